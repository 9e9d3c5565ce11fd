#!/usr/bin/env bash
# deit_base_patch16_224 at sparsities of 0.4 to 0.8.   use: bash image_classifiers/scripts/deit_b.sh IMAGENET [OUT [SPARSITY ...]]
exec bash "$(dirname "$0")/prune.sh" deit_base_patch16_224 "$@"
