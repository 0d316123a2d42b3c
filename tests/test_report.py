"""`python -m util.report`: one page that needs nothing else, and says what is true of the runs."""

import json
import re
import shutil
import subprocess
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import data_args
from running import fails, make_images, run
from trials import TINY, Trial

import util.report
from util.data.datasets import build_dataset
from util.report import RULES, past_its_best
from util.run.history import RunHistory, in_words, read_history, summarise
from util.run.logger import RunLog
from util.run.metrics import SPIKE_HISTORY, StepMeter

RECIPE = (*TINY, "--epochs", "3", "--vis_every", "1", "--save_steps", "2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """A run that was killed and resumed, and one with another learning rate and seed."""
    place = tmp_path_factory.mktemp("report")
    make_images(place / "images", 24)
    flags = (*RECIPE, "--data_path", place / "images", "--output_dir")
    trial = Trial(place, *flags, place / "killed")
    while not list((place / "killed").glob("checkpoint-*.pth")):
        assert not trial.poll(), trial.output
    trial.kill()
    trial.wait()
    Trial(place, *flags, place / "killed", "--resume", "auto").finish()
    Trial(place, *flags, place / "other", "--lr", "2e-3", "--seed", "7").finish()
    return place / "killed", place / "other"


@pytest.fixture(scope="module")
def page(runs) -> Path:
    out = runs[0].parent / "pages" / "report.html"
    run(util.report, *runs, "--out", out)
    return out


def test_a_killed_and_resumed_run_is_one_curve(runs):
    data = read_history(runs[0])
    epochs, losses = data.per_step("loss")
    assert len(losses) == 18 and np.allclose(epochs, np.arange(1, 19) / 6)
    [resumed] = data.resumed_at
    assert 0 < resumed < 3 and read_history(runs[1]).resumed_at == []
    x, speed = data.per_second("images")
    assert len(x) >= 18 and sorted(x) == list(x) and min(speed) > 0  # what was done twice counts once
    spent = data.time_spent
    assert 0 < spent.steps < spent.total and spent.starting > 0 and 0 < spent.goodput < 1


def test_the_page_needs_nothing_else_and_names_what_differs(page):
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)|@import|url\((?!#)', text)
    differ = text.partition("Where the runs differ")[2].partition("</table>")[0]
    assert set(re.findall(r"<td>(\w+)</td><td>[^<]*</td><td>", differ)) == {"lr", "seed"}
    assert text.count("<img") == text.count("data:image/jpeg") == 8  # the start, and three epochs, of each
    assert text.count("<svg") == 5 and len(text) < 2e6
    for run_name in ("killed", "other"):
        assert re.search(rf"<b>{run_name}</b>: goodput \d+%: .* in steps", text)


def test_the_page_opens_in_a_browser(page):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
    )
    assert "mixmae: how it went" in done.stdout and done.stdout.count("<svg") == 5 and "</html>" in done.stdout


def made_up(
    losses: list[float],
    epochs: int = 50,
    accuracies: list[float] = (),
    wait: float = 0.0,
    ranks: list[float] = (),
) -> RunHistory:
    per_epoch = len(losses) // epochs
    steps = [{"step": i + 1, "epoch": i // per_epoch, "loss": loss, "lr": 0.1} for i, loss in enumerate(losses)]
    lines = [
        {"epoch": i, "train_loss": float(np.mean(losses[i * per_epoch : (i + 1) * per_epoch]))} for i in range(epochs)
    ]
    for line, accuracy in zip(lines, accuracies):
        line["test_acc1"] = accuracy
    for line, rank in zip(lines, ranks):
        line["rankme"] = rank
    count = len(losses)
    times = [clock(0.0, 0, start=True), clock(count + 1.0, count, steps=count, data_wait=count * wait)]
    return RunHistory("made up", Path("."), {"epochs": 50}, {}, lines, steps, times)


def clock(time: float, step: int, steps: int = 0, **others: object) -> dict:
    """A record of times.jsonl, of an epoch of ten steps of a second."""
    speed = {"steps": steps, "seconds": float(steps), "images": 8 * steps, "data_wait": 0.0} if steps else {}
    return {"time": time, "epoch": step / 10, "step": step, **speed, **others}


FALLING = [1 / (1 + i / 50) for i in range(500)]


def test_a_curve_goes_forward_in_an_epoch_that_is_not_complete():
    data = made_up(FALLING[:23], epochs=2)  # 11 steps an epoch
    data.steps = [{**step, "epoch": i // 10} for i, step in enumerate(data.steps)]  # 10, 10, and 3 of the third
    epochs, losses = data.per_step("loss")
    assert np.allclose(epochs, np.arange(1, 24) / 10) and losses.tolist() == FALLING[:23]
    data.steps[4]["loss"] = None  # not finite
    epochs, losses = data.per_step("loss")
    assert len(epochs) == len(losses) == 22 and 0.5 not in epochs.round(6)


def test_time_is_divided_among_what_it_was_spent_on():
    """Of a run that is killed in its 26th step with 20 saved, and goes on a minute later."""
    data = made_up(FALLING[:40], epochs=4)
    data.times = [
        clock(1000, 0, start=True), clock(1015, 10, steps=10), clock(1018, 10), clock(1028, 20, steps=10),
        clock(1033, 25, steps=5), clock(1093, 20, start=True), clock(1105, 30, steps=10), clock(1115, 40, steps=10),
    ]  # fmt: skip
    spent = data.time_spent
    assert (spent.total, spent.steps, spent.again, spent.starting, spent.stopped) == (115, 40, 5, 5 + 2, 60)
    assert str(spent) == (
        "goodput 35%: 40 s of 1 min 55 s in steps "
        "(3.0 s evaluation, pictures and saving, 7.0 s starting, 5.0 s steps done again, 1 min stopped)"
    )
    x, speed = data.per_second("images")
    assert x.tolist() == [1, 2, 3, 4] and speed.tolist() == [8] * 4 and data.resumed_at == [2]
    anew = replace(data, times=[*data.times[:5], clock(1093, 0, start=True), *data.times[6:]])  # nothing was saved
    assert anew.time_spent.again == 25


def test_a_clock_that_is_set_back_gives_no_nonsense():
    data = made_up(FALLING[:40], epochs=4)
    data.times = [clock(1000, 0, start=True), clock(400, 20, steps=20), clock(300, 20, start=True), clock(310, 40, 20)]
    assert 0 < data.time_spent.goodput <= 1 and data.time_spent.stopped == 0


@pytest.mark.parametrize(
    "seconds, words",
    [(0.26, "0.3 s"), (45.4, "45 s"), (60, "1 min"), (299.7, "5 min"), (3_725, "1 h 2 min"), (200_000, "2 d 8 h")],
)
def test_durations(seconds, words):
    assert in_words(seconds) == words


def test_a_summary_names_the_best_and_never_fails(tmp_path):
    assert "no summary: " in summarise(str(tmp_path))
    data = made_up(FALLING, accuracies=[*range(30), *range(49, 29, -1)])
    data.epochs[7] |= {"test_rmse": 0.25}
    said = str(data)
    assert said.startswith("epochs 50, steps 500, starts 1\n") and "images/s in steps (median); goodput" in said
    assert "validation top-1: best 49% (epoch 30), last 30%" in said
    assert f"training loss: best {np.mean(FALLING[-10:]):.4g} (epoch 49)" in said
    assert "test_rmse: best 0.25 (epoch 7), last 0.25" in said  # of a task that measures something else


def test_bad_images_are_listed_once(tmp_path):
    """Also those that are found again after a restart; not those of another run in the folder."""
    for name in ("a.png", "b c.png", "d\udce9.png", "e.png"):
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"")
    make_images(tmp_path / "images", 1)
    for step, bad in ((0, [4]), (0, [1, 2]), (8, [2, 3])):
        dataset = build_dataset(
            data_args(tmp_path / "images", in_chans=1, bad_images="skip"), "train", lambda image: image
        )
        dataset.max_bad_share = 1.0
        for number in bad:
            dataset[(0, number)]
        log = RunLog(tmp_path, tmp_path, step, 0, 0)
        assert (tmp_path / "bad_images.txt").exists() == (step > 0)
        log.bad_images(dataset)
        log.close()
    (tmp_path / "config.json").write_text('{"config": {"epochs": 1}, "environment": {}}')
    (tmp_path / "steps.jsonl").write_text('{"step": 1, "epoch": 0, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0}\n')
    run = read_history(tmp_path)
    names = [Path(path).name for path in run.bad_images]
    assert {"a.png", "b c.png", "d\udce9.png"} <= set(names) and len(set(names)) == len(names)
    assert len(run.resumed_at) == 1
    util.report.page([run], [])


def test_a_run_that_started_later_is_finished():
    data = made_up(FALLING[:100], epochs=10)
    data.epochs = [{**line, "epoch": line["epoch"] + 40} for line in data.epochs]
    assert not util.report.unfinished(data)


def test_spikes_are_those_that_training_warns_of(caplog):
    losses = [9.0 if i > 150 and i % 60 == 0 else loss for i, loss in enumerate(FALLING)]
    meter = StepMeter(0, 1, 500, 1, torch.device("cpu"), deque(maxlen=SPIKE_HISTORY))
    meter.warn_of_spikes([{"step": i, "loss": loss} for i, loss in enumerate(losses)])
    assert util.report.spikes(made_up(losses)).startswith(f"{caplog.text.count('loss spike')} loss spikes")


@pytest.mark.parametrize(
    "data, rule",
    [
        (made_up(FALLING), ""),
        (made_up(FALLING, wait=0.3), "data wait is above 20%"),
        (made_up(FALLING[:200] + [FALLING[199]] * 300), "lowest loss of the last 20 epochs"),
        (made_up([1 + 0.01 * (-1) ** i for i in range(500)]), "98% of the first tenth's"),
        (made_up([9.0 if i > 150 and i % 60 == 0 else loss for i, loss in enumerate(FALLING)]), "deviations above"),
        (made_up(FALLING[:400], epochs=40), "fewer epochs than"),
        (made_up(FALLING, accuracies=[*range(30), *range(49, 29, -1)]), "a point below the best"),
        (replace(made_up(FALLING), bad_images=["a.png"]), "could not be read"),
        (replace(made_up(FALLING), times=[clock(0, 0, start=True), clock(1000, 50, 50)]), "less than 70% of the time"),
        (made_up(FALLING, ranks=[20, 40, 30, 19]), "RankMe is below half"),
    ],
)
def test_verdicts_have_rules(data, rule):
    said = [words for words, verdict in RULES.items() if verdict(data)]
    if rule == "98% of the first tenth's":  # such a loss does not move either
        said = [words for words in said if "lowest loss" not in words]
    assert len(said) == bool(rule) and all(rule in words for words in said)


def test_references(runs, tmp_path, capfd):
    run(util.report, runs[0], "--out", tmp_path / "a.html", "--save_reference", tmp_path / "usual.json")
    reference = json.loads((tmp_path / "usual.json").read_text())
    assert reference["config"]["epochs"] == 3 and len(reference["epochs"]) == len(reference["loss"]) == 18
    assert str(runs[0].parent) not in (tmp_path / "usual.json").read_text()  # whose machine it was is nobody's business
    run(util.report, runs[1], "--out", tmp_path / "b.html", "--reference", tmp_path / "usual.json")
    assert "usual (reference, stretched)" in (tmp_path / "b.html").read_text()
    capfd.readouterr()
    fails(
        util.report,
        capfd,
        "--reference absent does not exist: give one of",
        runs[1],
        "--out",
        "a",
        "--reference",
        "absent",
    )


def test_mistakes_are_explained(runs, tmp_path, capfd):
    fails(util.report, capfd, "is not the output folder of a run: there is no config.json", tmp_path, "--out", "a.html")
    for damaged in ("", "[1]", '{"config": {}}'):
        (tmp_path / "config.json").write_text(damaged)
        fails(util.report, capfd, "config.json is damaged, or another program's", tmp_path, "--out", "a.html")
    (tmp_path / "config.json").write_text('{"config": {}, "environment": {}}')
    (tmp_path / "steps.jsonl").write_text('7\n{"a": 1}\n{"step": 1, "ep')
    fails(util.report, capfd, "a run that has made no step yet", tmp_path, "--out", "a.html")
    fails(util.report, capfd, "--out", runs[0])
    for flags in (
        ["--out", runs[0] / "log.txt"],
        ["--out", tmp_path / "a.html", "--save_reference", runs[0] / "log.txt"],
    ):
        fails(util.report, capfd, "log.txt exists and is not replaced", runs[0], *flags)
    assert (runs[0] / "log.txt").stat().st_size


def test_the_quickstarts_curve_comes_with_the_program(runs, tmp_path):
    run(util.report, runs[1], "--out", tmp_path / "a.html", "--reference", "quickstart")
    assert "quickstart (reference, stretched)" in (tmp_path / "a.html").read_text()
    reference = util.report.read_reference("quickstart")
    assert reference["config"]["model"] == "mixmae_quickstart" and reference["loss"][-1] < 0.6 < reference["loss"][0]


def test_a_long_run_stays_small(tmp_path):
    steps = [{"step": i, "epoch": i // 5000, "loss": 1 / (1 + i), "lr": 0.1, "grad_norm": 1.0} for i in range(200_000)]
    data = RunHistory("long", tmp_path, {"epochs": 40, "input_size": [32, 32]}, {}, [], steps)
    assert len(util.report.page([data], [])) < 300_000


def test_names_of_runs_are_no_formulas(tmp_path):
    steps = [{"step": i, "epoch": 0, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0} for i in range(1, 9)]
    one, other = (RunHistory(name, tmp_path, {"epochs": 1}, {}, [], steps) for name in ("$x^$", "other"))
    assert "<td>$x^$</td>" in util.report.page([one, other], [])


def test_the_best_epoch_is_named_where_some_were_not_evaluated():
    accuracies = [None] * 50
    accuracies[6::7] = [60, 70, 80, 75, 70, 65, 60]
    assert "fell from 80.0% (epoch 21) to 60.0%" in past_its_best(made_up(FALLING, accuracies=accuracies))
