"""Which images a folder holds: scanned once per machine, cached on disk, kept in a few flat arrays.

A list of a million (path, target) tuples costs hundreds of megabytes, and every data-loader worker slowly copies it,
because reading a Python object writes to its reference count. Here all names are one array of bytes, which forked
workers share.

Hidden files and folders (`.thumbs/`, `._photo.jpg`) are left out, and counted; so are images that cannot be read
(`.heic`), links to images that are not there, and other files, by the endings of their names. So are the output
folders of runs and of `util.check_data`: their pictures show images, but are not for training.

The cache is in $MIXMAE_CACHE, else $XDG_CACHE_HOME/mixmae, else ~/.cache/mixmae; never in the data folder. It is valid
as long as every directory of the tree (except those with output) has the modification and change times that it had when
it was scanned: adding, removing or renaming an entry changes its directory's times. Changing the content of a file does
not, and need not. The cache files are plain numpy arrays, replaced atomically; a damaged one is scanned again.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from filelock import FileLock

from util.data.decoding import IMAGE_EXTENSIONS
from util.errors import UserError, unreadable_is_user_error

logger = logging.getLogger(__name__)

# Images too, but `util.data.decoding` does not read them.
UNREADABLE_EXTENSIONS = tuple(
    ".heic .heif .avif .jxl .jp2 .j2k .svg .psd .exr .hdr .dcm .dng .raw .cr2 .cr3 .nef .arw .raf .orf .rw2".split()
)
ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar")
# Counted with the endings, none of which has a space.
BROKEN_LINK, OWN_OUTPUT = "broken link", "own output"
OUTPUT_FILES = {".claim.json", "check_data.json", "config.json", "times.jsonl"}  # see `holds_output`
CACHE_FORMAT = 6
# A directory changed this shortly before its scan may change again without its times moving (coarse clocks).
SETTLED_AFTER_NS = 2_000_000_000
TICK_NS = 50_000_000  # of such clocks on a local disk
SECONDS_PER_LINE = 10.0  # of the log, during a long scan
LONGEST_WAIT = 3600  # seconds for another process's scan; after that, this process scans for itself

# Tables that are not in their cache files: a run opens its images twice, to choose settings and to train.
_not_cached: dict[Path, dict[str, np.ndarray]] = {}


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

    def __getitem__(self, i: int) -> str:  # raises IndexError at the end, so that a table can be iterated
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.blob[start : self.ends[i]].tobytes())


@dataclass(frozen=True)
class ImageIndex:
    """The images under `root`, in torchvision's ImageFolder order (class, then folder, then name).

    `targets` is (number of images,) int32: the position in `classes` of the first folder below `root`, or -1 for all
    images when `classes` is None. A tree has no classes when an image lies directly in `root`.
    """

    root: str
    names: StringTable
    targets: np.ndarray
    classes: list[str] | None
    left_out: dict[str, int] = field(default_factory=dict)  # ending of a name, BROKEN_LINK or OWN_OUTPUT -> how many
    hidden: int = 0  # images and folders left out, as their names begin with a dot
    # Folders below `root` ('' is itself) with images in them -> the number of these, device and inode: the folder, by
    # whatever links it was found. Of all images, also in a selection.
    folders: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> str:
        return os.path.join(self.root, self.names[i])

    def fingerprint(self) -> str:
        """The same for the same names in the same order, wherever `root` is."""
        return digest(self.names.ends.astype("<i8"), self.names.blob)

    def empty_classes(self) -> list[str]:
        """Class folders without any image."""
        used = set(np.unique(self.targets).tolist())
        return [name for i, name in enumerate(self.classes or []) if i not in used]

    def with_classes(self, classes: list[str]) -> "ImageIndex":
        """The same images, with targets that are positions in `classes` (a validation set takes the training set's).

        Raises UserError when an image's class is not among `classes`.
        """
        if unknown := sorted(set(self.classes or []) - set(classes)):
            raise UserError(
                f"{self.root} has classes that the training set lacks: {abbreviate(unknown)}; "
                f"class folders must have the same names in both"
            )
        position = {name: i for i, name in enumerate(classes)}
        table = np.array([position[name] for name in self.classes or []], dtype=np.int32)
        return replace(self, targets=table[self.targets], classes=list(classes))

    def set_aside(self, share: float) -> np.ndarray:
        """Which images are kept for validation, (number of images,) bool: `share` of each class.

        At least one of each, and not all. Images are chosen by hashes of their names: the same ones on every machine
        and for every seed, and adding others hardly changes which. Raises UserError when none would be chosen.
        """
        hashes = [hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in self.names]
        order = np.lexsort((np.frombuffer(b"".join(hashes), dtype=">u8"), self.targets))
        aside = np.zeros(len(self), dtype=bool)
        for own in np.split(order, np.flatnonzero(np.diff(self.targets[order])) + 1):  # the images of each class
            aside[own[: min(max(round(share * len(own)), 1), len(own) - 1)]] = True
        if not aside.any():
            raise UserError(f"--val_share {share:g} of {len(self)} images leaves none for validation: add images")
        return aside

    def select(self, chosen: np.ndarray) -> "ImageIndex":
        """The images where `chosen`, (number of images,) bool, is true."""
        names = StringTable.of([os.fsencode(self.names[i]) for i in np.flatnonzero(chosen)])
        return replace(self, names=names, targets=self.targets[chosen])


def digest(*parts: bytes | np.ndarray) -> str:
    """A hash of the concatenated parts, as 32 hexadecimal digits."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def ending(name: str) -> str:
    """The extension by which a file is counted: '' also for numbers, as in IM.0001, IM.0002, ..."""
    extension = os.path.splitext(name.lower())[1]
    return "" if extension[1:].isdigit() else extension


def holds_output(names: set[str]) -> bool:
    """Whether a folder with files of these names is the output of a run (perhaps just begun) or of check_data."""
    return bool({".claim.json", "check_data.json"} & names) or {"config.json", "times.jsonl"} <= names


def is_output(folder: str | os.PathLike) -> bool:
    """`holds_output` for a folder; nothing else in it is read."""
    return holds_output({name for name in OUTPUT_FILES if os.path.exists(os.path.join(folder, name))})


def shared_folders(folders: Iterable[str]) -> list[str]:
    """The common beginning of all these paths, as a list of folder names."""
    levels = zip(*(folder.split(os.sep) if folder else [] for folder in folders))
    return [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, levels)]


def report_left_out(place: str, left_out: Mapping[str, int], hidden: int) -> None:
    """Log which files of a folder or tar are not used: those that look like images as a warning."""
    images = {name: count for name, count in left_out.items() if name in UNREADABLE_EXTENSIONS}
    others = {name or "without ending": count for name, count in left_out.items() if name not in images}
    if broken := others.pop(BROKEN_LINK, 0):
        logger.warning("%s: left out %d links that lead to no image", place, broken)
    if own := others.pop(OWN_OUTPUT, 0):
        logger.warning("%s: left out %d folders with the output of a run or of check_data", place, own)
    if images:
        logger.warning(
            "%s: left out %s, which this program does not read: convert them to JPEG, PNG or .npy to use them",
            place, _counts(images),
        )  # fmt: skip
    if others:
        logger.info("%s: left out files without an image's ending: %s", place, _counts(others))
    if hidden:
        logger.info("%s: left out %d hidden images or folders (names that begin with a dot)", place, hidden)


def _counts(files: Mapping[str, int], shown: int = 5) -> str:
    listed = sorted(files.items(), key=lambda item: (-item[1], item[0]))
    more = [f"{sum(count for _, count in listed[shown:])} others"] if len(listed) > shown else []
    return ", ".join([*(f"{count} {name}" for name, count in listed[:shown]), *more])


def abbreviate(names: list[str], shown: int = 5) -> str:
    """The first few names, for a message."""
    return f"{names[:shown]}" + (f" and {len(names) - shown} more" if len(names) > shown else "")


def class_folders(root: str | os.PathLike) -> list[str]:
    """Names of the folders directly below `root`, hidden ones left out, sorted as torchvision sorts classes.

    Raises UserError when `root` cannot be listed.
    """
    with unreadable_is_user_error(f"cannot list the folder {root}"), os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.name[0] != "." and entry.is_dir())


def load_index(root: str | os.PathLike, extensions: Sequence[str] = IMAGE_EXTENSIONS) -> ImageIndex:
    """The index of `root`, from the cache if it is still valid, else from a scan that then fills the cache.

    Processes that start together on one machine wait for the first one's scan. Raises UserError when there is no image
    or a folder cannot be listed.
    """
    root = os.path.realpath(root)
    extensions = tuple(extensions)
    cache = _cache_file(root, extensions)
    index = _scanned_before(cache, root)
    if index is None:
        logger.info("looking for images under %s", root)
        with _lock(cache.with_suffix(".lock")):
            index = _scanned_before(cache, root)  # another process may have filled it meanwhile
            if index is None:
                index = _scan_and_cache(cache, root, extensions)
    report_left_out(root, index.left_out, index.hidden)
    often = Counter(folder[1:] for folder in index.folders.values())
    if same := sorted(name for name, folder in index.folders.items() if often[folder[1:]] > 1):
        logger.warning(
            "%s: links lead to folders that are included already, whose images are repeated: %s", root, abbreviate(same)
        )
    if len(index) == 0:
        packed = sorted(name for name in index.left_out if name in (*ARCHIVES, ".tar"))
        advice = f"; {', '.join(packed)} in it are not opened: unpack them, or give a .tar itself" if packed else ""
        raise UserError(f"no images found under {root} (looked for {', '.join(extensions)}){advice}")
    return index


def scan(
    root: str, extensions: tuple[str, ...] = IMAGE_EXTENSIONS
) -> tuple[ImageIndex, list[str], np.ndarray, list[str]]:
    """Walk the tree under `root`, following links, without hidden files and folders, whose names begin with a dot.

    Returns the index, all directories (relative to `root`) that it covers, their (mtime, ctime) in ns, (n, 2) int64,
    and those that are left out as output. Raises UserError when a directory cannot be listed.
    """
    directories, times, files, folders = [], [], [], {}  # files: (class, directory, sorted names)
    left_out, hidden, own_output = Counter(), 0, set()
    waiting = [("", ())]  # relative directory, identities of its ancestors
    found, spoken = 0, time.monotonic()
    while waiting:
        directory, ancestors = waiting.pop()
        absolute = os.path.join(root, directory)
        names, inner, others, dotted, own = [], [], Counter(), 0, set()
        with unreadable_is_user_error(f"cannot list the folder {Path(absolute)}"):
            status = os.stat(absolute)  # before listing: a change during the listing must invalidate the cache
            identity = (status.st_dev, status.st_ino)
            if identity in ancestors:  # a link to a folder above itself
                continue
            with os.scandir(absolute) as entries:
                for entry in entries:
                    name = entry.name
                    lower = name.lower()
                    if name[0] == ".":
                        dotted += entry.is_dir() or lower.endswith(extensions)
                    elif entry.is_dir():
                        inner.append((os.path.join(directory, name), (*ancestors, identity)))
                    elif lower.endswith(extensions):
                        if entry.is_file():
                            names.append(name)
                        else:
                            others[BROKEN_LINK] += 1
                    else:
                        others[ending(name)] += 1
                    if name in OUTPUT_FILES:
                        own.add(name)
        if directory and holds_output(own):
            own_output.add(directory)
            continue
        waiting += inner
        left_out += others
        hidden += dotted
        found += len(names)
        if time.monotonic() > spoken + SECONDS_PER_LINE:
            spoken = time.monotonic()
            logger.info("%d images in %d folders so far", found, len(directories) + 1)
        directories.append(directory)
        times.append((status.st_mtime_ns, status.st_ctime_ns))
        if names:
            folders[directory] = (len(names), *identity)
            files.append((directory.split(os.sep, 1)[0], directory, sorted(names)))

    left_out[OWN_OUTPUT] += len(own_output)
    files.sort(key=lambda group: group[:2])
    paths = [os.fsencode(os.path.join(directory, name)) for _, directory, names in files for name in names]
    if files and files[0][1] == "":  # images directly in the root: no classes
        classes, per_folder = None, [-1] * len(files)
    else:
        classes = [name for name in class_folders(root) if name not in own_output]
        position = {name: i for i, name in enumerate(classes)}
        per_folder = [position[top] for top, _, _ in files]
    targets = np.repeat(np.array(per_folder, dtype=np.int32), [len(names) for _, _, names in files])
    index = ImageIndex(root, StringTable.of(paths), targets, classes, dict(+left_out), hidden, folders)
    return index, directories, np.array(times, dtype=np.int64), sorted(own_output)


def _scan_and_cache(cache: Path, root: str, extensions: tuple[str, ...]) -> ImageIndex:
    start = time.time_ns()
    index, directories, times, own_output = scan(root, extensions)
    seconds = (time.time_ns() - start) / 1e9
    logger.info("scanned %d images in %d folders under %s in %.1f s", len(index), len(directories), root, seconds)
    others = json.dumps([index.classes, directories, index.left_out, index.hidden, own_output]).encode()
    table = {"names": index.names.blob, "name_ends": index.names.ends, "targets": index.targets, "times": times}
    table["images"] = np.array([index.folders.get(directory, (0,))[0] for directory in directories])
    table["others"] = np.frombuffer(others, dtype=np.uint8)
    _not_cached.pop(cache, None)
    newest = times[:, 0].max()
    if newest < start - TICK_NS:
        _not_cached[cache] = table
    if newest > start - SETTLED_AFTER_NS:
        logger.info("%s changed a moment ago; its index is not cached this time", root)
        return index
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **table)
        os.replace(temporary, cache)
        _not_cached.pop(cache, None)
    except OSError as error:
        logger.warning("the index of %s is not cached: %s", root, error)
        with contextlib.suppress(OSError):
            temporary.unlink()
    return index


def _cache_file(root: str, extensions: tuple[str, ...]) -> Path:
    folder = os.environ.get("MIXMAE_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mixmae")
    key = repr((CACHE_FORMAT, root, extensions, UNREADABLE_EXTENSIONS)).encode("utf-8", "surrogateescape")
    return Path(folder, f"index-{hashlib.blake2b(key, digest_size=12).hexdigest()}.npz")


def _scanned_before(cache: Path, root: str) -> ImageIndex | None:
    """The index from an earlier scan, if there was one, its cache file is whole, and no directory has changed since."""
    try:
        if (table := _not_cached.get(cache)) is None:
            with np.load(cache, allow_pickle=False) as arrays:  # zipfile checks every array's CRC
                table = dict(arrays)
        classes, directories, left_out, hidden, own_output = json.loads(table["others"].tobytes())
        if not all(is_output(os.path.join(root, folder)) for folder in own_output):
            return None
        folders = {}
        found = zip(directories, table["times"].tolist(), table["images"].tolist(), strict=True)
        for directory, times, images in found:
            status = os.stat(os.path.join(root, directory))
            if [status.st_mtime_ns, status.st_ctime_ns] != times:
                return None
            if images:
                folders[directory] = (images, status.st_dev, status.st_ino)
        names = StringTable(table["names"], table["name_ends"])
        return ImageIndex(root, names, table["targets"], classes, left_out, hidden, folders)
    except FileNotFoundError:  # no cache yet, or a directory is gone
        return None
    except Exception as error:  # a damaged file makes zipfile and numpy raise nearly anything
        logger.warning("the index cache %s is unusable (%s); scanning again", cache, error)
        return None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`. If the cache folder cannot be written or locked, do without."""
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path, timeout=LONGEST_WAIT))
        except (OSError, NotImplementedError) as error:
            logger.info("no file locks in %s (%s); this process scans for itself", path.parent, error)
        yield
