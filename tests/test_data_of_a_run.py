"""A run knows its data: resumed on other images, it says which, and what that means."""

import json
import os
import shutil
from pathlib import Path

import pytest
from running import QUICK, losses, make_images, read_lines, run
from trials import TINY, Trial

import main_finetune
import main_pretrain
from util.run.checks import check_data
from util.weights.file import read_checkpoint

SHAPE = ["--model", "mixmae_quickstart", "--input_size", "16", "--window_size", "4", "4", "4", "2", "--in_chans", "1"]
TRAIN = [*SHAPE, *QUICK, "--batch_size", "4", "--keep_checkpoints", "9"]


@pytest.fixture
def stopped(tmp_path) -> tuple[Path, Path]:
    """Data of 20 images, and a run that was stopped after 4 of 5 steps of its first epoch."""
    data, out = tmp_path / "data", tmp_path / "out"
    make_images(data, 20, (16, 16))
    run(main_pretrain, *TRAIN, "--epochs", "2", "--save_steps", "4", "--data_path", data, "--output_dir", out)
    for path in out.glob("checkpoint*.pth"):
        if read_checkpoint(path)["step"] > 4:
            path.unlink()
    return data, out


def resume(data: Path, out: Path, capfd) -> str:
    capfd.readouterr()
    flags = ["--epochs", "2", "--save_steps", "4", "--resume", "auto", "--data_path", data, "--output_dir", out]
    run(main_pretrain, *TRAIN, *flags)
    return capfd.readouterr().out


def test_the_fingerprint_is_stored(stopped):
    _, out = stopped
    [path] = out.glob("checkpoint*.pth")
    recorded = read_checkpoint(path)["data"]
    assert recorded == json.loads((out / "config.json").read_text())["data"]
    assert recorded["train"]["images"] == 20 and recorded["train"]["names"] and recorded["train"]["labels"] == ""


def test_the_same_images_are_no_matter(stopped, tmp_path, capfd):
    data, out = stopped
    assert "images are not those" not in resume(data, out, capfd)
    assert len(losses(out)) == 10


def test_added_removed_and_renamed_images_are_told(stopped, tmp_path, capfd):
    """160 -> 143 images went unnoticed. Here the checkpoint stands at step 4 of 5, and only 3 steps are left of it."""
    data, out = stopped
    renamed, other = tmp_path / "renamed", tmp_path / "other"
    replaced, third = tmp_path / "replaced", tmp_path / "third"
    shutil.copytree(out, third)
    shutil.copytree(data, replaced)
    make_images(replaced, 1, (16, 32))
    said = resume(replaced, third, capfd)
    assert "checkpoint: the same names, but other files: in a sample of them, sizes differ; the run goes on" in said

    shutil.copytree(out, other)
    shutil.copytree(data, renamed)
    (renamed / "0000.png").rename(renamed / "zzzz.png")
    said = resume(renamed, other, capfd)
    assert "the train images are not those of the checkpoint: 20 images as before, but under other names" in said

    for number in range(6):
        (data / f"{number:04d}.png").unlink()
    said = resume(data, out, capfd)
    assert "20 -> 14 images; the run goes on, but not as an uninterrupted one" in said
    assert read_checkpoint(out / "checkpoint.pth")["data"]["train"]["images"] == 14
    records = read_lines(out / "log.txt")
    assert [record["epoch"] for record in records] == [0, 1] and records[-1]["step"] == 4 + 3
    assert abs(records[0]["train_loss"] - sum(losses(out)[:4]) / 4) < 1e-6


def test_labels_and_validation_images_count_too(tmp_path, capfd):
    data, out = tmp_path / "data", tmp_path / "out"
    for split in ("train", "val"):
        for seed, name in enumerate("ab"):
            make_images(data / split / name, 4, (16, 16), seed=seed)
    flags = [*SHAPE[2:], *QUICK[:-2], "--model", "swin_quickstart", "--batch_size", "4", "--epochs"]
    shared = ["--data_path", data, "--output_dir", out]
    run(main_finetune, *flags, "1", *shared)
    recorded = read_checkpoint(out / "checkpoint.pth")["data"]
    assert recorded["train"]["images"] == 8 and recorded["train"]["labels"]
    (data / "val" / "a" / "0000.png").unlink()
    capfd.readouterr()
    run(main_finetune, *flags, "1", *shared, "--resume", "auto")
    said = capfd.readouterr().out
    assert "the val images are not those of the checkpoint: 8 -> 7 images; accuracies before and after cannot" in said
    assert "the train images" not in said

    labelled = {"train": recorded["train"] | {"labels": "others"}}
    check_data({"data": labelled}, {"train": recorded["train"]})
    assert "the same images, but with other labels" in capfd.readouterr().err
    for checkpoint in ({}, {"data": None}, {"data": {"train": 3}}, {"data": {"train": recorded["train"]}}):
        check_data(checkpoint, {"train": recorded["train"]})
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("change, number", [("unlink", 15), ("rename", 16)])
def test_ranks_must_have_the_same_images(tmp_path, change, number):
    """Each node with a copy of its own, of which one was incomplete: training went on, with some images twice."""
    for rank in "01":
        make_images(tmp_path / rank / "photos", 16)
    image = tmp_path / "1/photos/0003.png"
    image.unlink() if change == "unlink" else image.rename(image.with_name("zzzz.png"))
    flags = [*TINY, "--epochs", "1", "--data_path", "photos", "--output_dir", tmp_path / "out"]
    trial = Trial(tmp_path, *flags, ranks=2, sabotage=lambda rank: os.chdir(tmp_path / str(rank)))
    output = trial.finish(2, 2)
    assert "photos: rank 1 on " in output and f" finds {number} images and rank 0 on " in output
