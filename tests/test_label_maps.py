"""Images with label maps: what is read of them and refused, and how both are cut."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from label_map_folder import make_pairs, pair_settings
from PIL import Image

import models_mixmae  # noqa: F401 - registers the models
from util.data import label_maps
from util.data.datasets import SAMPLE
from util.data.decoding import BadImageError
from util.data.label_maps import IGNORED, RandomScaleAndCrop, Whole, build_segmentation_dataset
from util.data.sources import spread
from util.dense.segmentation_pictures import class_colors
from util.errors import UserError

ROOT = Path(__file__).resolve().parent.parent

# --- Label maps ---------------------------------------------------------------------------------------------


def test_ade20ks_layout_ignores_0_and_counts_from_1(tmp_path):
    values = np.arange(151, dtype=np.uint8).reshape(1, 151).repeat(2, 0)
    for kind, name, pixels in (("images", "a.jpg", values), ("annotations", "a.png", values)):
        for split in ("training", "validation"):
            (tmp_path / kind / split).mkdir(parents=True)
            Image.fromarray(pixels).convert("RGB" if kind == "images" else "L").save(tmp_path / kind / split / name)
    assert label_maps.find_layout(str(tmp_path)).reduce_zero_label
    dataset = build_segmentation_dataset(
        pair_settings(tmp_path, nb_classes=150, reduce_zero_label=True), "val", Whole(2)
    )
    labels = dataset[(0, 0)][1]
    assert labels[0].tolist() == [IGNORED, *range(150)]
    numbers = dataset.source.numbers
    assert numbers.values_of(labels[:, 1:].numpy()).tolist() == values[:, 1:].tolist()
    # On request the same numbers mean what they mean in pairs
    dataset = build_segmentation_dataset(pair_settings(tmp_path, nb_classes=151), "val", Whole(2))
    assert dataset[(0, 0)][1].tolist() == values.tolist()


def test_label_maps_may_be_grey_palette_binary_or_of_16_bits(tmp_path):
    values = np.array([[0, 1], [2, 255]], dtype=np.uint8)
    palette = Image.fromarray(values)
    palette.putpalette(class_colors(256).tobytes())
    for name, image, expected in (
        ("grey", Image.fromarray(values), values),
        ("palette", palette, values),
        ("16", Image.fromarray(values.astype(np.uint16) * 200), values.astype(int) * 200),
        ("1", Image.fromarray(values > 1), values > 1),
    ):
        image.save(tmp_path / f"{name}.png")
        assert label_maps.read_label_map(str(tmp_path / f"{name}.png")).tolist() == expected.astype(int).tolist(), name


def test_bad_labels_each_have_their_message(tmp_path):
    make_pairs(tmp_path, {"train": 2, "val": 2})
    bad = tmp_path / "masks" / "train" / "1.png"
    good = np.asarray(Image.open(bad))

    def refused(message: str, pixels: np.ndarray | None = None, **changes) -> None:
        if pixels is not None:
            Image.fromarray(pixels).save(bad)
        with pytest.raises(UserError, match=message):
            build_segmentation_dataset(pair_settings(tmp_path, **changes), "train", Whole(32))
        Image.fromarray(good).save(bad)

    file = re.escape(str(bad))
    refused(rf"1\.png.*label map {file} has 32 x 16 pixels, the image 32 x 32", good[:16])
    refused(
        rf"label map {file} has the value \['7'\], which is not a class: with --nb_classes 3 these are 0 to 2, and 255 "
        "is ignored",
        np.where(good == 2, np.uint8(7), good),
    )
    refused("these are 1 to 3, and 0 and 255 is", good + np.uint8(4), reduce_zero_label=True)
    refused("is RGB: a label map is a grey or palette PNG", np.stack([good] * 3, 2))
    bad.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    refused(f"label map {file} cannot be read")
    Image.fromarray(good.T[:, :20]).save(bad)
    Image.open(tmp_path / "images" / "train" / "1.png").resize((32, 20)).save(tmp_path / "images" / "train" / "1.png")
    with pytest.raises(BadImageError, match=r"did its EXIF tag turn the photograph\? --ignore_exif"):
        build_segmentation_dataset(pair_settings(tmp_path), "train", Whole(32))
    bad.unlink()
    refused(r"1 of the 2 images in .*images/train have no label map in .*masks/train: \['1\.png'\]")
    Image.fromarray(good).save(bad)
    with pytest.raises(UserError, match="label no pixel: in a sample of 2, all pixels are 255, which is ignored"):
        for name in ("0", "1"):
            Image.fromarray(np.full_like(good, 255)).save(bad.with_name(f"{name}.png"))
            make_photo = Image.fromarray(np.zeros((*good.shape, 3), np.uint8))
            make_photo.save(tmp_path / "images" / "train" / f"{name}.png")
        build_segmentation_dataset(pair_settings(tmp_path), "train", Whole(32))


def test_one_class_in_all_label_maps_is_an_error(tmp_path):
    """As in masks of 0 and 255, where 255 is ignored; not where another class is outside the sample."""
    make_pairs(tmp_path, {"train": SAMPLE + 2}, (8, 8))
    paths = sorted((tmp_path / "masks/train").iterdir())
    for path in paths:
        Image.fromarray(np.uint8([[0, 255]]).repeat(8, 0).repeat(4, 1)).save(path)
    message = r"masks/train have only one class, 'class 0', beside .* \(255\).* 0 and 255 must become 0 and 1"
    with pytest.raises(UserError, match=message):
        build_segmentation_dataset(pair_settings(tmp_path), "train", Whole(8))
    unseen = (set(range(len(paths))) - set(spread(len(paths), SAMPLE))).pop()
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(paths[unseen])
    build_segmentation_dataset(pair_settings(tmp_path), "train", Whole(8))


def test_bad_folders_and_names_each_have_their_message(tmp_path):
    with pytest.raises(UserError, match="has no label maps: neither annotations/ nor masks/; there must be"):
        label_maps.find_layout(str(tmp_path))
    make_pairs(tmp_path, {"train": 2})
    with pytest.raises(UserError, match="images/val does not exist: the val images are in"):
        build_segmentation_dataset(pair_settings(tmp_path), "val", Whole(32))
    assert label_maps.number_of_classes(str(tmp_path), None) == 3
    with pytest.raises(UserError, match=r"--nb_classes is 4 .given, or .* names 3 classes: .'class 0'"):
        label_maps.number_of_classes(str(tmp_path), 4)
    (tmp_path / "classes.txt").write_text("one\none\n")
    with pytest.raises(UserError, match=r"classes.txt has a name twice: .'one'"):
        label_maps.number_of_classes(str(tmp_path), None)
    (tmp_path / "classes.txt").unlink()
    table = "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t1\t2\t1\twall\n2\t0.1\t1\t2\t0\tbuilding, edifice\n"
    (tmp_path / "objectInfo150.txt").write_text(table)
    assert label_maps.read_class_names(str(tmp_path)) == ["wall", "building, edifice"]
    (tmp_path / "objectInfo150.txt").unlink()
    with pytest.raises(UserError, match="--nb_classes is missing: give the number of classes, or their names in"):
        label_maps.number_of_classes(str(tmp_path), None)
    (tmp_path / "annotations").mkdir()
    with pytest.raises(UserError, match="has both annotations/ and masks/"):
        label_maps.find_layout(str(tmp_path))


# --- Transforms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 60), (16, 16), (9, 70)])
def test_image_and_labels_are_cut_alike(size):
    """Where an image's values are its labels, they still are afterwards, away from edges; padding is ignored."""
    transform = RandomScaleAndCrop((32, 48), 32, (0.5, 2.0), fill=(0.5, 0.5, 0.5))
    labels = torch.zeros(size, dtype=torch.uint8)
    labels[size[0] // 2 :, size[1] // 3 :] = 100
    image = labels.expand(3, -1, -1)
    seen = set()
    for seed in range(40):
        random.seed(seed)
        cut, found = transform(image, labels)
        assert cut.shape == (3, 32, 48) and cut.dtype == torch.uint8 and found.shape == (32, 48)
        padded = found == IGNORED
        assert (cut[:, padded] == 128).all()
        inner = found[~padded.all(1)][:, ~padded.all(0)]
        assert (inner != IGNORED).all()  # only whole rows and columns, at the right and bottom
        assert not padded[0, 0]
        agree = (cut[0].int() - found.int()).abs() < 50
        assert agree[~padded].float().mean() > 0.8
        seen.add((inner.shape, bool(inner[-1, -1]), bool(inner[-1, 0])))
    assert len(seen) > 3


def test_an_image_that_is_large_enough_leaves_no_empty_edge():
    """Enlarged 1.6 times, 15 pixels are 9.4 of the image; 9 would be 14.4."""
    labels = torch.zeros(40, 53, dtype=torch.uint8)
    for size in range(9, 64):
        transform = RandomScaleAndCrop((size, size), 64, (1.0, 1.0), fill=(0.0,))
        assert not (transform(labels[None], labels)[1] == IGNORED).any(), size


def test_a_crop_shows_more_than_one_class_where_it_can():
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:, 48:] = 1
    transform = RandomScaleAndCrop((16, 16), 64, (1.0, 1.0), fill=(0.0,))
    shares = []
    for seed in range(30):
        random.seed(seed)
        found = transform(labels[None], labels)[1]
        shares.append(found.float().mean().item())
    assert np.mean([0.25 <= share <= 0.75 for share in shares]) > 0.5  # without looking: 0.18


def test_evaluation_leaves_the_labels_as_they_are():
    image, labels = torch.zeros(3, 40, 60, dtype=torch.uint8), torch.zeros(40, 60, dtype=torch.uint8)
    scaled, same = Whole(20)(image, labels)
    assert scaled.shape == (3, 20, 30) and same is labels
    assert Whole(20)(torch.zeros(3, 10, 4000, dtype=torch.uint8), labels)[0].shape == (3, 1, 80)
