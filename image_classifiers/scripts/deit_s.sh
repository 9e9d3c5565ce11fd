#!/usr/bin/env bash
# deit_small_patch16_224 at sparsities of 0.4 to 0.8.   use: bash image_classifiers/scripts/deit_s.sh IMAGENET [OUT [SPARSITY ...]]
exec bash "$(dirname "$0")/prune.sh" deit_small_patch16_224 "$@"
