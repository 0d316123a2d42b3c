"""Who this process is among the processes of a run, from the environment of whatever started it, and its device."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from util.errors import UserError

DEFAULT_PORT = 29500  # torchrun's; used where no job id tells runs apart
# Ports derived from a job id lie below Linux's ephemeral range (32768-60999), so no outgoing connection can hold one.
FIRST_JOB_PORT, JOB_PORTS = 15000, 16384


# The variables by which each launcher tells a process its rank, world size, local rank and local world size. The last
# may be missing, except under srun, where it is a layout of all nodes, `2(x3),1`, and SLURM_NODEID picks the entry.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpi": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}


@dataclass(frozen=True)
class Launch:
    """Who this process is among the processes of the run.

    `launcher` is 'torchrun', 'srun', 'mpi' or 'none'. `local_world_size` counts the processes on this node; it is None
    if RANK, WORLD_SIZE and LOCAL_RANK were set without it. Rank 0 is reached at `master_addr:master_port`, or
    `master_addr` is '' and a file takes its place. `cores` is how many this process can keep busy without taking
    another rank's (see `util.run.cores.share_of_cores`).
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None
    launcher: str
    master_addr: str
    master_port: int
    device: torch.device
    cores: int = 1


def detect_launch(
    environ: Mapping[str, str],
    dist_on_itp: bool = False,
    dist_url: str = "env://",
    port: int | None = None,
    world_size: int | None = None,
) -> Launch:
    """Who this process is, from its environment; the device is the CPU until `choose_device` has been asked.

    In this order: Open MPI when `dist_on_itp`, torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK), a step of `srun`
    with more than one task, or else a single process. Shells inside an allocation (`salloc`, `srun --pty`) are single
    processes. `port` overrides the port derived from the job id; `world_size` is what the user said it should be: 1
    declares a single process in a batch script.

    Raises:
        UserError: variables are missing, not numbers, or contradict each other; names them and their values.
    """
    launcher = "torchrun" if "RANK" in environ else "srun" if _step_tasks(environ) > 1 else "none"
    launcher = "mpi" if dist_on_itp else launcher
    ids = (0, 1, 0, 1) if launcher == "none" else _read_ids(environ, launcher)
    rank, started, _, local_world_size = ids
    _reject_other_launchers(environ, launcher, rank, started, declared_alone=world_size == 1)
    _require(
        world_size in (None, started),
        f"--world_size {world_size} contradicts the {started} process(es) that were started (launcher: {launcher}): "
        f"leave the flag out, or start {world_size} processes",
    )
    meeting_point = _meeting_point(environ, launcher, started in (1, local_world_size), dist_url, port)
    return Launch(*ids, launcher, *meeting_point, torch.device("cpu"))


def stated_rank(environ: Mapping[str, str]) -> tuple[str, bool]:
    """This process's rank and whether it has companions, unchecked: for messages about what may be wrong with them."""
    for rank, world_size, *_ in LAUNCHERS.values():
        if rank in environ:
            return environ[rank], environ.get(world_size, "1") != "1"
    return "0", False


def _read_ids(environ: Mapping[str, str], launcher: str) -> tuple[int, int, int, int | None]:
    """Rank, world size, local rank and local world size, checked against each other."""
    names = LAUNCHERS[launcher]
    needed = (*names, "SLURM_NODEID") if launcher == "srun" else names[:3]
    missing = ", ".join(name for name in needed if name not in environ)
    found = ", ".join(f"{name}={environ[name]}" for name in (*names, *needed[4:]) if name in environ)
    _require(not missing, f"{launcher} sets {', '.join(needed)}, but {missing} is missing (found: {found or 'none'})")
    rank, world_size, local_rank = (_integer(environ, name) for name in names[:3])
    local_world_size = None
    if launcher == "srun":
        layout, node = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ[names[3]]), _integer(environ, "SLURM_NODEID")
        tasks_per_node = [int(tasks) for tasks, nodes in layout for _ in range(int(nodes or 1))]
        fits = sum(tasks_per_node) == world_size and 0 <= node < len(tasks_per_node)
        _require(fits, f"the layout of the srun step contradicts its number of tasks or nodes: {found}")
        local_world_size = tasks_per_node[node]
    elif names[3] in environ:
        local_world_size = _integer(environ, names[3])
    on_node = world_size if local_world_size is None else local_world_size
    _require(
        0 <= rank < world_size and 0 <= local_rank < on_node <= world_size,
        f"{names[0]} must be below {names[1]}, and {names[2]} below this node's share of it ({on_node}): {found}",
    )
    return rank, world_size, local_rank, local_world_size


def _reject_other_launchers(
    environ: Mapping[str, str], launcher: str, rank: int, world_size: int, declared_alone: bool
) -> None:
    """Variables of another launcher than the detected one mean that every process might train on its own."""
    if launcher == "torchrun" and (tasks := _step_tasks(environ)) > 1:
        task = _integer(environ, "SLURM_PROCID")
        by_agent = "TORCHELASTIC_RUN_ID" in environ  # one torchrun per task, each starting processes of its own
        _require(
            world_size % tasks == 0 and (by_agent or (world_size, rank) == (tasks, task)),
            f"torchrun's variables (RANK={rank}, WORLD_SIZE={world_size}) contradict those of the srun step "
            f"(SLURM_PROCID={task}, {tasks} tasks): start the main by srun alone, or one torchrun per node with "
            f"--nnodes, or unset RANK and WORLD_SIZE",
        )
    if launcher in ("srun", "none"):
        stated = _integer(environ, "WORLD_SIZE", world_size)
        _require(
            stated == world_size,
            f"WORLD_SIZE={stated} is set but RANK is not, and it contradicts the {world_size} process(es) that were "
            f"started (launcher: {launcher}): set both (torchrun does) or neither",
        )
    if launcher == "none":
        processes = _integer(environ, "OMPI_COMM_WORLD_SIZE", 1)
        _require(
            processes <= 1,
            f"Open MPI started {processes} processes (OMPI_COMM_WORLD_SIZE): give --dist_on_itp to use it",
        )
        # A batch script has SLURM_PROCID like a task of srun, but no step; a shell of `salloc` has neither.
        batch_script = "SLURM_PROCID" in environ and "SLURM_STEP_ID" not in environ
        tasks = _integer(environ, "SLURM_NTASKS", 1)
        _require(
            not batch_script or tasks <= 1 or declared_alone,
            f"the batch script has SLURM_NTASKS={tasks} tasks but started only this process: write `srun python ...`, "
            f"or give --world_size 1 if one process is what you want",
        )


def _meeting_point(
    environ: Mapping[str, str], launcher: str, one_node: bool, dist_url: str, port: int | None
) -> tuple[str, int]:
    """Address and port at which rank 0 is reached; the address is '' if `dist_url` names a file instead."""
    default = _integer(environ, "MASTER_PORT", job_port(environ) if launcher == "srun" else DEFAULT_PORT)
    name, chosen = ("MASTER_PORT", default) if port is None else ("--port", port)
    _require(0 < chosen < 65536, f"{name} {chosen} is not a TCP port: give one from 1024 to 65535")
    _require(
        launcher != "torchrun" or chosen == default,
        f"--port {port} contradicts torchrun's MASTER_PORT={default}: give torchrun --master_port {port} instead",
    )
    url = re.fullmatch(r"env://|file:.*|tcp://([^/]+):([1-9]\d{0,4})/?", dist_url)
    _require(
        url and int(url[2] or 1) < 65536,
        f"--dist_url {dist_url} is not one of env://, tcp://HOST:PORT, file:///SHARED/NEW_FILE",
    )
    if dist_url.startswith("file:"):
        return "", 0
    if url[1]:
        _require(port in (None, int(url[2])), f"--port {port} contradicts --dist_url {dist_url}: leave one of them out")
        return url[1], int(url[2])
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if one_node else "")  # the latter needs no name to resolve
    if not address and _step_tasks(environ) > 1 and "SLURM_STEP_NODELIST" in environ:
        address = first_host(environ["SLURM_STEP_NODELIST"])
    _require(
        address,
        f"MASTER_ADDR is not set (nor SLURM_STEP_NODELIST), and the processes that {launcher} started may be on "
        f"several nodes: set MASTER_ADDR to the node of rank 0",
    )
    return address, chosen


def _step_tasks(environ: Mapping[str, str]) -> int:
    """How many tasks srun started this process with; 1 outside its steps (a batch script has no SLURM_STEP_ID)."""
    if not {"SLURM_PROCID", "SLURM_STEP_ID"} <= environ.keys():
        return 1
    return _integer(environ, "SLURM_STEP_NUM_TASKS", _integer(environ, "SLURM_NTASKS", 1))


def _integer(environ: Mapping[str, str], name: str, default: int = 0) -> int:
    try:
        return int(environ.get(name, default))
    except ValueError:
        raise UserError(f"{name}={environ[name]!r} is not a whole number") from None


def _require(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list such as `gpu[03-05,9],login1`: `gpu03`."""
    first = re.match(r"((?:[^\[\],]|\[[^\]]*\])+)(?:,|$)", nodelist)  # up to the first comma outside brackets
    _require(first, f"the Slurm node list {nodelist!r} cannot be read: set MASTER_ADDR to rank 0's node")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[1])


def job_port(environ: Mapping[str, str]) -> int:
    """A port from SLURM_JOB_ID, SLURM_STEP_ID and SLURM_RESTART_COUNT: jobs and steps that share a node do not collide,
    and a requeued job does not wait for the port of its last attempt."""
    job, step, restart = (_integer(environ, f"SLURM_{name}") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return FIRST_JOB_PORT + (job * 31 + step + restart * 7919) % JOB_PORTS


def choose_device(name: str, launch: Launch) -> torch.device:
    """The device called `name` ('auto', 'cuda', 'cuda:I', 'cpu') of this process, made current if it is a GPU.

    With several processes, each takes the GPU of `device_index`, whatever I says.

    Raises:
        UserError: there is no such device, or there are fewer GPUs than processes on this node.
    """
    _require(
        re.fullmatch(r"auto|cpu|cuda(:\d+)?", name), f"--device {name} is not a device: use auto, cuda, cuda:N or cpu"
    )
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    _require(
        torch.cuda.is_available(),
        f"--device {name}, but this PyTorch ({torch.__version__}) sees no GPU: use --device cpu",
    )
    count = torch.cuda.device_count()
    if ":" in name and launch.world_size == 1:
        index = int(name.removeprefix("cuda:"))
        _require(index < count, f"--device {name}, but only {count} GPU(s) are visible")
    else:
        index = device_index(launch, count, os.environ)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def device_index(launch: Launch, device_count: int, environ: Mapping[str, str]) -> int:
    """Which of the `device_count` visible GPUs belongs to this process: its local rank, or the only one when Slurm
    already shows every task its own (--gpus-per-task, --gpu-bind).

    Raises:
        UserError: there are fewer GPUs than processes on this node; raised, in the same words, by all of them.
    """
    bound = any(name in environ for name in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_TRES_PER_TASK"))
    if device_count == 1 and launch.launcher == "srun" and bound:
        return 0
    processes = launch.local_world_size or launch.local_rank + 1
    _require(
        processes <= device_count,
        f"the {processes} processes on this node ({socket.gethostname()}) need a GPU each, but it shows them "
        f"{device_count} (CUDA_VISIBLE_DEVICES={environ.get('CUDA_VISIBLE_DEVICES', 'unset')}): start as many "
        f"processes per node as GPUs, or use --device cpu",
    )
    return launch.local_rank
