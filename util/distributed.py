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
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

DEFAULT_PORT = 29500  # torchrun's; used where no job id tells runs apart
# Ports derived from a job id lie below Linux's ephemeral range (32768-60999), so no outgoing connection can hold one.
FIRST_JOB_PORT, JOB_PORTS = 15000, 16384
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


class LaunchError(ValueError):
    """The launcher's variables contradict each other, the flags or the machine."""


class CollectiveError(RuntimeError):
    """Ranks could not complete a collective: one of them died, hangs or is slower than --dist_timeout."""


@dataclass(frozen=True)
class Launch:
    """Who this process is among the processes of the run.

    `launcher` is 'torchrun', 'srun', 'mpi' or 'none'; `local_world_size` counts the processes on this node.
    Rank 0 is reached at `master_addr:master_port` unless `--dist_url` names another meeting point.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    master_addr: str
    master_port: int


def add_distributed_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how the processes of a run find each other."""
    group = parser.add_argument_group(
        "distributed run", "Normally detected from torchrun, srun or (with --dist_on_itp) MPI; nothing to set."
    )
    group.add_argument(
        "--world_size", type=int, default=None, metavar="N",
        help="number of processes; must agree with the launcher (default: the launcher's)",
    )  # fmt: skip
    group.add_argument(
        "--local_rank", "--local-rank", type=int, default=-1, metavar="I",
        help="index of this process on its node; must agree with the launcher (default: -1, the launcher's)",
    )  # fmt: skip
    group.add_argument(
        "--dist_on_itp", action="store_true", help="take rank and world size from Open MPI's variables (default: off)"
    )
    group.add_argument(
        "--dist_url", default="env://", metavar="URL",
        help="where processes meet: env://, tcp://HOST:PORT or file:///SHARED/NEW_FILE (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--port", type=int, default=None, metavar="P",
        help="TCP port on which rank 0 is met under srun and MPI (default: derived from the job id)",
    )  # fmt: skip
    group.add_argument(
        "--dist_timeout", type=float, default=1800.0, metavar="SECONDS",
        help="a rank that keeps the others waiting longer than this ends the run (default: %(default)g seconds)",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# Detection
# ---------------------------------------------------------------------------------------------------


def detect_launch(
    environ: Mapping[str, str],
    dist_on_itp: bool = False,
    dist_url: str = "env://",
    port: int | None = None,
    world_size: int | None = None,
) -> Launch:
    """Who we are, from the environment of the process.

    In this order: Open MPI when `dist_on_itp`, torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK), a step
    of `srun` with more than one task, and else a single process. Shells inside an allocation (`salloc`,
    `srun --pty`) are single processes. `port` overrides the port derived from the job id; `world_size` is
    what the user said it should be: 1 declares a single process in a batch script.

    Raises:
        LaunchError: variables are missing, not numbers, or contradict each other; names them and their values.
    """
    if port is not None and not 0 < port < 65536:
        raise LaunchError(f"--port {port} is not a TCP port: give one from 1024 to 65535")
    if dist_on_itp:
        launch = _detect_mpi(environ)
    elif "RANK" in environ:
        launch = _detect_torchrun(environ, port)
    elif _in_srun_step(environ):
        launch = _detect_srun(environ)
    else:
        _reject_forgotten_launchers(environ, world_size)
        launch = Launch(0, 1, 0, 1, "none", "127.0.0.1", DEFAULT_PORT)
    if world_size is not None and world_size != launch.world_size:
        raise LaunchError(
            f"--world_size {world_size} contradicts the {launch.world_size} process(es) that were started "
            f"(launcher: {launch.launcher}): leave the flag out, or start {world_size} processes"
        )
    return _apply_meeting_point(launch, dist_url, port)


def _detect_torchrun(environ: Mapping[str, str], port: int | None) -> Launch:
    rank, world_size, local_rank = _read_integers(environ, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    local_world_size = _integer(environ, "LOCAL_WORLD_SIZE", world_size)
    _check_ranks(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if _in_srun_step(environ):
        tasks, task = _step_tasks(environ), _integer(environ, "SLURM_PROCID", 0)
        by_agent = "TORCHELASTIC_RUN_ID" in environ  # one torchrun per task, each starting processes of its own
        if world_size % tasks or not (by_agent or (world_size, rank) == (tasks, task)):
            raise LaunchError(
                f"torchrun's variables (RANK={rank}, WORLD_SIZE={world_size}) contradict those of the srun step "
                f"(SLURM_PROCID={task}, {tasks} tasks): start the main by srun alone, or one torchrun per node with "
                f"--nnodes, or unset RANK and WORLD_SIZE"
            )
    master_port = _integer(environ, "MASTER_PORT", DEFAULT_PORT)
    if port is not None and port != master_port:
        raise LaunchError(
            f"--port {port} contradicts torchrun's MASTER_PORT={master_port}: give torchrun --master_port "
            f"{port} instead"
        )
    address = environ.get("MASTER_ADDR", "127.0.0.1")
    return Launch(rank, world_size, local_rank, local_world_size, "torchrun", address, master_port)


def _detect_srun(environ: Mapping[str, str]) -> Launch:
    world_size = _step_tasks(environ)
    if "WORLD_SIZE" in environ and _integer(environ, "WORLD_SIZE", 0) != world_size:
        raise LaunchError(
            f"WORLD_SIZE={environ['WORLD_SIZE']} (without RANK) contradicts the {world_size} tasks of the "
            f"srun step: unset it"
        )
    rank, local_rank = _read_integers(environ, "srun", "SLURM_PROCID", "SLURM_LOCALID")
    if not 0 <= rank < world_size:
        raise LaunchError(f"SLURM_PROCID={rank} is not below the step's number of tasks, {world_size}")
    layout = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    tasks_per_node = parse_tasks_per_node(layout) or [world_size]
    node = _integer(environ, "SLURM_NODEID", 0)
    if sum(tasks_per_node) != world_size or not 0 <= node < len(tasks_per_node):
        raise LaunchError(
            f"SLURM_STEP_TASKS_PER_NODE={layout!r} and SLURM_NODEID={node} do not fit the step's {world_size} tasks"
        )
    local_world_size = tasks_per_node[node]
    if not 0 <= local_rank < local_world_size:
        raise LaunchError(
            f"SLURM_LOCALID={local_rank} is not below this node's number of tasks, {local_world_size} "
            f"(SLURM_STEP_TASKS_PER_NODE={layout!r}, SLURM_NODEID={node})"
        )
    if "MASTER_ADDR" in environ:
        address = environ["MASTER_ADDR"]
    elif len(tasks_per_node) == 1:
        address = "127.0.0.1"  # needs no name to resolve
    else:
        nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        if not nodelist:
            raise LaunchError(
                "neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is set, so the node of rank 0 is unknown: "
                "set MASTER_ADDR"
            )
        address = first_host(nodelist)
    port = _integer(environ, "MASTER_PORT", job_port(environ))
    return Launch(rank, world_size, local_rank, local_world_size, "srun", address, port)


def _detect_mpi(environ: Mapping[str, str]) -> Launch:
    names = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    rank, world_size, local_rank = _read_integers(environ, "--dist_on_itp", *names[:3])
    local_world_size = _integer(environ, names[3], world_size)
    _check_ranks(environ, *names)
    address = environ.get("MASTER_ADDR")
    if address is None:
        if local_world_size != world_size:
            raise LaunchError(
                f"MASTER_ADDR is not set and Open MPI's {world_size} processes span several nodes "
                f"(OMPI_COMM_WORLD_LOCAL_SIZE={local_world_size}): set MASTER_ADDR to the node of rank 0"
            )
        address = "127.0.0.1"
    return Launch(
        rank, world_size, local_rank, local_world_size, "mpi", address, _integer(environ, "MASTER_PORT", DEFAULT_PORT)
    )


def _reject_forgotten_launchers(environ: Mapping[str, str], world_size: int | None) -> None:
    """Several processes were asked for, but we cannot tell which one we are: every one would train alone."""
    if "WORLD_SIZE" in environ and _integer(environ, "WORLD_SIZE", 1) != 1:
        raise LaunchError(
            f"WORLD_SIZE={environ['WORLD_SIZE']} is set but RANK is not: set both (torchrun does) or neither"
        )
    processes = _integer(environ, "OMPI_COMM_WORLD_SIZE", 1)
    if processes > 1:
        raise LaunchError(
            f"Open MPI started {processes} processes (OMPI_COMM_WORLD_SIZE): give --dist_on_itp to use it"
        )
    # A batch script has SLURM_PROCID like a task of srun, but no step; a shell of `salloc` has neither.
    tasks = _integer(environ, "SLURM_NTASKS", 1)
    if tasks > 1 and "SLURM_PROCID" in environ and "SLURM_STEP_ID" not in environ and world_size != 1:
        raise LaunchError(
            f"the batch script has SLURM_NTASKS={tasks} tasks but started only this process: write `srun "
            f"python ...`, or give --world_size 1 if one process is what you want"
        )


def _apply_meeting_point(launch: Launch, dist_url: str, port: int | None) -> Launch:
    address, master_port = launch.master_addr, launch.master_port if port is None else port
    url = urlparse(dist_url)
    if url.scheme == "tcp":
        if not url.hostname or not url.port:
            raise LaunchError(f"--dist_url {dist_url}: write tcp://HOST:PORT")
        if port is not None and port != url.port:
            raise LaunchError(f"--port {port} contradicts --dist_url {dist_url}: leave one of them out")
        address, master_port = url.hostname, url.port
    elif url.scheme not in ("env", "file"):
        raise LaunchError(f"--dist_url {dist_url} is not one of env://, tcp://HOST:PORT, file:///SHARED/NEW_FILE")
    return replace(launch, master_addr=address, master_port=master_port)


def _in_srun_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several tasks (in a batch script SLURM_STEP_ID is absent)."""
    return "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and _step_tasks(environ) > 1


def _step_tasks(environ: Mapping[str, str]) -> int:
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    return _integer(environ, name, 1)


def _integer(environ: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(environ.get(name, default))
    except ValueError:
        raise LaunchError(f"{name}={environ[name]!r} is not a whole number") from None


def _read_integers(environ: Mapping[str, str], launcher: str, *names: str) -> list[int]:
    found = ", ".join(f"{name}={environ[name]}" for name in names if name in environ)
    missing = [name for name in names if name not in environ]
    if missing:
        raise LaunchError(
            f"{launcher} sets {', '.join(names)}, but {', '.join(missing)} is missing (found: "
            f"{found or 'none of them'})"
        )
    return [_integer(environ, name, 0) for name in names]


def _check_ranks(environ: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> None:
    """`0 <= rank < size` on both levels, and no more processes on the node than in the world."""
    for index, count in ((rank, size), (local_rank, local_size), (local_rank, size), (local_size, size)):
        if index not in environ or count not in environ:
            continue
        low, value, high = int(index == local_size), _integer(environ, index, 0), _integer(environ, count, 0)
        if not low <= value < high + low:
            raise LaunchError(f"{index}={value} does not fit {count}={high}")


def parse_tasks_per_node(layout: str) -> list[int]:
    """Slurm's SLURM_TASKS_PER_NODE, `'2(x3),1'`, as one number per node: `[2, 2, 2, 1]`.

    Raises:
        LaunchError: `layout` has another form.
    """
    counts: list[int] = []
    for part in filter(None, layout.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise LaunchError(f"SLURM_TASKS_PER_NODE={layout!r} is not of the form 8(x2),4")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list such as `gpu[03-05,9],login1`, by `scontrol` or, without it, by
    ourselves.

    Raises:
        LaunchError: the list cannot be read.
    """
    try:
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, timeout=30
        )
        if listing.returncode == 0 and listing.stdout.strip():
            return listing.stdout.split()[0]
    except (OSError, subprocess.TimeoutExpired):
        pass  # containers often lack Slurm's commands
    first = re.match(r"(?:[^\[\],]|\[[^\]]*\])+", nodelist)  # up to the first comma outside brackets
    if first is None or "[" in nodelist.replace(first[0], "", 1).split(",")[0]:
        raise LaunchError(f"the Slurm node list {nodelist!r} cannot be read: set MASTER_ADDR to rank 0's node")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def job_port(environ: Mapping[str, str]) -> int:
    """A port from SLURM_JOB_ID, SLURM_STEP_ID and SLURM_RESTART_COUNT: jobs and steps that share a node do
    not collide, and a requeued job does not wait for the port of its last attempt."""
    job, step = _integer(environ, "SLURM_JOB_ID", 0), _integer(environ, "SLURM_STEP_ID", 0)
    restart = _integer(environ, "SLURM_RESTART_COUNT", 0)
    return FIRST_JOB_PORT + (job * 31 + step + restart * 7919) % JOB_PORTS


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


def device_index(launch: Launch, device_count: int, environ: Mapping[str, str]) -> int:
    """Which of the `device_count` visible GPUs belongs to this process: its local rank, or the only one
    when Slurm already shows every task its own (--gpus-per-task, --gpu-bind).

    Raises:
        LaunchError: there are fewer GPUs than processes on this node.
    """
    bound = any(name in environ for name in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_TRES_PER_TASK"))
    if device_count == 1 and launch.launcher == "srun" and bound:
        return 0
    if launch.local_rank >= device_count:
        raise LaunchError(
            f"local rank {launch.local_rank} needs a GPU of its own, but this node ({socket.gethostname()}) shows "
            f"{device_count} (CUDA_VISIBLE_DEVICES={environ.get('CUDA_VISIBLE_DEVICES', 'unset')}) to its "
            f"{launch.local_world_size} processes: start as many processes per node as GPUs, or use --device cpu"
        )
    return launch.local_rank


def _choose_device(name: str | torch.device, launch: Launch) -> torch.device:
    if str(name) == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LaunchError(f"--device {name} is not a device (auto, cuda, cuda:0, cpu, ...)") from error
    if device.type not in ("cpu", "cuda"):
        raise LaunchError(f"--device {name} is not supported: use auto, cuda, cuda:N or cpu")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise LaunchError(f"--device {name}, but this PyTorch ({torch.__version__}) sees no GPU: use --device cpu")
    if device.index is None or launch.world_size > 1:
        device = torch.device("cuda", device_index(launch, torch.cuda.device_count(), os.environ))
    elif device.index >= torch.cuda.device_count():
        raise LaunchError(f"--device {name}, but only {torch.cuda.device_count()} GPU(s) are visible")
    torch.cuda.set_device(device)
    return device


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
