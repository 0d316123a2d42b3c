"""What exp/ablations/run.sh found: one table, one plot.

    python -m exp.ablations.table --runs DIR --seeds 0 1 2

Both are of the runs that are complete; a variant counts with the seeds that it has.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure

from util.data.display import COLOURS, HAIRLINE, INK, LIGHT, MUTED
from util.errors import UserError
from util.run.failures import user_errors
from util.run.history import read_history
from util.run.logger import setup_logging

MEASURES = {
    "knn_acc1_k20": "20 nearest neighbours",
    "probe_acc1": "linear probe",
    "test_acc1": "fine-tuned, 500 labels",
}
GROUPS = {  # variants by their folders, and how they are called, in the order of the table
    "": {"paper": "the paper's method", "random": "random weights; supervised from scratch"},
    "Telling two images apart": {
        "mix_embed": "mix embeddings too",
        "mix_embed_unmasked": "mix embeddings instead of masked attention",
        "unmasked": "neither mix embeddings nor masked attention",
        "partners_cycle": "no masked attention, partners in a cycle",
    },
    "Reconstruction": {"single": "single instead of dual"},
    "What fills a hidden cell": {
        "fill_mask_token": "a mask token, as in SimMIM",
        "fill_zero": "zero (the mean)",
        "fill_noise": "noise",
    },
    "Mask": {
        "ratio_25": "ratio 0.25",
        "ratio_75": "ratio 0.75",
        "ratio_varied": "ratio from 0.5 to 0.75",
        "mask_per_pair": "one for each pair",
    },
    "Mixtures": {
        "images_3": "3 images (ratio 0.67)",
        "images_4": "4 images (ratio 0.75)",
    },
    "Decoder and target": {
        "decoder_deep": "4 decoder blocks instead of 1",
        "decoder_narrow": "decoder of 32 channels instead of 64",
        "plain_pixels": "pixels not normalised",
    },
}


@dataclass(frozen=True)
class Row:
    """A variant: its measures in percent for each complete seed, and seconds of an epoch."""

    name: str
    values: dict[str, list[float]]
    seconds: list[float]


def read_rows(runs: Path, seeds: list[int]) -> dict[str, list[Row]]:
    """The variants of each group that have complete runs.

    Raises:
        UserError: there are none.
    """
    groups = {}
    for group, variants in GROUPS.items():
        groups[group] = []
        for folder, name in variants.items():
            paths = (runs / folder / f"seed{seed}" for seed in seeds)
            complete = [path for path in paths if (path / "done").exists()]
            logs = [last_line(path / "pretrain") | last_line(path / "finetune") for path in complete]
            if logs:
                values = {measure: [log[measure] for log in logs] for measure in MEASURES}
                groups[group].append(Row(name, values, [epoch_seconds(path / "pretrain") for path in complete]))
    if not any(groups.values()):
        raise UserError(f"--runs {runs} has no complete runs of the seeds {seeds}: give the output folder of run.sh")
    return groups


def last_line(run: Path) -> dict[str, float]:
    return json.loads((run / "log.txt").read_text().splitlines()[-1])


def epoch_seconds(run: Path) -> float:
    """Seconds of one epoch of pretraining, measures and pictures not counted."""
    history = read_history(run)
    return history.time_spent.steps / len(history.epochs)


def table(groups: dict[str, list[Row]], seeds: list[int]) -> str:
    """In Markdown."""
    lines = ["| variant | " + " | ".join(MEASURES.values()) + " | seconds per epoch |", "|---|" + "---|" * 4]
    for group, rows in groups.items():
        for row in rows:
            cells = [f"{mean(values):.1f} ± {(max(values) - min(values)) / 2:.1f}" for values in row.values.values()]
            few = f" (of {len(row.seconds)} seeds)" if len(row.seconds) < len(seeds) else ""
            name = f"{group}: {row.name}" if group else row.name
            lines.append(f"| {name}{few} | {' | '.join(cells)} | {mean(row.seconds):.0f} |")
    lines += [
        "",
        f"Top-1 accuracy in %: mean over the seeds {seeds}, and half the distance from the lowest to the highest.",
    ]
    lines.append("Seconds of an epoch of pretraining, with another variant beside it on the same machine.")
    return "\n".join(lines) + "\n"


def plot(groups: dict[str, list[Row]]) -> Figure:
    """Every seed as a point, every mean as a line, the paper's method as a grey band from its lowest seed to its
    highest; a column for each measure."""
    rows = [(group, row) for group, members in groups.items() for row in members]
    figure = Figure((12, 0.34 * len(rows) + 1.5), layout="constrained")
    columns = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, (measure, heading) in zip(columns, MEASURES.items()):
        for row in groups[""]:
            if row.name == GROUPS[""]["paper"]:
                axes.axvspan(min(row.values[measure]), max(row.values[measure]), color=HAIRLINE, alpha=0.6, zorder=0)
        for place, (_, row) in enumerate(rows):
            values = row.values[measure]
            axes.plot(values, [place] * len(values), "o", color=COLOURS["A"], alpha=0.6, markersize=5)
            axes.plot([mean(values)] * 2, [place - 0.32, place + 0.32], color=INK, linewidth=2)
        for place in range(1, len(rows)):
            if rows[place][0] != rows[place - 1][0]:
                axes.axhline(place - 0.5, color=HAIRLINE, linewidth=1)
        axes.set_title(heading, fontsize=11, color=INK)
        axes.set_xlabel("top-1 accuracy in %", color=MUTED)
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x", color=LIGHT)
    columns[0].set_yticks(np.arange(len(rows)), [f"{group}: {row.name}" if group else row.name for group, row in rows])
    columns[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        setup_logging()
        groups = read_rows(flags.runs, flags.seeds)
    (flags.runs / "table.md").write_text(table(groups, flags.seeds))
    plot(groups).savefig(flags.runs / "plot.png", dpi=110)
    print(table(groups, flags.seeds))
    print(f"Look at {flags.runs / 'plot.png'}. The table is in {flags.runs / 'table.md'}.")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare the variants of exp/ablations/run.sh.")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="output folder of run.sh")
    parser.add_argument("--seeds", type=int, nargs="+", required=True, metavar="N", help="of the runs")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
