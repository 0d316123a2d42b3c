"""Images with label maps, for semantic segmentation: pairs of files, and transforms of both.

`--data_path DIR` has one of two layouts; in their folders, however nested, every image has a PNG of the same name:

    ADE20K's own    DIR/images/training, DIR/annotations/training; DIR/images/validation, DIR/annotations/validation.
                    In label maps, 0 is not a class and is ignored; classes are numbered from 1.
    pairs           DIR/images/train, DIR/masks/train; DIR/images/val, DIR/masks/val.
                    Classes are numbered from 0.

A label map is a grey or palette PNG of 8 or 16 bits, as large as its image, whose pixels are numbers of classes; 255 is
ignored in both (`--ignore_label`, `--reduce_zero_label`). The classes' names are those in DIR/classes.txt, one per
line, or in ADE20K's objectInfo150.txt.
"""

import contextlib
import logging
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import default_collate
from torchvision.transforms import ColorJitter

from util.data import Config
from util.data.custom_reader import extensions_of
from util.data.datasets import ImageDataset, collate, dataset_of, read_sample
from util.data.decoding import BadImageError, EncodedJpeg
from util.data.image_index import abbreviate, digest, load_index
from util.data.sources import FileSource, sizes_of_sample
from util.data.transforms import crop, resize
from util.errors import UserError, unreadable_is_user_error

logger = logging.getLogger(__name__)

IGNORED = 255  # label of ignored pixels, after reading
ILLEGAL = 254  # neither a class nor ignored
MOST_CLASSES = 254
LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # Pillow's, with one number per pixel
MOST_OF_ONE_CLASS = 0.75  # of the labelled pixels of a crop for training, if possible
TRIES = 10
LONGEST = 4  # long side of a photograph in evaluation, at most, in short sides


# --- Folders ---


@dataclass(frozen=True)
class Layout:
    """A folder `images` and one of label maps, with a folder for each split in both."""

    labels: str
    splits: dict[str, str]
    reduce_zero_label: bool


LAYOUTS = (
    Layout("annotations", {"train": "training", "val": "validation"}, reduce_zero_label=True),
    Layout("masks", {"train": "train", "val": "val"}, reduce_zero_label=False),
)


def find_layout(data_path: str) -> Layout:
    """The layout of a folder. Raises UserError if it has none, or both."""
    if not os.path.isdir(data_path):
        raise UserError(f"--data_path {data_path} is not a folder: give one with images/ and label maps in it")
    found = [layout for layout in LAYOUTS if (Path(data_path) / layout.labels).is_dir()]
    if len(found) != 1:
        folders = [f"images/{one.splits['train']} and {one.labels}/{one.splits['train']}" for one in LAYOUTS]
        both = "both annotations/ and masks/" if found else "no label maps: neither annotations/ nor masks/"
        raise UserError(f"--data_path {data_path} has {both}; there must be {', or '.join(folders)} in it")
    return found[0]


def read_class_names(data_path: str) -> list[str] | None:
    """The names of the classes, in the order of their numbers; None if no file has them. Raises UserError."""
    path, table = Path(data_path) / "classes.txt", Path(data_path) / "objectInfo150.txt"
    with unreadable_is_user_error(f"cannot read the names of the classes in {data_path}"):
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
        elif table.is_file():  # a heading, then Idx, Ratio, Train, Val, Stuff, Name
            path, lines = table, [line.split("\t")[-1] for line in table.read_text(encoding="utf-8").splitlines()[1:]]
        else:
            return None
    names = [line.strip() for line in lines if line.strip()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path} has a name twice: {abbreviate(twice)}")
    return names


def number_of_classes(data_path: str, given: int | None) -> int:
    """How many classes there are: `given` (--nb_classes), else as many as have names. Raises UserError."""
    names = read_class_names(data_path)
    if given is None and names is None:
        raise UserError(
            f"--nb_classes is missing: give the number of classes, or their names in {data_path}/classes.txt"
        )
    if None not in (given, names) and len(names) != given:
        raise UserError(
            f"--nb_classes is {given} (given, or recorded with the weights), but {data_path} names {len(names)} "
            f"classes: {abbreviate(names)}"
        )
    number = given if given is not None else len(names)
    if not 2 <= number <= MOST_CLASSES:
        raise UserError(f"the number of classes must be between 2 and {MOST_CLASSES}, got {number}")
    return number


def check_class_names(own: list[str], recorded: list[str], owner: str) -> None:
    """Raise a UserError if the data's class names differ from the `recorded` ones of `owner`, a model."""
    if own != recorded and not any(all(map(str.isdigit, names)) for names in (own, recorded)):
        different = [f"{a} / {b}" for a, b in zip(own, recorded) if a != b]
        raise UserError(
            f"the classes of the data are not those of {owner}: {abbreviate(different)} (data / model). Give them the "
            "same names in the same order; or train on other classes with --finetune"
        )


# --- Label maps ---


class LabelNumbers:
    """What the values of label maps mean: classes 0 to nb_classes - 1, or IGNORED."""

    def __init__(self, nb_classes: int, ignore_label: int, reduce_zero_label: bool):
        self.first = int(reduce_zero_label)
        self.nb_classes, self.ignored = nb_classes, {ignore_label} | ({0} if reduce_zero_label else set())
        self.table = np.full(2**16, ILLEGAL, dtype=np.uint8)
        self.table[self.first : self.first + nb_classes] = np.arange(nb_classes)
        self.table[list(self.ignored)] = IGNORED

    def classes_of(self, values: np.ndarray) -> np.ndarray:
        """The values of a label map as uint8 classes. Raises BadImageError for one neither a class nor ignored."""
        classes = self.table[values]
        if (classes == ILLEGAL).any():
            wrong = [str(value) for value in np.unique(values[classes == ILLEGAL])]
            last = self.first + self.nb_classes - 1
            raise BadImageError(
                f"has the value {abbreviate(wrong)}, which is not a class: with --nb_classes {self.nb_classes} these "
                f"are {self.first} to {last}, and {' and '.join(map(str, sorted(self.ignored)))} is ignored. Correct "
                "the label map, or --nb_classes, --ignore_label or --reduce_zero_label"
            )
        return classes

    def values_of(self, classes: np.ndarray) -> np.ndarray:
        """The reverse, for predictions."""
        return (classes + self.first).astype(np.uint8)


def read_label_map(path: str) -> np.ndarray:
    """The values of a label map, (h, w). Raises BadImageError."""
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            if image.mode not in LABEL_MODES:
                raise BadImageError(
                    f"is {image.mode}: a label map is a grey or palette PNG, whose pixels are numbers of classes"
                )
            values = np.asarray(image)
    except OSError as error:
        raise BadImageError(f"cannot be read: {error}") from None
    values = values.astype(np.int64)
    if values.min() < 0 or values.max() >= 2**16:
        raise BadImageError("has values outside 0 to 65535")
    return values


class LabelMapSource(FileSource):
    """Images in files, each with its label map as the target."""

    def __init__(self, images: str, labels: str, numbers: LabelNumbers, classes: list[str], config: Config):
        super().__init__(load_index(images, extensions_of(config.reader)), config)
        self.folder, self.numbers = labels, numbers
        self.classes, self.targets = classes, None
        maps = set(load_index(labels, (".png",)).names)
        own = {self.label_name(i) for i in range(len(self))}
        if missing := sorted(own - maps):
            raise UserError(
                f"{len(missing)} of the {len(self)} images in {images} have no label map in {labels}: "
                f"{abbreviate(missing)}; each has its image's name, and ends in .png"
            )
        if unused := sorted(maps - own):
            logger.warning("%s: %d label maps have no image in %s: %s", labels, len(unused), images, abbreviate(unused))

    def label_name(self, i: int) -> str:
        """The path of its label map in the folder of these."""
        return f"{os.path.splitext(self.index.names[i])[0]}.png"

    def label_path(self, i: int) -> str:
        return os.path.join(self.folder, self.label_name(i))

    @property
    def labels(self) -> str:
        """Changes when the sizes of the label maps of a sample change."""
        return digest(np.array(sizes_of_sample(len(self), self.label_path), "<i8"))

    def require_two_classes(self, found: set[int]) -> None:
        """Raise a UserError if no label map has another class than `found`; reads them until one has."""
        for i in range(len(self)):
            if len(found) > 1:
                return
            with contextlib.suppress(BadImageError):  # is for those who read the image
                found = found | set(np.unique(self.numbers.classes_of(read_label_map(self.label_path(i)))).tolist())
                found -= {IGNORED}
        if len(found) == 1:
            ignored, first = ", ".join(map(str, sorted(self.numbers.ignored))), self.numbers.first
            raise UserError(
                f"the label maps in {self.folder} have only one class, {self.classes[found.pop()]!r}, beside what is "
                f"ignored ({ignored}): there is nothing to learn. Classes are numbered, so masks of 0 and 255 must "
                f"become {first} and {first + 1}"
            )

    def read(self, i: int) -> tuple[torch.Tensor | EncodedJpeg, torch.Tensor]:
        """Image (in_chans, h, w) and labels (h, w) uint8: classes, and IGNORED. Raises BadImageError or OSError."""
        image, _ = super().read(i)
        try:
            labels = torch.from_numpy(self.numbers.classes_of(read_label_map(self.label_path(i))))
        except BadImageError as error:
            raise BadImageError(f"its label map {self.label_path(i)} {error}") from None
        if labels.shape != tuple(image.shape[1:]):
            own, other = (f"{width} x {height}" for height, width in (labels.shape, image.shape[1:]))
            hint = ""
            if labels.shape == tuple(image.shape[:0:-1]):
                hint = " (did its EXIF tag turn the photograph? --ignore_exif leaves it as stored)"
            raise BadImageError(f"its label map {self.label_path(i)} has {own} pixels, the image {other}{hint}")
        return image, labels


def build_segmentation_dataset(config: Config, split: str, transform: Callable) -> ImageDataset:
    """The data set of `split` ('train' or 'val') in `config.data_path`; its targets are labels (h, w) uint8.

    Images and label maps of a sample are read. Raises BadImageError for one that cannot be used, unless bad images
    are skipped, and UserError.
    """
    layout = find_layout(config.data_path)
    numbers = LabelNumbers(config.nb_classes, config.ignore_label, config.reduce_zero_label)
    images, labels = (Path(config.data_path) / kind / layout.splits[split] for kind in ("images", layout.labels))
    for folder in (images, labels):
        if not folder.is_dir():
            raise UserError(
                f"{folder} does not exist: the {split} images are in {images}, their label maps in {labels}"
            )
    with unreadable_is_user_error(f"cannot read --data_path {config.data_path}"):
        names = read_class_names(config.data_path) or [str(i) for i in range(config.nb_classes)]
        source = LabelMapSource(str(images), str(labels), numbers, names, config)
    dataset = dataset_of(source, split, transform, config)
    found = [set(np.unique(classes).tolist()) - {IGNORED} for classes in read_sample(dataset)]
    ignored = list(map(str, sorted(numbers.ignored)))
    if not any(found):
        raise UserError(
            f"the label maps in {labels} label no pixel: in a sample of {len(found)}, all pixels are "
            f"{' or '.join(ignored)}, which is ignored; see --ignore_label and --reduce_zero_label"
        )
    if split == "train":
        source.require_two_classes(set.union(*found))
    logger.info(
        "%s: %d images with label maps (classes %d to %d, ignored %s), from %s", split, len(dataset), numbers.first,
        numbers.first + config.nb_classes - 1, " and ".join(ignored), images,
    )  # fmt: skip
    return dataset


def collate_pairs(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, C, H, W) and labels (B, H, W) of samples of equal sizes."""
    images, labels = zip(*samples, strict=True)
    return collate([(image, 0) for image in images])[0], default_collate(list(labels))


# --- Transforms of an image and its labels ---


class RandomScaleAndCrop:
    """Image and labels for training: a random scale, a random crop, mirrored half of the time.

    Args:
        size: rows and columns of the result. If the scaled image is smaller, it is padded at the right and bottom,
            with `fill` and IGNORED.
        short_side: of the image at scale 1.
        scale: range of the random scale.
        fill: one value per channel, in the images' units.
        color_jitter: strength of random brightness, contrast and saturation of photographs; 0 for none.

    Of up to ten crops, the first one is taken in which no class has more than three quarters of the labelled pixels.
    """

    takes_encoded = takes_target = True

    def __init__(
        self,
        size: tuple[int, int],
        short_side: int,
        scale: tuple[float, float],
        fill: tuple[float, ...],
        color_jitter: float = 0.0,
    ):
        self.size, self.short_side, self.scale, self.fill = size, short_side, scale, fill
        self.jitter = ColorJitter(color_jitter, color_jitter, color_jitter) if color_jitter else None

    def __call__(self, image: torch.Tensor | EncodedJpeg, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = labels.shape
        factor = self.short_side / min(height, width) * random.uniform(*self.scale)
        # What becomes `size`, or all there is, in pixels of the original
        rows, columns = (min(side, max(1, round(out / factor))) for side, out in zip((height, width), self.size))
        # From the whole image's sides: if these reach `size`, rounding the cut's would leave an empty edge.
        scaled = tuple(min(out, max(1, round(side * factor))) for side, out in zip((height, width), self.size))
        for _ in range(TRIES):
            box = random.randint(0, height - rows), random.randint(0, width - columns), rows, columns
            cut = nearest(labels, box, scaled)
            counts = torch.bincount(cut[cut != IGNORED].long())
            if len(counts) and counts.max() <= MOST_OF_ONE_CLASS * counts.sum():
                break
        image = crop(image, box, scaled)
        if self.jitter is not None and image.dtype == torch.uint8 and len(image) == 3:
            image = self.jitter(image)
        if random.random() < 0.5:
            image, cut = image.flip(-1), cut.flip(-1)
        below, beside = self.size[0] - len(cut), self.size[1] - cut.shape[1]
        return self.pad(image), F.pad(cut, (0, beside, 0, below), value=IGNORED)

    def pad(self, image: torch.Tensor) -> torch.Tensor:
        rows, columns = image.shape[1:]
        if (rows, columns) == self.size:
            return image
        fill = torch.tensor(self.fill)
        fill = (fill * 255).round() if image.dtype == torch.uint8 else fill
        # The channels stay the fastest axis in memory.
        padded = fill.to(image.dtype).expand(*self.size, -1).clone().permute(2, 0, 1)
        padded[:, :rows, :columns] = image
        return padded


class Whole:
    """Image and labels for evaluation: the image with this short side, its labels as they are.

    An image more than LONGEST times as long as that becomes smaller. JPEGs are decoded in full.
    """

    takes_target = True

    def __init__(self, short_side: int):
        self.short_side = short_side

    def __call__(self, image: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = image.shape[1:]
        factor = self.short_side * min(1 / min(height, width), LONGEST / max(height, width))
        size = max(1, round(height * factor)), max(1, round(width * factor))
        return (image if size == (height, width) else resize(image, size)), labels


def nearest(labels: torch.Tensor, box: tuple[int, int, int, int], size: tuple[int, int]) -> torch.Tensor:
    """The `box` (top, left, height, width) of labels (h, w) resized to `size`, by nearest neighbour."""
    top, left, height, width = box
    rows = top + ((torch.arange(size[0]) + 0.5) * (height / size[0])).long()
    columns = left + ((torch.arange(size[1]) + 0.5) * (width / size[1])).long()
    return labels[rows][:, columns]
