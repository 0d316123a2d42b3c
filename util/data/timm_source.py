"""Data sets opened by timm: tar files, torchvision's sets, Hugging Face, WebDataset and TensorFlow sets.

Sets that can only be streamed (`hfids/`, `tfds/`, `wds/`) serve for training only. A stream decides the order of its
images itself: a resumed run is then not identical to an uninterrupted one, and the number of workers matters.
"""

import hashlib
import importlib.util
import logging
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from timm.data import create_dataset
from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import IterableDataset

from util.data.decoding import IMAGE_EXTENSIONS, BadImageError, EncodedJpeg, from_pillow, open_image
from util.data.image_index import UNREADABLE_EXTENSIONS, ending, report_left_out
from util.data.settings import DataSettings
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


class ReaderSource:
    """Encoded images from one of timm's readers: tar, folder, Hugging Face."""

    targets, fingerprint, sizes, labels = None, "", "", ""
    numbered = streamed = False

    def __init__(self, reader, in_chans: int, ignore_exif: bool, max_pixels: int):
        self.reader, self.in_chans, self.ignore_exif, self.max_pixels = reader, in_chans, ignore_exif, max_pixels
        self.classes = _class_names(getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None))
        self.process = os.getpid()

    def __len__(self) -> int:
        return len(self.reader)

    def path(self, i: int) -> str:
        return str(self.reader.filename(i))

    def read(self, i: int) -> tuple[torch.Tensor | EncodedJpeg, int]:
        if self.process != os.getpid():  # a new worker: file positions must not be shared with the parent
            self._close_files()
            self.process = os.getpid()
        try:
            file, target = self.reader[i][:2]
            with file:
                data = file.read()
        except tarfile.TarError as error:
            raise BadImageError(f"the tar is damaged: {error}") from error
        image = open_image(data, self.in_chans, self.ignore_exif, self.max_pixels)
        return image, -1 if target is None else int(target)

    def __getstate__(self) -> dict:
        self._close_files()  # open files cannot be sent to a worker
        return self.__dict__

    def _close_files(self) -> None:
        states = getattr(self.reader, "tar_state", {})
        waiting = list(states.values()) if isinstance(states, dict) else [states]
        while waiting:
            state = waiting.pop()
            state.reset()
            waiting.extend(state.children.values())


class TarSource(ReaderSource):
    """Images in a tar. Its innermost folders are the classes, in alphabetical order as those of a folder; timm numbers
    class2 before class10. Without classes when an image lies outside any folder.

    Hidden images and those that this program does not read are left out and counted, as in folders.
    Raises UserError when none is left.
    """

    def __init__(self, path: Path, in_chans: int, ignore_exif: bool, max_pixels: int):
        timms = get_img_extensions()
        set_img_extensions([*IMAGE_EXTENSIONS, *UNREADABLE_EXTENSIONS])
        try:
            # timm would keep the index of a large tar beside it, and trust it whatever becomes of the tar.
            reader = ReaderImageInTar(str(path), cache_tarinfo=False)
        except ValueError:  # what timm makes of no image at all
            raise UserError(f"no images found in {path} (looked for {', '.join(IMAGE_EXTENSIONS)})") from None
        finally:
            set_img_extensions(timms)
        names = [member.name for member, _, _ in reader.samples]
        hidden = np.array([any(part[0] == "." for part in Path(name).parts if part != "..") for name in names])
        readable = np.array([name.lower().endswith(IMAGE_EXTENSIONS) for name in names])
        report_left_out(str(path), Counter(ending(names[i]) for i in np.flatnonzero(~hidden & ~readable)), hidden.sum())
        chosen = np.flatnonzero(~hidden & readable)
        if len(chosen) == 0:
            raise UserError(f"no images found in {path} (looked for {', '.join(IMAGE_EXTENSIONS)})")
        reader.samples, reader.targets = reader.samples[chosen], reader.targets[chosen]
        super().__init__(reader, in_chans, ignore_exif, max_pixels)
        theirs = np.array(self.classes)[reader.targets]
        self.classes, self.targets = np.unique(theirs, return_inverse=True)
        self.classes, self.targets = self.classes.tolist(), self.targets.astype(np.int32)
        if "" in self.classes:
            self.classes, self.targets = None, np.full(len(chosen), -1, np.int32)
        reader.targets = self.targets
        self.fingerprint = _digest("\n".join(names[i] for i in chosen).encode("utf-8", "surrogateescape"))
        sizes = np.array([member.size for member, _, _ in reader.samples], "<i8")
        self.sizes = f"{path.stat().st_size} bytes, {_digest(sizes.tobytes())}"


class PillowSource:
    """A torchvision data set, whose items are (Pillow image, target)."""

    targets, fingerprint, sizes, labels = None, "", "", ""
    numbered = streamed = False

    def __init__(self, dataset, name: str, in_chans: int, ignore_exif: bool, max_pixels: int):
        self.dataset, self.name = dataset, name
        self.in_chans, self.ignore_exif, self.max_pixels = in_chans, ignore_exif, max_pixels
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

    timm shares the stream out among ranks and workers. When a worker's part is at its end, it begins again with the
    next epoch's shuffling.
    """

    streamed = True

    def __init__(self, dataset: IterableDataset, name: str, in_chans: int, ignore_exif: bool, max_pixels: int):
        super().__init__(dataset, name, in_chans, ignore_exif, max_pixels)
        self.classes = _class_names(getattr(dataset.reader, "class_to_idx", None))
        self.process, self.stream, self.epoch = None, None, 0
        if len(self) == 0:
            raise UserError(f"--dataset {name} does not say how many images it has, which the schedule needs")

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
        return from_pillow(image, self.in_chans, self.ignore_exif, self.max_pixels), -1 if target is None else int(
            target
        )

    def rewind(self) -> None:
        """Begin again with the first image, in this process."""
        self.process, self.stream = None, None
        if self.epoch:
            self.epoch = 0
            self.dataset.set_epoch(0)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "process": None, "stream": None}


def open_timm_source(
    name: str, path: Path, split: str, config: DataSettings
) -> ReaderSource | PillowSource | StreamSource:
    """Open timm's data set `name` ('' for a tar file) at `path`.

    Raises UserError with what timm or a missing package says.
    """
    in_chans, ignore_exif, max_pixels = config.in_chans, config.ignore_exif, config.max_pixels
    if name and in_chans not in (1, 3):
        raise UserError(f"--dataset {name} holds pictures, --in_chans must be 1 or 3, got {in_chans}")
    prefix = name.partition("/")[0].lower()
    if name and prefix not in PREFIXES:
        raise UserError(
            f"--dataset {name} is not known: give one of timm's, {', '.join(f'{known}/NAME' for known in PREFIXES)}, "
            "or leave the flag out for a folder, list or tar of images"
        )
    package, install = OPTIONAL_PACKAGES.get(prefix, (None, None))
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"--dataset {name} needs the package {package}, which is not installed: {install}")
    if prefix not in OPTIONAL_PACKAGES and not path.exists():
        advice = f"give the folder that --dataset {name} is in" if name else "give a tar of images"
        raise UserError(f"--data_path {path} does not exist: {advice}")
    try:
        if not name:
            return TarSource(path, in_chans, ignore_exif, max_pixels)
        dataset = create_dataset(
            name,
            root=str(path),
            split=SPLITS[split],
            is_training=split == "train",
            seed=config.seed,
            input_img_mode="RGB" if in_chans == 3 else "L",
        )
    except UserError:
        raise
    except (
        AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError, tarfile.TarError
    ) as error:  # fmt: skip
        raise UserError(f"timm cannot open --dataset {name or path} ({split}) at {path}: {error}") from error
    if isinstance(dataset, IterableDataset):
        if split != "train":
            raise UserError(f"--dataset {name} can only be streamed, which cannot promise to evaluate each image once")
        logger.warning("%s is streamed: a resumed run will not see the same images as an uninterrupted one", name)
        return StreamSource(dataset, name, in_chans, ignore_exif, max_pixels)
    if hasattr(dataset, "reader"):
        return ReaderSource(dataset.reader, in_chans, ignore_exif, max_pixels)
    return PillowSource(dataset, name, in_chans, ignore_exif, max_pixels)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _class_names(class_to_idx: dict | None) -> list[str] | None:
    return sorted(class_to_idx, key=class_to_idx.get) if class_to_idx else None
