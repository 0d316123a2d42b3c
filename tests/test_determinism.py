"""`--deterministic`: what it sets, what it changes, and what it says of an operation that cannot."""

import os

import pytest
import torch
import torch.nn.functional as F
from running import QUICK, fails, losses, make_images, run

import main_pretrain
from main_pretrain import PretrainConfig
from models_mixmae import MixMAE
from util.data.label_maps import IGNORED
from util.dense.upernet import AUXILIARY_WEIGHT, average_parts, segmentation_loss
from util.errors import UserError
from util.run import determinism
from util.run.config import DeviceFlags
from util.run.determinism import NondeterminismError, set_up_determinism
from util.run.failures import explained
from util.run.flags import ROUNDING

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TRAIN = [
    *("--model", "mixmae_quickstart", "--input_size", "16", "--window_size", "4", "4", "4", "2", "--in_chans", "1"),
    *(*QUICK, "--batch_size", "4", "--epochs", "1"),
]


@pytest.fixture(autouse=True)
def usual_settings(monkeypatch):
    monkeypatch.delenv(determinism.WORKSPACE, raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_what_is_set(monkeypatch):
    set_up_determinism(True, GPU)
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    # Only a warning would let fused attention's gradient be summed in any order.
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_up_determinism(True, GPU)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, got ':4096:2:16:8'"):
        set_up_determinism(True, GPU)
    set_up_determinism(False, GPU)
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic


def test_a_run_sets_it_and_on_a_cpu_has_the_same_losses(tmp_path, capfd, monkeypatch):
    make_images(tmp_path / "images", 12, (16, 16))
    flags = [*TRAIN, "--data_path", tmp_path / "images", "--output_dir"]
    run(main_pretrain, *flags, tmp_path / "plain")
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    assert "--deterministic" not in capfd.readouterr().out
    run(main_pretrain, *flags, tmp_path / "same", "--deterministic")
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    assert "on a CPU the main scripts' runs are bit-identical without it" in capfd.readouterr().out
    assert losses(tmp_path / "plain") == losses(tmp_path / "same")


def test_it_may_be_given_to_a_resumed_run_and_does_not_go_with_compiling(tmp_path, capfd):
    assert DeviceFlags.__dataclass_fields__["deterministic"].metadata["on_resume"] is ROUNDING
    fails(
        main_pretrain, capfd, "--deterministic does not go with --compile",
        *TRAIN, "--data_path", tmp_path, "--deterministic", "--compile",
    )  # fmt: skip
    assert PretrainConfig(data_path="a", deterministic=True, compile=False).deterministic


REFUSED = (  # as PyTorch says it
    "{} does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'. You can "
    "turn off determinism just for this operation, or you can use the 'warn_only=True' option."
)


@pytest.mark.parametrize("kernel", ["adaptive_avg_pool2d_backward_cuda", "roi_align_backward_kernel", "_histc_cuda"])
def test_operations_are_named(kernel):
    with pytest.raises(NondeterminismError, match=rf"has no deterministic version of {kernel} on this device"):
        with explained():
            raise RuntimeError(REFUSED.format(kernel))


def test_what_pytorch_says_is_understood():
    """Its own words, from an operation that has no deterministic version on a CPU either."""
    torch.use_deterministic_algorithms(True)
    with pytest.raises(NondeterminismError, match="has no deterministic version of put_ "), explained():
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    with pytest.raises(RuntimeError, match="another fault"), explained():
        raise RuntimeError("another fault")


def test_such_an_operation_ends_a_run_in_one_line(tmp_path):
    from trials import TINY, Trial, at_step

    make_images(tmp_path / "images", 12)

    def refuse(loss: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
        return loss + torch.zeros(3).put_(torch.tensor([0]), torch.ones(1)).sum()

    flags = (*TINY, "--epochs", 1, "--data_path", tmp_path / "images", "--output_dir", tmp_path / "out")
    said = Trial(tmp_path, *flags, "--deterministic", sabotage=at_step(2, refuse)).finish(1)
    assert "has no deterministic version of put_ on this device" in said and "Traceback" not in said
    Trial(tmp_path, *flags, sabotage=at_step(2, refuse)).finish(0)


def test_three_ranks_sum_in_their_order_on_any_device(monkeypatch):
    from util.run import distributed

    hooks = []

    class Wrapper(torch.nn.Module):
        def __init__(self, model, **options):
            super().__init__()

        def register_comm_hook(self, state, hook):
            hooks.append(hook)

    monkeypatch.setattr(distributed, "DistributedDataParallel", Wrapper)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    distributed.wrap_model(torch.nn.Linear(1, 1), GPU)
    assert not hooks
    torch.use_deterministic_algorithms(True)
    distributed.wrap_model(torch.nn.Linear(1, 1), GPU)
    assert hooks == [distributed.average_in_rank_order]


def test_segmentation_has_deterministic_operations_of_the_same_value():
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 7, 10, dtype=torch.float32, requires_grad=True)
    logits = torch.randn(2, 4, 8, 9), torch.randn(2, 4, 8, 9)
    labels = torch.randint(0, 4, (2, 8, 9))
    labels[0, :3] = IGNORED
    torch.use_deterministic_algorithms(True)
    for side in (1, 2, 3, 6):
        expected = F.adaptive_avg_pool2d(maps, side)
        torch.testing.assert_close(average_parts(maps, side), expected, rtol=1e-5, atol=1e-6)
    main, auxiliary = (F.cross_entropy(x, labels, ignore_index=IGNORED, reduction="sum") / 144 for x in logits)
    torch.testing.assert_close(segmentation_loss(logits, labels), main + AUXILIARY_WEIGHT * auxiliary)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_on_a_gpu_are_the_same_bits(precision):
    from util.run.optim import autocast, set_up_arithmetic

    found = []
    set_up_arithmetic(precision, measure=False)
    set_up_determinism(True, GPU)
    for _ in range(3):
        torch.manual_seed(0)
        model = MixMAE(
            img_size=64, embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=(8, 4, 2, 2),
            decoder_dim=64, decoder_depth=2, decoder_num_heads=4,
        ).to(GPU)  # fmt: skip
        imgs, mask = torch.randn(16, 3, 64, 64).to(GPU), model.random_masking(0.5, torch.Generator().manual_seed(0))
        with autocast(precision, GPU):
            loss, _, _ = model(imgs, mask=mask)
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).cpu())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
