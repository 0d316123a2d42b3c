"""Everything that training changes, into a checkpoint and back."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from util.run.config import effective_batch
from util.weights.file import FORMAT, CheckpointError
from util.weights.layouts import require_finite

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands. The coming optimizer step is number `step_in_epoch` of `epoch`, both counted from 0."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0  # optimizer steps done since the start of the run
    epoch_loss: float = 0.0  # sum of the losses of this epoch's steps so far, averaged over ranks
    best: float | None = None  # evaluation so far, such as fine-tuning's top-1 in percent; None: none is known

    def fraction(self, steps_per_epoch: int) -> float:
        """The fractional epoch."""
        return self.epoch + self.step_in_epoch / steps_per_epoch

    def is_best(self, result: float) -> bool:
        """Whether this evaluation is the best so far, and from now on the one to beat. The first one always is."""
        if self.best is not None and result <= self.best:
            return False
        self.best = result
        return True

    def next_step(self) -> None:
        self.step_in_epoch += 1
        self.step += 1

    def next_epoch(self) -> float:
        """Move to the next epoch; returns the mean loss of the one that ended."""
        mean_loss = self.epoch_loss / max(self.step_in_epoch, 1)
        self.epoch, self.step_in_epoch, self.epoch_loss = self.epoch + 1, 0, 0.0
        return mean_loss

    def __str__(self) -> str:
        return f"epoch {self.epoch} step {self.step_in_epoch} (optimizer step {self.step} of the run)"


@dataclass
class TrainingState:
    """The parts of a run that training changes, and the settings that are stored with them."""

    model: nn.Module  # not wrapped
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    settings: Mapping[str, Any]  # of the run's configuration; plain values
    progress: Progress
    model_ema: ModelEmaV3 | None = None
    classes: list[str] | None = None  # of a classifier: their names, in the order of the head's rows
    data: dict[str, dict] = field(default_factory=dict)  # split -> fingerprint of its images
    program: str = ""  # which continues the run, see `TrainingConfig`

    def checkpoint(self) -> dict[str, Any]:
        """The state as plain data, in the authors' layout: 'epoch' is the last complete one."""
        progress = self.progress
        checkpoint = {
            "format": FORMAT,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": progress.epoch - 1,
            "step_in_epoch": progress.step_in_epoch,
            "step": progress.step,
            "epoch_loss": progress.epoch_loss,
            "best": progress.best,
            "program": self.program,
            "args": dict(self.settings),
            "data": {split: dict(fingerprint) for split, fingerprint in self.data.items()},
        }
        if self.classes is not None:
            checkpoint["classes"] = list(self.classes)
        if self.model_ema is not None:
            checkpoint["model_ema"] = self.model_ema.module.state_dict()
        return checkpoint

    def restore(self, checkpoint: dict[str, Any], steps_per_epoch: int) -> None:
        """Take over a checkpoint of this run, or of one with other batches or images (then rounded down).

        Raises:
            CheckpointError: its weights or its optimizer are not this run's, or its weights are not finite.
        """
        try:
            self.load(checkpoint)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            why = " ".join(str(error).split())[:1000].rstrip(".")
            raise CheckpointError(
                f"--resume: the checkpoint does not fit this model or optimizer: {why}. To start from the weights that "
                "do fit, use --finetune"
            ) from error
        for model in (self.model, self.model_ema):
            if model is not None:
                require_finite(model, "--resume: the checkpoint")
        progress = self.progress
        progress.epoch = checkpoint["epoch"] + 1
        progress.step_in_epoch = checkpoint.get("step_in_epoch", 0)
        progress.step = checkpoint.get("step", progress.epoch * steps_per_epoch)
        progress.epoch_loss = checkpoint.get("epoch_loss", 0.0)
        progress.best = checkpoint.get("best", checkpoint.get("best_acc1"))  # as older versions call it
        before, now = effective_batch(checkpoint.get("args", {})), effective_batch(self.settings)
        steps = progress.step_in_epoch * before // now if None not in (before, now) else progress.step_in_epoch
        steps = min(steps, steps_per_epoch)  # there may be fewer images now
        if steps != progress.step_in_epoch:
            progress.epoch_loss = progress.epoch_loss / progress.step_in_epoch * steps
            progress.step_in_epoch = steps

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Take over weights, optimizer, scaler and average."""
        self.model.load_state_dict(
            {name: tensor for name, tensor in checkpoint["model"].items() if "relative_position_index" not in name}
        )
        # Moments are the file's; settings (weight decay, lr_scale, fused) are this run's. They go in first: where the
        # step counts are put depends on them.
        saved = checkpoint["optimizer"]
        groups = [
            group | {name: value for name, value in own.items() if name != "params"}
            for group, own in zip(match_groups(saved, self.optimizer.param_groups), self.optimizer.param_groups)
        ]
        self.optimizer.load_state_dict(saved | {"param_groups": groups})
        # On a CPU the optimizer takes over the very tensors, which may lie in the file: it gets its own.
        for moments in self.optimizer.state.values():
            for name, value in moments.items():
                if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                    moments[name] = value.clone()
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        if self.model_ema is not None:
            self.model_ema.module.load_state_dict(checkpoint.get("model_ema") or checkpoint["model"])


def program_of(checkpoint: dict[str, Any]) -> str | None:
    """The program that continues the run of a checkpoint, if it is known.

    Older checkpoints and the authors' do not record it: those of the two mains are recognised by one of their flags.
    """
    args = checkpoint.get("args") or {}
    guess = "main_pretrain.py" if "mask_ratio" in args else "main_finetune.py" if "nb_classes" in args else None
    return checkpoint.get("program") or guess


def match_groups(saved: dict[str, Any], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parameter groups of a saved optimizer in the order of `own`.

    By their names, if the file has them. The authors' files, and older ones of this program, have none and may order
    the groups differently: there a group is recognised by the shapes of its moments.

    Raises:
        ValueError: a group has no counterpart.
    """
    waiting = list(saved["param_groups"])
    if len(waiting) != len(own):
        raise ValueError(f"its optimizer has {len(waiting)} parameter groups, this run's has {len(own)}")

    def fits(group: dict[str, Any], wanted: dict[str, Any]) -> bool:
        moments = [saved["state"].get(index, {}).get("exp_avg") for index in group["params"]]
        return (
            group.get("name") in (None, wanted.get("name"))
            and len(moments) == len(wanted["params"])
            and all(moment is None or moment.shape == tensor.shape for moment, tensor in zip(moments, wanted["params"]))
        )

    matched = []
    for number, wanted in enumerate(own):
        group = next((group for group in waiting if fits(group, wanted)), None)
        if group is None:
            name = wanted.get("name", f"number {number}")
            raise ValueError(
                f"none of its optimizer's parameter groups has the {len(wanted['params'])} tensors of this run's group "
                f"'{name}', in their shapes and order"
            )
        waiting.remove(group)
        matched.append(group)
    return matched
