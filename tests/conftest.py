"""Shared by all tests: the repository root on the import path and two threads for PyTorch."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(2)
