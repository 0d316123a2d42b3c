"""Layouts of weights: other programs' names and orders into ours, and into a model of another size, with a report."""

import os
import re
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table_simple
from torch import Tensor, nn

from util.weights.file import CheckpointError

MAX_LISTED = 8  # names in one message; the rest are counted


# --- Other programs' names ---


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


def load_encoder(model: nn.Module, state_dict: dict[str, Tensor], source: object) -> LoadReport:
    """Load an encoder to fine-tune or probe; position embedding and bias tables are resized to the model's image size.

    A decoder in `state_dict` is ignored. A head is loaded where its size fits, else the model's own stays as it is.

    Raises:
        CheckpointError: an encoder tensor is missing or of another shape, or the file has some that the model lacks.
    """
    return _load(model, state_dict, source, optional=("head.",), ignored=("decoder_", "mask_token", "head."))


def load_classifier(model: nn.Module, state_dict: dict[str, Tensor], source: object) -> LoadReport:
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


def load_pretraining(model: nn.Module, state_dict: dict[str, Tensor], source: object) -> LoadReport:
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
    source: object,
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
    source: object,
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
