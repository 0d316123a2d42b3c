"""Weights of every known layout, from every kind of source, into every kind of model."""

import hashlib
import io
import json
import math
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

import util.weights.file
import util.weights.source
from models_mixmae import MixMAE
from models_swin import PatchMerging, SwinTransformer
from util.weights.file import CheckpointError, write_checkpoint
from util.weights.layouts import load_classifier, load_encoder, load_pretraining, normalise_state_dict
from util.weights.settings import CLASSIFIER_MODELS
from util.weights.source import PUBLISHED, Published, WeightsInfo, cache_folder, locate, read_weights

GOLDEN = Path(__file__).parent / "golden"
SHAPE = dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=(4, 4, 4, 2), img_size=64)
DECODER = dict(decoder_dim=16, decoder_depth=1, decoder_num_heads=2)


def classifier(**changes) -> SwinTransformer:
    return SwinTransformer(**{**SHAPE, "num_classes": 5, **changes})


def pretraining(**changes) -> MixMAE:
    return MixMAE(**{**SHAPE, **DECODER, **changes})


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """A file of reference values: the model's weights, the other tensors, and the metadata."""
    weights, others = {}, {}
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        for key in file.keys():
            kind = weights if key.startswith("weights.") else others
            kind[key.removeprefix("weights.")] = file.get_tensor(key)
        metadata = {key: json.loads(value) for key, value in file.metadata().items() if key in ("config", "adamw")}
    return weights, others, metadata


def assert_loaded(model: nn.Module, weights: dict[str, torch.Tensor], names) -> None:
    loaded = model.state_dict()
    for name in names:
        assert torch.equal(loaded[name], weights[name]), name


# -- Reference values -------------------------------------------------------------------------------------------


def five_steps(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor], metadata: dict) -> MixMAE:
    """The model of `pretrain_224` after the five AdamW steps of its loss curve."""
    model = MixMAE(**metadata["config"])
    model.load_state_dict(weights)
    recipe = metadata["adamw"]
    groups = timm.optim.param_groups_weight_decay(model, recipe["weight_decay"], no_weight_decay_list=())
    decaying = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    assert len(groups[1]["params"]) == len(decaying)  # everything but 1-D tensors and biases
    optimizer = torch.optim.AdamW(groups, betas=recipe["betas"])
    imgs = (others["input.images_u8"].float() / 255 - 0.5) / 0.25
    for step in range(5):
        epoch, warmup = step + 0.5, recipe["warmup_epochs"]
        cosine = 0.5 + 0.5 * math.cos(math.pi * (epoch - warmup) / (recipe["epochs"] - warmup))
        for group in optimizer.param_groups:
            group["lr"] = recipe["lr"] * (epoch / warmup if epoch < warmup else cosine)
        optimizer.zero_grad()
        model(imgs, mask=others["input.mask"])[0].backward()
        optimizer.step()
    return model


def test_resizing_from_224_to_384_gives_the_reference():
    """The reference was resized from `pretrain_224` as it is after the five steps of its loss curve.

    So the position embedding, which is not trained, is compared to the bit, and what is trained to the precision of
    five steps; the resizing of the tables is compared to the bit in the next test.
    """
    weights, others, metadata = golden("pretrain_224")
    expected, _, finetune = golden("finetune_224_to_384")
    trained = five_steps(weights, others, metadata).state_dict()
    model = SwinTransformer(**finetune["config"])
    report = load_encoder(model, trained, "pretrain_224")
    loaded = model.state_dict()
    encoder = [name for name in expected if not name.startswith("head.")]
    assert torch.equal(loaded["absolute_pos_embed"], expected["absolute_pos_embed"])
    for name in encoder:
        atol = 1e-6 if name.endswith("relative_position_bias_table") else 1e-4
        torch.testing.assert_close(loaded[name], expected[name], rtol=0, atol=atol, msg=name)

    assert sorted(report.loaded) == sorted(encoder)
    resized = [name for name in encoder if expected[name].shape != weights[name].shape]
    assert sorted(report.resized) == sorted(resized) and "absolute_pos_embed" in resized and len(resized) == 9
    assert report.missing == ["head.weight", "head.bias"] and report.reinitialised == []
    assert all(name.startswith(("decoder_", "mask_token")) for name in report.unexpected)
    assert str(report).startswith(f"loaded {len(encoder)} tensors from pretrain_224; 9 of them resized")


def test_bias_tables_are_resized_bicubically_on_their_square():
    source, model = classifier(), classifier(img_size=128, window_size=(8, 4, 4, 2))
    load_encoder(model, source.state_dict(), "a.pth")
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    table = source.state_dict()[name].t().reshape(1, -1, 7, 7)  # windows of 4
    expected = F.interpolate(table, size=(15, 15), mode="bicubic", align_corners=False)  # windows of 8
    assert torch.equal(model.state_dict()[name], expected[0].flatten(1).t())


@pytest.mark.parametrize("kind, model_name", [("pretrain", "mixmae_base"), ("finetune", "swin_base_w16_384")])
def test_a_saved_model_has_exactly_the_names_and_shapes_of_the_contract(tmp_path, kind, model_name):
    contract = json.loads((GOLDEN / "official_models.json").read_text())
    official = {"mixmae_base": "mixmim_base", "swin_base_w16_384": "mixmim_base_384"}[model_name]
    shapes = contract[f"{kind}/{official}"]["keys"]
    with torch.device("meta"):
        model = timm.create_model(model_name)
    small = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in model.state_dict().items()}  # 4 bytes each
    write_checkpoint(tmp_path / "checkpoint.pth", {"model": small, "epoch": 0})
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True, mmap=True)["model"]
    expected = {name: shape for name, shape in shapes.items() if not name.endswith("relative_position_index")}
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == expected


# -- mmpretrain -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.body.", "encoder.", "model."])
def test_the_encoder_of_a_larger_model(prefix, tmp_path):
    """Whose names begin as mmpretrain's do, and whose neck has names of its own."""
    original = classifier(num_classes=0)
    weights = {prefix + name: tensor for name, tensor in original.state_dict().items()}
    torch.save(weights | {"neck_of_mine.weight": torch.ones(3), "head.cls.weight": torch.ones(2)}, tmp_path / "d.pth")
    imgs = torch.randn(2, 3, 64, 64)
    loaded = classifier(num_classes=0)
    load_encoder(loaded, *read_weights(tmp_path / "d.pth"))
    assert torch.equal(loaded(imgs), original(imgs))


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1,)])
def test_a_pyramid_of_timm_takes_an_encoder(out_indices, tmp_path):
    original = timm.create_model("swin_tiny_w14", num_classes=0, **SHAPE)
    torch.save(original.state_dict(), tmp_path / "encoder.pth")
    pyramid = timm.create_model("swin_tiny_w14", features_only=True, out_indices=out_indices, **SHAPE)
    report = load_encoder(pyramid, *read_weights(tmp_path / "encoder.pth"))
    assert not report.missing
    imgs = torch.randn(2, 3, 64, 64)
    expected = original.forward_intermediates(imgs, indices=list(out_indices), intermediates_only=True)
    for ours, theirs in zip(pyramid(imgs), expected, strict=True):
        torch.testing.assert_close(ours if ours.shape == theirs.shape else ours.permute(0, 3, 1, 2), theirs)


def test_patch_merging_gives_what_unfolding_gives():
    """Independent reference: mmpretrain merges by `unfold`, norm, linear."""
    torch.manual_seed(0)
    dim, rows, cols = 6, 8, 4
    norm, reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(3, rows * cols, dim)
    unfolded = F.unfold(x.transpose(1, 2).unflatten(2, (rows, cols)), kernel_size=2, stride=2)  # (B, 4C, L/4)
    expected = reduction(norm(unfolded.transpose(1, 2)))

    theirs = {f"backbone.layers.0.downsample.norm.{name}": value for name, value in norm.state_dict().items()}
    theirs["backbone.layers.0.downsample.reduction.weight"] = reduction.weight
    theirs["backbone.patch_embed.projection.bias"] = torch.zeros(dim)
    ours = normalise_state_dict({"state_dict": theirs}, "theirs.pth")
    assert not ours.pop("patch_embed.proj.bias").any()
    merging = PatchMerging(dim)
    merging.load_state_dict({name.removeprefix("layers.0.downsample."): value for name, value in ours.items()})
    torch.testing.assert_close(merging(x.unflatten(1, (rows, cols))).flatten(1, 2), expected, rtol=1e-5, atol=1e-5)


def to_mmpretrain(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of the conversion, written from mmpretrain's side."""
    theirs = {}
    for name, tensor in weights.items():
        if name.startswith("head."):
            theirs[name.replace("head.", "head.fc.")] = tensor
            continue
        if "downsample" in name:
            C = tensor.shape[-1] // 4
            order = [k * C + c for c in range(C) for k in (0, 2, 1, 3)]  # channel c, then row by row
            tensor = tensor[..., order]
        name = name.replace("patch_embed.proj", "patch_embed.projection")
        name = name.replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1")
        if ".blocks." in name:
            name = name.replace("norm1", "ln1").replace("norm2", "ln2")
        theirs["backbone." + name] = tensor
    theirs["backbone.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    theirs["neck.decoder_embed.weight"] = torch.zeros(3, 3)
    return theirs


def test_an_mmpretrain_checkpoint_classifies_alike(tmp_path):
    torch.manual_seed(1)
    model = classifier()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    torch.save({"meta": {"epoch": 300}, "state_dict": to_mmpretrain(model.state_dict())}, tmp_path / "mixmim.pth")
    state_dict, info = read_weights(tmp_path / "mixmim.pth")
    other = classifier()
    report = load_classifier(other, state_dict, info.source)
    assert report.missing == []
    assert report.unexpected == ["neck.decoder_embed.weight"]  # and nothing else was left out
    imgs = torch.randn(2, 3, 64, 64)
    assert torch.equal(other.eval()(imgs), model.eval()(imgs))


def test_the_decoder_of_an_mmpretrain_checkpoint_is_not_denied(tmp_path):
    encoder = classifier(num_classes=0)
    torch.save({"state_dict": to_mmpretrain(encoder.state_dict())}, tmp_path / "mixmim.pth")
    state_dict, info = read_weights(tmp_path / "mixmim.pth")
    message = refusal(load_pretraining, pretraining(), state_dict)
    assert "mmpretrain's decoder, which is not converted" in message and "has no decoder" not in message
    assert "can be fine-tuned (main_finetune.py --finetune)" in message and "main_pretrain.py" in message
    message = refusal(load_classifier, classifier(), state_dict)
    assert "holds a pretraining model without a classification head" in message
    model = classifier(num_classes=0)
    load_encoder(model, state_dict, info)
    assert_loaded(model, encoder.state_dict(), encoder.state_dict())


# -- Files ------------------------------------------------------------------------------------------------------


def test_every_layout_of_a_file_gives_the_same_weights(tmp_path):
    model = pretraining()
    weights = model.state_dict()
    from safetensors.torch import save_file

    save_file(dict(weights), tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "bare.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "parallel.pth")
    torch.save({"model": {f"_orig_mod.{k}": v for k, v in weights.items()}}, tmp_path / "compiled.pth")
    index = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(2, 2), "layers.0.attn_mask": torch.zeros(1)}
    torch.save({"model": {**weights, **index}, "epoch": 7, "optimizer": {}}, tmp_path / "authors.pth")
    write_checkpoint(tmp_path / "ours.pth", {"model": weights, "args": {"model": "mixmae_base"}, "epoch": 3})
    for name in ("a.safetensors", "bare.pth", "parallel.pth", "compiled.pth", "authors.pth", "ours.pth"):
        state_dict, info = read_weights(tmp_path / name)
        assert state_dict.keys() == weights.keys(), name
        assert all(torch.equal(state_dict[key], weights[key]) for key in weights), name
        assert info.path == tmp_path / name
    assert info.args == {"model": "mixmae_base"} and info.epoch == 3
    torch.save({"epoch": 3, "args": {}}, tmp_path / "no_weights.pth")
    with pytest.raises(CheckpointError, match=r"holds no weights.*found 'epoch', 'args'"):
        read_weights(tmp_path / "no_weights.pth")


@pytest.mark.parametrize("plain, averaged", [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_averaged_weights_are_found_in_our_files_and_in_timms(tmp_path, plain, averaged):
    path = tmp_path / "checkpoint.pth"
    torch.save({plain: {"w": torch.zeros(2)}, averaged: {"w": torch.ones(2)}}, path)
    assert read_weights(path)[0]["w"].tolist() == [0, 0]
    assert read_weights(path, ema=True)[0]["w"].tolist() == [1, 1]
    torch.save({plain: {"w": torch.zeros(2)}, averaged: None}, path)
    with pytest.raises(CheckpointError, match="holds no averaged weights: leave out --model_ema"):
        read_weights(path, ema=True)


# -- Into a model -----------------------------------------------------------------------------------------------


def test_an_encoder_keeps_the_head_it_can_use_and_says_what_it_does_with_the_rest():
    source = classifier()
    same, wider, probe = classifier(), classifier(num_classes=9), classifier(num_classes=0)
    report = load_encoder(same, source.state_dict(), "a.pth")
    assert_loaded(same, source.state_dict(), source.state_dict())
    assert report.reinitialised == report.missing == report.unexpected == report.resized == []
    before = wider.head.weight.clone()
    report = load_encoder(wider, source.state_dict(), "a.pth")
    assert report.reinitialised == ["head.weight", "head.bias"] and torch.equal(wider.head.weight, before)
    assert "re-initialised, as their size in the file differs: head.weight, head.bias" in str(report)
    report = load_encoder(probe, source.state_dict(), "a.pth")
    assert report.unexpected == ["head.weight", "head.bias"] and "2 in the file ignored" in str(report)


def test_pretraining_weights_load_whole():
    source, model = pretraining(), pretraining()
    nn.init.normal_(source.mask_token)
    report = load_pretraining(model, source.state_dict(), "a.pth")
    assert_loaded(model, source.state_dict(), source.state_dict())
    assert str(report) == f"loaded {len(source.state_dict())} tensors from a.pth"


def test_resizing_a_pretraining_model_covers_its_decoder():
    source, model = pretraining(), pretraining(img_size=128)
    report = load_pretraining(model, source.state_dict(), "a.pth")
    assert {"absolute_pos_embed", "decoder_pos_embed"} <= set(report.resized)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_position_embeddings_of_oblong_images_keep_their_grid():
    """The same number of tokens in another arrangement is another size."""
    tall, wide = classifier(img_size=(128, 64)), classifier(img_size=(64, 128))
    report = load_encoder(classifier(img_size=(128, 64)), tall.state_dict(), "a.pth")
    assert report.resized == []
    report = load_encoder(wide, tall.state_dict(), "a.pth")
    assert report.resized == ["absolute_pos_embed"]
    reference = F.interpolate(
        tall.absolute_pos_embed.unflatten(1, (32, 16)).permute(0, 3, 1, 2),
        size=(16, 32),
        mode="bicubic",
        align_corners=False,
    )
    torch.testing.assert_close(wide.absolute_pos_embed.data, reference.flatten(2).transpose(1, 2), rtol=0, atol=1e-6)


def test_position_embeddings_of_any_grid_are_left_alone_at_their_own_size():
    for img_size in ((128, 32), (32, 128), (32, 32), (96, 64)):
        model = pretraining(img_size=img_size, window_size=(1, 1, 1, 1))
        report = load_pretraining(pretraining(img_size=img_size, window_size=(1, 1, 1, 1)), model.state_dict(), "a.pth")
        assert report.resized == [], img_size
    weights = {**classifier().state_dict(), "absolute_pos_embed": torch.randn(1, 256, 8)}  # not a sin-cos one
    model = classifier()
    assert load_encoder(model, weights, "a.pth").resized == []
    assert load_encoder(classifier(img_size=128), weights, "a.pth").resized == ["absolute_pos_embed"]


def refusal(load, model: nn.Module, weights: dict[str, torch.Tensor]) -> str:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load(model, weights, "given.pth")
    assert_loaded(model, before, before)  # a refused file changes nothing
    message = str(caught.value)
    assert message.startswith("given.pth") and "\n" not in message and len(message) < 1500
    return message


def test_weights_that_do_not_fit_are_refused_with_names_and_shapes():
    weights = classifier().state_dict()
    without = {name: tensor for name, tensor in weights.items() if name != "norm.weight"}
    assert "1 missing: norm.weight" in refusal(load_encoder, classifier(), without)
    misshapen = {**weights, "norm.weight": torch.ones(3)}
    message = refusal(load_encoder, classifier(), misshapen)
    assert "1 tensors of another shape: norm.weight (3,) (expected (64,))" in message
    deeper = refusal(load_encoder, classifier(), classifier(depths=(1, 1, 3, 1)).state_dict())
    assert "that the model lacks: layers.2.blocks.2" in deeper and "more)" in deeper
    wider = refusal(load_encoder, classifier(), classifier(embed_dim=16).state_dict())
    assert "is --model the one it was made with?" in wider
    info = WeightsInfo("given.pth", Path("given.pth"), args={"model": "swin_tiny_w14"})
    with pytest.raises(CheckpointError, match=r"is --model the one it was made with, swin_tiny_w14\?"):
        load_encoder(classifier(), misshapen, info)


@pytest.mark.parametrize(
    "load, make, name, value",
    [
        (load_classifier, classifier, "head.weight", math.nan),
        (load_encoder, classifier, "layers.2.blocks.1.mlp.fc2.bias", math.inf),
        (load_pretraining, pretraining, "mask_token", -math.inf),
    ],
)
def test_weights_that_are_not_finite_are_refused(load, make, name, value):
    """Evaluation gave an accuracy, that of the first class."""
    weights = make().state_dict()
    weights[name].view(-1)[-1] = value
    message = rf"given.pth holds weights that are not finite \(NaN or infinite\), the first in {name}: "
    with pytest.raises(CheckpointError, match=message):
        load(make(), weights, "given.pth")


def test_another_number_of_channels_has_its_own_message():
    message = refusal(load_encoder, classifier(in_chans=4), classifier().state_dict())
    assert "trained on images with 3 channels, the model takes 4: set --in_chans 3" in message
    message = refusal(load_pretraining, pretraining(in_chans=1), pretraining().state_dict())
    assert "set --in_chans 3" in message


def test_a_file_of_another_kind_of_model():
    message = refusal(load_encoder, classifier(), {"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)})
    assert "another kind of model" in message and "conv1.weight, fc.bias" in message


def test_a_classifier_is_asked_for_and_a_pretraining_file_given():
    message = refusal(load_classifier, classifier(), pretraining().state_dict())
    assert "holds a pretraining model without a classification head" in message and "--finetune" in message
    message = refusal(load_classifier, classifier(), classifier(num_classes=0).state_dict())
    assert "holds an encoder without a classification head" in message
    message = refusal(load_classifier, classifier(num_classes=9), classifier().state_dict())
    assert "has 5 classes, the model 9: they must be the same" in message


def test_a_pretraining_file_is_asked_for_and_a_classifier_given():
    assert "has no decoder" in refusal(load_pretraining, pretraining(), classifier().state_dict())


# -- By name and by link ----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return cache_folder()


def pretend_gdown(monkeypatch, content: bytes | None) -> list[str]:
    """A stand-in for gdown that 'downloads' `content`, or fails as without a network."""
    asked = []

    def download(id, output):
        asked.append(id)
        if content is None:
            raise OSError("no route to host")
        Path(output).write_bytes(content)
        return output

    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download=download))
    return asked


def file_bytes(checkpoint: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def test_what_is_neither_a_file_nor_a_name(cache):
    with pytest.raises(CheckpointError, match=r"nonsense is neither a file nor .* base_600ep, base_600ep_ft,"):
        read_weights("nonsense")


def test_a_published_name_without_gdown_or_network_says_what_to_do(cache, monkeypatch):
    by_hand = f"{PUBLISHED['base_600ep'].drive_id}/view in a browser and put the file at {cache}/mixmae_base_600ep.pth"
    monkeypatch.setitem(sys.modules, "gdown", None)  # makes the import fail
    with pytest.raises(CheckpointError) as caught:
        read_weights("base_600ep")
    assert "pip install gdown" in str(caught.value) and by_hand in str(caught.value)
    pretend_gdown(monkeypatch, None)
    with pytest.raises(CheckpointError) as caught:
        read_weights("base_600ep")
    assert "could not be downloaded (no route to host)" in str(caught.value) and by_hand in str(caught.value)


def test_a_published_file_put_by_hand_is_used(cache):
    cache.mkdir(parents=True)
    torch.save({"model": classifier().state_dict()}, cache / "mixmae_large_600ep_ft.pth")
    state_dict, info = read_weights("large_600ep_ft")
    assert info.source == "large_600ep_ft" and state_dict.keys() == classifier().state_dict().keys()


def test_the_cache_may_be_read_only(cache, monkeypatch):
    cache.mkdir(parents=True)
    torch.save({"model": classifier().state_dict()}, cache / "mixmae_large_600ep_ft.pth")
    monkeypatch.setattr(util.weights.source, "FileLock", lambda path: pytest.fail("wants to write"))
    read_weights("large_600ep_ft")


def test_a_download_is_checked_by_its_contents(cache, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "small", Published("an-id", "swin_quickstart"))
    right = file_bytes({"model": timm.create_model("swin_quickstart").state_dict()})
    other = file_bytes({"model": classifier().state_dict()})
    for content, message in ((b"<html>quota exceeded</html>", "is a web page"), (other, "another shape|has 5")):
        pretend_gdown(monkeypatch, content)
        with pytest.raises(CheckpointError, match=f"the download of small is not that checkpoint: .*({message})"):
            read_weights("small")
        assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == []
    asked = pretend_gdown(monkeypatch, right)
    for _ in range(2):  # the second time from the cache
        state_dict, _ = read_weights("small")
        assert state_dict["head.weight"].shape[0] == 1000
    assert asked == ["an-id"]


def test_links_need_https_and_a_hash(cache):
    with pytest.raises(CheckpointError, match="only https:// links"):
        read_weights("http://example.org/a.pth#sha256=" + "0" * 64)
    with pytest.raises(CheckpointError, match=r"needs the file's hash.*add #sha256=<hex>"):
        read_weights("https://example.org/a.pth")


def test_a_link_is_downloaded_once_and_only_with_the_right_hash(cache, monkeypatch):
    content = file_bytes({"model": classifier().state_dict()})
    digest = hashlib.sha256(content).hexdigest()
    asked = []

    def open_url(request):
        asked.append(request.full_url)
        response = io.BytesIO(content)
        response.info = lambda: types.SimpleNamespace(getheaders=lambda name: [str(len(content))])
        return response

    monkeypatch.setattr(torch.hub, "urlopen", open_url)
    for link in (f"https://example.org/a.pth?x=1#sha256={digest}", f"https://example.org/a-{digest[:8]}.pth"):
        asked.clear()
        for _ in range(2):
            assert read_weights(link)[0].keys() == classifier().state_dict().keys()
        assert asked == [link.partition("#")[0]]
    with pytest.raises(CheckpointError, match="could not be downloaded: invalid hash value"):
        read_weights("https://example.org/a.pth#sha256=" + "0" * 64)
    for path in cache.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="no longer has the hash"):
        read_weights(link)


def test_the_hash_of_a_link_is_all_that_is_verified(cache, monkeypatch):
    """The file is read from end to end once, not again for its own checksums; by ranks that come after, not at all."""
    content = file_bytes({"model": classifier().state_dict()})
    digest, hashed, file_hash = hashlib.sha256(content).hexdigest(), [], util.weights.source.file_hash
    cache.mkdir(parents=True)
    (cache / f"{digest[:8]}-a.pth").write_bytes(content)
    monkeypatch.setattr(util.weights.source, "file_hash", lambda path: hashed.append(path) or file_hash(path))
    monkeypatch.setattr(util.weights.file, "_verify_zip", lambda path: pytest.fail("reads it again"))
    for verify in (True, False):
        read_weights(f"https://example.org/a.pth#sha256={digest}", verify=verify)
        assert len(hashed) == 1


def test_one_download_serves_all_who_ask_for_it_at_once(cache, monkeypatch):
    content = file_bytes({"model": classifier().state_dict()})
    asked = []

    def slow_download(address, target, **kwargs):
        asked.append(address)
        time.sleep(0.3)
        Path(target).write_bytes(content)

    monkeypatch.setattr(torch.hub, "download_url_to_file", slow_download)
    link = f"https://example.org/a.pth#sha256={hashlib.sha256(content).hexdigest()}"
    with ThreadPoolExecutor(4) as pool:  # a lock of files excludes threads as it does processes
        paths = [path for path, _ in pool.map(locate, [link] * 4)]
    assert asked == ["https://example.org/a.pth"]
    assert len(set(paths)) == 1 and paths[0].read_bytes() == content


def test_a_cache_that_cannot_be_made_says_where_to_put_the_file(cache, tmp_path, monkeypatch):
    (tmp_path / "hub").write_text("a file where the folder should be")
    pretend_gdown(monkeypatch, b"")
    for source in ("base_600ep", "https://example.org/a.pth#sha256=" + "0" * 64):
        with pytest.raises(CheckpointError, match=f"could not be downloaded.*put (the file|it) at {cache}"):
            read_weights(source)


def test_the_table_of_published_checkpoints():
    assert len(PUBLISHED) == 8 and len({entry.link for entry in PUBLISHED.values()}) == 8
    assert sum(bool(entry.drive_id) for entry in PUBLISHED.values()) == 6
    import models_swin  # noqa: F401

    for name, entry in PUBLISHED.items():
        assert (entry.model in CLASSIFIER_MODELS) == ("_ft" in name) and timm.is_model(entry.model)
        assert ("384" in name) == ("384" in entry.model) and name.removeprefix("mixmim_").split("_")[0] in entry.model
    assert util.weights.source.PUBLISHED["base_600ep"].link.startswith("https://drive.google.com/file/d/1pZYm")


def test_mmpretrains_checkpoints_are_fetched_by_name_and_verified(cache, monkeypatch):
    """From where they are openly hosted, without gdown. Their names end in their hashes: nothing else passes."""
    content = file_bytes({"model": classifier().state_dict()})
    asked = []

    def open_url(request):
        asked.append(request.full_url)
        response = io.BytesIO(content)
        response.info = lambda: types.SimpleNamespace(getheaders=lambda name: [str(len(content))])
        return response

    monkeypatch.setattr(torch.hub, "urlopen", open_url)
    for name, digits in (("mixmim_base_300ep", "44fe8d2c"), ("mixmim_base_300ep_ft", "41ecada9")):
        with pytest.raises(CheckpointError, match=f'invalid hash value \\(expected "{digits}"'):
            read_weights(name)
        assert asked.pop() == PUBLISHED[name].url and not list(cache.glob(f"{digits}*"))
