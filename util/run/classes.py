"""Which class is which: the classes of a data set against those of weights, and the images set aside for validation.

Checkpoints of classifiers carry the names of their classes. Labels of the data are numbered by them, so a head never
has to be reordered, nor its optimizer state.
"""

import logging
import os
import unicodedata
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from util.data.datasets import ImageDataset, check_targets
from util.data.image_index import abbreviate
from util.errors import UserError, unreadable_is_user_error
from util.run.config import Config
from util.run.session import Start
from util.weights import layouts
from util.weights.file import CheckpointError
from util.weights.source import WeightsInfo, recorded_classes

logger = logging.getLogger(__name__)


def count_classes(config: Config, dataset: ImageDataset) -> int:
    """The number of classes, which --nb_classes and the data set must agree on; numbered labels need not use all.

    Raises:
        UserError: they do not agree, or neither gives it.
    """
    found = len(dataset.classes) if dataset.classes else None
    number = config.nb_classes or found
    if number is None:
        raise UserError("the data set does not give its number of classes: give --nb_classes")
    if found not in (None, number) and not (dataset.source.numbered and found < number):
        raise UserError(f"--nb_classes {number} contradicts the {found} classes in {config.data_path}")
    refuse_single_class(number, config)
    if dataset.targets is not None:
        check_targets(torch.as_tensor(dataset.targets), number)
    return number


def refuse_single_class(number: int, config: Config) -> None:
    """Raise a UserError if there is nothing to tell apart."""
    if number < 2:
        raise UserError(f"classification needs at least 2 classes, found {number} in {config.data_path}")


def number_classes(config: Config, dataset: ImageDataset, start: Start) -> int:
    """Renumber the labels in the order of the classes of the head that the run goes on with, matched by name; returns
    the number of classes.

    Raises:
        UserError: the head's classes are not those of the data.
    """
    number = count_classes(config, dataset)
    warn_of_similar_names(dataset.classes or [])
    warn_of_empty_classes(dataset, "training")
    if start.checkpoint is not None:
        classes, owner = recorded_classes(start.checkpoint, "the checkpoint to resume"), "the checkpoint to resume"
    elif start.weights is not None and not config.reset_head and len(start.weights[0].get("head.weight", ())) == number:
        classes, owner = start.weights[1].classes, str(start.weights[1])
    elif dataset.source.numbered:
        classes, owner = [str(i) for i in range(number)], "--nb_classes"
    else:
        return number
    if classes is not None:
        dataset.number_labels_as(classes, owner, exactly=True)
        return count_classes(config, dataset)
    if dataset.classes is not None:
        warn_of_unknown_classes(owner)
    return number


def warn_of_unknown_classes(source: object) -> None:
    logger.warning(
        "%s does not record the names of its classes, so whether they are those of the data cannot be checked: in both "
        "the same number must mean the same class (class folders are numbered in alphabetical order)",
        source,
    )


def classes_to_evaluate(config: Config, dataset: ImageDataset, weights: dict[str, Tensor], info: WeightsInfo) -> int:
    """Renumber the labels in the order of the classes of the weights, matched by name; returns the number of classes.

    Raises:
        UserError: these are not the classes of the data.
    """
    number, found = layouts.count_classes(weights, info), len(dataset.classes or ())
    if config.nb_classes not in (None, number):
        raise UserError(f"--nb_classes {config.nb_classes} contradicts the {number} classes in {info}: leave it out")
    if info.classes is not None:
        if len(info.classes) != number:
            raise CheckpointError(f"{info} records the names of {len(info.classes)} classes, but has {number}")
        dataset.number_labels_as(info.classes, str(info))
    else:
        warn_of_unknown_classes(info)
        if dataset.classes and found != number and not (dataset.source.numbered and found < number):
            raise UserError(
                f"{info} has {number} classes, but {config.data_path} has {found}, and the file does not record "
                f"their names: put a folder train/ beside val/ that has the folders of all {number} classes"
            )
    if dataset.targets is not None:
        check_targets(torch.as_tensor(dataset.targets), number)
    warn_of_empty_classes(dataset)
    return number


def warn_of_similar_names(classes: list[str]) -> None:
    """Warn of classes whose names are the same to most people, and to the file systems of macOS and Windows."""
    spelt = [unicodedata.normalize("NFC", name).casefold().strip() for name in classes]
    numbers = Counter(spelt)
    if twins := [name for name, alike in zip(classes, spelt) if numbers[alike] > 1]:
        logger.warning("treated as different classes, though their names are spelt alike: %s", abbreviate(twins))


def warn_of_empty_classes(dataset: ImageDataset, what: str = "validation") -> None:
    """Warn of classes without images: they are not learned, or the accuracy says nothing about them."""
    used = set(() if dataset.targets is None else dataset.targets.tolist())
    unused = [name for i, name in enumerate(dataset.classes or ()) if i not in used]
    if used and unused:
        logger.warning(
            "%d of %d classes have no %s image: %s", len(unused), len(dataset.classes), what, abbreviate(unused)
        )


def check_division(config: Config, dataset: ImageDataset, info: WeightsInfo) -> None:
    """The images to evaluate must not have been trained on, as far as the weights record it.

    Raises:
        UserError: the weights were trained with another --val_share.
    """
    recorded = info.args.get("val_share")
    if recorded and config.val_share and recorded != config.val_share:
        raise UserError(
            f"--val_share {config.val_share:g}, but {info} was trained with --val_share {recorded:g}: some of these "
            "images may have been trained on"
        )
    before, now = info.data.get("val"), dataset.fingerprint()
    trained_on = info.data.get("train")
    if isinstance(trained_on, dict) and now["names"] and all(now[name] == trained_on.get(name) for name in now):
        logger.warning("these are the %d images that %s was trained on", len(dataset), info)
    if config.val_share and isinstance(before, dict) and before.get("names") != now["names"]:
        logger.warning(
            "the %d images set aside by --val_share are not the %s of the training of %s, since images were added, "
            "removed or renamed: some may have been trained on. Its output folder lists those that were not: val.txt",
            now["images"], before.get("images"), info,
        )  # fmt: skip


def write_division(config: Config, dataset: ImageDataset) -> None:
    """With --val_share: list the validation images as `val.txt` in the output folder, which --data_path takes."""
    path = Path(config.output_dir) / "val.txt"
    with (
        unreadable_is_user_error(f"{path} cannot be written"),
        open(path, "w", encoding="utf-8", errors="surrogateescape") as file,
    ):
        for index, target in enumerate(dataset.targets):
            if "\n" not in (image := os.path.abspath(dataset.path_of(index))):  # which a list cannot hold
                file.write(f"{image}\t{target}\n")
