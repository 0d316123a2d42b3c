"""`python -m util.export`: every format opens in its own runtime, computes the same, tells how images are prepared."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from golden_files import load_golden, official_models
from PIL import Image
from running import fails, make_images, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import main_finetune
import main_pretrain
import models_mixmae
from util import export, predict
from util.run.config import with_settings
from util.weights.file import RECORD, CheckpointError, read_checkpoint, write_checkpoint
from util.weights.parts import load_part, open_onnx, open_torch_export, parse_record
from util.weights.source import WeightsInfo, read_weights

CLASSES = ["ant", "bee", "cow", "dog", "elk"]
SHAPE = dict(img_size=16, window_size=(4, 4, 4, 2), in_chans=1)
RECORDED = {"model": "swin_quickstart", "input_size": (16, 16), "window_size": (4, 4, 4, 2), "in_chans": 1}
RECORDED |= {"mean": (0.4,), "std": (0.2,)}


def loud(model: torch.nn.Module) -> torch.nn.Module:
    """With position biases and a head that would show if they were wrong."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias_table") or name == "head.weight":
                parameter.normal_(std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return loud(timm.create_model("swin_quickstart", num_classes=len(CLASSES), **SHAPE))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pth"
    content = {"format": 1, "model": model.state_dict(), "epoch": 3, "args": RECORDED, "classes": CLASSES}
    write_checkpoint(path, content)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(CLASSES):
        make_images(folder / "val" / name, 3, (20, 24), seed=number)
    return folder


@pytest.fixture(scope="module")
def imgs() -> torch.Tensor:
    return torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def outputs_of(part: str, model: torch.nn.Module, imgs: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        if part == "pyramid":
            return model.forward_intermediates(imgs, intermediates_only=True)
        return [model.forward_head(model.forward_features(imgs), pre_logits=part == "encoder")]


def exported(checkpoint: Path, out: Path, kind: str, *flags: str) -> Path:
    run(export, "--checkpoint", checkpoint, "--format", kind, "--out", out, *flags)
    assert [path for path in out.parent.iterdir() if path.name.startswith(".")] == []  # nothing else is left
    return out


@pytest.fixture(scope="module")
def onnx_file(checkpoint, images, tmp_path_factory) -> Path:
    """The classifier, compared on images."""
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    return exported(checkpoint, tmp_path_factory.mktemp("onnx") / "model.onnx", "onnx", "--images", images)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["classifier", "encoder", "pyramid"])
def test_onnx(onnx_file, checkpoint, model, imgs, tmp_path, part):
    path = onnx_file
    if part != "classifier":
        path = exported(checkpoint, tmp_path / "model.onnx", "onnx", "--part", part)
    compute, record, info = open_onnx(path)
    for batch in (1, 5):
        torch.testing.assert_close(
            compute(imgs[:batch]), list(outputs_of(part, model, imgs[:batch])), rtol=1e-4, atol=1e-4
        )
    assert record["part"] == part and record["crop_pct"] == 0.875 and record["interpolation"] == "bicubic"
    assert info.args["mean"] == [0.4] and info.classes == (CLASSES if part == "classifier" else None)
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="is damaged or not an ONNX file"):
        open_onnx(damaged)


@pytest.mark.slow
def test_a_large_onnx_model_keeps_its_weights_beside_it(checkpoint, model, imgs, tmp_path, capfd, monkeypatch):
    """PyTorch writes weights above a size into a second file; here, all of them."""
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    out, weights = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    weights.write_text("of another model")
    flags = ["--checkpoint", checkpoint, "--format", "onnx", "--out", out]
    fails(export, capfd, "model.onnx.data exists already", *flags)
    assert weights.read_text() == "of another model" and not out.exists()
    weights.unlink()
    exported(checkpoint, out, "onnx")
    assert sorted(tmp_path.iterdir()) == [out, weights] and weights.stat().st_size > out.stat().st_size
    [computed] = open_onnx(out)[0](imgs)
    torch.testing.assert_close(computed, outputs_of("classifier", model, imgs)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["classifier", "encoder", "pyramid"])
def test_torch_export(checkpoint, model, imgs, tmp_path, part):
    path = exported(checkpoint, tmp_path / "model.pt2", "torch_export", "--part", part)
    compute, record, _ = open_torch_export(path)
    for batch in (1, 5):
        torch.testing.assert_close(
            compute(imgs[:batch]), list(outputs_of(part, model, imgs[:batch])), rtol=1e-4, atol=1e-4
        )
    assert record["args"]["input_size"] == [16, 16]
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="is damaged or not a program"):
        open_torch_export(path)


@pytest.mark.parametrize("part", ["classifier", "encoder"])
def test_timm(checkpoint, model, imgs, tmp_path, part):
    """A folder that timm opens by itself, with its data settings; and features of an exported encoder."""
    folder = exported(checkpoint, tmp_path / "model", "timm", "--part", part)
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(imgs), outputs_of(part, model, imgs)[0])
    data = timm.data.resolve_model_data_config(opened)
    assert (*data["input_size"], data["crop_pct"], data["interpolation"]) == (1, 16, 16, 0.875, "bicubic")
    assert tuple(data["mean"]) == (0.4,) and tuple(data["std"]) == (0.2,)
    assert opened.pretrained_cfg.get("label_names") == (CLASSES if part == "classifier" else None)
    pyramid = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    with torch.no_grad():
        for ours, theirs in zip(outputs_of("pyramid", model, imgs), pyramid(imgs), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert read_weights(folder)[1].args == read_weights(folder / "model.safetensors")[1].args != {}


def test_safetensors_tell_all_that_is_needed(checkpoint, model, imgs, images, tmp_path):
    """Evaluation and prediction need not be told anything, and give what the checkpoint gives."""
    path = exported(checkpoint, tmp_path / "model.safetensors", "safetensors")
    weights, info = read_weights(path)
    assert info.classes == CLASSES and info.epoch == 3
    part, settings, _ = load_part(weights, info)
    with torch.no_grad():
        assert torch.equal(part(imgs), model(imgs))
    assert settings.input_size == (16, 16) and settings.std == (0.2,) and settings.window_size == (4, 4, 4, 2)
    quiet = ["--device", "cpu", "--num_workers", "0"]
    tables = [tmp_path / name for name in ("a.csv", "b.csv", "c.csv", "d.csv")]
    for weights, table in zip((checkpoint, path), tables):
        run(main_finetune, *quiet, "--eval", "--finetune", weights, "--data_path", images, "--predictions", table)
    assert tables[0].read_text() == tables[1].read_text()
    for weights, table in zip((checkpoint, path), tables[2:]):
        run(predict, *quiet, "--checkpoint", weights, images / "val", "--out", table)
    assert tables[2].read_text() == tables[3].read_text()


@pytest.mark.slow
def test_prediction_from_an_onnx_file(onnx_file, checkpoint, images, tmp_path, capfd, monkeypatch):
    path = onnx_file
    quiet = ["--device", "cpu", "--num_workers", "0", images / "val"]
    tables = [tmp_path / name for name in ("a.npz", "b.npz")]
    for weights, table in zip((checkpoint, path), tables):
        run(predict, *quiet, "--checkpoint", weights, "--out", table)
    ours, theirs = map(np.load, tables)
    assert np.array_equal(ours["paths"], theirs["paths"]) and np.array_equal(ours["class_names"], CLASSES)
    assert np.array_equal(ours["classes"], theirs["classes"])
    assert np.allclose(ours["scores"], theirs["scores"], atol=1e-5)
    fails(
        predict, capfd, "holds a model's classifier; its encoder is asked for",
        *quiet, "--checkpoint", path, "--features", "--out", tables[0],
    )  # fmt: skip
    fails(predict, capfd, "was exported with .16, 16.", *quiet, "--checkpoint", path, "--input_size", "32")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    fails(predict, capfd, "pip install onnxruntime", *quiet, "--checkpoint", path)


# -- The authors' layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, authors_name",
    [
        ("mixmae_base", "pretrain/mixmim_base"),
        ("swin_base_w14", "finetune/mixmim_base"),
        ("swin_base_w16_384", "finetune/mixmim_base_384"),
    ],
)
def test_the_authors_models_find_every_tensor(name, authors_name):
    with torch.device("meta"):
        weights = timm.create_model(name).state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in export.with_position_index(weights).items()}
    assert shapes == official_models()[authors_name]["keys"]


def test_the_index_is_the_authors():
    golden = load_golden("pretrain_64")
    derived = {name: tensor for name, tensor in golden.weights.items() if name.endswith("relative_position_index")}
    complete = export.with_position_index({k: v for k, v in golden.weights.items() if k not in derived})
    assert set(complete) >= set(golden.weights)
    for name, index in derived.items():
        assert torch.equal(complete[name], index)


@pytest.mark.slow
def test_a_run_goes_on_in_the_authors_programs(images, tmp_path):
    """A strict load of weights, optimizer and scaler, as their `--resume` does it; and we still read the file."""
    flags = ["--device", "cpu", "--num_workers", "0", "--epochs", "1", "--warmup_epochs", "0", "--batch_size", "4"]
    flags += ["--vis_every", "0", "--model", "mixmae_quickstart", "--in_chans", "1", "--input_size", "16"]
    flags += ["--window_size", "4", "4", "4", "2", "--data_path", images / "val"]
    run(main_pretrain, *flags, "--output_dir", tmp_path / "run")
    path = exported(tmp_path / "run" / "checkpoint.pth", tmp_path / "authors.pth", "authors")
    theirs = torch.load(path, weights_only=True)
    assert {"model", "optimizer", "scaler", "epoch", "args"} <= theirs.keys() and theirs["epoch"] == 0
    model = models_mixmae.mixmae_quickstart(**SHAPE)
    for module in model.modules():  # as theirs: the index is a buffer of each windowed attention
        if hasattr(module, "relative_position_bias_table"):
            side = (round(len(module.relative_position_bias_table) ** 0.5) + 1) // 2
            module.register_buffer("relative_position_index", torch.zeros(side**2, side**2, dtype=torch.long))
    model.load_state_dict(theirs["model"], strict=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict(theirs["scaler"])
    assert scaler.get_scale() == 65536
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for n, p in named if p.ndim == 1 or n.endswith(".bias")], "weight_decay": 0.0},
        {"params": [p for n, p in named if not (p.ndim == 1 or n.endswith(".bias"))], "weight_decay": 0.05},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    optimizer.load_state_dict(theirs["optimizer"])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    ours = read_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert all(torch.equal(tensor, read_weights(path)[0][name]) for name, tensor in ours["model"].items())
    run(main_pretrain, *flags, "--output_dir", tmp_path / "again", "--resume", path, "--resume_force")


# -- What cannot be exported, or read ---------------------------------------------------------------------------------


def test_a_wrong_export_gets_no_name(checkpoint, tmp_path, capfd, monkeypatch):
    """Whatever an exporter does wrong shows in the comparison."""
    write, open_back = export.FORMATS["safetensors"]

    def spoil(given, path):
        write(given, path)
        tensors = load_file(path)
        tensors["layers.0.blocks.0.attn.relative_position_bias_table"][0] += 1
        save_file(tensors, path, {RECORD: json.dumps(given.record)})

    monkeypatch.setitem(export.FORMATS, "safetensors", (spoil, open_back))
    out = tmp_path / "model.safetensors"
    fails(export, capfd, "computes something else for 1 images", "--checkpoint", checkpoint, "--format", "safetensors",
          "--out", out)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_damaged_foreign_and_newer_files(checkpoint, tmp_path):
    path = exported(checkpoint, tmp_path / "model.safetensors", "safetensors")
    tensors, metadata = load_file(path), export_metadata(path)
    record = json.loads(metadata[RECORD])
    save_file(tensors, path, {**metadata, RECORD: json.dumps(record | {"format": 99})})
    with pytest.raises(CheckpointError, match="newer version of this project"):
        read_weights(path)
    save_file(tensors, path, {**metadata, RECORD: "{"})
    with pytest.raises(CheckpointError, match="record of the model is not JSON"):
        read_weights(path)
    save_file(tensors, path)  # of another program
    assert read_weights(path)[1].args == {}
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        read_weights(path)
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "foreign.pt2")
    with pytest.raises(CheckpointError, match=r"was not written by `python -m util.export`"):
        open_torch_export(tmp_path / "foreign.pt2")


def export_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--format", "safetensors", "--part", "pyramid"], "--part pyramid is not for --format safetensors"),
        (["--format", "authors", "--part", "encoder"], "leave out --part"),
        (["--format", "onnx"], "--format onnx writes a .onnx file: give --out x.onnx"),
        (["--format", "authors"], "exists already: give another name, or remove it first"),
        ([], "--format is missing"),
    ],
)
def test_flags_that_contradict_each_other(checkpoint, tmp_path, capfd, flags, message):
    (tmp_path / "x.pth").touch()
    fails(export, capfd, message, "--checkpoint", checkpoint, "--out", tmp_path / "x.pth", *flags)


def test_packages_that_are_missing_are_named(checkpoint, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    out = ["--format", "onnx", "--out", tmp_path / "model.onnx"]
    fails(export, capfd, "pip install onnx onnxscript onnxruntime", "--checkpoint", checkpoint, *out)
    fails(export, capfd, "exists already", "--checkpoint", checkpoint, "--format", "timm", "--out", tmp_path)


def test_images_to_compare_with_are_prepared_as_for_evaluation(images):
    info = WeightsInfo("here", Path("here"), RECORDED)
    settings = load_part(timm.create_model("swin_quickstart", **SHAPE).state_dict(), info)[1]
    paths = (str(images / "val" / "ant"),)
    config = export.ExportConfig(checkpoint="here", format="timm", out="there", images=paths)
    given = export.example_images(with_settings(config, settings))
    assert given.shape == (5, 1, 16, 16) and torch.equal(given[0], given[3]) and not torch.equal(given[0], given[1])
    undone = given * 0.2 + 0.4
    assert undone.min() >= -1e-6 and undone.max() <= 1 + 1e-6


@pytest.mark.parametrize("missing", ["part", "args", "format", "epoch"])
def test_records_of_others_are_told_from_ours(missing):
    record = {"part": "encoder", "args": {}, "format": 1, "epoch": None, "classes": None}
    parse_record(json.dumps(record), "a.onnx")
    with pytest.raises(CheckpointError, match=r"a\.onnx was written by a newer version of this project \(format 99"):
        parse_record(json.dumps(record | {"format": 99}), "a.onnx")
    del record[missing]
    with pytest.raises(CheckpointError, match=r"a\.onnx was not written by `python -m util\.export`"):
        parse_record(json.dumps(record), "a.onnx")


def test_images_of_16_bits_to_compare_with(checkpoint, tmp_path):
    values = np.arange(400, dtype=np.uint16).reshape(20, 20) * 160
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert exported(checkpoint, tmp_path / "out.safetensors", "safetensors", "--images", tmp_path / "deep.png").exists()


def test_the_authors_format_of_weights_that_do_not_record_their_model(checkpoint, tmp_path, capfd):
    out, bare = tmp_path / "theirs.pth", tmp_path / "bare.pth"
    flags = ["--format", "authors", "--out", out]
    fails(export, capfd, "leave out --input_size", "--checkpoint", checkpoint, *flags, "--input_size", "32")
    recorded = {name: value for name, value in RECORDED.items() if name != "model"}
    write_checkpoint(bare, {"model": read_checkpoint(checkpoint)["model"], "args": recorded})
    exported(bare, out, "authors", "--model", "swin_quickstart")
    assert any(name.endswith("relative_position_index") for name in read_checkpoint(out)["model"])


def test_the_authors_format_of_a_variant_that_their_models_lack(tmp_path, capfd):
    variant = models_mixmae.mixmae_quickstart(mix_embed=True, **SHAPE)
    args = RECORDED | {"model": "mixmae_quickstart", "mix_embed": True}
    write_checkpoint(tmp_path / "run.pth", {"model": variant.state_dict(), "args": args})
    flags = ["--checkpoint", tmp_path / "run.pth", "--format", "authors", "--out", tmp_path / "theirs.pth"]
    fails(export, capfd, "have no such variant of the method .layers.0.mix_embed.: --format safetensors", *flags)
    assert not (tmp_path / "theirs.pth").exists()


@pytest.mark.slow
def test_an_exported_program_cannot_be_changed(onnx_file, images, tmp_path, capfd):
    flags = ["--checkpoint", onnx_file, "--device", "cpu", images / "val"]
    fails(predict, capfd, "--model_ema: .* was exported as it is", *flags, "--model_ema")
    fails(predict, capfd, "--precision: .* was exported as it is", *flags, "--precision", "bf16")
