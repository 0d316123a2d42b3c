"""How a process that cannot go on ends: one line on what its user can fix, once per node, or on which rank is gone.

A traceback is kept for everything else, which is a fault of the program.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import select
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from util.data.decoding import BadImageError
from util.errors import RunError, UserError
from util.run import distributed
from util.run.determinism import explain_nondeterminism
from util.run.distributed import World
from util.run.folder_lock import release_folders
from util.run.launch import stated_rank

logger = logging.getLogger(__name__)

RANK_0_FIRST = 1.0  # seconds in which it reports what all would report, so that there is one line
SURVIVOR_WAIT = 3.0  # seconds that the survivors of a failure give each other to report before naming who is missing
# What PyTorch says when /dev/shm is full; writing to a mapping of it is a bus error.
SHARED_MEMORY_SIGNS = ("unable to write to file </torch_", "shared memory(shm) for file", "killed by signal: Bus error")
# What gloo and NCCL say, in RuntimeErrors without a class of their own.
COLLECTIVE_FAILURE_SIGNS = (
    "gloo", "nccl", "closed by peer", "reset by peer", "broken pipe", "timed out", "pair closure"
)  # fmt: skip
# And where nodes do not reach each other.
NETWORK_FAILURE_SIGNS = ("refused", "no route", "unreachable", "network error", "socket interface", "find address")


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Around all but training: an error that one line explains ends the process with that line and exit code 2.

    Of the ranks of a node that fail with the same message only the first prints it, and rank 0, whose log may be a file
    of its own. Bad images and RunErrors are printed by every rank that has them.
    """
    try:
        with explained():
            yield
        sys.stdout.flush()
    except BaseException as error:
        release_folders()
        if isinstance(error, BrokenPipeError) and whoever_reads_has_gone():
            os._exit(1)  # as after `| head`: there is nobody to tell
        if not isinstance(error, (UserError, RunError)):
            raise
        rank, has_companions = stated_rank(os.environ)
        message = f"{Path(sys.argv[0]).name}: error: {in_one_line(error)}"
        if isinstance(error, (BadImageError, RunError)) or not has_companions or is_to_say(message, rank):
            line = message if rank == "0" else f"[rank {rank}] {message}"
            print(f"{line}\n", end="", file=sys.stderr, flush=True)  # in one write: no other's comes between
        if distributed.get_world_size() > 1:
            os._exit(2)  # at once: Python's shutdown would wait for ranks that may hang
        sys.exit(2)


def whoever_reads_has_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Explain PyTorch's errors about operations that are not deterministic, data-loading processes that have died and
    ranks that are gone. Others pass through."""
    try:
        yield
    except RunError:
        raise
    except (RuntimeError, OSError) as error:
        explanation = explain_nondeterminism(error) or explain_worker_failure(error) or explain_lost_rank(error)
        if explanation is None:
            raise
        raise explanation from error


def in_one_line(error: Exception) -> str:
    """The message of an error; one that comes from a data-loading process has a traceback before it."""
    name = f"{type(error).__module__}.{type(error).__name__}: "
    message = str(error).rstrip()
    return message.rpartition(name)[2] if name in message else message


def is_to_say(message: str, rank: str) -> bool:
    """Whether `rank` is 0, or no other process that our launcher started on this node has printed `message` since we
    were started.

    They may not have met yet, so they tell each other through a file of the user's in the temporary folder. What was
    printed before this process was started belongs to an earlier run. In doubt, print it: twice is better than never.
    """
    now, age = time.time(), process_age()  # together: the file may have to be waited for
    if rank != "0":
        time.sleep(RANK_0_FIRST)
    key = hashlib.sha256(f"{socket.gethostname()} {os.getppid()} {message}".encode()).hexdigest()
    path = Path(tempfile.gettempdir()) / f"mixmae-errors-{os.getuid()}.json"
    try:
        with open(path, "a+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600)) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            file.seek(0)
            text = file.read()
            file.truncate(0)
            said = json.loads(text or "{}")  # what was said in the last hour -> when
            json.dump({name: moment for name, moment in said.items() if moment > now - 3600} | {key: now}, file)
        return rank == "0" or said.get(key, 0) < now - age
    except (OSError, ValueError):
        return True


def process_age() -> float:
    """Seconds since this process was started; 0 if the system does not tell."""
    try:
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]  # in ticks after booting
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0


def explain_worker_failure(error: Exception) -> RunError | None:
    """What has happened to a data-loading process that was killed, or found no room for its batch."""
    died = re.search(
        r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (is killed by signal: [\w ]+|exited unexpectedly)", str(error)
    )
    if any(sign in str(error) for sign in SHARED_MEMORY_SIGNS):
        shared = shutil.disk_usage("/dev/shm").total / 2**30 if os.path.isdir("/dev/shm") else 0.0
        what = (
            f"found no room in shared memory for its batch. Batches travel through /dev/shm, which has {shared:.1f} "
            "GiB here: enlarge it (docker run --shm-size=16g), or use a smaller --num_workers or --batch_size"
        )
    elif died:
        what = (
            f"{died[1].strip()}. Out of memory, most likely: use a smaller --num_workers (0 reads in the training "
            "process), give the job more memory (sbatch --mem), or enlarge /dev/shm in a container (docker run "
            "--shm-size=16g)"
        )
    else:
        return None
    return RunError(f"a data-loading process {what}. Continue from the last checkpoint with --resume auto")


def explain_lost_rank(error: Exception) -> RunError | None:
    """Which ranks no longer answer, as far as that can be found out, when a collective has failed."""
    world, text = distributed.world, str(error).lower()
    is_failure = isinstance(error, RuntimeError) and any(sign in text for sign in COLLECTIVE_FAILURE_SIGNS)
    if world is None or not (is_failure or isinstance(error, dist.DistError)):
        return None
    # Logged at once, since the launcher may end us before the survivors have been counted.
    logger.error("rank %d: a collective failed: %s", world.launch.rank, str(error).partition("\n")[0])
    findings = ["rank 0 (through which the others meet) no longer answers"]
    # In a thread, since asking the store of a stopped process would block permanently.
    thread = threading.Thread(target=_find_suspect, args=(world, findings), daemon=True)
    thread.start()
    thread.join(SURVIVOR_WAIT + 2.0)
    unreached = any(sign in text for sign in NETWORK_FAILURE_SIGNS)
    return RunError(
        f"rank {world.launch.rank} of {world.launch.world_size} could not complete a collective: {findings[-1]}. "
        f"A process was killed, failed (its own message is above) or kept the others waiting longer than "
        f"--dist_timeout {world.timeout:g} s. Continue from the last checkpoint with --resume auto; raise "
        f"--dist_timeout if a rank may be that slow." + (f" {distributed.network_hint()}" if unreached else "")
    )


def _find_suspect(world: World, findings: list[str]) -> None:
    """Report our failure to the store; append to `findings`, repeatedly, which ranks have not reported theirs."""
    launch, store, now = world.launch, world.store, time.time()
    deadline = time.monotonic() + SURVIVOR_WAIT
    with contextlib.suppress(OSError, RuntimeError):  # the store is gone
        if launch.master_addr:  # the store itself would log a C++ stack trace when nobody listens
            socket.create_connection((launch.master_addr, launch.master_port), timeout=1.0).close()
        store.set(f"failed/{launch.rank}", str(now))
        missing = list(range(launch.world_size))
        while missing and time.monotonic() < deadline:
            time.sleep(0.1)
            missing = [rank for rank in missing if not store.check([f"failed/{rank}"])]
            findings.append(f"rank(s) {', '.join(map(str, missing))} no longer answer")
        if not missing:
            first, rank = min((float(store.get(f"failed/{rank}")), rank) for rank in range(launch.world_size))
            findings.append(
                f"rank {rank} gave up {now - first:.0f} s ago, so it is this rank that was stopped or too slow"
                if now - first > SURVIVOR_WAIT
                else "all ranks still answer, so one of them was too slow"
            )
