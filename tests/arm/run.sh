#!/bin/sh
# The kernels' self-test built for 64-bit ARM and run under emulation, once per instruction set: it
# must print what the host's portable build prints, bit for bit.
# Needs Debian's g++-aarch64-linux-gnu and qemu-user.
set -eu
cd "$(dirname "$0")/../.."
out=${TMPDIR:-/tmp}/covey-arm.$$
mkdir "$out"
trap 'rm -r "$out"' EXIT

build() {  # compiler, output, flags
    compiler=$1 output=$2
    shift 2
    "$compiler" -std=c++17 -O1 -ffp-contract=off -fno-math-errno -pthread -Wall -Wextra -Wno-psabi \
        -Wno-maybe-uninitialized "$@" -Inode/kernels/src node/kernels/src/*.cpp \
        tests/numeric/node/kernels/selftest.cpp -o "$out/$output"
}

build g++ host
"$out/host" >"$out/expected"
run() {  # name, architecture, a CPU that has no more than that
    build aarch64-linux-gnu-g++ "$1" -static -march="$2"
    qemu-aarch64 -cpu "$3" "$out/$1" >"$out/actual"
    diff "$out/expected" "$out/actual"
    echo "$1: the $(wc -l <"$out/expected") lines of the portable build"
}

run neon armv8-a cortex-a72
run neon_dotprod armv8.2-a+dotprod neoverse-n1
run neon_i8mm armv8.2-a+dotprod+i8mm max
