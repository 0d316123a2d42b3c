"""Small folders of images and label maps: parts of photographs in three classes."""

from argparse import Namespace
from pathlib import Path

import numpy as np
from photos import PHOTOS, data_args
from PIL import Image


def make_pairs(root: Path, counts: dict[str, int], size: tuple[int, int] = (32, 32), nb_classes: int = 3) -> Path:
    """Scenes as pairs of PNGs: crops of photographs with a dark left and a light right part; their classes 0 and 2, and
    a band of 1 at the top."""
    for split, count in counts.items():
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            rng = np.random.default_rng((number, len(split)))
            photo = np.asarray(Image.open(PHOTOS[number % len(PHOTOS)]).convert("RGB"))
            top, left = (rng.integers(0, side - own + 1) for side, own in zip(photo.shape, size))
            pixels = photo[top : top + size[0], left : left + size[1]] // 3
            edge, band = rng.integers(size[1] // 4, size[1] * 3 // 4), rng.integers(3, size[0] // 2)
            labels = np.zeros(size, dtype=np.uint8)
            labels[:, edge:] = 2
            labels[:band] = 1
            pixels = pixels + np.array([[0, 0, 0], [0, 160, 0], [160, 0, 160]], dtype=np.uint8)[labels]
            Image.fromarray(pixels).save(root / "images" / split / f"{number}.png")
            Image.fromarray(labels).save(root / "masks" / split / f"{number}.png")
    (root / "classes.txt").write_text("".join(f"class {i}\n" for i in range(nb_classes)))
    return root


def pair_settings(root: Path, **changes) -> Namespace:
    return data_args(root, **{"nb_classes": 3, "ignore_label": 255, "reduce_zero_label": False, **changes})
