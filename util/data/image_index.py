"""Which images a folder holds: scanned once per machine, cached on disk, kept in a few flat arrays.

A list of a million (path, target) tuples costs hundreds of megabytes, and every data-loader worker slowly
copies it, because reading a Python object writes to its reference count. Here all names are one array of
bytes, so that forked workers share it.

The cache lies in $MIXMAE_CACHE, else $XDG_CACHE_HOME/mixmae, else ~/.cache/mixmae; never in the data folder.
It is valid as long as every directory of the tree has the modification and change times that it had when it
was scanned: adding, removing or renaming an entry changes its directory's times. Changing the content of a
file does not, and does not need to. The cache files are plain numpy arrays, replaced atomically; a damaged
one is scanned again.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    ".npy",
)
CACHE_FORMAT = 1
# A directory changed this shortly before its scan may change again without its times moving (coarse clocks).
SETTLED_AFTER_NS = 2_000_000_000


@dataclass(frozen=True)
class StringTable:
    """Many strings in one array of bytes; `table[i]` decodes the i-th."""

    blob: np.ndarray  # (total bytes,) uint8
    ends: np.ndarray  # (number of strings,) int64

    @classmethod
    def of(cls, encoded: list[bytes]) -> "StringTable":
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), np.cumsum(lengths))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.blob[start : self.ends[i]].tobytes())


@dataclass(frozen=True)
class ImageIndex:
    """The images under `root`, in torchvision's ImageFolder order (class, then folder, then name).

    `targets` is (number of images,) int32: the position in `classes` of the first folder below `root`, or -1
    for all images when `classes` is None. A tree has no classes when an image lies directly in `root`.
    """

    root: str
    names: StringTable
    targets: np.ndarray
    classes: list[str] | None

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> str:
        return os.path.join(self.root, self.names[i])

    @property
    def nbytes(self) -> int:
        return self.names.blob.nbytes + self.names.ends.nbytes + self.targets.nbytes

    def empty_classes(self) -> list[str]:
        """Class folders without any image."""
        counts = np.bincount(self.targets, minlength=len(self.classes)) if self.classes else []
        return [name for name, count in zip(self.classes or [], counts, strict=True) if count == 0]

    def with_classes(self, classes: list[str]) -> "ImageIndex":
        """The same images, with targets that count in `classes` (a validation set takes the training set's).

        Raises ValueError when an image's class is not among `classes`.
        """
        unknown = sorted(set(self.classes or []) - set(classes))
        if unknown:
            raise ValueError(
                f"{self.root} has classes that the training set lacks: {abbreviate(unknown)}; "
                f"class folders must have the same names in both"
            )
        position = {name: i for i, name in enumerate(classes)}
        table = np.array([position[name] for name in self.classes or []], dtype=np.int32)
        return replace(self, targets=table[self.targets], classes=list(classes))


def abbreviate(names: list[str], shown: int = 5) -> str:
    """The first few names, for a message."""
    return f"{names[:shown]}" + (f" and {len(names) - shown} more" if len(names) > shown else "")


def class_folders(root: str | os.PathLike) -> list[str]:
    """Names of the folders directly below `root`, sorted as torchvision sorts classes."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def load_index(root: str | os.PathLike) -> ImageIndex:
    """The index of `root`, from the cache if it is still valid, else from a scan that then fills the cache.

    Processes that start together on one machine wait for the first one's scan. Raises ValueError when there
    is no image, OSError when a folder cannot be listed.
    """
    root = os.path.realpath(root)
    cache = _cache_file(root)
    index = _read_cache(cache, root)
    if index is None:
        with _lock(cache.with_suffix(".lock")):
            index = _read_cache(cache, root)  # another process may have filled it meanwhile
            if index is None:
                index = _scan_and_cache(cache, root)
    if len(index) == 0:
        raise ValueError(f"no images found under {root} (looked for {', '.join(IMAGE_EXTENSIONS)})")
    return index


def _scan_and_cache(cache: Path, root: str) -> ImageIndex:
    start = time.time_ns()
    index, directories, times = scan(root)
    seconds = (time.time_ns() - start) / 1e9
    logger.info("scanned %d images in %d folders under %s in %.1f s", len(index), len(directories), root, seconds)
    if times[:, 0].max() > start - SETTLED_AFTER_NS:
        logger.info("%s changed a moment ago; its index is not cached this time", root)
    else:
        _write_cache(cache, index, directories, times)
    return index


def scan(root: str) -> tuple[ImageIndex, StringTable, np.ndarray]:
    """Walk the tree under `root`, following links.

    Returns the index, all directories (relative to `root`), and their (mtime, ctime) in ns, (n, 2) int64.
    """
    directories, times, files = [], [], []  # files: (class, directory, sorted names)
    waiting = [("", ())]  # relative directory, identities of its ancestors
    while waiting:
        directory, ancestors = waiting.pop()
        absolute = os.path.join(root, directory)
        status = os.stat(absolute)  # before listing: a change during the listing must invalidate the cache
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:  # a link to a folder above itself
            continue
        directories.append(os.fsencode(directory))
        times.append((status.st_mtime_ns, status.st_ctime_ns))
        names = []
        with os.scandir(absolute) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append((os.path.join(directory, entry.name), (*ancestors, identity)))
                elif entry.name.lower().endswith(IMAGE_EXTENSIONS) and entry.is_file():
                    names.append(entry.name)
        if names:
            files.append((directory.split(os.sep, 1)[0], directory, sorted(names)))

    files.sort(key=lambda group: group[:2])
    paths = [os.fsencode(os.path.join(directory, name)) for _, directory, names in files for name in names]
    counts = [len(names) for _, _, names in files]
    if files and files[0][1] == "":  # images directly in the root: no classes
        classes, per_folder = None, [-1] * len(files)
    else:
        classes = class_folders(root)
        position = {name: i for i, name in enumerate(classes)}
        per_folder = [position[top] for top, _, _ in files]
    targets = np.repeat(np.array(per_folder, dtype=np.int32), counts)
    index = ImageIndex(root, StringTable.of(paths), targets, classes)
    return index, StringTable.of(directories), np.array(times, dtype=np.int64)


def _cache_file(root: str) -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixmae"
    folder = Path(os.environ.get("MIXMAE_CACHE") or default)
    key = hashlib.blake2b(
        repr((CACHE_FORMAT, root, IMAGE_EXTENSIONS)).encode("utf-8", "surrogateescape"), digest_size=12
    )
    return folder / f"index-{key.hexdigest()}.npz"


def _read_cache(cache: Path, root: str) -> ImageIndex | None:
    """The cached index if there is one, it is whole, and no directory has changed since."""
    try:
        with np.load(cache, allow_pickle=False) as arrays:  # zipfile checks every array's CRC
            table = {name: arrays[name] for name in arrays.files}
        directories = StringTable(table["directory_blob"], table["directory_ends"])
        for i, (mtime, ctime) in enumerate(table["directory_times"].tolist()):
            status = os.stat(os.path.join(root, directories[i]))
            if (status.st_mtime_ns, status.st_ctime_ns) != (mtime, ctime):
                return None
        class_names = StringTable(table["class_blob"], table["class_ends"])
        classes = [class_names[i] for i in range(len(class_names))] if table["has_classes"] else None
        return ImageIndex(root, StringTable(table["name_blob"], table["name_ends"]), table["targets"], classes)
    except FileNotFoundError:  # no cache yet, or a directory is gone
        return None
    except (OSError, ValueError, KeyError, EOFError, IndexError, zipfile.BadZipFile) as error:
        logger.warning("the index cache %s is unusable (%s); scanning again", cache, error)
        return None


def _write_cache(cache: Path, index: ImageIndex, directories: StringTable, times: np.ndarray) -> None:
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    class_names = StringTable.of([os.fsencode(name) for name in index.classes or []])
    try:
        with open(temporary, "wb") as file:
            np.savez(
                file,
                name_blob=index.names.blob,
                name_ends=index.names.ends,
                targets=index.targets,
                class_blob=class_names.blob,
                class_ends=class_names.ends,
                has_classes=np.array(index.classes is not None),
                directory_blob=directories.blob,
                directory_ends=directories.ends,
                directory_times=times,
            )
        os.replace(temporary, cache)
    except OSError as error:
        logger.warning("the index of %s is not cached: %s", index.root, error)
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`. Where the cache folder cannot be written or locked, do without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "wb")
    except OSError:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process to finish scanning")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.info("no file locks in %s (%s); this process scans for itself", path.parent, error)
        yield
