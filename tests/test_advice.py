"""The commands that the end of a run prints work as they stand."""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import QUICK, make_images

import main_pretrain
from util.run import advice
from util.run.flags import given_flags

ROOT = Path(__file__).resolve().parent.parent
SHAPE = ["--model", "mixmae_quickstart", "--input_size", "16", "--window_size", "4", "4", "4", "2", "--in_chans", "1"]
TRAIN = [*SHAPE, *QUICK, "--batch_size", "4", "--epochs", "1"]


def shell(command: str) -> str:
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def python(*words: object) -> str:

    return shell(shlex.join([sys.executable, *map(str, words)]))


def commands_in(said: str) -> dict[str, str]:
    """What each is for -> the command."""
    lines = said.partition("what can be done next:\n")[2].splitlines()
    return {purpose.removeprefix("  # "): line for purpose, line in zip(lines[::2], lines[1::2])}


@pytest.mark.slow
@pytest.mark.parametrize("labelled, divided", [(True, False), (False, False)])
def test_every_command_at_the_end_of_a_run_works(tmp_path, labelled, divided):
    """In a folder whose name has a space."""
    data, out = tmp_path / "my data", tmp_path / "my run"
    for split in ("train", "val") if divided else ("train",):
        for name in ("a", "b") if labelled else (".",):
            make_images(data / split / name, 20, (16, 16), seed=len(name + split))
    commands = commands_in(python("main_pretrain.py", *TRAIN, "--data_path", data, "--output_dir", out))
    expected = {"see reconstructions", "use the encoder elsewhere", "pretrain further"}
    expected |= {"measure the features", "fine-tune with labels"} if labelled else {"embed the images"}
    assert commands.keys() == expected
    for purpose, command in commands.items():
        if purpose in ("fine-tune with labels", "pretrain further"):  # as they stand, but for the time they take
            command += " --epochs 1 --batch_size 4 --num_workers 0 --device cpu"
        said = shell(command)
        if purpose == "fine-tune with labels":
            then = commands_in(said)
            assert len(then) == 3
            for command in then.values():
                shell(command)
    assert {"reconstructions.png", "encoder.safetensors"} <= {path.name for path in out.iterdir()}


@pytest.mark.slow
def test_a_stopped_run_says_how_to_go_on(tmp_path):

    data, out = tmp_path / "data", tmp_path / "out"
    make_images(data, 40, (16, 16))
    words = [sys.executable, "main_pretrain.py", *TRAIN, "--epochs", "500", "--save_steps", "5", "--print_freq", "1"]
    words += ["--data_path", data, "--output_dir", out]
    run = subprocess.Popen([*map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (out / "steps.jsonl").exists():
        time.sleep(0.05)
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 75, said
    command = said.partition("to go on: ")[2].partition("\n")[0]
    assert command.endswith("--resume auto")
    assert "resumed at" in shell(command.replace("--epochs 500", "--epochs 500 --resume_force --epochs 1"))


def test_commands_read_images_as_the_run_did(tmp_path):
    flags = ["--data_path", tmp_path, "--output_dir", tmp_path / "out", "--reader", "dicom:read", "--ignore_exif"]
    parsed = main_pretrain.get_args_parser().parse_args([*map(str, flags), "--max_pixels", "99"])
    config = given_flags(main_pretrain.PretrainConfig, parsed)
    for labelled in (True, False):
        for purpose, line in advice.after_pretraining(config, labelled):
            reads = purpose != "use the encoder elsewhere"
            for flags in ("--reader dicom:read", "--ignore_exif", "--max_pixels 99"):
                assert (flags in line) == reads


@pytest.mark.parametrize("given", [[], ["--resume", "auto"], ["--resume", "old.pth"], ["--resume=old.pth"]])
def test_going_on_is_from_the_runs_own_checkpoint(monkeypatch, given):
    """The last of several flags counts."""
    monkeypatch.setattr(sys, "argv", ["main_pretrain.py", "--data_path", "my data", *given])
    words = shlex.split(advice.to_continue())
    assert words[-2:] == ["--resume", "auto"] and "my data" in words and words.count("auto") == 1
