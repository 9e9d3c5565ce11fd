#!/usr/bin/env bash
# vit_base_patch16_224 at sparsities of 0.4 to 0.8.   use: bash image_classifiers/scripts/vit_b.sh IMAGENET [OUT [SPARSITY ...]]
exec bash "$(dirname "$0")/prune.sh" vit_base_patch16_224 "$@"
