"""A task that the repository does not know becomes a training run by `util.run.session` alone: saved, resumed exactly,
stopped at a NaN, told apart from other programs' runs, and replayed."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from trials import Trial, differences, steps_of

import main_finetune
from util import replay
from util.data.datasets import build_loader
from util.data.samplers import TrainBatchSampler
from util.run.config import TrainingConfig
from util.run.failures import user_errors
from util.run.flags import flag, get_parser, with_default
from util.run.launch import Launch
from util.run.optim import adjust_learning_rate, autocast, backward, clip_and_step
from util.run.session import Run, Start, find_start, launch_run, open_run, orderly_end
from util.seeding import seed_all

# --- The task: a colour from noise ---


@dataclass(frozen=True)
class ColourConfig(TrainingConfig):
    TITLE: ClassVar[str] = "colours"
    PROGRAM: ClassVar[str] = "exp/colours/train.py"

    bad_after: int = flag(0, "a step from which on the model diverges", "N")
    epochs: int = with_default(TrainingConfig, "epochs", 2)


class Colours(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        generator = torch.Generator().manual_seed(100 * epoch + index)
        return torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=generator), index % 3


class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 1))

    def compile_parts(self) -> None:
        pass

    def forward(self, imgs: Tensor) -> Tensor:
        return self.layers(imgs).squeeze(1)


def loss_of(model: nn.Module, imgs: Tensor, targets: Tensor) -> Tensor:
    return (model(imgs).float() - targets).square().mean()


def rebuild_step(
    settings: argparse.Namespace, weights: dict[str, Tensor], device: torch.device
) -> tuple[nn.Module, Callable[[Tensor, dict[str, Any]], Tensor]]:
    model = Regressor()
    model.load_state_dict(weights)
    return model.to(device).train(), lambda imgs, micro: loss_of(model, imgs, micro["targets"])


def choose(given: ColourConfig, launch: Launch, known: dict) -> dict[str, Any]:
    return {"model": "swin_quickstart", "batch_size": 4, "warmup_epochs": 0, "lr": 0.01}


def prepare(config: ColourConfig, start: Start) -> Run:
    launch, dataset = start.launch, Colours()
    seed_all(config.seed, "weights")
    model = Regressor().to(launch.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)
    sampler = TrainBatchSampler(len(dataset), config.batch_size, 1, launch.rank, launch.world_size, config.seed)
    loader = build_loader(dataset, sampler, config, launch.device)
    data = {"train": {"images": len(dataset), "names": "colours", "labels": "colours"}}
    return open_run(config, start, model, optimizer, loader, data, lambda weights, info: model.load_state_dict(weights))


def train(run: Run) -> None:
    config, state, progress = run.config, run.state, run.state.progress
    while progress.epoch < config.epochs:
        meter, batches = run.start_epoch()
        while progress.step_in_epoch < run.steps_per_epoch:
            lr = adjust_learning_rate(state.optimizer, progress.fraction(run.steps_per_epoch), config)
            imgs, targets = meter.next_batch(batches)
            keys = run.step_keys(0)
            seed_all(*keys)
            with autocast(config.precision, run.device):
                loss = loss_of(run.model, run.normalize(imgs.to(run.device)), targets.to(run.device))
            if 0 < config.bad_after <= progress.step:
                loss = loss * float("inf")
            backward(loss, state.scaler)
            run.guard.check()
            grad_norm = clip_and_step(state.optimizer, state.scaler, state.model.parameters(), config.clip_grad)
            run.finish_step(meter, lr, loss.detach(), grad_norm, [{"imgs": imgs, "targets": targets, "keys": keys}])
        run.finish_epoch({"error": float(loss)}, best=progress.is_best(-float(loss)))


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        given, launch = launch_run(ColourConfig, flags)
        start = find_start(given, launch)
        run = prepare(start.resolve(choose), start)
    with orderly_end(run):
        train(run)


COLOURS = SimpleNamespace(main=main, get_args_parser=lambda: get_parser(ColourConfig, "Colours."))
FLAGS = ("--device", "cpu", "--num_workers", 0, "--print_freq", 1, "--save_steps", 1, "--keep_checkpoints", 9)

# --- What it gets ---


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reference")
    Trial(out / "logs", *FLAGS, "--output_dir", out / "run", main=COLOURS).finish()
    return out / "run"


def test_it_is_resumed_exactly(reference, tmp_path):
    assert len(steps_of(reference)) == 6 and (reference / "checkpoint-best.pth").exists()
    resume = (*FLAGS, "--output_dir", tmp_path / "resumed", "--resume", reference / "checkpoint-00000002.pth")
    said = Trial(tmp_path / "logs", *resume, main=COLOURS).finish()
    assert "resumed at epoch 0 step 2" in said
    assert steps_of(tmp_path / "resumed") == steps_of(reference)[2:]
    assert differences(tmp_path / "resumed", reference, logs=False) == []


def test_no_other_program_continues_it(reference, tmp_path):
    flags = ("--data_path", tmp_path, "--device", "cpu", "--output_dir", reference, "--resume", "auto")
    said = Trial(tmp_path, *flags, main=main_finetune).finish(2)
    assert "holds a run of exp/colours/train.py, which that program continues; give another --output_dir" in said


def test_a_step_that_is_not_finite_stops_it_and_is_replayed(tmp_path, monkeypatch):
    flags = (*FLAGS, "--output_dir", tmp_path / "run", "--bad_after", 4, "--nan_dump")
    said = Trial(tmp_path / "logs", *flags, main=COLOURS).finish(1)
    assert "the loss of rank 0 is not finite at epoch 1 step 2" in said
    dump = replay.read_dump(tmp_path / "run" / "nan_dump_rank0.pth")
    with pytest.raises(ValueError, match=r"a run of exp/colours/train\.py, which is none of .*main_pretrain\.py"):
        list(replay.replay(dump, torch.device("cpu")))
    (tmp_path / "exp" / "colours").mkdir(parents=True)
    (tmp_path / "exp" / "colours" / "train.py").write_text("from test_new_task import rebuild_step\n")
    monkeypatch.setattr(replay, "ROOT", tmp_path)
    lines = list(replay.replay(dump, torch.device("cpu")))
    assert any("4 images, loss" in line and "(finite)" in line for line in lines)
