"""Transforms against the Pillow pipelines that they replace, on real photographs.

MIXMAE_STRESS=1 runs the recipe's RandAugment on 100,000 samples instead of 4,000 (about two minutes).
"""

import argparse
import logging
import os
import random

import numpy as np
import pytest
import torch
from photos import PHOTOS, data_args, decode
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from util.data.transforms import (
    BatchAugmentation,
    Normalize,
    eval_transform,
    finetune_transform,
    pretrain_transform,
    random_crop,
    resize,
    uses_mixup,
)
from util.errors import UserError
from util.seeding import seed_all

BICUBIC = InterpolationMode.BICUBIC
SAMPLES = 100_000 if os.environ.get("MIXMAE_STRESS") == "1" else 4_000


def difference(img: torch.Tensor, pillow: Image.Image) -> int:
    """The largest difference of two pixels, in 1/255."""
    reference = torch.from_numpy(np.array(pillow)).reshape(*img.shape[1:], -1).permute(2, 0, 1)
    assert img.dtype == torch.uint8 and img.shape == reference.shape
    return int((img.int() - reference.int()).abs().max())


@pytest.fixture(params=PHOTOS, ids=lambda path: path.stem)
def photo(request) -> tuple[torch.Tensor, Image.Image]:
    return decode(request.param.read_bytes(), 3), Image.open(request.param).convert("RGB")


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (384, 384)])
def test_random_crops_are_close_to_pillows(photo, size):
    img, pillow = photo
    random.seed(0)
    for _ in range(20):
        top, left, height, width = random_crop(*img.shape[1:], (0.08, 1.0))
        ours = resize(img[:, top : top + height, left : left + width], size)
        theirs = TF.resized_crop(pillow, top, left, height, width, list(size), BICUBIC)
        assert difference(ours, theirs) <= 2


def test_pretraining_crops_and_mirrors_like_pillow(photo):
    img, pillow = photo
    transform = pretrain_transform(data_args("", input_size=(224, 224)))
    mirrored = 0
    for seed in range(20):
        random.seed(seed)
        ours = transform(img)
        random.seed(seed)
        top, left, height, width = random_crop(*img.shape[1:], (0.2, 1.0))
        theirs = TF.resized_crop(pillow, top, left, height, width, [224, 224], BICUBIC)
        if random.random() < 0.5:
            theirs, mirrored = TF.hflip(theirs), mirrored + 1
        assert difference(ours, theirs) <= 2
    assert 3 < mirrored < 17


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0)])
@pytest.mark.parametrize("height, width", [(333, 500), (400, 100), (64, 64)])
def test_crops_are_distributed_like_torchvisions(height, width, scale):
    random.seed(0)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    draws = 6000
    ours = np.array([random_crop(height, width, scale) for _ in range(draws)], dtype=float)
    theirs = [T.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(draws)]
    theirs = np.array(theirs, dtype=float)
    for quantity in (
        lambda box: box[:, 2] * box[:, 3] / (height * width),
        lambda box: np.log(box[:, 3] / box[:, 2]),
        lambda box: box[:, 0] + box[:, 2] / 2,
        lambda box: box[:, 1] + box[:, 3] / 2,
    ):
        a, b = np.sort(quantity(ours)), np.sort(quantity(theirs))
        values = np.concatenate([a, b])
        gap = np.searchsorted(a, values, "right") - np.searchsorted(b, values, "right")
        # Kolmogorov-Smirnov: samples from one distribution differ by more once in 10,000 times
        assert np.abs(gap).max() / draws < 2.23 * np.sqrt(2 / draws)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 20_000), (20_000, 1), (2, 700)])
def test_extreme_images_give_crops_of_the_right_size(height, width):
    img = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    args = data_args("", input_size=(224, 224))
    for transform in (pretrain_transform(args), finetune_transform(args), eval_transform(args)):
        assert transform(img).shape == (3, 224, 224)
    for _ in range(100):
        top, left, rows, columns = random_crop(height, width, (0.08, 1.0))
        assert 0 <= top <= height - rows < height and 0 <= left <= width - columns < width


@pytest.mark.parametrize("size, resized", [(224, 256), (32, 36), (256, 256), (384, 384)])
def test_evaluation_resizes_with_a_margin_up_to_224_only(photo, size, resized):
    img, pillow = photo
    theirs = T.Compose([T.Resize(resized, BICUBIC), T.CenterCrop(size)])(pillow)
    assert difference(eval_transform(data_args("", input_size=(size, size)))(img), theirs) <= 2


def test_evaluation_of_other_shapes_covers_the_image():
    # Left half dark, right half bright: a centred crop has the edge in its middle, whatever the shapes.
    img = torch.zeros(3, 120, 300, dtype=torch.uint8)
    img[:, :, 150:] = 200
    for size in [(64, 128), (128, 64), (224, 112)]:
        out = eval_transform(data_args("", input_size=size))(img)
        assert out.shape == (3, *size)
        columns = out.float().mean((0, 1))
        assert columns[: size[1] // 2 - 4].max() < 5 and columns[size[1] // 2 + 4 :].min() > 195
    # With the crop's own shape, the crop covers 7/8 of both sides.
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 128, 256)
    out = eval_transform(data_args("", input_size=(112, 224)))(ramp)
    assert abs(int(out[0, 56, 0]) - 16) <= 2 and abs(int(out[0, 56, -1]) - 239) <= 2


def test_fine_tuning_augments_exactly_as_timm_does(photo):
    img, _ = photo
    args = data_args("", input_size=(224, 224))
    plain = finetune_transform(data_args("", input_size=(224, 224), aa="", color_jitter=None))
    ours = finetune_transform(args)
    fill = tuple(round(255 * value) for value in args.mean)
    params = dict(translate_const=int(224 * 0.45), img_mean=fill, interpolation=Image.Resampling.BICUBIC)
    theirs = rand_augment_transform(args.aa, params)
    compared = 0
    for seed in range(30):
        random.seed(seed), np.random.seed(seed)
        augmented = ours(img)
        random.seed(seed), np.random.seed(seed)
        crop = plain(img)
        try:
            reference = theirs(Image.fromarray(crop.permute(1, 2, 0).numpy()))
        except ValueError:  # posterize to 0 bits, tested below
            continue
        assert difference(augmented, reference) == 0
        compared += 1
    assert compared > 25


def test_colour_jitter_without_auto_augment(photo):
    img, _ = photo
    plain = finetune_transform(data_args("", aa="", color_jitter=None))
    jitter = finetune_transform(data_args("", aa="", color_jitter=0.4))
    random.seed(0), torch.manual_seed(0)
    a = plain(img).float()
    random.seed(0), torch.manual_seed(0)
    b = jitter(img).float()
    assert a.shape == b.shape and (a - b).abs().mean() > 1
    random.seed(0), torch.manual_seed(0)
    reference = T.ColorJitter(0.4, 0.4, 0.4)(Image.fromarray(a.byte().permute(1, 2, 0).numpy()))
    assert difference(b.byte(), reference) == 0


def test_randaugment_never_fails_on_posterizing_to_nothing():
    img = decode(PHOTOS[0].read_bytes(), 3)[:, :64, :64]
    transform = finetune_transform(data_args("", input_size=(32, 32)))
    black = 0
    for seed in range(SAMPLES):
        random.seed(seed), np.random.seed(seed)
        black += int(transform(img).max() == 0)
    assert black >= 1  # a posterized image with no bits left: without the repair timm raises ValueError here


@pytest.mark.parametrize(
    "name",
    [
        "rand-m10-inc1",
        "original",
        "v0r",
        "augmix-m9",
        "3a",
        "rand-mstd1-tweights",
        "rand-n3-p0.5-mmax20-m15",
        "augmix-m5-w4-d2-b1-mstd1",
    ],
)
def test_all_of_timms_augmentations_can_be_named(name):
    img = decode(PHOTOS[0].read_bytes(), 3)
    transform = finetune_transform(data_args("", aa=name))
    for seed in range(40):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        assert transform(img).shape == (3, 32, 32)


def test_unknown_augmentation_is_named_in_the_error():
    with pytest.raises(UserError, match=r"--aa .nonsense. .* rand-m9-mstd0.5-inc1"):
        finetune_transform(data_args("", aa="nonsense"))


@pytest.mark.parametrize("word", ["foo", "mx", "n0", "m9.5", "mstd", "inc2", "p2", "tx", "w3", ""])
def test_each_word_of_an_augmentation_is_checked(word):
    """timm passes over those that it does not know."""
    with pytest.raises(UserError, match=f"is not an augmentation that timm knows \\('{word}'\\)"):
        finetune_transform(data_args("", aa=f"rand-m9-{word}"))


@pytest.mark.parametrize(
    "aa, said",
    [
        ("rand-m999", "--aa rand-m999: magnitudes above 10 are reduced to 10; -mmax999 allows more"),
        ("rand-m10", ""),
        ("rand-m15-mmax15", ""),
        ("augmix-mstd0.5-m11", "above 10"),
    ],
)
def test_a_magnitude_that_is_not_reached_is_warned_of(aa, said, caplog):
    finetune_transform(data_args("", aa=aa))
    assert said in caplog.text and bool(said) == ("magnitudes" in caplog.text)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_augmentation_is_off_with_a_warning_for_other_channels(in_chans, caplog):
    with caplog.at_level(logging.WARNING):
        transform = finetune_transform(data_args("", in_chans=in_chans))
    assert f"--in_chans {in_chans}" in caplog.text
    assert transform(torch.rand(in_chans, 40, 50)).shape == (in_chans, 32, 32)


def test_float_and_many_channel_images_resize_like_their_channels():
    img = torch.randint(0, 256, (16, 90, 70), dtype=torch.uint8)
    many = resize(img, (48, 40))
    alone = torch.cat([resize(channel[None], (48, 40)) for channel in img])
    assert many.dtype == torch.uint8 and int((many.int() - alone.int()).abs().max()) <= 1
    floats = resize(img.float(), (48, 40))
    assert floats.dtype == torch.float32
    assert (floats - many.float()).abs().mean() < 0.5  # uint8 clamps, twice; this is rounding


def test_normalize_is_totensor_and_normalize():
    args = data_args("")
    imgs = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    reference = T.Normalize(args.mean, args.std)(imgs.float() / 255)
    for layout in (torch.contiguous_format, torch.channels_last):
        out = Normalize(args.mean, args.std)(imgs.contiguous(memory_format=layout))
        assert out.dtype == torch.float32 and out.is_contiguous()
        torch.testing.assert_close(out, reference, rtol=0, atol=2e-6)


def test_normalize_takes_float_images_in_their_own_units():
    imgs = torch.rand(2, 1, 8, 8) * 4000
    out = Normalize([1500.0], [700.0])(imgs)
    torch.testing.assert_close(out, (imgs - 1500) / 700, rtol=1e-6, atol=1e-6)


def test_normalize_rejects_what_does_not_fit():
    with pytest.raises(UserError, match="mean has 3 values and std 1"):
        Normalize([0.5] * 3, [0.5])
    with pytest.raises(UserError, match="std must be positive"):
        Normalize([0.5], [0.0])
    with pytest.raises(UserError, match="images have 1 channels, mean and std have 3 values"):
        Normalize([0.5] * 3, [0.5] * 3)(torch.zeros(2, 1, 4, 4))
    assert not Normalize([0.5], [0.5]).state_dict()


# --- batches


def batch_args(**changes) -> argparse.Namespace:
    values = dict(reprob=0.25, remode="pixel", recount=1, mixup=0.8, cutmix=1.0, cutmix_minmax=None, mixup_prob=1.0)
    values |= dict(mixup_switch_prob=0.5, mixup_mode="batch", smoothing=0.1)
    return argparse.Namespace(**{**values, **changes})


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.randint(0, 5, (8,), generator=generator)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reprob": 1.0, "remode": "rand", "recount": 3},
        {"mixup_mode": "pair", "smoothing": 0.0, "mixup_switch_prob": 0.2},
        {"mixup_mode": "elem", "mixup_prob": 0.5},
        {"mixup": 0.0, "cutmix": 0.0, "cutmix_minmax": (0.2, 0.8), "reprob": 0.0},
    ],
)
def test_batches_are_augmented_exactly_as_timm_does(changes):
    args = batch_args(**changes)
    erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device="cpu")
    mix = Mixup(
        args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
        label_smoothing=args.smoothing, num_classes=5,
    )  # fmt: skip
    augment = BatchAugmentation(args, 5, torch.device("cpu"))
    changed = 0
    for seed in range(10):
        imgs, targets = batch()
        seed_all(seed)
        expected_imgs, expected_targets = mix(erase(imgs), targets)
        seed_all(seed)
        imgs, targets = augment(*batch())
        assert torch.equal(imgs, expected_imgs) and torch.equal(targets, expected_targets)
        assert targets.shape == (8, 5)
        changed += not torch.equal(imgs, batch()[0])
    assert changed >= 8


def test_without_mixup_targets_stay_classes_and_images_are_still_erased():
    imgs, targets = batch()
    args = batch_args(mixup=0.0, cutmix=0.0, reprob=1.0, remode="const")
    augmented, same = BatchAugmentation(args, 5, torch.device("cpu"))(imgs.clone(), targets)
    assert torch.equal(same, targets)
    erased = (augmented != imgs).all(dim=1)
    assert erased.flatten(1).any(dim=1).all() and (augmented[erased[:, None].expand_as(imgs)] == 0).all()


def test_mixup_is_used_when_any_of_its_settings_asks_for_it():
    off = dict(mixup=0.0, cutmix=0.0)
    assert not uses_mixup(batch_args(**off))
    for on in ({"mixup": 0.8}, {"cutmix": 1.0}, {"cutmix_minmax": (0.2, 0.8)}):
        assert uses_mixup(batch_args(**{**off, **on}))
