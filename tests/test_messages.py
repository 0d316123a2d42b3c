"""What goes wrong for users is said in one line that helps them: each of these was a traceback, or beside the point."""

import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from photos import data_args
from running import fails, make_images
from torch.utils.data import DataLoader, Dataset
from trials import TINY, Trial, at_step, full_disk, mounted

import main_finetune
import main_pretrain
from util import knn
from util.data.open_source import open_source
from util.errors import RunError, UserError
from util.run.failures import explained
from util.weights.file import CheckpointError, read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
RECIPE = (*TINY, "--epochs", "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `images`, labelled ones in `data`, and `pretrained`, a run."""
    place = tmp_path_factory.mktemp("messages")
    make_images(place / "images", 12)
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        make_images(place / "data" / folder, 2)
    Trial(place, *RECIPE, "--data_path", place / "images", "--output_dir", place / "pretrained").finish()
    return place


# --- Data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images.zip", "images.tar.gz", "images.tgz", "IMAGES.ZIP"])
def test_a_compressed_archive_is_not_read_as_a_list(place, tmp_path, name):
    if name.lower().endswith("zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.write(place / "images" / "0000.png")
    else:
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            archive.add(place / "images")
    with pytest.raises(UserError, match=r"is a compressed archive: unpack it .* or make an uncompressed \.tar"):
        open_source(data_args(tmp_path / name), "train", False)


def test_an_image_as_data_path_is_told_what_to_give(place, tmp_path):
    with pytest.raises(UserError, match=r"0000\.png is one image: give the folder that holds the images \(.*/images\)"):
        open_source(data_args(place / "images" / "0000.png"), "train", False)
    (tmp_path / "something").write_bytes(bytes(99))
    with pytest.raises(UserError, match=r"something is neither a folder of images, nor a text file"):
        open_source(data_args(tmp_path / "something"), "train", False)


@pytest.mark.parametrize("name", ["bogus", "imagenet", "bogus/cifar10"])
def test_a_data_set_that_timm_does_not_know_is_not_read_as_a_folder(place, name):
    with pytest.raises(UserError, match=rf"--dataset {name} is not known: give one of timm's, torch/NAME, hfds/NAME"):
        open_source(data_args(place / "images", dataset=name), "train", False)


def test_knn_without_data_says_what_it_needs(place, capfd):
    message = "--data_path is missing: give a folder with train/ and val/ in it, both with one folder of images per"
    fails(knn, capfd, message, "--checkpoint", place / "pretrained" / "checkpoint.pth", "--device", "cpu")


def test_an_image_of_one_cell_is_told_to_be_larger(place, tmp_path, capfd):
    message = "an image of 8x8 is one cell of 8x8 pixels.* use a larger input size or smaller patches"
    flags = (*RECIPE, "--data_path", place / "images", "--input_size", 8, "--output_dir", tmp_path)
    fails(main_pretrain, capfd, message, *flags)


def test_names_that_the_locale_has_no_letters_for(tmp_path):
    """Python makes bytes of them that are no text; images may have any name, TensorBoard's folder may not."""
    make_images(tmp_path / "bïlder", 4)
    (tmp_path / "bïlder" / "0000.png").rename(tmp_path / "bïlder" / "ü.png")
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "main_pretrain.py", *RECIPE, "--epochs", "1", "--data_path", str(tmp_path / "bïlder")]
    process = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "öut")], env=ascii_only, cwd=ROOT, capture_output=True
    )
    said = (process.stdout + process.stderr).decode(errors="replace")
    assert process.returncode == 2 and "Traceback" not in said, said
    assert "train: 4 images" in said
    assert "whose name is not UTF-8 here: give another --log_dir, or set PYTHONUTF8=1" in said


# --- Weights and runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["101", "epoch 3\nloss 0.5\n", "model:\n  näme: x\n"])
def test_a_text_file_is_no_checkpoint(tmp_path, text):
    (tmp_path / "notes.pth").write_text(text, encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"notes\.pth is damaged or not a checkpoint: it is a text file; name a \.pth"
    ):
        read_checkpoint(tmp_path / "notes.pth")


@pytest.mark.parametrize("how", ["auto", "a path"])
def test_fine_tuning_does_not_resume_a_pretraining_run_but_says_how_to_start_from_it(place, tmp_path, capfd, how):
    checkpoint = place / "pretrained" / "checkpoint.pth"
    out, resume = (place / "pretrained", "auto") if how == "auto" else (tmp_path, checkpoint)
    message = rf"/pretrained holds a run of main_pretrain\.py, .* give another .*, and --finetune {checkpoint} to"
    flags = ("--data_path", place / "data", "--device", "cpu", "--in_chans", 1, "--output_dir", out)
    fails(main_finetune, capfd, message, *flags, "--resume", resume)


def test_pretraining_does_not_resume_a_fine_tuning_run(place, tmp_path, capfd):
    flags = ("--model", "swin_quickstart", "--in_chans", 1, "--device", "cpu", "--num_workers", 0, "--epochs", 1)
    flags = (*flags, "--warmup_epochs", 1, "--batch_size", 2, "--aa", "", "--data_path", place / "data")
    Trial(tmp_path, *flags, "--output_dir", tmp_path / "out", main=main_finetune).finish()
    message = r"/out holds a run of main_finetune\.py, which that program continues; give another --output_dir$"
    flags = (*RECIPE, "--data_path", place / "images", "--output_dir", tmp_path / "out")
    fails(main_pretrain, capfd, message, *flags, "--resume", "auto")


def test_a_disk_that_is_full_before_the_first_checkpoint_leaves_none(place, tmp_path):
    (tmp_path / "disk").mkdir()
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=40m", "tmpfs") as allowed:
        if not allowed:
            pytest.skip("cannot mount a tmpfs here")
        flags = (*RECIPE, "--data_path", place / "images", "--output_dir", tmp_path / "disk" / "out")
        said = Trial(tmp_path, *flags, sabotage=full_disk(tmp_path / "disk", range(1, 99))).finish(1)
    assert "No checkpoint has been saved yet" in said and "intact" not in said and "Traceback" not in said


@pytest.mark.parametrize(
    "given, meant",
    [
        ("--epoch", "--epochs"),
        ("--batchsize=4", "--batch_size"),
        ("--norm-pix-loss", "--norm_pix_loss"),
        ("--zzz", ""),
        ("--output", "--output_dir"),
        ("--data", "--data_path"),
    ],
)
def test_unknown_flags_are_told_what_they_may_mean(given, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        main_pretrain.get_args_parser().parse_args(["--data_path", "x", given, "3"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and f"unrecognized arguments: {given}" in said
    assert said.strip().endswith(f"did you mean {meant}?") if meant else "did you mean" not in said


# --- Data-loading processes ---------------------------------------------------------------------------------------


def kill_a_worker(loss: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
    """What the kernel does when memory runs out."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    time.sleep(1)
    return loss


def test_a_killed_data_loading_process_is_explained(place, tmp_path):
    flags = (*RECIPE, "--data_path", place / "images", "--num_workers", 2, "--output_dir", tmp_path / "out")
    said = Trial(tmp_path, *flags, sabotage=at_step(2, kill_a_worker)).finish(1)
    [line] = [line for line in said.splitlines() if "a data-loading process" in line]
    assert "is killed by signal: Killed. Out of memory, most likely" in line and "--num_workers" in line
    assert "Traceback" not in said and "--resume auto" in line


class NoRoom(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")


class Fault(NoRoom):
    def __getitem__(self, index: int) -> torch.Tensor:
        raise RuntimeError("a fault of the program")


def test_full_shared_memory_is_explained_and_a_fault_stays_one():
    with pytest.raises(RunError, match=r"/dev/shm, which has [\d.]+ GiB here: enlarge it .*--shm-size.*--num_workers"):
        with explained():
            list(DataLoader(NoRoom(), num_workers=1))
    with pytest.raises(RuntimeError, match="a fault of the program") as raised, explained():
        list(DataLoader(Fault(), num_workers=1))
    assert not isinstance(raised.value, RunError)
    with pytest.raises(RunError, match="shm"), explained():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")
