"""The feed-forward half of a transformer block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from util.layers.tracing import runs_eagerly


class Mlp(nn.Module):
    """Linear, GELU, linear: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def activate_and_project(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.drop(F.gelu(hidden)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if hidden.device.type == "cpu" and torch.is_grad_enabled() and runs_eagerly():
            # A quarter of all stored activations is GELU's output. On a CPU it is cheaper to compute it again, in the
            # cache, than to store and fetch it; on a GPU it is not.
            hidden = checkpoint(
                self.activate_and_project, hidden, use_reentrant=False, preserve_rng_state=self.drop.p > 0
            )
        else:
            hidden = self.activate_and_project(hidden)
        return self.drop(hidden)
