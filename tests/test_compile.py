"""`--compile`: the same losses, and nothing is compiled again after the first steps."""

import os
import shutil

import pytest
import torch

from models_mixmae import MixMAE
from models_swin import SwinTransformer

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile on a CPU needs a C++ compiler"
)

# Stages 1 to 3 have several windows, so that their groups' sizes vary with the mask; stage 4 is one window.
SMALL = dict(img_size=64, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=(8, 4, 2, 2))
DECODER = dict(decoder_dim=32, decoder_depth=1, decoder_num_heads=4)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def train(model: MixMAE, imgs: torch.Tensor, steps: range, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for step in steps:
        mask = model.random_masking(0.5, torch.Generator().manual_seed(step))  # another mask at every step
        loss, _, _ = model(imgs, mask=mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_pretraining():
    torch.manual_seed(0)
    imgs = torch.randn(4, 3, 64, 64)
    plain, compiled = models = [MixMAE(**SMALL, **DECODER) for _ in range(2)]
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_parts()
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in models]
    expected = train(plain, imgs, range(6), optimizers[0])
    losses = train(compiled, imgs, range(3), optimizers[1])  # the first epoch
    with torch.compiler.set_stance("fail_on_recompile"):
        losses += train(compiled, imgs, range(3, 6), optimizers[1])
    assert losses == pytest.approx(expected, rel=1e-4)
    # The embedding, 4 stages, 3 mergings, the decoder and the loss.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 10


@pytest.mark.slow
@torch.no_grad()
def test_evaluation_of_a_classifier():
    torch.manual_seed(0)
    plain, compiled = (SwinTransformer(num_classes=10, **SMALL).eval() for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_parts()
    imgs = torch.randn(2, 4, 3, 64, 64)
    logits = [compiled(imgs[0])]
    with torch.compiler.set_stance("fail_on_recompile"):
        logits.append(compiled(imgs[1]))
    for ours, batch in zip(logits, imgs):
        torch.testing.assert_close(ours, plain(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_fine_tuning_with_stochastic_depth():
    torch.manual_seed(0)
    model = SwinTransformer(num_classes=10, drop_path_rate=0.5, **SMALL)
    model.compile_parts()
    losses = []
    for step, imgs in enumerate(torch.randn(3, 4, 3, 64, 64)):
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            loss = model(imgs).square().mean()
            loss.backward()
        losses.append(loss.item())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)
    assert len(set(losses)) == 3
