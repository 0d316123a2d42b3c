"""Fine-tune, linear-probe or evaluate a classifier.

Fine-tune a pretrained encoder on labelled images (a folder with train/ and val/):
    python main_finetune.py --finetune output_dir/checkpoint.pth --model swin_tiny_w14 \
        --data_path /path/to/images --output_dir finetuned
Probe it with a linear layer:
    python main_finetune.py --finetune output_dir/checkpoint.pth --model swin_tiny_w14 --freeze_encoder \
        --data_path /path/to/images --output_dir probed --layer_decay 1 --weight_decay 0 \
        --aa '' --reprob 0 --smoothing 0
Evaluate a published checkpoint:
    python main_finetune.py --eval --finetune base_600ep_ft --data_path /path/to/imagenet
The paper's experiments, on Slurm or here:
    sh exp/base_600ep/finetune.sh partition 8 /path/to/imagenet
    sh exp/base_600ep/finetune.sh local 8 /path/to/imagenet
"""

import argparse
import csv
import logging
import time
from pathlib import Path

import timm
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers import trunc_normal_
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from engine_finetune import Evaluation, check_targets, evaluate, train_one_epoch
from util.data.datasets import build_dataset, build_loader
from util.data.samplers import EvalBatchSampler, TrainBatchSampler
from util.data.transforms import Normalize, eval_transform, train_transform
from util.run import config as arguments
from util.run import distributed
from util.run.logger import describe_environment, setup_logging
from util.run.optim import make_scaler, param_groups_layer_decay, resolve_precision
from util.run.preemption import Preemption
from util.run.session import Run, count_work, ending, open_run
from util.run.state import Progress, TrainingState
from util.seeding import seed_all
from util.weights.layouts import load_classifier, load_encoder
from util.weights.source import read_weights

logger = logging.getLogger(__name__)

HEAD_INIT_STD = 2e-5  # of a fresh head on a pretrained encoder: it starts at equal probabilities


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Fine-tune, linear-probe or evaluate a classifier.",
        formatter_class=arguments.HelpFormatter,
    )
    arguments.add_model_arguments(parser, "swin_base_w14", arguments.CLASSIFIER_MODELS, drop_path=0.1)
    group = parser.add_argument_group("fine-tuning")
    group.add_argument("--nb_classes", type=int, metavar="N", help="classes (default: those of the data)")
    group.add_argument(
        "--layer_decay", type=float, default=0.7, metavar="X", help="learning rate from a layer to the next"
    )
    group.add_argument("--freeze_encoder", action="store_true", help="train the head alone (linear probe)")
    group.add_argument("--smoothing", type=float, default=0.1, metavar="X", help="label smoothing")
    group.add_argument("--model_ema", action="store_true", help="average the weights, and evaluate the average too")
    group.add_argument(
        "--model_ema_decay", type=float, default=0.9999, metavar="X", help="decay of the average per step"
    )
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's auto-augment; '' for none"
    )
    group.add_argument(
        "--color_jitter", type=float, metavar="X", help="colour jitter, where --aa is '' (default: none)"
    )
    group.add_argument("--reprob", type=float, default=0.25, metavar="P", help="probability of random erasing")
    group.add_argument("--remode", default="pixel", choices=("const", "rand", "pixel"), help="what erased areas become")
    group.add_argument("--recount", type=int, default=1, metavar="N", help="most areas erased per image")
    group.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA", help="mixup; 0: off")
    group.add_argument("--cutmix", type=float, default=0.0, metavar="ALPHA", help="cutmix; 0: off")
    group.add_argument(
        "--cutmix_minmax", type=float, nargs=2, metavar=("MIN", "MAX"), help="cutmix size range, over alpha"
    )
    group.add_argument("--mixup_prob", type=float, default=1.0, metavar="P", help="probability of either, when on")
    group.add_argument("--mixup_switch_prob", type=float, default=0.5, metavar="P", help="of cutmix, when both are on")
    group.add_argument("--mixup_mode", default="batch", choices=("batch", "pair", "elem"), help="one draw for whom")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval", action="store_true", help="only evaluate the weights of --finetune or --resume")
    group.add_argument(
        "--dist_eval", action="store_true", help="accepted; evaluation always uses all ranks and is always exact"
    )
    group.add_argument("--per_class", action="store_true", help="with --eval: print top-1 per class")
    group.add_argument(
        "--predictions", default="", metavar="FILE.csv", help="with --eval: write the top-5 of every image"
    )
    arguments.add_optimizer_arguments(parser, batch_size=64, epochs=100, blr=5e-4, min_lr=1e-6, warmup_epochs=5)
    arguments.add_data_arguments(parser)
    arguments.add_run_arguments(parser)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Check fine-tuning's own flags; raises ValueError."""
    if not 0 <= args.smoothing < 1:
        raise ValueError(f"--smoothing must be at least 0 and below 1, got {args.smoothing}")
    if args.color_jitter is not None and args.color_jitter < 0:
        raise ValueError(f"--color_jitter must not be negative, got {args.color_jitter}")
    if args.cutmix_minmax is not None and not 0 <= args.cutmix_minmax[0] <= args.cutmix_minmax[1] <= 1:
        raise ValueError(f"--cutmix_minmax takes MIN and MAX, 0 <= MIN <= MAX <= 1, got {args.cutmix_minmax}")
    for name in ("reprob", "mixup_prob", "mixup_switch_prob", "model_ema_decay"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} must lie between 0 and 1, got {getattr(args, name)}")
    if not 0 < args.layer_decay <= 1:
        raise ValueError(f"--layer_decay must lie above 0 and not above 1, got {args.layer_decay}")
    if uses_mixup(args) and args.batch_size % 2:
        raise ValueError(
            f"mixup and cutmix pair the images of a batch: --batch_size must be even, got {args.batch_size} "
            "(or use --mixup 0 --cutmix 0)"
        )
    if (args.per_class or args.predictions) and not args.eval:
        raise ValueError("--per_class and --predictions go with --eval")
    if args.freeze_encoder and not (args.finetune or args.resume):
        logger.warning("--freeze_encoder without --finetune probes an encoder of random weights")


def uses_mixup(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def check_classes(args: argparse.Namespace, dataset) -> None:
    """Make --nb_classes agree with the data set; raises ValueError when it cannot."""
    found = len(dataset.classes) if dataset.classes else None
    if args.nb_classes is None:
        if found is None:
            raise ValueError("the data set does not tell its number of classes: give --nb_classes")
        args.nb_classes = found
    elif found is not None and found != args.nb_classes:
        raise ValueError(f"--nb_classes {args.nb_classes} contradicts the {found} classes in {args.data_path}")
    if args.nb_classes < 2:
        raise ValueError(f"classification needs at least 2 classes, found {args.nb_classes} in {args.data_path}")
    if dataset.targets is not None:
        check_targets(torch.as_tensor(dataset.targets), args.nb_classes)


def build_validation(args: argparse.Namespace, launch: distributed.Launch) -> DataLoader:
    dataset = build_dataset(args, "val", eval_transform(args))
    check_classes(args, dataset)
    sampler = EvalBatchSampler(len(dataset), args.batch_size, launch.rank, launch.world_size)
    return build_loader(dataset, sampler, args, args.device)


def build_classifier(args: argparse.Namespace, device: torch.device) -> nn.Module:
    seed_all(args.seed, "weights")  # the same initial weights on every rank
    model = timm.create_model(args.model, num_classes=args.nb_classes, **arguments.model_shape(args))
    model.set_grad_checkpointing(args.grad_checkpointing)
    return model.to(device)


def resolve_model(args: argparse.Namespace, device: torch.device) -> None:
    """Fill in the model's name and input size, which the transforms need before there is a model."""
    args.model = arguments.resolve_model_name(
        args.model, arguments.CLASSIFIER_MODELS, arguments.AUTHORS_CLASSIFIER_NAMES
    )
    args.precision = resolve_precision(args.precision, device)
    if args.input_size is None:
        args.input_size = tuple(timm.get_pretrained_cfg(args.model).input_size[1:])


def prepare(args: argparse.Namespace, launch: distributed.Launch, preemption: Preemption) -> tuple[Run, DataLoader]:
    """Everything before the first step: the run, and the validation images.

    Raises:
        ValueError, OSError: for what the user can put right.
    """
    device = args.device
    check_arguments(args)
    dataset = build_dataset(args, "train", train_transform(args), require_labels=True)
    check_classes(args, dataset)
    sampler = TrainBatchSampler(
        len(dataset), args.batch_size, args.accum_iter, launch.rank, launch.world_size, args.seed
    )
    loader = build_loader(dataset, sampler, args, device)
    validation = build_validation(args, launch)
    model = build_classifier(args, device)
    if args.freeze_encoder:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    if launch.rank == 0:
        parameters, multiply_adds = count_work(model, 1)
        logger.info(
            "%s at %dx%d, %d classes: %.1f M parameters, %.2f G multiply-adds per image, %s",
            args.model, *model.img_size, args.nb_classes, parameters / 1e6, multiply_adds / 1e9, args.precision,
        )  # fmt: skip
    optimizer = torch.optim.AdamW(
        param_groups_layer_decay(model, args.weight_decay, args.layer_decay), lr=args.lr, betas=(0.9, 0.999), fused=True
    )
    model_ema = ModelEmaV3(model, decay=args.model_ema_decay) if args.model_ema else None
    if args.compile:
        model.compile_blocks()
    state = TrainingState(model, optimizer, make_scaler(args.precision, device), args, Progress(), model_ema)

    def load_start() -> None:
        weights, source = read_weights(args.finetune)
        report = load_encoder(model, weights, source)
        logger.info("%s", report)
        if "head.weight" not in report.loaded:
            seed_all(args.seed, "head")
            trunc_normal_(model.head.weight, std=HEAD_INIT_STD)

    return open_run(args, device, state, loader, Normalize(args.mean, args.std), preemption, load_start), validation


def build_criterion(args: argparse.Namespace) -> tuple[nn.Module, Mixup | None]:
    """The loss, and mixup with it: mixed targets carry the label smoothing themselves."""
    if uses_mixup(args):
        mixup = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.nb_classes,
        )
        return SoftTargetCrossEntropy(), mixup
    return (LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()), None


def train(run: Run, validation: DataLoader) -> None:
    """All epochs, each followed by an evaluation."""
    args, state, progress = run.args, run.state, run.state.progress
    criterion, mixup = build_criterion(args)
    erasing = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=run.device)
    final = None  # result of the plain weights after the last epoch
    while progress.epoch < args.epochs:
        start = time.time()
        lr = train_one_epoch(run, criterion, erasing, mixup)
        final = result = evaluate(state.model, validation, run.normalize, args.precision, run.device)
        record = {"train_lr": lr, "test_loss": result.loss, "test_acc1": result.acc1, "test_acc5": result.acc5}
        if state.model_ema is not None:
            result = evaluate(state.model_ema.module, validation, run.normalize, args.precision, run.device)
            record |= {"test_ema_loss": result.loss, "test_ema_acc1": result.acc1, "test_ema_acc5": result.acc5}
        # By the averaged weights where there are any. The first epoch is the best so far whatever it gives.
        best = result.acc1 > progress.best_acc1 or progress.epoch == args.start_epoch
        progress.best_acc1 = max(progress.best_acc1, result.acc1)
        run.finish_epoch({**record, "best_acc1": progress.best_acc1, "seconds": time.time() - start}, best)
    if final is None:  # resumed when all was done
        final = evaluate(state.model, validation, run.normalize, args.precision, run.device)
    logger.info(describe_result(args, final, f"{args.output_dir}/checkpoint.pth"))
    averaged = ": its averaged weights, --eval --model_ema" if args.model_ema else ""
    logger.info("best top-1 of all epochs: %.3f %% (checkpoint-best.pth%s)", progress.best_acc1, averaged)


def describe_result(args: argparse.Namespace, result: Evaluation, checkpoint: str) -> str:
    """One line that stands for itself."""
    return (
        f"result: top-1 {result.acc1:.3f} %, top-5 {result.acc5:.3f} %, loss {result.loss:.4f} of {checkpoint} "
        f"({args.model} at {args.input_size[0]}x{args.input_size[1]}) on {result.images} images of {args.data_path}"
    )


def evaluate_only(args: argparse.Namespace, launch: distributed.Launch) -> None:
    """`--eval`: classify the validation images with the weights of --finetune or --resume."""
    source = args.finetune or args.resume
    with arguments.user_errors():
        if not source or source == "auto":
            raise ValueError("--eval needs the weights to evaluate: --finetune WEIGHTS (or --resume PATH)")
        weights, info = read_weights(source, ema=args.model_ema)
        validation = build_validation(args, launch)
        model = build_classifier(args, args.device)
        logger.info("%s", load_classifier(model, weights, info))
        if args.predictions and distributed.is_main_process():  # while an evaluation is not yet lost
            Path(args.predictions).parent.mkdir(parents=True, exist_ok=True)
            open(args.predictions, "ab").close()
        normalize = Normalize(args.mean, args.std).to(args.device)
        result = evaluate(model, validation, normalize, args.precision, args.device, bool(args.predictions))
        if not distributed.is_main_process():
            return
        if args.per_class:
            for name, acc1 in zip(validation.dataset.classes or range(args.nb_classes), result.class_acc1):
                logger.info("top-1 %6.2f %%  %s", acc1, name if str(name).isprintable() else repr(name))
        if args.predictions:
            write_predictions(args.predictions, result, validation.dataset)
        logger.info(describe_result(args, result, str(source)))


def write_predictions(path: str, result: Evaluation, dataset) -> None:
    """A CSV with one row per image: path, label, the top classes and their probabilities."""
    names = dataset.classes or [str(i) for i in range(len(result.class_acc1))]
    top = len(result.predictions[0][2])
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:  # names as on the disk
        writer = csv.writer(file)
        writer.writerow(["path", "label", *(f"top{i + 1}" for i in range(top)), *(f"score{i + 1}" for i in range(top))])
        for index, label, classes, scores in result.predictions:
            best = [names[c] for c in classes]
            writer.writerow([dataset.path_of(index), names[label], *best, *(f"{score:.6f}" for score in scores)])
    logger.info("wrote the predictions of %d images to %s", result.images, path)


def main(args: argparse.Namespace) -> None:
    with arguments.user_errors():
        setup_logging()
        launch = distributed.init_distributed(args)
        arguments.finish_arguments(args, launch)
        resolve_model(args, args.device)
    if args.eval:
        evaluate_only(args, launch)
    else:
        with arguments.user_errors():
            preemption = Preemption()
            preemption.install()
            for line in describe_environment():
                logger.info(line)
            run, validation = prepare(args, launch, preemption)
        with ending(run):
            train(run, validation)
    distributed.shutdown()


if __name__ == "__main__":
    main(get_args_parser().parse_args())
