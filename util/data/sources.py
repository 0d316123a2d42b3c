"""Where images come from: what `--data_path` and `--dataset` name, opened.

`--data_path DIR` holds `train/` (and `val/`) with one folder per class, as torchvision's ImageFolder; for pretraining
also a folder of images without classes, however nested, directly in DIR or in DIR/train.
`--data_path LIST` is a text file with one image per line, relative to the list's folder, optionally followed by a space
or tab and an integer label: `photos/cat 2.jpg 17`. A number is a label only behind a known image extension, so names
may contain spaces. Validation reads `val.txt` beside it. `--data_path DIR` with `DIR/train.txt` and `DIR/val.txt` does
the same, where there are no folders of these names.
`--data_path FILE.tar` is a tar of images (for validation too: `DIR/train.tar` and `DIR/val.tar`).
With `--val_share`, a folder or list without validation images is divided into two parts (`ImageIndex.set_aside`).
`--dataset NAME` is any name that `timm.data.create_dataset` knows (`torch/cifar10`, `hfds/...`, `wds/...`, ...), with
`--data_path` as its root.
"""

import bisect
import functools
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from util.data.decoding import IMAGE_EXTENSIONS, EncodedJpeg, open_image
from util.data.image_index import ImageIndex, StringTable, abbreviate, class_folders, load_index
from util.data.reader import extensions_of, read_by
from util.data.settings import DataSettings
from util.data.timm_source import open_timm_source
from util.errors import UserError, unreadable_is_user_error

logger = logging.getLogger(__name__)

FOLDER_DATASETS = ("", "folder", "image_folder", "torch/folder", "torch/image_folder")
ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar")
SIZED_FILES = 200  # whose sizes are looked at when a run starts; on a network each takes a millisecond
MAX_CLASSES = 100_000  # a larger number behind a file name in a list is no label


class Source(Protocol):
    """Images by number.

    classes: names of the classes; None without labels.
    numbered: the data tell numbers of classes, not names: `classes` are '0', '1', ... as far as labels occur.
    streamed: images cannot be read by number; such a source has a method `rewind`.
    targets: labels (number of images,) where they are known without reading the images, else None.
    fingerprint: changes when images are added, removed or renamed, as far as that is seen at once; else ''.
    sizes: changes when files of a sample have other sizes; '' where there are no files.
    labels: changes when targets that are no classes do; else ''.
    """

    classes: list[str] | None
    numbered: bool
    streamed: bool
    targets: np.ndarray | None
    fingerprint: str
    sizes: str
    labels: str

    def __len__(self) -> int: ...

    def path(self, i: int) -> str:
        """What to call image `i` in a message: its path, where it has one."""

    def read(self, i: int) -> tuple[torch.Tensor | EncodedJpeg, int]:
        """Image of shape (in_chans, h, w) and label, -1 without. Raises BadImageError or OSError."""


def digest_of_sizes(count: int, path: Callable[[int], str]) -> str:
    """Changes when files have other sizes: those of a sample of the `count` files at `path(i)`."""
    sample = np.unique(np.linspace(0, count - 1, min(count, SIZED_FILES), dtype=int)).tolist()
    # A file that is gone is found out when it is read.
    sizes = [os.stat(path(i)).st_size if os.path.exists(path(i)) else -1 for i in sample]
    return hashlib.blake2b(np.array(sizes, "<i8").tobytes(), digest_size=16).hexdigest()


class FileSource:
    """Images in files: a `Source`."""

    streamed, labels = False, ""

    def __init__(self, index: ImageIndex, config: DataSettings, numbered: bool = False):
        self.index, self.reader = index, config.reader
        self.in_chans, self.ignore_exif, self.max_pixels = config.in_chans, config.ignore_exif, config.max_pixels
        self.classes, self.numbered = index.classes, numbered
        self.targets = None if index.classes is None else index.targets

    @property
    def fingerprint(self) -> str:
        return self.index.fingerprint()

    @functools.cached_property
    def sizes(self) -> str:
        return digest_of_sizes(len(self), self.path)

    def __len__(self) -> int:
        return len(self.index)

    def path(self, i: int) -> str:
        return self.index.path(i)

    def read(self, i: int) -> tuple[torch.Tensor | EncodedJpeg, int]:
        if self.reader:
            image = read_by(self.reader, self.path(i), self.in_chans, self.max_pixels)
        else:
            with open(self.path(i), "rb", buffering=0) as file:
                data = file.readall()
            image = open_image(data, self.in_chans, self.ignore_exif, self.max_pixels)
        return image, int(self.index.targets[i])


class JoinedSource:
    """Several sources, one after another, without labels: a `Source`."""

    classes, numbered, targets, fingerprint, sizes, labels, streamed = None, False, None, "", "", "", False

    def __init__(self, sources: Sequence[Source], in_chans: int):
        self.sources, self.in_chans = sources, in_chans
        self.ends = list(itertools.accumulate(map(len, sources)))
        self.streamed = any(source.streamed for source in sources)

    def __len__(self) -> int:
        return self.ends[-1]

    def path(self, i: int) -> str:
        source, i = self._find(i)
        return source.path(i)

    def read(self, i: int) -> tuple[torch.Tensor | EncodedJpeg, int]:
        source, i = self._find(i)
        return source.read(i)[0], -1

    def _find(self, i: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self.ends, i)
        return self.sources[number], i - (self.ends[number - 1] if number else 0)


def open_images(paths: Sequence[str], config: DataSettings) -> JoinedSource:
    """The images in `paths`, in the given order: image files, folders (however nested), lists of images, tars.

    A folder's images come in the order of their folders, then of their names. Raises UserError.
    """
    sources, extensions = [], extensions_of(config.reader)
    for is_image, group in itertools.groupby(paths, lambda path: path.lower().endswith(extensions)):
        group = list(group)
        if is_image and (missing := [path for path in group if not os.path.exists(path)]):
            raise UserError(f"images that do not exist: {abbreviate(missing)}")
        if is_image and not any(map(os.path.isdir, group)):
            names = StringTable.of([os.fsencode(path) for path in group])
            index = ImageIndex("", names, np.full(len(group), -1, dtype=np.int32), None)
            sources.append(FileSource(index, config))
            continue
        for path in group:
            if path.lower().endswith(".tar"):
                sources.append(open_timm_source("", Path(path), "train", config))
            elif os.path.isdir(path):
                index = replace(load_index(path, extensions), root=path)  # named as it was given
                sources.append(FileSource(index, config))
            elif os.path.isfile(path):
                refuse_what_is_no_list(Path(path))
                index = _read_list(Path(path), extensions)
                sources.append(FileSource(index, config))
            else:
                raise UserError(f"{path} does not exist; give images, folders of images, lists of images or tars")
    return JoinedSource(sources, config.in_chans)


def open_source(config: DataSettings, split: str, require_labels: bool) -> Source:
    """The images of `split` ('train' or 'val') that `config` names (see the module's docstring).

    `require_labels`: unlabelled images and empty class folders are errors. The classes of 'val' are those of the
    training images, where there are any. Raises UserError.
    """
    path = Path(config.data_path)
    if config.dataset not in FOLDER_DATASETS:
        source = open_timm_source(config.dataset, path, split, config)
    elif (tar := _tar_file(path, split)) is not None:
        source = open_timm_source("", tar, split, config)
        train_classes = _train_classes(path, config) if split == "val" else None
        if train_classes is not None and source.classes != train_classes:
            different = sorted(set(source.classes or ()) ^ set(train_classes))
            raise UserError(f"{tar} and the training images differ in their classes: {abbreviate(different)}")
    elif path.exists():
        if path.is_file():
            refuse_what_is_no_list(path)
        index, numbered = _index(path, "train" if config.val_share else split, require_labels, config)
        if config.val_share:
            aside = index.set_aside(config.val_share)
            index = index.select(aside if split == "val" else ~aside)
        elif split == "val" and index.classes and (train_classes := _train_classes(path, config)) is not None:
            index = index.with_classes(train_classes)
        source = FileSource(index, config, numbered)
    else:
        raise UserError(f"--data_path {config.data_path} does not exist; give a folder of images, or a list of them")
    if config.val_share:
        _refuse_to_divide(path, config, source)
    if require_labels and source.classes is None:
        raise UserError(f"the images of {config.data_path} ({split}) have no labels: put them in one folder per class")
    return source


def refuse_what_is_no_list(path: Path) -> None:
    """Raise a UserError for a file that is given as images but lists none, with what to give instead."""
    name = path.name.lower()
    if name.endswith(ARCHIVES):
        raise UserError(
            f"{path} is a compressed archive: unpack it and give the folder, or make an uncompressed .tar "
            "of its images (they do not become smaller by compression)"
        )
    if name.endswith(tuple(IMAGE_EXTENSIONS)):
        raise UserError(
            f"{path} is one image: give the folder that holds the images ({path.parent}), or a text file "
            "that lists them"
        )
    with open(path, "rb") as file:
        if b"\0" in file.read(1024):
            raise UserError(
                f"{path} is neither a folder of images, nor a text file that lists them, nor a .tar of them"
            )


def _tar_file(data_path: Path, split: str) -> Path | None:
    """The tar file that holds `split`, if `data_path` is one or a folder of them."""
    if data_path.suffix == ".tar":
        if split != "train":
            raise UserError(
                f"--data_path {data_path} is a tar of training images; evaluation needs a folder with "
                f"train.tar and val.tar in it"
            )
        return data_path
    tar, folder = data_path / f"{split}.tar", data_path / split
    if tar.is_file() and folder.is_dir():
        raise UserError(f"both {tar} and {folder} are there: which holds the {split} images? Move the other elsewhere")
    return tar if tar.is_file() else None


def _list_file(data_path: Path, split: str) -> Path | None:
    """The list of the images of `split`, if `data_path` is a list or a folder of them."""
    if data_path.is_file():
        file = data_path if split == "train" else data_path.with_name("val.txt")
        if not file.is_file():
            raise UserError(
                f"--data_path {data_path} is a list of training images; evaluation needs a folder with 'val' in it, or "
                "val.txt beside the list, or --val_share"
            )
        return file
    file, folder = data_path / f"{split}.txt", data_path / split
    if not file.is_file():
        return None
    if folder.is_dir():  # a usual arrangement, where the list names files in the folder
        logger.info("%s is read, and not %s: to train on lists, give --data_path %s/train.txt", folder, file, data_path)
        return None
    return file


def _refuse_to_divide(path: Path, config: DataSettings, source: Source) -> None:
    """Raise a UserError where --val_share cannot divide the images, or there are validation images already."""
    if not isinstance(source, FileSource):
        if config.dataset not in FOLDER_DATASETS:
            raise UserError(f"--val_share divides folders and lists of images, not --dataset {config.dataset}")
        raise UserError(
            f"--val_share divides folders and lists of images, not the tar of --data_path {path}: unpack it, or make a "
            "val.tar beside a train.tar and give their folder without --val_share"
        )
    if (found := find_validation(path)) is not None:
        raise UserError(f"--val_share {config.val_share:g} divides the images, but {found} is there: use one of both")


def find_validation(data_path: str | Path) -> Path | None:
    """The folder, list or tar of validation images that comes with the folder or list `data_path`; None without."""
    path = Path(data_path)
    if path.suffix == ".tar":
        return None
    places = [path / name for name in ("val.txt", "val", "val.tar")] if path.is_dir() else [path.with_name("val.txt")]
    return next((place for place in places if place.exists()), None)


def _index(data_path: Path, split: str, require_labels: bool, config: DataSettings) -> tuple[ImageIndex, bool]:
    """The images of a folder or list, and whether their labels are numbers."""
    if (file := _list_file(data_path, split)) is not None:
        return _read_list(file, extensions_of(config.reader)), True
    return _folder_index(data_path, split, require_labels, config), False


def _folder_index(data_path: Path, split: str, require_labels: bool, config: DataSettings) -> ImageIndex:
    folder = data_path / split
    if not folder.is_dir():
        if require_labels and not config.val_share:  # which divides a folder without others
            raise UserError(
                f"{folder} does not exist; it must hold the {split} images, one folder per class"
                + ("; or let --val_share 0.1 set a part of the training images aside" if split == "val" else "")
                + (f"; or, if the class folders lie in {data_path}, give --val_share 0.1" if split == "train" else "")
            )
        folder = data_path
    index = load_index(folder, extensions_of(config.reader))
    if not require_labels:
        return index
    if index.classes is None:
        raise UserError(
            f"{index.path(0)!r} lies outside any class folder; labels need one folder per class in {folder}"
        )
    if empty := index.empty_classes():
        raise UserError(f"class folders without any image in {folder}: {abbreviate(empty)}")
    return index


def _train_classes(data_path: Path, config: DataSettings) -> list[str] | None:
    """The classes of the training images below `data_path`; None where there are none."""
    if (tar := _tar_file(data_path, "train")) is not None:
        return open_timm_source("", tar, "train", config).classes
    if (file := _list_file(data_path, "train")) is not None:
        return _read_list(file, extensions_of(config.reader)).classes
    return class_folders(data_path / "train") if (data_path / "train").is_dir() else None


def _read_list(path: Path, extensions: Sequence[str]) -> ImageIndex:
    """The index of a text file that lists images (see the module's docstring)."""
    pattern = rf"(.*(?:{'|'.join(map(re.escape, extensions))}))(?:[ \t]+(\d{{1,18}}))?"
    list_line = re.compile(pattern, re.IGNORECASE)
    with unreadable_is_user_error(f"cannot read the image list {path}"):
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    names, labels, known = [], [], {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = list_line.fullmatch(line.rstrip())
        if match is None:
            raise UserError(
                f"{path}, line {number}: expected an image file ({', '.join(extensions)}), optionally "
                f"followed by a space and an integer label, got {line[:200]!r}"
            )
        names.append(os.fsencode(match[1]))
        labels.append(-1 if match[2] is None else int(match[2]))
        if labels[-1] >= MAX_CLASSES:
            raise UserError(f"{path}, line {number}: a label is a class from 0 to {MAX_CLASSES - 1}, got {match[2]}")
        if known.setdefault(names[-1], labels[-1]) != labels[-1]:
            before = known[names[-1]]
            raise UserError(f"{path}, line {number}: {match[1]} has another label, {before}, in a line before")
    if not names:
        raise UserError(f"the image list {path} is empty; write one image file per line")
    if len(known) < len(names):
        logger.warning(
            "%s: %d lines repeat images of other lines, which count as often as they are listed",
            path, len(names) - len(known),
        )  # fmt: skip
    if min(labels) < 0 <= max(labels):
        raise UserError(
            f"{path}: line {labels.index(-1) + 1} has no label, but others have; give all lines one, or none"
        )
    classes = [str(i) for i in range(max(labels) + 1)] if max(labels) >= 0 else None
    return ImageIndex(str(path.resolve().parent), StringTable.of(names), np.array(labels, dtype=np.int32), classes)
