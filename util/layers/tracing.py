"""Whether a model's operations are run as Python calls them, or recorded."""

import torch


def runs_eagerly() -> bool:
    """False while torch.compile, torch.export, torch.jit.trace, an ONNX exporter or torch.func records the operations.

    Code of our own autograd, shapes that depend on random draws, and recomputation in the backward pass are for
    eager execution only: a recorder rejects them, or silently records them wrongly.
    """
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed())


def is_compiled_here() -> bool:
    """True while torch.compile takes the operations for this machine: not for an export, nor those of torch.func."""
    # Not `is_exporting()`, which PyTorch 2.11 takes for true whenever it compiles.
    exporting = getattr(torch.compiler, "_is_exporting_flag", False)
    return torch.compiler.is_dynamo_compiling() and not (exporting or is_transformed())


def is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active()  # vmap, grad, jvp, ...
