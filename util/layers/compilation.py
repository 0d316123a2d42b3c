"""How parts of a model are compiled with torch.compile, and whether that works here."""

import functools

import torch

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

    def train(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x @ x).sum()

    try:
        compile_part(train)(torch.ones(16, 16, device=device, requires_grad=True)).backward()
    except Exception as error:  # whatever is missing: Triton, a C compiler, headers, ...
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
