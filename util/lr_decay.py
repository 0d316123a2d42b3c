"""Layer-wise learning-rate decay for fine-tuning (MixMAE, appendix A; the idea is BEiT's)."""

from models_swin import SwinTransformer


def layer_ids(model: SwinTransformer) -> dict[str, int]:
    """Layer id of every trainable parameter: 0 for the embedding, 1..N for the blocks.

    Two oddities are the published recipe's, and its numbers depend on them: a stage's patch merging has the id of the
    next stage's first block, and the final norm and the head share the last block's id, so that the head trains at
    `decay ** 1` instead of the full rate.
    """
    ids = {}
    blocks_before = 0
    for i, stage in enumerate(model.layers):
        for j in range(len(stage.blocks)):
            blocks_before += 1
            ids[f"layers.{i}.blocks.{j}."] = blocks_before
        ids[f"layers.{i}.downsample."] = blocks_before + 1
    ids |= {"patch_embed.": 0, "absolute_pos_embed": 0, "norm.": blocks_before, "head.": blocks_before}

    def id_of(name: str) -> int:
        return next(layer_id for prefix, layer_id in ids.items() if name.startswith(prefix))

    return {name: id_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def param_groups_layer_decay(model: SwinTransformer, weight_decay: float, layer_decay: float) -> list[dict]:
    """Parameter groups with `lr_scale = layer_decay ** (N + 1 - id)`, and no weight decay for vectors and biases.

    Args:
        model: the classifier; frozen parameters are left out.
        weight_decay: for tensors of two or more dimensions that are not a bias.
        layer_decay: factor from one layer to the one below; 1 for the same rate everywhere.
    """
    num_blocks = sum(len(stage.blocks) for stage in model.layers)
    parameters = dict(model.named_parameters())
    groups = {}
    for name, layer_id in layer_ids(model).items():
        decays = parameters[name].ndim > 1 and not name.endswith(".bias")
        group = groups.setdefault(
            (layer_id, decays),
            {
                "params": [],
                "lr_scale": layer_decay ** (num_blocks + 1 - layer_id),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameters[name])
    return list(groups.values())
