"""A run's folder of checkpoints: what is kept, under which names, and which one a resumed run takes.

    checkpoint-<step>.pth         the last `keep` of them
    checkpoint-epoch<n>.pth       milestones, after n complete epochs; never removed
    checkpoint-best.pth           the best so far by the caller's measure
    checkpoint.pth                the newest, under the name that the authors' scripts expect

The names are hard links to one file where the file system has them, so a checkpoint is written, and takes space, once.
"""

import logging
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import torch

from util.errors import RunError, unreadable_is_user_error
from util.weights.file import (
    CheckpointError,
    read_checkpoint,
    refuse_what_is_not_plain,
    saved_at,
    sync_folder,
    temporary_path,
    write_checkpoint,
)

logger = logging.getLogger(__name__)

TOLERATED_FAILURES = 3  # saves in a row that may fail (a full disk, a network file system away) before the run ends


class SaveError(RunError):
    """Checkpoints could not be saved too often in a row."""


# Where a run stood: keys, types and lowest values. The last epoch before the first complete one is -1.
POSITION = (
    ("epoch", (int,), -1),
    ("step", (int,), 0),
    ("step_in_epoch", (int,), 0),
    ("epoch_loss", (int, float), float("-inf")),
    ("best", (int, float, type(None)), float("-inf")),
    ("best_acc1", (int, float, type(None)), float("-inf")),
)

STEP_NAME = re.compile(r"checkpoint-\d+\.pth")
LASTING_NAME = re.compile(r"checkpoint-(best|epoch\d+)\.pth")
TEMPORARY_NAME = re.compile(r"\.checkpoint.*\.pth\..+\.\d+\.tmp")  # see temporary_path


class CheckpointFolder:
    """Saves and finds the checkpoints of one run. For one process of a run: rank 0, which has taken the folder.

    Saving copies the tensors to the CPU and returns; a thread writes the copy, one at a time. The copy's memory is kept
    for the next one, since getting new memory would take longer than copying. Saving needs no other memory: the writer
    passes on the copy's own bytes. From a GPU, the copy is in page-locked memory, where PyTorch rounds each tensor up
    to a power of two: 1.5 GB in all for base and AdamW, 4.2 for large, 9.4 for huge. The folder is intact at any time:
    each name appears by an atomic rename after its content is on the disk, and older files go last.

    Args:
        output_dir: the folder, made if need be.
        keep: how many step checkpoints to keep, at least 1.

    Raises:
        UserError: the folder cannot be made or tidied. (`take_folders` has checked that it can be written to.)
    """

    def __init__(self, output_dir: str | os.PathLike, keep: int = 3):
        self.folder = Path(output_dir)
        self.keep = keep
        self.failures = 0  # in a row
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._copied: dict[str, Any] | None = None  # what was saved last; its memory is reused
        self._unwritten: list[tuple[dict[str, Any], list[str]]] = []  # with the names that no later checkpoint gets
        with unreadable_is_user_error(f"--output_dir {output_dir} cannot be written to"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()

    # -- Saving ------------------------------------------------------------------------------------------------

    def save(self, checkpoint: dict[str, Any], *, milestone: bool = False, best: bool = False) -> None:
        """Save `checkpoint` as the newest, named by its 'step'; on request as a milestone and as the best.

        Returns once the tensors are copied; `wait()` before relying on the file. A write that fails is logged, leaves
        all earlier files as they were and is tolerated `TOLERATED_FAILURES` times in a row. A milestone, or what is
        still the best, is then kept in memory and written with the next save.

        Raises:
            CheckpointError: `checkpoint` holds something other than tensors and plain values.
            SaveError: the write before this one failed, once too often.
        """
        refuse_what_is_not_plain(checkpoint)
        self.wait()
        # The first name is written, the others are links to it. Whichever of them a crash leaves, a resumed run finds
        # the newest state, and no milestone is lost because the run went on from a step checkpoint.
        # ('epoch' is that of the last complete one, counted from 0, as in the authors' files.)
        names = [f"checkpoint-epoch{checkpoint['epoch'] + 1:04d}.pth"] if milestone else []
        names += ["checkpoint-best.pth"] if best else []
        names += [f"checkpoint-{checkpoint['step']:08d}.pth", "checkpoint.pth"]
        owed = [(kept, [name for name in its_names if name not in names]) for kept, its_names in self._unwritten]
        owed = [(kept, its_names) for kept, its_names in owed if its_names]
        reusable = None if any(kept is self._copied for kept, _ in owed) else self._copied
        self._copied = _copied_to_cpu(checkpoint, reusable)
        writes = [*owed, (self._copied, names)]
        self._thread = threading.Thread(target=self._write, args=(writes,), name="checkpoint writer")
        self._thread.start()

    def wait(self, final: bool = False) -> None:
        """Return when no write is under way.

        Args:
            final: nothing is to be saved after this, so a failure is raised at once.

        Raises:
            SaveError: the last write failed, and it was the final one or once too often.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return
        if not isinstance(error, OSError):
            raise error
        saved = any(self.folder.glob("checkpoint*.pth"))
        left = "Earlier checkpoints are intact" if saved else "No checkpoint has been saved yet"
        message = (
            f"checkpoint could not be saved: {error} (failure {self.failures} in a row; {TOLERATED_FAILURES} are "
            f"tolerated, but not at the run's end). {left}"
        )
        if final or self.failures > TOLERATED_FAILURES:
            raise SaveError(f"the {message}: fix the disk and continue with --resume auto") from error
        logger.error("a %s. Training goes on", message)

    def _write(self, writes: list[tuple[dict[str, Any], list[str]]]) -> None:
        """Write checkpoints, each under its names, one after another."""
        self._unwritten = [(checkpoint, list(filter(LASTING_NAME.fullmatch, names))) for checkpoint, names in writes]
        try:
            for checkpoint, names in writes:
                latest = max((moment for moment, _ in self._by_age()), default=0)
                written = self.folder / names[0]
                write_checkpoint(written, checkpoint, later_than=latest)
                for name in names[1:]:
                    _give_name(written, self.folder / name)
                del self._unwritten[0]
            self._prune()
            self.failures = 0
        except Exception as error:  # raised in the caller's thread by wait()
            self.failures += 1
            self._error = error

    def _prune(self) -> None:
        steps = [path for _, path in self._by_age() if STEP_NAME.fullmatch(path.name)]
        for path in steps[: -self.keep]:
            path.unlink()

    def _by_age(self) -> list[tuple[int, Path]]:
        """All checkpoints of the folder with the moment they were saved, oldest first.

        By that moment, not by step: after going back to an older checkpoint, the new steps are the run's.
        """
        found = [(saved_at(path), path) for path in self.folder.glob("checkpoint*.pth")]
        return sorted(found, key=lambda entry: (entry[0], STEP_NAME.fullmatch(entry[1].name) is not None))

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of runs that died while saving: the folder is ours, so nobody is writing them."""
        for path in self.folder.glob(".checkpoint*.tmp"):
            if TEMPORARY_NAME.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)
                logger.info("removed %s, left by a run that ended while saving", path)

    # -- Resuming ----------------------------------------------------------------------------------------------

    def resume(self, spec: str) -> tuple[Path, dict[str, Any]] | None:
        """The file and the checkpoint to go on from, or None to start from scratch.

        Args:
            spec: '' starts from scratch; 'auto' takes the newest intact checkpoint of the folder, if any; a
                path takes that file.

        Raises:
            CheckpointError: the path is missing, damaged or not a run's checkpoint; or 'auto' finds only damaged ones.
        """
        if not spec:
            return None
        if spec == "auto":
            return self.newest_valid()
        return Path(spec), read_run_checkpoint(spec)

    def newest_valid(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest intact checkpoint of the folder, or None if there is none at all.

        Files that are skipped are named in the log, with the reason.

        Raises:
            CheckpointError: there are checkpoints, but none is intact. Starting from scratch would overwrite a run.
        """
        skipped: dict[Path, str] = {}  # and why
        for _, path in reversed(self._by_age()):
            if any(map(path.samefile, skipped)):
                continue  # another name of one of them
            try:
                checkpoint = read_run_checkpoint(path)
            except CheckpointError as error:
                logger.warning("not resuming from %s: %s", path.name, error)
                skipped[path] = str(error)
                continue
            logger.info("resuming from %s%s", path, f", after skipping {len(skipped)} newer" if skipped else "")
            return path, checkpoint
        if skipped:
            raise CheckpointError(
                f"{self.folder} has checkpoints, but none to resume from: {'; '.join(skipped.values())}. "
                "Move them away to start from scratch, or give another --output_dir"
            )
        logger.info("no checkpoint in %s: starting from scratch", self.folder)
        return None


def read_run_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """`read_checkpoint` for a file to resume from, with weights, optimizer and epoch. Tensors stay in the file.

    Raises:
        CheckpointError: as `read_checkpoint`, or the file holds weights without the state of a run.
    """
    checkpoint = read_checkpoint(path, mmap=True)
    absent = [key for key in ("model", "optimizer", "epoch") if key not in checkpoint]
    if absent:
        raise CheckpointError(
            f"{path} holds no run to resume (no {', '.join(absent)} in it): to start from its weights, use --finetune"
        )
    for key, kinds, lowest in POSITION:
        value = checkpoint.get(key, 0)
        if type(value) not in kinds or not (value is None or value >= lowest):
            raise CheckpointError(f"{path} holds no run to resume: its {key} is {str(value)[:100]!r}")
    if not isinstance(checkpoint.get("args", {}), dict):
        raise CheckpointError(f"{path} holds no run to resume: its args are a {type(checkpoint['args']).__name__}")
    return checkpoint


def _copied_to_cpu(value: Any, earlier: Any = None) -> Any:
    """A copy of `value` on the CPU that training cannot change, in the memory of an `earlier` one if that fits."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        fits = isinstance(earlier, torch.Tensor) and (earlier.shape, earlier.dtype) == (value.shape, value.dtype)
        copy = earlier if fits else torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return copy.copy_(value)
    if isinstance(value, dict):
        earlier = earlier if isinstance(earlier, dict) else {}
        return {key: _copied_to_cpu(item, earlier.get(key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        earlier = earlier if type(earlier) is type(value) and len(earlier) == len(value) else [None] * len(value)
        return type(value)(_copied_to_cpu(item, old) for item, old in zip(value, earlier))
    return value


def _give_name(existing: Path, name: Path) -> None:
    """Give the content of `existing` one more name, atomically: by a hard link, or a copy where there are none."""
    temporary = temporary_path(name)
    try:
        try:
            os.link(existing, temporary)
        except OSError:
            shutil.copyfile(existing, temporary)
            with open(temporary, "rb") as copy:
                os.fsync(copy.fileno())
        os.replace(temporary, name)
        sync_folder(name.parent)
    finally:
        temporary.unlink(missing_ok=True)
