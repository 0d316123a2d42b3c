"""Shared by all tests: the repository root on the import path and two threads for PyTorch, which sleep when idle."""

import multiprocessing
import os
import signal
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


@pytest.fixture(autouse=True, scope="module")
def no_workers_are_left():
    """Loaders that a test has not read to their end have workers, until they are collected as garbage: their end would
    be an error of PyTorch's in whatever test runs then."""
    yield
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's, which raises when a worker is killed
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    signal.signal(signal.SIGCHLD, handler)
