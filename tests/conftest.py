"""Shared by all tests: the repository root on the import path and two threads for PyTorch, which sleep when idle."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported; spinning starves busy machines
os.environ.setdefault("OMP_NUM_THREADS", "2")  # runs leave the number alone then

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def coco(tmp_path_factory) -> Path:
    """A folder in COCO's format, which tests leave as it is."""
    from coco_folder import make_coco

    return make_coco(tmp_path_factory.mktemp("coco") / "data")
