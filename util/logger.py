"""What a run says and writes: console lines, log.txt, steps.jsonl and TensorBoard.

`log.txt` has one JSON line per epoch (as the authors' script writes it), `steps.jsonl` one per optimizer step, both
written by rank 0 alone. A resumed run first drops what lies after the point where it resumes, so that every epoch and
step stands there once.
"""

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from util import distributed

logger = logging.getLogger(__name__)


def setup_logging() -> None:
    """Send the logs of rank 0 to stdout; the other ranks report errors only, with their rank."""

    def from_this_rank(record: logging.LogRecord) -> bool:
        rank = distributed.get_rank()  # asked for every record, since the rank becomes known on the way
        record.rank = f"[rank {rank}] " if rank else ""
        return rank == 0 or record.levelno >= logging.ERROR

    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(from_this_rank)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(rank)s%(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)


def describe_environment() -> list[str]:
    """Versions, commit and command line: what is needed to repeat the run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({torch.get_num_threads()} threads)"
    return [
        f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"timm {timm.__version__}, numpy {np.__version__}, {device}",
        f"commit {git_commit()}",
        f"command: {shlex.join(sys.argv)}",
    ]


def git_commit() -> str:
    """The commit of this code, marked when files were changed since."""
    root = Path(__file__).resolve().parent.parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (git is not there)"
    return result.stdout.strip() or "unknown (not a git checkout)"


class RunLog:
    """Files of a run's progress; does nothing on ranks other than 0.

    Args:
        output_dir: folder of log.txt and steps.jsonl.
        log_dir: folder of TensorBoard's files.
        resume_step: optimizer steps done so far; what the files say of later ones is dropped.
        resume_epoch: epochs complete so far, likewise.
        resume_x: TensorBoard's axis value (1000 per epoch) from which on events are dropped.
    """

    def __init__(self, output_dir: str, log_dir: str, resume_step: int, resume_epoch: int, resume_x: int):
        self.enabled = distributed.is_main_process()
        if not self.enabled:
            return
        self.epochs_file = Path(output_dir) / "log.txt"
        self.steps_file = Path(output_dir) / "steps.jsonl"
        keep_lines(self.epochs_file, lambda record: record.get("epoch", -1) < resume_epoch)
        keep_lines(self.steps_file, lambda record: record.get("step", 0) <= resume_step)
        # +1: the axis value of the last finished step itself stays.
        self.tensorboard = SummaryWriter(log_dir, purge_step=resume_x + 1 if resume_step else None)

    def steps(self, records: list[dict], epoch_1000x: int, tags: dict[str, float]) -> None:
        """Append optimizer steps to steps.jsonl and the last values to TensorBoard."""
        if not self.enabled:
            return
        append_lines(self.steps_file, records)
        for tag, value in tags.items():
            self.tensorboard.add_scalar(tag, value, epoch_1000x)

    def epoch(self, record: dict, epoch_1000x: int) -> None:
        """Append one epoch to log.txt and its numbers to TensorBoard."""
        if not self.enabled:
            return
        append_lines(self.epochs_file, [record])
        for tag, value in record.items():
            if tag.startswith("test_"):
                self.tensorboard.add_scalar(f"perf/{tag}", value, epoch_1000x)
        self.tensorboard.flush()

    def picture(self, tag: str, image: Image.Image, epoch_1000x: int) -> None:
        """Show a picture in TensorBoard."""
        if self.enabled:
            self.tensorboard.add_image(tag, np.asarray(image), epoch_1000x, dataformats="HWC")

    def close(self) -> None:
        if self.enabled:
            self.tensorboard.close()


def append_lines(path: Path, records: list[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def keep_lines(path: Path, wanted) -> None:
    """Rewrite a file of JSON lines with those that are `wanted`; a last line that a kill cut short goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if wanted(record):
            kept.append(json.dumps(record) + "\n")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
