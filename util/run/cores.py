"""The cores that a process may use: with how many threads it computes on a CPU, and how many processes load data."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

MOST_WORKERS = 16  # by default; each takes memory, and with its batches shared memory


def own_cores() -> frozenset[int]:
    """The numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def container_quota() -> float:
    """How many cores' worth of time the container may use; its cores are often all those of the machine."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no such file, or 'max'
        return float("inf")


def share_of_cores(
    environ: Mapping[str, str], cores: frozenset[int], node: Sequence[frozenset[int]], quota: float
) -> tuple[int, str]:
    """How many cores a process can keep busy without taking another one's, and why, in words.

    Args:
        environ: in a Slurm job, with the cores that a task asked for.
        cores: those of this process.
        node: those of every process of the run on this machine, this one included. Each core is shared among the
            processes that may use it.
        quota: how many cores the processes of this machine may keep busy.
    """
    share = sum(1 / sum(core in others for others in node) for core in cores)
    available = min(len(frozenset().union(*node)), quota)
    share = max(1, int(min(share, quota / len(node)) + 1e-9))
    per_task = environ.get("SLURM_CPUS_PER_TASK", "")
    if per_task.isdecimal() and 1 <= int(per_task) < share:  # a task may hold several processes, never the reverse
        return int(per_task), f"SLURM_CPUS_PER_TASK={per_task}"
    return share, f"{available:g} cores for {len(node)} process{'es' if len(node) > 1 else ''}"


def choose_workers(cores: int) -> int:
    """How many data-loading processes suit a process that can keep `cores` busy: it keeps one of more than two."""
    return min(MOST_WORKERS, cores - 1 if cores > 2 else cores)


def own_share(node: Sequence[frozenset[int]]) -> tuple[int, str]:
    """How many cores this process can keep busy, and why, see `share_of_cores`."""
    return share_of_cores(os.environ, own_cores(), node, container_quota())


def fit_threads(share: int, reason: str) -> str:
    """Compute with as many threads as `own_share`, unless the user gives a number; returns how many and why."""
    if given := os.environ.get("OMP_NUM_THREADS"):
        reason = f"OMP_NUM_THREADS={given}"
    else:
        torch.set_num_threads(share)
    return f"{torch.get_num_threads()} thread(s) per process ({reason})"
