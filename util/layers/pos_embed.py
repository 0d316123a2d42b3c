"""Fixed two-dimensional sine-cosine position embedding (MixMAE; as in MAE, appendix A), on any grid."""

import numpy as np
import torch
from timm.layers import register_notrace_function, resample_abs_pos_embed
from torch import Tensor

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
    """(1, rows * columns, D) made for `grid`, resized bicubically to `new_grid`; itself if the grids are equal."""
    if grid == new_grid:
        return embedding
    return resample_abs_pos_embed(embedding, list(new_grid), list(grid), num_prefix_tokens=0, antialias=False)


@register_notrace_function
def position_of(x: Tensor, embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, rows, columns, D) for tokens x (B, rows, columns, D), from an embedding (1, L, D) made for `grid`."""
    new_grid = grid_of(x)
    return resize_pos_embed(embedding, grid, new_grid).unflatten(1, new_grid)
