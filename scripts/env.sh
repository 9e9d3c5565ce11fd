# Sourced by the other scripts: creates .venv at the repository's root if it does not exist, installs into it what was not
# installed yet, and leaves its interpreter in $PYTHON_BIN. Given PYTHON_BIN, it uses that as it is.
#   use: source scripts/env.sh; need requirements.txt ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -n "${PYTHON_BIN:-}" ]; then  # another environment: used as it is
    need() { :; }
    return
fi

fail() { echo "$(basename "$0"): error: $1" >&2; exit 2; }

if [ ! -x .venv/bin/python ]; then
    base="${PYTHON:-python3}"
    command -v "$base" >/dev/null || fail "$base not found; install Python 3.10 or newer, or set PYTHON=/path/to/python3"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$base is $("$base" --version 2>&1); 3.10 or newer is needed, set PYTHON=/path/to/python3"
    echo "creating .venv with $("$base" --version)"
    "$base" -m venv .venv || { rm -rf .venv; fail "$base -m venv failed (on Debian: apt-get install python3-venv)"; }
fi
PYTHON_BIN="$PWD/.venv/bin/python"

# need FILE [pip options]: install a requirements file, unless this very file was installed before.
need() {
    local file="$1"; shift
    local stamp=".venv/installed-${file//\//-}"
    cmp -s "$file" "$stamp" && return
    echo "installing $file (the first time takes minutes)"
    "$PYTHON_BIN" -m pip install --quiet --disable-pip-version-check "$@" -r "$file" || fail "pip could not install $file"
    cp "$file" "$stamp"
}
