"""Fine-tuning and probing from the command line's flags, from pretraining to the evaluated result."""

import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from running import fails, losses, read_lines, run
from trials import Trial, differences, epochs_of, same, state_of, steps_of

import main_finetune
import main_pretrain
import util.run.session
from engine_finetune import Evaluation
from models_swin import SwinTransformer, classification_loss
from util.data.transforms import BatchAugmentation
from util.run.optim import learning_rate
from util.weights.file import read_checkpoint
from util.weights.settings import weight_settings

SHAPE = ["--input_size", "16", "--window_size", "4", "4", "4", "2"]
SHARED = [*SHAPE, "--device", "cpu", "--num_workers", "0", "--print_freq", "1", "--warmup_epochs", "1"]
FINETUNE = [*SHARED, "--model", "swin_quickstart", "--batch_size", "8", "--epochs", "3", "--lr", "1e-3"]
# No randomness but that of samples: what is left is the same however a batch is cut.
PLAIN = ["--aa", "", "--reprob", "0", "--drop_path", "0"]
CLASSES = ("blue", "green", "red")


def draw(folder: Path, hue: int, count: int, seed: int) -> None:
    """Noisy pictures with one bright channel."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng([seed, hue])
    for i in range(count):
        pixels = generator.integers(0, 150, (20, 20, 3), dtype=np.uint8)
        pixels[:, :, hue] += 100
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """3 steps of 8 images per epoch, and 11 validation images."""
    folder = tmp_path_factory.mktemp("data")
    for hue, name in enumerate(reversed(CLASSES)):
        draw(folder / "train" / name, hue, 9, seed=0)
        draw(folder / "val" / name, hue, 4 if hue else 3, seed=1)
    return folder


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory) -> Path:
    """A pretraining checkpoint of the same shape."""
    out = tmp_path_factory.mktemp("pretrained")
    flags = ["--model", "mixmae_quickstart", "--batch_size", "8", "--epochs", "1", "--vis_every", "0"]
    run(main_pretrain, *SHARED, *flags, "--data_path", data, "--output_dir", out)
    return out / "checkpoint.pth"


def result_lines(said: str) -> list[str]:
    return [line.partition("result: ")[2] for line in said.splitlines() if "result: " in line]


# --- From pretraining to a result -----------------------------------------------------------------------------------


def test_pretrain_finetune_evaluate(data, pretrained, tmp_path, capfd):
    out = tmp_path / "out"
    recipe = ["--mixup", "0.8", "--cutmix", "1", "--drop_path", "0.2", "--layer_decay", "0.9", "--epochs", "4"]
    run(main_finetune, *FINETUNE, *recipe, "--finetune", pretrained, "--data_path", data, "--output_dir", out)
    said = capfd.readouterr().out
    assert f"from {pretrained}; not in the file, so at their initial values: head.weight, head.bias" in said
    assert "swin_quickstart at 16x16, 3 classes: 0.4 M parameters" in said
    records = read_lines(out / "log.txt")
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    assert {"train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5", "best_acc1"} <= records[0].keys()
    assert records[-1]["best_acc1"] == max(record["test_acc1"] for record in records)

    evaluate = [*SHAPE, "--model", "swin_quickstart", "--device", "cpu", "--num_workers", "0", "--eval"]
    for name, acc1 in (("checkpoint.pth", records[-1]["test_acc1"]), ("checkpoint-best.pth", records[-1]["best_acc1"])):
        run(main_finetune, *evaluate, "--finetune", out / name, "--data_path", data)
        (line,) = result_lines(capfd.readouterr().out)
        assert line.startswith(f"top-1 {acc1:.3f}%, top-5 100.000%, loss ")
        assert line.endswith(f"of {out / name} (swin_quickstart at 16x16) on 11 images of {data}")
    (line,) = result_lines(said)
    loss = records[-1]["test_loss"]
    assert line.startswith(f"top-1 {records[-1]['test_acc1']:.3f}%, top-5 100.000%, loss {loss:.4f} of {out}/check")


def test_it_learns_what_can_be_learned(data, tmp_path):
    flags = ["--epochs", "10", "--mixup", "0", "--data_path", data, "--output_dir", tmp_path]
    run(main_finetune, *FINETUNE, *PLAIN, *flags)
    assert read_lines(tmp_path / "log.txt")[-1]["test_acc1"] == 100


def test_every_iteration_has_its_learning_rate(data, tmp_path):
    run(main_finetune, *FINETUNE, *PLAIN, "--min_lr", "1e-5", "--data_path", data, "--output_dir", tmp_path)
    schedule = SimpleNamespace(lr=1e-3, min_lr=1e-5, warmup_epochs=1, epochs=3)
    rates = [learning_rate(epoch + step / 3, schedule) for epoch in range(3) for step in range(3)]
    assert [record["lr"] for record in steps_of(tmp_path)] == rates and rates[3] == 1e-3
    assert [record["train_lr"] for record in read_lines(tmp_path / "log.txt")] == rates[2::3]
    groups = read_checkpoint(tmp_path / "checkpoint.pth")["optimizer"]["param_groups"]
    assert groups[0]["lr_scale"] == 0.7**6 and {group["lr_scale"] for group in groups} == {0.7**i for i in range(1, 7)}
    assert all(group["lr"] == rates[-1] * group["lr_scale"] for group in groups)
    assert groups[0]["betas"] == (0.9, 0.999)


def test_a_head_is_kept_where_it_fits(data, pretrained, tmp_path, capfd):
    """A fresh head on a pretrained encoder starts at almost equal probabilities; one of other classes is replaced."""
    first = tmp_path / "first"
    still = ["--epochs", "1", "--lr", "1e-12", "--min_lr", "0", *PLAIN]
    run(main_finetune, *FINETUNE, *still, "--finetune", pretrained, "--data_path", data, "--output_dir", first)
    head = read_checkpoint(first / "checkpoint.pth")["model"]["head.weight"]
    assert head.std() == pytest.approx(2e-5, rel=0.2)
    assert read_lines(first / "log.txt")[0]["test_loss"] == pytest.approx(np.log(3), rel=1e-3)

    again, two = tmp_path / "again", tmp_path / "two"
    shared = [*FINETUNE, *still, "--finetune", first / "checkpoint.pth"]
    run(main_finetune, *shared, "--data_path", data, "--output_dir", again)
    assert "re-initialised" not in capfd.readouterr().out
    torch.testing.assert_close(read_checkpoint(again / "checkpoint.pth")["model"]["head.weight"], head)

    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for name in CLASSES[:2]:
            (tmp_path / "data" / split / name).symlink_to(data / split / name)
    run(main_finetune, *shared, "--data_path", tmp_path / "data", "--output_dir", two)
    assert "re-initialised, as their size in the file differs: head.weight, head.bias" in capfd.readouterr().out
    assert read_checkpoint(two / "checkpoint.pth")["model"]["head.weight"].std() == pytest.approx(2e-5, rel=0.2)


def test_fine_tuning_at_another_size_resizes(data, pretrained, tmp_path, capfd):
    flags = ["--input_size", "32", "--window_size", "8", "8", "8", "4", "--epochs", "1", "--finetune", pretrained]
    run(main_finetune, *FINETUNE, *flags, "--data_path", data, "--output_dir", tmp_path)
    assert "6 of them resized (absolute_pos_embed, layers.0.blocks.0.attn.relative_position_bias_table" in (
        capfd.readouterr().out
    )


# --- Linear probe ---------------------------------------------------------------------------------------------------


def test_mean_and_std_are_those_of_the_weights_unless_given(data, pretrained, tmp_path, capfd):
    statistics = ("--mean", "0.3", "0.4", "0.5", "--std", "0.2", "0.2", "0.3")
    trained = tmp_path / "trained" / "checkpoint.pth"
    quick = ("--epochs", "1", "--warmup_epochs", "0", "--data_path", data)
    run(main_finetune, *FINETUNE, *quick, *statistics, "--output_dir", trained.parent)

    def result(*flags: object) -> str:
        capfd.readouterr()
        run(main_finetune, *FINETUNE, "--data_path", data, "--eval", "--finetune", trained, *flags)
        said = capfd.readouterr().out
        return re.search("result: (.*) of", said)[1], "was trained with [0.3, 0.4, 0.5]" in said

    assert result() == result(*statistics) and not result()[1]
    assert result("--mean", "0.9", "0.9", "0.9") != result() and result("--mean", "0.9", "0.9", "0.9")[1]
    run(main_finetune, *FINETUNE, *quick, "--finetune", trained, "--output_dir", tmp_path / "again")
    assert read_checkpoint(tmp_path / "again" / "checkpoint.pth")["args"]["mean"] == (0.3, 0.4, 0.5)


def test_a_frozen_encoder_stays_as_it_is(data, pretrained, tmp_path):
    flags = ["--freeze_encoder", "--mixup", "0.8", "--weight_decay", "0.5", "--drop_path", "0.5", "--layer_decay", "1"]
    run(
        main_finetune, *FINETUNE, *flags, "--finetune", pretrained, "--data_path", data, "--output_dir", tmp_path,
        "--model_ema", "--model_ema_decay", "0.5",
    )  # fmt: skip
    before, after = read_checkpoint(pretrained)["model"], read_checkpoint(tmp_path / "checkpoint.pth")
    encoder = [name for name in after["model"] if not name.startswith("head.")]
    assert len(encoder) == len(after["model"]) - 2
    for weights in (after["model"], after["model_ema"]):
        assert all(same(weights[name], before[name]) for name in encoder)
    assert after["model"]["head.weight"].abs().mean() > 1e-4  # began at 2e-5
    assert after["model"]["head.bias"].abs().min() > 0
    assert sum(len(group["params"]) for group in after["optimizer"]["param_groups"]) == 2


def test_a_frozen_encoder_gets_no_gradients(data, pretrained, tmp_path, monkeypatch):
    """And runs in evaluation mode: without drop path, and storing nothing for a backward pass."""
    seen = []
    finish_step = util.run.session.Run.finish_step

    def watch(self, *args):
        model = self.state.model
        seen.append((model.training, [name for name, p in model.named_parameters() if p.requires_grad]))
        features = model.forward_features(torch.zeros(1, 3, 16, 16))
        assert not features.requires_grad
        return finish_step(self, *args)

    monkeypatch.setattr(util.run.session.Run, "finish_step", watch)
    flags = ["--freeze_encoder", "--epochs", "1", "--finetune", pretrained]
    run(main_finetune, *FINETUNE, *flags, "--data_path", data, "--output_dir", tmp_path)
    assert seen == [(False, ["head.weight", "head.bias"])] * 3


# --- Averaged weights, best checkpoint, resuming --------------------------------------------------------------------


def test_an_average_that_hardly_moves_is_warned_of(data, tmp_path, capfd):
    """The best checkpoint was that of the initial weights."""
    flags = [*FINETUNE, *PLAIN, "--model_ema", "--data_path", data]
    run(main_finetune, *flags, "--lr", 0, "--min_lr", 0, "--output_dir", tmp_path / "slow")
    said = capfd.readouterr().out
    assert "--model_ema_decay 0.9999: after the 9 steps of this run" in said and "still 99.9% the initial ones" in said
    assert "nothing will be learned: the learning rate is 0 in all 9 steps" in said
    decay = re.search(r"with --model_ema_decay (\S+) they would be 1%", said)[1]
    assert float(decay) ** 9 == pytest.approx(0.01, rel=1e-3)
    run(main_finetune, *flags, "--model_ema_decay", decay, "--output_dir", tmp_path / "usual")
    said = capfd.readouterr().out
    assert "initial ones" not in said and "nothing will be learned" not in said
    fails(main_finetune, capfd, "--model_ema_decay must be at least 0 and below 1", *flags, "--model_ema_decay", 1)


def test_averaged_weights_follow_the_weights(data, tmp_path):
    flags = ["--model_ema", "--model_ema_decay", "0.75", "--save_steps", "1", "--keep_checkpoints", "9"]
    run(main_finetune, *FINETUNE, *PLAIN, *flags, "--data_path", data, "--output_dir", tmp_path)
    saved = [read_checkpoint(tmp_path / f"checkpoint-{step:08d}.pth") for step in range(1, 10)]
    average = saved[0]["model_ema"]
    for checkpoint in saved[1:]:
        average = {name: 0.75 * average[name] + 0.25 * tensor for name, tensor in checkpoint["model"].items()}
        for name, tensor in checkpoint["model_ema"].items():
            torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-6)
    record = read_lines(tmp_path / "log.txt")[-1]
    assert {"test_ema_loss", "test_ema_acc1", "test_ema_acc5"} <= record.keys()
    assert record["test_ema_loss"] != record["test_loss"]


def stop_in_step(step: int):
    """Sabotage: SIGTERM arrives during optimizer step `step`, counted from 1."""

    def install(_rank: int) -> None:
        finish_step = util.run.session.Run.finish_step

        def interrupted(self, *args):
            if self.state.progress.step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return finish_step(self, *args)

        util.run.session.Run.finish_step = interrupted

    return install


EVERYTHING_RANDOM = [
    *FINETUNE, "--batch_size", "4", "--accum_iter", "2", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.5",
    "--recount", "2", "--drop_path", "0.4", "--model_ema", "--model_ema_decay", "0.9", "--clip_grad", "1",
    "--mixup", "0.8", "--cutmix", "1", "--mixup_switch_prob", "0.4", "--mixup_prob", "0.8",
]  # fmt: skip


@pytest.fixture(scope="module", params=["batch", "pair", "elem"])
def uninterrupted(data, tmp_path_factory, request) -> tuple[list, Path]:
    flags = [*EVERYTHING_RANDOM, "--mixup_mode", request.param, "--data_path", data]
    out = tmp_path_factory.mktemp("uninterrupted")
    Trial(out, *flags, "--output_dir", out, main=main_finetune).finish()
    return flags, out


@pytest.mark.parametrize("step, workers", [(4, 2), (6, 0)])
def test_a_resumed_run_equals_an_uninterrupted_one(uninterrupted, tmp_path, step, workers):
    """In the middle of an epoch and at an epoch's last step, whose evaluation is still to come."""
    flags, reference = uninterrupted
    out = tmp_path / "out"
    flags = [*flags, "--output_dir", out]
    Trial(tmp_path, *flags, sabotage=stop_in_step(step), main=main_finetune).finish(75)
    assert state_of(out)["step"] == step and len(epochs_of(out)) == 1
    said = Trial(tmp_path, *flags, "--resume", "auto", "--num_workers", workers, main=main_finetune).finish()
    assert "resumed at epoch 1 step" in said
    assert differences(out, reference) == []
    assert "model_ema" in state_of(out)


def scripted(*accuracies: float):
    """Sabotage: evaluations find these accuracies, and then the process fails."""

    def install(_rank: int) -> None:
        left = list(accuracies)

        def evaluate(model, loader, *_):
            if not left:
                raise RuntimeError("no accuracy is left")
            return Evaluation(len(loader.dataset), left.pop(0), 100.0, 1.0, [], [])

        main_finetune.evaluate = evaluate

    return install


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_epoch_is_saved_before_it_is_evaluated(data, tmp_path, ranks):
    """Nobody asks meanwhile whether the run is to stop, and evaluations may be long."""

    def killed_in_the_first_evaluation(_rank: int) -> None:
        def evaluate(*_):
            for _ in range(1000):
                if (tmp_path / "checkpoint.pth").exists():
                    os._exit(9)
                time.sleep(0.02)

        main_finetune.evaluate = evaluate

    flags = [*FINETUNE, *PLAIN, "--save_every", "9", "--data_path", data, "--output_dir", tmp_path]
    trial = Trial(tmp_path, *flags, sabotage=killed_in_the_first_evaluation, main=main_finetune, ranks=ranks)
    trial.finish(*[9] * ranks)
    state = state_of(tmp_path)
    steps = len(steps_of(tmp_path))
    assert (state["epoch"], state["step"], state["step_in_epoch"]) == (-1, steps, steps) and steps == 3 // ranks
    assert not (tmp_path / "log.txt").exists()
    said = Trial(tmp_path, *flags, "--resume", "auto", sabotage=scripted(*[50] * 9), main=main_finetune).finish()
    assert "resumed at epoch 0 step" in said and epochs_of(tmp_path)[0]["test_acc1"] == 50


def test_before_short_evaluations_nothing_more_is_saved(data, tmp_path, monkeypatch):
    """After the first one, of which nobody knows how long it takes."""
    saved = []
    monkeypatch.setattr(main_finetune.Run, "save", lambda run, *_: saved.append(run.state.progress.step_in_epoch))
    flags = [*FINETUNE, *PLAIN, "--data_path", data, "--output_dir"]
    run(main_finetune, *flags, tmp_path / "short")
    assert saved == [3, 0, 0, 0]  # before the first, then at the end of each epoch
    saved.clear()
    monkeypatch.setattr("util.run.session.SHORT_MEASURES", 0.0)
    run(main_finetune, *flags, tmp_path / "long")
    assert saved == [3, 0, 3, 0, 3, 0]


def test_the_best_checkpoint_survives_a_resume(data, tmp_path):
    flags = [*FINETUNE, *PLAIN, "--epochs", "5", "--data_path", data, "--output_dir", tmp_path]
    Trial(tmp_path, *flags, sabotage=scripted(50, 80, 60), main=main_finetune).finish(1)
    assert (state_of(tmp_path)["step"], state_of(tmp_path)["best"]) == (9, 80)
    assert state_of(tmp_path, "checkpoint-best.pth")["step"] == 6
    shutil.copytree(tmp_path, tmp_path / "better")

    resume = [*flags, "--resume", "auto"]
    said = Trial(tmp_path, *resume, sabotage=scripted(70, 80, 80), main=main_finetune).finish()
    assert "best top-1 of all epochs: 80.000% (checkpoint-best.pth)" in said
    assert state_of(tmp_path)["best"] == 80
    assert state_of(tmp_path, "checkpoint-best.pth")["step"] == 6  # still that of the second epoch
    assert [record["best_acc1"] for record in epochs_of(tmp_path)] == [50, 80, 80, 80, 80]

    better = [*resume, "--output_dir", tmp_path / "better"]
    Trial(tmp_path, *better, sabotage=scripted(70, 90, 90), main=main_finetune).finish()
    assert state_of(tmp_path / "better", "checkpoint-best.pth")["step"] == 15


def test_there_is_a_best_checkpoint_even_when_nothing_is_right(data, tmp_path):
    flags = [*FINETUNE, *PLAIN, "--data_path", data, "--output_dir", tmp_path]
    Trial(tmp_path, *flags, sabotage=scripted(0, 0, 0, 0), main=main_finetune).finish()
    assert state_of(tmp_path, "checkpoint-best.pth")["step"] == 3


def test_evaluation_every_few_epochs_and_after_the_last(data, tmp_path):
    flags = [*FINETUNE, *PLAIN, "--epochs", "5", "--eval_every", "2", "--data_path", data, "--output_dir", tmp_path]
    said = Trial(tmp_path, *flags, sabotage=scripted(60, 80, 70), main=main_finetune).finish()
    assert "best top-1 of all epochs: 80.000% (checkpoint-best.pth)" in said
    assert state_of(tmp_path, "checkpoint-best.pth")["step"] == 12  # of four epochs
    accuracies = {record["epoch"]: record["test_acc1"] for record in epochs_of(tmp_path) if "test_acc1" in record}
    assert accuracies == {1: 60, 3: 80, 4: 70}
    assert all(("best_acc1" in record) == ("test_acc1" in record) for record in epochs_of(tmp_path))


# --- How a batch is made up -----------------------------------------------------------------------------------------


def test_accumulation_and_ranks_equal_one_big_batch(data, tmp_path):
    flags = [*FINETUNE, *PLAIN, "--lr", "1e-4", "--epochs", "2", "--data_path", data, "--output_dir"]
    run(main_finetune, *flags, tmp_path / "big")
    run(main_finetune, *flags, tmp_path / "accumulated", "--batch_size", "4", "--accum_iter", "2")
    ranks = Trial(tmp_path, *flags, tmp_path / "ranks", "--batch_size", "4", ranks=2, main=main_finetune)
    assert ranks.finish().count("result: ") == 1
    big = read_checkpoint(tmp_path / "big" / "checkpoint.pth")["model"]
    for name in ("accumulated", "ranks"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "big"), rel=1e-6)
        weights = read_checkpoint(tmp_path / name / "checkpoint.pth")["model"]
        for key, tensor in weights.items():
            difference = tensor - big[key]
            if key.endswith("qkv.bias"):  # softmax does not see the bias of keys, whose gradient is rounding alone
                difference.chunk(3)[1].zero_()
            assert difference.abs().max() < 1e-6, key
        last, reference = (read_lines(tmp_path / place / "log.txt")[-1] for place in (name, "big"))
        assert last["test_loss"] == pytest.approx(reference["test_loss"], rel=1e-6)


def test_bf16_and_less_memory_stay_close(data, tmp_path):
    for name, flags in (("plain", []), ("bf16", ["--precision", "bf16"]), ("less", ["--grad_checkpointing"])):
        shared = [*FINETUNE, *PLAIN, "--epochs", "1", "--data_path", data, "--output_dir", tmp_path / name]
        run(main_finetune, *shared, *flags)
    assert losses(tmp_path / "less") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "plain"), rel=3e-2)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "plain")


def augmentation_of(*flags: str) -> BatchAugmentation:
    """Of 3 classes."""
    parsed = main_finetune.get_args_parser().parse_args(list(map(str, flags)))
    return BatchAugmentation(parsed, 3, torch.device("cpu"))


def test_the_loss_follows_the_flags():
    """Label smoothing, and mixup that mixes targets with it, against what they should give."""
    logits, targets = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2])
    negative = -logits.log_softmax(1)
    own = negative.gather(1, targets[:, None])[:, 0]

    assert augmentation_of("--smoothing", "0").mix is None
    torch.testing.assert_close(classification_loss(logits, targets, 0.0), own.mean())
    expected = (0.7 * own + 0.3 * negative.mean(1)).mean()
    torch.testing.assert_close(classification_loss(logits, targets, 0.3), expected)

    mixup = augmentation_of("--mixup", "1", "--smoothing", "0").mix
    np.random.seed(0)
    imgs = torch.tensor([0.0, 1.0, 2.0, 4.0]).view(4, 1, 1, 1).expand(4, 3, 8, 8).clone()
    mixed, soft = mixup(imgs.clone(), targets)
    share = 1 - mixed[0, 0, 0, 0].item() / 4  # image 0 is mixed with image 3
    assert 0 < share < 1
    assert soft[0].tolist() == pytest.approx([share, 0, 1 - share], abs=1e-6)
    assert mixed[1, 0, 0, 0].item() == pytest.approx(share * 1 + (1 - share) * 2)
    torch.testing.assert_close(classification_loss(logits, soft), (soft * negative).sum(1).mean())


def test_mixing_flags_arrive():
    flags = ["--mixup", "0.3", "--cutmix", "0.6", "--mixup_prob", "0.9", "--mixup_switch_prob", "0.2"]
    mixup = augmentation_of(*flags, "--mixup_mode", "elem", "--smoothing", "0.2").mix
    settings = "mixup_alpha cutmix_alpha mix_prob switch_prob mode label_smoothing num_classes cutmix_minmax".split()
    assert [getattr(mixup, name) for name in settings] == [0.3, 0.6, 0.9, 0.2, "elem", 0.2, 3, None]
    mixup = augmentation_of("--cutmix_minmax", "0.2", "0.8").mix
    assert list(mixup.cutmix_minmax) == [0.2, 0.8] and mixup.cutmix_alpha == 1
    mixup = augmentation_of("--cutmix", "1").mix
    mixed, _ = mixup(torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 16, 16).clone(), torch.tensor([0, 1, 2, 2]))
    assert set(mixed[0].unique().tolist()) <= {0.0, 3.0}  # cutmix pastes, it does not blend


def test_random_erasing_works_on_normalised_images(data, tmp_path, monkeypatch):
    model_inputs, forward = [], SwinTransformer.forward

    def watch(self, imgs):
        if self.training:
            model_inputs.append(imgs.clone())
        return forward(self, imgs)

    monkeypatch.setattr(SwinTransformer, "forward", watch)
    flags = ["--aa", "", "--reprob", "1", "--remode", "const", "--epochs", "1"]
    run(main_finetune, *FINETUNE, *flags, "--data_path", data, "--output_dir", tmp_path)
    assert len(model_inputs) == 3
    for imgs in model_inputs:
        erased = (imgs == 0).all(dim=1).flatten(1)  # 0 is the mean of the training images
        assert erased.any(dim=1).all() and not erased.all()


def test_the_authors_names_of_models_are_understood():
    for theirs, ours in (("mixmim_base", "swin_base_w14"), ("mixmim_large_384", "swin_large_w16_384")):
        settings = weight_settings({}, "nothing", {"model": theirs})
        assert settings.model == ours and settings.input_size == ((384, 384) if "384" in ours else (224, 224))


# --- Mistakes ---


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mixup", "0.8", "--batch_size", "3"], r"mixup and cutmix pair .*--batch_size must be even, got 3"),
        (["--cutmix", "1", "--batch_size", "5"], r"--batch_size must be even, got 5 \(or use --mixup 0 --cutmix 0\)"),
        (["--nb_classes", "4"], r"--nb_classes 4 contradicts the 3 classes in"),
        (["--batch_size", "64"], r"27 training images do not fill one effective batch of 64"),
        (["--smoothing", "1.5"], r"--smoothing must be at least 0 and below 1, got 1.5"),
        (["--smoothing", "1"], r"--smoothing must be at least 0 and below 1, got 1"),
        (
            ["--cutmix_minmax", "0.8", "0.2"],
            r"--cutmix_minmax takes MIN and MAX, 0 <= MIN <= MAX <= 1, got \(0.8, 0.2\)",
        ),
        (["--color_jitter", "-1"], r"--color_jitter must not be negative, got -1"),
        (["--patch_size", "0"], r"the side of patches must be at least 1 pixel, got 0"),
        (
            ["--window_size", "-1", "4", "4", "2"],
            r"window_size must be at least 1, got \(-1, 4, 4, 2\)",
        ),
        (["--reprob", "-1"], r"--reprob must be between 0 and 1, got -1"),
        (["--layer_decay", "0"], r"--layer_decay must be above 0 and at most 1, got 0"),
        (["--drop_path", "1"], r"--drop_path must be at least 0 and below 1, got 1"),
        (["--aa", "nonsense"], r"--aa 'nonsense' is not an augmentation that timm knows"),
        (["--model", "resnet50"], r"--model resnet50 is not known: give --model one of .*swin_base_w14.*mixmim_base"),
        (["--input_size", "0"], r"sides of images must be at least 1 pixel, got 0x0"),
        (["--finetune", "nowhere.pth"], r"nowhere\.pth is neither a file nor a published checkpoint"),
        (["--resume", "nowhere.pth"], r"nowhere\.pth does not exist"),
        (["--data_path", "nowhere"], r"--data_path nowhere does not exist"),
        (["--in_chans", "4"], r"channels"),
        (["--epochs", "1", "--warmup_epochs", "2"], r"--warmup_epochs 2 is longer than the run: --epochs 1"),
    ],
)
def test_a_wrong_flag_is_explained_before_training(data, tmp_path, capfd, flags, message):
    fails(main_finetune, capfd, message, *FINETUNE, "--data_path", data, "--output_dir", tmp_path / "out", *flags)
    assert not (tmp_path / "out" / "steps.jsonl").exists()


def test_an_odd_batch_is_fine_without_mixing(data, tmp_path, capfd):
    flags = [flag for flag in FINETUNE if flag not in ("--lr", "1e-3")] + ["--batch_size", "9", "--epochs", "1"]
    run(main_finetune, *flags, "--blr", "5e-4", "--data_path", data, "--output_dir", tmp_path)
    assert len(losses(tmp_path)) == 3
    assert "learning rate 1.76e-05 (--blr 0.0005 per 256 images); 3 steps per epoch" in capfd.readouterr().out


def test_data_that_cannot_be_trained_on(data, tmp_path, capfd):
    """Each before the folder of an earlier run is touched."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "log.txt").write_text('{"epoch": 0}\n')

    def fail(message: str, folder: Path) -> None:
        fails(main_finetune, capfd, message, *FINETUNE, "--data_path", folder, "--output_dir", out)
        assert (out / "log.txt").read_text() == '{"epoch": 0}\n'

    place = tmp_path / "place"
    (place / "train").mkdir(parents=True)
    fail(r"no images found under", place)
    (place / "train" / "red").symlink_to(data / "train" / "red")
    fail(r"classification needs at least 2 classes, found 1", place)
    (place / "train" / "grey").mkdir()
    fail(r"class folders without any image in .*train: \['grey'\]", place)
    (place / "train" / "grey").rmdir()
    (place / "train" / "blue").symlink_to(data / "train" / "blue")
    fail(r"val does not exist; it must hold the val images", place)
    (place / "val").symlink_to(data / "val")
    fail(r"val has classes that the training set lacks: \['green'\]", place)
    fail(r"lies outside any class folder; labels need one folder per class in", flat(tmp_path / "flat", data))
    fail(r"train does not exist; it must hold the train images", data / "val")


def flat(folder: Path, data: Path) -> Path:
    """Training images without classes."""
    shutil.copytree(data / "train" / "red", folder / "train")
    return folder


def test_labels_of_a_list_must_be_classes(data, tmp_path, capfd):
    (tmp_path / "list.txt").write_text("".join(f"{data}/train/red/{i}.png {i % 3 + 3}\n" for i in range(9)))
    flags = [*FINETUNE, "--data_path", tmp_path / "list.txt", "--output_dir", tmp_path / "out"]
    fails(main_finetune, capfd, r"--nb_classes 3 contradicts the 6 classes in .*list\.txt", *flags, "--nb_classes", "3")
    (tmp_path / "list.txt").write_text(f"{data}/train/red/1.png 1\n{data}/train/red/2.png\n")
    fails(main_finetune, capfd, r"line 2 has no label, but others have", *flags)


def test_a_label_outside_the_classes_that_turns_up_while_training(data, tmp_path):
    """Data sets of other libraries do not tell their labels beforehand: the run ends in one line."""

    def hide_labels(_rank: int) -> None:
        build_dataset = main_finetune.build_dataset

        def build(*args, **kwargs):
            dataset = build_dataset(*args, **kwargs)
            dataset.classes = None
            return dataset

        main_finetune.build_dataset = build

    flags = [*FINETUNE, "--nb_classes", "2", "--data_path", data, "--output_dir", tmp_path]
    said = Trial(tmp_path, *flags, sabotage=hide_labels, main=main_finetune).finish(1)
    assert "labels [2] lie outside the 2 classes (0 to 1): correct the labels of the data, or --nb_classes" in said
    assert "Traceback" not in said


def test_a_probe_of_random_weights_is_pointed_out(data, tmp_path, capfd):
    flags = ["--freeze_encoder", "--epochs", "1", "--data_path", data, "--output_dir", tmp_path]
    run(main_finetune, *FINETUNE, *flags)
    assert "--freeze_encoder without --finetune probes an encoder of random weights" in capfd.readouterr().out


def test_help_shows_the_authors_flags_and_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        main_finetune.get_args_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for flag in (
        "--batch_size --epochs --accum_iter --model --input_size --drop_path --clip_grad --weight_decay --lr --blr "
        "--layer_decay --min_lr --warmup_epochs --color_jitter --aa --smoothing --reprob --remode --recount --mixup "
        "--cutmix --cutmix_minmax --mixup_prob --mixup_switch_prob --mixup_mode --finetune --data_path --nb_classes "
        "--output_dir --log_dir --device --seed --resume --start_epoch --eval --dist_eval --num_workers --pin_mem "
        "--no_pin_mem --world_size --local_rank --dist_on_itp --dist_url --precision --freeze_encoder --model_ema"
    ).split():
        assert flag in text
    unwrapped = "".join(text.split())
    assert "(default:0.7)" in unwrapped and "(default:rand-m9-mstd0.5-inc1)" in unwrapped
