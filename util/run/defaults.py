"""What a run does if no flag says: chosen once from the data and the machine, logged with the reason, and stored
with the run, so that resuming it does not choose again. The experiment scripts give every setting, so nothing is chosen
for them. util/README.md has the rules in a table; --num_workers, which every start chooses again, is util.run.config's.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from util.data.open_source import open_source
from util.data.survey import Survey, survey_images
from util.errors import unreadable_is_user_error
from util.run import distributed
from util.run.config import ImageTrainingConfig, effective_batch
from util.run.launch import Launch
from util.weights.settings import encoder_of

logger = logging.getLogger(__name__)

SMALL_MODEL = "mixmae_quickstart"
FINETUNING_MODEL, FINETUNING_BLR = "swin_base_w14", 5e-4
FEW_IMAGES, MANY_IMAGES = 2_000, 200_000
SMALL_SIDE = 40  # pixels
GPU_BATCH, CPU_BATCH, EVALUATION_BATCH = 128, 32, 64
STEPS_PER_EPOCH = 4
GPU_EPOCHS, CPU_STEPS = 400, 1_000
WARMUP_EPOCHS, FINETUNING_WARMUP_EPOCHS = 40, 5
SMALL_MODEL_LR = 2e-3
RECIPE_LR, RECIPE_BATCH = 1.2e-3, 2048


class Choices:
    """Known settings, and those that are chosen because they are not known."""

    def __init__(self, known: Mapping[str, Any]):
        self.settings = {name: value for name, value in known.items() if value is not None}
        self.chosen: dict[str, Any] = {}

    def choose(self, name: str, value: Any, reason: str) -> None:
        """Take `value` for what is not known yet, and log it with the reason."""
        if name not in self.settings:
            self.settings[name] = self.chosen[name] = value
            words = " ".join(map(str, value)) if isinstance(value, tuple) else value
            logger.info("not given, so chosen: --%s %s: %s", name, words, reason)

    def choose_batch(self, images: int, device: torch.device) -> None:
        usual, reason = (CPU_BATCH, "usual on a CPU") if device.type == "cpu" else (GPU_BATCH, "as in the recipes")
        most = images // (STEPS_PER_EPOCH * self.settings["accum_iter"] * self.settings["world_size"])
        if most < usual:
            usual, reason = most, f"an epoch of {images} images should have {STEPS_PER_EPOCH} steps"
        together = self.settings.get("mix_images", 2)
        if together > 2:
            reason += f", in multiples of {together}"
        self.choose("batch_size", max(together, usual // together * together), reason)

    def choose_warmup(self, most: int) -> None:
        tenth = round(self.settings["epochs"] / 10, 1)
        self.choose("warmup_epochs", min(most, tenth), "a tenth of the run" if tenth < most else "as in the recipes")


def choose_for_pretraining(known: Mapping[str, Any], survey: Survey, device: torch.device) -> Choices:
    """Everything that is not among the `known` settings (None: not known), by this module's rules."""
    choices = Choices(known)
    settings, side = choices.settings, survey.longest_side
    small = side is not None and side <= SMALL_SIDE
    if survey.in_chans is not None:
        choices.choose("in_chans", survey.in_chans, "what the image files have")
    if device.type == "cpu":
        choices.choose("model", SMALL_MODEL, "larger ones are slow on a CPU")
    elif survey.images < FEW_IMAGES:
        choices.choose("model", SMALL_MODEL, f"{survey.images} images are few")
    elif small:
        choices.choose("model", SMALL_MODEL, f"no image is larger than {side} pixels")
    elif survey.images < MANY_IMAGES:
        choices.choose("model", "mixmae_tiny", f"{survey.images} images are fewer than {MANY_IMAGES}")
    else:
        choices.choose("model", "mixmae_base", f"{survey.images} images")
    sizes = {"input_size", "patch_size", "window_size"}
    if choices.chosen.get("model") == SMALL_MODEL and not small and not sizes & settings.keys():
        choices.choose("input_size", (64, 64), "four times the pixels of the model's own")
        choices.choose("patch_size", 2, "as many tokens as the model's own")
    choices.choose_batch(survey.images, device)
    batch = effective_batch(settings)
    if device.type == "cpu":
        steps_per_epoch = max(1, survey.images // batch)
        epochs = min(GPU_EPOCHS, math.ceil(CPU_STEPS / steps_per_epoch))
        choices.choose("epochs", epochs, f"{epochs * steps_per_epoch} optimizer steps")
    else:
        choices.choose("epochs", GPU_EPOCHS, "the authors' default")
    choices.choose_warmup(WARMUP_EPOCHS)
    if "blr" not in settings:
        if settings["model"] == SMALL_MODEL:
            choices.choose("lr", SMALL_MODEL_LR, f"suits {SMALL_MODEL}")
        else:
            lr = float(f"{RECIPE_LR * math.sqrt(batch / RECIPE_BATCH):.3g}")
            choices.choose("lr", lr, f"{RECIPE_LR:g} x sqrt({batch} / {RECIPE_BATCH}), by the recipe's batch")
    return choices


def choose_for_finetuning(known: Mapping[str, Any], survey: Survey, device: torch.device) -> Choices:
    """Likewise for fine-tuning."""
    choices = Choices(known)
    if survey.in_chans is not None:
        choices.choose("in_chans", survey.in_chans, "what the image files have")
    choices.choose_batch(survey.images, device)
    choices.choose_warmup(FINETUNING_WARMUP_EPOCHS)
    choices.choose("model", FINETUNING_MODEL, "the paper's")
    if "lr" not in choices.settings and "blr" not in choices.settings:
        encoder = encoder_of(choices.settings["model"])
        if encoder == encoder_of(SMALL_MODEL):
            choices.choose("lr", SMALL_MODEL_LR, f"suits {encoder}")
        else:
            choices.choose("blr", FINETUNING_BLR, "as in the recipes")
    return choices


def look_and_choose(
    rules: Callable[[Mapping[str, Any], Survey, torch.device], Choices],
    given: ImageTrainingConfig,
    launch: Launch,
    known: Mapping[str, Any],
) -> dict[str, Any]:
    """What `rules` choose, on rank 0 for all ranks, which must call this together. The images are looked at only
    if anything is left to choose.

    Raises:
        UserError: the images of --data_path cannot be found.
    """
    known = {**known, "world_size": launch.world_size}
    rate = "lr" if known.get("blr") is None else "blr"
    needed = ("in_chans", "model", "batch_size", "epochs", "warmup_epochs", rate)
    if all(known.get(name) is not None for name in needed):
        return {}

    def look() -> Survey:
        with unreadable_is_user_error(f"cannot read --data_path {given.data_path}"):
            source = open_source(replace(given, in_chans=known.get("in_chans") or 3), "train", require_labels=False)
        return survey_images(source, given.reader, known.get("in_chans"))

    return rules(known, distributed.on_main_process(look), launch.device).chosen


pretraining_defaults = partial(look_and_choose, choose_for_pretraining)
finetuning_defaults = partial(look_and_choose, choose_for_finetuning)
