"""What to do when a GPU's memory is full: how many images would fit."""

import traceback

import torch
from torch import nn

from util.run.config import TrainingConfig
from util.run.optim import autocast
from util.run.state import TrainingState

SPARE = 0.06  # of a GPU's memory: fragments, and what is not PyTorch's
FEW, MORE = 1, 4  # mixtures (or pairs) of images in the steps that are measured


def explain_out_of_memory(error: torch.OutOfMemoryError, state: TrainingState, config: TrainingConfig) -> str:
    """A message with the batch that would fit, measured by steps of a few images; frees what the failed step holds."""
    traceback.clear_frames(error.__traceback__)  # each frame holds its tensors
    model = state.model
    device = next(model.parameters()).device
    total = torch.cuda.get_device_properties(device).total_memory
    message = f"the GPU's memory ({total / 2**30:.0f} GiB) is too small for --batch_size {config.batch_size}"
    options = "" if config.grad_checkpointing else ", or --grad_checkpointing, which recomputes blocks"
    if not hasattr(model, "img_size"):  # it takes images of several sizes
        return f"{message}: use a smaller one (and a larger --accum_iter), smaller images{options}"
    message += f" at {config.input_size[0]}x{config.input_size[1]}"
    try:
        fitting = images_that_fit(model, config.precision, total, has_moments=bool(state.optimizer.state))
    except torch.OutOfMemoryError:
        return f"{message}, and even for a few images: use a smaller --input_size or --model{options}"
    except Exception as failure:  # the message must not be lost because improving it failed
        return f"{message} (how many images fit could not be measured: {failure}). Use a smaller --batch_size{options}"
    if fitting >= config.batch_size:
        return f"{message} at times: is another program using it? Use a smaller --batch_size{options}"
    accum_iter = -(-config.batch_size * config.accum_iter // fitting)
    return (
        f"{message}: about {fitting} images would fit (measured without compiling, which needs a little less). Use "
        f"--batch_size {fitting} --accum_iter {accum_iter} for about as many images a step{options}"
    )


def images_that_fit(model: nn.Module, precision: str, total: int, has_moments: bool) -> int:
    """Number of images whose training step takes `total` bytes at most: of whole mixtures (or pairs), at least one.

    Args:
        model: the one in training, not wrapped.
        precision: of the steps.
        total: bytes.
        has_moments: whether the optimizer has made its two moments yet.

    Raises:
        torch.OutOfMemoryError: not even the measured steps fit.
    """
    together = getattr(model, "mix_images", 2)
    few, more = (peak_of_step(model, precision, mixtures * together) for mixtures in (FEW, MORE))
    per_mixture = max(1, (more - few) // (MORE - FEW))
    moments = 0 if has_moments else 2 * sum(p.numel() * p.element_size() for p in trained_parameters(model))
    fixed = few - FEW * per_mixture + moments
    return max(1, int((total * (1 - SPARE) - fixed) / per_mixture)) * together


def peak_of_step(model: nn.Module, precision: str, images: int) -> int:
    """Peak bytes of a step's forward and backward pass, including the model; nothing is compiled for it."""
    device = next(model.parameters()).device
    model.zero_grad()
    torch.cuda.empty_cache()
    trained = trained_parameters(model)
    torch.cuda.reset_peak_memory_stats(device)
    imgs = torch.zeros(images, model.in_chans, *model.img_size, device=device)
    with torch.compiler.set_stance("force_eager"), autocast(precision, device):
        output = model(imgs)
        loss = output[0] if isinstance(output, tuple) else output.float().square().mean()
    # Not `backward`, at which DistributedDataParallel would average the gradients of all ranks.
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    del gradients
    return torch.cuda.max_memory_allocated(device)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
