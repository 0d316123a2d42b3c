"""Runs that tests may kill: the mains in processes forked from this one, which has imported everything already.

A run that goes wrong on purpose is given a `sabotage`: a function that its process calls, with its rank, before the
main. Those that this module makes replace what they spoil in that process alone.
"""

import atexit
import contextlib
import multiprocessing.util
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import matplotlib.figure  # noqa: F401 - runs draw by it, and its first import makes a cache of fonts
import torch
from running import read_lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
from models_mixmae import MixMAE
from util.weights.file import read_checkpoint

TINY = (
    *("--model", "mixmae_quickstart", "--in_chans", "1", "--device", "cpu", "--num_workers", "0", "--lr", "1e-3"),
    *("--warmup_epochs", "1", "--print_freq", "1", "--vis_every", "0", "--knn_every", "0", "--batch_size", "4"),
)

Sabotage = Callable[[int], None]
SABOTAGED = "sabotage at"  # with the moment, in a run's output


class Trial:
    """One run of a main in `ranks` processes, started at once; its output of all ranks goes to one file.

    Args:
        folder: where the output file and the ranks' meeting point lie; made if need be.
        flags: of the main.
    """

    def __init__(
        self,
        folder: Path,
        *flags: object,
        ranks: int = 1,
        sabotage: Sabotage | None = None,
        main: ModuleType = main_pretrain,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.output_file = folder / f"output-{time.monotonic_ns()}.txt"
        self.started = time.monotonic()
        self.exits: dict[int, tuple[int, float]] = {}  # rank -> exit code (or minus the signal), moment
        arguments = [str(flag) for flag in flags]
        if ranks > 1:
            arguments += ["--dist_url", f"file://{folder}/meeting-{time.monotonic_ns()}"]
        self.processes = [self._start(arguments, rank, ranks, sabotage, main) for rank in range(ranks)]

    def _start(self, arguments: list[str], rank: int, ranks: int, sabotage: Sabotage | None, main: ModuleType) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            atexit._clear()  # those of the parent; the process then ends as one of its own would
            atexit.register(multiprocessing.util._exit_function)
            self._redirect_output()
            for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_"))]:
                del os.environ[name]
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            torch.set_num_threads(1)
            os.environ["OMP_NUM_THREADS"] = "1"
            if sabotage is not None:
                sabotage(rank)
            sys.argv = ["main_pretrain.py", *arguments]
            main.main(main.get_args_parser().parse_args(arguments))
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _redirect_output(self) -> None:
        output = os.open(self.output_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)

    def poll(self) -> bool:
        """Whether all ranks have ended."""
        for rank, process in enumerate(self.processes):
            if rank not in self.exits:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self.exits[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
        return len(self.exits) == len(self.processes)

    def wait(self, seconds: float = 120) -> list[int]:
        """The exit codes of all ranks, once they have ended; those that hang are killed, with a TimeoutError."""
        deadline = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > deadline:
                self.kill()
                self.wait(10)
                raise TimeoutError(f"ranks still ran after {seconds} s:\n{self.output}")
            time.sleep(0.002)
        return [code for _, (code, _) in sorted(self.exits.items())]

    def kill(self, signum: int = signal.SIGKILL) -> None:
        for rank, process in enumerate(self.processes):
            if rank not in self.exits:
                os.kill(process, signum)

    @property
    def output(self) -> str:
        return self.output_file.read_text(errors="replace") if self.output_file.exists() else ""

    def finish(self, *codes: int, seconds: float = 120) -> str:
        """Wait, check the exit codes of the ranks (default: 0 of all), and return the output."""
        found = self.wait(seconds)
        assert found == list(codes or [0] * len(found)), f"exit codes {found}:\n{self.output}"
        return self.output

    def seconds_after_sabotage(self) -> float:
        """From the (first) moment of the sabotage until the last rank had ended."""
        last = max(moment for _, moment in self.exits.values())
        return last - float(re.search(rf"{SABOTAGED} ([\d.]+)", self.output)[1])


# --- What a run left ----------------------------------------------------------------------------------------


def same(a: object, b: object) -> bool:
    """Whether two checkpoints, or parts of them, are equal to the bit."""
    if isinstance(a, torch.Tensor):
        # As bytes: a NaN equals itself, and 0 is not -0.
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state_of(output_dir: Path, name: str = "checkpoint.pth") -> dict:
    """What training changes, from a run's checkpoint: everything but its settings."""
    checkpoint = read_checkpoint(output_dir / name)
    return {key: value for key, value in checkpoint.items() if key != "args"}


def steps_of(output_dir: Path) -> list[dict]:
    return read_lines(output_dir / "steps.jsonl")


def epochs_of(output_dir: Path) -> list[dict]:
    """The lines of log.txt without what depends on the clock."""
    lines = read_lines(output_dir / "log.txt")
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def events_of(output_dir: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    """(axis value, value) of a tag, as TensorBoard shows it."""
    events = EventAccumulator(str(output_dir), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def differences(output_dir: Path, reference: Path, logs: bool = True) -> list[str]:
    """In what a run differs from the uninterrupted one: nothing, or names of what does."""
    found = []
    if not same(state_of(output_dir), state_of(reference)):
        found.append("weights, optimizer or position")
    if logs and steps_of(output_dir) != steps_of(reference):
        found.append("steps.jsonl")
    if logs and epochs_of(output_dir) != epochs_of(reference):
        found.append("log.txt")
    if logs and events_of(output_dir) != events_of(reference):
        found.append("TensorBoard")
    return found


def unfinished_files(output_dir: Path) -> list[str]:
    """Names of checkpoints that were being written when the run ended."""
    if not output_dir.is_dir():
        return []
    return [entry.name for entry in os.scandir(output_dir) if entry.name.endswith(".tmp")]


def flip_byte(path: Path, position: int, mask: int = 0xFF) -> None:
    """Change one byte of a file in place, under all its names."""
    with open(path, "r+b", buffering=0) as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ mask]))


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[bool]:
    """`mount` with `options` on `folder` for the time inside; False where that is not allowed."""
    allowed = os.geteuid() == 0 and shutil.which("mount") is not None
    allowed = allowed and os.system(f"mount {' '.join(options)} {folder} 2>/dev/null") == 0
    try:
        yield allowed
    finally:
        if allowed:
            os.system(f"umount -l {folder}")


# --- Sabotage -----------------------------------------------------------------------------------------------


def at_step(step: int, action: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], rank: int = 0) -> Sabotage:
    """Let `action` change the loss of training call number `step` (from 1) on one rank, given it and the prediction."""

    def install(own_rank: int) -> None:
        if own_rank != rank:
            return
        forward, calls = MixMAE.forward, 0

        def spoiled(self, *args, **kwargs):
            nonlocal calls
            loss, pred, mask = forward(self, *args, **kwargs)
            calls += self.training
            if self.training and calls == step:
                print(f"{SABOTAGED} {time.monotonic()}", flush=True)
                loss = action(loss, pred)
            return loss, pred, mask

        MixMAE.forward = spoiled

    return install


def nan_loss(step: int, rank: int = 0) -> Sabotage:
    return at_step(step, lambda loss, pred: loss * float("nan"), rank)


def nan_gradient(step: int, rank: int = 0) -> Sabotage:
    """The loss stays what it is; the derivative of a root at 0 is not finite."""
    return at_step(step, lambda loss, pred: loss + ((pred - pred.detach()) ** 2).sum().sqrt(), rank)


def stop_signal(step: int, signum: int = signal.SIGTERM) -> Sabotage:
    """The process gets `signum` in the middle of optimizer step `step` (from 1, micro-batches counted)."""

    def action(loss: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signum)
        return loss

    return at_step(step, action)


def waiting_for(path: Path, step: int = 1) -> Sabotage:
    """Spoils nothing: step `step` ends when there is a file `path`."""

    def wait(loss: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
        while not path.exists():
            time.sleep(0.005)
        return loss

    return at_step(step, wait)


# --- Watching -----------------------------------------------------------------------------------------------

FORBIDDEN = "FORBIDDEN"  # before what a watched run should not have done, in its output


def watch(*allowed: Path) -> Sabotage:
    """Spoils nothing: reports every file that the process changes outside `allowed`, and every program it starts.

    Shared memory and sockets of Python's multiprocessing, the question for this repository's commit, and the handle
    of the running program itself (a library without a name) are allowed.
    """
    roots = tuple(os.path.realpath(path) for path in (*allowed, "/dev/shm", "/dev/null"))
    sockets = os.path.join(os.path.realpath(tempfile.gettempdir()), "pymp-")  # of data-loading processes
    changing = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
    starting = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "ctypes.dlopen"}

    def report(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            paths = [path] if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND) else []
        elif event in changing:
            paths = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
        elif event in starting and arguments[0] != "git" and (event, arguments) != ("ctypes.dlopen", (None,)):
            os.write(2, f"{FORBIDDEN} {event} {arguments!r}\n".encode("utf-8", "backslashreplace"))
            return
        else:
            return
        for path in paths:
            if isinstance(path, int):  # opened already, and seen then
                continue
            real = os.path.realpath(os.fsdecode(path)) + os.sep
            if not real.startswith((*(root + os.sep for root in roots), sockets)):
                os.write(2, f"{FORBIDDEN} {event} {path!r}\n".encode("utf-8", "backslashreplace"))

    return lambda rank: sys.addaudithook(report)


def full_disk(folder: Path, steps: range) -> Sabotage:
    """A file `ballast` takes all space of the folder's file system from step `steps.start` (from 1) to `steps.stop`."""

    def install(rank: int) -> None:
        def fill(loss: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
            with open(folder / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
                while True:
                    ballast.write(bytes(1 << 12))
            return loss

        def free(loss: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
            (folder / "ballast").unlink()
            return loss

        at_step(steps.start, fill)(rank)
        at_step(steps.stop, free)(rank)

    return install
