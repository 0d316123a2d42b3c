"""How far long work has come: a bar on a terminal, elsewhere a line from time to time; rank 0 reports for all.

Bars are drawn on stderr, log lines go to stdout: where both are one terminal, lines appear above the bars
(`util.run.logger`), and those that a bar makes superfluous are left out.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from util.run import distributed
from util.run.metrics import StepMeter

logger = logging.getLogger(__name__)

SECONDS_PER_LINE = 10.0

T = TypeVar("T")


class Bar(tqdm):
    """A bar without a thread of its own, which data-loading processes forked from this one could not take along; drawn
    only by rank 0, if stderr is a terminal."""

    monitor_interval = 0

    def __init__(self, **arguments: Any):
        disable = not (distributed.is_main_process() and sys.stderr.isatty())
        super().__init__(dynamic_ncols=True, disable=disable, **arguments)


def needs_lines() -> bool:
    """Whether this process logs in lines how far it is: its log goes where no bar is seen."""
    return distributed.is_main_process() and not (sys.stderr.isatty() and sys.stdout.isatty())


def images_of(batch: Any) -> int:
    """The images of all ranks, if each has such a batch (imgs, targets)."""
    return len(batch[1]) * distributed.get_world_size()


def with_progress(batches: Iterable[T], total: int, what: str, count: Callable[[T], int] = images_of) -> Iterator[T]:
    """The batches as they are.

    Args:
        batches: of this rank; all ranks have about as many.
        total: images of all ranks.
        what: the work, for lines such as 'evaluation: 300 of 1000 images, ...'.
        count: the images of all ranks that are done with a batch.
    """
    if not distributed.is_main_process():
        yield from batches
        return
    done, first = 0, time.monotonic()
    spoken = first
    with Bar(total=total, unit=" images", desc=what, leave=False) as bar:
        for batch in batches:
            yield batch
            step = min(total - done, count(batch))
            done += step
            bar.update(step)
            now = time.monotonic()
            if needs_lines() and now > spoken + SECONDS_PER_LINE and done < total:
                spoken, rate = now, done / (now - first)
                left = (total - done) / rate
                logger.info("%s: %d of %d images, %.0f images/s, %.0f s left", what, done, total, rate, left)


class TrainingBar(Bar):
    """The bar of a training run, for its whole length; updated after each optimizer step.

    Args:
        done, total: optimizer steps, so far and of the whole run.
    """

    def __init__(self, done: int, total: int):
        super().__init__(total=total, initial=done, unit=" steps", desc="training")

    def tell(self, meter: StepMeter, step_in_epoch: int, scalars: dict[str, float]) -> None:
        """Show the most important of a meter's scalars beside the bar; where no bar is seen, log its line."""
        line = meter.line(step_in_epoch, scalars)
        self.set_description_str(f"epoch {meter.epoch}", refresh=False)
        self.set_postfix_str(f"loss {scalars['loss']:.4f}, {scalars['images_per_second']:.0f} images/s")
        if needs_lines():
            logger.info("%s", line)
