#!/usr/bin/env bash
# Prune one of the paper's models at sparsities of 0.4 to 0.8 with magnitude and Wanda, each uniform and by alpha.
# Needs ImageNet (train/ and val/, a folder per class) and weights/ from download_weights.sh.
# use: bash image_classifiers/scripts/prune.sh MODEL IMAGENET [OUT [SPARSITY ...]]
set -euo pipefail

fail() { echo "prune.sh: error: $1" >&2; exit 2; }
[ $# -ge 2 ] || fail "give a model and the folder of ImageNet: prune.sh deit_small_patch16_224 IMAGENET [OUT [SPARSITY ...]]"
MODEL="$1"; IMAGENET="$2"; OUT="${3:-results/$1}"
SPARSITIES=("${@:4}")
[ ${#SPARSITIES[@]} -gt 0 ] || SPARSITIES=(0.4 0.5 0.6 0.7 0.8)
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
WEIGHTS="$HERE/weights/$MODEL.pth"
[ -f "$WEIGHTS" ] || fail "$WEIGHTS not found; run: bash image_classifiers/download_weights.sh"
PYTHON_BIN="${PYTHON:-$HERE/../.venv/bin/python}"
[ -x "$PYTHON_BIN" ] || PYTHON_BIN=python3
MEAN=true
case "$MODEL" in vit_*) MEAN=false ;; esac  # jx_vit was trained on images normalised by 0.5

for METHOD in magnitude magnitude_ww wanda wanda_ww; do
    for SPARSITY in "${SPARSITIES[@]}"; do
        "$PYTHON_BIN" "$HERE/main.py" --model "$MODEL" --data_path "$IMAGENET" --resume "$WEIGHTS" \
            --prune_metric "$METHOD" --sparsity "$SPARSITY" --save_dir "$OUT/$METHOD" \
            --WW_metric alpha_mid --epsilon 0.2 --imagenet_default_mean_and_std "$MEAN"
    done
done
