"""One epoch of training a segmentation model, and exact evaluation."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from util.data.decoding import BadImageError
from util.data.transforms import Normalize
from util.dense.segmentation import (
    SegmentationScores,
    confusion_matrix,
    enlarged_classes,
    segmentation_scores,
    sliding_logits,
)
from util.dense.upernet import UPerNet, segmentation_loss
from util.run import distributed
from util.run.flags import Config
from util.run.optim import adjust_learning_rate, autocast, backward, clip_and_step, last_learning_rate
from util.run.progress import with_progress
from util.run.session import Run
from util.seeding import seed_all


def train_one_epoch(run: Run) -> float:
    """Train on what is left of the current epoch; returns the last learning rate.

    Raises:
        NonFiniteError, SystemExit: see `Run.finish_step`.
        BadImageError: for an image or label map that cannot be used.
    """
    config, state, progress = run.config, run.state, run.state.progress
    run.model.train()
    lr = last_learning_rate(progress.epoch, run.steps_per_epoch, config)  # for an epoch that was resumed at its end
    meter, batches = run.start_epoch()
    while progress.step_in_epoch < run.steps_per_epoch:
        lr = adjust_learning_rate(state.optimizer, progress.fraction(run.steps_per_epoch), config)
        loss, batch = 0.0, []
        for micro in range(config.accum_iter):
            imgs, labels = meter.next_batch(batches)
            keys = run.step_keys(micro)
            seed_all(*keys)  # for drop path and dropout
            batch.append({"imgs": imgs, "labels": labels, "keys": keys})
            imgs = run.normalize(imgs.to(run.device, non_blocking=True))
            with run.gradients_in_sync(micro):
                with autocast(config.precision, run.device):
                    logits = run.model(imgs)
                micro_loss = segmentation_loss(logits, labels.to(run.device, non_blocking=True)) / config.accum_iter
                backward(micro_loss, state.scaler)
            loss = loss + micro_loss.detach()
        run.check_last_step()
        grad_norm = clip_and_step(state.optimizer, state.scaler, state.model.parameters(), config.clip_grad)
        run.finish_step(meter, lr, loss, grad_norm, batch)
    return lr


def predict(model: UPerNet, imgs: Tensor, size: tuple[int, int], config: Config) -> Tensor:
    """The class of each pixel, (B, *size) uint8, of normalised images (B, C, H, W).

    Args:
        model: in evaluation mode, not wrapped.
        size: of the result; logits are enlarged to it.
        config: `precision`; with `slide`, images are seen in windows of `input_size`, two thirds apart.
    """
    with autocast(config.precision, imgs.device):
        if config.slide:
            stride = tuple(max(1, 2 * side // 3) for side in config.input_size)
            logits = sliding_logits(model, imgs, config.input_size, stride)
        else:
            logits = model(imgs)
    return enlarged_classes(logits.float(), size)


@torch.inference_mode()
def evaluate(
    model: UPerNet,
    loader: DataLoader,
    normalize: Normalize,
    config: Config,
    device: torch.device,
    keep: Callable[[int, Tensor], None] | None = None,
) -> SegmentationScores:
    """Segment every image of the loader's data set exactly once over all ranks, and compare with its label map.

    Pixels are counted in whole numbers, at the label maps' own sizes, so that the result does not depend on the number
    of ranks.

    Args:
        model: not wrapped.
        loader: of one image at a time, with an `EvalBatchSampler`.
        config: as of `predict`.
        keep: is given the number of each image of this rank and its classes (h, w), on the CPU.

    Raises:
        RuntimeError: when images were lost or counted twice.
        BadImageError: for an image or label map that cannot be used, or where no pixel is labelled.
    """
    was_training = model.training
    model.eval()
    confusion = torch.zeros(model.num_classes, model.num_classes, dtype=torch.int64, device=device)
    images = torch.zeros((), dtype=torch.int64, device=device)
    batches = with_progress(loader, len(loader.dataset), "evaluation")
    for [(_, index)], (imgs, labels) in zip(loader.batch_sampler, batches):
        imgs, labels = normalize(imgs.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
        classes = predict(model, imgs, labels.shape[-2:], config)
        confusion += confusion_matrix(labels, classes, model.num_classes)
        images += 1
        if keep is not None:
            keep(index, classes[0].cpu())
    model.train(was_training)
    confusion, images = distributed.all_reduce_sum(confusion), int(distributed.all_reduce_sum(images))
    if images != len(loader.dataset):
        raise RuntimeError(f"evaluation saw {images} images of {len(loader.dataset)}: please report this as a bug")
    if not confusion.any():
        raise BadImageError("no pixel of the validation images is labelled, so there is nothing to measure")
    return segmentation_scores(confusion)
