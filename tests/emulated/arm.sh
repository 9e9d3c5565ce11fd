#!/usr/bin/env bash
# Checks lib/sparse's C++ for ARM on another machine: check.cpp, built by a cross compiler, runs in the emulator QEMU.
# Debian: apt install g++-aarch64-linux-gnu qemu-user
#   bash tests/emulated/arm.sh [FOLDER]     about a minute; FOLDER: for what is built (default: a temporary one)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/build.sh"
folder=${1:-$(mktemp -d)}
mkdir -p "$folder" && cd "$folder"

CXX=aarch64-linux-gnu-g++ build neon
aarch64-linux-gnu-g++ -O2 -std=c++17 -Wall -Wextra -static "$here/check.cpp" neon-*.o -o check
qemu-aarch64 ./check
