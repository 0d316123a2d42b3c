"""Pictures of boxes and masks for people."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util.data.coco import decode_mask
from util.data.datasets import ImageDataset
from util.data.display import Display, shown_channels
from util.data.transforms import Normalize
from util.dense.average_precision import Result

SURE = 0.5  # score of the boxes that are drawn
COLOURS = ("#ff9f1c", "#2ec4f1", "#e83f6f", "#7ae582", "#b388eb", "#ffe14d")  # of classes, in turn
SIDE = 640  # pixels: shorter images are enlarged by a whole factor
GAP, HEAD, TEXT = 16, 40, 18
PAPER, INK = "#ffffff", "#1d2129"
OPACITY = 115  # of masks, of 255


def detections_picture(
    dataset: ImageDataset, results: Sequence[Result], mean: Sequence[float], std: Sequence[float], images: int = 4
) -> Image.Image:
    """The first images of a data set of a `CocoSource`, with their annotations and with what was found in them."""
    annotations, rows = dataset.source.annotations, []
    names = annotations.classes if len(annotations.classes) > 1 else None
    for index in range(min(images, len(dataset))):
        image, target = dataset[0, index]
        pixels = as_picture(image, mean, std)
        sure = [r for r in results if r["image_id"] == annotations.image_ids[index] and r["score"] >= SURE]
        boxes = np.array([result["bbox"] for result in sure]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [annotations.category_ids.index(result["category_id"]) for result in sure]
        masks = [decode_mask(result["segmentation"], *pixels.shape[:2]) for result in sure if "segmentation" in result]
        annotated = target["boxes"].numpy(), (target["labels"] - 1).tolist(), list(target.get("masks", ()))
        rows.append([draw_boxes(pixels, *drawn, names) for drawn in (annotated, (boxes, labels, masks))])
    return table_of_images(rows, ["annotated", f"detected, with a score of at least {SURE:.0%}"])


def as_picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """An image (C, h, w) as it is read, of any kind, as (h, w, 3) of uint8."""
    normalised = Normalize(mean, std)(image[None])
    return Display(normalised, mean, std, shown_channels(len(image)))(normalised)[0]


def draw_boxes(
    pixels: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    masks: Sequence[np.ndarray] = (),
    names: Sequence[str] | None = None,
) -> Image.Image:
    """An image (height, width, 3) of uint8 with boxes (n, 4) and masks (height, width) drawn into it.

    Args:
        boxes: left, top, right, bottom in pixels.
        labels: the class of each, from 0.
        masks: of each, or none at all.
        names: of the classes, where they are to be written.
    """
    height, width = pixels.shape[:2]
    factor = max(1, SIDE // max(height, width))
    image = Image.fromarray(pixels).resize((factor * width, factor * height), Image.Resampling.BICUBIC)
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    for mask, colour in zip(masks, colours):
        opacity = Image.fromarray((np.asarray(mask) > 0).astype(np.uint8) * OPACITY).resize(image.size)
        image.paste(Image.new("RGB", image.size, colour), mask=opacity)
    draw = ImageDraw.Draw(image)
    for box, label, colour in zip(np.asarray(boxes) * factor, labels, colours):
        draw.rectangle([*(box[:2].round()), *(box[2:].round() - 1).clip(min=box[:2].round())], outline=colour, width=2)
        if names is not None:
            draw.text((box[0] + 4, box[1] + 2), names[label], fill=colour, font=ImageFont.load_default(TEXT - 4))
    return image


def table_of_images(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """Images in rows, each column below its title."""
    widths = [max(row[i].width for row in rows) for i in range(len(titles))]
    heights = [max(image.height for image in row) for row in rows]
    width = sum(widths) + GAP * (len(widths) + 1)
    page = Image.new("RGB", (width, HEAD + sum(heights) + GAP * len(rows)), PAPER)
    draw, left = ImageDraw.Draw(page), GAP
    for i, title in enumerate(titles):
        draw.text((left, HEAD // 4), title, fill=INK, font=ImageFont.load_default(TEXT))
        top = HEAD
        for row, height in zip(rows, heights):
            page.paste(row[i], (left, top))
            top += height + GAP
        left += widths[i] + GAP
    return page
