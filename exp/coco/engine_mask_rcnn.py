"""One epoch of training a detector, and its exact evaluation."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN

from util.data.coco import Target
from util.data.transforms import Normalize
from util.dense.average_precision import Result, average_precision, results_of
from util.run import distributed
from util.run.optim import adjust_learning_rate, backward, clip_and_step, last_learning_rate
from util.run.progress import with_progress
from util.run.session import Run
from util.seeding import seed_all


def train_one_epoch(run: Run) -> float:
    """Train on what is left of the current epoch; returns the last learning rate.

    Raises:
        NonFiniteError, SystemExit: see `Run.finish_step`.
    """
    config, state, progress = run.config, run.state, run.state.progress
    run.model.train()
    lr = last_learning_rate(progress.epoch, run.steps_per_epoch, config)  # for an epoch that was resumed at its end
    meter, batches = run.start_epoch()
    while progress.step_in_epoch < run.steps_per_epoch:
        lr = adjust_learning_rate(state.optimizer, progress.fraction(run.steps_per_epoch), config)
        loss, batch = 0.0, []
        for micro in range(config.accum_iter):
            imgs, targets = meter.next_batch(batches)
            keys = run.step_keys(micro)
            seed_all(*keys)  # for the sizes of images, samples of boxes and drop path
            batch.append({"imgs": imgs, "targets": targets, "keys": keys})
            with run.gradients_in_sync(micro):
                # Without autocast: the encoder has one of its own, and the heads stay in float32 (see `DenseEncoder`).
                imgs = normalised(imgs, run.normalize, run.device)
                micro_loss = detection_loss(run.model, imgs, targets) / config.accum_iter
                backward(micro_loss, state.scaler)
            loss = loss + micro_loss.detach()
        run.check_last_step()
        grad_norm = clip_and_step(state.optimizer, state.scaler, state.model.parameters(), config.clip_grad)
        run.finish_step(meter, lr, loss, grad_norm, batch)
    return lr


def normalised(imgs: list[Tensor], normalize: Normalize, device: torch.device) -> list[Tensor]:
    """Images (C, h, w) as they are read, as the model takes them."""
    return [normalize(img.to(device, non_blocking=True)) for img in imgs]


def detection_loss(model: nn.Module, imgs: list[Tensor], targets: list[Target]) -> Tensor:
    """The sum of the detector's losses: objectness, boxes of candidates, classes, boxes and masks.

    Args:
        model: a torchvision detector in training.
        imgs: normalised (C, h, w), on the model's device.
        targets: on any device.
    """
    device = imgs[0].device
    targets = [{name: x.to(device, non_blocking=True) for name, x in target.items()} for target in targets]
    return sum(model(imgs, targets).values())


@torch.inference_mode()
def evaluate(
    model: FasterRCNN, loader: DataLoader, normalize: Normalize, device: torch.device
) -> tuple[dict[str, float], list[Result]]:
    """Detect in every image of the loader's data set exactly once over all ranks.

    Images are taken one by one: padded to the size of others, they would give results that depend on the batches.

    Args:
        model: not wrapped.
        loader: with an `EvalBatchSampler`, of a data set with a `CocoSource`.
        normalize: on the device.

    Returns:
        Average precision, the same on all ranks (see `average_precision`), and on rank 0 the detections.

    Raises:
        RuntimeError: when images were lost or seen twice.
        BadImageError: for an unreadable image.
    """
    was_training = model.training
    model.eval()
    annotations = loader.dataset.source.annotations
    found: dict[int, list[Result]] = {}  # by the number of the image
    batches = with_progress(loader, len(loader.dataset), "evaluation")
    for keys, (imgs, _) in zip(loader.batch_sampler, batches):
        for (_, index), img in zip(keys, normalised(imgs, normalize, device)):
            found[index] = results_of(model([img])[0], index, annotations)
    model.train(was_training)
    of_ranks = distributed.gather_on_main(found)
    measured, results = None, []
    if of_ranks is not None:
        seen = sorted(index for part in of_ranks for index in part)
        if seen != list(range(len(loader.dataset))):
            raise RuntimeError(f"evaluation saw {len(seen)} images of {len(loader.dataset)}: please report this bug")
        together = {index: results for part in of_ranks for index, results in part.items()}
        results = [result for index in seen for result in together[index]]
        measured = average_precision(annotations.path, results, annotations.masks is not None)
    return distributed.gather_objects(measured)[0], results
