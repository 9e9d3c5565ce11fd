#!/usr/bin/env bash
# Run the whole test suite in its own environment; what follows is passed on to pytest.
source "$(dirname "$0")/env.sh"
need requirements.txt
need scripts/requirements-data.txt --no-deps
need tests/requirements.txt
# A process per core, each with one thread; the tests of a file stay together, since they share what is slow to make, and
# files are not sorted by their number of tests: the few that take longest would be left to one core at the end.
export OMP_NUM_THREADS=1
# Tests that ask for more threads compete with the other processes: threads that spin while they wait for each other take
# the cores from those they wait for, and such a test then takes ten times as long.
export OMP_WAIT_POLICY=passive
exec "$PYTHON_BIN" -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
