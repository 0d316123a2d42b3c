"""Data sets whose every sample is a function of (seed, epoch, index), and their loaders."""

import atexit
import contextlib
import functools
import gc
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from util.data import Config
from util.data.decoding import BadImageError, EncodedJpeg, PixelType, decoded
from util.data.image_index import abbreviate, digest
from util.data.open_source import open_source
from util.data.sources import Source, spread
from util.data.statistics import magnitude
from util.errors import UserError, unreadable_is_user_error
from util.seeding import derive_seed, keyed_generator, seed_all

logger = logging.getLogger(__name__)

REPLACEMENT_TRIES = 100
SAMPLE = 32  # images that are looked at before a run
LARGEST = 100.0  # magnitude of an image: wrong units differ by factors of 1e2 to 1e4 (a whole sample may reach 14)
MOST_FAR = 0.01  # share of the images that may be larger
ENOUGH = 2000  # images, to estimate this share
NEAR, FAR = 1, 2  # what is known about an image; 0 before it is read
# Forked workers share the index of a data set; Linux's own default since Python 3.14 would send each a copy.
WORKERS = multiprocessing.get_context("fork" if sys.platform == "linux" else None)


class ImageDataset(Dataset):
    """`dataset[(epoch, index)]` -> (image (C, H, W) after the transform, target).

    Targets are classes, -1 without labels; or whatever else the source gives, such as boxes, for a transform with
    `takes_target`, which then gets both and returns both.

    Images are uint8, or float32 if the first image has more than 8 bits (see util.data.decoding). Before a transform
    all generators are seeded with (seed, epoch, index): a sample depends on nothing else, neither on the worker that
    makes it nor on the samples before it. (With num_workers 0 the generators are those of the training process.)

    A transform gets a tensor (C, h, w). One with `takes_encoded` may also get an `EncodedJpeg`, to decode only
    what it needs.

    An image that cannot be read raises a BadImageError that names it. With `skip_bad`, another image takes its place,
    drawn with the key (seed, epoch, index); it is logged once and counted, exactly, across the workers of this process,
    and a BadImageError is raised when more than `max_bad_share` of the data set has turned out bad.
    """

    pixels: PixelType | None = None  # of all images; not known before the first is read

    def __init__(
        self, source: Source, transform: Callable, seed: int, skip_bad: bool = False, max_bad_share: float = 0.01
    ):
        self.source, self.transform, self.seed = source, transform, seed
        self.skip_bad, self.max_bad_share = skip_bad, max_bad_share
        self.classes = source.classes
        self._numbers: np.ndarray | None = None  # of the source's classes in `classes`, if they differ
        self._bad = torch.zeros(len(source), dtype=torch.uint8).share_memory_()  # shared with the workers
        self._lock = WORKERS.Lock()
        self._statistics: tuple[torch.Tensor, torch.Tensor] | None = None  # (C, 1, 1) each
        self._looked_at: torch.Tensor | None = None  # NEAR or FAR of each image; shared with the workers
        self._stop_when_far = False
        self._reduced = torch.zeros(1, dtype=torch.uint8).share_memory_()  # whether bits were lost: logged once
        self.pixels = self._first_image_pixels()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        candidate = index
        for attempt in range(REPLACEMENT_TRIES):
            if not self._bad[candidate]:
                try:
                    image, target = self._read(candidate, self.transform, (self.seed, epoch, index))
                except BadImageError as error:
                    if not self.skip_bad:
                        advice = (
                            "Repair or remove it (--bad_images skip replaces training images only); python -m "
                            "util.check_data names all such images"
                        )
                        raise BadImageError(f"{error}. {advice}") from None
                    self._record_bad(candidate, error)
                else:
                    if self._stop_when_far and self._looked_at[candidate] == FAR:
                        self._refuse_too_many_far(candidate)
                    return image, target
            candidate = derive_seed("replacement", self.seed, epoch, index, attempt) % len(self)
        raise BadImageError(f"no readable image found in {REPLACEMENT_TRIES} tries to replace {self.path_of(index)!r}")

    def path_of(self, index: int) -> str:
        return self.source.path(index)

    @property
    def targets(self) -> np.ndarray | None:
        """The labels of all images, if they are known without reading them."""
        targets = None if self.classes is None else self.source.targets
        return targets if targets is None or self._numbers is None else self._numbers[targets]

    def fingerprint(self) -> dict[str, int | str]:
        """Plain values that change when the data set does, for a checkpoint.

        Raises BadImageError if files are missing in the sample whose sizes are included; with `skip_bad`, warns.
        """
        if missing := self.source.missing:
            message = f"{len(missing)} images of a sample of the {len(self)} do not exist: {abbreviate(missing)}"
            if not self.skip_bad:
                raise BadImageError(message)
            logger.warning("%s", message)
        targets = self.targets
        labels = self.source.labels if targets is None else digest(targets.astype("<i4"))
        return {
            "images": len(self), "names": self.source.fingerprint, "labels": labels, "sizes": self.source.sizes
        }  # fmt: skip

    def number_labels_as(self, classes: Sequence[str], owner: str, exactly: bool = False) -> None:
        """Renumber the labels in the order of `classes`, matched by name; they belong to `owner` (for messages).

        Labels that are numbers are matched with names that are numbers (folders 0 to 11 are in order 0, 1, 10, 11,
        2, ...); with other names they are taken as positions, with a warning. Call it before the data set is read.
        Raises UserError when it has a class that is not among `classes` (with `exactly` also the reverse).
        """
        own, by_number = self.source.classes, self.source.numbered and all(map(str.isdigit, classes))
        if own is not None and (by_number or not self.source.numbered):
            self._numbers = match_classes(own, classes, owner, exactly and not by_number)
        elif list(classes) != self.classes:
            logger.warning(
                "the labels of these images are numbers: they are taken as positions in the classes of %s, %s",
                owner, abbreviate(list(classes)),
            )  # fmt: skip
        self.classes = list(classes)

    def bad_images(self) -> list[int]:
        """The images that could not be read so far, in all workers of this process."""
        return self._bad.nonzero().flatten().tolist()

    def watch(self, mean: Sequence[float], std: Sequence[float], stop: bool) -> None:
        """Compare each image of more than 8 bits with `mean` and `std` when this process or a worker first reads it.

        Images are compared as read, before the transform. A warning names the first one that is far from them. With
        `stop`, a BadImageError is raised, whatever `skip_bad` is, when more than one image is, and more than `MOST_FAR`
        of those read so far (while these are few: of the whole data set, or of `ENOUGH`). Call it before other
        processes read the data set.
        """
        if self.pixels is not PixelType.BYTES:  # the units of bytes are clear from the sample
            self._statistics = tuple(torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
            self._looked_at = torch.zeros(len(self), dtype=torch.uint8).share_memory_()
            self._stop_when_far = stop

    def sample(self, most: int = SAMPLE, seconds: float = 1.0) -> list[torch.Tensor]:
        """Images from all over the data set, as read, without a transform: no random numbers are drawn.

        At most `most`, and no more after `seconds` once there are a few. Unreadable ones are left out. From a streamed
        set, the first ones; the stream then begins again.
        """
        evenly = [i * len(self) // min(most, len(self)) for i in range(min(most, len(self)))]
        images, start = [], time.monotonic()
        for index in (index for first in range(8) for index in evenly[first::8]):
            if len(images) >= 4 and time.monotonic() - start > seconds:
                break
            with contextlib.suppress(BadImageError):
                images.append(self._read(index)[0])
        if self.source.streamed:
            self.source.rewind()
        return images

    def _first_image_pixels(self) -> PixelType:
        """The pixel type of the first image, or with `skip_bad` the first readable one: all are converted to it."""
        tries, reasons = min(len(self), REPLACEMENT_TRIES), []
        for index in range(tries):
            try:
                return PixelType(self._read(index)[0].dtype)
            except BadImageError as error:
                if not self.skip_bad:
                    raise
                reasons.append(error)
        raise BadImageError(f"none of the first {tries} images can be read: {reasons[0]}")

    def _read(self, index: int, transform: Callable = decoded, seeds: tuple[int, ...] = ()) -> tuple[torch.Tensor, int]:
        """An image after `transform`, before which all generators are seeded with `seeds`, if any; and its target."""
        try:
            try:
                image, target = self.source.read(index)
            except OSError as error:
                raise BadImageError(str(error)) from None
            if self._numbers is not None:
                target = int(self._numbers[target])
            if self.pixels is not None:
                self._say_once_that_bits_are_lost(index, image.dtype)
                image = self.pixels.convert(image)
            if not getattr(transform, "takes_encoded", False):
                image = decoded(image)
            if self._looked_at is not None and not self._looked_at[index]:
                self._look_at(index, image)
            if seeds:
                seed_all(*seeds)
            return transform(image, target) if getattr(transform, "takes_target", False) else (transform(image), target)
        except BadImageError as error:
            raise BadImageError(f"cannot use image {self.path_of(index)!r}: {error}") from None

    def _say_once_that_bits_are_lost(self, index: int, dtype: torch.dtype) -> None:
        if dtype == torch.uint16 and self.pixels is PixelType.BYTES and not self._reduced[0]:
            self._reduced[0] = 1
            logger.warning(
                "%s has 16 bits and is reduced to 8, as others will be: the first image, %s, has 8. To keep all bits, "
                "make a 16-bit image the first", self.path_of(index), self.path_of(0),
            )  # fmt: skip

    def _look_at(self, index: int, image: torch.Tensor) -> None:
        """See `watch`."""
        size = magnitude(image, *self._statistics)
        if size <= LARGEST:
            self._looked_at[index] = NEAR
            return
        with self._lock:
            first = not (self._looked_at == FAR).any()
            self._looked_at[index] = FAR
        if first:
            logger.warning(
                "image %s is far from --mean and --std: normalised with them, its values are about %.3g in size; 1 is "
                "usual%s", self.path_of(index), size,
                f". Training stops when more than {MOST_FAR:.0%} of the images are" if self._stop_when_far else "",
            )  # fmt: skip

    def _refuse_too_many_far(self, index: int) -> None:
        far, looked_at = int((self._looked_at == FAR).sum()), int(self._looked_at.count_nonzero())
        if far > max(1, MOST_FAR * max(looked_at, min(len(self), ENOUGH))):
            raise BadImageError(
                f"{far} of {looked_at} images read so far are far from --mean and --std, as if in another unit; the "
                f"last one: {self.path_of(index)}. Convert all images to one unit, or give the --mean and --std that "
                "python -m util.check_data measures; --allow_odd_statistics continues all the same"
            )

    def _record_bad(self, index: int, error: BadImageError) -> None:
        with self._lock:
            known = bool(self._bad[index])
            self._bad[index] = 1
            count = int(self._bad.sum())
        if not known:
            logger.warning("skipping a bad image (%d so far): %s", count, error)
        if count > self.max_bad_share * len(self):
            raise BadImageError(
                f"{count} of {len(self)} images cannot be used, more than the share "
                f"--max_bad_images {self.max_bad_share:g} allows; the last one: {error}"
            )


class NumberedImages(ImageDataset):
    """`dataset[(0, index)]` -> (image (C, H, W) after the transform, index): every image once, none replaced.

    With `skip_bad`, (any image, -1) for one that cannot be read, which the log names.
    """

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        _, index = key
        try:
            image, _ = self._read(index, self.transform)
        except BadImageError as error:
            if not self.skip_bad:
                raise
            logger.error("left out: %s", error)
            return self.transform(torch.zeros(self.source.in_chans, 1, 1, dtype=self.pixels.dtype)), -1
        return image, index


def read_sample(dataset: ImageDataset) -> Iterator[Any]:
    """The targets of images from all over the data set, which locate things in them, such as boxes.

    At the end, a warning names photographs that their EXIF tag turns or mirrors without changing their size; a change
    (when they are turned on their side) would show.

    Raises:
        BadImageError: for an image or target that cannot be used, unless these are skipped.
    """
    numbers, turned = spread(len(dataset), SAMPLE), []
    for i in numbers:
        try:
            image, target = dataset.source.read(i)
        except (BadImageError, OSError) as error:
            if not dataset.skip_bad:
                raise BadImageError(f"cannot use image {dataset.path_of(i)!r}: {error}") from None
            continue
        if isinstance(image, EncodedJpeg) and image.orientation in (2, 3, 4):
            turned.append(dataset.path_of(i))
        yield target
    if turned:
        logger.warning(
            "%d of %d photographs in a sample are turned upside down or mirrored by their EXIF tag; annotations are "
            "assumed to fit the result; if they fit the pixels as stored, give --ignore_exif: %s",
            len(turned), len(numbers), abbreviate(turned),
        )  # fmt: skip


def match_classes(own: Sequence[str], classes: Sequence[str], owner: str, exactly: bool) -> np.ndarray:
    """The position in `classes` of each of `own`. Raises UserError: see `ImageDataset.number_labels_as`."""
    position = {name: i for i, name in enumerate(classes)}
    extra, lacking = sorted(set(own) - set(classes)), sorted(set(classes) - set(own))
    if extra or (exactly and lacking):
        differences = [f"only in the data: {abbreviate(extra)}"] if extra else []
        differences += [f"only in {owner}: {abbreviate(lacking)}"] if lacking else []
        raise UserError(
            f"the data and {owner} differ in the names of their classes: {'; '.join(differences)}. Give the class "
            "folders the names that they had; or fine-tune on other classes with --finetune and --reset_head"
        )
    return np.array([position[name] for name in own], dtype=np.int32)


def check_targets(targets: torch.Tensor, nb_classes: int) -> None:
    """Raise a BadImageError for a label that is not a class."""
    if targets.min() < 0 or targets.max() >= nb_classes:
        wrong = targets[(targets < 0) | (targets >= nb_classes)].unique().tolist()
        raise BadImageError(
            f"labels {wrong} lie outside the {nb_classes} classes (0 to {nb_classes - 1}): "
            "correct the labels of the data, or --nb_classes"
        )


def build_dataset(config: Config, split: str, transform: Callable, require_labels: bool | None = None) -> ImageDataset:
    """The data set of `split` ('train' or 'val') that `config` names (see util.data.open_source).

    `require_labels`: unlabelled images and empty class folders are errors (default: for 'val'). 'val' has the classes
    of the training folder. Evaluation never skips an image: a bad one in 'val' is an error. Raises UserError (a missing
    path, no images, other channels than config.in_chans, ...).
    """
    with unreadable_is_user_error(f"cannot read --data_path {config.data_path}"):
        source = open_source(config, split, split == "val" if require_labels is None else require_labels)
    dataset = dataset_of(source, split, transform, config)
    kinds = f"{len(source.classes)} classes" if source.classes else "no labels"
    logger.info("%s: %d images, %s, from %s", split, len(dataset), kinds, config.data_path)
    return dataset


def dataset_of(source: Source, split: str, transform: Callable, config: Config) -> ImageDataset:
    """The images of `source`; --bad_images skip is for training only."""
    skip_bad = config.bad_images == "skip" and split == "train"
    return ImageDataset(source, transform, config.seed, skip_bad, config.max_bad_images)


def build_loader(
    dataset: Dataset,
    batch_sampler: Iterable[list[tuple[int, int]]],
    config: Config,
    device: torch.device,
    collate_fn: Callable | None = None,
) -> DataLoader:
    """A loader of what `collate_fn` makes of the samples of each list of keys that `batch_sampler` yields.

    By default, these are (images (B, C, H, W), targets (B,) int64).

    `device` is where the batches are used. Workers ignore the signals that ask a job to stop, which reach all of its
    processes: the training process decides, and ends them when it exits.
    """
    workers = config.num_workers > 0
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=config.num_workers,
        collate_fn=collate_fn or collate,
        pin_memory=config.pin_mem and device.type == "cuda",
        multiprocessing_context=WORKERS if workers else None,
        persistent_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=functools.partial(_start_worker, exiting=_exit_flag(os.getpid())),
        generator=keyed_generator(config.seed, "loader"),  # so that it draws nothing from the global one
    )


def collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack images and targets; the channels stay the fastest axis in memory, one plain copy per image."""
    images, targets = zip(*samples, strict=True)
    # (B, H, W, C); default_collate stacks into shared memory when it runs in a worker
    images = default_collate([image.permute(1, 2, 0) for image in images])
    return images.permute(0, 3, 1, 2), torch.tensor(targets)


@functools.cache
def _exit_flag(_process: int):
    """One byte of memory that this process shares with its workers, and that becomes 1 when it exits."""
    flag = WORKERS.RawValue("b", 0)
    atexit.register(setattr, flag, "value", 1)
    return flag


def _start_worker(_worker_id: int, exiting) -> None:
    def on_terminate(_number: int, _frame) -> None:
        if exiting.value:  # this one is from the training process, which waits for its workers to end
            os._exit(0)

    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_terminate)
    torch.set_num_threads(1)
    gc.freeze()  # collections then skip the parent's objects: less time, and their memory stays shared
