"""How parts of a model are compiled with torch.compile, and whether that works here."""

import contextlib
import copy
import functools
from collections.abc import Callable

import torch

from util.layers.stage import Block, Stage
from util.layers.windows import upsample

# Whole graphs, each for the shapes it was compiled with, which do not vary in training.
OPTIONS = dict(fullgraph=True, dynamic=False)
# All stages share one compiled function, which is specialised for each stage, in training and in evaluation.
SPECIALISATIONS = 64
LARGEST_DIFFERENCE = 0.1  # of gradients and outputs, norm over norm; in bfloat16 a few percent are usual


@functools.cache
def compiled(function: Callable) -> Callable:
    """The compiled form of a plain function, such as a method of a class: a copied model then computes with its own."""
    return torch.compile(function, **OPTIONS)


def eager_if(condition: bool) -> contextlib.AbstractContextManager:
    """Context in which compiled modules run eagerly, if `condition`: for shapes that are rare."""
    return torch.compiler.set_stance("force_eager") if condition else contextlib.nullcontext()


def prepare_compiling() -> None:
    """Settings of the compiler: room for all specialisations, PyTorch's own random numbers, and whole graphs under
    DistributedDataParallel, too.

    Random numbers that generated code would draw depend on how the code was divided, and a step could not be replayed.
    Graphs divided at the buckets of gradients cannot hold FlexAttention in some versions (pytorch/pytorch#137481);
    those of whole stages are reduced one after another, which still overlaps with the backward pass.
    """
    torch._dynamo.config.optimize_ddp = False
    if hasattr(torch._dynamo.config, "recompile_limit"):
        torch._dynamo.config.recompile_limit = max(SPECIALISATIONS, torch._dynamo.config.recompile_limit)
    else:  # PyTorch 2.6
        torch._dynamo.config.cache_size_limit = max(SPECIALISATIONS, torch._dynamo.config.cache_size_limit)
    torch._inductor.config.fallback_random = True


def why_not_compiled(device: torch.device, dtype: torch.dtype) -> str:
    """Why torch.compile does not work on `device`, in its own words; '' if it does.

    Tried are training steps and evaluations of small stages in `dtype`, with the layouts of pretraining: on a GPU four
    masked windows of as many tokens as those of the published models, and everywhere a single one whose tokens are
    sorted. (Without a backward pass, as in evaluation and when blocks are recomputed, other code is generated.)
    """
    prepare_compiling()
    window, scales = (14, (4, 2)) if device.type == "cuda" else (4, (2,))  # scale: tokens on a side of a cell
    cells = torch.arange((window // 2) ** 2).view(window // 2, -1) % 2  # the groups
    try:
        for scale in scales:
            grid = (window // 2 * scale,) * 2
            stage = Stage([Block(64, 2, window)], grid, window, None).to(device)
            layout = stage.layout(grid, upsample(cells, scale), one_shape=True, sizes_vary=False)
            x = torch.randn(2, *grid, 64, device=device)
            found = []
            for module in (copy.deepcopy(stage), stage):
                if module is stage:
                    stage.compile(**OPTIONS)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    module(x, layout).float().square().sum().backward()  # large enough for float16
                    with torch.inference_mode():
                        outputs = module(x, layout).float()
                if lost := [name for name, parameter in module.named_parameters() if parameter.grad is None]:
                    return f"no gradients of {', '.join(lost)}"
                found.append((torch.cat([parameter.grad.flatten() for parameter in module.parameters()]), outputs))
            for what, expected, ours in zip(("gradients", "outputs"), *found):
                difference = ((ours - expected).norm() / expected.norm()).item()
                if not difference < LARGEST_DIFFERENCE:
                    return f"{what} of compiled layers differ from those of others by {difference:.1%}"
    except Exception as error:  # whatever is missing: Triton, a C compiler, headers, shared memory, ...
        lines = (str(error).strip() or type(error).__name__).splitlines()
        return next((line for line in lines if not line.endswith(" raised:")), lines[0])  # "backend='inductor' raised:"
    return ""
