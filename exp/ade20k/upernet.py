"""Train or evaluate UPerNet, which segments images into classes, on a pretrained encoder.

Train on a folder of images and label maps (see util/data/label_maps.py):
    python -m exp.ade20k.upernet --finetune output_dir/checkpoint.pth --data_path /path/to/pairs --output_dir segmenter
Evaluate, and write label maps and pictures of what was found:
    python -m exp.ade20k.upernet --eval --finetune segmenter/checkpoint-best.pth --data_path /path/to/pairs \
        --predictions predictions
The recipe for ADE20K, on Slurm or here:
    sh exp/ade20k/finetune.sh partition 8 /path/to/ADEChallengeData2016
    sh exp/ade20k/finetune.sh local 8 /path/to/ADEChallengeData2016
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from exp.ade20k.engine_upernet import evaluate, predict, train_one_epoch
from util.data.datasets import build_loader
from util.data.label_maps import (
    RandomScaleAndCrop,
    Whole,
    build_segmentation_dataset,
    check_class_names,
    collate_pairs,
    find_layout,
    number_of_classes,
)
from util.data.samplers import EvalBatchSampler, TrainBatchSampler
from util.data.transforms import Normalize
from util.dense.config import DenseConfig, load_to_evaluate, open_to_evaluate, settings_to_train
from util.dense.encoder import DenseEncoder
from util.dense.upernet import UPerNet, segmentation_loss
from util.run import distributed
from util.run.checks import check_overlap, check_statistics
from util.run.config import TrainingConfig
from util.run.evaluation import train_and_evaluate
from util.run.failures import user_errors
from util.run.flags import AT_LEAST_1, FREE, NOT_NEGATIVE, flag, get_parser, with_default
from util.run.launch import Launch
from util.run.optim import param_groups_layer_decay
from util.run.session import Run, Start, find_start, launch_run, open_run, orderly_end
from util.weights.layouts import load_encoder

logger = logging.getLogger(__name__)

PICTURE_IMAGES = 4


@dataclass(frozen=True)
class SegmentationConfig(DenseConfig):
    TITLE: ClassVar[str] = "segmentation"
    PROGRAM: ClassVar[str] = "exp/ade20k/upernet.py"
    DATA: ClassVar[str] = "a folder with images/ and annotations/ (ADE20K's layout) or masks/ in it"
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "model": "swin_base_w14", "batch_size": 4, "epochs": 100, "warmup_epochs": 1, "blr": 1.6e-3
    }  # fmt: skip
    TASK_SETTINGS: ClassVar[dict[str, Any]] = {
        "nb_classes": None,
        "ignore_label": 255,
        "reduce_zero_label": None,
        "head_channels": 512,
        "short_side": None,
    }

    nb_classes: int | None = flag(
        None,
        "number of classes (default: as in the run to resume or evaluate, else as many as classes.txt in the data "
        "names, or ADE20K's objectInfo150.txt)",
        "N",
    )
    ignore_label: int | None = flag(
        None,
        "pixels with this value in label maps count nowhere (default: as in the run to resume or evaluate, else 255)",
        "VALUE",
        (lambda value: 0 <= value < 2**16, "must be between 0 and 65535"),
    )  # fmt: skip
    reduce_zero_label: bool | None = flag(
        None,
        "in label maps 0 is ignored too, and 1 is the first class (default: as in the run to resume or evaluate, "
        "else so in ADE20K's layout)",
    )
    head_channels: int | None = flag(
        None,
        "of the head, a multiple of 32; the auxiliary head has half as many (default: as in the run to resume or "
        "evaluate, else 512)",
        "N",
        (lambda value: value > 0 and value % 32 == 0, "must be a multiple of 32"),
    )
    short_side: int | None = flag(
        None,
        "shorter side of images at scale 1, at which they are evaluated; training crops --input_size of them (default: "
        "as in the run to resume or evaluate, else the shorter side of --input_size)",
        "PIXELS",
        AT_LEAST_1,
    )
    scales: tuple[float, float] = flag(
        (0.5, 2.0), "smallest and largest scale of images in training", ("MIN", "MAX"),
        (lambda value: 0 < value[0] <= value[1], "takes MIN and MAX, 0 < MIN <= MAX"),
    )  # fmt: skip
    color_jitter: float = flag(
        0.0, "strength of random brightness, contrast and saturation in training", "X", NOT_NEGATIVE
    )
    slide: bool = flag(
        False, "evaluate in windows of --input_size, two thirds apart, instead of whole images", on_resume=FREE
    )
    drop_path: float = with_default(TrainingConfig, "drop_path", 0.1)


def get_args_parser() -> argparse.ArgumentParser:
    return get_parser(
        SegmentationConfig, "Train or evaluate UPerNet for semantic segmentation on a pretrained encoder."
    )


def complete(config: SegmentationConfig) -> SegmentationConfig:
    """The configuration, completed from the data if neither a flag nor a checkpoint gives a value."""
    layout, reduce = find_layout(config.data_path), config.reduce_zero_label
    config = replace(
        config,
        nb_classes=number_of_classes(config.data_path, config.nb_classes),
        reduce_zero_label=layout.reduce_zero_label if reduce is None else reduce,
        short_side=config.short_side or min(config.input_size),
    )
    if config.reduce_zero_label <= config.ignore_label < config.nb_classes + config.reduce_zero_label:
        logger.warning(
            "--ignore_label %d is one of the %d classes' numbers: that class is ignored, and never found",
            config.ignore_label, config.nb_classes,
        )  # fmt: skip
    return config


def build_model(config: SegmentationConfig) -> UPerNet:
    return UPerNet(DenseEncoder(config), config.nb_classes, config.head_channels)


def rebuild_step(
    settings: argparse.Namespace, weights: dict[str, Tensor], device: torch.device
) -> tuple[UPerNet, Callable[[Tensor, dict[str, Any]], Tensor]]:
    """For util.replay: the model in training mode with its weights; the loss of (normalised images, micro-batch)."""
    model = build_model(settings)
    model.load_state_dict(weights)
    return model.to(device).train(), lambda imgs, micro: segmentation_loss(model(imgs), micro["labels"].to(device))


def build_validation(config: SegmentationConfig, launch: Launch) -> DataLoader:
    """Images one by one, since they differ in size."""
    dataset = build_segmentation_dataset(config, "val", Whole(config.short_side))
    check_statistics(config, dataset, f"{config.data_path} (val)")
    sampler = EvalBatchSampler(len(dataset), 1, launch.rank, launch.world_size)
    return build_loader(dataset, sampler, config, launch.device, collate_pairs)


def prepare(start: Start) -> tuple[Run, DataLoader]:
    """Everything before the first step: the run, and the validation images."""
    launch = start.launch
    config = complete(settings_to_train(start))
    transform = RandomScaleAndCrop(
        config.input_size, config.short_side, config.scales, config.mean, config.color_jitter
    )
    dataset = build_segmentation_dataset(config, "train", transform)
    check_statistics(config, dataset, f"{config.data_path} (train)")
    check_class_names(
        dataset.classes, (start.checkpoint or {}).get("classes") or dataset.classes, "the checkpoint to resume"
    )
    sampler = TrainBatchSampler(
        len(dataset), config.batch_size, config.accum_iter, launch.rank, launch.world_size, config.seed
    )
    loader = build_loader(dataset, sampler, config, launch.device, collate_pairs)
    validation = build_validation(config, launch)
    check_overlap(dataset, validation.dataset)
    model = build_model(config).to(launch.device)
    logger.info(
        "UPerNet on %s at %dx%d, %d classes: %.1f M parameters, %s", config.model, *config.input_size,
        config.nb_classes, sum(parameter.numel() for parameter in model.parameters()) / 1e6, config.precision,
    )  # fmt: skip
    groups = param_groups_layer_decay(model.encoder.swin, config.weight_decay, config.layer_decay, model)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), fused=True)
    data = {"train": dataset.fingerprint(), "val": validation.dataset.fingerprint()}
    load_weights = partial(load_encoder, model.encoder.body)
    return open_run(config, start, model, optimizer, loader, data, load_weights, classes=dataset.classes), validation


def train(run: Run, validation: DataLoader) -> None:
    """All epochs; evaluations and pictures where they are due."""
    config, progress = run.config, run.state.progress

    def measure() -> dict[str, float]:
        scores = evaluate(run.state.model, validation, run.normalize, config, run.device)
        if progress.epoch < config.epochs:
            show(run, validation)
        return {"miou": scores.miou, "pixel_acc": scores.pixel_acc}

    measured = train_and_evaluate(run, train_one_epoch, measure, best_by="miou")
    checkpoint, images = f"{config.output_dir}/checkpoint.pth", len(validation.dataset)
    logger.info(describe_result(config, **measured, checkpoint=checkpoint, images=images))
    if progress.best is not None:
        logger.info("best mIoU of all evaluations: %.2f%% (checkpoint-best.pth)", progress.best)


@torch.inference_mode()
def show(run: Run, validation: DataLoader) -> None:
    """A picture of the first validation images with their label maps, and with what was found (rank 0)."""
    if not distributed.is_main_process():
        return
    from util.dense.segmentation_pictures import segmentation_picture  # with matplotlib, which no other rank needs

    dataset, model, found = validation.dataset, run.state.model.eval(), []
    for index in range(min(PICTURE_IMAGES, len(dataset))):
        imgs, labels = collate_pairs([dataset[(0, index)]])
        found.append(predict(model, run.normalize(imgs.to(run.device)), labels.shape[-2:], run.config)[0].cpu())
    picture = segmentation_picture(dataset, found, run.config.mean, run.config.std)
    run.log.picture("predictions", picture, f"epoch{run.state.progress.epoch + 1:04d}.png", run.epoch_1000x)


def describe_result(config: SegmentationConfig, miou: float, pixel_acc: float, checkpoint: str, images: int) -> str:
    """One self-contained line."""
    how = f"windows of {config.input_size[0]}x{config.input_size[1]}" if config.slide else "whole images"
    return (
        f"result: mIoU {miou:.2f}%, pixel accuracy {pixel_acc:.2f}% of {checkpoint} (UPerNet, "
        f"{config.model}) on {images} images of {config.data_path}, {how}"
    )


def evaluate_only(given: SegmentationConfig, launch: Launch) -> None:
    """`--eval`: segment the validation images with the weights of --finetune or --resume."""
    config, checkpoint, source = open_to_evaluate(given, launch)
    config, trained_size = complete(config), tuple(checkpoint["args"]["input_size"])
    validation = build_validation(config, launch)
    check_class_names(validation.dataset.classes, checkpoint["classes"], source)
    model = build_model(replace(config, input_size=trained_size))
    load_to_evaluate(model, checkpoint, source, config)
    keep = None
    if config.predictions:
        from util.dense.segmentation_pictures import PredictionFolder

        keep = PredictionFolder(config.predictions, validation.dataset, config.mean, config.std)
    normalize = Normalize(config.mean, config.std).to(launch.device)
    scores = evaluate(model.to(launch.device), validation, normalize, config, launch.device, keep)
    for name, iou in zip(checkpoint["classes"], scores.class_iou):
        logger.info("IoU %6.2f%%  %s", iou, name)
    logger.info(describe_result(config, scores.miou, scores.pixel_acc, source, len(validation.dataset)))


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        given, launch = launch_run(SegmentationConfig, flags)
        if given.eval:
            evaluate_only(given, launch)
            distributed.shutdown()
            return
        run, validation = prepare(find_start(given, launch))
    with orderly_end(run):
        train(run, validation)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
