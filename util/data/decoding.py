"""Bytes to images: tensors of a chosen number of channels, by fast JPEG and PNG decoders or by Pillow.

How each kind of file is read, for in_chans 3 (RGB) and 1 (grey):

    JPEG                        decoded by torchvision's libjpeg, with the same pixels as Pillow's
      above a million pixels    if a crop of it becomes small, at a fraction of its size: see `EncodedJpeg`
    EXIF orientation            applied, unless `ignore_exif`: torchvision's ImageFolder does not apply it
    grey image                  in_chans 3: its value in all three channels
    RGB image                   in_chans 1: luma (ITU-R 601)
    CMYK/YCCK JPEG              converted to RGB by Pillow (no colour profile)
    palette, transparency       palette expanded, alpha dropped, as torchvision's ImageFolder does
    16 bits: PNG, grey TIFF     all bits kept: float32 in 0..1, value / 65535 (12-bit data in them reach 0.0625);
      and PGM                   so --mean and --std are in 0..1 as for 8 bits, and a set may mix both
    16-bit colour TIFF          as PNG, with the package tifffile; else refused, as Pillow would reduce it to 8 bits
    16-bit colour PPM           refused likewise
    floating-point TIFF         as a .npy array, with tifffile; else refused
    HEIC                        with the package pillow-heif
    AVIF                        if Pillow was built with it
    animation, several pages    the first frame
    1 x 1, 20,000 x 100         images like any other
    above `max_pixels`          refused before any pixel is decoded (a decompression bomb)
    truncated, empty, no image  refused
    damaged bytes inside JPEG   what libjpeg makes of them, as with Pillow: the format has no checksum

`.npy` files hold arrays (H, W, in_chans), or (H, W) for one channel; any in_chans. So do TIFF files of several bands
(also as pages of one band each), with tifffile:

    uint8                       uint8, normalised like a photo (value / 255)
    uint16, int16, int32, float16, float32, float64
                                float32 in the file's own units: --mean and --std are in these units too
    NaN, infinity               refused

A data set has one pixel type, that of its first image: see `PixelType`.
"""

import enum
import functools
import io
import math
import re
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, features

from util.data.jpeg import TURNS, Box, JpegHeader, decode_reduced, read_header, reduction, stored_box, turn
from util.errors import UserError

try:  # the operator itself: the function around it warns on every call that it will move elsewhere
    import torchvision.io  # noqa: F401 - registers the operator

    decode_jpeg, decode_png = torch.ops.image.decode_jpeg, torch.ops.image.decode_png
except (ImportError, AttributeError):  # without it, Pillow decodes everything (except 16-bit colour)
    decode_jpeg = decode_png = None

try:
    import pillow_heif
except ImportError:
    pillow_heif = None
try:
    import tifffile
except ImportError:
    tifffile = None

MAX_PIXELS = 250_000_000  # 0.75 GB as RGB; a scan of A3 at 900 dpi has 160 million
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit; ours is checked before it decodes
# Pillow reads other formats too; one of them (EPS) would start another program.
PILLOW_FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]
IMAGE_EXTENSIONS = tuple(".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .npy".split())
if features.check("avif"):
    PILLOW_FORMATS, IMAGE_EXTENSIONS = [*PILLOW_FORMATS, "AVIF"], (*IMAGE_EXTENSIONS, ".avif")
if pillow_heif is not None:
    pillow_heif.register_heif_opener()
    PILLOW_FORMATS, IMAGE_EXTENSIONS = [*PILLOW_FORMATS, "HEIF"], (*IMAGE_EXTENSIONS, ".heic", ".heif")
DEEP_MODES = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's, with one number of more than 8 bits per pixel
BITS_PER_SAMPLE = 258  # TIFF's tag
TIFF_SIGNS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ARRAY_TYPES = ("uint8", "uint16", "int16", "int32", "float16", "float32", "float64")


class BadImageError(UserError):
    """An image that cannot be used. The message says why."""


class EncodedJpeg:
    """A JPEG photograph that is not decoded yet, as a crop of it may need fewer pixels than all.

    shape: (in_chans, height, width), upright. dtype: of its pixels. orientation: EXIF's, by which they are turned.
    """

    dtype = torch.uint8

    def __init__(self, data: bytes, header: JpegHeader, in_chans: int, ignore_exif: bool):
        self._data, self._header = data, header
        self.orientation = 1 if ignore_exif else header.orientation
        sides = (header.height, header.width)
        self.shape = (in_chans, *(reversed(sides) if TURNS[self.orientation][0] else sides))

    @functools.cached_property
    def pixels(self) -> torch.Tensor:
        """All pixels, of shape `shape`. Raises BadImageError."""
        in_chans = self.shape[0]
        # Grey from colour is Pillow's work: libjpeg would skip clamping the colours first, which shows.
        if decode_jpeg is not None and self._header.components in (1, in_chans):
            try:
                encoded = torch.frombuffer(bytearray(self._data), dtype=torch.uint8)
                return turn(decode_jpeg(encoded, in_chans, False), self.orientation)  # mode: 1 grey, 3 RGB; as stored
            except RuntimeError:  # Pillow may still read it, or give the reason
                pass
        image = _decode_with_pillow(self._data, in_chans, ignore_exif=True, max_pixels=math.prod(self.shape[1:]))
        return turn(image, self.orientation)

    def crop(self, box: Box, size: tuple[int, int]) -> torch.Tensor | None:
        """The `box` of the image, resized to `size`, if that needs fewer than all pixels; else None.

        See `util.data.jpeg.reduction`. Decoding all pixels would give other values: the mean absolute difference is
        0.4/255 to 2/255, most for sharp photographs at 1/8.
        """
        factor = reduction(math.prod(self.shape[1:]), box, size)
        if factor == 1:
            return None
        stored = stored_box(box, self.shape[1:], self.orientation)
        stored_size = size[::-1] if TURNS[self.orientation][0] else size
        try:
            image = decode_reduced(self._data, self.shape[0], factor, stored, stored_size)
        except Exception:  # Pillow raises nearly anything; decoding all pixels gives the reason
            return None
        return turn(image, self.orientation)


def decoded(image: "torch.Tensor | EncodedJpeg") -> torch.Tensor:
    """The pixels of what `open_image` returned. Raises BadImageError."""
    return image.pixels if isinstance(image, EncodedJpeg) else image


def open_image(
    data: bytes, in_chans: int, ignore_exif: bool = False, max_pixels: int = MAX_PIXELS
) -> torch.Tensor | EncodedJpeg:
    """An encoded image or a `.npy` array as a tensor (in_chans, h, w), see the module's table; JPEGs stay encoded.

    Pictures of 16 bits are uint16 here, which tells them from arrays in units of their own: see `PixelType`.
    In memory the channels are the fastest axis, as resizing is fastest on that layout. `ignore_exif` leaves the pixels
    as they are stored, whatever the EXIF orientation says. Raises BadImageError.
    """
    if data[:6] == b"\x93NUMPY":
        return _decode_array(data, in_chans, max_pixels)
    if not data:
        raise BadImageError("the file is empty")
    if in_chans not in (1, 3):
        if data[:4] in TIFF_SIGNS:
            return _decode_tiff(data, in_chans, max_pixels)
        raise BadImageError(
            f"images with {in_chans} channels are read from TIFF and .npy files, (H, W, {in_chans}), or with --reader"
        )
    if _is_deep_png(data) and decode_png is not None:
        return _decode_deep_png(data, in_chans, ignore_exif, max_pixels)
    header = read_header(data)
    if header is not None:
        _check_pixels(header.height, header.width, max_pixels)
        if header.components in (1, 3) and header.height * header.width > 0:
            return EncodedJpeg(data, header, in_chans, ignore_exif)
    return _decode_with_pillow(data, in_chans, ignore_exif, max_pixels)


def from_pillow(
    image: Image.Image, in_chans: int, ignore_exif: bool = False, max_pixels: int = MAX_PIXELS
) -> torch.Tensor:
    """As `open_image`, for a Pillow image and in_chans 1 or 3: a tensor (in_chans, h, w). Raises BadImageError."""
    _check_pixels(image.height, image.width, max_pixels)
    if not ignore_exif:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise BadImageError("32-bit float pixels have no known range: pip install tifffile, or store it as .npy")
    if image.mode in DEEP_MODES:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImageError("integer pixels outside 0..65535; store the image as .npy")
        return torch.from_numpy(values.astype(np.uint16))[None].expand(in_chans, -1, -1)
    array = np.array(image.convert("RGB" if in_chans == 3 else "L"))
    return torch.from_numpy(array.reshape(*array.shape[:2], in_chans)).permute(2, 0, 1)


def _decode_with_pillow(data: bytes, in_chans: int, ignore_exif: bool, max_pixels: int) -> torch.Tensor:
    try:
        with warnings.catch_warnings():  # about bombs below our limit, transparency, odd metadata
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
                loses_bits = _has_more_bits(image, data) and image.mode not in DEEP_MODES
                if image.format == "TIFF" and tifffile is not None and (loses_bits or image.mode == "F"):
                    return _decode_tiff(data, in_chans, max_pixels)
                if loses_bits:
                    raise BadImageError(
                        "16 bits per colour in a file that Pillow reads as 8: use a grey image, PNG or .npy, or for "
                        "TIFF pip install tifffile"
                    )
                return from_pillow(image, in_chans, ignore_exif, max_pixels)
    except BadImageError:
        raise
    except Image.UnidentifiedImageError:
        if data[:4] in TIFF_SIGNS:  # of a kind that Pillow does not know, such as several bands
            return _decode_tiff(data, in_chans, max_pixels)
        raise BadImageError(f"not an image in a known format ({', '.join(PILLOW_FORMATS)})") from None
    except Exception as error:  # damaged files make Pillow's plugins raise nearly anything
        raise BadImageError(f"{type(error).__name__}: {error}") from error


def _decode_tiff(data: bytes, in_chans: int, max_pixels: int) -> torch.Tensor:
    """The first image of a TIFF file, by tifffile: its bands, or as many pages as there are channels."""
    if tifffile is None:
        raise BadImageError("this kind of TIFF file needs the package tifffile: pip install tifffile")
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            series = file.series[0]
            sizes = {axis: size for axis, size in zip(series.axes, series.shape) if axis in "YX" or size > 1}
            bands = [axis for axis in sizes if axis not in "YX"]
            if not {"Y", "X"} <= sizes.keys() or len(bands) > 1:
                raise BadImageError(f"the axes of the TIFF file are {sizes}: an image has Y, X and at most one more")
            _check_pixels(sizes["Y"], sizes["X"], max_pixels)
            parts = [part for page in series.pages for part in zip(page.dataoffsets, page.databytecounts)]
            if max(offset + count for offset, count in parts) > len(data):  # tifffile would make them zeros
                raise BadImageError("the TIFF file is truncated")
            array = series.asarray().reshape(list(sizes.values()))
    except BadImageError:
        raise
    except Exception as error:  # damaged files make it raise nearly anything
        raise BadImageError(f"{type(error).__name__}: {error}") from error
    array = array.transpose([list(sizes).index(axis) for axis in ["Y", "X", *bands]])
    if bands == ["S"] and in_chans == 3 and array.shape[2] == 4:
        array = array[:, :, :3]  # without alpha
    elif bands not in ([], ["S"]) and array.shape[2] != in_chans:
        if in_chans > 1:
            height, width, pages = array.shape
            message = (
                f"the TIFF file has {pages} pages of {height} x {width} pixels, {in_chans} are needed "
                f"(--in_chans {in_chans})"
            )
            if width == in_chans:  # what tifffile makes of (H, W, bands) unless told otherwise
                message += (
                    f". If it was written from an array ({pages}, {height}, {in_chans}), write it with "
                    'tifffile.imwrite(..., planarconfig="contig", photometric="minisblack")'
                )
            raise BadImageError(message)
        array = array[:, :, :1]  # pages that are not bands: the first
    image = image_of(array, in_chans, max_pixels)
    # With one or three channels it is a picture, like a 16-bit PNG.
    return image.to(torch.uint16) if in_chans in (1, 3) and array.dtype == np.uint16 else image


def _is_deep_png(data: bytes) -> bool:
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10"  # the bits per sample in its header


def _decode_deep_png(data: bytes, in_chans: int, ignore_exif: bool, max_pixels: int) -> torch.Tensor:
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    _check_pixels(height, width, max_pixels)
    colour = data[25] in (2, 6)  # RGB, RGBA; else grey, with alpha or without
    try:
        # mode: 1 grey, 3 RGB; alpha is dropped
        image = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), 3 if colour else 1, not ignore_exif)
    except RuntimeError as error:
        raise BadImageError(f"damaged PNG: {' '.join(str(error).split())[-200:]}") from None
    if colour and in_chans == 1:
        red, green, blue = image.to(torch.int64)
        image = ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16)[None].to(torch.uint16)  # Pillow's luma
    return image.expand(in_chans, -1, -1)


def _has_more_bits(image: Image.Image, data: bytes) -> bool:
    """Whether a file has more than the 8 bits per colour that Pillow gives."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (8,))) > 8
    if image.format == "PPM":
        header = re.match(rb"P[36](?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+(\d+)", data[:1000])
        return header is not None and int(header[1]) > 255
    return _is_deep_png(data)


class PixelType(enum.Enum):
    """The type of a data set's pixels: that of its first image."""

    BYTES = torch.uint8  # 8 bits; pictures of 16 are reduced to 8
    DEEP_PICTURES = torch.uint16  # float32 in 0..1; pictures of 8 bits too
    ARRAYS = torch.float32  # in units of their own, which no picture has

    @property
    def dtype(self) -> torch.dtype:
        """Of the images that `convert` returns."""
        return torch.uint8 if self is PixelType.BYTES else torch.float32

    def convert(self, image: torch.Tensor | EncodedJpeg) -> torch.Tensor | EncodedJpeg:
        """What `open_image` returned, as an image of this type. Raises BadImageError when it cannot be one."""
        if self is not PixelType.BYTES:
            image = decoded(image)
        if self is not PixelType.ARRAYS and image.dtype == torch.uint16:
            unit = image.to(torch.float32) / 65535
            return unit if self is PixelType.DEEP_PICTURES else (unit * 255).round().to(torch.uint8)
        if self is PixelType.DEEP_PICTURES and image.dtype == torch.uint8:
            return image.to(torch.float32) / 255
        if image.dtype != self.value:
            raise BadImageError(
                f"its pixels are {image.dtype}, those of the first image {self.value}; use one type for all"
            )
        return image


def _decode_array(data: bytes, in_chans: int, max_pixels: int) -> torch.Tensor:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError, SyntaxError) as error:
        raise BadImageError(f"damaged .npy file: {error}") from error
    return image_of(array, in_chans, max_pixels)


def image_of(array: np.ndarray, in_chans: int, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """An array (H, W, in_chans), or (H, W) for one channel, as an image (in_chans, H, W): uint8, else float32.

    Raises BadImageError for another shape or type, and for values that are not finite.
    """
    if array.ndim == 2 and in_chans == 1:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] != in_chans or 0 in array.shape:
        raise BadImageError(f"the array has shape {array.shape}, (H, W, {in_chans}) is needed (--in_chans {in_chans})")
    _check_pixels(*array.shape[:2], max_pixels)
    if array.dtype.name not in ARRAY_TYPES:
        raise BadImageError(f"the array's type is {array.dtype}, one of {', '.join(ARRAY_TYPES)} is needed")
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise BadImageError("the array holds values that are not finite (in float32)")
    # Writable, as PyTorch wants it; a copy if a user's reader returns another kind.
    return torch.from_numpy(np.require(array, requirements="CW")).permute(2, 0, 1)


def _check_pixels(height: int, width: int, most: int) -> None:
    if height * width > most:
        raise BadImageError(f"{width} x {height} = {height * width} pixels are more than --max_pixels {most} allows")
