"""Learning rate of a step (MixMAE, section 4.1): linear warm-up, then half a cosine."""

import argparse
import math

from torch.optim import Optimizer


def learning_rate(epoch: float, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """The rate at a fractional epoch: 0 at the start, `lr` after `warmup_epochs`, `min_lr` at `epochs`."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def last_learning_rate(epoch: int, steps_per_epoch: int, args: argparse.Namespace) -> float:
    """The rate of an epoch's last step."""
    last = epoch + (steps_per_epoch - 1) / steps_per_epoch
    return learning_rate(last, args.lr, args.min_lr, args.warmup_epochs, args.epochs)


def adjust_learning_rate(optimizer: Optimizer, epoch: float, args: argparse.Namespace) -> float:
    """Set the rate of every parameter group, scaled by its `lr_scale` (layer decay); returns the unscaled rate."""
    lr = learning_rate(epoch, args.lr, args.min_lr, args.warmup_epochs, args.epochs)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr
