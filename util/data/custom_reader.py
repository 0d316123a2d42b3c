"""`--reader PACKAGE.MODULE:FUNCTION`: the user's own function that reads image files, for other formats.

The function takes a path and returns an array (H, W, in_chans), or (H, W) for one channel, as a `.npy` file would hold
it. Its attribute `extensions`, if it has one, names the files of a folder that it reads: `read.extensions = (".dcm",)`.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from util.data.decoding import IMAGE_EXTENSIONS, BadImageError, image_of
from util.errors import UserError


def find_reader(name: str) -> Callable[[str], Any]:
    """The function that `name` ('package.module:function') names.

    Raises:
        UserError: it cannot be imported; says why.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--reader {name} cannot be imported ({error}): give PACKAGE.MODULE:FUNCTION, of a module in the folder of "
            "the script or on PYTHONPATH"
        ) from error


def extensions_of(reader: str) -> tuple[str, ...]:
    """The endings of image files' names, in lower case; `reader` is '' for our own decoders."""
    return tuple(getattr(find_reader(reader), "extensions", IMAGE_EXTENSIONS)) if reader else IMAGE_EXTENSIONS


def read_by(reader: str, path: str, in_chans: int, max_pixels: int) -> torch.Tensor:
    """The image (in_chans, H, W) at `path` as `reader` reads it. Raises BadImageError."""
    try:
        array = find_reader(reader)(path)
        array = array.numpy() if isinstance(array, torch.Tensor) else array
    except Exception as error:  # whatever it raises
        raise BadImageError(f"--reader {reader}: {type(error).__name__}: {error}") from error
    return image_of(array, in_chans, max_pixels)
