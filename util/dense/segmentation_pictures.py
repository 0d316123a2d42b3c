"""Label maps as pictures for people, and predicted ones as files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from util.data.datasets import ImageDataset
from util.data.decoding import decoded
from util.data.display import render, without_formulas
from util.data.label_maps import IGNORED, LabelMapSource
from util.dense.detection_pictures import as_picture, image_table
from util.errors import unreadable_is_user_error


def class_colors(number: int) -> np.ndarray:
    """Colours (number, 3) uint8 for classes: hues a golden section of the circle apart, brighter and darker in turn."""
    classes = np.arange(number)
    hue, saturation, value = classes * 0.618034 % 1, 0.9 - 0.15 * (classes // 3 % 3), 1 - 0.2 * (classes % 3)
    hsv = (np.stack([hue, saturation, value], axis=1) * 255).round().astype(np.uint8)
    return np.asarray(Image.fromarray(hsv[None], "HSV").convert("RGB"))[0]


def overlay(image: np.ndarray, classes: np.ndarray, colors: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """A picture (h, w, 3) in grey, with its classes (h, w) in colours over it; IGNORED pixels stay grey."""
    labelled = classes != IGNORED
    picture = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    picture[labelled] += opacity * (colors[classes[labelled]] - picture[labelled])
    return picture.round().astype(np.uint8)


def segmentation_table(
    rows: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]], titles: Sequence[str], names: Sequence[str]
) -> Image.Image:
    """A table of images (h, w, 3), in each row one and then its label maps (h, w), over a legend of the classes.

    Args:
        rows: an image and its label maps.
        titles: of the columns.
        names: of all classes; those that occur are in the legend.
    """
    colors = class_colors(len(names))
    images = [[image, *(overlay(image, classes, colors) for classes in label_maps)] for image, label_maps in rows]
    figure, _ = image_table(images, titles, 3.2)
    found = {number for _, label_maps in rows for classes in label_maps for number in np.unique(classes).tolist()}
    patches = [Patch(color=colors[number] / 255, label=names[number]) for number in sorted(found - {IGNORED})]
    widest = 6 * max((len(patch.get_label()) for patch in patches), default=0) + 50  # of an entry, in points
    columns = max(1, int(72 * figure.get_figwidth() / widest))
    figure.set_figheight(figure.get_figheight() + 0.3 * len(patches) / columns)
    without_formulas(figure.legend(handles=patches, loc="outside lower left", ncols=columns, frameon=False))
    return render(figure)


def segmentation_picture(
    dataset: ImageDataset, predicted: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]
) -> Image.Image:
    """The first images of a data set of a `LabelMapSource`, with their label maps and with what was predicted.

    Args:
        predicted: classes (h, w) of each of these images.
        mean, std: of the images, see `as_picture`.
    """
    rows = []
    for index, classes in enumerate(predicted):
        pixels, labels = read_picture(dataset, index, mean, std)
        rows.append((pixels, [labels, classes.numpy()]))
    return segmentation_table(rows, ["image", "label map", "predicted"], dataset.classes)


def read_picture(
    dataset: ImageDataset, index: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """An image of a data set of a `LabelMapSource` as a picture (h, w, 3), and its label map (h, w)."""
    image, labels = dataset.source.read(index)
    return as_picture(decoded(dataset.pixels.convert(image)), mean, std), labels.numpy()


class PredictionFolder:
    """Writes predicted classes (h, w) of image `index`: `keep(index, classes)`.

    labels/NAME.png is a label map with the data set's own numbers; overlays/NAME.png shows it over the image.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(self, folder: str, dataset: ImageDataset, mean: Sequence[float], std: Sequence[float]):
        self.folder, self.dataset, self.mean, self.std = Path(folder), dataset, mean, std
        self.colors = class_colors(len(dataset.classes))
        with unreadable_is_user_error(f"--predictions {folder} cannot be written"):  # before the evaluation
            (self.folder / "labels").mkdir(parents=True, exist_ok=True)

    def __call__(self, index: int, classes: Tensor) -> None:
        source: LabelMapSource = self.dataset.source
        pixels, _ = read_picture(self.dataset, index, self.mean, self.std)
        values, shown = source.numbers.values_of(classes.numpy()), overlay(pixels, classes.numpy(), self.colors)
        for kind, picture in (("labels", values), ("overlays", shown)):
            path = self.folder / kind / source.label_name(index)
            with unreadable_is_user_error(f"--predictions {self.folder} cannot be written"):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path)
