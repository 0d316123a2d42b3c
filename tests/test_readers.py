"""Images of other kinds: TIFF of many bands and of numbers, HEIC, AVIF, and whatever somebody's own function reads."""

import contextlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import decode
from PIL import Image
from running import QUICK, fails, losses, run

import main_finetune
import main_pretrain
import util.check_data
import util.knn
import util.predict
import util.visualize
from util.data import decoding
from util.data.decoding import BadImageError
from util.weights.file import read_checkpoint

SHAPE = ["--input_size", "16", "--window_size", "4", "4", "4", "2"]


def bands(channels: int, dtype=np.uint16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, (20, 24, channels)).astype(dtype)


def tiff(array: np.ndarray, **options) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


# --- TIFF ---


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("order", ["contig", "separate", "pages"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_bands(dtype, order, compression):
    array = bands(13, dtype)
    stored = array if order == "contig" else array.transpose(2, 0, 1)
    options = {} if order == "pages" else {"planarconfig": order}
    image = decode(tiff(stored, photometric="minisblack", compression=compression, **options), 13)
    assert image.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)  # as an array of a .npy file
    assert torch.equal(image, torch.from_numpy(array.astype(image.numpy().dtype)).permute(2, 0, 1))


def test_deep_colours_are_those_of_a_png():
    array = bands(3) * 257
    image = decode(tiff(array, photometric="rgb"), 3)
    assert image.dtype == torch.uint16 and torch.equal(
        image.int(), torch.from_numpy(array.astype(np.int32)).permute(2, 0, 1)
    )
    with_alpha = np.concatenate([array, array[:, :, :1]], axis=2)
    assert torch.equal(decode(tiff(with_alpha, photometric="rgb"), 3).int(), image.int())


def test_floats_are_in_their_own_units():
    array = bands(1, np.float32)[:, :, 0] * 1e3
    assert torch.equal(decode(tiff(array), 1), torch.from_numpy(array)[None])
    with pytest.raises(BadImageError, match="not finite"):
        decode(tiff(np.full((8, 8), np.nan, np.float32)), 1)


def test_of_pages_that_are_no_bands_the_first_counts():
    array = bands(5, np.float32)
    image = decode(tiff(array.transpose(2, 0, 1), photometric="minisblack"), 1)
    assert torch.equal(image[0], torch.from_numpy(array[:, :, 0]))


def test_pages_that_are_rows_say_how_to_write_bands():
    """What tifffile makes of an array (H, W, bands) by default."""
    message = r"^the TIFF file has 20 pages of 24 x 13 pixels, 13 are needed \(--in_chans 13\)\. If .* \(20, 24, 13\)"
    with pytest.raises(BadImageError, match=message + r', .*planarconfig="contig", photometric="minisblack"\)$'):
        decode(tiff(bands(13)), 13)
    with pytest.raises(BadImageError, match=r"has 20 pages of 24 x 13 pixels, 7 are needed \(--in_chans 7\)$"):
        decode(tiff(bands(13)), 7)


def test_what_cannot_be_an_image_says_why(monkeypatch):
    data = tiff(bands(13), photometric="minisblack", planarconfig="contig")
    with pytest.raises(BadImageError, match=r"shape \(20, 24, 13\), \(H, W, 4\) is needed"):
        decode(data, 4)
    with pytest.raises(BadImageError, match="480 pixels are more than --max_pixels 400"):
        decode(data, 13, max_pixels=400)
    with pytest.raises(BadImageError):
        decode(data[: len(data) // 2], 13)
    with pytest.raises(BadImageError, match=r"axes of the TIFF file are .*: an image has Y, X and at most one more"):
        decode(tiff(np.zeros((3, 4, 20, 24), np.uint16), imagej=True), 5)
    monkeypatch.setattr(decoding, "tifffile", None)
    with pytest.raises(BadImageError, match="pip install tifffile"):
        decode(data, 13)


def satellite_bands(path: Path, seed: int) -> None:
    array = bands(13, seed=seed) * 40
    path.with_suffix(".tif").write_bytes(tiff(array, photometric="minisblack", planarconfig="contig"))


def deep_grey(path: Path, seed: int) -> None:
    Image.fromarray(bands(1, seed=seed)[:, :, 0] * 6).save(path.with_suffix(".png"))


@pytest.mark.parametrize("write, in_chans", [(satellite_bands, 13), pytest.param(deep_grey, 1, marks=pytest.mark.slow)])
def test_images_of_16_bits_from_check_data_to_pictures(tmp_path, capfd, write, in_chans):
    """With the statistics that check_data gives: pretrain, resume, kNN, fine-tune, evaluate, draw, embed."""
    data, out, tuned = (tmp_path / name for name in ("data", "out", "tuned"))
    for split in ("train", "val"):
        for label in "ab":
            (data / split / label).mkdir(parents=True)
            for i in range(4):
                write(data / split / label / str(i), seed=i + 10 * ord(label) + (split == "val"))
    cpu = ["--device", "cpu", "--num_workers", "0"]
    flags = [*cpu, *QUICK, *SHAPE, "--batch_size", "4", "--data_path", data]
    if in_chans == 13:  # in their own units
        fails(main_pretrain, capfd, "far from 0 and 1. Measured on 8 of them: --mean ", *flags, "--output_dir", out)
    with contextlib.suppress(SystemExit):  # copies are faults
        run(util.check_data, data, "--num_workers", "0", "--out", tmp_path)
    report = json.loads((tmp_path / "check_data.json").read_text())
    assert report["in_chans"] == in_chans and report["train"]["images"] == 8
    units = ["--mean", *report["mean"], "--std", *report["std"]]
    run(main_pretrain, *flags, "--output_dir", out, *units, "--epochs", "1")
    run(main_pretrain, *flags, "--output_dir", out, *units, "--epochs", "2", "--resume", "auto", "--resume_force")
    assert max(losses(out)) < 10 and read_checkpoint(out / "checkpoint.pth")["args"]["in_chans"] == in_chans
    weights = ["--checkpoint", out / "checkpoint.pth"]
    run(util.knn, *cpu, *weights, "--data_path", data, "--k", "1")
    flags = [*cpu, "--data_path", data, "--finetune"]
    run(main_finetune, *flags, out / "checkpoint.pth", "--batch_size", "4", "--epochs", "1", "--output_dir", tuned)
    run(main_finetune, *flags, tuned / "checkpoint.pth", "--eval")
    assert capfd.readouterr().out.count("result: top-1") == 2
    picture = tmp_path / "picture.png"
    channels = ["--channels", "3", "2", "1"] if in_chans == 13 else []
    run(util.visualize, *weights, "--images", data / "train", "--out", picture, *channels)
    run(util.predict, *cpu, *weights, data / "val", "--features", "--out", tmp_path / "features.npz")
    assert Image.open(picture).size[0] > 500 and len(np.load(tmp_path / "features.npz")["paths"]) == 8


# --- HEIC and AVIF ---


@pytest.mark.parametrize("form, extension", [("AVIF", ".avif"), ("HEIF", ".heic")])
def test_photographs_of_telephones(tmp_path, form, extension):
    if extension not in decoding.IMAGE_EXTENSIONS:
        pytest.skip(f"{form} is not read here")
    gradient = np.linspace(0, 255, 64).astype(np.uint8)
    array = np.stack(np.broadcast_arrays(gradient[:, None], gradient[None], np.uint8(90)), axis=2)
    Image.fromarray(array).save(tmp_path / f"photo{extension}", form, quality=95)
    image = decode((tmp_path / f"photo{extension}").read_bytes(), 3)
    assert (
        image.shape == (3, 64, 64)
        and (image.int() - torch.from_numpy(array).permute(2, 0, 1).int()).abs().float().mean() < 4
    )


# --- Somebody's own function ---

OWN = """
import numpy as np

def read(path):
    header, pixels = open(path, "rb").read().split(b"|", 1)
    height, width = map(int, header.split())
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 2)

read.extensions = (".own",)
"""


@pytest.fixture
def own_format(tmp_path, monkeypatch):
    """A folder of ten images in a format of its own, one of them damaged, and the module that reads it."""
    (tmp_path / "own_format.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "data").mkdir()
    for i in range(10):
        content = b"20 24|" + bands(2, np.uint8, i).tobytes()
        (tmp_path / "data" / f"{i}.own").write_bytes(content if i != 7 else content[:99])
    (tmp_path / "data" / "notes.txt").write_text("")
    yield tmp_path / "data"
    sys.modules.pop("own_format", None)


def test_a_format_of_its_own(own_format, tmp_path, capfd):
    flags = ["--device", "cpu", *QUICK, *SHAPE, "--batch_size", "2", "--epochs", "1", "--data_path", own_format]
    flags += ["--output_dir", tmp_path / "out", "--reader", "own_format:read"]
    run(main_pretrain, *flags, "--bad_images", "skip", "--max_bad_images", "0.2")  # in_chans is what it reads
    said = capfd.readouterr().out
    assert "10 images" in said and "--in_chans 2: what the image files have" in said
    assert "7.own': --reader own_format:read: ValueError: cannot reshape" in said
    checkpoint, reader = ["--checkpoint", tmp_path / "out" / "checkpoint.pth"], ["--reader", "own_format:read"]
    flags = ["--device", "cpu", "--num_workers", "0", *checkpoint, own_format, *reader, "--bad_images", "skip"]
    run(util.predict, *flags, "--features", "--out", tmp_path / "features.npz")
    assert len(np.load(tmp_path / "features.npz")["paths"]) == 9
    for name, why in (("own_format:nothing", "has no attribute 'nothing'"), ("absent.module:read", "No module named")):
        message = f"--reader {name} cannot be imported .*{why}.*: give PACKAGE.MODULE:FUNCTION"
        fails(
            main_pretrain, capfd, message, "--data_path", own_format, "--output_dir", tmp_path / "b", "--reader", name
        )
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(own_format, "images")
    others = ["--output_dir", tmp_path / "b", *reader, "--data_path"]
    fails(
        main_pretrain,
        capfd,
        r"--reader own_format:read reads files, and .*images.tar is a tar",
        *others,
        tmp_path / "images.tar",
    )
    fails(
        main_pretrain,
        capfd,
        r"not the images of --dataset torch/cifar10",
        *others,
        tmp_path,
        "--dataset",
        "torch/cifar10",
    )


def test_medical_images(tmp_path, monkeypatch):
    """DICOM by pydicom: two lines of one's own."""
    data = pytest.importorskip("pydicom.data")
    source = (
        "import pydicom\ndef read(path):\n    return pydicom.dcmread(path).pixel_array\nread.extensions = ('.dcm',)\n"
    )
    (tmp_path / "dicom.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    content = open(data.get_testdata_file("CT_small.dcm"), "rb").read()
    (tmp_path / "data").mkdir()
    for i in range(4):
        (tmp_path / "data" / f"{i}.dcm").write_bytes(content)
    flags = ["--device", "cpu", *QUICK, *SHAPE, "--batch_size", "2", "--epochs", "1", "--data_path", tmp_path / "data"]
    run(
        main_pretrain,
        *flags,
        "--output_dir",
        tmp_path / "out",
        "--reader",
        "dicom:read",
        "--mean",
        "900",
        "--std",
        "400",
    )
    assert len(losses(tmp_path / "out")) == 2
