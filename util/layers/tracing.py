"""Whether a model's operations are run as Python calls them, or recorded."""

import torch


def runs_eagerly() -> bool:
    """False while torch.compile, torch.export, torch.jit.trace, an ONNX exporter or torch.func records the operations.

    Code of our own autograd, shapes that depend on random draws, and recomputation in the backward pass are for
    eager execution only: a recorder rejects them, or silently records them wrongly.
    """
    transformed = torch._C._are_functorch_transforms_active()  # vmap, grad, jvp, ...
    return not (transformed or torch.compiler.is_compiling() or torch.jit.is_tracing())
