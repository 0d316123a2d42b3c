"""What mains and commands do before and while PyTorch is imported: idle threads sleep, Ctrl-C ends in one line; and how
many threads a process computes with, and how many processes load its data."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import make_images
from trials import TINY, Trial

from util.knn import KnnConfig
from util.run.config import resolve
from util.run.cores import choose_workers, share_of_cores
from util.run.flags import get_parser, given_flags
from util.run.launch import Launch
from util.run.startup import on_interrupt
from util.weights.settings import weight_settings

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [f"util/{file.name}" for file in (ROOT / "util").glob("*.py") if "__main__" in file.read_text()]
COMMANDS.remove("util/submit.py")  # which computes nothing
TASKS = sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.glob("exp/*/*.py") if "launch_run" in path.read_text()
)
PROGRAMS = ["main_pretrain.py", "main_finetune.py", *TASKS, *sorted(COMMANDS)]
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


def interrupted(*command: object, when: str) -> tuple[int, str]:
    """Exit code and output of a program that gets Ctrl-C when it has said something."""
    command = [sys.executable, *map(str, command)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = ""
    while when not in said:
        line = process.stdout.readline()
        assert line, f"it ended before {when!r}:\n{said}"
        said += line
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=60)[0]
    return process.returncode, said


@pytest.mark.parametrize("after", ["util.run.startup", "torch.nn"])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, after):
    flags = ("--data_path", tmp_path, "--device", "cpu", "--output_dir", tmp_path / "out")
    code, said = interrupted("-X", "importtime", "main_pretrain.py", *flags, when=f" {after}\n")
    said = "\n".join(line for line in said.splitlines() if line and not line.startswith("import time:"))
    assert (code, said) == (130, "main_pretrain.py: interrupted")


@pytest.mark.slow
def test_ctrl_c_during_knn_is_one_line(tmp_path):
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        make_images(tmp_path / "data" / folder, 400)
    data = ("--data_path", tmp_path / "data", "--device", "cpu")
    Trial(tmp_path, *TINY, *data, "--epochs", 1, "--batch_size", 400, "--output_dir", tmp_path / "out").finish()
    checkpoint = ("--checkpoint", tmp_path / "out" / "checkpoint.pth")
    code, said = interrupted("-m", "util.knn", *data, *checkpoint, "--num_workers", 2, when="val: 800 images")
    assert code == 130 and "Traceback" not in said
    assert said.splitlines()[-1] == "knn.py: interrupted"


def test_a_program_that_imports_a_main_keeps_its_own_handler():
    assert "main_pretrain" in sys.modules  # by the trials
    assert signal.getsignal(signal.SIGINT) is not on_interrupt


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
    ],
)
def test_the_threads_fit_the_cores(environ, cores, node, quota, threads):
    assert share_of_cores(environ, frozenset(cores), [frozenset(other) for other in node], quota)[0] == threads


@pytest.mark.parametrize("cores, workers", [(1, 1), (2, 2), (3, 2), (8, 7), (12, 11), (16, 15), (17, 16), (192, 16)])
def test_of_more_than_two_cores_one_is_left_for_the_main_process(cores, workers):
    assert choose_workers(cores) == workers


def test_cores_are_shared_among_ranks_and_the_log_says_once_how_many_load_data(caplog):
    """Eight ranks on a machine of 96 cores, and one that Slurm gives 12, also with one thread each."""
    environ, node = {"OMP_NUM_THREADS": "1"}, [frozenset(range(96))] * 8
    assert share_of_cores(environ, node[0], node, INFINITE)[0] == 12
    assert share_of_cores(environ | {"SLURM_CPUS_PER_TASK": "12"}, node[0], node[:1], INFINITE)[0] == 12
    # One task of Slurm's for all ranks, which torchrun starts.
    assert share_of_cores(environ | {"SLURM_CPUS_PER_TASK": "96"}, node[0], node, INFINITE)[0] == 12
    caplog.set_level("INFO")
    launch = Launch(0, 8, 0, 8, "torchrun", "127.0.0.1", 29500, torch.device("cpu"), cores=12)
    for given, workers in (("", 11), ("--num_workers 3", 3)):
        flags = get_parser(KnnConfig, "test").parse_args(["--checkpoint", "x", "--data_path", "x", *given.split()])
        config = resolve(given_flags(KnnConfig, flags), launch, weight_settings({}, "x", {"model": "swin_base_w14"}))
        assert config.num_workers == workers
    said = [record.getMessage() for record in caplog.records if "chosen" in record.getMessage()]
    assert said == ["not given, so chosen: --num_workers 11: 12 core(s) per rank"]


def test_the_log_says_once_how_many_threads_and_why(tmp_path):
    make_images(tmp_path / "data", 4)
    flags = [*TINY, "--data_path", str(tmp_path / "data"), "--epochs", "1", "--output_dir"]
    cores = len(os.sched_getaffinity(0))
    free = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK")}
    command = [sys.executable, "main_pretrain.py", *flags, str(tmp_path / "free")]
    said = subprocess.run(command, cwd=ROOT, env=free, capture_output=True, text=True, check=True).stdout
    assert said.count("per process") == 1 and f"computing in {cores} thread(s) per process ({cores} cores for 1" in said
    said = Trial(tmp_path, *flags, tmp_path / "given").finish()
    assert said.count("per process") == 1 and "computing in 1 thread(s) per process (OMP_NUM_THREADS=1)" in said
