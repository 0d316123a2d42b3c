"""How parts of a model are compiled with torch.compile, and whether that works here."""

import functools
from collections.abc import Callable

import torch

from util.layers.attention import flexible_attention

# Whole graphs, each for the shapes it was compiled with, which do not vary in training.
OPTIONS = dict(fullgraph=True, dynamic=False)
# All stages share one compiled function, which is specialised for each stage in training and in evaluation, and for a
# smaller last batch.
SPECIALISATIONS = 64


@functools.cache
def compiled(function: Callable) -> Callable:
    """The compiled form of a plain function, such as a method of a class: a copied model then computes with its own."""
    return torch.compile(function, **OPTIONS)


def prepare_compiling() -> None:
    """Settings of the compiler: room for all specialisations, PyTorch's own random numbers, and whole graphs under
    DistributedDataParallel, too.

    Random numbers that generated code would draw depend on how the code was divided, and a step could not be replayed.
    Graphs divided at the buckets of gradients cannot hold FlexAttention in some versions (pytorch/pytorch#137481);
    those of whole stages are reduced one after another, which still overlaps with the backward pass.
    """
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = max(SPECIALISATIONS, torch._dynamo.config.recompile_limit)
    torch._inductor.config.fallback_random = True


def why_not_compiled(device: torch.device, dtype: torch.dtype) -> str:
    """Why torch.compile does not work on `device`, as it says itself; '' where it does.

    On a GPU this tries attention of two sizes, for which PyTorch generates different kernels, with gradients.
    """

    def loss(qkv: torch.Tensor, bias: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        if device.type == "cuda":
            return flexible_attention(qkv, bias, group).float().square().mean()
        return torch.nn.functional.gelu(qkv @ bias[0, 0, :32, :32]).float().mean()

    try:
        for tokens in (196, 96):
            qkv = torch.ones(2, 1, tokens, 3, 1, 32, device=device, dtype=dtype, requires_grad=True)
            bias = torch.zeros(1, 1, tokens, tokens, device=device, requires_grad=True)
            group = torch.arange(tokens, device=device, dtype=torch.int32)[None] % 2
            compiled(loss)(qkv, bias.to(dtype) if device.type == "cpu" else bias, group).backward()
    except Exception as error:  # whatever is missing: Triton, a C compiler, headers, shared memory, ...
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
