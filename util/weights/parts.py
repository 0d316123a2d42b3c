"""The part of a trained model that is used elsewhere (its classes, embedding or maps), and the record with it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from models_swin import SwinTransformer
from util.errors import UserError
from util.layers.sizes import NUM_STAGES
from util.weights.file import FORMAT, RECORD, CheckpointError, refuse_newer
from util.weights.layouts import count_classes, load_classifier, load_encoder
from util.weights.settings import WeightSettings, model_arguments, weight_settings
from util.weights.source import WeightsInfo, recorded_classes

Runner = Callable[[Tensor], list[Tensor]]  # images (B, C, H, W) -> the outputs of a part
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


def output_names(part: str) -> list[str]:
    """The names of a part's outputs, in their order."""
    names = {"classifier": ["logits"], "encoder": ["features"]}
    return names.get(part, [f"stage{i + 1}" for i in range(NUM_STAGES)])


def load_part(
    weights: dict[str, Tensor],
    info: WeightsInfo,
    given: Mapping[str, Any] | None = None,
    part: str | None = None,
) -> tuple[Part, WeightSettings, str]:
    """A part of trained weights, ready to be used, its settings, and the report of loading.

    Args:
        weights, info: from `read_weights`.
        given: flags that override what is recorded, as for `weight_settings`.
        part: one of `PARTS`; None: the classifier if the weights have a head, else the encoder.

    Raises:
        UserError: the weights do not record their model, or do not fit it, or have no head.
    """
    part = part or ("classifier" if "head.weight" in weights else "encoder")
    settings = weight_settings(info.args, info.source, given)
    number = count_classes(weights, info) if part == "classifier" else 0
    model = timm.create_model(settings.model, num_classes=number, **model_arguments(settings))
    if part == "pyramid":
        model.norm = nn.Identity()  # maps are taken before it, and detectors have none
    report = (load_classifier if number else load_encoder)(model, weights, info)
    if settings.window_size is None:
        settings = replace(settings, window_size=tuple(stage.window for stage in model.layers))
    if info.classes is not None and number and len(info.classes) != number:
        raise CheckpointError(f"{info} records the names of {len(info.classes)} classes, but has {number}")
    return Part(model.eval(), part).eval(), settings, str(report)


# --- The record that travels inside an exported file ---


def make_record(part: Part, settings: WeightSettings, info: WeightsInfo, crop_ratio: float) -> dict[str, Any]:
    """What a file must record for its images to be prepared and its outputs understood; plain values."""
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
    """The record of an exported file, and what `read_weights` would return about it.

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
            f"{source} was not written by `python -m util.export`: it does not record how its images are prepared"
        ) from error
    refuse_newer(record, source)
    classes = recorded_classes(record, source)
    return record, WeightsInfo(str(source), source, record["args"], record["epoch"], classes)


# --- Exported models in the runtimes that they were exported for ---


def open_onnx(path: Path) -> tuple[Runner, dict[str, Any], WeightsInfo]:
    """An exported ONNX file in onnxruntime, on a GPU if that package supports one; its record; where it came from.

    Raises:
        UserError: onnxruntime is not installed.
        CheckpointError: the file is damaged, foreign or of a newer version.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path} is an ONNX file: `pip install onnxruntime` (or onnxruntime-gpu) to run it") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers)
    except Exception as error:  # onnxruntime's exceptions have no common class of their own
        raise CheckpointError(f"{path} is damaged or not an ONNX file: {str(error).splitlines()[0]}") from error
    record, info = parse_record(session.get_modelmeta().custom_metadata_map.get(RECORD, ""), path)
    name = session.get_inputs()[0].name

    def run(imgs: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {name: imgs.cpu().numpy()})]

    return run, record, info


def open_torch_export(path: Path) -> tuple[Runner, dict[str, Any], WeightsInfo]:
    """An exported `.pt2` file, run by PyTorch; its record; where it came from.

    Raises:
        CheckpointError: the file is damaged, foreign or of a newer version.
    """
    extra = {RECORD: ""}
    try:
        with open(path, "rb") as file:  # whatever it is called
            program = torch.export.load(file, extra_files=extra)
    except Exception as error:  # whatever a damaged archive makes the reader raise
        raise CheckpointError(f"{path} is damaged or not a program of torch.export: {error}") from error
    record, info = parse_record(extra[RECORD], path)
    module = program.module()

    def run(imgs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return as_list(module(imgs))

    return run, record, info
