"""A GPU for machines that have none: its tensors have shapes, types and a device, but no values.

Programs run on it as on a GPU, so it finds tensors of two devices that meet, and the places where the processor would
wait for the GPU. It finds no wrong value and no slow kernel, and nothing of compiled models: for those see
tests/test_gpu.py.
"""

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from util.run import checkpoint_folder

ROOT = Path(__file__).resolve().parent.parent
aten = torch.ops.aten


class TensorsWithoutValues(FakeTensorMode):
    """PyTorch's own, which must not look for a GPU though there seems to be one."""

    avoid_device_init = True


class PretendedGpu(TorchDispatchMode):
    """Operations with a tensor or result on a GPU go to `TensorsWithoutValues`, below this mode; all others are real.

    What is copied from the GPU has ones for values.

    waits: how often the processor would wait for the GPU, by the line of this repository where that happens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._page_locked: dict[int, Tensor] = {}  # by address; kept, since the address of one that is freed comes back

    def wait(self, *_) -> None:
        """Note that the processor would wait here."""
        frame = sys._getframe(1)
        while not is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        self.waits[f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled() and func.namespace == "aten":
            with self:
                parts = func.decompose(*args, **kwargs)  # of which operations reach a mode elsewhere
            if parts is not NotImplemented:
                return parts
        leaves = tree_leaves((args, kwargs))
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            self.wait()
            return 1.0 if args[0].is_floating_point() else 1
        if any(map(is_on_gpu, leaves)):
            if self._waits(func, *args, **kwargs):
                self.wait()
            if func is aten.copy_.default and not is_on_gpu(args[0]):
                return args[0].fill_(1)
            result = func(*args, **kwargs)
            if not isinstance(result, FakeTensor) or result.device.type != "cpu":
                return result
            with unset_fake_temporarily():
                result = torch.ones(result.shape, dtype=result.dtype)
            if kwargs.get("pin_memory"):
                self._page_lock(result)
            return result
        with unset_fake_temporarily():
            if func is aten._pin_memory.default:
                return self._page_lock(args[0].clone())
            if func is aten.is_pinned.default:
                return self._is_page_locked(args[0])
            kwargs.pop("pin_memory", None)
            return func(*args, **kwargs)

    def _page_lock(self, tensor: Tensor) -> Tensor:
        self._page_locked[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def _is_page_locked(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._page_locked

    def _waits(self, func, *args, non_blocking: bool = False, device: torch.device | None = None, **_) -> bool:
        """Whether the processor waits in an operation with a tensor on the GPU: where it brings one from or to there,
        unless it may run on and the memory on its side is page-locked, as that of a new tensor then is."""
        if func is aten._to_copy.default:
            sides = [args[0], args[0] if device is None else device]
        elif func is aten.copy_.default:
            sides, non_blocking = args[:2], (*args, non_blocking)[2]
        else:  # such as with an index on the CPU
            return any(isinstance(x, Tensor) and not is_on_gpu(x) and x.ndim for x in tree_leaves(args))
        on_cpu = [side for side in sides if not is_on_gpu(side)]
        locked = all(isinstance(side, torch.device) or self._is_page_locked(side) for side in on_cpu)
        return len(on_cpu) == 1 and not (non_blocking and locked)


def is_ours(file: str) -> bool:
    """Whether it is one of this repository's, but for this one."""
    path = Path(file)
    return path.is_relative_to(ROOT) and ".venv" not in path.parts and path != Path(__file__)


def is_on_gpu(x: object) -> bool:
    return isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda")


def ones_as_list(x: FakeTensor, gpu: PretendedGpu) -> list | float | int:
    """In place of `tolist`, which would wait for each number by itself."""
    gpu.wait()
    with unset_fake_temporarily():
        return torch.ones(x.shape, dtype=x.dtype).tolist()


def zero_gradients(loss: Tensor, gradient: Tensor | None = None) -> None:
    """In place of `Tensor.backward`, which would need a GPU: gradients of all parameters that it would reach."""
    assert gradient is None or gradient.device == loss.device
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        waiting += [following for following, _ in function.next_functions]
        if (parameter := getattr(function, "variable", None)) is not None and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """There seems to be one H100 in this context."""
    gpu = PretendedGpu()
    of_cuda = dict(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda _: None,
        get_device_name=lambda _=None: "NVIDIA H100 80GB HBM3",
        get_device_properties=lambda _=None: SimpleNamespace(total_memory=80 * 2**30, major=9, minor=0),
        is_bf16_supported=lambda **_: True,
        max_memory_allocated=lambda _=None: 0,
        reset_peak_memory_stats=lambda _=None: None,
        empty_cache=lambda: None,
        get_rng_state=lambda _=None: torch.zeros(16, dtype=torch.uint8),
        set_rng_state=lambda *_: None,
        synchronize=gpu.wait,
        get_device_capability=lambda _=None: (9, 0),
        Event=lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None),
    )
    with (
        mock.patch.multiple(torch.cuda, **of_cuda),
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.accelerator, "is_available", lambda: True),
        mock.patch.object(torch.Tensor, "backward", zero_gradients),
        mock.patch.object(FakeTensor, "tolist", functools.partialmethod(ones_as_list, gpu)),
        mock.patch.object(torch, "load", unset_fake_temporarily()(torch.load)),
        mock.patch.object(torch, "Generator", lambda device=None, new=torch.Generator: new()),
        mock.patch.object(checkpoint_folder, "refuse_what_is_not_plain", lambda _: None),
        TensorsWithoutValues(allow_non_fake_inputs=True),
        gpu,
    ):
        yield gpu
