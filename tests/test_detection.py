"""Detection: the detector, its training and its evaluation (test_coco.py has annotations and average precision)."""

import argparse
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from coco_folder import coco_settings, make_coco, precision_by_hand, set_first, spoil
from PIL import Image
from running import fails, read_lines
from trials import Trial, differences, epochs_of, steps_of

from exp.coco import mask_rcnn
from exp.coco.engine_mask_rcnn import detection_loss
from util import replay
from util.data.coco import AsItIs, build_coco_dataset
from util.dense.average_precision import MEASURES
from util.dense.config import settings_to_train
from util.dense.detector import build_detector
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
def trained(coco, tmp_path_factory) -> Path:
    """The output of a run of 2 epochs of 4 steps."""
    out = tmp_path_factory.mktemp("trained")
    Trial(out, *SMALL, "--data_path", coco, "--output_dir", out / "out", main=mask_rcnn).finish()
    return out / "out"


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
    start.weights = {}, WeightsInfo("a.pth", Path("a.pth"), recorded)
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
        dataset = build_coco_dataset(coco_settings(coco, val_json=str(path), bad_boxes="clip"), "val", AsItIs())
        assert len(dataset.source.annotations.boxes) == kept
    image, target = dataset[0, 1]
    model = build_detector(tiny_config(), 2).train()
    assert detection_loss(model, [image.float()], [target]).isfinite()


# --- Runs ---------------------------------------------------------------------------------------------------


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
        expected = precision_by_hand(coco / "annotations/instances_val.json", results, kind)
        expected = {f"test_{name}_{measure}": value for measure, value in zip(MEASURES, expected) if value >= 0}
        own = {key: value for key, value in last.items() if key.startswith(f"test_{name}_")}
        assert 3 < len(own) < 6 and own == pytest.approx(expected, abs=1e-9)  # no object is large
        assert float(found[f"{name} AP"]) == pytest.approx(expected[f"test_{name}_AP"], abs=0.006)
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
        "--min_lr 0.0001 ends the cosine that --lr_steps replaces",
        *there,
        "--lr_steps",
        1,
        "--min_lr",
        1e-4,
    )
    evaluation = (*there, "--eval", "--finetune", trained / "checkpoint.pth")
    message = r"checkpoint.pth does not fit these flags, leave them out: --detector faster_rcnn \(it has mask_rcnn\)"
    fails(mask_rcnn, capfd, message, *evaluation, "--detector", "faster_rcnn")
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
