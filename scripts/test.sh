#!/usr/bin/env bash
# Run the whole test suite in its own environment; what follows is passed on to pytest.
source "$(dirname "$0")/env.sh"
need requirements.txt
need scripts/requirements-data.txt --no-deps
need scripts/requirements-images.txt
need tests/requirements.txt
exec "$PYTHON_BIN" -m pytest "$@"
