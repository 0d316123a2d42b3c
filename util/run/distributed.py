"""The process groups of one run, and communication between its ranks.

There are two: NCCL on GPUs (gloo on CPUs) for gradients, and a gloo group for decisions that the CPUs take together.
Every function works without a group too: a single process is a world of one.
"""

import argparse
import contextlib
import datetime
import inspect
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util.errors import RunError, UserError
from util.run.cores import fit_threads, own_cores, own_share
from util.run.launch import Launch, choose_device, detect_launch

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The running process groups. `control` is the gloo group; `store`, the store through which they were started."""

    launch: Launch
    timeout: float  # seconds
    store: dist.Store
    control: dist.ProcessGroup


world: World | None = None  # None: a single process


def init_distributed(flags: argparse.Namespace) -> Launch:
    """Detect the launcher, choose the device and start the process groups; on a CPU, fit the threads to the cores.

    Args:
        flags: those of `util.run.config.ProcessFlags`, and `device` ('auto', 'cuda', 'cuda:I' or 'cpu').

    Raises:
        UserError: contradictory variables or flags, or more processes on this node than GPUs.
        RunError: the processes did not meet within `flags.dist_timeout` seconds.
    """
    global world
    if not 0 < flags.dist_timeout < 1e9:
        raise UserError(f"--dist_timeout {flags.dist_timeout:g} must be a positive number of seconds, below 1e9")
    launch = detect_launch(os.environ, flags.dist_on_itp, flags.dist_url, flags.port, flags.world_size)
    if flags.local_rank not in (-1, launch.local_rank):
        raise UserError(f"--local_rank {flags.local_rank} contradicts the launcher's local rank {launch.local_rank}")
    launch = replace(launch, device=choose_device(flags.device, launch))
    on_node = [own_cores()]
    if launch.world_size == 1:
        logger.info("started as a single process (launcher: %s) on %s", launch.launcher, launch.device)
    else:
        if not launch.master_addr or (launch.launcher == "torchrun" and flags.dist_url == "env://"):
            url = flags.dist_url  # with env://, torch knows that torchrun's agent may hold the store instead of rank 0
        else:
            url = f"tcp://{launch.master_addr}:{launch.master_port}"
        world = _start_groups(launch, url, flags.dist_timeout)
        own_node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        nodes, cores = zip(*gather_objects((own_node, own_cores())))
        placement = ", ".join(f"{count} on {node}" for node, count in Counter(nodes).items())
        logger.info(
            "started by %s: %d processes (%s), meeting at %s, %s on %s",
            launch.launcher, launch.world_size, placement, url, dist.get_backend(), launch.device.type,
        )  # fmt: skip
        on_node = [theirs for node, theirs in zip(nodes, cores) if node == own_node]
    share, reason = own_share(on_node)
    if launch.device.type == "cpu":
        logger.info("computing in %s", fit_threads(share, reason))
    return replace(launch, cores=share)


def _start_groups(launch: Launch, url: str, seconds: float) -> World:
    timeout = datetime.timedelta(seconds=seconds)
    on_gpu = launch.device.type == "cuda"
    try:
        store, rank, world_size = next(dist.rendezvous(url, launch.rank, launch.world_size, timeout=timeout))
        store.set_timeout(timeout)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout,
            device_id=launch.device if on_gpu else None,
        )  # fmt: skip
        return World(launch, seconds, store, dist.new_group(backend="gloo", timeout=timeout))
    except RuntimeError as error:
        raise RunError(
            f"rank {launch.rank} of {launch.world_size} did not meet the others at {url} within --dist_timeout "
            f"{seconds:g} s ({error}): are all {launch.world_size} processes running, is the port free? "
            f"{network_hint()}"
        ) from error


def network_hint() -> str:
    """What to do if nodes do not reach each other though their processes run."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    now = ", ".join(f"{name}={os.environ.get(name, 'unset')}" for name in names)
    return (
        "On several nodes, both variables may have to name the network interface that joins the nodes, as `ip addr` "
        f"shows it (now {now})"
    )


def shutdown() -> None:
    """End the process groups, on all ranks together: the first to leave may make srun kill the others.

    To be called after rank 0's last write. Ranks that have died are not waited for.
    """
    global world
    if world is not None:
        with contextlib.suppress(RuntimeError):
            barrier()
        world = None
        dist.destroy_process_group()


def get_rank() -> int:
    return world.launch.rank if world else 0


def get_world_size() -> int:
    return world.launch.world_size if world else 1


def is_main_process() -> bool:
    return get_rank() == 0


def barrier() -> None:
    """Wait for all ranks, on the CPU (work queued on a GPU is not waited for)."""
    if world:
        dist.barrier(group=world.control)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all ranks as a new tensor, on its device; `tensor` itself stays as it is."""
    total = tensor.detach().clone()
    if world:
        dist.all_reduce(total, group=world.control if total.device.type == "cpu" else None)
    return total


def all_reduce_mean(value: torch.Tensor) -> torch.Tensor:
    """The mean of `value` over all ranks."""
    return all_reduce_sum(value) / get_world_size()


def gather_objects(obj: Any) -> list[Any]:
    """`obj` of every rank, in the order of ranks, on every rank. It is pickled, so keep it small and trusted."""
    if not world:
        return [obj]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, obj, group=world.control)
    return gathered


def together(act: Callable[[], T] | None) -> T | None:
    """What `act()` returns on this rank, once it is done on all ranks that have an `act`; None on the others.

    Raises:
        UserError, RunError: on all ranks, if `act` raises one on any, of the first one's class; names the node unless
            `act` has failed everywhere.
        RuntimeError: on all ranks, if the first has raised something else.
    """
    if not world:
        return act() if act else None
    found, error, failure = None, None, None
    try:
        found = act() if act else None
    except (UserError, RunError) as caught:
        error, failure = caught, (type(caught), str(caught))
    except Exception as caught:  # the others must not wait for this rank
        error, failure = caught, (RuntimeError, f"{type(caught).__name__}: {caught}")
    answers = gather_objects((act is not None, failure, f"on {socket.gethostname()} (rank {get_rank()}): "))
    failed = [(*failure, where) for _, failure, where in answers if failure]
    if failed:
        kind, message, where = failed[0]
        everywhere = len(failed) == sum(acted for acted, *_ in answers)
        raise kind(message if everywhere else where + message) from error
    return found


def on_main_process(answer: Callable[[], T]) -> T:
    """What `answer()` returns on rank 0, on every rank. It is pickled, so keep it small and trusted; raises as
    `together`."""
    return gather_objects(together(answer if is_main_process() else None))[0]


def once_per_node(read: Callable[..., T]) -> T:
    """What `read(verify=True)` returns on the first rank of each node, and then `read(verify=False)` on its others;
    raises as `together`.

    So a file is read from end to end once per node, and the other ranks find in memory what they need of it.
    """
    first = not world or world.launch.local_rank == 0
    of_first = together(partial(read, verify=True) if first else None)
    of_others = together(None if first else partial(read, verify=False))
    return of_first if first else of_others


def gather_on_main(obj: Any) -> list[Any] | None:
    """`obj` of every rank, in the order of ranks, on rank 0; None on the others. It is pickled: trusted only."""
    if not world:
        return [obj]
    gathered = [None] * get_world_size() if is_main_process() else None
    dist.gather_object(obj, gathered, dst=0, group=world.control)
    return gathered


def wrap_model(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as it is called: in DistributedDataParallel if there are several ranks."""
    if get_world_size() == 1:
        return model
    # - Without device_ids, inputs are left where they are: masks belong on the CPU.
    # - Buffers are constants, the same on all ranks: they need not be sent before every forward pass. (PyTorch 2.13
    #   warns about the older name.)
    # - Gradients lie in the buckets that are reduced: one copy of them instead of two. Accumulated
    #   micro-batches before the last, in no_sync, sum into separate tensors, freed as the last one fills the buckets.
    # - Not static_graph: every parameter gets a gradient in every step, so there is no search for unused ones that it
    #   would save, and what it promises may not be true (a step's mask decides how its attention is computed).
    # - PyTorch's own bucket size, 25 MiB: only the last of them is reduced after the backward pass has ended.
    names = inspect.signature(DistributedDataParallel).parameters
    constant_buffers = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
    model = DistributedDataParallel(model, gradient_as_bucket_view=True, **constant_buffers)
    if (device.type == "cpu" or torch.are_deterministic_algorithms_enabled()) and get_world_size() > 2:
        model.register_comm_hook(None, average_in_rank_order)
    return model


def average_in_rank_order(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average gradients over ranks, added in the order of ranks, for a resumed run to be identical.

    The order of gloo's own sum, and of NCCL's, depends on where in a bucket a value lies, and DistributedDataParallel
    packs its buckets again after the first step of a process. Two ranks have only one order, and theirs is faster.
    """
    gradients = [torch.empty_like(bucket.buffer()) for _ in range(dist.get_world_size())]

    def average(_: torch.futures.Future) -> Tensor:
        total = gradients[0]
        for gradient in gradients:
            if gradient.is_cuda:  # on a stream of its own here: the memory is not free before these additions are done
                gradient.record_stream(torch.cuda.current_stream())
        for gradient in gradients[1:]:
            total += gradient
        return total.div_(len(gradients))

    return dist.all_gather(gradients, bucket.buffer(), async_op=True).get_future().then(average)
