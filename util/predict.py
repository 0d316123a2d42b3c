"""Classes or features of images, in the order in which they are given.

    python -m util.predict --checkpoint finetuned/checkpoint.pth photos/ more/cat.jpg             # printed
    python -m util.predict --checkpoint base_600ep_ft photos/ --out classes.csv                   # the top 5
    python -m util.predict --checkpoint base_600ep list.txt --features --out embeddings.npz       # (images, channels)
    python -m util.predict --checkpoint base_600ep photos/ --dense --out maps.npz                 # the stages' maps
    torchrun --standalone --nproc_per_node 8 -m util.predict ...                                  # ranks share them

The checkpoint may also be a model exported by `python -m util.export --format onnx`. Images are prepared as in
evaluation, with the settings recorded with the weights. An `.npz` holds `paths` and one array per output, with one row
per image; results are collected in files beside `--out`, so that any number of images fits into memory.
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import contextlib
import csv
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from util.data.datasets import NumberedImages, build_loader
from util.data.open_source import open_images
from util.data.samplers import EvalBatchSampler
from util.data.transforms import Normalize, eval_transform
from util.errors import UserError, unreadable_is_user_error
from util.run import distributed
from util.run.checks import check_statistics
from util.run.config import CheckpointFlags, DeviceFlags, ProcessFlags, ReadingFlags, resolve
from util.run.failures import user_errors
from util.run.flags import AT_LEAST_1, flag, get_parser, given_flags
from util.run.launch import Launch
from util.run.logger import setup_logging
from util.run.optim import autocast
from util.run.progress import with_progress
from util.weights.file import make_folder
from util.weights.parts import Runner, as_list, load_part, open_onnx, output_names
from util.weights.settings import weight_settings
from util.weights.source import WeightsInfo, read_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictConfig(CheckpointFlags, ReadingFlags, DeviceFlags, ProcessFlags):
    TITLE: ClassVar[str] = "prediction"
    DESCRIPTION: ClassVar[str] = "--checkpoint may also be a model exported by `python -m util.export --format onnx`."

    features: bool = flag(False, "embeddings instead of classes: the mean of the encoder's last stage")
    dense: bool = flag(False, "the maps of the encoder's four stages instead of classes (needs an .npz)")
    top: int = flag(5, "how many classes per image", "K", AT_LEAST_1)
    out: str = flag("", "file to write, replacing an older one; without it, classes are printed", "FILE.csv|FILE.npz")
    bad_images: str = flag(
        "error", "stop at an unreadable image, or name it and leave it out", choices=("error", "skip")
    )
    model_ema: bool = flag(False, "use the averaged weights in the checkpoint")
    batch_size: int = flag(64, "images per rank at a time", "N", AT_LEAST_1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features and self.dense:
            raise UserError("--features and --dense exclude each other")
        if self.out and Path(self.out).suffix not in (".csv", ".npz"):
            raise UserError(f"--out {self.out} must end in .csv or .npz")
        if self.dense and not self.out.endswith(".npz"):
            raise UserError(f"--dense writes an .npz: give --out FILE.npz, not '{self.out}'")
        if self.features and not self.out:
            raise UserError("--features needs --out FILE.npz (or FILE.csv)")

    @property
    def part(self) -> str:
        return "encoder" if self.features else "pyramid" if self.dense else "classifier"


def get_args_parser() -> argparse.ArgumentParser:
    parser = get_parser(PredictConfig, "Classes or features of images.", "python -m util.predict")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGES", help="image files, folders (however nested), list files, tars"
    )
    return parser


def load_model(given: PredictConfig, launch: Launch) -> tuple[Runner, PredictConfig, WeightsInfo]:
    """The model as a function, the configuration completed by what is recorded with it, and where it came from.

    Raises:
        UserError: the checkpoint cannot be used for what is asked.
    """
    if given.checkpoint.endswith(".onnx"):
        return load_onnx(given, launch)
    weights, info = distributed.once_per_node(partial(read_weights, given.checkpoint, given.model_ema))
    module, settings, report = load_part(weights, info, given.as_dict(), given.part)
    logger.info("%s", report)
    config = resolve(given, launch, settings)
    module = module.to(launch.device)

    def run(imgs: Tensor) -> list[Tensor]:
        with autocast(config.precision, launch.device):
            return as_list(module(imgs))

    return run, config, info


def load_onnx(given: PredictConfig, launch: Launch) -> tuple[Runner, PredictConfig, WeightsInfo]:
    """As `load_model`, for an exported ONNX file, whose model and image size are fixed."""
    path = Path(given.checkpoint)
    if not path.is_file():
        raise UserError(f"--checkpoint {path} does not exist")
    for name in ("precision", "model_ema"):
        if getattr(given, name):
            raise UserError(f"--{name}: {path} was exported as it is; leave the flag out, or export again")
    run, record, info = open_onnx(path)
    fixed, config = (weight_settings(info.args, str(path), flags) for flags in (None, given.as_dict()))
    for name in ("model", "in_chans", "input_size"):
        if getattr(config, name) != getattr(fixed, name):
            raise UserError(
                f"--{name} {getattr(config, name)}: {path} was exported with {getattr(fixed, name)}; export again for "
                "another"
            )
    if record["part"] != given.part:
        raise UserError(
            f"{path} holds a model's {record['part']}; its {given.part} is asked for: export --part {given.part}"
        )
    return run, resolve(given, launch, config), info


# --- Images through the model ---


@torch.inference_mode()
def run_model(
    model: Runner, loader: DataLoader, normalize: Normalize, config: PredictConfig, folder: Path
) -> tuple[list[str], list[int]]:
    """Put the results of this rank's images into files NAME.RANK.npy of the folder, one row per image.

    Returns:
        The names of the results, and the numbers of the images that could not be read.
    """
    device, rank, start, bad = normalize.mean.device, distributed.get_rank(), 0, []
    arrays: dict[str, np.ndarray] = {}
    for imgs, numbers in with_progress(loader, len(loader.dataset), "prediction"):
        outputs = [output.float() for output in model(normalize(imgs.to(device, non_blocking=True)))]
        if config.part == "classifier":
            scores, classes = outputs[0].softmax(dim=1).topk(min(config.top, outputs[0].shape[1]), dim=1)
            results = {"classes": classes, "scores": scores}
        else:
            results = dict(zip(output_names(config.part), outputs))
        for name, rows in results.items():
            rows = rows.cpu().numpy()
            if name not in arrays:
                shape = (len(loader.batch_sampler.indices), *rows.shape[1:])
                file = folder / f"{name}.{rank}.npy"
                arrays[name] = np.lib.format.open_memmap(file, "w+", rows.dtype, shape)
            arrays[name][start : start + len(rows)] = rows
        for position in (numbers < 0).nonzero().flatten().tolist():
            bad.append(rank + (start + position) * distributed.get_world_size())
        start += len(numbers)
    for array in arrays.values():
        array.flush()
    return list(arrays), bad


def in_order(folder: Path, name: str, kept: list[int], files: int) -> np.ndarray:
    """The rows of the images `kept` out of the first `files` ranks' files; in a file again, for they may be too many
    for the memory."""
    paths = [folder / f"{name}.{rank}.npy" for rank in range(files)]
    parts = [np.load(path, mmap_mode="r") for path in paths]
    if files == 1 and len(kept) == len(parts[0]):
        return parts[0]
    rows = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", parts[0].dtype, (len(kept), *parts[0].shape[1:]))
    for row, index in enumerate(kept):
        rows[row] = parts[index % files][index // files]
    for path in paths:  # so that at most one result is on the disk twice
        path.unlink()
    return rows


# --- Output ---


def write_csv(file: Path, paths: list[str], results: dict[str, np.ndarray], names: list[str] | None) -> None:
    """A line for each path: its best classes by their names and their scores, or its features."""
    columns = next(iter(results.values())).shape[1]
    with open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as table:  # names as on the disk
        writer = csv.writer(table)
        if "classes" in results:
            numbers = range(1, columns + 1)
            writer.writerow(["path", *(f"top{i}" for i in numbers), *(f"score{i}" for i in numbers)])
            for path, classes, scores in best_classes(paths, results, names):
                writer.writerow([path, *classes, *(f"{score:.6f}" for score in scores)])
        else:
            writer.writerow(["path", *(f"features{i}" for i in range(columns))])
            for path, values in zip(paths, results["features"]):
                writer.writerow([path, *(f"{value:.9g}" for value in values)])


def best_classes(
    paths: list[str], results: dict[str, np.ndarray], names: list[str] | None
) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Path, best classes by their names, or numbers where they have none, and scores of every image."""
    for path, classes, scores in zip(paths, results["classes"], results["scores"]):
        yield path, [names[number] if names else str(number) for number in classes], scores


@contextlib.contextmanager
def shared_folder(out: str) -> Iterator[Path]:
    """A temporary folder beside `out` for all ranks, removed at the end."""

    def make() -> str:
        with unreadable_is_user_error(f"--out {out} cannot be written"):
            if os.path.isdir(out):
                raise UserError(f"--out {out} is a folder: name a file")
            parent = Path(out).parent if out else Path(tempfile.gettempdir())
            make_folder(parent)
            return tempfile.mkdtemp(prefix=f".{Path(out).name}.", suffix=".tmp", dir=parent)

    folder = distributed.on_main_process(make)
    try:
        yield Path(folder)
    finally:
        if distributed.is_main_process():
            shutil.rmtree(folder, ignore_errors=True)


def predict(given: PredictConfig, images: list[str], launch: Launch) -> None:
    """Write or show what the model makes of the images.

    Raises:
        UserError: for what the user can put right.
    """
    model, config, info = load_model(given, launch)
    if launch.world_size > 1 and not config.out:
        raise UserError("several processes need --out, in a folder that all of them see")
    source = open_images(images, config)
    dataset = NumberedImages(source, eval_transform(config), config.seed, skip_bad=config.bad_images == "skip")
    logger.info("%d images", len(dataset))
    check_statistics(config, dataset, "these images")
    sampler = EvalBatchSampler(len(dataset), config.batch_size, launch.rank, launch.world_size)
    loader = build_loader(dataset, sampler, config, launch.device)
    normalize = Normalize(config.mean, config.std).to(launch.device)
    with shared_folder(config.out) as folder:
        start = time.monotonic()
        names, bad = run_model(model, loader, normalize, config, folder)
        logger.info("%.1f images/s", len(dataset) / (time.monotonic() - start))
        bad = {index for indices in distributed.gather_objects(bad) for index in indices}
        distributed.on_main_process(lambda: finish(config, info, dataset, bad, folder, names, launch.world_size))


def finish(
    config: PredictConfig, info: WeightsInfo, dataset: NumberedImages, bad: set[int],
    folder: Path, names: list[str], ranks: int,
) -> None:  # fmt: skip
    """Write or show the results of all ranks, without the images that could not be read."""
    kept = [index for index in range(len(dataset)) if index not in bad]
    if not kept:
        raise UserError(f"none of the {len(bad)} images can be read")
    paths = [dataset.path_of(index) for index in kept]
    files = min(ranks, len(dataset))  # of the ranks that had images
    results = {name: in_order(folder, name, kept, files) for name in names}
    if not config.out:
        for path, classes, scores in best_classes(paths, results, info.classes):
            logger.info("%s: %s", path, "  ".join(f"{c} {s:.1%}" for c, s in zip(classes, scores)))
        return
    file = folder / Path(config.out).name
    with unreadable_is_user_error(f"--out {config.out} cannot be written"):
        if file.suffix == ".csv":
            write_csv(file, paths, results, info.classes)
        else:
            class_names = {"class_names": info.classes} if info.classes and "classes" in results else {}
            np.savez(file, paths=paths, **class_names, **results)
        os.replace(file, config.out)
    logger.info("wrote %s: %d images%s", config.out, len(kept), f", {len(bad)} left out" if bad else "")


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        setup_logging()
        given = given_flags(PredictConfig, flags)
        launch = distributed.init_distributed(given)
        predict(given, flags.images, launch)
        distributed.shutdown()


if __name__ == "__main__":
    main(get_args_parser().parse_args())
