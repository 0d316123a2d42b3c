"""Pretrain MixMAE.

On this machine (a CPU, or one GPU):
    python main_pretrain.py --data_path /path/to/images --model mixmae_tiny --batch_size 32
On the GPUs of one machine:
    torchrun --standalone --nproc_per_node 8 main_pretrain.py --data_path /path/to/imagenet
The paper's experiments, on Slurm or here:
    sh exp/base_600ep/pretrain.sh partition 16 /path/to/imagenet
    sh exp/base_600ep/pretrain.sh local 8 /path/to/imagenet
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor

from engine_pretrain import train_one_epoch
from models_mixmae import MixMAE
from util.data.datasets import ImageDataset, build_dataset, build_loader
from util.data.samplers import TrainBatchSampler
from util.data.transforms import pretrain_transform
from util.errors import UserError
from util.knn import NEIGHBOURS, knn_accuracy, labelled_datasets
from util.run import advice, distributed
from util.run.checks import check_statistics
from util.run.config import ImageTrainingConfig
from util.run.defaults import pretraining_defaults
from util.run.failures import user_errors
from util.run.features import check_sample, held_out_images, own_features, probe_accuracy, rank_of_features, rank_sample
from util.run.flags import AT_LEAST_1, AT_LEAST_2, BELOW_1, FRACTION, NOT_NEGATIVE, Config, flag, free, get_parser
from util.run.metrics import log_model, training_operations
from util.run.optim import autocast
from util.run.session import Run, Start, find_start, launch_run, open_run, orderly_end
from util.seeding import keyed_generator, seed_all
from util.visualize import reconstruction_figure
from util.weights.layouts import LoadReport, load_pretraining
from util.weights.settings import METHOD, mixing_arguments, model_arguments
from util.weights.source import WeightsInfo

logger = logging.getLogger(__name__)

PICTURE_IMAGES = 6

variant = partial(flag, default_before=True)  # older runs, and the authors', used the method as released


@dataclass(frozen=True)
class VariantFlags(Config):
    TITLE: ClassVar[str] = "variants of the method"
    DESCRIPTION: ClassVar[str] = (
        "For ablations (exp/ablations); the defaults are the paper's method, as it was released."
    )

    decoder_dim: int | None = variant(None, "width of the decoder (default: the model's)", "CHANNELS", AT_LEAST_1)
    decoder_depth: int | None = variant(None, "blocks of the decoder (default: the model's)", "N", AT_LEAST_1)
    decoder_num_heads: int | None = variant(None, "heads of the decoder (default: the model's)", "N", AT_LEAST_1)
    mix_embed: bool = variant(False, "add a learned vector to tokens at each stage, one for each image of a mixture")
    masked_attn: bool = variant(True, "tokens attend only to their own image's; otherwise to all of their window")
    mix_images: int = variant(2, "images in a mixture; with 3, use --mask_ratio 0.67 for equal shares", "K", AT_LEAST_2)
    partners: str = variant(
        "pairs",
        "mix images in pairs (tuples), or, with --no_masked_attn, each with the ones after it",
        choices=("pairs", "cycle"),
    )
    mask_per_pair: bool = variant(False, "a mask for each pair instead of one for the whole batch: slow")
    reconstruct: str = variant("dual", "both (all) images of a mixture, or only the first", choices=("dual", "single"))
    fill: str = variant(
        "partner",
        "what replaces hidden cells: the partner's; or, with --no_masked_attn, a learned token as in SimMIM, zeros "
        "(the mean colour) or noise",
        choices=("partner", "mask_token", "zero", "noise"),
    )


@dataclass(frozen=True)
class PretrainConfig(VariantFlags, ImageTrainingConfig):
    TITLE: ClassVar[str] = "pretraining"
    PROGRAM: ClassVar[str] = "main_pretrain.py"
    PRETRAINS: ClassVar[bool] = True

    mask_ratio: float = flag(0.5, "fraction of the cells that are replaced by the partner's", "FRACTION", FRACTION)
    range_mask_ratio: float = flag(
        0.0, "add a random amount from 0 to this to each step's mask ratio", "FRACTION", BELOW_1
    )
    norm_pix_loss: bool = flag(True, "predict pixels normalised by their cell's mean and variance")
    vis_every: int = free(
        20, "draw a picture at the start, after the first epoch and every N epochs (0: never)", "EPOCHS", NOT_NEGATIVE
    )
    knn_every: int = free(0, "test by kNN every N epochs (0: never)", "EPOCHS", NOT_NEGATIVE)
    probe_every: int = free(0, "fit a linear probe every N epochs (0: never)", "EPOCHS", NOT_NEGATIVE)
    rank_every: int = free(
        0, "measure RankMe, without labels, on validation images if there are any, every N epochs (0: never)", "EPOCHS",
        NOT_NEGATIVE,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_per_pair and (self.partners != "pairs" or self.fill != "partner"):
            raise UserError("--mask_per_pair needs pairs: leave out --partners cycle and --fill")
        if self.batch_size is not None and self.batch_size % self.mix_images:
            raise UserError(
                f"--batch_size must be even, since images are mixed in pairs; got {self.batch_size}"
                if self.mix_images == 2
                else f"--batch_size must be a multiple of --mix_images {self.mix_images}; got {self.batch_size}"
            )


def get_args_parser() -> argparse.ArgumentParser:
    return get_parser(PretrainConfig, "Pretrain MixMAE on unlabelled images.")


def build_model(config: PretrainConfig) -> MixMAE:
    seed_all(config.seed, "weights")  # the same initial weights on every rank
    model: MixMAE = timm.create_model(
        config.model,
        drop_path_rate=config.drop_path,
        **mixing_arguments(vars(config)),
        **model_arguments(config),
    )
    model.random_masking(config.mask_ratio, keyed_generator(0))  # complains now about a ratio that hides nothing
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model


def rebuild_step(
    settings: argparse.Namespace, weights: dict[str, Tensor], device: torch.device
) -> tuple[MixMAE, Callable[[Tensor, dict[str, Any]], Tensor]]:
    """For util.replay: the model in training mode with its weights; the loss of (normalised images, micro-batch)."""
    model = build_model(settings)
    model.load_state_dict(weights)
    return model.to(device).train(), lambda imgs, micro: model(imgs, mask=micro["mask"])[0]


def load_to_go_on(model: MixMAE, config: PretrainConfig, weights: dict[str, Tensor], source: WeightsInfo) -> LoadReport:
    """Load a pretraining model to continue from; warns if it was pretrained by another variant of the method."""
    before = source.args
    differing = [name for name in METHOD if before.get(name) not in (None, getattr(config, name))]
    if differing:
        logger.warning(
            "%s was pretrained by another variant of the method: %s; to go on with that, give the same flags",
            source,
            ", ".join(f"{name} {before[name]} (here: {getattr(config, name)})" for name in differing),
        )
    return load_pretraining(model, weights, source)


def prepare(config: PretrainConfig, start: Start) -> tuple[Run, list[ImageDataset]]:
    """Everything before the first step: the run, and the images that its encoder is measured on."""
    launch = start.launch
    model = build_model(config).to(launch.device)
    dataset = build_dataset(config, "train", pretrain_transform(config))
    check_statistics(config, dataset, config.data_path, training=True)
    sampler = TrainBatchSampler(
        len(dataset),
        config.batch_size,
        config.accum_iter,
        launch.rank,
        launch.world_size,
        config.seed,
        config.mix_images,
    )
    loader = build_loader(dataset, sampler, config, launch.device)
    evaluated = []
    if config.knn_every or config.probe_every:
        evaluated = list(labelled_datasets(config, NEIGHBOURS if config.knn_every else (1,)))
    elif config.rank_every:
        evaluated = [held_out_images(config)]
    if config.rank_every:
        check_sample(evaluated[-1], model.num_features)
    operations = training_operations(log_model(config, model, mask_ratio=config.mask_ratio))
    groups = param_groups_weight_decay(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    data = {"train": dataset.fingerprint()}
    load_weights = partial(load_to_go_on, model, config)
    return open_run(config, start, model, optimizer, loader, data, load_weights, operations), evaluated


def save_picture(run: Run, epochs: int) -> None:
    """Write reconstructions of training images from all over the data set, after `epochs` epochs, to the output folder
    and TensorBoard."""
    if not distributed.is_main_process():
        return
    config, model = run.config, run.state.model
    dataset = run.loader.dataset
    number = max(1, min(PICTURE_IMAGES, len(dataset)) // config.mix_images) * config.mix_images
    imgs = torch.stack([dataset[(0, index)][0] for index in range(0, len(dataset), len(dataset) // number)][:number])
    mask = model.random_masking(config.mask_ratio, keyed_generator(config.seed, "picture"))
    # A few images at a time are not worth compiling for.
    with torch.compiler.set_stance("force_eager"), autocast(config.precision, run.device):
        picture = reconstruction_figure(model, run.normalize(imgs.to(run.device)), mask, config.mean, config.std)
    run.log.picture("reconstructions", picture, f"epoch{epochs:04d}.png", run.epoch_1000x)


def measure(run: Run, evaluated: list[ImageDataset]) -> dict[str, float]:
    """The measures of the encoder that are due, by their names in log.txt."""
    config, model, found = run.config, run.state.model, {}
    knn, probe, rank = map(run.is_due, (config.knn_every, config.probe_every, config.rank_every))
    images = [len(dataset) for dataset in evaluated]
    if knn or probe:
        features = [own_features(model, dataset, run.normalize, config) for dataset in evaluated]
    else:
        sample = rank_sample(images[-1], model.num_features)
        features, images = [own_features(model, evaluated[-1], run.normalize, config, sample)], [len(sample)]
    if knn:
        found |= {f"knn_acc1_k{k}": accuracy for k, accuracy in knn_accuracy(*features, images).items()}
    if probe:
        found["probe_acc1"] = probe_accuracy(*features, len(evaluated[0].classes))
    if rank:
        found["rankme"] = rank_of_features(features[-1][0], images[-1])
    return found


def train(run: Run, evaluated: list[ImageDataset]) -> None:
    """All epochs, each followed by the pictures and measures that are due."""
    config, progress = run.config, run.state.progress
    if config.vis_every and progress.step == 0:
        save_picture(run, epochs=0)
    while progress.epoch < config.epochs:
        epoch_start = time.time()
        record = {"train_lr": train_one_epoch(run)}
        if run.is_due(config.vis_every) or (config.vis_every and progress.epoch == 0):
            save_picture(run, progress.epoch + 1)
        if any(map(run.is_due, (config.knn_every, config.probe_every, config.rank_every))):
            with run.measuring():
                record |= measure(run, evaluated)
        run.finish_epoch({**record, "seconds": time.time() - epoch_start})


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        given, launch = launch_run(PretrainConfig, flags)
        start = find_start(given, launch)
        config = start.resolve(pretraining_defaults)
        run, evaluated = prepare(config, start)
    with orderly_end(run):
        train(run, evaluated)
    if launch.rank == 0:  # the ranks no longer know each other
        steps = advice.after_pretraining(config, run.loader.dataset.classes is not None)
        logger.info(advice.at_the_end("pretraining", config.output_dir, steps))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
