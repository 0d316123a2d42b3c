"""Annotations in COCO's format: what is read of them and refused, and average precision."""

import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_folder import coco_settings, precision_by_hand, set_first, spoil
from PIL import Image

from util.data.coco import AsItIs, Flip, build_coco_dataset, decode_mask, read_annotations, run_lengths
from util.data.decoding import BadImageError
from util.data.sources import shared_with_training
from util.dense.average_precision import MEASURES, average_precision, encode_mask, results_of
from util.errors import UserError

pytest.importorskip("pycocotools", reason="pycocotools is not installed: boxes and masks cannot be evaluated")

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # pycocotools' with numpy 2


# --- Data ---------------------------------------------------------------------------------------------------


def test_images_come_with_boxes_masks_and_classes(coco):
    dataset = build_coco_dataset(coco_settings(coco), "train", AsItIs())
    assert len(dataset) == 8 and dataset.classes == ["square", "disc"]  # by the categories' ids
    image, target = dataset[0, 0]
    assert image.shape == (3, 64, 72) and target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 64, 72)
    for index in range(1, 8):
        image, target = dataset[0, index]
        assert target["masks"].shape == (2, *image.shape[1:]) and target["labels"].tolist() == [2, 1]  # not the crowd
        for mask, box in zip(target["masks"], target["boxes"].int().tolist()):
            rows, columns = mask.nonzero().unbind(1)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        red, _, blue = image[:, target["masks"][1].bool()].float().mean(dim=1)  # of the square
        assert blue > 200 > red


def test_a_flip_depends_on_the_key_alone_and_takes_everything_along(coco):
    plain = build_coco_dataset(coco_settings(coco), "train", AsItIs())
    flipped = build_coco_dataset(coco_settings(coco), "train", Flip())
    flips = []
    for epoch in range(8):
        (image, target), (expected, before) = flipped[epoch, 3], plain[epoch, 3]
        torch.rand(3)
        assert torch.equal(image, flipped[epoch, 3][0])
        flips.append(not torch.equal(image, expected))
        if flips[-1]:
            assert torch.equal(image.flip(-1), expected) and torch.equal(target["masks"].flip(-1), before["masks"])
        for mask, box in zip(target["masks"], target["boxes"].int().tolist()):
            assert mask[:, : box[0]].sum() == mask[:, box[2] :].sum() == 0 < mask[:, box[0]].sum()
    assert 0 < sum(flips) < 8


@pytest.mark.parametrize("seed", range(3))
def test_masks_in_every_form(seed):
    from pycocotools import mask as coco_mask

    mask = (np.random.default_rng(seed).random((13, 17)) < 0.4).astype(np.uint8)
    encoded = encode_mask(mask)
    assert np.array_equal(decode_mask(encoded, 13, 17), mask)
    runs = run_lengths(encoded["counts"])
    assert sum(runs) == mask.size and sum(runs[1::2]) == mask.sum()
    assert np.array_equal(decode_mask({"size": [13, 17], "counts": runs}, 13, 17), mask)
    square = decode_mask([[2, 3, 9, 3, 9, 8, 2, 8]], 13, 17)
    assert square[3:8, 2:9].all() and square.sum() == 35
    short = coco_mask.frPyObjects({"size": [13, 17], "counts": [200]}, 13, 17)
    for wrong in ({"size": [13, 17], "counts": [100, 20]}, {"size": [13, 17], "counts": short["counts"]}):
        with pytest.raises(BadImageError, match="a mask of 17x13 cannot be decoded"):
            decode_mask(wrong, 13, 17)


WRONG = {
    "no list": (lambda content: content.pop("annotations"), r"not in COCO's format \(lacks 'annotations'\)"),
    "no size": (lambda content: content["images"][0].pop("height"), r"not in COCO's format \(lacks 'height'\)"),
    "no image": (set_first(image_id=99), r"image that is not in 'images': annotation 1 \(image_id 99\); add it, or"),
    "a string": (set_first(image_id="101"), r"not in 'images': annotation 1 \(image_id '101'\)"),
    "no class": (set_first(category_id=4), r"category that is not in 'categories': annotation 1 \(category_id 4\)"),
    "no box": (set_first(bbox=[1, 2, None, 3]), r"s without a box: annotation 1 \(\[1, 2, None, 3\]\); 'bbox' is left"),
    "outside": (
        set_first(bbox=[60, 2, 30, 9]),
        r"annotation 1 \(from 60, 2 to 90, 11 in an image of 72x72\); "
        "'bbox' is left, top, width and height in pixels: repair them, or let --bad_boxes clip",
    ),
    "no area": (set_first(bbox=[10, 2, 0, 9]), r"a side below 0.1 pixels: annotation 1 \(from 10, 2 to 10, 11 in an"),
    "almost no area": (set_first(bbox=[10, 2, 1e-6, 9]), "a side below 0.1 pixels: annotation 1 "),
    "mask's size": (
        set_first(segmentation={"size": [64, 64], "counts": [4096]}),
        r"annotation 1 \(its mask is of size \[64, 64\], its image has height and width \[72, 72\]\)",
    ),
    "short mask": (
        set_first(segmentation={"size": [72, 72], "counts": [5, 9]}),
        r"annotation 1 \(its mask has 14 pixels, its image 5184\)",
    ),
    "runs": (
        set_first(segmentation={"size": [72, 72], "counts": ["a", 3]}),
        r"annotation 1 \(its mask has no 'counts', the run lengths\)",
    ),
    "no mask": (set_first(segmentation=[]), r"annotation 1 \(no 'segmentation'\); repair them; --detector faster_rcnn"),
    "polygon": (set_first(segmentation=[[1, 2, 3]]), r"a polygon is a list of x, y, x, y, ... of at least three"),
    "points": (set_first(segmentation=[[1, 2, "3", 4, 5, 6]]), r"a polygon is a list of x, y, x, y, ... of at least"),
    "class in a list": (set_first(category_id=[7]), r"not in 'categories': annotation 1 \(category_id \[7\]\)"),
    "id in a list": (set_first(id=[2], iscrowd=1, bbox=[0]), r"without a box: annotation \[2\] \(\[0\]\)"),
    "same image": (lambda content: content["images"].append(content["images"][2]), "the same image id more than once"),
    "same file": (
        lambda content: content["images"][2].update(file_name="1.jpg"),
        "the same file name more than once: 1.jpg",
    ),
    "shares": (
        lambda content: [a.update(bbox=[side / 72 for side in a["bbox"]]) for a in content["annotations"]],
        "all boxes lie between 0 and 1, as shares of their images: 'bbox' is in pixels",
    ),
    "same id": (set_first(id=2), "the same annotation id more than once: 2"),
    "same category": (
        lambda content: content["categories"].append({"id": 9, "name": "disc"}),
        "the same category name more than once: disc",
    ),
    "empty": (lambda content: content.update(images=[], annotations=[]), "no image or no category"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_annotations_are_named(coco, tmp_path, case):
    change, message = WRONG[case]
    with pytest.raises(UserError, match=message) as raised:
        read_annotations(spoil(coco, tmp_path, change), masks=True)
    assert str(tmp_path / "instances_train.json") in str(raised.value)


def test_wrong_boxes_can_be_clipped_or_left_out(coco, tmp_path, caplog):
    whole = read_annotations(coco / "annotations/instances_train.json")
    for box, expected in (
        ([60, 2, 30, 9], [60, 2, 72, 11]),
        ([10, 2, 0, 9], None),
        ([80, 2, 9, 9], None),
        ([10, 2, 1e-6, 9], None),
    ):
        path = spoil(coco, tmp_path, set_first(bbox=box))
        clipped = read_annotations(path, clip=True)
        assert len(clipped.boxes) == len(whole.boxes) - (expected is None)
        assert expected is None or clipped.boxes[0].tolist() == expected
        assert "annotation 1" in caplog.text and str(path) in caplog.text
        caplog.clear()
    rounded = read_annotations(spoil(coco, tmp_path, set_first(bbox=[-0.4, 2, 30, 70.9])))  # by a program
    assert rounded.boxes[0].tolist() == pytest.approx([0, 2, 29.6, 72])


def test_without_boxes_there_is_nothing_to_train_on(coco, tmp_path, caplog):
    path = spoil(coco, tmp_path, lambda content: content.update(annotations=[]))
    with pytest.raises(UserError, match=rf"{path} has no boxes to train on"):
        build_coco_dataset(coco_settings(coco, train_json=str(path)), "train", AsItIs())
    build_coco_dataset(coco_settings(coco, val_json=str(path)), "val", AsItIs())  # that may be
    assert f"{path} has no boxes (crowds do not count), so there is no average precision" in caplog.text


def test_missing_files_are_named(coco, tmp_path):
    with pytest.raises(UserError, match=r"annotations needs one file \*train\*.json .* found no such folder"):
        build_coco_dataset(coco_settings(tmp_path), "train", AsItIs())
    with pytest.raises(UserError, match=r"--data_path .*/nowhere is not a folder: give one with annotations/"):
        build_coco_dataset(coco_settings(tmp_path / "nowhere"), "train", AsItIs())
    with pytest.raises(UserError, match=r"--val_json nothing\.json exists neither"):
        build_coco_dataset(coco_settings(coco, val_json="nothing.json"), "val", AsItIs())
    path = coco / "annotations/instances_val.json"
    with pytest.raises(UserError, match=r"names the image '0.jpg', which is in none of .*/val2017"):
        (tmp_path / "val2017.json").write_text(path.read_text())
        build_coco_dataset(coco_settings(tmp_path, val_json="val2017.json"), "val", AsItIs())


def test_images_may_lie_beside_their_annotations(coco, tmp_path):
    """As Roboflow exports them; and the first image does not decide alone where they are."""
    own = shutil.copytree(coco / "val", tmp_path / "valid")
    path = shutil.copy(coco / "annotations/instances_val.json", own / "_annotations.coco.json")
    source = build_coco_dataset(coco_settings(tmp_path, val_json=str(path)), "val", AsItIs()).source
    assert source.path(0) == str(own / "0.jpg")
    (own / "0.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of the 5 images that .* names are not in .*valid: \['0.jpg'\]"):
        build_coco_dataset(coco_settings(tmp_path, val_json=str(path)), "val", AsItIs())


def test_images_of_both_files_are_counted(coco, tmp_path):
    """Though both name them in one folder, and neither has all of the other's."""

    def shorten(content: dict) -> None:
        content["images"].pop()
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 107]

    path = spoil(coco, tmp_path, shorten)
    settings = coco_settings(coco, train_json=str(path), val_json="annotations/instances_train.json")
    train, val = (build_coco_dataset(settings, split, AsItIs()).source for split in ("train", "val"))
    assert shared_with_training(train, val) == (7, 8)


def test_all_images_are_looked_for_before_training(coco, tmp_path):
    own = shutil.copytree(coco, tmp_path / "own")
    (own / "train/5.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of the 8 images that .*_train.json names are not in .*train: \['5.jpg'\]"):
        build_coco_dataset(coco_settings(own), "train", AsItIs())
    (own / "train/5.jpg").write_bytes(b"no image")
    with pytest.raises(BadImageError, match=r"cannot use image '.*train/5.jpg'"):
        build_coco_dataset(coco_settings(own), "train", AsItIs())


def test_turned_photographs_are_named(coco, tmp_path, caplog):
    own = shutil.copytree(coco, tmp_path / "own")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.open(own / "train/5.jpg").save(own / "train/5.jpg", exif=exif)
    build_coco_dataset(coco_settings(own), "val", AsItIs())
    build_coco_dataset(coco_settings(own, ignore_exif=True), "train", AsItIs())
    assert "EXIF" not in caplog.text
    build_coco_dataset(coco_settings(own), "train", AsItIs())
    assert re.search(r"1 of 8 photographs .* give --ignore_exif: \['.*train/5.jpg'\]", caplog.text)


def test_an_image_of_another_size_than_its_annotations_is_an_error(coco, tmp_path):
    path = spoil(coco, tmp_path, lambda content: content["images"][0].update(height=32, width=36))
    with pytest.raises(BadImageError, match=r"72x64 pixels, its annotations are for 36x32: was it resized\?"):
        build_coco_dataset(coco_settings(coco, train_json=str(path)), "train", AsItIs())


def test_classes_are_matched_by_name(coco, tmp_path):
    source = build_coco_dataset(coco_settings(coco), "train", AsItIs()).source
    before = source.target(1)["labels"]
    source.number_classes_as(["disc", "triangle", "square"], "the weights")
    assert before.tolist() == [2, 1] and source.target(1)["labels"].tolist() == [1, 3]
    assert source.annotations.category_ids == [7, None, 3]
    with pytest.raises(UserError, match=r"categories that the weights does not know: \['square'\]"):
        source.number_classes_as(["disc", "triangle"], "the weights")


def test_without_pycocotools_one_is_told_to_install_it(coco, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pycocotools"):
        build_coco_dataset(coco_settings(coco), "train", AsItIs())


# --- Average precision -----------------------------------------------------------------------------------------


def perfect_results(coco: Path) -> list[dict]:
    """Of the validation images: what is there, found with a score of 0.9."""
    source, results = build_coco_dataset(coco_settings(coco), "val", AsItIs()).source, []
    for i in range(len(source)):
        target = source.target(i)
        detections = {**target, "scores": torch.full([len(target["boxes"])], 0.9), "masks": target["masks"][:, None]}
        results += results_of(detections, i, source.annotations)
    return results


def without(key: str):
    def change(content: dict) -> None:
        for annotation in content["annotations"]:
            annotation.pop(key)

    return change


def crowd_without_a_mask(content: dict) -> None:
    next(annotation for annotation in content["annotations"] if annotation["iscrowd"]).pop("segmentation")


def numbered_from_0(content: dict) -> None:
    for annotation in content["annotations"]:
        annotation["id"] -= 1


def numbers_in_strings(content: dict) -> None:
    for entry in content["images"] + content["annotations"]:
        entry |= {key: str(entry[key]) for key in ("height", "width", "iscrowd") if key in entry}


CHANGES = [without("area"), crowd_without_a_mask, numbered_from_0, numbers_in_strings]


@pytest.mark.parametrize("change", CHANGES, ids=range(4))
def test_perfect_detections_are_perfect_whatever_a_file_leaves_out(coco, tmp_path, change):
    path = spoil(coco, tmp_path, change, "val")
    measured = average_precision(path, perfect_results(coco), masks=True)
    none = ("_medium", "_large")
    assert all(value == pytest.approx(-1 if key.endswith(none) else 100) for key, value in measured.items()), measured


def test_without_iscrowd_nothing_is_a_crowd(coco, tmp_path):
    path = spoil(coco, tmp_path, without("iscrowd"), "val")
    measured = average_precision(path, perfect_results(coco), masks=True)
    assert 0 < measured["mask_AP"] < 100 and measured["box_AP"] == measured["mask_AP"]  # the crowd is a disc, not found


def test_a_box_of_no_area_needs_no_mask(coco, tmp_path):
    path = spoil(coco, tmp_path, set_first(bbox=[10, 2, 0, 9], segmentation=[]), "val")
    assert len(read_annotations(path, masks=True, clip=True).boxes) == 7
    assert average_precision(path, perfect_results(coco), masks=True)["mask_AP50"] > 0


def test_what_is_found_where_nothing_is_counts_by_the_size_of_its_mask(coco):
    """Its box is of medium size; image 100 has no annotations."""
    path, results = coco / "annotations/instances_val.json", perfect_results(coco)
    mask = np.zeros((64, 72), np.uint8)
    mask[0, :50] = mask[:50, 0] = 1
    wrong = {"image_id": 100, "category_id": 7, "bbox": [0, 0, 50, 50], "score": 0.95}
    results.append(wrong | {"segmentation": encode_mask(mask)})
    measured = average_precision(path, results, masks=True)
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        assert [measured[f"{name}_{measure}"] for measure in MEASURES] == pytest.approx(
            precision_by_hand(path, results, kind)
        )
    assert measured["mask_AP_small"] < 100 == pytest.approx(measured["box_AP_small"]) and measured["box_AP"] < 100
