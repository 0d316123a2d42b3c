"""The tests' photographs, and the settings that the data layer reads."""

import argparse
import io
import itertools
import shutil
from pathlib import Path

import torch
from PIL import Image

from util.data.decoding import MAX_PIXELS, decoded, open_image

PHOTOS = sorted((Path(__file__).parent / "data").glob("*.jpg"))


def data_args(data_path, **changes) -> argparse.Namespace:
    """The parsed arguments of a training run on the images at `data_path`."""
    values = dict(
        data_path=str(data_path),
        dataset="",
        in_chans=3,
        input_size=(32, 32),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        seed=0,
        aa="rand-m9-mstd0.5-inc1",
        color_jitter=None,
        num_workers=0,
        pin_mem=False,
        bad_images="error",
        max_bad_images=0.01,
        val_share=0.0,
        ignore_exif=False,
        max_pixels=250_000_000,
        reader="",
    )
    return argparse.Namespace(**{**values, **changes})


def photo_folder(root: Path, copies: int = 4) -> Path:
    """The photographs several times in `root/train`, in two classes."""
    for i in range(copies):
        for photo in PHOTOS:
            target = root / "train" / f"c{i % 2}" / f"{i}-{photo.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(photo, target)
    return root


def decode(data: bytes, in_chans: int, ignore_exif: bool = False, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """All pixels of an encoded image, (in_chans, h, w)."""
    return decoded(open_image(data, in_chans, ignore_exif, max_pixels))


def large_photo(width: int, height: int, enlarged: float = 1.0) -> Image.Image:
    """A mosaic of the photographs, which are first enlarged. At 2 it is about as sharp as a camera's photograph, at 1
    much sharper."""
    mosaic = Image.new("RGB", (width, height))
    photos = itertools.cycle(PHOTOS)
    rows = round(300 * enlarged)
    for top in range(0, height, rows):
        left = 0
        while left < width:
            with Image.open(next(photos)) as photo:
                tile = photo.convert("RGB").resize((rows * photo.width // photo.height, rows), Image.Resampling.BICUBIC)
            mosaic.paste(tile, (left, top))
            left += tile.width
    return mosaic


def encode_jpeg(photo: Image.Image, quality: int = 90, **options) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()
