"""Files that every rank needs: verified by the first rank of each node, and then opened by the others of the node."""

import os
from typing import Any

from torch import Tensor

from util.run.distributed import once_per_node
from util.weights.file import read_checkpoint
from util.weights.source import WeightsInfo, read_weights


def read_checkpoint_together(path: str | os.PathLike, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """`util.weights.file.read_checkpoint` on all ranks; those that have it, verified, give it as `known`."""
    return once_per_node(lambda first: read_checkpoint(path, mmap=True, verify=first) if known is None else known)


def read_weights_together(source: str | os.PathLike, ema: bool = False) -> tuple[dict[str, Tensor], WeightsInfo]:
    """`util.weights.source.read_weights` on all ranks, the file verified once per node."""
    return once_per_node(lambda first: read_weights(source, ema, verify=first))
