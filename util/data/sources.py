"""Images by number: what a data set is made from."""

import bisect
import filecmp
import functools
import io
import itertools
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import natural_key

from util.data import Config
from util.data.custom_reader import read_by
from util.data.decoding import IMAGE_EXTENSIONS, BadImageError, EncodedJpeg, open_image
from util.data.image_index import (
    BROKEN_LINK,
    ImageIndex,
    StringTable,
    digest,
    ending,
    report_left_out,
    shared_folders,
)
from util.errors import UserError

SIZED_FILES = 200  # whose sizes are read when a run starts; on a network each takes a millisecond
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # as gzip, bzip2, xz and zstd begin
COMPARED_FILES = 200  # of a validation folder, with those of training; the names in lists are all compared


class Source:
    """Images by number.

    classes: names of the classes; None without labels.
    numbered: the data have numbers of classes, not names: `classes` are '0', '1', ... up to the largest label.
    streamed: images cannot be read by number; such a source has a method `rewind`.
    targets: labels (number of images,) if they are known without reading the images, else None.
    fingerprint: changes when images are added, removed or renamed, as far as that shows without reading them; else ''.
    sizes: changes when the sizes of the files of a sample do; '' if there are no files.
    missing: the files of this sample that do not exist.
    labels: changes when targets that are not classes do; else ''.
    """

    classes: list[str] | None = None
    numbered = streamed = False
    targets: np.ndarray | None = None
    fingerprint = sizes = labels = ""
    missing: Sequence[str] = ()

    def __init__(self, config: Config):
        self.in_chans, self.ignore_exif, self.max_pixels = config.in_chans, config.ignore_exif, config.max_pixels

    def __len__(self) -> int:
        raise NotImplementedError

    def path(self, i: int) -> str:
        """What to call image `i` in a message: its path, if it has one."""
        raise NotImplementedError

    def file(self, i: int) -> str | io.BytesIO:
        """The file of image `i`: its path, or its content. Raises NotImplementedError if images are not files."""
        raise NotImplementedError

    def read(self, i: int) -> tuple[torch.Tensor | EncodedJpeg, Any]:
        """Image of shape (in_chans, h, w) and its target: a label, -1 without. Raises BadImageError or OSError."""
        raise NotImplementedError


class FileSource(Source):
    """Images in files."""

    def __init__(self, index: ImageIndex, config: Config, numbered: bool = False):
        super().__init__(config)
        self.index, self.reader = index, config.reader
        self.classes, self.numbered = index.classes, numbered
        self.targets = None if index.classes is None else index.targets

    @property
    def fingerprint(self) -> str:
        return self.index.fingerprint()

    @functools.cached_property
    def _sizes(self) -> list[int]:
        return sizes_of_sample(len(self), self.path)

    @property
    def sizes(self) -> str:
        return digest(np.array(self._sizes, "<i8"))

    @property
    def missing(self) -> list[str]:
        return [self.path(i) for i, size in zip(spread(len(self), SIZED_FILES), self._sizes) if size < 0]

    def __len__(self) -> int:
        return len(self.index)

    def path(self, i: int) -> str:
        return self.index.path(i)

    file = path

    def read(self, i: int) -> tuple[torch.Tensor | EncodedJpeg, Any]:
        if self.reader:
            image = read_by(self.reader, self.path(i), self.in_chans, self.max_pixels)
        else:
            with open(self.path(i), "rb", buffering=0) as file:
                data = file.readall()
            image = open_image(data, self.in_chans, self.ignore_exif, self.max_pixels)
        return image, int(self.index.targets[i])


class TarSource(Source):
    """Images in a tar that is not compressed. Its classes are the first folders in which its images differ, in
    alphabetical order as those of a folder; a tar in it is like a folder. See `_classes_of`.

    Hidden images, those that this program does not read, and links that lead to none are left out and counted, as in
    folders. Raises UserError when none is left.
    """

    def __init__(self, path: Path, config: Config):
        super().__init__(config)
        images, left_out, hidden = [], Counter(), 0
        if not path.exists():
            raise UserError(f"--data_path {path} does not exist: give a tar of images")
        if config.reader:
            raise UserError(f"--reader {config.reader} reads files, and {path} is a tar: unpack it")
        try:
            with open(path, "rb") as file:
                if file.read(6).startswith(COMPRESSED):
                    raise UserError(f"{path} is compressed: decompress it (gunzip, bunzip2, unxz, unzstd)")
            with tarfile.open(path, "r:") as tar:
                files = sorted(_files_in(tar, left_out), key=lambda file: natural_key(file[1]))
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{path} is damaged or not a tar: {error}") from error
        for folder, name, position, size in files:
            full, is_image = Path(folder, name), name.lower().endswith(IMAGE_EXTENSIONS)
            if any(part[0] == "." for part in full.parts if part != ".."):
                hidden += is_image
            elif is_image:
                images.append((name, str(full.parent), position, size))
            else:
                left_out[ending(name)] += 1
        report_left_out(str(path), left_out, hidden)
        if not images:
            raise UserError(f"no images found in {path} (looked for {', '.join(IMAGE_EXTENSIONS)})")
        names, folders, positions, sizes = zip(*images)
        if class_of := _classes_of(set(folders)):
            classes, targets = np.unique([class_of[folder] for folder in folders], return_inverse=True)
            self.classes, self.targets = classes.tolist(), targets.astype(np.int32)
        encoded = [os.fsencode(name) for name in names]
        self.names, self.positions, self.bytes = StringTable.of(encoded), np.array(positions), np.array(sizes, "<i8")
        self.fingerprint = digest(b"\n".join(encoded))
        self.sizes = f"{path.stat().st_size} bytes, {digest(self.bytes)}"
        self.tar, self._file = path, None  # opened once in each process: on a network this takes time

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> str:
        return self.names[i]

    def file(self, i: int) -> io.BytesIO:
        return io.BytesIO(self._content(i))

    def read(self, i: int) -> tuple[torch.Tensor | EncodedJpeg, int]:
        label = -1 if self.targets is None else int(self.targets[i])
        return open_image(self._content(i), self.in_chans, self.ignore_exif, self.max_pixels), label

    def _content(self, i: int) -> bytes:
        self._file = self._file or open(self.tar, "rb", buffering=0)
        # Without moving the position in the file, which forked workers share.
        data = os.pread(self._file.fileno(), self.bytes[i], self.positions[i])
        if len(data) < self.bytes[i]:
            raise BadImageError(f"{self.tar} is truncated")
        return data

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}


def _files_in(
    tar: tarfile.TarFile, left_out: Counter, folder: str = "", start: int = 0
) -> Iterator[tuple[str, str, int, int]]:
    """Folder ('' except in a tar in the tar), name, position and size of every file in a tar that begins at `start`.

    Links are read as what they lead to in the tar; those named like images that lead to no file are counted in
    `left_out`. Of several files of one name, the last is taken, as when a tar is unpacked.
    """
    members = {os.path.normpath(member.name): member for member in tar if not member.isdir()}
    for path, member in members.items():
        target, passed = member, {path}
        while target is not None and not target.isfile():
            above = os.path.dirname(path) if target.issym() else ""  # what symbolic links are relative to
            path = os.path.normpath(os.path.join(above, target.linkname))
            target = None if path in passed else members.get(path)
            passed.add(path)
        if target is None:
            left_out[BROKEN_LINK] += member.name.lower().endswith(IMAGE_EXTENSIONS)
        elif member.name.lower().endswith(".tar"):
            with tarfile.open(fileobj=tar.extractfile(target), mode="r:") as inner:
                yield from _files_in(
                    inner, left_out, os.path.join(folder, member.name[:-4]), start + target.offset_data
                )
        else:
            yield folder, member.name, start + target.offset_data, target.size


def _classes_of(folders: Collection[str]) -> dict[str, str]:
    """The class of each of the folders that hold a tar's images: the first part of its path that not all have in common
    (a tar may be of `train/cat/` or of `cat/`), the last if there is one folder. {} if one has no such part."""
    parts = {folder: Path(folder).parts for folder in folders}
    depth = min(len(shared_folders(folders)), max(map(len, parts.values())) - 1)
    return {folder: own[depth] for folder, own in parts.items()} if min(map(len, parts.values())) > depth >= 0 else {}


class JoinedSource(Source):
    """Several sources, one after another, without labels."""

    def __init__(self, sources: Sequence[Source], config: Config):
        super().__init__(config)
        self.sources, self.ends = sources, list(itertools.accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self.ends[-1]

    def path(self, i: int) -> str:
        source, i = self._find(i)
        return source.path(i)

    def read(self, i: int) -> tuple[torch.Tensor | EncodedJpeg, Any]:
        source, i = self._find(i)
        return source.read(i)[0], -1

    def _find(self, i: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self.ends, i)
        return self.sources[number], i - (self.ends[number - 1] if number else 0)


def sizes_of_sample(count: int, path: Callable[[int], str]) -> list[int]:
    """The sizes of a sample of the `count` files at `path(i)`; -1 if there is none."""
    return [os.stat(file).st_size if os.path.exists(file := path(i)) else -1 for i in spread(count, SIZED_FILES)]


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most), dtype=int)).tolist()


def shared_with_training(train: Source, val: Source) -> tuple[int, int]:
    """How many images of `val` are in `train` too, and how many were compared; (0, 0) if they are not files.

    It finds the same files in lists, the same folders by whatever links, and in folders files of the same name and
    content; not copies under other names, for which all files would have to be read (`python -m util.check_data` does).
    """
    if not isinstance(train, FileSource) or not isinstance(val, FileSource):
        return 0, 0
    if not train.numbered and train.index.root == val.index.root:  # one folder: given twice, or divided in some way
        return len(set(val.index.names).intersection(train.index.names)), len(val)
    trained_on = {folder[1:] for folder in train.index.folders.values()}
    if linked := sum(folder[0] for folder in val.index.folders.values() if folder[1:] in trained_on):
        return linked, len(val)
    if train.numbered:
        paths = {os.path.normpath(train.path(i)) for i in range(len(train))}
        return sum(os.path.normpath(val.path(i)) in paths for i in range(len(val))), len(val)
    chosen = spread(len(val), COMPARED_FILES)
    return sum(_is_copy(val.path(i), os.path.join(train.index.root, val.index.names[i])) for i in chosen), len(chosen)


def _is_copy(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other) or filecmp.cmp(path, other, shallow=False)
    except OSError:  # there is no other
        return False
