"""Pretrain MixMAE.

On this machine (a CPU, or one GPU):
    python main_pretrain.py --data_path /path/to/images --model mixmae_tiny --batch_size 32
On the GPUs of one machine:
    torchrun --standalone --nproc_per_node 8 main_pretrain.py --data_path /path/to/imagenet --norm_pix_loss
The paper's experiments, on Slurm or here:
    sh exp/base_600ep/pretrain.sh partition 16 /path/to/imagenet
    sh exp/base_600ep/pretrain.sh local 8 /path/to/imagenet
"""

import argparse
import logging
import time

import timm
import torch
from timm.optim import param_groups_weight_decay

from engine_pretrain import train_one_epoch
from models_mixmae import MixMAE
from util.data.datasets import ImageDataset, build_dataset, build_loader
from util.data.samplers import TrainBatchSampler
from util.data.transforms import Normalize, pretrain_transform
from util.knn import NEIGHBOURS, knn_accuracy, labelled_datasets
from util.run import config as arguments
from util.run import distributed
from util.run.logger import describe_environment, setup_logging
from util.run.optim import autocast, make_scaler, resolve_precision
from util.run.preemption import Preemption
from util.run.session import Run, count_work, ending, open_run
from util.run.state import Progress, TrainingState
from util.seeding import keyed_generator, seed_all
from util.visualize import reconstruction_figure
from util.weights.layouts import load_pretraining
from util.weights.source import read_weights

logger = logging.getLogger(__name__)

PICTURE_IMAGES = 6


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Pretrain MixMAE on unlabelled images.", formatter_class=arguments.HelpFormatter
    )
    arguments.add_model_arguments(parser, "mixmae_base", arguments.PRETRAINING_MODELS)
    group = parser.add_argument_group("pretraining")
    group.add_argument(
        "--mask_ratio", type=float, default=0.5, metavar="SHARE", help="share of cells that are mixed in"
    )
    group.add_argument(
        "--range_mask_ratio",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="adds U(0, SHARE) to every step's mask ratio",
    )
    group.add_argument(
        "--norm_pix_loss", action="store_true", help="predict pixels normalised by their cell's mean and variance"
    )
    group.add_argument("--vis_every", type=int, default=20, metavar="EPOCHS", help="epochs between pictures; 0: none")
    group.add_argument("--knn_every", type=int, default=0, metavar="EPOCHS", help="epochs between kNN tests; 0: none")
    arguments.add_optimizer_arguments(parser, batch_size=64, epochs=400, blr=1.5e-4, min_lr=0.0, warmup_epochs=40)
    arguments.add_data_arguments(parser)
    arguments.add_run_arguments(parser)
    return parser


def prepare(
    args: argparse.Namespace, launch: distributed.Launch, preemption: Preemption
) -> tuple[Run, tuple[ImageDataset, ImageDataset] | None]:
    """Everything before the first step: the run, and the labelled images of --knn_every.

    Raises:
        ValueError, OSError: for what the user can put right.
    """
    device = args.device
    arguments.finish_arguments(args, launch)
    args.model = arguments.resolve_model_name(
        args.model, arguments.PRETRAINING_MODELS, arguments.AUTHORS_PRETRAINING_NAMES
    )
    args.precision = resolve_precision(args.precision, device)
    if args.batch_size % 2:
        raise ValueError(f"--batch_size must be even, since images are mixed in pairs; got {args.batch_size}")

    seed_all(args.seed, "weights")  # the same initial weights on every rank
    model: MixMAE = timm.create_model(
        args.model,
        norm_pix_loss=args.norm_pix_loss,
        range_mask_ratio=args.range_mask_ratio,
        **arguments.model_shape(args),
    )
    args.input_size = model.img_size
    model.random_masking(args.mask_ratio, keyed_generator(0))  # complains now about a ratio that hides nothing
    model.to(device)
    model.set_grad_checkpointing(args.grad_checkpointing)

    dataset = build_dataset(args, "train", pretrain_transform(args))
    sampler = TrainBatchSampler(
        len(dataset), args.batch_size, args.accum_iter, launch.rank, launch.world_size, args.seed
    )
    loader = build_loader(dataset, sampler, args, device)
    if launch.rank == 0:
        parameters, multiply_adds = count_work(model, 2, mask_ratio=args.mask_ratio)
        logger.info(
            "%s at %dx%d: %.1f M parameters, %.2f G multiply-adds per image, %s",
            args.model, *model.img_size, parameters / 1e6, multiply_adds / 1e9, args.precision,
        )  # fmt: skip
    optimizer = torch.optim.AdamW(
        param_groups_weight_decay(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.95), fused=True
    )
    if args.compile:
        model.compile_blocks()
    state = TrainingState(model, optimizer, make_scaler(args.precision, device), args, Progress())
    labelled = labelled_datasets(args, NEIGHBOURS) if args.knn_every else None

    def load_start() -> None:
        weights, source = read_weights(args.finetune)
        logger.info("%s", load_pretraining(model, weights, source))

    run = open_run(args, device, state, loader, Normalize(args.mean, args.std), preemption, load_start)
    return run, labelled


def due(every: int, run: Run) -> bool:
    """Whether something that happens every so many epochs, and after the last one, is due at the end of this one."""
    finished = run.state.progress.epoch + 1
    return every > 0 and (finished % every == 0 or finished == run.args.epochs)


def save_picture(run: Run) -> None:
    """Write reconstructions of training images from all over the data set to the output folder and TensorBoard."""
    if not distributed.is_main_process():
        return
    args, model = run.args, run.state.model
    dataset = run.loader.dataset
    number = min(PICTURE_IMAGES, len(dataset)) // 2 * 2
    imgs = torch.stack([dataset[(0, index)][0] for index in range(0, len(dataset), len(dataset) // number)][:number])
    mask = model.random_masking(args.mask_ratio, keyed_generator(args.seed, "picture"))
    with autocast(args.precision, run.device):
        picture = reconstruction_figure(model, run.normalize(imgs.to(run.device)), mask, args.mean, args.std)
    name = f"epoch{run.state.progress.epoch + 1:04d}.png"
    run.log.picture("reconstructions", picture, name, run.epoch_1000x)


def main(args: argparse.Namespace) -> None:
    with arguments.user_errors():
        setup_logging()
        launch = distributed.init_distributed(args)
        preemption = Preemption()
        preemption.install()
        for line in describe_environment():
            logger.info(line)
        run, labelled = prepare(args, launch, preemption)
    start = time.time()
    if run.state.progress.epoch >= args.epochs:
        logger.info("all %d epochs were done already", args.epochs)
    with ending(run):
        while run.state.progress.epoch < args.epochs:
            epoch_start = time.time()
            lr = train_one_epoch(run)
            if due(args.vis_every, run):
                save_picture(run)
            record = {"train_lr": lr}
            if labelled is not None and due(args.knn_every, run):
                accuracy = knn_accuracy(run.state.model, *labelled, run.normalize, args)
                record |= {f"knn_acc1_k{k}": value for k, value in accuracy.items()}
            run.finish_epoch({**record, "seconds": time.time() - epoch_start})
    minutes = (time.time() - start) / 60
    logger.info("pretraining took %.1f minutes; checkpoint: %s/checkpoint.pth", minutes, args.output_dir)
    distributed.shutdown()


if __name__ == "__main__":
    main(get_args_parser().parse_args())
