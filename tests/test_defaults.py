"""What is not given is chosen by rules from the data and the machine, said with the reason, and stored with the run."""

import json
import logging
import os
import re
import signal
import subprocess
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import PHOTOS
from PIL import Image
from running import fails, make_images, run
from trials import Trial

import main_finetune
import main_pretrain
from util.data.open_source import open_source
from util.data.survey import Survey, channels_come_first, shape_in_header, survey_images
from util.run.defaults import choose_for_finetuning, choose_for_pretraining
from util.run.flags import given_flags
from util.run.preemption import EXIT_REQUEUE

ROOT = Path(__file__).resolve().parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda")
KNOWN = {"accum_iter": 1, "world_size": 1}
QUIET = ["--device", "cpu", "--num_workers", "0", "--vis_every", "0"]


def photographs(images: int) -> Survey:
    return Survey(images, in_chans=3, size=None, longest_side=500)


@pytest.mark.parametrize(
    "images, device, world_size, expected",
    [
        (600, CPU, 1, dict(model="mixmae_quickstart", input_size=(64, 64), patch_size=2, batch_size=32, epochs=56)),
        (60, CPU, 1, dict(batch_size=14, epochs=250, warmup_epochs=25, lr=2e-3)),
        (6, CPU, 1, dict(batch_size=2, epochs=334)),
        (1, CPU, 1, dict(batch_size=2)),
        (1_500, GPU, 1, dict(model="mixmae_quickstart", batch_size=128, epochs=400, warmup_epochs=40, lr=2e-3)),
        (60_000, GPU, 1, dict(model="mixmae_tiny", batch_size=128, lr=3e-4)),
        (1_281_167, GPU, 16, dict(model="mixmae_base", batch_size=128, epochs=400, warmup_epochs=40, lr=1.2e-3)),
    ],
)
def test_rules_of_pretraining(images, device, world_size, expected, caplog):
    with caplog.at_level(logging.INFO):
        choices = choose_for_pretraining({**KNOWN, "world_size": world_size}, photographs(images), device)
    assert {name: choices.chosen[name] for name in expected} == expected
    assert caplog.text.count("not given, so chosen: ") == len(choices.chosen)
    if choices.chosen["model"] != "mixmae_quickstart":
        assert "input_size" not in choices.chosen  # the model's own


def test_small_images_get_the_small_model_at_its_own_size():
    choices = choose_for_pretraining(KNOWN, Survey(60_000, 1, (28, 28), 28), GPU)
    assert choices.chosen["model"] == "mixmae_quickstart" and choices.chosen["in_chans"] == 1
    assert not {"input_size", "patch_size"} & choices.chosen.keys()


def test_what_is_known_is_not_chosen_and_decides_the_rest():
    known = {**KNOWN, "model": "mixmae_tiny", "batch_size": 64, "epochs": 20, "blr": 1e-4, "in_chans": 1}
    choices = choose_for_pretraining(known, photographs(600), CPU)
    assert choices.chosen == {"warmup_epochs": 2}
    known = {**KNOWN, "epochs": 30, "model": "swin_tiny_w14"}
    chosen = {"in_chans": 3, "batch_size": 24, "warmup_epochs": 3}
    assert choose_for_finetuning(known, photographs(100), CPU).chosen == {**chosen, "blr": 5e-4}
    assert choose_for_finetuning({**known, "lr": 1e-3}, photographs(100), CPU).chosen == chosen
    for small in ("swin_quickstart", "mixmae_quickstart"):
        choices = choose_for_finetuning({**known, "model": small}, photographs(100), CPU)
        assert choices.chosen == {**chosen, "lr": 2e-3}


def test_headers(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "colour.jpg")
    Image.new("P", (30, 20)).save(tmp_path / "palette.png")
    Image.new("I;16", (30, 20)).save(tmp_path / "deep.png")
    np.save(tmp_path / "bands.npy", np.zeros((20, 30, 13), np.uint16))
    np.save(tmp_path / "grey.npy", np.zeros((20, 30), np.float32))
    found = {path.stem: shape_in_header(str(path), path.name) for path in tmp_path.iterdir()}
    channels = {"colour": 3, "palette": 3, "deep": 1, "bands": 13, "grey": 1}
    assert found == {name: (20, 30, number) for name, number in channels.items()}


def test_images_in_a_tar_are_looked_at_as_those_of_a_folder(tmp_path):
    """Above all, grey ones are not taken for colours."""
    folder, tar = tmp_path / "folder", tmp_path / "images.tar"
    make_images(folder, 6, (28, 20))
    np.save(folder / "bands.npy", np.zeros((28, 20), np.uint8))
    with tarfile.open(tar, "w") as file:
        file.add(folder, ".")
        file.addfile(tarfile.TarInfo("damaged.png"))
    flags = main_pretrain.get_args_parser()
    surveys = []
    for path in (folder, tar):
        given = given_flags(main_pretrain.PretrainConfig, flags.parse_args(["--data_path", str(path)]))
        surveys.append(survey_images(open_source(replace(given, in_chans=3), "train", require_labels=False)))
    assert surveys[0] == Survey(images=7, in_chans=1, size=(28, 20), longest_side=28)
    assert surveys[1] == replace(surveys[0], images=8)


@pytest.mark.parametrize(
    "experiment", sorted((ROOT / "exp").glob("*_600ep/*.sh")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_nothing_is_chosen_for_an_experiment(experiment):
    """Recipes give everything."""
    printed = subprocess.run(["sh", experiment, "print", "8", "/data"], capture_output=True, text=True, check=True)
    script, *flags = printed.stdout.removesuffix("\n").split("\n")
    main = {"main_pretrain.py": main_pretrain, "main_finetune.py": main_finetune}[script]
    config_class = main_pretrain.PretrainConfig if main is main_pretrain else main_finetune.FinetuneConfig
    if "--eval" in flags:
        flags += ["--finetune", "weights.pth"]
    known = {**given_flags(config_class, main.get_args_parser().parse_args(flags)).as_dict(), "world_size": 8}
    choose = choose_for_pretraining if main is main_pretrain else choose_for_finetuning
    assert choose(known, photographs(1_281_167), GPU).chosen.keys() <= (
        {"batch_size", "warmup_epochs", "blr"} if "--eval" in flags else set()
    )


def test_a_folder_and_nothing_else(tmp_path, capfd):
    """Trains, says what was chosen and why; goes on with the same when resumed on more images."""
    data, out = tmp_path / "data", tmp_path / "out"
    make_images(data, 10, (28, 28))
    flags = [*QUIET, "--output_dir", out, "--data_path", data, "--resume", "auto"]
    run(main_pretrain, *flags, "--epochs", "2")
    said = capfd.readouterr().out
    for choice in ("in_chans 1", "model mixmae_quickstart", "batch_size 2", "warmup_epochs 0.2", "lr 0.002"):
        assert f"not given, so chosen: --{choice}: " in said
    stored = json.loads((out / "config.json").read_text())["config"]
    make_images(data, 100, (28, 28))
    run(main_pretrain, *flags)
    said = capfd.readouterr().out
    assert "chosen" not in said and "10 -> 100 images" in said and "with another setting" not in said
    again = json.loads((out / "config.json").read_text())["config"]
    assert {**again, "epochs": stored["epochs"]} == stored


@pytest.mark.parametrize(
    "count", [pytest.param(6, marks=pytest.mark.slow), 60, pytest.param(600, marks=pytest.mark.slow)]
)
def test_photographs_and_nothing_else(tmp_path, count):
    """On a CPU a folder is enough, and pictures are there within a minute; every choice is said with its reason."""
    for i in range(count):
        with Image.open(PHOTOS[i % len(PHOTOS)]) as photo:
            photo.convert("RGB").resize((120 + i % 7, 90)).save(tmp_path / f"{i}.jpg")
    started = time.time()
    trial = Trial(tmp_path / "log", "--data_path", tmp_path, sabotage=lambda rank: os.chdir(tmp_path / "log"))
    pictures = tmp_path / "log" / "output_dir" / "reconstructions"
    while not (pictures / "epoch0001.png").exists() and time.monotonic() < trial.started + 120:
        assert not trial.poll(), trial.output
        time.sleep(0.05)
    assert (pictures / "epoch0001.png").exists(), trial.output
    assert (pictures / "epoch0000.png").stat().st_mtime - started < 60
    trial.kill(signal.SIGINT)
    said = trial.finish(EXIT_REQUEUE)
    for name in ("in_chans 3", "model mixmae_quickstart", "input_size 64 64", "patch_size 2", "batch_size", "epochs",
                 "warmup_epochs", "lr 0.002", "num_workers"):  # fmt: skip
        assert re.search(rf"not given, so chosen: --{name}[ \d.]*: \w+", said)
    assert "to go on: " in said and "--resume auto" in said


@pytest.mark.parametrize("main", [main_pretrain, main_finetune])
def test_too_few_images(tmp_path, capfd, main):
    (tmp_path / "data" / "train").mkdir(parents=True)
    flags = ["--device", "cpu", "--data_path", tmp_path / "data", "--output_dir", tmp_path / "out"]
    fails(main, capfd, "no images found under", *flags)
    if main is main_pretrain:
        make_images(tmp_path / "data" / "train", 1)
        fails(main, capfd, "1 training images do not fill one effective batch of 2", *flags)


def test_arrays_with_their_channels_first_are_not_taken_for_images_of_many(tmp_path, capfd):
    """Arrays (3, 24, 24) trained as images of 3 x 24 pixels and 24 channels."""
    (tmp_path / "data").mkdir()
    for number in range(4):
        np.save(tmp_path / "data" / f"{number}.npy", np.random.rand(3, 24, 24).astype(np.float32))
    flags = [*QUIET, "--epochs", "1", "--data_path", tmp_path / "data", "--output_dir", tmp_path / "out"]
    message = r"look like arrays \(channels, H, W\) = \(3, 24, 24\).*if they are 24 channels of 3 x 24 .*--in_chans 24"
    fails(main_pretrain, capfd, message, *flags)
    run(main_pretrain, *flags, "--in_chans", "24")
    assert all(map(channels_come_first, [(3, 24, 24), (13, 20, 30), (32, 64, 128), (1, 28, 28)]))
    ordinary = [(64, 96, 200), (24, 24, 3), (16, 16, 32), (20, 30, 200), (145, 145, 200), (33, 80, 80)]
    assert not any(map(channels_come_first, ordinary))


def test_arrays_of_several_channels(tmp_path, capfd):
    make_images(tmp_path / "data", 6, (16, 16), channels=5)
    make_images(tmp_path / "data" / "other", 2, (16, 16), channels=4)
    flags = [*QUIET, "--epochs", "1", "--data_path", tmp_path / "data", "--output_dir", tmp_path / "out"]
    fails(
        main_pretrain,
        capfd,
        r"different numbers of channels: of 8 that were looked at, 2 with 4, 6 with 5; .*--in_chans",
        *flags,
    )
