"""`--deterministic`: the same bits in every run on the same GPU, as far as PyTorch can.

An operation without a deterministic version in PyTorch ends the run, with one line that names it. PyTorch could also
warn and go on (`warn_only=True`), but then fused attention, which has such a version, would not use it.
"""

import logging
import os

import torch

from util.errors import UserError

logger = logging.getLogger(__name__)

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS promises the same bits; the second is slower and smaller
NO_VERSION = " does not have a deterministic implementation"  # after the name of a kernel, in PyTorch's errors


class NondeterminismError(UserError):
    """An operation has no deterministic version."""


def set_up_determinism(deterministic: bool, device: torch.device) -> None:
    """Let PyTorch choose only deterministic operations, or whichever are fast; call it before the first one on a GPU.

    Raises:
        UserError: cuBLAS was told to work in a way that is not deterministic.
    """
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    if not deterministic:
        return
    if device.type == "cpu":
        logger.info("--deterministic: on a CPU the main scripts' runs are bit-identical without it, too")
        return
    # Read when cuBLAS is first used, in this process: its streams get workspaces of their own.
    if os.environ.setdefault(WORKSPACE, WORKSPACES[0]) not in WORKSPACES:
        raise UserError(
            f"--deterministic needs {WORKSPACE} to be {' or '.join(WORKSPACES)}, got {os.environ[WORKSPACE]!r}: unset "
            "it, and it is set here"
        )
    logger.info(
        "--deterministic: the same bits on as many GPUs of the same model with the same versions, but slower; "
        "nothing is compiled"
    )


def explain_nondeterminism(error: Exception) -> NondeterminismError | None:
    """Which operation PyTorch has refused; None for other errors."""
    before, refused, _ = str(error).partition(NO_VERSION)
    if not refused:
        return None
    return NondeterminismError(
        f"--deterministic: PyTorch {torch.__version__} has no deterministic version of {before.split()[-1]} on this "
        "device: leave the flag out"
    )
