"""Ending a run on request without losing a step: time limits, preemption, `scancel`, Ctrl-C.

SIGUSR1, SIGUSR2 (`sbatch --signal=USR2@120`, submitit), SIGTERM and SIGINT (Ctrl-C) only set a flag. After the next
optimizer step all ranks agree that one of them saw a signal; the main then saves and calls
`exit_for_requeue`. A second SIGTERM or SIGINT ends the process at once.

Exit codes: 75 (EX_TEMPFAIL: saved, start me again), 143 and 130 (second SIGTERM or SIGINT, nothing was saved).
"""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from util.run import distributed
from util.run.folder_lock import release_folders

logger = logging.getLogger(__name__)

EXIT_REQUEUE = 75
END_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # somebody is ending this run
INTERRUPT_ECHO = 2.0  # seconds in which another SIGINT is the same Ctrl-C, passed on by torchrun
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # sent ahead of the time limit or a preemption


class Preemption:
    """The flag that the signals set, and what all ranks do about it.

    The main installs one before it builds anything and asks `requested_on_any_rank` once per optimizer step; when that
    is true, it saves and calls `exit_for_requeue`.
    """

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}  # signal -> moment of the first
        self._previous: dict[int, Any] = {}
        self._flags = torch.zeros(2, dtype=torch.int32)  # (a requeue signal, an end signal) seen on any rank
        self._pending: Any = None  # the reduction that is under way

    def install(self) -> None:
        """Take over SIGUSR1, SIGUSR2, SIGTERM and SIGINT; main thread only. Handlers that were there before are kept:
        submitit's is called once everything is saved."""
        for signum in (*REQUEUE_SIGNALS, *END_SIGNALS):
            self._previous[signum] = signal.signal(signum, self._on_signal)
        # exp/launch.sh holds back what arrives before this point.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUEUE_SIGNALS)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        # No logging here: the handler may interrupt any line, even one that holds the logger's lock.
        now = time.monotonic()
        if signum not in self._seen:
            self._seen[signum] = now
            if signum == signal.SIGINT and distributed.is_main_process():
                os.write(2, b"\nsaving after this step, then leaving; Ctrl-C again leaves at once\n")
        elif signum == signal.SIGTERM or (signum == signal.SIGINT and now - self._seen[signum] > INTERRUPT_ECHO):
            release_folders()
            os._exit(128 + signum)

    def requested_on_any_rank(self) -> bool:
        """Whether any rank has been asked to stop; the same answer on all ranks, which must call it equally often.

        The reduction that one call starts is read by the next, so nobody waits for it. The answer therefore comes one
        call late across ranks (a single process answers at once).
        """
        if distributed.get_world_size() == 1:
            self._flags = self._local_flags()
            return bool(self._flags.any())
        self.wait_for_reduction()
        if self._flags.any():
            return True
        self._flags = self._local_flags()
        group = distributed.world.control
        self._pending = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=group, async_op=True)
        return False

    def exit_for_requeue(self) -> NoReturn:
        """Leave after saving, on all ranks together; first have the job requeued if nobody else does.

        After SIGUSR1 or SIGUSR2, rank 0 hands over to the handler that was there before us (submitit's), or else calls
        `scontrol requeue` for a batch job that allows it. After SIGTERM or SIGINT somebody is ending the job already
        (`scontrol requeue`, preemption, `scancel`): asking for a requeue could bring a cancelled job back.

        Raises:
            SystemExit: with `EXIT_REQUEUE`, or whatever submitit's handler exits with.
        """
        self.wait_for_reduction()
        requeue, terminated = (self._flags | self._local_flags()).bool().tolist()  # while saving, too
        try:
            if requeue and not terminated and distributed.is_main_process():
                self._requeue()
        finally:
            # The first to leave makes srun kill the others, so nobody leaves before rank 0 is done.
            with contextlib.suppress(RuntimeError):  # a rank that was killed meanwhile: leave all the same
                distributed.barrier()
        sys.exit(EXIT_REQUEUE)

    def close(self) -> None:
        """Wait for the reduction under way and give the signals back to their previous handlers."""
        self.wait_for_reduction()
        for signum, handler in self._previous.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    def _local_flags(self) -> torch.Tensor:
        seen = [not self._seen.keys().isdisjoint(signals) for signals in (REQUEUE_SIGNALS, END_SIGNALS)]
        return torch.tensor(seen, dtype=torch.int32)

    def wait_for_reduction(self) -> None:
        """Wait for the reduction under way, on all ranks."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.wait()

    def _requeue(self) -> None:
        for signum in REQUEUE_SIGNALS:
            if callable(handler := self._previous.get(signum)):
                handler(signum, None)
                return
        job = os.environ.get("SLURM_JOB_ID")
        if job is None:
            logger.warning("saved; start the same command again to continue")
        elif reason := _requeue_in_slurm(job):
            logger.warning("saved, but job %s is not queued again (%s): submit it again to continue", job, reason)
        else:
            logger.warning("saved; job %s is queued again", job)


def _requeue_in_slurm(job: str) -> str:
    """Have Slurm queue our `job` again; returns why it does not, or ''."""

    def scontrol(*arguments: str) -> str:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout

    try:
        # Slurm would also queue a job again that is being cancelled. (Of an array it may show all tasks.)
        if not re.search(rf"^JobId={job} .*\bJobState=RUNNING\b", scontrol("show", "job", "-o", job), re.MULTILINE):
            return "it is being ended already"
        scontrol("requeue", job)
    except (OSError, subprocess.CalledProcessError) as error:  # no batch job, or one that may not be requeued
        return str(getattr(error, "stderr", None) or error).strip()
    return ""
