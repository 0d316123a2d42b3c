"""The classifier against reference values, the published table's sizes, and timm's conventions."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from golden_files import load_golden, official_models, relative_error, without_derived
from timm.models.swin_transformer import get_relative_position_index
from torch.utils.flop_counter import FlopCounterMode

import models_swin
from models_swin import Block, PatchMerging, SwinTransformer, classification_loss
from util.layers.attention import segment_attention
from util.layers.windows import relative_position_index
from util.run.metrics import count_work
from util.run.optim import param_groups_layer_decay
from util.weights.layouts import load_classifier

SMALL = dict(img_size=64, embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], window_size=[8, 4, 4, 2])

# Name, the authors' name, and the multiply-adds of one forward pass that the paper's tables give, in G.
PUBLISHED = [
    ("swin_base_w14", "mixmim_base", 16.3),
    ("swin_base_w16_384", "mixmim_base_384", 52.6),
    ("swin_large_w14", "mixmim_large", 35.9),
    ("swin_large_w16_384", "mixmim_large_384", 112.0),
    ("swin_huge_w14", "mixmim_huge", None),
]


@pytest.fixture
def model() -> SwinTransformer:
    torch.manual_seed(0)
    return SwinTransformer(**SMALL, num_classes=5).eval()


@pytest.fixture
def imgs() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def weightless(name: str) -> SwinTransformer:
    """A registered model without memory for its weights."""
    with torch.device("meta"):
        return timm.create_model(name).eval()


# -- Reference values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["finetune_224", "finetune_224_to_384"])
def test_features_logits_and_loss_equal_the_reference(name):
    golden = load_golden(name)
    model = SwinTransformer(**golden.facts["config"]).eval()
    report = load_classifier(model, without_derived(golden.weights), name)
    assert not report.missing and not report.resized
    with torch.no_grad():
        features = model.forward_head(model.forward_features(golden.imgs), pre_logits=True)
        logits = model(golden.imgs)
    loss = F.cross_entropy(logits, golden.tensors["input.labels"])
    assert relative_error(features, golden.tensors["output.features"]) < 1e-5
    assert relative_error(logits, golden.tensors["output.logits"]) < 1e-5
    assert relative_error(loss, golden.tensors["output.loss"][0]) < 1e-5


def decay_table(model: SwinTransformer, layer_decay: float) -> dict[str, list[float]]:
    """Name -> [learning-rate scale, weight decay] of every trained parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=layer_decay)
    return {names[p]: [group["lr_scale"], group["weight_decay"]] for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", ["finetune_224", "finetune_224_to_384"])
def test_decay_groups_of_small_models_equal_the_reference(name):
    facts = load_golden(name).facts
    assert decay_table(SwinTransformer(**facts["config"]), facts["layer_decay"]) == facts["param_groups"]


def test_decay_groups_of_base_equal_the_reference():
    assert decay_table(weightless("swin_base_w14"), 0.7) == official_models()["finetune/mixmim_base"]["layer_decay_0.7"]


@pytest.mark.parametrize("name, authors_name, _", PUBLISHED)
def test_parameters_of_the_published_models(name, authors_name, _):
    model, official = weightless(name), official_models()[f"finetune/{authors_name}"]
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == without_derived(official["keys"])
    assert sum(parameter.numel() for parameter in model.parameters()) == official["params"]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == official["trainable"]


def multiply_adds(model: SwinTransformer) -> tuple[float, float]:
    """Of one image, in G: those of convolutions and linear layers, and those of the two products of attention."""
    imgs = torch.zeros(1, model.in_chans, *model.img_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(imgs)
    by_operation = {str(operation): flops / 2e9 for operation, flops in counter.get_flop_counts()["Global"].items()}
    attention = by_operation.pop("aten.bmm")
    assert set(by_operation) == {"aten.convolution", "aten.addmm", "aten.mm"}
    return sum(by_operation.values()), attention


@pytest.mark.parametrize("name, _, published", [row for row in PUBLISHED if row[2]])
def test_multiply_adds_of_the_published_models(name, _, published):
    """The published numbers are matrix products, those of attention included, with little or nothing for the rest.

    Ours are 16.32, 52.46, 35.80 and 111.99. Five more operations for every normalised element, a convention of common
    counters, make them 16.35, 52.57, 35.86 and 112.15.
    """
    layers, attention = multiply_adds(weightless(name))
    assert layers + attention == pytest.approx(published, rel=0.005)
    assert layers < 0.96 * published  # so the products of attention are part of what was published


def test_work_reported_by_a_run_is_the_same_count(model):
    weightless_model = SwinTransformer(**SMALL, num_classes=5).to("meta").eval()
    parameters, counted = count_work(model)
    assert counted == pytest.approx(sum(multiply_adds(weightless_model)) * 1e9, rel=1e-9)
    assert parameters == sum(parameter.numel() for parameter in model.parameters())


# -- Geometry --------------------------------------------------------------------------------------------------------


def test_windows_see_only_themselves(model, imgs):
    """A pixel of the first stage's upper left window changes that stage's output inside the window alone."""
    changed = imgs.clone()
    changed[:, :, 0, 0] += 1
    with torch.no_grad():
        before = model.forward_intermediates(imgs, intermediates_only=True)[0]
        after = model.forward_intermediates(changed, intermediates_only=True)[0]
    differs = (before != after).any(dim=1)  # (B, 16, 16)
    assert differs[:, :8, :8].all() and not differs[:, 8:].any() and not differs[:, :, 8:].any()


def test_tokens_attend_to_their_own_group_only(model, imgs):
    """With group ids, what the cells of one group hold does not change the features of the other, to the bit."""
    group = torch.tensor([[0, 1], [1, 0]])
    hidden = group.repeat_interleave(32, 0).repeat_interleave(32, 1).bool()
    changed = torch.where(hidden, imgs + 1, imgs)
    with torch.no_grad():
        before, after = model.forward_features(imgs, group), model.forward_features(changed, group)
        together = model.forward_features(imgs)
    own = group == 0
    assert torch.equal(before[:, own], after[:, own])
    assert not torch.equal(before[:, ~own], after[:, ~own])
    assert not torch.allclose(before, together, atol=1e-4)
    with torch.no_grad():
        one_group = model.forward_features(imgs, torch.zeros(4))
    torch.testing.assert_close(one_group, together, rtol=1e-5, atol=1e-5)


def test_position_embedding_stays_fixed(model, imgs):
    model.train()(imgs).sum().backward()
    assert model.absolute_pos_embed.grad is None
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "absolute_pos_embed")


def test_images_of_another_shape_are_named(model):
    with pytest.raises(ValueError, match=r"takes images of shape \(B, 3, 64, 64\), got \(2, 1, 64, 64\)"):
        model(torch.zeros(2, 1, 64, 64))


def test_drop_path_grows_from_the_first_to_the_last_block():
    model = SwinTransformer(**SMALL, drop_path_rate=0.2)
    rates = [block.drop_path_rate for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("kept", [[1, 1, 1], [0, 1, 1], [0, 0, 0]])
def test_a_dropped_branch_is_not_computed(monkeypatch, kept):
    block = Block(8, 2, drop_path=0.25).train()
    computed = []
    block.mlp.register_forward_hook(lambda module, args, output: computed.append(len(args[0])))
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda draw, probability: draw.copy_(torch.tensor(kept)))
    x = torch.randn(3, 5, 8)
    out = block(x)
    assert computed == [max(sum(kept), 1)]
    monkeypatch.undo()
    for row, is_kept in enumerate(kept):
        after_attention = x[row : row + 1] + is_kept * block.attn(block.norm1(x[row : row + 1])) / 0.75
        expected = after_attention + is_kept * block.mlp(block.norm2(after_attention)) / 0.75
        torch.testing.assert_close(out[row : row + 1], expected)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_attention_with_a_learned_bias_has_the_gradients_of_its_formula():
    segments = ((2, 3), (1, 4), (2, 2))  # segments of their own bias, a single one, and segments that share a bias
    torch.manual_seed(0)
    qkv = torch.randn(2, 14, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    biases = [torch.randn(k, 2, n, n, dtype=torch.float64, requires_grad=True) for k, n in ((2, 3), (1, 4), (1, 2))]
    assert torch.autograd.gradcheck(lambda qkv, *biases: segment_attention(qkv, segments, biases), (qkv, *biases))
    out = segment_attention(qkv, segments, biases)
    assert "BiasedAttention" in type(out.grad_fn).__name__
    with torch.no_grad():  # by PyTorch's kernels
        torch.testing.assert_close(segment_attention(qkv, segments, biases), out)
    q, k, v = qkv[0, 6:10].unbind(1)  # the segment of 4 tokens: (4, heads, d)
    scores = torch.einsum("qhd,khd->hqk", q, k) / 5**0.5 + biases[1][0]
    torch.testing.assert_close(out[0, 6:10], torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))


def test_the_bias_table_is_looked_up_as_in_swin():
    place = torch.randperm(25)[:9]
    expected = get_relative_position_index(5, 5)
    assert torch.equal(relative_position_index(torch.arange(25), 5), expected)
    assert torch.equal(relative_position_index(place, 5), expected[place][:, place])


def test_patch_merging_orders_its_parameters_as_the_authors_files():
    assert list(PatchMerging(8).state_dict()) == ["reduction.weight", "norm.weight", "norm.bias"]


def test_loss_of_classes_and_of_class_distributions():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    assert torch.equal(classification_loss(logits, targets), F.cross_entropy(logits, targets))
    smoothed = F.cross_entropy(logits, targets, label_smoothing=0.3)
    torch.testing.assert_close(classification_loss(logits, targets, 0.3), smoothed)
    distribution = 0.7 * F.one_hot(targets, 5) + 0.3 / 5
    for smoothing in (0.0, 0.3):  # which a distribution has already
        torch.testing.assert_close(classification_loss(logits, distribution, smoothing), smoothed)


# -- timm's conventions ----------------------------------------------------------------------------------------------


def test_all_models_are_registered_with_a_configuration():
    for name in models_swin.default_cfgs:
        configuration = timm.get_pretrained_cfg(name)
        assert configuration.input_size[1:] == weightless(name).img_size
        assert configuration.interpolation == "bicubic" and configuration.classifier == "head"
    assert timm.get_pretrained_cfg("swin_base_w14").crop_pct == 0.875
    assert timm.get_pretrained_cfg("swin_base_w16_384").crop_pct == 1.0
    assert timm.create_model("swin_quickstart").default_cfg["input_size"] == (3, 32, 32)


def test_create_model_takes_every_option():
    model = timm.create_model(
        "swin_quickstart", num_classes=7, in_chans=5, img_size=(16, 32), window_size=(4, 4, 4, 2), drop_path_rate=0.1
    )
    assert model(torch.zeros(2, 5, 16, 32)).shape == (2, 7)
    with pytest.raises(TypeError, match="no_such_option"):
        timm.create_model("swin_quickstart", no_such_option=1)


def test_head_can_be_left_out_replaced_and_asked_for(model, imgs):
    assert isinstance(model.get_classifier(), torch.nn.Linear)
    features = model.forward_features(imgs)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape == (2, 2, 2, 128) and pooled.shape == (2, 128)
    assert torch.equal(pooled, features.mean((1, 2)))
    assert torch.equal(model(imgs), model.head(pooled))

    model.reset_classifier(3)
    assert model.num_classes == 3 and model(imgs).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(imgs), pooled) and model.num_classes == 0
    headless = timm.create_model("swin_quickstart", num_classes=0)
    assert isinstance(headless.get_classifier(), torch.nn.Identity)
    assert headless(torch.zeros(1, 3, 32, 32)).shape == (1, headless.num_features)
    with pytest.raises(ValueError, match=r"pools by averaging .*got 'max'"):
        model.reset_classifier(3, "max")


def test_no_weight_decay_names_parameters(model):
    names = {name for name, parameter in model.named_parameters()}
    assert model.no_weight_decay() == {"absolute_pos_embed"} and model.no_weight_decay() <= names


def test_checkpointing_changes_nothing_but_memory(imgs):
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = SwinTransformer(**SMALL, num_classes=5, drop_path_rate=0.5).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)  # for drop path
        loss = model(imgs).square().sum()
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*results))


def test_dense_features_of_the_stages(model, imgs):
    last, maps = model.forward_intermediates(imgs)
    assert torch.equal(last, model.forward_features(imgs))
    assert [tuple(x.shape[1:]) for x in maps] == [(16, 16, 16), (32, 8, 8), (64, 4, 4), (128, 2, 2)]
    normed = model.forward_intermediates(imgs, indices=1, norm=True, intermediates_only=True, output_fmt="NHWC")
    assert len(normed) == 1 and torch.equal(normed[0], last)
    selected = model.forward_intermediates(imgs, indices=[0, 2], intermediates_only=True)
    assert all(torch.equal(x, maps[i]) for x, i in zip(selected, [0, 2]))
    # Row and column stand where they should: a map's cell comes from the tokens of the same place.
    wide = SwinTransformer(**SMALL | {"img_size": (64, 128)})
    assert wide.forward_intermediates(torch.zeros(1, 3, 64, 128), intermediates_only=True)[3].shape[2:] == (2, 4)


def test_features_only():
    network = timm.create_model("swin_quickstart", features_only=True, out_indices=(1, 3))
    assert network.feature_info.channels() == [32, 128] and network.feature_info.reduction() == [2, 8]
    assert [tuple(x.shape) for x in network(torch.zeros(2, 3, 32, 32))] == [(2, 32, 16, 16), (2, 128, 4, 4)]
    every_stage = timm.create_model("swin_quickstart", features_only=True)
    assert [x.shape[1] for x in every_stage(torch.zeros(1, 3, 32, 32))] == [16, 32, 64, 128]


# -- Ways to run a model ---------------------------------------------------------------------------------------------


def test_features_can_be_taken_before_training():
    """What a forward pass without gradients leaves behind must serve the backward pass as well."""
    model = timm.create_model("swin_quickstart")
    imgs = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        model(imgs)
    model(imgs).sum().backward()
    assert model.layers[0].blocks[0].attn.relative_position_bias_table.grad is not None


def test_a_model_works_after_it_was_exported():
    """No index tensor may be left that is one of the stand-ins that torch.export computes with."""
    imgs = torch.randn(2, 3, 32, 32)
    model = timm.create_model("swin_quickstart").eval()
    exported = torch.export.export(model, (imgs,)).module()
    logits = model(imgs)
    assert type(logits) is torch.Tensor
    torch.testing.assert_close(exported(imgs), logits)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_traced_model_computes_the_same(model, imgs, checkpointing):
    """With gradients enabled, where training on a CPU has kernels of its own that a tracer cannot see into."""
    model.set_grad_checkpointing(checkpointing)
    traced = torch.jit.trace(model, imgs, check_trace=False)
    others = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(traced(others), model(others))
    assert traced(others).requires_grad


def test_tracing_stochastic_depth_does_not_record_a_draw():
    model = timm.create_model("swin_quickstart", drop_path_rate=0.5).train()
    imgs = torch.randn(4, 3, 32, 32)
    exported = torch.export.export(model, (imgs,)).module()
    outputs = [exported(imgs) for _ in range(2)]
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("group", [None, torch.tensor([[0, 1], [1, 0]])])
@pytest.mark.parametrize("train", [False, True])
def test_a_forward_pass_without_memory(train, group):
    with torch.device("meta"):
        model = SwinTransformer(**SMALL, num_classes=5, drop_path_rate=0.5).train(train)
        features = model.forward_features(torch.empty(2, 3, 64, 64), group)
    assert model.forward_head(features).shape == (2, 5) and features.device.type == "meta"
    assert all(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers()))


def test_copies_and_other_types_have_their_own_index_tensors(model, imgs):
    twin = copy.deepcopy(model)
    assert torch.equal(twin(imgs), model(imgs))
    assert not {b.data_ptr() for b in twin.buffers()} & {b.data_ptr() for b in model.buffers()}
    assert all(b.dtype == torch.long for b in twin.to(torch.bfloat16).buffers())
    assert all(b.device.type == "meta" for b in twin.to("meta").buffers())
    assert twin(imgs.to("meta", torch.bfloat16)).shape == (2, 5)


def test_group_ids_may_be_any_whole_numbers(model, imgs):
    group = torch.tensor([[0, 1], [2, 0]])
    expected = model.forward_features(imgs, group)
    torch.testing.assert_close(model.forward_features(imgs, 5 * group - 7), expected)


def test_a_fresh_head_takes_the_models_device_and_type():
    model = timm.create_model("swin_quickstart").to(torch.bfloat16)
    model.reset_classifier(7)
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)).shape == (2, 7)


def test_features_only_drops_the_stages_after_the_last_one_wanted():
    whole = timm.create_model("swin_quickstart")
    model = timm.create_model("swin_quickstart", features_only=True, out_indices=(0, 1))
    maps = model(torch.randn(2, 3, 32, 32))
    assert [tuple(x.shape[1:]) for x in maps] == [(16, 32, 32), (32, 16, 16)]
    sum(x.sum() for x in maps).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert sum(p.numel() for p in trained) < 0.1 * sum(p.numel() for p in whole.parameters())
