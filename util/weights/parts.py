"""What of a trained model is used elsewhere (its classes, its embedding or its maps), and what travels with it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import timm
from torch import Tensor, nn

from models_swin import SwinTransformer
from util.weights.file import FORMAT, CheckpointError
from util.weights.layouts import count_classes, load_classifier, load_encoder
from util.weights.settings import WeightSettings, model_arguments, weight_settings
from util.weights.source import WeightsInfo, recorded_classes

PARTS = ("classifier", "encoder", "pyramid")


class Part(nn.Module):
    """A trained model as a function of normalised images (B, C, H, W) alone.

    'classifier': logits (B, classes). 'encoder': the mean of the normed last stage (B, num_features), as the
    classification head sees it. 'pyramid': the four stages' maps, each (B, channels, rows, columns).
    """

    def __init__(self, model: SwinTransformer, name: str):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, imgs: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.name == "pyramid":
            return tuple(self.model.forward_intermediates(imgs, intermediates_only=True))
        return self.model.forward_head(self.model.forward_features(imgs), pre_logits=self.name == "encoder")


def as_list(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs of a part, one or several."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def output_names(part: str, stages: int = 4) -> list[str]:
    """The names of a part's outputs, in their order."""
    names = {"classifier": ["logits"], "encoder": ["features"]}
    return names.get(part) or [f"stage{i + 1}" for i in range(stages)]


def load_part(
    weights: dict[str, Tensor],
    info: WeightsInfo,
    given: Mapping[str, Any] | None = None,
    part: str | None = None,
) -> tuple[Part, WeightSettings, str]:
    """A part of trained weights, ready to be used, its settings, and the report of loading.

    Args:
        weights, info: of `read_weights`.
        given: flags that override what is recorded, as for `weight_settings`.
        part: one of `PARTS`; None: the classifier if the weights have a head, else the encoder.

    Raises:
        UserError: the weights do not say which model they are, or do not fit it, or have no head.
    """
    part = part or ("classifier" if "head.weight" in weights else "encoder")
    settings = weight_settings(info.args, info.source, given)
    number = count_classes(weights, info) if part == "classifier" else 0
    model = timm.create_model(settings.model, num_classes=number, **model_arguments(settings))
    report = (load_classifier if number else load_encoder)(model, weights, info)
    if settings.window_size is None:
        settings = replace(settings, window_size=tuple(stage.window for stage in model.layers))
    if info.classes is not None and number and len(info.classes) != number:
        raise CheckpointError(f"{info} records the names of {len(info.classes)} classes, but classifies {number}")
    return Part(model.eval(), part).eval(), settings, str(report)


# --- The record that travels inside an exported file ---


def make_record(part: Part, settings: WeightSettings, info: WeightsInfo, crop_ratio: float) -> dict[str, Any]:
    """What a file must tell for its images to be prepared and its outputs to be understood; plain values."""
    return {
        "format": FORMAT,
        "part": part.name,
        "args": settings.values(),
        "epoch": info.epoch,
        "classes": info.classes if part.name == "classifier" else None,
        "num_classes": part.model.num_classes,
        "crop_pct": crop_ratio,  # of evaluation; follows from the input size
        "interpolation": "bicubic",
    }


def parse_record(text: str, source: object) -> tuple[dict[str, Any], WeightsInfo]:
    """The record of an exported file, and what `read_weights` would tell of it.

    Raises:
        CheckpointError: no record of ours, or one of a newer version.
    """
    try:
        record = json.loads(text)
        plain = isinstance(record["args"], dict) and type(record["format"]) is int
        if record["part"] not in PARTS or not plain or "epoch" not in record:
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{source} was not written by `python -m util.export`: it does not tell how its images are prepared"
        ) from error
    if record["format"] > FORMAT:
        raise CheckpointError(
            f"{source} was written by a newer version of this project (format {record['format']}, this one reads up "
            f"to {FORMAT}): update to read it"
        )
    classes = recorded_classes(record, source)
    return record, WeightsInfo(str(source), source, "mixmae", record["args"], record["epoch"], classes)
