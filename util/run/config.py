"""The configuration of a run: every flag is declared once, all are resolved once, and then they are only read.

Here are the flags that mains and commands share; each adds its own. The flags of the authors' scripts keep their names
and meanings.
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from util.data.decoding import MAX_PIXELS
from util.errors import UserError
from util.run.cores import MOST_WORKERS, choose_workers
from util.run.determinism import set_up_determinism
from util.run.flags import (
    AT_LEAST_1,
    BATCHES,
    BELOW_1,
    FREE,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    RECIPE,
    ROUNDING,
    Config,
    flag,
    free,
)
from util.run.launch import Launch
from util.run.optim import resolve_precision, set_up_arithmetic
from util.weights.settings import CLASSIFIER_MODELS, PRETRAINING_MODELS, WeightSettings, is_authors_name

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=Config)

# --- Shared flags ---


@dataclass(frozen=True)
class WeightFlags(Config):
    """What belongs to weights: `util.weights.settings` fills in what is not given."""

    TITLE: ClassVar[str] = "model and images"

    model: str | None = flag(
        None,
        f"{', '.join(PRETRAINING_MODELS)} to pretrain; {', '.join(CLASSIFIER_MODELS)} to fine-tune; or the authors' "
        "mixmim_* names (default: the one recorded with the weights, else chosen)",
        "NAME",
    )
    in_chans: int | None = flag(
        None, "channels of the images (default: those the weights were trained with, else 3)", "N", AT_LEAST_1
    )
    input_size: tuple[int, ...] | None = flag(
        None, "one side, or height and width (default: that of the weights, else the model's)", "PIXELS"
    )
    mean: tuple[float, ...] | None = flag(
        None,
        "mean of each channel, in 0..1 for pictures of 8 or 16 bits, else in the images' own units (default: that of "
        "the weights, else ImageNet's for 3 channels and 0.5 for others)",
        "X",
    )
    std: tuple[float, ...] | None = flag(
        None,
        "standard deviation per channel, in the same units (default: that of the weights, else ImageNet's, or 0.25)",
        "X",
    )


@dataclass(frozen=True)
class CheckpointFlags(WeightFlags):
    """Of commands that use a trained model."""

    TITLE: ClassVar[str] = "weights"

    checkpoint: str = flag(
        "", "a path, https URL#sha256=..., or a published name such as base_600ep", "WEIGHTS",
        required="a file of weights, or a published name such as base_600ep",
    )  # fmt: skip


@dataclass(frozen=True)
class ModelFlags(Config):
    TITLE: ClassVar[str] = "model"

    patch_size: int | None = flag(None, "patch side length (default: that of the weights, else the model's)", "PIXELS")
    window_size: tuple[int, int, int, int] | None = flag(
        None, "window side length in each stage (default: those of the weights, else the model's)", "TOKENS"
    )
    drop_path: float = flag(0.0, "stochastic-depth rate of the last block", "RATE", BELOW_1)
    grad_checkpointing: bool = flag(
        False, "recompute blocks in the backward pass: slower, less memory", on_resume=ROUNDING
    )
    compile: bool | None = flag(
        None, "compile the model with torch.compile (default: on a GPU, where that works)", on_resume=ROUNDING
    )


@dataclass(frozen=True)
class DecodingFlags(Config):
    TITLE: ClassVar[str] = "decoding images"

    ignore_exif: bool = flag(False, "ignore the EXIF orientation of photographs, as the authors' code does")
    reader: str = flag(
        "",
        "read image files with this function (path -> array H x W x channels), for other formats",
        "PACKAGE.MODULE:FUNCTION",
    )
    max_pixels: int = flag(
        MAX_PIXELS,
        "an image with more is unreadable, since decoding it may take all memory",
        "N",
        AT_LEAST_1,
        on_resume="other samples wherever an image is too large",
    )


@dataclass(frozen=True)
class ReadingFlags(DecodingFlags):
    TITLE: ClassVar[str] = "reading images"

    allow_odd_statistics: bool = free(False, "continue even if --mean and --std do not fit the images")
    num_workers: int | None = free(
        None,
        "data-loading processes per rank; 0: none, the main one reads (default: one per core of the rank, less one for "
        f"the main process, {MOST_WORKERS} at most)",
        "N",
        NOT_NEGATIVE,
    )
    pin_mem: bool = free(True, "page-locked memory for copies to a GPU")


@dataclass(frozen=True)
class DataFlags(ReadingFlags):
    TITLE: ClassVar[str] = "data"
    DATA: ClassVar[str] = "a folder with train/ in it, a folder of images, or a list file"  # as messages call it

    data_path: str = flag(
        "",
        "folder with train/ (and val/), folder of images, list file, tar, or the root folder for --dataset",
        "PATH",
        on_resume="identical only if it holds the same images in the same order",
    )
    dataset: str = flag("", "a data set that timm.data.create_dataset knows, with --data_path as its root", "NAME")
    val_share: float = flag(
        0.0, "fraction of each class set aside for validation if there is no val/", "FRACTION", BELOW_1
    )
    bad_images: str = flag(
        "error",
        "at an unreadable image, stop (error) or use another one (skip)",
        choices=("error", "skip"),
        on_resume="other samples wherever an image cannot be read",
    )
    max_bad_images: float = free(
        0.01, "with --bad_images skip: stop if more than this fraction of the images is unreadable", "FRACTION",
        PROBABILITY,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data_path:
            raise UserError(
                f"--data_path is missing: give the folder that --dataset {self.dataset} is in, or is downloaded to"
                if self.dataset
                else f"--data_path is missing: give {self.DATA}"
            )


@dataclass(frozen=True)
class OptimizerFlags(Config):
    TITLE: ClassVar[str] = "optimisation"

    batch_size: int | None = flag(
        None, "images per rank and micro-batch (default: chosen)", "N", AT_LEAST_1, on_resume=BATCHES
    )
    epochs: int | None = flag(None, "epochs of the whole schedule (default: chosen)", "N", AT_LEAST_1)
    accum_iter: int = flag(1, "micro-batches accumulated into one optimizer step", "N", AT_LEAST_1, on_resume=BATCHES)
    clip_grad: float | None = flag(None, "clip the gradient norm (default: no clipping)", "NORM", POSITIVE)
    weight_decay: float = flag(0.05, "AdamW's weight decay", "X", NOT_NEGATIVE)
    lr: float | None = flag(
        None, "learning rate (default: blr * effective batch / 256; without --blr, chosen)", "X", NOT_NEGATIVE
    )
    blr: float | None = flag(None, "base learning rate, per 256 images", "X", NOT_NEGATIVE)
    min_lr: float = flag(0.0, "learning rate at the end", "X", NOT_NEGATIVE)
    warmup_epochs: float | None = flag(None, "epochs of linear warm-up (default: chosen)", "N", NOT_NEGATIVE)


@dataclass(frozen=True)
class DeviceFlags(Config):
    TITLE: ClassVar[str] = "device"
    SAME_SHAPES: ClassVar[bool] = True  # whether all batches have the same

    device: str = flag("auto", "auto, cuda, cuda:N or cpu", on_resume=ROUNDING)
    precision: str | None = flag(
        None,
        "numeric precision (default: bf16 if the GPU supports it, else fp16; fp32 on a CPU)",
        choices=("fp32", "bf16", "fp16"),
        on_resume=ROUNDING,
    )
    seed: int = flag(0, "random seed", "N")
    deterministic: bool = flag(
        False,
        "the same bits in every run on the same GPU, as far as PyTorch can; an operation that cannot ends the run",
        on_resume=ROUNDING,
        default_before=True,
    )


@dataclass(frozen=True)
class RunFlags(Config):
    TITLE: ClassVar[str] = "run"

    output_dir: str = free(
        "./output_dir", "checkpoints, logs and pictures", "DIR", (bool, "must name a folder ('.' is the current one)")
    )
    log_dir: str | None = free(None, "TensorBoard files (default: output_dir)", "DIR")
    finetune: str = flag(
        "",
        "start from weights: a path, https URL#sha256=..., or a published name such as base_600ep",
        "WEIGHTS",
        on_resume="a resumed run goes on from its own checkpoint, so these weights are not read",
    )
    resume: str = free(
        "", "continue a run: from the newest intact checkpoint in output_dir, or from a file", "auto|PATH"
    )
    resume_force: bool = free(False, "continue even though the model or recipe differs from the checkpoint's")
    start_epoch: int = free(0, "epoch to start from if no run is resumed", "N", NOT_NEGATIVE)
    print_freq: int = free(20, "optimizer steps between log lines", "STEPS", AT_LEAST_1)
    save_every: int = free(
        1, "epochs between checkpoints; one more before an evaluation that may be long", "EPOCHS", AT_LEAST_1
    )
    save_steps: int = free(0, "optimizer steps between checkpoints; 0: epochs only", "STEPS", NOT_NEGATIVE)
    keep_checkpoints: int = free(3, "how many of the last checkpoints to keep", "K", AT_LEAST_1)
    keep_every: int = free(100, "epochs between checkpoints kept permanently; 0: none", "EPOCHS", NOT_NEGATIVE)
    nan_dump: bool = free(False, "on a non-finite loss or gradient, write the batch and the state into output_dir")


@dataclass(frozen=True)
class ProcessFlags(Config):
    TITLE: ClassVar[str] = "distributed run"
    DESCRIPTION: ClassVar[str] = (
        "Detected from torchrun, srun or (with --dist_on_itp) MPI; normally these need not be set."
    )

    world_size: int | None = flag(
        None, "number of processes; must agree with the launcher (default: the launcher's)", "N", on_resume=BATCHES
    )
    local_rank: int = free(
        -1, "index of this process on its node; must agree with the launcher (default: the launcher's)", "I",
        aliases=("--local-rank",),
    )  # fmt: skip
    dist_on_itp: bool = free(False, "take rank and world size from Open MPI's variables")
    dist_url: str = free("env://", "rendezvous address: env://, tcp://HOST:PORT or file:///SHARED/NEW_FILE", "URL")
    port: int | None = free(None, "TCP port of rank 0 under srun and MPI (default: derived from the job id)", "P")
    dist_timeout: float = free(1800.0, "end the run if a rank keeps the others waiting longer than this", "SECONDS")


TINY_LR = 1e-6  # the default of --min_lr in fine-tuning: smaller rates may rise to it


@dataclass(frozen=True)
class TrainingConfig(ReadingFlags, WeightFlags, ModelFlags, OptimizerFlags, DeviceFlags, RunFlags, ProcessFlags):
    """What all training runs share, whatever their task."""

    PROGRAM: ClassVar[str]  # the script that makes such runs, from the repository's root; their checkpoints record it
    PRETRAINS: ClassVar[bool] = False  # whether its model is a `MixMAE`, not the encoder or something built on it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.deterministic and self.compile:
            raise UserError("--deterministic does not go with --compile: compiled attention sums in any order")
        if self.lr is not None and self.min_lr > max(self.lr, TINY_LR):
            raise UserError(
                f"--min_lr {self.min_lr:g} is above the learning rate, {self.lr:g}: give a --min_lr of at most that"
            )
        if self.epochs is None:
            return
        if self.start_epoch >= self.epochs:
            raise UserError(f"--start_epoch {self.start_epoch} leaves nothing to train: --epochs is {self.epochs}")
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise UserError(f"--warmup_epochs {self.warmup_epochs:g} is longer than the run: --epochs {self.epochs}")

    @property
    def eff_batch_size(self) -> int:
        """Images of one optimizer step over all ranks."""
        return self.batch_size * self.accum_iter * self.world_size


@dataclass(frozen=True)
class ImageTrainingConfig(DataFlags, TrainingConfig):
    """Of runs on a set of images with at most one label each."""


# --- Resolving ---


OPTIMISATION = ("batch_size", "epochs", "warmup_epochs", "lr", "blr")


def with_settings(given: C, settings: WeightSettings) -> C:
    """The configuration with what belongs to the weights (`util.weights.settings.weight_settings`) filled in."""
    names = {field.name for field in dataclasses.fields(given)}
    return dataclasses.replace(given, **{name: value for name, value in settings.values().items() if name in names})


def resolve(given: C, launch: Launch, settings: WeightSettings, others: Mapping[str, Any] | None = None) -> C:
    """The configuration: what was given, and what follows from it.

    Args:
        given: of `given_flags`.
        launch: the processes of the run; `world_size` and `device` become the actual ones, and its cores decide
            how many processes load data if that was not given.
        settings: what belongs to the weights (`util.weights.settings.weight_settings`), for what was not given.
        others: values for the flags of `OPTIMISATION` that were not given.

    Raises:
        UserError: a precision that the device does not have, or settings that are not deterministic.
    """
    names, others = {field.name for field in dataclasses.fields(given)}, others or {}
    values = {name: others[name] for name in OPTIMISATION if name in others and getattr(given, name, "") is None}
    if getattr(given, "blr", None) is not None:
        values["lr"] = given.lr  # derived from --blr, unless it is given too
    values |= {"world_size": launch.world_size, "device": launch.device.type}
    if "num_workers" in names and given.num_workers is None:
        values["num_workers"] = choose_workers(launch.cores)
        logger.info("not given, so chosen: --num_workers %d: %d core(s) per rank", values["num_workers"], launch.cores)
    values["precision"] = resolve_precision(given.precision, launch.device)
    set_up_arithmetic(values["precision"], given.SAME_SHAPES and not given.deterministic)
    set_up_determinism(given.deterministic, launch.device)
    if "log_dir" in names:
        values["log_dir"] = given.log_dir or given.output_dir
    config = dataclasses.replace(with_settings(given, settings), **values)
    if "lr" in names and config.lr is None and config.blr is not None:  # neither, if nothing is trained
        config = dataclasses.replace(config, lr=config.blr * config.eff_batch_size / 256)
    logger.info("configuration: %s", " ".join(f"{name}={value!r}" for name, value in config.as_dict().items()))
    return config


# --- Resuming with other settings ---

OBSOLETE = frozenset(("eff_batch_size", "rank", "distributed"))  # what older versions recorded; follows from the rest


def compare_recipes(
    saved: Mapping[str, Any], now: Mapping[str, Any], config_class: type[Config]
) -> tuple[list[str], list[str]]:
    """What differs between the settings that a checkpoint was made with and those of the run that resumes it.

    Args:
        saved: the checkpoint's 'args', of this program or the authors', whose names and meanings are the same.
        now: the settings of the run that resumes.
        config_class: says what a change of each means.

    Returns:
        errors: 'name: saved -> now' for every difference in model or recipe.
        warnings: differences after which the run goes on, but no longer identically to an uninterrupted one.
    """
    fields = dataclasses.fields(config_class)
    changes = {field.name: field.metadata["on_resume"] for field in fields}
    before = {field.name: field.default for field in fields if field.metadata["default_before"] and field.name in now}
    saved = before | dict(saved)
    ignored = {name for name, change in changes.items() if change == FREE} | OBSOLETE
    errors, warnings = [], []
    for name in sorted((saved.keys() & now.keys()) - ignored):
        before, after, change = _comparable(name, saved[name]), _comparable(name, now[name]), changes[name]
        difference = f"{name}: {before} -> {after}"
        if before == after or (name == "model" and is_authors_name(before, after)):
            continue
        if change is not RECIPE:
            warnings.append(f"{difference} ({change})")
        elif name == "lr" and follows_batch_size(saved) and follows_batch_size(now):
            warnings.append(f"{difference} (it follows the effective batch size)")
        else:
            errors.append(difference)
    unknown = sorted((saved.keys() ^ now.keys()) - ignored)
    if unknown:
        warnings.append(f"only in the checkpoint or only in this version, so not compared: {', '.join(unknown)}")
    return errors, warnings


def effective_batch(settings: Mapping[str, Any]) -> int | None:
    """The effective batch size that recorded settings give, or None if they are incomplete."""
    factors = [settings.get(name) for name in ("batch_size", "accum_iter", "world_size")]
    return None if any(type(factor) is not int for factor in factors) else factors[0] * factors[1] * factors[2]


def follows_batch_size(settings: Mapping[str, Any]) -> bool:
    """Whether the learning rate is the one derived from the base learning rate, rather than given."""
    size = effective_batch(settings)
    return None not in (size, settings.get("blr")) and settings["lr"] == settings["blr"] * size / 256


def _comparable(name: str, value: Any) -> Any:
    """A setting in a form that compares equal across versions, and with the authors' program."""
    if name == "input_size" and isinstance(value, int):
        return (value, value)
    if name == "device":
        return str(value).partition(":")[0]
    return tuple(value) if isinstance(value, list) else value
