"""Features of whole data sets, shared out to all ranks, and what they are worth without training anything on top."""

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models_swin import SwinTransformer
from util.data.datasets import ImageDataset, build_loader
from util.data.open_source import find_validation, open_source
from util.data.samplers import Key
from util.data.transforms import Normalize, eval_transform
from util.errors import UserError
from util.layers.compilation import eager_if
from util.run import distributed
from util.run.checks import check_statistics
from util.run.config import Config
from util.run.optim import autocast
from util.run.progress import with_progress

logger = logging.getLogger(__name__)

RANK_IMAGES = 2048  # at least, and twice as many as there are channels: the rank is below both
CHUNK = 4096
RIDGE = 1e-2  # of the probe, relative to the number of images


@torch.inference_mode()
def own_features(
    model: SwinTransformer,
    dataset: ImageDataset,
    normalize: Normalize,
    config: Config,
    chosen: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Features (n, num_features) and labels (n,) of this rank's images: `rank`, `rank + world_size`, ... of `chosen`.

    The features are the mean of the encoder's normed last stage, as the classification head sees them.

    Args:
        model: a classifier or pretraining model, not wrapped; left in the mode that it was in.
        dataset: as evaluation sees it.
        normalize: on the model's device.
        config: `batch_size`, `precision`, and what `build_loader` takes.
        chosen: numbers of images; None means all.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    device = next(model.parameters()).device
    chosen = range(len(dataset)) if chosen is None else chosen
    own: list[Key] = [(0, index) for index in chosen[rank::world_size]]
    batches = [own[start : start + config.batch_size] for start in range(0, len(own), config.batch_size)]
    features = [torch.zeros(0, model.num_features, device=device)]
    labels = [torch.zeros(0, dtype=torch.long)]
    was_training, whole = model.training, 0
    model.eval()
    for imgs, targets in with_progress(build_loader(dataset, batches, config, device), len(chosen), "features"):
        whole = max(whole, len(imgs))
        with autocast(config.precision, device), eager_if(model.is_compiled and len(imgs) < whole):
            tokens = model.forward_features(normalize(imgs.to(device, non_blocking=True)))
        features.append(model.forward_head(tokens.float(), pre_logits=True))
        labels.append(targets)
    model.train(was_training)
    return torch.cat(features), torch.cat(labels).to(device)


def rankme(features: Tensor) -> float:
    """The effective rank of features (N, D): exp of the entropy of their singular values (RankMe, Garrido et al.,
    ICML 2023, equation 1). 1 if all lie on a line, at most min(N, D); it falls when an encoder collapses.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + 1e-7
    return float((-shares * shares.log()).sum().exp())


def held_out_images(config: Config) -> ImageDataset:
    """Validation images, which need no labels; training images if there are no others. Transformed as for evaluation,
    but `config.bad_images` applies: this only monitors a run."""
    split, source = "train", None
    if config.val_share or (not config.dataset and find_validation(config.data_path) is not None):
        try:
            split, source = "val", open_source(config, "val", False)
        except (UserError, OSError) as error:  # as an empty val/
            logger.warning("RankMe is measured on training images: %s", error)
    else:
        logger.info("RankMe is measured on training images: there are no others (val/, or --val_share 0.1)")
    source = source or open_source(config, "train", False)
    transform, skip_bad = eval_transform(config), config.bad_images == "skip"
    dataset = ImageDataset(source, transform, config.seed, skip_bad, config.max_bad_images)
    logger.info("RankMe is measured on a sample of %d images (%s)", len(dataset), split)
    check_statistics(config, dataset, f"{config.data_path} ({split})")
    return dataset


def check_sample(dataset: ImageDataset, num_features: int) -> None:
    """Warn if `dataset` has too few images for RankMe to mean much.

    Raises:
        UserError: the images are streamed, so that no sample is the same twice.
    """
    if dataset.source.streamed:
        raise UserError("--rank_every needs images that can be read again, these are streamed: leave it out")
    if len(dataset) < num_features:
        logger.warning("RankMe of %d images is at most that, whatever the %d features are", len(dataset), num_features)


def rank_sample(images: int, num_features: int) -> list[int]:
    """The images whose features' rank is measured: numbers spread evenly over a data set."""
    count = min(max(RANK_IMAGES, 2 * num_features), images)
    return [position * images // count for position in range(count)]


def rank_of_features(own: Tensor, images: int) -> float:
    """RankMe of a sample of `images` images, from the features (n, D) of this rank's own; the same on all ranks, which
    call this together."""
    chosen = torch.tensor(rank_sample(images, own.shape[1]))
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    mine = chosen % ranks == rank
    features = own.new_zeros(len(chosen), own.shape[1])
    features[mine] = own[(chosen[mine] // ranks).to(own.device)]
    return rankme(distributed.all_reduce_sum(features))  # every row is zero on all ranks but its own


def probe_accuracy(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], num_classes: int) -> float:
    """Top-1 in percent of a linear classifier of standardised features: ridge regression, in closed form.

    Args:
        train, val: features (n, D) and labels (n,) of this rank's images; all ranks call this together.
    """
    features = train[0]
    count = distributed.all_reduce_sum(features.new_tensor(len(features), dtype=torch.float64))
    # In chunks, since the features of a large data set in float64 may not fit beside the model.
    mean = distributed.all_reduce_sum(sum_over_chunks(lambda values, _: values.sum(0), *train)) / count
    variance = distributed.all_reduce_sum(sum_over_chunks(lambda v, _: (v - mean).square().sum(0), *train)) / count

    def inputs(values: Tensor) -> Tensor:
        standardised = (values - mean) / (variance.sqrt() + 1e-6)
        return torch.cat([standardised, torch.ones_like(standardised[:, :1])], dim=1)

    def products(values: Tensor, labels: Tensor) -> Tensor:
        x = inputs(values)
        return x.T @ torch.cat([x, F.one_hot(labels, num_classes).double()], dim=1)

    size = features.shape[1] + 1
    among_inputs, with_classes = distributed.all_reduce_sum(sum_over_chunks(products, *train)).split(
        [size, num_classes], dim=1
    )
    penalty = torch.full_like(among_inputs[0], RIDGE * float(count))
    penalty[-1] = 0  # of the bias
    weights = torch.linalg.solve(among_inputs + penalty.diag(), with_classes)

    def hits(values: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([((inputs(values) @ weights).argmax(1) == targets).sum(), targets.new_tensor(len(targets))])

    right, total = distributed.all_reduce_sum(sum_over_chunks(hits, *val)).tolist()
    return 100 * right / total


def sum_over_chunks(function: Callable[[Tensor, Tensor], Tensor], features: Tensor, labels: Tensor) -> Tensor:
    """The sum of `function` (of features in float64, and labels) over a few thousand images at a time."""
    return sum(function(values.double(), some) for values, some in zip(features.split(CHUNK), labels.split(CHUNK)))
