"""What a run has recorded (`util.run.logger`), read back: its curves, its restarts, and where its time went."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from util.errors import UserError, unreadable_is_user_error
from util.run.logger import RESULTS, read_list, read_records
from util.run.metrics import SPIKE_HISTORY, find_spikes

Series = tuple[np.ndarray, np.ndarray]  # fractional epochs (n,) and values (n,)


TITLES = {  # of what is measured, by its name in log.txt
    "train_loss": "training loss",
    "knn_acc1_k10": "kNN top-1, k = 10",
    "knn_acc1_k20": "kNN top-1, k = 20",
    "probe_acc1": "linear probe top-1",
    "rankme": "RankMe (effective rank of the features)",
    "test_loss": "validation loss",
    "test_acc1": "validation top-1",
    "test_acc5": "validation top-5",
    "test_ema_loss": "validation loss, averaged weights",
    "test_ema_acc1": "validation top-1, averaged weights",
    "test_ema_acc5": "validation top-5, averaged weights",
    "test_miou": "validation mIoU",
    "test_pixel_acc": "validation pixel accuracy",
    "test_box_AP": "validation AP of boxes",
    "test_mask_AP": "validation AP of masks",
}
PERCENTAGES = ("acc", "miou", "AP")  # parts of the names of measures in percent


def title_of(name: str) -> str:
    return TITLES.get(name, name)  # another task measures other things


def unit_of(name: str) -> str:
    return "%" if any(part in name for part in PERCENTAGES) else ""


@dataclass(frozen=True)
class TimeSpent:
    """Seconds of wall time, from the first start of a run to the last thing that it wrote."""

    total: float
    steps: float  # in optimizer steps that count, the wait for their images included
    again: float  # in steps that were repeated after the run was killed
    starting: float  # from the start of a process to its first step
    stopped: float  # while no process ran

    @property
    def goodput(self) -> float:
        """The share of the wall time that was spent in steps that count."""
        return self.steps / self.total

    @property
    def other(self) -> float:
        """In evaluation, pictures and saving."""
        return max(0.0, self.total - self.steps - self.again - self.starting - self.stopped)

    def __str__(self) -> str:
        parts = {
            "evaluation, pictures and saving": self.other,
            "starting": self.starting,
            "steps done again": self.again,
            "stopped": self.stopped,
        }
        words = [f"{in_words(seconds)} {what}" for what, seconds in parts.items() if seconds >= 0.01 * self.total]
        after = f" ({', '.join(words)})" if words else ""
        return f"goodput {self.goodput:.0%}: {in_words(self.steps)} of {in_words(self.total)} in steps{after}"


@dataclass
class RunHistory:
    """What is known of a run; lists are empty where it recorded nothing.

    Args:
        name: of its folder.
        config, environment: as in config.json (see util.run.provenance).
        epochs, steps, times: the records of log.txt, steps.jsonl and times.jsonl.
        bad_images: paths of unreadable images.
        program, free, other_bits, data, earlier: as in config.json, too; older runs lack them.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    epochs: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    times: list[dict[str, Any]] = field(default_factory=list)
    bad_images: list[str] = field(default_factory=list)
    program: str | None = None
    free: list[str] | None = None
    other_bits: dict[str, str] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    earlier: list[dict[str, Any]] = field(default_factory=list)

    def per_step(self, name: str) -> Series:
        """Values of the optimizer steps; those that are not finite are left out."""
        epochs = np.array([step["epoch"] for step in self.steps], dtype=int)
        lengths = np.bincount(epochs)
        number = 1 + np.arange(len(epochs)) - (np.cumsum(lengths) - lengths)[epochs]  # of the step in its epoch
        if not self.epochs or self.epochs[-1]["epoch"] < epochs[-1]:  # the last epoch is not complete
            lengths[-1] = lengths.max()
        values = np.array([step.get(name) for step in self.steps], dtype=float)  # None becomes NaN
        known = np.isfinite(values)
        return (epochs + number / lengths[epochs])[known], values[known]

    def per_epoch(self, name: str) -> Series:
        found = [(line["epoch"] + 1, line[name]) for line in self.epochs if line.get(name) is not None]
        return tuple(np.array(found, dtype=float).reshape(-1, 2).T)

    @property
    def measured(self) -> list[str]:
        """The names in log.txt of measures of how good the run is, those of `TITLES` first, in its order."""
        recorded = {name for line in self.epochs for name, value in line.items() if value is not None}
        others = {name for name in recorded if name.startswith(RESULTS)} - TITLES.keys()
        return [name for name in TITLES if name in recorded] + sorted(others)

    def best(self, name: str) -> tuple[float, int]:
        """The best value of one of `measured`, and the number of its epoch, from 0."""
        epochs, values = self.per_epoch(name)
        place = values.argmin() if name.endswith("loss") else values.argmax()
        return float(values[place]), int(epochs[place]) - 1

    @cached_property
    def windows(self) -> list[tuple[dict[str, Any], float]]:
        """The records of steps in times.jsonl, each with the share of its steps that a restart did not undo."""
        found, resumed = [], math.inf
        for line in reversed(self.times):
            if "start" in line:
                resumed = min(resumed, line["step"])
            elif line.get("steps"):
                undone = min(line["steps"], max(0, line["step"] - resumed))
                found.append((line, 1 - undone / line["steps"]))
        return found[::-1]

    def per_second(self, name: str) -> Series:
        """The 'images' per second of steps, or the 'data_wait': the share of that time spent waiting for them."""
        found = [
            (line["epoch"], line[name] / line["seconds"]) for line, kept in self.windows if kept and line["seconds"]
        ]
        return tuple(np.array(found, dtype=float).reshape(-1, 2).T)

    @property
    def resumed_at(self) -> list[float]:
        """The fractional epochs at which the run was started again."""
        return [line["epoch"] for line in self.times if "start" in line][1:]

    @property
    def time_spent(self) -> TimeSpent | None:
        """None if nothing was recorded."""
        starting = stopped = 0.0
        started = previous = None
        for line in self.times:
            if "start" in line:
                stopped += max(0.0, line["time"] - previous) if previous is not None else 0.0
                started = line["time"]
            elif line.get("steps") and started is not None:
                starting, started = starting + max(0.0, line["time"] - line["seconds"] - started), None
            previous = line["time"]
        if not self.windows:
            return None
        steps = sum(line["seconds"] * kept for line, kept in self.windows)
        again = sum(line["seconds"] * (1 - kept) for line, kept in self.windows)
        total = max(self.times[-1]["time"] - self.times[0]["time"], steps + again)  # clocks may be set
        return TimeSpent(total, steps, again, starting, stopped)

    @cached_property
    def spikes(self) -> Series:
        """The losses far above those before them, as `StepMeter.warn_of_spikes` finds them."""
        epochs, losses = self.per_step("loss")
        above, _, _ = find_spikes(losses)
        return epochs[SPIKE_HISTORY:][above], losses[SPIKE_HISTORY:][above]

    def __str__(self) -> str:
        """What was done, how fast, and how well: a few lines."""
        starts = 1 + len(self.resumed_at)
        lines = [f"epochs {len(self.epochs)}, steps {len(self.steps):,}, starts {starts}"]
        _, speed = self.per_second("images")
        if (spent := self.time_spent) is not None:
            lines += [f"{np.median(speed):.0f} images/s in steps (median); {spent}"]
        if number := len(self.bad_images):
            lines.append(f"unreadable images, replaced by others: {number} ({self.folder}/bad_images.txt)")
        for name in self.measured:
            (value, epoch), last, unit = self.best(name), self.per_epoch(name)[1][-1], unit_of(name)
            lines.append(f"{title_of(name)}: best {value:.4g}{unit} (epoch {epoch}), last {last:.4g}{unit}")
        return "\n".join(lines)


def in_words(seconds: float) -> str:
    """A duration, such as '4 min 7 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    large = next(i for i, (_, length) in enumerate(units) if seconds >= length)
    (unit, length), (smaller, part) = units[large : large + 2]
    whole, rest = divmod(round(seconds / part), length // part)
    return f"{whole} {unit} {rest} {smaller}" if rest else f"{whole} {unit}"


def summarise(folder: str) -> str:
    """What the run in `folder` did, how fast and how well; if its files cannot be read, why."""
    try:
        return "\n".join(f"  {line}" for line in str(read_history(folder)).splitlines())
    except UserError as error:
        return f"  no summary: {error}"


# --- Reading files ---

LINES = {  # what every record of a file has
    "log.txt": {"epoch", "train_loss"},
    "steps.jsonl": {"epoch", "step"},
    "times.jsonl": {"epoch", "step", "time"},
}


def read_history(folder: str | Path) -> RunHistory:
    """Raises UserError for what is not the output folder of a run."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"{folder} is not the output folder of a run: there is no config.json in it")
    content = read_json(path / "config.json", ("config", "environment"))
    with unreadable_is_user_error(f"{folder} cannot be read"):
        epochs, steps, times = (
            [line for line in read_records(path / name) if keys <= line.keys()] for name, keys in LINES.items()
        )
        bad_images = read_list(path / "bad_images.txt")
    if not steps:
        raise UserError(f"{folder} holds a run that has made no step yet")
    name = path.resolve().name
    recorded = {part: content[part] for part in ("program", "free", "other_bits", "data", "earlier") if part in content}
    return RunHistory(
        name, path, content["config"], content["environment"], epochs, steps, times, bad_images, **recorded
    )  # fmt: skip


def read_json(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """What a file of JSON holds. Raises UserError if it cannot be read or does not have all `keys`."""
    with unreadable_is_user_error(f"{path} cannot be read"):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        content = json.loads(text)
        return content | {key: content[key] for key in keys}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged, or another program's: it must have {', '.join(keys)} in JSON") from error
