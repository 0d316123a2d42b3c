"""Measuring a run without slowing it (losses stay on the device until a log line is due), and a model's size."""

import datetime
import logging
import re
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from util.run import distributed
from util.run.config import TrainingConfig

logger = logging.getLogger(__name__)

SPIKE_HISTORY = 100  # steps that define which losses are usual
SPIKE_SIGMAS = 6.0
MOST_DATA_WAIT = 0.2  # share of the time; above, training waits for images
FEW_STEPS = 10  # with fewer, the share of waiting is chance
SECONDS_BETWEEN_LINES = 10.0  # at most, however slow the steps are


@dataclass
class StepMeter:
    """Collects one epoch's optimizer steps; `flush` reduces them over ranks and describes them.

    Args:
        epoch: which one this is, from 0.
        epochs, steps_per_epoch: of the whole run, and the optimizer steps of each.
        images_per_step: of all ranks.
        device: of training.
        usual_losses: those of the last steps, earlier epochs' too, by which spikes are found; appended to.
        operations: of training on one image, for the utilisation of a GPU (MFU); 0 for none.
    """

    epoch: int
    epochs: int
    steps_per_epoch: int
    images_per_step: int
    device: torch.device
    usual_losses: deque[float]
    operations: float = 0.0

    def __post_init__(self) -> None:
        self.pending: list[tuple[int, float, Tensor, Tensor]] = []
        peak = peak_operations(self.device) * distributed.get_world_size()
        self.utilisation_per_speed = self.operations / peak if peak else 0.0
        self.waited = 0.0
        self.first_wait: float | None = None  # of the epoch, which the workers' start makes long
        self.data_wait_said = False
        self.window_start = self.last_line = time.perf_counter()

    def next_batch(self, batches: Iterator) -> Any:
        """The next one of `batches`; the time spent waiting for it is noted."""
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - start
        self.waited += waited
        self.first_wait = waited if self.first_wait is None else self.first_wait
        return batch

    def add(self, step: int, lr: float, loss: Tensor, grad_norm: Tensor) -> None:
        """Note one optimizer step, its loss on this rank and its gradient norm; nothing is read from the device."""
        self.pending.append((step, lr, loss.detach(), grad_norm.detach()))

    def flush(self) -> tuple[list[dict], dict[str, float]]:
        """Reduce what was noted over all ranks, which must call this together.

        Returns:
            One record per optimizer step, with its loss averaged over ranks; and the scalars of the log line.
        """
        if not self.pending:
            return [], {}
        steps, lrs, losses, norms = zip(*self.pending)
        # In float64, in which the order of ranks and the length of the list change nothing.
        losses = torch.tensor(torch.stack(losses).tolist(), dtype=torch.float64)
        losses = distributed.all_reduce_mean(losses).tolist()
        norms = torch.stack(norms).float().tolist()
        records = [
            {"step": step, "epoch": self.epoch, "lr": lr, "loss": loss, "grad_norm": norm}
            for step, lr, loss, norm in zip(steps, lrs, losses, norms)
        ]
        scalars = self._scalars(losses, norms)
        self.warn_of_spikes(records)
        self._warn_of_data_wait()
        self.pending, self.waited, self.window_start = [], 0.0, time.perf_counter()
        return records, scalars

    def _scalars(self, losses: Sequence[float], norms: Sequence[float]) -> dict[str, float]:
        seconds, steps = time.perf_counter() - self.window_start, len(self.pending)
        images_per_second = self.images_per_step * steps / seconds
        utilisation = images_per_second * self.utilisation_per_speed
        return {
            "loss": sum(losses) / steps,
            "lr": self.pending[-1][1],
            "grad_norm": sum(norms) / steps,
            "images_per_second": images_per_second,
            **({"mfu": utilisation} if utilisation else {}),
            "data_wait_share": self.waited / seconds,
            "memory_mb": peak_memory_mb(self.device),
            "seconds_per_step": seconds / steps,
        }

    def _warn_of_data_wait(self) -> None:
        """Warn once an epoch that training waits for images, and say what helps."""
        first, self.first_wait = self.first_wait or 0.0, 0.0
        share = (self.waited - first) / max(1e-9, time.perf_counter() - self.window_start - first)
        if share > MOST_DATA_WAIT and len(self.pending) >= FEW_STEPS and not self.data_wait_said:
            self.data_wait_said = True
            logger.warning("%s", data_wait_advice(share))

    def meanwhile(self) -> dict[str, float]:
        """The scalars of this rank if no log line has been due for long; else none."""
        if not self.pending or time.perf_counter() - self.last_line < SECONDS_BETWEEN_LINES:
            return {}
        _, _, losses, norms = zip(*self.pending)
        return self._scalars(torch.stack(losses).tolist(), torch.stack(norms).tolist())

    def line(self, step_in_epoch: int, scalars: dict[str, float]) -> str:
        """The console line of a flush."""
        self.last_line = time.perf_counter()
        left = ((self.epochs - self.epoch) * self.steps_per_epoch - step_in_epoch) * scalars["seconds_per_step"]
        mfu = f"  MFU {scalars['mfu']:.1%}" if "mfu" in scalars else ""
        return (
            f"epoch {self.epoch}  step {step_in_epoch}/{self.steps_per_epoch}  loss {scalars['loss']:.4f}  "
            f"lr {scalars['lr']:.3g}  grad norm {scalars['grad_norm']:.3g}  "
            f"{scalars['images_per_second']:.0f} images/s{mfu}  data wait {scalars['data_wait_share']:.0%}  "
            f"memory {scalars['memory_mb']:.0f} MB  ETA {datetime.timedelta(seconds=int(left))}"
        )

    def warn_of_spikes(self, records: list[dict]) -> None:
        """Log a warning for a loss far above those of the steps before it."""
        losses = [record["loss"] for record in records]
        found, mean, deviation = find_spikes(np.array([*self.usual_losses, *losses]))
        for record, spike, usual, about in zip(records[len(records) - len(found) :], found, mean, deviation):
            if spike:
                logger.warning(
                    "loss spike: %.4f at step %d, the last %d steps had %.4f +- %.4f",
                    record["loss"], record["step"], SPIKE_HISTORY, usual, about,
                )  # fmt: skip
        self.usual_losses.extend(losses)


@np.errstate(over="ignore", invalid="ignore")  # one that is not finite ends the run soon
def find_spikes(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of the losses (n,) but the first `SPIKE_HISTORY` are far above that many before them.

    Returns:
        Three arrays (n - SPIKE_HISTORY,): whether it is, and the mean and standard deviation of those before it.
    """
    sums, squares = (np.cumsum(np.concatenate([np.zeros(1), values])) for values in (losses, losses**2))
    total, square = (series[SPIKE_HISTORY:-1] - series[: -SPIKE_HISTORY - 1] for series in (sums, squares))
    mean, variance = total / SPIKE_HISTORY, np.maximum(square - total**2 / SPIKE_HISTORY, 0) / (SPIKE_HISTORY - 1)
    deviation = np.sqrt(variance)
    limit = mean + SPIKE_SIGMAS * deviation + 1e-9 * abs(mean)  # the last for rounding
    return losses[SPIKE_HISTORY:] > limit, mean, deviation


# Dense bf16 products, in TFLOP/s by the maker's data sheets; the first of these found in the GPU's own name is taken.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "GH200": 989}
PEAK_TFLOPS |= {"B200": 2250, "A100": 312}


def peak_operations(device: torch.device) -> float:
    """What a GPU could do at most in bf16 or fp16, in operations per second; 0 if that is not known."""
    return peak_of_card(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0


def peak_of_card(name: str) -> float:
    """As `peak_operations`, by the GPU's name; 0 for a part of one (MIG)."""
    found = (tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name))
    return 0.0 if "MIG" in name else next(found, 0.0)


def training_operations(multiply_adds: float) -> float:
    """Of one image: two for each multiply-add of the forward pass, and twice as many for the backward pass."""
    return 2 * 3 * multiply_adds


def data_wait_advice(share: float) -> str:
    """What to do if `share` of the training time is spent waiting for images."""
    return (
        f"data wait {share:.0%}: training waits for images. More --num_workers (and cores for them), faster storage or "
        "smaller files help; python -m util.check_data tells how many images/s a data-loading process reads"
    )


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process so far in MB: of the GPU's allocator, or the resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def count_work(model: nn.Module, **forward: float) -> tuple[int, float]:
    """Parameters (frozen ones included) and multiply-adds of one image's forward pass.

    It counts matrix products and convolutions, those of attention included, for all pairs of a window.

    Args:
        model: a `SwinTransformer` or `MixMAE`.
        **forward: further arguments of the model's forward, such as `mask_ratio`.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    device = next(model.parameters()).device
    batch_size = getattr(model, "mix_images", 1)
    imgs = torch.zeros(batch_size, model.in_chans, *model.img_size, device=device)
    was_training = model.training
    model.eval()
    # The counter does not know all fused attentions (not a CPU's); the plain one is made of products that it knows.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        one_layout_shape, model.one_layout_shape = model.one_layout_shape, True  # a number that no mask changes
        model(imgs, **forward)
        model.one_layout_shape = one_layout_shape
    model.train(was_training)
    return parameters, counter.get_total_flops() / 2 / batch_size


def log_model(config: TrainingConfig, model: nn.Module, **forward: float) -> float:
    """Log how large the model is (rank 0). Returns the multiply-adds of one image's forward pass; on other ranks 0.

    Args:
        config: of the run.
        model: a `SwinTransformer` or `MixMAE`.
        **forward: see `count_work`.
    """
    if not distributed.is_main_process():
        return 0.0
    parameters, multiply_adds = count_work(model, **forward)
    name = f"{config.model} at {model.img_size[0]}x{model.img_size[1]}"
    if getattr(model, "num_classes", 0):
        name += f", {model.num_classes} classes"
    logger.info(
        "%s: %.1f M parameters, %.2f G multiply-adds per image, %s",
        name, parameters / 1e6, multiply_adds / 1e9, config.precision,
    )  # fmt: skip
    return multiply_adds
