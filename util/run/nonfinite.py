"""Stopping all ranks when a loss or gradient is not finite, and keeping what is needed to see why."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.errors import RunError
from util.run import distributed
from util.run.state import TrainingState
from util.weights.file import write_checkpoint

logger = logging.getLogger(__name__)

# Gradients that are not finite at a loss scale this small did not overflow. Further halving would end at a scale of 0,
# which lets a bad gradient through as 0 * infinity.
SMALLEST_LOSS_SCALE = 1.0


class NonFiniteError(RunError):
    """A loss or gradient is infinite or not a number."""


class NonFiniteGuard:
    """Reads a step's loss and gradient norm without making a GPU wait: one step later, before the next update.

    The update of the bad step itself did not happen (`util.run.optim.clip_and_step`). Since the gradient norm is the
    same on all ranks, they all come to the same decision without communicating, and only then exchange their losses.

    Args:
        device: of training.
        state: of the run. A loss scaler in it (fp16) skips bad gradients by itself; then only a bad loss stops the run.
        dump_folder: where to write the bad step's batch and state, or None.
    """

    def __init__(self, device: torch.device, state: TrainingState, dump_folder: Path | None = None):
        self.state = state
        self.dump_folder = dump_folder
        self.watched: tuple[str, Tensor, list[dict[str, Any]]] | None = None
        self.copied = torch.cuda.Event() if device.type == "cuda" else None

    def watch(self, where: str, loss: Tensor, grad_norm: Tensor, batch: list[dict[str, Any]]) -> None:
        """Remember a step: its name, its loss on this rank, its gradient norm, and its micro-batches for a dump."""
        values = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        self.watched = (where, values.to("cpu", non_blocking=True), batch)
        if self.copied is None:
            self.check()
        else:
            self.copied.record()

    def check(self) -> None:
        """Raise NonFiniteError, on all ranks, when the step watched last was bad."""
        if self.watched is None:
            return
        if self.copied is not None:
            self.copied.synchronize()
        (where, values, batch), self.watched = self.watched, None
        loss, grad_norm = values.tolist()
        if torch.isfinite(values[1]):
            return
        losses = distributed.gather_objects(loss)
        bad_ranks = [rank for rank, value in enumerate(losses) if not torch.isfinite(torch.tensor(value))]
        if not bad_ranks and self.state.scaler.get_scale() > SMALLEST_LOSS_SCALE:
            return  # the loss scaler skips the step and halves its scale
        if self.dump_folder:
            hint = self.dump(where, batch, bad_ranks or range(len(losses)))
        else:
            hint = "Run with --nan_dump to keep the batch"
        what = f"the loss of rank {', '.join(map(str, bad_ranks))}" if bad_ranks else "the gradient"
        raise NonFiniteError(
            f"{what} is not finite at {where} (losses by rank: {', '.join(f'{value:g}' for value in losses)}; gradient "
            f"norm {grad_norm:g}). The weights were not updated and the last checkpoint is intact. "
            f"{hint}. Usual remedies: --precision bf16 or fp32, --clip_grad, a lower --blr, a look at the images"
        )

    def dump(self, where: str, batch: list[dict[str, Any]], bad_ranks: Sequence[int]) -> str:
        """Let each bad rank write its micro-batches of the step and the state before it, for `python -m util.replay`.

        Returns when all have written, since the first rank to leave may take the others with it; tells where they are.
        """
        rank, outcome = distributed.get_rank(), None
        if rank in bad_ranks:
            path = self.dump_folder / f"nan_dump_rank{rank}.pth"
            try:
                write_checkpoint(path, {"where": where, "batch": batch, "checkpoint": self.state.checkpoint()})
                outcome = f"Batch and state are in {path}: see python -m util.replay"
            except OSError as error:
                outcome = f"{path} could not be written: {error}"
        return "; ".join(filter(None, distributed.gather_objects(outcome)))
