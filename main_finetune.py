"""Fine-tune, linear-probe or evaluate a classifier.

Fine-tune a pretrained encoder on labelled images (a folder with train/ and val/):
    python main_finetune.py --finetune output_dir/checkpoint.pth --data_path /path/to/images --output_dir finetuned
Probe it with a linear layer:
    python main_finetune.py --finetune output_dir/checkpoint.pth --data_path /path/to/images --output_dir probed \
        --freeze_encoder --layer_decay 1 --weight_decay 0 --aa '' --reprob 0 --smoothing 0
Evaluate a published checkpoint:
    python main_finetune.py --eval --finetune base_600ep_ft --data_path /path/to/imagenet
The paper's experiments, on Slurm or here:
    sh exp/base_600ep/finetune.sh partition 8 /path/to/imagenet
    sh exp/base_600ep/finetune.sh local 8 /path/to/imagenet
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import csv
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import timm
import torch
from timm.layers import trunc_normal_
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils.data import DataLoader

from engine_finetune import Evaluation, evaluate, train_one_epoch
from models_swin import SwinTransformer, classification_loss
from util.data.datasets import ImageDataset, build_dataset, build_loader
from util.data.samplers import EvalBatchSampler, TrainBatchSampler
from util.data.transforms import BatchAugmentation, Normalize, eval_transform, finetune_transform, uses_mixup
from util.errors import UserError, require_writable, unreadable_is_user_error
from util.run import advice, classes, distributed
from util.run.checks import check_overlap, check_statistics
from util.run.config import ImageTrainingConfig, resolve
from util.run.defaults import EVALUATION_BATCH, FINETUNING_MODEL, finetuning_defaults
from util.run.evaluation import EvaluationFlags, train_and_evaluate
from util.run.failures import user_errors
from util.run.flags import (
    AT_LEAST_1,
    AT_LEAST_2,
    BELOW_1,
    NOT_NEGATIVE,
    PROBABILITY,
    SHARE,
    Config,
    flag,
    free,
    get_parser,
    with_default,
)
from util.run.launch import Launch
from util.run.metrics import log_model, training_operations
from util.run.optim import param_groups_layer_decay
from util.run.session import Run, Start, find_start, launch_run, open_run, orderly_end
from util.seeding import seed_all
from util.weights.layouts import LoadReport, load_classifier, load_encoder
from util.weights.settings import model_arguments, weight_settings
from util.weights.source import WeightsInfo, read_weights

logger = logging.getLogger(__name__)

MOST_INITIAL_WEIGHTS = 0.1  # share in the moving average at the end of a run
HEAD_INIT_STD = 2e-5  # of a fresh head on a pretrained encoder: it starts at equal probabilities


@dataclass(frozen=True)
class AugmentationFlags(Config):
    TITLE: ClassVar[str] = "augmentation"

    aa: str = flag("rand-m9-mstd0.5-inc1", "timm auto-augment policy; '' for none", "POLICY")
    color_jitter: float | None = flag(
        None, "strength of colour jitter, used only if --aa is '' (default: none)", "X", NOT_NEGATIVE
    )
    reprob: float = flag(0.25, "probability of random erasing", "P", PROBABILITY)
    remode: str = flag("pixel", "what erased areas are filled with", choices=("const", "rand", "pixel"))
    recount: int = flag(1, "maximum number of areas erased per image", "N", AT_LEAST_1)
    resplit: bool = free(False, "no effect; accepted so that the authors' command lines work")
    mixup: float = flag(0.0, "mixup alpha (0: off)", "ALPHA", NOT_NEGATIVE)
    cutmix: float = flag(0.0, "cutmix alpha (0: off)", "ALPHA", NOT_NEGATIVE)
    cutmix_minmax: tuple[float, float] | None = flag(
        None,
        "minimum and maximum box size, instead of alpha",
        ("MIN", "MAX"),
        (lambda value: 0 <= value[0] <= value[1] <= 1, "takes MIN and MAX, 0 <= MIN <= MAX <= 1"),
    )
    mixup_prob: float = flag(1.0, "probability that a batch is mixed, if mixup or cutmix is on", "P", PROBABILITY)
    mixup_switch_prob: float = flag(0.5, "probability of cutmix, if both are on", "P", PROBABILITY)
    mixup_mode: str = flag(
        "batch", "draw the mixing once per batch, per pair or per image", choices=("batch", "pair", "elem")
    )


@dataclass(frozen=True)
class FinetuneConfig(AugmentationFlags, EvaluationFlags, ImageTrainingConfig):
    TITLE: ClassVar[str] = "fine-tuning"
    PROGRAM: ClassVar[str] = "main_finetune.py"

    # Free, since weights of another number of classes do not fit the model: loading refuses them.
    nb_classes: int | None = free(None, "number of classes (default: as in the data)", "N", AT_LEAST_2)
    layer_decay: float = flag(0.7, "learning-rate factor from each layer to the one below it", "X", SHARE)
    freeze_encoder: bool = flag(False, "train only the head (linear probe)")
    reset_head: bool = free(False, "re-initialise the head even if the weights contain one that fits")
    smoothing: float = flag(0.1, "label smoothing", "X", BELOW_1)
    model_ema: bool = flag(False, "keep a moving average of the weights and evaluate it too")
    model_ema_decay: float = flag(0.9999, "decay of the average per step", "X", BELOW_1)
    dist_eval: bool = free(False, "no effect: evaluation always uses all ranks and is always exact")
    per_class: bool = free(False, "with --eval: print top-1 per class")
    predictions: str = free("", "with --eval: write the top-5 of every image", "FILE.csv")
    drop_path: float = with_default(ImageTrainingConfig, "drop_path", 0.1)
    epochs: int = with_default(ImageTrainingConfig, "epochs", 100)
    min_lr: float = with_default(ImageTrainingConfig, "min_lr", 1e-6)

    def __post_init__(self) -> None:
        super().__post_init__()
        if uses_mixup(self) and self.batch_size is not None and self.batch_size % 2:
            raise UserError(
                f"mixup and cutmix pair the images of a batch: --batch_size must be even, got {self.batch_size} "
                "(or use --mixup 0 --cutmix 0)"
            )
        if (self.per_class or self.predictions) and not self.eval:
            raise UserError("--per_class and --predictions go with --eval")


def get_args_parser() -> argparse.ArgumentParser:
    return get_parser(FinetuneConfig, "Fine-tune, linear-probe or evaluate a classifier.")


def build_validation(config: FinetuneConfig, launch: Launch) -> DataLoader:
    dataset = build_dataset(config, "val", eval_transform(config))
    sampler = EvalBatchSampler(len(dataset), config.batch_size, launch.rank, launch.world_size)
    return build_loader(dataset, sampler, config, launch.device)


def build_classifier(config: FinetuneConfig, num_classes: int) -> SwinTransformer:
    seed_all(config.seed, "weights")  # the same initial weights on every rank
    model: SwinTransformer = timm.create_model(
        config.model, num_classes=num_classes, drop_path_rate=config.drop_path, **model_arguments(config)
    )
    model.set_grad_checkpointing(config.grad_checkpointing)
    if config.freeze_encoder:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    return model


def rebuild_step(
    settings: argparse.Namespace, weights: dict[str, Tensor], device: torch.device
) -> tuple[SwinTransformer, Callable[[Tensor, dict[str, Any]], Tensor]]:
    """For util.replay: the model in training mode with its weights; the loss of (normalised images, micro-batch)."""
    model = build_classifier(settings, len(weights["head.weight"]))
    model.load_state_dict(weights)
    augment = BatchAugmentation(settings, model.num_classes, device)

    def loss(imgs: Tensor, micro: dict[str, Any]) -> Tensor:
        imgs, targets = augment(imgs, micro["targets"].to(device))
        return classification_loss(model(imgs).float(), targets, settings.smoothing)

    return model.to(device).train(not settings.freeze_encoder), loss


def load_for_finetuning(
    model: SwinTransformer, config: FinetuneConfig, weights: dict[str, Tensor], source: WeightsInfo
) -> LoadReport:
    """Load a pretrained encoder, and the head that comes with it where it fits and is wanted."""
    if config.reset_head:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    report = load_encoder(model, weights, source)
    if "head.weight" not in report.loaded:
        seed_all(config.seed, "head")
        trunc_normal_(model.head.weight, std=HEAD_INIT_STD)
    return report


def warn_of_slow_average(decay: float, steps: int) -> None:
    """Warn if, after `steps` steps, the moving average would still contain much of the initial weights."""
    if (kept := decay**steps) > MOST_INITIAL_WEIGHTS:
        logger.warning(
            "--model_ema_decay %g: after the %d steps of this run, the averaged weights, by which checkpoint-best is "
            "chosen, are still %.1f%% the initial ones; with --model_ema_decay %.6g they would be 1%%",
            decay, steps, 100 * kept, 0.01 ** (1 / steps),
        )  # fmt: skip


def prepare(config: FinetuneConfig, start: Start) -> tuple[Run, DataLoader]:
    """Everything before the first step: the run, and the validation images."""
    launch = start.launch
    if config.freeze_encoder and not (config.finetune or config.resume):
        logger.warning("--freeze_encoder without --finetune probes an encoder of random weights")
    dataset = build_dataset(config, "train", finetune_transform(config), require_labels=True)
    check_statistics(config, dataset, config.data_path, training=True)
    if dataset.pixels.dtype != torch.uint8 and config.in_chans == 3 and (config.aa or config.color_jitter):
        logger.warning("auto-augment and colour jitter need 8-bit images; on these, of more bits, they are off")
    num_classes = classes.number_classes(config, dataset, start)
    sampler = TrainBatchSampler(
        len(dataset), config.batch_size, config.accum_iter, launch.rank, launch.world_size, config.seed
    )
    if config.model_ema:
        warn_of_slow_average(config.model_ema_decay, config.epochs * sampler.steps_per_epoch)
    loader = build_loader(dataset, sampler, config, launch.device)
    validation = build_validation(config, launch)
    if dataset.classes:
        validation.dataset.number_labels_as(dataset.classes, "the training images")
    classes.count_classes(config, validation.dataset)
    classes.warn_of_empty_classes(validation.dataset)
    check_overlap(dataset, validation.dataset)
    check_statistics(config, validation.dataset, f"{config.data_path} (val)")
    config = replace(config, nb_classes=num_classes)
    model = build_classifier(config, num_classes).to(launch.device)
    multiply_adds = log_model(config, model)
    # With a frozen encoder there is no backward pass to speak of.
    operations = 2 * multiply_adds if config.freeze_encoder else training_operations(multiply_adds)
    groups = param_groups_layer_decay(model, config.weight_decay, config.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), fused=True)
    model_ema = ModelEmaV3(model, decay=config.model_ema_decay) if config.model_ema else None
    data = {"train": dataset.fingerprint(), "val": validation.dataset.fingerprint()}
    load_weights = partial(load_for_finetuning, model, config)
    run = open_run(
        config, start, model, optimizer, loader, data, load_weights, operations, model_ema, dataset.classes
    )  # fmt: skip
    if config.val_share > 0 and run.state.progress.step == 0 and launch.rank == 0:
        classes.write_division(config, validation.dataset)
    return run, validation


def train(run: Run, validation: DataLoader) -> None:
    """All epochs, each followed by an evaluation if one is due; the best epoch is judged by the averaged weights,
    if there are any."""
    config, state, progress = run.config, run.state, run.state.progress
    augment = BatchAugmentation(config, state.model.num_classes, run.device)
    result: Evaluation | None = None  # the last one of the plain weights

    def measure() -> dict[str, float]:
        nonlocal result
        result = evaluate(state.model, validation, run.normalize, config.precision, run.device)
        measured = result.measures()
        if state.model_ema is not None:
            averaged = evaluate(state.model_ema.module, validation, run.normalize, config.precision, run.device)
            measured |= {f"ema_{name}": value for name, value in averaged.measures().items()}
        return measured

    best_by = "acc1" if state.model_ema is None else "ema_acc1"
    train_and_evaluate(run, partial(train_one_epoch, augment=augment), measure, best_by)
    logger.info(describe_result(config, result, f"{config.output_dir}/checkpoint.pth"))
    if progress.best is not None:  # unknown in a finished run of the authors' program
        averaged = ": its averaged weights, --eval --model_ema" if config.model_ema else ""
        logger.info("best top-1 of all epochs: %.3f%% (checkpoint-best.pth%s)", progress.best, averaged)


def describe_result(config: FinetuneConfig, result: Evaluation, checkpoint: str) -> str:
    """One self-contained line."""
    return (
        f"result: top-1 {result.acc1:.3f}%, top-5 {result.acc5:.3f}%, loss {result.loss:.4f} of {checkpoint} "
        f"({config.model} at {config.input_size[0]}x{config.input_size[1]}) on {result.images} images of "
        f"{config.data_path}"
    )


def evaluate_only(given: FinetuneConfig, launch: Launch) -> None:
    """`--eval`: classify the validation images with the weights of --finetune or --resume."""
    source = given.finetune or given.resume
    weights, info = distributed.once_per_node(partial(read_weights, source, given.model_ema))
    settings = weight_settings(info.args, source, given.as_dict(), defaults={"model": FINETUNING_MODEL})
    config = resolve(given, launch, settings, {"batch_size": EVALUATION_BATCH})
    validation = build_validation(config, launch)
    dataset, device = validation.dataset, launch.device
    check_statistics(config, dataset, config.data_path)
    classes.check_division(config, dataset, info)
    model = build_classifier(config, classes.classes_to_evaluate(config, dataset, weights, info))
    logger.info("%s", load_classifier(model, weights, info))
    if config.predictions and launch.rank == 0:
        require_writable(config.predictions, "--predictions", ".csv")
    normalize = Normalize(config.mean, config.std).to(device)
    result = evaluate(model.to(device), validation, normalize, config.precision, device, bool(config.predictions))
    if launch.rank != 0:
        return
    if config.per_class:
        for name, acc1 in zip(dataset.classes or range(model.num_classes), result.class_acc1):
            logger.info("top-1 %6.2f%%  %s", acc1, name if str(name).isprintable() else repr(name))
    if config.predictions:
        write_predictions(config.predictions, result, dataset)
    logger.info(describe_result(config, result, source))


def write_predictions(path: str, result: Evaluation, dataset: ImageDataset) -> None:
    """A CSV with one row per image: path, label, the top classes and their probabilities."""
    names = dataset.classes or [str(i) for i in range(len(result.class_acc1))]
    top = len(result.predictions[0][2])
    with (
        unreadable_is_user_error(f"--predictions {path} cannot be written"),
        open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,  # names as on the disk
    ):
        writer = csv.writer(file)
        writer.writerow(["path", "label", *(f"top{i + 1}" for i in range(top)), *(f"score{i + 1}" for i in range(top))])
        for index, label, best, scores in result.predictions:
            scores = [f"{score:.6f}" for score in scores]
            writer.writerow([dataset.path_of(index), names[label], *(names[c] for c in best), *scores])
    logger.info("wrote the predictions of %d images to %s", result.images, path)


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        given, launch = launch_run(FinetuneConfig, flags)
        if given.eval:
            evaluate_only(given, launch)
            distributed.shutdown()
            return
        start = find_start(given, launch)
        config = start.resolve(finetuning_defaults)
        run, validation = prepare(config, start)
    with orderly_end(run):
        train(run, validation)
    if launch.rank == 0:  # the ranks no longer know each other
        logger.info(advice.at_the_end("fine-tuning", config.output_dir, advice.after_fine_tuning(config)))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
