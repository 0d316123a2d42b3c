"""A trained model for other programs: classifier, encoder or feature pyramid, in five formats.

    python -m util.export --checkpoint finetuned/checkpoint.pth --format onnx --out classifier.onnx --images photos/
    python -m util.export --checkpoint base_600ep --part pyramid --format torch_export --out pyramid.pt2
    python -m util.export --checkpoint base_600ep --format timm --out encoder  # timm.create_model("local-dir:encoder")

Before a file gets its final name, the program that it is for loads it back, and it is compared with the model here,
with one and with five images. It also records how images are prepared, and the names of the classes; `--finetune`,
`--eval` and `util.predict` read these.
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor

from util.data.datasets import NumberedImages
from util.data.open_source import open_images
from util.data.transforms import Normalize, crop_ratio, eval_transform
from util.errors import UserError, unreadable_is_user_error
from util.layers.conversion import MIX_EMBEDS
from util.run.config import CheckpointFlags, DecodingFlags, with_settings
from util.run.failures import user_errors
from util.run.flags import flag, get_parser, given_flags
from util.run.logger import setup_logging
from util.seeding import keyed_generator
from util.weights.file import FORMAT, RECORD, make_folder, read_checkpoint, sync_folder, write_checkpoint
from util.weights.parts import (
    PARTS,
    Part,
    Runner,
    as_list,
    load_part,
    make_record,
    open_onnx,
    open_torch_export,
    output_names,
)
from util.weights.settings import WeightSettings, model_arguments
from util.weights.source import WeightsInfo, read_weights

logger = logging.getLogger(__name__)

BATCHES = (1, 5)  # with which an exported model is tried
TOLERANCE = 1e-4  # of its outputs, relative to the largest where that is above 1
ONNX_LIMIT = 2 * 10**9  # bytes of weights in one file
WITHOUT_SCALING = torch.amp.GradScaler("cpu").state_dict()  # what a loss scaler starts with


@dataclass
class Export:
    """What is exported."""

    part: Part
    settings: WeightSettings
    info: WeightsInfo
    record: dict[str, Any]  # see `make_record`
    imgs: Tensor  # (5, C, H, W) normalised, to record and to compare with
    averaged: bool  # whether the weights are the averaged ones


# --- The formats: write to a path; open what was written as a function of images ---


def write_safetensors(export: Export, path: Path) -> None:
    weights = {name: tensor.contiguous() for name, tensor in export.part.model.state_dict().items()}
    save_file(weights, path, {"format": "pt", RECORD: json.dumps(export.record)})
    os.umask(umask := os.umask(0))
    path.chmod(0o666 & ~umask)  # as any other file: the library lets its owner alone read it


def open_weights(export: Export, path: Path, given: dict[str, Any] | None = None) -> Runner:
    """A file of weights as `--finetune` and `--eval` read it; without `given`, told nothing but what is in the file."""
    weights, info = read_weights(path)
    part, _, _ = load_part(weights, info, given, export.part.name)
    return lambda imgs: as_list(part(imgs))


def write_timm(export: Export, path: Path) -> None:
    """A folder as on the Hugging Face hub: config.json and model.safetensors."""
    path.mkdir()
    write_safetensors(export, path / "model.safetensors")
    settings, model, record = export.settings, export.part.model, export.record
    images = {"input_size": (settings.in_chans, *settings.input_size), "mean": settings.mean, "std": settings.std}
    recorded = {name: record[name] for name in ("num_classes", "crop_pct", "interpolation")}
    config = {
        "architecture": settings.model,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": "avg",
        "model_args": model_arguments(settings),
        "pretrained_cfg": timm.get_pretrained_cfg(settings.model).to_dict() | images | recorded,
    }
    if record["classes"]:
        config["label_names"] = record["classes"]
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def open_timm(export: Export, path: Path) -> Runner:
    model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    return lambda imgs: [model(imgs)]


def write_onnx(export: Export, path: Path) -> None:
    """An ONNX file; PyTorch puts weights of more than 1.5 GiB beside it, under its name and `.data`."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs packages that are not installed: pip install {' '.join(missing)}")
    size = 4 * sum(parameter.numel() for parameter in export.part.parameters())
    if size > ONNX_LIMIT:
        raise UserError(
            f"{export.settings.model} has {size / 1e9:.1f} GB of weights, and an ONNX file holds at most 2: use "
            "--format torch_export or safetensors"
        )
    program = torch.onnx.export(
        export.part,
        (export.imgs[:2],),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=output_names(export.part.name),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    program.model.metadata_props[RECORD] = json.dumps(export.record)
    program.save(path)


def write_torch_export(export: Export, path: Path) -> None:
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(export.part, (export.imgs[:2],), dynamic_shapes=batch)
    torch.export.save(program, path, extra_files={RECORD: json.dumps(export.record)})


def write_authors(export: Export, path: Path) -> None:
    """A checkpoint as the authors' scripts read it: with every tensor that their models register, and a loss scaler."""
    checkpoint = read_checkpoint(export.info.path)
    weights, _ = read_weights(export.info.path, ema=export.averaged)
    unknown = [name for name in weights if name in (*MIX_EMBEDS, "fill_token")]
    if unknown or checkpoint.get("args", {}).get("fill", "partner") != "partner":
        raise UserError(
            f"the authors' programs have no such variant of the method ({', '.join(unknown[:1]) or '--fill'}): "
            "--format safetensors keeps the encoder, whose features are the same"
        )
    optimizer = checkpoint.get("optimizer")
    if optimizer is not None:
        ours = ("name", "fused")  # settings of groups that theirs does not have
        groups = [{key: group[key] for key in group if key not in ours} for group in optimizer["param_groups"]]
        checkpoint["optimizer"] = {**optimizer, "param_groups": groups}
    kept = {name: checkpoint[name] for name in ("optimizer", "epoch", "args", "classes") if name in checkpoint}
    scaler = checkpoint.get("scaler") or WITHOUT_SCALING  # they load one always; ours is empty without fp16
    write_checkpoint(path, {**kept, "format": FORMAT, "model": with_position_index(weights), "scaler": scaler})


def with_position_index(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the (N, N) rows of every bias table, which the authors' models save, and ours derive."""
    indices = {}
    for name, table in weights.items():
        if name.endswith("relative_position_bias_table"):
            window = (round(len(table) ** 0.5) + 1) // 2  # the table has (2 * window - 1) ** 2 rows
            indices[name.replace("bias_table", "index")] = get_relative_position_index(window, window)
    return weights | indices


ENDINGS = {"safetensors": ".safetensors", "timm": "", "onnx": ".onnx", "torch_export": ".pt2", "authors": ".pth"}
Writer, Opener = Callable[[Export, Path], None], Callable[[Export, Path], Runner]
FORMATS: dict[str, tuple[Writer, Opener]] = {
    "safetensors": (write_safetensors, open_weights),
    "timm": (write_timm, open_timm),
    "onnx": (write_onnx, lambda _, path: open_onnx(path)[0]),
    "torch_export": (write_torch_export, lambda _, path: open_torch_export(path)[0]),
    # The authors' scripts are told which model it is.
    "authors": (write_authors, lambda export, path: open_weights(export, path, export.settings.values())),
}


# --- The command ---


@dataclass(frozen=True)
class ExportConfig(CheckpointFlags, DecodingFlags):
    TITLE: ClassVar[str] = "export"

    format: str = flag("", "what to write", choices=tuple(FORMATS), required=f"one of {', '.join(FORMATS)}")
    out: str = flag(
        "", "the file to write, for timm a folder; it must not exist yet", "PATH",
        required="the file, or for timm the folder",
    )  # fmt: skip
    part: str | None = flag(
        None,
        "what it returns: logits; the mean of the last stage; the maps of the four stages (default: classifier if "
        "there is a head)",
        choices=PARTS,
    )
    images: tuple[str, ...] | None = flag(
        None, "images, folders or lists to compare with (default: smooth random ones)", "PATH"
    )
    seed: int = flag(0, "seed of the random images", "N")
    model_ema: bool = flag(False, "use the averaged weights in the checkpoint")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part == "pyramid" and self.format in ("safetensors", "timm"):
            raise UserError(
                f"--part pyramid is not for --format {self.format}, which holds weights alone: export the encoder, and "
                "let timm.create_model(..., features_only=True) make the pyramid"
            )
        ending = ENDINGS[self.format]
        if not self.out.endswith(ending):
            raise UserError(f"--format {self.format} writes a {ending} file: give --out {Path(self.out).stem}{ending}")


def get_args_parser() -> argparse.ArgumentParser:
    return get_parser(ExportConfig, "Export a trained model for other programs.", "python -m util.export")


def example_images(config: ExportConfig) -> Tensor:
    """Images (5, C, H, W), prepared as for evaluation: the first of `--images`, over again if they are fewer."""
    count = max(BATCHES)
    if not config.images:
        coarse = torch.randn(count, config.in_chans, 8, 8, generator=keyed_generator(config.seed, "images"))
        return F.interpolate(coarse, config.input_size, mode="bicubic", align_corners=False)
    dataset = NumberedImages(open_images(config.images, config), eval_transform(config), config.seed)
    normalize = Normalize(config.mean, config.std)
    images = [normalize(dataset[(0, i)][0]) for i in range(min(count, len(dataset)))]
    return torch.stack([images[i % len(images)] for i in range(count)])


@torch.no_grad()
def largest_difference(run: Runner, part: Part, imgs: Tensor) -> float:
    """Between the outputs of an exported model and the model's own, relative to the largest where that is above 1.

    Raises:
        UserError: it is above `TOLERANCE`, or not a number.
    """
    largest = 0.0
    for batch in BATCHES:
        expected, outputs = as_list(part(imgs[:batch])), run(imgs[:batch])
        if [output.shape for output in outputs] != [output.shape for output in expected]:
            raise UserError(f"the exported model gives other outputs for {batch} images: please report this as a bug")
        for ours, theirs in zip(expected, outputs):
            difference = ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)).item()
            if not difference <= TOLERANCE:
                raise UserError(
                    f"the exported model computes something else for {batch} images: its outputs differ by "
                    f"{difference:.2g} (at most {TOLERANCE:g}). Nothing was written; please report this as a bug"
                )
            largest = max(largest, difference)
    return largest


@torch.no_grad()
def export_model(config: ExportConfig) -> None:
    """Write the exported model, once it has been compared.

    Raises:
        UserError: for what the user can put right.
    """
    out = Path(config.out)
    fixed = [name for name in ("part", "input_size", "mean", "std") if getattr(config, name) is not None]
    if fixed and config.format == "authors":
        raise UserError(f"--format authors keeps the checkpoint as it is: leave out --{fixed[0]}")
    for path in (out, Path(f"{out}.data")) if config.format == "onnx" else (out,):
        if os.path.lexists(path):
            raise UserError(f"--out: {path} exists already: give another name, or remove it first")
    weights, info = read_weights(config.checkpoint, ema=config.model_ema)
    part, settings, report = load_part(weights, info, config.as_dict(), config.part)
    logger.info("%s", report)
    record = make_record(part, settings, info, crop_ratio(settings.input_size))
    imgs = example_images(with_settings(config, settings))
    export = Export(part, settings, info, record, imgs, config.model_ema)
    write, load_back = FORMATS[config.format]
    with unreadable_is_user_error(f"--out {out} cannot be written"):
        make_folder(out.parent)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as folder:
            written = Path(folder) / out.name
            write(export, written)
            difference = largest_difference(load_back(export, written), part, export.imgs)
            for path in sorted(Path(folder).iterdir(), reverse=True):  # NAME.onnx.data before NAME.onnx
                os.replace(path, out.parent / path.name)
        sync_folder(out.parent)
    logger.info(
        "wrote %s: %s of %s as %s; loaded back, its outputs differ by at most %.2g (%s images)",
        out, part.name, settings.model, config.format, difference, " and ".join(map(str, BATCHES)),
    )  # fmt: skip


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        setup_logging()
        export_model(given_flags(ExportConfig, flags))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
