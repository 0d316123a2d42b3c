"""One run per folder: of two starts one runs, a killed run leaves nothing to clean, other machines are waited for."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from running import make_images
from trials import TINY, Trial, at_step, steps_of, waiting_for

import main_finetune
from util.errors import UserError
from util.run import folder_lock
from util.run.folder_lock import FolderLock, Owner

RECIPE = (*TINY, "--epochs", "1")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one run") / "images"
    make_images(folder, 12)
    return folder


def start_pair(tmp_path: Path, *flags: object) -> tuple[Trial, Trial]:
    """Two starts at once, of which one has ended; then the other one goes on."""
    go = tmp_path / "go"
    go.unlink(missing_ok=True)
    pair = [Trial(tmp_path / "logs", *flags, sabotage=waiting_for(go)) for _ in range(2)]
    deadline = time.monotonic() + 60
    while not any([trial.poll() for trial in pair]):
        assert time.monotonic() < deadline, "both starts run"
        time.sleep(0.005)
    go.touch()
    refused, running = sorted(pair, key=Trial.poll, reverse=True)
    return running, refused


def test_of_two_starts_at_once_exactly_one_runs(images, tmp_path):
    """The other one says whose the folder is, in one line, and writes nothing."""
    for number in range(3):
        out = tmp_path / f"out{number}"
        running, refused = start_pair(tmp_path, *RECIPE, "--data_path", images, "--output_dir", out)
        said = refused.finish(2)
        running.finish()
        [line] = [line for line in said.splitlines() if "error" in line]
        assert f"{out} is in use by another run: process {running.processes[0]} on " in line
        assert "give another --output_dir" in line and "Traceback" not in said
        assert [record["step"] for record in steps_of(out)] == [1, 2, 3]
        assert not [name for name in os.listdir(out) if name.startswith(".")]


def test_of_twenty_pairs_one_of_each_gets_the_folder(tmp_path):
    """Processes that do nothing else, released by the same write, after a kill every second time."""
    for number in range(20):
        out = tmp_path / f"out{number % 10}"
        started, start = os.pipe()
        finished, finish = os.pipe()
        pair = []
        for _ in range(2):
            if not (process := os.fork()):
                code = 1
                try:
                    os.read(started, 1)
                    FolderLock(out)
                    os.read(finished, 1)
                    code = 0
                except UserError as error:
                    code = 2 if "is in use by another run" in str(error) else 3
                finally:
                    os._exit(code)  # as if killed: nothing is tidied up
            pair.append(process)
        os.write(start, b"12")
        first, status = os.waitpid(-1, 0)
        assert first in pair and os.waitstatus_to_exitcode(status) == 2
        os.write(finish, b"1")
        pair.remove(first)
        assert os.waitstatus_to_exitcode(os.waitpid(pair[0], 0)[1]) == 0
        assert json.loads((out / ".claim.json").read_text())["process"] == pair[0]


def test_two_runs_do_not_share_their_curves(images, tmp_path):
    """TensorBoard showed one run that went back and forth."""
    flags = (*RECIPE, "--data_path", images, "--log_dir", tmp_path / "curves", "--output_dir")
    go = tmp_path / "go"
    running = Trial(tmp_path, *flags, tmp_path / "one", sabotage=waiting_for(go))
    while not (tmp_path / "curves" / ".claim.json").exists():
        assert not running.poll(), running.output
        time.sleep(0.01)
    said = Trial(tmp_path, *flags, tmp_path / "two").finish(2)
    assert "curves is in use by another run: process" in said and "or give another --log_dir" in said
    go.touch()
    running.finish()
    said = Trial(tmp_path, *flags, tmp_path / "two").finish(2)
    assert f"{tmp_path}/curves holds the curves of another run: give another --log_dir" in said
    more = ("--resume", "auto", "--epochs", 2, "--resume_force")
    Trial(tmp_path, *flags, tmp_path / "one", *more).finish()
    assert not [name for name in os.listdir(tmp_path / "curves") if name.startswith(".")]


def test_resuming_twice_at_once_runs_once(images, tmp_path):
    flags = (*RECIPE, "--data_path", images, "--output_dir", tmp_path / "out")
    Trial(tmp_path, *flags).finish()
    running, refused = start_pair(tmp_path, *flags, "--epochs", 2, "--resume", "auto", "--resume_force")
    refused.finish(2)
    running.finish()
    assert [record["step"] for record in steps_of(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_makes_room_at_once(images, tmp_path, workers):
    """Although its data-loading processes notice its death only seconds later."""
    out, logs = tmp_path / "out", tmp_path / "logs"
    flags = (*RECIPE, "--data_path", images, "--output_dir", out, "--num_workers", workers)
    killed = Trial(logs, *flags, sabotage=at_step(2, lambda loss, pred: os.kill(os.getpid(), signal.SIGKILL)))
    killed.finish(-signal.SIGKILL)
    assert (out / ".claim.json").exists()
    said = Trial(logs, *flags, "--resume", "auto").finish()
    assert "waiting" not in said
    assert not [name for name in os.listdir(out) if name.startswith(".")]


@pytest.mark.parametrize("ended_by", ["an error", "a stop", "a fault"])
def test_however_a_run_ends_it_leaves_no_claim(images, tmp_path, ended_by):
    def end(loss, pred):
        if ended_by == "a stop":
            os.kill(os.getpid(), signal.SIGTERM)
        if ended_by == "a fault":
            raise KeyError("a programming fault")
        return loss * float("nan") if ended_by == "an error" else loss

    trial = Trial(tmp_path, *RECIPE, "--data_path", images, "--output_dir", tmp_path / "out", sabotage=at_step(2, end))
    trial.finish({"an error": 1, "a stop": 75, "a fault": 1}[ended_by])
    assert (tmp_path / "out" / "config.json").exists()
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]


# --- Other machines -------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Time runs faster."""
    monkeypatch.setattr(folder_lock, "RENEW_EVERY", 0.2)
    monkeypatch.setattr(folder_lock, "STALE_AFTER", 1.0)


def claim_of(folder: Path, silent: float = 0.0, **changes: object) -> Owner:
    """Write a claim of another machine."""
    folder.mkdir(exist_ok=True)
    owner = replace(Owner.this_process({}), host="elsewhere", kernel="another", token="theirs", **changes)
    (folder / ".claim.json").write_text(json.dumps(asdict(owner)))
    moment = time.time() - silent
    os.utime(folder / ".claim.json", (moment, moment))
    return owner


def test_a_claim_that_is_renewed_keeps_others_out(tmp_path, quick):
    claim_of(tmp_path, job="77")
    renewing = "import os, sys, time\nwhile True: os.utime(sys.argv[1]); time.sleep(0.1)"
    other = subprocess.Popen([sys.executable, "-c", renewing, tmp_path / ".claim.json"])
    try:
        with pytest.raises(
            UserError, match=r"in use by another run: process \d+ on elsewhere, started .* \(Slurm job 77\)"
        ):
            FolderLock(tmp_path)
    finally:
        other.kill()
        other.wait()
    assert json.loads((tmp_path / ".claim.json").read_text())["token"] == "theirs"


def test_a_silent_claim_is_waited_for_with_a_word_and_then_replaced(tmp_path, quick, caplog):
    claim_of(tmp_path)
    start = time.monotonic()
    lock = FolderLock(tmp_path)
    assert 0.5 < time.monotonic() - start < 10
    assert "elsewhere" in caplog.text and "waiting at most 1 s" in caplog.text
    assert json.loads((tmp_path / ".claim.json").read_text())["token"] == lock.own.token
    lock.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "claim, restart, waits",
    [
        (dict(silent=500), "", False),  # long dead
        (dict(job="77"), "1", False),  # requeued by Slurm after its node failed
        (dict(job="77", restart=1), "2", False),
        (dict(job="77", restart=1), "1", True),  # another step of the same job
        (dict(job="76"), "1", True),
    ],
)
def test_which_claims_of_other_machines_count(tmp_path, quick, monkeypatch, caplog, claim, restart, waits):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    claim_of(tmp_path, **claim)
    FolderLock(tmp_path).release()
    assert ("waiting" in caplog.text) == waits


@pytest.mark.parametrize("content", ["{", '{"process": "x"}'])
def test_a_claim_that_cannot_be_read_is_waited_for(tmp_path, quick, caplog, content):
    (tmp_path / ".claim.json").write_text(content)
    FolderLock(tmp_path).release()
    assert "waiting" in caplog.text


def test_without_locks_in_the_file_system_claims_decide(tmp_path, quick, monkeypatch):
    """And a process of this machine that is gone is not waited for."""

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folder_lock.fcntl, "flock", no_locks)
    monkeypatch.setattr(folder_lock, "STALE_AFTER", 60.0)
    lock = FolderLock(tmp_path)
    with pytest.raises(UserError, match=f"in use by another run: process {os.getpid()} on "):
        FolderLock(tmp_path)
    lock.release()
    with subprocess.Popen(["true"]) as ended:
        pass
    claim_of(tmp_path)
    dead = replace(lock.own, process=ended.pid)
    (tmp_path / ".claim.json").write_text(json.dumps(asdict(dead)))
    start = time.monotonic()
    FolderLock(tmp_path).release()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("links_work", [True, False])
def test_a_full_disk_leaves_no_claim_that_the_next_start_would_wait_for(tmp_path, monkeypatch, caplog, links_work):
    def no_links(*paths: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links_work:
        monkeypatch.setattr(os, "link", no_links)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as on a full disk, files can be made but not written
    try:
        with pytest.raises(UserError, match=r"--output_dir .* cannot be written to: File too large"):
            FolderLock(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    FolderLock(tmp_path).release()
    assert "waiting" not in caplog.text and os.listdir(tmp_path) == []


def test_a_claim_appears_with_its_content(tmp_path, monkeypatch):
    """Whatever ends the process between the steps of writing it."""
    link, seen = os.link, []

    def observed(source: Path, target: Path) -> None:
        seen.append((json.loads(Path(source).read_text())["process"], target.exists()))
        link(source, target)

    monkeypatch.setattr(os, "link", observed)
    FolderLock(tmp_path).release()
    assert seen == [(os.getpid(), False)]


@pytest.mark.parametrize(
    "number, message",
    [
        (errno.EAGAIN, "is in use by another run"),
        (errno.EACCES, "is in use by another run"),  # what some file systems answer instead
        (errno.EIO, "cannot be written to: Input/output error"),
        (errno.ESTALE, "cannot be written to: Stale file handle"),
    ],
)
def test_only_a_file_system_without_locks_is_taken_for_one(tmp_path, monkeypatch, number, message):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
    with pytest.raises(UserError, match=message):
        FolderLock(tmp_path)
    assert not (tmp_path / ".claim.json").exists()


def test_a_run_whose_claim_was_taken_over_ends(images, tmp_path, monkeypatch):
    """It was away for so long that another one has begun: at once, before it writes among the other's files."""
    monkeypatch.setattr(folder_lock, "RENEW_EVERY", 0.2)
    trial = Trial(
        tmp_path, *RECIPE, "--data_path", images, "--output_dir", tmp_path / "out",
        sabotage=at_step(2, lambda loss, pred: claim_of(tmp_path / "out") and time.sleep(60)),
    )  # fmt: skip
    said = trial.finish(1, seconds=30)
    assert "was taken over by process" in said and "elsewhere" in said
    assert json.loads((tmp_path / "out" / ".claim.json").read_text())["token"] == "theirs"


def test_only_a_claim_that_was_judged_is_removed(tmp_path):
    """Of two that find the same dead claim, the slower one must not remove what the faster one has written."""
    lock = FolderLock(tmp_path)
    lock._remove_claim(replace(lock.own, token="dead"))
    assert json.loads((tmp_path / ".claim.json").read_text())["token"] == lock.own.token
    lock.release()


def test_the_lock_of_a_run_that_just_ended_does_not_count(tmp_path, monkeypatch):
    """Its file has lost its name between our opening and locking it."""
    flock, removed = folder_lock.fcntl.flock, []

    def flock_after_removal(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        flock(descriptor, operation)

    monkeypatch.setattr(folder_lock.fcntl, "flock", flock_after_removal)
    lock = FolderLock(tmp_path)
    assert os.fstat(lock.descriptor).st_ino == os.stat(tmp_path / ".lock").st_ino
    lock.release()


def test_evaluation_needs_no_lock(tmp_path):
    """It writes nothing into the folder, so a run may be evaluated while it goes on."""
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        make_images(tmp_path / "data" / folder, 2)
    out = tmp_path / "out"
    flags = ("--model", "swin_quickstart", "--in_chans", 1, "--device", "cpu", "--num_workers", 0, "--epochs", 1)
    flags = (*flags, "--warmup_epochs", 1, "--batch_size", 2, "--aa", "", "--data_path", tmp_path / "data")
    Trial(tmp_path, *flags, "--output_dir", out, main=main_finetune).finish()
    lock = FolderLock(out)
    try:
        evaluation = ("--eval", "--resume", out / "checkpoint.pth", "--output_dir", out)
        assert "result: top-1" in Trial(tmp_path, *flags, *evaluation, main=main_finetune).finish()
    finally:
        lock.release()
