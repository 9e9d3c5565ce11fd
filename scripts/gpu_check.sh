#!/usr/bin/env bash
# On a machine with a CUDA GPU: run the tests that need one, then time every method on random blocks of LLaMA-7B's
# shapes and print a Markdown table. Downloads no model. What follows is passed on to scripts/bench/bench.py. Without a
# GPU the exit status is 2.
source "$(dirname "$0")/env.sh"
need requirements.txt
if ! "$PYTHON_BIN" -c 'import sys; from lib.core import cpu; sys.exit(not cpu.gpus())'; then
    echo "gpu_check.sh: error: no CUDA device here, nothing was checked" >&2
    exit 2
fi
need scripts/requirements-data.txt --no-deps
need tests/requirements.txt
failed=0
"$PYTHON_BIN" -m pytest -m gpu tests || failed=1
"$PYTHON_BIN" scripts/bench/bench.py --device cuda "$@" || failed=1
exit "$failed"
