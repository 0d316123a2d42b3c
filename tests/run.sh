#!/bin/sh
# Run all tests, after creating .venv if it is missing or out of date; arguments are passed to pytest.
#     sh tests/run.sh [-x] [-k NAME] [tests/test_...py]
# MIXMAE_REQUIRE_SLURM=1 lets tests fail instead of skip where Slurm, root, shellcheck or dash is missing.
set -eu

root=$(cd -- "$(dirname -- "$0")/.." && pwd)
sh "$root/exp/setup.sh" pytest ruff 'setuptools>=77'
cd -- "$root"
exec .venv/bin/python -m pytest "$@"
