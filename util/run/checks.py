"""What is checked before a run begins, or goes on from a checkpoint."""

import json
import logging
import socket
from pathlib import Path
from typing import Any

from util.data.datasets import ImageDataset
from util.data.open_source import FOLDER_DATASETS, refuse_output_among_images
from util.data.sources import shared_with_training
from util.data.statistics import check_images, check_units
from util.errors import UserError
from util.run import distributed
from util.run.config import Config, ImageTrainingConfig, TrainingConfig, compare_recipes
from util.run.state import program_of
from util.weights.file import CheckpointError

logger = logging.getLogger(__name__)


def refuse_folders_of_images(given: TrainingConfig) -> None:
    """Raise a UserError if a run's folder would lie among its images, before it is made."""
    if isinstance(given, ImageTrainingConfig) and given.dataset in FOLDER_DATASETS:
        refuse_output_among_images(given.output_dir, "--output_dir", given.data_path)


def refuse_folders_of_other_runs(given: TrainingConfig) -> None:
    """Raise a UserError if a run starts in a folder that holds another one, or --log_dir holds another one's curves."""
    folder = Path(given.output_dir)
    continues = given.resume == "auto" or (given.resume and Path(given.resume).parent.resolve() == folder.resolve())
    if not continues and any(folder.glob("checkpoint*.pth")):
        raise UserError(
            f"{folder} holds a run already, which this one would replace: continue it with --resume auto, or give "
            "another --output_dir"
        )
    curves = Path(given.log_dir or folder).resolve()
    if curves == folder.resolve() or not any(curves.glob("events.out.tfevents.*")):
        return
    try:
        own = Path(json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]["log_dir"])
    except (OSError, ValueError, TypeError, KeyError):  # a first start
        own = folder
    if own.resolve() != curves:
        raise UserError(f"{given.log_dir} holds the curves of another run: give another --log_dir")


def refuse_another_programs_run(checkpoint: dict[str, Any], given: TrainingConfig) -> None:
    """Raise a CheckpointError if, say, fine-tuning would resume a pretraining run."""
    program = program_of(checkpoint)
    if program not in (None, given.PROGRAM):
        path = Path(given.output_dir) / "checkpoint.pth" if given.resume == "auto" else Path(given.resume)
        advice = "give another --output_dir"
        # Pretraining starts only from pretraining weights; what a detector learned fits no other program.
        if not given.PRETRAINS and program in ("main_pretrain.py", "main_finetune.py"):
            advice += f", and --finetune {path} to start a run of {given.PROGRAM} from its weights"
        raise CheckpointError(
            f"--resume {given.resume}: {path.parent} holds a run of {program}, which that program continues; {advice}"
        )


def check_recipe(checkpoint: dict[str, Any], config: TrainingConfig) -> None:
    """Compare the settings of a checkpoint with the run's: warn if it will not be identical, refuse another recipe.

    Raises:
        CheckpointError: the checkpoint was made with another model or recipe.
    """
    if "format" not in checkpoint:
        logger.warning(
            "the checkpoint was not written by this program: only settings that both programs know are compared"
        )
    errors, warnings = compare_recipes(checkpoint.get("args", {}), config.as_dict(), type(config))
    for warning in warnings:
        logger.warning("resuming with another setting: %s", warning)
    if errors and not config.resume_force:
        raise CheckpointError(
            f"--resume {config.resume}: the checkpoint was made with another model or recipe: {'; '.join(errors)}. "
            "Use the same settings, another --output_dir, or --resume_force"
        )
    for error in errors:
        logger.warning("resuming by --resume_force with another recipe: %s", error)


def check_data(checkpoint: dict[str, Any], data: dict[str, dict]) -> None:
    """Warn if the images are not those of the checkpoint, and say what that means."""
    recorded = checkpoint.get("data")
    for split, now in data.items():
        before = recorded.get(split) if isinstance(recorded, dict) else None
        if not isinstance(before, dict):
            continue
        before = now | before  # an older version recorded less
        if now.get("sizes", "").startswith(f"{before['names']}, "):  # for a tar only its size, in place of names
            before = now | {"images": before["images"]}
        if before == now:
            continue
        if before["images"] != now["images"]:
            change = f"{before['images']} -> {now['images']} images"
        elif before["names"] != now["names"]:
            change = f"{now['images']} images as before, but under other names"
        elif before["labels"] != now["labels"]:
            change = "the same images, but with other labels"
        else:
            change = "the same names, but other files: in a sample of them, sizes differ"
        if split == "train":
            meaning = (
                "the run goes on, but not as an uninterrupted one: from here its steps are made of these images, and "
                "an epoch has as many steps as there are images for"
            )
        else:
            meaning = (
                "accuracies before and after cannot be compared, so the best epoch so far may not be the best; with "
                "--val_share, some of these images may have been trained on"
            )
        logger.warning("the %s images are not those of the checkpoint: %s; %s", split, change, meaning)


def check_overlap(train: ImageDataset, val: ImageDataset) -> None:
    """Warn if images to evaluate on are training images too."""
    if distributed.is_main_process():
        shared, looked_at = shared_with_training(train.source, val.source)
        if shared:
            logger.warning(
                "%d of %d validation images%s are training images too: their accuracy says nothing about other images. "
                "python -m util.check_data names them, and copies under other names",
                shared, looked_at, "" if looked_at == len(val) else " that were looked at",
            )  # fmt: skip


def refuse_other_images_of_a_rank(dataset: ImageDataset, what: str) -> None:
    """Raise a UserError, on all ranks, if one has other images than rank 0: a node's own copy may be incomplete.

    Ranks share images out by their positions; so some would be read twice, others never, and no step would show it.
    """
    here = (len(dataset), dataset.source.fingerprint, dataset.source.sizes)
    (first, of_first), *others = distributed.gather_objects((socket.gethostname(), here))
    for rank, (node, images) in enumerate(others, 1):
        if images != of_first:
            raise UserError(
                f"{what}: rank {rank} on {node} finds {images[0]} images and rank 0 on {first} {of_first[0]}, not the "
                "same files by name and size: if nodes have copies of their own, complete them before the run starts"
            )


def check_statistics(config: Config, dataset: ImageDataset, what: str, training: bool = False) -> None:
    """Check a sample of the images, on rank 0 for all, before they are used; and let all be watched.

    All ranks must have the same images.

    Args:
        config: `mean`, `std`, `allow_odd_statistics`.
        what: which images these are, for messages.
        training: whether they are trained on; training then stops if too many are in another unit, else there is one
            warning (see `ImageDataset.watch`).

    Raises:
        UserError: they are not in the units of `config.mean` and `config.std`, or of each other, without
            `config.allow_odd_statistics`; or not the same on all ranks.
    """
    refuse_other_images_of_a_rank(dataset, what)
    found = ("", "")
    if distributed.is_main_process() and (images := dataset.sample()):
        found = check_units(images)
        if not found[0]:
            error, warning = check_images(images, config.mean, config.std)
            if training:
                advice = "Give these flags (or for trained weights, bring the images into the units of their training)"
            else:
                advice = "Bring them into the units of the images that were trained on, or if those are in these "
                advice += "units too, give these flags"
            found = (error and f"{error}. {advice}", "; ".join(filter(None, (found[1], warning))))
    error, warning = distributed.gather_objects(found)[0]
    if error and not config.allow_odd_statistics:
        raise UserError(f"{what}: {error}; --allow_odd_statistics continues all the same")
    if error or warning:
        logger.warning("%s: %s", what, error or warning)
    if not config.allow_odd_statistics:
        dataset.watch(config.mean, config.std, stop=training)
