"""What only a GPU shows: `sh tests/run.sh -n 0 -m gpu`. Elsewhere these tests are skipped.

One GPU is enough but for NCCL's ranks.
"""

import copy
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import losses, make_images

from models_mixmae import MixMAE
from models_swin import SwinTransformer
from util.knn import nearest
from util.run.gpu_memory import explain_out_of_memory, images_that_fit, peak_of_step
from util.run.optim import DTYPES, autocast, backward, clip_and_step, make_scaler, set_up_arithmetic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.device("cuda")
SMALL = dict(img_size=64, embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=(8, 4, 2, 2))
DECODER = dict(decoder_dim=64, decoder_depth=2, decoder_num_heads=4)
# Of losses and of gradients (norm over norm) against float32 on a CPU.
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (1e-2, 5e-2), "fp16": (2e-3, 2e-2)}


def pair(**options) -> tuple[MixMAE, MixMAE]:
    """A model on the CPU and its copy on the GPU."""
    torch.manual_seed(0)
    model = MixMAE(**SMALL | DECODER | options, norm_pix_loss=True)
    return model, copy.deepcopy(model).to(GPU)


def norm_of_difference(ours: torch.nn.Module, theirs: torch.nn.Module) -> float:
    """Between all gradients, norm over norm."""
    pairs = [(p.grad.cpu(), q.grad.cpu()) for p, q in zip(ours.parameters(), theirs.parameters()) if q.requires_grad]
    difference = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    return float(difference / torch.stack([b.norm() for _, b in pairs]).norm())


def compare_step(model: MixMAE, reference: MixMAE, precision: str, seed: int = 0) -> None:
    """Loss and gradients of one mask on the GPU are those of the CPU, within what the precision allows, as is the loss
    without gradients."""
    generator = torch.Generator().manual_seed(seed)
    imgs = torch.randn(8, 3, *reference.img_size, generator=generator)
    mask = reference.random_masking(0.5, generator)
    scaler = make_scaler(precision, GPU)
    set_up_arithmetic(precision)
    model.zero_grad()
    reference.zero_grad()
    with autocast(precision, GPU):
        loss, _, _ = model(imgs.to(GPU), mask=mask)
    backward(loss, scaler)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= scaler.get_scale()
    expected, _, _ = reference(imgs, mask=mask)
    expected.backward()
    of_loss, of_gradients = TOLERANCES[precision]
    assert loss.item() == pytest.approx(expected.item(), rel=of_loss)
    assert norm_of_difference(model, reference) < of_gradients
    with torch.inference_mode(), autocast(precision, GPU):
        loss, _, _ = model(imgs.to(GPU), mask=mask)
    assert loss.item() == pytest.approx(expected.item(), rel=of_loss)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("options", [{}, {"range_mask_ratio": 0.3}], ids=["one ratio", "ratios"])
def test_a_step_is_that_of_a_cpu(precision, options):
    reference, model = pair(**options)
    compare_step(model, reference, precision)


def test_recomputed_blocks():
    reference, model = pair()
    model.set_grad_checkpointing()
    compare_step(model, reference, "fp32")


PUBLISHED = dict(img_size=224, window_size=14)  # windows of 196 tokens, which FlexAttention takes


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("sizes", [{}, PUBLISHED], ids=["small windows", "published windows"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_steps_are_those_of_a_cpu_and_nothing_is_compiled_twice(precision, sizes, recomputed):
    torch._dynamo.reset()
    reference, model = pair(range_mask_ratio=0.3, **sizes)
    model.set_grad_checkpointing(recomputed)
    model.compile_parts()
    for seed in range(3):
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            compare_step(model, reference, precision, seed)
    torch._dynamo.reset()


def test_compiled_branches_are_dropped_as_eager_ones():
    torch._dynamo.reset()
    set_up_arithmetic("fp32")
    torch.manual_seed(0)
    model = SwinTransformer(**SMALL, num_classes=5, drop_path_rate=0.5).to(GPU)
    compiled = copy.deepcopy(model)
    compiled.compile_parts()
    imgs = torch.randn(8, 3, 64, 64, device=GPU)
    for seed in range(3):
        found = []
        for version in (model, compiled):
            torch.manual_seed(seed)
            found.append(version(imgs).square().mean().item())
        assert found[0] == pytest.approx(found[1], rel=1e-4)
    torch._dynamo.reset()


def test_a_classifier_trains_and_drops_branches():
    torch.manual_seed(0)
    model = SwinTransformer(**SMALL, num_classes=5, drop_path_rate=0.5).to(GPU)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, fused=True)
    imgs, targets = torch.randn(20, 3, 64, 64, device=GPU), torch.arange(20, device=GPU) % 5
    scaler, found = make_scaler("bf16", GPU), []
    for _ in range(60):
        with autocast("bf16", GPU):
            loss = torch.nn.functional.cross_entropy(model(imgs).float(), targets)
        backward(loss, scaler)
        clip_and_step(optimizer, scaler, model.parameters(), 5.0)
        found.append(loss.item())
    assert sum(found[-10:]) < 0.5 * sum(found[:10])


def test_neighbours_are_compared_in_float32():
    set_up_arithmetic("bf16")
    features, labels = torch.nn.functional.normalize(torch.randn(1000, 64, device=GPU), dim=1), torch.arange(1000)
    similarity, _ = nearest(features[:50], features, labels.to(GPU), 20)
    expected = (features[:50].double() @ features.double().T).topk(20, dim=1).values
    torch.testing.assert_close(similarity.double(), expected, rtol=0, atol=1e-6)
    assert torch.get_float32_matmul_precision() == "high"


def test_copies_that_nobody_waits_for_bring_the_right_values():
    """Masks and layouts are copied from page-locked memory that is soon used again."""
    reference, model = pair()
    imgs = torch.randn(8, 3, 64, 64).to(GPU)
    generator = torch.Generator().manual_seed(0)
    masks = [reference.random_masking(0.5, generator) for _ in range(40)]
    with torch.no_grad():
        torch.cuda._sleep(10**9)  # some half a second, in which the CPU runs ahead
        queued = [model(imgs, mask=mask)[0] for mask in masks]
        for loss, mask in zip(queued, masks):
            torch.cuda.synchronize()
            assert loss.item() == pytest.approx(model(imgs, mask=mask)[0].item(), rel=1e-5)


# --- The commands ---

RUN = ("--device", "cuda", "--model", "mixmae_quickstart", "--in_chans", "1", "--warmup_epochs", "1", "--lr", "1e-3")
FEW = (
    *RUN,
    "--no_compile",
    "--batch_size",
    "8",
    "--num_workers",
    "2",
    "--print_freq",
    "1",
    "--vis_every",
    "2",
    "--epochs",
    "2",
)


def command(program: str, *flags: object) -> str:
    """Run one in a process of its own; its output, which must be that of a success."""
    arguments = [sys.executable, *program.split(), *map(str, flags)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for split, number in (("train", 24), ("val", 12)):
        for label in "ab":
            make_images(folder / split / label, number, seed=ord(label))
    return folder


@pytest.fixture(scope="module")
def pretrained(images, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("pretrained")
    said = command("main_pretrain.py", *FEW, "--data_path", images, "--output_dir", output, "--rank_every", 2)
    assert "bf16" in said and len(losses(output)) == 12
    return output


def test_pretraining_goes_on_where_it_stopped(images, pretrained, tmp_path):
    first = min(pretrained.glob("checkpoint-0*.pth"))  # after the first of two epochs
    flags = (*FEW, "--data_path", images, "--output_dir", tmp_path)
    assert "resumed at epoch 1" in command("main_pretrain.py", *flags, "--resume", first)
    # Sums of gradients that threads add in any order differ in their last bits.
    assert losses(tmp_path) == pytest.approx(losses(pretrained)[-len(losses(tmp_path)) :], rel=1e-2)


def test_compiling_is_the_default(images, tmp_path):
    flags = [flag for flag in FEW if flag != "--no_compile"]
    said = command("main_pretrain.py", *flags, "--data_path", images, "--output_dir", tmp_path, "--knn_every", 2)
    assert "compile=True" in said and len(losses(tmp_path)) == 12


def test_images_that_fit_do_and_more_do_not():
    torch.manual_seed(0)
    model = MixMAE(**SMALL, **DECODER).to(GPU)
    total = 2 * 2**30
    fitting = images_that_fit(model, "bf16", total, has_moments=True)
    assert (
        0.75 * total < peak_of_step(model, "bf16", fitting) < total < peak_of_step(model, "bf16", fitting * 2 // 3 * 2)
    )


def test_a_full_memory_is_explained():
    state = SimpleNamespace(model=MixMAE(**SMALL, **DECODER).to(GPU), optimizer=SimpleNamespace(state={}))
    config = SimpleNamespace(
        batch_size=2**20, accum_iter=1, input_size=(64, 64), grad_checkpointing=False, precision="bf16"
    )
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2**50, device=GPU)
    said = explain_out_of_memory(caught.value, state, config)
    assert re.search(r"too small for --batch_size 1048576 at 64x64: about \d+ images would fit", said), said


def test_fine_tuning_evaluation_and_prediction(images, pretrained, tmp_path):
    flags = ("--device", "cuda", "--data_path", images, "--num_workers", 2)
    command(
        "main_finetune.py", *flags, "--finetune", pretrained / "checkpoint.pth", "--output_dir", tmp_path,
        "--epochs", 3, "--batch_size", 8, "--model", "swin_quickstart", "--mixup", 0.8, "--model_ema",
    )  # fmt: skip
    said = command("main_finetune.py", *flags, "--eval", "--resume", tmp_path / "checkpoint.pth")
    on_cpu = command("main_finetune.py", *flags, "--device", "cpu", "--eval", "--resume", tmp_path / "checkpoint.pth")
    results = [re.search(r"top-1 ([\d.]+)%.*on (24) images", text) for text in (said, on_cpu)]
    assert abs(float(results[0][1]) - float(results[1][1])) <= 100 / 24 + 1e-3  # at most one image to the other side
    command("-m util.knn", *flags, "--checkpoint", pretrained / "checkpoint.pth")


def test_more_processes_than_gpus():
    count = torch.cuda.device_count() + 1
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    done = subprocess.run(
        [*launcher, "main_pretrain.py", *RUN, "--data_path", "/"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert re.search(
        rf"the {count} processes on this node .* need a GPU each, but it shows them {count - 1} ",
        done.stderr + done.stdout,
    ), done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("compiled", [False, True])
def test_two_ranks_train_as_one(images, tmp_path, compiled):
    flags = (*FEW, "--data_path", images, "--precision", "fp32", "--epochs", 1)
    flags = [flag for flag in flags if flag != "--no_compile" or not compiled]
    command("main_pretrain.py", *flags, "--output_dir", tmp_path / "one", "--accum_iter", 2)
    command(
        "-m torch.distributed.run --standalone --nproc_per_node=2 main_pretrain.py",
        *flags, "--output_dir", tmp_path / "two",
    )  # fmt: skip
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3 if compiled else 1e-4)
