"""`pip install .`: the models and `util`, for use outside a checkout; the mains stay in the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the tracked files, so that building leaves nothing behind in the real checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("which files are tracked is known only in a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    copy = tmp_path_factory.mktemp("checkout")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # not one that was deleted a moment ago
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def installed(checkout, tmp_path_factory) -> Path:
    """The folder that the wheel is installed in."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "--no-cache-dir", "install"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    command = [*pip, *offline, "--no-compile", "--target", target, checkout]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return target


def run_elsewhere(code: str, installed: Path, folder: Path) -> str:
    """The output of `code` in a fresh process that starts in `folder` and finds the project in `installed` alone."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheel_holds_the_models_and_util_alone(checkout, installed):
    expected = {"models_swin.py", "models_mixmae.py"}
    expected |= {str(path.relative_to(checkout)) for path in (checkout / "util").rglob("*.py")}
    assert {str(path.relative_to(installed)) for path in installed.rglob("*.py")} == expected


def test_the_wheel_requires_what_requirements_txt_lists(checkout, installed):
    [metadata] = installed.glob("mixmae-*.dist-info/METADATA")
    lines = metadata.read_text().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    listed = [line.strip() for line in (checkout / "requirements.txt").read_text().splitlines()]
    listed = [line for line in listed if line and not line.startswith("#")]
    assert [line for line in required if "extra ==" not in line] == listed
    assert "torch" in "".join(listed)


FEATURES = """
import timm
import torch

import models_mixmae
import models_swin
from util.weights.layouts import load_encoder

assert callable(load_encoder)
encoder = timm.create_model("swin_quickstart", num_classes=0)
print(models_swin.__file__, models_mixmae.__file__, *encoder(torch.randn(2, 3, 32, 32)).shape)
"""


@pytest.mark.slow
def test_the_wheel_gives_features(installed, tmp_path):
    *files, batch, channels = run_elsewhere(FEATURES, installed, tmp_path).split()
    assert files == [str(installed / "models_swin.py"), str(installed / "models_mixmae.py")]
    assert (int(batch), int(channels)) == (2, 128)  # the last stage of embed_dim 16


EVERY_MODULE = """
import importlib
import pkgutil

import util

for module in pkgutil.walk_packages(util.__path__, "util."):
    importlib.import_module(module.name)
    print(module.name)
"""


def test_every_module_of_the_wheel_can_be_imported(installed, tmp_path):
    imported = run_elsewhere(EVERY_MODULE, installed, tmp_path).split()
    assert {"util.data.datasets", "util.layers.attention", "util.run.config", "util.weights.file"} <= set(imported)
