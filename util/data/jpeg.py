"""JPEG files: their headers, the EXIF orientation, and decoding a part of one at a fraction of its size."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

ORIENTATION = 0x0112  # EXIF's tag
# EXIF orientation -> what makes the stored pixels upright: whether rows and columns are transposed, and then whether
# the order of the rows and that of the columns is reversed.
TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
# n -> pixels of an image from which decoding at 1 / n of each side is faster (`tests/benchmark.py data`): libjpeg does
# that at a fraction of the cost of all pixels. The saving grows with the image, but half of decoding, the entropy
# coding, remains; and Pillow, which is needed for it, resizes more slowly than PyTorch.
REDUCTIONS = {8: 1_000_000, 4: 1_000_000, 2: 4_000_000}

Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class JpegHeader:
    """height, width: as stored, before it is turned upright; components: 1 grey, 3 colour, 4 CMYK."""

    height: int
    width: int
    components: int
    orientation: int = 1


def read_header(data: bytes) -> JpegHeader | None:
    """The frame header of a JPEG and its EXIF orientation; None if `data` has no such header."""
    if data[:2] != b"\xff\xd8":
        return None
    position, orientation = 2, None
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        content = data[position + 4 : position + 2 + length]
        if marker in (0xFF, 0x01) or 0xD0 <= marker <= 0xD7:  # padding; markers without content
            position += 1 if marker == 0xFF else 2
            continue
        if marker < 0xC0 or marker in (0xD8, 0xD9):  # not a marker, or an image that begins or ends here
            return None
        if marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = int.from_bytes(content[1:3], "big"), int.from_bytes(content[3:5], "big")
            return JpegHeader(height, width, data[position + 9], orientation or 1)
        if orientation is None and marker == 0xE1 and content[:6] == b"Exif\0\0":  # the first one applies
            orientation = _orientation(content)
        position += 2 + length
    return None


def _orientation(exif: bytes) -> int:
    tags = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tags.load(exif)
            orientation = tags.get(ORIENTATION, 1)
    except Exception:  # damaged metadata make Pillow raise nearly anything
        return 1
    return orientation if orientation in TURNS else 1


def turn(image: torch.Tensor, orientation: int) -> torch.Tensor:
    """Stored pixels (C, H, W) with an EXIF orientation, made upright."""
    transposed, *reversed_axes = TURNS[orientation]
    image = image.transpose(1, 2) if transposed else image
    axes = [axis for axis, is_reversed in zip((1, 2), reversed_axes) if is_reversed]
    return image.flip(axes) if axes else image


def stored_box(box: Box, upright: tuple[int, int], orientation: int) -> Box:
    """Where a box of the upright image, which has (height, width) `upright`, lies in the stored one."""
    top, left, height, width = box
    transposed, rows_reversed, columns_reversed = TURNS[orientation]
    top = upright[0] - top - height if rows_reversed else top
    left = upright[1] - left - width if columns_reversed else left
    return (left, top, width, height) if transposed else (top, left, height, width)


def reduction(pixels: int, box: Box, size: tuple[int, int]) -> int:
    """The factor by which both sides of an image of so many pixels are reduced in decoding; 1: not at all.

    As large as possible while `box` keeps at least the pixels of each side of `size`, to which it will be resized; and
    only if that is faster.
    """
    most = min(box[2] / size[0], box[3] / size[1])
    return next((factor for factor, least in REDUCTIONS.items() if factor <= most and pixels >= least), 1)


def decode_reduced(data: bytes, in_chans: int, factor: int, box: Box, size: tuple[int, int]) -> torch.Tensor:
    """The `box` of an image as stored, resized to `size` (bicubic, antialiased), from 1 / `factor` of rows and columns.

    The box need not lie on the grid of the remaining pixels: its edges are at fractions of them. Returns (in_chans,
    *size) uint8. Raises whatever Pillow raises on a damaged file.
    """
    top, left, height, width = box
    with warnings.catch_warnings():  # about odd metadata
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            sides = image.size
            image.draft(None, (image.width // factor, image.height // factor))
            if image.size != tuple(-(-side // factor) for side in sides):
                raise ValueError(f"decoded at {image.size} instead of 1 / {factor} of {sides}")
            edges = left / factor, top / factor, (left + width) / factor, (top + height) / factor
            image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=edges)
    array = np.array(image.convert("RGB" if in_chans == 3 else "L"))
    return torch.from_numpy(array.reshape(*size, in_chans)).permute(2, 0, 1)
