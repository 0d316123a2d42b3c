"""What mains and commands do before and while PyTorch is imported: idle threads sleep, Ctrl-C ends in one line; and how
many threads a process computes with."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import make_images
from trials import TINY

from util.run.cores import choose_threads

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ["main_pretrain.py", "main_finetune.py", "util/knn.py", "util/visualize.py", "util/replay.py"]
INFINITE = float("inf")


@pytest.mark.parametrize("program", PROGRAMS)
def test_threads_are_told_to_sleep_before_pytorch_is_imported(program):
    """The library reads the setting when it is loaded."""
    first = next(line for line in (ROOT / program).read_text().splitlines() if re.match("(import|from) ", line))
    assert first.startswith("import util.run.startup")
    code = "import sys, os, util.run.startup; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for given, expected in ((environment, "PASSIVE False"), (environment | {"OMP_WAIT_POLICY": "x"}, "x False")):
        said = subprocess.run([sys.executable, "-c", code], env=given, cwd=ROOT, capture_output=True, text=True)
        assert said.stdout.strip() == expected


def interrupted(*command: object, when: str | float) -> tuple[int, str]:
    """Exit code and output of a program that gets Ctrl-C after some seconds, or when it has said something."""
    command = [sys.executable, *map(str, command)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = ""
    if isinstance(when, float):
        time.sleep(when)
    else:
        while when not in said:
            line = process.stdout.readline()
            assert line, f"it ended before {when!r}:\n{said}"
            said += line
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=60)[0]
    return process.returncode, said


@pytest.mark.parametrize("seconds", [0.5, 1.2])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, seconds):
    flags = ("--data_path", tmp_path, "--device", "cpu", "--output_dir", tmp_path / "out")
    code, said = interrupted("-X", "importtime", "main_pretrain.py", *flags, when=seconds)
    said = "\n".join(line for line in said.splitlines() if line and not line.startswith("import time:"))
    assert (code, said) == (130, "main_pretrain.py: interrupted")


def test_ctrl_c_during_knn_is_one_line(tmp_path):
    from main_pretrain import get_args_parser, main  # noqa: F401 - imported as a library: its handlers stay ours

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        make_images(tmp_path / "data" / folder, 400)
    data = ("--data_path", tmp_path / "data", "--device", "cpu")
    subprocess.run(
        [sys.executable, "main_pretrain.py", *TINY, *map(str, data), "--epochs", "1", "--batch_size", "400"]
        + ["--output_dir", str(tmp_path / "out")],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    checkpoint = ("--checkpoint", tmp_path / "out" / "checkpoint.pth")
    code, said = interrupted("-m", "util.knn", *data, *checkpoint, "--num_workers", 2, when="val: 800 images")
    assert code == 130 and "Traceback" not in said
    assert said.splitlines()[-1] == "knn.py: interrupted"


@pytest.mark.parametrize(
    "environ, cores, node, quota, threads",
    [
        ({}, {0, 1, 2, 3}, [{0, 1, 2, 3}], INFINITE, 4),
        ({}, {0, 1, 2, 3}, [{0, 1, 2, 3}] * 2, INFINITE, 2),  # two that share all cores
        ({}, {0, 1}, [{0, 1}, {2, 3}], INFINITE, 2),  # two that Slurm has bound apart
        ({}, {0, 1}, [{0, 1}] * 3, INFINITE, 1),
        ({}, set(range(96)), [set(range(96))], 4.0, 4),  # a container
        ({}, set(range(96)), [set(range(96))] * 2, 4.0, 2),
        ({}, set(range(96)), [set(range(96))], 0.5, 1),
        ({"SLURM_CPUS_PER_TASK": "3"}, {0, 1, 2, 3}, [{0, 1, 2, 3}], INFINITE, 3),
        ({"SLURM_CPUS_PER_TASK": "8"}, {0, 1, 2, 3}, [{0, 1, 2, 3}], INFINITE, 4),
        ({"OMP_NUM_THREADS": "7", "SLURM_CPUS_PER_TASK": "8"}, {0}, [{0}], INFINITE, None),
    ],
)
def test_the_threads_fit_the_cores(environ, cores, node, quota, threads):
    assert choose_threads(environ, frozenset(cores), [frozenset(other) for other in node], quota)[0] == threads


def test_the_log_says_once_how_many_threads_and_why(tmp_path):
    make_images(tmp_path / "data", 4)
    flags = (*TINY, "--data_path", tmp_path / "data", "--epochs", 1, "--output_dir", tmp_path / "out")
    cores = len(os.sched_getaffinity(0))
    for given, reason in (({}, f"{cores} thread(s) per process ({cores} cores for 1 process)"),
                          ({"OMP_NUM_THREADS": "1"}, "1 thread(s) per process (OMP_NUM_THREADS=1)")):  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS",)} | given
        command = [sys.executable, "main_pretrain.py", *map(str, flags)]
        said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        assert said.count("thread(s)") == 1 and f"computing in {reason}" in said
