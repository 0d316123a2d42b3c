"""How well frozen features separate classes: a weighted k-nearest-neighbour classifier, without any training.

    python -m util.knn --checkpoint output_dir/checkpoint.pth --data_path /path/to/images
    torchrun --standalone --nproc_per_node 8 -m util.knn --checkpoint base_600ep --data_path /path/to/imagenet

The protocol is the usual one of self-supervised learning (Wu et al., CVPR 2018, "Instance discrimination", section 3.4;
DINO, Caron et al., ICCV 2021): training and validation images both as in evaluation (resized, centre crop), features of
length 1, and each of the k most similar training images votes for its class with exp(similarity / temperature). The
features here are the mean of the encoder's normed last stage, as the classification head sees them.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from models_swin import SwinTransformer
from util.data.datasets import ImageDataset, build_dataset, build_loader
from util.data.samplers import EvalBatchSampler
from util.data.transforms import Normalize, eval_transform
from util.run import config as arguments
from util.run import distributed
from util.run.logger import setup_logging
from util.run.optim import autocast, resolve_precision
from util.seeding import seed_all
from util.weights.layouts import load_encoder
from util.weights.source import WeightsInfo, read_weights

logger = logging.getLogger(__name__)

NEIGHBOURS = (10, 20)
TEMPERATURE = 0.07
CHUNK_ELEMENTS = 2**26  # similarities held at a time: 256 MB

# The encoder inside every pretraining model, under its classifier's name.
ENCODERS = {
    name: next(encoder for encoder in arguments.CLASSIFIER_MODELS if encoder.startswith(name.replace("mixmae", "swin")))
    for name in arguments.PRETRAINING_MODELS
}
AUTHORS_NAMES = {theirs: ENCODERS[ours] for theirs, ours in arguments.AUTHORS_PRETRAINING_NAMES.items()}


def labelled_datasets(args: argparse.Namespace, neighbours: Sequence[int]) -> tuple[ImageDataset, ImageDataset]:
    """The training and validation images, both as evaluation sees them.

    Args:
        args: what `build_dataset` takes, and `input_size`.
        neighbours: the values of k.

    Raises:
        ValueError, OSError: no labels, no validation images, or fewer training images than a k.
    """
    train, val = (build_dataset(args, split, eval_transform(args), require_labels=True) for split in ("train", "val"))
    if min(neighbours) < 1 or max(neighbours) > len(train):
        raise ValueError(f"k must lie between 1 and the {len(train)} training images, got {list(neighbours)}")
    return train, val


def knn_accuracy(
    model: SwinTransformer,
    train: ImageDataset,
    val: ImageDataset,
    normalize: Normalize,
    args: argparse.Namespace,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, float]:
    """Top-1 accuracy in percent for each k; the same on all ranks, which share the work and must call this together.

    Args:
        model: a classifier or pretraining model, not wrapped; left in the mode that it was in.
        train, val: of `labelled_datasets`.
        normalize: on the model's device.
        args: `batch_size`, `precision`, `device`, and what `build_loader` takes.
        neighbours: the values of k.
        temperature: of the votes.
    """
    features, labels = own_features(model, train, normalize, args)
    queries, targets = own_features(model, val, normalize, args)
    queries, targets = gather_all(queries, len(val)), gather_all(targets, len(val))
    num_classes = 1 + int(max(gather_all(labels, len(train)).max(), targets.max()))
    correct = dict.fromkeys(neighbours, 0)
    chunk = max(1, CHUNK_ELEMENTS * distributed.get_world_size() // len(train))
    for query, target in zip(queries.split(chunk), targets.split(chunk)):
        similarity, label = nearest(query, features, labels, max(neighbours))
        weight = ((similarity - similarity[:, :1]).double() / temperature).exp()  # relative to the nearest one's
        for k in correct:
            votes = weight.new_zeros(len(query), num_classes).scatter_add_(1, label[:, :k], weight[:, :k])
            correct[k] += int((votes.argmax(dim=1) == target).sum())
    return {k: 100 * count / len(val) for k, count in correct.items()}


@torch.inference_mode()
def own_features(
    model: SwinTransformer, dataset: ImageDataset, normalize: Normalize, args: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """Features (n, num_features) of length 1 and labels (n,) of this rank's images: `rank`, `rank + world_size`, ..."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    loader = build_loader(dataset, EvalBatchSampler(len(dataset), args.batch_size, rank, world_size), args, args.device)
    features = [torch.zeros(0, model.num_features, device=args.device)]
    labels = [torch.zeros(0, dtype=torch.long)]
    was_training = model.training
    model.eval()
    for imgs, targets in loader:
        with autocast(args.precision, args.device):
            tokens = model.forward_features(normalize(imgs.to(args.device, non_blocking=True)))
        pooled = model.forward_head(tokens.float(), pre_logits=True)
        features.append(F.normalize(pooled, dim=1))
        labels.append(targets)
    model.train(was_training)
    return torch.cat(features), torch.cat(labels).to(args.device)


def gather_all(own: Tensor, total: int) -> Tensor:
    """(n, ...) of each rank's samples -> (total, ...) of all samples in their order, the same on all ranks."""
    gathered = own.new_zeros(total, *own.shape[1:])
    gathered[distributed.get_rank() :: distributed.get_world_size()] = own
    return distributed.all_reduce_sum(gathered)  # every row is zero on all ranks but its own


def nearest(query: Tensor, features: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and labels (n, k) of the k most similar training images of all ranks, the most similar first.

    Each rank looks among its own training images; the best of all ranks are among the best k of each.

    Args:
        query: (n, D), the same on all ranks.
        features, labels: (N, D) and (N,), this rank's training images.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    own_similarity, own_index = (query @ features.T).topk(min(k, len(features)), dim=1)
    candidates = query.new_full((world_size, len(query), k), float("-inf"))
    candidate_labels = labels.new_zeros(world_size, len(query), k)
    candidates[:rank], candidates[rank + 1 :] = 0, 0
    candidates[rank, :, : own_index.shape[1]] = own_similarity
    candidate_labels[rank, :, : own_index.shape[1]] = labels[own_index]
    candidates = distributed.all_reduce_sum(candidates).transpose(0, 1).flatten(1)  # (n, world_size * k)
    candidate_labels = distributed.all_reduce_sum(candidate_labels).transpose(0, 1).flatten(1)
    similarity, index = candidates.topk(k, dim=1)
    return similarity, candidate_labels.gather(1, index)


# --- The command ----------------------------------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m util.knn",
        description="Classify validation images by their nearest training images in an encoder's feature space.",
        formatter_class=arguments.HelpFormatter,
    )
    group = parser.add_argument_group("kNN")
    group.add_argument(
        "--checkpoint", required=True, metavar="WEIGHTS", help="a path, https URL#sha256=..., or base_600ep, ..."
    )
    group.add_argument("--k", type=int, nargs="+", default=NEIGHBOURS, metavar="K", help="how many neighbours vote")
    group.add_argument("--temperature", type=float, default=TEMPERATURE, metavar="T", help="of the votes")
    group.add_argument(
        "--random_weights", action="store_true", help="the checkpoint's architecture untrained, for comparison"
    )
    group.add_argument("--model_ema", action="store_true", help="the averaged weights in the checkpoint")
    group.add_argument("--model", metavar="NAME", help="for weights that do not record which model they are")
    group.add_argument(
        "--input_size", type=int, nargs="+", metavar="PIXELS", help="one side, or height and width (default: recorded)"
    )
    group.add_argument("--batch_size", type=int, default=64, metavar="N", help="images per rank at a time")
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: as in training")
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of --random_weights")
    group.add_argument("--out", default="", metavar="FILE.json", help="write the result with all its settings")
    arguments.add_data_arguments(parser)
    parser.set_defaults(in_chans=None)  # recorded
    arguments.add_distributed_arguments(parser)
    return parser


def load_model(args: argparse.Namespace) -> tuple[SwinTransformer, WeightsInfo]:
    """The encoder of `--checkpoint`, shaped as its recorded arguments say; fills in what `args` leaves to them.

    Raises:
        ValueError: the weights cannot be used, or do not say which model they are.
    """
    weights, info = read_weights(args.checkpoint, ema=args.model_ema)
    recorded = {"in_chans": 3, "patch_size": None, "window_size": None, "input_size": None} | info.args
    arguments.check_recorded(recorded, args.checkpoint)
    name = args.model or recorded.get("model")
    if name is None:
        raise ValueError(f"{args.checkpoint} does not record which model it is: give --model")
    args.model = arguments.resolve_model_name(
        name, arguments.CLASSIFIER_MODELS, AUTHORS_NAMES | arguments.AUTHORS_CLASSIFIER_NAMES | ENCODERS
    )
    if args.in_chans is None:
        args.in_chans = recorded["in_chans"]
    if args.input_size is not None:
        recorded["input_size"] = args.input_size[0], args.input_size[-1]
    shape = argparse.Namespace(**recorded | {"in_chans": args.in_chans, "drop_path": 0.0})
    seed_all(args.seed, "weights")
    model = timm.create_model(args.model, num_classes=0, **arguments.model_shape(shape))
    args.input_size = model.img_size
    if not args.random_weights:
        logger.info("%s", load_encoder(model, weights, info))
    photos = args.in_chans == len(arguments.IMAGENET_MEAN)  # the authors' files record no statistics
    default_mean = arguments.IMAGENET_MEAN if photos else (0.5,) * args.in_chans
    default_std = arguments.IMAGENET_STD if photos else (0.25,) * args.in_chans
    args.mean = tuple(args.mean or recorded.get("mean") or default_mean)
    args.std = tuple(args.std or recorded.get("std") or default_std)
    return model.to(args.device), info


def evaluate(args: argparse.Namespace) -> dict:
    """The result with all its settings. Raises ValueError or OSError for what the user can put right."""
    if args.temperature <= 0 or args.batch_size < 1:
        raise ValueError(
            f"--temperature and --batch_size must be positive, got {args.temperature:g} and {args.batch_size}"
        )
    args.precision = resolve_precision(args.precision, args.device)
    model, info = load_model(args)
    normalize = Normalize(args.mean, args.std).to(args.device)
    train, val = labelled_datasets(args, args.k)
    accuracy = knn_accuracy(model, train, val, normalize, args, args.k, args.temperature)
    return {
        "accuracy": {str(k): value for k, value in accuracy.items()},  # k -> top-1 in percent
        "temperature": args.temperature,
        "checkpoint": args.checkpoint,
        "epoch": info.epoch,
        "model_ema": args.model_ema,
        "random_weights": args.random_weights,
        "seed": args.seed,
        "model": args.model,
        "features": f"mean of the last stage, {model.num_features} channels",
        "input_size": list(model.img_size),
        "mean": list(args.mean),
        "std": list(args.std),
        "precision": args.precision,
        "data": args.data_path,
        "train_images": len(train),
        "val_images": len(val),
    }


def describe(result: dict) -> str:
    """One line that stands for itself."""
    accuracy = ", ".join(f"k={k} {value:.3f} %" for k, value in result["accuracy"].items())
    weights = result["checkpoint"] + (f" after epoch {result['epoch']}" if result["epoch"] is not None else "")
    if result["model_ema"]:
        weights += " (averaged weights)"
    if result["random_weights"]:
        weights = f"random weights (seed {result['seed']})"
    height, width = result["input_size"]
    return (
        f"kNN top-1: {accuracy} of {weights} ({result['model']} at {height}x{width}, {result['features']}, temperature "
        f"{result['temperature']:g}, {result['precision']}) on {result['val_images']} images of {result['data']}, by "
        f"{result['train_images']} training images"
    )


def main(args: argparse.Namespace) -> None:
    with arguments.user_errors():
        setup_logging()
        distributed.init_distributed(args)
        if distributed.is_main_process() and args.out:  # while an evaluation is not yet lost
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            open(args.out, "ab").close()
        result = evaluate(args)
        logger.info("%s", describe(result))
        if distributed.is_main_process() and args.out:
            Path(args.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    distributed.shutdown()


if __name__ == "__main__":
    main(get_args_parser().parse_args())
