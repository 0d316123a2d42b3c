"""Starting, talking across and ending the processes of one run.

Who we are (rank, world size, ...) comes from whatever started us: `torchrun`, a bare `srun`, MPI
(`--dist_on_itp`), or nobody. `detect_launch` decides that from the environment alone and rejects
contradictions; `init_distributed` then picks the device, starts the process group (NCCL on CUDA, gloo on a
CPU) and a second, gloo group for decisions that the CPUs take together. Every function below works without
a group too: a single process is a world of one.
"""

import argparse
import contextlib
import datetime
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from util.run.launch import Launch, LaunchError, _choose_device, detect_launch

logger = logging.getLogger(__name__)

SURVIVOR_WAIT = 3.0  # seconds that the survivors of a failure wait for each other before naming who is missing
# What gloo and NCCL say, in RuntimeErrors without a class of their own.
COLLECTIVE_FAILURE_SIGNS = (
    "gloo",
    "nccl",
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "timed out",
    "pair closure",
)


class CollectiveError(RuntimeError):
    """Ranks could not complete a collective: one of them died, hangs or is slower than --dist_timeout."""


# ---------------------------------------------------------------------------------------------------
# Start and end
# ---------------------------------------------------------------------------------------------------


@dataclass
class _World:
    """The running process groups: `control` is the gloo group of the CPUs' decisions."""

    launch: Launch
    timeout: float  # seconds
    store: Any
    store_address: tuple[str, int] | None  # None: a file
    control: Any


_world: _World | None = None  # None: a single process


def init_distributed(args: argparse.Namespace) -> Launch:
    """Detect the launcher, choose the device and start the process groups.

    Reads the flags of `add_distributed_arguments` and `args.device` ('auto', 'cuda', 'cuda:I', 'cpu', ...);
    sets `args.rank`, `args.world_size`, `args.local_rank`, `args.distributed` and `args.device` (a
    `torch.device`).

    Raises:
        LaunchError: contradictory variables or flags, or more processes on this node than GPUs.
        CollectiveError: the processes did not meet within `args.dist_timeout` seconds.
    """
    global _world
    if args.dist_timeout <= 0:
        raise LaunchError(f"--dist_timeout {args.dist_timeout:g} must be a positive number of seconds")
    launch = detect_launch(os.environ, args.dist_on_itp, args.dist_url, args.port, args.world_size)
    if args.local_rank not in (-1, launch.local_rank):
        raise LaunchError(f"--local_rank {args.local_rank} contradicts the launcher's local rank {launch.local_rank}")
    device = _choose_device(args.device, launch)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if launch.world_size > 1:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # a timed-out NCCL collective ends us
        _world = _start_groups(launch, backend, args.dist_url, args.dist_timeout)
    args.rank, args.world_size, args.local_rank = launch.rank, launch.world_size, launch.local_rank
    args.distributed, args.device = launch.world_size > 1, device
    if launch.world_size > 1:
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        logger.info(
            "started by %s: %d processes (%s), meeting at %s, %s on %s",
            launch.launcher, launch.world_size, describe_placement(gather_objects(node)),
            _meeting_point(launch, args.dist_url), backend, device.type,
        )  # fmt: skip
    else:
        logger.info("started as a single process (launcher: %s) on %s", launch.launcher, device)
    return launch


def describe_placement(nodes: list[str]) -> str:
    """The node of every rank, in words: `'2 on node1, 1 on node2'`."""
    return ", ".join(f"{nodes.count(node)} on {node}" for node in dict.fromkeys(nodes))


def _meeting_point(launch: Launch, dist_url: str) -> str:
    """The URL of the rendezvous. torchrun's is env://, where its agent, not rank 0, may hold the store."""
    if dist_url.startswith("file:") or (launch.launcher == "torchrun" and dist_url == "env://"):
        return dist_url
    return f"tcp://{launch.master_addr}:{launch.master_port}"


def _start_groups(launch: Launch, backend: str, dist_url: str, seconds: float) -> _World:
    timeout = datetime.timedelta(seconds=seconds)
    url = _meeting_point(launch, dist_url)
    try:
        store, rank, world_size = next(
            dist.rendezvous(url, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
        )
        store.set_timeout(timeout)
        device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device
        )
        control = dist.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as error:
        raise CollectiveError(
            f"rank {launch.rank} of {launch.world_size} did not meet the others at {url} within --dist_timeout "
            f"{seconds:g} s: are all {launch.world_size} processes running, is the port free ({error})?"
        ) from error
    store_address = None if url.startswith("file:") else (launch.master_addr, launch.master_port)
    return _World(launch, seconds, dist.PrefixStore("survivors", store), store_address, control)


def shutdown() -> None:
    """End the process groups (also after a failure); nothing to do in a single process."""
    global _world
    if _world is not None:
        _world = None
        dist.destroy_process_group()


@contextlib.contextmanager
def explain_collective_failures() -> Iterator[None]:
    """Around training: a collective that fails inside becomes a `CollectiveError` that names this rank,
    --dist_timeout and, where it can be found out, the ranks that no longer answer. Other errors pass
    through."""
    try:
        yield
    except RuntimeError as error:
        if _world is None or isinstance(error, CollectiveError) or not _is_collective_failure(error):
            raise
        # Said at once, since the launcher may end us before the survivors have been counted.
        logger.error("rank %d: a collective failed: %s", _world.launch.rank, str(error).partition("\n")[0])
        raise CollectiveError(_describe_failure(_world)) from error


def _is_collective_failure(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(sign in text for sign in COLLECTIVE_FAILURE_SIGNS)


def _describe_failure(world: _World) -> str:
    suspect = "rank 0 (which the others meet through) no longer answers"

    def ask() -> None:
        nonlocal suspect
        with contextlib.suppress(OSError, RuntimeError):
            suspect = _find_suspect(world)

    # In a thread, since asking the store of a stopped process would block for ever.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SURVIVOR_WAIT + 2.0)
    return (
        f"rank {world.launch.rank} of {world.launch.world_size} could not complete a collective: {suspect}. "
        f"A process was killed, failed (its own message is above) or kept the others waiting longer than "
        f"--dist_timeout {world.timeout:g} s. Continue from the last checkpoint with --resume auto; raise "
        f"--dist_timeout if a rank may be that slow."
    )


def _find_suspect(world: _World) -> str:
    """Which ranks do not report their failure to the store within `SURVIVOR_WAIT` seconds of our own, in words.

    Raises:
        OSError, RuntimeError: the store is gone.
    """
    launch, now = world.launch, time.time()
    if world.store_address is not None:  # the store itself would log a C++ stack trace when nobody listens
        socket.create_connection(world.store_address, timeout=1.0).close()
    world.store.set(str(launch.rank), str(now))
    others = [rank for rank in range(launch.world_size) if rank != launch.rank]
    deadline = time.monotonic() + SURVIVOR_WAIT
    while others and time.monotonic() < deadline:
        for rank in [rank for rank in others if world.store.check([str(rank)])]:
            others.remove(rank)
            ahead = now - float(world.store.get(str(rank)))
            if ahead > SURVIVOR_WAIT:
                return f"rank {rank} gave up {ahead:.0f} s ago, so it is this rank that was stopped or too slow"
        time.sleep(0.1)
    if others:
        return f"rank(s) {', '.join(map(str, others))} no longer answer"
    return "all ranks still answer, so one of them was too slow"


# ---------------------------------------------------------------------------------------------------
# Talking across ranks
# ---------------------------------------------------------------------------------------------------


def get_rank() -> int:
    return _world.launch.rank if _world else 0


def get_world_size() -> int:
    return _world.launch.world_size if _world else 1


def is_main_process() -> bool:
    return get_rank() == 0


def control_group() -> Any:
    """The gloo group for decisions that the CPUs of all ranks take together; None in a single process."""
    return _world.control if _world else None


def barrier() -> None:
    """Wait for all ranks, on the CPU (work queued on a GPU is not waited for)."""
    if _world:
        dist.barrier(group=_world.control)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all ranks as a new tensor, on its device; `tensor` itself stays as it is."""
    total = tensor.detach().clone()
    if _world:
        dist.all_reduce(total, group=_world.control if total.device.type == "cpu" else None)
    return total


def all_reduce_mean(value: torch.Tensor | float) -> torch.Tensor | float:
    """The mean of `value` over all ranks: a tensor for a tensor, a float (summed in float64) for a number."""
    if isinstance(value, torch.Tensor):
        return all_reduce_sum(value) / get_world_size()
    return all_reduce_sum(torch.tensor(value, dtype=torch.float64)).item() / get_world_size()


def gather_objects(obj: Any) -> list[Any]:
    """`obj` of every rank, in the order of ranks, on every rank. It is pickled, so keep it small and our own."""
    if not _world:
        return [obj]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, obj, group=_world.control)
    return gathered
