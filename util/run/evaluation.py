"""Epochs of training, each followed by an evaluation if one is due: what all programs that train with labels share."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from util.errors import UserError
from util.run.flags import AT_LEAST_1, Config, free
from util.run.session import Run


@dataclass(frozen=True)
class EvaluationFlags(Config):
    TITLE: ClassVar[str] = "evaluation"

    eval_every: int = free(1, "evaluate every N epochs, and after the last one", "EPOCHS", AT_LEAST_1)
    eval: bool = free(False, "only evaluate the weights of --finetune or --resume")

    def __post_init__(self) -> None:
        super().__post_init__()
        sources = [name for name in ("finetune", "resume") if getattr(self, name) not in ("", "auto")]
        if self.eval and len(sources) != 1:
            raise UserError(
                "--eval needs the weights to evaluate: --finetune WEIGHTS (or --resume PATH)"
                if not sources
                else f"--eval evaluates one file: give --finetune {self.finetune} or --resume {self.resume}, not both"
            )


def train_and_evaluate(
    run: Run, train_one_epoch: Callable[[Run], float], evaluate: Callable[[], dict[str, float]], best_by: str
) -> dict[str, float]:
    """All epochs, with evaluations where they are due; returns what the last one measured.

    Args:
        train_one_epoch: returns the last learning rate.
        evaluate: called on all ranks, and returns the same on all.
        best_by: the measure that decides which is best; higher is better.
    """
    config, progress = run.config, run.state.progress
    measured = None  # after the last epoch
    while progress.epoch < config.epochs:
        start = time.time()
        record, best = {"train_lr": train_one_epoch(run)}, False
        if run.is_due(config.eval_every):
            with run.measuring():
                measured = evaluate()
            best = progress.is_best(measured[best_by])
            record |= {f"test_{name}": value for name, value in measured.items()} | {f"best_{best_by}": progress.best}
        run.finish_epoch({**record, "seconds": time.time() - start}, best)
    if measured is None:  # resumed when all was done
        measured = evaluate()
    if run.folder is not None:
        run.folder.wait(final=True)  # the line with the result names its file
    return measured
