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
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table_simple
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


# --- Weights of any layout ----------------------------------------------------------------------------------


@dataclass
class WeightsInfo:
    """Where weights came from.

    source: as the user gave it. path: the file that was read. layout: 'mixmae' (the authors' names, which are ours) or
    'mmpretrain'. args: the recorded configuration, {} where the file has none. epoch: the recorded epoch or None.
    """

    source: str
    path: Path
    layout: str
    args: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None

    def __str__(self) -> str:
        return self.source


def read_weights(source: str | os.PathLike, ema: bool = False) -> tuple[dict[str, Tensor], WeightsInfo]:
    """The weights that `source` names, under the names that the authors' checkpoints use, and where they came from.

    Args:
        source: a file; the name of a published checkpoint (`base_600ep`, see `util.pretrained.PUBLISHED`); or an
            `https://` link with its hash: `https://.../file.pth#sha256=<hex>`, or a name that ends in `-<hex>.pth`.

        ema: take the averaged weights that `--model_ema` keeps, where the file has them.

    Derived tensors (`relative_position_index`, `attn_mask`) are left out, wrappers' prefixes (`module.`) are taken off
    and mmpretrain's MixMIM names and patch-merging order are converted.

    Raises:
        CheckpointError: nothing there, damaged, unsafe, or no weights in it.
    """
    from util.pretrained import locate  # here, because it imports this module to check what it downloads

    path = locate(os.fspath(source))
    checkpoint = read_checkpoint(path, mmap=True)
    if ema:
        if "model_ema" not in checkpoint:
            raise CheckpointError(f"{path} holds no averaged weights: leave out --model_ema to use its plain ones")
        checkpoint["model"] = checkpoint["model_ema"]
    state_dict, layout = normalise_state_dict(checkpoint, path)
    args = checkpoint.get("args")
    epoch = checkpoint.get("epoch")
    return state_dict, WeightsInfo(
        source=os.fspath(source),
        path=path,
        layout=layout,
        args=args if isinstance(args, dict) else {},
        epoch=epoch if isinstance(epoch, int) else None,
    )


def normalise_state_dict(checkpoint: dict[str, Any], path: str | os.PathLike) -> tuple[dict[str, Tensor], str]:
    """The weights in a checkpoint under our names, and the layout they had ('mixmae' or 'mmpretrain')."""
    weights = next(
        (checkpoint[key] for key in ("model", "state_dict") if isinstance(checkpoint.get(key), dict)), checkpoint
    )
    weights = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor) and isinstance(name, str)}
    if not weights:
        raise CheckpointError(
            f"{path} holds no weights: expected a state dict, bare or under 'model' or 'state_dict', "
            f"found {_listed(map(repr, checkpoint)) or 'an empty dict'}"
        )
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        if all(name.startswith(prefix) for name in weights):
            weights = {name[len(prefix) :]: tensor for name, tensor in weights.items()}
    layout = "mmpretrain" if any(name.startswith("backbone.") for name in weights) else "mixmae"
    if layout == "mmpretrain":
        weights = _from_mmpretrain(weights)
    derived = ("relative_position_index", "attn_mask")
    return {name: tensor for name, tensor in weights.items() if not name.endswith(derived)}, layout


def _from_mmpretrain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """mmpretrain's MixMIM encoder and classification head under our names; its decoder (`neck.`) is left out."""
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("head.fc."):
            renamed["head." + name.removeprefix("head.fc.")] = tensor
        elif name.startswith("backbone."):
            name = name.removeprefix("backbone.")
            for theirs, ours in (
                ("patch_embed.projection.", "patch_embed.proj."),
                (".ln1.", ".norm1."),
                (".ln2.", ".norm2."),
                (".ffn.layers.0.0.", ".mlp.fc1."),
                (".ffn.layers.1.", ".mlp.fc2."),
            ):
                name = name.replace(theirs, ours)
            if re.search(r"\.downsample\.(reduction|norm)\.", name):
                tensor = _patch_merging_order(tensor)
            renamed[name] = tensor
    return renamed


def _patch_merging_order(tensor: Tensor) -> Tensor:
    """Reorder the last axis (4C) from unfold's order to that of concatenated neighbours.

    unfold: channel c*4 + k with k over (row, col) = (0,0), (0,1), (1,0), (1,1).
    Ours: channel k*C + c with k over (0,0), (1,0), (0,1), (1,1).
    """
    by_channel = tensor.unflatten(-1, (-1, 4))  # (..., C, 4)
    return by_channel[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2).contiguous()  # (..., 4, C) -> (..., 4C)


# --- Into a model -------------------------------------------------------------------------------------------


@dataclass
class LoadReport:
    """What became of every tensor. `str(report)` is the line for the log."""

    source: str
    loaded: list[str] = field(default_factory=list)  # copied, resized ones among them
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # in the model, not in the file; left at their initial values
    unexpected: list[str] = field(default_factory=list)  # in the file, not in the model; ignored
    reinitialised: list[str] = field(default_factory=list)  # in both, of other sizes; left at their initial values

    def __str__(self) -> str:
        parts = [f"loaded {len(self.loaded)} tensors from {self.source}"]
        if self.resized:
            parts.append(f"{len(self.resized)} of them resized ({_listed(self.resized, most=2)})")
        if self.reinitialised:
            parts.append(f"re-initialised, being of another size in the file: {_listed(self.reinitialised)}")
        if self.missing:
            parts.append(f"not in the file, so at their initial values: {_listed(self.missing)}")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} in the file ignored ({_listed(self.unexpected, most=2)})")
        return "; ".join(parts)


def load_encoder(
    model: nn.Module, state_dict: dict[str, Tensor], source: WeightsInfo | str | os.PathLike
) -> LoadReport:
    """Load an encoder to fine-tune or probe; position embedding and bias tables are resized to the model's image size.

    A decoder in `state_dict` is ignored. A head is loaded where its size fits, else the model's own stays as it is.

    Raises:
        CheckpointError: an encoder tensor is missing or of another shape, or the file has some that the model lacks.
    """
    return _load(model, state_dict, source, optional=("head.",), ignored=("decoder_", "mask_token", "head."))


def load_classifier(
    model: nn.Module, state_dict: dict[str, Tensor], source: WeightsInfo | str | os.PathLike
) -> LoadReport:
    """Load a fine-tuned classifier, head included, to evaluate it; resizes as `load_encoder` does.

    Raises:
        CheckpointError: the file is not a classifier (of this size and number of classes).
    """
    if "head.weight" not in state_dict:
        what = "a pretraining model" if _has_decoder(state_dict) else "an encoder"
        raise CheckpointError(
            f"{source} holds {what} without a classification head, so there is nothing to evaluate: "
            "fine-tune it first (--finetune), then evaluate the result"
        )
    expected, given = model.state_dict()["head.weight"].shape[0], state_dict["head.weight"].shape[0]
    if expected != given:
        raise CheckpointError(f"{source} classifies {given} classes, the model {expected}: set --nb_classes {given}")
    return _load(model, state_dict, source, optional=(), ignored=("decoder_", "mask_token"))


def load_pretraining(
    model: nn.Module, state_dict: dict[str, Tensor], source: WeightsInfo | str | os.PathLike
) -> LoadReport:
    """Load a whole pretraining model, decoder included, to train on or to reconstruct; resizes as `load_encoder` does.

    Raises:
        CheckpointError: the file is not a pretraining checkpoint of this model.
    """
    if not _has_decoder(state_dict):
        raise CheckpointError(
            f"{source} has no decoder: it holds a fine-tuned or bare encoder, and this needs a pretraining checkpoint"
        )
    return _load(model, state_dict, source, optional=(), ignored=("head.",))


def _has_decoder(state_dict: dict[str, Tensor]) -> bool:
    return any(name.startswith("decoder_") for name in state_dict)


def _load(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    source: WeightsInfo | str | os.PathLike,
    optional: tuple[str, ...],
    ignored: tuple[str, ...],
) -> LoadReport:
    """The one implementation: every tensor of the model must come from the file, and every tensor of the file be used.

    Exempt are the model's tensors whose names start as in `optional` and the file's whose names start as in `ignored`.
    """
    report = LoadReport(str(source))
    chosen: dict[str, Tensor] = {}
    absent: list[str] = []
    misshapen: list[str] = []
    expected_shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, shape in expected_shapes.items():
        given = state_dict.get(name)
        fitting = None if given is None else _resized(name, given, shape, model)
        if fitting is not None and fitting.shape == shape:
            report.loaded.append(name)
            chosen[name] = fitting
            if fitting is not given:
                report.resized.append(name)
        elif name.startswith(optional):
            (report.missing if given is None else report.reinitialised).append(name)
        elif given is None:
            absent.append(name)
        else:
            misshapen.append(f"{name} {tuple(given.shape)} (expected {tuple(shape)})")
    surplus = [name for name in state_dict if name not in expected_shapes]
    report.unexpected = [name for name in surplus if name.startswith(ignored)]
    foreign = [name for name in surplus if not name.startswith(ignored)]

    if absent or misshapen or foreign:
        raise CheckpointError(_why_it_does_not_fit(source, state_dict, expected_shapes, absent, misshapen, foreign))
    model.load_state_dict(chosen, strict=False)  # strict about what matters above
    return report


def _why_it_does_not_fit(
    source: WeightsInfo | str | os.PathLike,
    state_dict: dict[str, Tensor],
    expected_shapes: dict[str, torch.Size],
    absent: list[str],
    misshapen: list[str],
    foreign: list[str],
) -> str:
    """The message for weights that are not this model's, the likeliest cause first."""
    stem = "patch_embed.proj.weight"
    if stem not in state_dict:
        return (
            f"{source} holds weights of another kind of model (no {stem}; it has {_listed(state_dict, most=3)}): "
            "give a MixMAE checkpoint"
        )
    given, expected = state_dict[stem].shape, expected_shapes[stem]
    if given[0] == expected[0] and given[1] != expected[1]:
        return (
            f"{source} was trained on images with {given[1]} channels, the model takes {expected[1]}: "
            f"set --in_chans {given[1]}, or pretrain on images with {expected[1]} channels"
        )
    parts = []
    if misshapen:
        parts.append(f"{len(misshapen)} tensors of another shape: {_listed(misshapen)}")
    if absent:
        parts.append(f"{len(absent)} missing: {_listed(absent)}")
    if foreign:
        parts.append(f"{len(foreign)} that the model lacks: {_listed(foreign)}")
    return f"{source} does not fit this model (is --model the one it was made with?): " + "; ".join(parts)


def _resized(name: str, tensor: Tensor, shape: torch.Size, model: nn.Module) -> Tensor:
    """`tensor` resized to `shape` if it is one that depends on the image size and is of another size, else itself."""
    if tensor.ndim != len(shape) or tensor.shape[-1] != shape[-1]:
        return tensor
    if name in ("absolute_pos_embed", "decoder_pos_embed"):
        new_grid = model.layers[0].grid if name == "absolute_pos_embed" else model.grid_size
        side = isqrt(tensor.shape[1])
        old_grid = _grid_of(tensor) or ((side, side) if tensor.shape != shape else tuple(new_grid))
        if old_grid == tuple(new_grid) or old_grid[0] * old_grid[1] != tensor.shape[1]:
            return tensor
        return resample_abs_pos_embed(
            tensor, new_size=list(new_grid), old_size=list(old_grid), num_prefix_tokens=0, antialias=False
        )
    if name.endswith("relative_position_bias_table") and tensor.shape != shape:
        sides = isqrt(tensor.shape[0]), isqrt(shape[0])  # of the square table: 2 * window - 1
        if sides[0] ** 2 == tensor.shape[0] and sides[1] ** 2 == shape[0]:
            window = (sides[1] + 1) // 2
            return resize_rel_pos_bias_table_simple(tensor.float(), (window, window), tuple(shape)).to(tensor.dtype)
    return tensor


def _grid_of(pos_embed: Tensor) -> tuple[int, int] | None:
    """The (rows, cols) that a (1, L, D) sin-cos embedding was made for, or None if it is another kind of embedding.

    Its first half encodes the column and is the same in every row; its second half encodes the row.
    """
    length, dim = pos_embed.shape[1:]
    col_code, row_code = pos_embed[0, :, : dim // 2], pos_embed[0, :, dim // 2 :]  # (L, D/2)
    new_row = ((row_code - row_code[0]).abs().amax(dim=1) > 1e-3).nonzero()
    cols = int(new_row[0]) if len(new_row) else length
    if length % cols or (col_code.unflatten(0, (-1, cols)) - col_code[:cols]).abs().amax() > 1e-3:
        return None
    return length // cols, cols


def _listed(names, most: int = MAX_LISTED) -> str:
    names = list(names)
    rest = f", ... ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + rest
