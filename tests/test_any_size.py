"""Images of any height and width: against a slow reference, a loop over windows that shares no code with the model."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

import util.layers.stage
from models_mixmae import MixMAE
from models_swin import SwinTransformer
from util.errors import UserError
from util.weights.layouts import load_classifier

SHAPE = dict(
    img_size=224, embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], window_size=[14, 14, 14, 7], num_classes=5
)
DECODER = dict(decoder_dim=32, decoder_depth=1, decoder_num_heads=4)


def away_from_the_start(model: torch.nn.Module) -> torch.nn.Module:
    """Biases, norms and bias tables with values in which errors would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> SwinTransformer:
    torch.manual_seed(0)
    return away_from_the_start(SwinTransformer(**SHAPE, strict_img_size=False))


def images(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


# --- The reference ---


def reference_block(block, x: Tensor, window: int, group: Tensor | None) -> Tensor:
    attended = torch.empty_like(x)
    normed = block.norm1(x)
    for top in range(0, x.shape[1], window):
        for left in range(0, x.shape[2], window):
            area = (slice(top, top + window), slice(left, left + window))
            tokens = normed[:, area[0], area[1]]
            own_group = None if group is None else group[area]
            attended[:, area[0], area[1]] = reference_attention(block.attn, tokens, window, own_group)
    x = x + attended
    return x + block.mlp(block.norm2(x))


def reference_attention(attention, tokens: Tensor, window: int, group: Tensor | None) -> Tensor:
    """Attention among the tokens (B, rows, columns, C) of one window, whole or cut."""
    B, rows, columns, C = tokens.shape
    heads = attention.num_heads
    row, column = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    down, right = row[:, None] - row[None, :], column[:, None] - column[None, :]
    table = attention.relative_position_bias_table.view(2 * window - 1, 2 * window - 1, heads)
    bias = table[down + window - 1, right + window - 1].permute(2, 0, 1)
    if group is not None:
        bias = bias.masked_fill(group.flatten()[:, None] != group.flatten()[None, :], -torch.inf)
    q, k, v = attention.qkv(tokens).view(B, rows * columns, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) * (C // heads) ** -0.5 + bias).softmax(-1)
    return attention.proj((weights @ v).transpose(1, 2).reshape(B, rows, columns, C))


def reference_features(model: SwinTransformer, imgs: Tensor, group: Tensor | None = None) -> list[Tensor]:
    """The four stages' outputs and the normed last one, (B, rows, columns, channels); group: ids (rows, columns)."""
    patch = model.patch_size
    whole = imgs.new_zeros(*imgs.shape[:2], *(-(-side // patch) * patch for side in imgs.shape[2:]))
    whole[:, :, : imgs.shape[2], : imgs.shape[3]] = imgs
    x = model.patch_embed.norm(model.patch_embed.proj(whole).permute(0, 2, 3, 1))
    rows, columns = model.layers[0].grid
    position = model.absolute_pos_embed.view(1, rows, columns, -1).permute(0, 3, 1, 2)
    if (rows, columns) != x.shape[1:3]:
        position = F.interpolate(position, size=x.shape[1:3], mode="bicubic", align_corners=False)
    x = x + position.permute(0, 2, 3, 1)
    outputs = []
    for i, stage in enumerate(model.layers):
        cells = 2 ** (3 - i)
        own = group if group is None else group.repeat_interleave(cells, 0).repeat_interleave(cells, 1)
        for block in stage.blocks:
            x = reference_block(block, x, stage.window, None if own is None else own[: x.shape[1], : x.shape[2]])
        outputs.append(x)
        if i < 3:
            B, rows, columns, C = x.shape
            even = x.new_zeros(B, rows + rows % 2, columns + columns % 2, C)
            even[:, :rows, :columns] = x
            x = torch.cat([even[:, 0::2, 0::2], even[:, 1::2, 0::2], even[:, 0::2, 1::2], even[:, 1::2, 1::2]], -1)
            x = stage.downsample.reduction(stage.downsample.norm(x))
    return [*outputs, model.norm(x)]


def random_sizes(count: int) -> list[tuple[int, int]]:
    sides = torch.randint(32, 513, (count, 2), generator=torch.Generator().manual_seed(10))
    return [tuple(pair) for pair in sides.tolist()]


@pytest.mark.parametrize("size", [*random_sizes(40), (33, 512), (511, 32), (224, 224)])
def test_features_equal_the_reference(model, size):
    imgs = images(*size, batch=1)
    with torch.no_grad():
        expected = reference_features(model, imgs)
        last, maps = model.forward_intermediates(imgs, output_fmt="NHWC")
        assert torch.equal(model.forward_features(imgs), last)
    for ours, reference in zip([*maps, last], expected):
        assert ours.shape == reference.shape
        assert relative_error(ours, reference) < 1e-5
    strides = [-(-side // 32) for side in size]
    assert list(last.shape[1:3]) == strides


def test_gradients_equal_the_reference(model):
    imgs = images(150, 93)
    direction = torch.randn(2, 5, 3, 128)
    gradients = []
    for forward in (model.forward_features, lambda imgs: reference_features(model, imgs)[-1]):
        model.zero_grad()
        (forward(imgs) * direction).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(gradient.norm() for gradient in gradients[1].values())
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-6 * largest, name


@pytest.mark.parametrize("one_shape", [False, True])
@pytest.mark.parametrize("size", [(150, 93), (224, 224), (65, 300)])
def test_groups_in_windows_that_the_edge_cuts(model, size, one_shape):
    """Sorted by group, and masked in windows that stay whole, as on a GPU and when compiled."""
    imgs = images(*size)
    cells = [-(-side // 32) for side in size]
    group = torch.randint(0, 3, cells, generator=torch.Generator().manual_seed(3))
    compiled = copy.deepcopy(model)
    compiled.one_layout_shape = one_shape
    with torch.no_grad():
        features = compiled.forward_features(imgs, group)
        assert relative_error(features, reference_features(model, imgs, group)[-1]) < 1e-5


# --- What is padded ---


def test_patches_are_completed_with_zeros(model):
    imgs = images(101, 67)
    with torch.no_grad():
        assert torch.equal(model(imgs), model(F.pad(imgs, (0, 1, 0, 3))))
        assert not torch.equal(model(imgs), model(F.pad(imgs, (0, 1, 0, 3), value=1.0)))


def test_every_token_that_attends_is_one_of_the_image(model):
    lengths = []
    hooks = [
        stage.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
        for stage in model.layers
    ]
    model(images(101, 67))
    for hook in hooks:
        hook.remove()
    assert lengths == [26 * 17, 13 * 9, 7 * 5, 4 * 3]


def test_a_windows_last_token_reaches_its_own_window_alone(model):
    """At stage 1 of 30x24 tokens and windows of 14, the corner's window has 2x10 tokens."""
    imgs = images(118, 94)
    changed = imgs.clone()
    changed[:, :, -1, -1] = float("nan")
    with torch.no_grad():
        before, after = (model.forward_intermediates(x, [0], intermediates_only=True)[0] for x in (imgs, changed))
    assert after[:, :, 28:, 14:].isnan().all()
    after[:, :, 28:, 14:] = before[:, :, 28:, 14:]
    assert torch.equal(before, after)


def test_what_completes_an_odd_side_reaches_nothing_but_its_own_window(model, monkeypatch):
    """40x29 tokens at stage 1: a column is added, whose values must not leave the merged column's windows."""
    imgs = images(160, 116)
    before = model.forward_intermediates(imgs, intermediates_only=True)
    pad = F.pad
    monkeypatch.setattr(util.layers.stage.F, "pad", lambda x, sides: pad(x, sides, value=7.0))
    after = model.forward_intermediates(imgs, intermediates_only=True)
    assert torch.equal(before[0], after[0])
    assert before[1].shape[2:] == (20, 15)  # windows of 14: the last column is in windows of its own
    assert torch.equal(before[1][..., :14], after[1][..., :14])
    assert (before[1][..., 14:] != after[1][..., 14:]).any()


# --- The model's own size ---


def test_the_own_size_is_computed_as_ever(model):
    strict = SwinTransformer(**SHAPE).eval()
    strict.load_state_dict(model.state_dict())
    imgs = images(224, 224)
    assert torch.equal(strict(imgs), model(imgs))
    for stage, layout in zip(model.layers, model.layouts((56, 56))):
        assert layout.bias_index is stage.bias_index and len(layout.bias_index) == stage.window**4
        assert len(layout.segments) == 1


def test_a_strict_model_takes_its_own_size_alone():
    model = SwinTransformer(**SHAPE | dict(img_size=(64, 101)))
    assert model(images(64, 101)).shape == (2, 5)
    with pytest.raises(UserError, match=r"images of shape \(B, 3, 64, 101\), got \(2, 3, 64, 104\)"):
        model(images(64, 104))


def test_other_channels_are_refused_at_any_size(model):
    with pytest.raises(UserError, match=r"images of shape \(B, 3, H, W\), got \(2, 4, 50, 50\)"):
        model(torch.zeros(2, 4, 50, 50))


@pytest.mark.parametrize("wrong", [dict(img_size=0), dict(img_size=(64, -1)), dict(patch_size=0), dict(window_size=0)])
def test_sizes_below_one_are_refused(wrong):
    with pytest.raises(UserError, match="must be at least 1"):
        SwinTransformer(**SHAPE | wrong)
    model = SwinTransformer(**SHAPE)
    with pytest.raises(UserError, match="must be at least 1"):
        model.set_input_size(**wrong)
    assert model(images(224, 224, batch=1)).shape == (1, 5)  # nothing has changed


@pytest.mark.parametrize("window_size", [4, (4, 4), (4, 4, 4, 4), ((4, 4), 4, (4, 4), 4)])
def test_windows_are_given_as_in_timm(window_size):
    model = SwinTransformer(**SHAPE | dict(img_size=64, window_size=window_size))
    assert [stage.window for stage in model.layers] == [4, 4, 4, 2]  # the last grid has 2x2 tokens


def test_set_input_size_takes_timms_arguments_for_windows():
    """What is not a size of theirs leaves the windows alone; grids at 96x128 are 24x32, 12x16, 6x8 and 3x4."""
    model = SwinTransformer(**SHAPE)

    def windows(**arguments) -> list[int]:
        model.set_input_size(img_size=(96, 128), **arguments)
        assert model(images(96, 128, batch=1)).shape == (1, 5)
        return [stage.window for stage in model.layers]

    assert windows() == windows(always_partition=True) == [14, 14, 14, 7]
    assert windows(always_partition=False) == [14, 12, 6, 3]
    assert windows(window_ratio=4, always_partition=True) == [6, 6, 6, 6]
    assert windows(window_ratio=4) == [6, 6, 6, 3]
    assert windows(window_ratio=[8, 8, 4, 30]) == [3, 3, 6, 1]
    assert windows(window_size=5, window_ratio=2) == [5, 5, 5, 3]
    for wrong, error, message in (
        (dict(window_size=(5, 6)), UserError, "windows are square, got 5x6"),
        (dict(window_ratio=0), UserError, "window_ratio must be at least 1"),
        (dict(window_ratio=(2, 4)), ValueError, "window_ratio needs one value for each of the 4 stages"),
        (dict(window_size=(5, 5, 5)), ValueError, "window_size needs one value for each of the 4 stages"),
    ):
        with pytest.raises(error, match=message):
            model.set_input_size(img_size=224, **wrong)
        assert model.img_size == (96, 128) and [stage.window for stage in model.layers] == [5, 5, 5, 3]


@pytest.mark.parametrize("size", [448, (96, 160), (130, 77)])
def test_set_input_size_gives_what_a_free_model_computes(model, size):
    resized = copy.deepcopy(model)
    resized.patch_embed.strict_img_size = True
    resized.set_input_size(img_size=size)
    imgs = images(*resized.img_size, batch=1)
    assert torch.equal(resized(imgs), model(imgs))
    shapes = {name: p.shape for name, p in resized.named_parameters() if name != "absolute_pos_embed"}
    assert all(model.get_parameter(name).shape == shape for name, shape in shapes.items())
    with pytest.raises(UserError, match="got"):
        resized(images(224, 224, batch=1))


def test_set_input_size_with_windows_is_building_and_loading(model):
    resized = copy.deepcopy(model).to(torch.float64)
    resized.set_input_size(img_size=(96, 128), window_size=(7, 9, 9, 9))
    built = SwinTransformer(**SHAPE | dict(img_size=(96, 128), window_size=(7, 9, 9, 9))).to(torch.float64).eval()
    load_classifier(built, model.state_dict(), "the model")
    imgs = images(96, 128).double()
    torch.testing.assert_close(resized(imgs), built(imgs), rtol=1e-6, atol=1e-6)
    assert [stage.window for stage in resized.layers] == [7, 9, 6, 3]
    assert resized.absolute_pos_embed.dtype == torch.float64 and not resized.absolute_pos_embed.requires_grad


def test_set_input_size_with_another_patch():
    model = SwinTransformer(**SHAPE).eval()
    with pytest.raises(UserError, match="patches are square, got 2x4"):
        model.set_input_size(patch_size=(2, 4))
    model.set_input_size(img_size=112, patch_size=(2, 2))
    assert model.patch_embed.proj.weight.shape[2:] == (2, 2) and model.encoder_stride == 16
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16]
    assert model.grid_size == (7, 7) and model(images(112, 112)).shape == (2, 5)


def test_frozen_stays_frozen():
    model = SwinTransformer(**SHAPE).requires_grad_(False)
    model.set_input_size(img_size=96, patch_size=2, window_size=5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


# --- Position embeddings of other sizes ---


def test_a_resized_position_embedding_follows_the_model(model):
    model, imgs = copy.deepcopy(model), images(90, 120)
    before = model(imgs)
    model.absolute_pos_embed.data.mul_(2)  # of which autograd knows nothing
    assert not torch.allclose(model(imgs), before)
    assert model.to(torch.bfloat16)(imgs.bfloat16()).dtype == torch.bfloat16
    assert model.to("meta")(imgs.to("meta", torch.bfloat16)).shape == (2, 5)


def test_features_of_another_size_can_be_taken_before_training(model):
    model, imgs = copy.deepcopy(model), images(90, 120)
    with torch.inference_mode():
        model(imgs)
    model(imgs).sum().backward()
    assert model.layers[0].blocks[0].attn.relative_position_bias_table.grad is not None


@pytest.mark.slow
def test_a_model_works_after_it_was_exported_at_another_size(model):
    model, imgs = copy.deepcopy(model), images(70, 90)
    exported = torch.export.export(model, (imgs,)).module()
    logits = model(imgs)
    assert type(logits) is Tensor
    torch.testing.assert_close(exported(imgs), logits)


@pytest.mark.slow
def test_a_model_compiles_whole_at_another_size(model):
    torch._dynamo.reset()
    imgs = images(70, 90)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(imgs), model(imgs), rtol=1e-4, atol=1e-5)


# --- Pretraining ---


@pytest.mark.parametrize("size", [256, (96, 160), pytest.param((288, 512), marks=pytest.mark.slow)])
def test_pretraining_at_sizes_that_windows_do_not_tile(size):
    torch.manual_seed(0)
    encoder = {name: value for name, value in SHAPE.items() if name != "num_classes"}
    model = away_from_the_start(MixMAE(**encoder | dict(img_size=size), **DECODER))
    imgs, mask = images(*model.img_size), model.random_masking(0.5)
    assert len(mask) == model.img_size[0] * model.img_size[1] // 32**2
    with torch.no_grad():
        latent = model.forward_encoder(imgs, mask)
        cells = mask.view(model.grid_size)
        hidden = cells.repeat_interleave(32, 0).repeat_interleave(32, 1).bool()
        mixed = torch.where(hidden, imgs.flip(0), imgs)
        assert relative_error(latent, reference_features(model, mixed, cells)[-1].flatten(1, 2)) < 1e-5
    loss, pred, _ = model(imgs, mask=mask)
    loss.backward()
    assert model.unpatchify(pred).shape == imgs.shape
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_pretraining_model_takes_another_size():
    model = timm.create_model("mixmae_quickstart", strict_img_size=False)
    with pytest.raises(UserError, match="takes images of 32x32: call set_input_size"):
        model(torch.zeros(2, 3, 40, 32))
    assert model.forward_features(torch.zeros(2, 3, 37, 32)).shape == (2, 5, 4, 128)
    model.set_input_size(img_size=(40, 24))
    loss, pred, mask = model(torch.randn(2, 3, 40, 24))
    assert pred.shape == (2, 15, 192) and len(mask) == 15 and loss.isfinite()
    assert not model.decoder_pos_embed.requires_grad
    with pytest.raises(UserError, match="multiples of 8, got input size 40x36; use 40x32"):
        model.set_input_size(img_size=(40, 36))
    with pytest.raises(UserError, match="cells of patches of 1 pixels, got 2"):
        model.set_input_size(patch_size=2)


def test_a_state_dict_of_another_size_with_as_many_tokens_is_resized():
    shape = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), patch_size=2, window_size=4, num_classes=3)
    wide, tall = (SwinTransformer(img_size=size, **shape) for size in ((32, 64), (64, 32)))
    tall.load_state_dict(wide.state_dict())
    source = wide.absolute_pos_embed
    expected = resample_abs_pos_embed(source, (32, 16), (16, 32), num_prefix_tokens=0, antialias=False)
    assert not torch.equal(tall.absolute_pos_embed, source)
    torch.testing.assert_close(tall.absolute_pos_embed, expected)
