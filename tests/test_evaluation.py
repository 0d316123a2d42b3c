"""Evaluation counts every image once: ranks and batch sizes change nothing; and its mistakes are explained."""

import argparse
import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from running import fails, run
from trials import Trial

import engine_finetune
import main_finetune
from util.data.datasets import build_dataset, build_loader
from util.data.samplers import EvalBatchSampler
from util.data.transforms import Normalize, eval_transform
from util.weights.file import read_checkpoint, write_checkpoint

CLASSES = ("ant", "bee", "cow", "dog", "elk", "fox", "gnu")
PER_CLASS = (4, 3, 3, 4, 3, 3, 3)  # 23 validation images, a prime number
SHAPE = dict(img_size=16, window_size=(4, 4, 4, 2), in_chans=1)
FLAGS = ["--model", "swin_quickstart", "--input_size", "16", "--window_size", "4", "4", "4", "2", "--in_chans", "1"]
FLAGS += ["--device", "cpu", "--num_workers", "0", "--eval"]


def draw(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        pixels = generator.integers(0, 256, (4, 4), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for position, (name, count) in enumerate(zip(CLASSES, PER_CLASS)):
        draw(folder / "val" / name, count, seed=position)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A classifier of random weights whose head tells images apart; its averaged weights have the opposite head."""
    torch.manual_seed(0)
    model = timm.create_model("swin_quickstart", num_classes=len(CLASSES), **SHAPE).eval()
    with torch.no_grad():
        model.head.weight.normal_(std=0.5)  # larger, it would amplify float32 rounding into the scores
        imgs = torch.rand(64, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3) * 4 - 2
        model.head.bias -= model(imgs).mean(dim=0)
    weights = model.state_dict()
    averaged = weights | {name: -weights[name] for name in ("head.weight", "head.bias")}
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pth"
    write_checkpoint(path, {"model": weights, "model_ema": averaged, "epoch": 1, "args": {}})
    return str(path)


@pytest.fixture(scope="module")
def logits(data, checkpoint) -> dict[str, torch.Tensor]:
    """The logits of every image, path by path, in float64."""
    model = timm.create_model("swin_quickstart", num_classes=len(CLASSES), **SHAPE).double().eval()
    model.load_state_dict(read_checkpoint(checkpoint)["model"])
    transform = eval_transform(argparse.Namespace(input_size=(16, 16)))
    found = {}
    for path in sorted((data / "val").glob("*/*.png")):
        img = transform(torch.tensor(np.asarray(Image.open(path)))[None])
        with torch.no_grad():
            found[str(path)] = model((img[None].double() / 255 - 0.5) / 0.25)[0]
    return found


def label(path: str) -> int:
    return CLASSES.index(Path(path).parent.name)


def say_exactly(_rank: int) -> None:
    """Let a run end with its numbers in full."""

    def describe(args, result, checkpoint):
        return "exactly " + json.dumps([result.images, result.acc1, result.acc5, result.loss, result.class_acc1])

    main_finetune.describe_result = describe


def evaluated(place: Path, *flags: object, ranks: int = 1) -> list:
    """[images, top-1, top-5, loss, top-1 per class] of a run."""
    said = Trial(place, *FLAGS, *flags, ranks=ranks, sabotage=say_exactly, main=main_finetune).finish()
    assert said.count("exactly") == 1  # by one rank
    return json.loads(said.partition("exactly ")[2].splitlines()[0])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_ranks_and_batches_change_nothing(data, checkpoint, logits, tmp_path, ranks, batch_size):
    table = tmp_path / "predictions.csv"
    flags = ("--data_path", data, "--finetune", checkpoint, "--batch_size", batch_size, "--predictions", table)
    images, acc1, acc5, loss, class_acc1 = evaluated(tmp_path, *flags, ranks=ranks)
    ranking = {path: values.argsort(descending=True).tolist() for path, values in logits.items()}
    hits = [label(path) == order[0] for path, order in ranking.items()]
    losses = [-values.log_softmax(0)[label(path)].item() for path, values in logits.items()]
    assert images == 23
    assert acc1 == 100 * sum(hits) / 23
    assert acc5 == 100 * sum(label(path) in order[:5] for path, order in ranking.items()) / 23
    assert loss == pytest.approx(sum(losses) / 23, rel=1e-6)
    for position, name in enumerate(CLASSES):
        of_class = [hit for hit, path in zip(hits, ranking) if Path(path).parent.name == name]
        assert class_acc1[position] == pytest.approx(100 * sum(of_class) / len(of_class))

    rows = list(csv.DictReader(table.open()))
    assert [row["path"] for row in rows] == list(logits)  # each image once, in order
    for row in rows:
        order, scores = ranking[row["path"]], logits[row["path"]].softmax(0)
        assert row["label"] == Path(row["path"]).parent.name
        assert [row[f"top{i}"] for i in range(1, 6)] == [CLASSES[i] for i in order[:5]]
        expected = [scores[i].item() for i in order[:5]]
        assert [float(row[f"score{i}"]) for i in range(1, 6)] == pytest.approx(expected, abs=2e-6)


def test_the_reference_is_neither_trivial_nor_tied(logits):
    """Else the comparisons above would show little."""
    top = torch.stack(list(logits.values())).topk(2).values
    assert (top[:, 0] - top[:, 1]).min() > 1e-4
    assert len({values.argmax().item() for values in logits.values()}) > 2


def test_what_an_evaluation_says(data, checkpoint, capfd):
    run(main_finetune, *FLAGS, "--data_path", data, "--finetune", checkpoint, "--per_class", "--batch_size", "5")
    said = capfd.readouterr().out
    assert f"of {checkpoint} (swin_quickstart at 16x16) on 23 images of {data}" in said
    assert said.splitlines()[-1].partition("] ")[2].startswith("result: top-1 ")
    assert [line.split()[-1] for line in said.splitlines() if "top-1" in line][:7] == list(CLASSES)


def test_resume_names_weights_too_and_averages_are_evaluated_on_request(data, checkpoint, tmp_path):
    plain = evaluated(tmp_path, "--data_path", data, "--resume", checkpoint)
    assert plain == evaluated(tmp_path, "--data_path", data, "--finetune", checkpoint, "--dist_eval")
    averaged = evaluated(tmp_path, "--data_path", data, "--finetune", checkpoint, "--model_ema")
    assert averaged[0] == 23 and averaged[3] != plain[3]


def test_classes_without_images_keep_their_place(data, checkpoint, tmp_path):
    """The classes are those of the training folder; a class that validation lacks has no top-1 of its own."""
    for name in CLASSES:
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        if name != "cow":
            (tmp_path / "data" / "val").mkdir(exist_ok=True)
            (tmp_path / "data" / "val" / name).symlink_to(data / "val" / name)
    images, _, _, _, class_acc1 = evaluated(tmp_path, "--data_path", tmp_path / "data", "--finetune", checkpoint)
    everything = evaluated(tmp_path, "--data_path", data, "--finetune", checkpoint)[4]
    assert images == 20 and math.isnan(class_acc1[2])
    assert class_acc1[:2] + class_acc1[3:] == everything[:2] + everything[3:]


def loader_of(data: Path, **sampler: int):
    args = argparse.Namespace(
        data_path=str(data), dataset="", in_chans=1, seed=0, bad_images="error", max_bad_images=0.01,
        input_size=(16, 16), num_workers=0, pin_mem=False, ignore_exif=False, max_pixels=10**6, val_share=0.0,
        reader="",
    )  # fmt: skip
    dataset = build_dataset(args, "val", eval_transform(args))
    return build_loader(dataset, EvalBatchSampler(len(dataset), batch_size=4, **sampler), args, torch.device("cpu"))


def test_a_lost_image_is_noticed(data):
    model = timm.create_model("swin_quickstart", num_classes=7, **SHAPE)
    normalize, cpu = Normalize((0.5,), (0.25,)), torch.device("cpu")
    with pytest.raises(RuntimeError, match="evaluation saw 12 images of 23"):
        engine_finetune.evaluate(model, loader_of(data, rank=0, world_size=2), normalize, "fp32", cpu)
    for mode in (True, False):
        model.train(mode)
        engine_finetune.evaluate(model, loader_of(data), normalize, "fp32", cpu)
        assert model.training is mode


def test_labels_that_are_no_class():
    engine_finetune.check_targets(torch.tensor([0, 4]), 5)
    with pytest.raises(ValueError, match=r"labels \[-1, 7\] lie outside the 5 classes \(0 to 4\): correct the labels"):
        engine_finetune.check_targets(torch.tensor([7, 0, -1, 4, 7]), 5)


def test_fewer_than_five_classes(tmp_path, data):
    (tmp_path / "val").mkdir()
    for name in CLASSES[:3]:
        (tmp_path / "val" / name).symlink_to(data / "val" / name)
    torch.manual_seed(0)
    model = timm.create_model("swin_quickstart", num_classes=3, **SHAPE)
    write_checkpoint(tmp_path / "three.pth", {"model": model.state_dict()})
    table = tmp_path / "new" / "folder" / "predictions.csv"
    flags = ("--data_path", tmp_path, "--finetune", tmp_path / "three.pth", "--predictions", table)
    images, _, acc5, _, _ = evaluated(tmp_path, *flags)
    assert images == 10 and acc5 == 100
    assert list(csv.DictReader(table.open()).fieldnames) == "path label top1 top2 top3 score1 score2 score3".split()


# --- Mistakes ---


def test_weights_that_cannot_be_evaluated(data, checkpoint, tmp_path, capfd):
    shared = [*FLAGS, "--data_path", data]
    fails(main_finetune, capfd, r"--eval needs the weights to evaluate: --finetune WEIGHTS", *shared)
    fails(main_finetune, capfd, r"--eval needs the weights to evaluate", *shared, "--resume", "auto")
    both = ["--finetune", "a.pth", "--resume", "b.pth"]
    fails(main_finetune, capfd, r"give --finetune a\.pth or --resume b\.pth, not both", *shared, *both)
    fails(main_finetune, capfd, r"nowhere\.pth is neither a file nor a published", *shared, "--finetune", "nowhere.pth")

    pretraining = timm.create_model("mixmae_quickstart", **SHAPE)
    write_checkpoint(tmp_path / "pretrained.pth", {"model": pretraining.state_dict()})
    message = r"pretrained\.pth holds a pretraining model without a classification head, so it cannot classify"
    fails(main_finetune, capfd, message, *shared, "--finetune", tmp_path / "pretrained.pth")

    five = timm.create_model("swin_quickstart", num_classes=5, **SHAPE)
    write_checkpoint(tmp_path / "five.pth", {"model": five.state_dict()})
    message = r"five\.pth has 5 classes, but .* has 7"
    fails(main_finetune, capfd, message, *shared, "--finetune", tmp_path / "five.pth")
    message = r"five\.pth holds no averaged weights: leave out --model_ema"
    fails(main_finetune, capfd, message, *shared, "--finetune", tmp_path / "five.pth", "--model_ema")

    message = r"--nb_classes 5 contradicts the 7 classes in"
    fails(main_finetune, capfd, message, *shared, "--finetune", checkpoint, "--nb_classes", "5")
    message = r"does not fit this model \(is --model the one it was made with\?\)"
    other = ["--model", "swin_tiny_w14", "--patch_size", "1"]
    fails(main_finetune, capfd, message, *shared, "--finetune", checkpoint, *other)
    message = r"trained on images with 1 channels, the model takes 3: set --in_chans 1"
    fails(main_finetune, capfd, message, *shared, "--finetune", checkpoint, "--in_chans", "3")


def test_data_that_cannot_be_evaluated(data, checkpoint, tmp_path, capfd):
    def fail(message: str, folder: Path) -> None:
        fails(main_finetune, capfd, message, *FLAGS, "--finetune", checkpoint, "--data_path", folder)

    fail(r"--data_path \S+nowhere does not exist", tmp_path / "nowhere")
    (tmp_path / "train" / "ant").mkdir(parents=True)
    fail(r"val does not exist; it must hold the val images, one folder per class", tmp_path)
    (tmp_path / "val" / "ant").mkdir(parents=True)
    (tmp_path / "val" / "bee").symlink_to(data / "val" / "bee")
    fail(r"class folders without any image in .*val: \['ant'\]", tmp_path)
    (tmp_path / "val" / "ant" / "broken.png").write_bytes(b"no image")
    fail(r"val has classes that the training set lacks: \['bee'\]", tmp_path)
    (tmp_path / "list.txt").write_text("a.png 0")
    fail(r"evaluation needs a folder with 'val' in it", tmp_path / "list.txt")


def test_an_image_that_cannot_be_read_is_named(data, checkpoint, tmp_path, capfd):
    """Also one that turns up late: never skipped, since the number of images is part of the result."""
    (tmp_path / "val").mkdir()
    for name in CLASSES[:-1]:
        (tmp_path / "val" / name).symlink_to(data / "val" / name)
    (tmp_path / "val" / "gnu").mkdir()
    (tmp_path / "val" / "gnu" / "broken.png").write_bytes(b"no image")
    flags = [*FLAGS, "--finetune", checkpoint, "--data_path", tmp_path, "--bad_images", "skip"]
    fails(main_finetune, capfd, r"cannot use image .*broken\.png", *flags)


def test_an_image_that_one_rank_cannot_read_is_named(data, checkpoint, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    broken = sorted((tmp_path / "data" / "val").glob("*/*.png"))[1]  # the second rank's first
    broken.write_bytes(b"no image")
    for workers in (0, 1):
        flags = [*FLAGS, "--finetune", checkpoint, "--data_path", tmp_path / "data", "--num_workers", workers]
        trial = Trial(tmp_path / "logs", *flags, ranks=2, main=main_finetune)
        said = trial.finish(2, 2)
        assert said.count(f"[rank 1] main_pretrain.py: error: cannot use image '{broken}'") == 1, said
        assert "Traceback" not in said


def test_reports_that_cannot_be_written(data, checkpoint, tmp_path, capfd):
    flags = [*FLAGS, "--finetune", checkpoint, "--data_path", data]
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "predictions.csv", tmp_path):
        fails(main_finetune, capfd, r"error: ", *flags, "--predictions", path)
    image = next((data / "val").rglob("*.png"))
    content = image.read_bytes()
    fails(main_finetune, capfd, f"{image} exists and is not replaced", *flags, "--predictions", image)
    assert image.read_bytes() == content
    training = [flag for flag in flags if flag != "--eval"]
    for report in (["--per_class"], ["--predictions", "predictions.csv"]):
        fails(main_finetune, capfd, r"--per_class and --predictions go with --eval", *training, *report)
