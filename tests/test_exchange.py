"""Files of the authors' programs: a run of theirs goes on here, with its optimizer, and under its own recipe only.

The stand-ins are files of this program, stripped of what only it writes and ordered as theirs are.
"""

import argparse
from pathlib import Path

import pytest
import torch
from running import make_images, read_lines, run
from trials import same

import main_finetune
import main_pretrain
from util.weights.file import read_checkpoint

SHAPE = ["--device", "cpu", "--num_workers", "0", "--input_size", "16", "--window_size", "4", "4", "4", "2"]
SHAPE += ["--in_chans", "1", "--warmup_epochs", "1", "--batch_size", "4", "--lr", "1e-3"]
PRETRAIN = [*SHAPE, "--model", "mixmae_quickstart", "--vis_every", "0", "--norm_pix_loss"]
FINETUNE = [*SHAPE, "--model", "swin_quickstart"]
NOT_THEIRS = ("in_chans", "patch_size", "window_size", "mean", "std", "precision", "compile", "grad_checkpointing")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for number, name in enumerate("ab"):
            make_images(folder / split / name, 8, (16, 16), seed=number)
    return folder


def as_theirs(path: Path, target: Path, swap_groups: bool = False, **settings) -> Path:
    """Write a run's checkpoint as the authors' program would have."""
    checkpoint = read_checkpoint(path)
    recorded = {name: value for name, value in checkpoint["args"].items() if name not in NOT_THEIRS}
    recorded |= {"input_size": recorded["input_size"][0], "gpu": 0, "dist_backend": "nccl", **settings}
    groups = checkpoint["optimizer"]["param_groups"]
    for group in groups:
        group.pop("name", None)
    if swap_groups:  # tensors of a stage's patch merging are registered in another order
        moments = checkpoint["optimizer"]["state"]
        for i in range(len(groups) - 1):
            if groups[i]["lr_scale"] == groups[i + 1]["lr_scale"] and i % 4 == 2:
                groups[i], groups[i + 1] = groups[i + 1], groups[i]
        renumbered, state = [], {}
        for group in groups:
            old = group["params"]
            group["params"] = list(range(len(renumbered), len(renumbered) + len(old)))
            state |= {new: moments[before] for new, before in zip(group["params"], old) if before in moments}
            renumbered += old
        checkpoint["optimizer"]["state"] = state
    kept = {name: checkpoint[name] for name in ("model", "optimizer", "scaler", "epoch")}
    torch.save({**kept, "args": argparse.Namespace(**recorded)}, target)
    return target


def test_a_fine_tuning_run_goes_on_whatever_the_order_of_its_groups(images, tmp_path, capfd):
    """The whole run, against one that goes on from a file without names whose groups are swapped."""
    flags = [*FINETUNE, "--data_path", images, "--aa", "", "--reprob", "0", "--epochs", "2", "--keep_every", "1"]
    run(main_finetune, *flags, "--output_dir", tmp_path / "whole")
    theirs = as_theirs(tmp_path / "whole" / "checkpoint-epoch0001.pth", tmp_path / "theirs.pth", swap_groups=True)
    original = read_checkpoint(tmp_path / "whole" / "checkpoint-epoch0001.pth")["optimizer"]["param_groups"]
    swapped = read_checkpoint(theirs)["optimizer"]["param_groups"]
    assert [len(group["params"]) for group in original] != [len(group["params"]) for group in swapped]
    run(main_finetune, *flags, "--output_dir", tmp_path / "gone_on", "--resume", theirs)
    said = capfd.readouterr().out
    assert "the checkpoint was not written by this program" in said
    whole, gone_on = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "gone_on"))
    assert same(whole["model"], gone_on["model"]) and same(whole["optimizer"], gone_on["optimizer"])


def test_groups_that_do_not_fit_are_named(images, tmp_path, capfd):
    flags = [*FINETUNE, "--data_path", images, "--aa", "", "--output_dir", tmp_path / "out"]
    run(main_finetune, *flags, "--epochs", "1")
    theirs = as_theirs(tmp_path / "out" / "checkpoint.pth", tmp_path / "theirs.pth")
    checkpoint = read_checkpoint(theirs)
    groups = checkpoint["optimizer"]["param_groups"]
    groups[0]["params"], groups[1]["params"] = [*groups[0]["params"], groups[1]["params"][0]], groups[1]["params"][1:]
    torch.save(checkpoint, theirs)
    with pytest.raises(SystemExit):
        run(main_finetune, *flags, "--output_dir", tmp_path / "other", "--epochs", "1", "--resume", theirs)
    said = capfd.readouterr().err
    assert "does not fit this model or optimizer: none of its optimizer's parameter groups has the" in said
    assert "tensors of this run's group 'layer 0, weight decay'" in said or "'layer 0, no weight decay'" in said


def test_a_run_with_another_recipe_is_refused(images, tmp_path, capfd):
    flags = [*PRETRAIN, "--data_path", images]
    run(main_pretrain, *flags, "--epochs", "1", "--output_dir", tmp_path / "out")
    theirs = as_theirs(
        tmp_path / "out" / "checkpoint.pth", tmp_path / "theirs.pth", mask_ratio=0.9, norm_pix_loss=False
    )
    with pytest.raises(SystemExit) as stopped:
        run(main_pretrain, *flags, "--epochs", "2", "--output_dir", tmp_path / "other", "--resume", theirs)
    said = capfd.readouterr().err
    assert stopped.value.code == 2
    assert "another model or recipe: epochs: 1 -> 2; mask_ratio: 0.9 -> 0.5; norm_pix_loss: False -> True" in said
    assert not (tmp_path / "other" / "steps.jsonl").exists()


def test_a_run_with_the_same_recipe_goes_on(images, tmp_path, capfd):
    """Theirs records sizes as one number, and models by another name."""
    flags = [*PRETRAIN, "--data_path", images, "--epochs", "2", "--keep_every", "1"]
    run(main_pretrain, *flags, "--output_dir", tmp_path / "whole")
    first = tmp_path / "whole" / "checkpoint-epoch0001.pth"
    theirs = as_theirs(first, tmp_path / "theirs.pth", model="mixmim_quickstart")
    run(main_pretrain, *flags, "--output_dir", tmp_path / "gone_on", "--resume", theirs)
    assert "another recipe" not in capfd.readouterr().out
    whole, gone_on = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "gone_on"))
    assert same(whole["model"], gone_on["model"])


def test_a_finished_run_of_theirs_has_no_best_accuracy_to_tell(images, tmp_path, capfd):
    flags = [*FINETUNE, "--data_path", images, "--aa", "", "--epochs", "1"]
    run(main_finetune, *flags, "--output_dir", tmp_path / "out")
    acc1 = read_lines(tmp_path / "out" / "log.txt")[-1]["test_acc1"]
    theirs = as_theirs(tmp_path / "out" / "checkpoint.pth", tmp_path / "theirs.pth")
    capfd.readouterr()
    run(main_finetune, *flags, "--output_dir", tmp_path / "again", "--resume", theirs)
    said = capfd.readouterr().out
    assert f"result: top-1 {acc1:.3f}%" in said and "best top-1" not in said


def test_a_head_that_fits_is_drawn_anew_on_request_as_theirs_always_is(images, tmp_path, capfd):
    flags = [*FINETUNE, "--data_path", images, "--aa", "", "--epochs", "1"]
    run(main_finetune, *flags, "--output_dir", tmp_path / "first")
    start = ["--finetune", tmp_path / "first" / "checkpoint.pth", "--lr", "0", "--min_lr", "0"]
    run(main_finetune, *flags, *start, "--output_dir", tmp_path / "kept")
    run(main_finetune, *flags, *start, "--reset_head", "--output_dir", tmp_path / "drawn")
    first, kept, drawn = (
        read_checkpoint(tmp_path / name / "checkpoint.pth")["model"] for name in ("first", "kept", "drawn")
    )
    assert torch.equal(kept["head.weight"], first["head.weight"])
    assert drawn["head.weight"].std() == pytest.approx(2e-5, rel=0.3) and not drawn["head.bias"].any()
    assert torch.equal(drawn["norm.weight"], first["norm.weight"])
    assert "not in the file, so at their initial values: head.weight" in capfd.readouterr().out


def test_flags_of_their_scripts_are_understood():
    parsed = main_finetune.get_args_parser().parse_args(["--resplit", "--dist_eval", "--no_pin_mem"])
    assert parsed.resplit and parsed.dist_eval and not parsed.pin_mem
