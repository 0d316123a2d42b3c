"""Pictures of boxes and masks for people."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageColor
from torch import Tensor
from torchvision.ops import box_convert

from util.data.coco import decode_mask
from util.data.datasets import ImageDataset
from util.data.display import Display, render
from util.data.transforms import Normalize
from util.dense.average_precision import Result

IMAGES = 4  # in a picture, at most
SURE = 0.5  # score of the boxes that are drawn
COLOURS = ("#ff9f1c", "#2ec4f1", "#e83f6f", "#7ae582", "#b388eb", "#ffe14d")  # of classes, in turn
OPACITY = 0.45  # of masks


def detections_picture(
    dataset: ImageDataset, results: Sequence[Result], mean: Sequence[float], std: Sequence[float]
) -> Image.Image:
    """The first images of a data set of a `CocoSource`, with their annotations and with what was found in them."""
    annotations, rows, objects = dataset.source.annotations, [], []
    for index in range(min(IMAGES, len(dataset))):
        image, target = dataset[0, index]
        pixels = as_picture(image, mean, std)
        sure = [r for r in results if r["image_id"] == annotations.image_ids[index] and r["score"] >= SURE]
        boxes = [result["bbox"] for result in sure]
        labels = [annotations.category_ids.index(result["category_id"]) for result in sure]
        masks = [decode_mask(result["segmentation"], *pixels.shape[:2]) for result in sure if "segmentation" in result]
        annotated = box_convert(target["boxes"], "xyxy", "xywh").tolist(), (target["labels"] - 1).tolist()
        rows.append([with_masks(pixels, annotated[1], target.get("masks", ())), with_masks(pixels, labels, masks)])
        objects += [annotated, (boxes, labels)]
    figure, axes = image_table(rows, ["annotated", f"detected, with a score of at least {SURE:.0%}"], 6.4)
    for place, (boxes, labels) in zip(axes.flat, objects):
        for (left, top, width, height), label in zip(boxes, labels):
            corner, colour = (left - 0.5, top - 0.5), COLOURS[label % len(COLOURS)]  # pixel 0 is drawn from -0.5 on
            place.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=1.5))
            if len(annotations.classes) > 1:
                style = dict(color=colour, va="top", parse_math=False, clip_on=True)
                place.annotate(annotations.classes[label], corner, (3, -3), textcoords="offset points", **style)
    return render(figure)


def as_picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """An image (C, h, w) as it is read, of any kind, as (h, w, 3) of uint8."""
    normalised = Normalize(mean, std)(image[None])
    return Display(normalised, mean, std)(normalised)[0]


def with_masks(pixels: np.ndarray, labels: Sequence[int], masks: Sequence[np.ndarray | Tensor]) -> np.ndarray:
    """An image (h, w, 3) with masks (h, w) over it, in the colours of their labels."""
    pixels = pixels.copy()
    for label, mask in zip(labels, masks):
        inside, colour = np.asarray(mask) > 0, ImageColor.getrgb(COLOURS[label % len(COLOURS)])
        pixels[inside] = (1 - OPACITY) * pixels[inside] + OPACITY * np.array(colour)
    return pixels


def image_table(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], side: float) -> tuple[Figure, np.ndarray]:
    """A figure with images (h, w, 3) in rows, the columns below their titles and `side` inches wide; and the axes
    (rows, columns), whose units are the images' pixels."""
    heights = [row[0].shape[0] / row[0].shape[1] for row in rows]
    figure = Figure((side * len(titles), side * sum(heights) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False, height_ratios=heights)
    for place, image in zip(axes.flat, (image for row in rows for image in row)):
        height, width = image.shape[:2]
        step = max(1, width // int(200 * side))  # two pixels for each that is drawn are enough
        place.imshow(image[::step, ::step], extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        place.axis("off")
    for place, title in zip(axes[0], titles):
        place.set_title(title)
    return figure, axes
