"""Files of weights: written whole or not at all, checked before use, and never executed.

A file that this project writes is an ordinary `torch.save` archive whose zip comment carries a seal: the SHA-256 of
every byte before it. Any damage, also in the parts that the zip's own CRCs leave out, is found before a tensor is used.

    write_checkpoint(path, checkpoint)          atomic and durable
    read_checkpoint(path)                       a whole file, verified
    read_weights(source)                        the weights in a file of any layout, or behind a name or an https link
    load_encoder / load_classifier / load_pretraining(model, state_dict, source)
"""

import argparse
import hashlib
import os
import pathlib
import pickle
import re
import socket
import struct
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = 1  # the number under 'format' in our files: raised when an older reader could misread a newer file
MAX_LISTED = 8  # names in one message; the rest are counted

# The end-of-archive record of a zip without a comment; its last two bytes are the comment's length.
ZIP_END = b"PK\x05\x06"
ZIP_END_SIZE = 22
SEAL = re.compile(rb"mixmae seal time=(\d{20}) sha256=([0-9a-f]{64})")
SEAL_SIZE = len("mixmae seal time=") + 20 + len(" sha256=") + 64

PLAIN_LEAVES = (type(None), bool, int, float, str, torch.Size, torch.dtype)


class CheckpointError(ValueError):
    """A file of weights that is missing, damaged, unsafe or not what was asked for. The message is one for the user."""


# --- Writing ------------------------------------------------------------------------------------------------


def write_checkpoint(path: str | os.PathLike, checkpoint: dict[str, Any], later_than: int = 0) -> None:
    """Write `checkpoint` to `path` so that the file is there whole, on the disk, or was never touched.

    The bytes go to a temporary file in the same folder (`.<name>.<host>.<pid>.tmp`), are flushed to the disk, read back
    and compared with what was meant to be written, and only then take the name `path`.

    Args:
        path: the file; its folder exists.
        checkpoint: tensors, dicts, lists, tuples and plain values.
        later_than: a `saved_at` that the file's own shall exceed, even where the clock was set back.

    Raises:
        CheckpointError: `checkpoint` holds something that `torch.load(weights_only=True)` would not open.
        OSError: the disk is full, failing or read-only, or gave back other bytes; `path` is as it was before.
    """
    refuse_what_is_not_plain(checkpoint)
    path = Path(path)
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            sealing = _SealingWriter(file)
            torch.save(checkpoint, sealing)
            digest = sealing.seal(max(time.time_ns(), later_than + 1))
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # so that reading it back asks the disk, not the cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if file_hash(temporary) != digest:
            raise OSError(f"{temporary} reads back other bytes than were written: the disk is failing")
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)  # gone already where the file took its name


def temporary_path(path: Path) -> Path:
    """A name beside `path` for a file in the making: hidden, with its host and process, which tell leftovers apart."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


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
    elif kind not in PLAIN_LEAVES and kind not in (Tensor, nn.Parameter):
        raise CheckpointError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which would not open with "
            "torch.load(weights_only=True): a checkpoint holds tensors and plain values only, so convert it first"
        )


class _SealingWriter:
    """The file object for `torch.save`: hashes what passes through and ends the archive with the seal.

    A failing write is remembered and raised by `seal()`: inside torch's C++ writer it would turn into another error.
    """

    def __init__(self, file):
        self.file = file
        self.digest = hashlib.sha256()
        self.held = b""  # the last bytes so far: the end record is changed before it is written
        self.error: OSError | None = None

    def write(self, data) -> int:
        data = memoryview(data)
        if len(data) >= ZIP_END_SIZE:
            self._pass_on(self.held)
            self._pass_on(data[:-ZIP_END_SIZE])
            self.held = bytes(data[-ZIP_END_SIZE:])
        else:
            joined = self.held + bytes(data)
            self._pass_on(joined[:-ZIP_END_SIZE])
            self.held = joined[-ZIP_END_SIZE:]
        return len(data)

    def flush(self) -> None:
        """Nothing to do: `write_checkpoint` flushes the file."""

    def seal(self, moment: int) -> str:
        """Write what was held back and the seal with its moment (nanoseconds); the digest of the whole file."""
        assert self.error is not None or (self.held.startswith(ZIP_END) and self.held.endswith(b"\0\0"))
        self._pass_on(self.held[:-2] + struct.pack("<H", SEAL_SIZE))
        self._pass_on(f"mixmae seal time={moment:020d} sha256=".encode())
        self._pass_on(self.digest.hexdigest().encode())
        if self.error is not None:
            raise self.error
        return self.digest.hexdigest()

    def _pass_on(self, data) -> None:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        self.digest.update(data)


def file_hash(path: Path, without_last: int = 0) -> str:
    """The SHA-256 of a file, less its last bytes."""
    digest = hashlib.sha256()
    remaining = path.stat().st_size - without_last
    with open(path, "rb", buffering=0) as file:
        while remaining > 0 and (block := file.read(min(remaining, 1 << 22))):
            digest.update(block)
            remaining -= len(block)
    return digest.hexdigest()


# --- Reading ------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike, mmap: bool = False) -> dict[str, Any]:
    """Everything in a file of weights, on the CPU, after the file's bytes have been verified.

    Opens our files, the authors' (their `args`, an `argparse.Namespace`, becomes a dict), any other that
    `torch.load(weights_only=True)` opens, and `.safetensors` (as {'model': tensors}). Nothing in the file is executed.

    Args:
        path: the file.
        mmap: leave the tensors in the file until they are used; for callers that need a part of it.

    Raises:
        CheckpointError: no such file, damaged, unsafe, or not a file of weights.
    """
    path = Path(path)
    try:
        kind = _kind_of(path)
        if kind == "safetensors":
            return {"model": _read_safetensors(path)}
        if kind == "zip":
            _verify_zip(path)
        checkpoint = _restricted_load(path, mmap=mmap and kind == "zip")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a dict of weights: not a checkpoint")
    if isinstance(checkpoint.get("format"), int) and checkpoint["format"] > FORMAT:
        raise CheckpointError(
            f"{path} was written by a newer version of this project (format {checkpoint['format']}, "
            f"this one reads up to {FORMAT}): update to read it"
        )
    try:
        return _as_plain(checkpoint)
    except RecursionError as error:
        raise CheckpointError(f"{path} is no checkpoint: it holds itself") from error


def saved_at(path: str | os.PathLike) -> int:
    """When a file was written, in nanoseconds since 1970: by its seal, which a copy keeps, else by its folder."""
    try:
        seal = _read_seal(Path(path))
    except OSError:  # unreadable, which is for those to report who need its content
        seal = None
    return int(seal[1]) if seal else os.stat(path).st_mtime_ns


def _kind_of(path: Path) -> str:
    """'zip', 'safetensors' or 'pickle', by content; CheckpointError for what cannot be a file of weights."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name a file in it")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): the copy or the download failed, fetch it again")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not a checkpoint: the download got the page, not the file")
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the checkpoint itself: run `git lfs pull`")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if len(head) > 8 and head[8:9] == b"{" and path.suffix != ".pkl":
        return "safetensors"
    return "pickle"


def _read_seal(path: Path) -> re.Match | None:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - SEAL_SIZE))
        return SEAL.fullmatch(file.read())


def _verify_zip(path: Path) -> None:
    """CheckpointError unless the archive is whole: by its seal where it has one, else by the CRCs of its members."""
    seal = _read_seal(path)
    if seal:
        if file_hash(path, without_last=64).encode() != seal[2]:
            raise CheckpointError(f"{path} is damaged: its content does not match the checksum at its end")
        return
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - ZIP_END_SIZE))
        end = file.read()
    # torch.save ends a file with this record and no comment. Whatever else stands here, a broken seal too, is damage.
    if not end.startswith(ZIP_END) or not end.endswith(b"\0\0"):
        raise CheckpointError(f"{path} is truncated or damaged: the end of the archive is not where it should be")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            names = archive.namelist()
    except Exception as error:  # zipfile raises a dozen kinds on damaged archives
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} in it does not match")
    if not any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        raise CheckpointError(f"{path} is a zip archive, but not a checkpoint: it has no data.pkl")


def _restricted_load(path: Path, mmap: bool) -> Any:
    """`torch.load(weights_only=True)` that knows the plain types of the authors' files, with one message per error."""
    # Paths in a pickled Namespace (submitit's output_dir) become pure ones, which never touch the disk.
    allowed = [argparse.Namespace] + [
        (pathlib.PurePath, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
    ]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is said once, by the exception
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # whatever a hostile or damaged file makes the unpickler raise
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if unsafe:
            raise CheckpointError(
                f"{path} is refused: besides tensors and plain values it would load {unsafe[1]}, which could run code; "
                "nothing was run. If you trust its origin, save its state dict alone with torch.save and give that"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            why = "its content is not pickled tensors and plain values; nothing in it was run"
        else:
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {why}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"{path} is a safetensors file: reading it needs `pip install safetensors`") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {error}") from error


def _as_plain(value: Any) -> Any:
    """`value` with every Namespace as a dict and every path as a str."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: _as_plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_as_plain(item) for item in value)
    return str(value) if isinstance(value, pathlib.PurePath) else value
