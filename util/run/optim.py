"""The optimizer step: parameter groups, learning rate, numeric precision, clipping."""

import contextlib
import logging
import math
import socket
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.optim import Optimizer

from models_swin import SwinTransformer
from util.errors import UserError
from util.layers.compilation import why_not_compiled
from util.run import distributed

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# --- Parameter groups ---


def layer_ids(model: SwinTransformer) -> dict[str, int]:
    """Layer id of every trainable parameter: 0 for the embedding, 1..N for the blocks.

    Two oddities are the published recipe's, and its numbers depend on them: a stage's patch merging has the id of the
    next stage's first block, and the final norm and the head share the last block's id, so that the head trains at
    `decay ** 1` instead of the full rate.
    """
    ids = group_parameters(model, model.group_matcher(), reverse=True)
    return {name: ids[name] for name, parameter in model.named_parameters() if parameter.requires_grad}


def param_groups_layer_decay(
    encoder: SwinTransformer, weight_decay: float, layer_decay: float, model: nn.Module | None = None
) -> list[dict]:
    """Parameter groups with `lr_scale = layer_decay ** (N + 1 - id)`, and no weight decay for vectors and biases.

    Args:
        encoder: the classifier or encoder; frozen parameters are left out.
        weight_decay: for tensors of two or more dimensions that are not a bias.
        layer_decay: factor from one layer to the one below; 1 for the same rate everywhere.
        model: the one that the encoder is part of, if any; its other parts train at the full rate.
    """
    above = sum(len(stage.blocks) for stage in encoder.layers) + 1
    ids = {encoder.get_parameter(name): layer_id for name, layer_id in layer_ids(encoder).items()}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in (model or encoder).named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias")
            groups.setdefault((ids.get(parameter, above), decays), []).append(parameter)
    return [
        {
            "name": f"layer {layer_id}, {'weight decay' if decays else 'no weight decay'}",
            "params": parameters,
            "lr_scale": layer_decay ** (above - layer_id),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (layer_id, decays), parameters in groups.items()
    ]


# --- Learning rate ---


def learning_rate(epoch: float, config: Any) -> float:
    """The rate at a fractional epoch (MixMAE, section 4.1): linear warm-up, then half a cosine.

    It is 0 at the start, `lr` after `warmup_epochs`, `min_lr` at `epochs`. Where the configuration has `lr_steps`, the
    rate is divided by 10 at each of these epochs instead.
    """
    if epoch < config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    if steps := getattr(config, "lr_steps", ()):
        return config.lr * 0.1 ** sum(epoch >= step for step in steps)
    progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def last_learning_rate(epoch: int, steps_per_epoch: int, config: Any) -> float:
    """The rate of an epoch's last step."""
    return learning_rate(epoch + (steps_per_epoch - 1) / steps_per_epoch, config)


def warn_if_nothing_is_learned(config: Any, steps_per_epoch: int) -> None:
    """Warn, before training, if the rate is 0 in all steps: with --lr 0, or a warm-up in the only step of a run."""
    steps = config.epochs * steps_per_epoch
    if not any(learning_rate(step / steps_per_epoch, config) for step in range(steps)):
        remedy = "give a positive --lr" if config.lr == 0 else "train longer, or give --warmup_epochs 0"
        logger.warning("nothing will be learned: the learning rate is 0 in all %d steps of the run; %s", steps, remedy)


def adjust_learning_rate(optimizer: Optimizer, epoch: float, config: Any) -> float:
    """Set the rate of every parameter group, scaled by its `lr_scale` (layer decay); returns the unscaled rate."""
    lr = learning_rate(epoch, config)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


# --- Precision and step ---


def resolve_precision(name: str | None, device: torch.device) -> str:
    """The precision to train in: `name`, or by default bf16 if a GPU supports it, fp16 on older ones, fp32 on CPUs.

    Raises:
        UserError: for fp16 on a CPU, which has no fast fp16 arithmetic.
    """
    if device.type == "cpu":
        if name == "fp16":
            raise UserError("--precision fp16 needs a GPU: on a CPU use fp32 or bf16")
        return name or "fp32"
    return name or ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16")


def whether_to_compile(given: bool | None, device: torch.device, precision: str) -> bool:
    """Whether the model is compiled, the same on all ranks: as `given`, else on GPUs where torch.compile works.

    If it does not, on any rank, the log says why.

    Raises:
        UserError: compiling is asked for, and does not work.
    """
    if given is False or (given is None and device.type != "cuda"):
        return False
    answer = socket.gethostname(), why_not_compiled(device, DTYPES[precision])
    reasons = [f"on {node}: {reason}" for node, reason in distributed.gather_objects(answer) if reason]
    if reasons and given:
        raise UserError(f"--compile does not work {reasons[0]}")
    if reasons:
        logger.warning("the model is not compiled, which would be faster: torch.compile says %s", reasons[0])
    return not reasons


def set_up_arithmetic(precision: str, measure: bool = True) -> None:
    """Allow TF32 for what stays float32 in a lower `precision`; with fp32, for nothing.

    By default PyTorch would round the patch embedding's products to TF32 even then. With `measure`, kernels for
    convolutions are chosen by measurement, and cuDNN's attention may be: not if batches differ in shape, since both
    are prepared for every shape, nor if runs are to be identical.
    """
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.benchmark = measure
    torch.backends.cuda.enable_cudnn_sdp(measure)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Compute products of float32 in float32 on a GPU, too, whatever training allows."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Context of a forward pass in `precision`; does nothing for fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler, which only fp16 needs."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def backward(loss: Tensor, scaler: torch.amp.GradScaler) -> None:
    """Backward pass of a loss; one that is not finite makes every gradient NaN.

    That way the reduction of the gradients over ranks, which happens anyway, tells every rank.
    """
    scaled = scaler.scale(loss)
    scaled.backward(torch.where(loss.detach().isfinite(), 1.0, float("nan")).to(scaled.dtype))


def clip_and_step(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: Iterable[nn.Parameter],
    clip_grad: float | None,
) -> Tensor:
    """Clip the gradients' norm to `clip_grad` (None: no clipping), update the weights, clear the gradients.

    Nothing is updated when the norm is not finite. That is decided on the device (a fused optimizer's `found_inf`),
    so that nobody waits for it.

    Returns:
        The norm before clipping, a scalar on the device; the same on all ranks.
    """
    scaler.unscale_(optimizer)
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
    if not scaler.is_enabled():  # an enabled scaler has a check of its own
        optimizer.found_inf = (~norm.isfinite()).to(torch.float32)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm
