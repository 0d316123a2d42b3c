"""Whether two runs are the same, and where they diverge.

    python -m util.compare_runs run_a run_b --out losses.png

It compares what both runs left in their folders: settings, data, versions and commit (config.json), every optimizer
step's loss, learning rate and gradient norm (steps.jsonl), and every epoch's measures (log.txt). A run that was killed
and resumed counts as one; the rest of a longer run is left out.
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import json
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from util.data.display import COLOURS, without_formulas
from util.errors import UserError, unreadable_is_user_error
from util.run.config import TrainingConfig
from util.run.failures import user_errors
from util.run.flags import FREE, NOT_NEGATIVE, Config, flag, get_parser, given_flags
from util.run.history import RunHistory, read_history
from util.run.logger import setup_logging
from util.run.state import program_of

logger = logging.getLogger(__name__)

PER_STEP = {"lr": "learning rate", "loss": "loss", "grad_norm": "gradient norm"}
FINGERPRINT = {
    "images": "their number", "names": "their names or order", "labels": "their labels", "sizes": "sizes of files"
}  # fmt: skip
STARTS = ("finetune", "reset_head", "nb_classes", "start_epoch")  # which matter here; to a resumed run they do not


@dataclass(frozen=True)
class CompareConfig(Config):
    TITLE: ClassVar[str] = "comparison"

    tolerance: float = flag(
        0.0, "relative difference up to which numbers count as the same (0: to the bit)", "X", NOT_NEGATIVE
    )
    out: str = flag(
        "", "draw both losses, and the differences on a logarithmic axis", "FILE.png",
        (lambda value: not value or value.lower().endswith((".png", ".pdf", ".svg")), "must end in .png, .pdf or .svg"),
    )  # fmt: skip


def get_args_parser() -> argparse.ArgumentParser:
    parser = get_parser(
        CompareConfig,
        "Say whether two runs are the same, and where they diverge. Exit code: 0 if all numbers that both recorded are "
        "the same, whatever their settings; 1 if not; 2 if the runs cannot be compared.",
        "python -m util.compare_runs",
    )
    parser.add_argument("runs", nargs=2, metavar="RUN", help="output folder of a run")
    return parser


# --- How they were made ---


def refuse_other_kinds(a: RunHistory, b: RunHistory) -> None:
    """Raise a UserError for runs of different programs, whose losses are not the same quantity."""
    programs = [run.program or program_of({"args": run.config}) for run in (a, b)]
    if None not in programs and programs[0] != programs[1]:
        raise UserError(
            f"these are not the same kind of run, so their numbers cannot be compared: {a.name} is of {programs[0]}, "
            f"{b.name} of {programs[1]}; give two runs of one program"
        )


def different_settings(a: RunHistory, b: RunHistory) -> Iterator[str]:
    """Lines: first the settings that make another experiment, then those that may change bits, then the others."""
    if a.free is None and b.free is None:  # older runs do not tell
        free = {field.name for field in fields(TrainingConfig) if field.metadata["on_resume"] == FREE}
    else:
        free = {*(a.free or ()), *(b.free or ())}
    free = free.difference(STARTS)
    other_bits = a.other_bits | b.other_bits | dict.fromkeys(STARTS, "what the run started from")
    names = [name for name in a.config if name in b.config and a.config[name] != b.config[name]]
    for name in sorted(names, key=lambda name: name in other_bits):
        if name not in free:
            meaning = f" ({other_bits[name]})" if name in other_bits else ""
            yield f"setting {name}: {json.dumps(a.config[name])} | {json.dumps(b.config[name])}{meaning}"
    if of_no_effect := [name for name in names if name in free]:
        yield f"settings that differ, without effect on the numbers: {', '.join(of_no_effect)}"
    for run, other in ((a, b), (b, a)):
        if only := sorted(run.config.keys() - other.config.keys()):
            yield f"settings of {run.name} alone: {', '.join(only)}"


def different_environments(a: RunHistory, b: RunHistory) -> Iterator[str]:
    """Lines about versions, machine and commit."""
    versions = [run.environment.get("versions", "").split(", ") for run in (a, b)]
    only = [[version for version in versions[i] if version not in versions[1 - i]] for i in (0, 1)]
    if any(only):
        yield f"versions: {' | '.join(', '.join(found) or '-' for found in only)}"
    for name in ("device", "commit"):
        if a.environment.get(name) != b.environment.get(name):
            yield f"{name}: {a.environment.get(name)} | {b.environment.get(name)}"


def different_data(a: RunHistory, b: RunHistory) -> Iterator[str]:
    """A line for every set of images that is not the same, as far as fingerprints tell."""
    for split in dict.fromkeys([*a.data, *b.data]):
        ours, theirs = a.data.get(split), b.data.get(split)
        if ours is None or theirs is None:
            yield f"{split} images: recorded by {(a if theirs is None else b).name} alone"
        elif different := [words for key, words in FINGERPRINT.items() if ours.get(key) != theirs.get(key)]:
            counts = f"{ours.get('images')} | {theirs.get('images')}"
            yield f"{split} images: {counts}; what differs: {', '.join(different)}"


def earlier_starts(run: RunHistory) -> Iterator[str]:
    """A line for every start of a run that was resumed with something changed."""
    for start in run.earlier:
        before = start.get("config", {}) | start.get("data", {}) | start.get("environment", {})
        before.pop("command", None)
        yield f"{run.name} had other values until step {start['until_step']}: {json.dumps(before)}"


# --- What they computed ---


@dataclass(frozen=True)
class Comparison:
    """Of one quantity, over what both runs recorded.

    Args:
        what: its name.
        unit: 'step' or 'epoch'.
        at: steps, or epochs from 0 (n,).
        values: of both runs (n, 2); NaN where it was not finite.
        differences: relative to the larger magnitude (n,), 0 where the values are equal, infinite where only one is
            finite.
    """

    what: str
    unit: str
    at: np.ndarray
    values: np.ndarray
    differences: np.ndarray

    def at_position(self, position: int) -> str:
        a, b = self.values[position]
        return f"{self.what} {a:.9g} | {b:.9g} (relative difference {self.differences[position]:.1e})"


def compare(what: str, unit: str, name: str, *records: list[dict[str, Any]]) -> Comparison:
    """The value `name` in the records of two runs; None is one that was not finite."""
    a, b = ({line[unit]: line[name] for line in lines if name in line} for lines in records)
    at = sorted(a.keys() & b.keys())
    values = np.array([[a[key], b[key]] for key in at], dtype=float).reshape(-1, 2)  # None becomes NaN
    differences = np.array([relative_difference(*pair) for pair in values.tolist()])
    return Comparison(what, unit, np.array(at, dtype=int), values, differences)


def relative_difference(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return abs(a - b) / max(abs(a), abs(b)) if math.isfinite(a) and math.isfinite(b) else math.inf


def compare_steps(a: RunHistory, b: RunHistory) -> list[Comparison]:
    """Raises UserError where the runs have no optimizer step in common."""
    found = [compare(words, "step", name, a.steps, b.steps) for name, words in PER_STEP.items()]
    found = [comparison for comparison in found if len(comparison.at)]
    if not found:
        steps = [f"{run.name} has steps {run.steps[0]['step']} to {run.steps[-1]['step']}" for run in (a, b)]
        raise UserError(f"the runs have no optimizer step in common: {', '.join(steps)}")
    return found


def where_they_part(comparisons: list[Comparison], tolerance: float) -> Iterator[str]:
    """A line for each quantity that differs by more than `tolerance` at the first step or epoch where one does."""
    above = [(comparison, np.flatnonzero(comparison.differences > tolerance)) for comparison in comparisons]
    firsts = [(comparison, positions[0]) for comparison, positions in above if len(positions)]
    start = min((comparison.at[first] for comparison, first in firsts), default=None)
    for comparison, first in firsts:
        if comparison.at[first] == start:
            yield f"first different {comparison.unit}: {start}, {comparison.at_position(first)}"


def largest_differences(comparisons: list[Comparison]) -> Iterator[str]:
    """A line for each quantity that differs at all."""
    for found in comparisons:
        if found.differences.any():
            largest = found.differences.argmax()
            yield f"largest difference, at {found.unit} {found.at[largest]}: {found.at_position(largest)}"


def draw(a: RunHistory, b: RunHistory, comparisons: list[Comparison], path: str) -> None:
    """Both losses, and below them the relative differences on a logarithmic axis, by optimizer step."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for run, colour, style in zip((a, b), COLOURS.values(), ("-", "--")):
        line = [(step["step"], step.get("loss")) for step in run.steps]
        above.plot(*np.array(line, dtype=float).T, style, color=colour, label=run.name, linewidth=1.2)
    above.set_ylabel("loss")
    without_formulas(above.legend(frameon=False))
    for comparison in comparisons:
        shown = (comparison.differences > 0) & np.isfinite(comparison.differences)
        if shown.any():
            below.plot(
                comparison.at[shown], comparison.differences[shown], ".-", label=comparison.what, linewidth=0.8,
                markersize=3,
            )  # fmt: skip
    below.set(xlabel="optimizer step", ylabel="relative difference")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    if below.lines:
        below.set_yscale("log")
        below.set_ylim(whole_decades(np.concatenate([line.get_ydata() for line in below.lines])))
        below.yaxis.set_minor_formatter(NullFormatter())
        below.legend(frameon=False)
    else:
        below.text(0.5, 0.5, "no difference", ha="center", transform=below.transAxes)
        below.set_yticks([])
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    with unreadable_is_user_error(f"--out {path} cannot be written"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def whole_decades(values: np.ndarray) -> tuple[float, float]:
    """The limits of a logarithmic axis for positive values: powers of ten, at least one decade apart."""
    low = math.floor(math.log10(values.min()))
    return 10.0**low, 10.0 ** max(low + 1, math.ceil(math.log10(values.max())))


def report_differences(a: RunHistory, b: RunHistory, tolerance: float, out: str) -> bool:
    """Log all about it, draw it to `out` if that is given, and return whether the numbers are the same."""
    made = (different_settings(a, b), different_data(a, b), different_environments(a, b))
    for line in chain(*made, earlier_starts(a), earlier_starts(b)):
        logger.info("%s", line)
    steps = compare_steps(a, b)
    epochs = [compare(name, "epoch", name, a.epochs, b.epochs) for name in a.measured if name in b.measured]
    parts = [*where_they_part(steps, tolerance), *where_they_part(epochs, tolerance)]
    for line in (*parts, *largest_differences(steps + epochs)):
        logger.info("%s", line)
    if out:
        draw(a, b, steps, out)
        logger.info("wrote %s", out)
    common = len(steps[0].at)
    compared = f"{common} steps"
    if {len(a.steps), len(b.steps)} != {common}:
        compared += f" that both have (of {len(a.steps)} | {len(b.steps)})"
    same = f"the same within {tolerance:g}" if tolerance else "the same to the bit"
    logger.info("%s and %s are %s in %s", a.name, b.name, "NOT the same" if parts else same, compared)
    return not parts


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        setup_logging()
        config = given_flags(CompareConfig, flags)
        a, b = (read_history(folder) for folder in flags.runs)
        if a.name == b.name:
            a, b = (replace(run, name=folder) for run, folder in zip((a, b), flags.runs))
        refuse_other_kinds(a, b)
        same = report_differences(a, b, config.tolerance, config.out)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
