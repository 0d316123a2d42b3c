"""Which samples form which batch: a function of (seed, epoch, step) alone.

Samplers yield lists of keys `(epoch, index)`, so that a dataset can draw a sample's augmentation from its key.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from util.errors import UserError
from util.seeding import keyed_generator

Key = tuple[int, int]


class TrainBatchSampler(Sampler[list[Key]]):
    """Shuffled batches for training; every rank and every accumulation step takes its piece of one effective batch.

    MixMAE (and timm's mixup) pairs sample i of a batch with sample B-1-i. The effective batch of an optimizer step is
    therefore cut from both ends at once: piece p takes the p-th slice from the front and the p-th from the back. The
    pairs are the same however the effective batch is divided into ranks and micro-batches. Likewise with tuples of K,
    which have a sample from each of K blocks, every second of which is read from its end.
    What does not fill an effective batch at the end of an epoch is left out of that epoch.

    Args:
        num_samples: size of the dataset.
        batch_size: samples of one micro-batch of one rank.
        accum_iter: micro-batches of one optimizer step.
        rank, world_size: this process among all.
        seed: of the run.
        mix_images: K, samples that are mixed with each other.

    Raises:
        UserError: when the dataset does not fill one effective batch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        accum_iter: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        mix_images: int = 2,
    ):
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.pieces = accum_iter * world_size
        self.my_pieces = range(rank, self.pieces, world_size)
        self.seed = seed
        self.mix_images = mix_images
        self.epoch = 0
        self.first_step = 0
        self.steps_per_epoch = num_samples // (batch_size * self.pieces)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{num_samples} training images do not fill one effective batch of {batch_size * self.pieces} "
                f"(--batch_size {batch_size} x --accum_iter {accum_iter} x {world_size} processes): "
                "lower --batch_size or --accum_iter, or add images"
            )

    def set_position(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch that the next iteration covers, and its first optimizer step."""
        self.epoch = epoch
        self.first_step = first_step

    def __len__(self) -> int:
        """Micro-batches of this rank in the coming iteration."""
        return (self.steps_per_epoch - self.first_step) * len(self.my_pieces)

    def __iter__(self) -> Iterator[list[Key]]:
        order = torch.randperm(self.num_samples, generator=keyed_generator(self.seed, "order", self.epoch))
        # Samples that a piece takes from each block; with an odd batch in fine-tuning, one more from the first.
        sizes = [-(-(self.batch_size - number) // self.mix_images) for number in range(self.mix_images)]
        for step in range(self.first_step, self.steps_per_epoch):
            effective = order[step * self.batch_size * self.pieces :][: self.batch_size * self.pieces]
            blocks = effective.split([size * self.pieces for size in sizes])
            for piece in self.my_pieces:
                places = [self.pieces - 1 - piece if number % 2 else piece for number in range(self.mix_images)]
                parts = [block[place * size :][:size] for block, place, size in zip(blocks, places, sizes)]
                samples = torch.cat(parts)
                yield [(self.epoch, index) for index in samples.tolist()]


class EvalBatchSampler(Sampler[list[Key]]):
    """Every sample exactly once over all ranks, in order, without padding; ranks may differ by one sample."""

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.indices = range(rank, num_samples, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]
