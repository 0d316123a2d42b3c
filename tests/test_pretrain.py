"""Pretraining runs from the command line's flags: kinds of data, ranks, logs, and every mistake's message."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import QUICK, fails, losses, make_images, read_lines, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
import util.check_data
from util.weights.file import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    *QUICK,
    "--model",
    "mixmae_quickstart",
    "--in_chans",
    "1",
    "--batch_size",
    "4",
    "--epochs",
    "2",
    "--lr",
    "1e-3",
]


@pytest.fixture
def images(tmp_path) -> Path:
    make_images(tmp_path / "images" / "train" / "a", 6)
    make_images(tmp_path / "images" / "train" / "b", 6, seed=1)
    return tmp_path / "images"


def test_a_run_trains_and_leaves_its_records(images, tmp_path, capfd):
    out = tmp_path / "out"
    flags = ["--data_path", images, "--output_dir", out, "--norm_pix_loss", "--epochs", "12", "--vis_every", "6"]
    run(main_pretrain, *SMALL, *flags)
    said = capfd.readouterr().out
    assert "command:" in said and "commit" in said and "torch 2" in said
    assert "0.4 M parameters, 0.02 G multiply-adds" in said
    assert "effective batch 4 = 4 images x 1 micro-batches x 1 ranks; learning rate 0.001" in said
    for word in ("epoch 3", "step 2/3", "loss", "lr", "grad norm", "images/s", "data wait", "memory", "ETA"):
        assert word in said

    epochs = read_lines(out / "log.txt")
    assert [record["epoch"] for record in epochs] == list(range(12))
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    steps = read_lines(out / "steps.jsonl")
    assert [record["step"] for record in steps] == list(range(1, 37))
    assert steps[0]["lr"] == 0 and steps[3]["lr"] == pytest.approx(1e-3)  # one epoch of warm-up, per iteration
    assert epochs[2]["train_loss"] == pytest.approx(sum(record["loss"] for record in steps[6:9]) / 3)

    events = EventAccumulator(str(out))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [int(1000 * (i + 1) / 3) for i in range(36)]
    assert {"train/lr", "train/grad_norm", "speed/images_per_second"} <= set(events.Tags()["scalars"])
    assert len(events.Images("reconstructions")) == 4
    pictures = sorted(path.stem for path in (out / "reconstructions").iterdir())
    assert pictures == ["epoch0000", "epoch0001", "epoch0006", "epoch0012"]  # before training and after its first epoch
    assert f"picture: {out / 'reconstructions' / 'epoch0000.png'}" in said
    assert "  epochs 12, steps 36, starts 1\n" in said and "goodput" in said and "training loss: best" in said

    checkpoint = torch.load(out / "checkpoint.pth", weights_only=True)
    assert checkpoint["epoch"] == 11 and checkpoint["step"] == 36
    assert checkpoint["args"]["mask_ratio"] == 0.5 and checkpoint["args"]["input_size"] == (32, 32)


def test_axis_of_tensorboard_does_not_depend_on_accumulation(images, tmp_path):
    for accum_iter in ("1", "2"):
        out = tmp_path / accum_iter
        batch = ["--batch_size", str(4 // int(accum_iter)), "--accum_iter", accum_iter]
        run(main_pretrain, *SMALL, *batch, "--data_path", images, "--output_dir", out)
    axes = []
    for accum_iter in ("1", "2"):
        events = EventAccumulator(str(tmp_path / accum_iter))
        events.Reload()
        axes.append([event.step for event in events.Scalars("train/loss")])
    assert axes[0] == axes[1]


def test_flat_nested_and_listed_images_give_the_same_run(tmp_path):
    make_images(tmp_path / "flat", 8)
    (tmp_path / "nested" / "x" / "y").mkdir(parents=True)
    for i, path in enumerate(sorted((tmp_path / "flat").iterdir())):
        target = tmp_path / "nested" / ("x/y" if i >= 4 else "") / path.name
        target.symlink_to(path)
    (tmp_path / "list.txt").write_text("".join(f"flat/{i:04d}.png\n" for i in range(8)))
    for source in ("flat", "nested", "list.txt"):
        run(main_pretrain, *SMALL, "--data_path", tmp_path / source, "--output_dir", tmp_path / f"out_{source}")
    assert losses(tmp_path / "out_flat") == losses(tmp_path / "out_list.txt") == losses(tmp_path / "out_nested")


def test_sixteen_channels_not_square(tmp_path):
    make_images(tmp_path / "images", 8, size=(40, 70), channels=16)
    flags = ["--in_chans", "16", "--input_size", "32", "64", "--vis_every", "1", "--norm_pix_loss"]
    run(main_pretrain, *SMALL, *flags, "--data_path", tmp_path / "images", "--output_dir", tmp_path / "out")
    assert len(losses(tmp_path / "out")) == 4
    model = read_checkpoint(tmp_path / "out" / "checkpoint.pth")["model"]
    assert model["patch_embed.proj.weight"].shape[1] == 16 and model["decoder_pos_embed"].shape[1] == 4 * 8
    assert (tmp_path / "out" / "reconstructions" / "epoch0002.png").exists()


def test_authors_model_name_and_weights_to_start_from(images, tmp_path, capfd):
    run(main_pretrain, *SMALL, "--data_path", images, "--output_dir", tmp_path / "first")
    flags = ["--model", "mixmim_quickstart", "--finetune", tmp_path / "first" / "checkpoint.pth", "--lr", "1e-12"]
    run(main_pretrain, *SMALL, *flags, "--data_path", images, "--output_dir", tmp_path / "second")
    assert "loaded 101 tensors" in capfd.readouterr().out
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "first")[0]


def test_bf16_and_grad_checkpointing_stay_close_to_fp32(images, tmp_path):
    for name, flags in (("fp32", []), ("bf16", ["--precision", "bf16"]), ("again", ["--grad_checkpointing"])):
        run(main_pretrain, *SMALL, *flags, "--data_path", images, "--output_dir", tmp_path / name)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "fp32"), rel=1e-6)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=2e-2)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")


def launch(script: str, processes: int, *flags: object) -> str:
    """Run a script with its own processes, through torchrun when there are several; returns what it said."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), ROOT / script, *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_two_processes_equal_one_with_accumulation(images, tmp_path):
    """Randomness is keyed by the piece of the effective batch, so ranks and micro-batches see the same masks."""
    shared = [*SMALL, "--batch_size", "2", "--data_path", images, "--output_dir"]
    said = launch("main_pretrain.py", 2, *shared, tmp_path / "two")
    assert said.count("effective batch 4 = 2 images x 1 micro-batches x 2 ranks") == 1  # by one rank
    run(main_pretrain, *shared, tmp_path / "one", "--accum_iter", "2")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_two_processes_equal_one_of_twice_the_batch_under_a_fixed_mask(images, tmp_path):
    shared = [*SMALL, "--data_path", images, "--output_dir"]
    launch("tests/fixed_mask_pretrain.py", 2, *shared, tmp_path / "two", "--batch_size", "2")
    launch("tests/fixed_mask_pretrain.py", 1, *shared, tmp_path / "one", "--batch_size", "4")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


# --- Mistakes ---


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch_size", "3"], r"--batch_size must be even, since images are mixed in pairs; got 3"),
        (["--batch_size", "0"], r"--batch_size must be at least 1, got 0"),
        (["--batch_size", "16"], r"12 training images do not fill one effective batch of 16"),
        (["--mask_ratio", "1.0"], r"--mask_ratio must be above 0 and below 1, got 1.0"),
        (["--mask_ratio", "0.01"], r"hides 0 of 16 cells"),
        (["--mask_ratio", "0.8", "--range_mask_ratio", "0.3"], r"mask_ratio \+ range_mask_ratio below 1"),
        (["--model", "resnet50"], r"--model resnet50 is not known: give --model one of .*mixmae_base"),
        (["--input_size", "33"], r"sides must be multiples of 8, got input size 33x33; use 32x32"),
        (["--input_size", "1", "2", "3"], r"--input_size takes one side, or height and width"),
        (["--mean", "0.5", "0.5"], r"--mean needs one value for each of 1 channels"),
        (["--std", "0"], r"--std must be positive"),
        (["--epochs", "1", "--warmup_epochs", "3"], r"--warmup_epochs 3 is longer than the run: --epochs 1"),
        (["--epochs", "3", "--start_epoch", "3"], r"--start_epoch 3 leaves nothing to train: --epochs is 3"),
        (["--clip_grad", "-1"], r"--clip_grad must be positive, got -1"),
        (["--precision", "fp16"], r"--precision fp16 needs a GPU"),
        (["--resume", "nowhere.pth"], r"nowhere.pth"),
        (["--finetune", "nowhere.pth"], r"nowhere.pth"),
        (["--world_size", "2"], r"--world_size 2 contradicts the 1 process"),
        (["--dist_on_itp"], r"OMPI_COMM_WORLD_RANK"),
        (["--in_chans", "16"], r"16"),
    ],
)
def test_a_wrong_flag_is_explained_before_training(images, tmp_path, capfd, flags, message):
    fails(main_pretrain, capfd, message, *SMALL, "--data_path", images, "--output_dir", tmp_path / "out", *flags)
    assert not (tmp_path / "out" / "steps.jsonl").exists()


def test_flags_are_not_abbreviated(images, tmp_path, capfd):
    """The launch scripts look for --batch_size and --accum_iter by their names."""
    fails(main_pretrain, capfd, r"unrecognized arguments: --accum 3", *SMALL, "--data_path", images, "--accum", "3")


def test_a_mask_ratio_and_its_range_go_together(images, tmp_path):
    ratios = ["--mask_ratio", "0.25", "--range_mask_ratio", "0.6"]
    run(main_pretrain, *SMALL, *ratios, "--data_path", images, "--output_dir", tmp_path, "--epochs", "1")


def test_contradicting_launch_variables_are_explained(images, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    fails(main_pretrain, capfd, r"RANK=3.*WORLD_SIZE=2", *SMALL, "--data_path", images, "--output_dir", tmp_path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing", r"missing.* does not exist"),
        ("empty", r"no images"),
        ("text", r"broken\.png"),
        ("arrays", r"the array has shape \(32, 32, 5\), \(H, W, 6\) is needed"),
    ],
)
def test_bad_data_is_explained_before_training(tmp_path, capfd, name, message):
    data = tmp_path / name
    if name != "missing":
        data.mkdir()
    if name == "text":
        for i in range(8):
            (data / f"{i}broken.png").write_text("not an image")
    if name == "arrays":
        make_images(data, 8, channels=5)
    flags = ["--in_chans", "6"] if name == "arrays" else []
    fails(main_pretrain, capfd, message, *SMALL, *flags, "--data_path", data, "--output_dir", tmp_path / "out")


def test_a_run_beside_its_images_is_no_image_of_the_next_one(tmp_path, capfd, monkeypatch):
    """Reconstructions were trained on, in the second run."""
    make_images(tmp_path / "train" / "a", 8)
    monkeypatch.chdir(tmp_path / "train")
    for out in ("output_dir", "second", "second/third"):
        run(main_pretrain, *SMALL, "--data_path", ".", "--vis_every", "1", "--epochs", "1", "--output_dir", out)
        said = capfd.readouterr().out
        assert "train: 8 images, 1 classes" in said and (tmp_path / "train" / out / "reconstructions").is_dir()
    assert "left out 2 folders with the output of a run" in said
    for data, out in ((".", "."), (".", "a"), ("..", "../train/new")):
        message = (
            f"{re.escape(out)} is among the images of --data_path {re.escape(data)}, and pictures in it would be used"
        )
        fails(main_pretrain, capfd, message, *SMALL, "--data_path", data, "--output_dir", out)
        fails(util.check_data, capfd, message, data, "--out", out)


def test_missing_data_path_is_explained(tmp_path, capfd):
    fails(main_pretrain, capfd, r"--data_path is missing", *SMALL, "--output_dir", tmp_path / "out")


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        main_pretrain.get_args_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for flag in (
        "--batch_size --epochs --accum_iter --model --input_size --mask_ratio --norm_pix_loss --clip_grad "
        "--weight_decay --lr --blr --min_lr --warmup_epochs --data_path --output_dir --log_dir --device --seed "
        "--resume --finetune --start_epoch --num_workers --pin_mem --no_pin_mem --world_size --local_rank "
        "--dist_on_itp --dist_url --port --precision --in_chans --mean --std --range_mask_ratio --print_freq "
        "--save_every --vis_every"
    ).split():
        assert flag in text
    assert "(default: 0.05)" in text and "(default: chosen)" in text and "EPOCHS" in text
