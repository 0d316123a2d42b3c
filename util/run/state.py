"""Everything that a run is at one moment, into a checkpoint and back."""

import argparse
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from util.run import distributed
from util.run.checkpoint_folder import CheckpointFolder, compare_recipes
from util.run.config import plain_arguments
from util.weights.file import CheckpointError, read_checkpoint

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands. The coming optimizer step is number `step_in_epoch` of `epoch`, both counted from 0."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0  # optimizer steps done since the start of the run
    epoch_loss: float = 0.0  # sum of the losses of this epoch's steps so far, averaged over ranks
    best_acc1: float = 0.0  # fine-tuning: best top-1 so far, in percent

    def fraction(self, steps_per_epoch: int) -> float:
        """The fractional epoch."""
        return self.epoch + self.step_in_epoch / steps_per_epoch

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
    """The parts of a run that training changes."""

    model: nn.Module  # not wrapped
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    args: argparse.Namespace
    progress: Progress
    model_ema: ModelEmaV3 | None = None

    def checkpoint(self) -> dict[str, Any]:
        """The state as plain data, in the authors' layout: 'epoch' is the last complete one."""
        progress = self.progress
        checkpoint = {
            "format": 1,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": progress.epoch - 1,
            "step_in_epoch": progress.step_in_epoch,
            "step": progress.step,
            "epoch_loss": progress.epoch_loss,
            "best_acc1": progress.best_acc1,
            "args": plain_arguments(self.args),
        }
        if self.model_ema is not None:
            checkpoint["model_ema"] = self.model_ema.module.state_dict()
        return checkpoint

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
            for group, own in zip(saved["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        self.optimizer.load_state_dict(saved | {"param_groups": groups})
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        if self.model_ema is not None:
            self.model_ema.module.load_state_dict(checkpoint.get("model_ema") or checkpoint["model"])

    def restore(self, checkpoint: dict[str, Any], steps_per_epoch: int) -> None:
        """Take over a checkpoint of this run, or of one with other batches (the position is then rounded down).

        Raises:
            CheckpointError: its weights are not this model's.
        """
        try:
            self.load(checkpoint)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            why = " ".join(str(error).split())[:1000]
            raise CheckpointError(
                f"--resume {self.args.resume}: the checkpoint does not fit this model or optimizer: {why}. To start "
                "from the weights that do fit, use --finetune"
            ) from error
        progress = self.progress
        progress.epoch = checkpoint["epoch"] + 1
        progress.step_in_epoch = checkpoint.get("step_in_epoch", 0)
        progress.step = checkpoint.get("step", progress.epoch * steps_per_epoch)
        progress.epoch_loss = checkpoint.get("epoch_loss", 0.0)
        progress.best_acc1 = checkpoint.get("best_acc1", 0.0)
        saved = checkpoint.get("args", {})
        if progress.step_in_epoch and saved.get("eff_batch_size", self.args.eff_batch_size) != self.args.eff_batch_size:
            done = progress.step_in_epoch * saved["eff_batch_size"] // self.args.eff_batch_size
            mean_loss = progress.epoch_loss / progress.step_in_epoch
            progress.step_in_epoch = min(done, steps_per_epoch)
            progress.epoch_loss = mean_loss * progress.step_in_epoch


def find_checkpoint(folder: CheckpointFolder | None, args: argparse.Namespace) -> dict[str, Any] | None:
    """The checkpoint that `--resume` asks for, the same on all ranks, or None.

    Rank 0 looks for it; the others read the file that it found.

    Raises:
        CheckpointError: the file is missing or damaged, or was made with another model or recipe.
    """
    found, error = None, None
    if folder is not None:
        try:
            found = folder.resume(args.resume)
            if found is not None:
                check_recipe(found[1], args)
        except CheckpointError as caught:
            error = str(caught)
    path, error = distributed.gather_objects((found and os.fspath(found[0]), error))[0]
    if error:
        raise CheckpointError(error)
    if path is None:
        return None
    return found[1] if found is not None else read_checkpoint(Path(path))


def check_recipe(checkpoint: dict[str, Any], args: argparse.Namespace) -> None:
    """Compare the settings of a checkpoint with the run's: warn of lost identity, refuse another recipe."""
    if "format" not in checkpoint:
        logger.warning("the checkpoint is not of this program: its settings are not compared with the run's")
        return
    errors, warnings = compare_recipes(checkpoint.get("args", {}), plain_arguments(args))
    for warning in warnings:
        logger.warning("resuming with another setting: %s", warning)
    if errors and not args.resume_force:
        raise CheckpointError(
            f"--resume {args.resume}: the checkpoint was made with another model or recipe: {'; '.join(errors)}. "
            "Use the same settings, another --output_dir, or --resume_force"
        )
    for error in errors:
        logger.warning("resuming by --resume_force with another recipe: %s", error)
