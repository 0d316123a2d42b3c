"""exp/ablations: every variant in the script is a run that can start, and a line of the table; how it starts them."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import main_pretrain
from exp.ablations import table
from util.errors import UserError
from util.run.flags import given_flags

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = (ROOT / "exp/ablations/run.sh").read_text()
VARIANTS = {
    line[0]: line[1:] for line in (shlex.split(rest, comments=True) for rest in re.findall("  variant (.*)", SCRIPT))
}


def test_the_table_has_the_scripts_variants():
    assert list(VARIANTS) == list(table.VARIANTS)


def test_every_variant_builds_its_model_and_differs_from_the_paper():
    common = ["--data_path", ".", "--model", "mixmae_quickstart", "--in_chans", "1", "--batch_size", "32"]
    common += ["--input_size", "32", "32", "--lr", "2e-3", "--mean", "0.2", "--std", "0.3"]
    parser = main_pretrain.get_args_parser()
    configurations = {}
    for name, flags in VARIANTS.items():
        given = given_flags(main_pretrain.PretrainConfig, parser.parse_args([*common, *flags]))
        main_pretrain.build_model(given)
        configurations[given] = name
    assert len(configurations) == len(VARIANTS)


def make_run(folder, knn: float, seconds: float) -> None:
    for part, record in (("pretrain", {"knn_acc1_k20": knn, "probe_acc1": 80.0}), ("finetune", {"test_acc1": 60.0})):
        (folder / part).mkdir(parents=True)
        lines = [{"epoch": 0, "train_loss": 1.0, "knn_acc1_k20": 0.0}, {"epoch": 1, "train_loss": 1.0, **record}]
        (folder / part / "log.txt").write_text("\n".join(map(json.dumps, lines)) + "\n")
    times = [{"time": 0.0, "start": True, "epoch": 0.0, "step": 0}]
    for step in (20, 40):
        record = {
            "epoch": step / 40,
            "step": step,
            "steps": 20,
            "images": 640,
            "seconds": seconds / 2,
            "data_wait": 0.1,
        }
        times.append({"time": 5 + step * seconds / 40, **record})
    (folder / "pretrain" / "times.jsonl").write_text("\n".join(map(json.dumps, times)) + "\n")
    configuration = {"config": {"epochs": 1}, "environment": {}, "program": "main_pretrain.py"}
    (folder / "pretrain" / "config.json").write_text(json.dumps(configuration))
    steps = [
        {"step": step, "epoch": (step - 1) // 20, "lr": 1e-3, "loss": 1.0, "grad_norm": 1.0} for step in range(1, 41)
    ]
    (folder / "pretrain" / "steps.jsonl").write_text("\n".join(map(json.dumps, steps)) + "\n")
    (folder / "done").touch()


def test_table_and_plot_are_of_the_complete_runs(tmp_path, capsys):
    for seed, knn in enumerate((75.0, 76.0, 78.0)):
        make_run(tmp_path / "paper" / f"seed{seed}", knn, 20 + 2 * seed)  # in two epochs
    make_run(tmp_path / "images_3" / "seed0", 70.0, 60)
    (tmp_path / "images_3" / "seed1").mkdir()  # has not ended
    flags = table.get_args_parser().parse_args(["--runs", str(tmp_path), "--seeds", "0", "1", "2"])
    table.main(flags)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2:4] == [
        "| the paper's method | 76.3 ± 1.5 | 80.0 ± 0.0 | 60.0 ± 0.0 | 11 |",
        "| Mixtures: 3 images (ratio 0.67) (of 1 seeds) | 70.0 ± 0.0 | 80.0 ± 0.0 | 60.0 ± 0.0 | 30 |",
    ]
    assert lines[2] in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    with pytest.raises(UserError, match=r"has no complete runs of the seeds \[7\]"):
        table.read_rows(tmp_path, [7])


def test_the_band_of_the_plot_is_the_papers_method_and_no_other(tmp_path):
    make_run(tmp_path / "random" / "seed0", 70.0, 20)
    without = table.plot(table.read_rows(tmp_path, [0]))
    assert not any(axes.patches for axes in without.axes)
    make_run(tmp_path / "paper" / "seed0", 75.0, 20)
    assert all(len(axes.patches) == 1 for axes in table.plot(table.read_rows(tmp_path, [0])).axes)


# --- The script, with an interpreter that only notes what it is given ---


@pytest.fixture
def checkout(tmp_path):
    """A repository with the script alone, and images of three classes."""
    for name in ("exp/ablations/run.sh", "exp/demonstration.sh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "exp/setup.sh").touch()
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\necho "$@" >>started\ncase "$*" in *"${FAIL:-nothing}"*) echo broken; exit 1 ;; esac\n'
    )
    python.chmod(0o755)
    for folder, count in (("train", 4), ("val", 1)):
        for label in ("a b", "c", "d"):
            (tmp_path / "images" / folder / label).mkdir(parents=True)
            for number in range(count * 16):
                (tmp_path / "images" / folder / label / f"{number}.png").touch()
    return tmp_path


def start(checkout, *arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in ("DATA", "FLAGS", "EPOCHS")}
    return subprocess.run(
        ["sh", "exp/ablations/run.sh", *arguments],
        cwd=checkout, env=inherited | {"DATA": "images", **environment}, capture_output=True, text=True,
    )  # fmt: skip


def started(checkout) -> dict[tuple[str, str], list[str]]:
    """(program, variant/seed) -> flags."""
    found = {}
    for line in (checkout / "started").read_text().splitlines():
        program, *flags = line.split()
        if program.startswith("main_"):
            folder = Path(flags[flags.index("--output_dir") + 1])
            found[program, f"{folder.parent.parent.name}/{folder.parent.name}"] = flags
    return found


def last(flags: list[str], name: str) -> str:
    """What argparse takes."""
    return flags[len(flags) - flags[::-1].index(name)]


def test_the_script_starts_every_variant_with_every_seed_and_announces_it(checkout):
    result = start(checkout, "out", FLAGS="--in_chans 3")
    assert result.returncode == 0, result.stderr
    runs = [f"{name}/seed{seed}" for seed in (0, 1, 2) for name in VARIANTS]
    programs = started(checkout)
    assert programs.keys() == {(f"main_{part}.py", run) for part in ("pretrain", "finetune") for run in runs}
    assert all(last(flags, "--in_chans") == "3" for flags in programs.values())
    for number, run in enumerate(runs, 1):
        name, seed = run.split("/seed")
        assert (
            f"{number} of {len(runs)}: {name}, seed {seed} (output in {checkout}/out/{run}/output.txt)" in result.stdout
        )
    assert "about 24 steps" in result.stdout  # 4 epochs of 192 images
    labelled = list((checkout / "out/labelled").glob("*/*/*.png"))
    assert len(labelled) == 3 * 64 + 3 * 16 and all(path.exists() for path in labelled)
    (checkout / "started").unlink()
    assert start(checkout, "out", FLAGS="--in_chans 3").returncode == 0
    assert not started(checkout)  # all are complete


def test_chosen_variants_alone(checkout):
    result = start(checkout, "--only", "single,paper", "--seed", "7", "--only", "unmasked", "out")
    assert result.returncode == 0, result.stderr
    runs = ["paper/seed7", "unmasked/seed7", "single/seed7"]  # in the order of the table
    assert {run for _, run in started(checkout)} == set(runs)
    assert [line.split(" (")[0] for line in sorted(result.stdout.splitlines()) if " of 3: " in line] == [
        f"{number} of 3: {run.replace('/seed', ', seed ')}" for number, run in enumerate(runs, 1)
    ]
    refused = start(checkout, "--only", "paper,nothing")
    assert refused.returncode == 2
    assert refused.stderr == f"exp/ablations/run.sh: --only nothing is not one of {' '.join(VARIANTS)}\n"
    empty = start(checkout, "--only", ",")
    assert empty.returncode == 2 and empty.stderr.startswith("exp/ablations/run.sh: --only needs names from paper ")


def test_epochs_are_those_of_pretraining_and_it_is_measured_at_their_end(checkout):
    assert start(checkout, "--only", "random,paper", "--seed", "0", "out", EPOCHS="2").returncode == 0
    programs = started(checkout)
    paper, random = (programs["main_pretrain.py", f"{name}/seed0"] for name in ("paper", "random"))
    assert [last(paper, f"--{name}") for name in ("epochs", "knn_every", "probe_every", "vis_every")] == ["2"] * 4
    assert (last(random, "--lr"), last(random, "--epochs")) == ("0", "1")
    assert last(programs["main_finetune.py", "paper/seed0"], "--epochs") == "15"
    other = start(checkout, "--only", "single", "--seed", "0", "out")  # the table would compare what cannot be
    assert other.returncode == 2 and "has runs with EPOCHS=2 " in other.stderr and "single/seed0" not in other.stdout


@pytest.mark.parametrize(
    "missing, message",
    [
        ("images", "DATA=images is not a folder; one with train/CLASS/ and val/CLASS/ is needed"),
        ("images/train", "DATA=images has no class folders in train/; train/CLASS/ and val/CLASS/ are needed"),
        ("images/val", "DATA=images has no class folders in val/; train/CLASS/ and val/CLASS/ are needed"),
        ("images/val/*", "DATA=images has no class folders in val/; train/CLASS/ and val/CLASS/ are needed"),
        ("images/train/[ac]*", "DATA=images has 1 class folders in train/; 2 to 500 are needed"),
    ],
)
def test_folders_that_lack_something_are_refused_before_the_work_starts(checkout, missing, message):
    for folder in list(checkout.glob(missing)):
        shutil.rmtree(folder)
    result = start(checkout, "out")
    assert (result.returncode, result.stderr) == (2, f"exp/ablations/run.sh: {message}\n")
    assert not (checkout / "out").exists() and not (checkout / "started").exists()


def test_wrong_epochs_and_flags_are_refused_and_help_shows_all(checkout):
    for epochs in ("0", "-1", "1.5", "two"):
        result = start(checkout, EPOCHS=epochs)
        assert result.returncode == 2 and f"EPOCHS={epochs} must be a whole number" in result.stderr
    result = start(checkout, "--seeds", "1")
    assert result.returncode == 2 and "[--only NAME,NAME...]" in result.stderr
    shown = start(checkout, "--help")
    assert shown.returncode == 0 and all(
        word in shown.stdout for word in ("--only", "--seed", "EPOCHS", "DATA", "FLAGS")
    )
    assert "#" not in shown.stdout and "here=" not in shown.stdout and not (checkout / "started").exists()


@pytest.mark.parametrize("variant", ["paper", "random"])  # one in each process
def test_a_variant_that_fails_is_named_and_ends_the_script(checkout, variant):
    result = start(checkout, "--only", "paper,random", "--seed", "0", "out", FAIL=f"{variant}/seed0/finetune")
    assert result.returncode == 1
    assert f"{variant}, seed 0, failed" in result.stdout and "broken" in result.stderr
    assert not (checkout / "out" / variant / "seed0/done").exists()
