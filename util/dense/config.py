"""The flags of tasks on dense features (detection, segmentation), beside those of every training run, and how they are
completed."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

from torch import nn

from util.errors import UserError
from util.run.config import DataFlags, TrainingConfig, resolve
from util.run.distributed import once_per_node
from util.run.evaluation import EvaluationFlags
from util.run.flags import SHARE, flag, free, with_default
from util.run.launch import Launch
from util.run.session import Start
from util.run.state import program_of
from util.weights.file import CheckpointError, read_checkpoint
from util.weights.layouts import require_finite
from util.weights.settings import weight_settings

logger = logging.getLogger(__name__)

SHAPING = ("model", "in_chans", "patch_size", "detector", "nb_classes", "head_channels")  # what weights must fit

C = TypeVar("C", bound="DenseConfig")


@dataclass(frozen=True)
class DenseConfig(EvaluationFlags, TrainingConfig):
    TITLE: ClassVar[str] = "task"
    DATA: ClassVar[str]  # what --data_path is, as messages call it
    SAME_SHAPES: ClassVar[bool] = False
    DEFAULTS: ClassVar[dict[str, Any]]  # the recipe's, of flags that every run has
    TASK_SETTINGS: ClassVar[dict[str, Any]]  # flags that belong to the weights of the task, with their defaults

    compile: bool = free(False, "not in this program: its images differ in size")
    data_path: str = flag(
        "",
        "folder of images with annotations (COCO's format) or label maps (ADE20K's layout, or images/ and masks/)",
        "PATH",
        on_resume="identical only if it holds the same images in the same order",
    )
    bad_images: str = with_default(DataFlags, "bad_images", "error")
    max_bad_images: float = with_default(DataFlags, "max_bad_images", 0.01)
    layer_decay: float = flag(
        0.8, "learning-rate factor from each layer of the encoder to the one below it", "X", SHARE
    )
    freeze_stages: int = flag(
        -1,
        "leave the patch embedding (0) and the first stages of the encoder (1 to 4) as they are; -1: train all",
        "N",
        (lambda value: -1 <= value <= 4, "must be from -1 (none) to 4"),
    )
    lr_steps: tuple[float, ...] = flag(
        (), "divide the learning rate by 10 at these epochs (default: half a cosine down to --min_lr)", "EPOCH",
        (lambda value: all(step > 0 for step in value), "must be positive"),
    )  # fmt: skip
    predictions: str = free(
        "",
        "with --eval: write what was found: detections to a file, in COCO's result format; label maps and pictures of "
        "segmentation to a folder",
        "PATH",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data_path:
            raise UserError(f"--data_path is missing: give {self.DATA}")
        if self.compile:
            raise UserError("--compile is for the mains: here images differ in size, and each size would be compiled")
        if self.predictions and not self.eval:
            raise UserError(f"--predictions {self.predictions} goes with --eval")
        if self.lr_steps and self.min_lr:
            raise UserError(f"--min_lr {self.min_lr:g} ends the cosine that --lr_steps replaces: give only one")
        first, last = self.warmup_epochs or 0, self.epochs or math.inf
        if outside := [step for step in self.lr_steps if not first <= step < last]:
            raise UserError(
                f"--lr_steps {' '.join(f'{step:g}' for step in outside)} must not be within --warmup_epochs {first:g}, "
                f"and below --epochs {last:g}"
            )


def settings_to_train(start: Start) -> DenseConfig:
    """The configuration of a run; the task's settings are those of the run to resume, never of --finetune's weights,
    of which only the encoder is loaded."""
    return with_task_settings(start.resolve(choose_recipe), (start.checkpoint or {}).get("args", {}))


def open_to_evaluate(given: C, launch: Launch) -> tuple[C, dict[str, Any], str]:
    """For --eval: the configuration, the checkpoint of --finetune or --resume, and what to call it.

    Raises:
        CheckpointError: it is missing, damaged, or of another program.
    """
    source = given.finetune or given.resume
    checkpoint = once_per_node(partial(read_checkpoint, source, True))
    if program_of(checkpoint) != given.PROGRAM:
        raise CheckpointError(f"{source} is not a model of {given.PROGRAM}: train one with --finetune {source}")
    recorded = checkpoint["args"]
    settings = weight_settings(recorded, source, given.as_dict())
    return with_task_settings(resolve(given, launch, settings, given.DEFAULTS), recorded), checkpoint, source


def load_to_evaluate(model: nn.Module, checkpoint: Mapping[str, Any], source: str, config: DenseConfig) -> None:
    """Load what `open_to_evaluate` has opened into a model of its configuration.

    Raises:
        CheckpointError: flags ask for another model, or the weights are not finite.
    """
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        own, flags = checkpoint["args"], {name: getattr(config, name, None) for name in SHAPING}
        other = {name: value for name, value in flags.items() if value not in (None, own.get(name))}
        if not other:
            raise
        given = ", ".join(f"--{name} {value} (it has {own.get(name)})" for name, value in other.items())
        raise CheckpointError(f"{source} does not fit these flags, leave them out: {given}") from error
    require_finite(model, source)


def choose_recipe(given: DenseConfig, launch: Launch, known: Mapping[str, Any]) -> dict[str, Any]:
    """Of the recipe's settings, those that are not known; for `Start.resolve`."""
    chosen = {name: value for name, value in given.DEFAULTS.items() if known.get(name) is None}
    if known.get("lr") is not None:
        chosen.pop("blr", None)
    for name, value in chosen.items():
        logger.info("not given, so chosen: --%s %s, the recipe's", name, value)
    return chosen


def with_task_settings(config: C, recorded: Mapping[str, Any]) -> C:
    """The configuration with `TASK_SETTINGS` filled in: what was given, else what the weights record, else defaults."""
    values = {}
    for name, default in config.TASK_SETTINGS.items():
        if getattr(config, name) is None:
            value = recorded.get(name)
            values[name] = default if value is None else tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(config, **values)
