"""`python -m util.compare_runs`: whether two runs are the same, and where they diverge."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from running import fails, make_images, read_lines, run
from trials import TINY, Trial

import util.compare_runs
from main_pretrain import PretrainConfig
from util.compare_runs import relative_difference, whole_decades
from util.run import provenance

RECIPE = (*TINY, "--epochs", "3", "--save_steps", "2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`whole`, `killed` and resumed on the same images, `other` with another rate, and `images`."""
    place = tmp_path_factory.mktemp("compare")
    make_images(place / "images", 24)
    flags = (*RECIPE, "--data_path", place / "images", "--output_dir")
    Trial(place, *flags, place / "whole").finish()
    Trial(place, *flags, place / "other", "--lr", "1.01e-3", "--print_freq", "9").finish()
    trial = Trial(place, *flags, place / "killed")
    while not list((place / "killed").glob("checkpoint-*.pth")):
        assert not trial.poll(), trial.output
    trial.kill()
    trial.wait()
    Trial(place, *flags, place / "killed", "--resume", "auto").finish()
    return place


def compare(capfd, *flags: object) -> tuple[int, str]:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(util.compare_runs, *flags)
    return stopped.value.code, capfd.readouterr().out


def changed(run_folder: Path, to: Path, change) -> Path:
    """A copy of a run, after `change(its config.json, its steps)`."""
    shutil.copytree(run_folder, to)
    config, steps = json.loads((to / "config.json").read_text()), read_lines(to / "steps.jsonl")
    change(config, steps)
    (to / "config.json").write_text(json.dumps(config))
    (to / "steps.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    return to


def test_a_killed_and_resumed_run_is_the_same(runs, capfd, tmp_path):
    code, said = compare(capfd, runs / "whole", runs / "killed", "--out", tmp_path / "plots" / "losses.png")
    assert code == 0 and "whole and killed are the same to the bit in 18 steps\n" in said
    assert "without effect on the numbers: output_dir, log_dir, resume" in said and "setting " not in said
    with Image.open(tmp_path / "plots" / "losses.png") as picture:
        assert picture.width > 800


def test_names_of_runs_are_no_formulas(runs, capfd, tmp_path):
    formula = changed(runs / "whole", tmp_path / "$x^$", lambda config, steps: None)
    code, said = compare(capfd, runs / "whole", formula, "--out", tmp_path / "losses.png")
    assert code == 0 and "whole and $x^$ are the same" in said and (tmp_path / "losses.png").exists()


def test_other_runs_part_where_they_do(runs, capfd):
    code, said = compare(capfd, runs / "whole", runs / "other")
    assert code == 1 and "whole and other are NOT the same in 18 steps" in said
    assert "setting lr: 0.001 | 0.00101\n" in said and "numbers: output_dir, log_dir, print_freq" in said
    # The rate rises from 0: it differs after the first step, and the loss after the second.
    assert "first different step: 2, learning rate 0.000166666667 | 0.000168333333 (" in said
    assert "first different step: 2, loss" not in said and "first different epoch: 0, train_loss" in said
    largest = max(
        (relative_difference(a["loss"], b["loss"]), a["step"])
        for a, b in zip(*(read_lines(runs / name / "steps.jsonl") for name in ("whole", "other")))
    )
    assert f"largest difference, at step {largest[1]}: loss" in said and f" {largest[0]:.1e})" in said
    assert compare(capfd, runs / "whole", runs / "other", "--tolerance", "0.02")[0] == 0


def test_one_bit_is_a_difference_and_a_shorter_run_counts_as_far_as_it_goes(runs, capfd, tmp_path):
    def last_bit(config, steps):
        steps[7]["loss"] *= 1 + 2**-52

    def shorter(config, steps):
        del steps[7:]

    code, said = compare(capfd, runs / "whole", changed(runs / "whole", tmp_path / "bit", last_bit))
    assert code == 1 and "first different step: 8, loss" in said and "learning rate" not in said
    code, said = compare(capfd, runs / "whole", changed(tmp_path / "bit", tmp_path / "short", shorter))
    assert code == 0 and "to the bit in 7 steps that both have (of 18 | 7)" in said


def test_values_that_are_not_finite(runs, capfd, tmp_path):
    def spoil(config, steps):
        steps[3]["loss"] = None

    one = changed(runs / "whole", tmp_path / "one", spoil)
    code, said = compare(capfd, runs / "whole", one, "--tolerance", "100")
    assert code == 1 and "first different step: 4, loss" in said and "nan (relative difference inf)" in said
    assert compare(capfd, one, shutil.copytree(one, tmp_path / "two"))[0] == 0
    assert relative_difference(0.0, 0.0) == 0 and relative_difference(-1.0, 1.0) == 2


def test_data_versions_and_earlier_starts_are_compared(runs, capfd, tmp_path):
    def change(config, steps):
        config["data"]["train"] |= {"images": 23, "names": "?"}
        config["environment"]["versions"] = config["environment"]["versions"].replace("torch 2", "torch 1", 1)
        config["environment"]["commit"] = "0123"
        config["config"] |= {"seed": 7, "accum_iter": 2, "more": 1, "start_epoch": 1}
        config["earlier"] = [{"until_step": 5, "environment": {"commit": "abc", "command": "..."}}]

    _, said = compare(capfd, runs / "whole", changed(runs / "whole", tmp_path / "whole", change))
    ours = runs / "whole"  # names that are the same become paths
    assert f"{ours} and {tmp_path / 'whole'} are the same to the bit" in said
    assert "train images: 24 | 23; what differs: their number, their names or order\n" in said
    assert "versions: torch 2" in said and "| torch 1" in said and "torchvision" not in said
    assert "| 0123\n" in said and f"settings of {tmp_path / 'whole'} alone: more" in said
    assert f"{tmp_path / 'whole'} had other values until step 5: " + '{"commit": "abc"}' in said
    assert "setting start_epoch: 0 | 1 (what the run started from)" in said
    assert said.index("setting seed: 0 | 7\n") < said.index("setting accum_iter: 1 | 2 (steps are made of other images")


def test_runs_of_older_versions_are_compared(runs, capfd, tmp_path):
    def older(config, steps):
        del config["free"], config["other_bits"], config["data"]

    paths = [changed(runs / name, tmp_path / name, older) for name in ("whole", "killed")]
    code, said = compare(capfd, *paths)
    assert code == 0 and "setting " not in said and "without effect on the numbers: output_dir, log_dir, resume" in said


def test_mistakes_are_explained(runs, capfd, tmp_path):
    fails(util.compare_runs, capfd, "is not the output folder of a run", runs / "whole", tmp_path)
    fails(util.compare_runs, capfd, "the following arguments are required|RUN", runs / "whole")
    both = runs / "whole", runs / "other"
    fails(util.compare_runs, capfd, "--out must end in .png, .pdf or .svg, got a.jpg", *both, "--out", "a.jpg")
    fails(util.compare_runs, capfd, "--tolerance must not be negative", *both, "--tolerance", -1)

    def later(config, steps):
        for step in steps:
            step["step"] += 100

    other = changed(runs / "whole", tmp_path / "later", later)
    message = "no optimizer step in common: whole has steps 1 to 18, later has steps 101 to 118"
    fails(util.compare_runs, capfd, message, runs / "whole", other)


def test_runs_of_other_programs_are_refused(runs, capfd, tmp_path):
    def classify(config, steps):
        config["program"] = "main_finetune.py"

    def classify_before_programs_were_recorded(config, steps):
        del config["program"], config["config"]["mask_ratio"]
        config["config"]["nb_classes"] = 10

    def segment(config, steps):
        config["program"] = "exp/ade20k/upernet.py"

    finetuned = changed(runs / "whole", tmp_path / "finetuned", classify)
    older = changed(runs / "whole", tmp_path / "older", classify_before_programs_were_recorded)
    segmenter = changed(finetuned, tmp_path / "segmenter", segment)
    message = "not the same kind of run.*whole is of main_pretrain.py, finetuned of main_finetune.py"
    fails(util.compare_runs, capfd, message, runs / "whole", finetuned)
    message = "segmenter is of exp/ade20k/upernet.py, older of main_finetune.py"
    fails(util.compare_runs, capfd, message, segmenter, older)
    assert compare(capfd, finetuned, older)[0] == 0


def test_the_axis_of_differences_has_a_decade_at_least():
    for values, limits in (
        ([8.9e-8, 9.5e-8], (1e-8, 1e-7)),
        ([1e-3], (1e-3, 1e-2)),
        ([2e-9, 3e-4], (1e-9, 1e-3)),
    ):
        assert whole_decades(np.array(values)) == pytest.approx(limits)


# --- What a run was made with ---


def test_a_run_records_what_it_was_made_with(runs):
    content = json.loads((runs / "whole" / "config.json").read_text())
    for package in ("Python", "torch", "torchvision", "timm", "numpy", "Pillow"):
        assert f"{package} " in content["environment"]["versions"]
    assert content["environment"]["command"].startswith("main_pretrain.py --model mixmae_quickstart")
    assert content["data"]["train"]["images"] == 24
    assert ("-dirty" in content["environment"]["commit"]) == (runs / "whole" / "uncommitted.diff").exists()
    assert {"num_workers", "output_dir"} <= set(content["free"]) and "lr" not in content["free"]
    assert "rounds differently" in content["other_bits"]["deterministic"] and "earlier" not in content


def test_a_resumed_run_records_what_differed_before(runs, tmp_path):
    """Another number of workers changes no numbers and is not kept; another precision is."""
    out = shutil.copytree(runs / "whole", tmp_path / "out")
    flags = (*RECIPE, "--data_path", runs / "images", "--output_dir", out, "--resume", "auto", "--max_pixels", 10**6)
    Trial(tmp_path, *flags).finish()
    content = json.loads((out / "config.json").read_text())
    [earlier] = content["earlier"]
    earlier.pop("environment", None)  # where somebody committed something in the meantime
    assert earlier == {"until_step": 18, "config": {"max_pixels": 250_000_000}}
    Trial(tmp_path, *flags).finish()
    assert [start["until_step"] for start in json.loads((out / "config.json").read_text())["earlier"]] == [18]


def test_uncommitted_changes_are_recorded(tmp_path, monkeypatch):
    code = tmp_path / "code"
    code.mkdir()
    git = ["git", "-C", code, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    provenance.ask_git.cache_clear()
    monkeypatch.setattr(provenance, "ROOT", code)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert provenance.describe_commit() == "unknown (git is missing, or this is not a git checkout)"
    (code / "a.py").write_text("a = 1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    clean = provenance.describe_commit()
    assert len(clean) == 12
    described = []
    for text in ("a = 2\n", "a = 3\n"):
        (code / "a.py").write_text(text)
        provenance.ask_git.cache_clear()  # as in another process
        described.append(provenance.describe_commit())
        assert described[-1].startswith(f"{clean}-dirty (uncommitted changes ")
        assert text.encode() in provenance.uncommitted_changes()
    assert described[0] != described[1]
    provenance.ask_git.cache_clear()


def test_uncommitted_changes_are_written_where_config_json_tells_of_some(tmp_path, monkeypatch):
    """Not those that somebody makes between the two questions to git; the file is replaced as a whole."""
    config = PretrainConfig(data_path=str(tmp_path), output_dir=str(tmp_path), device="cpu")
    state = SimpleNamespace(program="a", settings={}, data={}, progress=SimpleNamespace(step=0))

    def write(commit: str, changes: bytes) -> bytes | None:
        monkeypatch.setattr(provenance, "describe_commit", lambda: commit)
        monkeypatch.setattr(provenance, "uncommitted_changes", lambda: changes)
        provenance.write_provenance(config, state)
        found = tmp_path / "uncommitted.diff"
        return found.read_bytes() if found.exists() else None

    assert write("0123-dirty (uncommitted changes 45)", b"first") == b"first"
    with open(tmp_path / "uncommitted.diff", "rb") as earlier:
        assert write("0123-dirty (uncommitted changes 67)", b"second") == b"second"
        assert earlier.read() == b"first"
    assert write("0123", b"of another moment") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]
