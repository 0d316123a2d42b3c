"""What a run logs and writes: console lines, log.txt, steps.jsonl, times.jsonl and TensorBoard.

`log.txt` has one JSON line per epoch (as the authors' script writes it), `steps.jsonl` one per optimizer step, both
written only by rank 0. A resumed run first drops what lies after the point where it resumes, so that every epoch and
step is there once. `times.jsonl` has what depends on the clock, and resuming drops nothing of it: one line for
each start of the run, for the steps of each log line, and for each epoch's end, all with their time, epoch and step.
`bad_images.txt` lists unreadable images. A run that starts from its first step empties all files, so the
time that it lost before its first checkpoint is not counted. `util.run.history` reads it all.
"""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter

from util.data.datasets import ImageDataset
from util.errors import UserError
from util.run import distributed
from util.run.failures import process_age
from util.run.progress import Bar

logger = logging.getLogger(__name__)

RESULTS = ("test_", "knn_", "probe_", "rankme")  # prefixes of the names of measures in log.txt


class LinesAboveBars(logging.StreamHandler):
    """Writes to a terminal that may show progress bars of this process."""

    def __init__(self, stream: TextIO):
        super().__init__(stream)
        self.process = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        if os.getpid() == self.process:
            with Bar.external_write_mode(self.stream):
                super().emit(record)
        else:  # a data-loading process, which knows the bar only as of its fork: erase what is drawn of it
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            super().emit(record)


def setup_logging() -> None:
    """Send the logs of rank 0 to stdout; the other ranks report errors only, with their rank."""

    def from_this_rank(record: logging.LogRecord) -> bool:
        rank = distributed.get_rank()  # asked for every record, since the rank becomes known only later
        record.rank = f"[rank {rank}] " if rank else ""
        return rank == 0 or record.levelno >= logging.ERROR

    if hasattr(sys.stdout, "reconfigure"):  # names of files may be bytes that no encoding has
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = (LinesAboveBars if sys.stderr.isatty() else logging.StreamHandler)(sys.stdout)
    handler.addFilter(from_this_rank)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(rank)s%(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    # They log every step; warnings of the last two are about their own optimisation, and exports are compared anyway.
    for name, level in (("timm", logging.WARNING), ("onnxscript", logging.ERROR), ("onnx_ir", logging.ERROR)):
        logging.getLogger(name).setLevel(level)


class RunLog:
    """Files of a run's progress; does nothing on ranks other than 0. Files that cannot be written do not end the run.

    Args:
        output_dir: folder of all but TensorBoard's files.
        log_dir: folder of TensorBoard's files.
        resume_step: optimizer steps done so far; what the files hold of later ones is dropped.
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
        self.times_file = LinesFile(self.output_dir / "times.jsonl", lambda line: resume_step > 0)
        if not resume_step:
            (self.output_dir / "bad_images.txt").unlink(missing_ok=True)
        self._note_time(process_age(), start=True, epoch=resume_x / 1000, step=resume_step)
        # +1: the values of the last finished step itself stay; without one, those of an earlier run go too.
        self.tensorboard = EventsFile(log_dir, resume_x + 1 if resume_step else 0)

    def steps(self, records: list[dict], epoch_1000x: int, scalars: dict[str, float]) -> None:
        """Append optimizer steps to steps.jsonl, and the scalars of `StepMeter.flush` to the other files."""
        if not self.enabled:
            return
        self.steps_file.append(records)
        seconds = scalars["seconds_per_step"] * len(records)
        self._note_time(
            epoch=epoch_1000x / 1000,
            step=records[-1]["step"],
            steps=len(records),
            images=round(scalars["images_per_second"] * seconds),
            seconds=round(seconds, 3),
            data_wait=round(scalars["data_wait_share"] * seconds, 3),
        )
        tags = {f"train/{name}": scalars[name] for name in ("loss", "lr", "grad_norm")}
        speeds = ("images_per_second", "data_wait_share", "memory_mb", "mfu")
        tags |= {f"speed/{name}": scalars[name] for name in speeds if name in scalars}
        if not self.steps_file.waiting:  # else the disk is full
            self.tensorboard.scalars(tags, epoch_1000x)

    def epoch(self, record: dict, epoch_1000x: int) -> None:
        """Append one epoch to log.txt and its results to TensorBoard."""
        if not self.enabled:
            return
        self.epochs_file.append([record])
        self._note_time(epoch=record["epoch"] + 1, step=record["step"])
        results = {f"perf/{tag}": value for tag, value in record.items() if tag.startswith(RESULTS)}
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
            logger.info("picture: %s", path)
        self.tensorboard.picture(tag, image, epoch_1000x)

    def bad_images(self, dataset: Dataset) -> None:
        """List the images that any rank has skipped in bad_images.txt; all ranks call this together."""
        if not isinstance(dataset, ImageDataset) or not dataset.skip_bad:
            return
        found = {number for numbers in distributed.gather_objects(dataset.bad_images()) for number in numbers}
        if not self.enabled or not found:
            return
        paths = [dataset.path_of(number) for number in sorted(found)]
        path = self.output_dir / "bad_images.txt"
        with going_on_without(f"{path} could not be written"):
            listed = set(read_list(path))
            if new := [name for name in paths if name not in listed]:
                with open(path, "a", encoding="utf-8", errors="surrogateescape") as file:  # names as on the disk
                    file.writelines(f"{name}\n" for name in new)

    def close(self) -> None:
        """Write what is left."""
        if self.enabled:
            for file in (self.epochs_file, self.steps_file, self.times_file):
                file.append([])
            self.tensorboard.close()

    def _note_time(self, ago: float = 0.0, **record: float) -> None:
        """Append to times.jsonl what happens now, or happened some seconds ago."""
        self.times_file.append([{"time": round(time.time() - ago, 3), **record}])


def read_records(path: Path) -> Iterator[dict]:
    """The records of a file of JSON lines, if there is one; what is not a record (a line cut short) is left out."""
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                yield record


def read_list(path: Path) -> list[str]:
    """The lines of a file; none if there is no file."""
    return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if path.exists() else []


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
        path: the file, which need not exist.
        wanted: which of the existing records stay. A last line that a kill cut short goes too.
    """

    def __init__(self, path: Path, wanted: Callable[[dict], bool]):
        self.path = path
        self.waiting = b""  # what is not in the file yet
        if path.exists():
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in read_records(path) if wanted(record)))
            os.replace(temporary, path)

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
        folder: where they are.
        purge: axis value from which TensorBoard is to forget the contents of earlier files in the folder.

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
                "PYTHONUTF8=1 if the name displays correctly elsewhere"
            ) from None
        self.writer: SummaryWriter | None = SummaryWriter(folder, purge_step=purge)

    def scalars(self, values: dict[str, float], x: int) -> None:
        self._write(lambda writer: [writer.add_scalar(tag, value, x) for tag, value in values.items()])

    def picture(self, tag: str, image: Image.Image, x: int) -> None:
        self._write(lambda writer: writer.add_image(tag, np.asarray(image), x, dataformats="HWC"))

    def close(self) -> None:
        self._write(SummaryWriter.close)

    def _write(self, action: Callable[[SummaryWriter], object]) -> None:
        """Do `action` and flush its values to the disk, so that they do not lag behind a checkpoint."""
        with going_on_without(f"TensorBoard's file in {self.folder} could not be written"):
            writer, self.writer = self.writer or SummaryWriter(self.folder), None
            action(writer)
            if writer.file_writer is not None:  # not closed
                writer.flush()
                self.writer = writer  # a writer that failed is of no more use: the next attempt opens a new file
