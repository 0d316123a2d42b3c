"""Hostile names, lists, archives and checkpoints run nothing and change nothing outside the output folder; full and
read-only disks are said clearly."""

import csv
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from running import make_images, read_lines
from trials import FORBIDDEN, TINY, Trial, differences, full_disk, mounted, same, state_of, watch

import main_finetune
from util.weights.file import read_checkpoint, write_checkpoint

RECIPE = (*TINY, "--epochs", "2", "--vis_every", "1")


class RunsACommand:
    """Pickled, it is a call of os.system."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `images` and with `reference`, the output of an ordinary run."""
    place = tmp_path_factory.mktemp("hostile")
    make_images(place / "images", 12)
    Trial(place, *RECIPE, "--data_path", place / "images", "--output_dir", place / "reference").finish()
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Where indices of image folders are kept: the one place outside the output folder that is written to."""
    monkeypatch.setenv("MIXMAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def everything_below(folder: Path, *but: Path) -> dict[str, bytes | None]:
    """Path -> content of all files below `folder`, without those below `but`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not any(path == other or other in path.parents for other in but):
            found[os.fsencode(path)] = path.read_bytes() if path.is_file() else None
    return found


def watched(tmp_path: Path, *flags: object, code: int = 0, recipe: tuple = RECIPE, **options) -> str:
    """A run in `tmp_path/out` that may change nothing else; returns what it said."""
    out, logs = tmp_path / "out", tmp_path / "logs"
    before = everything_below(tmp_path, out, logs, tmp_path / "cache")
    allowed = watch(out, logs, tmp_path / "cache")
    said = Trial(logs, *recipe, *flags, "--output_dir", out, sabotage=allowed, **options).finish(code)
    assert FORBIDDEN not in said
    assert everything_below(tmp_path, out, logs, tmp_path / "cache") == before
    assert not list(tmp_path.parent.rglob("it_ran"))
    return said


def test_watching_sees_a_file_elsewhere_and_a_program(tmp_path):
    """The tests below would fail if there were something to see."""

    def hostile(rank: int) -> None:
        watch(tmp_path / "out")(rank)
        (tmp_path / "elsewhere").write_text("")
        os.system("true")

    said = Trial(tmp_path / "logs", "--data_path", "absent", "--device", "cpu", sabotage=hostile).finish(2)
    assert f"{FORBIDDEN} open" in said and f"{FORBIDDEN} os.system" in said


NAMES = ["x..%2f..%2fx", "$(touch it_ran)", ";touch it_ran", "two\nlines", "-rf", "~", os.fsdecode(b"not utf-8 \xff")]


@pytest.fixture
def badly_named(tmp_path) -> Path:
    """Training and validation images, one per class, with names that would do harm."""
    for split in ("train", "val"):
        for name in NAMES:
            folder = tmp_path / "data" / split / name
            make_images(folder, 1)
            (folder / "0000.png").rename(folder / f"{name}.png")
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 2])
def test_names_of_classes_and_images_in_pretraining(tmp_path, badly_named, workers):
    watched(tmp_path, "--data_path", badly_named, "--num_workers", workers)


def test_names_of_classes_and_images_in_fine_tuning_and_its_results(tmp_path, badly_named):
    out = tmp_path / "out"
    recipe = (*TINY[: TINY.index("--vis_every")], "--model", "swin_quickstart", "--batch_size", 2, "--epochs", 1)
    flags = ("--data_path", badly_named, "--aa", "")
    watched(tmp_path, *flags, recipe=recipe, main=main_finetune)
    results = ("--eval", "--resume", out / "checkpoint.pth", "--per_class", "--predictions", out / "predictions.csv")
    said = watched(tmp_path, *flags, *results, recipe=recipe, main=main_finetune)
    assert "result: top-1" in said and "'two\\nlines'" in said
    rows = list(csv.reader((out / "predictions.csv").open(newline="", errors="surrogateescape")))
    assert sorted(row[1] for row in rows[1:]) == sorted(NAMES)


def test_lists_may_name_images_anywhere_and_are_only_read(tmp_path):
    make_images(tmp_path / "elsewhere", 8)
    (tmp_path / "lists").mkdir()
    names = [f"../elsewhere/{i:04d}.png" for i in range(4)]
    names += [str(tmp_path / "elsewhere" / f"{i:04d}.png") for i in range(4, 8)]
    (tmp_path / "lists" / "images.txt").write_text("\n".join(names))
    watched(tmp_path, "--data_path", tmp_path / "lists" / "images.txt")


def test_archives_are_not_unpacked(tmp_path, place):
    picture = (place / "images" / "0000.png").read_bytes()
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for i in range(4):
            for name in (f"../../escaped{i}.png", f"{tmp_path}/absolute{i}.png"):
                member = tarfile.TarInfo(name)
                member.size = len(picture)
                archive.addfile(member, io.BytesIO(picture))
    watched(tmp_path, "--data_path", tmp_path / "images.tar")


def test_an_array_or_an_index_that_would_run_a_command_is_refused(tmp_path):
    make_images(tmp_path / "data", 3, channels=2)
    hostile = np.array([RunsACommand(f"touch {tmp_path}/it_ran")], dtype=object)
    np.save(tmp_path / "data" / "0003.npy", hostile, allow_pickle=True)
    os.utime(tmp_path / "data", (0, 0))  # settled, so that its index is kept
    flags = ("--in_chans", 2, "--data_path", tmp_path / "data", "--batch_size", 2)
    said = watched(tmp_path, *flags, code=1)
    assert "0003.npy" in said and "--bad_images skip" in said and "Traceback" not in said
    watched(tmp_path, *flags, "--num_workers", 2, code=1)
    (index,) = (tmp_path / "cache").glob("*.npz")
    np.savez(index, names=hostile, allow_pickle=True)
    (tmp_path / "data" / "0003.npy").unlink()
    os.utime(tmp_path / "data", (0, 0))
    said = watched(tmp_path, *flags)
    assert "unusable" in said


@pytest.mark.parametrize("how", ["--resume", "--finetune", "auto"])
def test_a_checkpoint_that_would_run_a_command_is_refused(tmp_path, place, how):
    hostile = tmp_path / "hostile.pth"
    torch.save({"model": {}, "optimizer": {}, "epoch": 1, "args": RunsACommand(f"touch {tmp_path}/it_ran")}, hostile)
    flags = (how, hostile)
    if how == "auto":
        (tmp_path / "out").mkdir()
        shutil.copy(hostile, tmp_path / "out" / "checkpoint.pth")
        flags = ("--resume", "auto")
    said = watched(tmp_path, "--data_path", place / "images", *flags, code=2)
    assert "refused" in said and "nothing was run" in said and "Traceback" not in said


def test_the_settings_in_a_checkpoint_direct_nothing(tmp_path, place):
    checkpoint = read_checkpoint(place / "reference" / "checkpoint-00000003.pth")
    for name in ("output_dir", "log_dir", "data_path"):
        checkpoint["args"][name] = str(tmp_path / "elsewhere")
    write_checkpoint(tmp_path / "theirs.pth", checkpoint)
    said = watched(tmp_path, "--data_path", place / "images", "--resume", tmp_path / "theirs.pth")
    assert "data_path: " in said
    assert same(state_of(tmp_path / "out"), state_of(place / "reference"))


@pytest.mark.parametrize(
    "changed",
    [{"epoch": "1"}, {"step": None}, {"args": 3}, {"optimizer": {}}, {"model": {"a": 1}}, {"step_in_epoch": -(10**30)}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_checkpoint_of_another_structure_is_an_error_in_one_line(tmp_path, place, changed):
    write_checkpoint(tmp_path / "odd.pth", read_checkpoint(place / "reference" / "checkpoint.pth") | changed)
    said = watched(tmp_path, "--data_path", place / "images", "--resume", tmp_path / "odd.pth", code=2)
    assert "odd.pth" in said and "Traceback" not in said


# --- Disks --------------------------------------------------------------------------------------------------


def test_an_output_folder_that_cannot_be_written_to_is_an_error_before_training(tmp_path, place):
    flags = (*RECIPE, "--data_path", place / "images")
    (tmp_path / "file").write_text("")
    said = Trial(tmp_path, *flags, "--output_dir", tmp_path / "file" / "out").finish(2)
    assert "file/out cannot be written to" in said and "--output_dir" in said and "Traceback" not in said
    said = Trial(tmp_path, *flags, "--output_dir", tmp_path / "out", "--log_dir", tmp_path / "file" / "tb").finish(2)
    assert "file/tb" in said and "Traceback" not in said and "epoch 0" not in said
    out = tmp_path / "read-only"
    out.mkdir(mode=0o500)
    with mounted(out, "--bind", str(out)) as bound:  # root may write in spite of the mode
        if os.geteuid() == 0 and not (bound and os.system(f"mount -o remount,ro,bind {out} 2>/dev/null") == 0):
            pytest.skip("root cannot mount a folder read-only here")
        said = Trial(tmp_path, *flags, "--output_dir", out).finish(2)
        assert "read-only cannot be written to" in said and "Traceback" not in said and "epoch 0" not in said


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 MB."""
    (tmp_path / "disk").mkdir()
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=40m", "tmpfs") as allowed:
        if not allowed:
            pytest.skip("cannot mount a tmpfs here")
        yield tmp_path / "disk"


def test_a_run_survives_a_disk_that_is_full_for_a_while(tmp_path, place, small_disk):
    out = small_disk / "out"
    flags = (*RECIPE, "--data_path", place / "images", "--output_dir", out, "--save_steps", 1)
    said = Trial(tmp_path, *flags, sabotage=full_disk(small_disk, range(3, 5))).finish()
    assert "could not be saved" in said and "No space left" in said and "are tolerated" in said
    assert "Traceback" not in said
    assert not differences(out, place / "reference", logs=False)
    assert read_lines(out / "steps.jsonl") == read_lines(place / "reference" / "steps.jsonl")


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_with_the_last_checkpoint_whole(tmp_path, place, small_disk):
    out = small_disk / "out"
    flags = (*RECIPE, "--data_path", place / "images", "--output_dir", out, "--save_steps", 1, "--epochs", 4)
    Trial(tmp_path, *flags, "--output_dir", tmp_path / "whole").finish()
    said = Trial(tmp_path, *flags, sabotage=full_disk(small_disk, range(3, 99))).finish(1)
    assert "the checkpoint could not be saved" in said and "continue with --resume auto" in said
    assert "Traceback" not in said
    saved = state_of(out)["step"]
    assert saved in (1, 2)
    (small_disk / "ballast").unlink()
    said = Trial(tmp_path, *flags, "--resume", "auto").finish()
    assert f"optimizer step {saved} of the run" in said
    assert not differences(out, tmp_path / "whole", logs=False)
    assert read_lines(out / "steps.jsonl") == read_lines(tmp_path / "whole" / "steps.jsonl")
