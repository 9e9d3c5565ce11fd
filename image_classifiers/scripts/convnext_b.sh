#!/usr/bin/env bash
# convnext_base at sparsities of 0.4 to 0.8.   use: bash image_classifiers/scripts/convnext_b.sh IMAGENET [OUT [SPARSITY ...]]
exec bash "$(dirname "$0")/prune.sh" convnext_base "$@"
