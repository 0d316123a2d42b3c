"""The models against the dense textbook version, an independent implementation (`tests/textbook.py`)."""

import pytest
import torch
from textbook import Config, TextbookEncoder, TextbookMixMAE

from models_mixmae import MixMAE
from models_swin import SwinTransformer

SMALL = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
DECODER = dict(decoder_dim=32, decoder_depth=2, decoder_num_heads=4)

SIZES = {
    "one window per stage": dict(img_size=64, window_size=(16, 8, 4, 2)),
    "odd grid of cells": dict(img_size=96, window_size=(12, 12, 6, 3)),
    "wide": dict(img_size=(64, 128), window_size=(8, 4, 4, 2)),
    "tall": dict(img_size=(192, 64), window_size=(16, 8, 4, 2)),
    "windows cut through cells": dict(img_size=224, window_size=(14, 14, 14, 7)),
    "windows do not divide a cell": dict(img_size=192, window_size=(12, 6, 3, 6)),
    "patches of one pixel": dict(img_size=32, patch_size=1, window_size=(8, 8, 8, 4)),
}


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


def assert_same_gradients(ours: torch.nn.Module, theirs: torch.nn.Module, tolerance: float = 1e-4) -> None:
    theirs = dict(theirs.named_parameters())
    largest = max(p.grad.norm() for p in theirs.values() if p.grad is not None)
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            continue
        expected = theirs[name].grad
        if expected.norm() < 1e-6 * largest:  # the key's bias: exactly zero but for rounding
            assert parameter.grad.norm() < 1e-5 * largest, name
            continue
        assert relative_difference(parameter.grad, expected) < tolerance, name


def pair(size: dict, **config) -> tuple[MixMAE, TextbookMixMAE, torch.Tensor]:
    """Both models with the same weights, and images for them."""
    torch.manual_seed(0)
    config = {**SMALL, **DECODER, **size, **config}
    ours, theirs = MixMAE(**config), TextbookMixMAE(Config(**config))
    with torch.no_grad():  # biases and norms away from their start, where errors in them would not show
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, torch.randn(4, config.get("in_chans", 3), *ours.img_size)


def assert_same_step(ours: MixMAE, theirs: TextbookMixMAE, imgs: torch.Tensor, mask: torch.Tensor) -> None:
    loss, pred, _ = ours(imgs, mask=mask)
    expected_loss, expected_pred, _ = theirs(imgs, mask)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert relative_difference(pred, expected_pred) < 1e-5
    loss.backward()
    expected_loss.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_loss_reconstruction_and_gradients(size):
    ours, theirs, imgs = pair(size, norm_pix_loss=True)
    mask = ours.random_masking(0.5, torch.Generator().manual_seed(1))
    assert_same_step(ours, theirs, imgs, mask)


@pytest.mark.parametrize("hidden", [1, 2, 4, 7, 8])
def test_any_number_of_hidden_cells(hidden):
    ours, theirs, imgs = pair(SIZES["odd grid of cells"])
    mask = torch.zeros(9)
    mask[torch.randperm(9)[:hidden]] = 1
    assert_same_step(ours, theirs, imgs, mask)


def test_a_drawn_range_of_mask_ratios():
    ours, theirs, imgs = pair(SIZES["odd grid of cells"])
    ours.range_mask_ratio = 0.4
    generator = torch.Generator().manual_seed(0)
    masks = [ours.random_masking(0.3, generator) for _ in range(20)]
    assert len({int(mask.sum()) for mask in masks}) > 1
    for mask in masks[:3]:
        ours.zero_grad()
        theirs.zero_grad()
        assert_same_step(ours, theirs, imgs, mask)


def test_other_channels():
    ours, theirs, imgs = pair(SIZES["one window per stage"], in_chans=5)
    assert_same_step(ours, theirs, imgs, ours.random_masking(0.5))


def test_shapes_that_do_not_depend_on_the_mask():
    """The layout for GPUs and `torch.compile`, which hides pairs instead of sorting tokens."""
    ours, theirs, imgs = pair(SIZES["windows cut through cells"], norm_pix_loss=True)
    ours.one_layout_shape = True
    assert_same_step(ours, theirs, imgs, ours.random_masking(0.5))


def test_grad_checkpointing_changes_nothing():
    ours, theirs, imgs = pair(SIZES["wide"])
    ours.set_grad_checkpointing(True)
    assert_same_step(ours, theirs, imgs, ours.random_masking(0.5))


def test_prediction_of_both_branches_is_selected_where_hidden():
    """Ours predicts hidden cells alone; the textbook predicts everything and selects."""
    ours, theirs, imgs = pair(SIZES["wide"])
    mask = ours.random_masking(0.5)
    with torch.no_grad():
        _, pred, _ = ours(imgs, mask=mask)
        _, _, both = theirs(imgs, mask)
    first, second = both.chunk(2)
    hidden = mask.bool()
    torch.testing.assert_close(pred[:, hidden], first[:, hidden], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pred[:, ~hidden], second.flip(0)[:, ~hidden], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [SIZES["wide"], SIZES["windows cut through cells"]], ids=["wide", "224"])
def test_classifier(size):
    torch.manual_seed(0)
    config = {**SMALL, **size, "num_classes": 10}
    ours, theirs = SwinTransformer(**config), TextbookEncoder(Config(**config))
    theirs.load_state_dict(ours.state_dict())
    imgs, targets = torch.randn(2, 3, *ours.img_size), torch.tensor([3, 7])
    logits, expected = ours(imgs), theirs(imgs)
    assert relative_difference(logits, expected) < 1e-5
    torch.nn.functional.cross_entropy(logits, targets).backward()
    torch.nn.functional.cross_entropy(expected, targets).backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])  # all rows kept here and there; some; none here and there
def test_drop_path_draws_the_same_rows(rate):
    torch.manual_seed(0)
    config = {**SMALL, **SIZES["one window per stage"], "num_classes": 10, "drop_path_rate": rate}
    ours, theirs = SwinTransformer(**config), TextbookEncoder(Config(**config))
    theirs.load_state_dict(ours.state_dict())
    imgs = torch.randn(8, 3, 64, 64)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        outputs.append(model.train()(imgs))
        outputs[-1].square().mean().backward()
    assert relative_difference(*outputs) < 1e-5
    assert_same_gradients(ours, theirs)
