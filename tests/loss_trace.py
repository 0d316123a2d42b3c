"""The losses of two small runs, step by step, beside those that are stored in loss_trace.json.

    python tests/loss_trace.py            # compare
    python tests/loss_trace.py --store    # store those of now, after a change of numbers that is wanted

A pretraining run and a fine-tuning run that starts from it, on generated images in colour, in float32 and one thread on
a CPU. test_loss_trace.py compares them in the default tests.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import torch
from running import make_images, read_lines
from trials import Sabotage, Trial

import main_finetune
import main_pretrain
from util.run.provenance import describe_environment

STORED = Path(__file__).with_name("loss_trace.json")
TOLERANCES = {"loss": 5e-6, "grad_norm": 5e-5}  # relative; tests/README.md says what was measured
HOW_TO_STORE = "If that is what the change is for: .venv/bin/python tests/loss_trace.py --store"
SHARED = (
    *("--device", "cpu", "--precision", "fp32", "--num_workers", 0, "--warmup_epochs", 1, "--print_freq", 1),
    *("--batch_size", 8, "--epochs", 4, "--min_lr", 1e-5, "--clip_grad", 1.0, "--drop_path", 0.1),
)
PRETRAIN = ("--model", "mixmae_quickstart", "--vis_every", 0, "--lr", 1e-3, "--range_mask_ratio", 0.2)
FINETUNE = ("--lr", 2e-3, "--mixup", 0.8, "--cutmix", 1.0, "--model_ema", "--model_ema_decay", 0.9)

Trace = dict[str, list[dict[str, float]]]  # of each run, its steps


def record(
    folder: Path, pretrain: tuple = (), finetune: tuple = (), sabotage: Sabotage | None = None
) -> dict[str, Any]:
    """`versions`, `device` and `runs`, the `Trace` of both runs, which are given further flags and a sabotage."""
    for split, count in (("train", 24), ("val", 4)):
        for number, name in enumerate("ab"):
            make_images(folder / "images" / split / name, count, (48, 40), 3, seed=10 * number + count)
    first, second = folder / "pretrain", folder / "finetune"

    def start(main: ModuleType, out: Path, *flags: object) -> list[dict[str, float]]:
        shared = (*SHARED, "--data_path", folder / "images", "--output_dir", out)
        Trial(folder, *shared, *flags, main=main, sabotage=sabotage).finish()
        return [
            {name: step[name] for name in ("step", "loss", "grad_norm")} for step in read_lines(out / "steps.jsonl")
        ]

    runs = {
        "pretraining": start(main_pretrain, first, *PRETRAIN, *pretrain),
        "fine-tuning": start(main_finetune, second, *FINETUNE, "--finetune", first / "checkpoint.pth", *finetune),
    }
    environment = describe_environment(torch.device("cpu"))
    return {"versions": environment["versions"], "device": environment["device"], "runs": runs}


def differences(stored: Trace, now: Trace) -> dict[str, float]:
    """The largest relative difference of each quantity of each run."""
    found = {}
    for run, steps in stored.items():
        for name in TOLERANCES:
            pairs = [(before[name], after[name]) for before, after in zip(steps, now[run], strict=True)]
            found[f"{run} {name}"] = max(abs(a - b) / max(abs(a), abs(b)) for a, b in pairs)
    return found


def complaint(stored: dict[str, Any], now: dict[str, Any]) -> str:
    """The first step of each run that is not the stored one, what may be the reason and what to do; '' if all are."""
    found = []
    for run, steps in stored["runs"].items():
        if len(steps) != len(now["runs"][run]):
            found.append(f"{run}: {len(steps)} steps stored, {len(now['runs'][run])} now")
            continue
        for before, after in zip(steps, now["runs"][run]):
            different = [
                f"{name} {before[name]:.9g} -> {after[name]:.9g}"
                for name, tolerance in TOLERANCES.items()
                if not abs(before[name] - after[name]) <= tolerance * max(abs(before[name]), abs(after[name]))
            ]
            if different:
                found.append(f"{run}, first at step {before['step']}: {', '.join(different)}")
                break
    if not found:
        return ""
    lines = ["the numbers have changed since the loss trace was stored", *found]
    if stored["versions"] != now["versions"]:
        lines.append(f"which other versions may have done: {stored['versions']} -> {now['versions']}")
    return "\n".join([*lines, HOW_TO_STORE])


def as_text(trace: dict[str, Any]) -> str:
    """JSON with a line for each step, so that a difference between commits shows which steps they change."""
    runs = [
        f'  "{run}": [\n' + ",\n".join(f"   {json.dumps(step)}" for step in steps) + "\n  ]"
        for run, steps in trace["runs"].items()
    ]
    heads = [f' "{name}": {json.dumps(trace[name])},\n' for name in ("versions", "device")]
    return "{\n" + "".join(heads) + ' "runs": {\n' + ",\n".join(runs) + "\n }\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--store", action="store_true", help="store the losses of now in tests/loss_trace.json")
    store = parser.parse_args().store
    with tempfile.TemporaryDirectory() as folder:
        now = record(Path(folder))
    if store:
        STORED.write_text(as_text(now))
    else:
        stored = json.loads(STORED.read_text())
        print(differences(stored["runs"], now["runs"]))
        sys.exit(complaint(stored, now) or 0)


if __name__ == "__main__":
    main()
