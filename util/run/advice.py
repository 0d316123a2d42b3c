"""What to do next, as commands to paste: at the end of a run, and after it was stopped."""

import dataclasses
import itertools
import os
import shlex
import shutil
import sys
from pathlib import Path

from util.data.sources import find_validation
from util.run.config import DecodingFlags, TrainingConfig
from util.run.history import summarise


def command(*words: object) -> str:
    """A shell command that runs in the environment of this process: `words` after the Python interpreter."""
    activated = shutil.which("python")
    python = "python" if activated and os.path.samefile(activated, sys.executable) else sys.executable
    if python.startswith(f"{os.getcwd()}{os.sep}"):
        python = os.path.relpath(python)
    return shlex.join([python, *map(str, words)])


def decoding_flags(config: TrainingConfig) -> list[object]:
    """The flags that say how image files are read, where they are not the defaults."""
    flags: list[object] = []
    for field in dataclasses.fields(DecodingFlags):
        if (value := getattr(config, field.name)) != field.default:
            flags += [f"--{field.name}"] if value is True else [f"--{field.name}", value]
    return flags


def data_flags(config: TrainingConfig, divided: bool = True) -> list[object]:
    """The flags that name the images and say how they are read; `divided`: into training and validation images."""
    flags: list[object] = ["--data_path", config.data_path]
    if config.dataset:
        flags += ["--dataset", config.dataset]
    elif divided and config.val_share:
        flags += ["--val_share", config.val_share]
    elif divided:
        flags += [] if find_validation(config.data_path) else ["--val_share", 0.1]
    return flags + decoding_flags(config)


def after_pretraining(config: TrainingConfig, labelled: bool) -> list[tuple[str, str]]:
    """What can be done with the checkpoint, and how.

    Args:
        labelled: whether the images have labels.
    """
    folder, data = Path(config.output_dir), data_flags(config)
    checkpoint = ["--checkpoint", folder / "checkpoint.pth"]
    steps = []
    if not config.dataset:
        drawn = ["--images", config.data_path, "--out", folder / "reconstructions.png", *decoding_flags(config)]
        steps.append(("see reconstructions", command("-m", "util.visualize", *checkpoint, *drawn)))
    if labelled:
        steps.append(("measure the features", command("-m", "util.knn", *checkpoint, *data)))
        finetuned = folder.with_name(f"{folder.name}_finetuned")
        flags = ["--finetune", folder / "checkpoint.pth", *data, "--output_dir", finetuned]
        steps.append(("fine-tune with labels", command("main_finetune.py", *flags)))
    elif not config.dataset:
        embeddings = [config.data_path, "--features", "--out", folder / "embeddings.npz", *decoding_flags(config)]
        steps.append(("embed the images", command("-m", "util.predict", *checkpoint, *embeddings)))
    exported = ["--part", "encoder", "--format", "safetensors", "--out", folder / "encoder.safetensors"]
    steps.append(("use the encoder elsewhere", command("-m", "util.export", *checkpoint, *exported)))
    more = folder.with_name(f"{folder.name}_continued")
    flags = [*data_flags(config, False), "--finetune", folder / "checkpoint.pth", "--output_dir", more]
    steps.append(("pretrain further", command("main_pretrain.py", *flags)))
    return steps


def after_fine_tuning(config: TrainingConfig) -> list[tuple[str, str]]:
    """Likewise for a classifier."""
    folder, data = Path(config.output_dir), data_flags(config)
    best = folder / "checkpoint-best.pth"
    predictions = ["--per_class", "--predictions", folder / "predictions.csv"]
    steps = [("evaluate again", command("main_finetune.py", "--eval", "--finetune", best, *data, *predictions))]
    if not config.dataset:
        classified = ["--checkpoint", best, config.data_path, "--out", folder / "classes.csv", *decoding_flags(config)]
        steps.append(("classify images", command("-m", "util.predict", *classified)))
    exported = ["--checkpoint", best, "--format", "safetensors", "--out", folder / "classifier.safetensors"]
    return [*steps, ("use the classifier elsewhere", command("-m", "util.export", *exported))]


def at_the_end(what: str, output_dir: str, steps: list[tuple[str, str]]) -> str:
    """What a finished run has done, and the commands of `after_...`, one per line, each below what it does."""
    done = f"{what} is done: {Path(output_dir) / 'checkpoint.pth'}\n{summarise(output_dir)}"
    return "\n".join([done, "what can be done next:", *(f"  # {purpose}\n  {line}" for purpose, line in steps)])


def to_continue() -> str:
    """The command that goes on with the run of this process."""
    words = sys.argv if ("--resume", "auto") in itertools.pairwise(sys.argv) else [*sys.argv, "--resume", "auto"]
    return command(*words)
