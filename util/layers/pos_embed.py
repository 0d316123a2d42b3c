"""Fixed two-dimensional sine-cosine position embedding (MixMAE; as in MAE, appendix A), on any grid."""

import numpy as np
import torch
from timm.layers import register_notrace_module, resample_abs_pos_embed
from torch import Tensor, nn

from util.layers.tracing import runs_eagerly
from util.layers.windows import grid_of


def get_2d_sincos_pos_embed(embed_dim: int, grid_size: tuple[int, int]) -> torch.Tensor:
    """Position embedding of a grid of tokens in row-major order.

    The first half of the channels encodes the column, the second half the row; each half is
    `[sin(pos * w_k), ..., cos(pos * w_k), ...]` with `w_k = 10000 ** (-k / (embed_dim / 4))`.

    Args:
        embed_dim: number of channels, a multiple of 4.
        grid_size: (rows, columns) of the grid.

    Returns:
        (1, rows * columns, embed_dim) float32 on the default device, computed in float64.

    Raises:
        ValueError: when `embed_dim` is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"a 2-D sine-cosine embedding needs a multiple of 4 channels, got {embed_dim}")
    frequencies = 10000.0 ** (-np.arange(embed_dim // 4) / (embed_dim / 4))

    def encode(positions: np.ndarray) -> np.ndarray:
        angles = np.outer(positions, frequencies)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.indices(grid_size).reshape(2, -1)
    embedding = np.concatenate([encode(columns), encode(rows)], axis=1)
    return torch.tensor(embedding, dtype=torch.float32)[None]


def resize_pos_embed(embedding: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """(1, rows * columns, D) made for `grid`, resized bicubically to `new_grid`; itself where the grids are equal."""
    if grid == new_grid:
        return embedding
    return resample_abs_pos_embed(embedding, list(new_grid), list(grid), num_prefix_tokens=0, antialias=False)


@register_notrace_module
class PositionOfTokens(nn.Module):
    """The position embedding for a map of tokens, resized where the map is not of the embedding's own grid.

    Those of the grids met last are kept. They are remade when the embedding changes, and none is kept where the
    embedding stands for another one, as while operations are recorded. A copy starts without any.
    """

    MOST = 8

    def __init__(self):
        super().__init__()
        self.of: tuple | None = None  # the embedding that `kept` was made from
        self.kept: dict[tuple[int, int], Tensor] = {}

    def __reduce__(self):  # for copy and pickle
        return type(self), ()

    def forward(self, x: Tensor, embedding: Tensor, grid: tuple[int, int]) -> Tensor:
        """(1, rows, columns, D) for x (B, rows, columns, D) of an embedding (1, L, D) that was made for `grid`."""
        new_grid = grid_of(x)
        return self.on_grid(embedding, grid, new_grid).unflatten(1, new_grid)

    def on_grid(self, embedding: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
        """As `resize_pos_embed`."""
        if grid == new_grid or not runs_eagerly() or type(embedding) is not nn.Parameter or embedding.is_inference():
            return resize_pos_embed(embedding, grid, new_grid)
        of = (embedding.data_ptr(), embedding._version, embedding.dtype, embedding.device)
        if of != self.of or (new_grid not in self.kept and len(self.kept) == self.MOST):
            self.of, self.kept = of, {}
        if new_grid not in self.kept:
            with torch.inference_mode(False), torch.no_grad():
                self.kept[new_grid] = resize_pos_embed(embedding.detach(), grid, new_grid)
        return self.kept[new_grid]
