#!/usr/bin/env bash
# Runs the image on this board, with what a container can't see by itself.
#   docker/run.sh [webui]                  the page, for this board alone; HOST=0.0.0.0: the network
#   docker/run.sh train RECIPE …, chat …   any other jetson-ft command
#   docker/run.sh --env >docker/.env       the same findings, for docker/compose.yaml
# Asks for IMAGE, HOST, PORT, HF_ENDPOINT, HF_TOKEN and DOCKER (podman) in the environment.
set -euo pipefail
cd "$(dirname "$0")/.."

image=${IMAGE:-jetson-ft:jp6}
host=${HOST:-127.0.0.1}
port=${PORT:-7860}
root=${SYSTEM_ROOT:-} # the tests' stand-in for /

# Made here: Docker would make them root's, and the container runs as you.
mkdir -p data runs
user=${SUDO_UID:-$(id -u)}:${SUDO_GID:-$(id -g)}
[ "$(id -u)" != 0 ] || chown "$user" data runs

# In the link, every address stands for the one that others in the network reach.
address=$host
if [ "$host" = 0.0.0.0 ]; then
    read -r address _ < <(hostname -I 2>/dev/null || true) || true
fi
reached_as=${address:-127.0.0.1}:$port

# By number: the image has no such groups. Without video and render, CUDA fails with error 801.
gid() { getent group "$1" | cut -d: -f3; }

# The device tree is masked in containers; jetson_ft.device.probe looks for this copy too.
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
    echo "# Made by docker/run.sh --env: this board and this user, for docker/compose.yaml."
    echo "IMAGE=$image"
    echo "PUBLISH=$host"
    echo "PORT=$port"
    echo "REACHED_AS=$reached_as"
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
    echo "No Jetson here (/etc/nv_tegra_release is missing): without a GPU." >&2
fi
[ -z "$model" ] || options+=(--volume "$model:/tmp/nv_jetson_model:ro")
[ -z "$jtop" ] || options+=(--volume "$jtop:$jtop")
for group in video render jtop; do
    if number=$(gid "$group"); then options+=(--group-add "$number"); fi
done

if [ "${1:-webui}" = webui ]; then
    options+=(--name jetson-ft --publish "$host:$port:7860" --env "JETSON_FT_REACHED_AS=$reached_as")
else
    options+=(--no-healthcheck) # it asks for the page
fi
exec "${DOCKER:-docker}" run "${options[@]}" "$image" "$@"
