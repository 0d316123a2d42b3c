"""What kind of images there are, from the headers of some of them: for settings that are not given."""

import logging
import math
from collections import Counter
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image

from util.data.custom_reader import find_reader
from util.data.decoding import DEEP_MODES, PILLOW_FORMATS, tifffile
from util.data.sources import Source
from util.errors import UserError

logger = logging.getLogger(__name__)

SAMPLE = 100  # images whose headers are read
MOST_CHANNELS_FIRST = 32  # more may be rows of pixels
GREY_MODES = ("1", "L", "LA", "La", *DEEP_MODES)


@dataclass(frozen=True)
class Survey:
    """What the images of a data set have in common; None if that is unknown, or they differ."""

    images: int
    in_chans: int | None
    size: tuple[int, int] | None  # height, width
    longest_side: int | None  # of any image that was looked at


def survey_images(source: Source, reader: str = "", in_chans: int | None = None) -> Survey:
    """Look at images from all over `source`; those that cannot be read are left for others to report.

    Without `in_chans`, raises UserError for arrays that have different numbers of channels, or seem to have them
    first.
    """
    count = len(source)
    shapes = []
    for number in range(min(SAMPLE, count)):
        try:
            image = number * count // min(SAMPLE, count)
            file = source.file(image)
            shape = find_reader(reader)(file).shape if reader else shape_in_header(file, source.path(image))
            height, width, channels = (*shape, 1) if len(shape) == 2 else shape
            shapes.append((height, width, channels))
        except Exception:  # not a file (in timm's data sets), an array that is not an image, whatever Pillow raises
            continue
    channels = Counter(shape[2] for shape in shapes)
    if in_chans is None and len(channels) > 1 and set(channels) != {1, 3}:
        found = ", ".join(f"{number} with {name}" for name, number in sorted(channels.items()))
        raise UserError(
            f"the images have different numbers of channels: of {len(shapes)} that were looked at, {found}; keep one "
            "kind, or choose it with --in_chans"
        )
    if in_chans is None and shapes and all(channels_come_first(shape) for shape in shapes):
        height, width, number = shapes[0]
        raise UserError(
            f"the images look like arrays (channels, H, W) = {shapes[0]}, and (H, W, channels) is needed: transpose "
            f"them; or if they are {number} channels of {height} x {width} pixels, give --in_chans {number}"
        )
    sizes = {shape[:2] for shape in shapes}
    return Survey(
        images=count,
        in_chans=3 if set(channels) == {1, 3} else next(iter(channels), None),
        size=sizes.pop() if len(sizes) == 1 else None,
        longest_side=max((max(shape[:2]) for shape in shapes), default=None),
    )


def channels_come_first(shape: tuple[int, int, int]) -> bool:
    """Whether an array taken for (height, width, channels) is rather (channels, height, width).

    The first axis is then short, and the others are sides, neither more than twice the other: not so in images of
    64 x 96 pixels with 200 bands.
    """
    first, second, third = shape
    short = first <= MOST_CHANNELS_FIRST and first < second and 2 * first <= third
    return short and max(second, third) <= 2 * min(second, third)


def shape_in_header(file: str | BinaryIO, name: str) -> tuple[int, int, int]:
    """(height, width, channels) of an image file, without decoding it; 1 channel is grey, 3 is colour of any kind.

    `file` is its path or its content, `name` ends like the file's name.
    """
    if name.lower().endswith(".npy"):
        shape = np.load(file, mmap_mode="r" if isinstance(file, str) else None, allow_pickle=False).shape
        return (*shape, 1) if len(shape) == 2 else shape
    if name.lower().endswith((".tif", ".tiff")) and tifffile is not None:
        with tifffile.TiffFile(file) as tiff:
            sizes = dict(zip(tiff.series[0].axes, tiff.series[0].shape, strict=True))
        height, width = sizes.pop("Y"), sizes.pop("X")
        bands = math.prod(sizes.values())
        return height, width, 3 if "S" in sizes and bands == 4 else bands
    with Image.open(file, formats=PILLOW_FORMATS) as image:
        return image.height, image.width, 1 if image.mode in GREY_MODES else 3
