"""Residual branches with stochastic depth (Huang et al., ECCV 2016)."""

from collections.abc import Callable

import torch
from timm.layers import drop_path
from torch import Tensor

from util.layers.tracing import runs_eagerly


def add_branch(x: Tensor, branch: Callable[[Tensor], Tensor], drop_rate: float) -> Tensor:
    """x + branch(x) on rows (B, ...), each branch dropped with probability `drop_rate`, the others scaled up instead.

    On a CPU the branch of a dropped row is not even computed.
    """
    if drop_rate == 0:
        return x + branch(x)
    # A GPU would have to wait to learn what is dropped, and gain little; recorded shapes must not depend on it.
    if x.device.type != "cpu" or not runs_eagerly():
        return x + drop_path(branch(x), drop_rate, training=True)
    keep_prob = 1 - drop_rate
    scale = 1 / keep_prob
    kept = torch.empty(len(x), device="cpu").bernoulli_(keep_prob).nonzero().flatten()
    if len(kept) == len(x):
        return torch.add(x, branch(x), alpha=scale)
    if len(kept) == 0:  # one row times zero, so that every parameter has a gradient, which DDP waits for
        kept, scale = kept.new_zeros(1), 0.0
    return x.index_add(0, kept, branch(x.index_select(0, kept)).to(x.dtype), alpha=scale)
