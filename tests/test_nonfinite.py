"""A loss or gradient that is not finite stops all ranks before the weights move, and tells what it was."""

from pathlib import Path

import pytest
import torch
from running import make_images
from torch import nn
from trials import TINY, Trial, differences, nan_gradient, nan_loss, same, state_of

from util.run.nonfinite import NonFiniteError, NonFiniteGuard
from util.run.optim import backward, clip_and_step
from util.weights.file import read_checkpoint

RECIPE = (*TINY, "--epochs", "2", "--batch_size", "2", "--save_steps", "1")
MOST_SECONDS = 10  # for all ranks to leave


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `images` and with `reference`, an uninterrupted run of two ranks: 2 epochs of 4 steps."""
    place = tmp_path_factory.mktemp("nonfinite")
    make_images(place / "images", 16)
    flags = (*RECIPE, "--data_path", place / "images", "--keep_checkpoints", 99)
    Trial(place, *flags, "--output_dir", place / "reference", ranks=2).finish()
    return place


@pytest.mark.parametrize(
    "spoil, message, bad_ranks",
    [(nan_loss, "the loss of rank 1 is not finite", [1]), (nan_gradient, "the gradient is not finite", [0, 1])],
)
def test_all_ranks_stop_at_once_with_the_weights_before_and_a_dump(place, tmp_path, spoil, message, bad_ranks):
    flags = (*RECIPE, "--data_path", place / "images", "--output_dir", tmp_path)
    trial = Trial(tmp_path / "logs", *flags, "--nan_dump", ranks=2, sabotage=spoil(6, rank=1))
    said = trial.finish(1, 1)
    assert trial.seconds_after_sabotage() < MOST_SECONDS
    assert said.count(f"{message} at epoch 1 step 2 (optimizer step 6)") == 1 and "Traceback" not in said
    assert "gradient norm nan" in said and ("losses by rank: 1." in said or "losses by rank: 2." in said)
    assert "The weights were not updated and the last checkpoint is intact" in said

    # The last checkpoint is the one after step 5, and the weights are still its weights.
    saved = state_of(tmp_path)
    assert same(saved, state_of(place / "reference", "checkpoint-00000005.pth"))
    for rank in range(2):
        path = tmp_path / f"nan_dump_rank{rank}.pth"
        assert path.exists() == (rank in bad_ranks) == (str(path) in said)
    dump = read_checkpoint(path)
    assert same(dump["checkpoint"]["model"], saved["model"])
    assert same(dump["checkpoint"]["optimizer"]["state"], saved["optimizer"]["state"])
    assert dump["where"] == "epoch 1 step 2 (optimizer step 6)" and dump["checkpoint"]["step"] == 5
    assert [micro["imgs"].shape for micro in dump["batch"]] == [(2, 1, 32, 32)]
    assert dump["batch"][0]["mask"].sum() == 8

    Trial(tmp_path / "logs", *flags, "--resume", "auto", ranks=2).finish()
    assert differences(tmp_path, place / "reference") == []


def test_without_a_dump_the_message_tells_how_to_get_one(place, tmp_path):
    flags = (*RECIPE, "--data_path", place / "images", "--output_dir", tmp_path, "--accum_iter", 2)
    said = Trial(tmp_path, *flags, sabotage=nan_loss(3)).finish(1)  # the first micro-batch of step 2
    assert "the loss of rank 0 is not finite at epoch 0 step 2 (optimizer step 2)" in said
    assert "Run with --nan_dump to keep the batch" in said
    assert state_of(tmp_path)["step"] == 1 and not list(tmp_path.glob("nan_dump*"))


# --- The pieces ---------------------------------------------------------------------------------------------


def small_problem() -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_bad_step_moves_neither_weights_nor_moments_and_the_next_one_is_as_if_it_had_not_been(bad, clip_grad):
    def step(spoiled: bool) -> torch.Tensor:
        loss = model(torch.ones(4, 3)).square().mean()
        if spoiled and bad == "loss":
            loss = loss * float("inf")
        elif spoiled:
            loss = loss + model.bias.sub(model.bias.detach()).square().sum().sqrt()
        assert loss.isfinite() == (not spoiled or bad == "gradient")
        backward(loss, scaler)
        return clip_and_step(optimizer, scaler, model.parameters(), clip_grad)

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    results = []
    for plan in ([False, True, False], [False, False]):
        model, optimizer = small_problem()
        norms = [step(spoiled) for spoiled in plan]
        assert [bool(norm.isfinite()) for norm in norms] == [not spoiled for spoiled in plan]
        assert all(parameter.grad is None for parameter in model.parameters())
        results.append((model.state_dict(), optimizer.state_dict()["state"]))
    assert same(results[0], results[1])


def test_a_loss_that_is_not_finite_makes_every_gradient_so():
    """Also where the backward pass alone would not: that tells the other ranks, through the reduction of gradients."""
    weight = nn.Parameter(torch.ones(3))
    loss = torch.maximum(weight.sum() * 0 + float("inf"), weight.sum())
    backward(loss, torch.amp.GradScaler("cpu", enabled=False))
    assert weight.grad.isnan().all()


class State:
    """What the guard needs of a training state."""

    def __init__(self, fp16: bool):
        self.scaler = torch.amp.GradScaler("cpu", enabled=fp16)

    def checkpoint(self) -> dict:
        return {"model": {}}


@pytest.mark.parametrize("fp16", [False, True])
def test_with_a_loss_scaler_only_the_loss_counts(fp16):
    """fp16 overflows now and then: the scaler skips such a step and lowers its scale."""
    guard = NonFiniteGuard(torch.device("cpu"), State(fp16))
    finite, infinite, nan = torch.tensor(1.0), torch.tensor(float("inf")), torch.tensor(float("nan"))
    guard.watch("step 1", finite, finite, [])
    guard.watch("step 2", infinite, finite, [])  # cannot be: see the test above
    if fp16:
        guard.watch("step 3", finite, infinite, [])
    else:
        with pytest.raises(NonFiniteError, match="the gradient is not finite at step 3"):
            guard.watch("step 3", finite, infinite, [])
    with pytest.raises(NonFiniteError, match=r"the loss of rank 0 is not finite at step 4 \(losses by rank: nan"):
        guard.watch("step 4", nan, nan, [])


def test_fp16_steps_that_overflow_are_skipped_and_a_bad_loss_moves_nothing():
    model, optimizer = small_problem()
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**120)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(3):
        backward(model(torch.full((4, 3), 1e3)).square().mean(), scaler)  # overflows at this scale
        norm = clip_and_step(optimizer, scaler, model.parameters(), None)
        assert not norm.isfinite()
    assert scaler.get_scale() == 2.0**117
    backward(model(torch.ones(4, 3)).square().mean() * float("nan"), scaler)
    assert clip_and_step(optimizer, scaler, model.parameters(), None).isnan()
    assert same(before, [parameter.detach() for parameter in model.parameters()])


def test_fp16_gradients_that_are_bad_at_every_scale_end_the_run_before_the_scale_is_nothing():
    model, optimizer = small_problem()
    state = State(True)
    state.scaler = scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=4.0)
    guard = NonFiniteGuard(torch.device("cpu"), state)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(NonFiniteError, match="the gradient is not finite at step 2"):
        for step in range(1, 200):
            loss = (model(torch.ones(4, 3)) * 0).sqrt().sum()  # a finite loss with a gradient of 0 * infinity
            backward(loss, scaler)
            guard.watch(f"step {step}", loss, clip_and_step(optimizer, scaler, model.parameters(), None), [])
            optimizer.zero_grad()
    assert scaler.get_scale() == 1.0 and same(before, [parameter.detach() for parameter in model.parameters()])


def test_a_dump_that_cannot_be_written_does_not_hide_what_happened(tmp_path):
    guard = NonFiniteGuard(torch.device("cpu"), State(False), tmp_path / "absent")
    nan = torch.tensor(float("nan"))
    with pytest.raises(NonFiniteError, match=r"the loss of rank 0.*rank0.pth could not be written: .*No such"):
        guard.watch("step 1", nan, nan, [])
