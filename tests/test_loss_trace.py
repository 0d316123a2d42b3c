"""A commit that changes the numbers says so: two small runs compute the losses that are stored."""

import copy
import json
from pathlib import Path

import pytest
import torch
from loss_trace import HOW_TO_STORE, STORED, TOLERANCES, as_text, complaint, differences, record

import util.data.transforms


@pytest.fixture(scope="module")
def stored() -> dict:
    return json.loads(STORED.read_text())


def test_the_losses_are_those_that_are_stored(stored, tmp_path):
    now = record(tmp_path)
    assert [len(steps) for steps in now["runs"].values()] == [24, 24]
    if said := complaint(stored, now):
        pytest.fail(said, pytrace=False)


def other_initialisation(rank: int) -> None:
    initialise = torch.nn.init.xavier_uniform_
    torch.nn.init.xavier_uniform_ = lambda tensor: initialise(tensor, gain=1.01)


def other_crops(rank: int) -> None:
    initialise = util.data.transforms.RandomCropAndFlip.__init__

    def narrower(self, size, scale, *others):
        initialise(self, size, (scale[0] + 0.01, scale[1]), *others)

    util.data.transforms.RandomCropAndFlip.__init__ = narrower


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, run",
    [
        ({"pretrain": ("--lr", 1.001e-3)}, "pretraining"),
        ({"pretrain": ("--weight_decay", 0.06)}, "pretraining"),
        ({"finetune": ("--smoothing", 0.11)}, "fine-tuning"),
        ({"finetune": ("--layer_decay", 0.71)}, "fine-tuning"),
        ({"sabotage": other_initialisation}, "pretraining"),
        ({"sabotage": other_crops}, "pretraining"),
    ],
    ids=["lr", "weight decay", "smoothing", "layer decay", "initialisation", "crops"],
)
def test_a_change_of_numbers_is_seen(stored, tmp_path, change, run):
    now = record(tmp_path, **change)
    said = complaint(stored, now)
    assert f"{run}, first at step" in said and HOW_TO_STORE in said, differences(stored["runs"], now["runs"])
    assert ("pretraining" in said) == (run == "pretraining")


def test_the_complaint_names_the_first_step_and_other_versions(stored):
    assert complaint(stored, stored) == ""
    now = copy.deepcopy(stored)
    for step in now["runs"]["fine-tuning"][6:]:
        step["loss"] *= 1 + 2 * TOLERANCES["loss"]
    said = complaint(stored, now)
    assert "fine-tuning, first at step 7: loss " in said and "pretraining" not in said and "versions" not in said
    now["versions"] = "torch 9"
    assert f"other versions may have done: {stored['versions']} -> torch 9" in complaint(stored, now)
    now["runs"]["fine-tuning"][6]["loss"] = float("nan")
    assert "-> nan" in complaint(stored, now)
    del now["runs"]["pretraining"][-1]
    assert "pretraining: 24 steps stored, 23 now" in complaint(stored, now)


def test_the_stored_file_has_a_line_for_each_step(stored):
    assert as_text(stored) == Path(STORED).read_text() and STORED.read_text().count('{"step"') == 48
