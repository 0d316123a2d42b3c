"""`--compile`: the same losses, and nothing is compiled again after the first steps."""

import copy
import os
import shutil

import pytest
import torch
import torch.distributed as dist
from photos import data_args
from PIL import Image
from running import in_a_fork
from torch._dynamo import lookup_backend
from torch.nn.attention import flex_attention
from torch.nn.parallel import DistributedDataParallel

from engine_finetune import evaluate
from models_mixmae import MixMAE
from models_swin import SwinTransformer
from util.data.datasets import build_dataset
from util.data.transforms import Normalize, eval_transform
from util.layers import attention, compilation
from util.layers.tracing import is_compiled_here
from util.run.features import own_features

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
@pytest.mark.parametrize(
    "variant", [{}, dict(mix_embed=True, masked_attn=False, partners="cycle", reconstruct="single")]
)
def test_pretraining(variant):
    torch.manual_seed(0)
    imgs = torch.randn(4, 3, 64, 64)
    plain, compiled = models = [MixMAE(**SMALL, **DECODER, **variant) for _ in range(2)]
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


# --- Without generated code, in seconds: what is compiled, and for which model


@pytest.fixture
def graphs_alone(monkeypatch):
    monkeypatch.setitem(compilation.OPTIONS, "backend", "aot_eager")
    compilation.compiled.cache_clear()
    yield
    compilation.compiled.cache_clear()


@pytest.mark.skipif(not attention.FLEX_LEARNS, reason="FlexAttention of this PyTorch loses gradients")
@in_a_fork
def test_what_is_compiled_for_a_gpu(graphs_alone):
    """A CPU in place of it, FlexAttention in its plain form: whole graphs, once for all masks, the same results."""
    lengths = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        for node in graph.graph.nodes:
            if node.target is torch.ops.higher_order.flex_attention:
                lengths.append(node.args[0].meta["example_value"].shape[2])
                captured = set(node.args[7])
                while new := {source for made in captured for source in made.all_input_nodes} - captured:
                    captured |= new
                # Inductor may compute what is captured inside of the kernel, where it fails on these.
                assert not {torch.stack, torch.cat} & {made.target for made in captured}
        return lookup_backend("aot_eager")(graph, inputs)

    compilation.OPTIONS["backend"] = backend
    attention.is_compiled_for_gpu = lambda x: is_compiled_here()
    attention.FLEX_TOKENS = 8
    flex_attention._validate_device = lambda *tensors: None  # which refuses gradients on a CPU
    assert compilation.why_not_compiled(torch.device("cpu"), torch.bfloat16) == ""
    assert lengths == [8, 8]  # with gradients and without
    torch.manual_seed(0)
    plain, compiled = models = [MixMAE(**SMALL, **DECODER) for _ in range(2)]
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_parts()
    imgs = torch.randn(4, 3, 64, 64)
    for step in range(3):
        mask = plain.random_masking(0.5, torch.Generator().manual_seed(step))
        losses = []
        for model in models:
            model.zero_grad()
            with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
                losses.append(model(imgs, mask=mask)[0])
            losses[-1].backward()
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
        for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert lengths[2:] == [64, 16]  # the segments of the other stages are short


@in_a_fork
def test_a_compiler_that_fails_in_evaluation_is_found_out(monkeypatch):
    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        if not torch.is_grad_enabled():
            raise ValueError("no kernel for this")
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setitem(compilation.OPTIONS, "backend", backend)
    assert compilation.why_not_compiled(torch.device("cpu"), torch.float32) == "ValueError: no kernel for this"


class Batches(list):
    dataset, batch_sampler = range(7), [[(0, i) for i in range(4)], [(0, i) for i in range(4, 7)]]


@in_a_fork
def test_a_smaller_last_batch_of_an_evaluation_is_not_compiled_for_itself(graphs_alone, tmp_path):
    torch.manual_seed(0)
    models = [SwinTransformer(num_classes=10, **SMALL) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].compile_parts()
    imgs, targets = torch.randint(256, (7, 3, 64, 64), dtype=torch.uint8), torch.arange(7)
    batches = Batches([(imgs[:4], targets[:4]), (imgs[4:], targets[4:])])
    normalize = Normalize((0.5,) * 3, (0.5,) * 3)
    results = [evaluate(model, batches, normalize, "fp32", torch.device("cpu")) for model in models]
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 8  # the embedding, 4 stages, 3 mergings
    for i in range(7):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(imgs[i].permute(1, 2, 0).numpy()).save(tmp_path / "train" / "a" / f"{i}.png")
    config = data_args(tmp_path, input_size=(64, 64), batch_size=4, precision="fp32")
    dataset = build_dataset(config, "train", eval_transform(config))
    features = [own_features(model, dataset, normalize, config)[0] for model in models]
    torch.testing.assert_close(features[1], features[0], rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 8


@pytest.mark.slow
@in_a_fork
def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(graphs_alone):
    model = SwinTransformer(num_classes=10, **SMALL)
    model.compile_parts()
    imgs = torch.randn(2, 3, 64, 64)
    model(imgs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(imgs).any() and model(imgs).any()


@pytest.mark.slow
@in_a_fork
def test_training_evaluation_and_a_smaller_last_batch_compile_once_each(graphs_alone):
    model = SwinTransformer(num_classes=10, drop_path_rate=0.2, **SMALL)
    plain = copy.deepcopy(model)
    model.compile_parts()
    imgs = torch.randn(4, 3, 64, 64)
    for epoch in range(2):
        with torch.compiler.set_stance("fail_on_recompile" if epoch else "default"):
            model.train()(imgs).sum().backward()
            for batch in (imgs, imgs[:3]):
                with torch.inference_mode():
                    torch.testing.assert_close(model.eval()(batch), plain.eval()(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@in_a_fork
def test_a_compiled_model_in_distributed_data_parallel(graphs_alone, tmp_path):
    plain = MixMAE(**SMALL, **DECODER)
    model = copy.deepcopy(plain)
    model.compile_parts()
    imgs, mask = torch.randn(4, 3, 64, 64), plain.random_masking(0.5)
    plain(imgs, mask=mask)[0].backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        DistributedDataParallel(model)(imgs, mask=mask)[0].backward()
    finally:
        dist.destroy_process_group()
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        if theirs.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
