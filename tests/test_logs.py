"""log.txt, steps.jsonl and TensorBoard show each epoch and step once, whatever happened to the run or its disk."""

import itertools
import json
import logging
import math
import resource
import signal
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from running import make_images, read_lines
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter
from trials import TINY, Trial, differences, epochs_of, events_of, state_of, steps_of

from util.run import metrics
from util.run.logger import EventsFile, LinesFile, RunLog
from util.run.metrics import FEW_STEPS, SPIKE_HISTORY, StepMeter, peak_of_card

RECIPE = (*TINY, "--epochs", "3", "--vis_every", "1", "--save_every", "99")
STEPS = 18  # 3 epochs of 6


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `images` and with `reference`, the output of the uninterrupted run."""
    place = tmp_path_factory.mktemp("logs")
    make_images(place / "images", 24)
    Trial(place, *RECIPE, "--data_path", place / "images", "--output_dir", place / "reference").finish()
    return place


def kill_after(trial: Trial, out: Path, steps: int) -> None:
    """kill -9 once the run has logged so many steps."""
    deadline = time.monotonic() + 60
    while not (out / "steps.jsonl").exists() or (out / "steps.jsonl").read_text().count("\n") < steps:
        assert time.monotonic() < deadline and not trial.poll(), trial.output
        time.sleep(0.001)
    trial.kill()
    assert trial.wait() == [-signal.SIGKILL]


@pytest.mark.parametrize("save_steps", [4, pytest.param(99, marks=pytest.mark.slow)])
def test_after_a_kill_each_epoch_and_step_stands_there_once(place, tmp_path, save_steps):
    """Also where it came before the first checkpoint, so that the run began anew."""
    out = tmp_path / "out"
    flags = (*RECIPE, "--data_path", place / "images", "--output_dir", out, "--save_steps", save_steps)
    for steps in (7, 15):
        kill_after(Trial(tmp_path, *flags, "--resume", "auto"), out, steps)
    assert "starting from scratch" in Trial(tmp_path, *flags, "--resume", "auto").finish() or save_steps == 4
    assert differences(out, place / "reference") == []
    assert [line["step"] for line in steps_of(out)] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in epochs_of(out)] == [0, 1, 2]
    assert [x for x, _ in events_of(out)] == [1000 * step // 6 for step in range(1, STEPS + 1)]
    assert len(list((out / "reconstructions").iterdir())) == 4  # before training, and after each epoch


def test_a_checkpoint_is_never_ahead_of_the_logs(place, tmp_path):
    """Nothing before the point of resuming is missing, however rarely lines are due."""
    out = tmp_path / "out"
    flags = (*RECIPE, "--data_path", place / "images", "--output_dir", out)
    trial = Trial(tmp_path, *flags, "--save_steps", 5, "--print_freq", 99)
    kill_after(trial, out, 11)  # the lines of steps 11 and 12 come with the end of the epoch
    saved = state_of(out)["step"]
    assert saved in (5, 10)
    assert steps_of(out)[:saved] == steps_of(place / "reference")[:saved]
    assert any(x == 1000 * saved // 6 for x, _ in events_of(out))


# --- The pieces ---------------------------------------------------------------------------------------------


def test_lines_after_the_point_of_resuming_and_broken_ones_are_dropped(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n')
    steps = [json.dumps({"step": step}) for step in range(1, 6)]
    (tmp_path / "steps.jsonl").write_text("\n".join([*steps[:2], '"no record"', "\0\0\0", "", *steps[2:4], '{"ste']))
    log = RunLog(tmp_path, tmp_path, resume_step=3, resume_epoch=1, resume_x=1500)
    log.steps([{"step": 4, "loss": 1.0}], 2000, SCALARS)
    log.epoch({"epoch": 1, "step": 4}, 2000)
    log.close()
    assert read_lines(tmp_path / "steps.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "loss": 1.0}]
    assert read_lines(tmp_path / "log.txt") == [{"epoch": 0}, {"epoch": 1, "step": 4}]


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    LinesFile(tmp_path / "steps.jsonl", wanted=lambda record: True).append([{"step": 1, "grad_norm": math.inf}])
    assert (tmp_path / "steps.jsonl").read_text() == '{"step": 1, "grad_norm": null}\n'


SCALARS = dict(loss=1.0, lr=0.1, grad_norm=1.0, images_per_second=1.0, data_wait_share=0.0, memory_mb=1.0)
SCALARS["seconds_per_step"] = 10.0


def test_the_time_left_follows_from_the_epochs_left():
    """Also after a resume with another batch size, whose steps do not add up with those before."""
    meter = StepMeter(8, 10, 5, 4, torch.device("cpu"), deque())
    assert meter.line(2, SCALARS).endswith("ETA 0:01:20")


def test_slow_steps_are_shown_before_a_line_is_due(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = StepMeter(0, 1, 40, 8, torch.device("cpu"), deque(maxlen=SPIKE_HISTORY))
    assert not meter.meanwhile()
    lines = []
    for step in range(1, 7):
        now[0] += 4
        meter.add(step, 0.1, torch.tensor(float(step)), torch.tensor(1.0))
        lines.append((scalars := meter.meanwhile()) and meter.line(step, scalars))
    assert [bool(line) for line in lines] == [False, False, True, False, False, True]  # 12 s after the one before
    assert "step 3/40  loss 2.0000" in lines[2] and "2 images/s" in lines[2]
    records, _ = meter.flush()
    assert [record["loss"] for record in records] == [1, 2, 3, 4, 5, 6]  # nothing is lost by it


def waiting_meter(monkeypatch, now: list[float]) -> tuple[StepMeter, Iterator]:
    """A meter, and batches that take a minute (the first one) or three seconds."""
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def batches():
        for number in itertools.count():
            now[0] += 3.0 if number else 60.0
            yield number

    return StepMeter(0, 1, 400, 8, torch.device("cpu"), deque(maxlen=SPIKE_HISTORY)), batches()


@pytest.mark.parametrize("compute, warned", [(1.0, 1), (11.0, 1), (13.0, 0)])
def test_waiting_for_data_is_said_once_an_epoch(compute, warned, monkeypatch, caplog):
    """Above a share of a fifth; the first batch, for which the data-loading processes start, does not count."""
    now = [0.0]
    meter, batches = waiting_meter(monkeypatch, now)
    for report in range(4):
        for step in range(20):
            meter.next_batch(batches)
            now[0] += compute
            meter.add(20 * report + step, 0.1, torch.tensor(1.0), torch.tensor(1.0))
        meter.flush()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warned
    assert all("data wait " in line and "--num_workers" in line and "util.check_data" in line for line in said)


def test_waiting_in_a_few_steps_is_chance(monkeypatch, caplog):
    now = [0.0]
    meter, batches = waiting_meter(monkeypatch, now)
    for _ in range(FEW_STEPS - 1):
        meter.next_batch(batches)
        meter.add(1, 0.1, torch.tensor(1.0), torch.tensor(1.0))
    meter.flush()
    assert not caplog.records


def test_tensorboard_forgets_what_is_done_again_and_keeps_the_rest(tmp_path, monkeypatch):
    # Files of one second are read in the order of their names, which end in a count of this process: 10 before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    first = EventsFile(tmp_path, purge=0)
    for x in (500, 1000, 1500, 2000):
        first.scalars({"train/loss": 1.0}, x)
    del first  # killed: every value is on the disk without closing the file
    second = EventsFile(tmp_path, purge=1001)
    second.scalars({"train/loss": 2.0}, 1500)
    assert events_of(tmp_path) == [(500, 1.0), (1000, 1.0), (1500, 2.0)]
    third = EventsFile(tmp_path, purge=0)
    third.scalars({"train/loss": 3.0}, 500)
    third.close()
    assert events_of(tmp_path) == [(500, 3.0)]


def test_lines_that_a_full_disk_refuses_are_written_later_and_once(tmp_path, caplog):
    """A real failing write, in the middle of a line: the kernel refuses bytes beyond a limit on the file size."""
    file = LinesFile(tmp_path / "steps.jsonl", lambda record: True)
    file.append([{"step": 1}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        file.append([{"step": 2}])
        file.append([{"step": 3}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert (tmp_path / "steps.jsonl").stat().st_size == 20
    assert "steps.jsonl could not be written" in caplog.text and "Training goes on" in caplog.text
    file.append([{"step": 4}])
    assert read_lines(tmp_path / "steps.jsonl") == [{"step": step} for step in (1, 2, 3, 4)]


def test_a_run_goes_on_without_tensorboard_and_with_it_again(tmp_path, caplog, monkeypatch):
    events = EventsFile(tmp_path, purge=0)
    events.scalars({"train/loss": 1.0}, 1)

    def disk_full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "flush", disk_full)
    events.scalars({"train/loss": 2.0}, 2)
    assert "TensorBoard's file in" in caplog.text and "No space left on device. Training goes on" in caplog.text
    monkeypatch.undo()
    events.scalars({"train/loss": 3.0}, 3)
    events.close()
    assert [x for x, _ in events_of(tmp_path)][-1] == 3


def test_a_loss_spike_is_a_warning_also_across_epochs(caplog):
    usual: deque[float] = deque(maxlen=SPIKE_HISTORY)
    torch.manual_seed(0)

    def epoch(number: int, losses: torch.Tensor) -> None:
        meter = StepMeter(number, 10, len(losses), 4, torch.device("cpu"), usual)
        for step, loss in enumerate(losses, start=number * len(losses)):
            meter.add(step, 1e-3, loss, torch.tensor(1.0))
        meter.flush()

    with caplog.at_level(logging.WARNING):
        for number in range(3):
            epoch(number, 1 + 0.01 * torch.randn(40))
        assert caplog.text == ""
        epoch(3, torch.tensor([1.0, 1.01, 1.5, 1.0]))
    assert caplog.text.count("loss spike") == 1
    assert "loss spike: 1.5000 at step 14, the last 100 steps had 1.00" in caplog.text


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA RTX A1000", 0), ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 0),
        ("NVIDIA GB200", 0), ("NVIDIA B200", 2250), ("Tesla T4", 0),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_card_or_unknown(name, tflops):
    assert peak_of_card(name) == tflops * 1e12


def test_the_utilisation_of_a_known_card_is_in_the_line(monkeypatch):
    monkeypatch.setattr(metrics, "peak_operations", lambda device: 1e12)
    meter = StepMeter(0, 1, 40, 8, torch.device("cpu"), deque(), operations=1e9)
    meter.add(1, 0.1, torch.tensor(1.0), torch.tensor(1.0))
    _, scalars = meter.flush()
    assert scalars["mfu"] == pytest.approx(scalars["images_per_second"] * 1e9 / 1e12)
    assert f"MFU {scalars['mfu']:.1%}" in meter.line(1, scalars)
