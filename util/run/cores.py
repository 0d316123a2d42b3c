"""How many threads a process computes with on a CPU."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch


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


def choose_threads(
    environ: Mapping[str, str], cores: frozenset[int], node: Sequence[frozenset[int]], quota: float
) -> tuple[int | None, str]:
    """How many threads a process should compute with (None: as it does), and why, in words.

    Args:
        environ: what the user or Slurm says goes first.
        cores: those of this process.
        node: those of every process of the run on this machine, this one included. Each core is shared among the
            processes that may use it.
        quota: how many cores the processes of this machine may keep busy.
    """
    if environ.get("OMP_NUM_THREADS"):
        return None, f"OMP_NUM_THREADS={environ['OMP_NUM_THREADS']}"
    per_task = environ.get("SLURM_CPUS_PER_TASK", "")
    if per_task.isdecimal():
        return max(1, min(int(per_task), len(cores))), f"SLURM_CPUS_PER_TASK={per_task}"
    share = sum(1 / sum(core in others for others in node) for core in cores)
    threads = max(1, int(min(share, quota / len(node)) + 1e-9))
    available = min(len(frozenset().union(*node)), quota)
    return threads, f"{available:g} cores for {len(node)} process{'es' if len(node) > 1 else ''}"


def fit_threads(node: Sequence[frozenset[int]]) -> str:
    """Compute with as many threads as fit, see `choose_threads`; says how many and why."""
    threads, reason = choose_threads(os.environ, own_cores(), node, container_quota())
    if threads is not None:
        torch.set_num_threads(threads)
    return f"{torch.get_num_threads()} thread(s) per process ({reason})"
