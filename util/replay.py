"""Rerun the optimizer step that stopped a run with a non-finite loss or gradient, and say where it goes wrong.

    python -m util.replay --dump output_dir/nan_dump_rank0.pth
    python -m util.replay --dump output_dir/nan_dump_rank0.pth --precision fp32   # would that have helped?

The dump, which `--nan_dump` of both mains writes, holds the step's micro-batches with the keys of their randomness, and
the weights before the step. On the same kind of device, masks, drop path, mixup and erasing are therefore the
same as in the run.
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import contextlib
import logging
import runpy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from util.data.image_index import abbreviate
from util.data.transforms import Normalize
from util.run.config import DeviceFlags
from util.run.failures import user_errors
from util.run.flags import Config, flag, get_parser, given_flags, with_default
from util.run.launch import choose_device, detect_launch
from util.run.logger import setup_logging
from util.run.optim import autocast, make_scaler, resolve_precision, set_up_arithmetic
from util.run.startup import ROOT
from util.run.state import program_of
from util.seeding import seed_all
from util.weights.file import CheckpointError, read_checkpoint

logger = logging.getLogger(__name__)

PROGRAMS = ("main_*.py", "exp/*/*.py")  # each has a function `rebuild_step`
EXTREME = 20.0  # standard deviations: what no photo reaches after normalisation


def read_dump(path: str) -> dict[str, Any]:
    """A file that `--nan_dump` wrote.

    Raises:
        CheckpointError: missing, damaged or another kind of file.
    """
    dump = read_checkpoint(path)
    if not {"where", "batch", "checkpoint"} <= dump.keys():
        raise CheckpointError(f"{path} is not a dump of a bad step: give a nan_dump_rank<n>.pth, written by --nan_dump")
    return dump


@contextlib.contextmanager
def first_bad_output(model: nn.Module) -> Iterator[list[str]]:
    """Around a forward pass: the list gets a sentence for every module whose output is not finite, in their order.

    The first names the innermost culprit, since modules end before those around them.
    """
    names, found = {module: name for name, module in model.named_modules() if name}, []

    @torch.no_grad()  # what a check computes is no part of a step that is recomputed
    def check(module: nn.Module, inputs: tuple, output: Any) -> None:
        if module in names and isinstance(output, Tensor) and not output.isfinite().all():
            given = [value for value in inputs if isinstance(value, Tensor)]
            if not all(value.isfinite().all() for value in given):
                origin = "its input is not finite already"
            elif given:
                origin = f"its input is finite, up to {given[0].abs().max():.3g} in size"
            else:
                origin = "its input is no tensor"
            found.append(f"{names[module]} ({type(module).__name__}): {count_bad(output)} of its output; {origin}")

    with register_module_forward_hook(check):
        yield found


def count_bad(tensor: Tensor) -> str:
    """How many values are not finite."""
    return f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} values not finite"


def describe_inputs(imgs: Iterable[Tensor]) -> Iterator[str]:
    """A line for every normalised image (C, H, W) with values that are not finite, or extreme."""
    for i, img in enumerate(imgs):
        if not img.isfinite().all():
            yield f"image {i}: {count_bad(img)}"
        elif img.abs().max() > EXTREME:
            yield f"image {i}: extreme values, from {img.min():.3g} to {img.max():.3g} standard deviations"


def find_program(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The functions of the program whose run dumped the step.

    Raises:
        CheckpointError: none of ours.
    """
    scripts = {path.relative_to(ROOT).as_posix(): path for pattern in PROGRAMS for path in ROOT.glob(pattern)}
    program = str(program_of(checkpoint))
    if program not in scripts:
        raise CheckpointError(f"the dump is of a run of {program}, which is none of {', '.join(sorted(scripts))}")
    return runpy.run_path(str(scripts[program]))


def replay(dump: dict[str, Any], device: torch.device, precision: str | None = None) -> Iterator[str]:
    """Lines that say what each micro-batch of the step does.

    Args:
        dump: of `read_dump`.
        device: where to run.
        precision: instead of the run's.

    Raises:
        UserError: the run's precision does not work on this device.
    """
    checkpoint = dump["checkpoint"]
    precision = resolve_precision(precision or checkpoint["args"]["precision"], device)
    settings = argparse.Namespace(**checkpoint["args"] | {"precision": precision})
    set_up_arithmetic(precision)
    yield f"{settings.model} at {dump['where']}, in {precision} on {device}"
    bad_weights = [name for name, tensor in checkpoint["model"].items() if not tensor.isfinite().all()]
    if bad_weights:
        yield f"weights before the step that are not finite: {abbreviate(bad_weights)}"
    model, loss_of = find_program(checkpoint)["rebuild_step"](settings, checkpoint["model"], device)
    normalize = Normalize(settings.mean, settings.std).to(device)
    scaler = make_scaler(precision, device)
    if checkpoint["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(checkpoint["scaler"])

    for number, micro in enumerate(dump["batch"]):
        imgs = micro["imgs"]  # one tensor, or a list where they differ in size
        imgs = normalize(imgs.to(device)) if isinstance(imgs, Tensor) else [normalize(img.to(device)) for img in imgs]
        for line in describe_inputs(imgs):
            yield f"micro-batch {number}, {line}"
        model.zero_grad()
        seed_all(*micro["keys"])
        with first_bad_output(model) as bad_outputs, autocast(precision, device):
            loss = loss_of(imgs, micro)
        scaler.scale(loss / settings.accum_iter).backward()
        finite = "finite" if loss.isfinite() else "NOT FINITE"
        yield f"micro-batch {number}: {len(imgs)} images, loss {loss.item():.6g} ({finite})"
        if bad_outputs:
            yield f"micro-batch {number}, first output that is not finite: {bad_outputs[0]}"
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        bad_gradients = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        if bad_gradients:
            yield f"micro-batch {number}, gradients that are not finite: {abbreviate(bad_gradients)}"
        else:
            norm = torch.nn.utils.get_total_norm(gradients.values()) / scaler.get_scale()
            yield f"micro-batch {number}: gradient norm {norm.item():.4g}"


@dataclass(frozen=True)
class ReplayConfig(Config):
    TITLE: ClassVar[str] = "replay"

    dump: str = flag(
        "", "output_dir/nan_dump_rank<n>.pth", "FILE", required="a nan_dump_rank<n>.pth, written by --nan_dump"
    )
    precision: str | None = flag(None, "instead of the run's", choices=("fp32", "bf16", "fp16"))
    device: str = with_default(DeviceFlags, "device", "auto")


def get_args_parser() -> argparse.ArgumentParser:
    description = "Rerun the step in a dump of --nan_dump and say where it goes wrong."
    return get_parser(ReplayConfig, description, "python -m util.replay")


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        setup_logging()
        given = given_flags(ReplayConfig, flags)
        device = choose_device(given.device, detect_launch({}))
        for line in replay(read_dump(given.dump), device, given.precision):
            logger.info("%s", line)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
