"""Randomness that is a function of keys, not of history.

Every random draw of a run is keyed by what it belongs to: a sample's augmentation by (seed, epoch, index), a step's
mask and drop path by (seed, step, micro-batch). Nothing has to be saved to resume a run exactly, and the number of
data-loader workers has no effect.
"""

import hashlib
import random

import numpy as np
import torch


def derive_seed(*keys: int | str) -> int:
    """A 63-bit seed from any keys, the same on every machine; different keys give independent seeds."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(*keys: int | str) -> None:
    """Seed the global generators of `random`, numpy and torch (and CUDA's, if it is in use) from `keys`."""
    seed = derive_seed(*keys)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # never in a data-loader worker, which must not touch CUDA
        torch.cuda.manual_seed_all(seed)


def keyed_generator(*keys: int | str) -> torch.Generator:
    """A CPU generator seeded from `keys`."""
    return torch.Generator().manual_seed(derive_seed(*keys))
