"""The learning rate of every step and layer."""

import argparse
import itertools
import math

import pytest
import torch

from models_swin import SwinTransformer
from util.run.optim import (
    adjust_learning_rate,
    last_learning_rate,
    layer_ids,
    learning_rate,
    param_groups_layer_decay,
    warn_if_nothing_is_learned,
)

SCHEDULE = argparse.Namespace(lr=2e-3, min_lr=1e-6, warmup_epochs=5, epochs=100)
SMALL = dict(img_size=64, embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], window_size=[8, 4, 4, 2])


def test_warm_up_is_linear_and_ends_at_the_rate():
    assert learning_rate(0, SCHEDULE) == 0
    assert learning_rate(1.25, SCHEDULE) == pytest.approx(2e-3 / 4, rel=1e-12)
    assert learning_rate(5, SCHEDULE) == 2e-3
    just_before = math.nextafter(5, 0)
    assert learning_rate(just_before, SCHEDULE) == pytest.approx(2e-3, rel=1e-12)


def test_half_a_cosine_ends_at_the_minimum():
    assert learning_rate(100, SCHEDULE) == pytest.approx(1e-6, rel=1e-12)
    middle = (5 + 100) / 2
    assert learning_rate(middle, SCHEDULE) == pytest.approx((2e-3 + 1e-6) / 2, rel=1e-12)
    rates = [learning_rate(5 + 95 * i / 1000, SCHEDULE) for i in range(1001)]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    # The last of 312 steps of the last epoch: close to the minimum, and above it.
    last = learning_rate(99 + 311 / 312, SCHEDULE)
    assert 1e-6 < last < 1e-6 + 1e-9
    assert last == last_learning_rate(99, 312, SCHEDULE)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert learning_rate(0, argparse.Namespace(lr=1e-3, min_lr=0.0, warmup_epochs=0, epochs=10)) == 1e-3


@pytest.mark.parametrize(
    "lr, warmup_epochs, epochs, remedy",
    [
        (0, 0, 6, "0 in all 6 steps of the run; give a positive --lr"),
        (1, 0.5, 1, "1 steps of the run; train longer, or give"),
        (1, 0, 1, ""),
        (1, 2, 2, ""),
    ],
)
def test_a_run_without_a_step_that_learns_is_warned_of(caplog, lr, warmup_epochs, epochs, remedy):
    """It counted as done."""
    config = argparse.Namespace(lr=lr, min_lr=0, warmup_epochs=warmup_epochs, epochs=epochs)
    warn_if_nothing_is_learned(config, steps_per_epoch=1)
    assert remedy in caplog.text and bool(remedy) == ("nothing will be learned" in caplog.text)


def test_every_iteration_sets_every_group():
    model = SwinTransformer(**SMALL, num_classes=5)
    optimizer = torch.optim.AdamW(param_groups_layer_decay(model, 0.05, 0.7), lr=1.0)
    for step in range(12):  # 4 steps per epoch
        rate = adjust_learning_rate(optimizer, step / 4, SCHEDULE)
        assert rate == learning_rate(step / 4, SCHEDULE)
        assert all(group["lr"] == rate * group["lr_scale"] for group in optimizer.param_groups)
    plain = torch.optim.SGD(model.parameters(), lr=1.0)  # pretraining's groups have no scale
    adjust_learning_rate(plain, 5, SCHEDULE)
    assert plain.param_groups[0]["lr"] == 2e-3


def test_steps_divide_the_rate_by_ten():
    steps = argparse.Namespace(lr=1.0, warmup_epochs=0.5, lr_steps=(8, 11))
    rates = [learning_rate(epoch, steps) for epoch in (0, 0.25, 0.5, 7.99, 8, 10.99, 11, 12)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = argparse.Namespace(**vars(SCHEDULE), lr_steps=(8, 11))
    assert adjust_learning_rate(optimizer, 9.5, config) == pytest.approx(2e-4)
    assert last_learning_rate(10, 4, config) == pytest.approx(2e-4)
    config.lr_steps = ()
    assert adjust_learning_rate(optimizer, 9.5, config) == learning_rate(9.5, SCHEDULE)


def test_what_is_built_on_an_encoder_trains_at_the_full_rate():
    model = torch.nn.ModuleDict({"encoder": SwinTransformer(**SMALL, num_classes=0), "head": torch.nn.Linear(4, 4)})
    model["encoder"].patch_embed.requires_grad_(False)
    groups = param_groups_layer_decay(model["encoder"], 0.05, 0.5, model)
    scale = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scale) == sum(parameter.requires_grad for parameter in model.parameters())
    assert scale[model["head"].weight] == scale[model["head"].bias] == 1
    own = param_groups_layer_decay(model["encoder"], 0.05, 0.5)
    assert all(scale[parameter] == group["lr_scale"] < 1 for group in own for parameter in group["params"])
    decays = {group["weight_decay"] for group in groups for p in group["params"] if p is model["head"].weight}
    assert decays == {0.05}


def test_layer_ids_count_blocks_through_the_stages():
    model = SwinTransformer(**SMALL, num_classes=5)
    expected = {
        "patch_embed.": 0,
        "layers.0.blocks.0.": 1,
        "layers.0.downsample.": 2,  # as the next stage's first block
        "layers.1.blocks.0.": 2,
        "layers.1.downsample.": 3,
        "layers.2.blocks.0.": 3,
        "layers.2.blocks.1.": 4,
        "layers.2.downsample.": 5,
        "layers.3.blocks.0.": 5,
        "norm.": 5,
        "head.": 5,
    }
    ids = layer_ids(model)
    assert "absolute_pos_embed" not in ids
    for prefix, layer_id in expected.items():
        found = {value for name, value in ids.items() if name.startswith(prefix)}
        assert found == {layer_id}, prefix
    assert all(name.startswith(tuple(expected)) for name in ids)


@pytest.mark.parametrize("layer_decay", [0.7, 1.0])
def test_groups_hold_every_trained_parameter_once(layer_decay):
    model = SwinTransformer(**SMALL, num_classes=5)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=layer_decay)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    ids = layer_ids(model)
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr_scale"] == layer_decay ** (5 + 1 - ids[name])
            # Matrices decay, and the bias tables with them; vectors and biases do not.
            assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0)


def test_frozen_parameters_are_in_no_group():
    model = SwinTransformer(**SMALL, num_classes=5).requires_grad_(False)
    model.head.requires_grad_(True)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [[(5, 128)], [(5,)]]
    assert [group["lr_scale"] for group in groups] == [0.7, 0.7]
