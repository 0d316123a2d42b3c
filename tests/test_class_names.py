"""Class names travel with the weights: renamed folders stop a run, other orders are mapped by name."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import fails, read_lines, run

import main_finetune
import util.data.open_source
from util.data.datasets import match_classes
from util.errors import UserError
from util.weights.file import CheckpointError, read_checkpoint, write_checkpoint
from util.weights.source import read_weights, recorded_classes

CLASSES = ["blue", "green", "red"]
SHARED = ["--device", "cpu", "--num_workers", "0"]
TRAIN = ["--model", "swin_quickstart", "--input_size", "16", "--window_size", "4", "4", "4", "2", *SHARED]
TRAIN += ["--batch_size", "8", "--lr", "1e-3", "--warmup_epochs", "1", "--aa", "", "--reprob", "0", "--drop_path", "0"]


def draw(folder: Path, name: str, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng([seed, CLASSES.index(name)])
    for i in range(count):
        pixels = generator.integers(0, 150, (20, 20, 3), dtype=np.uint8)
        pixels[:, :, 2 - CLASSES.index(name)] += 100
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in CLASSES:
        draw(folder / "train" / name, name, 9, seed=0)
        draw(folder / "val" / name, name, 4, seed=1)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A classifier that is always right."""
    out = tmp_path_factory.mktemp("out")
    run(main_finetune, *TRAIN, "--epochs", "10", "--data_path", data, "--output_dir", out)
    assert read_lines(out / "log.txt")[-1]["test_acc1"] == 100
    return out / "checkpoint.pth"


def rearranged(data: Path, place: Path, names: dict[str, str], splits=("train", "val")) -> Path:
    """The data under other names: class folder `old` becomes `names[old]`."""
    for split in splits:
        (place / split).mkdir(parents=True)
        for old, new in names.items():
            (place / split / new).symlink_to(data / split / old)
    return place


def without_names(trained: Path, place: Path, **changes) -> Path:
    content = read_checkpoint(trained)
    write_checkpoint(place, {name: value for name, value in content.items() if name != "classes"} | changes)
    return place


def result(said: str) -> str:
    return said.partition("result: top-1 ")[2].partition("%")[0]


def test_checkpoints_carry_the_names_of_their_classes(trained):
    assert read_checkpoint(trained)["classes"] == CLASSES
    assert read_weights(trained)[1].classes == CLASSES


@pytest.mark.parametrize("flag", ["--finetune", "--resume"])
@pytest.mark.parametrize("splits", [("val",), ("train", "val")])
def test_evaluation_stops_where_folders_were_renamed(data, trained, tmp_path, capfd, flag, splits):
    """Without train/ beside it, val/ numbered its own folders: 8% instead of 66%, and exit code 0."""
    renamed = rearranged(data, tmp_path / "data", {"blue": "z_blue", "green": "green", "red": "red"}, splits)
    message = rf"only in the data: \['z_blue'\]; only in {trained}: \['blue'\]\. Give the class folders.*--reset_head"
    fails(main_finetune, capfd, message, *SHARED, "--eval", flag, trained, "--data_path", renamed)


def test_evaluation_of_some_classes_alone_numbers_them_as_training_did(data, trained, tmp_path, capfd):
    some = rearranged(data, tmp_path / "data", {"green": "green", "red": "red"}, splits=("val",))
    table = tmp_path / "predictions.csv"
    flags = ["--data_path", some, "--finetune", trained, "--predictions", table]
    run(main_finetune, *SHARED, "--eval", *flags)
    said = capfd.readouterr().out
    assert result(said) == "100.000" and "1 of 3 classes have no validation image: ['blue']" in said
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 8 and all(row["label"] == row["top1"] == Path(row["path"]).parent.name for row in rows)
    assert {row["top3"] for row in rows} | {row["top2"] for row in rows} >= {"blue"}


class Reversed(util.data.open_source.FileSource):
    """The same images and names; classes are numbered backwards, as another data set's library may do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.classes = self.classes[::-1]
        self.targets = len(self.classes) - 1 - self.targets

    def read(self, i):
        image, _ = super().read(i)
        return image, int(self.targets[i])


def test_the_same_names_in_another_order_are_mapped(data, trained, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(util.data.open_source, "FileSource", Reversed)
    monkeypatch.setattr(util.data.open_source, "_train_classes", lambda *_: None)
    run(main_finetune, *SHARED, "--eval", "--finetune", trained, "--data_path", data, "--per_class")
    said = capfd.readouterr().out
    assert result(said) == "100.000"
    assert [line.split()[-1] for line in said.splitlines() if "] top-1" in line] == CLASSES

    out = tmp_path / "kept"  # a head that is kept, its weights as good as unchanged
    flags = ["--epochs", "1", "--lr", "1e-12", "--min_lr", "0", "--data_path", data, "--output_dir", out]
    run(main_finetune, *TRAIN, *flags, "--finetune", trained)
    assert read_lines(out / "log.txt")[0]["test_acc1"] == 100
    assert read_checkpoint(out / "checkpoint.pth")["classes"] == CLASSES
    out = tmp_path / "reset"
    flags = ["--epochs", "1", "--data_path", data, "--output_dir", out, "--finetune", trained, "--reset_head"]
    run(main_finetune, *TRAIN, *flags)
    assert read_checkpoint(out / "checkpoint.pth")["classes"] == CLASSES[::-1]  # the data's own


def test_fine_tuning_on_other_classes_needs_reset_head(data, trained, tmp_path, capfd):
    other = rearranged(data, tmp_path / "data", {"blue": "ant", "green": "bee", "red": "cow"})
    flags = [*TRAIN, "--epochs", "1", "--finetune", trained, "--data_path", other, "--output_dir", tmp_path / "out"]
    message = r"only in the data: \['ant', 'bee', 'cow'\]; only in .*\['blue', 'green', 'red'\]"
    fails(main_finetune, capfd, message, *flags)
    run(main_finetune, *flags, "--reset_head")
    assert read_checkpoint(tmp_path / "out" / "checkpoint.pth")["classes"] == ["ant", "bee", "cow"]


def test_a_run_is_not_resumed_on_renamed_classes(data, trained, tmp_path, capfd):
    out = tmp_path / "out"
    shutil.copytree(trained.parent, out)
    flags = [*TRAIN, "--epochs", "10", "--resume", "auto", "--output_dir", out, "--data_path"]
    renamed = rearranged(data, tmp_path / "renamed", {"blue": "blue", "green": "tea", "red": "red"})
    message = r"only in the data: \['tea'\]; only in the checkpoint to resume: \['green'\]"
    fails(main_finetune, capfd, message, *flags, renamed)
    fewer = rearranged(data, tmp_path / "fewer", {"blue": "blue", "red": "red"})
    fails(main_finetune, capfd, r"only in the checkpoint to resume: \['green'\]", *flags, fewer)
    run(main_finetune, *flags, data)
    assert result(capfd.readouterr().out) == "100.000"


def test_weights_without_names_are_used_with_a_warning(data, trained, tmp_path, capfd):
    nameless = without_names(trained, tmp_path / "nameless.pth")
    run(main_finetune, *SHARED, "--eval", "--finetune", nameless, "--data_path", data)
    said = capfd.readouterr().out
    assert f"{nameless} does not record the names of its classes" in said and result(said) == "100.000"
    flags = ["--epochs", "1", "--data_path", data, "--output_dir", tmp_path / "out", "--finetune", nameless]
    run(main_finetune, *TRAIN, *flags)
    assert "does not record the names" in capfd.readouterr().out


def test_nb_classes_does_not_contradict_itself(data, trained, tmp_path, capfd):
    """It said "set --nb_classes 3", and then that 3 contradicts the data's 2."""
    nameless = without_names(trained, tmp_path / "nameless.pth")
    two = rearranged(data, tmp_path / "two", {"blue": "blue", "red": "red"}, splits=("val",))
    for flags in ([], ["--nb_classes", "3"]):
        message = r"has 3 classes, but .*two has 2.*put a folder train/ beside val/"
        fails(main_finetune, capfd, message, *SHARED, "--eval", "--finetune", nameless, "--data_path", two, *flags)
    (two / "train" / "green").mkdir(parents=True)  # what the message says
    for name in ("blue", "red"):
        (two / "train" / name).mkdir()
    run(main_finetune, *SHARED, "--eval", "--finetune", nameless, "--data_path", two, "--nb_classes", "3")
    assert result(capfd.readouterr().out) == "100.000"
    message = r"--nb_classes 2 contradicts the 3 classes in .*checkpoint\.pth: leave it out"
    fails(
        main_finetune, capfd, message, *SHARED, "--eval", "--finetune", trained, "--data_path", two, "--nb_classes", "2"
    )


def test_damaged_names(trained, tmp_path):
    for classes in ("blue", ["a", "a", "b"], [1, 2, 3]):
        path = without_names(trained, tmp_path / "damaged.pth", classes=classes)
        with pytest.raises(CheckpointError, match="which are not distinct names"):
            read_weights(path)
    assert recorded_classes({"classes": ["of", "another program"]}, "x") is None


def test_matching_is_by_name():
    assert match_classes(["c", "a"], ["a", "b", "c"], "w", exactly=False).tolist() == [2, 0]
    for own, exactly in ((["a", "d"], False), (["a", "c"], True)):
        with pytest.raises(UserError, match="differ in the names of their classes"):
            match_classes(own, ["a", "b", "c"], "w", exactly)


def test_what_is_evaluated_has_the_size_of_the_weights(data, trained, tmp_path, capfd):
    """Nothing but the file says that it is a model of 64 pixels with patches and windows of its own."""
    out = tmp_path / "out"
    shape = ["--input_size", "64", "--patch_size", "8", "--window_size", "8", "4", "2", "1", "--epochs", "1"]
    run(main_finetune, *TRAIN, *shape, "--data_path", data, "--output_dir", out)
    trained_as = result(capfd.readouterr().out)
    run(main_finetune, *SHARED, "--eval", "--finetune", out / "checkpoint.pth", "--data_path", data)
    said = capfd.readouterr().out
    assert "(swin_quickstart at 64x64) on 12 images" in said and "resized" not in said
    assert result(said) == trained_as
