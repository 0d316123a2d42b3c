"""The encoder inside other people's tools. Those that are not installed are skipped (see tests/run.sh)."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from running import run
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

import models_swin  # noqa: F401  registers the models
from util import export
from util.errors import UserError
from util.weights.file import FORMAT, write_checkpoint


class Pyramid(nn.Module):
    """Our four stages under torchvision's feature pyramid, for images of any size."""

    out_channels = 32

    def __init__(self):
        super().__init__()
        shape = dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
        self.body = timm.create_model("swin_tiny_w14", features_only=True, strict_img_size=False, **shape)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels, LastLevelMaxPool())

    def forward(self, imgs: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.fpn({str(i): x for i, x in enumerate(self.body(imgs))})


@pytest.mark.parametrize("detector", [FasterRCNN, pytest.param(MaskRCNN, marks=pytest.mark.slow)])
def test_torchvision_detectors_on_images_of_different_sizes(detector):
    """With their own transform, which resizes and pads every batch to another size."""
    torch.manual_seed(0)
    model = detector(Pyramid(), num_classes=3, min_size=96, max_size=160)
    for sizes in (((120, 90), (70, 131)), ((64, 200), (101, 99))):
        imgs = [torch.rand(3, *size) for size in sizes]
        boxes = torch.tensor([[5.0, 5.0, 50.0, 40.0]])
        targets = [
            {"boxes": boxes, "labels": torch.tensor([1]), "masks": torch.ones(1, *size, dtype=torch.uint8)}
            for size in sizes
        ]
        losses = model.train()(imgs, targets)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        with torch.no_grad():
            found = model.eval()(imgs)
        assert len(found) == 2 and all(entry["boxes"].shape[1] == 4 for entry in found)
    for name, parameter in model.backbone.body.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), name


@pytest.mark.slow
def test_sharded_by_fsdp():
    """`fully_shard` finds all blocks, those of the decoder too, since they are entered by the front door."""
    tests = Path(__file__).resolve().parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "sharded.py"]
    path = os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command, cwd=tests, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]


def test_segmentation_models_pytorch():
    """A feature pyramid on our stages trains, its encoder too."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = smp.FPN("tu-swin_tiny_w14", encoder_weights=None, classes=3)
    imgs = torch.randn(2, 3, 224, 224)
    assert model(imgs).shape == (2, 3, 224, 224)
    model(imgs).square().mean().backward()
    gradients = {name: p.grad for name, p in model.encoder.named_parameters() if p.requires_grad}
    unused = [name for name, gradient in gradients.items() if gradient is None and ".norm." not in name]
    assert len(gradients) > 100 and all("norm" in name for name in unused), unused


def test_transformers_backbone():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.TimmBackboneConfig(
        backbone="swin_quickstart", out_indices=[0, 1, 2, 3], use_pretrained_backbone=False
    )
    backbone = transformers.TimmBackbone(config).eval()
    model = timm.create_model("swin_quickstart", num_classes=0).eval()
    weights = {name.split("_backbone.")[-1].removeprefix("model."): t for name, t in backbone.state_dict().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert all(name.startswith("norm.") for name in missing) and not unexpected  # of the last stage alone, pruned
    imgs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = backbone(imgs).feature_maps
        expected = model.forward_intermediates(imgs, intermediates_only=True)
    assert len(maps) == 4
    for ours, theirs in zip(expected, maps):
        torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("assign", [True, False], ids=["assigned", "memory first"])
def test_a_model_that_was_built_without_memory(assign):
    """As sharded and large models are: on the meta device, and then given weights."""
    model = timm.create_model("swin_quickstart", num_classes=3).eval()
    imgs = torch.randn(2, 3, 32, 32)
    with torch.device("meta"):
        other = timm.create_model("swin_quickstart", num_classes=3).eval()
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), assign=assign)
    with torch.no_grad():
        assert torch.equal(other(imgs), model(imgs))
    twin = pickle.loads(pickle.dumps(other))
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(imgs), model(imgs))


@pytest.mark.parametrize("part", ["encoder", "classifier"])
def test_transformers_wrapper_opens_a_folder_for_timm(tmp_path, part):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = timm.create_model("swin_quickstart", num_classes=3, in_chans=1).eval()
    recorded = dict(model="swin_quickstart", in_chans=1, input_size=(32, 32), mean=(0.4,), std=(0.2,))
    content = {"format": FORMAT, "model": model.state_dict(), "args": recorded, "classes": ["ant", "bee", "cow"]}
    write_checkpoint(tmp_path / "checkpoint.pth", content)
    flags = [
        "--checkpoint",
        tmp_path / "checkpoint.pth",
        "--part",
        part,
        "--format",
        "timm",
        "--out",
        tmp_path / "timm",
    ]
    run(export, *flags)
    imgs = torch.randn(2, 1, 32, 32)
    opened = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        if part == "classifier":
            wrapper = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / "timm").eval()
            found, expected = wrapper(imgs).logits, model(imgs)
            assert list(wrapper.config.id2label.values()) == content["classes"]
        else:
            wrapper = transformers.TimmWrapperModel.from_pretrained(tmp_path / "timm").eval()
            found, expected = wrapper(imgs).pooler_output, model.forward_head(model.forward_features(imgs), True)
        assert torch.equal(found, expected) and torch.equal(opened(imgs), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_classes=-1), "num_classes must be 0, for no head, or more, got -1"),
        (dict(img_size=64.0), r"a size is a whole number, or \(height, width\), got 64.0"),
        (dict(img_size="64"), "got '64'"),
        (dict(img_size=(32, 32, 3)), r"got \(32, 32, 3\)"),
    ],
)
def test_wrong_arguments_of_a_model_are_explained(change, message):
    with pytest.raises(UserError, match=message):
        timm.create_model("swin_quickstart", **change)
