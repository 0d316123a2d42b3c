"""One self-contained page about runs: how they went, in what they differ, and whether that is normal.

    python -m util.report output_dir --out report.html
    python -m util.report run_a run_b --out report.html --reference quickstart

It reads what runs leave in their folders: config.json, log.txt, steps.jsonl, TensorBoard's files and reconstructions.
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import base64
import html
import io
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.errors import UserError, unreadable_is_user_error
from util.run.failures import user_errors
from util.run.flags import Config, flag, get_parser, given_flags
from util.run.logger import setup_logging
from util.run.metrics import MOST_DATA_WAIT, SPIKE_HISTORY, SPIKE_SIGMAS, data_wait_advice

logger = logging.getLogger(__name__)

REFERENCES = Path(__file__).resolve().parent.parent / "figures" / "reference"
POINTS = 600  # of a curve; longer ones are drawn as the mean and the extremes of as many bins
PICTURES, PICTURE_WIDTH = 4, 800  # reconstructions shown of each run, and their width in pixels
COLOURS = ("#2f7fe8", "#f0821e", "#3a9d5d", "#b04fc4", "#c23b4b", "#0f9aa8")
GREY = "#7a7f87"
NOT_COMPARED = ("output_dir", "log_dir", "resume", "resume_force")  # where things are, which all runs differ in


@dataclass(frozen=True)
class ReportConfig(Config):
    TITLE: ClassVar[str] = "report"

    out: str = flag("", "the page to write", "FILE.html", required="the page to write, FILE.html")
    reference: str = flag("", "a curve to draw beside the runs: a file of --save_reference, or quickstart", "NAME|FILE")
    save_reference: str = flag("", "write the curve of the (first) run to this file", "FILE.json")


def get_args_parser() -> argparse.ArgumentParser:
    parser = get_parser(ReportConfig, "Describe runs in one HTML page.", "python -m util.report")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of main_pretrain.py or main_finetune.py")
    return parser


# --- What a run left ---


@dataclass
class RunData:
    """What is known of a run; lists are empty where it recorded nothing."""

    name: str
    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    epochs: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    speed: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # tag -> (epochs, values)
    starts: int = 1

    def per_step(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Fractional epochs (n,) and values (n,) of the optimizer steps; what was not finite is left out."""
        epochs = np.array([step["epoch"] for step in self.steps], dtype=int)
        lengths = np.bincount(epochs)
        number = 1 + np.arange(len(epochs)) - (np.cumsum(lengths) - lengths)[epochs]  # of the step in its epoch
        if not self.epochs or self.epochs[-1]["epoch"] < epochs[-1]:  # the last epoch is not complete
            lengths[-1] = lengths.max()
        values = np.array([step.get(name) for step in self.steps], dtype=float)  # None becomes NaN
        known = np.isfinite(values)
        return (epochs + number / lengths[epochs])[known], values[known]

    def per_epoch(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        found = [(line["epoch"] + 1, line[name]) for line in self.epochs if line.get(name) is not None]
        return tuple(np.array(found, dtype=float).reshape(-1, 2).T)


def read_run(folder: str) -> RunData:
    """Raises UserError for what is not the output folder of a run."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"{folder} is not the output folder of a run: there is no config.json in it")
    content = read_json(path / "config.json", ("config", "environment"))
    with unreadable_is_user_error(f"{folder} cannot be read"):
        epochs, steps = (list(read_lines(path / name, key)) for name, key in LINES)
    if not steps:
        raise UserError(f"{folder} holds a run that has made no step yet")
    log_dir = Path(content["config"].get("log_dir") or path)
    log_dir = log_dir if log_dir.is_dir() else path  # the folder was moved
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 10_000})
    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it tells of every file
    events.Reload()
    speed = {}
    for tag in ("speed/images_per_second", "speed/data_wait_share", "speed/memory_mb"):
        if tag in events.Tags()["scalars"]:
            found = np.array([(event.step / 1000, event.value) for event in events.Scalars(tag)])
            speed[tag] = (found[:, 0], found[:, 1])
    starts = len(list(log_dir.glob("events.out.tfevents.*")))
    return RunData(
        path.name or str(path), path, content["config"], content["environment"], epochs, steps, speed, starts
    )


LINES = (("log.txt", "train_loss"), ("steps.jsonl", "step"))  # what every record of a file has, beside its epoch


def read_lines(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines; what is no record (a line that is being written) is left out."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and {"epoch", key} <= record.keys():
                yield record


def read_json(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Raises UserError for a file that cannot be read, or has not all of `keys`."""
    with unreadable_is_user_error(f"{path} cannot be read"):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        content = json.loads(text)
        return {key: content[key] for key in keys}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged, or another program's: it must have {', '.join(keys)} in JSON") from error


def smoothed(values: np.ndarray) -> np.ndarray:
    """The running mean of a fiftieth of the run."""
    width = max(1, len(values) // 50)
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    first = np.maximum(np.arange(len(values)) + 1 - width, 0)
    return (sums[1:] - sums[first]) / (np.arange(len(values)) + 1 - first)


# --- Verdicts ---

Verdict = Callable[[RunData], str]  # a sentence, or '' where there is nothing to say


def data_wait(run: RunData) -> str:
    _, values = run.speed.get("speed/data_wait_share", (None, np.zeros(0)))
    if len(values) and np.median(values) > MOST_DATA_WAIT:
        advice = data_wait_advice(np.median(values))
        return f"{advice[0].upper()}{advice[1:]}."
    return ""


def still_loss(run: RunData) -> str:
    _, losses = run.per_epoch("train_loss")
    if len(losses) >= 40 and losses[-20:].min() > 0.999 * losses[:-20].min():
        return "The loss has not moved for 20 epochs: training longer in this way will change little."
    return ""


def no_progress(run: RunData) -> str:
    _, losses = run.per_step("loss")
    tenth = max(1, len(losses) // 10)
    if len(losses) >= 50 and losses[-tenth:].mean() > 0.98 * losses[:tenth].mean():
        return (
            f"The loss has hardly fallen ({losses[:tenth].mean():.4g} to {losses[-tenth:].mean():.4g}): the learning "
            "rate may be far too small or too large, or the images in other units than --mean and --std."
        )
    return ""


def spikes(run: RunData) -> str:
    _, losses = run.per_step("loss")
    sums, squares = (np.cumsum(np.concatenate([np.zeros(1), values])) for values in (losses, losses**2))
    # Of the SPIKE_HISTORY losses before each one.
    total, square = (series[SPIKE_HISTORY:-1] - series[: -SPIKE_HISTORY - 1] for series in (sums, squares))
    mean, variance = total / SPIKE_HISTORY, np.maximum(square - total**2 / SPIKE_HISTORY, 0) / (SPIKE_HISTORY - 1)
    limit = mean + SPIKE_SIGMAS * np.sqrt(variance) + 1e-9 * abs(mean)  # the last for rounding
    count = int((losses[SPIKE_HISTORY:] > limit).sum())
    if count > max(3, len(losses) // 1000):
        return f"{count} loss spikes: a smaller learning rate, or --clip_grad, makes them rarer."
    return ""


def unfinished(run: RunData) -> str:
    done, total = 1 + run.epochs[-1]["epoch"] if run.epochs else 0, run.config.get("epochs")
    return f"{done} of {total} epochs are done: --resume auto continues." if total and done < total else ""


def past_its_best(run: RunData) -> str:
    _, accuracies = run.per_epoch("test_acc1")
    if len(accuracies) > 5 and accuracies[-1] < accuracies.max() - 1:
        return (
            f"Accuracy fell from {accuracies.max():.1f}% (epoch {accuracies.argmax() + 1}) to {accuracies[-1]:.1f}%: "
            "it overfits; checkpoint-best.pth has the best weights."
        )
    return ""


RULES: dict[str, Verdict] = {  # the rule in words -> what it says of a run
    f"the median data wait is above {MOST_DATA_WAIT:.0%}": data_wait,
    "the lowest loss of the last 20 epochs is within 0.1% of the lowest before": still_loss,
    "the loss of the last tenth of the steps is above 98% of the first tenth's": no_progress,
    f"more than one step in 1,000 is {SPIKE_SIGMAS:g} deviations above the {SPIKE_HISTORY} before it": spikes,
    "fewer epochs than --epochs": unfinished,
    "the last accuracy is a point below the best": past_its_best,
}


# --- Plots ---


def plot(
    title: str, curves: list[tuple[str, str, np.ndarray, np.ndarray]], smooth: bool = False, log: bool = False
) -> str:
    """An SVG of curves, each (label, colour, x, y); with `smooth`, raw values are drawn faintly behind."""
    figure = Figure(figsize=(6.2, 3.4), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot(xlabel="epochs", title=title)
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    for label, colour, x, y in curves:
        if smooth:
            low, high, middle = binned(x, y)
            axes.fill_between(middle, low, high, color=colour, alpha=0.18, linewidth=0)
            y = smoothed(y)
        every = max(1, len(x) // POINTS)
        marker = "o" if len(x) < 30 else None
        axes.plot(
            x[::-1][::every][::-1],
            y[::-1][::every][::-1],
            color=colour,
            label=label,
            linewidth=1.4,
            marker=marker,
            markersize=3,
        )
    if log:
        axes.set_yscale("log")
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=GREY)
    axes.title.set_color(GREY)  # which can be read on light and on dark
    axes.xaxis.label.set_color(GREY)
    axes.tick_params(which="both", colors=GREY)
    axes.spines[["left", "bottom"]].set_color(GREY)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lowest and highest value of each of at most POINTS bins, and where they lie."""
    starts = np.unique(np.linspace(0, len(y), min(POINTS, len(y)), endpoint=False).astype(int))
    return np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts), x[starts]


def plots(runs: list[RunData], references: list[dict[str, Any]]) -> Iterator[str]:
    colour = {run.name: COLOURS[number % len(COLOURS)] for number, run in enumerate(runs)}
    losses = [(run.name, colour[run.name], *run.per_step("loss")) for run in runs]
    for reference in references:
        x = np.array(reference["epochs"]) / reference["config"]["epochs"] * max(run.config["epochs"] for run in runs)
        losses.append((f"{reference['name']} (reference, stretched)", GREY, x, np.array(reference["loss"])))
    yield plot("loss: running mean, and range", losses, smooth=True)
    for name, title in (("lr", "learning rate"), ("grad_norm", "gradient norm")):
        curves = [(run.name, colour[run.name], *run.per_step(name)) for run in runs]
        yield plot(title, curves, smooth=name == "grad_norm", log=name == "grad_norm")
    recorded = sorted({name for run in runs for line in run.epochs for name in line})
    scores = [name for name in recorded if name.startswith(("knn_", "test_", "probe_", "rankme"))]
    for name in scores:
        curves = [(run.name, colour[run.name], *run.per_epoch(name)) for run in runs if len(run.per_epoch(name)[0])]
        yield plot(name, curves)
    for tag, title in (
        ("speed/images_per_second", "images per second"),
        ("speed/data_wait_share", "share of time spent waiting for data"),
    ):
        curves = [(run.name, colour[run.name], *run.speed[tag]) for run in runs if tag in run.speed]
        if curves:
            yield plot(title, curves)


# --- The page ---

STYLE = """
:root { color-scheme: light dark; --muted: #7a7f87; --line: light-dark(#e3e6ea, #33373d); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1320px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.6em; }
h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; }
td, th { text-align: left; padding: .25em 1.2em .25em 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 1em; }
svg, img { width: 100%; height: auto; }
th, .rule, summary { color: var(--muted); }
summary { cursor: pointer; }
"""


def table(header: list[str], rows: list[list[object]]) -> str:
    def row(cells: list[object], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(str(cell))}</{kind}>" for cell in cells) + "</tr>"

    return f"<table>{row(header, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def summary(run: RunData) -> list[object]:
    _, losses = run.per_step("loss")
    seconds = sum(line.get("seconds") or 0 for line in run.epochs)
    best = [
        f"{name} {max(values):.2f}" for name in ("knn_acc1_k20", "test_acc1") if len(values := run.per_epoch(name)[1])
    ]
    _, rate = run.speed.get("speed/images_per_second", (None, np.array([math.nan])))
    size = "x".join(map(str, run.config.get("input_size") or ()))
    return [
        run.name, f"{run.config.get('model')} at {size}", f"{len(run.epochs)} of {run.config.get('epochs')}",
        len(run.steps), f"{smoothed(losses)[-1]:.4f}", ", ".join(best) or "-", f"{np.median(rate):.0f}",
        f"{seconds / 60:.1f} min", run.starts - 1,
    ]  # fmt: skip


def page(runs: list[RunData], references: list[dict[str, Any]]) -> str:
    parts = ["<h1>mixmae: how it went</h1>"]
    header = ["run", "model", "epochs", "steps", "loss now", "best", "images/s", "time in epochs", "resumed"]
    parts.append(table(header, [summary(run) for run in runs]))
    parts.append("<h2>Verdicts</h2>")
    said = [(run, rule, sentence) for run in runs for rule, verdict in RULES.items() if (sentence := verdict(run))]
    for run, rule, sentence in said:
        run_name, words = html.escape(run.name), html.escape(sentence)
        parts.append(f"<p><b>{run_name}</b>: {words} <span class=rule>(rule: {html.escape(rule)})</span></p>")
    if not said:
        parts.append("<p>Nothing unusual.</p>")
    rules = "".join(f"<li>{html.escape(rule)}" for rule in RULES)
    parts.append(f"<details><summary>the rules</summary><ul>{rules}</ul></details>")
    parts.append(f"<h2>Curves</h2><div class=plots>{''.join(plots(runs, references))}</div>")
    names = sorted({name for run in runs for name in run.config})
    values = {name: [json.dumps(run.config.get(name)) for run in runs] for name in names}
    if len(runs) > 1:
        different = [[name, *values[name]] for name in names if len(set(values[name])) > 1 and name not in NOT_COMPARED]
        parts.append("<h2>Where the runs differ</h2>")
        parts.append(
            table(["setting", *(run.name for run in runs)], different) if different else "<p>In no setting.</p>"
        )
    for run in runs:
        if pictures := sorted((run.folder / "reconstructions").glob("*.png")):
            chosen = pictures[:: max(1, -(-len(pictures) // PICTURES))][: PICTURES - 1] + pictures[-1:]
            parts.append(f"<h2>Reconstructions of {html.escape(run.name)}</h2>")
            parts += [
                f"<details{' open' * (path == chosen[-1])}><summary>{path.stem}</summary>{embedded(path)}</details>"
                for path in dict.fromkeys(chosen)
            ]
    rows = [[name, *values[name]] for name in names]
    rows += [
        [name, *(run.environment.get(name) for run in runs)] for name in ("versions", "device", "commit", "command")
    ]
    everything = table(["setting", *(run.name for run in runs)], rows)
    parts.append(f"<h2>Configuration</h2><details><summary>every setting</summary>{everything}</details>")
    title = html.escape(", ".join(run.name for run in runs))
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    return f"{head}{''.join(parts)}</html>\n"


def embedded(path: Path) -> str:
    """A picture as part of the page."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.thumbnail((PICTURE_WIDTH, PICTURE_WIDTH * 4))
        image.convert("RGB").save(buffer, "JPEG", quality=80)
    return f'<img alt="{path.stem}" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


# --- Reference curves ---


def as_reference(run: RunData, name: str) -> dict[str, Any]:
    """The curve of a run at about 100 points, and what it was made with, but for where things were."""
    epochs, losses = run.per_step("loss")
    every = max(1, len(losses) // 100)
    chosen = slice(every - 1, None, every)
    knn = {name: values[-1] for name in ("knn_acc1_k20",) if len(values := run.per_epoch(name)[1])}
    return {
        "name": name,
        "commit": run.environment.get("commit"),
        "config": {key: value for key, value in run.config.items() if key not in (*NOT_COMPARED, "data_path")},
        "epochs": [round(value, 4) for value in epochs[chosen].tolist()],
        "loss": [round(value, 5) for value in smoothed(losses)[chosen].tolist()],
        **knn,
    }


def read_reference(name: str) -> dict[str, Any]:
    path = Path(name) if Path(name).suffix == ".json" else REFERENCES / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in REFERENCES.glob("*.json")))
        raise UserError(
            f"--reference {name} does not exist: give one of {known or 'none'}, or a file of --save_reference"
        )
    return read_json(path, ("name", "config", "epochs", "loss"))


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        setup_logging()
        config = given_flags(ReportConfig, flags)
        runs = [read_run(folder) for folder in flags.runs]
        if len({run.name for run in runs}) < len(runs):
            runs = [RunData(**{**vars(run), "name": str(run.folder)}) for run in runs]
        references = [read_reference(config.reference)] if config.reference else []
        text = page(runs, references)
        with unreadable_is_user_error(f"--out {config.out} cannot be written"):
            Path(config.out).parent.mkdir(parents=True, exist_ok=True)
            Path(config.out).write_text(text, encoding="utf-8")
        logger.info("wrote %s (%.1f MB)", config.out, len(text) / 1e6)
        if path := config.save_reference:
            with unreadable_is_user_error(f"--save_reference {path} cannot be written"):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_text(json.dumps(as_reference(runs[0], Path(path).stem)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
