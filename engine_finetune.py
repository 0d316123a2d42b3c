"""One epoch of fine-tuning, and exact evaluation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from models_swin import classification_loss
from util.data.datasets import check_targets
from util.data.transforms import Normalize
from util.layers.compilation import eager_if
from util.run import distributed
from util.run.optim import adjust_learning_rate, autocast, backward, clip_and_step, last_learning_rate
from util.run.progress import with_progress
from util.run.session import Run
from util.seeding import seed_all

TOP = 5


def train_one_epoch(run: Run, augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> float:
    """Train on what is left of the current epoch; returns the last learning rate.

    Args:
        run: its model is the classifier.
        augment: random erasing, mixup and cutmix of a normalised batch; targets may become class distributions.

    Raises:
        NonFiniteError, SystemExit: see `Run.finish_step`.
        BadImageError: for a label outside the classes.
    """
    config, state, progress = run.config, run.state, run.state.progress
    run.model.train(not config.freeze_encoder)
    lr = last_learning_rate(progress.epoch, run.steps_per_epoch, config)  # for an epoch that was resumed at its end
    meter, batches = run.start_epoch()
    while progress.step_in_epoch < run.steps_per_epoch:
        lr = adjust_learning_rate(state.optimizer, progress.fraction(run.steps_per_epoch), config)
        loss, batch = 0.0, []
        for micro in range(config.accum_iter):
            imgs, targets = meter.next_batch(batches)
            check_targets(targets, state.model.num_classes)
            keys = run.step_keys(micro)
            seed_all(*keys)  # for random erasing, mixup and drop path
            batch.append({"imgs": imgs, "targets": targets, "keys": keys})
            imgs = run.normalize(imgs.to(run.device, non_blocking=True))
            imgs, targets = augment(imgs, targets.to(run.device, non_blocking=True))
            with run.gradients_in_sync(micro):
                with autocast(config.precision, run.device):
                    # With mixup the smoothing has no effect here: the mixed targets are smoothed already.
                    micro_loss = classification_loss(run.model(imgs).float(), targets, config.smoothing)
                micro_loss = micro_loss / config.accum_iter
                backward(micro_loss, state.scaler)
            loss = loss + micro_loss.detach()
        run.check_last_step()
        grad_norm = clip_and_step(state.optimizer, state.scaler, state.model.parameters(), config.clip_grad)
        if state.model_ema is not None:
            state.model_ema.update(state.model)
        run.finish_step(meter, lr, loss, grad_norm, batch)
    return lr


@dataclass
class Evaluation:
    """Result of classifying a whole data set, the same on all ranks."""

    images: int
    acc1: float  # percent
    acc5: float  # percent
    loss: float  # mean cross-entropy
    class_acc1: list[float]  # percent; nan for a class without images
    predictions: list[tuple[int, int, list[int], list[float]]]  # index, label, top classes, their probabilities

    def measures(self) -> dict[str, float]:
        """The three numbers, by their names in log.txt."""
        return {"loss": self.loss, "acc1": self.acc1, "acc5": self.acc5}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    normalize: Normalize,
    precision: str,
    device: torch.device,
    keep_predictions: bool = False,
) -> Evaluation:
    """Classify every image of the loader's data set exactly once over all ranks.

    Counts are integers, and losses are summed in float64, so that the result does not depend on the number of ranks or
    the batch size.

    Args:
        model: the classifier, not wrapped.
        loader: with an `EvalBatchSampler`.
        keep_predictions: also return the top classes of every image.

    Raises:
        RuntimeError: when images were lost or counted twice.
        BadImageError: for an unreadable image, or a label outside the classes.
    """
    was_training = model.training
    model.eval()
    nb_classes = model.num_classes
    top = min(TOP, nb_classes)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    counts = torch.zeros(3, nb_classes, dtype=torch.int64, device=device)  # images of each class; right; among top 5
    predictions, whole = [], 0
    batches = with_progress(loader, len(loader.dataset), "evaluation")
    for keys, (imgs, targets) in zip(loader.batch_sampler, batches):
        check_targets(targets, nb_classes)
        targets = targets.to(device, non_blocking=True)
        whole = max(whole, len(imgs))
        with autocast(precision, device), eager_if(model.is_compiled and len(imgs) < whole):
            logits = model(normalize(imgs.to(device, non_blocking=True))).float()
        loss_sum += F.cross_entropy(logits, targets, reduction="none").double().sum()
        scores, classes = logits.softmax(dim=1).topk(top, dim=1)
        hits = classes == targets[:, None]
        # By additions, which do not wait for a GPU: bincount, and hits as an index, wait for the number of results.
        counted = torch.stack([torch.ones_like(targets), hits[:, 0], hits.any(dim=1)])
        counts.index_add_(1, targets, counted)
        if keep_predictions:
            rows = zip(keys, targets.tolist(), classes.tolist(), scores.tolist())
            predictions += [(index, target, best, score) for (_, index), target, best, score in rows]
    model.train(was_training)
    loss_sum, counts = distributed.all_reduce_sum(loss_sum), distributed.all_reduce_sum(counts)
    images, right, among_top5 = counts.sum(dim=1).tolist()
    if images != len(loader.dataset):
        raise RuntimeError(f"evaluation saw {images} images of {len(loader.dataset)}: please report this as a bug")
    if keep_predictions:
        predictions = sorted(row for rows in distributed.gather_objects(predictions) for row in rows)
    return Evaluation(
        images=images,
        acc1=100 * right / images,
        acc5=100 * among_top5 / images,
        loss=loss_sum.item() / images,
        class_acc1=(100 * counts[1].double() / counts[0]).tolist(),
        predictions=predictions,
    )
