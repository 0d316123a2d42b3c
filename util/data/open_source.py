"""Where images come from: what `--data_path` and `--dataset` name, opened.

`--data_path DIR` holds `train/` (and `val/`) with one folder per class, as for torchvision's ImageFolder; for
pretraining also a folder of images without classes, however nested, directly in DIR or in DIR/train.
`--data_path LIST` is a text file with one image per line, relative to the list's folder, optionally followed by a space
or tab and an integer label: `photos/cat 2.jpg 17`. A number is a label only after a known image extension, so names
may contain spaces. Validation reads `val.txt` beside it. `--data_path DIR` with `DIR/train.txt` and `DIR/val.txt` does
the same, if there are no folders of these names.
`--data_path FILE.tar` is a tar of images (for validation too: `DIR/train.tar` and `DIR/val.tar`).
With `--val_share`, a folder or list without validation images is divided into two parts (`ImageIndex.set_aside`).
`--dataset NAME` is any name that `timm.data.create_dataset` knows (`torch/cifar10`, `hfds/...`, `wds/...`, ...), with
`--data_path` as its root.
"""

import itertools
import logging
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from util.data import Config
from util.data.custom_reader import extensions_of
from util.data.decoding import IMAGE_EXTENSIONS
from util.data.image_index import (
    ARCHIVES,
    ImageIndex,
    StringTable,
    abbreviate,
    class_folders,
    is_output,
    load_index,
    shared_folders,
)
from util.data.sources import FileSource, JoinedSource, Source, TarSource
from util.data.timm_source import open_timm_source
from util.errors import UserError, unreadable_is_user_error

logger = logging.getLogger(__name__)

FOLDER_DATASETS = ("", "folder", "image_folder", "torch/folder", "torch/image_folder")
# Names of folders with a part of a data set in them: Train, validation, test_images, val2017.
PART = re.compile(r"(train|training|val|valid|validation|test|testing)([-_ ]?(set|images|data|\d{4}))?", re.IGNORECASE)
MAX_CLASSES = 100_000  # a larger number after a file name in a list is not a label


def open_images(paths: Sequence[str], config: Config) -> JoinedSource:
    """The images in `paths`, in the given order: image files, folders (however nested), lists of images, tars.

    A folder's images come in the order of their folders, then of their names. Raises UserError.
    """
    sources, extensions = [], extensions_of(config.reader)
    for are_images, group in itertools.groupby(
        paths, lambda path: path.lower().endswith(extensions) and not os.path.isdir(path)
    ):
        group = list(group)
        if are_images:
            if missing := [path for path in group if not os.path.exists(path)]:
                raise UserError(f"images that do not exist: {abbreviate(missing)}")
            names = StringTable.of([os.fsencode(path) for path in group])
            unlabelled = np.full(len(group), -1, dtype=np.int32)
            sources.append(FileSource(ImageIndex("", names, unlabelled, None), config))
            continue
        for path in group:
            if path.lower().endswith(".tar"):
                sources.append(TarSource(Path(path), config))
            elif os.path.isdir(path):
                index = replace(load_index(path, extensions), root=path)  # named as it was given
                sources.append(FileSource(index, config))
            elif os.path.isfile(path):
                _refuse_what_is_no_list(Path(path))
                sources.append(FileSource(_read_list(Path(path), extensions), config))
            else:
                raise UserError(f"{path} does not exist; give images, folders of images, lists of images or tars")
    return JoinedSource(sources, config)


def open_source(config: Config, split: str, require_labels: bool) -> Source:
    """The images of `split` ('train' or 'val') that `config` names (see the module's docstring).

    `require_labels`: unlabelled images and empty class folders are errors. The classes of 'val' are those of the
    training images, if there are any. Raises UserError.
    """
    if config.dataset in FOLDER_DATASETS:
        source = _open_files(Path(config.data_path), split, require_labels, config)
    elif config.val_share:
        raise UserError(f"--val_share divides folders and lists of images, not --dataset {config.dataset}")
    elif config.reader:
        raise UserError(f"--reader {config.reader} reads files, not the images of --dataset {config.dataset}")
    else:
        source = open_timm_source(split, config)
    if require_labels and source.classes is None:
        raise UserError(f"the images of {config.data_path} ({split}) have no labels: put them in one folder per class")
    return source


def _look_for_parts(place: Path, folders: Collection[str], labels: bool) -> None:
    """If the first `folders` below `place` that differ, or the only one, are named like parts of a data set (train,
    val, test, ...): raise a UserError, as they would be classes; without `labels` warn, also of deeper ones. One such
    name among others may be a class."""
    parts = [folder.split(os.sep) for folder in folders]
    shared = shared_folders(folders)
    names = {own[len(shared)] for own in parts if len(own) > len(shared)}
    found = sorted(filter(PART.fullmatch, names))
    alone = next(filter(PART.fullmatch, shared), None) if labels else None
    if alone is not None:
        shared, found = shared[: shared.index(alone)], [alone]
    elif len(found) < 2:
        found = [] if labels else sorted(filter(PART.fullmatch, {name for own in parts for name in own}))
    if len(found) < 2 and alone is None:
        return
    if not labels:
        logger.warning(
            "%s: in folders named like parts of a data set, %s, all images are used", place, abbreviate(found)
        )
        return
    place = place.joinpath(*shared)
    what = "parts of a data set, not classes" if alone is None else "a part of a data set, not a class"
    raise UserError(
        f"{place} holds {abbreviate(found)}, named like {what}: call the folder of training images 'train' and that "
        "for validation 'val' (or make train.tar and val.tar), and give --data_path "
        f"{place if place.is_dir() else place.parent}; or give only one of them"
    )


def _open_files(path: Path, split: str, require_labels: bool, config: Config) -> Source:
    """The images of `split` in a folder, list or tar, or in a part of a --data_path that is one; as `open_source`."""
    place = _place(path, "train" if config.val_share else split)
    if config.val_share:
        _refuse_to_divide(path, place, config.val_share)
    if place.suffix.lower() == ".tar":
        source = TarSource(place, config)
        if place == path:
            _look_for_parts(place, source.classes or (), require_labels)
        train_classes = _train_classes(path, config, source.classes or ()) if split == "val" else None
        if train_classes is not None and source.classes != train_classes:
            different = sorted(set(source.classes or ()) ^ set(train_classes))
            raise UserError(f"{place} and the training images differ in their classes: {abbreviate(different)}")
        return source
    index = _index(place, path / split, require_labels, config)
    if config.val_share:
        aside = index.set_aside(config.val_share)
        index = index.select(aside if split == "val" else ~aside)
    elif (
        split == "val" and index.classes and (train_classes := _train_classes(path, config, index.classes)) is not None
    ):
        index = index.with_classes(train_classes)
    return FileSource(index, config, numbered=place.is_file())


def _place(path: Path, split: str) -> Path:
    """The tar, list or folder of the images of `split` in a --data_path; a folder without such a part is one itself."""
    if path.suffix.lower() == ".tar":
        if split == "val":
            raise UserError(
                f"--data_path {path} is a tar of training images; evaluation needs a folder with train.tar and val.tar "
                "in it"
            )
        return path
    if not path.exists():
        raise UserError(f"--data_path {path} does not exist; give a folder of images, or a list of them")
    if path.is_file():
        _refuse_what_is_no_list(path)
        place = path if split == "train" else path.with_name("val.txt")
        if not place.is_file():
            raise UserError(
                f"--data_path {path} is a list of training images; evaluation needs a folder with 'val' in it, or "
                "val.txt beside the list, or --val_share"
            )
        return place
    tar, file, folder = (path / f"{split}{ending}" for ending in (".tar", ".txt", ""))
    if not folder.is_dir():
        return tar if tar.is_file() else file if file.is_file() else path
    if tar.is_file():
        raise UserError(f"both {tar} and {folder} exist: which holds the {split} images? Move the other elsewhere")
    if file.is_file():  # a usual arrangement, where the list names files in the folder
        logger.info("%s is read, not %s: to train on lists, give --data_path %s/train.txt", folder, file, path)
    return folder


def _refuse_to_divide(path: Path, place: Path, share: float) -> None:
    """Raise a UserError if --val_share cannot divide the images at `place`, or --data_path has others for it."""
    if place.suffix.lower() == ".tar":
        raise UserError(
            f"--val_share divides folders and lists of images, not the tar of --data_path {path}: unpack it, or make a "
            "val.tar beside a train.tar and give their folder without --val_share"
        )
    if (found := find_validation(path)) is not None:
        raise UserError(f"--val_share {share:g} divides the images, but {found} exists: use one of the two")


def find_validation(data_path: str | Path) -> Path | None:
    """The folder, list or tar of validation images that comes with the folder or list `data_path`, or None."""
    path = Path(data_path)
    if path.suffix.lower() == ".tar":
        return None
    places = [path / name for name in ("val", "val.txt", "val.tar")] if path.is_dir() else [path.with_name("val.txt")]
    return next((place for place in places if place.exists()), None)


def _index(place: Path, expected: Path, require_labels: bool, config: Config) -> ImageIndex:
    """The images of a list or folder, which with labels must be the `expected` one, unless --val_share divides it."""
    extensions = extensions_of(config.reader)
    if place.is_file():
        return _read_list(place, extensions)
    if require_labels and place != expected and not config.val_share:
        if not {"train", "val"} & {*(folders := class_folders(place))}:  # with one of them, only the other is missing
            _look_for_parts(place, folders, labels=True)
        raise UserError(
            f"{expected} does not exist; it must hold the {expected.name} images, one folder per class; or let "
            f"--val_share 0.1 set a part of the training images aside; with it, class folders may lie in {place} itself"
        )
    index = load_index(place, extensions)
    if place == expected.parent:  # no part was named
        _look_for_parts(place, index.folders, require_labels)
    if require_labels and index.classes is None:
        raise UserError(f"{index.path(0)!r} lies outside any class folder; labels need one folder per class in {place}")
    if require_labels and (empty := index.empty_classes()):
        raise UserError(f"class folders without any image in {place}: {abbreviate(empty)}")
    return index


def _train_classes(data_path: Path, config: Config, of_validation: Collection[str]) -> list[str] | None:
    """The classes of the training images below `data_path`; None if there are none.

    Folders that the validation images also have are not searched for output, which on a network takes time.
    """
    place = _place(data_path, "train")
    if place.suffix.lower() == ".tar":
        return TarSource(place, config).classes
    if place.is_file():
        return _read_list(place, extensions_of(config.reader)).classes
    if place == data_path:
        return None
    return [name for name in class_folders(place) if name in of_validation or not is_output(place / name)]


def _refuse_what_is_no_list(path: Path) -> None:
    """Raise a UserError for a file given as images that does not list any, saying what to give instead."""
    name = path.name.lower()
    with open(path, "rb") as file:
        is_text = b"\0" not in file.read(1024)
    if name.endswith(ARCHIVES):
        why = (
            "is a compressed archive: unpack it and give the folder, or make an uncompressed .tar of its images "
            "(compression does not make them smaller)"
        )
    elif name.endswith(IMAGE_EXTENSIONS):
        why = f"is one image: give the folder that holds the images ({path.parent}), or a text file that lists them"
    elif not is_text:
        why = "is neither a folder of images, nor a text file that lists them, nor a .tar of them"
    else:
        return
    raise UserError(f"{path} {why}")


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
            raise UserError(f"{path}, line {number}: {match[1]} has another label, {before}, in an earlier line")
    if not names:
        raise UserError(f"the image list {path} is empty; write one image file per line")
    if len(known) < len(names):
        logger.warning(
            "%s: %d lines repeat images of other lines, which are used as often as they are listed",
            path, len(names) - len(known),
        )  # fmt: skip
    if min(labels) < 0 <= max(labels):
        raise UserError(
            f"{path}: line {labels.index(-1) + 1} has no label, but others have; give all lines one, or none"
        )
    classes = [str(i) for i in range(max(labels) + 1)] if max(labels) >= 0 else None
    return ImageIndex(str(path.resolve().parent), StringTable.of(names), np.array(labels, dtype=np.int32), classes)


def refuse_output_among_images(folder: str, flag: str, data_path: str) -> None:
    """Raise a UserError if pictures in `folder`, which `flag` names, would be taken for images of `data_path`, or it
    for a class: in train/ and val/, or in a folder of images without these if it holds images already and is not left
    out (see `is_output`)."""
    output, data = Path(folder).resolve(), Path(data_path)
    parts = [place for name in ("train", "val") if (place := data / name).is_dir()]
    if not parts:
        if not data.is_dir() or _place(data, "train") != data or not output.is_dir():
            return
        images = (name for *_, files in os.walk(output) for name in files if name.lower().endswith(IMAGE_EXTENSIONS))
        if is_output(output) or not any(images):
            return
    if any(output.is_relative_to(place.resolve()) for place in parts or [data]):
        raise UserError(
            f"{flag} {folder} is among the images of --data_path {data_path}, and pictures in it would be used as "
            "such: give a new folder elsewhere"
        )
