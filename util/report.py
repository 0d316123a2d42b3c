"""One self-contained page about runs: how they went, how they differ, and whether that is normal.

    python -m util.report output_dir --out report.html
    python -m util.report run_a run_b --out report.html --reference quickstart

It reads what runs leave in their folders: config.json, log.txt, steps.jsonl, times.jsonl and reconstructions.
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import base64
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from util.data.display import COLOURS, without_formulas
from util.errors import UserError, require_writable, unreadable_is_user_error
from util.run.failures import user_errors
from util.run.flags import Config, flag, get_parser, given_flags
from util.run.history import RunHistory, Series, in_words, read_history, read_json, title_of, unit_of
from util.run.logger import setup_logging
from util.run.metrics import MOST_DATA_WAIT, SPIKE_HISTORY, SPIKE_SIGMAS, data_wait_advice

logger = logging.getLogger(__name__)

REFERENCES = Path(__file__).resolve().parent.parent / "figures" / "reference"
POINTS = 600  # of a curve; longer ones are drawn as the mean and the extremes of as many bins
PICTURES, PICTURE_WIDTH = 4, 800  # reconstructions shown of each run, and their width in pixels, as in STYLE
GREY = "#7a7f87"  # which can be read on light and on dark
LOOK = {
    **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    **{"axes.facecolor": "none", "figure.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6},
    **{"legend.frameon": False, "legend.fontsize": 8, "legend.labelcolor": GREY},
}
USUAL_GOODPUT = 0.7
SHORT_RUN = 60.0  # seconds, of which starting is much
MADE_WITH = ("versions", "device", "commit", "command")
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


def smoothed(values: np.ndarray) -> np.ndarray:
    """The running mean of a fiftieth of the run."""
    width = max(1, len(values) // 50)
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    first = np.maximum(np.arange(len(values)) + 1 - width, 0)
    return (sums[1:] - sums[first]) / (np.arange(len(values)) + 1 - first)


# --- Verdicts ---

Verdict = Callable[[RunHistory], str]  # a sentence, or '' where there is nothing to say


def data_wait(run: RunHistory) -> str:
    _, values = run.per_second("data_wait")
    waited = np.median(values) if len(values) else 0
    return f"{data_wait_advice(waited)}." if waited > MOST_DATA_WAIT else ""


def little_goodput(run: RunHistory) -> str:
    spent = run.time_spent
    if spent is None or spent.goodput >= USUAL_GOODPUT or spent.total < SHORT_RUN:
        return ""
    reasons = {
        "passed while it was stopped: a requeued job with --resume auto continues by itself": spent.stopped,
        "went into steps that a kill undid: with a smaller --save_steps these are fewer": spent.again,
        "went into starting": spent.starting,
        "went into evaluation, pictures and saving: --knn_every, --probe_every, --vis_every, --eval_every and "
        "--save_every say how often": spent.other,
    }
    reason = max(reasons, key=reasons.get)
    return f"{str(spent).capitalize()}. Most of the rest {reason}."


def still_loss(run: RunHistory) -> str:
    _, losses = run.per_epoch("train_loss")
    if len(losses) >= 40 and losses[-20:].min() > 0.999 * losses[:-20].min():
        return "The loss has not moved for 20 epochs: training longer in this way will change little."
    return ""


def no_progress(run: RunHistory) -> str:
    _, losses = run.per_step("loss")
    tenth = max(1, len(losses) // 10)
    if len(losses) >= 50 and losses[-tenth:].mean() > 0.98 * losses[:tenth].mean():
        return (
            f"The loss has hardly fallen ({losses[:tenth].mean():.4g} to {losses[-tenth:].mean():.4g}): the learning "
            "rate may be far too small or too large, or the images in other units than --mean and --std."
        )
    return ""


def spikes(run: RunHistory) -> str:
    count = len(run.spikes[0])
    if count > max(3, len(run.steps) // 1000):
        return f"{count} loss spikes: a smaller learning rate, or --clip_grad, makes them rarer."
    return ""


def bad_images(run: RunHistory) -> str:
    if not run.bad_images:
        return ""
    names = ", ".join(run.bad_images[:3]) + (", ..." if len(run.bad_images) > 3 else "")
    return f"Unreadable images, replaced by others: {len(run.bad_images)} ({names}), all listed in bad_images.txt."


def collapse(run: RunHistory) -> str:
    _, ranks = run.per_epoch("rankme")
    if len(ranks) > 2 and ranks[-1] < ranks.max() / 2:
        return (
            f"RankMe fell from {ranks.max():.1f} to {ranks[-1]:.1f}: the features use fewer and fewer directions, as "
            "where an encoder collapses; compare kNN or a probe before training on."
        )
    return ""


def unfinished(run: RunHistory) -> str:
    done, total = 1 + run.epochs[-1]["epoch"] if run.epochs else 0, run.config.get("epochs")
    return f"{done} of {total} epochs are done: --resume auto continues." if total and done < total else ""


def past_its_best(run: RunHistory) -> str:
    epochs, accuracies = run.per_epoch("test_acc1")
    if len(accuracies) > 5 and accuracies[-1] < accuracies.max() - 1:
        best = f"{accuracies.max():.1f}% (epoch {epochs[accuracies.argmax()]:.0f})"
        return f"Accuracy fell from {best} to {accuracies[-1]:.1f}%: it overfits; checkpoint-best.pth has the best."
    return ""


RULES: dict[str, Verdict] = {  # the rule in words -> what it says of a run
    f"the median data wait is above {MOST_DATA_WAIT:.0%}": data_wait,
    f"less than {USUAL_GOODPUT:.0%} of the time since the first start (if above a minute) were steps": little_goodput,
    "the lowest loss of the last 20 epochs is within 0.1% of the lowest before": still_loss,
    "the loss of the last tenth of the steps is above 98% of the first tenth's": no_progress,
    f"more than one step in 1,000 is {SPIKE_SIGMAS:g} deviations above the {SPIKE_HISTORY} before it": spikes,
    "RankMe is below half of its highest value": collapse,
    "images could not be read": bad_images,
    "fewer epochs than --epochs": unfinished,
    "the last accuracy is a point below the best": past_its_best,
}


# --- Plots ---


@dataclass
class Curve:
    """Of one run in one plot.

    Args:
        x, y: fractional epochs and values (n,).
        marks: points to mark, (epochs, values).
        lines: epochs to mark by vertical lines.
    """

    label: str
    colour: str
    x: np.ndarray
    y: np.ndarray
    marks: Series = (np.empty(0), np.empty(0))
    lines: Sequence[float] = ()


def plot(title: str, curves: list[Curve], smooth: bool = False, **settings: Any) -> Markup:
    """An SVG of curves; with `smooth`, the values (of many, their range) are drawn faintly behind a running mean.
    Further settings are those of matplotlib's axes."""
    with rc_context(LOOK):
        figure = Figure(figsize=(6.2, 3.4), layout="constrained")
        axes = figure.add_subplot(xlabel="epochs", title=title, **settings)
        for curve in curves:
            x, y, colour = curve.x, curve.y, curve.colour
            for epoch in curve.lines:
                axes.axvline(epoch, color=colour, linestyle=":", linewidth=1)
            axes.plot(*curve.marks, "v", color=colour, markersize=5)
            if smooth:
                axes.fill_between(*binned(x, y), color=colour, alpha=0.25, linewidth=0.8)
                y = smoothed(y)
            every = max(1, len(x) // POINTS)
            shown = slice((len(x) - 1) % every, None, every)  # the last one included
            style = "o-" if len(x) < 30 else "-"
            axes.plot(x[shown], y[shown], style, color=colour, label=curve.label, linewidth=1.4, markersize=3)
        if len(curves) > 1:
            without_formulas(axes.legend())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Markup(buffer.getvalue()[buffer.getvalue().index("<svg") :])


def binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where at most POINTS bins begin, and the lowest and highest value of each."""
    starts = np.unique(np.linspace(0, len(y), min(POINTS, len(y)), endpoint=False).astype(int))
    return x[starts], np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def plots(runs: list[RunHistory], references: list[dict[str, Any]]) -> Iterator[Markup]:
    coloured = list(zip(runs, cycle(COLOURS.values())))

    def curves(series: Callable[[RunHistory, str], Series], name: str) -> list[Curve]:
        found = [Curve(run.name, colour, *series(run, name)) for run, colour in coloured]
        return [curve for curve in found if len(curve.x)]

    losses = [Curve(run.name, colour, *run.per_step("loss"), run.spikes, run.resumed_at) for run, colour in coloured]
    for reference in references:
        x = np.array(reference["epochs"]) / reference["config"]["epochs"] * max(run.config["epochs"] for run in runs)
        losses.append(Curve(f"{reference['name']} (reference, stretched)", GREY, x, np.array(reference["loss"])))
    yield plot("training loss", losses, smooth=True)
    for name in dict.fromkeys(name for run in runs for name in run.measured):
        if name != "train_loss":
            title = title_of(name) + (f" ({unit_of(name)})" if unit_of(name) else "")
            yield plot(title, curves(RunHistory.per_epoch, name))
    yield plot("learning rate", curves(RunHistory.per_step, "lr"))
    yield plot("gradient norm", curves(RunHistory.per_step, "grad_norm"), smooth=True, yscale="log")
    if speeds := curves(RunHistory.per_second, "images"):
        yield plot("images per second", speeds)
        waits = curves(RunHistory.per_second, "data_wait")
        yield plot("share of the time spent waiting for images", waits, ylim=(0, 1))


# --- The page ---

PAGE = Environment(autoescape=True).from_string("""\
<!doctype html>
<html lang=en>
<meta charset=utf-8>
<title>{{ runs | join(", ", attribute="name") }}</title>
<style>
:root { color-scheme: light dark; --muted: #7a7f87; --line: light-dark(#e3e6ea, #33373d); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1320px; margin: 2em auto; padding: 0 1.5em; }
table { border-collapse: collapse; }
td, th { text-align: left; padding: .25em 1.2em .25em 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 1em; }
svg, img { width: 100%; height: auto; }
img { max-width: 800px; }
th, .rule, summary { color: var(--muted); }
summary { cursor: pointer; }
</style>
{% macro table(header, rows) %}
<table>
<tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table>
{% endmacro %}
<h1>mixmae: how it went</h1>
{{ table(*overview) }}
{% for run in runs if run.time_spent %}
<p><b>{{ run.name }}</b>: {{ run.time_spent }}.</p>
{% endfor %}
<h2>Verdicts</h2>
{% for run, rule, sentence in verdicts %}
<p><b>{{ run.name }}</b>: {{ sentence }} <span class=rule>(rule: {{ rule }})</span></p>
{% else %}
<p>Nothing unusual.</p>
{% endfor %}
<details><summary>the rules</summary><ul>{% for rule in rules %}<li>{{ rule }}</li>{% endfor %}</ul></details>
<h2>Curves</h2>
<p class=rule>Loss and gradient norm: running means, and behind them the values of single steps, or their range. Dotted
lines: the run was resumed. Triangles: loss spikes.</p>
<div class=plots>{{ plots | join }}</div>
{% if runs | length > 1 %}
<h2>Where the runs differ</h2>
{{ table(header, different) if different else "In no setting." }}
{% endif %}
{% for run, pictures in pictures %}
<h2>Reconstructions of {{ run.name }}</h2>
{% for name, data in pictures %}
<details {{ "open" if loop.last }}><summary>{{ name }}</summary><img alt="{{ name }}" src="{{ data }}"></details>
{% endfor %}
{% endfor %}
<h2>Configuration</h2>
<details><summary>every setting</summary>{{ table(header, settings) }}</details>
</html>
""")


def summary(run: RunHistory) -> dict[str, object]:
    """A run in one row of a table, by the headings of its columns."""
    _, losses = run.per_step("loss")
    _, speed = run.per_second("images")
    spent, size = run.time_spent, "x".join(map(str, run.config.get("input_size") or ()))
    best = [
        f"{run.best(name)[0]:.2f}{unit_of(name)} {title_of(name)}"
        for name in run.measured
        if name not in ("train_loss", "rankme", "knn_acc1_k10") and not name.endswith(("acc5", "loss"))
    ]
    return {
        "run": run.name,
        "model": f"{run.config.get('model')} at {size}",
        "epochs": f"{len(run.epochs)} of {run.config.get('epochs')}",
        "steps": f"{len(run.steps):,}",
        "loss": f"{smoothed(losses)[-1]:.4f}",
        "best": ", ".join(best) or "-",
        "images/s": f"{np.median(speed):.0f}" if len(speed) else "-",
        "time": in_words(spent.total) if spent else "-",
        "goodput": f"{spent.goodput:.0%}" if spent else "-",
        "resumed": len(run.resumed_at),
        "spikes": len(run.spikes[0]),
        "bad images": len(run.bad_images),
    }


def page(runs: list[RunHistory], references: list[dict[str, Any]]) -> str:
    rows = [summary(run) for run in runs]
    names = sorted({name for run in runs for name in run.config})
    values = {name: [json.dumps(run.config.get(name)) for run in runs] for name in names}
    made_with = {name: [run.environment.get(name) for run in runs] for name in MADE_WITH}
    return PAGE.render(
        runs=runs,
        overview=(rows[0], [row.values() for row in rows]),
        verdicts=[(run, rule, said) for run in runs for rule, verdict in RULES.items() if (said := verdict(run))],
        rules=RULES,
        plots=plots(runs, references),
        header=["setting", *(run.name for run in runs)],
        different=[[name, *values[name]] for name in names if len(set(values[name])) > 1 and name not in NOT_COMPARED],
        pictures=[(run, found) for run in runs if (found := list(reconstructions(run)))],
        settings=[[name, *row] for name, row in (values | made_with).items()],
    )


def reconstructions(run: RunHistory) -> Iterator[tuple[str, str]]:
    """Names and data of a few pictures of a run, from its first to its last."""
    paths = sorted((run.folder / "reconstructions").glob("*.png"))
    for number in np.linspace(0, len(paths) - 1, min(PICTURES, len(paths)), dtype=int):
        buffer = io.BytesIO()
        with Image.open(paths[number]) as image:
            image.thumbnail((PICTURE_WIDTH, PICTURE_WIDTH * 4))
            image.convert("RGB").save(buffer, "JPEG", quality=80)
        yield paths[number].stem, f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- Reference curves ---


def as_reference(run: RunHistory, name: str) -> dict[str, Any]:
    """The curve of a run at about 100 points, and what it was made with, but for where things were."""
    epochs, losses = run.per_step("loss")
    every = max(1, len(losses) // 100)
    chosen = slice(every - 1, None, every)
    return {
        "name": name,
        "commit": run.environment.get("commit"),
        "config": {key: value for key, value in run.config.items() if key not in (*NOT_COMPARED, "data_path")},
        "epochs": [round(value, 4) for value in epochs[chosen].tolist()],
        "loss": [round(value, 5) for value in smoothed(losses)[chosen].tolist()],
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
        runs = [read_history(folder) for folder in flags.runs]
        if len({run.name for run in runs}) < len(runs):
            runs = [replace(run, name=str(run.folder)) for run in runs]
        references = [read_reference(config.reference)] if config.reference else []
        text = page(runs, references)
        require_writable(config.out, "--out", ".html")
        if config.save_reference:
            require_writable(config.save_reference, "--save_reference")
        with unreadable_is_user_error(f"--out {config.out} cannot be written"):
            Path(config.out).write_text(text, encoding="utf-8", errors="backslashreplace")
        logger.info("wrote %s (%.1f MB)", config.out, len(text) / 1e6)
        if path := config.save_reference:
            with unreadable_is_user_error(f"--save_reference {path} cannot be written"):
                Path(path).write_text(json.dumps(as_reference(runs[0], Path(path).stem)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
