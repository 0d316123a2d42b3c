"""How well frozen features separate classes: a weighted k-nearest-neighbour classifier, without any training.

    python -m util.knn --checkpoint output_dir/checkpoint.pth --data_path /path/to/images
    torchrun --standalone --nproc_per_node 8 -m util.knn --checkpoint base_600ep --data_path /path/to/imagenet

The protocol is the usual one of self-supervised learning (Wu et al., CVPR 2018, "Instance discrimination", section 3.4;
DINO, Caron et al., ICCV 2021): both training and validation images are prepared as in evaluation (resized, centre
crop), features have length 1, and each of the k most similar training images votes for its class with
exp(similarity / temperature). The features here are the mean of the encoder's normed last stage, as the classification
head sees them.
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import timm
import torch.nn.functional as F
from torch import Tensor

from models_swin import SwinTransformer
from util.data.datasets import ImageDataset, build_dataset
from util.data.transforms import Normalize, eval_transform
from util.errors import UserError, require_writable, unreadable_is_user_error
from util.run import distributed
from util.run.checks import check_overlap, check_statistics
from util.run.classes import refuse_single_class, warn_of_empty_classes
from util.run.config import CheckpointFlags, DataFlags, DeviceFlags, ProcessFlags, resolve
from util.run.failures import user_errors
from util.run.features import own_features, rank_of_features
from util.run.flags import AT_LEAST_1, POSITIVE, Config, flag, get_parser, given_flags
from util.run.launch import Launch
from util.run.logger import setup_logging
from util.run.optim import exact_products
from util.run.progress import with_progress
from util.seeding import seed_all
from util.weights.layouts import load_encoder
from util.weights.settings import model_arguments, weight_settings
from util.weights.source import WeightsInfo, read_weights

logger = logging.getLogger(__name__)

NEIGHBOURS = (10, 20)
TEMPERATURE = 0.07
CHUNK_ELEMENTS = 2**26  # similarities held at a time: 256 MB


def labelled_datasets(config: Config, neighbours: Sequence[int]) -> tuple[ImageDataset, ImageDataset]:
    """The training and validation images, both as evaluation sees them.

    Args:
        config: what `build_dataset` takes, and `input_size`.
        neighbours: the values of k.

    Raises:
        UserError: no labels or only one, no validation images or in other units than the configuration's mean and
            standard deviation, fewer training images than a k.
    """
    train, val = (
        build_dataset(config, split, eval_transform(config), require_labels=True) for split in ("train", "val")
    )
    if train.targets is not None:  # else they are known when the images have been read
        refuse_single_class(len(np.unique(train.targets)), config)
    warn_of_empty_classes(val)
    check_statistics(config, val, f"{config.data_path} (val)")
    check_overlap(train, val)
    if min(neighbours) < 1 or max(neighbours) > len(train):
        raise UserError(f"k must lie between 1 and the {len(train)} training images, got {list(neighbours)}")
    return train, val


Features = tuple[Tensor, Tensor]  # of this rank's images, and their labels: see util.run.features.own_features


def gather_all(own: Tensor, total: int) -> Tensor:
    """(n, ...) of each rank's samples -> (total, ...) of all samples in their order, the same on all ranks."""
    gathered = own.new_zeros(total, *own.shape[1:])
    gathered[distributed.get_rank() :: distributed.get_world_size()] = own
    return distributed.all_reduce_sum(gathered)  # every row is zero on all ranks but its own


def knn_accuracy(
    train: Features,
    val: Features,
    totals: Sequence[int],
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, float]:
    """Top-1 accuracy in percent for each k; the same on all ranks, which share the work and must call this together.

    Args:
        train, val: this rank's.
        totals: how many training and validation images all ranks have.
        neighbours: the values of k.
        temperature: of the votes.
    """
    features, labels = F.normalize(train[0], dim=1), train[1]
    queries, targets = gather_all(F.normalize(val[0], dim=1), totals[1]), gather_all(val[1], totals[1])
    num_classes = 1 + int(max(gather_all(labels, totals[0]).max(), targets.max()))
    correct = dict.fromkeys(neighbours, 0)
    chunk = max(1, CHUNK_ELEMENTS * distributed.get_world_size() // totals[0])
    chunks = zip(queries.split(chunk), targets.split(chunk))
    for query, target in with_progress(chunks, totals[1], "nearest neighbours", lambda part: len(part[0])):
        similarity, label = nearest(query, features, labels, max(neighbours))
        weight = ((similarity - similarity[:, :1]).double() / temperature).exp()  # relative to the nearest one's
        for k in correct:
            votes = weight.new_zeros(len(query), num_classes).scatter_add_(1, label[:, :k], weight[:, :k])
            correct[k] += int((votes.argmax(dim=1) == target).sum())
    return {k: 100 * count / totals[1] for k, count in correct.items()}


def nearest(query: Tensor, features: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and labels (n, k) of the k most similar training images of all ranks, the most similar first.

    Each rank looks among its own training images; the best of all ranks are among the best k of each.

    Args:
        query: (n, D), the same on all ranks.
        features, labels: (N, D) and (N,), this rank's training images.
    """
    with exact_products():  # in TF32 neighbours would swap, and votes be wrong by a percent
        own_similarity, own_index = (query @ features.T).topk(min(k, len(features)), dim=1)

    def of_all_ranks(own: Tensor, where_too_few: float) -> Tensor:
        """(n, up to k) of this rank -> (n, k * ranks)"""
        everyone = own.new_zeros(distributed.get_world_size(), len(query), k)
        everyone[distributed.get_rank()] = F.pad(own, (0, k - own.shape[1]), value=where_too_few)
        return distributed.all_reduce_sum(everyone).transpose(0, 1).flatten(1)

    similarity, index = of_all_ranks(own_similarity, float("-inf")).topk(k, dim=1)
    return similarity, of_all_ranks(labels[own_index], 0).gather(1, index)


# --- The command ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnnConfig(CheckpointFlags, DataFlags, DeviceFlags, ProcessFlags):
    TITLE: ClassVar[str] = "kNN"
    DATA: ClassVar[str] = "a folder with train/ and val/ in it, both with one folder of images per class"

    k: tuple[int, ...] = flag(
        NEIGHBOURS, "how many neighbours vote", "K", (lambda value: min(value) >= 1, "must be at least 1")
    )
    temperature: float = flag(TEMPERATURE, "temperature of the votes", "T", POSITIVE)
    random_weights: bool = flag(False, "use the checkpoint's architecture with random weights, for comparison")
    model_ema: bool = flag(False, "use the averaged weights in the checkpoint")
    batch_size: int = flag(64, "batch size per rank", "N", AT_LEAST_1)
    out: str = flag("", "write the result and all settings to this file", "FILE.json")


def get_args_parser() -> argparse.ArgumentParser:
    description = "Classify validation images by their nearest training images in an encoder's feature space."
    return get_parser(KnnConfig, description, "python -m util.knn")


def load_model(given: KnnConfig, launch: Launch) -> tuple[SwinTransformer, KnnConfig, WeightsInfo]:
    """The encoder of `--checkpoint` on its device, and the configuration, completed by what is recorded with it.

    Raises:
        UserError: the weights cannot be used, or do not say which model they are.
    """
    weights, info = distributed.once_per_node(partial(read_weights, given.checkpoint, given.model_ema))
    settings = weight_settings(info.args, given.checkpoint, given.as_dict())
    config = resolve(given, launch, settings)
    seed_all(config.seed, "weights")
    model = timm.create_model(config.model, num_classes=0, **model_arguments(settings))
    if not config.random_weights:
        logger.info("%s", load_encoder(model, weights, info))
    return model.to(launch.device), config, info


def evaluate(given: KnnConfig, launch: Launch) -> dict:
    """The result with all its settings.

    Raises:
        UserError: for what the user can put right.
    """
    model, config, info = load_model(given, launch)
    normalize = Normalize(config.mean, config.std).to(launch.device)
    train, val = labelled_datasets(config, config.k)
    check_statistics(config, train, f"{config.data_path} (train)")
    features = [own_features(model, dataset, normalize, config) for dataset in (train, val)]
    accuracy = knn_accuracy(*features, (len(train), len(val)), config.k, config.temperature)
    return config.as_dict() | {
        "accuracy": {str(k): value for k, value in accuracy.items()},  # k -> top-1 in percent
        "rankme": rank_of_features(features[1][0], len(val)),
        "epoch": info.epoch,
        "features": f"mean of the last stage, {model.num_features} channels",
        "train_images": len(train),
        "val_images": len(val),
    }


def describe(result: dict) -> str:
    """One self-contained line."""
    accuracy = ", ".join(f"k={k} {value:.3f}%" for k, value in result["accuracy"].items())
    weights = result["checkpoint"] + (f" after {result['epoch'] + 1} epochs" if result["epoch"] is not None else "")
    if result["model_ema"]:
        weights += " (averaged weights)"
    if result["random_weights"]:
        weights = f"random weights (seed {result['seed']})"
    height, width = result["input_size"]
    return (
        f"kNN top-1: {accuracy} of {weights} ({result['model']} at {height}x{width}, {result['features']}, temperature "
        f"{result['temperature']:g}, {result['precision']}) on {result['val_images']} images of "
        f"{result['data_path']}, by {result['train_images']} training images; RankMe of the features "
        f"{result['rankme']:.1f}"
    )


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        setup_logging()
        given = given_flags(KnnConfig, flags)
        launch = distributed.init_distributed(given)
        if launch.rank == 0 and given.out:
            require_writable(given.out, "--out")
        result = evaluate(given, launch)
        logger.info("%s", describe(result))
        if launch.rank == 0 and given.out:
            with unreadable_is_user_error(f"--out {given.out} cannot be written"):
                Path(given.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        distributed.shutdown()


if __name__ == "__main__":
    main(get_args_parser().parse_args())
