"""A run's folder of checkpoints: what is kept, what survives a crash, and what a resumed run takes."""

import errno
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import util.run.checkpoint_folder
from main_pretrain import PretrainConfig
from util.errors import UserError
from util.run.checkpoint_folder import TOLERATED_FAILURES, CheckpointFolder, SaveError, read_run_checkpoint
from util.run.config import compare_recipes
from util.run.folder_lock import FolderLock
from util.weights.file import CheckpointError, read_checkpoint, saved_at, temporary_path, write_checkpoint


def run_state(step: int, epoch: int = 0) -> dict:
    return {
        "model": {"weight": torch.full((100,), float(step))},
        "optimizer": {"state": {}},
        "epoch": epoch,
        "step": step,
        "args": {},
        "format": 1,
    }


def save_steps(folder: CheckpointFolder, *steps: int) -> None:
    for step in steps:
        folder.save(run_state(step))
    folder.wait()


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def damage(path: Path) -> None:
    """Flip one bit of a file in place, whatever its names."""
    with open(path, "r+b") as file:
        file.seek(700)
        byte = file.read(1)[0]
        file.seek(700)
        file.write(bytes([byte ^ 4]))


def step_of(found) -> int:
    return found[1]["step"]


def test_the_last_ones_the_milestones_the_best_and_the_newest_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path / "run" / "ckpt", keep=2)
    for epoch in range(6):
        folder.save(run_state(10 * epoch, epoch), milestone=epoch in (0, 3), best=epoch == 2)
    folder.wait()
    folder = tmp_path / "run" / "ckpt"
    assert names(folder) == [
        "checkpoint-00000040.pth",
        "checkpoint-00000050.pth",
        "checkpoint-best.pth",
        "checkpoint-epoch0001.pth",
        "checkpoint-epoch0004.pth",
        "checkpoint.pth",
    ]
    assert read_checkpoint(folder / "checkpoint.pth")["step"] == 50
    assert read_checkpoint(folder / "checkpoint-best.pth")["step"] == 20
    assert read_checkpoint(folder / "checkpoint-epoch0001.pth")["step"] == 0
    # One file, two names: it takes its space once.
    assert os.path.samefile(folder / "checkpoint.pth", folder / "checkpoint-00000050.pth")


def test_a_file_system_without_hard_links_gets_copies(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    save_steps(CheckpointFolder(tmp_path), 1, 2)
    assert read_checkpoint(tmp_path / "checkpoint.pth")["step"] == 2
    assert not os.path.samefile(tmp_path / "checkpoint.pth", tmp_path / "checkpoint-00000002.pth")
    assert names(tmp_path) == ["checkpoint-00000001.pth", "checkpoint-00000002.pth", "checkpoint.pth"]


def test_saving_returns_before_writing_and_what_is_written_is_the_moment_of_saving(tmp_path, monkeypatch):
    go_on = threading.Event()
    real_write = util.run.checkpoint_folder.write_checkpoint

    def slow_write(*args, **kwargs):
        assert go_on.wait(20)
        real_write(*args, **kwargs)

    monkeypatch.setattr(util.run.checkpoint_folder, "write_checkpoint", slow_write)
    state = run_state(1)
    folder = CheckpointFolder(tmp_path)
    folder.save(state)
    assert names(tmp_path) == []
    state["model"]["weight"].zero_()  # training goes on
    state["args"]["changed"] = True
    go_on.set()
    folder.wait()
    saved = read_checkpoint(tmp_path / "checkpoint.pth")
    assert saved["args"] == {} and torch.equal(saved["model"]["weight"], torch.ones(100))


def test_failing_saves_are_reported_tolerated_a_few_times_and_harm_nothing(tmp_path, monkeypatch, caplog):
    folder = CheckpointFolder(tmp_path)
    save_steps(folder, 1)

    def disk_full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(util.run.checkpoint_folder, "write_checkpoint", disk_full)
    save_steps(folder, *range(2, 2 + TOLERATED_FAILURES))
    assert caplog.text.count("could not be saved: [Errno 28] No space left") == TOLERATED_FAILURES
    folder.save(run_state(9))
    with pytest.raises(SaveError, match="No space left"):
        folder.wait()
    assert step_of(folder.newest_valid()) == 1

    monkeypatch.undo()
    save_steps(folder, 10)
    assert folder.failures == 0 and step_of(folder.newest_valid()) == 10
    # The last save of a run is not tolerated to fail: nothing would follow it.
    monkeypatch.setattr(util.run.checkpoint_folder, "write_checkpoint", disk_full)
    folder.save(run_state(11))
    with pytest.raises(SaveError, match="No space left"):
        folder.wait(final=True)


def test_what_is_best_and_milestones_are_written_once_that_is_possible_again(tmp_path, monkeypatch):
    """A later save, of something worse, does not take the place of what could not be written."""
    folder, real_write, full = CheckpointFolder(tmp_path), util.run.checkpoint_folder.write_checkpoint, True

    def write(*args, **kwargs):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_write(*args, **kwargs)

    monkeypatch.setattr(util.run.checkpoint_folder, "write_checkpoint", write)
    folder.save(run_state(10, epoch=0), best=True)
    folder.save(run_state(20, epoch=1), best=True, milestone=True)
    folder.save(run_state(30, epoch=2))
    folder.wait()
    assert names(tmp_path) == []
    full = False
    save_steps(folder, 40)
    lasting = ["checkpoint-best.pth", "checkpoint-epoch0002.pth"]
    assert names(tmp_path) == ["checkpoint-00000040.pth", *lasting, "checkpoint.pth"]
    for name in lasting:
        saved = read_checkpoint(tmp_path / name)
        assert saved["step"] == 20 and torch.equal(saved["model"]["weight"], torch.full((100,), 20.0))
    assert step_of(folder.newest_valid()) == 40
    save_steps(folder, 50)
    assert read_checkpoint(tmp_path / "checkpoint-best.pth")["step"] == 20


def test_an_unwritable_folder_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output_dir .*cannot be written to: Not a directory"):
        FolderLock(tmp_path / "file" / "ckpt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_an_error_before_training(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot be written to.*Permission denied"):
        FolderLock(tmp_path)
    tmp_path.chmod(0o700)


def test_what_is_not_plain_is_an_error_where_it_is_saved(tmp_path):
    with pytest.raises(CheckpointError, match=r"\['args'\]\['path'\]"):
        CheckpointFolder(tmp_path).save(run_state(1) | {"args": {"path": Path("a")}})


# -- Resuming --------------------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint_is_taken_and_skipped_ones_are_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = CheckpointFolder(tmp_path)
    assert folder.resume("auto") is None and "starting from scratch" in caplog.text
    assert folder.resume("") is None
    save_steps(folder, 1, 2, 3)
    path, checkpoint = folder.resume("auto")
    assert path.name == "checkpoint-00000003.pth" and checkpoint["step"] == 3
    damage(tmp_path / "checkpoint.pth")  # and with it checkpoint-00000003.pth: one file
    (tmp_path / "checkpoint-00000002.pth").write_bytes(b"")
    assert step_of(folder.resume("auto")) == 1
    assert "not resuming from checkpoint-00000003.pth" in caplog.text and "is damaged" in caplog.text
    assert "not resuming from checkpoint-00000002.pth" in caplog.text and "is empty" in caplog.text
    assert "after skipping 2 newer" in caplog.text


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(tmp_path):
    folder = CheckpointFolder(tmp_path)
    save_steps(folder, 1)
    damage(tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=r"has checkpoints, but none to resume from: .* is damaged"):
        folder.resume("auto")


def test_an_explicit_path_is_that_file_or_an_error(tmp_path):
    folder = CheckpointFolder(tmp_path / "run")
    save_steps(folder, 1, 2)
    earlier = tmp_path / "run" / "checkpoint-00000001.pth"
    assert step_of(folder.resume(str(earlier))) == 1
    damage(earlier)
    with pytest.raises(CheckpointError, match="is damaged"):
        folder.resume(str(earlier))
    with pytest.raises(CheckpointError, match="does not exist"):
        folder.resume(str(tmp_path / "absent.pth"))
    torch.save({"model": {"weight": torch.ones(1)}}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"no optimizer, epoch in it.*--finetune"):
        folder.resume(str(tmp_path / "weights.pth"))


def test_after_going_back_the_new_steps_count_as_newest_and_are_not_pruned(tmp_path):
    save_steps(CheckpointFolder(tmp_path), 10, 20, 30, 40)
    folder = CheckpointFolder(tmp_path)  # as a run that was given --resume .../checkpoint-00000020.pth
    save_steps(folder, 25)
    assert step_of(folder.newest_valid()) == 25
    save_steps(folder, 28, 29)
    assert [name for name in names(tmp_path) if "-" in name] == [
        f"checkpoint-000000{step}.pth" for step in (25, 28, 29)
    ]


def test_a_clock_set_back_does_not_hide_the_newest(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    save_steps(folder, 1, 2)
    monkeypatch.setattr(time, "time_ns", lambda: 5)
    save_steps(folder, 3, 4)
    monkeypatch.undo()
    assert step_of(folder.newest_valid()) == 4
    assert saved_at(tmp_path / "checkpoint.pth") > saved_at(tmp_path / "checkpoint-00000003.pth")


def test_leftovers_of_dead_runs_are_removed_and_nothing_else(tmp_path):
    here, elsewhere = temporary_path(tmp_path / "checkpoint-00000001.pth"), tmp_path / ".checkpoint.pth.a.node.7.tmp"
    other = tmp_path / ".checkpoint-notes.tmp"
    for path in (here, elsewhere, other):
        path.write_text("")
    export, folder = tmp_path / ".checkpoint-authors.pth.k3_9wz0a.tmp", tmp_path / ".checkpoint.pth.a.node.8.tmp"
    for path in (export, folder):  # util.export's, which may be at work; and one that nobody here has made
        path.mkdir()
    CheckpointFolder(tmp_path)
    assert names(tmp_path) == sorted([other.name, export.name, folder.name])


def test_leftovers_that_vanish_or_stay_end_no_run_with_a_traceback(tmp_path, monkeypatch):
    leftover = tmp_path / ".checkpoint.pth.a.node.7.tmp"
    leftover.write_text("")

    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", unlink)
        with pytest.raises(UserError, match=f"--output_dir {tmp_path} cannot be written to: Operation not permitted"):
            CheckpointFolder(tmp_path)
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: is_file(path) and not path.unlink())  # by somebody else
    CheckpointFolder(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "key, value",
    [("epoch", True), ("step", -1), ("step_in_epoch", 1.0), ("epoch_loss", "abc"), ("best", {"a": 1}),
     ("best_acc1", [70.0]), ("best", float("nan"))],
)  # fmt: skip
def test_a_position_that_is_none_is_refused_before_training(tmp_path, key, value):
    write_checkpoint(tmp_path / "run.pth", {"model": {}, "optimizer": {}, "epoch": 3, "best": None})
    assert read_run_checkpoint(tmp_path / "run.pth")["epoch"] == 3
    write_checkpoint(tmp_path / "run.pth", {"model": {}, "optimizer": {}, "epoch": 3, key: value})
    with pytest.raises(CheckpointError, match=f"run.pth holds no run to resume: its {key} is "):
        read_run_checkpoint(tmp_path / "run.pth")


KILLED_WHILE_SAVING = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from util.run.checkpoint_folder import CheckpointFolder

folder_name, kills = sys.argv[1], int(sys.argv[2])
rng = random.Random(0)
cut_short, reached = 0, 0
for number in range(kills):
    child = os.fork()
    if child == 0:
        folder = CheckpointFolder(folder_name)
        found = folder.newest_valid()
        step = found[1]["step"] if found else 0
        while True:
            step += 1
            model = {"weight": torch.full((200_000,), float(step))}
            state = {"model": model, "optimizer": {}, "epoch": step, "step": step}
            folder.save(state, milestone=step % 50 == 0, best=step % 7 == 0)
    time.sleep(0.05 + rng.random() * 0.1)
    while number % 2 and not any(name.endswith(".tmp") for name in os.listdir(folder_name)):
        pass  # every other kill: not before a file is being written, however slow the machine
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    cut_short += any(name.endswith(".tmp") for name in os.listdir(folder_name))
    found = CheckpointFolder(folder_name).newest_valid()
    step = found[1]["step"] if found else 0
    assert step >= reached, (step, reached)
    reached = step
    if found:
        assert (found[1]["model"]["weight"] == step).all()
    assert not any(name.endswith(".tmp") for name in os.listdir(folder_name))
print(cut_short, reached)
"""


def test_killed_at_any_moment_nothing_is_lost(tmp_path):
    """kill -9 of a process that does nothing but save: the newest whole file is always found, and never goes back."""
    kills = 25
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), str(kills)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    cut_short, reached = map(int, done.stdout.split())
    assert cut_short >= kills // 5  # caught with a file half written
    assert reached >= 10


# -- Recipes ---------------------------------------------------------------------------------------------------


def compare(saved: dict, now: dict) -> tuple[list[str], list[str]]:
    return compare_recipes(saved, now, PretrainConfig)


def test_recipes_are_compared():
    saved = dict(model="mixmae_base", mask_ratio=0.5, input_size=(224, 224), batch_size=64, num_workers=8, seed=0)
    assert compare(saved, dict(saved, num_workers=2, output_dir="/b", input_size=[224, 224])) == ([], [])
    errors, warnings = compare(saved, dict(saved, model="mixmae_large", mask_ratio=0.75))
    assert errors == ["mask_ratio: 0.5 -> 0.75", "model: mixmae_base -> mixmae_large"] and warnings == []
    errors, warnings = compare(saved, dict(saved, batch_size=32))
    assert errors == [] and len(warnings) == 1 and warnings[0].startswith("batch_size: 64 -> 32 (")


def test_the_way_of_launching_is_no_part_of_the_recipe():
    assert compare(dict(dist_on_itp=True, local_rank=1), dict(dist_on_itp=False, local_rank=-1)) == ([], [])


def test_a_learning_rate_that_follows_the_batch_size_is_no_error():
    saved = dict(blr=1e-3, lr=4e-3, world_size=4, batch_size=256, accum_iter=1)
    errors, warnings = compare(saved, dict(saved, lr=2e-3, world_size=2))
    assert errors == [] and any(warning.startswith("lr: 0.004 -> 0.002") for warning in warnings)
    errors, _ = compare(saved, dict(saved, lr=2e-3))  # given by hand
    assert errors == ["lr: 0.004 -> 0.002"]


def test_settings_of_another_version_are_named():
    errors, warnings = compare(dict(model="a", old_flag=1), dict(model="a", new_flag=2))
    assert errors == [] and len(warnings) == 1 and "new_flag, old_flag" in warnings[0]
