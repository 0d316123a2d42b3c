"""The settings that belong to weights: which model they fit, and how its images are prepared.

All commands get them from `weight_settings`, so that they agree on what a file leaves open.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import timm

import models_mixmae
import models_swin
from util.errors import UserError
from util.weights.file import CheckpointError

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SIZES = ("input_size", "patch_size", "window_size")
PRETRAINING_MODELS = [name.removesuffix(".") for name in models_mixmae.default_cfgs]
CLASSIFIER_MODELS = [name.removesuffix(".") for name in models_swin.default_cfgs]
ENCODERS = {  # pretraining model -> the classifier with the same encoder
    "mixmae_quickstart": "swin_quickstart",
    "mixmae_tiny": "swin_tiny_w14",
    "mixmae_base": "swin_base_w14",
    "mixmae_large": "swin_large_w14",
    "mixmae_huge": "swin_huge_w14",
}
AUTHORS_PRETRAINING_NAMES = {name.replace("mixmae_", "mixmim_"): name for name in PRETRAINING_MODELS}
AUTHORS_CLASSIFIER_NAMES = {
    "mixmim_base": "swin_base_w14",
    "mixmim_base_384": "swin_base_w16_384",
    "mixmim_large": "swin_large_w14",
    "mixmim_large_384": "swin_large_w16_384",
    "mixmim_huge": "swin_huge_w14",
}


@dataclass(frozen=True)
class WeightSettings:
    """What has to be known to build the model for some weights and to prepare images for it."""

    model: str
    in_chans: int
    input_size: tuple[int, int]  # height, width
    patch_size: int | None  # None: the model's own
    window_size: tuple[int, ...] | None  # likewise
    mean: tuple[float, ...]  # per channel; in 0..1 for pictures of 8 or 16 bits, else in the images' own units
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.in_chans:
                raise UserError(
                    f"--{name} needs one value for each of {self.in_chans} channels, got {getattr(self, name)}"
                )
            if not all(map(math.isfinite, getattr(self, name))):
                raise UserError(f"--{name} must be finite numbers, got {getattr(self, name)}")
        if not min(self.std) > 0:
            raise UserError(f"--std must be positive, got {self.std}")

    def values(self) -> dict[str, Any]:
        """The settings by the names of their flags."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def weight_settings(
    recorded: Mapping[str, Any],
    source: str,
    given: Mapping[str, Any] | None = None,
    pretraining: bool = False,
    defaults: Mapping[str, Any] | None = None,
) -> WeightSettings:
    """The settings for weights that are used: what is given, else what is recorded with them, else the model's own.

    Sizes that are recorded for another encoder are ignored. So are statistics of another number of channels: these are
    then ImageNet's for 3 channels, and mean 0.5 and standard deviation 0.25 for others.

    Args:
        recorded: the arguments stored with the weights; {} if there are none.
        source: what the weights are called, for messages.
        given: flags by name, which take precedence; None and missing ones are not given.
        pretraining: whether the model is to be a pretraining model, rather than a classifier or encoder.
        defaults: by name, for what neither has; without a model in it, weights that record none are an error.

    Raises:
        UserError: an unknown model, a record of another type, statistics that do not fit the channels.
    """
    check_recorded(recorded, source)
    defaults = defaults or {}
    recorded, given = (
        {flag: value for flag, value in values.items() if value is not None} for values in (recorded, given or {})
    )
    name = given.get("model") or recorded.get("model") or defaults.get("model")
    if name is None:
        raise CheckpointError(f"{source} does not record which model it is: give --model")
    model = resolve_model_name(
        name, pretraining, "--model" if "model" in given else f"{source}, which records the model"
    )
    if encoder_of(recorded.get("model", model)) != encoder_of(model):
        recorded = {flag: value for flag, value in recorded.items() if flag not in SIZES}
    known = {**defaults, **recorded, **given}
    in_chans = known.get("in_chans", 3)
    input_size = known.get("input_size", timm.get_pretrained_cfg(model).input_size)
    input_size = (input_size,) if isinstance(input_size, int) else tuple(input_size)
    if len(given.get("input_size", ())) > 2:
        raise UserError(f"--input_size takes one side, or height and width, got {input_size}")
    if in_chans == len(IMAGENET_MEAN):
        statistics = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    else:
        statistics = {"mean": (0.5,) * in_chans, "std": (0.25,) * in_chans}
    for name in statistics:
        if len(recorded.get(name, ())) == in_chans:
            statistics[name] = tuple(recorded[name])
            if tuple(given.get(name, recorded[name])) != statistics[name]:
                logger.warning(
                    "--%s %s, but %s was trained with %s", name, list(given[name]), source, list(statistics[name])
                )
        statistics[name] = tuple(given.get(name, statistics[name]))
    window_size = known.get("window_size")
    return WeightSettings(
        model=model,
        in_chans=in_chans,
        input_size=(2 * input_size)[-2:],  # of one side, twice; of channels, height and width, the last two
        patch_size=known.get("patch_size"),
        window_size=None if window_size is None else tuple(window_size),
        **statistics,
    )


def resolve_model_name(name: str, pretraining: bool, origin: str = "--model") -> str:
    """Our name of a model given by our name or the authors'; if no pretraining model is wanted, its encoder's.

    Raises:
        UserError: for an unknown name, or a classifier if a pretraining model is wanted; lists the known ones.
    """
    if pretraining and name in CLASSIFIER_MODELS:
        raise UserError(
            f"{origin} {name}: this is a classifier, a pretraining model is needed: {', '.join(PRETRAINING_MODELS)}"
        )
    if pretraining:
        names, aliases, ours = PRETRAINING_MODELS, AUTHORS_PRETRAINING_NAMES, AUTHORS_PRETRAINING_NAMES.get(name, name)
    else:
        names, aliases, ours = CLASSIFIER_MODELS, AUTHORS_CLASSIFIER_NAMES, encoder_of(name)
    if ours not in names:
        raise UserError(f"{origin} {name} is not known: give --model one of {', '.join([*names, *aliases])}")
    return ours


def encoder_of(name: str) -> str:
    """The encoder in a model that is given by our name or the authors'; the name itself if it is not known."""
    ours = AUTHORS_CLASSIFIER_NAMES.get(name) or AUTHORS_PRETRAINING_NAMES.get(name, name)
    return ENCODERS.get(ours, ours)


def is_authors_name(name: str, ours: str) -> bool:
    """Whether `name` is what the authors call the model, or the encoder in the model, that we call `ours`."""
    return name in {**AUTHORS_CLASSIFIER_NAMES, **AUTHORS_PRETRAINING_NAMES} and encoder_of(name) == encoder_of(ours)


def model_arguments(settings: Any) -> dict[str, Any]:
    """The arguments of a model's constructor in settings or in a configuration; the others keep its defaults."""
    arguments = {
        "in_chans": settings.in_chans,
        "img_size": settings.input_size,
        "patch_size": settings.patch_size,
        "window_size": settings.window_size,
    }
    return {name: value for name, value in arguments.items() if value is not None}


MIXING = (  # arguments of `MixMAE` that a checkpoint records by the same names
    "decoder_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss", "range_mask_ratio",
    "mix_embed", "masked_attn", "mix_images", "partners", "reconstruct", "fill",
)  # fmt: skip
METHOD = (*MIXING, "mask_ratio", "mask_per_pair")  # everything that defines a variant of the method


def mixing_arguments(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pretraining model besides its encoder's, from a configuration or recorded with weights."""
    return {name: recorded[name] for name in MIXING if recorded.get(name) is not None}


def check_recorded(recorded: Mapping[str, Any], source: str) -> None:
    """Raise a CheckpointError unless what `source` records of model and data has the types of the flags."""

    def is_list_of(kinds: tuple[type, ...], value: object) -> bool:
        return isinstance(value, (list, tuple)) and len(value) > 0 and all(type(item) in kinds for item in value)

    rules = {
        ("model", "partners", "reconstruct", "fill"): lambda value: isinstance(value, str),
        ("in_chans", "patch_size", "decoder_dim", "decoder_depth", "decoder_num_heads", "mix_images"): (
            lambda value: type(value) is int and value > 0
        ),
        ("window_size",): lambda value: is_list_of((int,), value),
        ("input_size",): lambda value: type(value) is int or is_list_of((int,), value),
        ("mean", "std"): lambda value: is_list_of((int, float), value),
        ("mask_ratio",): lambda value: type(value) is float and 0 < value < 1,
        ("range_mask_ratio",): lambda value: type(value) in (int, float) and 0 <= value < 1,
        ("norm_pix_loss", "mix_embed", "masked_attn"): lambda value: type(value) is bool,
    }
    for names, is_legal in rules.items():
        for name in names:
            if recorded.get(name) is not None and not is_legal(recorded[name]):
                raise CheckpointError(f"{source} records {name}={recorded[name]!r}, which is not a value of --{name}")
