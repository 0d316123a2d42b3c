"""Train or evaluate Mask R-CNN or Faster R-CNN on a pretrained encoder.

Train on a folder with annotations in COCO's format (see util/data/coco.py):
    python -m exp.coco.mask_rcnn --finetune output_dir/checkpoint.pth --data_path /path/to/coco --output_dir detector
Evaluate, and write what was found:
    python -m exp.coco.mask_rcnn --eval --finetune detector/checkpoint-best.pth --data_path /path/to/coco \
        --predictions found.json
The recipe for COCO, on Slurm or here:
    sh exp/coco/finetune.sh partition 8 /path/to/coco
    sh exp/coco/finetune.sh local 8 /path/to/coco
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN

from exp.coco.engine_mask_rcnn import detection_loss, evaluate, train_one_epoch
from util.data.coco import AsItIs, Flip, build_coco_dataset, collate_lists
from util.data.datasets import build_loader
from util.data.samplers import EvalBatchSampler, TrainBatchSampler
from util.data.transforms import Normalize
from util.dense.average_precision import Result, write_results
from util.dense.config import DenseConfig, load_to_evaluate, open_to_evaluate, settings_to_train
from util.dense.detector import build_detector
from util.errors import UserError, require_writable
from util.run import distributed
from util.run.checks import check_overlap, check_statistics
from util.run.config import TrainingConfig
from util.run.evaluation import train_and_evaluate
from util.run.failures import user_errors
from util.run.flags import AT_LEAST_1, FREE, flag, get_parser, with_default
from util.run.launch import Launch
from util.run.optim import param_groups_layer_decay
from util.run.session import Run, Start, find_start, launch_run, open_run, orderly_end
from util.weights.layouts import load_encoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DetectionConfig(DenseConfig):
    TITLE: ClassVar[str] = "detection"
    PROGRAM: ClassVar[str] = "exp/coco/mask_rcnn.py"
    DATA: ClassVar[str] = "a folder with annotations/ and images in COCO's format"
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "model": "swin_base_w14", "batch_size": 2, "epochs": 12, "warmup_epochs": 0.07, "blr": 1.6e-3
    }  # fmt: skip
    TASK_SETTINGS: ClassVar[dict[str, Any]] = {
        "detector": "mask_rcnn",
        "head_channels": 256,
        "min_size": (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        "max_size": 1333,
    }

    detector: str | None = flag(
        None, "with masks, or boxes alone (default: as in the run to resume or evaluate, else mask_rcnn)",
        choices=("mask_rcnn", "faster_rcnn"),
    )  # fmt: skip
    head_channels: int | None = flag(
        None, "of the feature pyramid and the heads (default: as in the run to resume or evaluate, else 256)", "N",
        AT_LEAST_1,
    )  # fmt: skip
    min_size: tuple[int, ...] | None = flag(
        None, "shorter side of the images; of several, one is drawn for each image in training, and the last is taken "
        "in evaluation (default: as in the run to resume or evaluate, else 480 512 ... 800)", "PIXELS",
        (lambda value: min(value) >= 1, "must be at least 1"),
    )  # fmt: skip
    max_size: int | None = flag(
        None, "longer side at most (default: as in the run to resume or evaluate, else 1333)", "PIXELS", AT_LEAST_1
    )
    sampled_boxes: int = flag(
        512, "candidates of each image that the heads train on, a quarter of them objects at most", "N", AT_LEAST_1
    )
    train_json: str = flag(
        "", "annotations to train on (default: annotations/*train*.json of the data)", "FILE",
        on_resume="identical only if it says the same of the same images",
    )  # fmt: skip
    val_json: str = flag(
        "", "annotations to evaluate on (default: annotations/*val*.json of the data)", "FILE", on_resume=FREE
    )
    bad_boxes: str = flag(
        "error", "at boxes outside their image or of almost no area, stop (error), or clip them and leave out what "
        "then has almost no area (clip)", choices=("error", "clip"),
        on_resume="other boxes wherever one is outside its image",
    )  # fmt: skip
    drop_path: float = with_default(TrainingConfig, "drop_path", 0.2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if None not in (self.min_size, self.max_size) and max(self.min_size) > self.max_size:
            raise UserError(f"--min_size {max(self.min_size)} is above --max_size {self.max_size}")


def get_args_parser() -> argparse.ArgumentParser:
    return get_parser(DetectionConfig, "Train or evaluate Mask R-CNN or Faster R-CNN on a pretrained encoder.")


def build_validation(config: DetectionConfig, launch: Launch) -> DataLoader:
    dataset = build_coco_dataset(config, "val", AsItIs())
    sampler = EvalBatchSampler(len(dataset), config.batch_size, launch.rank, launch.world_size)
    return build_loader(dataset, sampler, config, launch.device, collate_lists)


def prepare(start: Start) -> tuple[Run, DataLoader]:
    """Everything before the first step: the run, and the validation images."""
    launch = start.launch
    config = settings_to_train(start)
    dataset = build_coco_dataset(config, "train", Flip())
    classes = (start.checkpoint or {}).get("classes") or dataset.classes
    dataset.source.number_classes_as(classes, "the checkpoint to resume")
    validation = build_validation(config, launch)
    validation.dataset.source.number_classes_as(classes, "training")
    check_overlap(dataset, validation.dataset)
    for images, split in ((dataset, "train"), (validation.dataset, "val")):
        check_statistics(config, images, f"{config.data_path} ({split})")
    sampler = TrainBatchSampler(
        len(dataset), config.batch_size, config.accum_iter, launch.rank, launch.world_size, config.seed
    )
    loader = build_loader(dataset, sampler, config, launch.device, collate_lists)
    model = build_detector(config, len(classes)).to(launch.device)
    logger.info(
        "%s on %s, %d classes: %.1f M parameters, %s", config.detector, config.model, len(classes),
        sum(parameter.numel() for parameter in model.parameters()) / 1e6, config.precision,
    )  # fmt: skip
    encoder = model.backbone.encoder
    groups = param_groups_layer_decay(encoder.swin, config.weight_decay, config.layer_decay, model)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), fused=True)
    data = {"train": dataset.fingerprint(), "val": validation.dataset.fingerprint()}
    load_weights = partial(load_encoder, encoder.body)
    return open_run(config, start, model, optimizer, loader, data, load_weights, classes=classes), validation


def rebuild_step(
    settings: argparse.Namespace, weights: dict[str, Tensor], device: torch.device
) -> tuple[FasterRCNN, Callable[[list[Tensor], dict[str, Any]], Tensor]]:
    """For util.replay: the model in training mode with its weights; the loss of (normalised images, micro-batch)."""
    model = build_detector(settings, len(weights["roi_heads.box_predictor.cls_score.bias"]) - 1)
    model.load_state_dict(weights)

    def loss(imgs: list[Tensor], micro: dict[str, Any]) -> Tensor:
        with torch.autocast(device.type, enabled=False):  # as in training
            return detection_loss(model, imgs, micro["targets"])

    return model.to(device).train(), loss


def train(run: Run, validation: DataLoader) -> None:
    """All epochs, each followed by an evaluation and a picture."""
    config, progress = run.config, run.state.progress

    def measure() -> dict[str, float]:
        measured, results = evaluate(run.state.model, validation, run.normalize, run.device)
        if progress.epoch < config.epochs:
            show(run, validation, results)
        # Curves and reports have no use for the -1 of measures without annotations; the best epoch needs its own.
        return {name: value for name, value in measured.items() if value >= 0 or name == "box_AP"}

    measured = train_and_evaluate(run, train_one_epoch, measure, best_by="box_AP")
    logger.info(describe_result(config, measured, f"{config.output_dir}/checkpoint.pth", len(validation.dataset)))
    if progress.best is not None and progress.best >= 0:
        logger.info("best box AP of all epochs: %.2f%% (checkpoint-best.pth)", progress.best)


def show(run: Run, validation: DataLoader, results: list[Result]) -> None:
    """A picture of the first validation images with their annotations, and with what was found (rank 0)."""
    if distributed.is_main_process():
        from util.dense.detection_pictures import detections_picture  # with matplotlib, which no other rank needs

        picture = detections_picture(validation.dataset, results, run.config.mean, run.config.std)
        run.log.picture("detections", picture, f"epoch{run.state.progress.epoch + 1:04d}.png", run.epoch_1000x)


def describe_result(config: DetectionConfig, measured: dict[str, float], checkpoint: str, images: int) -> str:
    """One self-contained line; leaves out measures without annotations, which are -1."""
    values = [f"{name.replace('_', ' ')} {value:.2f}" for name, value in measured.items() if value >= 0]
    what = f"{checkpoint} ({config.detector} on {config.model})"
    measures = ", ".join(values) or "no average precision, for want of boxes,"
    return f"result: {measures} of {what} on {images} images of {config.data_path}"


def evaluate_only(given: DetectionConfig, launch: Launch) -> None:
    """`--eval`: detect in the validation images with the weights of --finetune or --resume."""
    config, checkpoint, source = open_to_evaluate(given, launch)
    validation = build_validation(config, launch)
    validation.dataset.source.number_classes_as(checkpoint["classes"], source)
    check_statistics(config, validation.dataset, config.data_path)
    model = build_detector(config, len(checkpoint["classes"]))
    load_to_evaluate(model, checkpoint, source, config)
    if config.predictions and launch.rank == 0:
        require_writable(config.predictions, "--predictions")
    normalize = Normalize(config.mean, config.std).to(launch.device)
    measured, results = evaluate(model.to(launch.device), validation, normalize, launch.device)
    if launch.rank == 0:
        if config.predictions:
            write_results(config.predictions, results)
        logger.info(describe_result(config, measured, source, len(validation.dataset)))


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        given, launch = launch_run(DetectionConfig, flags)
        if given.eval:
            evaluate_only(given, launch)
            distributed.shutdown()
            return
        run, validation = prepare(find_start(given, launch))
    with orderly_end(run):
        train(run, validation)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
