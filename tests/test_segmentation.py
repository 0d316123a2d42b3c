"""Semantic segmentation: the head, measures, and whole runs of exp/ade20k/upernet.py (its data: test_label_maps.py)."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from label_map_folder import make_pairs
from PIL import Image
from running import fails, read_lines, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from trials import Trial, differences, steps_of

import models_mixmae  # noqa: F401 - registers the models
from exp.ade20k import engine_upernet, upernet
from exp.ade20k.upernet import SegmentationConfig, build_model, complete, get_args_parser
from exp.garments import scenes
from util import replay
from util.data.label_maps import IGNORED
from util.dense.segmentation import (
    confusion_matrix,
    enlarged_classes,
    segmentation_scores,
    sliding_logits,
    window_starts,
)
from util.dense.segmentation_pictures import class_colors, overlay, segmentation_table
from util.dense.upernet import UPerNet, enlarge, segmentation_loss
from util.run.checkpoint_folder import CheckpointFolder
from util.run.flags import given_flags
from util.weights.file import CheckpointError, read_checkpoint
from util.weights.layouts import load_encoder
from util.weights.parts import load_part
from util.weights.source import read_weights

ROOT = Path(__file__).resolve().parent.parent


def test_equal_seeds_make_equal_scenes():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 28, 28), dtype=np.uint8)
    garments = scenes.Garments(images, images > 99, np.arange(1, 5))
    first, again, other = (
        [np.asarray(part) for part in scenes.make_scene(garments, np.random.default_rng(seed))] for seed in (1, 1, 2)
    )
    for i in range(2):  # the picture, the label map
        assert np.array_equal(first[i], again[i]) and not np.array_equal(first[i], other[i])


def test_a_class_of_few_garments_is_as_frequent_as_one_of_many():
    images = np.full((10, 28, 28), 200, dtype=np.uint8)
    garments = scenes.Garments(images, images > 99, np.array([1] * 9 + [2]))
    label_maps = [np.asarray(scenes.make_scene(garments, np.random.default_rng(seed))[1]) for seed in range(200)]
    pixels = np.bincount(np.stack(label_maps).ravel(), minlength=3)
    assert len(pixels) == 3 and 0.4 < pixels[2] / pixels[1:].sum() < 0.6


# --- Measures and windows -----------------------------------------------------------------------------------


def test_scores_equal_a_count_by_hand():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 3, IGNORED], (3, 20, 30)).astype(np.uint8)
    predicted = rng.choice([0, 1, 2, 4], labels.shape).astype(np.uint8)
    confusion = sum(confusion_matrix(torch.tensor(a), torch.tensor(b), 6) for a, b in zip(labels, predicted))
    ious, right, counted = [], 0, 0
    for c in range(6):
        both = either = 0
        for a, b in zip(labels.ravel().tolist(), predicted.ravel().tolist()):
            if a == IGNORED:
                continue
            both += a == c and b == c
            either += a == c or b == c
            counted += c == 0
            right += c == 0 and a == b
        ious.append(100 * both / either if either else float("nan"))
    scores = segmentation_scores(confusion)
    assert scores.class_iou == pytest.approx(ious, nan_ok=True) and np.isnan(scores.class_iou[5])
    assert scores.class_iou[3] == scores.class_iou[4] == 0  # only labelled, only predicted
    assert scores.miou == pytest.approx(np.mean(ious[:5]))
    assert scores.pixel_acc == pytest.approx(100 * right / counted)
    assert np.isnan(segmentation_scores(torch.zeros(3, 3)).miou)


@pytest.mark.parametrize("nb_classes", [2, 8, 19])
def test_classes_enlarged_a_few_at_a_time_are_those_of_all_at_once(nb_classes):
    logits = torch.randn(2, nb_classes, 5, 7, generator=torch.Generator().manual_seed(0))
    for size in ((5, 7), (13, 20), (4, 3)):
        expected = nn.functional.interpolate(logits, size, mode="bilinear").argmax(dim=1)
        assert torch.equal(enlarged_classes(logits, size), expected.to(torch.uint8))


def test_windows_cover_every_pixel():
    for side in range(1, 40):
        for window, stride in ((16, 11), (16, 16), (7, 3)):
            starts = window_starts(side, window, stride)
            covered = np.zeros(side, dtype=int)
            for start in starts:
                covered[start : start + window] += 1
            assert covered.min() >= 1 and starts[-1] == max(0, side - window) and len(set(starts)) == len(starts)


def test_sliding_windows_average_and_equal_the_whole_image_where_one_suffices():
    imgs = torch.randn(2, 3, 20, 33)
    by_pixel = nn.Conv2d(3, 5, 1)
    with torch.no_grad():
        for window in ((20, 33), (64, 64), (8, 12), (7, 64)):
            logits = sliding_logits(by_pixel, imgs, window, tuple(max(1, 2 * side // 3) for side in window))
            torch.testing.assert_close(logits, by_pixel(imgs))

        def contextual(x):
            return by_pixel(x) + x.mean((2, 3), keepdim=True)[:, :1]

        assert torch.equal(sliding_logits(contextual, imgs, (20, 33), (13, 22)), contextual(imgs))
        two = sliding_logits(contextual, imgs, (20, 22), (13, 11))
        left, right = contextual(imgs[..., :22]), contextual(imgs[..., 11:])
        torch.testing.assert_close(two[..., :11], left[..., :11])
        torch.testing.assert_close(two[..., 11:22], (left[..., 11:] + right[..., :11]) / 2)


def test_pictures_show_classes_in_colours_over_grey_with_a_legend():
    colors = class_colors(254)
    assert len({tuple(color) for color in colors.tolist()}) > 200
    assert len({tuple(color) for color in colors[:64].tolist()}) == 64
    image = np.zeros((1, 2, 3), np.uint8) + np.array([60, 100, 140], np.uint8)
    picture = overlay(image, np.array([[1, IGNORED]], np.uint8), colors, opacity=0.5)
    assert picture[0, 1].tolist() == [100, 100, 100]
    assert np.abs(picture[0, 0] - (100.0 + colors[1]) / 2).max() <= 1
    classes = np.array([[0, 1], [1, 2]], np.uint8)
    table = segmentation_table(
        [(np.zeros((2, 2, 3), np.uint8), [classes, classes])], "abc", ["$x^$", "y" * 90, "z" * 90]
    )
    assert {tuple(color) for color in colors[:3].tolist()} <= {color for _, color in table.getcolors(1 << 20)}


# --- The model ----------------------------------------------------------------------------------------------


def small_model(**changes) -> UPerNet:
    flags = ("--model", "swin_quickstart", "--data_path", "-", "--head_channels", "32", "--drop_path", "0")
    given = given_flags(SegmentationConfig, get_args_parser().parse_args(list(flags)))
    config = replace(given, **{"in_chans": 3, "input_size": (32, 32), "patch_size": 2, "nb_classes": 3, **changes})
    model = build_model(replace(config, precision="fp32"))
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return model


@pytest.mark.parametrize("size", [(32, 32), (33, 61), (20, 100), (1, 7)])
def test_logits_are_as_large_as_the_image(size):
    model = small_model()
    assert model.eval()(torch.randn(1, 3, *size)).shape == (1, 3, *size)
    assert [tuple(x.shape) for x in model.train()(torch.randn(2, 3, *size))] == [(2, 3, *size)] * 2


def test_maps_stay_aligned_where_grids_are_odd():
    """Enlarged and cut, a map's cell lies over the pixels that it was made of."""
    ramp = torch.arange(12.0).view(1, 1, 1, 12)
    coarse = nn.functional.avg_pool2d(nn.functional.pad(ramp, (0, 4, 0, 0), mode="replicate"), (1, 4))
    found = enlarge(coarse, 4, ramp.shape[-2:])
    assert found.shape == ramp.shape
    torch.testing.assert_close(found[..., 2:8], ramp[..., 2:8])


def test_a_step_does_not_depend_on_how_its_images_are_divided_and_every_parameter_learns():
    torch.manual_seed(0)
    model, imgs = small_model().train(), torch.randn(4, 3, 32, 32)
    labels = torch.randint(0, 3, (4, 32, 32), dtype=torch.uint8)
    labels[0] = IGNORED  # an image of which nothing counts
    segmentation_loss(model(imgs), labels).backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.any() for gradient in whole.values())
    model.zero_grad()
    for part in (slice(0, 1), slice(1, 4)):
        share = (part.stop - part.start) / 4
        (segmentation_loss(model(imgs[part]), labels[part]) * share).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, whole[name], rtol=1e-3, atol=1e-6)


def test_ignored_pixels_never_count():
    logits = [torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2)]
    labels = torch.randint(0, 3, (2, 4, 4), dtype=torch.uint8)
    ignored = torch.rand(2, 4, 4) < 0.5
    labels[ignored] = IGNORED
    segmentation_loss(tuple(logits), labels).backward()
    for x in logits:
        assert not x.grad.permute(0, 2, 3, 1)[ignored].any() and x.grad.permute(0, 2, 3, 1)[~ignored].any()
    nothing = segmentation_loss(tuple(logits), torch.full_like(labels, IGNORED))
    assert nothing == 0


# --- Whole runs ---------------------------------------------------------------------------------------------

RECIPE = (
    *("--model", "swin_quickstart", "--input_size", 32, "--patch_size", 2, "--head_channels", 32, "--device", "cpu"),
    *("--num_workers", 0, "--batch_size", 4, "--warmup_epochs", 1, "--lr", "2e-3", "--print_freq", 1),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `data`, photographs of which 8 train and 3 of other sizes validate, and `reference`, a run."""
    place = tmp_path_factory.mktemp("segmentation")
    make_pairs(place / "data", {"train": 8, "val": 1})
    for number, size in enumerate(((40, 32), (32, 70)), start=1):
        more = make_pairs(place / "more", {"val": 1}, size)
        for kind in ("images", "masks"):
            (more / kind / "val" / "0.png").rename(place / "data" / kind / "val" / f"{number}.png")
    flags = ("--data_path", place / "data", "--epochs", 2, "--save_steps", 1)
    Trial(place, *RECIPE, *flags, "--output_dir", place / "reference", main=upernet).finish()
    return place


def test_killed_and_resumed_the_weights_are_those_of_an_uninterrupted_run(place, tmp_path):
    flags = (*RECIPE, "--data_path", place / "data", "--epochs", 2, "--save_steps", 1, "--output_dir", tmp_path)

    def slow(_: int) -> None:  # so that the kill comes in time
        def save(self, *args, saved=CheckpointFolder.save, **kwargs):
            saved(self, *args, **kwargs)
            self.wait()
            time.sleep(0.3)

        CheckpointFolder.save = save

    trial = Trial(tmp_path, *flags, main=upernet, sabotage=slow)
    while not (tmp_path / "checkpoint-00000003.pth").exists() and not trial.poll():
        time.sleep(0.01)
    trial.kill()
    assert trial.wait() == [-signal.SIGKILL], trial.output
    said = Trial(tmp_path, *flags, "--resume", "auto", main=upernet).finish()
    assert "resumed at epoch 1 step 1 (optimizer step 3" in said
    assert differences(tmp_path, place / "reference") == []


def test_a_step_that_ended_a_run_can_be_run_again(place, tmp_path):
    def spoil(_: int) -> None:
        real, calls = engine_upernet.segmentation_loss, itertools.count(1)
        engine_upernet.segmentation_loss = lambda *args: real(*args) * (float("nan") if next(calls) == 3 else 1)

    flags = (*RECIPE, "--data_path", place / "data", "--epochs", 2, "--nan_dump", "--output_dir", tmp_path)
    said = Trial(tmp_path, *flags, main=upernet, sabotage=spoil).finish(1)
    assert "the loss of rank 0 is not finite at epoch 1 step 1" in said
    lines = list(replay.replay(replay.read_dump(tmp_path / "nan_dump_rank0.pth"), torch.device("cpu")))
    third = steps_of(place / "reference")[2]
    assert f"micro-batch 0: 4 images, loss {third['loss']:.6g} (finite)" in lines
    assert f"micro-batch 0: gradient norm {third['grad_norm']:.4g}" in lines


def test_evaluation_equals_a_count_by_hand_on_what_it_wrote(place, tmp_path, capsys):
    """And does not depend on how images are gone over, where one window takes them whole."""
    flags = ("--eval", "--finetune", place / "reference/checkpoint.pth", "--data_path", place / "data")
    run(upernet, *flags, "--predictions", tmp_path, "--num_workers", 0, "--device", "cpu")
    said = capsys.readouterr().out
    both, either, right, total = np.zeros(3), np.zeros(3), 0, 0
    for path in sorted((place / "data/masks/val").iterdir()):
        labels, found = np.asarray(Image.open(path)), np.asarray(Image.open(tmp_path / "labels" / path.name))
        assert Image.open(tmp_path / "overlays" / path.name).size == Image.open(path).size
        for c in range(3):
            both[c] += ((labels == c) & (found == c)).sum()
            either[c] += ((labels == c) | (found == c)).sum()
        right, total = right + (labels == found).sum(), total + labels.size
    miou = np.mean((100 * both / either)[either > 0])
    assert f"mIoU {miou:.2f}%, pixel accuracy {100 * right / total:.2f}% of" in said and "3 images" in said
    assert f"{100 * both[2] / either[2]:6.2f}%  class 2" in said
    last = read_lines(place / "reference/log.txt")[-1]
    assert last["test_miou"] == pytest.approx(miou) and last["test_pixel_acc"] == pytest.approx(100 * right / total)
    run(upernet, *flags, "--slide", "--input_size", 32, 70, "--short_side", 32, "--num_workers", 0, "--device", "cpu")
    assert "windows of 32x70" in capsys.readouterr().out
    assert sorted(os.listdir(place / "reference/predictions")) == ["epoch0001.png", "epoch0002.png"]
    assert len(EventAccumulator(str(place / "reference")).Reload().Images("predictions")) == 2


@pytest.mark.slow
def test_two_ranks_train_as_one_and_measure_the_same(place, tmp_path):
    flags = (*RECIPE, "--data_path", place / "data", "--epochs", 1, "--drop_path", 0, "--batch_size", 2)
    Trial(tmp_path, *flags, "--accum_iter", 2, "--output_dir", tmp_path / "one", main=upernet).finish()
    Trial(tmp_path, *flags, "--output_dir", tmp_path / "two", main=upernet, ranks=2).finish()
    for a, b in zip(steps_of(tmp_path / "one"), steps_of(tmp_path / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    evaluation = ("--eval", "--finetune", tmp_path / "one/checkpoint.pth", "--data_path", place / "data")
    results = []
    for ranks in (1, 2):
        said = Trial(tmp_path, *evaluation, "--num_workers", 0, "--device", "cpu", main=upernet, ranks=ranks).finish()
        results.append([line[11:] for line in said.splitlines() if "IoU" in line])
    assert results[0] == results[1] and len(results[0]) == 4


@pytest.mark.slow
def test_eight_images_are_learned_by_heart(tmp_path, capsys):
    data = make_pairs(tmp_path / "data", {"train": 8})
    for kind in ("images", "masks"):
        shutil.copytree(data / kind / "train", data / kind / "val")
    flags = (*RECIPE, "--batch_size", 8, "--epochs", 60, "--eval_every", 60, "--save_every", 60, "--drop_path", 0)
    run(upernet, *flags, "--data_path", data, "--output_dir", tmp_path / "out", "--layer_decay", 1)
    assert read_lines(tmp_path / "out/log.txt")[-1]["test_miou"] > 80


def test_what_label_maps_mean_belongs_to_the_weights(place, tmp_path, capsys):
    """Trained with 0 as a class that counts nowhere, a model is evaluated so; a flag overrides it."""
    args = read_checkpoint(place / "reference/checkpoint.pth")["args"]
    assert (args["ignore_label"], args["reduce_zero_label"]) == (255, False)  # as resolved
    data = shutil.copytree(place / "data", tmp_path / "data")
    for path in (data / "masks").glob("*/*.png"):
        labels = np.asarray(Image.open(path)) + 1
        labels[:3, :3] = 0
        Image.fromarray(labels.astype(np.uint8)).save(path)
    flags = (*RECIPE, "--data_path", data, "--epochs", 1, "--lr", 0, "--warmup_epochs", 0, "--ignore_label", 9)
    run(upernet, *flags, "--reduce_zero_label", "--output_dir", tmp_path / "out")
    trained = re.search(r"result: mIoU (\S+)%", capsys.readouterr().out)[1]
    weights = ("--eval", "--finetune", tmp_path / "out/checkpoint.pth", "--data_path", data, "--device", "cpu")
    run(upernet, *weights, "--num_workers", 0)
    said = capsys.readouterr().out
    assert "classes 1 to 3, ignored 0 and 9" in said and f"result: mIoU {trained}%" in said


def test_a_class_that_is_ignored_is_pointed_out(place, caplog):
    flags = get_args_parser().parse_args(["--data_path", str(place / "data"), "--input_size", "32"])
    config = replace(given_flags(SegmentationConfig, flags), reduce_zero_label=True)
    for value, said in ((4, False), (1, True), (3, True), (0, False)):
        caplog.clear()
        complete(replace(config, ignore_label=value))
        assert (f"--ignore_label {value} is one of the 3 classes' numbers" in caplog.text) == said


def test_an_encoder_is_taken_from_pretraining_and_from_another_segmenter(place, tmp_path, capsys):
    def encoder_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.split("body.model.")[1]: tensor for name, tensor in weights.items() if "body.model." in name}

    model = timm.create_model("mixmae_quickstart", img_size=32, patch_size=2, in_chans=3)
    settings = {"model": "mixmae_quickstart", "patch_size": 2}
    torch.save({"model": model.state_dict(), "args": settings}, tmp_path / "a.pth")
    flags = (*RECIPE, "--data_path", place / "data", "--epochs", 1, "--lr", 0, "--warmup_epochs", 0, "--save_every", 9)
    run(upernet, *flags, "--finetune", tmp_path / "a.pth", "--output_dir", tmp_path / "out")
    own = encoder_of(read_checkpoint(tmp_path / "out/checkpoint.pth")["model"])
    assert f"loaded {len(own)} tensors from {tmp_path / 'a.pth'}" in capsys.readouterr().out
    assert len(own) > 50 and all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in own.items())

    other = small_model()
    load_encoder(other.encoder.body, *read_weights(place / "reference/checkpoint.pth"))
    expected = encoder_of(read_checkpoint(place / "reference/checkpoint.pth")["model"])
    own = encoder_of(other.state_dict())
    assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)


def test_a_segmenters_encoder_gives_maps_elsewhere(place):
    """It has no norm for pooled features."""
    weights, info = read_weights(place / "reference/checkpoint.pth")
    part, _, _ = load_part(weights, info, part="pyramid")
    segmenter = small_model().eval()
    segmenter.load_state_dict(read_checkpoint(place / "reference/checkpoint.pth")["model"])
    imgs = torch.randn(2, 3, 32, 32)
    assert all(map(torch.equal, part(imgs), segmenter.encoder.body(imgs)))
    with pytest.raises(CheckpointError, match=r"a detector or segmenter, which has no norm .* .util.predict --dense"):
        load_part(weights, info)


def test_mistakes_are_explained_before_training(place, tmp_path, capfd):
    flags = (*RECIPE, "--epochs", 1, "--output_dir", tmp_path / "out")
    fails(upernet, capfd, "--data_path is missing: give a folder with images/ and annotations/", *flags)
    fails(upernet, capfd, "has no label maps: neither annotations/ nor masks/", *flags, "--data_path", tmp_path)
    flags = (*flags, "--data_path", place / "data")
    fails(upernet, capfd, "--nb_classes is 5 .given, or recorded .* names 3 classes", *flags, "--nb_classes", 5)
    fails(upernet, capfd, "--head_channels must be a multiple of 32, got 40", *flags, "--head_channels", 40)
    fails(upernet, capfd, "--predictions .* goes with --eval", *flags, "--predictions", tmp_path)
    classifier = tmp_path / "classifier.pth"
    torch.save({"model": {}, "args": {"nb_classes": 3}}, classifier)
    fails(upernet, capfd, "is not a model of exp/ade20k/upernet.py", *flags, "--eval", "--finetune", classifier)
    other = shutil.copytree(place / "data", tmp_path / "other")
    (other / "classes.txt").write_text("class 0\nclass 2\nclass 1\n")
    message = r"classes of the data are not those of .*checkpoint.pth: \['class 2 / class 1', 'class 1 / class 2'\]"
    checkpoint = place / "reference/checkpoint.pth"
    evaluation = (*flags, "--eval", "--finetune", checkpoint)
    fails(upernet, capfd, message, *evaluation, "--data_path", other)
    message = r"does not fit these flags, leave them out: --head_channels 64 \(it has 32\)$"
    fails(upernet, capfd, message, *evaluation, "--head_channels", 64)


@pytest.mark.parametrize("script", ["finetune.sh", "eval.sh"])
def test_the_recipe_for_ade20k_is_made_of_flags_that_exist(script, tmp_path):
    command = ["sh", str(ROOT / "exp/ade20k" / script), "print", "4", str(tmp_path)]
    program, *flags = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert program == SegmentationConfig.PROGRAM
    config = given_flags(SegmentationConfig, get_args_parser().parse_args(flags))
    assert config.data_path == str(tmp_path) and config.eval == (script == "eval.sh")
    if not config.eval:
        assert (config.batch_size * config.accum_iter * 4, config.nb_classes, config.input_size) == (16, 150, (512,))
