"""Activations stored for the backward pass, and bytes exchanged between processes."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from benchmark import stored_bytes
from textbook import Config, TextbookMixMAE
from torch.nn.parallel import DistributedDataParallel

from models_mixmae import MixMAE

# Stage 3 of every published model is one window of 14x14 tokens and most of the depth; so it is here.
CONFIG = dict(
    img_size=224,
    embed_dim=32,
    depths=(1, 1, 6, 1),
    num_heads=(1, 2, 4, 8),
    window_size=(14, 14, 14, 7),
    decoder_dim=64,
    decoder_depth=2,
    decoder_num_heads=2,
)


@pytest.fixture(scope="module")
def stored() -> dict[str, int]:
    torch.manual_seed(0)
    ours, theirs = MixMAE(**CONFIG), TextbookMixMAE(Config(**CONFIG))
    imgs, mask = torch.randn(2, 3, 224, 224), ours.random_masking(0.5)
    sizes = {
        "textbook": stored_bytes(theirs, lambda: theirs(imgs, mask)[0]),
        "ours": stored_bytes(ours, lambda: ours(imgs, mask=mask)[0]),
    }
    ours.set_grad_checkpointing(True)
    sizes["checkpointing"] = stored_bytes(ours, lambda: ours(imgs, mask=mask)[0])
    return sizes


def test_a_fifth_less_is_stored_than_by_the_textbook(stored):
    assert stored["ours"] <= 0.80 * stored["textbook"]


def test_checkpointing_stores_a_fifth(stored):
    assert stored["checkpointing"] <= 0.20 * stored["textbook"]


def test_without_gradients_nothing_is_stored():
    model = MixMAE(**CONFIG)
    imgs = torch.randn(2, 3, 224, 224)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(imgs)[0]

    assert stored_bytes(model, forward) == 0


FAULTS = """
import resource, sys, torch
from util.run.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = []
for step in range(10):  # where the pieces lie settles within a few
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(10_000_000 + 999 * i) for i in range(6)]  # 240 MB, freed at the end of the step
    del tensors
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")
def test_freed_memory_can_be_kept():
    """In processes of their own, since there is no way back: memory that was kept need not be mapped again."""
    root = Path(__file__).resolve().parent.parent
    faults = {}
    for how in ("usual", "keep"):
        command = [sys.executable, "-c", FAULTS, how]
        faults[how] = int(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)
    assert faults["keep"] < faults["usual"] / 10


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("error:Grad strides do not match")
@pytest.mark.parametrize("accum_iter", [1, 4])
def test_gradients_are_exchanged_once_per_update(one_process, accum_iter):
    """As the engines do it: all micro-batches but the last run inside `no_sync`."""
    config = CONFIG | dict(img_size=64, window_size=(16, 8, 4, 2))
    model = MixMAE(**config)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    exchanged = []

    def count(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        exchanged.append(bucket.buffer().nbytes)
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    parallel.register_comm_hook(None, count)
    imgs = torch.randn(4, 3, 64, 64)
    for micro in range(accum_iter):
        parallel.require_backward_grad_sync = micro == accum_iter - 1
        parallel(imgs)[0].backward()
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert sum(exchanged) == trained
