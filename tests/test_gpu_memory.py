"""When a GPU's memory is full, the message names the batch that would fit, also in the midst of a distributed step.

There is no GPU here: what PyTorch would say of its memory is made up. tests/test_gpu.py measures it.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from running import in_a_fork
from torch.nn.parallel import DistributedDataParallel

from models_mixmae import MixMAE
from util.run.gpu_memory import explain_out_of_memory

SMALL = dict(img_size=32, patch_size=1, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=8)
CONFIG = SimpleNamespace(batch_size=64, accum_iter=2, input_size=(32, 32), grad_checkpointing=False, precision="fp32")


@pytest.fixture
def state(monkeypatch):
    """A run's state on a GPU of 1000 bytes, where steps of 2 and 8 images take 300 and 420 bytes with all weights."""
    model = MixMAE(**SMALL, decoder_dim=16, decoder_depth=1, decoder_num_heads=1)
    peaks = iter((300, 420))
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1000))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: next(peaks))
    return SimpleNamespace(model=model, optimizer=SimpleNamespace(state={"moments": "are there"}))


def full_memory(*_) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_batch_that_fits_is_named(state):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        full_memory()
    said = explain_out_of_memory(caught.value, state, CONFIG)
    # 20 bytes an image beside 260: (1000 - 6 % - 260) / 20 = 34
    assert "too small for --batch_size 64 at 32x32: about 34 images would fit" in said
    assert "--batch_size 34 --accum_iter 4" in said and "--grad_checkpointing" in said


def test_mixtures_of_three_stay_whole(state):
    state.model = MixMAE(**SMALL, decoder_dim=16, decoder_depth=1, decoder_num_heads=1, mix_images=3)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        full_memory()
    # 40 bytes a mixture beside 260: (1000 - 6 % - 260) / 40 = 17
    assert "about 51 images would fit" in explain_out_of_memory(caught.value, state, CONFIG)


@in_a_fork
def test_in_the_midst_of_a_distributed_backward_pass(state, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(state.model)
        loss, _, _ = model(torch.randn(2, 3, 32, 32))
        state.model.layers[0].blocks[0].mlp.fc1.weight.register_hook(full_memory)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            loss.backward()
        state.model.layers[0].blocks[0].mlp.fc1.weight._backward_hooks.clear()
        assert "about 34 images would fit" in explain_out_of_memory(caught.value, state, CONFIG)
    finally:
        dist.destroy_process_group()


def test_what_goes_wrong_in_measuring_does_not_hide_what_went_wrong(state, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1 / 0)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        full_memory()
    said = explain_out_of_memory(caught.value, state, CONFIG)
    assert "too small for --batch_size 64" in said and "division by zero" in said
