"""What exp/ablations/run.sh found: one table, one plot.

    python -m exp.ablations.table --runs DIR --seeds 0 1 2

Both cover the complete runs; a variant is averaged over the seeds that it has.
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
VARIANTS = {  # by their folders, in the order of the table
    "paper": "the paper's method",
    "random": "random weights; supervised from scratch",
    "mix_embed": "Telling two images apart: mix embeddings too",
    "mix_embed_unmasked": "Telling two images apart: mix embeddings instead of masked attention",
    "unmasked": "Telling two images apart: neither mix embeddings nor masked attention",
    "partners_cycle": "Telling two images apart: no masked attention, partners in a cycle",
    "single": "Reconstruction: single instead of dual",
    "single_unmasked": "Reconstruction: single instead of dual, without masked attention",
    "fill_mask_token": "What fills a hidden cell: a mask token, as in SimMIM",
    "fill_zero": "What fills a hidden cell: zero (the mean)",
    "fill_noise": "What fills a hidden cell: noise",
    "ratio_25": "Mask: ratio 0.25",
    "ratio_75": "Mask: ratio 0.75",
    "ratio_varied": "Mask: ratio from 0.5 to 0.75",
    "mask_per_pair": "Mask: one for each pair",
    "images_3": "Mixtures: 3 images (ratio 0.67)",
    "images_4": "Mixtures: 4 images (ratio 0.75)",
    "decoder_deep": "Decoder and target: 4 decoder blocks instead of 1",
    "decoder_narrow": "Decoder and target: decoder of 32 channels instead of 64",
    "plain_pixels": "Decoder and target: pixels not normalised",
}


@dataclass(frozen=True)
class Row:
    """A variant: its measures in percent for each complete seed, and seconds of an epoch."""

    variant: str
    values: dict[str, list[float]]
    seconds: list[float]


def read_rows(runs: Path, seeds: list[int]) -> list[Row]:
    """The variants that have complete runs.

    Raises:
        UserError: there are none.
    """
    rows = []
    for variant in VARIANTS:
        paths = (runs / variant / f"seed{seed}" for seed in seeds)
        complete = [path for path in paths if (path / "done").exists()]
        logs = [last_line(path / "pretrain") | last_line(path / "finetune") for path in complete]
        if logs:
            values = {measure: [log[measure] for log in logs] for measure in MEASURES}
            rows.append(Row(variant, values, [epoch_seconds(path / "pretrain") for path in complete]))
    if not rows:
        raise UserError(f"--runs {runs} has no complete runs of the seeds {seeds}: give the output folder of run.sh")
    return rows


def last_line(run: Path) -> dict[str, float]:
    return json.loads((run / "log.txt").read_text().splitlines()[-1])


def epoch_seconds(run: Path) -> float:
    """Seconds of one epoch of pretraining, measures and pictures not counted."""
    history = read_history(run)
    return history.time_spent.steps / len(history.epochs)


def table(rows: list[Row], seeds: list[int]) -> str:
    """In Markdown."""
    lines = ["| variant | " + " | ".join(MEASURES.values()) + " | seconds per epoch |", "|---|" + "---|" * 4]
    for row in rows:
        cells = [f"{mean(values):.1f} ± {(max(values) - min(values)) / 2:.1f}" for values in row.values.values()]
        few = f" (of {len(row.seconds)} seeds)" if len(row.seconds) < len(seeds) else ""
        lines.append(f"| {VARIANTS[row.variant]}{few} | {' | '.join(cells)} | {mean(row.seconds):.0f} |")
    lines += [
        "",
        f"Top-1 accuracy in %: mean over the seeds {seeds}, and half the distance from the lowest to the highest.",
        "Seconds of an epoch of pretraining, with another variant beside it on the same machine.",
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[Row]) -> Figure:
    """Every seed as a point, every mean as a line, the paper's method as a grey band from its lowest seed to its
    highest; a column for each measure."""
    figure = Figure((12, 0.34 * len(rows) + 1.5), layout="constrained")
    columns = figure.subplots(1, len(MEASURES), sharey=True)
    names = [VARIANTS[row.variant] for row in rows]
    groups = [name.partition(": ")[0] if ": " in name else "" for name in names]
    for axes, (measure, heading) in zip(columns, MEASURES.items()):
        for place, row in enumerate(rows):
            values = row.values[measure]
            if row.variant == "paper":
                axes.axvspan(min(values), max(values), color=HAIRLINE, alpha=0.6, zorder=0)
            axes.plot(values, [place] * len(values), "o", color=COLOURS["A"], alpha=0.6, markersize=5)
            axes.plot([mean(values)] * 2, [place - 0.32, place + 0.32], color=INK, linewidth=2)
            if place and groups[place] != groups[place - 1]:
                axes.axhline(place - 0.5, color=HAIRLINE, linewidth=1)
        axes.set_title(heading, fontsize=11, color=INK)
        axes.set_xlabel("top-1 accuracy in %", color=MUTED)
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x", color=LIGHT)
    columns[0].set_yticks(np.arange(len(rows)), names)
    columns[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        setup_logging()
        rows = read_rows(flags.runs, flags.seeds)
    (flags.runs / "table.md").write_text(table(rows, flags.seeds))
    plot(rows).savefig(flags.runs / "plot.png", dpi=110)
    print(table(rows, flags.seeds))
    print(f"Look at {flags.runs / 'plot.png'}. The table is in {flags.runs / 'table.md'}.")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare the variants of exp/ablations/run.sh.")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="output folder of run.sh")
    parser.add_argument("--seeds", type=int, nargs="+", required=True, metavar="N", help="of the runs")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
