"""What the programs of tasks on dense features share: their settings, the epochs of training, what is evaluated."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from util.dense.config import DenseConfig, choose_recipe, with_task_settings
from util.run.config import resolve
from util.run.launch import Launch
from util.run.once_per_node import read_checkpoint_together
from util.run.session import Run, Start
from util.run.state import program_of
from util.weights.file import CheckpointError
from util.weights.settings import weight_settings

C = TypeVar("C", bound=DenseConfig)


def settings_to_train(start: Start) -> DenseConfig:
    """The configuration of a run; the task's settings are those of the run to resume, never of --finetune's weights,
    of which the encoder alone is loaded."""
    return with_task_settings(start.resolve(choose_recipe), (start.checkpoint or {}).get("args", {}))


def open_to_evaluate(given: C, launch: Launch) -> tuple[C, dict[str, Any], str]:
    """For --eval: the configuration, the checkpoint of --finetune or --resume, and what to call it.

    Raises:
        CheckpointError: it is missing, damaged, or of another program.
    """
    source = given.finetune or given.resume
    checkpoint = read_checkpoint_together(source, None)
    if program_of(checkpoint) != given.PROGRAM:
        raise CheckpointError(f"{source} is no model of {given.PROGRAM}: train one with --finetune {source}")
    recorded, known = checkpoint["args"], {name: value for name, value in given.as_dict().items() if value is not None}
    settings = weight_settings(recorded, source, known)
    return with_task_settings(resolve(given, launch, settings, given.DEFAULTS), recorded), checkpoint, source


def train_and_evaluate(
    run: Run, train_one_epoch: Callable[[Run], float], evaluate: Callable[[], dict[str, float]], best_by: str
) -> dict[str, float]:
    """All epochs, with evaluations where they are due; returns what the last one measured.

    Args:
        train_one_epoch: returns the last learning rate.
        evaluate: called on all ranks, and gives the same on all.
        best_by: the measure of which more is better.
    """
    config, progress = run.config, run.state.progress
    measured = None  # after the last epoch
    while progress.epoch < config.epochs:
        start = time.time()
        record, best = {"train_lr": train_one_epoch(run)}, False
        if config.evaluates_after(progress.epoch):
            measured = evaluate()
            record |= {f"test_{name}": value for name, value in measured.items()}
            best = progress.is_best(measured[best_by])
        run.finish_epoch({**record, "seconds": time.time() - start}, best)
    if measured is None:  # resumed when all was done
        measured = evaluate()
    if run.folder is not None:
        run.folder.wait(final=True)  # what the result is said to be of
    return measured
