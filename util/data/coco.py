"""Images with boxes and masks, in COCO's format.

`--data_path DIR` holds `annotations/` with one JSON file for training and one for validation, `*train*.json` and
`*val*.json` (if there are several, the `instances_*` ones), and the images that these name, in `train2017/` for
`instances_train2017.json`, or in `images/train2017/`, `train/`, `images/`, DIR itself, or beside the JSON file.
"""

import importlib.util
import json
import logging
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from util.data import Config
from util.data.datasets import ImageDataset, dataset_of, read_sample
from util.data.decoding import BadImageError, EncodedJpeg
from util.data.image_index import ImageIndex, StringTable, abbreviate, digest
from util.data.sources import FileSource
from util.errors import UserError, unreadable_is_user_error

logger = logging.getLogger(__name__)

Target = dict[str, Tensor]  # boxes (n, 4) float32, labels (n,) int64, and, if asked for, masks (n, h, w) uint8
TOLERANCE = 1.0  # pixels that a box may extend beyond its image, as many programs round
FIRST = 8  # images by which their folder is found
SMALLEST_SIDE = 0.1  # of a box, in pixels: a smaller one may be rounded to nothing when it is resized, in float32


@dataclass
class Annotations:
    """The content of a JSON file, without crowd regions, in arrays that forked processes share."""

    path: Path
    names: StringTable  # of the image files
    image_ids: list[int]
    sizes: np.ndarray  # (images, 2) height and width
    ends: np.ndarray  # (images,) where an image's boxes end in the arrays below
    boxes: np.ndarray  # (boxes, 4) float32: left, top, right, bottom
    labels: np.ndarray  # (boxes,) positions in `classes`
    masks: StringTable | None  # JSON of each segmentation
    classes: list[str]  # names of the categories, by their ids
    category_ids: list[int | None]  # of `classes`; None for those that the file lacks


class CocoSource(FileSource):
    """Images and their targets. Labels count from 1, as torchvision's detectors want them."""

    def __init__(self, annotations: Annotations, folder: Path, config: Config):
        unlabelled = np.full(len(annotations.names), -1, dtype=np.int32)
        super().__init__(ImageIndex(str(folder), annotations.names, unlabelled, None), config)
        self.annotations, self.classes = annotations, annotations.classes

    @property
    def labels(self) -> str:
        own = self.annotations
        arrays = (own.ends, own.boxes, own.labels, *((own.masks.blob,) if own.masks else ()))
        return digest(json.dumps(own.classes).encode(), *map(np.ascontiguousarray, arrays))

    def read(self, i: int) -> tuple[Tensor | EncodedJpeg, Target]:
        image, _ = super().read(i)
        stated, found = tuple(self.annotations.sizes[i].tolist()), tuple(image.shape[1:])
        if stated != found:
            turned = stated == found[::-1] and not self.ignore_exif
            raise BadImageError(
                f"the file has {found[1]}x{found[0]} pixels, its annotations are for {stated[1]}x{stated[0]}: "
                + ("they may be for the photograph as it is stored (--ignore_exif)" if turned else "was it resized?")
            )
        return image, self.target(i)

    def target(self, i: int) -> Target:
        """Boxes, labels and masks of image `i`."""
        annotations = self.annotations
        own = slice(annotations.ends[i - 1] if i else 0, annotations.ends[i])
        target = {
            "boxes": torch.from_numpy(annotations.boxes[own].copy()),
            "labels": torch.from_numpy(annotations.labels[own].astype(np.int64)) + 1,
        }
        if annotations.masks is not None:
            height, width = annotations.sizes[i].tolist()
            masks = [decode_mask(json.loads(annotations.masks[j]), height, width) for j in range(own.start, own.stop)]
            target["masks"] = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width).byte()
        return target

    def number_classes_as(self, classes: Sequence[str], owner: str) -> None:
        """Renumber the labels in the order of `classes`, those of the weights called `owner`, matched by name. Raises
        UserError if one is unknown."""
        if unknown := sorted(set(self.classes) - set(classes)):
            raise UserError(
                f"{self.annotations.path} has categories that {owner} does not know: {abbreviate(unknown)}; it knows "
                f"{abbreviate(list(classes))}"
            )
        annotations = self.annotations
        positions = np.array([classes.index(name) for name in self.classes], dtype=annotations.labels.dtype)
        ids = dict(zip(self.classes, annotations.category_ids))
        annotations.labels = positions[annotations.labels]
        # A category that this file lacks has no id in it: results for it are left out.
        annotations.category_ids = [ids.get(name) for name in classes]
        annotations.classes = self.classes = list(classes)


# --- Reading and checking ---


def build_coco_dataset(config: Config, split: str, transform: Callable) -> ImageDataset:
    """The images of `split` ('train' or 'val') with their targets (see `Target`).

    An unreadable image in 'val' is an error, also with --bad_images skip.

    Raises:
        UserError: files are missing, or annotations are wrong; names them.
    """
    if importlib.util.find_spec("pycocotools") is None:
        what = "reading masks" if config.detector == "mask_rcnn" else "average precision"
        raise UserError(f"{what} needs the package pycocotools: pip install pycocotools")
    path = find_annotations(Path(config.data_path), split, getattr(config, f"{split}_json"))
    annotations = read_annotations(path, config.detector == "mask_rcnn", config.bad_boxes == "clip")
    source = CocoSource(annotations, find_images(Path(config.data_path), annotations, split), config)
    if split == "train" and not len(annotations.boxes):
        raise UserError(f"{path} has no boxes to train on: crowds, and what --bad_boxes clip leaves out, do not count")
    if not len(annotations.boxes):
        logger.warning("%s has no boxes (crowds do not count), so there is no average precision", path)
    dataset = dataset_of(source, split, transform, config)
    for _ in read_sample(dataset):
        pass  # raises if one cannot be read
    starts = np.concatenate([[0], annotations.ends[:-1]])
    logger.info(
        "%s: %d images, %d of them without boxes, %d boxes of %d classes, from %s",
        split, len(dataset), int((annotations.ends == starts).sum()), len(annotations.boxes), len(source.classes), path,
    )  # fmt: skip
    return dataset


def find_annotations(data_path: Path, split: str, given: str = "") -> Path:
    """The JSON file of `split`: `given`, else the one in `data_path/annotations`. Raises UserError."""
    if given:
        found = [path for path in (Path(given), data_path / given) if path.is_file()]
        if not found:
            raise UserError(f"--{split}_json {given} exists neither here nor in {data_path}")
        return found[0]
    if not data_path.is_dir():
        raise UserError(f"--data_path {data_path} is not a folder: give one with annotations/ and images in it")
    folder = data_path / "annotations"
    found = sorted(folder.glob(f"*{split}*.json"))
    if len(found) > 1:
        found = [path for path in found if path.name.startswith("instances")] or found
    if len(found) != 1:
        others = abbreviate([path.name for path in found or sorted(folder.glob("*"))])
        raise UserError(
            f"{folder} needs one file *{split}*.json in COCO's format, "
            + (f"but has {others}" if found else f"found {others if folder.is_dir() else 'no such folder'}")
            + f": give --{split}_json FILE"
        )
    return found[0]


def find_images(data_path: Path, annotations: Annotations, split: str) -> Path:
    """The folder of the images. Raises UserError if none has any of the first ones, or if that folder lacks some."""
    name, names = annotations.path.stem.removeprefix("instances_"), list(annotations.names)
    tried = [data_path / place for place in (name, f"images/{name}", split, f"images/{split}", "images", "")]
    tried.append(annotations.path.parent)
    folder = next((folder for folder in tried if any((folder / name).is_file() for name in names[:FIRST])), None)
    if folder is None:
        raise UserError(
            f"{annotations.path} names the image {names[0]!r}, which is in none of {', '.join(map(str, tried))}: put "
            "the images in one of them"
        )
    with unreadable_is_user_error(f"cannot read {folder}"):  # once: on a network each file would take a millisecond
        parents = {parent for parent in map(os.path.dirname, names) if (folder / parent).is_dir()}
        there = {os.path.join(parent, file) for parent in parents for file in os.listdir(folder / parent)}
    # A file system may accept a name in other spellings than the one it lists.
    if missing := [name for name in names if name not in there and not (folder / name).is_file()]:
        raise UserError(
            f"{len(missing)} of the {len(names)} images that {annotations.path} names are not in {folder}: "
            f"{abbreviate(missing)}; add them there, or remove them from the file"
        )
    return folder


def read_annotations(path: Path, masks: bool = False, clip: bool = False) -> Annotations:
    """Read and check a JSON file.

    Args:
        path: the file.
        masks: whether every box needs a mask.
        clip: clip boxes to their images and leave out those of almost no area, instead of raising an error.

    Raises:
        UserError: the file is not in COCO's format, or its content is impossible; names the annotations.
    """
    with unreadable_is_user_error(f"cannot read {path}"):
        text = path.read_bytes()
    try:
        content = json.loads(text)
        images, categories = content["images"], content["categories"]
        by_id = {image["id"]: number for number, image in enumerate(images)}
        names = [image["file_name"].encode() for image in images]
        sizes = np.array([(image["height"], image["width"]) for image in images], dtype=np.int64).reshape(-1, 2)
        classes = {category["id"]: category["name"] for category in sorted(categories, key=lambda entry: entry["id"])}
        annotations = content["annotations"]
        crowds = list(map(is_crowd, annotations))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path} is not in COCO's format ({why}): it needs 'images' with id, file_name, height and width, "
            "'categories' with id and name, and 'annotations' with id, image_id, category_id and bbox"
        ) from None
    _refuse(path, "no image or no category", [] if images and categories else ["the file"], "list them in it")
    for what, values in (
        ("image id", [image["id"] for image in images]),
        ("file name", [image["file_name"] for image in images]),
        ("annotation id", [annotation.get("id") for annotation in annotations]),
        ("category id", [category["id"] for category in categories]),
        ("category name", [category["name"] for category in categories]),
    ):
        twice = [value for value, count in Counter(map(str, values)).items() if count > 1]
        _refuse(path, f"the same {what} more than once", twice, "give each its own")

    for key, known, what in (
        ("image_id", by_id, "an image that is not in 'images'"),
        ("category_id", classes, "a category that is not in 'categories'"),
    ):
        wrong = [
            f"annotation {annotation.get('id')} ({key} {annotation.get(key)!r})"
            for annotation in annotations
            if not isinstance(annotation.get(key), Hashable) or annotation.get(key) not in known
        ]
        _refuse(path, what, wrong, "add it, or remove the annotations")
    wrong = [
        f"annotation {annotation.get('id')} ({annotation.get('bbox')})"
        for annotation in annotations
        if not _are_numbers(annotation.get("bbox")) or len(annotation["bbox"]) != 4
    ]
    _refuse(path, "annotations without a box", wrong, "'bbox' is left, top, width and height in pixels")
    numbers = np.array([by_id[annotation["image_id"]] for annotation in annotations], dtype=np.int64)
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes.astype(np.float32)
    if len(boxes) and boxes.max() <= 1:
        raise UserError(f"{path}: all boxes lie between 0 and 1, as shares of their images: 'bbox' is in pixels")
    kept = _check_boxes(path, annotations, boxes, sizes[numbers][:, ::-1], clip) & ~np.array(crowds, dtype=bool)
    if masks:
        wrong = [
            f"annotation {annotation.get('id')} ({why})"
            for annotation, number, keep in zip(annotations, numbers, kept)
            if keep and (why := why_no_mask(annotation.get("segmentation"), *sizes[number].tolist()))
        ]
        _refuse(
            path, "annotations without a mask of their image", wrong,
            "repair them; --detector faster_rcnn needs no masks",
        )  # fmt: skip
    order = np.flatnonzero(kept)
    order = order[np.argsort(numbers[order], kind="stable")]
    positions = {category: position for position, category in enumerate(classes)}
    segmentations = [json.dumps(annotations[i]["segmentation"]).encode() for i in order] if masks else None
    return Annotations(
        path=path,
        names=StringTable.of(names),
        image_ids=[image["id"] for image in images],
        sizes=sizes,
        ends=np.cumsum(np.bincount(numbers[order], minlength=len(images))),
        boxes=boxes[order],
        labels=np.array([positions[annotations[i]["category_id"]] for i in order], dtype=np.int32),
        masks=None if segmentations is None else StringTable.of(segmentations),
        classes=list(classes.values()),
        category_ids=list(classes),
    )


def _refuse(path: Path, what: str, wrong: list[str], advice: str) -> None:
    """Raise a UserError if there is anything in `wrong`."""
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path}: {what}: {', '.join(wrong[:3])}{more}; {advice}")


def is_crowd(annotation: dict[str, Any]) -> bool:
    """Whether it is of a crowd; by default not. Raises ValueError for what is no number, in a string or not."""
    return bool(int(annotation.get("iscrowd") or 0))


def _are_numbers(values: Any) -> bool:
    numbers = isinstance(values, list) and {int, float}.issuperset(map(type, values))
    return numbers and all(map(math.isfinite, values))


def _check_boxes(path: Path, annotations: list[dict], boxes: np.ndarray, sides: np.ndarray, clip: bool) -> np.ndarray:
    """Clip `boxes` (n, 4) to images of `sides` (n, 2), width and height, in place; returns which have area, (n,) bool.

    Raises:
        UserError: without `clip`, for one that lies outside by more than rounding, or has almost no area.
    """
    outside = ((boxes < -TOLERANCE) | (boxes > np.tile(sides, 2) + TOLERANCE)).any(axis=1)
    given = boxes.copy()
    np.clip(boxes, 0, np.tile(sides, 2), out=boxes)
    has_area = (boxes[:, 2:] - boxes[:, :2] >= SMALLEST_SIDE).all(axis=1)
    wrong = [
        f"annotation {annotations[i].get('id')} (from {given[i, 0]:g}, {given[i, 1]:g} to {given[i, 2]:g}, "
        f"{given[i, 3]:g} in an image of {sides[i, 0]}x{sides[i, 1]})"
        for i in np.flatnonzero(outside | ~has_area)
    ]
    if not clip:
        _refuse(
            path, f"boxes outside their images or with a side below {SMALLEST_SIDE} pixels", wrong,
            "'bbox' is left, top, width and height in pixels: repair them, or let --bad_boxes clip cut them at the "
            "edge and leave out what then has almost no area",
        )  # fmt: skip
    if wrong:
        logger.warning(
            "%s: %d boxes clipped to their images, %d of almost no area left out: %s",
            path, int((outside & has_area).sum()), int((~has_area).sum()), abbreviate(wrong, 3),
        )  # fmt: skip
    return has_area


def why_no_mask(segmentation: Any, height: int, width: int) -> str:
    """Why a segmentation of COCO's format is not a mask of an image of that size; '' if it is one."""
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width]:
            size = segmentation.get("size")
            return f"its mask is of size {size}, its image has height and width {[height, width]}"
        counts = segmentation.get("counts")
        if isinstance(counts, str):
            return ""
        if not isinstance(counts, list) or not {int}.issuperset(map(type, counts)) or min(counts, default=0) < 0:
            return "its mask has no 'counts', the run lengths"
        return "" if sum(counts) == height * width else f"its mask has {sum(counts)} pixels, its image {height * width}"
    if not isinstance(segmentation, list) or not segmentation:
        return "no 'segmentation'"
    if not all(_are_numbers(polygon) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation):
        return "a polygon is a list of x, y, x, y, ... of at least three points"
    return ""


def decode_mask(segmentation: dict | list, height: int, width: int) -> np.ndarray:
    """A segmentation of COCO's format (polygons or run lengths) as a mask (height, width) of uint8.

    Raises:
        BadImageError: run lengths that do not add up to this size.
    """
    from pycocotools import mask

    try:
        if isinstance(segmentation, list):
            return mask.decode(mask.merge(mask.frPyObjects(segmentation, height, width)))
        if isinstance(segmentation["counts"], list):
            segmentation = mask.frPyObjects(segmentation, height, width)
        if sum(run_lengths(segmentation["counts"])) != height * width:  # pycocotools would leave the rest undefined
            raise ValueError("its run lengths add up to another size")
        return mask.decode(segmentation)
    except (ValueError, TypeError) as error:
        raise BadImageError(f"a mask of {width}x{height} cannot be decoded: {error}") from error


def run_lengths(counts: str | bytes) -> list[int]:
    """The lengths in COCO's compressed run-length code: 5 bits in each character; from the fourth run on, differences
    from the run two before."""
    runs, value, shift = [], 0, 0
    for byte in counts.encode() if isinstance(counts, str) else counts:
        bits = byte - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:  # the last character of this number
            value -= (1 << shift) if bits & 0x10 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


# --- Transforms and batches ---


class Flip:
    """Mirrors an image (C, h, w) with its boxes and masks, half of the time."""

    takes_target = True

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        if random.random() < 0.5:
            image, width = image.flip(-1), image.shape[-1]
            left, top, right, bottom = target["boxes"].unbind(1)
            target = target | {"boxes": torch.stack([width - right, top, width - left, bottom], 1)}
            if "masks" in target:
                target["masks"] = target["masks"].flip(-1)
        return image, target


class AsItIs:
    """For evaluation: an image and its target, unchanged."""

    takes_target = True

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        return image, target


def collate_lists(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Images of different sizes and their targets, as two lists."""
    images, targets = zip(*samples, strict=True)
    return [image.contiguous() for image in images], list(targets)
