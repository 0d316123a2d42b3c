"""How far work has come: a bar where a terminal shows it, lines elsewhere, and lines that no bar breaks."""

import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from running import make_images, run
from trials import TINY

import main_finetune
import main_pretrain
from util.run import distributed, progress
from util.run.logger import setup_logging
from util.run.metrics import StepMeter
from util.run.progress import Bar, with_progress
from util.run.session import Run
from util.run.state import Progress

BAR = re.compile(r"\d+%\|.*\|")


def on_a_terminal(action: Callable[[], None]) -> list[str]:
    """The lines on the screen of a terminal in which `action` was done: what was overwritten is gone."""
    sys.stdout.flush()
    child, terminal = pty.fork()
    if not child:
        code = 1
        try:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 500, 250, 0, 0))
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            torch.set_num_threads(1)
            action()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    written = b""
    while True:
        try:
            written += os.read(terminal, 1 << 16)
        except OSError:  # the other side is closed
            break
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, written.decode()
    return screen(written.decode())


def screen(text: str) -> list[str]:
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\r|\n|\x1b\[[AK]|[^\r\n\x1b]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[A":
            row -= 1
        elif part == "\x1b[K":
            lines[row] = lines[row][:column]
        else:
            line = lines[row].ljust(column)
            lines[row], column = line[:column] + part + line[column + len(part) :], column + len(part)
    return [line.rstrip() for line in lines if line.strip()]


def test_a_terminal_shows_a_bar_and_whole_lines(tmp_path):
    """Of evaluations too; the bar of training takes the place of the lines about steps."""
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        make_images(tmp_path / "data" / folder, 12)
    out = ("--data_path", tmp_path / "data", "--output_dir")
    flags = (*TINY, "--epochs", 3, "--knn_every", 1, "--rank_every", 1, *out, tmp_path / "out")
    said = on_a_terminal(lambda: run(main_pretrain, *flags))
    bars = [line for line in said if BAR.search(line)]
    assert len(bars) == 1, "\n".join(said)  # those of measures are gone when these are done
    assert re.match(r"epoch 2: 100%\|.*\| 18/18 \[.*, loss \d\.\d{4}, \d+ images/s\]$", bars[0])
    assert not any(re.search(r"epoch \d+  step", line) for line in said)
    assert sum(bool(re.match(r"\[\d\d:\d\d:\d\d\] epoch \d done: step \d+, train_loss", line)) for line in said) == 3
    assert said.index(bars[0]) < next(i for i, line in enumerate(said) if "pretraining is done" in line)

    classifier = ("--model", "swin_quickstart", "--in_chans", 1, "--device", "cpu", "--num_workers", 0, "--epochs", 2)
    classifier = (*classifier, "--batch_size", 4, "--aa", "")
    said = on_a_terminal(lambda: run(main_finetune, *classifier, *out, tmp_path / "tuned"))
    assert sum(bool(BAR.search(line)) for line in said) == 1 and any("result: top-1" in line for line in said)


def test_a_forked_process_draws_no_bar():
    """A data-loading process has the bar as it was at the fork, and drew that below each of its lines."""

    def log_from_a_fork() -> None:
        setup_logging()
        bar = Bar(total=10, desc="training")
        if not (worker := os.fork()):
            Bar.get_lock = None  # nor does it wait for others who draw
            logging.info("a bad image")
            os._exit(0)
        os.waitpid(worker, 0)
        bar.update(5)
        bar.close()

    lines = on_a_terminal(log_from_a_fork)
    assert len(lines) == 2 and lines[0].endswith("] a bad image") and BAR.search(lines[1])


def test_the_bar_starts_where_the_run_does():
    """To the step, which the fraction of an epoch, in floating point, does not tell."""
    loader = SimpleNamespace(batch_sampler=SimpleNamespace(steps_per_epoch=49))
    for step in range(1, 49):
        state = SimpleNamespace(progress=Progress(epoch=1, step_in_epoch=step))
        run = Run(SimpleNamespace(epochs=2), None, None, state, loader, *[None] * 5)
        assert (run.bar.n, run.bar.total) == (49 + step, 98)


@pytest.mark.parametrize("shown", ["stderr", "both", "neither"])
def test_lines_are_told_where_no_bar_is_seen(monkeypatch, caplog, shown):
    """By time: one each ten seconds, but none at the end."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: shown != "neither", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: shown == "both", raising=False)

    def batches():
        for _ in range(10):
            now[0] += 4.0
            yield torch.zeros(8, 1), torch.zeros(8)

    with caplog.at_level(logging.INFO):
        assert len(list(with_progress(batches(), 75, "evaluation"))) == 10
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (0 if shown == "both" else 3)
    assert all(re.fullmatch(r"evaluation: \d+ of 75 images, 2 images/s, \d+ s left", line) for line in said)


def test_other_ranks_are_silent(monkeypatch, capfd, caplog):
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(with_progress([1, 2], 2, "evaluation")) == [1, 2]
    bar = progress.TrainingBar(0, 10)
    bar.update()
    scalars = dict.fromkeys(
        "loss lr grad_norm images_per_second data_wait_share memory_mb seconds_per_step".split(), 1.0
    )
    bar.tell(StepMeter(0, 1, 10, 8, torch.device("cpu"), deque()), 1, scalars)
    bar.close()
    assert capfd.readouterr() == ("", "") and not caplog.records
