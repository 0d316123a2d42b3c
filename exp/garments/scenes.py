"""Make scenes with exact label maps: grey garments of Fashion-MNIST on textured canvases in colours.

    python exp/garments/scenes.py --out DIR [--seed N]

DIR gets

    unlabelled/    scenes to pretrain on; the labelled ones for training are the first of them
    labelled/      images/train, masks/train, images/val, masks/val and classes.txt

The garments in validation scenes are in no other scene. Equal seeds make equal files.
"""

import argparse
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

FASHION_MNIST = Path(__file__).resolve().parents[1] / "quickstart" / "fashion_mnist.tar.xz"
SIDE = 48  # of a scene, in pixels
GARMENTS = (1, 2)  # in a scene
SCALES = (1.1, 1.5)  # of a garment of 28 x 28 pixels
PLACES = 10  # tried for a garment
BORDER = 2  # empty pixels around garments in the archive
CLASSES = {  # the archive's, merged if they hardly differ at this size; without dresses, which resemble tops
    "top": ("t_shirt", "pullover", "coat", "shirt"),
    "trousers": ("trouser",),
    "shoe": ("sandal", "sneaker", "ankle_boot"),
    "bag": ("bag",),
}
DARK = 20  # of 255: darker pixels that touch the border are not the garment's


@dataclass
class Garments:
    """Grey images (n, 28, 28) of garments, which pixels are theirs, and their classes (n,), from 1."""

    images: np.ndarray
    shapes: np.ndarray
    labels: np.ndarray


def read_garments(split: str) -> Garments:
    """The garments of `split` ('train' or 'val') in the archive."""
    number = {name: i for i, names in enumerate(CLASSES.values(), 1) for name in names}
    images, labels = [], []
    with tarfile.open(FASHION_MNIST) as archive:
        for member in archive:
            folder, _, rest = member.name.partition("/")
            label = number.get(rest.partition("/")[0])
            if folder == split and label and member.name.endswith(".png"):
                images.append(np.asarray(Image.open(io.BytesIO(archive.extractfile(member).read()))))
                labels.append(label)
    images = np.stack(images)[:, BORDER:-BORDER, BORDER:-BORDER]
    return Garments(images, silhouettes(images), np.array(labels))


def silhouettes(images: np.ndarray) -> np.ndarray:
    """Which pixels of images (n, h, w) are the garment's: all but the dark ones that are joined to the border."""
    dark = np.pad(images < DARK, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    outside = np.ones_like(dark)
    outside[:, 1:-1, 1:-1] = False
    before = 0
    while (now := outside.sum()) != before:
        before = now
        for axis, step in ((1, 1), (1, -1), (2, 1), (2, -1)):
            outside |= dark & np.roll(outside, step, axis)
    return ~outside[:, 1:-1, 1:-1]


def make_canvas(rng: np.random.Generator) -> np.ndarray:
    """A texture (SIDE, SIDE, 3) in 0..255: two colours mixed by stripes, checks or clouds, with fine noise."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.08, 0.5)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kind = rng.integers(3)
    if kind == 0:
        mix = np.sin(2 * np.pi * along / period) / 2 + 0.5
    elif kind == 1:
        mix = (np.floor(along / period) + np.floor(across / period)) % 2
    else:
        coarse = [Image.fromarray(rng.random((n, n)).astype(np.float32)) for n in (3, 6, 12)]
        mix = sum(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in coarse) / len(coarse)
    first, second = rng.uniform(0, 255, (2, 3))
    canvas = first + 0.5 * mix[..., None] * (second - first) + rng.normal(0, 8, (SIDE, SIDE, 1))
    return canvas.clip(0, 255)


def paste(
    canvas: np.ndarray, labels: np.ndarray, image: np.ndarray, shape: np.ndarray, label: int, rng: np.random.Generator
) -> None:
    """Put a garment on the canvas at a random scale, and its label into the label map.

    Of some random places, the one where it hides least of the other garments is taken.
    """
    side = round(len(image) * rng.uniform(*SCALES))
    grey = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))
    inside = np.asarray(Image.fromarray(shape).resize((side, side), Image.Resampling.NEAREST))
    if rng.random() < 0.5:
        grey, inside = grey[:, ::-1], inside[:, ::-1]
    corners = rng.integers(0, SIDE - side + 1, (PLACES, 2))
    places = [np.s_[top : top + side, left : left + side] for top, left in corners]
    here = min(places, key=lambda place: np.count_nonzero(labels[place][inside]))
    canvas[here][inside] = grey[inside][:, None]
    labels[here][inside] = label


def make_scene(garments: Garments, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A scene and its label map: 0 where the canvas shows, else the class of the garment on top."""
    canvas, labels = make_canvas(rng), np.zeros((SIDE, SIDE), dtype=np.uint8)
    for _ in range(rng.integers(GARMENTS[0], GARMENTS[1] + 1)):
        label = rng.choice(np.unique(garments.labels))  # so that all classes are equally frequent
        i = rng.choice(np.flatnonzero(garments.labels == label))
        paste(canvas, labels, garments.images[i], garments.shapes[i], label, rng)
    return Image.fromarray(canvas.round().astype(np.uint8)), Image.fromarray(labels)


def main(flags: argparse.Namespace) -> None:
    unlabelled, labelled = flags.out / "unlabelled", flags.out / "labelled"
    unlabelled.mkdir(parents=True, exist_ok=True)
    for stream, split, count in ((0, "train", flags.unlabelled), (1, "val", flags.val)):
        garments = read_garments(split)
        images, masks = labelled / "images" / split, labelled / "masks" / split
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            scene, labels = make_scene(garments, np.random.default_rng((flags.seed, stream, number)))
            name = f"{number:05d}.png"
            if split == "train":
                scene.save(unlabelled / name, compress_level=1)
            if split == "val" or number < flags.labelled:
                scene.save(images / name, compress_level=1)
                labels.save(masks / name)
    (labelled / "classes.txt").write_text("\n".join(["canvas", *CLASSES]) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make scenes of garments with exact label maps.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the scenes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (default: 0)")
    parser.add_argument(
        "--unlabelled", type=int, default=4000, metavar="N", help="scenes to pretrain on (default: 4000)"
    )
    parser.add_argument("--labelled", type=int, default=1000, metavar="N", help="labelled of these (default: 1000)")
    parser.add_argument("--val", type=int, default=200, metavar="N", help="scenes for validation (default: 200)")
    main(parser.parse_args())
