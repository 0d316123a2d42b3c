"""What exp/garments/run.sh found: mIoU of both models for each seed, and a picture of what they see in some scenes.

python -m exp.garments.report --runs DIR --scenes DIR/scenes/labelled --seeds 0 1 2
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.label_maps import IGNORED, read_class_names, read_label_map
from util.dense.segmentation_pictures import segmentation_table

SHOWN = 6  # scenes, the first ones for validation


def miou_of(run: Path) -> float:
    """In percent, after a run's last epoch."""
    return json.loads((run / "log.txt").read_text().splitlines()[-1])["test_miou"]


def draw(run: Path, scenes: Path) -> Image.Image:
    """Scenes with their label maps, and those that both models of a seed gave; the canvas stays grey."""
    folders = {
        "label map": scenes / "masks/val",
        "pretrained": run / "pretrained/predictions/labels",
        "from scratch": run / "scratch/predictions/labels",
    }
    rows = []
    for path in sorted((scenes / "images/val").iterdir())[:SHOWN]:
        maps = [read_label_map(str(folder / path.name)) for folder in folders.values()]
        rows.append((np.asarray(Image.open(path)), [np.where(classes == 0, IGNORED, classes) for classes in maps]))
    return segmentation_table(rows, ["scene", *folders], read_class_names(str(scenes)))


def main(flags: argparse.Namespace) -> None:
    print("seed   pretrained   from scratch")
    miou = np.array(
        [[miou_of(flags.runs / f"seed{seed}" / name) for name in ("pretrained", "scratch")] for seed in flags.seeds]
    )
    for name, (pretrained, scratch) in zip([*flags.seeds, "mean"], [*miou, miou.mean(axis=0)]):
        print(f"{name:>4}   {pretrained:9.1f}%   {scratch:11.1f}%")
    wins = np.count_nonzero(miou[:, 0] > miou[:, 1])
    print(f"\nWith pretraining the mIoU is higher for {wins} of {len(flags.seeds)} seeds.")
    path = flags.runs / "garments.png"
    draw(flags.runs / f"seed{flags.seeds[0]}", flags.scenes).save(path)
    print(f"Look at {path} (seed {flags.seeds[0]}). Logs and checkpoints are in {flags.runs}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare the models of exp/garments/run.sh.")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="output folder of run.sh")
    parser.add_argument("--scenes", type=Path, required=True, metavar="DIR", help="its labelled scenes")
    parser.add_argument("--seeds", type=int, nargs="+", required=True, metavar="N", help="of the runs")
    main(parser.parse_args())
