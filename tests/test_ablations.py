"""exp/ablations: every variant in the script is a run that can start, and a line of the table."""

import json
import re
import shlex
from pathlib import Path

import pytest

import main_pretrain
from exp.ablations import table
from util.errors import UserError
from util.run.flags import given_flags

SCRIPT = (Path(__file__).resolve().parent.parent / "exp/ablations/run.sh").read_text()
VARIANTS = {
    line[0]: line[1:] for line in (shlex.split(rest, comments=True) for rest in re.findall("  variant (.*)", SCRIPT))
}


def test_the_table_has_the_scripts_variants():
    assert list(VARIANTS) == [name for members in table.GROUPS.values() for name in members]


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
