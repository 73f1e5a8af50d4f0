#!/usr/bin/env bash
# profile.sh: print the image's profile for this board, jp6 or jp7; for other machines jp6.
set -euo pipefail

release=${SYSTEM_ROOT:-}/etc/nv_tegra_release # tests set SYSTEM_ROOT
l4t=
[ ! -r "$release" ] || l4t=$(sed -nE 's/.*R([0-9]+) \(release\).*/\1/p' "$release" | head -n 1)
case $l4t in
36 | '') echo jp6 ;;
39) echo jp7 ;;
*)
    what="L4T r$l4t is not supported."
    [ "$l4t" != 38 ] || what="L4T r38 (JetPack 7.0 and 7.1) is for Jetson Thor only."
    echo "$what The images are for JetPack 6 (L4T r36) and JetPack 7.2 (L4T r39)." >&2
    echo "  fix:   update the board, or choose an image: PROFILE=jp6 or PROFILE=jp7 for make," >&2
    echo "         IMAGE=jetson-ft:jp7 for docker/run.sh." >&2
    exit 1
    ;;
esac
