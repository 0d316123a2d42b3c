"""`python -m util.predict`: classes as evaluation gives them, features as the model gives them, in the order given."""

import csv
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from running import fails, make_images, run

import main_finetune
from util import predict
from util.weights.file import write_checkpoint

CLASSES = ["ant", "bee", "cow", "dog", "elk", "fox"]
SHAPE = dict(img_size=16, window_size=(4, 4, 4, 2), in_chans=1)
RECORDED = {"model": "swin_quickstart", "input_size": (16, 16), "window_size": (4, 4, 4, 2), "in_chans": 1}
RECORDED |= {"mean": (0.4,), "std": (0.2,)}
QUIET = ["--device", "cpu", "--num_workers", "0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """23 images in the folders of six classes; one as a JPEG."""
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(CLASSES):
        make_images(folder / "val" / name, 3 + (number < 5), (20, 24), seed=number)
    image = folder / "val" / "cow" / "0001"
    Image.open(image.with_suffix(".png")).save(image.with_suffix(".jpg"))
    image.with_suffix(".png").unlink()
    return folder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = timm.create_model("swin_quickstart", num_classes=len(CLASSES), **SHAPE).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pth"
    content = {"format": 1, "model": model.state_dict(), "epoch": 3, "args": RECORDED, "classes": CLASSES}
    write_checkpoint(path, content)
    return path


def rows(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def prepared(path: str) -> torch.Tensor:
    """(1, 1, 16, 16): resized to height 18 and cropped, by Pillow."""
    image = Image.open(path)
    image = image.resize((int(18 * image.width / image.height), 18), Image.Resampling.BICUBIC)
    left = round((image.width - 16) / 2)
    return (torch.tensor(np.asarray(image)[1:17, left : left + 16])[None, None] / 255 - 0.4) / 0.2


@pytest.mark.parametrize("batch_size", [5, 64])
def test_classes_equal_those_of_evaluation(images, checkpoint, tmp_path, batch_size):
    flags = [*QUIET, "--batch_size", batch_size]
    run(
        main_finetune, *flags, "--eval", "--finetune", checkpoint, "--data_path", images,
        "--predictions", tmp_path / "evaluation.csv",
    )  # fmt: skip
    run(predict, *flags, "--checkpoint", checkpoint, images / "val", "--out", tmp_path / "predictions.csv")
    evaluation, predictions = rows(tmp_path / "evaluation.csv"), rows(tmp_path / "predictions.csv")
    assert len(predictions) == 24 and predictions[0] == [column for column in evaluation[0] if column != "label"]
    assert [[row[0], *row[2:]] for row in evaluation[1:]] == predictions[1:]


def test_embeddings_are_the_pooled_last_stage(images, checkpoint, model, tmp_path):
    for out in ("features.npz", "features.csv"):
        run(predict, *QUIET, "--checkpoint", checkpoint, images / "val", "--features", "--out", tmp_path / out)
    table = np.load(tmp_path / "features.npz")
    assert table["features"].shape == (23, model.num_features) and table["features"].dtype == np.float32
    with torch.no_grad():
        for path, features in zip(table["paths"], table["features"]):
            expected = model.forward_head(model.forward_features(prepared(path)), pre_logits=True)[0]
            torch.testing.assert_close(torch.tensor(features), expected, rtol=0, atol=0.05)  # a JPEG's last bit
    heading, *lines = rows(tmp_path / "features.csv")
    assert heading[:2] == ["path", "features0"] and [line[0] for line in lines] == table["paths"].tolist()
    assert np.array_equal(np.array([line[1:] for line in lines], np.float32), table["features"])


def test_dense_features_are_the_stages_maps(images, checkpoint, model, tmp_path, capfd):
    paths = [images / "val" / "fox" / f"000{i}.png" for i in (2, 0)]
    run(predict, *QUIET, "--checkpoint", checkpoint, *paths, "--dense", "--out", tmp_path / "new" / "maps.npz")
    assert f"made the folder {tmp_path / 'new'}" in capfd.readouterr().out
    table = np.load(tmp_path / "new" / "maps.npz")
    assert table["paths"].tolist() == [str(path) for path in paths]
    with torch.no_grad():
        expected = model.forward_intermediates(torch.cat([prepared(path) for path in paths]), intermediates_only=True)
    for number, maps in enumerate(expected, start=1):
        torch.testing.assert_close(torch.tensor(table[f"stage{number}"]), maps, rtol=1e-4, atol=1e-4)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["maps.npz"]  # nothing else is left


def test_inputs_of_every_kind_keep_their_order(images, checkpoint, tmp_path, monkeypatch):
    """Files, a nested folder, a list with labels, a tar, twice the same image."""
    monkeypatch.chdir(images)
    (images / "some.txt").write_text("val/fox/0001.png 3\nval/ant/0000.png 1\n")
    with tarfile.open(images / "pair.tar", "w") as tar:
        tar.add("val/elk/0000.png")
        tar.add("val/elk/0001.png")
    given = ["val/cow/0001.jpg", "val/bee", "some.txt", "val/cow/0001.jpg", "pair.tar", "val/ant/0003.png"]
    run(predict, *QUIET, "--checkpoint", checkpoint, *given, "--out", tmp_path / "classes.npz", "--batch_size", 3)
    table = np.load(tmp_path / "classes.npz")
    paths = table["paths"].tolist()
    assert paths[:5] == ["val/cow/0001.jpg", *(f"val/bee/000{i}.png" for i in range(4))]
    assert [Path(path).name for path in paths[5:8]] == ["0001.png", "0000.png", "0001.jpg"]
    assert "elk/0000.png" in paths[8] and "elk/0001.png" in paths[9] and paths[10] == "val/ant/0003.png"
    assert table["class_names"].tolist() == CLASSES
    run(predict, *QUIET, "--checkpoint", checkpoint, "val", "--out", tmp_path / "all.npz")
    everything = np.load(tmp_path / "all.npz")
    alone = dict(zip(everything["paths"].tolist(), everything["scores"]))
    for path, scores in zip(paths, table["scores"]):
        known = next(name for name in alone if name.endswith("/".join(Path(path).parts[-2:])))
        assert np.allclose(scores, alone[known], atol=1e-6)


def test_bad_images_are_named_and_left_out_on_request(images, checkpoint, tmp_path, capfd):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    good = [images / "val" / "ant" / f"000{i}.png" for i in range(3)]
    given = [broken, good[0], broken, *good[1:], broken]
    flags = [*QUIET, "--checkpoint", checkpoint, *given, "--out", tmp_path / "classes.csv", "--batch_size", 2]
    fails(predict, capfd, "broken.png", *flags)
    assert not (tmp_path / "classes.csv").exists()
    for workers in (0, 2):
        run(predict, *flags, "--bad_images", "skip", "--num_workers", workers)
        said = capfd.readouterr().out
        assert said.count("left out: cannot use image") == 3 and "3 images, 3 left out" in said
        assert [row[0] for row in rows(tmp_path / "classes.csv")[1:]] == [str(path) for path in good]
    reason = "none of the first 2 images can be read: .*broken.png.*: not an image"
    fails(predict, capfd, reason, *QUIET, "--checkpoint", checkpoint, broken, broken, "--bad_images", "skip")


def test_without_out_the_classes_are_shown(images, checkpoint, capfd):
    """Images may follow a list of numbers."""
    numbers = ("--input_size", 17, 24, "--mean", 0.4)
    run(predict, *QUIET, "--checkpoint", checkpoint, *numbers, images / "val" / "fox" / "0000.png", "--top", 2)
    shown = next(line for line in capfd.readouterr().out.splitlines() if "fox/0000.png: " in line)
    assert sum(name in shown.rpartition("/")[2] for name in CLASSES) >= 2 and shown.count("%") == 2


def test_what_follows_a_list_of_numbers_flag_is_its_value_even_if_it_is_no_number(capsys):
    with pytest.raises(SystemExit):
        predict.get_args_parser().parse_args(["--checkpoint", "c.pth", "photo.jpg", "--mean", "abc"])
    assert "argument --mean: invalid number value: 'abc'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        predict.get_args_parser().parse_args(["--mean", "--checkpoint", "c.pth", "photo.jpg"])
    assert "argument --mean: expected at least one argument" in capsys.readouterr().err


@pytest.mark.slow
def test_several_ranks_write_what_one_does(images, checkpoint, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    command = ["--checkpoint", checkpoint, images / "val", broken, "--bad_images", "skip", "--device", "cpu"]
    run(predict, *command, "--num_workers", "0", "--features", "--out", tmp_path / "one.npz")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["--num_workers", "0", "--features", "--out", tmp_path / "two.npz", "--batch_size", "4"]
    root = Path(predict.__file__).resolve().parent.parent
    subprocess.run([*launch, "util.predict", *map(str, command)], check=True, cwd=root, timeout=300)
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert one["paths"].tolist() == two["paths"].tolist() and len(one["paths"]) == 23
    assert np.allclose(one["features"], two["features"], atol=1e-5)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--features"], "--features needs --out"),
        (["--dense", "--out", "a.csv"], "--dense writes an .npz"),
        (["--features", "--dense", "--out", "a.npz"], "exclude each other"),
        (["--out", "a.txt"], r"must end in \.csv or \.npz"),
        (["--top", "0"], "--top must be at least 1"),
    ],
)
def test_flags_that_contradict_each_other(images, checkpoint, capfd, flags, message):
    fails(predict, capfd, message, *QUIET, "--checkpoint", checkpoint, images, *flags)


def test_what_cannot_be_used_is_said(images, checkpoint, tmp_path, capfd):
    fails(predict, capfd, "nowhere.png", *QUIET, "--checkpoint", checkpoint, tmp_path / "nowhere.png")
    fails(predict, capfd, "nowhere does not exist", *QUIET, "--checkpoint", checkpoint, tmp_path / "nowhere")
    fails(predict, capfd, "--checkpoint is missing", *QUIET, images)
    (tmp_path / "images.zip").write_bytes(b"PK")
    fails(predict, capfd, "is a compressed archive", *QUIET, "--checkpoint", checkpoint, tmp_path / "images.zip")
    headless = tmp_path / "pretrained.pth"
    weights = timm.create_model("mixmae_quickstart", **SHAPE).state_dict()
    write_checkpoint(headless, {"model": weights, "args": RECORDED | {"model": "mixmae_quickstart"}})
    fails(predict, capfd, "without a classification head", *QUIET, "--checkpoint", headless, images)
    run(predict, *QUIET, "--checkpoint", headless, images / "val", "--features", "--out", tmp_path / "features.npz")
    assert len(np.load(tmp_path / "features.npz")["features"]) == 23
