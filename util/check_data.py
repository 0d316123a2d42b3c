"""Check the images before hours are spent on training: what is wrong with them, and which flags fit them.

    python -m util.check_data /path/to/images
    python -m util.check_data /path/to/images --in_chans 13 --out check --model mixmae_tiny

Every image is read as training reads it. The report begins with faults, followed by what the images are, their
mean and standard deviation as flags, and how fast they are read. `--out` adds a sheet of images as the model will see
them. The exit code is 1 if something would stop training or make its results wrong.
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import hashlib
import io
import json
import logging
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import make_grid

from util.data.datasets import WORKERS, NumberedImages
from util.data.decoding import PILLOW_FORMATS, BadImageError, PixelType, decoded
from util.data.display import Display
from util.data.image_index import abbreviate
from util.data.jpeg import ORIENTATION
from util.data.open_source import find_validation, open_source, refuse_output_among_images
from util.data.sources import Source
from util.data.statistics import check_images, check_units
from util.data.survey import survey_images
from util.data.transforms import Normalize, eval_transform, pretrain_transform
from util.errors import UserError, unreadable_is_user_error
from util.run.config import DataFlags, WeightFlags, with_settings
from util.run.cores import choose_workers, own_cores, own_share
from util.run.failures import user_errors
from util.run.flags import NOT_NEGATIVE, flag, get_parser, given_flags
from util.run.logger import setup_logging
from util.run.progress import with_progress
from util.seeding import seed_all
from util.weights.settings import weight_settings

logger = logging.getLogger(__name__)

LONG = 10.0  # longer side / shorter side of an odd image
TINY_SIDE = 8  # pixels
SHEET_IMAGES = 40
BITS = {PixelType.BYTES: 8, PixelType.DEEP_PICTURES: 16, PixelType.ARRAYS: 32}
BLOCK = 2**20  # pixels that are float64 at a time
TIMED_STEPS = 3


@dataclass(frozen=True)
class CheckDataConfig(WeightFlags, DataFlags):
    TITLE: ClassVar[str] = "what to check"

    sample: int = flag(0, "look at this many images, spread over the data; 0: at all", "N", NOT_NEGATIVE)
    out: str = flag("", "folder for check_data.json and check_data.png (default: none is written)", "DIR")


def get_args_parser() -> argparse.ArgumentParser:
    description = "Check the images that training would read. Exit code 1: something would stop or mislead training."
    parser = get_parser(CheckDataConfig, description, "python -m util.check_data")
    parser.add_argument("data_path", nargs="?", default=argparse.SUPPRESS, metavar="DIR", help="as --data_path")
    return parser


# --- One image ---


class Inspection(Dataset):
    """`inspection[i]` -> what is known about image i: a dict of plain values, with 'error' if it is unreadable."""

    def __init__(self, source: Source, numbers: list[int], config: CheckDataConfig):
        self.source, self.numbers, self.config = source, numbers, config
        self.transform = pretrain_transform(config)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> dict[str, Any]:
        number = self.numbers[position]
        path, targets = self.source.path(number), self.source.targets
        target = -1 if targets is None else int(targets[number])
        found: dict[str, Any] = {"number": number, "path": path, "target": target}
        try:
            file = self.source.file(number)
            data = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
            found |= {"hash": hashlib.blake2b(data, digest_size=16).digest(), **header(data, path)}
            started = time.perf_counter()
            image, _ = self.source.read(number)
            kind = PixelType(image.dtype)
            image = kind.convert(image)
            seed_all(0, number)
            self.transform(image)
            found["seconds"] = time.perf_counter() - started
            image = decoded(image)
            unit = 255 if kind is PixelType.BYTES else 1
            blocks = [block.double() / unit for block in image.flatten(1).split(BLOCK, 1)]
            mean = sum(block.sum(1) for block in blocks) / image[0].numel()
            spread = sum((block - mean[:, None]).square().sum(1) for block in blocks)
            found |= {"bits": BITS[kind], "height": image.shape[1], "width": image.shape[2]}
            found |= {"pixels": image[0].numel(), "mean": mean.tolist(), "spread": spread.tolist()}
        except (BadImageError, OSError) as error:
            found["error"] = getattr(error, "strerror", None) or str(error)  # without the path, to count them together
        return found


def header(data: bytes, path: str) -> dict[str, Any]:
    """Format, colour mode and orientation, where Pillow knows them."""
    kind = os.path.splitext(path)[1].lower().lstrip(".")
    try:
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
            turned = image.getexif().get(ORIENTATION, 1) not in (0, 1)
            return {"format": image.format, "mode": image.mode, "turned": turned}
    except Exception:  # no picture, or a damaged one; reading it says more
        return {"format": kind, "mode": "", "turned": False}


# --- All images ---


@dataclass
class Findings:
    """What is known of one split."""

    split: str
    classes: list[str] | None
    images: list[dict[str, Any]] = field(default_factory=list)

    @property
    def good(self) -> list[dict[str, Any]]:
        return [image for image in self.images if "error" not in image]

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (C,) over all pixels of all images, in float64."""
        pixels = np.array([image["pixels"] for image in self.good], dtype=float)[:, None]
        means, spreads = (np.array([image[name] for image in self.good]) for name in ("mean", "spread"))
        mean = (pixels * means).sum(0) / pixels.sum()
        return mean, np.sqrt((spreads + pixels * (means - mean) ** 2).sum(0) / pixels.sum())


def inspect(source: Source, split: str, config: CheckDataConfig) -> Findings:
    count = min(config.sample or len(source), len(source))
    numbers = [position * len(source) // count for position in range(count)]
    loader = DataLoader(
        Inspection(source, numbers, config), batch_size=16, num_workers=config.num_workers, collate_fn=list,
        multiprocessing_context=WORKERS if config.num_workers else None, worker_init_fn=one_thread,
    )  # fmt: skip
    findings = Findings(split, source.classes)
    for batch in with_progress(loader, count, split, len):
        findings.images += batch
    return findings


def one_thread(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    torch.set_num_threads(1)


def faults_of(parts: list[Findings], config: CheckDataConfig) -> tuple[list[str], list[str]]:
    """What would stop training or make its results wrong, and what may be intended."""
    wrong, odd = [], []
    images = [
        image | {"split": part.split, "class": part.classes and part.classes[image["target"]]}
        for part in parts
        for image in part.images
    ]
    good = [image for image in images if "error" not in image]

    def note(where: list[str], names: list[str], what: str) -> None:
        if names:
            where.append(f"{len(names)} {what}: {abbreviate(names)}")

    reasons, contents = defaultdict(list), defaultdict(list)
    for image in images:
        if "error" in image:
            reasons[image["error"]].append(image["path"])
        if "hash" in image:
            contents[image["hash"]].append(image)
    for reason, paths in sorted(reasons.items(), key=lambda item: -len(item[1])):
        note(wrong, paths, f"unreadable ({reason})")
    copies = [same for same in contents.values() if len(same) > 1]
    shared = [
        image["path"] for same in copies if same[0]["split"] == "train" for image in same if image["split"] == "val"
    ]
    note(wrong, shared, "validation images are training images too")
    unclear = [
        image["path"] for same in copies if len({image["class"] for image in same} - {None}) > 1 for image in same
    ]
    # Without validation images the classes of a folder may be the folders that there happen to be.
    labelled = len(parts) == 2 or Path(config.data_path).is_file()
    note(wrong if labelled else odd, unclear, "images are in several classes, byte for byte")
    note(odd, [image["path"] for same in copies for image in same[1:]], "are copies of another image, byte for byte")
    if len(parts) == 2 and parts[0].classes and parts[1].classes:
        train, val = ({part.classes[image["target"]] for image in part.images} for part in parts)
        note(wrong, sorted(val - train), "classes have validation images but no training images")
        note(odd, sorted(train - val), "classes have no validation images")
    bits = Counter(image["bits"] for image in good)
    if 32 in bits and len(bits) > 1:
        wrong.append(f"arrays in their own units among pictures: {dict(bits)} (bits per channel: images)")
    elif len(bits) > 1:
        odd.append(f"8 and 16 bits per channel: {dict(bits)}; all are reduced to what the first image has")
    long = [i["path"] for i in good if max(i["height"], i["width"]) > LONG * min(i["height"], i["width"])]
    note(odd, long, f"are more than {LONG:g} times longer in one direction")
    tiny = [i["path"] for i in good if min(i["height"], i["width"]) < TINY_SIDE]
    note(odd, tiny, f"have a side below {TINY_SIDE} pixels")

    def of_modes(*modes: str) -> list[str]:
        return [image["path"] for image in images if image.get("mode") in modes]

    note(odd, of_modes("CMYK", "YCCK"), "are CMYK, converted without a colour profile")
    note(odd, of_modes("P", "PA"), "have a palette")
    note(odd, of_modes("RGBA", "LA", "La", "RGBa"), "lose transparency")
    what = "left as they are stored" if config.ignore_exif else "turned accordingly"
    turned = [image["path"] for image in images if image.get("turned")]
    note(odd, turned, f"have an EXIF orientation, and are {what}")
    grey = of_modes("L", "1", "LA", "I", "I;16")
    colour = of_modes("RGB", "RGBA", "P", "CMYK", "YCbCr")
    fewer, others, kind = (grey, colour, "grey") if len(grey) < len(colour) else (colour, grey, "colour")
    note(odd, fewer, f"are {kind} among {len(others)} others")
    return wrong, odd


def describe(part: Findings) -> dict[str, Any]:
    """Plain values for the report of one split."""
    good = part.good
    sides = np.array([(image["height"], image["width"]) for image in good]).reshape(-1, 2)
    result: dict[str, Any] = {
        "images": len(part.images),
        "unreadable": len(part.images) - len(good),
        "formats": dict(Counter(image.get("format", "?") for image in part.images).most_common()),
        "bits": dict(Counter(image["bits"] for image in good).most_common()),
    }
    if good:
        result["height"], result["width"] = (
            {"smallest": int(side.min()), "median": int(np.median(side)), "largest": int(side.max())}
            for side in sides.T
        )
        result["images_per_second"] = len(good) / sum(image["seconds"] for image in good)
    if part.classes:
        counts = Counter(image["target"] for image in part.images)
        result["classes"] = {name: counts[number] for number, name in enumerate(part.classes)}
    return result


# --- The sheet, and the model's speed ---


def draw_sheet(source: Source, part: Findings, config: CheckDataConfig) -> Image.Image:
    """Images as the model sees them: after the crop of evaluation, normalised by the configuration, and back."""
    dataset, normalize = NumberedImages(source, eval_transform(config), 0, True), Normalize(config.mean, config.std)
    numbers = [image["number"] for image in part.good]
    count = min(SHEET_IMAGES, len(numbers))
    samples = [dataset[(0, numbers[position * len(numbers) // count])] for position in range(count)]
    imgs = torch.stack([normalize(image) for image, number in samples if number >= 0])  # of the first image's kind
    display = Display(imgs, config.mean, config.std)
    grid = make_grid(torch.from_numpy(display(imgs)).permute(0, 3, 1, 2), nrow=8, padding=4, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def images_per_second(config: CheckDataConfig) -> float:
    """Of training steps with --model on this machine, in fp32, without reading anything."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model(config.model, in_chans=config.in_chans, img_size=config.input_size).to(device)
    imgs = torch.randn(8, config.in_chans, *config.input_size, device=device)
    times = []
    for _ in range(1 + TIMED_STEPS):
        started = time.perf_counter()
        model(imgs)[0].backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return len(imgs) / min(times[1:])


# --- The command ---


def open_splits(config: CheckDataConfig) -> tuple[list[tuple[str, Source]], list[str]]:
    """The training images, and those for validation where there are any; and where there are, what fine-tuning and kNN
    would refuse, though pretraining does not.

    Raises:
        UserError: there are no images, or they are not files.
    """
    if config.dataset:
        raise UserError(f"only image files are checked, in folders, lists or tars, not --dataset {config.dataset}")
    places, val = {"train": (config.data_path, "train")}, find_validation(config.data_path)
    if config.val_share:
        places["val"] = (config.data_path, "val")
    elif val is not None:
        places["val"] = (str(val), "train")  # by itself, so that classes which the training images lack are no error
    sources, refused = [], []
    for split, (place, part) in places.items():
        with unreadable_is_user_error(f"cannot read {place}"):
            try:
                source = open_source(config, split, require_labels=len(places) == 2)
            except UserError as error:
                refused.append(str(error))
                source = open_source(replace(config, data_path=place), part, require_labels=False)
        sources.append((split, source))
    return sources, [f"fine-tuning and kNN would stop: {message}" for message in dict.fromkeys(refused)]


def check_data(given: CheckDataConfig) -> dict[str, Any]:
    """The report, as plain values; it is logged, and written to `--out`.

    Raises:
        UserError: there is nothing to check, or the report cannot be written.
    """
    if given.out:
        refuse_output_among_images(given.out, "--out", given.data_path)
    sources, refused = open_splits(replace(given, in_chans=given.in_chans or 3))
    in_chans = given.in_chans or survey_images(sources[0][1], given.reader).in_chans
    settings = weight_settings(
        {}, "", given.as_dict() | {"in_chans": in_chans}, pretraining=True, defaults={"model": "mixmae_tiny"}
    )
    config = with_settings(given, settings)
    if config.num_workers is None:
        config = replace(config, num_workers=choose_workers(own_share([own_cores()])[0]))
    for _, source in sources:
        source.in_chans = config.in_chans
    parts = [inspect(source, split, config) for split, source in sources]
    wrong, odd = faults_of(parts, config)
    odd += refused
    if parts[0].good:
        sample = NumberedImages(sources[0][1], eval_transform(config), 0, True).sample()
        found = [check_units(sample)]
        if given.mean is not None or given.std is not None:
            found.append((check_images(sample, config.mean, config.std)[0], ""))
        wrong += [error for error, _ in found if error]
        odd += [doubt for _, doubt in found if doubt]
    report: dict[str, Any] = {"data": config.data_path, "in_chans": config.in_chans, "faults": wrong, "remarks": odd}
    report |= {part.split: describe(part) for part in parts}
    if parts[0].good:
        mean, std = parts[0].statistics()
        report |= {"mean": mean.tolist(), "std": std.tolist()}
        config = replace(config, mean=tuple(mean.tolist()), std=tuple(np.where(std > 0, std, 1).tolist()))
    if given.model is not None:
        report["model_images_per_second"] = images_per_second(config)
    say(report, config)
    if config.out:
        folder = Path(config.out)
        with unreadable_is_user_error(f"--out {config.out} cannot be written"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "check_data.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            if parts[0].good:
                draw_sheet(sources[0][1], parts[0], config).save(folder / "check_data.png")
        logger.info("wrote %s/check_data.json and check_data.png", config.out)
    return report


def say(report: dict[str, Any], config: CheckDataConfig) -> None:
    """Log the report in words."""
    for fault in report["faults"]:
        logger.error("FAULT: %s", fault)
    for remark in report["remarks"]:
        logger.warning("note: %s", remark)
    for split in ("train", "val"):
        if part := report.get(split):
            formats = ", ".join(f"{count} {name}" for name, count in part["formats"].items())
            bits = ", ".join(f"{count} of {bits} bits" for bits, count in part["bits"].items())
            logger.info("%s: %d images (%s; %s)", split, part["images"], formats, bits or "none readable")
            if "height" in part:
                logger.info(
                    "%s: heights %s, widths %s (smallest, median, largest)", split,
                    " ".join(map(str, part["height"].values())), " ".join(map(str, part["width"].values())),
                )  # fmt: skip
            if counts := part.get("classes"):
                largest, smallest = max(counts, key=counts.get), min(counts, key=counts.get)
                if counts[largest] == counts[smallest]:
                    logger.info("%s: %d classes of %d images", split, len(counts), counts[largest])
                else:
                    logger.info(
                        "%s: %d classes, from %d images (%s) to %d (%s)", split, len(counts), counts[smallest],
                        smallest, counts[largest], largest,
                    )  # fmt: skip
    if "mean" in report:
        mean, std = (" ".join(f"{value:.4g}" for value in report[name]) for name in ("mean", "std"))
        logger.info("flags: --in_chans %d --mean %s --std %s", config.in_chans, mean, std)
        speed = report["train"]["images_per_second"]
        logger.info("reading and augmenting for pretraining: %.0f images/s per data-loading process", speed)
        if needed := report.get("model_images_per_second"):
            logger.info(
                "%s takes %.0f images/s here: --num_workers %d keeps up", config.model, needed, -(-needed // speed)
            )
    logger.info("%d faults, %d notes", len(report["faults"]), len(report["remarks"]))


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        setup_logging()
        report = check_data(given_flags(CheckDataConfig, flags))
    sys.exit(1 if report["faults"] else 0)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
