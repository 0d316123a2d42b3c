"""How far long work has come: a bar on a terminal, elsewhere a line from time to time; rank 0 speaks for all."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from util.run import distributed

logger = logging.getLogger(__name__)

SECONDS_PER_LINE = 10.0

T = TypeVar("T")


def images_of(batch: Any) -> int:
    """The images of a batch (imgs, targets)."""
    return len(batch[1])


def with_progress(batches: Iterable[T], total: int, what: str, count: Callable[[T], int] = images_of) -> Iterator[T]:
    """The batches as they are.

    Args:
        batches: of this rank; all ranks have about as many.
        total: images of all ranks.
        what: the work, for lines such as 'evaluation: 300 of 1000 images, ...'.
        count: the images in a batch.
    """
    if not distributed.is_main_process():
        yield from batches
        return
    ranks, done, first = distributed.get_world_size(), 0, time.monotonic()
    spoken = first
    with tqdm(total=total, unit=" images", desc=what, leave=False, disable=not sys.stderr.isatty()) as bar:
        for batch in batches:
            yield batch
            step = min(total - done, count(batch) * ranks)
            done += step
            bar.update(step)
            now = time.monotonic()
            if bar.disable and now > spoken + SECONDS_PER_LINE and done < total:
                spoken, rate = now, done / (now - first)
                left = (total - done) / rate
                logger.info("%s: %d of %d images, %.0f images/s, %.0f s left", what, done, total, rate, left)
