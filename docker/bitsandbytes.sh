#!/usr/bin/env bash
# bitsandbytes.sh PACKAGE-FOLDER: replace the published package's CUDA library by one built here.
# Under JetPack 6 the published one imports, but fails at the first 4-bit weight: it is built with
# the toolchain of Arm servers (SBSA), whose symbols don't match L4T's. Its sm_80 code would run.
set -euo pipefail

package=$1
case $BNB_SOURCE in
wheel) exit ;;
source) ;;
*)
    echo "BNB_SOURCE=$BNB_SOURCE is neither 'source' nor 'wheel'." >&2
    exit 1
    ;;
esac

bash "$(dirname "$0")/apt.sh" ca-certificates cmake g++ git make
git clone --quiet --depth 1 --branch "$BNB_VERSION" "$BNB_REPO" bitsandbytes

# nvcc takes up to 2 GB a process: with one process a core, a board of 8 GB runs out of memory.
jobs=$(($(awk '/^MemAvailable:/ { print $2 }' "${MEMINFO:-/proc/meminfo}") / 2000000))
cores=$(nproc)
jobs=$((jobs < 1 ? 1 : jobs > cores ? cores : jobs))
cmake -S bitsandbytes -B bitsandbytes/build -DCMAKE_BUILD_TYPE=Release \
    -DCOMPUTE_BACKEND=cuda "-DCOMPUTE_CAPABILITY=$CUDA_ARCH"
cmake --build bitsandbytes/build -j "$jobs"

built=(bitsandbytes/bitsandbytes/libbitsandbytes_cuda*.so)
if ! cuobjdump --list-elf "${built[0]}" | grep "sm_$CUDA_ARCH" >/dev/null; then
    echo "${built[0]} has no kernels for sm_$CUDA_ARCH." >&2
    exit 1
fi
rm -f "$package"/libbitsandbytes_cuda*.so
install -m 644 -s "${built[0]}" "$package/"
rm -rf bitsandbytes
