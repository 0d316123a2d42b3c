"""The scripts of the experiments: what they start, what they reject, and that they are portable shell."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN = "exp/base_600ep/pretrain.sh"
EXPERIMENTS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("exp/*_600ep/*.sh"))
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("exp/**/*.sh", "tests/**/*.sh", ".ci/run")
    for path in ROOT.glob(pattern)
    if "ckpt" not in path.parts
)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "images with blanks"
    folder.mkdir()
    return str(folder)


@pytest.fixture
def fake_commands(tmp_path, monkeypatch):
    """Stand-ins on the PATH: `srun` and the interpreter print their arguments, `sinfo` knows the partition `gpu`."""
    commands = tmp_path / "bin"
    commands.mkdir()
    programs = {
        "srun": 'printf "%s\\n" srun "$@"; echo "OMP_NUM_THREADS=$OMP_NUM_THREADS"',
        "fake-python": 'printf "%s\\n" python "$@"; echo "OMP_NUM_THREADS=$OMP_NUM_THREADS"',
        "sinfo": 'case "$*" in *"--partition nosuch"*) ;; *) echo gpu ;; esac',
    }
    for name, body in programs.items():
        path = commands / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", str(commands / "fake-python"))
    for name in (
        "GPUS_PER_NODE", "CPUS_PER_TASK", "SRUN_ARGS", "EFFECTIVE_BATCH", "OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


def run(script, *arguments, shell="sh", cwd=ROOT, **environ):
    command = [shell, str(ROOT / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | environ)


def value_of(flag, lines):
    """What argparse takes: the value after the last of the flags."""
    return lines[len(lines) - lines[::-1].index(flag)]


def test_print_gives_the_main_and_its_flags(data, tmp_path):
    result = run(PRETRAIN, "print", "16", data, "--epochs", "2", "--note=a b", cwd=tmp_path)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and lines[0] == "main_pretrain.py"
    assert value_of("--data_path", lines) == data
    assert value_of("--model", lines) == "mixmae_base"
    assert value_of("--accum_iter", lines) == "1"
    assert value_of("--epochs", lines) == "2"
    assert value_of("--output_dir", lines) == str(ROOT / "exp/base_600ep/ckpt")
    assert lines[-1] == "--note=a b"


@pytest.mark.parametrize("script", EXPERIMENTS)
def test_every_experiment_states_its_numbers_once_and_says_where_they_are_from(script, data):
    text = (ROOT / script).read_text()
    header = text[: text.index("\nhere=")]
    assert all(line.startswith("#") for line in header.splitlines())
    for entry in ("# GPUs ", "# Start ", "# Result ", "# Origin "):
        assert entry in header
    if not script.endswith("eval.sh"):
        assert "# Effective batch " in header
    if "base" not in script or "384" in script or "linear" in script:
        assert "ours" in header or script.endswith("eval.sh")
    lines = run(script, "print", "8", data).stdout.splitlines()
    flags = [line for line in lines if line.startswith("--")]
    assert len(flags) == len(set(flags))
    assert "--ignore_exif" in flags
    if not script.endswith("eval.sh"):
        assert f" x {value_of('--batch_size', lines)} images" in header
        epochs, warmup = value_of("--epochs", lines), value_of("--warmup_epochs", lines)
        assert f"# Epochs           {epochs}, the first {warmup} of them warm-up" in header
        effective = int(value_of("--accum_iter", lines)) * 8 * int(value_of("--batch_size", lines))
        assert f"# Effective batch  {effective}," in header
        learning_rate = float(value_of("--blr", lines)) * effective / 256
        assert float(header.split("lr = ")[1].split(" = ")[1].split()[0].removesuffix(",")) == pytest.approx(
            learning_rate
        )


def test_the_published_recipe(data):
    """The values that the authors published for base."""
    lines = run(PRETRAIN, "print", "16", data).stdout.splitlines()
    published = {
        "--mask_ratio": "0.5", "--blr": "1.5e-4", "--min_lr": "0", "--weight_decay": "0.05", "--epochs": "600",
        "--warmup_epochs": "40", "--batch_size": "128",
    }  # fmt: skip
    assert {flag: value_of(flag, lines) for flag in published} == published and "--norm_pix_loss" in lines
    lines = run("exp/base_600ep/finetune.sh", "print", "8", data).stdout.splitlines()
    published = {
        "--blr": "5e-4", "--min_lr": "1e-6", "--weight_decay": "0.05", "--epochs": "100", "--warmup_epochs": "5",
        "--layer_decay": "0.7", "--drop_path": "0.1", "--aa": "rand-m9-mstd0.5-inc1", "--reprob": "0.25",
        "--remode": "pixel", "--mixup": "0.8", "--cutmix": "1.0", "--smoothing": "0.1", "--batch_size": "128",
        "--finetune": str(ROOT / "exp/base_600ep/ckpt/checkpoint.pth"),
    }  # fmt: skip
    assert {flag: value_of(flag, lines) for flag in published} == published


@pytest.mark.parametrize(("gpus", "flags", "accum_iter"), [
    ("1", [], "16"), ("8", [], "2"), ("16", ["--batch_size", "32"], "4"), ("4", ["--batch_size=512"], "1"),
    ("3", ["--accum_iter", "5"], "5"), ("2", ["--batch_size", "7", "--batch_size", "64"], "16"),
    ("4", ["--batch_size=64", "--epochs", "3"], "8"), ("2", ["--batch_size=7", "--batch_size", "64"], "16"),
])  # fmt: skip
def test_effective_batch_stays_the_recipes(gpus, flags, accum_iter, data):
    assert value_of("--accum_iter", run(PRETRAIN, "print", gpus, data, *flags).stdout.splitlines()) == accum_iter


def test_effective_batch_of_the_environment_overrides_the_recipes(data):
    lines = run(PRETRAIN, "print", "8", data, EFFECTIVE_BATCH="4096").stdout.splitlines()
    assert value_of("--accum_iter", lines) == "4"
    result = run(PRETRAIN, "print", "8", data, EFFECTIVE_BATCH="many")
    assert result.returncode == 2 and "EFFECTIVE_BATCH must be a positive number, not 'many'" in result.stderr
    evaluation = run("exp/base_600ep/eval.sh", "print", "3", data, EFFECTIVE_BATCH="4096")
    assert evaluation.returncode == 0 and "--accum_iter" not in evaluation.stdout


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "PARTITION, GPUS and DATA are needed"),
    (["local", "2"], "PARTITION, GPUS and DATA are needed"),
    (["local", "two", "DATA"], "GPUS must be a positive number, not 'two'"),
    (["local", "0", "DATA"], "GPUS must be a positive number, not '0'"),
    (["local", "08", "DATA"], "GPUS must be a positive number, not '08'"),
    (["local", "-2", "DATA"], "GPUS must be a positive number, not '-2'"),
    (["local", "2", "/no/such/folder"], "the data folder (or list of images) '/no/such/folder' does not exist"),
    (["nosuch", "2", "DATA"], "Slurm knows no partition 'nosuch', only: gpu"),
    (["local", "3", "DATA"], "2048 is not a multiple of 3 GPUs x --batch_size 128: take a number of GPUs that divides"),
    (["local", "32", "DATA"], "2048 is not a multiple of 32 GPUs x --batch_size 128: --batch_size 64 works"),
    (["local", "2", "DATA", "--batch_size", "many"], "--batch_size must be a positive number, not 'many'"),
    (["local", "2", "DATA", "--batch_size", "0"], "--batch_size must be a positive number, not '0'"),
])  # fmt: skip
@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_what_is_wrong_is_said_with_the_usage(arguments, message, shell, data, fake_commands):
    result = run(PRETRAIN, *[data if argument == "DATA" else argument for argument in arguments], shell=shell)
    assert result.returncode == 2 and result.stdout == ""
    assert f"{ROOT / PRETRAIN}: " in result.stderr and message in result.stderr
    assert "usage: sh" in result.stderr and "PARTITION|local|print GPUS DATA" in result.stderr


def test_a_slurm_that_does_not_answer_is_no_missing_partition(data, tmp_path, fake_commands):
    (tmp_path / "bin/sinfo").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    result = run(PRETRAIN, "gpu", "8", data)
    assert result.returncode == 2 and "Unable to contact slurm controller" in result.stderr
    assert "Slurm does not answer" in result.stderr and "knows no partition" not in result.stderr


def test_a_named_dataset_needs_no_folder(fake_commands):
    for flags in (["--dataset", "hfds/food101"], ["--dataset=hfds/food101", "--epochs", "2"]):
        result = run(PRETRAIN, "local", "2", "somewhere", *flags)
        assert result.returncode == 0 and value_of("--data_path", result.stdout.splitlines()) == "somewhere"


def test_print_needs_no_data():
    lines = run(PRETRAIN, "print", "2", "/not/on/this/machine").stdout.splitlines()
    assert value_of("--data_path", lines) == "/not/on/this/machine"


def test_local_is_torchrun_and_one_process_needs_none(data, fake_commands):
    lines = run(PRETRAIN, "local", "2", data, "--x", OMP_NUM_THREADS="3").stdout.splitlines()
    start = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert lines[:7] == [*start, str(ROOT / "main_pretrain.py")]
    assert lines[-2:] == ["--x", "OMP_NUM_THREADS=3"]
    alone = run(PRETRAIN, "local", "1", data).stdout.splitlines()
    assert alone[:2] == ["python", str(ROOT / "main_pretrain.py")]
    assert alone[-1] == f"OMP_NUM_THREADS={os.cpu_count()}"


def test_srun_gets_tasks_nodes_gpus_and_site_options(data, fake_commands):
    lines = run(PRETRAIN, "gpu", "16", data, SRUN_ARGS="--account=lab --time=60").stdout.splitlines()
    assert lines[:9] == [
        "srun", "--partition=gpu", "--ntasks=16", "--ntasks-per-node=8", "--gres=gpu:8", "--cpus-per-task=12",
        "--kill-on-bad-exit=1", "--account=lab", "--time=60",
    ]  # fmt: skip
    assert "-u" in lines and str(ROOT / "main_pretrain.py") in lines and lines[-1] == "OMP_NUM_THREADS=1"
    lines = run(PRETRAIN, "gpu", "4", data, GPUS_PER_NODE="2", CPUS_PER_TASK="3").stdout.splitlines()
    assert {"--ntasks=4", "--ntasks-per-node=2", "--gres=gpu:2", "--cpus-per-task=3"} <= set(lines)
    lines = run(PRETRAIN, "gpu", "4", data, SLURM_CPUS_PER_TASK="5").stdout.splitlines()
    assert {"--ntasks-per-node=4", "--gres=gpu:4", "--cpus-per-task=5"} <= set(lines)


def test_a_copy_made_by_sbatch_finds_the_repository(data, tmp_path):
    copy = tmp_path / "slurm_script"
    shutil.copy(ROOT / PRETRAIN, copy)
    result = subprocess.run(["sh", str(copy), "print", "16", data], capture_output=True, text=True, cwd=ROOT)
    assert value_of("--output_dir", result.stdout.splitlines()) == str(ROOT / "exp/base_600ep/ckpt")


def require(command):
    if shutil.which(command) is None:
        if os.environ.get("MIXMAE_REQUIRE_SLURM") == "1":
            pytest.fail(f"{command} is not installed")
        pytest.skip(f"{command} is not installed")


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script):
    require("shellcheck")
    result = subprocess.run(["shellcheck", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", EXPERIMENTS)
def test_dash_runs_every_experiment(script, data):
    require("dash")
    result = run(script, "print", "8", data, shell="dash")
    assert result.returncode == 0 and result.stderr == ""
