"""Labels from lists, and a part of one folder set aside for validation: as from class folders, to the last number."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from photos import data_args
from running import QUICK, fails, losses, make_images, run

import main_finetune
import main_pretrain
import util.knn
from util.data.datasets import build_dataset
from util.data.image_index import ImageIndex, StringTable
from util.data.sources import FileSource, shared_with_training
from util.errors import UserError
from util.run.checks import check_overlap
from util.weights.file import read_checkpoint

CLASSES = ("ant", "bee", "cow")
SHAPE = ["--input_size", "16", "--window_size", "4", "4", "4", "2", "--in_chans", "1"]
QUICK = [*QUICK[:-2], "--warmup_epochs", "0"]
TRAIN = [*SHAPE, *QUICK, "--model", "swin_quickstart", "--batch_size", "4", "--epochs", "1", "--lr", "1e-3"]
CPU = ["--device", "cpu", "--num_workers", "0"]


@pytest.fixture
def folders(tmp_path) -> Path:
    """10 training and 4 validation images of each class."""
    for number, name in enumerate(CLASSES):
        make_images(tmp_path / "data" / "train" / name, 10, (16, 16), seed=number)
        make_images(tmp_path / "data" / "val" / name, 4, (16, 16), seed=10 + number)
    return tmp_path / "data"


def lists(folders: Path, place: Path) -> Path:
    """The same images and labels in `place/train.txt` and `place/val.txt`."""
    place.mkdir()
    for split in ("train", "val"):
        paths = sorted((folders / split).glob("*/*.png"))
        lines = [f"{path} {CLASSES.index(path.parent.name)}\n" for path in paths]
        (place / f"{split}.txt").write_text("".join(lines))
    return place


def result(said: str) -> str:
    return said.rpartition("result: ")[2].partition(" of ")[0]


def test_lists_train_probe_and_evaluate_as_folders_do(folders, tmp_path, capfd):
    place = lists(folders, tmp_path / "lists")
    results = []
    for data, out in ((folders, "a"), (place, "b"), (place / "train.txt", "c")):
        run(main_finetune, *TRAIN, "--data_path", data, "--output_dir", tmp_path / out)
        trained = result(capfd.readouterr().out)
        weights = tmp_path / out / "checkpoint.pth"
        table = tmp_path / f"{out}.csv"
        flags = ["--eval", "--finetune", weights, "--data_path", data, "--predictions", table]
        run(main_finetune, *CPU, *flags)
        assert result(capfd.readouterr().out) == trained
        rows = [(row["path"], row["score1"]) for row in csv.DictReader(table.open())]
        assert len(rows) == 12
        run(util.knn, *CPU, "--checkpoint", weights, "--data_path", data, "--k", "3")
        knn = capfd.readouterr().out.rpartition("kNN top-1: ")[2].partition(" of ")[0]
        results.append((losses(tmp_path / out), trained, rows, knn))
    assert results[0] == results[1] == results[2]
    assert read_checkpoint(tmp_path / "b" / "checkpoint.pth")["classes"] == ["0", "1", "2"]
    # numbers are taken as positions in the names, which are other names than numbers the other way round
    run(main_finetune, *CPU, "--eval", "--finetune", tmp_path / "a" / "checkpoint.pth", "--data_path", place)
    said = capfd.readouterr().out
    assert result(said) == results[0][1] and "the labels of these images are numbers" in said
    message = r"only in the data: \['ant', 'bee', 'cow'\]"
    weights = tmp_path / "b" / "checkpoint.pth"
    fails(main_finetune, capfd, message, *CPU, "--eval", "--finetune", weights, "--data_path", folders)


def test_mistakes_with_lists(folders, tmp_path, capfd):
    place = lists(folders, tmp_path / "lists")
    flags = [*TRAIN, "--output_dir", tmp_path / "out", "--data_path"]
    other = shutil.copy(folders / "val" / "ant" / "0000.png", tmp_path)
    with (place / "val.txt").open("a") as file:
        file.write(f"{other} 7\n")
    fails(main_finetune, capfd, r"has classes that the training set lacks: \['3', '4', '5', '6', '7'\]", *flags, place)
    (place / "val.txt").write_text(f"{folders}/val/ant/0000.png\n")
    fails(main_finetune, capfd, r"the images of .* \(val\) have no labels", *flags, place)
    (place / "val.txt").unlink()
    message = r"is a list of training images; .*val\.txt beside the list, or --val_share"
    fails(main_finetune, capfd, message, *flags, place / "train.txt")
    fails(main_finetune, capfd, r"val does not exist; .*--val_share 0\.1", *flags, place)


def test_missing_images_of_a_list_are_told_before_training(folders, tmp_path, capfd):
    """A run ended in its first epoch, or at its first evaluation."""
    place = lists(folders, tmp_path / "lists")
    flags = [*TRAIN, "--output_dir", tmp_path / "out", "--data_path", place]
    for split, number in (("val", 1), ("train", 2)):
        for i in range(number):
            (folders / split / "bee" / f"000{i}.png").unlink()
        message = rf"{number} images of a sample of the \d+ do not exist: \['{folders}/{split}/bee/0000.png'"
        fails(main_finetune, capfd, message, *flags)
        assert not (tmp_path / "out" / "steps.jsonl").exists()
        if split == "val":
            make_images(folders / "val" / "bee", 1, (16, 16))
    run(main_finetune, *flags, "--bad_images", "skip", "--max_bad_images", "0.1")
    assert "2 images of a sample of the 30 do not exist" in capfd.readouterr().out


def test_folders_win_over_lists_of_their_name(folders, caplog):
    for split in ("train", "val"):
        (folders / f"{split}.txt").write_text(f"{split}/ant/0000.png 0\n")
    for path, numbers in ((folders, (30, 12)), (folders / "train.txt", (1, 1))):
        args = data_args(path, in_chans=1)
        assert tuple(len(build_dataset(args, split, lambda image: image)) for split in ("train", "val")) == numbers


def test_lists_that_repeat_images_skip_classes_or_share_images(folders, tmp_path, capfd):
    place = lists(folders, tmp_path / "lists")
    train, val = (place / f"{split}.txt" for split in ("train", "val"))
    train.write_text(re.sub(" ([012])\n", lambda match: f" {2 * int(match[1]) + 1}\n", train.read_text()))
    val.write_text("".join(train.read_text().splitlines(True)[:4] * 2))
    run(main_finetune, *TRAIN, "--data_path", place, "--output_dir", tmp_path / "out")
    said = capfd.readouterr().out
    assert "3 of 6 classes have no training image: ['0', '2', '4']" in said
    assert f"{val}: 4 lines repeat images of other lines" in said
    assert "8 of 8 validation images are training images too" in said


@pytest.mark.parametrize("how", ["the same folder", "a linked folder", "a copy", "apart"])
def test_validation_images_that_were_trained_on_are_told(folders, tmp_path, caplog, how):
    """kNN said 100%, with exit code 0."""
    if how in ("the same folder", "a copy"):
        shutil.rmtree(folders / "val")
    if how == "the same folder":
        (folders / "val").symlink_to("train")
    if how == "a linked folder":
        (folders / "train" / "bee" / "more").symlink_to("../../val/bee")
        (folders / "train" / "bee" / "again").symlink_to("../../val/bee")
    if how == "a copy":
        shutil.copytree(folders / "train", folders / "val")
        (folders / "val" / "ant" / "0000.png").unlink()
        make_images(folders / "val" / "bee", 1, (16, 16), seed=99)
    train, val = (
        build_dataset(data_args(folders, in_chans=1), split, lambda image: image) for split in ("train", "val")
    )
    check_overlap(train, val)
    expected = {"the same folder": "30 of 30", "a linked folder": "4 of 12", "a copy": "28 of 29"}
    assert (f"{expected.get(how)} validation images are training images too" in caplog.text) == (how != "apart")
    assert ("whose images are repeated: ['bee/again', 'bee/more']" in caplog.text) == (how == "a linked folder")


def test_looking_for_shared_images_is_cheap_in_a_large_folder(monkeypatch):
    """Paths of ImageNet's size took 4 seconds, be the folder divided (which shares no image) or given twice."""
    names = [f"n{i // 1300:08d}/n{i // 1300:08d}_{i:07d}.JPEG".encode() for i in range(100_000)]
    index = ImageIndex("/data", StringTable.of(names), np.zeros(len(names), np.int32), ["a"])
    aside = np.arange(len(names)) % 10 == 0
    parts = (index, index.select(aside), index.select(~aside))
    whole, part, rest = (FileSource(one, data_args("/data")) for one in parts)
    monkeypatch.setattr(FileSource, "path", lambda self, i: 1 / 0)
    assert shared_with_training(rest, part) == (0, 10_000)
    assert shared_with_training(whole, whole) == (100_000, 100_000)


def test_an_evaluation_of_the_training_images_says_so(folders, tmp_path, capfd):
    run(main_finetune, *TRAIN, "--data_path", folders, "--output_dir", tmp_path / "out")
    shutil.rmtree(folders / "val")
    evaluate = ["--eval", "--finetune", tmp_path / "out" / "checkpoint.pth", "--data_path", folders]
    for rename in (False, True):
        (folders / "train").rename(folders / "val")
        capfd.readouterr()
        run(main_finetune, *CPU, *evaluate)
        assert ("these are the 30 images that" in capfd.readouterr().out) != rename
        if not rename:
            (folders / "val" / "ant" / "0000.png").rename(folders / "val" / "ant" / "other.png")
            (folders / "val").rename(folders / "train")


def test_classes_that_are_spelt_alike_are_told(folders, tmp_path, capfd):
    for split in ("train", "val"):
        (folders / split / "cow").rename(folders / split / "ANT")
    run(main_finetune, *TRAIN, "--data_path", folders, "--output_dir", tmp_path / "out")
    assert "treated as different classes, though their names are spelt alike: ['ANT', 'ant']" in capfd.readouterr().out


def test_more_classes_than_a_list_shows(folders, tmp_path):
    place, out = lists(folders, tmp_path / "lists"), tmp_path / "out"
    run(main_finetune, *TRAIN, "--nb_classes", "5", "--data_path", place, "--output_dir", out)
    assert read_checkpoint(out / "checkpoint.pth")["classes"] == list("01234")


# --- One folder for both ---


def parts(path: Path, **changes) -> tuple[list[str], list[str]]:
    args = data_args(path, in_chans=1, **changes)
    datasets = [build_dataset(args, split, lambda image: image, require_labels=True) for split in ("train", "val")]
    assert datasets[0].classes == datasets[1].classes
    for dataset in datasets:
        names = [dataset.classes[int(target)] for target in dataset.targets]
        assert not dataset.classes[0].isalpha() or [Path(p).parent.name for p in paths_of(dataset)] == names
    return paths_of(datasets[0]), paths_of(datasets[1])


def paths_of(dataset) -> list[str]:
    return [dataset.path_of(i) for i in range(len(dataset))]


@pytest.mark.parametrize("kind", ["folders", "train", "list"])
def test_a_share_of_every_class_is_set_aside(folders, tmp_path, kind):
    if kind == "list":
        place = lists(folders, tmp_path / "lists") / "train.txt"
        (place.parent / "val.txt").unlink()
    else:
        shutil.rmtree(folders / "val")
        place = folders if kind == "train" else folders / "train"
    train, val = parts(place, val_share=0.2)
    assert sorted(train + val) == sorted(map(str, (folders / "train").glob("*/*.png")))
    assert [Path(path).parent.name for path in val] == [name for name in CLASSES for _ in range(2)]
    assert parts(place, val_share=0.2, seed=7) == (train, val)
    assert len(parts(place, val_share=0.5)[1]) == 15
    assert set(val) < set(parts(place, val_share=0.5)[1])
    assert len(parts(place, val_share=0.001)[1]) == 3 and len(parts(place, val_share=0.999)[0]) == 3


def test_the_division_hardly_changes_with_the_images():
    names = [b"%05d.jpg" % i for i in range(2000)]
    index = ImageIndex("/", StringTable.of(names), np.zeros(2000, np.int32), ["x"])
    aside = index.set_aside(0.1)
    assert aside.sum() == 200 and 15 < aside[:200].sum() + aside[-200:].sum() < 70
    fewer = ImageIndex("/", StringTable.of(names[100:]), np.zeros(1900, np.int32), ["x"])
    assert (fewer.set_aside(0.1) != aside[100:]).sum() < 30
    tiny = ImageIndex("/", StringTable.of([b"a", b"b"]), np.array([0, 1], np.int32), ["x", "y"])
    with pytest.raises(UserError, match=r"--val_share 0\.1 of 2 images leaves none for validation"):
        tiny.set_aside(0.1)


def test_the_division_is_stored_and_checked(folders, tmp_path, capfd):
    shutil.rmtree(folders / "val")
    out, shared = tmp_path / "out", ["--data_path", folders]
    flags = [*TRAIN, *shared, "--output_dir", out]
    fails(main_finetune, capfd, r"val does not exist; .*or let --val_share 0\.1 set a part", *flags)
    run(main_finetune, *flags, "--val_share", "0.2")
    said = capfd.readouterr().out
    trained = result(said)
    assert "on 6 images" in said and len((out / "val.txt").read_text().splitlines()) == 6
    weights = ["--eval", "--finetune", out / "checkpoint.pth"]
    run(main_finetune, *CPU, *weights, *shared, "--val_share", "0.2")
    said = capfd.readouterr().out
    assert result(said) == trained and "on 6 images" in said and "may have been trained on" not in said
    message = r"--val_share 0\.3, but .* trained with --val_share 0\.2: some of these images may have been trained on"
    fails(main_finetune, capfd, message, *CPU, *weights, *shared, "--val_share", "0.3")
    message = r"val_share: 0\.2 -> 0\.3"
    fails(main_finetune, capfd, message, *flags, "--val_share", "0.3", "--resume", "auto")

    make_images(folders / "train" / "ant", 40, (16, 16), seed=5)  # more images, as time goes by
    run(main_finetune, *CPU, *weights, *shared, "--val_share", "0.2")
    said = capfd.readouterr().out
    assert "the 12 images set aside by --val_share are not the 6 of the training" in said
    run(main_finetune, *CPU, *weights, "--data_path", out / "val.txt")  # the stored list still holds
    assert "on 6 images" in capfd.readouterr().out


def test_where_nothing_can_be_divided(folders, tmp_path, capfd):
    flags = [*TRAIN, "--output_dir", tmp_path / "out", "--val_share", "0.2", "--data_path"]
    fails(
        main_finetune,
        capfd,
        r"--val_share 0\.2 divides the images, but .*val exists: use one of the two",
        *flags,
        folders,
    )
    place = lists(folders, tmp_path / "lists")
    fails(main_finetune, capfd, r"but .*val\.txt exists", *flags, place / "train.txt")
    fails(
        main_finetune,
        capfd,
        r"--val_share must be at least 0 and below 1, got 1",
        *flags[:-2],
        "1",
        "--data_path",
        place,
    )
    (tmp_path / "tar").mkdir()
    shutil.make_archive(str(tmp_path / "tar" / "train"), "tar", folders / "train")
    message = r"not the tar of --data_path .*/tar: unpack it, or make a val\.tar beside a train\.tar"
    fails(main_finetune, capfd, message, *flags, tmp_path / "tar")


def test_pretraining_leaves_the_part_out_and_tests_on_it(folders, tmp_path, capfd):
    shutil.rmtree(folders / "val")
    flags = [*SHAPE, *QUICK, "--model", "mixmae_quickstart", "--batch_size", "12", "--epochs", "1", "--vis_every", "0"]
    shared = ["--data_path", folders / "train", "--output_dir", tmp_path / "out", "--val_share", "0.2"]
    run(main_pretrain, *flags, *shared, "--knn_every", "1")
    said = capfd.readouterr().out
    assert "train: 24 images" in said and "val: 6 images" in said and "knn_acc1_k10" in said


def test_folders_that_are_named_by_numbers_are_matched_by_number(tmp_path):
    """As text, 10 comes before 2: labels of lists were taken as positions, 20 of 24 wrong, without a word."""
    names = [str(number) for number in range(12)]
    for number, name in enumerate(names):
        make_images(tmp_path / "data" / "train" / name, 2, (16, 16), seed=number)
        make_images(tmp_path / "data" / "val" / name, 2, (16, 16), seed=number)
    listed = tmp_path / "lists"
    listed.mkdir()
    for split in ("train", "val"):
        lines = [f"{path} {path.parent.name}" for path in sorted((tmp_path / "data" / split).glob("*/*.png"))]
        (listed / f"{split}.txt").write_text("\n".join(lines))
    dataset = build_dataset(data_args(listed, in_chans=1), "val", lambda image: image)
    classes = sorted(names)  # of weights that were trained on folders
    dataset.number_labels_as(classes, "the weights")
    for index in range(len(dataset)):
        assert classes[dataset[(0, index)][1]] == Path(dataset.path_of(index)).parent.name
    assert {classes[target] for target in dataset.targets} == set(names)
    with pytest.raises(UserError, match=r"only in the data: \['0'\]"):
        build_dataset(data_args(listed, in_chans=1), "val", lambda image: image).number_labels_as(names[1:], "others")
