"""What a run says and writes: console lines, log.txt, steps.jsonl and TensorBoard.

`log.txt` has one JSON line per epoch (as the authors' script writes it), `steps.jsonl` one per optimizer step, both
written by rank 0 alone. A resumed run first drops what lies after the point where it resumes, so that every epoch and
step stands there once.
"""

import contextlib
import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from util.errors import UserError
from util.run import distributed

logger = logging.getLogger(__name__)


def setup_logging() -> None:
    """Send the logs of rank 0 to stdout; the other ranks report errors only, with their rank."""

    def from_this_rank(record: logging.LogRecord) -> bool:
        rank = distributed.get_rank()  # asked for every record, since the rank becomes known on the way
        record.rank = f"[rank {rank}] " if rank else ""
        return rank == 0 or record.levelno >= logging.ERROR

    if hasattr(sys.stdout, "reconfigure"):  # names of files may be bytes that no encoding has
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(from_this_rank)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(rank)s%(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)


def describe_environment(device: torch.device) -> dict[str, str]:
    """Versions, machine, commit and command line: what is needed to repeat the run."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"CPU ({torch.get_num_threads()} threads)"
    modules = {"torch": torch, "torchvision": torchvision, "timm": timm, "numpy": np}
    versions = [f"{name} {module.__version__}" for name, module in modules.items()]
    return {
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "device": machine,
        "commit": git_commit(),
        "command": shlex.join(sys.argv),
    }


def log_environment(device: torch.device) -> None:
    environment = describe_environment(device)
    logger.info("%s, %s", environment["versions"], environment["device"])
    logger.info("commit %s", environment["commit"])
    logger.info("command: %s", environment["command"])


def git_commit() -> str:
    """The commit of this code, marked when files were changed since."""
    root = Path(__file__).resolve().parents[2]
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
    """Files of a run's progress; does nothing on ranks other than 0. Files that cannot be written end no run.

    Args:
        output_dir: folder of log.txt, steps.jsonl and pictures.
        log_dir: folder of TensorBoard's files.
        resume_step: optimizer steps done so far; what the files say of later ones is dropped.
        resume_epoch: epochs complete so far, likewise.
        resume_x: TensorBoard's axis value (1000 per epoch) after which events are dropped.

    Raises:
        OSError: the folders cannot be written to now, before training.
    """

    def __init__(self, output_dir: str, log_dir: str, resume_step: int, resume_epoch: int, resume_x: int):
        self.enabled = distributed.is_main_process()
        if not self.enabled:
            return
        self.output_dir = Path(output_dir)
        self.epochs_file = LinesFile(self.output_dir / "log.txt", lambda line: line.get("epoch", -1) < resume_epoch)
        self.steps_file = LinesFile(self.output_dir / "steps.jsonl", lambda line: line.get("step", 0) <= resume_step)
        # +1: the values of the last finished step itself stay; without one, those of an earlier run go too.
        self.tensorboard = EventsFile(log_dir, resume_x + 1 if resume_step else 0)

    def steps(self, records: list[dict], epoch_1000x: int, tags: dict[str, float]) -> None:
        """Append optimizer steps to steps.jsonl and the last values to TensorBoard."""
        if not self.enabled:
            return
        self.steps_file.append(records)
        if not self.steps_file.waiting:  # else the disk is full
            self.tensorboard.scalars(tags, epoch_1000x)

    def epoch(self, record: dict, epoch_1000x: int) -> None:
        """Append one epoch to log.txt and its results to TensorBoard."""
        if not self.enabled:
            return
        self.epochs_file.append([record])
        results = {
            f"perf/{tag}": value
            for tag, value in record.items()
            if tag.startswith(("test_", "knn_", "probe_", "rankme"))
        }
        if not self.epochs_file.waiting:
            self.tensorboard.scalars(results, epoch_1000x)

    def picture(self, tag: str, image: Image.Image, name: str, epoch_1000x: int) -> None:
        """Write a picture to <output_dir>/<tag>/<name>, and show it in TensorBoard."""
        if not self.enabled:
            return
        path = self.output_dir / tag / name
        with going_on_without(f"{path} could not be written"):
            path.parent.mkdir(exist_ok=True)
            image.save(path)
        self.tensorboard.picture(tag, image, epoch_1000x)

    def close(self) -> None:
        """Write what is left."""
        if self.enabled:
            self.epochs_file.append([])
            self.steps_file.append([])
            self.tensorboard.close()


@contextlib.contextmanager
def going_on_without(what: str) -> Iterator[None]:
    """Report a failing write instead of raising it: logs are no reason to end a run."""
    try:
        yield
    except OSError as error:
        logger.error("%s: %s. Training goes on", what, error)


def without_non_finite(record: dict) -> dict:
    """A record with None for numbers that are not finite, which JSON has no names for."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


class LinesFile:
    """A file of JSON lines, each written once.

    Lines that a full disk refuses are kept, and written with the next ones.

    Args:
        path: the file; there or not.
        wanted: which of the records that are there stay. A last line that a kill cut short goes too.
    """

    def __init__(self, path: Path, wanted: Callable[[dict], bool]):
        self.path = path
        self.waiting = b""  # what is not in the file yet
        if path.exists():
            self._keep(wanted)

    def _keep(self, wanted: Callable[[dict], bool]) -> None:
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and wanted(record):
                kept.append(line + "\n")
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def append(self, records: list[dict]) -> None:
        """Write `records`, after those that could not be written before."""
        self.waiting += "".join(json.dumps(without_non_finite(record)) + "\n" for record in records).encode()
        with going_on_without(f"{self.path} could not be written; its lines are kept for the next attempt"):
            with open(self.path, "ab", buffering=0) as file:  # unbuffered, to know exactly how much went in
                while self.waiting:
                    self.waiting = self.waiting[file.write(self.waiting) :]


class EventsFile:
    """TensorBoard's files of a run. Values that a full disk refuses are lost here; steps.jsonl has them too.

    Args:
        folder: where they lie.
        purge: axis value from which on TensorBoard shall forget what earlier files in the folder say.

    Raises:
        UserError: TensorBoard cannot write to a folder of that name.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: str, purge: int):
        self.folder = folder
        try:
            str(folder).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"TensorBoard cannot write to {folder!r}, whose name is not UTF-8 here: give another --log_dir, or set "
                "PYTHONUTF8=1 if the name is shown well elsewhere"
            ) from None
        self.writer: SummaryWriter | None = SummaryWriter(folder, purge_step=purge)

    def scalars(self, values: dict[str, float], x: int) -> None:
        def add(writer: SummaryWriter) -> None:
            for tag, value in values.items():
                writer.add_scalar(tag, value, x)

        self._write(add)

    def picture(self, tag: str, image: Image.Image, x: int) -> None:
        self._write(lambda writer: writer.add_image(tag, np.asarray(image), x, dataformats="HWC"))

    def close(self) -> None:
        self._write(SummaryWriter.close)

    def _write(self, action: Callable[[SummaryWriter], None]) -> None:
        """Do `action` and bring its values to the disk, so that they do not lag behind a checkpoint."""
        with going_on_without(f"TensorBoard's file in {self.folder} could not be written"):
            writer, self.writer = self.writer or SummaryWriter(self.folder), None
            action(writer)
            if writer.file_writer is not None:  # not closed
                writer.flush()
                self.writer = writer  # a writer that failed is of no more use: the next attempt opens a new file
