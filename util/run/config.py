"""Command-line flags that both mains share, their defaults, and what is derived from them.

The flags of the authors' scripts keep their names and meanings.
"""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import models_mixmae
import models_swin
from util.data.decoding import BadImageError
from util.run import distributed
from util.weights.file import CheckpointError
from util.weights.source import read_weights

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PRETRAINING_MODELS = [name.removesuffix(".") for name in models_mixmae.default_cfgs]
CLASSIFIER_MODELS = [name.removesuffix(".") for name in models_swin.default_cfgs]
AUTHORS_PRETRAINING_NAMES = {name.replace("mixmae_", "mixmim_"): name for name in PRETRAINING_MODELS}
AUTHORS_CLASSIFIER_NAMES = {
    "mixmim_base": "swin_base_w14",
    "mixmim_base_384": "swin_base_w16_384",
    "mixmim_large": "swin_large_w14",
    "mixmim_large_384": "swin_large_w16_384",
    "mixmim_huge": "swin_huge_w14",
}


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = any(action.default is value for value in (None, False, argparse.SUPPRESS)) or action.default == ""
        return action.help if hidden or "default" in action.help else super()._get_help_string(action)


def add_model_arguments(parser: argparse.ArgumentParser, model: str, names: list[str], drop_path: float = 0.0) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default=model, metavar="NAME", help=f"one of {', '.join(names)}, or the authors' mixmim_* names"
    )
    group.add_argument(
        "--input_size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="one side, or height and width (default: the model's)",
    )
    group.add_argument("--patch_size", type=int, metavar="PIXELS", help="side of a patch (default: the model's)")
    group.add_argument(
        "--window_size", type=int, nargs=4, metavar="TOKENS", help="window side of each stage (default: the model's)"
    )
    group.add_argument(
        "--drop_path", type=float, default=drop_path, metavar="RATE", help="stochastic depth of the last block"
    )
    group.add_argument(
        "--grad_checkpointing", action="store_true", help="store less and compute blocks twice: slower, less memory"
    )
    group.add_argument("--compile", action="store_true", help="compile the encoder's stages with torch.compile")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path", default="", metavar="PATH", help="folder with train/ (and val/), folder of images, or list file"
    )
    group.add_argument(
        "--dataset",
        default="",
        metavar="NAME",
        help="a timm.data.create_dataset name instead of files, under data_path",
    )
    group.add_argument("--in_chans", type=int, default=3, metavar="N", help="image channels")
    group.add_argument(
        "--ignore_exif", action="store_true", help="read pixels as stored, without their EXIF orientation"
    )
    group.add_argument(
        "--mean",
        type=float,
        nargs="+",
        metavar="X",
        help="per channel, of values in 0..1 (default: ImageNet's, else 0.5)",
    )
    group.add_argument(
        "--std",
        type=float,
        nargs="+",
        metavar="X",
        help="per channel, of values in 0..1 (default: ImageNet's, else 0.25)",
    )
    group.add_argument(
        "--bad_images", choices=("error", "skip"), default="error", help="stop at an unreadable image, or replace it"
    )
    group.add_argument(
        "--max_bad_images", type=float, default=0.01, metavar="SHARE", help="with skip: stop above this share of images"
    )
    group.add_argument(
        "--num_workers",
        type=int,
        default=min(10, available_cpus()),
        metavar="N",
        help="data-loading processes per rank, here at most one per CPU",
    )
    group.add_argument(
        "--pin_mem", action=argparse.BooleanOptionalAction, default=True, help="page-locked memory for copies to a GPU"
    )
    group.add_argument(
        "--no_pin_mem", action="store_false", dest="pin_mem", default=argparse.SUPPRESS, help="the opposite"
    )


def add_optimizer_arguments(
    parser: argparse.ArgumentParser, batch_size: int, epochs: int, blr: float, min_lr: float, warmup_epochs: float
) -> None:
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--batch_size", type=int, default=batch_size, metavar="N", help="images per rank and micro-batch"
    )
    group.add_argument("--epochs", type=int, default=epochs, metavar="N", help="epochs of the whole schedule")
    group.add_argument(
        "--accum_iter", type=int, default=1, metavar="N", help="micro-batches accumulated into one optimizer step"
    )
    group.add_argument("--clip_grad", type=float, metavar="NORM", help="clip the gradient norm (default: no clipping)")
    group.add_argument("--weight_decay", type=float, default=0.05, metavar="X", help="AdamW's weight decay")
    group.add_argument("--lr", type=float, metavar="X", help="learning rate (default: blr * effective batch / 256)")
    group.add_argument("--blr", type=float, default=blr, metavar="X", help="base learning rate, for 256 images")
    group.add_argument("--min_lr", type=float, default=min_lr, metavar="X", help="learning rate at the end")
    group.add_argument(
        "--warmup_epochs", type=float, default=warmup_epochs, metavar="N", help="epochs of linear warm-up"
    )
    group.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="default: bf16 where a GPU has it, else fp16; CPU: fp32"
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="./output_dir", metavar="DIR", help="checkpoints, logs and pictures")
    group.add_argument("--log_dir", metavar="DIR", help="TensorBoard files (default: output_dir)")
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="all randomness of the run follows from it")
    group.add_argument(
        "--resume",
        default="",
        metavar="auto|PATH",
        help="continue a run: from output_dir's newest intact checkpoint, or this",
    )
    group.add_argument(
        "--resume_force",
        action="store_true",
        help="continue even though the model or recipe differs from the checkpoint's",
    )
    group.add_argument(
        "--finetune",
        default="",
        metavar="WEIGHTS",
        help="start from weights: a path, https URL#sha256=..., or base_600ep, ...",
    )
    group.add_argument("--start_epoch", type=int, default=0, metavar="N", help="first epoch when nothing is resumed")
    group.add_argument("--print_freq", type=int, default=20, metavar="STEPS", help="optimizer steps between log lines")
    group.add_argument("--save_every", type=int, default=1, metavar="EPOCHS", help="epochs between checkpoints")
    group.add_argument(
        "--save_steps", type=int, default=0, metavar="STEPS", help="optimizer steps between checkpoints; 0: epochs only"
    )
    group.add_argument("--keep_checkpoints", type=int, default=3, metavar="K", help="how many of the last to keep")
    group.add_argument(
        "--keep_every",
        type=int,
        default=100,
        metavar="EPOCHS",
        help="epochs between checkpoints kept for ever; 0: none",
    )
    group.add_argument(
        "--nan_dump", action="store_true", help="on a non-finite loss, write the batch and the state into output_dir"
    )
    add_distributed_arguments(parser)


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


def resolve_model_name(name: str, names: list[str], aliases: dict[str, str]) -> str:
    """Our name of a model given by our name or the authors'.

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """
    name = aliases.get(name, name)
    if name not in names:
        raise ValueError(f"--model {name} is not known: choose one of {', '.join([*names, *aliases])}")
    return name


def model_shape(args: argparse.Namespace) -> dict:
    """Arguments of the model's constructor that the flags set; the others stay the model's own."""
    shape = {"in_chans": args.in_chans, "patch_size": args.patch_size, "window_size": args.window_size}
    shape |= {"img_size": args.input_size, "drop_path_rate": args.drop_path}
    return {name: value for name, value in shape.items() if value is not None}


def check_recorded(recorded: dict, source: str) -> None:
    """Raise a ValueError unless what the checkpoint `source` records of model and data has the types of the flags."""

    def is_list_of(kinds: tuple[type, ...], value: object) -> bool:
        return isinstance(value, (list, tuple)) and all(type(item) in kinds for item in value)

    for name in ("in_chans", "patch_size", "window_size", "input_size", "mean", "std"):
        value = recorded.get(name)
        kinds = (int, float) if name in ("mean", "std") else (int,)
        single = name in ("in_chans", "patch_size", "input_size") and type(value) is int
        if not (value is None or single or is_list_of(kinds, value)):
            raise ValueError(f"{source} records {name}={value!r}, which is no value of --{name}")


def recorded_statistics(args: argparse.Namespace) -> dict:
    """`mean` and `std` of the images that the weights to start from, or to evaluate, were trained with.

    Empty where they are not recorded, or for another number of channels. Differing flags are a warning.
    """
    source = args.finetune or (args.resume if getattr(args, "eval", False) and args.resume != "auto" else "")
    try:
        recorded = read_weights(source)[1].args if source else {}
    except CheckpointError:  # said where the weights are needed, which a resumed run does not
        return {}
    check_recorded(recorded, source)
    found = {name: list(recorded[name]) for name in ("mean", "std") if recorded.get(name)}
    if any(len(values) != args.in_chans for values in found.values()):
        return {}
    for name, values in found.items():
        if getattr(args, name) and list(getattr(args, name)) != values:
            logger.warning("--%s %s, but %s was trained with %s", name, getattr(args, name), source, values)
    return found


def finish_arguments(args: argparse.Namespace, launch: distributed.Launch) -> None:
    """Check the shared flags and fill in what follows from them, in place.

    Raises:
        ValueError: naming the flag, what was given and what is legal.
    """
    positive = ("batch_size", "epochs", "accum_iter", "in_chans", "print_freq", "save_every", "keep_checkpoints")
    for name in positive:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    for name in ("num_workers", "save_steps", "keep_every", "start_epoch", "warmup_epochs", "weight_decay", "min_lr"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must not be negative, got {getattr(args, name)}")
    if args.start_epoch >= args.epochs:
        raise ValueError(f"--start_epoch {args.start_epoch} leaves nothing to train: --epochs is {args.epochs}")
    if args.warmup_epochs > args.epochs:
        raise ValueError(f"--warmup_epochs {args.warmup_epochs:g} is longer than the run: --epochs {args.epochs}")
    if not 0 <= args.drop_path < 1:
        raise ValueError(f"--drop_path is a probability below 1, got {args.drop_path}")
    if args.clip_grad is not None and args.clip_grad <= 0:
        raise ValueError(f"--clip_grad is a positive norm (leave it out for no clipping), got {args.clip_grad}")
    if args.input_size is not None:
        if len(args.input_size) > 2:
            raise ValueError(f"--input_size takes one side, or height and width, got {args.input_size}")
        args.input_size = (args.input_size[0], args.input_size[-1])
    if not args.data_path:
        raise ValueError("--data_path is missing: give a folder with train/ in it, a folder of images or a list file")
    default_mean, default_std = IMAGENET_MEAN, IMAGENET_STD
    if args.in_chans != 3:
        default_mean, default_std = (0.5,) * args.in_chans, (0.25,) * args.in_chans
    recorded = recorded_statistics(args)
    args.mean = tuple(args.mean or recorded.get("mean") or default_mean)
    args.std = tuple(args.std or recorded.get("std") or default_std)
    logger.info("images are normalised with mean %s and std %s", args.mean, args.std)
    for name in ("mean", "std"):
        if len(getattr(args, name)) != args.in_chans:
            raise ValueError(
                f"--{name} needs one value for each of {args.in_chans} channels, got {getattr(args, name)}"
            )
    if min(args.std) <= 0:
        raise ValueError(f"--std must be positive, got {args.std}")
    args.log_dir = args.log_dir or args.output_dir
    args.eff_batch_size = args.batch_size * args.accum_iter * launch.world_size
    if args.lr is None:
        args.lr = args.blr * args.eff_batch_size / 256


def plain_arguments(args: argparse.Namespace) -> dict:
    """The arguments as plain values, for a checkpoint."""
    return {name: value if is_plain(value) else str(value) for name, value in vars(args).items()}


def is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Around all but training: what a user can put right ends in one line and exit code 2, no traceback."""
    try:
        with distributed.explain_collective_failures():
            yield
    except (ValueError, OSError, distributed.CollectiveError) as error:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        of_this_rank = isinstance(error, (BadImageError, distributed.CollectiveError))
        if of_this_rank or local_rank == "0":  # others once per node: another node may lack what this one has
            prefix = "" if rank == "0" else f"[rank {rank}] "
            print(f"{prefix}{Path(sys.argv[0]).name}: error: {in_one_line(error)}", file=sys.stderr, flush=True)
        if distributed.get_world_size() > 1:
            os._exit(2)  # at once: Python's shutdown would wait for ranks that may hang
        sys.exit(2)


def in_one_line(error: Exception) -> str:
    """The message of an error; one that comes from a data-loading process has a traceback before it."""
    name = f"{type(error).__module__}.{type(error).__name__}: "
    message = str(error).rstrip()
    return message.rpartition(name)[2] if name in message else message
