"""Who this process is among the processes of a run: from the environment of whatever started it, and its device."""

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlparse

import torch

from util.errors import UserError

DEFAULT_PORT = 29500  # torchrun's; used where no job id tells runs apart
# Ports derived from a job id lie below Linux's ephemeral range (32768-60999), so no outgoing connection can hold one.
FIRST_JOB_PORT, JOB_PORTS = 15000, 16384


class LaunchError(UserError):
    """The launcher's variables contradict each other, the flags or the machine."""


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
