"""Files that every rank needs: verified by the first rank of each node, and then opened by the others of the node."""

import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from util.errors import UserError
from util.run import distributed
from util.weights.file import read_checkpoint
from util.weights.source import WeightsInfo, read_weights

T = TypeVar("T")


def once_per_node(read: Callable[[bool], T]) -> T:
    """What `read(True)` gives on the first rank of each node, and after that `read(False)` on its others.

    So a file is read from end to end once per node, and the other ranks find in memory what they need of it.

    Raises:
        UserError: on all ranks, where `read` raises one on any.
        RuntimeError: on all ranks, where it raises something else on any.
    """
    if distributed.world is None:
        return read(True)
    is_first, found = distributed.world.launch.local_rank == 0, None
    for turn_of_first in (True, False):
        own_turn, error, kind = turn_of_first == is_first, None, UserError
        if own_turn:
            try:
                found = read(turn_of_first)
            except UserError as caught:
                error = str(caught)
            except Exception as caught:  # the others must not wait for this rank
                error, kind = f"{type(caught).__name__}: {caught}", RuntimeError
        answers = distributed.gather_objects((own_turn, error, kind, socket.gethostname()))
        failed = [(rank, *answer) for rank, answer in enumerate(answers) if answer[1] is not None]
        if failed:
            rank, _, error, kind, node = failed[0]
            succeeded = len(failed) < sum(had_turn for had_turn, *_ in answers)  # elsewhere
            raise kind(f"on {node} (rank {rank}): {error}" if succeeded else error)
    return found


def read_checkpoint_together(path: str | os.PathLike, known: dict[str, Any] | None) -> dict[str, Any]:
    """`util.weights.file.read_checkpoint` on all ranks; those that have it, verified, give it as `known`."""
    return once_per_node(lambda first: read_checkpoint(path, mmap=True, verify=first) if known is None else known)


def read_weights_together(source: str | os.PathLike, ema: bool = False) -> tuple[dict[str, Tensor], WeightsInfo]:
    """`util.weights.source.read_weights` on all ranks, the file verified once per node."""
    return once_per_node(lambda first: read_weights(source, ema, verify=first))
