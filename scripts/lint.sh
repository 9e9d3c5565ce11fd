#!/usr/bin/env bash
# Check style (ruff) and the import order of modules (import-linter); the rules are in pyproject.toml.
source "$(dirname "$0")/env.sh"
need requirements.txt
need tests/requirements.txt
"$PYTHON_BIN" -m ruff check .
"$PYTHON_BIN" -c "from importlinter.cli import lint_imports_command; lint_imports_command()"
