"""Unusual, damaged and hostile images: each behaves as util/data/decoding.py documents, alone and in a data set.

MIXMAE_STRESS=1 counts 1% bad images among 10,000 instead of 1,000.
"""

import argparse
import io
import logging
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import PHOTOS, data_args, decode
from PIL import Image, ImageOps

from util.data import decoding
from util.data.datasets import BadImageError, build_dataset, build_loader
from util.data.decoding import MAX_PIXELS, PixelType
from util.data.transforms import eval_transform, finetune_transform, pretrain_transform
from util.errors import UserError

CPU = torch.device("cpu")
IMAGES = 10_000 if os.environ.get("MIXMAE_STRESS") == "1" else 1_000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXMAE_CACHE", str(tmp_path / "cache"))


def encode(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def pixels(img: torch.Tensor) -> np.ndarray:
    return img.permute(1, 2, 0).numpy()


def photo(size=(60, 40)) -> Image.Image:
    return Image.open(PHOTOS[1]).convert("RGB").resize(size)


# --- images that work


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
def test_photographs_decode_to_pillows_pixels(path):
    data = path.read_bytes()
    assert np.array_equal(pixels(decode(data, 3)), np.array(Image.open(path).convert("RGB")))
    assert np.array_equal(pixels(decode(data, 1))[:, :, 0], np.array(Image.open(path).convert("L")))


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
def test_without_torchvisions_decoder_pillow_decodes(path, monkeypatch):
    data = path.read_bytes()
    expected = decode(data, 3)
    monkeypatch.setattr(decoding, "decode_jpeg", None)
    assert torch.equal(decode(data, 3), expected)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(), form, exif=exif)
    image = decode(data, 3)
    assert image.shape == ((3, 40, 60) if orientation < 5 else (3, 60, 40))
    assert np.array_equal(pixels(image), np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_can_be_ignored(form, orientation, in_chans):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(), form, exif=exif)
    stored = np.array(Image.open(io.BytesIO(data)).convert("RGB" if in_chans == 3 else "L"))
    assert np.array_equal(pixels(decode(data, in_chans, ignore_exif=True)), stored.reshape(40, 60, in_chans))


def test_cmyk_jpeg_becomes_rgb():
    data = encode(photo().convert("CMYK"), "JPEG", quality=95)
    image = decode(data, 3)
    assert np.array_equal(pixels(image), np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(pixels(image).astype(int) - np.array(photo())).mean() < 12


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_palettes_are_expanded_and_transparency_dropped(form):
    image = photo().quantize(16)
    data = encode(image, form, transparency=0)
    assert np.array_equal(pixels(decode(data, 3)), np.array(image.convert("RGB")))
    with_alpha = photo()
    with_alpha.putalpha(7)
    assert np.array_equal(pixels(decode(encode(with_alpha, "PNG"), 3)), np.array(photo()))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_are_kept_unless_others_have_8(form):
    values = np.array([[0, 128, 129, 257], [25700, 32768, 65406, 65535]], np.uint16)
    image = decode(encode(Image.fromarray(values), form), 1)
    assert image.dtype == torch.uint16 and image[0].tolist() == values.tolist()
    assert decode(encode(Image.fromarray(values), form), 3)[2].tolist() == image[0].tolist()
    reduced = PixelType.BYTES.convert(image)
    assert reduced.dtype == torch.uint8 and reduced[0].tolist() == [[0, 0, 1, 1], [100, 128, 254, 255]]
    assert np.array_equal(PixelType.DEEP_PICTURES.convert(image)[0], (values / 65535).astype(np.float32))
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    assert torch.equal(PixelType.BYTES.convert(every).int(), (every.int() + 128) // 257)


def deep_png(values: np.ndarray, colour: int, exif: bytes = b"") -> bytes:
    """A 16-bit PNG of (h, w, channels) values; colour type 0 grey, 2 RGB, 4 grey + alpha, 6 RGB + alpha."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", header), *([(b"eXIf", exif)] if exif else []), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


@pytest.mark.parametrize("colour, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_pngs_of_all_kinds_keep_their_bits(colour, channels):
    """Pillow reads those in colour with 8 bits, those with alpha too."""
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    data = deep_png(values, colour)
    rgb = decode(data, 3)
    expected = values[..., :3] if channels >= 3 else values[..., :1].repeat(3, 2)
    assert rgb.dtype == torch.uint16 and np.array_equal(rgb.permute(1, 2, 0), expected)
    assert np.abs(decode(data, 1)[0].numpy() - expected @ [0.299, 0.587, 0.114]).max() < 1
    with pytest.raises(BadImageError, match="damaged PNG"):
        decode(data[:70], 3)
    turned = deep_png(values, colour, exif=Image.Exif.tobytes(sideways())[6:])
    assert np.array_equal(decode(turned, 3).permute(1, 2, 0), np.rot90(expected, -1))
    assert np.array_equal(decode(turned, 3, ignore_exif=True).permute(1, 2, 0), expected)


def sideways() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_bombs_of_16_bits_are_refused_before_decoding():
    data = bytearray(deep_png(np.zeros((1, 1, 3), np.uint16), 2))
    data[16:24] = struct.pack(">II", 1_000_000, 1_000_000)
    with pytest.raises(BadImageError, match="more than --max_pixels 250000000 allows"):
        decode(bytes(data), 3)


def deep_tiff(values: np.ndarray) -> bytes:
    """A 16-bit RGB TIFF of (h, w, 3) values."""
    height, width = values.shape[:2]
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, 140), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, values.nbytes), (284, 3, 1, 1)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0\x08\0\0\0" + directory + struct.pack("<3H", 16, 16, 16) + values.astype("<u2").tobytes()


def test_16_bits_that_would_be_lost_are_refused(monkeypatch):
    monkeypatch.setattr(decoding, "tifffile", None)  # which reads them
    values = np.full((4, 4, 3), 1000, np.uint16)
    assert Image.open(io.BytesIO(deep_tiff(values))).mode == "RGB"
    ppm = b"P6\n# made by hand\n4 4\n65535\n" + values.astype(">u2").tobytes()
    for data in (deep_tiff(values), ppm):
        with pytest.raises(BadImageError, match="16 bits per colour in a file that Pillow reads as 8"):
            decode(data, 3)
    pgm = b"P5 4 4 65535\n" + values[..., 0].astype(">u2").tobytes()
    assert decode(pgm, 1).dtype == torch.uint16 and decode(pgm, 1).unique().tolist() == [1000]


def mixed(root: Path, *names: str) -> argparse.Namespace:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for number, name in enumerate(names):
        (root / "train").mkdir(parents=True, exist_ok=True)
        path = root / "train" / f"{number}.{'npy' if name == 'array' else 'png'}"
        if name == "array":
            np.save(path, np.zeros((16, 16, 1), np.float32))
        else:
            Image.fromarray(values.astype(np.uint8) if name == "8" else values * 257).save(path)
    return data_args(root, in_chans=1)


def test_sets_that_mix_8_and_16_bits(tmp_path, caplog):
    """The same picture in 8 and in 16 bits is the same image, whichever is first."""
    for order, dtype in ((("8", "16", "16"), torch.uint8), (("16", "8"), torch.float32)):
        caplog.clear()
        dataset = build_dataset(mixed(tmp_path / order[0], *order), "train", lambda image: image)
        images = [dataset[(0, i)][0] for i in range(len(order))]
        assert all(image.dtype == dtype for image in images)
        assert all(torch.allclose(image, images[0], rtol=1e-6) for image in images)
        assert caplog.text.count("1.png has 16 bits and is reduced to 8") == (dtype == torch.uint8)
    for number, order in enumerate((("16", "array"), ("array", "16"), ("array", "8"), ("8", "array"))):
        dataset = build_dataset(mixed(tmp_path / f"a{number}", *order), "train", lambda image: image)
        with pytest.raises(BadImageError, match="use one type for all"):
            dataset[(0, 1)]


def test_12_bits_in_files_of_16_keep_their_levels(tmp_path):
    """They kept 17 of 255."""
    (tmp_path / "train").mkdir()
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "train" / "a.png")
    args = data_args(tmp_path, in_chans=1, input_size=(64, 64))
    image, _ = build_dataset(args, "train", lambda image: image)[(0, 0)]
    assert len(image.unique()) == 4096 and 0 <= image.min() and image.max() == np.float32(4095 / 65535)
    for transform in (pretrain_transform(args), finetune_transform(args), eval_transform(args)):
        image, _ = build_dataset(args, "train", transform)[(0, 0)]
        assert image.dtype == torch.float32 and len(image.unique()) > 1000
    colour = data_args(tmp_path, input_size=(64, 64))  # with RandAugment, which is defined for 8 bits
    image, _ = build_dataset(colour, "train", finetune_transform(colour))[(0, 0)]
    assert image.shape == (3, 64, 64) and len(image.unique()) > 1000


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(form):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    image = decode(encode(frames[0], form, save_all=True, append_images=frames[1:]), 3)
    assert image.shape == (3, 10, 20) and image[0].min() > 240 and image[2].max() < 10


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
@pytest.mark.parametrize("mode, in_chans", [("L", 3), ("L", 1), ("RGB", 1)])
def test_grey_and_colour_convert_into_each_other(form, mode, in_chans):
    colour = (30, 200, 90) if mode == "RGB" else 120
    image = decode(encode(Image.new(mode, (16, 16), colour), form), in_chans)
    assert image.shape == (in_chans, 16, 16)
    assert (image.int() - (137 if mode == "RGB" else 120)).abs().max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (20_000, 3), (1, 20_000)])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_very_small_and_very_long_images_are_images(tmp_path, size, form):
    (tmp_path / f"a.{form.lower()}").write_bytes(encode(Image.new("RGB", size, (10, 20, 30)), form))
    args = data_args(tmp_path, input_size=(224, 224))
    for transform in (pretrain_transform(args), eval_transform(args)):
        image, _ = build_dataset(args, "train", transform)[(0, 0)]
        assert image.shape == (3, 224, 224)
        assert (image.float().mean((1, 2)) - torch.tensor([10.0, 20, 30])).abs().max() < 3


# --- images that are refused


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width x height pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_bomb(width: int, height: int) -> bytes:
    data = bytearray(encode(Image.new("RGB", (16, 16)), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def array_file(array: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


class Payload:
    """Unpickling this would create a file."""

    path = "unpickled"

    def __reduce__(self):
        return open, (self.path, "w")


JPEG = encode(photo(), "JPEG")
PNG = encode(photo(), "PNG")
REFUSED = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html>404 Not Found</html>", "not an image in a known format"),
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "JPEG header only": (JPEG[:20], "not an image in a known format|truncated|No more data|Truncated"),
    "truncated PNG": (PNG[: len(PNG) // 2], "truncated"),
    "truncated photo": (PHOTOS[0].read_bytes()[:20_000], "truncated"),
    "PNG bomb": (png_bomb(50_000, 50_000), "pixels"),
    "smaller PNG bomb": (
        png_bomb(25_000, 10_001),
        f"25000 x 10001 = 250025000 pixels are more than --max_pixels {MAX_PIXELS} allows",
    ),
    "JPEG bomb": (jpeg_bomb(60_000, 60_000), "60000 x 60000 = 3600000000 pixels are more than --max_pixels"),
    "float TIFF": (encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "32-bit float pixels"),
    "32-bit TIFF": (encode(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "outside 0..65535"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
    "truncated array": (array_file(np.zeros((9, 9, 3)))[:200], "damaged .npy file"),
    "array header only": (b"\x93NUMPY\x01\x00", "damaged .npy file"),
    "pickled array": (array_file(np.array([Payload()], object), allow_pickle=True), "damaged .npy file"),
    "channels first": (array_file(np.zeros((3, 9, 9))), r"shape \(3, 9, 9\), \(H, W, 3\) is needed"),
    "no pixels": (array_file(np.zeros((0, 9, 3))), "is needed"),
    "complex array": (array_file(np.zeros((9, 9, 3), complex)), "type is complex128"),
    "not a number": (array_file(np.full((9, 9, 3), np.nan)), "not finite"),
    "beyond float32": (array_file(np.full((9, 9, 3), 1e300)), "not finite"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_bad_images_are_refused_with_the_reason(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decoding, "tifffile", None)  # which reads floats
    data, message = REFUSED[kind]
    started = time.monotonic()
    with pytest.raises(BadImageError, match=message):
        decode(data, 3)
    assert time.monotonic() - started < 2 and issubclass(BadImageError, UserError)
    assert not list(tmp_path.iterdir())  # nothing was unpickled or written


def test_an_ordinary_scan_is_within_the_limit_and_another_limit_may_be_given(tmp_path):
    scan = png_bomb(12_000, 9_000)  # a header without pixels, so what is wrong is found later
    with pytest.raises(BadImageError) as raised:
        decode(scan, 3)
    assert "pixels" not in str(raised.value)
    with pytest.raises(BadImageError, match="12000 x 9000 = 108000000 pixels are more than --max_pixels 1000000 "):
        decode(scan, 3, max_pixels=1_000_000)
    folder_with_bad(tmp_path / "data", 4, {2: encode(photo((11, 10)), "JPEG")})
    dataset = build_dataset(data_args(tmp_path / "data", max_pixels=100), "train", lambda image: image)
    assert dataset[(0, 1)][0].shape == (3, 8, 8)
    with pytest.raises(BadImageError, match=r"00002\.jpg.*110 pixels are more than --max_pixels 100"):
        dataset[(0, 2)]


def test_random_damage_is_an_image_or_a_bad_image():
    generator = np.random.default_rng(0)
    for data in (JPEG, PNG, encode(photo(), "WEBP"), encode(photo(), "GIF"), encode(photo(), "TIFF")):
        for _ in range(60):
            damaged = bytearray(data)
            for position in generator.integers(0, len(data), 3):
                damaged[position] = generator.integers(0, 256)
            try:
                assert decode(bytes(damaged), 3).dtype == torch.uint8
            except BadImageError as error:
                assert str(error)


# --- in a data set


def folder_with_bad(root, images: int, bad: dict[int, bytes]):
    """`images` small JPEG files 00000.jpg ..., those in `bad` with that content."""
    root.mkdir()
    good = encode(photo((8, 8)), "JPEG")
    for i in range(images):
        (root / f"{i:05d}.jpg").write_bytes(bad.get(i, good))
    return root


def run_epochs(dataset, args, epochs=2, batch_size=16):
    keys = [(epoch, i) for epoch in range(epochs) for i in range(len(dataset))]
    batches = [keys[k : k + batch_size] for k in range(0, len(keys), batch_size)]
    return torch.cat([images for images, _ in build_loader(dataset, batches, args, CPU)])


def test_by_default_a_bad_image_is_an_error_that_names_it(tmp_path):
    args = data_args(folder_with_bad(tmp_path / "data", 8, {5: b"", 0: JPEG[:100]}))
    with pytest.raises(BadImageError, match=r"cannot use image '.*/00000.jpg': .*[Tt]runcated"):
        build_dataset(args, "train", eval_transform(args))  # the first one already when building
    (tmp_path / "data" / "00000.jpg").write_bytes(JPEG)
    dataset = build_dataset(args, "train", eval_transform(args))
    with pytest.raises(
        BadImageError, match=r"00005.jpg': the file is empty. Repair or remove it .--bad_images skip replaces training"
    ):
        dataset[(0, 5)]
    (tmp_path / "data" / "00003.jpg").unlink()
    with pytest.raises(BadImageError, match=r"00003.jpg': .*No such file"):
        dataset[(0, 3)]


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_bad_images_are_replaced_the_same_way_by_any_workers(tmp_path, workers):
    bad = {i: b"" for i in (0, 3, 17, 18)}
    root = folder_with_bad(tmp_path / "data", 40, bad)
    for i in range(40):
        if i not in bad:  # recognisable by its grey value
            (root / f"{i:05d}.jpg").write_bytes(encode(Image.new("RGB", (8, 8), (i * 6,) * 3), "JPEG"))
    args = data_args(root, bad_images="skip", max_bad_images=0.1, num_workers=workers)
    dataset = build_dataset(args, "train", eval_transform(args))
    values = run_epochs(dataset, args).float().mean((1, 2, 3)).div(6).round().int().view(2, 40)
    assert len(dataset.bad_images()) == 4
    for i in range(40):
        if i not in bad:
            assert values[:, i].tolist() == [i, i]
    replacements = values[:, sorted(bad)]
    assert not set(replacements.flatten().tolist()) & set(bad)
    fresh = build_dataset(data_args(root, bad_images="skip", max_bad_images=0.1), "train", eval_transform(args))
    again = [[int(fresh[(e, i)][0].float().mean().div(6).round()) for i in sorted(bad)] for e in range(2)]
    assert replacements.tolist() == again
    assert again[0] != again[1]  # another epoch, another replacement


def test_counts_are_exact_across_workers_and_each_is_logged_once(tmp_path, caplog):
    generator = np.random.default_rng(1)
    positions = generator.choice(IMAGES, IMAGES // 100, replace=False)
    kinds = [b"", b"text", JPEG[:300], png_bomb(50_000, 50_000)]
    root = folder_with_bad(tmp_path / "data", IMAGES, {int(i): kinds[k % 4] for k, i in enumerate(positions)})
    args = data_args(root, bad_images="skip", num_workers=3, input_size=(8, 8))
    dataset = build_dataset(args, "train", eval_transform(args))
    assert len(run_epochs(dataset, args)) == 2 * IMAGES
    assert len(dataset.bad_images()) == IMAGES // 100
    # and in one process, where the log can be read
    args.num_workers = 0
    dataset = build_dataset(args, "train", eval_transform(args))
    with caplog.at_level(logging.WARNING):
        run_epochs(dataset, args)
    messages = [record.getMessage() for record in caplog.records if "skipping" in record.getMessage()]
    assert len(messages) == IMAGES // 100 == len(dataset.bad_images())
    assert all(sum(dataset.path_of(int(i)) in message for message in messages) == 1 for i in positions)


def test_too_many_bad_images_end_the_run(tmp_path):
    root = folder_with_bad(tmp_path / "data", 100, {i: b"" for i in (10, 20, 30)})
    for share, fails in ((0.03, False), (0.02, True)):
        args = data_args(root, bad_images="skip", max_bad_images=share, num_workers=2)
        dataset = build_dataset(args, "train", eval_transform(args))
        if not fails:
            run_epochs(dataset, args)
            continue
        with pytest.raises(BadImageError, match=r"3 of 100 images cannot be used.*--max_bad_images 0.02"):
            run_epochs(dataset, args)


def test_a_folder_without_one_readable_image_is_an_error(tmp_path):
    root = folder_with_bad(tmp_path / "data", 5, dict.fromkeys(range(5), b""))
    args = data_args(root, bad_images="skip", max_bad_images=1.0)
    with pytest.raises(BadImageError, match=r"none of the first 5 images can be read.*00000.jpg"):
        build_dataset(args, "train", eval_transform(args))


def test_evaluation_never_skips_an_image(tmp_path):
    (tmp_path / "data" / "val").mkdir(parents=True)
    folder_with_bad(tmp_path / "data" / "val" / "a", 6, {4: b""})
    args = data_args(tmp_path / "data", bad_images="skip", max_bad_images=1.0)
    dataset = build_dataset(args, "val", eval_transform(args))
    with pytest.raises(BadImageError, match=r"00004.jpg': the file is empty"):
        dataset[(0, 4)]


def test_one_pixel_type_per_data_set(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((9, 9, 3), np.uint8))
    np.save(tmp_path / "b.npy", np.zeros((9, 9, 3), np.uint16))
    args = data_args(tmp_path)
    dataset = build_dataset(args, "train", eval_transform(args))
    with pytest.raises(BadImageError, match=r"b.npy': its pixels are torch.float32, those of the first image"):
        dataset[(0, 1)]
