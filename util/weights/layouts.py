"""Layouts of weights: other programs' names and orders to ours, and into a model of any image size, with a report."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from util.layers.conversion import (
    DECODER,
    MIX_EMBEDS,
    MMPRETRAIN_DECODER,
    STEM,
    StateDict,
    for_model,
    resized,
    under_our_names,
)
from util.layers.sizes import NUM_STAGES
from util.weights.file import CheckpointError

PLAIN_KEYS = ("model", "state_dict")  # where our and the authors', and timm's and mmpretrain's files keep weights
AVERAGED_KEYS = ("model_ema", "state_dict_ema")  # ours and timm's
WRAPPERS = re.compile(r"(module\.|_orig_mod\.)+")  # prefixes of DistributedDataParallel and torch.compile


# --- Other programs' names ---


def normalise_state_dict(checkpoint: dict[str, Any], source: object, ema: bool = False) -> StateDict:
    """The weights in a checkpoint under our names, with `ema` the averaged ones. `source` is their name in messages.

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
    return under_our_names(weights)


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
    moved: list[str]  # mix embeddings, only in the file; moved into biases, which gives single images the same features

    def __str__(self) -> str:
        parts = [f"loaded {len(self.loaded)} tensors from {self.source}"]
        if self.resized:
            parts.append(f"{len(self.resized)} of them resized ({_listed(self.resized, most=2)})")
        if self.reinitialised:
            parts.append(f"re-initialised, as their size in the file differs: {_listed(self.reinitialised)}")
        if self.moved:
            parts.append("mix embeddings left out: an image's own are added to biases, which gives the same features")
        if self.missing:
            parts.append(f"not in the file, so at their initial values: {_listed(self.missing)}")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} in the file ignored ({_listed(self.unexpected, most=2)})")
        return "; ".join(parts)


def load_encoder(model: nn.Module, state_dict: StateDict, source: object) -> LoadReport:
    """Load an encoder to fine-tune or probe; position embedding and bias tables are resized to the model's image size.

    A decoder in `state_dict` is ignored. A head is loaded if its size fits, else the model keeps its own. The model may
    be one of timm's `features_only`, without the parts that it has dropped.

    Raises:
        CheckpointError: an encoder tensor is missing, of another shape or not finite, or the file has some that the
            model lacks.
    """
    model = model.model if isinstance(model, FeatureGetterNet) else model
    return _load(model, state_dict, source, optional=("head.",), ignored=(*DECODER, "head.", *_dropped_parts(model)))


def _dropped_parts(model: nn.Module) -> list[str]:
    """Prefixes of what `prune_intermediate_layers` has taken away."""
    stages = len(model.layers)
    dropped = [f"layers.{i}." for i in range(stages, NUM_STAGES)]
    if dropped:
        dropped.append(f"layers.{stages - 1}.downsample.")
    return dropped + ["norm."] * isinstance(model.norm, nn.Identity)


def load_classifier(model: nn.Module, state_dict: StateDict, source: object) -> LoadReport:
    """Load a fine-tuned classifier, head included, to evaluate it; resizes as `load_encoder` does.

    Raises:
        CheckpointError: the file is not a classifier (of this size and number of classes), or its weights are not
            finite.
    """
    expected, given = model.state_dict()["head.weight"].shape[0], count_classes(state_dict, source)
    if expected != given:
        raise CheckpointError(f"{source} has {given} classes, the model {expected}: they must be the same")
    return _load(model, state_dict, source, ignored=DECODER)


def count_classes(state_dict: StateDict, source: object) -> int:
    """The number of classes of a classifier's head.

    Raises:
        CheckpointError: there is no head.
    """
    if "head.weight" not in state_dict:
        has_decoder = any(name.startswith(("decoder_", MMPRETRAIN_DECODER)) for name in state_dict)
        raise CheckpointError(
            f"{source} holds {'a pretraining model' if has_decoder else 'an encoder'} without a classification head, "
            "so it cannot classify: fine-tune it first (main_finetune.py --finetune), or take its features "
            "(util.predict --features or --dense, util.export --part encoder or pyramid)"
        )
    return len(state_dict["head.weight"])


def load_pretraining(model: nn.Module, state_dict: StateDict, source: object) -> LoadReport:
    """Load a whole pretraining model, decoder included, to train on or to reconstruct; resizes as `load_encoder` does.

    Mix embeddings and the token that fills hidden cells, which not every pretraining model has, keep their initial
    values if the file has none that fit.

    Raises:
        CheckpointError: the file is not a pretraining checkpoint of this model, or its weights are not finite.
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
    return _load(model, state_dict, source, optional=(*MIX_EMBEDS, "fill_token"), ignored=("head.", "fill_token"))


def _load(
    model: nn.Module, state_dict: StateDict, source: object, ignored: tuple[str, ...], optional: tuple[str, ...] = ()
) -> LoadReport:
    """The one implementation: every tensor of the model must come from the file, and every tensor of the file be used.

    Exempt are the model's tensors whose names begin with `optional` and the file's whose names begin with `ignored`.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    given_names, state_dict = state_dict.keys(), for_model(state_dict, model)
    given = {name: state_dict[name] for name in shapes if name in state_dict}
    given = {name: resized(name, tensor, shapes[name], model) for name, tensor in given.items()}
    fitting = {name: tensor for name, tensor in given.items() if tensor.shape == shapes[name]}
    report = LoadReport(
        source,
        loaded=list(fitting),
        resized=[name for name, tensor in fitting.items() if tensor is not state_dict[name]],
        missing=[name for name in shapes if name not in state_dict],
        unexpected=[name for name in state_dict if name not in shapes],
        reinitialised=[name for name in given if name not in fitting],
        moved=[name for name in given_names if name not in state_dict],
    )
    wrong = [name for name in report.missing + report.reinitialised if not name.startswith(optional)]
    wrong += [name for name in report.unexpected if not name.startswith(ignored)]
    if wrong:
        made_with = getattr(source, "args", {}).get("model")
        raise CheckpointError(f"{source} {_why_it_does_not_fit(wrong, state_dict, shapes, made_with)}")
    model.load_state_dict(fitting, strict=False)  # what must be there has been checked
    require_finite(model, source)
    return report


def require_finite(model: nn.Module, source: object) -> None:
    """Raise a CheckpointError if a model has weights from `source` that are not finite: all results would be NaN, and
    the first class would always win. (Checking before they are in the model would read a large file twice.)"""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{source} holds weights that are not finite (NaN or infinite), the first in {name}: its training went "
                "wrong before it was saved; take an earlier checkpoint"
            )


def _why_it_does_not_fit(
    wrong: list[str], state_dict: StateDict, shapes: dict[str, torch.Size], made_with: str | None
) -> str:
    """The likeliest reason why the tensors named in `wrong` are not the model's; the file records `made_with`."""
    if STEM not in state_dict:
        return (
            f"holds weights of another kind of model (no {STEM}; it has {_listed(state_dict, most=3)}): "
            "give a MixMAE checkpoint"
        )
    given, expected = state_dict[STEM].shape, shapes[STEM]  # (embed_dim, in_chans, patch, patch)
    if given[0] == expected[0] and given[1] != expected[1]:
        return (
            f"was trained on images with {given[1]} channels, the model takes {expected[1]}: "
            f"set --in_chans {given[1]} (in Python, in_chans={given[1]}), or pretrain on images with "
            f"{expected[1]} channels"
        )
    if set(wrong) == {"norm.weight", "norm.bias"} and state_dict.keys().isdisjoint(wrong):
        return (
            "holds the encoder of a detector or segmenter, which has no norm after its last stage, and so no pooled "
            "features: take its maps (util.predict --dense, util.export --part pyramid), or the weights that it was "
            "trained from"
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
    recorded = f", {made_with}" if made_with else ""
    return f"does not fit this model (is --model the one it was made with{recorded}?): {'; '.join(counts)}"


def _listed(names: Iterable[object], most: int = 8) -> str:
    """The first names, with a count of the others."""
    names = list(map(str, names))
    rest = f", ... ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
