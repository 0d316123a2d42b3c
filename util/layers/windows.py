"""Geometry of windows: pure functions from sizes and groups to layouts, the order in which tokens stand.

Layouts are worked out on the CPU with NumPy, whatever records or transforms PyTorch's operations at the time.
"""

from functools import lru_cache
from itertools import groupby
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

Segments = tuple[tuple[int, int], ...]
Array = TypeVar("Array", np.ndarray, Tensor)


def grid_of(x: Tensor) -> tuple[int, int]:
    """(rows, columns) of a map of tokens (B, rows, columns, C), as plain numbers even when shapes are recorded."""
    return int(x.shape[1]), int(x.shape[2])


class WindowLayout(NamedTuple):
    """The order in which a stage's tokens stand while its blocks run, and who attends to whom.

    Tokens stand in segments, one after another, and a token attends to the tokens of its own segment only. Without
    groups a segment is a window, and with groups the part of one group inside one window.
    """

    order: Tensor | None  # (T,) raster index of the token at each place; None if that is the raster order
    inverse: Tensor | None  # (T,) place of each token in raster order
    segments: Segments  # (how many, tokens in each): neighbours of equal length share one attention call
    bias_index: Tensor  # rows of the bias table, segment by segment
    one_bias: bool = True  # `bias_index` has only the first of neighbours of equal length: the others' are the same
    groups: tuple[Tensor, ...] | None = None  # for each of `segments`, (how many, n): tokens of other groups are hidden
    group_of: Tensor | None = None  # (T,) group of each token in raster order, for mix embeddings; None: all of group 0


def sort_tokens(
    grid: tuple[int, int], window: int, group: np.ndarray | None = None
) -> tuple[np.ndarray, Segments, np.ndarray]:
    """The one rule of all layouts: tokens are sorted by window and group, and cut where these change.

    Windows start at the top left, and one that the grid's edge cuts is smaller. Windows of one shape stand together:
    there are at most four, whole ones and those at the right edge, the bottom edge and the corner.

    Sorting by group is exact. Attention is equivariant to the order of its tokens (the position bias is looked up for
    the sorted pairs), and a token that masking would hide has an attention weight of exactly zero, so the dense
    masked attention of a window is block-diagonal after the sort: one smaller attention per group, with nothing left
    out.

    Args:
        grid: rows and columns of tokens.
        window: side of a whole window.
        group: group ids of the tokens (T,), whole numbers from 0.

    Returns:
        `order`, `segments` and `bias_index` of a `WindowLayout`; without groups `one_bias` holds.
    """
    rows, columns = np.indices(grid).reshape(2, -1)
    whole_rows, whole_columns = (side - side % window for side in grid)
    shape = 2 * (rows >= whole_rows) + (columns >= whole_columns)
    key = (shape * grid[0] + rows // window) * grid[1] + columns // window
    if group is not None:
        key = key * (group.max() + 1) + group
    order = key.argsort(kind="stable")
    place = (rows % window * window + columns % window)[order]  # in a whole window
    starts = np.flatnonzero(np.diff(key[order], prepend=-1))
    lengths = np.diff(starts, append=len(order))

    segments, bias_index, begin = [], [], 0
    for (n, _), alike in groupby(zip(lengths.tolist(), shape[order[starts]].tolist())):
        count = sum(1 for _ in alike)
        run = place[begin : begin + count * n].reshape(count, n)
        bias_index.append(relative_position_index(run if group is not None else run[:1], window).ravel())
        segments.append((count, n))
        begin += count * n
    return order, tuple(segments), np.concatenate(bias_index)


def relative_position_index(place: Array, window: int) -> Array:
    """Row of the bias table for each pair of tokens: (..., n) raster indices in their window -> (..., n, n).

    The table's rows stand for the offsets (query - key), from -(window - 1) to window - 1, rows before columns. A
    window that is cut uses the rows of the offsets that it has.
    """
    offset = place // window * (2 * window - 1) + place % window  # of rows and columns in one number
    return offset[..., :, None] - offset[..., None, :] + 2 * window * (window - 1)


sort_windows = lru_cache(maxsize=32)(sort_tokens)  # without groups: those of the last sizes are kept


@torch.compiler.assume_constant_result  # plain numbers and sorting, nothing to compile
def window_layout(grid: tuple[int, int], window: int, device: torch.device) -> WindowLayout:
    """Layout for ordinary window attention: every window is one segment."""
    order, segments, bias_index = sort_windows(grid, window)
    bias_index = to_device(torch.from_numpy(bias_index), device)
    if segments == ((1, len(order)),):
        return WindowLayout(None, None, segments, bias_index)
    return WindowLayout(*order_and_inverse(order, device), segments, bias_index)


def order_and_inverse(order: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return to_device(torch.from_numpy(order), device), to_device(torch.from_numpy(inverse), device)


def group_layout(
    group: Tensor, window: int, layout: WindowLayout, one_shape: bool = False, sizes_vary: bool = True
) -> WindowLayout:
    """Layout for attention inside the groups of each window: sorted on a CPU, masked on a GPU if windows are many.

    Args:
        group: (rows, columns) group ids of the stage's tokens, whole numbers from 0, on the CPU, where index
            arithmetic is cheap and the lengths of segments are known without waiting for a device.
        window: side of a whole window.
        layout: the stage's `window_layout`, on the device where this one's tensors are wanted.
        one_shape: keep shapes independent of the groups, as `torch.compile` needs.
        sizes_vary: whether groups have other sizes in other calls. If not, a stage that is one window has one shape
            when it is sorted, too.
    """
    device = layout.bias_index.device
    grid, group = tuple(group.shape), group.flatten().numpy()
    many_windows = layout.order is not None
    if (many_windows and device.type != "cpu") or (one_shape and (many_windows or sizes_vary)):
        return masked_layout(grid, group, window, layout)
    order, segments, bias_index = sort_tokens(grid, window, group)
    bias_index = to_device(torch.from_numpy(bias_index), device)
    return WindowLayout(*order_and_inverse(order, device), segments, bias_index, one_bias=False)


def masked_layout(grid: tuple[int, int], group: np.ndarray, window: int, layout: WindowLayout) -> WindowLayout:
    """Layout for attention inside groups with shapes that do not depend on the groups: the usual masked windows.

    It computes every pair of a window and hides those of different groups. That wastes work but is one operation
    for all windows of one shape, which suits a GPU and `torch.compile` if windows are many and small.
    """
    order, segments, _ = sort_windows(grid, window)
    groups = to_device(torch.from_numpy(group[order].astype(np.int32)), layout.bias_index.device)
    parts = groups.split([count * n for count, n in segments])
    return layout._replace(groups=tuple(part.view(count, n) for part, (count, n) in zip(parts, segments)))


def upsample(cells: Tensor, scale: int) -> Tensor:
    """(..., rows, columns) -> (..., rows * scale, columns * scale): what holds for a cell, for each of its tokens."""
    return cells.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, without waiting for it: only copies from page-locked memory are asynchronous."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
