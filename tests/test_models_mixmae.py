"""The pretraining model against reference values, and the properties that the method promises."""

import itertools
import math
from types import SimpleNamespace

import pytest
import timm
import torch
from golden_files import load_golden, official_models, relative_error, without_derived
from timm.optim import param_groups_weight_decay

from models_mixmae import MixMAE
from util.errors import UserError
from util.layers.pos_embed import get_2d_sincos_pos_embed
from util.run.optim import adjust_learning_rate
from util.seeding import keyed_generator

SMALL = dict(
    img_size=64,
    embed_dim=16,
    depths=[1, 1, 2, 1],
    num_heads=[1, 2, 4, 8],
    window_size=[8, 4, 8, 4],
    decoder_dim=32,
    decoder_depth=2,
    decoder_num_heads=4,
    patch_size=2,
)  # 4x4 cells


@pytest.fixture
def model() -> MixMAE:
    torch.manual_seed(0)
    return MixMAE(**SMALL)


@pytest.fixture
def imgs() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, generator=keyed_generator(1))


@pytest.fixture
def mask(model) -> torch.Tensor:
    return model.random_masking(0.5, keyed_generator(2))


# --- Reference values ---


@pytest.mark.parametrize("name", ["pretrain_64", "pretrain_224"])
def test_outputs_and_gradients_equal_the_reference(name):
    golden = load_golden(name)
    model = MixMAE(**golden.facts["config"])
    model.load_state_dict(without_derived(golden.weights))
    mask = golden.tensors["input.mask"]
    loss, pred, _ = model(golden.imgs, mask=mask)
    loss.backward()

    assert loss.item() == pytest.approx(golden.tensors["output.loss"].item(), rel=1e-5)
    assert relative_error(model.forward_encoder(golden.imgs, mask), golden.tensors["output.latent"]) < 1e-5
    for part, columns in (("first32", slice(None, 32)), ("last32", slice(-32, None))):
        first, second = golden.tensors[f"output.pred_{part}"].chunk(2)
        reference = torch.where(mask.bool()[:, None], first, second.flip(0))
        assert relative_error(pred[..., columns], reference) < 1e-5
    norms = golden.facts["grad_norms"]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert norms.keys() == trained.keys()
    for parameter_name, parameter in trained.items():
        assert parameter.grad.norm().item() == pytest.approx(norms[parameter_name], rel=1e-4), parameter_name
    assert relative_error(model.mask_token.grad, golden.tensors["grad.mask_token"]) < 1e-4
    assert relative_error(model.patch_embed.proj.weight.grad, golden.tensors["grad.patch_embed.proj.weight"]) < 1e-4
    tables = [stage.blocks[0].attn.relative_position_bias_table.grad for stage in model.layers]
    assert any(
        table.shape == golden.tensors["grad.rpb"].shape and relative_error(table, golden.tensors["grad.rpb"]) < 1e-4
        for table in tables
    )


@pytest.mark.parametrize("name", ["pretrain_64", "pretrain_224"])
def test_five_steps_give_the_reference_losses(name):
    golden = load_golden(name)
    model = MixMAE(**golden.facts["config"])
    model.load_state_dict(without_derived(golden.weights))
    recipe = golden.facts["adamw"]
    groups = param_groups_weight_decay(model, recipe["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=recipe["lr"], betas=recipe["betas"], fused=True)
    epochs = dict(warmup_epochs=recipe["warmup_epochs"], epochs=recipe["epochs"])
    schedule = SimpleNamespace(lr=recipe["lr"], min_lr=0.0, **epochs)
    losses = []
    for i in range(5):
        adjust_learning_rate(optimizer, i + 0.5, schedule)
        loss, _, _ = model(golden.imgs, mask=golden.tensors["input.mask"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(golden.facts["loss_curve"], rel=1e-4)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_state_dict_keeps_the_published_names_and_shapes(size):
    official = official_models()[f"pretrain/mixmim_{size}"]
    with torch.device("meta"):
        model = timm.create_model(f"mixmae_{size}")
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == without_derived(official["keys"])
    assert sum(p.numel() for p in model.parameters()) == official["params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == official["trainable"]


def test_position_embedding_encodes_column_then_row():
    embedding = get_2d_sincos_pos_embed(16, (3, 5))[0].view(3, 5, 16)
    assert torch.equal(embedding[0, :, :8], embedding[2, :, :8])  # columns do not depend on the row
    assert torch.equal(embedding[:, 0, 8:], embedding[:, 4, 8:])
    for k, position in itertools.product(range(4), range(5)):
        assert embedding[0, position, k].item() == pytest.approx(math.sin(position * 10000 ** (-k / 4)), abs=1e-7)
        assert embedding[0, position, 4 + k].item() == pytest.approx(math.cos(position * 10000 ** (-k / 4)), abs=1e-7)


def test_initial_weights_follow_the_recipe():
    torch.manual_seed(0)
    model = MixMAE(**SMALL | {"embed_dim": 32})
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            limit = math.sqrt(6 / (module.in_features + module.out_features))
            assert module.weight.abs().max() <= limit and module.weight.std().item() == pytest.approx(
                limit / 3**0.5, rel=0.1
            ), name
            assert module.bias is None or not module.bias.any(), name
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any() and module.eps == 1e-5, name
    table = model.layers[2].blocks[0].attn.relative_position_bias_table
    assert table.std().item() == pytest.approx(0.02, rel=0.2) and model.mask_token.std().item() == pytest.approx(
        0.02, rel=0.5
    )


# --- Mask ---


def test_mask_hides_the_integer_share_uniformly(model):
    counts = torch.zeros(16)
    for i in range(2000):
        mask = model.random_masking(0.4, keyed_generator(i))
        assert mask.sum() == int(16 * 0.4)
        counts += mask
    assert (counts / 2000 - 6 / 16).abs().max() < 0.05  # 4.6 standard deviations


def test_base_hides_24_of_49_cells():
    model = MixMAE(**SMALL | dict(img_size=224, patch_size=4, window_size=[14, 14, 14, 7]))
    assert model.random_masking(0.5).sum() == 24 and model.num_cells == 49


def test_range_mask_ratio_adds_up_to_its_value():
    model = MixMAE(**SMALL, range_mask_ratio=0.25)
    hidden = {int(model.random_masking(0.5, keyed_generator(i)).sum()) for i in range(300)}
    assert hidden == {8, 9, 10, 11}  # int(16 * (0.5 + U(0, 0.25)))


def test_mask_is_a_function_of_its_key(model):
    draw = [model.random_masking(0.5, keyed_generator(*key)) for key in ((0, 1, 2), (0, 1, 2), (0, 2, 2), (0, 1, 3))]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2]) and not torch.equal(draw[0], draw[3])


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5])
def test_mask_ratio_outside_its_range_is_an_error(model, ratio):
    with pytest.raises(UserError, match=f"mask_ratio must lie between 0 and 1.*got mask_ratio={ratio}"):
        model.random_masking(ratio)


def test_mask_ratio_that_hides_nothing_is_an_error(model):
    with pytest.raises(UserError, match=r"hides 0 of 16 cells.*between 0.0625 and"):
        model.random_masking(0.05)


@pytest.mark.parametrize("bad", [torch.ones(16), torch.zeros(16)])
def test_fixed_mask_that_hides_all_or_nothing_is_an_error(model, imgs, bad):
    with pytest.raises(UserError, match="of 16 cells: there is nothing to learn"):
        model(imgs, mask=bad)


@pytest.mark.parametrize("bad", [torch.ones(4), torch.full((16,), 0.5), torch.eye(4)])
def test_mask_of_another_form_is_an_error(model, imgs, bad):
    with pytest.raises(ValueError, match="a mask is 0 or 1 for each of the 16 cells"):
        model(imgs, mask=bad)


def test_stage_masks_nest(model, mask):
    """Every layout groups exactly the tokens that the cell mask covers, at all four stages."""
    for stage, layout in zip(model.layers, model.layouts(model.layers[0].grid, mask)):
        scale = stage.grid[0] // 4
        expected = mask.view(4, 4).repeat_interleave(scale, 0).repeat_interleave(scale, 1).flatten()
        order = layout.order if layout.order is not None else torch.arange(expected.numel())
        lengths = [n for count, n in layout.segments for _ in range(count)]
        assert sum(lengths) == expected.numel()
        for segment in order.split(lengths):
            assert len(expected[segment].unique()) == 1  # one group in a segment
            rows, columns = segment // stage.grid[1] // stage.window, segment % stage.grid[1] // stage.window
            assert len(rows.unique()) == len(columns.unique()) == 1  # one window in a segment
        tokens = torch.arange(expected.numel())
        windows = tokens // stage.grid[1] // stage.window * 100 + tokens % stage.grid[1] // stage.window
        pieces = torch.stack([windows, expected], dim=1).unique(dim=0)
        assert len(lengths) == len(pieces)  # and nobody of the same window and group is left out


# --- Mix, encode ---


def test_mixed_tokens_are_the_images_own_where_the_mask_is_0(model, imgs, mask):
    tokens = model.embed(imgs)
    token_mask = mask.view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
    mixed = model.embed_mixture(imgs, token_mask[..., None].bool()).view(4, 32, 32, 16)
    own, partner = tokens.view(4, 32, 32, 16), tokens.flip(0).view(4, 32, 32, 16)
    for cell in range(16):
        area = (slice(None), slice(cell // 4 * 8, cell // 4 * 8 + 8), slice(cell % 4 * 8, cell % 4 * 8 + 8))
        assert torch.equal(mixed[area], (partner if mask[cell] else own)[area])


def test_partner_never_reaches_an_images_own_tokens(model, imgs, mask):
    latent = model.forward_encoder(imgs, mask)
    changed = imgs.clone()
    changed[3] = torch.randn(3, 64, 64)  # the partner of image 0
    other = model.forward_encoder(changed, mask)
    own = mask == 0
    assert torch.equal(latent[0, own], other[0, own])  # to the bit
    assert not torch.equal(latent[0, ~own], other[0, ~own])


def test_latent_equals_encoding_each_image_alone_in_the_same_groups(model, imgs, mask):
    latent = model.forward_encoder(imgs, mask)
    alone = model.forward_features(imgs, group=mask).flatten(1, 2)
    own = mask == 0
    torch.testing.assert_close(latent[:, own], alone[:, own], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(latent.flip(0)[:, ~own], alone[:, ~own], rtol=1e-5, atol=1e-5)


def test_groups_change_the_features(model, imgs, mask):
    assert not torch.allclose(model.forward_features(imgs), model.forward_features(imgs, group=mask), atol=1e-3)


def test_swapping_the_batch_swaps_the_outputs(model, imgs, mask):
    loss, pred, _ = model(imgs, mask=mask)
    swapped_loss, swapped_pred, _ = model(imgs.flip(0), mask=mask)
    torch.testing.assert_close(swapped_pred, pred.flip(0), rtol=1e-5, atol=1e-5)
    assert swapped_loss.item() == pytest.approx(loss.item(), rel=1e-6)


def test_odd_batch_is_an_error(model):
    with pytest.raises(UserError, match="batch size must be even, got B=3"):
        model(torch.randn(3, 3, 64, 64))


# --- Decode, loss ---


def test_every_cell_is_predicted_without_seeing_it(model, imgs, mask):
    """Changing the pixels of a cell never changes its own prediction, but that of others of the image."""
    _, pred, _ = model(imgs, mask=mask)
    for cell in (int(mask.argmax()), int(mask.argmin())):
        changed = imgs.clone()
        changed[0, :, cell // 4 * 16 : cell // 4 * 16 + 16, cell % 4 * 16 : cell % 4 * 16 + 16] += 1
        _, other, _ = model(changed, mask=mask)
        torch.testing.assert_close(other[0, cell], pred[0, cell], rtol=0, atol=1e-5)
        assert (other[0] - pred[0]).abs().max() > 1e-3


def test_every_decoder_block_is_entered_by_its_own_forward(model, imgs, mask):
    """Hooks and sharding act there; the last one goes on with the hidden tokens alone after its attention."""
    rows = {name: [] for name, _ in model.decoder_blocks.named_modules()}
    for name, module in model.decoder_blocks.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: rows[name].append(output.shape[0]))
    model(imgs, mask=mask)
    del rows[""]  # the list of blocks
    assert all(rows.values())
    assert rows["0"] == rows["0.mlp"] == rows["1.attn.qkv"] == [8]
    assert rows["1"] == rows["1.attn"] == rows["1.mlp"] == [4]


def test_a_blocks_selection_is_that_of_its_output(model):
    x = torch.randn(4, 16, 32, generator=keyed_generator(5))
    block = model.decoder_blocks[1]
    torch.testing.assert_close(block(x, select=lambda x: x[1:, ::2]), block(x)[1:, ::2])


def test_patchify_orders_pixels_by_row_column_channel_and_round_trips(model, imgs):
    cells = model.patchify(imgs)
    assert cells.shape == (4, 16, 16 * 16 * 3)
    assert cells[1, 6, (5 * 16 + 7) * 3 + 2] == imgs[1, 2, 16 + 5, 2 * 16 + 7]
    assert torch.equal(model.unpatchify(cells), imgs)


def test_loss_is_the_error_against_pixels_and_against_normalised_pixels(model, imgs):
    pred = torch.randn(4, 16, 768, generator=keyed_generator(3))
    target = model.patchify(imgs)
    assert model.forward_loss(imgs, pred).item() == pytest.approx(((pred - target) ** 2).mean().item(), rel=1e-6)
    model.norm_pix_loss = True
    normed = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True, unbiased=True) + 1e-6) ** 0.5
    assert model.forward_loss(imgs, pred).item() == pytest.approx(((pred - normed) ** 2).mean().item(), rel=1e-6)
    assert model.forward_loss(imgs, normed).item() < 1e-10


def test_constant_cells_give_finite_normalised_targets():
    model = MixMAE(**SMALL, norm_pix_loss=True)
    loss, _, _ = model(torch.zeros(2, 3, 64, 64))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_accumulation_equals_one_big_batch(model, mask):
    """Pairs (i, B-1-i) of the big batch stay together in the micro-batches."""
    imgs = torch.randn(8, 3, 64, 64, generator=keyed_generator(4))
    model(imgs, mask=mask)[0].backward()
    big = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for rows in ([0, 1, 6, 7], [2, 3, 4, 5]):
        (model(imgs[rows], mask=mask)[0] / 2).backward()
    for name, gradient in big.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


# --- Sizes, channels ---


@pytest.mark.parametrize(
    "changes",
    [
        dict(in_chans=1),
        dict(in_chans=16, img_size=(32, 64)),
        dict(img_size=(96, 64), patch_size=4, window_size=[8, 4, 2, 1]),
        dict(patch_size=1, img_size=32),
        dict(img_size=(64, 128), patch_size=4, window_size=[16, 8, 4, 2]),
    ],
)
def test_other_channels_sizes_and_patches(changes):
    model = MixMAE(**SMALL | changes, norm_pix_loss=True)
    imgs = torch.randn(2, model.in_chans, *model.img_size)
    loss, pred, _ = model(imgs)
    loss.backward()
    assert pred.shape == (2, model.num_cells, model.encoder_stride**2 * model.in_chans)
    assert model.encoder_stride == 8 * model.patch_size
    assert model.unpatchify(pred).shape == imgs.shape
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("norm_pix_loss, drop_path_rate", [(True, 0.0), (False, 0.5)])
def test_training_without_memory(norm_pix_loss, drop_path_rate):
    """On the meta device, where shapes are computed and nothing else; masks are on the CPU as always."""
    model = MixMAE(**SMALL, norm_pix_loss=norm_pix_loss, drop_path_rate=drop_path_rate, device="meta")
    loss, pred, mask = model(torch.empty(4, 3, 64, 64, device="meta"))
    loss.backward()
    assert pred.shape == (4, 16, 768) and pred.device.type == "meta" and mask.device.type == "cpu"
    assert all(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers()))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("size, nearest", [((230, 224), "224x224"), ((225, 250), "224x256"), (9, "32x32")])
def test_size_of_no_whole_cells_names_the_nearest(size, nearest):
    given = "x".join(map(str, (size, size) if isinstance(size, int) else size))
    with pytest.raises(UserError, match=f"32x32 pixels.*multiples of 32, got input size {given}; use {nearest}"):
        MixMAE(img_size=size)
    MixMAE(**SMALL | dict(img_size=tuple(map(int, nearest.split("x"))), patch_size=4))


def test_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="window_sizes"):
        MixMAE(window_sizes=[8, 4, 8, 4])
    with pytest.raises(TypeError, match="decoder_heads"):
        timm.create_model("mixmae_quickstart", decoder_heads=4)


def test_images_of_another_shape_are_an_error(model):
    with pytest.raises(ValueError, match=r"takes images of shape \(B, 3, 64, 64\), got \(2, 1, 64, 64\)"):
        model(torch.randn(2, 1, 64, 64))


def test_empty_decoder_is_an_error():
    with pytest.raises(ValueError, match="decoder needs at least one block, got decoder_depth=0"):
        MixMAE(**SMALL | {"decoder_depth": 0})
