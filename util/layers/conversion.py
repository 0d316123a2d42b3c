"""Weights under other programs' names, and of other image sizes, as those of a model: pure functions of state dicts."""

import re
from math import isqrt

import torch
from torch import Size, Tensor, nn

from util.layers.attention import resize_bias_table
from util.layers.pos_embed import resize_pos_embed
from util.layers.sizes import NUM_STAGES

try:
    from timm.models._input import update_model_input_size
except ImportError:

    def update_model_input_size(*_, **__) -> None:
        """timm before 1.0.31 does not rebuild a saved model with its present size."""


StateDict = dict[str, Tensor]

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
MMPRETRAIN_STEM = "backbone.patch_embed.projection."
STEM = "patch_embed.proj.weight"
DECODER = ("decoder_", "mask_token", "fill_token", MMPRETRAIN_DECODER)
MIX_EMBEDS = [f"layers.{stage}.mix_embed" for stage in range(NUM_STAGES)]


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Weights of other programs and other image sizes as the model's own; timm calls it for files of weights.

    Names of the authors and of mmpretrain are understood, position embeddings and bias tables resized, and decoder
    and head left out if the model has none. For a report, use `util.weights.layouts`.
    """
    for key in ("state_dict", "model"):
        state_dict = state_dict.get(key, state_dict)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = for_model(under_our_names(state_dict), model)
    unused = [name for name in weights if name not in shapes and name.startswith((*DECODER, "head."))]
    return {
        name: resized(name, tensor, shapes[name], model) if name in shapes else tensor
        for name, tensor in weights.items()
        if name not in unused
    }


def adapt_state_dict(model: nn.Module, state_dict: StateDict, prefix: str, *_) -> None:
    """Hook of `load_state_dict`, which is all that timm's `checkpoint_path` calls: what does not fit is made to."""
    own = {name[len(prefix) :]: state_dict[name] for name in state_dict if name.startswith(prefix)}
    if not all(isinstance(tensor, Tensor) for tensor in own.values()):
        return  # load_state_dict says what is wrong
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if {name: tensor.shape for name, tensor in own.items()} == shapes:
        # Still, a position embedding of as many tokens may be of another grid.
        adapted = {name: resized(name, tensor, shapes[name], model) for name, tensor in own.items()}
    else:
        adapted = checkpoint_filter_fn(own, model)
        for name in own:
            del state_dict[prefix + name]
    state_dict.update({prefix + name: tensor for name, tensor in adapted.items()})


def for_model(weights: StateDict, model: nn.Module) -> StateDict:
    """The weights, without mix embeddings if `model` has none, or has another number of them."""
    fits = all(
        stage.mix_embed is not None and stage.mix_embed.shape == weights[name].shape
        for stage, name in zip(model.layers, MIX_EMBEDS)
        if name in weights
    )
    return weights if fits else without_mix_embed(weights)


def without_mix_embed(weights: StateDict) -> StateDict:
    """Weights that give a single image the same features, to rounding, without mix embeddings.

    In pretraining every token carried the vector of an image in the mixture. A single image carries that of the first,
    its own group's, at all positions, so the vector can be moved into the biases before it: the patch embedding's,
    and those of the norm in each patch merging, by the smallest change that the linear layer behind it maps to it.
    """
    weights = dict(weights)
    for stage, name in enumerate(MIX_EMBEDS):
        if name not in weights:
            continue
        shift = weights.pop(name)[0].double()
        bias = "patch_embed.norm.bias"
        if stage > 0:
            bias = f"layers.{stage - 1}.downsample.norm.bias"
            reduction = weights[f"layers.{stage - 1}.downsample.reduction.weight"].double()  # (2C, 4C)
            shift = torch.linalg.lstsq(reduction, shift[:, None], driver="gelsd").solution[:, 0]
        weights[bias] = (weights[bias].double() + shift).to(weights[bias].dtype)
    return weights


def under_our_names(weights: StateDict) -> StateDict:
    """Weights without derived tensors, under the authors' names, which are ours; they may come with mmpretrain's."""
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(DERIVED)}
    if any(name.startswith(MMPRETRAIN_STEM) for name in weights):
        return _from_mmpretrain(weights)
    return _encoder_of(weights)


def _encoder_of(weights: StateDict) -> StateDict:
    """From a detector or another larger model, what is under the prefix of its only patch embedding; else all."""
    prefixes = [name.removesuffix(STEM) for name in weights if name.endswith("." + STEM)]
    if STEM in weights or len(prefixes) != 1:
        return weights
    return {name.removeprefix(prefixes[0]): weights[name] for name in weights if name.startswith(prefixes[0])}


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


def resized(name: str, tensor: Tensor, shape: Size, model: nn.Module) -> Tensor:
    """`tensor` resized to `shape` if it depends on the image size and was made for another one, else itself."""
    if tensor.ndim != len(shape) or tensor.shape[-1] != shape[-1]:
        return tensor
    if name in ("absolute_pos_embed", "decoder_pos_embed"):
        new_grid = tuple(model.layers[0].grid if name == "absolute_pos_embed" else model.grid_size)
        side = isqrt(tensor.shape[1])
        old_grid = _grid_of(tensor) or ((side, side) if tensor.shape != shape else new_grid)
        if old_grid == new_grid or old_grid[0] * old_grid[1] != tensor.shape[1]:
            return tensor
        return resize_pos_embed(tensor, old_grid, new_grid)
    if name.endswith("relative_position_bias_table") and tensor.shape != shape:
        old_side, new_side = isqrt(tensor.shape[0]), isqrt(shape[0])  # of the square table: 2 * window - 1
        if old_side**2 == tensor.shape[0] and new_side**2 == shape[0]:
            return resize_bias_table(tensor, (new_side + 1) // 2)
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
