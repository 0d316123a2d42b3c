"""`python -m util.cost`: a plan of training on paper, by arithmetic."""

import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
from running import fails

from util import cost
from util.run.flags import given_flags
from util.run.metrics import count_work

ROOT = Path(__file__).resolve().parent.parent
BASE = ("--model", "mixmae_base")


def configuration(*flags: object) -> cost.CostConfig:
    return given_flags(cost.CostConfig, cost.get_args_parser().parse_args([str(flag) for flag in flags]))


def plans(*flags: object) -> list[cost.Training]:
    config = configuration(*flags)
    return [training for model in config.model for training in cost.trainings(config, model)]


def output(capsys, *flags: object) -> str:
    cost.main(cost.get_args_parser().parse_args([str(flag) for flag in flags]))
    return capsys.readouterr().out


@pytest.fixture(scope="module", autouse=True)
def counted_once() -> Iterator[None]:
    """A model takes a second to count, so the tests share what they count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "operations_of", functools.cache(cost.operations_of))
        yield


@pytest.fixture(scope="module")
def base() -> list[cost.Training]:
    """Pretraining and fine-tuning at a fifth of 500 TFLOP/s."""
    return plans(*BASE, "--utilisation", 0.2, "--peak_tflops", 500, "--images", 1000, "--epochs", 30)


def test_operations_are_six_per_multiply_add_of_a_forward_pass(base):
    for name in ("mixmae_quickstart", "swin_quickstart"):
        assert cost.operations_of(name) == 6 * count_work(timm.create_model(name))[1]
    assert base[0].operations == pytest.approx(112e9, rel=0.05)  # encoder of 16.35 G multiply-adds, and decoder
    assert base[1].operations == pytest.approx(6 * 16.35e9, rel=0.01)


def test_speed_and_hours_by_hand(base):
    for training, images in zip(base, (30 * 1000, 100 * 1000), strict=True):
        assert training.images == images
        assert training.images_per_second == pytest.approx(100e12 / training.operations)
        speed, hours, gpu_hours, per_gpu, cores = training.on(16, 0.5)
        assert speed == pytest.approx(8 * training.images_per_second) and per_gpu == pytest.approx(speed / 16)
        assert hours * 3600 * speed == pytest.approx(images) and gpu_hours == pytest.approx(16 * hours)
        assert (cores - 1) * training.images_per_core < per_gpu <= cores * training.images_per_core
    assert base[0].on(1, 0.5) == base[0].on(1, 1.0)  # one GPU has nothing to lose
    assert base[0].on(64, 1.0)[2] == pytest.approx(base[0].on(1, 1.0)[2])


@pytest.mark.slow
def test_the_recipes_epochs_are_the_defaults():
    titles = [training.title for training in plans()]
    assert [re.sub(r"(\w+), (pre|fine).*, (\d+) epochs", r"\1 \3", title) for title in titles] == [
        *("mixmae_base 600", "swin_base_w14 100", "mixmae_large 600", "swin_large_w14 50"),
        *("mixmae_huge 600", "swin_huge_w14 50"),
    ]
    for size, epochs in (("base", 100), ("large", 50), ("huge", 50)):
        assert f"--epochs {epochs} " in (ROOT / "exp" / f"{size}_600ep" / "finetune.sh").read_text()
        assert "--epochs 600 " in (ROOT / "exp" / f"{size}_600ep" / "pretrain.sh").read_text()


def test_a_measured_speed_takes_the_place_of_the_assumed_one(base, capsys):
    pretraining, finetuning = plans(*BASE, "--images_per_second", 1234)
    assert pretraining.images_per_second == pytest.approx(1234)
    ratio = base[1].images_per_second / base[0].images_per_second
    assert finetuning.images_per_second == pytest.approx(1234 * ratio)
    said = output(capsys, *BASE, "--images_per_second", 1234, "--scaling_efficiency", 0.75, "--gpus", 4)
    assert "1234 images/s as measured" in said and "75% of N times" in said and "      4       3,702" in said


def test_what_is_assumed_is_said(capsys):
    said = output(capsys, *BASE, "--finetune_epochs", 0)
    assert said.count("GFLOP per image") == 1 and "fine-tuning, 100" not in said
    for assumption in (
        "16% of 989 TFLOP/s (dense bf16), which base reached",
        "N times as fast as one, assumed",
        "Not counted:",
    ):
        assert assumption in said
    assert [line.split()[0] for line in said.splitlines()[2:6]] == ["1", "8", "16", "64"]
    said = output(capsys, *BASE, "--finetune_epochs", 0, "--utilisation", 0.4)
    assert "40% of 989 TFLOP/s (dense bf16), as given" in said


def test_whoever_reads_may_stop_reading():
    """As in `| head`: no traceback."""
    command = [sys.executable, "-m", "util.cost", "--model", "mixmae_quickstart"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--images_per_second", 10), "--images_per_second was measured with one model: give that as --model"),
        ((*BASE, "--images_per_second", 10, "--utilisation", 0.3), "give one of them"),
        ((*BASE, "--images_per_second", 1e6), r"--images_per_second 1e\+06 would take [\d.]+ times --peak_tflops 989"),
        ((*BASE, "--utilisation", 1.5), "--utilisation must be above 0 and at most 1, got 1.5"),
        ((*BASE, "--scaling_efficiency", 0), "--scaling_efficiency must be above 0 and at most 1, got 0"),
        ((*BASE, "--gpus", 8, 0), "--gpus must be at least 1 each"),
        (("--model", "swin_base_w14"), "this is a classifier, a pretraining model is needed: mixmae_quickstart"),
        (("--model", "resnet50"), "--model resnet50 is not known: give --model one of mixmae_quickstart"),
    ],
)
def test_mistakes_are_explained(capfd, flags, message):
    fails(cost, capfd, message, *flags)


def test_the_pages_example_is_what_it_prints(capsys):
    page = (ROOT / "exp" / "README.md").read_text()
    [(flags, printed)] = re.findall(r"\$ python -m util\.cost (.*)\n((?:.*\n)*?)```", page)
    assert output(capsys, *flags.split()) == printed
