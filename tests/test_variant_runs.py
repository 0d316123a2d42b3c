"""Runs of variants of the method: they train, resume, are drawn, and say what does not go together."""

import pytest
from running import fails, make_images, run
from trials import TINY, steps_of

import main_pretrain
import models_mixmae
from util import visualize
from util.run.config import compare_recipes
from util.run.flags import given_flags
from util.run.reconstruction import load_model
from util.seeding import keyed_generator
from util.weights.file import write_checkpoint


@pytest.mark.parametrize(
    "flags",
    [
        ["--mix_images", "3", "--mask_ratio", "0.67", "--mix_embed"],
        ["--mask_per_pair", "--mix_embed", "--no_masked_attn"],
        ["--fill", "mask_token", "--no_masked_attn", "--decoder_dim", "32"],
    ],
)
def test_a_run_of_a_variant_trains_resumes_and_is_drawn(flags, tmp_path, capfd):
    make_images(tmp_path / "images", 12)
    common = [*TINY, "--batch_size", "6", "--data_path", tmp_path / "images", *flags]
    run(main_pretrain, *common, "--vis_every", "1", "--epochs", "3", "--output_dir", tmp_path / "whole")
    run(
        main_pretrain,
        *common,
        "--epochs",
        "3",
        "--output_dir",
        tmp_path / "run",
        "--save_steps",
        "2",
        "--keep_checkpoints",
        "9",
    )
    checkpoint = sorted((tmp_path / "run").glob("checkpoint-0*.pth"))[0]
    capfd.readouterr()
    run(main_pretrain, *common, "--epochs", "3", "--output_dir", tmp_path / "again", "--resume", checkpoint)
    whole, again = ([step["loss"] for step in steps_of(tmp_path / name)] for name in ("whole", "again"))
    assert len(whole) == 6 and again[-4:] == whole[-4:]
    out = tmp_path / "picture.png"
    run(visualize, "--checkpoint", tmp_path / "whole/checkpoint.pth", "--images", tmp_path / "images", "--out", out)
    assert out.exists() and (tmp_path / "whole/reconstructions/epoch0003.png").exists()


def test_a_run_of_an_older_version_is_not_resumed_as_a_variant():
    """What it does not record was the released method."""
    now = {"lr": 1e-3, "mix_images": 2, "partners": "cycle", "mix_embed": False}
    errors, warnings = compare_recipes({"lr": 1e-3}, now, main_pretrain.PretrainConfig)
    assert errors == ["partners: pairs -> cycle"] and not warnings


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mix_images", "3", "--batch_size", "32"], "--batch_size must be a multiple of --mix_images 3; got 32"),
        (["--mask_per_pair", "--partners", "cycle"], "--mask_per_pair needs pairs"),
        (["--fill", "zero"], "add --no_masked_attn"),
        (["--decoder_num_heads", "5"], "of decoder_num_heads, got decoder_dim=64"),
    ],
)
def test_flags_that_exclude_each_other_are_one_line(flags, message, tmp_path, capfd):
    make_images(tmp_path / "images", 8)
    common = [*TINY, "--data_path", tmp_path / "images", "--epochs", "1", "--output_dir", tmp_path / "run"]
    fails(main_pretrain, capfd, message, *common, *flags)


def test_a_picture_hides_what_its_flag_says(tmp_path):
    """Whatever the run added to it at random."""
    model = models_mixmae.mixmae_quickstart(in_chans=1)
    args = {"model": "mixmae_quickstart", "in_chans": 1, "mean": (0.2,), "std": (0.3,), "range_mask_ratio": 0.4}
    write_checkpoint(tmp_path / "run.pth", {"model": model.state_dict(), "args": args})
    flags = ["--checkpoint", str(tmp_path / "run.pth"), "--images", "unused", "--out", "picture.png"]
    model, _, _ = load_model(given_flags(visualize.VisualizeConfig, visualize.get_args_parser().parse_args(flags)))
    assert {int(model.random_masking(0.75, keyed_generator(seed)).sum()) for seed in range(20)} == {12}


def test_going_on_with_another_variant_is_pointed_out(tmp_path, capfd):
    make_images(tmp_path / "images", 12)
    common = [*TINY, "--batch_size", "6", "--epochs", "1", "--data_path", tmp_path / "images"]
    flags = ["--no_masked_attn", "--mask_ratio", "0.75"]
    run(main_pretrain, *common, *flags, "--output_dir", tmp_path / "before")
    further = [*common, "--finetune", tmp_path / "before" / "checkpoint.pth"]
    run(main_pretrain, *further, *flags, "--output_dir", tmp_path / "same")
    assert "another variant" not in capfd.readouterr().out
    run(main_pretrain, *further, "--output_dir", tmp_path / "other")
    said = capfd.readouterr().out
    assert (
        "masked_attn False (here: True), mask_ratio 0.75 (here: 0.5); to go on with that, give the same flags" in said
    )
