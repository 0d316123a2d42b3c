"""Sizes of patches, grids and windows, under timm's names: plain numbers in, plain numbers out."""

from collections.abc import Sequence
from numbers import Integral

from util.errors import UserError

NUM_STAGES = 4


def to_2tuple(size: int | Sequence[int]) -> tuple[int, int]:
    """`size` as (height, width). Raises a UserError unless it is one or two whole numbers."""
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, Integral) for side in sides):
        raise UserError(f"a size is a whole number, or (height, width), got {size!r}")
    return int(sides[0]), int(sides[1])


def to_side(size: int | Sequence[int], of: str = "patches") -> int:
    """The side of a square, given as such or as (height, width)."""
    height, width = to_2tuple(size)
    if height != width:
        raise UserError(f"{of} are square, got {height}x{width}")
    return height


def stage_grids(size: tuple[int, int], patch_size: int = 1) -> list[tuple[int, int]]:
    """(rows, columns) of tokens at each of the four stages; those at the right and bottom edge may be padded."""
    return [tuple(-(-side // (patch_size << stage)) for side in size) for stage in range(NUM_STAGES)]


def stage_windows(
    grids: Sequence[tuple[int, int]],
    window_size: int | Sequence[int] | Sequence[Sequence[int]] | None,
    window_ratio: int | Sequence[int] | None = None,
    always_partition: bool | None = False,
) -> list[int]:
    """The side of each stage's windows, as timm reads these arguments, except that windows are square.

    Args:
        grids: of the stages.
        window_size: one for all stages or one for each; two numbers are one (height, width).
        window_ratio: without `window_size`, the shorter side of the first stage's grid divided by that of the windows.
        always_partition: keep windows that are larger than their grid; else they are as large as its shorter side.

    Raises:
        UserError: windows that are not square, or a value below 1.
        ValueError: not one for each stage.
    """
    if window_size is not None:
        if not isinstance(window_size, int) and len(window_size) == 2 and isinstance(window_size[0], int):
            window_size = to_side(window_size, "windows")
        windows = [to_side(size, "windows") for size in one_per_stage("window_size", window_size, len(grids))]
    else:
        ratios = one_per_stage("window_ratio", window_ratio, len(grids))
        windows = [max(1, min(grids[0]) // ratio) for ratio in ratios]
    return windows if always_partition else [min(window, *grid) for grid, window in zip(grids, windows)]


def one_per_stage(name: str, values: int | Sequence, stages: int) -> Sequence:
    """`values`, one for all stages or one for each, as one for each; raises as `stage_windows` does."""
    values = (values,) * stages if isinstance(values, int) else tuple(values)
    if len(values) != stages:
        raise ValueError(f"{name} needs one value for each of the {stages} stages, got {values}")
    if any(min(to_2tuple(value)) < 1 for value in values):
        raise UserError(f"{name} must be at least 1, got {values}")
    return values
