"""A step that ended a run can be run again, and the image and layer that spoil it are named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from running import fails, run
from trials import TINY, Trial, nan_gradient, steps_of

import main_finetune
from util import replay
from util.weights.file import read_checkpoint, write_checkpoint

SMALL = (*TINY, "--input_size", "16", "--window_size", "4", "4", "4", "2", "--epochs", "1", "--nan_dump")
STATISTICS = ("--mean", "0", "--std", "1")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two classes of 8 arrays each, one array with values as large as float32 has them."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for i in range(8):
                np.save(folder / split / name / f"{i}.npy", generator.random((16, 16, 1), dtype=np.float32))
    np.save(folder / "train" / "b" / "3.npy", np.full((16, 16, 1), -3e38, dtype=np.float32))
    return folder


def dumped(trial: Trial, output_dir: Path) -> tuple[dict, list[str]]:
    """The dump that a failed run left, and what its replay says."""
    said = trial.finish(1)
    path = output_dir / "nan_dump_rank0.pth"
    assert f"Batch and state are in {path}: see python -m util.replay" in said
    dump = replay.read_dump(path)
    return dump, list(replay.replay(dump, torch.device("cpu")))


def spoiled_image(dump: dict) -> tuple[int, int]:
    """Micro-batch and position in it of the array with the large values."""
    return next(
        (number, position)
        for number, micro in enumerate(dump["batch"])
        for position, img in enumerate(micro["imgs"])
        if img.abs().max() > 1e30
    )


def test_pretraining_step_with_a_spoiled_image(images, tmp_path):
    flags = (*SMALL, *STATISTICS, "--accum_iter", "2", "--drop_path", "0.3", "--output_dir", tmp_path)
    dump, lines = dumped(Trial(tmp_path, *flags, "--data_path", images), tmp_path)
    number, position = spoiled_image(dump)
    assert len(dump["batch"]) == 2
    assert lines[0].startswith(f"mixmae_quickstart at {dump['where']}, in fp32 on cpu")
    said = "\n".join(lines)
    assert f"micro-batch {number}, image {position}: extreme values, from -3e+38 to -3e+38 standard deviations" in said
    assert f"micro-batch {number}: 4 images, loss nan (NOT FINITE)" in said
    assert f"micro-batch {number}, first output that is not finite: patch_embed.norm (LayerNorm): " in said
    assert "of its output; its input is finite, up to" in said
    assert f"micro-batch {number}, gradients that are not finite: " in said
    other = 1 - number
    assert f"micro-batch {other}, image" not in said and f"micro-batch {other}, first" not in said
    assert f"micro-batch {other}: gradient norm" in said


def test_finetuning_step_with_a_spoiled_image(images, tmp_path):
    flags = (*without(SMALL, "--vis_every", "--knn_every"), *STATISTICS, "--model", "swin_quickstart")
    flags = (*flags, "--batch_size", "8", "--aa", "", "--mixup", "0.8", "--cutmix", "1", "--drop_path", "0.3")
    flags = (*flags, "--data_path", images, "--output_dir", tmp_path)
    dump, lines = dumped(Trial(tmp_path, *flags, main=main_finetune), tmp_path)
    _, position = spoiled_image(dump)
    said = "\n".join(lines)
    assert f"micro-batch 0, image {position}: extreme values" in said
    assert "micro-batch 0: 8 images, loss nan (NOT FINITE)" in said
    assert "first output that is not finite: patch_embed.norm" in said


def without(flags: tuple, *names: str) -> list:
    """`flags` less some, with their values."""
    kept = list(flags)
    for name in names:
        position = kept.index(name)
        del kept[position : position + 2]
    return kept


def test_a_repeated_step_has_the_losses_of_the_run(images, tmp_path):
    """The spoiled gradient came from outside, so the replay is fine, and shows the loss that the run would have had."""
    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    (data / "train" / "a").symlink_to(images / "train" / "a")
    flags = (*SMALL, "--data_path", data, "--drop_path", "0.3", "--epochs", "2", "--range_mask_ratio", "0.3")
    spoiled = Trial(tmp_path, *flags, "--output_dir", tmp_path / "spoiled", sabotage=nan_gradient(3))
    _, lines = dumped(spoiled, tmp_path / "spoiled")
    Trial(tmp_path, *flags, "--output_dir", tmp_path / "whole").finish()
    third = steps_of(tmp_path / "whole")[2]
    assert f"micro-batch 0: 4 images, loss {third['loss']:.6g} (finite)" in lines
    assert f"micro-batch 0: gradient norm {third['grad_norm']:.4g}" in lines
    assert not any("not finite" in line for line in lines)


def test_bad_pixels_and_weights_are_named(images, tmp_path, capfd):
    """Also for a dump that was changed by hand: one pixel, one weight."""
    flags = (*SMALL, *STATISTICS, "--output_dir", tmp_path)
    dump, _ = dumped(Trial(tmp_path, *flags, "--data_path", images), tmp_path)
    number, position = spoiled_image(dump)
    dump["batch"][number]["imgs"][position] = 0.5
    dump["batch"][number]["imgs"][2, 0, 1, 1] = float("nan")
    dump["checkpoint"]["model"]["layers.3.blocks.0.mlp.fc1.bias"][0] = float("inf")
    write_checkpoint(tmp_path / "changed.pth", dump)
    run(replay, "--dump", tmp_path / "changed.pth", "--device", "cpu", "--precision", "bf16")
    said = capfd.readouterr().out
    assert ", in bf16 on cpu" in said
    assert "weights before the step that are not finite: ['layers.3.blocks.0.mlp.fc1.bias']" in said
    assert f"micro-batch {number}, image 2: 1 of 256 values not finite" in said
    assert "first output that is not finite: patch_embed.proj (Conv2d): 16 of 16384 values not finite of its" in said
    assert "its input is not finite already" in said


def test_other_files_are_refused(images, tmp_path, capfd):
    write_checkpoint(tmp_path / "checkpoint.pth", {"model": {"a": torch.ones(1)}})
    fails(replay, capfd, r"checkpoint\.pth is not a dump of a bad step", "--dump", tmp_path / "checkpoint.pth")
    fails(replay, capfd, r"nowhere\.pth does not exist", "--dump", tmp_path / "nowhere.pth")
    assert read_checkpoint(tmp_path / "checkpoint.pth")  # left as it was
