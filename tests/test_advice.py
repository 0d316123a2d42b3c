"""The commands that the end of a run prints work as they stand."""

import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from running import QUICK, make_images

import main_finetune
import main_pretrain
from util.run import advice
from util.run.flags import given_flags
from util.weights.settings import METHOD

ROOT = Path(__file__).resolve().parent.parent
SHAPE = ["--model", "mixmae_quickstart", "--input_size", "16", "--window_size", "4", "4", "4", "2", "--in_chans", "1"]
TRAIN = [*SHAPE, *QUICK, "--batch_size", "4", "--epochs", "1"]


def shell(command: str, folder: Path = ROOT) -> str:
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def python(*words: object, folder: Path = ROOT) -> str:
    return shell(shlex.join([sys.executable, *map(str, words)]), folder)


def commands_in(said: str) -> dict[str, str]:
    """What each is for -> the command."""
    lines = said.partition("what can be done next:\n")[2].splitlines()
    return {purpose.removeprefix("  # "): line for purpose, line in zip(lines[::2], lines[1::2])}


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [True, False])
def test_every_command_at_the_end_of_a_run_works(tmp_path, labelled):
    """In a folder whose name has a space; from another folder than this repository, as well."""
    data, out, folder = tmp_path / "my data", tmp_path / "my run", ROOT if labelled else tmp_path
    for name in ("a", "b") if labelled else (".",):
        make_images(data / "train" / name, 20, (16, 16), seed=len(name))
    flags = [*TRAIN, "--data_path", data, "--output_dir", out]
    said = python(ROOT / "main_pretrain.py", *flags, folder=folder)
    assert re.search(
        r"pretraining is done: .*/my run/checkpoint.pth\n  epochs 1, steps \d+, starts 1\n.*goodput \d+%", said
    )
    commands = commands_in(said)
    expected = {"see how it went, in a browser", "see reconstructions", "use the encoder elsewhere", "pretrain further"}
    expected |= {"measure the features", "fine-tune with labels"} if labelled else {"embed the images"}
    assert commands.keys() == expected
    for purpose, command in commands.items():
        if purpose in ("fine-tune with labels", "pretrain further"):  # as they stand, but for the time they take
            command += " --epochs 1 --batch_size 4 --num_workers 0 --device cpu"
        said = shell(command, folder)
        if purpose == "fine-tune with labels":
            assert "fine-tuning is done: " in said and "validation top-1: best " in said
            then = commands_in(said)
            assert len(then) == 4
            for command in then.values():
                shell(command)
    assert {"report.html", "reconstructions.png", "encoder.safetensors"} <= {path.name for path in out.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_run_says_how_to_go_on(tmp_path, ranks):
    """Also under torchrun, which has an exit code of its own."""
    data, out = tmp_path / "data", tmp_path / "out"
    make_images(data, 40, (16, 16))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks] if ranks > 1 else []
    words = [sys.executable, *launcher, "main_pretrain.py", *TRAIN, "--epochs", "500", "--save_steps", "5"]
    words += ["--data_path", data, "--output_dir", out]
    run = subprocess.Popen([*map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (out / "steps.jsonl").exists():
        time.sleep(0.05)
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=120)[0]
    assert run.returncode == (75 if ranks == 1 else 1), said  # 1: of torchrun
    command = said.partition("to go on: ")[2].partition("\n")[0]
    assert command.endswith("--resume auto")
    assert "resumed at" in shell(command.replace("--epochs 500", "--epochs 500 --resume_force --epochs 1"))


def test_commands_read_images_as_the_run_did(tmp_path):
    flags = ["--data_path", tmp_path, "--output_dir", tmp_path / "out", "--reader", "dicom:read", "--ignore_exif"]
    parsed = main_pretrain.get_args_parser().parse_args([*map(str, flags), "--max_pixels", "99"])
    config = given_flags(main_pretrain.PretrainConfig, parsed)
    for labelled in (True, False):
        for purpose, line in advice.after_pretraining(config, labelled):
            reads = purpose not in ("use the encoder elsewhere", "see how it went, in a browser")
            for flags in ("--reader dicom:read", "--ignore_exif", "--max_pixels 99"):
                assert (flags in line) == reads


def test_going_on_is_with_the_same_method_and_the_same_images(tmp_path):
    method = [
        "--no_masked_attn",
        "--mix_images",
        "3",
        "--mask_ratio",
        "0.67",
        "--no-norm_pix_loss",
        "--val_share",
        "0.2",
    ]
    flags = ["--data_path", str(tmp_path), "--output_dir", str(tmp_path / "out"), *method, "--batch_size", "6"]
    config = given_flags(main_pretrain.PretrainConfig, main_pretrain.get_args_parser().parse_args(flags))
    further = dict(advice.after_pretraining(config, labelled=False))["pretrain further"]
    words = shlex.split(further)[2:]
    assert {"--no-masked_attn", "--mix_images", "--mask_ratio", "--no-norm_pix_loss", "--val_share"} <= set(words)
    again = given_flags(main_pretrain.PretrainConfig, main_pretrain.get_args_parser().parse_args(words))
    assert all(getattr(again, name) == getattr(config, name) for name in (*METHOD, "val_share"))


def test_the_averaged_weights_are_used_where_the_best_is_theirs(tmp_path):
    flags = ["--data_path", str(tmp_path), "--output_dir", "out", "--model_ema"]
    config = given_flags(main_finetune.FinetuneConfig, main_finetune.get_args_parser().parse_args(flags))
    commands = [line for _, line in advice.after_fine_tuning(config) if "checkpoint-best.pth" in line]
    assert len(commands) == 3 and all("--model_ema" in line for line in commands)


@pytest.mark.parametrize("output_dir, beside", [("out", "out"), (".", "{}/here"), ("..", "{}"), ("../x/.", "../x")])
def test_further_runs_go_beside_the_folder_of_this_one(tmp_path, monkeypatch, output_dir, beside):
    """Of `.`, which has no name, there was a traceback after the whole run."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    flags = ["--data_path", "images", "--output_dir", output_dir]
    config = given_flags(main_pretrain.PretrainConfig, main_pretrain.get_args_parser().parse_args(flags))
    further = dict(advice.after_pretraining(config, labelled=True))
    for purpose, suffix in (("fine-tune with labels", "_finetuned"), ("pretrain further", "_continued")):
        words = shlex.split(further[purpose])
        assert words[words.index("--output_dir") + 1] == beside.format(tmp_path) + suffix


@pytest.mark.parametrize("data", ["x.tar", "tars", "tars with val"])
def test_nothing_is_offered_that_divides_a_tar(tmp_path, data):
    (tmp_path / "tars").mkdir()
    for name in {"x.tar": ("x",), "tars": ("train",), "tars with val": ("train", "val")}[data]:
        (tmp_path / "tars" / f"{name}.tar").touch()
    path = tmp_path / "tars" / "x.tar" if data == "x.tar" else tmp_path / "tars"
    parsed = main_pretrain.get_args_parser().parse_args(["--data_path", str(path), "--output_dir", "out"])
    commands = dict(advice.after_pretraining(given_flags(main_pretrain.PretrainConfig, parsed), labelled=True))
    assert not any("--val_share" in line for line in commands.values())
    assert ("fine-tune with labels" in commands) == ("measure the features" in commands) == ("val" in data)
    tar = path if data == "x.tar" else path / "train.tar"
    assert f"--images {tar} " in commands["see reconstructions"]


def test_images_are_predicted_as_they_were_trained_on(tmp_path):
    """Also where a classifier has done so."""
    flags = ["--data_path", tmp_path, "--output_dir", "out", "--bad_images", "skip", "--allow_odd_statistics"]
    for main, config_class, after in (
        (main_pretrain, main_pretrain.PretrainConfig, partial(advice.after_pretraining, labelled=False)),
        (main_finetune, main_finetune.FinetuneConfig, advice.after_fine_tuning),
    ):
        config = given_flags(config_class, main.get_args_parser().parse_args([*map(str, flags)]))
        [predict] = [line for _, line in after(config) if "util.predict" in line]
        assert "--bad_images skip" in predict and "--allow_odd_statistics" in predict


@pytest.mark.parametrize("given", [[], ["--resume", "auto"], ["--resume", "old.pth"], ["--resume=old.pth"]])
def test_going_on_is_from_the_runs_own_checkpoint(monkeypatch, given):
    """The last of several flags counts."""
    monkeypatch.setattr(sys, "argv", ["main_pretrain.py", "--data_path", "my data", *given])
    words = shlex.split(advice.to_continue(1))
    assert words[-2:] == ["--resume", "auto"] and "my data" in words and words.count("auto") == 1


def test_going_on_with_several_ranks(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "main_pretrain.py"), "--data_path", "d"])
    ours = ["main_pretrain.py", "--data_path", "d", "--resume", "auto"]
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")  # as Open MPI, which sets no WORLD_SIZE
    assert advice.to_continue(4).startswith("start all processes again")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert advice.to_continue(4).startswith("start all processes again")  # who has started them is not known
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    assert shlex.split(advice.to_continue(4))[1:] == launcher + ours
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(tmp_path)
        assert shlex.split(advice.to_continue(4))[2:] == [*launcher, str(ROOT / ours[0]), *ours[1:]]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # on two machines
    assert advice.to_continue(4).startswith("start all processes again")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert advice.to_continue(4) == ""
