import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from util.data.decoding import BadImageError
from util.run import distributed


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Around all but training: what a user can put right ends in one line and exit code 2, no traceback."""
    try:
        with distributed.explain_collective_failures():
            yield
    except (ValueError, OSError, distributed.CollectiveError) as error:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        of_this_rank = isinstance(error, (BadImageError, distributed.CollectiveError))
        if of_this_rank or local_rank == "0":  # others once per node: another node may lack what this one has
            prefix = "" if rank == "0" else f"[rank {rank}] "
            print(f"{prefix}{Path(sys.argv[0]).name}: error: {in_one_line(error)}", file=sys.stderr, flush=True)
        if distributed.get_world_size() > 1:
            os._exit(2)  # at once: Python's shutdown would wait for ranks that may hang
        sys.exit(2)


def in_one_line(error: Exception) -> str:
    """The message of an error; one that comes from a data-loading process has a traceback before it."""
    name = f"{type(error).__module__}.{type(error).__name__}: "
    message = str(error).rstrip()
    return message.rpartition(name)[2] if name in message else message
