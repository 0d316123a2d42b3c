"""Whether --mean and --std are in the units of the images. In other units training runs, but learns nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor

PIXELS = 64  # about so many rows and columns of an image are measured
OUTLIER = 1000  # times the others' largest value
# Limits for normalised images. What people do on purpose stays within: medical grey images, dark ones, ImageNet's
# statistics on other photographs, statistics of another data set.
MOST = 10.0  # distance of a channel's mean from 0, and its standard deviation
LEAST = 0.02  # standard deviation of all channels; values in another unit are hundreds of times too small
SUSPECT = 0.1  # likewise for images of more than 8 bits (12 bits in files of 16 give about 0.06), else for a warning
# Ratios of images' largest values: for a warning (12 bits among 16), and for an error where values have no bounds.
GAP, WIDE_GAP = 10.0, 50.0
SHARE = 0.05  # of a sample, at least, that differs in kind from the rest


def measure(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (C,) float64, in the units of --mean: uint8 images are in 0..1.

    images: (C, h, w) each, of any size; all weigh the same, but a few with values far beyond the others' (a damaged
    file has numbers such as 1e38) are left out.
    """
    means, squares, peaks = [], [], []
    for image in images:
        step = max(1, min(image.shape[1:]) // PIXELS)
        values = image[:, ::step, ::step].double() / (255 if image.dtype == torch.uint8 else 1)
        means.append(values.mean(dim=(1, 2)))
        squares.append(values.square().mean(dim=(1, 2)))
        peaks.append(values.abs().max())
    peak = torch.stack(peaks)
    ordinary = (peak <= OUTLIER * peak.median()) | (peak.median() == 0)
    mean = torch.stack(means)[ordinary].mean(dim=0)
    return mean, (torch.stack(squares)[ordinary].mean(dim=0) - mean.square()).clamp(min=0).sqrt()


def magnitude(image: Tensor, mean: Tensor, std: Tensor) -> float:
    """Root mean square of a float image (C, h, w) normalised by `mean` and `std` (C, 1, 1): the channels' median.

    Around 1. With the mean and deviation that `measure` gives for a set of images, above 100 for fewer than 1 in 5000
    of them: over all, the mean square of each channel is 1, and half of an image's channels would be above 10,000.
    """
    step = max(1, min(image.shape[1:]) // PIXELS)
    values = (image[:, ::step, ::step] - mean) / std
    return float(values.square().mean(dim=(1, 2)).median().sqrt())


def check_units(images: Sequence[Tensor]) -> tuple[str, str]:
    """Whether a sample of a data set is of two kinds, the values of one far below those of the other.

    Returns an error and a warning, '' for none, as `check_images`. Images of one colour are left out.
    """
    peaks = sorted(float(image.double().abs().max()) for image in images if image.min() != image.max())
    fewest = max(2, SHARE * len(images))
    gaps = [(peaks[i] / peaks[i - 1], i) for i in range(1, len(peaks)) if fewest <= i <= len(peaks) - fewest]
    factor, below = max(gaps, default=(1.0, 0))
    if factor < GAP:
        return "", ""
    message = (
        f"values reach at most {peaks[below - 1]:.4g} in {below} of {len(images)} images, and at least "
        f"{peaks[below]:.4g} in {len(peaks) - below} others, as if they were in different units: convert all to one"
    )
    return (message, "") if factor >= WIDE_GAP and images[0].dtype != torch.uint8 else ("", message)


def check_images(images: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]) -> tuple[str, str]:
    """Check a sample of a data set, normalised with `mean` and `std`; returns an error and a warning, '' for none.

    images: (C, h, w) each, as read; at least one.
    """
    if all(torch.equal(image.amin(dim=(1, 2)), image.amax(dim=(1, 2))) for image in images):
        return "", f"each of {len(images)} sample images has a single colour: nothing can be learned from them"
    if len(images) > 1 and all(torch.equal(image, images[0]) for image in images[1:]):
        return "", f"{len(images)} sample images are identical"
    measured, deviation = measure(images)
    given_std = torch.tensor(std, dtype=torch.float64)
    offset, scale = (measured - torch.tensor(mean, dtype=torch.float64)) / given_std, deviation / given_std
    unseen = (deviation > 0) & (scale < LEAST)
    if offset.abs().max() <= MOST and SUSPECT <= scale.max() <= MOST and not unseen.any():
        return "", ""
    deviation[deviation == 0] = 1.0  # any suits a channel that is constant
    flags = f"--mean {_listed(measured)} --std {_listed(deviation)}"
    message = (
        f"normalised with --mean {_listed(mean)} --std {_listed(std)}, these images have mean {_listed(offset)} and "
        f"standard deviation {_listed(scale)}, far from 0 and 1. Measured on {len(images)} of them: {flags}"
    )
    least = LEAST if images[0].dtype == torch.uint8 else SUSPECT
    wrong = not offset.abs().max() <= MOST or not least <= scale.max() <= MOST
    return (message, "") if wrong else ("", message)


def _listed(values: Sequence[float] | Tensor) -> str:
    return " ".join(f"{float(value):.4g}" for value in values)
