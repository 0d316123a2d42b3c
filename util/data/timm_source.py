"""Data sets opened by timm: torchvision's, Hugging Face, WebDataset and TensorFlow sets.

Sets that can only be streamed (`hfids/`, `tfds/`, `wds/`) are for training only. A stream decides the order of its
images itself: a resumed run is then not identical to an uninterrupted one, and the number of workers matters.
"""

import importlib.util
import logging
import os
from pathlib import Path

import torch
from timm.data import create_dataset
from torch.utils.data import IterableDataset

from util.data import Config
from util.data.decoding import BadImageError, EncodedJpeg, from_pillow, open_image
from util.data.sources import Source
from util.errors import UserError

logger = logging.getLogger(__name__)

# prefix of the name -> (package that it needs, how to install it)
OPTIONAL_PACKAGES = {
    "hfds": ("datasets", "pip install datasets"),
    "hfids": ("datasets", "pip install datasets"),
    "wds": ("webdataset", "pip install webdataset"),
    "tfds": ("tensorflow_datasets", "pip install tensorflow tensorflow-datasets"),
}
PREFIXES = ("torch", *OPTIONAL_PACKAGES)
SPLITS = {"train": "train", "val": "validation"}


class ReaderSource(Source):
    """Encoded images from timm's reader of Hugging Face sets."""

    def __init__(self, reader, config: Config):
        super().__init__(config)
        self.reader, self.classes = reader, _class_names(reader)

    def __len__(self) -> int:
        return len(self.reader)

    def path(self, i: int) -> str:
        return str(self.reader.filename(i))

    def read(self, i: int) -> tuple[torch.Tensor | EncodedJpeg, int]:
        file, target = self.reader[i][:2]
        with file:
            image = open_image(file.read(), self.in_chans, self.ignore_exif, self.max_pixels)
        return image, -1 if target is None else int(target)


class PillowSource(Source):
    """A torchvision data set, whose items are (Pillow image, target)."""

    def __init__(self, dataset, config: Config):
        super().__init__(config)
        self.dataset, self.name = dataset, config.dataset
        self.classes = list(dataset.classes) if hasattr(dataset, "classes") else None

    def __len__(self) -> int:
        return len(self.dataset)

    def path(self, i: int) -> str:
        return f"{self.name}[{i}]"

    def read(self, i: int) -> tuple[torch.Tensor, int]:
        try:
            image, target = self.dataset[i]
        except (SyntaxError, ValueError) as error:  # of Pillow's plugins
            raise BadImageError(f"{type(error).__name__}: {error}") from error
        return from_pillow(image, self.in_chans, self.ignore_exif, self.max_pixels), int(target)


class StreamSource(PillowSource):
    """A data set that can only be streamed: `read(i)` gives the worker's next image, whatever `i` is.

    timm divides the stream among ranks and workers. When a worker's part ends, it begins again with the next epoch's
    shuffling.
    """

    streamed = True

    def __init__(self, dataset: IterableDataset, config: Config):
        super().__init__(dataset, config)
        self.classes = _class_names(dataset.reader)
        self.process, self.stream, self.epoch = None, None, 0
        if len(self) == 0:
            raise UserError(f"--dataset {self.name} does not say how many images it has, which the schedule needs")

    def read(self, i: int) -> tuple[torch.Tensor, int]:
        if self.process != os.getpid():
            self.process, self.stream = os.getpid(), iter(self.dataset)
        try:
            image, target = next(self.stream)
        except StopIteration:
            self.epoch += 1
            self.dataset.set_epoch(self.epoch)
            self.stream = iter(self.dataset)
            image, target = next(self.stream)
        target = -1 if target is None else int(target)
        return from_pillow(image, self.in_chans, self.ignore_exif, self.max_pixels), target

    def rewind(self) -> None:
        """Begin again with the first image, in this process."""
        self.process, self.stream = None, None
        if self.epoch:
            self.epoch = 0
            self.dataset.set_epoch(0)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "process": None, "stream": None}


def open_timm_source(split: str, config: Config) -> Source:
    """Open the data set that `config.dataset` names for timm, at `config.data_path`.

    Raises UserError with what timm or a missing package says.
    """
    name, path = config.dataset, Path(config.data_path)
    if config.in_chans not in (1, 3):
        raise UserError(f"--dataset {name} holds pictures, --in_chans must be 1 or 3, got {config.in_chans}")
    prefix = name.partition("/")[0].lower()
    if prefix not in PREFIXES:
        raise UserError(
            f"--dataset {name} is not known: give one of timm's, {', '.join(f'{known}/NAME' for known in PREFIXES)}, "
            "or leave the flag out for a folder, list or tar of images"
        )
    package, install = OPTIONAL_PACKAGES.get(prefix, (None, None))
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"--dataset {name} needs the package {package}, which is not installed: {install}")
    if not package and not path.exists():
        raise UserError(f"--data_path {path} does not exist: give the folder that --dataset {name} is in")
    try:
        dataset = create_dataset(
            name,
            root=str(path),
            split=SPLITS[split],
            is_training=split == "train",
            seed=config.seed,
            input_img_mode="RGB" if config.in_chans == 3 else "L",
        )
    except (AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"timm cannot open --dataset {name} ({split}) at {path}: {error}") from error
    if isinstance(dataset, IterableDataset):
        if split != "train":
            raise UserError(f"--dataset {name} can only be streamed, so it may not give each image exactly once")
        logger.warning("%s is streamed: a resumed run will not see the same images as an uninterrupted one", name)
        return StreamSource(dataset, config)
    return ReaderSource(dataset.reader, config) if hasattr(dataset, "reader") else PillowSource(dataset, config)


def _class_names(reader) -> list[str] | None:
    class_to_idx = getattr(reader, "class_to_idx", None)
    return sorted(class_to_idx, key=class_to_idx.get) if class_to_idx else None
