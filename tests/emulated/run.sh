#!/usr/bin/env bash
# Checks lib/sparse's C++ with AVX-512 on a machine without it: a Linux kernel boots in the emulator Bochs with
# check.cpp as its only process. Debian: apt install bochs bochs-term grub-pc-bin grub-common xorriso mtools cpio
#   bash tests/emulated/run.sh [FOLDER]     about five minutes; FOLDER: for what is built (default: a temporary one)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/build.sh"
folder=${1:-$(mktemp -d)}
mkdir -p "$folder" && cd "$folder"

avx512="-mavx512f -mavx512bw -mavx512vl -mavx512vbmi2 -mavx512vnni -mavx2 -mfma -mf16c -mpopcnt"
build avx2 -mavx2 -mbmi2 -mfma -mf16c -mpopcnt
# shellcheck disable=SC2086
build avx512 $avx512
# shellcheck disable=SC2086
build avx512bf16 $avx512 -mavx512bf16
# shellcheck disable=SC2086
build amx $avx512 -mamx-tile -mamx-bf16  # which Bochs does not have: it is checked on this machine, if that has it
g++ -O2 -std=c++17 -mfma -Wall -Wextra -static "$here/check.cpp" a*.o -o init
echo "on this machine:" && ./init

apt-get download -q "$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ {print $2; exit}')"
dpkg-deb -x linux-image-*.deb kernel
mkdir -p image/boot/grub root
cp init root/init
(cd root && echo init | cpio -o -H newc --quiet) > image/boot/initrd.img
cp kernel/boot/vmlinuz-* image/boot/vmlinuz
# Bochs 3.0 has neither AMX's state nor five levels of pages in system management mode.
options="console=ttyS0 mitigations=off nokaslr noapic no5lvl clearcpuid=amx_tile,amx_bf16,amx_int8 loglevel=3"
echo "set timeout=0
menuentry check { linux /boot/vmlinuz $options; initrd /boot/initrd.img; }" > image/boot/grub/grub.cfg
grub-mkrescue -o image.iso image > grub.log 2>&1
cat > bochs.rc << END
display_library: term
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
cpu: model=sapphire_rapids, ips=100000000
memory: guest=512, host=512
ata0-master: type=cdrom, path=image.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=serial.txt
log: /dev/null
panic: action=fatal
END
rm -f serial.txt
TERM=xterm timeout 1800 script -qec "bochs -q -f bochs.rc" /dev/null > /dev/null 2>&1 || true
echo "on Bochs's Sapphire Rapids:" && grep -a "FAIL\|done\|checks" serial.txt
grep -qa "failures: 0" serial.txt && grep -qa "avx512bf16: done" serial.txt
