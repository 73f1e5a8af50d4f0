#!/usr/bin/env bash
# Run the image on this board, with the board's devices, groups and address.
#   docker/run.sh [webui]                  the page, for this board alone; HOST=0.0.0.0: the network
#   docker/run.sh serve [RUN …]            the API for clients; HOST=0.0.0.0, PORT as for the page
#   docker/run.sh train RECIPE …, chat …   any other jetson-ft command
#   docker/run.sh --env >docker/.env       print the same settings for docker/compose.yaml
# Variables: IMAGE (by default the one for this board's JetPack), HOST, PORT, HF_ENDPOINT, HF_TOKEN, DOCKER (e.g. podman).
set -euo pipefail
cd "$(dirname "$0")/.."

image=${IMAGE:-jetson-ft:$(docker/profile.sh)}
# An IPv6 address needs brackets before a port.
bracketed() {
    case $1 in
        "["*) echo "$1" ;;
        *:*) echo "[$1]" ;;
        *) echo "$1" ;;
    esac
}
host=$(bracketed "${HOST:-127.0.0.1}")
inside=7860 # the port in the container
[ "${1:-}" != serve ] || inside=8000
port=${PORT:-$inside}
root=${SYSTEM_ROOT:-} # tests set it in place of /

# If Docker created these folders they would belong to root, but the container runs as this user.
mkdir -p data runs
user=${SUDO_UID:-$(id -u)}:${SUDO_GID:-$(id -g)}
[ "$(id -u)" != 0 ] || chown "$user" data runs

# If the page listens on all addresses, its link shows the first one.
address=$host
if [ "$host" = 0.0.0.0 ] || [ "$host" = "[::]" ]; then
    read -r address _ < <(hostname -I 2>/dev/null || true) || true
fi
address=$(bracketed "${address:-127.0.0.1}")
reached_as=$address:$port

# Groups by number: the image has no such names. Without video and render, CUDA fails with 801.
gid() { getent group "$1" | cut -d: -f3; }

# Containers can't read the device tree; jetson_ft.hardware.detect also reads this copy.
model=
if [ -r "$root/proc/device-tree/model" ]; then
    model=$PWD/runs/.nv_jetson_model
    cp "$root/proc/device-tree/model" "$model"
fi
tegra_release=
[ ! -e "$root/etc/nv_tegra_release" ] || tegra_release=/etc/nv_tegra_release
jtop=
[ ! -S "$root/run/jtop.sock" ] || jtop=/run/jtop.sock

if [ "${1:-}" = --env ]; then
    echo "# Made by docker/run.sh --env for this board and user; read by docker/compose.yaml."
    echo "IMAGE=$image"
    echo "PUBLISH=$host"
    echo "PORT=$port"
    echo "REACHED_AS=$reached_as"
    echo "SERVE_PORT=${SERVE_PORT:-8000}"
    echo "SERVE_REACHED_AS=$address:${SERVE_PORT:-8000}"
    echo "RUN_AS=$user"
    echo "VIDEO_GID=$(gid video)"
    echo "RENDER_GID=$(gid render || gid video)"
    echo "JTOP_GID=$(gid jtop || gid video)"
    echo "NV_JETSON_MODEL=${model:-/dev/null}"
    echo "NV_TEGRA_RELEASE=${tegra_release:-/dev/null}"
    echo "JTOP_SOCK=${jtop:-/dev/null}"
    exit
fi

options=(--rm --stop-timeout 120 --shm-size 1g --user "$user")
options+=(--volume jetson-ft-cache:/cache)
options+=(--volume "$PWD/data:/srv/data" --volume "$PWD/runs:/srv/runs")
options+=(--env HF_TOKEN)
[ -z "${HF_ENDPOINT:-}" ] || options+=(--env HF_ENDPOINT)
[ ! -t 0 ] || options+=(--interactive --tty)

if [ -n "$tegra_release" ]; then
    options+=(--runtime nvidia --volume "$tegra_release:$tegra_release:ro")
else
    echo "This is no Jetson (/etc/nv_tegra_release is missing): the container has no GPU." >&2
fi
[ -z "$model" ] || options+=(--volume "$model:/tmp/nv_jetson_model:ro")
[ -z "$jtop" ] || options+=(--volume "$jtop:$jtop")
for group in video render jtop; do
    if number=$(gid "$group"); then options+=(--group-add "$number"); fi
done

case ${1:-webui} in
webui | serve)
    name=jetson-ft
    [ "${1:-}" != serve ] || name=jetson-ft-serve
    options+=(--name "$name" --publish "$host:$port:$inside")
    options+=(--env "JETSON_FT_REACHED_AS=$reached_as")
    ;;
*) options+=(--no-healthcheck) ;; # it requests the page or the API
esac
exec "${DOCKER:-docker}" run "${options[@]}" "$image" "$@"
