#!/usr/bin/env bash
# apt.sh PACKAGE…: install packages, from APT_MIRROR if it is set, and delete apt's lists and logs.
set -euo pipefail

if [ -n "${APT_MIRROR:-}" ]; then
    known='(ports\.ubuntu\.com/ubuntu-ports|(archive|security)\.ubuntu\.com/ubuntu|deb\.debian\.org/debian)'
    find /etc/apt/sources.list /etc/apt/sources.list.d -type f \
        -exec sed -i -E "s#https?://$known/?( |\$)#${APT_MIRROR%/} #" {} +
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log
