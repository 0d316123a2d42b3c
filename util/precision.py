"""Numeric precision of training, and the optimizer step that all precisions share."""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(name: str | None, device: torch.device) -> str:
    """The precision to train in: `name`, or by default bf16 where a GPU supports it, fp16 on older ones, fp32 on CPUs.

    Raises:
        ValueError: for fp16 on a CPU, which has no fast fp16 arithmetic.
    """
    if device.type == "cpu":
        if name == "fp16":
            raise ValueError("--precision fp16 needs a GPU: on a CPU use fp32 or bf16")
        return name or "fp32"
    return name or ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Context of a forward pass in `precision`; does nothing for fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler, which fp16 alone needs."""
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
