#!/usr/bin/env bash
# Fetch the weight files of the paper's five models from where their authors keep them, into image_classifiers/weights
# or the folder that is given. Existing files are left alone.   use: download_weights.sh [FOLDER [NAME ...]]
set -euo pipefail

FOLDER="${1:-$(dirname "${BASH_SOURCE[0]}")/weights}"
[ $# -gt 0 ] && shift
META=https://dl.fbaipublicfiles.com
TIMM=https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-vitjx

# name, address, and the first digits of the SHA-256 that the authors put into the file's name, if they did
FILES="
convnext_base $META/convnext/convnext_base_1k_224_ema.pth -
deit_small_patch16_224 $META/deit/deit_small_patch16_224-cd65a155.pth cd65a155
deit_base_patch16_224 $META/deit/deit_base_patch16_224-b5f2ef4d.pth b5f2ef4d
vit_base_patch16_224 $TIMM/jx_vit_base_p16_224-80ecf9dd.pth 80ecf9dd
vit_large_patch16_224 $TIMM/jx_vit_large_p16_224-4ee7a4dc.pth 4ee7a4dc
"

fail() { echo "download_weights.sh: error: $1" >&2; exit 2; }
command -v curl >/dev/null || fail "curl not found; install it"
known="$(awk 'NF {print $1}' <<<"$FILES")"
for name in "$@"; do
    grep -qx -- "$name" <<<"$known" || fail "$name: invalid name; choose from: $(tr '\n' ' ' <<<"$known")"
done
mkdir -p "$FOLDER" || fail "$FOLDER: cannot be written"
while read -r name url sha; do
    [ -n "$name" ] || continue
    [ $# -eq 0 ] || [[ " $* " == *" $name "* ]] || continue
    file="$FOLDER/$name.pth"
    if [ -f "$file" ]; then echo "$file already exists"; continue; fi
    echo "fetching $url"
    curl --fail --location --retry 3 --continue-at - --output "$file.part" "$url" || fail "$url: cannot be fetched"
    if [ "$sha" != - ] && [[ "$(sha256sum "$file.part")" != "$sha"* ]]; then
        rm "$file.part"
        fail "$url: the download is not the published file; try again"
    fi
    mv "$file.part" "$file"
done <<<"$FILES"
