"""What both mains do around their training loops: setting a run up, and ending its steps and epochs."""

import argparse
import contextlib
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from util.data.datasets import BadImageError
from util.data.transforms import Normalize
from util.run import distributed, failures
from util.run.allocator import keep_freed_memory
from util.run.checkpoint_folder import CheckpointFolder, SaveError
from util.run.logger import RunLog
from util.run.metrics import SPIKE_HISTORY, StepMeter
from util.run.nonfinite import NonFiniteError, NonFiniteGuard
from util.run.preemption import Preemption
from util.run.state import TrainingState, find_checkpoint

logger = logging.getLogger(__name__)


class Preempted(Exception):
    """The run was asked to stop, and has saved."""


@dataclass
class Run:
    """A run in progress: what a training loop works with."""

    args: argparse.Namespace
    device: torch.device
    model: nn.Module  # what is called: the state's model, or its DistributedDataParallel wrapper
    state: TrainingState
    loader: DataLoader
    normalize: Normalize
    folder: CheckpointFolder | None  # rank 0 alone
    log: RunLog
    guard: NonFiniteGuard
    preemption: Preemption
    usual_losses: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_HISTORY))

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.batch_sampler.steps_per_epoch

    @property
    def saves_at_this_step(self) -> bool:
        """Whether `--save_steps` asks for a checkpoint after the step that was done last."""
        return self.args.save_steps > 0 and self.state.progress.step % self.args.save_steps == 0

    @property
    def epoch_1000x(self) -> int:
        """The axis of TensorBoard: comparable between runs whatever their batch size."""
        return int(self.state.progress.fraction(self.steps_per_epoch) * 1000)

    def start_epoch(self) -> tuple[StepMeter, Iterator]:
        """A meter for the epoch, and the batches that are left of it."""
        progress = self.state.progress
        meter = StepMeter(
            progress.epoch,
            self.args.epochs,
            self.steps_per_epoch,
            self.args.eff_batch_size,
            self.device,
            self.usual_losses,
        )
        if progress.step_in_epoch == self.steps_per_epoch:
            return meter, iter(())
        self.loader.batch_sampler.set_position(progress.epoch, progress.step_in_epoch)
        return meter, iter(self.loader)

    def step_keys(self, micro: int) -> tuple[int, str, int, int]:
        """Keys of all randomness of one micro-batch: the same for a piece of the effective batch, whichever rank or
        accumulation step it falls to."""
        piece = micro * distributed.get_world_size() + distributed.get_rank()
        return self.args.seed, "step", self.state.progress.step, piece

    def gradients_in_sync(self, micro: int) -> contextlib.AbstractContextManager:
        """Around forward and backward of a micro-batch: ranks reduce their gradients with the last one only."""
        if micro < self.args.accum_iter - 1 and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def finish_step(self, meter: StepMeter, lr: float, loss: Tensor, grad_norm: Tensor, batch: list[dict]) -> None:
        """After an optimizer step: check, count, log and save as far as due.

        Raises:
            NonFiniteError: on all ranks, when the loss or gradient was not finite.
            Preempted: on all ranks, when any was asked to stop; the state is saved.
        """
        args, progress = self.args, self.state.progress
        this_step = f"epoch {progress.epoch} step {progress.step_in_epoch + 1} (optimizer step {progress.step + 1})"
        self.guard.watch(this_step, loss, grad_norm, batch if args.nan_dump else [])
        progress.next_step()
        meter.add(progress.step, lr, loss, grad_norm)
        stop = self.preemption.requested_on_any_rank()
        last = progress.step_in_epoch == self.steps_per_epoch
        save = stop or (self.saves_at_this_step and not last)  # after the last step, the epoch's end saves
        if save or last or progress.step % args.print_freq == 0:
            self.report(meter)
        if save:
            self.save()
        if stop:
            raise Preempted(f"stopped on request at {progress}")

    def report(self, meter: StepMeter) -> None:
        """Write the log lines that are due."""
        progress = self.state.progress
        records, scalars = meter.flush()
        if not records:
            return
        for record in records:  # one by one: the same sum, to the bit, however the steps fall into reports
            progress.epoch_loss += record["loss"]
        tags = {f"train/{name}": scalars[name] for name in ("loss", "lr", "grad_norm")}
        tags |= {f"speed/{name}": scalars[name] for name in ("images_per_second", "data_wait_share", "memory_mb")}
        self.log.steps(records, self.epoch_1000x, tags)
        logger.info(meter.line(progress.step_in_epoch, scalars))

    def save(self, milestone: bool = False, best: bool = False) -> None:
        """Write a checkpoint (rank 0), once the last step is known to be good (all ranks)."""
        self.guard.check()
        if self.folder is not None:
            self.folder.save(self.state.checkpoint(), milestone=milestone, best=best)

    def finish_epoch(self, record: dict, best: bool = False) -> None:
        """Move to the next epoch, save when due, and write the epoch's line of log.txt with `record` in it.

        The line comes before the checkpoint: a run that resumes before it drops the line and writes it again.
        """
        args, progress = self.args, self.state.progress
        epoch = progress.epoch
        record = {"epoch": epoch, "step": progress.step, "train_loss": progress.next_epoch(), **record}
        last = progress.epoch == args.epochs
        milestone = bool(args.keep_every) and progress.epoch % args.keep_every == 0
        self.log.epoch(record, self.epoch_1000x)
        if last or milestone or best or progress.epoch % args.save_every == 0 or self.saves_at_this_step:
            self.save(milestone, best)
        logger.info("epoch %d done: %s", epoch, ", ".join(f"{k} {v:.4g}" for k, v in record.items() if k != "epoch"))

    def close(self) -> None:
        """Wait for the last checkpoint to be on the disk, and close the logs."""
        if self.folder is not None:
            self.folder.wait(final=True)
        self.log.close()
        self.preemption.close()


def open_run(
    args: argparse.Namespace,
    device: torch.device,
    state: TrainingState,
    loader: DataLoader,
    normalize: Normalize,
    preemption: Preemption,
    load_start: Callable[[], None],
) -> Run:
    """Restore what `--resume` names, or else `load_start` the weights of `--finetune`; then open the run's files and
    wrap the model for several ranks. On a CPU the process keeps the memory that it frees from here on.

    Raises:
        CheckpointError: the output folder or the checkpoint to resume from cannot be used.
    """
    if device.type == "cpu":
        keep_freed_memory()
    steps_per_epoch = loader.batch_sampler.steps_per_epoch
    folder = open_folder(args)
    checkpoint = find_checkpoint(folder, args)
    state.progress.epoch = args.start_epoch
    if checkpoint is not None:
        state.restore(checkpoint, steps_per_epoch)
        logger.info("resumed at %s", state.progress)
    elif args.finetune:
        load_start()
        if state.model_ema is not None:
            state.model_ema.set(state.model)
    progress = state.progress
    log = RunLog(
        args.output_dir,
        args.log_dir,
        progress.step,
        progress.epoch,
        int(progress.fraction(steps_per_epoch) * 1000),
    )
    guard = NonFiniteGuard(device, state, Path(args.output_dir) if args.nan_dump else None)
    model = state.model
    if distributed.get_world_size() > 1:
        # Without device_ids, inputs are left where they are: masks belong on the CPU.
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if device.type == "cpu" and distributed.get_world_size() > 2:
            model.register_comm_hook(None, average_in_rank_order)
    logger.info(
        "effective batch %d = %d images x %d micro-batches x %d ranks; learning rate %.3g; %d steps per epoch",
        args.eff_batch_size, args.batch_size, args.accum_iter, distributed.get_world_size(), args.lr, steps_per_epoch,
    )  # fmt: skip
    return Run(args, device, model, state, loader, normalize.to(device), folder, log, guard, preemption)


def average_in_rank_order(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average gradients over ranks, added in the order of ranks, for a resumed run to be identical.

    The order of gloo's own sum depends on where in a bucket a value lies, and DistributedDataParallel packs its buckets
    anew after the first step of a process. Between two ranks there is but one order, and gloo's is faster.
    """
    gradients = [torch.empty_like(bucket.buffer()) for _ in range(dist.get_world_size())]

    def average(_: torch.futures.Future) -> Tensor:
        total = gradients[0]
        for gradient in gradients[1:]:
            total += gradient
        return total.div_(len(gradients))

    return dist.all_gather(gradients, bucket.buffer(), async_op=True).get_future().then(average)


def open_folder(args: argparse.Namespace) -> CheckpointFolder | None:
    """The run's folder on rank 0; an error there is an error on all ranks."""
    folder, error = None, None
    if distributed.is_main_process():
        try:
            folder = CheckpointFolder(args.output_dir, args.keep_checkpoints)
            continues = args.resume == "auto" or (
                args.resume and Path(args.resume).parent.resolve() == folder.folder.resolve()
            )
            if not continues and any(folder.folder.glob("checkpoint*.pth")):
                raise ValueError(
                    f"{args.output_dir} holds a run already, which this one would replace: continue it by --resume "
                    "auto, or give another --output_dir"
                )
        except ValueError as caught:
            error = str(caught)
    error = distributed.gather_objects(error)[0]
    if error:
        raise ValueError(error)
    return folder


@contextlib.contextmanager
def ending(run: Run) -> Iterator[None]:
    """Around training: ends the process in the way that fits how training ended, with the last checkpoint written.

    Exit codes: 1 for a failure that is explained in one line, `util.preemption.EXIT_REQUEUE` after a request to stop.
    """
    try:
        try:
            with failures.explain_collective_failures():
                yield
            run.close()
        except Preempted as stopped:
            logger.warning("%s", stopped)
            if run.folder is not None:
                run.folder.wait(final=True)
            run.preemption.exit_for_requeue()
    except (NonFiniteError, BadImageError, distributed.CollectiveError, SaveError) as error:
        if distributed.is_main_process() or not isinstance(error, NonFiniteError):
            logger.error("%s", failures.in_one_line(error))
        if run.folder is not None:
            with contextlib.suppress(SaveError):  # of the checkpoint under way, after the error that ends the run
                run.folder.wait()
        sys.stdout.flush()
        # At once, without Python's shutdown: a rank that hangs must not keep this one waiting for its goodbye.
        os._exit(1)


def count_work(model: nn.Module, batch_size: int, **forward: float) -> tuple[int, float]:
    """Parameters (frozen ones included) and multiply-adds of one image's forward pass.

    Counted are the products of matrices and convolutions, those of attention included, all pairs of a window.

    Args:
        model: a `SwinTransformer` or `MixMAE`.
        batch_size: of the forward pass that is counted; even for a `MixMAE`.
        **forward: further arguments of the model's forward, as `mask_ratio`.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    device = next(model.parameters()).device
    imgs = torch.zeros(batch_size, model.in_chans, *model.img_size, device=device)
    was_training = model.training
    model.eval()
    # The counter does not know all fused attentions (not a CPU's); the plain one is made of products that it knows.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        one_layout_shape, model.one_layout_shape = model.one_layout_shape, True  # a number that no mask changes
        model(imgs, **forward)
        model.one_layout_shape = one_layout_shape
    model.train(was_training)
    return parameters, counter.get_total_flops() / 2 / batch_size
