"""Layouts of weights: other programs' names and orders into ours, and into a model of any image size, with a report."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table_simple
from torch import Tensor, nn

from util.weights.file import CheckpointError

StateDict = dict[str, Tensor]

PLAIN_KEYS = ("model", "state_dict")  # where our and the authors', and timm's and mmpretrain's files keep weights
AVERAGED_KEYS = ("model_ema", "state_dict_ema")  # ours and timm's
WRAPPERS = re.compile(r"(module\.|_orig_mod\.)+")  # prefixes of DistributedDataParallel and torch.compile
DERIVED = ("relative_position_index", "attn_mask")
MMPRETRAIN_NAMES = {
    "backbone.": "",
    "head.fc.": "head.",
    "patch_embed.projection.": "patch_embed.proj.",
    ".ln1.": ".norm1.",
    ".ln2.": ".norm2.",
    ".ffn.layers.0.0.": ".mlp.fc1.",
    ".ffn.layers.1.": ".mlp.fc2.",
}

MMPRETRAIN_DECODER = "neck."
DECODER = ("decoder_", "mask_token", MMPRETRAIN_DECODER)


# --- Other programs' names ---


def normalise_state_dict(checkpoint: dict[str, Any], source: object, ema: bool = False) -> tuple[StateDict, str]:
    """The weights in a checkpoint under our names (with `ema` the averaged ones), and whose layout they had.

    That is 'mixmae' (the authors' names, which are ours) or 'mmpretrain'. `source` is their name in messages.

    Raises:
        CheckpointError: it holds no weights, or no averaged ones.
    """
    found = [checkpoint[key] for key in (AVERAGED_KEYS if ema else PLAIN_KEYS) if isinstance(checkpoint.get(key), dict)]
    if ema and not found:
        raise CheckpointError(f"{source} holds no averaged weights: leave out --model_ema to use its plain ones")
    weights = found[0] if found else checkpoint
    weights = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor) and isinstance(name, str)}
    if not weights:
        raise CheckpointError(
            f"{source} holds no weights: expected a state dict, bare or under 'model' or 'state_dict', "
            f"found {_listed(map(repr, checkpoint)) or 'an empty dict'}"
        )
    if all(WRAPPERS.match(name) for name in weights):
        weights = {name[WRAPPERS.match(name).end() :]: tensor for name, tensor in weights.items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(DERIVED)}
    if any(name.startswith("backbone.") for name in weights):
        return _from_mmpretrain(weights), "mmpretrain"
    return weights, "mixmae"


def _from_mmpretrain(weights: StateDict) -> StateDict:
    """mmpretrain's MixMIM encoder and classification head under our names; its decoder keeps its own (`neck.`)."""
    renamed = {}
    for name, tensor in weights.items():
        if not name.startswith(("backbone.", "head.fc.", MMPRETRAIN_DECODER)):
            continue
        if re.search(r"\.downsample\.(reduction|norm)\.", name):
            tensor = _patch_merging_order(tensor)
        for theirs, ours in MMPRETRAIN_NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def _patch_merging_order(tensor: Tensor) -> Tensor:
    """Reorder the last axis (4C) from unfold's order to that of concatenated neighbours.

    unfold: channel c*4 + k with k over (row, col) = (0,0), (0,1), (1,0), (1,1).
    Ours: channel k*C + c with k over (0,0), (1,0), (0,1), (1,1).
    """
    by_channel = tensor.unflatten(-1, (-1, 4))  # (..., C, 4)
    return by_channel[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2).contiguous()  # (..., 4, C) -> (..., 4C)


# --- Into a model ---


@dataclass
class LoadReport:
    """What became of every tensor. `str(report)` is the line for the log."""

    source: object
    loaded: list[str]  # copied into the model, resized or not
    resized: list[str]
    missing: list[str]  # in the model, not in the file; left at their initial values
    unexpected: list[str]  # in the file, not in the model; ignored
    reinitialised: list[str]  # in both, with different shapes; left at their initial values

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


def load_encoder(model: nn.Module, state_dict: StateDict, source: object) -> LoadReport:
    """Load an encoder to fine-tune or probe; position embedding and bias tables are resized to the model's image size.

    A decoder in `state_dict` is ignored. A head is loaded if its size fits, else the model keeps its own.

    Raises:
        CheckpointError: an encoder tensor is missing or of another shape, or the file has some that the model lacks.
    """
    return _load(model, state_dict, source, optional=("head.",), ignored=(*DECODER, "head."))


def load_classifier(model: nn.Module, state_dict: StateDict, source: object) -> LoadReport:
    """Load a fine-tuned classifier, head included, to evaluate it; resizes as `load_encoder` does.

    Raises:
        CheckpointError: the file is not a classifier (of this size and number of classes).
    """
    expected, given = model.state_dict()["head.weight"].shape[0], count_classes(state_dict, source)
    if expected != given:
        raise CheckpointError(f"{source} classifies {given} classes, the model {expected}: they must be the same")
    return _load(model, state_dict, source, ignored=DECODER)


def count_classes(state_dict: StateDict, source: object) -> int:
    """How many classes the head of a classifier tells apart.

    Raises:
        CheckpointError: there is no head.
    """
    if "head.weight" not in state_dict:
        has_decoder = any(name.startswith(("decoder_", MMPRETRAIN_DECODER)) for name in state_dict)
        raise CheckpointError(
            f"{source} holds {'a pretraining model' if has_decoder else 'an encoder'} without a classification head, "
            "so there is nothing to evaluate: fine-tune it first (--finetune), then evaluate the result"
        )
    return len(state_dict["head.weight"])


def load_pretraining(model: nn.Module, state_dict: StateDict, source: object) -> LoadReport:
    """Load a whole pretraining model, decoder included, to train on or to reconstruct; resizes as `load_encoder` does.

    Raises:
        CheckpointError: the file is not a pretraining checkpoint of this model.
    """
    if any(name.startswith(MMPRETRAIN_DECODER) for name in state_dict):
        raise CheckpointError(
            f"{source} has mmpretrain's decoder, which is not converted: its encoder can be fine-tuned "
            "(main_finetune.py --finetune), but pretraining and pictures need a checkpoint of main_pretrain.py "
            "or of the authors"
        )
    if not any(name.startswith("decoder_") for name in state_dict):
        raise CheckpointError(
            f"{source} has no decoder: it holds a fine-tuned or bare encoder, and this needs a pretraining checkpoint"
        )
    return _load(model, state_dict, source, ignored=("head.",))


def _load(
    model: nn.Module, state_dict: StateDict, source: object, ignored: tuple[str, ...], optional: tuple[str, ...] = ()
) -> LoadReport:
    """The one implementation: every tensor of the model must come from the file, and every tensor of the file be used.

    Exempt are the model's tensors whose names begin as in `optional` and the file's whose names begin as in `ignored`.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    given = {name: state_dict[name] for name in shapes if name in state_dict}
    given = {name: _resized(name, tensor, shapes[name], model) for name, tensor in given.items()}
    fitting = {name: tensor for name, tensor in given.items() if tensor.shape == shapes[name]}
    report = LoadReport(
        source,
        loaded=list(fitting),
        resized=[name for name, tensor in fitting.items() if tensor is not state_dict[name]],
        missing=[name for name in shapes if name not in state_dict],
        unexpected=[name for name in state_dict if name not in shapes],
        reinitialised=[name for name in given if name not in fitting],
    )
    wrong = [name for name in report.missing + report.reinitialised if not name.startswith(optional)]
    wrong += [name for name in report.unexpected if not name.startswith(ignored)]
    if wrong:
        raise CheckpointError(f"{source} {_why_it_does_not_fit(wrong, state_dict, shapes)}")
    model.load_state_dict(fitting, strict=False)  # what must be there has been checked
    return report


def _why_it_does_not_fit(wrong: list[str], state_dict: StateDict, shapes: dict[str, torch.Size]) -> str:
    """The likeliest reason why the tensors named in `wrong` are not the model's."""
    stem = "patch_embed.proj.weight"  # (embed_dim, in_chans, patch, patch)
    if stem not in state_dict:
        return (
            f"holds weights of another kind of model (no {stem}; it has {_listed(state_dict, most=3)}): "
            "give a MixMAE checkpoint"
        )
    given, expected = state_dict[stem].shape, shapes[stem]
    if given[0] == expected[0] and given[1] != expected[1]:
        return (
            f"was trained on images with {given[1]} channels, the model takes {expected[1]}: "
            f"set --in_chans {given[1]}, or pretrain on images with {expected[1]} channels"
        )
    kinds = {
        "tensors of another shape": [
            f"{name} {tuple(state_dict[name].shape)} (expected {tuple(shapes[name])})"
            for name in wrong
            if name in state_dict and name in shapes
        ],
        "missing": [name for name in wrong if name not in state_dict],
        "that the model lacks": [name for name in wrong if name not in shapes],
    }
    counts = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    return f"does not fit this model (is --model the one it was made with?): {'; '.join(counts)}"


def _resized(name: str, tensor: Tensor, shape: torch.Size, model: nn.Module) -> Tensor:
    """`tensor` resized to `shape` if it depends on the image size and was made for another one, else itself."""
    if tensor.ndim != len(shape) or tensor.shape[-1] != shape[-1]:
        return tensor
    if name in ("absolute_pos_embed", "decoder_pos_embed"):
        new_grid = tuple(model.layers[0].grid if name == "absolute_pos_embed" else model.grid_size)
        side = isqrt(tensor.shape[1])
        old_grid = _grid_of(tensor) or ((side, side) if tensor.shape != shape else new_grid)
        if old_grid == new_grid or old_grid[0] * old_grid[1] != tensor.shape[1]:
            return tensor
        return resample_abs_pos_embed(tensor, list(new_grid), list(old_grid), num_prefix_tokens=0, antialias=False)
    if name.endswith("relative_position_bias_table") and tensor.shape != shape:
        old_side, new_side = isqrt(tensor.shape[0]), isqrt(shape[0])  # of the square table: 2 * window - 1
        if old_side**2 == tensor.shape[0] and new_side**2 == shape[0]:
            window = (new_side + 1) // 2
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


def _listed(names: Iterable[object], most: int = 8) -> str:
    """The first names, with a count of the others."""
    names = list(map(str, names))
    rest = f", ... ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
