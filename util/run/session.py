"""One training run from its start to its end: what it goes on from, its steps and epochs, and how it ends."""

import argparse
import contextlib
import dataclasses
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from util.data.decoding import BadImageError
from util.data.transforms import Normalize
from util.errors import RunError, unreadable_is_user_error
from util.run import distributed, failures
from util.run.advice import to_continue
from util.run.allocator import keep_freed_memory
from util.run.checkpoint_folder import CheckpointFolder, SaveError
from util.run.checks import (
    check_data,
    check_recipe,
    refuse_another_programs_run,
    refuse_folders_of_images,
    refuse_folders_of_other_runs,
)
from util.run.config import TrainingConfig, follows_batch_size, resolve
from util.run.determinism import NondeterminismError
from util.run.flags import given_flags
from util.run.folder_lock import release_folders, take_folders
from util.run.gpu_memory import explain_out_of_memory
from util.run.launch import Launch
from util.run.logger import RunLog, setup_logging
from util.run.metrics import SPIKE_HISTORY, StepMeter
from util.run.nonfinite import NonFiniteError, NonFiniteGuard
from util.run.optim import make_scaler, resolve_precision, warn_if_nothing_is_learned, whether_to_compile
from util.run.preemption import Preemption
from util.run.progress import TrainingBar
from util.run.provenance import log_environment, write_provenance
from util.run.state import Progress, TrainingState
from util.weights.file import read_checkpoint
from util.weights.settings import WeightSettings, weight_settings
from util.weights.source import WeightsInfo, read_weights

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=TrainingConfig)

# --- What a run goes on from ---


@dataclass
class Start(Generic[C]):
    """What a run has before its model: its flags and processes, and what it goes on from, which is its own checkpoint
    (--resume), other weights (--finetune), or nothing."""

    given: C
    launch: Launch
    preemption: Preemption
    folder: CheckpointFolder | None = None  # only on rank 0
    checkpoint: dict[str, Any] | None = None
    weights: tuple[dict[str, Tensor], WeightsInfo] | None = None

    def resolve(self, choose: Callable[[C, Launch, Mapping[str, Any]], dict[str, Any]]) -> C:
        """The configuration: what flags give, else what the run to resume or the weights were made with, else what
        `choose(given, launch, known)` returns (see util.run.defaults).

        Raises:
            UserError: settings that contradict each other, or the images.
        """
        given, launch = self.given, self.launch
        recorded, source = {}, ""
        if self.checkpoint is not None:
            recorded, source = self.checkpoint.get("args", {}), "the checkpoint to resume"
        elif self.weights is not None:
            recorded, source = self.weights[1].args, self.weights[1].source
        known = {name: value for name, value in given.as_dict().items() if value is not None}
        # Of weights other than the run's own, only the settings that belong to them are taken.
        of_weights = {field.name: recorded.get(field.name) for field in dataclasses.fields(WeightSettings)}
        own = recorded if self.checkpoint is not None else of_weights
        chosen = choose(given, launch, own | known)
        settings = weight_settings(recorded, source, known, given.PRETRAINS, chosen)
        precision = resolve_precision(given.precision, launch.device)
        compiled = not given.deterministic and whether_to_compile(given.compile, launch.device, precision)
        given = dataclasses.replace(given, compile=compiled)
        return resolve(given, launch, settings, chosen | own)


def launch_run(config_class: type[C], flags: argparse.Namespace) -> tuple[C, Launch]:
    """The first lines of a program that may train: set up the log, check the flags, start the processes.

    Raises:
        UserError: see `given_flags` and `init_distributed`.
    """
    setup_logging()
    given = given_flags(config_class, flags)
    launch = distributed.init_distributed(given)
    log_environment(launch.device)
    return given, launch


def find_start(given: C, launch: Launch) -> Start[C]:
    """Take and open the output folder, and find what --resume or else --finetune names; the same on all ranks.

    From here on, a request to stop waits for the end of a step. Rank 0 looks for the checkpoint to resume; the others
    open the file that it found. A resumed run does not read --finetune. Either file is verified only by the first rank
    of each node, and the tensors stay in it until they are used, so a node has it in memory once.

    Raises:
        CheckpointError: a file is missing or damaged, or another program's run.
        UserError: the folder cannot be written to, is another run's, or holds one that this one would replace.
    """
    preemption = Preemption()
    preemption.install()  # not before: an evaluation never polls it
    start = Start(given, launch, preemption)

    def open_folder() -> str | None:
        refuse_folders_of_images(given)
        take_folders(given.output_dir, given.log_dir or given.output_dir)
        start.folder = CheckpointFolder(given.output_dir, given.keep_checkpoints)
        refuse_folders_of_other_runs(given)
        path, start.checkpoint = start.folder.resume(given.resume) or (None, None)
        return path and os.fspath(path)

    if path := distributed.on_main_process(open_folder):
        known = start.checkpoint  # of rank 0, which has verified it
        start.checkpoint = distributed.once_per_node(lambda verify: known or read_checkpoint(path, True, verify))
        refuse_another_programs_run(start.checkpoint, given)
    elif given.finetune:
        start.weights = distributed.once_per_node(partial(read_weights, given.finetune))
    return start


# --- The run ---


SHORT_MEASURES = 20.0  # seconds; schedulers give a job 30 or more between SIGTERM and SIGKILL


@dataclass
class Run:
    """A run in progress: what a training loop works with."""

    config: TrainingConfig
    device: torch.device
    model: nn.Module  # what is called: the state's model, or its DistributedDataParallel wrapper
    state: TrainingState
    loader: DataLoader
    normalize: Normalize
    folder: CheckpointFolder | None  # only on rank 0
    log: RunLog
    guard: NonFiniteGuard
    preemption: Preemption
    operations: float = 0.0  # of training on one image; known to rank 0, which logs
    usual_losses: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_HISTORY))
    seconds_to_measure: float = math.inf  # after an epoch, as last time
    bar: TrainingBar = field(init=False)

    def __post_init__(self) -> None:
        steps, progress = self.steps_per_epoch, self.state.progress
        done = progress.epoch * steps + progress.step_in_epoch
        self.bar = TrainingBar(done, self.config.epochs * steps)

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.batch_sampler.steps_per_epoch

    @property
    def saves_at_this_step(self) -> bool:
        """Whether `--save_steps` asks for a checkpoint after the step that was done last."""
        return self.config.save_steps > 0 and self.state.progress.step % self.config.save_steps == 0

    @property
    def epoch_1000x(self) -> int:
        """The axis of TensorBoard: comparable between runs whatever their batch size."""
        return int(self.state.progress.fraction(self.steps_per_epoch) * 1000)

    def start_epoch(self) -> tuple[StepMeter, Iterator]:
        """A meter for the epoch, and the batches that are left of it."""
        progress = self.state.progress
        meter = StepMeter(
            progress.epoch,
            self.config.epochs,
            self.steps_per_epoch,
            self.config.eff_batch_size,
            self.device,
            self.usual_losses,
            self.operations if self.config.precision in ("bf16", "fp16") else 0.0,
        )
        self.loader.batch_sampler.set_position(progress.epoch, progress.step_in_epoch)
        return meter, iter(self.loader)

    def step_keys(self, micro: int) -> tuple[int, str, int, int]:
        """Keys of all randomness of one micro-batch: the same for a piece of the effective batch, whichever rank or
        accumulation step it falls to."""
        piece = micro * distributed.get_world_size() + distributed.get_rank()
        return self.config.seed, "step", self.state.progress.step, piece

    def gradients_in_sync(self, micro: int) -> contextlib.AbstractContextManager:
        """Around forward and backward of a micro-batch: ranks reduce their gradients with the last one only."""
        if micro < self.config.accum_iter - 1 and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def check_last_step(self) -> None:
        """Before an update: raise NonFiniteError, on all ranks, when the step before was bad.

        By now a GPU has finished that; but if a rank is gone, it waits for it, which only the CPUs' reduction reveals.
        """
        self.preemption.wait_for_reduction()
        self.guard.check()

    def finish_step(self, meter: StepMeter, lr: float, loss: Tensor, grad_norm: Tensor, batch: list[dict]) -> None:
        """After an optimizer step: check, count, log and save as far as due.

        Raises:
            NonFiniteError: on all ranks, when the loss or gradient was not finite.
            SystemExit: on all ranks, when any was asked to stop; the state is saved.
        """
        config, progress = self.config, self.state.progress
        this_step = f"epoch {progress.epoch} step {progress.step_in_epoch + 1} (optimizer step {progress.step + 1})"
        self.guard.watch(this_step, loss, grad_norm, batch if config.nan_dump else [])
        progress.next_step()
        self.bar.update()
        meter.add(progress.step, lr, loss, grad_norm)
        stop = self.preemption.requested_on_any_rank()
        last = progress.step_in_epoch == self.steps_per_epoch
        save = stop or (self.saves_at_this_step and not last)  # after the last step, the epoch's end saves
        if save or last or progress.step % config.print_freq == 0:
            records, scalars = meter.flush()
            for record in records:  # one by one: the same sum, to the bit, however the steps fall into reports
                progress.epoch_loss += record["loss"]
            self.log.steps(records, self.epoch_1000x, scalars)
            self.bar.tell(meter, progress.step_in_epoch, scalars)
        elif distributed.is_main_process() and (scalars := meter.meanwhile()):
            self.bar.tell(meter, progress.step_in_epoch, scalars)
        if save:
            self.save()
        if stop:
            self.stop()

    def save(self, milestone: bool = False, best: bool = False) -> None:
        """Write a checkpoint (rank 0), once the last step is known to be good (all ranks)."""
        self.guard.check()
        self.log.bad_images(self.loader.dataset)
        if self.folder is not None:
            self.folder.save(self.state.checkpoint(), milestone=milestone, best=best)

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many epochs (0: never), and after the last one, is due at the end of
        this one."""
        finished = self.state.progress.epoch + 1
        return every > 0 and (finished % every == 0 or finished == self.config.epochs)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Around what is measured after the last step of an epoch, on all ranks together. Requests to stop are not seen
        meanwhile, so the epoch is saved first, unless the last measurement was short."""
        if distributed.on_main_process(lambda: self.seconds_to_measure > SHORT_MEASURES):
            self.save()
        start = time.monotonic()
        yield
        self.seconds_to_measure = time.monotonic() - start

    def finish_epoch(self, record: dict, best: bool = False) -> None:
        """Move to the next epoch, save when due, and write the epoch's line of log.txt with `record` in it.

        The line comes before the checkpoint: a run that resumes before it drops the line and writes it again.
        """
        config, progress = self.config, self.state.progress
        epoch = progress.epoch
        record = {"epoch": epoch, "step": progress.step, "train_loss": progress.next_epoch(), **record}
        last = progress.epoch == config.epochs
        milestone = bool(config.keep_every) and progress.epoch % config.keep_every == 0
        self.log.epoch(record, self.epoch_1000x)
        if last or milestone or best or progress.epoch % config.save_every == 0 or self.saves_at_this_step:
            self.save(milestone, best)
        logger.info("epoch %d done: %s", epoch, ", ".join(f"{k} {v:.4g}" for k, v in record.items() if k != "epoch"))

    def stop(self) -> NoReturn:
        """Leave after saving, on all ranks together; raises as `Preemption.exit_for_requeue`."""
        self.bar.close()
        logger.warning("stopped on request at %s", self.state.progress)
        if how := to_continue(self.config.world_size):
            logger.warning("to go on: %s", how)
        if self.folder is not None:
            self.folder.wait(final=True)
        release_folders()  # a requeued job may start elsewhere before this process has ended
        self.preemption.exit_for_requeue()

    def close(self) -> None:
        """Wait for the last checkpoint to be on the disk, close the logs, free the folder and leave the other ranks.

        Requests to stop have no effect any more, and must not end this process while rank 0 is writing.
        """
        if self.folder is not None:
            self.folder.wait(final=True)
        self.log.close()
        release_folders()
        self.preemption.wait_for_reduction()
        distributed.shutdown()
        self.preemption.close()


def open_run(
    config: TrainingConfig,
    start: Start,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    data: dict[str, dict],
    load_weights: Callable[[dict[str, Tensor], WeightsInfo], object],
    operations: float = 0.0,
    model_ema: ModelEmaV3 | None = None,
    classes: list[str] | None = None,
) -> Run:
    """Restore the checkpoint of `start`, or load its weights; then open the run's files.

    The model is compiled if `config` says so, and wrapped for several ranks. On a CPU the process keeps the memory
    that it frees from here on.

    Args:
        config: of `start.resolve`.
        model: on the device; with a method `compile_parts`.
        optimizer: of the model.
        loader: of the training images. Its batch sampler has `steps_per_epoch` and `set_position(epoch, step)`.
        data: the fingerprint of every set of images, by the name of its split.
        load_weights: loads the weights of --finetune into the model; what it returns is logged.
        operations: of training on one image, for the share of a GPU's peak in the log; 0: unknown.
        model_ema: of the model.
        classes: their names, for a checkpoint of a classifier.

    Raises:
        CheckpointError: the checkpoint or the weights are not of this model or recipe.
        UserError: the run's files cannot be written.
    """
    device = start.launch.device
    if device.type == "cpu":
        keep_freed_memory()
    if config.compile:
        model.compile_parts()
    progress = Progress(epoch=config.start_epoch)
    scaler = make_scaler(config.precision, device)
    settings = config.as_dict()
    state = TrainingState(model, optimizer, scaler, settings, progress, model_ema, classes, data, config.PROGRAM)
    steps_per_epoch = loader.batch_sampler.steps_per_epoch
    warn_if_nothing_is_learned(config, steps_per_epoch)
    if start.checkpoint is not None:
        check_recipe(start.checkpoint, config)
        check_data(start.checkpoint, data)
        state.restore(start.checkpoint, steps_per_epoch)
        start.checkpoint = None  # its memory is needed
        ended = f": all {config.epochs} epochs are done" if progress.epoch >= config.epochs else ""
        logger.info("resumed at %s%s", progress, ended)
    elif start.weights is not None:
        logger.info("%s", load_weights(*start.weights))
        start.weights = None
        if model_ema is not None:
            model_ema.set(model)
    axis = int(progress.fraction(steps_per_epoch) * 1000)
    with unreadable_is_user_error(f"{config.output_dir} or {config.log_dir} cannot be written to"):
        write_provenance(config, state)
        log = RunLog(config.output_dir, config.log_dir, progress.step, progress.epoch, axis)
    guard = NonFiniteGuard(device, state, Path(config.output_dir) if config.nan_dump else None)
    rate = f"{config.lr:.3g}" + (f" (--blr {config.blr:g} per 256 images)" if follows_batch_size(settings) else "")
    logger.info(
        "effective batch %d = %d images x %d micro-batches x %d ranks; learning rate %s; %d steps per epoch",
        config.eff_batch_size, config.batch_size, config.accum_iter, config.world_size, rate, steps_per_epoch,
    )  # fmt: skip
    wrapped = distributed.wrap_model(model, device)
    normalize = Normalize(config.mean, config.std).to(device)
    return Run(
        config, device, wrapped, state, loader, normalize, start.folder, log, guard, start.preemption, operations
    )  # fmt: skip


@contextlib.contextmanager
def orderly_end(run: Run) -> Iterator[None]:
    """Around training: ends the process in the way that fits how training ended, with the last checkpoint written.

    Exit codes: 1 for a failure that is explained in one line, `util.run.preemption.EXIT_REQUEUE` after a request to
    stop.
    """
    try:
        with failures.explained(), contextlib.closing(run.bar):
            yield
            run.close()
    except (torch.OutOfMemoryError, RunError, BadImageError, NondeterminismError) as error:  # each says what happened
        if isinstance(error, torch.OutOfMemoryError):
            message = explain_out_of_memory(error, run.state, run.config)
            if failures.is_to_say(message, str(distributed.get_rank())):
                logger.error("%s", message)
        elif distributed.is_main_process() or not isinstance(error, (NonFiniteError, NondeterminismError)):
            logger.error("%s", failures.in_one_line(error))
        if run.folder is not None:
            with contextlib.suppress(SaveError):  # of the checkpoint under way, after the error that ends the run
                run.folder.wait()
        release_folders()
        sys.stdout.flush()
        # At once, without Python's shutdown: a rank that hangs must not keep this one waiting for its goodbye.
        os._exit(1)
    finally:
        release_folders()
