"""Detection: annotations in COCO's format, the detector, its training and its average precision."""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_folder import make_coco
from photos import data_args
from PIL import Image
from running import fails, read_lines
from trials import Trial, differences, epochs_of, steps_of

from exp.coco import mask_rcnn
from exp.coco.engine_mask_rcnn import detection_loss
from util import replay
from util.data.coco import AsItIs, Flip, build_coco_dataset, decode_mask, read_annotations, run_lengths
from util.data.decoding import BadImageError
from util.dense.average_precision import MEASURES, average_precision, encode_mask, results_of
from util.dense.detector import build_detector
from util.dense.task import settings_to_train
from util.errors import UserError
from util.run.flags import given_flags
from util.run.launch import Launch
from util.run.optim import set_up_arithmetic
from util.run.session import Start
from util.weights.source import WeightsInfo

pytest.importorskip("pycocotools", reason="pycocotools is not installed: boxes and masks cannot be evaluated")

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # pycocotools' with numpy 2

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    *("--model", "swin_quickstart", "--input_size", "64", "--patch_size", "4", "--head_channels", "8"),
    *("--sampled_boxes", "16", "--min_size", "56", "64", "--device", "cpu", "--num_workers", "0", "--print_freq", "1"),
    *("--drop_path", "0.2", "--warmup_epochs", "0.5", "--lr", "1e-3", "--batch_size", "2", "--epochs", "2"),
)


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    return make_coco(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture(scope="module")
def trained(coco, tmp_path_factory) -> Path:
    """The output of a run of 2 epochs of 4 steps."""
    out = tmp_path_factory.mktemp("trained")
    Trial(out, *SMALL, "--data_path", coco, "--output_dir", out / "out", main=mask_rcnn).finish()
    return out / "out"


def settings(coco: Path, **changes) -> argparse.Namespace:
    values = dict(train_json="", val_json="", detector="mask_rcnn", bad_boxes="error")
    return data_args(coco, **{**values, **changes})


# --- Data ---------------------------------------------------------------------------------------------------


def test_images_come_with_boxes_masks_and_classes(coco):
    dataset = build_coco_dataset(settings(coco), "train", AsItIs())
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
    plain = build_coco_dataset(settings(coco), "train", AsItIs())
    flipped = build_coco_dataset(settings(coco), "train", Flip())
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


def spoil(coco: Path, folder: Path, change, split: str = "train") -> Path:
    """The annotations of `split` after `change(content)`."""
    content = json.loads((coco / f"annotations/instances_{split}.json").read_text())
    change(content)
    path = folder / f"instances_{split}.json"
    path.write_text(json.dumps(content))
    return path


def set_first(**values):
    return lambda content: content["annotations"][0].update(values)


WRONG = {
    "no list": (lambda content: content.pop("annotations"), r"not in COCO's format \(lacks 'annotations'\)"),
    "no size": (lambda content: content["images"][0].pop("height"), r"not in COCO's format \(lacks 'height'\)"),
    "no image": (set_first(image_id=99), r"image that is not in 'images': annotation 1 \(image_id 99\); add it, or"),
    "no class": (set_first(category_id=4), r"category that is not in 'categories': annotation 1 \(category_id 4\)"),
    "no box": (set_first(bbox=[1, 2, None, 3]), r"without a box: annotation 1 \(\[1, 2, None, 3\]\); 'bbox' is left"),
    "outside": (
        set_first(bbox=[60, 2, 30, 9]),
        r"annotation 1 \(from 60, 2 to 90, 11 in an image of 72x72\); repair them, or --bad_boxes clip",
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
        r"annotation 1 \(its mask has no 'counts', the lengths of runs\)",
    ),
    "no mask": (set_first(segmentation=[]), r"annotation 1 \(no 'segmentation'\); repair them; --detector faster_rcnn"),
    "polygon": (set_first(segmentation=[[1, 2, 3]]), r"a polygon is a list of x, y, x, y, ... of at least three"),
    "points": (set_first(segmentation=[[1, 2, "3", 4, 5, 6]]), r"a polygon is a list of x, y, x, y, ... of at least"),
    "class in a list": (set_first(category_id=[7]), r"not in 'categories': annotation 1 \(category_id \[7\]\)"),
    "id in a list": (set_first(id=[2], iscrowd=1, bbox=[0]), r"without a box: annotation \[2\] \(\[0\]\)"),
    "same image": (lambda content: content["images"].append(content["images"][2]), "the same image id more than once"),
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


def test_without_boxes_there_is_nothing_to_train_on(coco, tmp_path):
    path = spoil(coco, tmp_path, lambda content: content.update(annotations=[]))
    with pytest.raises(UserError, match=rf"{path} has no boxes to train on"):
        build_coco_dataset(settings(coco, train_json=str(path)), "train", AsItIs())
    assert len(read_annotations(path).boxes) == 0  # of images that are evaluated, that may be


def test_missing_files_are_named(coco, tmp_path):
    with pytest.raises(UserError, match=r"annotations needs one file \*train\*.json .* found no such folder"):
        build_coco_dataset(settings(tmp_path), "train", AsItIs())
    with pytest.raises(UserError, match=r"--val_json nothing\.json does not exist"):
        build_coco_dataset(settings(coco, val_json="nothing.json"), "val", AsItIs())
    path = coco / "annotations/instances_val.json"
    with pytest.raises(UserError, match=r"names the image '0.jpg', which is in none of .*/val2017"):
        (tmp_path / "val2017.json").write_text(path.read_text())
        build_coco_dataset(settings(tmp_path, val_json="val2017.json"), "val", AsItIs())


def test_all_images_are_looked_for_before_training(coco, tmp_path):
    own = shutil.copytree(coco, tmp_path / "own")
    (own / "train/5.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of the 8 images that .*_train.json names are not in .*train: \['5.jpg'\]"):
        build_coco_dataset(settings(own), "train", AsItIs())
    (own / "train/5.jpg").write_bytes(b"no image")
    with pytest.raises(BadImageError, match=r"cannot use image '.*train/5.jpg'"):
        build_coco_dataset(settings(own), "train", AsItIs())


def test_turned_photographs_are_named(coco, tmp_path, caplog):
    own = shutil.copytree(coco, tmp_path / "own")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.open(own / "train/5.jpg").save(own / "train/5.jpg", exif=exif)
    build_coco_dataset(settings(own), "val", AsItIs())
    build_coco_dataset(settings(own, ignore_exif=True), "train", AsItIs())
    assert "EXIF" not in caplog.text
    build_coco_dataset(settings(own), "train", AsItIs())
    assert re.search(r"1 of 8 photographs .* give --ignore_exif: \['.*train/5.jpg'\]", caplog.text)


def test_an_image_of_another_size_than_its_annotations_is_an_error(coco, tmp_path):
    path = spoil(coco, tmp_path, lambda content: content["images"][0].update(height=32, width=36))
    with pytest.raises(BadImageError, match=r"72x64 pixels, its annotations are for 36x32: was it resized\?"):
        build_coco_dataset(settings(coco, train_json=str(path)), "train", AsItIs())


def test_classes_are_matched_by_name(coco, tmp_path):
    source = build_coco_dataset(settings(coco), "train", AsItIs()).source
    before = source.target(1)["labels"]
    source.number_classes_as(["disc", "triangle", "square"], "the weights")
    assert before.tolist() == [2, 1] and source.target(1)["labels"].tolist() == [1, 3]
    assert source.annotations.category_ids == [7, None, 3]
    with pytest.raises(UserError, match=r"categories that the weights does not know: \['square'\]"):
        source.number_classes_as(["disc", "triangle"], "the weights")


def test_without_pycocotools_one_is_told_to_install_it(coco, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pycocotools"):
        build_coco_dataset(settings(coco), "train", AsItIs())


# --- The model ----------------------------------------------------------------------------------------------


def tiny_config(**changes) -> argparse.Namespace:
    parsed = mask_rcnn.get_args_parser().parse_args([*SMALL, "--data_path", "x"])
    values = dict(in_chans=3, precision="fp32", detector="mask_rcnn", max_size=96, input_size=(64, 64))
    return argparse.Namespace(**vars(parsed) | values | changes)


def test_the_recipe_is_not_that_of_weights_to_start_from():
    """Of which the encoder alone is loaded: a segmenter's `head_channels` mean something else."""
    flags = mask_rcnn.get_args_parser().parse_args(["--data_path", "x", "--epochs", "3", "--device", "cpu"])
    launch = Launch(0, 1, 0, 1, "none", "127.0.0.1", 29500, torch.device("cpu"))
    start = Start(given_flags(mask_rcnn.DetectionConfig, flags), launch, None)
    recorded = {"model": "swin_quickstart", "head_channels": 99, "max_size": 88, "detector": "faster_rcnn"}
    start.weights = {}, WeightsInfo("a.pth", Path("a.pth"), "mixmae", recorded)
    set_up_arithmetic("fp32")
    config = settings_to_train(start)
    assert (config.model, config.head_channels, config.max_size) == ("swin_quickstart", 256, 1333)
    assert config.detector == "mask_rcnn" and not torch.backends.cudnn.benchmark  # for its images differ in size
    start.weights, start.checkpoint = None, {"args": recorded | {"min_size": [64]}}
    assert settings_to_train(start).head_channels == 99


def test_stages_can_be_frozen(coco):
    model = build_detector(tiny_config(freeze_stages=2), 2).train()
    swin = model.backbone.encoder.swin
    trained = {name for name, parameter in swin.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith(("layers.2", "layers.3")) for name in trained)
    assert not swin.layers[1].training and not swin.patch_embed.training and swin.layers[2].training
    assert build_detector(tiny_config(), 2).backbone.encoder.frozen == []


def test_boxes_are_not_rounded_in_a_lower_precision():
    """torchvision's coder takes boxes in the type of the heads' outputs; in bf16, 1001 is 1000."""
    model = build_detector(tiny_config(precision="bf16"), 2).train()
    seen = []
    model.rpn.register_forward_hook(lambda module, inputs, outputs: seen.extend(outputs[0]))
    target = {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1]), "masks": torch.ones(1, 64, 64)}
    loss = detection_loss(model, [torch.randn(3, 64, 64)], [target])
    loss.backward()
    assert loss.dtype == torch.float32 and seen[0].dtype == torch.float32
    assert (seen[0] - seen[0].bfloat16().float()).abs().max() > 0
    nothing = {name: values[:0] for name, values in target.items()}  # of an image without boxes
    for targets in ([target], [nothing]):
        model.zero_grad()
        detection_loss(model, [torch.randn(3, 64, 64)], targets).backward()
        unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert unused == []  # DistributedDataParallel would wait for them


@pytest.mark.parametrize("patch_size", [3, 8])
def test_anchors_lie_as_far_apart_as_cells(patch_size):
    side = 16 * patch_size + 1  # no multiple of a cell of the coarsest map
    model = build_detector(tiny_config(patch_size=patch_size, min_size=(side,), max_size=999), 2).eval()
    seen = []
    model.rpn.anchor_generator.register_forward_hook(
        lambda module, inputs, anchors: seen.append((inputs[1], anchors[0]))
    )
    model([torch.randn(3, side, side)])
    [(maps, anchors)] = seen
    corners = anchors.split([3 * maps[i].shape[-2] * maps[i].shape[-1] for i in range(5)])
    apart = [(level[3, 0] - level[0, 0]).item() for level in corners[:4]]
    assert apart == [patch_size * 2**i for i in range(4)]


def test_boxes_that_are_kept_survive_being_resized(coco, tmp_path):
    """torchvision refuses one of no area; such a small one would be rounded to that."""
    for width, kept in ((4e-6, 7), (0.11, 8)):
        path = spoil(coco, tmp_path, lambda content, width=width: set_first(bbox=[50, 2, width, 9])(content), "val")
        dataset = build_coco_dataset(settings(coco, val_json=str(path), bad_boxes="clip"), "val", AsItIs())
        assert len(dataset.source.annotations.boxes) == kept
    image, target = dataset[0, 1]
    model = build_detector(tiny_config(), 2).train()
    assert detection_loss(model, [image.float()], [target]).isfinite()


# --- Runs ---------------------------------------------------------------------------------------------------


def by_hand(annotations: Path, results: list[dict], kind: str) -> list[float]:
    """The six measures of pycocotools; those of masks without boxes, whose area it would take for theirs."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = [{k: v for k, v in result.items() if kind == "bbox" or k != "bbox"} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [value if value < 0 else 100 * value for value in evaluation.stats[:6]]


def perfect_results(coco: Path) -> list[dict]:
    """Of the validation images: what is there, found with a score of 0.9."""
    source, results = build_coco_dataset(settings(coco), "val", AsItIs()).source, []
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


@pytest.mark.parametrize("change", [without("area"), crowd_without_a_mask, numbered_from_0], ids=range(3))
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
        assert [measured[f"{name}_{measure}"] for measure in MEASURES] == pytest.approx(by_hand(path, results, kind))
    assert measured["mask_AP_small"] < 100 == pytest.approx(measured["box_AP_small"]) and measured["box_AP"] < 100


def test_average_precision_is_pycocotools_of_what_is_written(coco, trained, tmp_path):
    flags = ("--device", "cpu", "--num_workers", "0", "--data_path", coco, "--finetune", trained / "checkpoint.pth")
    out = Trial(tmp_path, "--eval", *flags, "--predictions", tmp_path / "a.json", main=mask_rcnn).finish()
    result = re.search(r"result: (.*) of \S+checkpoint.pth \(mask_rcnn on swin_quickstart\) on 5 images", out)[1]
    found = dict(re.findall(r"(\w+ AP\S*(?: \w+)?) (-?[\d.]+)", result))
    last = read_lines(trained / "log.txt")[-1]
    results = json.loads((tmp_path / "a.json").read_text())
    assert (
        results
        and {r["category_id"] for r in results} <= {3, 7}
        and {r["image_id"] for r in results} <= {*range(100, 105)}
    )
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        expected = by_hand(coco / "annotations/instances_val.json", results, kind)
        assert [last[f"test_{name}_{measure}"] for measure in MEASURES] == pytest.approx(expected, abs=1e-9)
        assert float(found[f"{name} AP"]) == pytest.approx(expected[0], abs=0.006)
    assert Image.open(trained / "detections/epoch0002.png").width > 2 * 576
    (tmp_path / "b.json").write_text("an older one")
    two = Trial(tmp_path, "--eval", *flags, "--predictions", tmp_path / "b.json", ranks=2, main=mask_rcnn).finish()
    assert f"result: {result} of" in two
    assert json.loads((tmp_path / "b.json").read_text()) == results


def test_killed_and_resumed_the_weights_are_those_of_an_uninterrupted_run(coco, trained, tmp_path):
    flags = (*SMALL, "--data_path", coco, "--output_dir", tmp_path / "out", "--save_steps", 1, "--resume", "auto")
    trial = Trial(tmp_path, *flags, main=mask_rcnn)
    while not (tmp_path / "out/checkpoint.pth").exists() or len(steps_of(tmp_path / "out")) < 3:
        assert not trial.poll(), trial.output
        time.sleep(0.005)
    trial.kill()
    trial.finish(-signal.SIGKILL)
    said = Trial(tmp_path, *flags, main=mask_rcnn).finish()
    assert re.search(r"resumed at epoch 0 step \d", said)
    assert differences(tmp_path / "out", trained) == []


def test_a_step_is_replayed(coco, tmp_path):
    """Of a dump, with images of several sizes: the loss is that of the run to the bit."""

    def poison(rank: int) -> None:
        calls = []

        def spoiled(*inputs):
            loss = detection_loss(*inputs)
            calls.append(loss.item())
            print(f"loss of call {len(calls)}: {loss.item():.6g}", flush=True)
            return loss * (float("nan") if len(calls) == 3 else 1)

        mask_rcnn.train_one_epoch.__globals__["detection_loss"] = spoiled

    flags = (*SMALL, "--data_path", coco, "--detector", "faster_rcnn", "--output_dir", tmp_path, "--nan_dump")
    said = Trial(tmp_path, *flags, sabotage=poison, main=mask_rcnn).finish(1)
    lines = list(replay.replay(replay.read_dump(tmp_path / "nan_dump_rank0.pth"), torch.device("cpu")))
    loss = re.search(r"loss of call 3: (\S+)", said)[1]
    assert f"micro-batch 0: 2 images, loss {loss} (finite)" in lines


def test_what_cannot_be_is_said_before_training(coco, trained, tmp_path, capfd):
    flags = (*SMALL, "--output_dir", tmp_path / "out")
    fails(mask_rcnn, capfd, "--data_path is missing: give a folder with annotations/", *flags)
    fails(mask_rcnn, capfd, "--eval needs the weights", *flags, "--data_path", coco, "--eval")
    there = (*flags, "--data_path", coco)
    fails(mask_rcnn, capfd, "--predictions a.json goes with --eval", *there, "--predictions", "a.json")
    fails(mask_rcnn, capfd, "--min_size 64 is above --max_size 60", *there, "--max_size", 60)
    fails(
        mask_rcnn,
        capfd,
        "--lr_steps 0.4 2 must not be within --warmup_epochs 0.5, and below --epochs 2",
        *there,
        "--lr_steps",
        0.4,
        1,
        2,
    )
    fails(
        mask_rcnn,
        capfd,
        "--min_lr 0.1 ends the cosine that --lr_steps replaces",
        *there,
        "--lr_steps",
        1,
        "--min_lr",
        0.1,
    )
    missing = (*flags, "--data_path", coco, "--train_json", spoil(coco, tmp_path, set_first(image_id=99)))
    fails(mask_rcnn, capfd, "image that is not in 'images'", *missing)


@pytest.mark.slow
def test_training_on_two_ranks(coco, trained, tmp_path):
    """Makes the first step that one rank makes of the same images, and goes on from another rank's checkpoint.

    After the first step, rounding may choose other candidates.
    """
    flags = (*SMALL, "--data_path", coco, "--batch_size", 1, "--drop_path", 0)
    Trial(tmp_path, *flags, "--output_dir", tmp_path / "out", "--save_steps", 1, ranks=2, main=mask_rcnn).finish()
    one = ("--accum_iter", 2, "--epochs", 1, "--output_dir", tmp_path / "one")
    Trial(tmp_path, *flags, *one, main=mask_rcnn).finish()
    steps = [steps_of(folder) for folder in (tmp_path / "out", tmp_path / "one", trained)]
    assert [step["lr"] for step in steps[0]] == [step["lr"] for step in steps[2]] and len(steps[0]) == 8
    assert steps[0][0]["loss"] == pytest.approx(steps[1][0]["loss"], rel=1e-5)
    assert steps[0][0]["grad_norm"] == pytest.approx(steps[1][0]["grad_norm"], rel=1e-3)
    assert all("test_box_AP" in epoch for epoch in epochs_of(tmp_path / "out"))
    again = (*flags, "--output_dir", tmp_path / "again", "--resume", tmp_path / "out/checkpoint-00000006.pth")
    Trial(tmp_path, *again, ranks=2, main=mask_rcnn).finish()
    assert differences(tmp_path / "again", tmp_path / "out", logs=False) == []


@pytest.mark.slow
def test_a_few_images_are_learned_by_heart(tmp_path):
    coco = make_coco(tmp_path / "data", train=8, val=1)
    train = coco / "annotations/instances_train.json"
    flags = [*SMALL, "--data_path", coco, "--val_json", train, "--output_dir", tmp_path / "out", "--eval_every", 99]
    flags += [
        "--epochs",
        60,
        "--drop_path",
        0,
        "--lr",
        3e-3,
        "--head_channels",
        32,
        "--batch_size",
        4,
        "--min_size",
        64,
    ]
    Trial(tmp_path, *flags, "--layer_decay", 1, "--print_freq", 20, main=mask_rcnn).finish(seconds=400)
    result = read_lines(tmp_path / "out/log.txt")[-1]
    assert result["test_box_AP50"] > 80 and result["test_mask_AP50"] > 80, result


# --- The recipe ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["finetune", "eval"])
def test_the_recipes_flags_are_the_programs(script):
    command = ["sh", f"exp/coco/{script}.sh", "print", "4", "/coco", "--seed", "3"]
    program, *flags = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    config = given_flags(mask_rcnn.DetectionConfig, mask_rcnn.get_args_parser().parse_args(flags))
    assert program == config.PROGRAM and config.data_path == "/coco" and config.seed == 3
    header = (ROOT / f"exp/coco/{script}.sh").read_text().partition("\nhere=")[0]
    assert all(f"# {entry} " in header for entry in ("GPUs", "Start", "Result", "Origin", "DATA"))
    if script == "finetune":
        assert 4 * config.batch_size * config.accum_iter == 16 and config.blr * 16 / 256 == pytest.approx(1e-4)
        assert config.lr_steps == (8, 11) and config.epochs == 12


def test_the_launcher_puts_the_repository_on_pythons_path(coco, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$1"\n')
    python.chmod(0o755)
    command = ["sh", str(ROOT / "exp/coco/finetune.sh"), "local", "1", str(coco)]
    for given, expected in (("", str(ROOT)), ("/mine", f"{ROOT}:/mine")):
        environ = os.environ | {"PYTHONPATH": given, "PYTHON": str(python)}
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environ)
        assert result.stdout.splitlines() == [expected, str(ROOT / "exp/coco/mask_rcnn.py")], result.stderr
