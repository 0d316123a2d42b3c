#!/bin/sh
# Run all tests, after creating .venv if it is missing or out of date; arguments are passed to pytest.
#     sh tests/run.sh [-x] [-k NAME] [tests/test_...py]
# Two processes share the files of tests; with -n 0 there is one alone, which is what a debugger needs.
# Tests marked as slow are left out; -m '' runs them too. Tests with other people's tools are skipped unless these are
# installed, as MIXMAE_TEST_EXTRAS="onnx onnxruntime onnxscript segmentation-models-pytorch transformers tifffile
# pillow-heif pydicom pycocotools" does.
# MIXMAE_REQUIRE_SLURM=1 lets tests fail instead of skip where Slurm, root, shellcheck or dash is missing.
set -eu

root=$(cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck disable=SC2086 # several packages
sh "$root/exp/setup.sh" pytest pytest-xdist ruff 'setuptools>=77' ${MIXMAE_TEST_EXTRAS-}
cd -- "$root"
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
