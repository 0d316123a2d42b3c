#!/bin/sh
# Make the environment if it is missing and run all tests; arguments go to pytest.
#     sh tests/run.sh [-x] [-k NAME] [tests/test_...py]
# MIXMAE_REQUIRE_SLURM=1 makes tests fail, not skip, where Slurm, root or shellcheck is missing.
set -eu

root=$(cd -- "$(dirname -- "$0")/.." && pwd)
sh "$root/exp/setup.sh" pytest ruff
cd -- "$root"
exec .venv/bin/python -m pytest "$@"
