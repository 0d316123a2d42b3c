"""Programs on a GPU without values: no tensors of two devices meet, and a training step never waits for the GPU.

What a real GPU shows besides: tests/test_gpu.py.
"""

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from label_map_folder import make_pairs
from pretended_gpu import pretended_gpu
from running import make_images, run

import engine_finetune
import main_finetune
import main_pretrain
from exp.ade20k import engine_upernet, upernet
from models_mixmae import MixMAE
from models_swin import SwinTransformer
from util import predict
from util.data.transforms import Normalize
from util.run import metrics

STEPS = 5
COMMON = "--device cuda --num_workers 0 --lr 1e-3 --warmup_epochs 0 --epochs 1".split()
SMALL = [*COMMON, *"--no_compile --in_chans 1 --batch_size 4".split()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two classes of images, of which one is for validation: whatever is counted on the GPU seems to be one."""
    root = tmp_path_factory.mktemp("data")
    for name in "ab":
        make_images(root / "train" / name, 2 * STEPS, seed=ord(name))
    make_images(root / "val" / "a", 1)
    return root


def waits_of_training(monkeypatch, program, *flags: object) -> Counter[str]:
    """Where a program waits for the GPU while it trains for an epoch."""
    train_one_epoch, found = program.train_one_epoch, Counter()

    def watched(*args, **kwargs):
        before = gpu.waits.copy()
        result = train_one_epoch(*args, **kwargs)
        found.update(gpu.waits - before)
        return result

    monkeypatch.setattr(program, "train_one_epoch", watched)
    monkeypatch.setattr(metrics, "SECONDS_BETWEEN_LINES", math.inf)  # of a slow machine
    with pretended_gpu() as gpu:
        run(program, *flags)
    return found


def assert_log_line_alone(waits: Counter[str]) -> None:
    """Losses and gradient norms are read for the log line, of which the epoch has one."""
    assert len(waits) == 2 and set(waits.values()) == {1}, waits
    assert all(place.startswith("util/run/metrics.py:") for place in waits), waits


@pytest.mark.parametrize(
    "flags",
    [
        "--accum_iter 2 --batch_size 2 --drop_path 0.5 --vis_every 0",
        "--mask_per_pair --mix_embed --range_mask_ratio 0.2 --grad_checkpointing --precision fp16 --vis_every 0",
        "--no_masked_attn --fill noise --rank_every 1 --precision fp32 --deterministic --vis_every 0",
        "--mix_images 4 --mask_ratio 0.75 --clip_grad 1 --knn_every 1 --probe_every 1",
    ],
    ids=["paper", "masks of pairs", "noise", "four images"],
)
def test_pretraining(data, tmp_path, monkeypatch, flags):
    paths = ["--data_path", data, "--output_dir", tmp_path]
    flags = [*SMALL, *paths, "--model", "mixmae_quickstart", *flags.split()]
    assert_log_line_alone(waits_of_training(monkeypatch, main_pretrain, *flags))
    assert (tmp_path / "checkpoint.pth").exists()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # when the model is copied
def test_finetuning_and_prediction(data, tmp_path, monkeypatch):
    flags = ["--data_path", data, "--output_dir", tmp_path, "--model", "swin_quickstart", "--model_ema"]
    flags += ["--mixup", "0.8", "--cutmix", "1", "--reprob", "0.5", "--drop_path", "0.5"]
    assert_log_line_alone(waits_of_training(monkeypatch, main_finetune, *SMALL, *flags))
    with pretended_gpu():
        checkpoint = ["--checkpoint", tmp_path / "checkpoint.pth", "--device", "cuda", "--num_workers", "0"]
        run(predict, *checkpoint, data / "val", "--out", tmp_path / "classes.csv")
    assert len((tmp_path / "classes.csv").read_text().splitlines()) == 2


class Batches(list):
    """A loader's batches of a data set that seems to have one image, since whatever is counted on the GPU is one."""

    dataset = range(1)
    batch_sampler = itertools.repeat([(0, 0)])


def test_evaluation_waits_at_its_end_alone():
    def waits(batches: int) -> Counter[str]:
        with pretended_gpu() as gpu:
            model = SwinTransformer(32, 1, 1, 3, 8, (1, 1, 1, 1), (1, 1, 2, 2), (4, 4, 2, 1)).to("cuda")
            normalize = Normalize((0.5,), (0.5,)).to("cuda")
            batch = torch.zeros(4, 1, 32, 32).pin_memory(), torch.zeros(4, dtype=torch.long).pin_memory()
            gpu.waits.clear()
            engine_finetune.evaluate(model, Batches([batch] * batches), normalize, "bf16", torch.device("cuda"))
        return gpu.waits

    assert waits(1) == waits(3)


def test_segmentation(tmp_path, monkeypatch):
    # Pixels are counted by an operation whose result has a size that depends on values.
    counts = torch.ones(3, 3, dtype=torch.int64)
    monkeypatch.setattr(engine_upernet, "confusion_matrix", lambda labels, classes, _: counts.to(labels.device))
    make_pairs(tmp_path / "data", {"train": 6, "val": 1})
    flags = ["--data_path", tmp_path / "data", "--output_dir", tmp_path / "out", "--model", "swin_quickstart"]
    flags += ["--input_size", "32", "--patch_size", "2", "--head_channels", "32", "--batch_size", "2"]
    assert_log_line_alone(waits_of_training(monkeypatch, upernet, *COMMON, *flags))


def test_planted_faults_are_found(data, tmp_path, monkeypatch):
    decode = MixMAE.decode
    flags = [*SMALL, "--data_path", data, "--model", "mixmae_quickstart", "--vis_every", "0", "--output_dir"]
    monkeypatch.setattr(MixMAE, "decode", lambda self, latent, mask: decode(self, latent, mask) * float(mask.sum()))
    of_steps = waits_of_training(monkeypatch, main_pretrain, *flags, tmp_path / "waits")
    assert [count for place, count in of_steps.items() if place.startswith("tests/test_pretended_gpu.py")] == [STEPS]
    monkeypatch.setattr(MixMAE, "decode", lambda self, latent, mask: decode(self, latent, mask) + torch.ones(1))
    with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        waits_of_training(monkeypatch, main_pretrain, *flags, tmp_path / "meets")
