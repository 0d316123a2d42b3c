"""The encoder inside other people's tools. Those that are not installed are skipped (see tests/run.sh)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import models_swin  # noqa: F401  registers the models


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
