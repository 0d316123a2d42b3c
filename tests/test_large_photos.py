"""Large JPEGs are decoded at a fraction of their size: the same crops, nearly the same pixels; others to the bit."""

import functools
import io
import random

import numpy as np
import pytest
import torch
from photos import PHOTOS, data_args, decode, encode_jpeg, large_photo
from PIL import Image, ImageOps

from util.data import jpeg
from util.data.datasets import BadImageError, build_dataset, build_loader
from util.data.decoding import EncodedJpeg, PixelType, open_image
from util.data.jpeg import ORIENTATION, REDUCTIONS, read_header, reduction
from util.data.transforms import crop, eval_transform, finetune_transform, pretrain_transform, random_crop

SIZE = data_args("", input_size=(64, 64))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXMAE_CACHE", str(tmp_path / "cache"))


@functools.cache
def encoded(width: int = 1500, height: int = 1000, enlarged: float = 1.0, orientation: int = 1, **options) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode_jpeg(large_photo(width, height, enlarged), exif=exif, **options)


def reduced(image: EncodedJpeg, *args) -> torch.Tensor:
    """The crop, which must not need all pixels."""
    result = crop(image, *args)
    assert "pixels" not in vars(image)
    return result


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    assert a.shape == b.shape and a.dtype == b.dtype == torch.uint8
    return (a.int() - b.int()).abs().float()


# --- Without reduction: as ever


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
def test_other_images_are_the_same_to_the_bit(path, orientation):
    """As torchvision decodes all pixels and turns them, whether the crop is drawn before or after that."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    with Image.open(path) as photo:
        data = encode_jpeg(photo.convert("RGB"), exif=exif)
    expected = torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), 3, True)
    image = open_image(data, 3)
    assert isinstance(image, EncodedJpeg) and image.shape == tuple(expected.shape)
    assert torch.equal(decode(data, 3), expected)
    args = data_args("", input_size=(224, 224))
    for transform in (pretrain_transform(args), finetune_transform(args)):
        for seed in range(3):
            results = []
            for img in (open_image(data, 3), expected):
                random.seed(seed)
                np.random.seed(seed)
                results.append(transform(img))
            assert torch.equal(*results)


def test_reduction_is_for_large_images_alone():
    small, large = min(REDUCTIONS.values()) - 1, max(REDUCTIONS.values())
    assert reduction(small, (0, 0, 999, 1000), (8, 8)) == 1
    assert reduction(large, (0, 0, 1600, 1600), (200, 200)) == 8
    assert reduction(large, (0, 0, 1600, 1599), (200, 200)) == 4
    assert reduction(large - 1, (0, 0, 500, 500), (200, 200)) == 1  # by 2 pays for even larger ones only
    assert reduction(large, (0, 0, 500, 500), (200, 200)) == 2
    assert reduction(large, (0, 0, 300, 300), (200, 200)) == 1


def test_no_side_falls_below_the_target():
    random.seed(0)
    factors = set()
    for _ in range(3000):
        height, width = (random.randint(1, 6000) for _ in range(2))
        size = random.randint(1, 400), random.randint(1, 400)
        box = random_crop(height, width, (0.08, 1.0))
        factor = reduction(height * width, box, size)
        factors.add(factor)
        assert factor == 1 or all(side / factor >= target for side, target in zip(box[2:], size))
    assert factors == {1, *REDUCTIONS}


# --- With reduction


@pytest.mark.parametrize("enlarged, most", [(1.0, 2.0), (2.0, 1.4)])
def test_the_pixels_are_nearly_those_of_the_whole_image(enlarged, most):
    """Mean absolute differences in 1/255, over ten crops of a mosaic of photographs: see `EncodedJpeg.crop`."""
    data = encoded(2400, 1800, enlarged)
    whole, differences, factors = decode(data, 3), [], set()
    random.seed(0)
    for _ in range(10):
        box = random_crop(*whole.shape[1:], (0.2, 1.0))
        factors.add(reduction(2400 * 1800, box, (160, 160)))
        differences.append(difference(crop(open_image(data, 3), box, (160, 160)), crop(whole, box, (160, 160))).mean())
    assert factors == {4, 8}
    assert 0.1 < sum(differences) / 10 < most


def test_evaluation_sees_the_whole_image(tmp_path):
    data = encoded()
    (tmp_path / "a.jpg").write_bytes(data)
    args = data_args(tmp_path, input_size=(64, 64))
    transform = eval_transform(args)
    assert torch.equal(build_dataset(args, "train", transform)[(0, 0)][0], transform(decode(data, 3)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_lie_where_they_lay(orientation):
    """To a fraction of a pixel, also of images that are turned: the waves are 4/255 a pixel steep."""
    rows, columns = np.mgrid[:1011, :1517]
    waves = [127 + 100 * np.sin(angle / 160 * 2 * np.pi) for angle in (rows, columns, rows + columns)]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode_jpeg(Image.fromarray(np.stack(waves, 2).astype(np.uint8)), 98, exif=exif, subsampling=0)
    whole = decode(data, 3)
    assert whole.shape[1:] == ((1011, 1517) if orientation < 5 else (1517, 1011))
    random.seed(0)
    for size in ((96, 120), (120, 96)):
        box = random_crop(*whole.shape[1:], (0.6, 0.7))
        assert difference(reduced(open_image(data, 3), box, size), crop(whole, box, size)).mean() < 0.7
    # The draws are the same too, and in the same order: the crop and the mirroring.
    transform, results = pretrain_transform(data_args("", input_size=(96, 96))), []
    for seed in range(6):
        for img in (open_image(data, 3), whole):
            random.seed(seed)
            results.append(transform(img))
        assert difference(*results[-2:]).mean() < 0.7


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_grey_and_progressive_photographs(in_chans, mode, progressive):
    data = encode_jpeg(large_photo(1500, 1000, 2.0).convert(mode), progressive=progressive)
    box, size = (100, 203, 801, 907), (90, 100)
    image = open_image(data, in_chans)
    result = reduced(image, box, size)
    assert result.shape == (in_chans, 90, 100)
    assert difference(result, crop(decode(data, in_chans), box, size)).mean() < 2.5
    if mode == "L" and in_chans == 3:
        assert torch.equal(result[0], result[2])


def test_photographs_with_a_second_picture_behind():
    """As telephones write them (MPO)."""
    buffer = io.BytesIO()
    first, second = large_photo(1500, 1000, 2.0), large_photo(300, 200)
    first.save(buffer, "MPO", save_all=True, append_images=[second], quality=90)
    data = buffer.getvalue()
    box = (0, 0, 1000, 1500)
    result = reduced(open_image(data, 3), box, (100, 150))
    assert difference(result, crop(decode(data, 3), box, (100, 150))).mean() < 2.5


def test_cmyk_and_images_of_another_kind_are_decoded_at_once():
    photo = large_photo(1500, 1000)
    for data in (encode_jpeg(photo.convert("CMYK")), encode_png(photo)):
        assert isinstance(open_image(data, 3), torch.Tensor)
    deep = PixelType.DEEP_PICTURES.convert(open_image(encoded(), 3))
    assert deep.dtype == torch.float32 and deep.max() <= 1


def encode_png(photo: Image.Image) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


# --- Headers


def test_the_orientation_is_that_of_pillow_whatever_precedes_it():
    data = encoded(orientation=6)
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x/>"
    other = b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp
    data = data[:2] + other + data[2:]
    assert read_header(data).orientation == 6 and open_image(data, 3).shape == (3, 1500, 1000)
    with Image.open(io.BytesIO(data)) as image:
        assert ImageOps.exif_transpose(image).size == (1000, 1500)
    assert open_image(data, 3, ignore_exif=True).shape == (3, 1000, 1500)
    second = Image.Exif()
    second[ORIENTATION] = 1
    content = second.tobytes()
    end = data.index(b"\xff\xdb")  # where the metadata of the first picture end
    data = data[:end] + b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content + data[end:]
    with Image.open(io.BytesIO(data)) as image:
        assert ImageOps.exif_transpose(image).size == (1000, 1500)
    assert read_header(data).orientation == 6


@pytest.mark.parametrize("before", [b"\xff", b"\xff\xff\xff", b"\xff\xd0", b"\xff\xd7\xff"])
def test_padding_and_markers_without_content_are_stepped_over(before):
    data = encoded(orientation=6)
    end = data.index(b"\xff\xdb")  # of the metadata
    for place in (2, end):
        padded = data[:place] + before + data[place:]
        assert read_header(padded) == read_header(data)
        assert isinstance(open_image(padded, 3), EncodedJpeg)
        assert torch.equal(decode(padded, 3), decode(data, 3))


@pytest.mark.parametrize("exif", [b"", b"II", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0"])
def test_damaged_metadata_turn_nothing(exif):
    data = encode_jpeg(large_photo(30, 20))
    content = b"Exif\0\0" + exif
    data = data[:2] + b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content + data[2:]
    assert open_image(data, 3).shape == decode(data, 3).shape == (3, 20, 30)


# --- Bad images


def test_damage_is_found_whatever_is_decoded(tmp_path):
    """A truncated photograph is bad for every crop, and replaced; decoding all of it says what is wrong."""
    data = encoded()
    for number, content in enumerate((data, data[: len(data) // 2])):
        path = tmp_path / "train" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    args = data_args(tmp_path, input_size=(64, 64), bad_images="skip", max_bad_images=0.5)
    dataset = build_dataset(args, "train", pretrain_transform(args))
    replaced = dataset[(0, 1)][0]
    assert len(dataset.bad_images()) == 1 and replaced.shape == (3, 64, 64)
    args.bad_images = "error"
    with pytest.raises(BadImageError, match=r"1\.jpg.*truncated"):
        build_dataset(args, "train", eval_transform(args))[(0, 1)]
    with pytest.raises(BadImageError, match="1500000 pixels are more than --max_pixels 1499999"):
        open_image(data, 3, max_pixels=1_499_999)


def test_random_damage_gives_an_image_or_a_bad_image():
    data, generator = encoded(), np.random.default_rng(0)
    header = data.index(b"\xff\xda")
    images = 0
    for _ in range(40):
        damaged = bytearray(data)
        for position in (*generator.integers(0, header, 1), *generator.integers(0, len(data), 2)):
            damaged[position] = generator.integers(0, 256)
        try:
            image = open_image(bytes(damaged), 3)
            assert crop(image, (0, 0, *image.shape[1:]), (64, 64)).shape == (3, 64, 64)
            images += 1
        except BadImageError as error:
            assert str(error)
    assert images > 10


def test_what_pillow_cannot_reduce_is_decoded_as_a_whole(monkeypatch):
    def fail(*_):
        raise OSError("broken")

    image, whole = open_image(encoded(), 3), decode(encoded(), 3)
    monkeypatch.setattr("util.data.decoding.decode_reduced", fail)
    assert torch.equal(crop(image, (0, 0, 1000, 1500), (64, 64)), crop(whole, (0, 0, 1000, 1500), (64, 64)))


# --- In a data set


def test_samples_are_the_same_in_all_workers(tmp_path, monkeypatch):
    path = tmp_path / "train" / "a.jpg"
    path.parent.mkdir()
    path.write_bytes(encoded())
    batches, results = [[(0, 0), (1, 0)], [(2, 0)]], []
    for workers in (0, 1, 2):
        args = data_args(tmp_path, input_size=(64, 64), num_workers=workers)
        dataset = build_dataset(args, "train", finetune_transform(args))
        results.append([images for images, _ in build_loader(dataset, batches, args, torch.device("cpu"))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert build_dataset(args, "train", lambda image: image)[(0, 0)][0].shape == (3, 1000, 1500)  # for all others
    monkeypatch.setattr(jpeg, "REDUCTIONS", {})
    assert not torch.equal(dataset[(0, 0)][0], results[0][0][0])
