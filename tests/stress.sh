#!/bin/sh
# Test the promises of reliability at scale and print a table of the results; fails when one does not hold.
#     sh tests/stress.sh                          # all of them: 15 minutes on two idle cores; mounting needs root
#     sh tests/stress.sh --kills 5 --flips 20     # fewer trials
#     sh tests/stress.sh --only kills nan         # only these
#     sh tests/stress.sh --help
# PYTHON: the interpreter (default: that of .venv)
set -eu

root=$(cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
exec "$python" "$root/tests/stress.py" "$@"
