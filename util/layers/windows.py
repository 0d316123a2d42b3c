"""Geometry of windows: pure functions from sizes and groups to layouts, the order in which tokens stand."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from util.errors import UserError

NUM_STAGES = 4


def to_2tuple(size: int | Sequence[int]) -> tuple[int, int]:
    """`size` as (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def stage_grids(img_size: tuple[int, int], patch_size: int) -> list[tuple[int, int]]:
    """(rows, columns) of tokens at each of the four stages; the last one is the grid of cells."""
    return [tuple(side // (patch_size << stage) for side in img_size) for stage in range(NUM_STAGES)]


def fit_window(grid: tuple[int, int], window: int) -> int:
    """The window's side on `grid`: the shorter side of the grid where the window would not fit."""
    return min(window, *grid)


def largest_window(grid: tuple[int, int], window: int) -> int:
    """The largest side up to `window` that tiles `grid`."""
    return max(side for side in range(1, fit_window(grid, window) + 1) if grid[0] % side == grid[1] % side == 0)


def img_size_works(img_size: tuple[int, int], patch_size: int, window_size: Sequence[int]) -> bool:
    """Whether every stage's grid is whole and is tiled exactly by its windows."""
    if min(img_size) <= 0 or any(side % (8 * patch_size) for side in img_size):
        return False
    grids = stage_grids(img_size, patch_size)
    return all(side % fit_window(grid, window) == 0 for grid, window in zip(grids, window_size) for side in grid)


def check_img_size(img_size: tuple[int, int], patch_size: int, window_size: Sequence[int]) -> None:
    """Raise a UserError that names the nearest sizes that work when `img_size` does not."""
    if patch_size < 1 or min(window_size) < 1:
        raise UserError(f"patch and window sizes must be at least 1, got {patch_size} and {tuple(window_size)}")
    if img_size_works(img_size, patch_size, window_size):
        return
    stride = 8 * patch_size
    reach = max(window_size) * 2
    sides = [[stride * k for k in range(max(1, side // stride - reach), side // stride + reach)] for side in img_size]
    working = [(h, w) for h in sides[0] for w in sides[1] if img_size_works((h, w), patch_size, window_size)]
    if img_size[0] == img_size[1]:
        working = [size for size in working if size[0] == size[1]]
    working.sort(key=lambda size: abs(size[0] - img_size[0]) + abs(size[1] - img_size[1]))
    near = tuple(max(1, round(side / stride)) * stride for side in img_size)
    windows = [largest_window(grid, window) for grid, window in zip(stage_grids(near, patch_size), window_size)]
    raise UserError(
        f"input size {img_size[0]}x{img_size[1]} does not work with patch size {patch_size} and windows "
        f"{tuple(window_size)}: both sides must be multiples of {stride}, and the token grid of every stage must be "
        f"tiled by its window. Nearest sizes that work: {', '.join(f'{h}x{w}' for h, w in working[:3])}; or "
        f"{near[0]}x{near[1]} with windows {' '.join(map(str, windows))} (--window_size)"
    )


class WindowLayout(NamedTuple):
    """The order in which a stage's tokens stand while its blocks run, and who attends to whom.

    Tokens stand in segments, one after another, and a token attends to the tokens of its own segment only. Without
    groups a segment is a window. With groups it is the part of one group inside one window (see `sorted_layout`).
    """

    order: Tensor | None  # (T,) raster index of the token at each place; None where that is the raster order
    inverse: Tensor | None  # (T,) place of each token in raster order
    segments: tuple[tuple[int, int], ...]  # (how many, tokens in each): neighbours of equal length are one attention
    bias_index: Tensor  # rows of the bias table, segment by segment; those of one window if all windows are the same
    separate: Tensor | None = None  # (nW, 1, N, N) True where two tokens of a window must not see each other


def raster_to_windows(grid: tuple[int, int], window: int, device: torch.device | None = None) -> Tensor:
    """(nW, N) raster index of each token, window by window; N = window * window."""
    rows, columns = grid
    index = torch.arange(rows * columns, device=device)
    index = index.view(rows // window, window, columns // window, window)
    return index.transpose(1, 2).reshape(-1, window * window)


def relative_position_index(place: Tensor, window: int) -> Tensor:
    """Row of the bias table for each pair of tokens: (..., n) raster indices in their window -> (..., n, n).

    The table's rows stand for the offsets (query - key), from -(window - 1) to window - 1, rows before columns.
    """
    offset = place // window * (2 * window - 1) + place % window  # of rows and columns in one number
    return offset[..., :, None] - offset[..., None, :] + 2 * window * (window - 1)


def window_layout(grid: tuple[int, int], window: int) -> WindowLayout:
    """Layout for ordinary window attention: every window is one segment. On the default device."""
    order = raster_to_windows(grid, window)  # (nW, N)
    segments = (tuple(order.shape),)
    bias_index = relative_position_index(torch.arange(window * window), window).flatten()
    if len(order) == 1:
        return WindowLayout(None, None, segments, bias_index)
    order = order.flatten()
    return WindowLayout(order, order.argsort(), segments, bias_index)


def group_layout(group: Tensor, window: int, layout: WindowLayout, one_shape: bool = False) -> WindowLayout:
    """Layout for attention inside the groups of each window: sorted on a CPU, masked on a GPU where windows are many.

    Args:
        group: (rows, columns) group ids of the stage's tokens, on the CPU, where index arithmetic is cheap and the
            lengths of segments are known without waiting for a device.
        window: side of the square windows that tile the grid.
        layout: the stage's `window_layout`, on the device where this one's tensors are wanted.
        one_shape: keep shapes independent of how groups cut windows, as `torch.compile` needs. Those of a stage that is
            one window depend on the sizes of the groups alone.
    """
    device = layout.bias_index.device
    many_windows = layout.order is not None
    if many_windows and (one_shape or device.type != "cpu"):
        return masked_layout(group, window, layout)
    return sorted_layout(group, window, device)


def sorted_layout(group: Tensor, window: int, device: torch.device) -> WindowLayout:
    """Layout for attention inside groups: the tokens of each window are sorted by group.

    Sorting is exact. Attention is equivariant to the order of its tokens (the position bias is looked up for the
    sorted pairs), and a token that masking would hide has an attention weight of exactly zero, so the dense masked
    attention of a window is block-diagonal after the sort: one smaller attention per group, with nothing left out.
    """
    order = raster_to_windows(tuple(group.shape), window, group.device)  # (nW, N)
    window_group, place = group.flatten()[order].sort(dim=1, stable=True)  # (nW, N)
    order = order.gather(1, place).flatten()
    groups = int(group.max() - group.min()) + 1
    segment_ids = window_group + groups * torch.arange(len(place), device=group.device)[:, None]
    lengths = segment_ids.flatten().unique_consecutive(return_counts=True)[1].tolist()
    segments = tuple((len(list(same)), n) for n, same in groupby(lengths))
    places = place.flatten().split([count * n for count, n in segments])
    bias_index = [
        relative_position_index(part.view(count, n), window).flatten() for part, (count, n) in zip(places, segments)
    ]
    return WindowLayout(
        to_device(order, device), to_device(order.argsort(), device), segments, to_device(torch.cat(bias_index), device)
    )


def masked_layout(group: Tensor, window: int, layout: WindowLayout) -> WindowLayout:
    """Layout for attention inside groups with shapes that do not depend on the groups: the textbook's masked windows.

    It computes every pair of a window and hides those of different groups. That wastes work but is one operation
    for all windows, which is what a GPU and `torch.compile` want where windows are many and small.
    """
    window_group = group.flatten()[raster_to_windows(tuple(group.shape), window, group.device)]  # (nW, N)
    separate = window_group[:, None, :, None] != window_group[:, None, None, :]  # (nW, 1, N, N)
    return layout._replace(separate=to_device(separate, layout.bias_index.device))


def upsample(cells: Tensor, scale: int) -> Tensor:
    """(rows, columns) -> (rows * scale, columns * scale): what holds for a cell, for each token that it covers."""
    return cells.repeat_interleave(scale, 0).repeat_interleave(scale, 1)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, without waiting for it: only a copy from page-locked memory lets a GPU run on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
