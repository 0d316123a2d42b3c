"""Features of whole data sets, shared out to all ranks, and what they are worth without training anything on top."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models_swin import SwinTransformer
from util.data.datasets import ImageDataset, build_loader
from util.data.samplers import Key
from util.data.transforms import Normalize
from util.run import distributed
from util.run.config import Config
from util.run.optim import autocast
from util.run.progress import with_progress

RANK_IMAGES = 2048
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
    was_training = model.training
    model.eval()
    for imgs, targets in with_progress(build_loader(dataset, batches, config, device), len(chosen), "features"):
        with autocast(config.precision, device):
            tokens = model.forward_features(normalize(imgs.to(device, non_blocking=True)))
        features.append(model.forward_head(tokens.float(), pre_logits=True))
        labels.append(targets)
    model.train(was_training)
    return torch.cat(features), torch.cat(labels).to(device)


def gather_all(own: Tensor, total: int) -> Tensor:
    """(n, ...) of each rank's samples -> (total, ...) of all samples in their order, the same on all ranks."""
    gathered = own.new_zeros(total, *own.shape[1:])
    gathered[distributed.get_rank() :: distributed.get_world_size()] = own
    return distributed.all_reduce_sum(gathered)  # every row is zero on all ranks but its own


def rankme(features: Tensor) -> float:
    """The effective rank of features (N, D): exp of the entropy of their singular values (RankMe, Garrido et al.,
    ICML 2023, equation 1). 1 where all lie on a line, at most min(N, D); it falls when an encoder collapses.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + 1e-7
    return float((-shares * shares.log()).sum().exp())


def rank_of_sample(model: SwinTransformer, dataset: ImageDataset, normalize: Normalize, config: Config) -> float:
    """RankMe of at most RANK_IMAGES images from all over `dataset`; the same on all ranks, together."""
    count = min(RANK_IMAGES, len(dataset))
    chosen = [position * len(dataset) // count for position in range(count)]
    features, _ = own_features(model, dataset, normalize, config, chosen)
    return rankme(gather_all(features, count))


def probe_accuracy(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], num_classes: int) -> float:
    """Top-1 in percent of a linear classifier of standardised features: ridge regression, in closed form.

    Args:
        train, val: features (n, D) and labels (n,) of this rank's images; all ranks call this together.
    """
    (features, labels), (queries, targets) = train, val
    features = features.double()
    count = distributed.all_reduce_sum(torch.tensor(float(len(features)), dtype=torch.float64))
    mean = distributed.all_reduce_sum(features.sum(0)) / count.to(features.device)
    std = (distributed.all_reduce_sum((features - mean).square().sum(0)) / count.to(features.device)).sqrt() + 1e-6

    def inputs(values: Tensor) -> Tensor:
        standardised = (values.double() - mean) / std
        return torch.cat([standardised, torch.ones_like(standardised[:, :1])], dim=1)

    x, y = inputs(features), torch.nn.functional.one_hot(labels, num_classes).double()
    products, targets_seen = distributed.all_reduce_sum(x.T @ x), distributed.all_reduce_sum(x.T @ y)
    penalty = torch.full_like(products[0], RIDGE * float(count))
    penalty[-1] = 0  # of the bias
    weights = torch.linalg.solve(products + penalty.diag(), targets_seen)
    correct = ((inputs(queries) @ weights).argmax(1) == targets).sum().cpu()
    right, total = distributed.all_reduce_sum(torch.stack([correct, torch.tensor(len(targets))])).tolist()
    return 100 * right / total
