"""What to do next, as commands to paste: at the end of a run, and after it was stopped."""

import dataclasses
import itertools
import os
import shlex
import shutil
import sys
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from util.data.open_source import find_validation
from util.run.config import DecodingFlags, ImageTrainingConfig
from util.run.history import summarise
from util.run.startup import ROOT, program
from util.weights.settings import METHOD

DECODING = [field.name for field in dataclasses.fields(DecodingFlags)]


def command(*words: object) -> str:
    """A shell command that runs in the environment and the folder of this process: `words` after the interpreter."""
    activated = shutil.which("python")
    python = "python" if activated and os.path.samefile(activated, sys.executable) else sys.executable
    if python.startswith(f"{os.getcwd()}{os.sep}"):
        python = os.path.relpath(python)
    elsewhere = Path.cwd() != ROOT
    path = f"PYTHONPATH={shlex.quote(str(ROOT))} " if elsewhere and words[0] == "-m" else ""
    mains = ("main_pretrain.py", "main_finetune.py")  # also where torchrun is to start one
    return path + shlex.join([python, *(str(ROOT / word if elsewhere and word in mains else word) for word in words)])


def changed_flags(config: ImageTrainingConfig, names: Container[str]) -> list[object]:
    """Those of the named flags that are not at their defaults."""
    flags: list[object] = []
    for field in dataclasses.fields(config):
        if field.name in names and (value := getattr(config, field.name)) != field.default:
            if isinstance(value, bool):
                flags.append(f"--{field.name}" if value else f"--no-{field.name}")
            else:
                flags += [f"--{field.name}", value]
    return flags


def data_flags(config: ImageTrainingConfig, divided: bool = True) -> list[object]:
    """The flags that name the images and say how they are read; `divided`: hold some out for validation if the run
    did not and there are no others."""
    names = ("data_path", "dataset", "val_share", *DECODING, "bad_images", "max_bad_images", "allow_odd_statistics")
    to_divide = divided and not (config.dataset or config.val_share or find_validation(config.data_path))
    return changed_flags(config, names) + (["--val_share", 0.1] if to_divide else [])


def can_validate(config: ImageTrainingConfig) -> bool:
    """Whether there are validation images, or images that --val_share divides, as it does not divide tars."""
    tar = images_of(config).endswith(".tar")
    return bool(config.dataset or find_validation(config.data_path)) or not tar


def images_of(config: ImageTrainingConfig) -> str:
    """The training images, for commands that take any images: the tar, if the folder has one."""
    tar = Path(config.data_path) / "train.tar"
    return str(tar) if tar.is_file() else config.data_path


def predict(config: ImageTrainingConfig, checkpoint: Path, *flags: object) -> str:
    """The command of `util.predict` for the images of a run, read as the run did."""
    reading = changed_flags(config, (*DECODING, "bad_images", "allow_odd_statistics"))
    return command("-m", "util.predict", "--checkpoint", checkpoint, images_of(config), *flags, *reading)


def beside(folder: Path, suffix: str) -> Path:
    """A folder next to another one, with a longer name; also if that is called `.` or `..`."""
    named = folder.resolve() if folder.name in ("", "..") else folder
    return named.parent / f"{named.name}{suffix}"


def report(folder: Path) -> tuple[str, str]:
    return "see how it went, in a browser", command("-m", "util.report", folder, "--out", folder / "report.html")


def after_pretraining(config: ImageTrainingConfig, labelled: bool) -> Iterator[tuple[str, str]]:
    """What can be done with the checkpoint, and how.

    Args:
        labelled: whether the images have labels.
    """
    folder, data = Path(config.output_dir), data_flags(config)
    weights = folder / "checkpoint.pth"
    yield report(folder)
    if not config.dataset:
        drawn = ["--images", images_of(config), "--out", folder / "reconstructions.png"]
        drawn += changed_flags(config, DECODING)
        yield "see reconstructions", command("-m", "util.visualize", "--checkpoint", weights, *drawn)
    if labelled and can_validate(config):
        yield "measure the features", command("-m", "util.knn", "--checkpoint", weights, *data)
        out = ["--output_dir", beside(folder, "_finetuned")]
        yield "fine-tune with labels", command("main_finetune.py", "--finetune", weights, *data, *out)
    elif not config.dataset:
        yield "embed the images", predict(config, weights, "--features", "--out", folder / "embeddings.npz")
    exported = ["--part", "encoder", "--format", "safetensors", "--out", folder / "encoder.safetensors"]
    yield "use the encoder elsewhere", command("-m", "util.export", "--checkpoint", weights, *exported)
    out = ["--output_dir", beside(folder, "_continued"), *changed_flags(config, METHOD)]
    yield "pretrain further", command("main_pretrain.py", *data_flags(config, False), "--finetune", weights, *out)


def after_fine_tuning(config: ImageTrainingConfig) -> Iterator[tuple[str, str]]:
    """What can be done with the best checkpoint of a classifier, and how; the best by its averaged weights, if there
    are any."""
    folder, data = Path(config.output_dir), data_flags(config)
    best, averaged = folder / "checkpoint-best.pth", changed_flags(config, ("model_ema",))
    yield report(folder)
    predictions = ["--per_class", "--predictions", folder / "predictions.csv"]
    yield "evaluate again", command("main_finetune.py", "--eval", "--finetune", best, *averaged, *data, *predictions)
    if not config.dataset:
        yield "classify images", predict(config, best, *averaged, "--out", folder / "classes.csv")
    exported = ["--checkpoint", best, *averaged, "--format", "safetensors", "--out", folder / "classifier.safetensors"]
    yield "use the classifier elsewhere", command("-m", "util.export", *exported)


def at_the_end(what: str, output_dir: str, steps: Iterable[tuple[str, str]]) -> str:
    """What a finished run has done, and the commands of `after_...`, one per line, each below what it does."""
    done = f"{what} is done: {Path(output_dir) / 'checkpoint.pth'}\n{summarise(output_dir)}"
    return "\n".join([done, "what can be done next:", *(f"  # {purpose}\n  {line}" for purpose, line in steps)])


def to_continue(world_size: int) -> str:
    """How to continue the run of this process, as a command if there is one; '' in a Slurm job.

    (For jobs, `util.run.preemption` logs whether they are queued again.)

    Args:
        world_size: processes of the run.
    """
    if "SLURM_JOB_ID" in os.environ:
        return ""
    words = [*program(), *sys.argv[1:]]
    if ("--resume", "auto") not in itertools.pairwise(words):
        words += ["--resume", "auto"]
    if world_size == 1:
        return command(*words)
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        return command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", world_size, *words)
    return "start all processes again as before, with --resume auto"
