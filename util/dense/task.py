"""What the programs of tasks on dense features share: their settings, and the weights that are evaluated."""

from typing import Any, TypeVar

from util.dense.config import DenseConfig, choose_recipe, with_task_settings
from util.run.config import resolve
from util.run.launch import Launch
from util.run.once_per_node import read_checkpoint_together
from util.run.session import Start
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
