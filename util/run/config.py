"""The configuration of a run: every flag is declared once, all are resolved once, and then they are only read.

A flag is a field of one of the classes below (a main or command adds its own): its annotation is its type, and `flag`
gives its default, its help, its check, and what a change of it means for a run that is resumed. `get_parser` makes the
command line of a configuration class, and `resolve` an object of it, which cannot be written to.

The flags of the authors' scripts keep their names and meanings.
"""

import argparse
import dataclasses
import logging
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from util.errors import UserError
from util.run.launch import Launch
from util.run.optim import resolve_precision
from util.weights.settings import CLASSIFIER_MODELS, PRETRAINING_MODELS, WeightSettings, is_authors_name

logger = logging.getLogger(__name__)

C = TypeVar("C", bound="Config")

# --- Declaring flags ---


@dataclass(frozen=True)
class Change:
    """What changing a flag means for a run that is resumed: whether it may, and what is then no longer identical."""

    allowed: bool
    difference: str = ""


RECIPE = Change(allowed=False)  # another experiment
FREE = Change(allowed=True)  # where things are, how fast they go, what is reported and kept


def other_bits(difference: str) -> Change:
    """The same recipe, but not the same bits."""
    return Change(allowed=True, difference=difference)


BATCHES = other_bits("steps are made of other images, or averaged in another order")
ROUNDING = other_bits("the same computation, but it rounds differently")

Check = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and the rule in words
POSITIVE: Check = (lambda value: value > 0, "must be positive")
AT_LEAST_1: Check = (lambda value: value >= 1, "must be at least 1")
NOT_NEGATIVE: Check = (lambda value: value >= 0, "must not be negative")
PROBABILITY: Check = (lambda value: 0 <= value <= 1, "must be between 0 and 1")
BELOW_1: Check = (lambda value: 0 <= value < 1, "must be at least 0 and below 1")


def flag(
    default: Any,
    help: str,
    metavar: str | None = None,
    check: Check | None = None,
    on_resume: Change = RECIPE,
    choices: Sequence[str] | None = None,
    aliases: Sequence[str] = (),
) -> Any:
    """A field of a configuration class that is a flag.

    Args:
        default: its value where it is not given; None means that `resolve` or the data decide.
        help: what `--help` says.
        metavar: what `--help` calls the value.
        check: what values are allowed (None, where it is the default, always is).
        on_resume: what changing it means for a run that is resumed.
        choices: the allowed words.
        aliases: other spellings, with their dashes.
    """
    metadata = dict(help=help, metavar=metavar, check=check, on_resume=on_resume, choices=choices, aliases=aliases)
    return dataclasses.field(default=default, metadata=metadata)


def with_default(flags: type["Config"], name: str, default: Any) -> Any:
    """The field of a flag that `flags` declares, with another default for one main."""
    return dataclasses.field(default=default, metadata=flags.__dataclass_fields__[name].metadata)


# --- The flags that mains and commands share ---


@dataclass(frozen=True)
class Config:
    """What all configurations can do. Writing to one is a `dataclasses.FrozenInstanceError`.

    Raises:
        UserError: on construction, for a value that is not allowed; says which flag, what was given, what is allowed.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, check = getattr(self, field.name), field.metadata["check"]
            if check is not None and value is not None and not check[0](value):
                raise UserError(f"--{field.name} {check[1]}, got {value}")

    def as_dict(self) -> dict[str, Any]:
        """All values by name, plain ones, as checkpoints store them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True)
class WeightFlags(Config):
    """What belongs to weights: `util.weights.settings` fills in what is not given."""

    TITLE: ClassVar[str] = "model and images"

    model: str | None = flag(
        None,
        f"{', '.join(PRETRAINING_MODELS)} to pretrain; {', '.join(CLASSIFIER_MODELS)} to fine-tune; or the authors' "
        "mixmim_* names (default: the one that the weights record, else Base)",
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
        "mean of each channel, in 0..1 for 8-bit images, else in the images' own units (default: that of the weights, "
        "else ImageNet's for 3 channels and 0.5 for others)",
        "X",
    )
    std: tuple[float, ...] | None = flag(
        None,
        "standard deviation of each channel, likewise (default: that of the weights, else ImageNet's, or 0.25)",
        "X",
    )
    allow_odd_statistics: bool = flag(False, "go on where --mean and --std do not fit the images", on_resume=FREE)


@dataclass(frozen=True)
class ModelFlags(Config):
    TITLE: ClassVar[str] = "model"

    patch_size: int | None = flag(None, "side of a patch (default: that of the weights, else the model's)", "PIXELS")
    window_size: tuple[int, int, int, int] | None = flag(
        None, "window side of each stage (default: those of the weights, else the model's)", "TOKENS"
    )
    drop_path: float = flag(0.0, "stochastic depth of the last block", "RATE", BELOW_1)
    grad_checkpointing: bool = flag(
        False, "store less and compute blocks twice: slower, less memory", on_resume=ROUNDING
    )
    compile: bool = flag(False, "compile the encoder's stages with torch.compile", on_resume=ROUNDING)


@dataclass(frozen=True)
class ReadingFlags(Config):
    TITLE: ClassVar[str] = "reading images"

    ignore_exif: bool = flag(
        False, "do not rotate photographs as their EXIF orientation says (the authors' code does not)"
    )
    num_workers: int = flag(
        min(10, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1),
        "data-loading processes per rank, here at most one per CPU",
        "N",
        NOT_NEGATIVE,
        on_resume=FREE,
    )
    pin_mem: bool = flag(True, "page-locked memory for copies to a GPU", aliases=("--no_pin_mem",), on_resume=FREE)


@dataclass(frozen=True)
class DataFlags(ReadingFlags):
    TITLE: ClassVar[str] = "data"

    data_path: str = flag(
        "",
        "folder with train/ (and val/), folder of images, list file, tar, or the folder of --dataset",
        "PATH",
        on_resume=other_bits("identical only if it holds the same images in the same order"),
    )
    dataset: str = flag("", "a timm.data.create_dataset name instead of files, under --data_path", "NAME")
    val_share: float = flag(
        0.0, "part of each class set aside for validation, where there is no val/", "SHARE", BELOW_1
    )
    bad_images: str = flag(
        "error",
        "stop at an unreadable image, or replace it",
        choices=("error", "skip"),
        on_resume=other_bits("other samples wherever an image cannot be read"),
    )
    max_bad_images: float = flag(
        0.01, "with --bad_images skip: stop above this share of images", "SHARE", PROBABILITY, on_resume=FREE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data_path:
            raise UserError(
                f"--data_path is missing: give the folder that --dataset {self.dataset} is in, or is downloaded to"
                if self.dataset
                else "--data_path is missing: give a folder with train/ in it, a folder of images, or a list file"
            )


@dataclass(frozen=True)
class OptimizerFlags(Config):
    TITLE: ClassVar[str] = "optimisation"

    batch_size: int = flag(64, "images per rank and micro-batch", "N", AT_LEAST_1, on_resume=BATCHES)
    epochs: int = flag(100, "epochs of the whole schedule", "N", AT_LEAST_1)
    accum_iter: int = flag(1, "micro-batches accumulated into one optimizer step", "N", AT_LEAST_1, on_resume=BATCHES)
    clip_grad: float | None = flag(None, "clip the gradient norm (default: no clipping)", "NORM", POSITIVE)
    weight_decay: float = flag(0.05, "AdamW's weight decay", "X", NOT_NEGATIVE)
    lr: float | None = flag(None, "learning rate (default: blr * effective batch / 256)", "X", NOT_NEGATIVE)
    blr: float = flag(1e-4, "base learning rate, for 256 images", "X", NOT_NEGATIVE)
    min_lr: float = flag(0.0, "learning rate at the end", "X", NOT_NEGATIVE)
    warmup_epochs: float = flag(5, "epochs of linear warm-up", "N", NOT_NEGATIVE)


@dataclass(frozen=True)
class DeviceFlags(Config):
    TITLE: ClassVar[str] = "device"

    device: str = flag("auto", "auto, cuda, cuda:N or cpu", on_resume=ROUNDING)
    precision: str | None = flag(
        None,
        "default: bf16 where a GPU has it, else fp16; on a CPU fp32",
        choices=("fp32", "bf16", "fp16"),
        on_resume=ROUNDING,
    )
    seed: int = flag(0, "all randomness follows from it", "N")


@dataclass(frozen=True)
class RunFlags(Config):
    TITLE: ClassVar[str] = "run"

    output_dir: str = flag("./output_dir", "checkpoints, logs and pictures", "DIR", on_resume=FREE)
    log_dir: str | None = flag(None, "TensorBoard files (default: output_dir)", "DIR", on_resume=FREE)
    finetune: str = flag(
        "",
        "start from weights: a path, https URL#sha256=..., or a published name such as base_600ep",
        "WEIGHTS",
        on_resume=other_bits("a resumed run goes on from its own checkpoint, so these weights are not read"),
    )
    resume: str = flag(
        "", "continue a run: from the newest intact checkpoint in output_dir, or from a file", "auto|PATH",
        on_resume=FREE,
    )  # fmt: skip
    resume_force: bool = flag(
        False, "continue even though the model or recipe differs from the checkpoint's", on_resume=FREE
    )
    start_epoch: int = flag(0, "first epoch when nothing is resumed", "N", NOT_NEGATIVE, on_resume=FREE)
    print_freq: int = flag(20, "optimizer steps between log lines", "STEPS", AT_LEAST_1, on_resume=FREE)
    save_every: int = flag(1, "epochs between checkpoints", "EPOCHS", AT_LEAST_1, on_resume=FREE)
    save_steps: int = flag(
        0, "optimizer steps between checkpoints; 0: epochs only", "STEPS", NOT_NEGATIVE, on_resume=FREE
    )
    keep_checkpoints: int = flag(3, "how many of the last checkpoints to keep", "K", AT_LEAST_1, on_resume=FREE)
    keep_every: int = flag(
        100, "epochs between checkpoints kept permanently; 0: none", "EPOCHS", NOT_NEGATIVE, on_resume=FREE
    )
    nan_dump: bool = flag(False, "on a non-finite loss, write the batch and the state into output_dir", on_resume=FREE)


@dataclass(frozen=True)
class ProcessFlags(Config):
    TITLE: ClassVar[str] = "distributed run"
    DESCRIPTION: ClassVar[str] = "Detected from torchrun, srun or (with --dist_on_itp) MPI; normally nothing to set."

    world_size: int | None = flag(
        None, "number of processes; must agree with the launcher (default: the launcher's)", "N", on_resume=BATCHES
    )
    local_rank: int = flag(
        -1,
        "index of this process on its node; must agree with the launcher (default: the launcher's)",
        "I",
        on_resume=FREE,
        aliases=("--local-rank",),
    )
    dist_on_itp: bool = flag(False, "take rank and world size from Open MPI's variables", on_resume=FREE)
    dist_url: str = flag(
        "env://", "where processes meet: env://, tcp://HOST:PORT or file:///SHARED/NEW_FILE", "URL", on_resume=FREE
    )
    port: int | None = flag(
        None, "TCP port on which rank 0 is met under srun and MPI (default: derived from the job id)", "P",
        on_resume=FREE,
    )  # fmt: skip
    dist_timeout: float = flag(
        1800.0, "a rank that keeps the others waiting for longer than this many seconds ends the run", "SECONDS",
        on_resume=FREE,
    )  # fmt: skip


@dataclass(frozen=True)
class TrainingConfig(WeightFlags, ModelFlags, OptimizerFlags, DataFlags, DeviceFlags, RunFlags, ProcessFlags):
    """What both mains share."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_epoch >= self.epochs:
            raise UserError(f"--start_epoch {self.start_epoch} leaves nothing to train: --epochs is {self.epochs}")
        if self.warmup_epochs > self.epochs:
            raise UserError(f"--warmup_epochs {self.warmup_epochs:g} is longer than the run: --epochs {self.epochs}")

    @property
    def eff_batch_size(self) -> int:
        """Images of one optimizer step over all ranks."""
        return self.batch_size * self.accum_iter * self.world_size


# --- The command line ---


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = any(action.default is value for value in (None, False, argparse.SUPPRESS)) or action.default == ""
        return action.help if hidden or "default" in action.help else super()._get_help_string(action)


def get_parser(config_class: type[Config], description: str, prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of a configuration class: one argument group for each class of flags that it is made of."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog=prog, description=description, formatter_class=HelpFormatter
    )
    kinds = typing.get_type_hints(config_class)
    for flags in config_class.__mro__:
        if "TITLE" in vars(flags):
            group = parser.add_argument_group(flags.TITLE, vars(flags).get("DESCRIPTION"))
            own = set(flags.__dataclass_fields__).difference(*(base.__dataclass_fields__ for base in flags.__bases__))
            for field in dataclasses.fields(config_class):  # with the defaults of this class
                if field.name in own:
                    _add_flag(group, field, kinds[field.name])
    return parser


def _add_flag(group: Any, field: dataclasses.Field, kind: Any) -> None:
    name, metadata, default = f"--{field.name}", field.metadata, field.default
    optional = isinstance(kind, types.UnionType)  # X | None
    kind = typing.get_args(kind)[0] if optional else kind
    if kind is bool:
        action = argparse.BooleanOptionalAction if default else "store_true"
        group.add_argument(name, action=action, default=default, help=metadata["help"])
        for alias in metadata["aliases"]:  # of one that is on by default
            group.add_argument(
                alias, action="store_false", dest=field.name, default=argparse.SUPPRESS, help="the opposite"
            )
        return
    options = {key: metadata[key] for key in ("help", "metavar", "choices") if metadata[key] is not None}
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        options["nargs"], kind = "+" if items[-1] is Ellipsis else len(items), items[0]
    group.add_argument(name, *metadata["aliases"], type=kind, default=default, **options)


def given_flags(config_class: type[C], flags: argparse.Namespace) -> C:
    """The parsed flags, checked one by one and against each other, before anything is read or written.

    Raises:
        UserError: naming the flag, what was given and what is allowed.
    """
    values = {field.name: getattr(flags, field.name) for field in dataclasses.fields(config_class)}
    return config_class(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def resolve(given: C, launch: Launch, settings: WeightSettings) -> C:
    """The configuration: what was given, and what follows from it.

    Args:
        given: of `given_flags`.
        launch: the processes of the run; `world_size` and `device` become what they are.
        settings: what belongs to the weights (`util.weights.settings.weight_settings`), for what was not given.

    Raises:
        UserError: a precision that the device does not have.
    """
    names = {field.name for field in dataclasses.fields(given)}
    values = {name: value for name, value in settings.values().items() if name in names}
    values |= {"world_size": launch.world_size, "device": launch.device.type}
    values["precision"] = resolve_precision(given.precision, launch.device)
    if "log_dir" in names:
        values["log_dir"] = given.log_dir or given.output_dir
    config = dataclasses.replace(given, **values)
    if "lr" in names and config.lr is None:
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
    changes = {field.name: field.metadata["on_resume"] for field in dataclasses.fields(config_class)}
    free = {name for name, change in changes.items() if change is FREE} | OBSOLETE
    errors, warnings = [], []
    for name in sorted((saved.keys() & now.keys()) - free):
        before, after, change = _comparable(name, saved[name]), _comparable(name, now[name]), changes[name]
        difference = f"{name}: {before} -> {after}"
        if before == after or (name == "model" and is_authors_name(before, after)):
            continue
        if change.allowed:
            warnings.append(f"{difference} ({change.difference})")
        elif name == "lr" and _follows_batch_size(saved) and _follows_batch_size(now):
            warnings.append(f"{difference} (it follows the effective batch size)")
        else:
            errors.append(difference)
    unknown = sorted((saved.keys() ^ now.keys()) - free)
    if unknown:
        warnings.append(f"only in the checkpoint or only in this version, so not compared: {', '.join(unknown)}")
    return errors, warnings


def effective_batch(settings: Mapping[str, Any]) -> int | None:
    """The effective batch size that recorded settings give, or None where they do not say."""
    factors = [settings.get(name) for name in ("batch_size", "accum_iter", "world_size")]
    return None if any(type(factor) is not int for factor in factors) else factors[0] * factors[1] * factors[2]


def _follows_batch_size(settings: Mapping[str, Any]) -> bool:
    """Whether the learning rate is the one derived from the base learning rate, rather than given."""
    size = effective_batch(settings)
    return None not in (size, settings.get("blr")) and settings["lr"] == settings["blr"] * size / 256


def _comparable(name: str, value: Any) -> Any:
    """A setting in a form in which equal ones of all versions, and of the authors' program, are equal."""
    if name == "input_size" and isinstance(value, int):
        return (value, value)
    if name == "device":
        return str(value).partition(":")[0]
    return tuple(value) if isinstance(value, list) else value
