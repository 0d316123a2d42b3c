"""How long pretraining and fine-tuning would take on GPUs, calculated from the models' operations; needs no GPU.

python -m util.cost
python -m util.cost --model mixmae_base --gpus 8 --images_per_second 2500
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import timm
import torch

from util.errors import UserError
from util.run.failures import user_errors
from util.run.flags import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, SHARE, Config, flag, get_parser, given_flags
from util.run.metrics import count_work, training_operations
from util.weights.settings import ENCODERS, resolve_model_name

ASSUMED_UTILISATION = 0.16  # what pretraining of base reached on an H100, see tests/README.md
IMAGENET = 1_281_167  # training images
FINETUNING_EPOCHS = {"mixmae_large": 50, "mixmae_huge": 50}  # of our recipes; for other models
USUAL_FINETUNING_EPOCHS = 100
# Photographs of about 110 KB that one core decodes and augments in a second, see tests/README.md.
PRETRAINING_IMAGES_PER_CORE, FINETUNING_IMAGES_PER_CORE = 450, 300


@dataclass(frozen=True)
class CostConfig(Config):
    TITLE: ClassVar[str] = "what to calculate"

    model: tuple[str, ...] = flag(
        ("mixmae_base", "mixmae_large", "mixmae_huge"), "pretraining models (default: base, large, huge)", "NAME"
    )
    gpus: tuple[int, ...] = flag(
        (1, 8, 16, 64),
        "numbers of GPUs (default: 1 8 16 64)",
        "N",
        (lambda numbers: min(numbers) >= 1, "must be at least 1 each"),
    )
    images: int = flag(IMAGENET, "training images", "N", AT_LEAST_1)
    epochs: int = flag(600, "epochs of pretraining", "N", AT_LEAST_1)
    finetune_epochs: int | None = flag(
        None, "epochs of fine-tuning; 0: none (default: as in the recipes, 100; for large and huge 50)", "N",
        NOT_NEGATIVE,
    )  # fmt: skip
    peak_tflops: float = flag(
        989.0, "the GPU's dense bf16 peak in TFLOP/s: H100 SXM 989, A100 312", "X", POSITIVE
    )  # fmt: skip
    utilisation: float | None = flag(
        None,
        f"share of the peak that training reaches (default: {ASSUMED_UTILISATION}, as base did on an H100)",
        "SHARE",
        SHARE,
    )
    images_per_second: float | None = flag(
        None,
        "measured speed of one GPU in pretraining, from a run's log, instead of --utilisation",
        "X",
        POSITIVE,
    )
    scaling_efficiency: float | None = flag(
        None, "speed of N GPUs, relative to N times that of one (default: 1, assumed)", "SHARE", SHARE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images_per_second is not None and self.utilisation is not None:
            raise UserError("--images_per_second is measured and --utilisation assumed: give one of them")
        if self.images_per_second is not None and len(self.model) > 1:
            raise UserError("--images_per_second was measured with one model: give that as --model")


@dataclass(frozen=True)
class Training:
    """One model's pretraining or fine-tuning on one GPU."""

    title: str
    operations: float  # on one image, forward and backward
    images: int  # of all epochs
    images_per_second: float
    images_per_core: int  # and second

    def on(self, gpus: int, efficiency: float) -> tuple[float, float, float, float, int]:
        """Images/s, hours, GPU-hours; and what each GPU must be fed: images/s, and cores to prepare them.

        Args:
            gpus: how many.
            efficiency: their speed relative to `gpus` times that of one; a single GPU has 1.
        """
        per_gpu = self.images_per_second * (efficiency if gpus > 1 else 1.0)
        hours = self.images / (per_gpu * gpus) / 3600
        return per_gpu * gpus, hours, hours * gpus, per_gpu, math.ceil(per_gpu / self.images_per_core)


def operations_of(model_name: str) -> float:
    """Operations of training on one image."""
    with torch.device("meta"):
        _, multiply_adds = count_work(timm.create_model(model_name))
    return training_operations(multiply_adds)


def utilisation_of(config: CostConfig, operations: float) -> float:
    """The share of the peak: assumed, or that of a measured speed with `operations` per image.

    Raises:
        UserError: a measured speed is beyond the peak.
    """
    if config.images_per_second is None:
        return config.utilisation or ASSUMED_UTILISATION
    utilisation = config.images_per_second * operations / (config.peak_tflops * 1e12)
    if utilisation > 1:
        raise UserError(
            f"--images_per_second {config.images_per_second:g} would take {utilisation:.1f} times --peak_tflops "
            f"{config.peak_tflops:g}: give the speed of one GPU, and that GPU's peak"
        )
    return utilisation


def trainings(config: CostConfig, model: str) -> Iterator[Training]:
    """Pretraining, and fine-tuning if there is any, of a pretraining model by its name."""
    name = resolve_model_name(model, pretraining=True)
    operations = operations_of(name)
    speed = utilisation_of(config, operations) * config.peak_tflops * 1e12  # operations per second
    images, epochs = config.images, config.epochs
    title = f"{name}, pretraining, {epochs} epochs"
    yield Training(title, operations, images * epochs, speed / operations, PRETRAINING_IMAGES_PER_CORE)
    epochs = config.finetune_epochs
    if epochs is None:
        epochs = FINETUNING_EPOCHS.get(name, USUAL_FINETUNING_EPOCHS)
    if epochs:
        operations = operations_of(ENCODERS[name])
        title = f"{ENCODERS[name]}, fine-tuning, {epochs} epochs"
        yield Training(title, operations, images * epochs, speed / operations, FINETUNING_IMAGES_PER_CORE)


def table(training: Training, config: CostConfig) -> str:
    """A title and a line for every number of GPUs."""
    lines = [
        f"{training.title} of {config.images:,} images, {training.operations / 1e9:.3g} GFLOP per image",
        "   GPUs    images/s       hours   GPU-hours   each GPU needs",
    ]
    for gpus in config.gpus:
        speed, hours, gpu_hours, per_gpu, cores = training.on(gpus, config.scaling_efficiency or 1.0)
        lines.append(
            f"{gpus:7,} {speed:11,.0f} {hours:11,.1f} {gpu_hours:11,.0f}   {per_gpu:,.0f} images/s, {cores} core(s)"
        )
    return "\n".join(lines)


def assumptions(config: CostConfig, utilisation: float) -> str:
    """What the numbers rest on, one line each."""
    share = f"{utilisation:.0%} of {config.peak_tflops:g} TFLOP/s (dense bf16)"
    if config.images_per_second is not None:
        speed = f"{config.images_per_second:g} images/s as measured, {share}; in fine-tuning the same share, assumed"
    else:
        origin = "as given" if config.utilisation else "which base reached on an H100 in pretraining"
        speed = f"{share}, {origin}: measure yours and give its log's images/s as --images_per_second"
    if config.scaling_efficiency is None:
        scaling = "N times as fast as one, assumed: give --scaling_efficiency if they are not"
    else:
        scaling = f"{config.scaling_efficiency:.0%} of N times as fast as one"
    return "\n".join(
        (
            f"One GPU: {speed}.",
            f"N GPUs: {scaling}.",
            "Operations: two per multiply-add, three forward passes per image (--grad_checkpointing: about four).",
            f"Cores: {PRETRAINING_IMAGES_PER_CORE} images/s each in pretraining, {FINETUNING_IMAGES_PER_CORE} in "
            "fine-tuning, for photographs of 110 KB; python -m util.check_data measures yours.",
            "Not counted: starting, evaluation, saving.",
        )
    )


def get_args_parser() -> argparse.ArgumentParser:
    description = "Calculate how long training would take on GPUs, at each model's own image size. Needs no GPU."
    return get_parser(CostConfig, description, "python -m util.cost")


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        config = given_flags(CostConfig, flags)
        planned = [training for model in config.model for training in trainings(config, model)]
        utilisation = utilisation_of(config, planned[0].operations)
        print("\n\n".join([*(table(training, config) for training in planned), assumptions(config, utilisation)]))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
