"""Semantic segmentation: prediction by sliding windows, and exact measures."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from util.data.label_maps import IGNORED

ENLARGED_CLASSES = 8  # at a time

# --- Prediction ---


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover `side` pixels, `stride` apart; the last one ends at the edge."""
    last = max(0, side - window)
    return [*range(0, last, stride), last]


def sliding_logits(
    model: Callable[[Tensor], Tensor], imgs: Tensor, window: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """Logits (B, num_classes, H, W) of images (B, C, H, W): for each pixel the mean over all windows that contain it.

    A side that is shorter than the window is taken whole.
    """
    rows, columns = (window_starts(*of) for of in zip(imgs.shape[-2:], window, stride))
    total, count = None, imgs.new_zeros(imgs.shape[-2:])
    for top in rows:
        for left in columns:
            here = ..., slice(top, top + window[0]), slice(left, left + window[1])
            logits = model(imgs[here]).float()
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *imgs.shape[-2:])
            total[here] += logits
            count[here] += 1
    return total / count


def enlarged_classes(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The most probable class of each pixel (B, *size) uint8, by logits (B, classes, H, W) of another size.

    A few classes at a time, since the enlarged logits of all of them are gigabytes for a large photograph.
    """
    if logits.shape[-2:] == tuple(size):
        return logits.argmax(dim=1).to(torch.uint8)
    highest = logits.new_full((len(logits), *size), -math.inf)
    classes = torch.zeros_like(highest, dtype=torch.uint8)
    for first in range(0, logits.shape[1], ENLARGED_CLASSES):
        enlarged = F.interpolate(logits[:, first : first + ENLARGED_CLASSES], tuple(size), mode="bilinear")
        value, index = enlarged.max(dim=1)
        classes = torch.where(value > highest, (first + index).to(torch.uint8), classes)
        highest = torch.maximum(value, highest)
    return classes


# --- Measures ---


def confusion_matrix(labels: Tensor, predicted: Tensor, nb_classes: int) -> Tensor:
    """Counts of pixels (nb_classes, nb_classes), int64: rows are the labels' classes, columns the predicted ones.

    Args:
        labels: of any shape, uint8; IGNORED ones are left out.
        predicted: classes, of the same shape.
    """
    counts = labels != IGNORED
    pairs = labels[counts].long() * nb_classes + predicted[counts].long()
    return torch.bincount(pairs, minlength=nb_classes**2).view(nb_classes, nb_classes)


@dataclass(frozen=True)
class SegmentationScores:
    """In percent."""

    miou: float  # mean over the classes that occur
    pixel_acc: float  # of the labelled pixels
    class_iou: list[float]  # nan for a class that neither labels nor predictions have


def segmentation_scores(confusion: Tensor) -> SegmentationScores:
    """The scores that follow from a `confusion_matrix` of all pixels; nan where there are none."""
    confusion = confusion.cpu().double()
    right = confusion.diagonal()
    iou = 100 * right / (confusion.sum(0) + confusion.sum(1) - right)
    return SegmentationScores(
        miou=iou.nanmean().item(),
        pixel_acc=(100 * right.sum() / confusion.sum()).item(),
        class_iou=iou.tolist(),
    )
