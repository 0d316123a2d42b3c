"""Data sets whose every sample is a function of (seed, epoch, index), and their loaders.

`--data_path DIR` holds `train/` (and `val/`) with one folder per class, as torchvision's ImageFolder; for
pretraining also a folder of images without classes, however nested, directly in DIR or in DIR/train.
`--data_path LIST` is a text file with one image per line, relative to the list's folder, optionally followed
by a space or tab and an integer label: `photos/cat 2.jpg 17`. A number is a label only behind a known image
extension, so names may contain spaces. `--data_path FILE.tar` is a tar of
images (for validation too: `DIR/train.tar` and `DIR/val.tar`), and `--dataset NAME` any
name that `timm.data.create_dataset` knows (`torch/cifar10`, `hfds/...`, `wds/...`, ...), with `--data_path`
as its root.

Sets that can only be streamed (`hfids/`, `tfds/`, `wds/`) serve for training only. A stream decides the
order of its images itself: a resumed run is then not identical to an uninterrupted one, and the number of
workers matters.
"""

import argparse
import atexit
import gc
import logging
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from util.data.decoding import BadImageError, decode
from util.data.image_index import IMAGE_EXTENSIONS, ImageIndex, StringTable, abbreviate, class_folders, load_index
from util.data.timm_source import open_timm_source
from util.seeding import derive_seed, keyed_generator, seed_all

logger = logging.getLogger(__name__)

FOLDER_DATASETS = ("", "folder", "image_folder", "torch/folder", "torch/image_folder")
REPLACEMENT_TRIES = 100
MAX_CLASSES = 100_000  # a larger number behind a file name in a list is no label
LIST_LINE = re.compile(rf"(.*(?:{'|'.join(map(re.escape, IMAGE_EXTENSIONS))}))(?:[ \t]+(\d+))?", re.IGNORECASE)


class FileSource:
    """Images in files. `read(i)` -> (image (in_chans, h, w), target)."""

    def __init__(self, index: ImageIndex, in_chans: int):
        self.index, self.in_chans = index, in_chans
        self.classes = index.classes

    def __len__(self) -> int:
        return len(self.index)

    def path(self, i: int) -> str:
        return self.index.path(i)

    def read(self, i: int) -> tuple[torch.Tensor, int]:
        with open(self.path(i), "rb", buffering=0) as file:
            data = file.readall()
        return decode(data, self.in_chans), int(self.index.targets[i])


class ImageDataset(Dataset):
    """`dataset[(epoch, index)]` -> (image (C, H, W) after the transform, target); -1 without labels.

    Images are uint8, or float32 where the source has more than 8 bits (see util.decoding).
    Before the transform all generators are seeded with (seed, epoch, index): a sample depends on nothing
    else, neither on the worker that makes it nor on the samples before it. (With num_workers 0 the generators
    are those of the training process.)

    An image that cannot be read is a BadImageError that names it. With `skip_bad`, another image takes its
    place, drawn with the key (seed, epoch, index); it is logged once and counted, exactly across the workers
    of this process, and when more than `max_bad_share` of the data set has turned out bad, that is a
    BadImageError.
    """

    def __init__(self, source, transform: Callable, seed: int, skip_bad: bool = False, max_bad_share: float = 0.01):
        self.source, self.transform, self.seed = source, transform, seed
        self.skip_bad, self.max_bad_share = skip_bad, max_bad_share
        self.classes = source.classes
        self._bad = torch.zeros(len(source), dtype=torch.uint8).share_memory_()  # shared with the workers
        self._bad_lock = multiprocessing.Lock()
        self.dtype = self._first_image_dtype()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        image, target = self._read_or_replace(epoch, index)
        seed_all(self.seed, epoch, index)
        return self.transform(image), target

    def path_of(self, index: int) -> str:
        return self.source.path(index)

    @property
    def targets(self) -> np.ndarray | None:
        """The labels of all images where they are known without reading them."""
        index = getattr(self.source, "index", None)
        return None if index is None or self.classes is None else index.targets

    def bad_count(self) -> int:
        """How many different images could not be read so far, in all workers of this process."""
        return int(self._bad.sum())

    def _first_image_dtype(self) -> torch.dtype:
        """The pixel type of the first image, or with `skip_bad` the first readable one: all must have it."""
        tries = min(len(self), REPLACEMENT_TRIES)
        for index in range(tries):
            try:
                return self._read(index)[0].dtype
            except BadImageError:
                if not self.skip_bad:
                    raise
        raise BadImageError(f"none of the first {tries} images can be read, e.g. {self.path_of(0)!r}")

    def _read(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            image, target = self.source.read(index)
            dtype = getattr(self, "dtype", image.dtype)
            if image.dtype != dtype:
                raise BadImageError(
                    f"its pixels are {image.dtype}, those of the first image {dtype}; use one type for all"
                )
        except (BadImageError, OSError) as error:
            raise BadImageError(f"cannot use image {self.path_of(index)!r}: {error}") from None
        return image, target

    def _read_or_replace(self, epoch: int, index: int) -> tuple[torch.Tensor, int]:
        candidate = index
        for attempt in range(REPLACEMENT_TRIES):
            if not self._bad[candidate]:
                try:
                    return self._read(candidate)
                except BadImageError as error:
                    if not self.skip_bad:
                        advice = "Repair or remove it; training images are replaced with --bad_images skip"
                        raise BadImageError(f"{error}. {advice}") from None
                    self._record_bad(candidate, error)
            candidate = derive_seed("replacement", self.seed, epoch, index, attempt) % len(self)
        raise BadImageError(f"no readable image found in {REPLACEMENT_TRIES} tries to replace {self.path_of(index)!r}")

    def _record_bad(self, index: int, error: BadImageError) -> None:
        with self._bad_lock:
            known = bool(self._bad[index])
            self._bad[index] = 1
            count = self.bad_count()
        if not known:
            logger.warning("skipping a bad image (%d so far): %s", count, error)
        if count > self.max_bad_share * len(self):
            raise BadImageError(
                f"{count} of {len(self)} images cannot be used, more than the share "
                f"--max_bad_images {self.max_bad_share:g} allows; the last one: {error}"
            )


def build_dataset(
    args: argparse.Namespace, split: str, transform: Callable, require_labels: bool = False
) -> ImageDataset:
    """The data set of `split` ('train' or 'val') that `args` names (see the module's docstring).

    Uses args.data_path, dataset, in_chans, seed, bad_images, max_bad_images. `require_labels`: unlabelled
    images and empty class folders are errors; always so for 'val', whose classes are those of the training
    folder. Evaluation never skips an image: a bad one in 'val' is an error. Raises ValueError or OSError (a
    missing path, no images, other channels than args.in_chans, ...).
    """
    require_labels = require_labels or split == "val"
    path = Path(args.data_path)
    if args.dataset not in FOLDER_DATASETS:
        source = open_timm_source(args.dataset, path, split, args.in_chans, args.seed)
    elif (tar := _tar_file(path, split)) is not None:
        source = open_timm_source("", tar, split, args.in_chans, args.seed)
        train_classes = _train_classes(path, args) if split == "val" else None
        if train_classes is not None and source.classes != train_classes:
            different = sorted(set(source.classes or ()) ^ set(train_classes))
            raise ValueError(f"{tar} and the training images differ in their classes: {abbreviate(different)}")
    elif path.is_file():
        source = FileSource(_read_list(path, split), args.in_chans)
    elif path.is_dir():
        index = _folder_index(path, split, require_labels)
        if split == "val" and (train_classes := _train_classes(path, args)) is not None:
            index = index.with_classes(train_classes)
        source = FileSource(index, args.in_chans)
    else:
        raise ValueError(f"--data_path {args.data_path} does not exist; give a folder of images, or a list of them")
    if require_labels and source.classes is None:
        raise ValueError(f"the images of {args.data_path} ({split}) have no labels: put them in one folder per class")
    skip_bad = args.bad_images == "skip" and split == "train"
    dataset = ImageDataset(source, transform, args.seed, skip_bad, args.max_bad_images)
    kinds = f"{len(source.classes)} classes" if source.classes else "no labels"
    logger.info("%s: %d images, %s, from %s", split, len(dataset), kinds, args.data_path)
    return dataset


def build_loader(
    dataset: Dataset, batch_sampler: Iterable[list[tuple[int, int]]], args: argparse.Namespace
) -> DataLoader:
    """A loader of (images (B, C, H, W), targets (B,) int64) for the key lists that `batch_sampler` yields.

    Uses args.num_workers, pin_mem, seed. Workers ignore the signals that ask a job to stop, which reach all
    of its processes: the training process decides, and takes them along when it exits.
    """
    exiting = multiprocessing.RawValue("b", 0)  # shared with the workers
    atexit.register(setattr, exiting, "value", 1)
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=args.num_workers,
        collate_fn=collate,
        pin_memory=args.pin_mem and torch.cuda.is_available(),
        persistent_workers=args.num_workers > 0,
        prefetch_factor=4 if args.num_workers > 0 else None,
        worker_init_fn=partial(_start_worker, exiting=exiting),
        generator=keyed_generator(args.seed, "loader"),  # so that it draws nothing from the global one
    )


def collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack images and targets; the channels stay the fastest axis in memory, one plain copy per image."""
    images, targets = zip(*samples, strict=True)
    # (B, H, W, C); default_collate stacks into shared memory when it runs in a worker
    images = default_collate([image.permute(1, 2, 0) for image in images])
    return images.permute(0, 3, 1, 2), torch.tensor(targets)


def _start_worker(_worker_id: int, exiting) -> None:
    def on_terminate(_number: int, _frame) -> None:
        if exiting.value:  # this one is from the training process, which waits for its workers to end
            os._exit(0)

    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_terminate)
    torch.set_num_threads(1)
    gc.freeze()  # collections then skip the parent's objects: less time, and their memory stays shared


def _tar_file(data_path: Path, split: str) -> Path | None:
    """The tar file that holds `split`, if `data_path` is one or a folder of them."""
    if data_path.suffix == ".tar":
        if split != "train":
            raise ValueError(
                f"--data_path {data_path} is a tar of training images; evaluation needs a folder with "
                f"train.tar and val.tar in it"
            )
        return data_path
    tar, folder = data_path / f"{split}.tar", data_path / split
    if tar.is_file() and folder.is_dir():
        raise ValueError(f"both {tar} and {folder} are there: which holds the {split} images? Move the other elsewhere")
    return tar if tar.is_file() else None


def _folder_index(data_path: Path, split: str, require_labels: bool) -> ImageIndex:
    folder = data_path / split
    if not folder.is_dir():
        if require_labels:
            raise ValueError(f"{folder} does not exist; it must hold the {split} images, one folder per class")
        folder = data_path
    index = load_index(folder)
    if not require_labels:
        return index
    if index.classes is None:
        raise ValueError(
            f"{index.path(0)!r} lies outside any class folder; labels need one folder per class in {folder}"
        )
    if empty := index.empty_classes():
        raise ValueError(f"class folders without any image in {folder}: {abbreviate(empty)}")
    return index


def _train_classes(data_path: Path, args: argparse.Namespace) -> list[str] | None:
    """The classes of the training images below `data_path`; None where there are none."""
    if (tar := _tar_file(data_path, "train")) is not None:
        return open_timm_source("", tar, "train", args.in_chans, args.seed).classes
    return class_folders(data_path / "train") if (data_path / "train").is_dir() else None


def _read_list(path: Path, split: str) -> ImageIndex:
    """The index of a text file that lists images (see the module's docstring)."""
    if split != "train":
        raise ValueError(f"--data_path {path} is a list of training images; evaluation needs a folder with 'val' in it")
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise ValueError(f"cannot read the image list {path}: {error}") from error
    names, labels = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = LIST_LINE.fullmatch(line.rstrip())
        if match is None:
            raise ValueError(
                f"{path}, line {number}: expected an image file ({', '.join(IMAGE_EXTENSIONS)}), optionally "
                f"followed by a space and an integer label, got {line[:200]!r}"
            )
        names.append(os.fsencode(match[1]))
        labels.append(-1 if match[2] is None else int(match[2]))
        if labels[-1] >= MAX_CLASSES:
            raise ValueError(f"{path}, line {number}: a label is a class from 0 to {MAX_CLASSES - 1}, got {match[2]}")
    if not names:
        raise ValueError(f"the image list {path} is empty; write one image file per line")
    if min(labels) < 0 <= max(labels):
        raise ValueError(
            f"{path}: line {labels.index(-1) + 1} has no label, but others have; give all lines one, or none"
        )
    targets = torch.tensor(labels, dtype=torch.int32).numpy()
    classes = [str(i) for i in range(max(labels) + 1)] if max(labels) >= 0 else None
    return ImageIndex(str(path.resolve().parent), StringTable.of(names), targets, classes)
