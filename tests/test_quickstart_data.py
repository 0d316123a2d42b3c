"""The quickstart's embedded images: whole, exact, balanced, small, and licensed."""

import hashlib
import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[1] / "exp" / "quickstart"
ARCHIVE = FOLDER / "fashion_mnist.tar.xz"
# SHA-256 of all pixels, in the order of the paths.
PIXELS = {
    "train": "3882679b9aa223dc16b788a20c48d03bef2fda5aee2ea744854825d4e3b0acbe",
    "val": "eb34ad84cf6e2ba068bcf6753659d25b91e844372f4f66ec734a29f6bea7cbaf",
}


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    with tarfile.open(ARCHIVE) as tar:
        return {entry.name: np.array(Image.open(io.BytesIO(tar.extractfile(entry).read()))) for entry in tar}


def split(images: dict[str, np.ndarray], name: str) -> np.ndarray:
    return np.stack([images[path] for path in sorted(images) if path.startswith(f"{name}/")])


def test_archive_is_small():
    assert ARCHIVE.stat().st_size < 6e6


def test_layout_is_an_image_folder_with_balanced_classes(images):
    counts = Counter(tuple(path.split("/")[:2]) for path in images)
    classes = "ankle_boot bag coat dress pullover sandal shirt sneaker t_shirt trouser".split()
    assert counts == {("train", name): 800 for name in classes} | {("val", name): 200 for name in classes}


@pytest.mark.parametrize("name", ["train", "val"])
def test_pixels_are_the_originals(images, name):
    pixels = split(images, name)
    assert pixels.dtype == np.uint8 and pixels.shape[1:] == (32, 32)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == PIXELS[name]
    border = np.ones((32, 32), dtype=bool)
    border[2:-2, 2:-2] = False
    assert not pixels[:, border].any()


def test_no_image_is_in_both_splits_or_twice(images):
    assert len({image.tobytes() for image in images.values()}) == 10_000


def test_statistics_and_licence_are_stated(images):
    readme = (FOLDER / "README.md").read_text()
    pixels = split(images, "train") / 255
    assert f"mean is {pixels.mean():.3f} and the standard deviation {pixels.std():.3f}" in " ".join(readme.split())
    assert "Copyright © 2017 Zalando SE" in readme and "Permission is hereby granted" in readme
