#!/usr/bin/env bash
# Train a small ViT and a small ConvNeXt on scikit-learn's digits, prune them in six ways, print and plot accuracies.
source "$(dirname "$0")/env.sh"
need requirements.txt
exec "$PYTHON_BIN" scripts/image_demo.py "$@"
