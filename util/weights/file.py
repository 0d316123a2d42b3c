"""Files of weights: written whole or not at all, verified before use, and never executed.

A file that this project writes is an ordinary `torch.save` archive with a seal as its zip comment: the time of saving
and the SHA-256 of every byte before the digest. It reveals any damage, also where the zip's own CRCs do not reach.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import pathlib
import pickle
import re
import socket
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file as read_safetensors
from torch import Tensor, nn

from util.errors import UserError

logger = logging.getLogger(__name__)

RECORD = "mixmae"  # key under which exported files keep what belongs to their weights, as JSON
FORMAT = 1  # the number under 'format' in our files: raised when an older reader could misread a newer file

SEAL = re.compile(rb"mixmae seal time=(\d{20}) sha256=([0-9a-f]{64})")
SEAL_SIZE = len("mixmae seal time=") + 20 + len(" sha256=") + 64
CONTROL_BYTES = frozenset(range(32)) - frozenset(b"\t\n\f\r")  # no text holds them, every pickle, zip, ... does
ZIP_END, ZIP_END_SIZE = b"PK\x05\x06", 22  # a zip's last record; its last two bytes are the length of the comment

# What the authors' files also hold: paths (submitit's output_dir) become pure ones, which never touch the disk.
HARMLESS = [argparse.Namespace] + [
    (pathlib.PurePath, f"{module}.{name}")
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
]
PLAIN_TYPES = (type(None), bool, int, float, str, torch.Size, torch.dtype, Tensor, nn.Parameter)

# What to do about a file that holds objects of other classes.
OF_UNKNOWN_ORIGIN = "If you trust its origin, save only its state dict with torch.save and give that"
OF_MMENGINE = (
    "It is a training checkpoint of mmengine: convert it to a file of plain weights with mmpretrain's "
    "tools/model_converters/publish_model.py, or load it where it was trained and save only its 'state_dict' with "
    "torch.save"
)


class CheckpointError(UserError):
    """A file of weights that is missing, damaged, unsafe or not what was asked for."""


# --- Writing ---


def write_checkpoint(path: str | os.PathLike, checkpoint: dict[str, Any], later_than: int = 0) -> None:
    """Write `checkpoint` to `path`: afterwards the whole file is safely on the disk, or `path` was never touched.

    The bytes go to a temporary file in the same folder, are flushed to the disk, read back and compared with what was
    meant to be written; only then does the file take the name `path`. Its `saved_at` will exceed `later_than`, even if
    the clock was set back.

    Raises:
        CheckpointError: `checkpoint` holds something that `torch.load(weights_only=True)` would not open.
        OSError: the disk is full, read-only or failing, or gave back other bytes; `path` is as it was before.
    """
    refuse_what_is_not_plain(checkpoint)
    path = Path(path)
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            writer = _HashingWriter(file)
            torch.save(checkpoint, writer)
            digest = writer.seal(max(time.time_ns(), later_than + 1))
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # so that reading it back asks the disk, not the cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if file_hash(temporary) != digest:
            raise OSError(f"{temporary} reads back other bytes than those written: the disk is failing")
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)  # already gone if the file took its name


class _HashingWriter:
    """What `torch.save` writes to: passes the bytes on to `file` and hashes all but the last two.

    Those are the length of the archive's comment, which the seal changes. `seal()` raises the error of the first write
    that failed, as torch's C++ writer would turn it into a RuntimeError.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.flush = file.flush
        self.digest = hashlib.sha256()
        self.last_two = b""
        self.error: OSError | None = None

    def write(self, data) -> int:
        data = memoryview(data)
        self.digest.update(self.last_two)
        self.digest.update(data[:-2])
        self.last_two = bytes(data[-2:])
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def seal(self, moment: int) -> str:
        """Append the seal, with its time in nanoseconds since 1970, as the comment; the SHA-256 of the whole file."""
        if self.error is not None:
            raise self.error
        assert self.last_two == b"\0\0", "torch.save no longer ends a file with a zip record without a comment"
        end = SEAL_SIZE.to_bytes(2, "little") + f"mixmae seal time={moment:020d} sha256=".encode()
        self.digest.update(end)
        own_digest = self.digest.hexdigest().encode()
        self.digest.update(own_digest)
        self.file.seek(-2, os.SEEK_END)
        self.file.write(end + own_digest)
        return self.digest.hexdigest()


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path` for an unfinished file; host and process in it tell whose leftover it is."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def make_folder(folder: Path) -> None:
    """Make a folder that the user named, and log it, as the name may be a typo."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        logger.info("made the folder %s", folder)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; a file's own fsync does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_what_is_not_plain(value: Any, where: str = "checkpoint") -> None:
    """Raise CheckpointError unless `value` consists of tensors, dicts, lists, tuples and plain values throughout."""
    kind = type(value)  # exact: a subclass (numpy's floats, a namedtuple) would be pickled by its own class
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            refuse_what_is_not_plain(key, f"a key of {where}")
            refuse_what_is_not_plain(item, f"{where}[{key!r}]")
    elif kind in (list, tuple):
        for position, item in enumerate(value):
            refuse_what_is_not_plain(item, f"{where}[{position}]")
    elif kind not in PLAIN_TYPES:
        raise CheckpointError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which would not open with "
            "torch.load(weights_only=True): a checkpoint holds tensors and plain values only, so convert it first"
        )


# --- Reading ---


def read_checkpoint(path: str | os.PathLike, mmap: bool = False, verify: bool = True) -> dict[str, Any]:
    """Everything in a file of weights, on the CPU, after the file's bytes have been verified.

    Opens our files, the authors' (their `args`, an `argparse.Namespace`, becomes a dict), any other that
    `torch.load(weights_only=True)` opens, and `.safetensors` (as {'model': tensors}, with what `util.export` recorded).
    Nothing in the file is executed.

    Args:
        path: the file.
        mmap: the tensors stay in the file until they are used, in memory that processes share. The file must not be
            changed meanwhile; it may be removed, or replaced by another, as ours are.
        verify: check all bytes first, by their checksums. False if that has been done already.

    Raises:
        CheckpointError: no such file, damaged, unsafe, or not a file of weights.
    """
    path = Path(path)
    try:
        kind = _kind_of(path)
        if kind == "zip" and verify:
            _verify_zip(path)
        if kind == "safetensors":
            checkpoint = _read_safetensors(path)
        else:
            checkpoint = _as_plain(_restricted_load(path, mmap=mmap and kind == "zip"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is not a checkpoint: it contains itself") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a dict of weights: not a checkpoint")
    refuse_newer(checkpoint, path)
    return checkpoint


def refuse_newer(record: Mapping[str, Any], source: object) -> None:
    """Raise CheckpointError for what a newer version of this project has written."""
    if isinstance(record.get("format"), int) and record["format"] > FORMAT:
        raise CheckpointError(
            f"{source} was written by a newer version of this project (format {record['format']}, "
            f"this one reads up to {FORMAT}): update to read it"
        )


def saved_at(path: str | os.PathLike) -> int:
    """When a file was saved, in nanoseconds since 1970: by its seal, which a copy keeps, else its modification time."""
    with contextlib.suppress(OSError):  # left to whoever needs its content to report
        if seal := SEAL.fullmatch(_last_bytes(Path(path), SEAL_SIZE)):
            return int(seal[1])
    return os.stat(path).st_mtime_ns


def file_hash(path: Path, without_last: int = 0) -> str:
    """The SHA-256 of a file, without its last `without_last` bytes."""
    digest = hashlib.sha256()
    remaining = path.stat().st_size - without_last
    with open(path, "rb", buffering=0) as file:
        while remaining > 0 and (block := file.read(min(remaining, 1 << 22))):
            digest.update(block)
            remaining -= len(block)
    return digest.hexdigest()


def _kind_of(path: Path) -> str:
    """'zip', 'safetensors' or 'pickle', by content; CheckpointError for what cannot be a file of weights."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name a file in it")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    head = _first_bytes(path)
    text = head.lstrip().lower()
    if not head:
        raise CheckpointError(f"{path} is empty (0 bytes): the copy or the download failed, fetch it again")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not a checkpoint: download the file itself")
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the checkpoint itself: run `git lfs pull`")
    if path.suffix in (".onnx", ".pt2"):
        raise CheckpointError(
            f"{path} is an exported program, not weights: give the checkpoint that it was exported from, or export it "
            "with --format safetensors"
        )
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    return "safetensors" if head[4:9] == b"\0\0\0\0{" else "pickle"  # the header's length (8 bytes), then its JSON


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        record = (file.metadata() or {}).get(RECORD, "{}")
    try:
        return {**json.loads(record), "model": read_safetensors(path)}
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: its record of the model is not JSON ({error})") from error


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def _last_bytes(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - count))
        return file.read()


def _verify_zip(path: Path) -> None:
    """CheckpointError unless the archive is whole: by its seal if it has one, else by the CRCs of its members."""
    if seal := SEAL.fullmatch(_last_bytes(path, SEAL_SIZE)):
        if file_hash(path, without_last=64).encode() != seal[2]:
            raise CheckpointError(f"{path} is damaged: its content does not match the checksum at its end")
        return
    end = _last_bytes(path, ZIP_END_SIZE)
    # torch.save ends a file with this record and no comment. Anything else here, a broken seal too, is damage.
    if not end.startswith(ZIP_END) or not end.endswith(b"\0\0"):
        raise CheckpointError(f"{path} is truncated or damaged: the end of the archive is not where it should be")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself ignores the CRCs
            is_checkpoint = any(name.endswith("/data.pkl") for name in archive.namelist())
    except Exception as error:  # zipfile raises a dozen kinds on damaged archives
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} in it does not match")
    if not is_checkpoint:
        raise CheckpointError(f"{path} is a zip archive, but not a checkpoint: it has no data.pkl")


def _restricted_load(path: Path, mmap: bool) -> Any:
    """`torch.load(weights_only=True)` that knows the plain types of the authors' files, with one message per error."""
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exception already gives the reason
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # whatever a hostile or damaged file makes the unpickler raise
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            remedy = OF_MMENGINE if unsafe[1].startswith("mmengine.") else OF_UNKNOWN_ORIGIN
            raise CheckpointError(
                f"{path} is refused: besides tensors and plain values it would load {unsafe[1]}, which could run code; "
                f"nothing was run. {remedy}"
            ) from error
        if not CONTROL_BYTES.intersection(_first_bytes(path)):
            why = "it is a text file; name a .pth or .safetensors file"
        elif isinstance(error, pickle.UnpicklingError):
            why = "its content is not pickled tensors and plain values; nothing in it was run"
        else:
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {why}") from error


def _as_plain(value: Any) -> Any:
    """`value` with every Namespace as a dict and every path as a str."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: _as_plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_as_plain(item) for item in value)
    return str(value) if isinstance(value, pathlib.PurePath) else value
