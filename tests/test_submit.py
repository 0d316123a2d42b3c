"""What `python -m util.submit` would start; that it does start is tested on a real Slurm in test_slurm.py."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from util import submit
from util.submit import ROOT, Training, recipe


def test_recipe_is_the_experiments_script(tmp_path):
    main, flags = recipe("base_600ep", "pretrain", 16, str(tmp_path), ["--epochs", "3", "--aa", ""])
    script = ["sh", str(ROOT / "exp/base_600ep/pretrain.sh"), "print", "16", str(tmp_path), "--epochs", "3", "--aa", ""]
    printed = subprocess.run(script, capture_output=True, text=True).stdout
    assert [main, *flags] == printed[:-1].split("\n")
    assert main == "main_pretrain.py" and flags[-4:] == ["--epochs", "3", "--aa", ""]
    assert flags[flags.index("--accum_iter") + 1] == "1"


def test_recipe_passes_on_what_the_script_rejects(tmp_path):
    with pytest.raises(ValueError, match=r"2048 is not a multiple of 3 GPUs x --batch_size 128"):
        recipe("base_600ep", "pretrain", 3, str(tmp_path), [])
    with pytest.raises(ValueError, match=r"no_such has no pretrain.sh; these experiments have: base_600ep/pretrain, "):
        recipe("no_such", "pretrain", 8, str(tmp_path), [])


@pytest.mark.parametrize(("arguments", "message"), [
    (["eval"], "eval is a script of an experiment: add --exp"),
    (["pretrain", "--nodes", "0"], "--nodes must be at least 1, got 0"),
    *[
        ([script.stem, "--exp", script.parent.name, "--data_path", "/no/such"], "'/no/such' does not exist")
        for script in [*ROOT.glob("exp/*/pretrain.sh"), *ROOT.glob("exp/*/finetune.sh")]
        if script.parent.name != "fashion_mnist"  # for one machine
    ],
    (["pretrain", "--data_path", "/no/such"], "'/no/such' does not exist"),
])  # fmt: skip
def test_wrong_arguments_end_with_one_line_and_code_2(arguments, message, tmp_path, capsys):
    defaults = ["--partition", "gpu", "--data_path", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        submit.main([arguments[0], *defaults, *arguments[1:]])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_flags_are_checked_before_submitting(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        submit.main(["pretrain", "--partition", "gpu", "--data_path", str(tmp_path), "--", "--epochs", "many"])
    assert ended.value.code == 2
    assert "--epochs: invalid int value: 'many'" in capsys.readouterr().err


def install_slurm(folder: Path, sbatch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put stand-ins of Slurm's commands, `sbatch` among them, into `folder` and this at the head of PATH."""
    folder.mkdir()
    for name, script in (("sbatch", sbatch), ("srun", "exit 0")):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_what_slurm_refuses_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    install_slurm(tmp_path / "bin", "echo 'invalid partition specified: gpux' >&2; exit 1", monkeypatch)
    flags = ["--partition", "gpux", "--data_path", str(tmp_path), "--job_dir", str(tmp_path / "jobs")]
    with pytest.raises(SystemExit) as ended:
        submit.main(["pretrain", *flags])
    assert ended.value.code == 2
    assert re.search(
        "Slurm did not take the job: .*invalid partition specified: gpux", capsys.readouterr().err, re.DOTALL
    )


def test_options_of_sbatch_may_have_an_empty_value_or_none(tmp_path, monkeypatch):
    install_slurm(tmp_path / "bin", "echo Submitted batch job 7", monkeypatch)
    flags = ["--partition", "gpu", "--data_path", str(tmp_path), "--job_dir", str(tmp_path / "jobs")]
    submit.main(["pretrain", *flags, "--slurm", "comment=", "--slurm", "qos=long", "--slurm", "contiguous"])
    script = (tmp_path / "jobs" / "7_submission.sh").read_text()
    options = [line.removeprefix("#SBATCH --") for line in script.splitlines()]
    assert {"comment=''", "qos=long", "contiguous"} <= set(options)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A main that only writes down its arguments: its script, and a function that reads those of every start."""
    script, log = tmp_path / "stand_in_main.py", tmp_path / "started.jsonl"
    script.write_text(
        f"import json, sys\nwith open({str(log)!r}, 'a') as log: print(json.dumps(sys.argv[1:]), file=log)"
    )
    parser = argparse.ArgumentParser()
    for flag in ("--output_dir", "--log_dir", "--resume", "--dist_url", "--model"):
        parser.add_argument(flag)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return str(script), lambda: [parser.parse_args(json.loads(line)) for line in log.read_text().splitlines()]


def test_a_job_resumes_and_meets_anew_after_every_restart(stand_in, monkeypatch):
    script, started = stand_in
    training = Training(script, ["--model", "m"], "/jobs/%j")
    training()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    training.checkpoint().function()
    first, second = started()
    assert (first.output_dir, first.resume, first.model) == ("/jobs/17", "auto", "m")
    assert first.log_dir is None  # which the mains take as output_dir, whatever that is
    assert (first.dist_url, second.dist_url) == ("file:///jobs/17/meeting-17-0", "file:///jobs/17/meeting-17-1")


def test_given_flags_override_the_jobs_own(stand_in):
    script, started = stand_in
    Training(script, ["--output_dir", "elsewhere", "--resume", ""], "/jobs/%j")()
    (only,) = started()
    assert (only.output_dir, only.resume) == ("elsewhere", "")
