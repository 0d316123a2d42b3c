"""Transforms of single images as uint8 tensors; normalisation and augmentation of whole batches on the device.

The same distribution as the usual Pillow pipelines (torchvision's for pretraining, timm's for fine-tuning) and, for the
same crop, within 2/255 of their pixels; faster, because images stay uint8 with the channels as the fastest axis in
memory from the decoder to the batch, and become float32 only on the device. Randomness comes from the global
generators, which the data set seeds for every sample and the engine for every batch.
"""

import logging
import random
import re
from collections.abc import Callable, Sequence
from math import ceil, exp, log, sqrt

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP, posterize
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import nn

from util.data import Config
from util.data.decoding import EncodedJpeg
from util.errors import UserError

logger = logging.getLogger(__name__)

ASPECT_RATIOS = (3 / 4, 4 / 3)  # of random crops, width / height
CROP_RATIO = 0.875  # of evaluation at up to 224 pixels
# timm's augmentations, and the words that each may be followed by. timm itself ignores many that it does not know.
AUGMENTATIONS = {
    "rand": r"m\d+|n[1-9]\d*|p(0(\.\d+)?|1(\.0+)?)|mstd\d+(\.\d+)?|mmax[1-9]\d*|inc[01]|t(weights|3aw?)",
    "augmix": r"m\d+|w[1-9]\d*|d[1-9]\d*|a\d+(\.\d+)?|b[01]|mstd\d+(\.\d+)?",
    **dict.fromkeys(("v0", "v0r", "original", "originalr", "3a"), r"mstd\d+(\.\d+)?"),
}
MAGNITUDE = 10  # of timm's augmentations at most, if there is no mmax


class Normalize(nn.Module):
    """(x - mean) / std per channel, as float32; uint8 images are divided by 255 first, float images are not.

    imgs (B, C, H, W) or (C, H, W) -> the same shape, contiguous. `mean` and `std` have C values, in the units
    of x. Raises UserError on lengths that differ, a standard deviation that is not positive, and images of
    another number of channels.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        if len(mean) != len(std):
            raise UserError(f"mean has {len(mean)} values and std {len(std)}: give one per channel for both")
        if not all(value > 0 for value in std):
            raise UserError(f"std must be positive, got {tuple(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        if imgs.shape[-3] != len(self.mean):
            raise UserError(f"images have {imgs.shape[-3]} channels, mean and std have {len(self.mean)} values")
        unit = 255.0 if imgs.dtype == torch.uint8 else 1.0
        imgs = imgs.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return imgs.sub_(unit * self.mean).div_(unit * self.std)


def resize(img: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic with antialiasing, (C, h, w) -> (C, *size); uint8 images are rounded as in Pillow."""
    height, width = img.shape[1:]
    # torch's fast uint8 kernel wants channels_last, and recognises it only in 4 dimensions.
    batch = img.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # (1, C, h, w)
    if height - size[0] > max(0, 2 * (width - size[1])):
        # The vertical pass first, if it shrinks the image more. Pillow 13 does the same, which matters for
        # equal pixels: values are clamped to 0..255 between the two passes.
        batch = F.interpolate(batch, (size[0], width), mode="bicubic", align_corners=False, antialias=True)
    return F.interpolate(batch, size, mode="bicubic", align_corners=False, antialias=True)[0]


def random_crop(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """A box (top, left, height, width) that covers a share of the image's area drawn from `scale`.

    The distribution is that of torchvision's and timm's RandomResizedCrop; the draws are Python's, which cost
    a tenth of torch's. If none of ten draws fits, the largest central box with a legal aspect ratio is taken.
    """
    for _ in range(10):
        area = height * width * random.uniform(*scale)
        ratio = exp(random.uniform(log(ASPECT_RATIOS[0]), log(ASPECT_RATIOS[1])))
        rows, columns = round(sqrt(area / ratio)), round(sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            return random.randint(0, height - rows), random.randint(0, width - columns), rows, columns
    rows = min(height, round(width / ASPECT_RATIOS[0]))
    columns = min(width, round(height * ASPECT_RATIOS[1]))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def crop(img: torch.Tensor | EncodedJpeg, box: tuple[int, int, int, int], size: tuple[int, int]) -> torch.Tensor:
    """The `box` (top, left, height, width) of an image (C, h, w), resized to (C, *size).

    Of a JPEG that is not decoded yet, only so many pixels are decoded that the box keeps at least the rows and columns
    of `size` (see `EncodedJpeg.crop`). Raises BadImageError when it cannot be decoded.
    """
    if isinstance(img, EncodedJpeg):
        if (reduced := img.crop(box, size)) is not None:
            return reduced
        img = img.pixels
    top, left, height, width = box
    return resize(img[:, top : top + height, left : left + width], size)


class RandomCropAndFlip:
    """Random area and aspect ratio, resized to `size` (bicubic, antialiased), mirrored half of the time.

    `augment` transforms Pillow images, so only photographs of 8 bits; float images stay as they are.
    """

    takes_encoded = True

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float],
        augment: Callable[[Image.Image], Image.Image] | None = None,
    ):
        self.size, self.scale, self.augment = size, scale, augment

    def __call__(self, img: torch.Tensor | EncodedJpeg) -> torch.Tensor:
        img = crop(img, random_crop(*img.shape[1:], self.scale), self.size)
        img = img.flip(-1) if random.random() < 0.5 else img
        if self.augment is None or img.dtype != torch.uint8:
            return img
        image = self.augment(Image.fromarray(img.permute(1, 2, 0).numpy()))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class ResizeAndCentreCrop:
    """Resize so that a centre crop of `size` covers `crop_ratio` of the image along its tighter side; crop.

    An image more than LONGEST times as long as the crop is first cut to that length, so that a strip of
    20,000 x 1 pixels does not become one of five million x 256.

    JPEGs are decoded in full, however large: what is evaluated is not random, and its pixels should be those of
    other programs.
    """

    LONGEST = 8

    def __init__(self, size: tuple[int, int], crop_ratio: float):
        self.size = size
        self.resized = tuple(int(side / crop_ratio) for side in size)

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        all_rows, all_columns = img.shape[1:]
        height = min(all_rows, ceil(self.LONGEST * all_columns * self.size[0] / self.size[1]))
        width = min(all_columns, ceil(self.LONGEST * all_rows * self.size[1] / self.size[0]))
        box = (all_rows - height) // 2, (all_columns - width) // 2, height, width
        # The side that needs more enlarging sets the scale, the other one keeps the image's proportions.
        if self.resized[0] * width >= self.resized[1] * height:
            resized = (self.resized[0], max(self.resized[1], int(self.resized[0] * width / height)))
        else:
            resized = (max(self.resized[0], int(self.resized[1] * height / width)), self.resized[1])
        img = crop(img, box, resized)
        top = round((resized[0] - self.size[0]) / 2)
        left = round((resized[1] - self.size[1]) / 2)
        return img[:, top : top + self.size[0], left : left + self.size[1]]


def pretrain_transform(config: Config) -> Callable[[torch.Tensor], torch.Tensor]:
    """Pretraining: a random crop of 20% to 100% of the area, resized to `config.input_size`; mirroring."""
    return RandomCropAndFlip(config.input_size, scale=(0.2, 1.0))


def finetune_transform(config: Config) -> Callable[[torch.Tensor], torch.Tensor]:
    """Fine-tuning: a random crop of 8% to 100% of the area, mirroring, timm's augmentation named `config.aa`.

    Without `config.aa`, colour jitter (`config.color_jitter`) instead. Both are defined for photos of 8 bits: with
    `config.in_chans` other than 3 they are left out, with a warning, and float images are unchanged. Raises
    UserError when timm does not know `config.aa`.
    """
    augment = None
    if (config.aa or config.color_jitter) and config.in_chans != 3:
        logger.warning(
            "auto-augment and colour jitter need 3 channels; with --in_chans %d they are off", config.in_chans
        )
    elif config.aa or config.color_jitter:
        augment = _timms_augmentation(config)
    return RandomCropAndFlip(config.input_size, (0.08, 1.0), augment)


def _timms_augmentation(config: Config) -> Callable[[Image.Image], Image.Image]:
    if config.aa:
        _check_augmentation(config.aa)
    _, augment, _ = create_transform(
        config.input_size,
        is_training=True,
        auto_augment=config.aa or None,
        color_jitter=config.color_jitter,
        interpolation="bicubic",
        mean=config.mean,
        std=config.std,
        separate=True,
    )
    return augment


def _check_augmentation(aa: str) -> None:
    """Raise a UserError for a word of --aa that timm does not know; warn of a magnitude that it does not reach."""
    name, *words = aa.split("-")
    known = AUGMENTATIONS.get(name, "")
    if unknown := [name] * (not known) or [word for word in words if not re.fullmatch(known, word)]:
        raise UserError(
            f"--aa {aa!r} is not an augmentation that timm knows ({unknown[0]!r}), e.g. rand-m9-mstd0.5-inc1"
        )
    given = {word.rstrip("0123456789"): word for word in words}
    most = int(given.get("mmax", f"mmax{MAGNITUDE}").removeprefix("mmax"))
    if (magnitude := int(given.get("m", "m0").removeprefix("m"))) > most:
        logger.warning("--aa %s: magnitudes above %d are reduced to %d; -mmax%d allows more", aa, most, most, magnitude)


def eval_transform(config: Config) -> Callable[[torch.Tensor], torch.Tensor]:
    """Evaluation: resize to input_size / 0.875 and crop the centre; above 224 pixels no margin (ratio 1)."""
    return ResizeAndCentreCrop(config.input_size, crop_ratio(config.input_size))


def crop_ratio(input_size: tuple[int, int]) -> float:
    """The share of the resized image's side that the crop of evaluation takes."""
    return CROP_RATIO if max(input_size) <= 224 else 1.0


class BatchAugmentation:
    """Fine-tuning's augmentation of a batch on the device: timm's random erasing, then its mixup and cutmix.

    (imgs (B, C, H, W), targets (B,) int64) -> imgs of the same shape, changed in place, and targets: class
    distributions (B, num_classes), with the label smoothing in them, if `uses_mixup(config)`; else as they were.
    imgs are normalised, since erased areas get noise of mean 0 and standard deviation 1; B is even with mixup.
    """

    def __init__(self, config: Config, num_classes: int, device: torch.device):
        self.erase = RandomErasing(config.reprob, mode=config.remode, max_count=config.recount, device=device)
        self.mix = None
        if uses_mixup(config):
            self.mix = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                cutmix_minmax=config.cutmix_minmax,
                prob=config.mixup_prob,
                switch_prob=config.mixup_switch_prob,
                mode=config.mixup_mode,
                label_smoothing=config.smoothing,
                num_classes=num_classes,
            )

    def __call__(self, imgs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        imgs = self.erase(imgs)
        return (imgs, targets) if self.mix is None else self.mix(imgs, targets)


def uses_mixup(config: Config) -> bool:
    """Whether `config` asks for mixup or cutmix, whose targets are class distributions."""
    return config.mixup > 0 or config.cutmix > 0 or config.cutmix_minmax is not None


def _posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """timm's, but 0 bits, for which timm asks at the highest magnitude, give a black image as in older versions of
    Pillow; Pillow 13 raises ValueError. (Put into timm's table, for all that use it in this process.)"""
    return posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


NAME_TO_OP.update({name: _posterize for name in NAME_TO_OP if name.startswith("Posterize")})
