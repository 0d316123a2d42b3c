"""A resumed run equals an uninterrupted one to the bit, or says what is no longer identical, or refuses."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from running import make_images, read_lines
from trials import TINY, Trial, differences, epochs_of, flip_byte, state_of, steps_of, stop_signal

import main_finetune
from util.run.optim import clip_and_step, make_scaler
from util.run.state import Progress, TrainingState, program_of
from util.weights.file import CheckpointError

# 2 epochs of 5 optimizer steps, each of 2 micro-batches of 2 images, with everything random in it.
RECIPE = (*TINY, "--batch_size", "2", "--accum_iter", "2", "--epochs", "2", "--drop_path", "0.3")
RECIPE = (*RECIPE, "--range_mask_ratio", "0.2", "--clip_grad", "1")
MICRO = 2


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `images` and with `reference`, the output of the uninterrupted run."""
    place = tmp_path_factory.mktemp("resume")
    make_images(place / "images", 22)
    Trial(place, *RECIPE, "--data_path", place / "images", "--output_dir", place / "reference").finish()
    return place


def stopped_at(place: Path, out: Path, step: int, *flags: object, signum: int = signal.SIGTERM) -> str:
    """Let a run begin in `out` and be asked to stop during optimizer step `step`; returns what it said."""
    trial = Trial(place, *flags, "--output_dir", out, sabotage=stop_signal(MICRO * step, signum))
    return trial.finish(75)


@pytest.mark.parametrize(
    "step, workers_before, workers_after, signum",
    [
        (1, 0, 2, signal.SIGTERM),
        (5, 2, 0, signal.SIGUSR1),  # an epoch's last step: the end of the epoch is still to be done
        (7, 3, 3, signal.SIGTERM),
        (9, 0, 0, signal.SIGUSR2),
        (3, 2, 0, signal.SIGINT),  # Ctrl-C
    ],
)
def test_resuming_at_any_step_changes_nothing(place, tmp_path, step, workers_before, workers_after, signum):
    flags = (*RECIPE, "--data_path", place / "images")
    said = stopped_at(place, tmp_path, step, *flags, "--num_workers", workers_before, signum=signum)
    assert f"stopped on request at epoch {(step - 1) // 5} step {(step - 1) % 5 + 1} (optimizer step {step} " in said
    checkpoint = state_of(tmp_path)
    assert (checkpoint["step"], checkpoint["step_in_epoch"]) == (step, (step - 1) % 5 + 1)
    said = Trial(place, *flags, "--output_dir", tmp_path, "--resume", "auto", "--num_workers", workers_after).finish()
    assert "resumed at" in said and "no longer" not in said and "another setting" not in said
    assert differences(tmp_path, place / "reference") == []
    assert len(steps_of(tmp_path)) == 10 and len(epochs_of(tmp_path)) == 2


def test_resuming_from_an_older_checkpoint_does_later_steps_again(place, tmp_path):
    out = tmp_path / "out"
    flags = (*RECIPE, "--data_path", place / "images", "--output_dir", out)
    Trial(place, *flags, "--save_steps", 3, "--keep_checkpoints", 9).finish()
    assert differences(out, place / "reference") == []
    Trial(place, *flags, "--resume", out / "checkpoint-00000006.pth").finish()
    assert differences(out, place / "reference") == []


def test_several_ranks_resume_exactly(place, tmp_path):
    """Three, since two numbers have the same sum in either order."""
    flags = (*RECIPE, "--accum_iter", 1, "--data_path", place / "images", "--save_steps", 1, "--keep_checkpoints", 99)
    Trial(tmp_path, *flags, "--output_dir", tmp_path / "reference", ranks=3).finish()
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "reference", out)
    resume = ("--resume", out / "checkpoint-00000004.pth", "--print_freq", 5)
    Trial(tmp_path, *flags, "--output_dir", out, *resume, ranks=3).finish()
    assert differences(out, tmp_path / "reference", logs=False) == []
    assert steps_of(out) == steps_of(tmp_path / "reference") and epochs_of(out) == epochs_of(tmp_path / "reference")


def test_a_finished_run_is_left_as_it_is_and_no_new_one_replaces_it(place, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(place / "reference", out)
    flags = (*RECIPE, "--data_path", place / "images", "--output_dir", out)
    Trial(place, *flags, "--resume", "auto").finish()
    assert differences(out, place / "reference") == []
    said = Trial(place, *flags).finish(2)
    assert "holds a run already, which this one would replace: continue it with --resume auto" in said
    assert differences(out, place / "reference") == []


def test_fine_tuning_resumes_exactly_with_mixup_drop_path_and_averaged_weights(place, tmp_path):
    for split, seed in (("train", 0), ("val", 7)):
        for name in ("one", "other"):
            make_images(tmp_path / "data" / split / name, 8, seed=seed + len(name))
    flags = (
        *("--model", "swin_quickstart", "--in_chans", 1, "--device", "cpu", "--num_workers", 0, "--lr", "1e-3"),
        *("--data_path", tmp_path / "data", "--epochs", 2, "--batch_size", 4, "--warmup_epochs", 1, "--print_freq", 1),
        *("--mixup", 0.8, "--cutmix", 1.0, "--drop_path", 0.3, "--model_ema", "--model_ema_decay", 0.9, "--aa", ""),
    )
    flags = (*flags, "--save_steps", 1, "--keep_checkpoints", 99)
    out = tmp_path / "out"
    Trial(tmp_path, *flags, "--output_dir", out, main=main_finetune).finish()
    shutil.copytree(out, tmp_path / "reference")
    for step, workers in ((5, 2), (3, 0)):
        resume = ("--resume", out / f"checkpoint-{step:08d}.pth", "--num_workers", workers)
        Trial(tmp_path, *flags, "--output_dir", out, *resume, main=main_finetune).finish()
        assert differences(out, tmp_path / "reference") == []
    assert "model_ema" in state_of(out)


def test_other_batches_or_ranks_go_on_with_a_warning(place, tmp_path):
    flags = (*RECIPE, "--data_path", place / "images")
    stopped_at(place, tmp_path / "first", 8, *flags)
    for name, ranks, changed, warnings in (
        ("ranks", 2, ("--accum_iter", 1), ("world_size: 1 -> 2 (", "accum_iter: 2 -> 1 (")),
        ("batch", 1, ("--batch_size", 4), ("batch_size: 2 -> 4 (steps are made of other images",)),
    ):
        out = tmp_path / name
        shutil.copytree(tmp_path / "first", out)
        said = Trial(place, *flags, *changed, "--output_dir", out, "--resume", "auto", ranks=ranks).finish()
        for warning in warnings:
            assert f"resuming with another setting: {warning}" in said
        steps = steps_of(out)
        assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
        assert [line["epoch"] for line in epochs_of(out)] == [0, 1]
        if name == "ranks":  # the same effective batches, divided otherwise: equal but for rounding
            for line, expected in zip(steps, steps_of(place / "reference"), strict=True):
                assert line == pytest.approx(expected, rel=1e-4)
        else:  # 3 steps of epoch 1 were done: the first of its two twice as large ones; the other is left
            assert len(steps) == 8 + 1


def test_another_recipe_or_model_is_an_error_that_lists_the_differences(place, tmp_path):
    out = tmp_path / "out"
    flags = (*RECIPE, "--data_path", place / "images", "--output_dir", out, "--resume", "auto")
    stopped_at(place, out, 7, *flags)
    before = state_of(out)
    said = Trial(place, *flags, "--mask_ratio", 0.6, "--seed", 3).finish(2)
    assert "made with another model or recipe: mask_ratio: 0.5 -> 0.6; seed: 0 -> 3" in said
    assert "--resume_force" in said and "Traceback" not in said
    said = Trial(place, *flags, "--in_chans", 3).finish(2)
    assert "made with another model or recipe: in_chans: 1 -> 3; mean: " in said
    said = Trial(place, *flags, "--in_chans", 3, "--resume_force").finish(2)  # no force makes other shapes fit
    assert "does not fit this model" in said and "--finetune" in said
    assert "Traceback" not in said
    assert state_of(out).keys() == before.keys() and state_of(out)["step"] == 7
    said = Trial(place, *flags, "--mask_ratio", 0.6, "--resume_force").finish()
    assert "resuming by --resume_force with another recipe: mask_ratio: 0.5 -> 0.6" in said
    assert [line["step"] for line in steps_of(out)] == list(range(1, 11))


def test_a_checkpoint_that_was_named_is_used_or_is_an_error(place, tmp_path):
    flags = (*RECIPE, "--data_path", place / "images", "--output_dir", tmp_path / "out")
    said = Trial(place, *flags, "--resume", tmp_path / "absent.pth").finish(2)
    assert "absent.pth does not exist" in said and "Traceback" not in said
    damaged = tmp_path / "damaged.pth"
    shutil.copy(place / "reference" / "checkpoint.pth", damaged)
    flip_byte(damaged, 100_000)
    said = Trial(place, *flags, "--resume", damaged).finish(2)
    assert "is damaged" in said and "Traceback" not in said
    assert not (tmp_path / "out" / "steps.jsonl").exists()


def test_auto_skips_what_is_damaged_says_so_and_still_arrives(place, tmp_path):
    flags = (*RECIPE, "--data_path", place / "images", "--output_dir", tmp_path)
    stopped_at(place, tmp_path, 9, *flags, "--save_steps", 4)
    flip_byte(tmp_path / "checkpoint.pth", 2_000_000)
    said = Trial(place, *flags, "--resume", "auto").finish()
    assert "not resuming from checkpoint-00000009.pth" in said and "is damaged" in said
    assert "after skipping 1 newer" in said
    assert "resumed at epoch 1 step 3 (optimizer step 8 of the run)" in said
    assert differences(tmp_path, place / "reference") == []


def test_the_mean_loss_of_an_epoch_does_not_depend_on_when_steps_were_reported(place, tmp_path):
    flags = (*RECIPE, "--data_path", place / "images", "--output_dir", tmp_path, "--print_freq", 4)
    stopped_at(place, tmp_path, 7, *flags)
    Trial(place, *flags, "--resume", "auto").finish()
    assert epochs_of(tmp_path) == epochs_of(place / "reference")
    assert read_lines(tmp_path / "steps.jsonl") == steps_of(place / "reference")


def test_another_runs_checkpoint_does_not_replace_the_run_in_the_output_folder(place, tmp_path):
    flags = (*RECIPE, "--data_path", place / "images")
    shutil.copytree(place / "reference", tmp_path / "other")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "other").iterdir())}
    other = ("--resume", place / "reference" / "checkpoint.pth", "--output_dir", tmp_path / "other")
    said = Trial(tmp_path / "logs", *flags, *other).finish(2)
    assert "holds a run already, which this one would replace" in said
    assert {path: path.read_bytes() for path in sorted((tmp_path / "other").iterdir())} == before


def test_whose_run_it_is_and_its_best_result_are_known_of_older_checkpoints_too():
    model = torch.nn.Linear(3, 2)
    scaler = make_scaler("fp32", torch.device("cpu"))
    state = TrainingState(
        model, torch.optim.AdamW(model.parameters()), scaler, {}, Progress(epoch=1), program="exp/task/train.py"
    )
    assert [state.progress.is_best(result) for result in (-2.0, 80.0, 80.0, 79.0)] == [True, True, False, False]
    checkpoint = state.checkpoint()
    assert program_of(checkpoint) == "exp/task/train.py" and checkpoint["best"] == 80
    older = {name: value for name, value in checkpoint.items() if name not in ("program", "best")}
    state.restore(older, steps_per_epoch=1)
    assert state.progress.best is None and program_of(older) is None
    state.restore(older | {"best_acc1": 70.0}, steps_per_epoch=1)
    assert state.progress.best == 70
    spoiled = {"model": model.state_dict() | {"bias": torch.tensor([0.0, torch.nan])}}
    with pytest.raises(CheckpointError, match=r"--resume: the checkpoint holds weights .* not finite .* in bias: "):
        state.restore(older | spoiled, steps_per_epoch=1)
    for flag, program in (("mask_ratio", "main_pretrain.py"), ("nb_classes", "main_finetune.py")):
        assert program_of(older | {"args": {flag: None}}) == program


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_an_optimizers_settings_are_those_of_the_run_and_its_moments_those_of_the_file():
    """A checkpoint of another program has no fused optimizer, and --resume_force may change the weight decay."""

    def state(**settings) -> TrainingState:
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **settings)
        return TrainingState(model, optimizer, make_scaler("fp32", torch.device("cpu")), {}, Progress())

    theirs, ours = state(weight_decay=0.01), state(weight_decay=0.5, fused=True)
    for some in (theirs, ours):
        some.model(torch.ones(1, 3)).sum().backward()
    theirs.optimizer.step()
    ours.load(theirs.checkpoint())
    group = ours.optimizer.param_groups[0]
    assert group["weight_decay"] == 0.5 and group["fused"]
    moments = [some.optimizer.state_dict()["state"][0]["exp_avg"] for some in (theirs, ours)]
    assert torch.equal(*moments)
    before = ours.model.weight.detach().clone()
    clip_and_step(ours.optimizer, ours.scaler, ours.model.parameters(), None)
    assert not torch.equal(before, ours.model.weight)
    with torch.device("meta"):  # in place of a GPU, where a fused optimizer wants its step counts
        elsewhere = state()
    elsewhere.optimizer.param_groups[0]["fused"] = True
    elsewhere.load(theirs.checkpoint())
    assert all(entry["step"].is_meta for entry in elsewhere.optimizer.state.values())
