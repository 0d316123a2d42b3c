"""How parts of a model are compiled with torch.compile, and whether that works here."""

import functools

import torch

from util.layers.attention import flexible_attention

# Whole graphs, each for the shapes it was compiled with, which do not vary in training.
OPTIONS = dict(fullgraph=True, dynamic=False)
compile_part = functools.partial(torch.compile, **OPTIONS)
# The stages share one compiled function, which is specialised for each stage in training and in evaluation, and for a
# smaller last batch.
SPECIALISATIONS = 64


def allow_specialisations() -> None:
    torch._dynamo.config.recompile_limit = max(SPECIALISATIONS, torch._dynamo.config.recompile_limit)


def why_not_compiled(device: torch.device) -> str:
    """Why torch.compile does not work on `device`, as it says itself; '' where it does."""
    qkv = torch.ones(2, 1, 16, 3, 1, 16, device=device, requires_grad=True)
    bias = torch.zeros(1, 1, 16, 16, device=device, requires_grad=True)

    def loss(qkv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if device.type == "cuda":  # what training needs besides: generated attention, with gradients
            return flexible_attention(qkv, bias, group=None).square().mean()
        return torch.nn.functional.gelu(qkv @ bias).mean()

    try:
        compile_part(loss)(qkv, bias).backward()
    except Exception as error:  # whatever is missing: Triton, a C compiler, headers, ...
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
