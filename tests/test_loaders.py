"""Samples that depend on their key alone, and loaders whose workers behave."""

import atexit
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from photos import data_args, photo_folder

from util.data.datasets import BadImageError, ImageDataset, build_dataset, build_loader
from util.data.transforms import finetune_transform, pretrain_transform

CPU = torch.device("cpu")
slow = partial(pytest.param, marks=pytest.mark.slow)
PATHS = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]  # for scripts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXMAE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("make_transform", [pretrain_transform, finetune_transform])
def test_samples_depend_on_their_key_alone(tmp_path, make_transform):
    root = photo_folder(tmp_path / "data")
    batches = [[(0, 3), (0, 1)], [(0, 0), (0, 2), (0, 5)], [(1, 3), (1, 1)], [(0, 3)]]
    results = []
    for workers in (0, 2, 3):
        args = data_args(root, num_workers=workers, seed=5)
        loader = build_loader(build_dataset(args, "train", make_transform(args)), batches, args, CPU)
        results.append([images for images, _ in loader])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    first = results[0]
    assert torch.equal(first[0][0], first[3][0])  # the same key, in another place
    assert not torch.equal(first[0], first[2])  # the same image in another epoch
    args = data_args(root, seed=6)
    assert not torch.equal(build_dataset(args, "train", make_transform(args))[(0, 3)][0], first[3][0])


def test_batches(tmp_path):
    args = data_args(photo_folder(tmp_path / "data"), num_workers=2)
    dataset = build_dataset(args, "train", pretrain_transform(args))
    images, targets = next(iter(build_loader(dataset, [[(0, i) for i in range(12)]], args, CPU)))
    assert images.shape == (12, 3, 32, 32) and images.dtype == torch.uint8
    assert targets.dtype == torch.int64 and targets.tolist() == [0] * 6 + [1] * 6
    assert torch.equal(images[7], dataset[(0, 7)][0])


def test_loading_in_workers_leaves_the_generators_alone(tmp_path):
    args = data_args(photo_folder(tmp_path / "data"), num_workers=1)
    dataset = build_dataset(args, "train", pretrain_transform(args))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    for _ in build_loader(dataset, [[(0, 0)], [(0, 1)]], args, CPU):
        pass
    assert torch.equal(torch.rand(2), expected)


def test_memory_is_pinned_for_a_gpu_alone(tmp_path, monkeypatch):
    args = data_args(photo_folder(tmp_path / "data"), pin_mem=True)
    dataset = build_dataset(args, "train", pretrain_transform(args))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not build_loader(dataset, [[(0, 0)]], args, CPU).pin_memory
    assert build_loader(dataset, [[(0, 0)]], args, torch.device("cuda:1")).pin_memory
    args.pin_mem = False
    assert not build_loader(dataset, [[(0, 0)]], args, torch.device("cuda")).pin_memory


def test_all_loaders_of_a_process_share_one_callback_at_its_exit(tmp_path):
    args = data_args(photo_folder(tmp_path / "data"), num_workers=1)
    dataset = build_dataset(args, "train", pretrain_transform(args))
    build_loader(dataset, [[(0, 0)]], args, CPU)
    registered = atexit._ncallbacks()
    for _ in range(3):
        build_loader(dataset, [[(0, 0)]], args, CPU)
    assert atexit._ncallbacks() == registered


FORKING_SCRIPT = """
import multiprocessing, sys
sys.path[:0] = {paths!r}
multiprocessing.set_start_method("forkserver")  # the default from Python 3.14 on
import torch
from photos import data_args
from util.data.datasets import build_dataset, build_loader
from util.data.image_index import ImageIndex
from util.data.transforms import pretrain_transform
def reduce(self):
    raise AssertionError("the index was pickled")
ImageIndex.__reduce__ = reduce
args = data_args({root!r}, num_workers=2, bad_images="skip", max_bad_images=1.0)
dataset = build_dataset(args, "train", pretrain_transform(args))
open(dataset.path_of(4), "wb").close()
for _ in build_loader(dataset, [[(0, 0)], [(0, 4)]] * 4, args, torch.device("cpu")):
    pass
assert len(dataset.bad_images()) == 1
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers start as the platform likes")
def test_workers_are_forked_and_share_the_index(tmp_path):
    root = photo_folder(tmp_path / "data")
    script = tmp_path / "script.py"
    script.write_text(FORKING_SCRIPT.format(paths=PATHS, root=str(root)))
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


LOADER_SCRIPT = """
import os, signal, sys, time
sys.path[:0] = {paths!r}
import torch
from photos import data_args
from util.data.datasets import build_dataset, build_loader
from util.data.transforms import pretrain_transform
args = data_args({root!r}, num_workers=2)
dataset = build_dataset(args, "train", pretrain_transform(args))
loader = build_loader(dataset, [[(0, 0), (0, 1)]] * 40, args, torch.device("cpu"))
batches = iter(loader)
next(batches)
workers = [process.pid for process in batches._workers]
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    for worker in workers:
        os.kill(worker, number)
time.sleep(0.3)
assert len([1 for _ in batches]) == 39, "a worker fell to a signal"
print(*workers)
{end}
"""


ENDS = [slow("pass"), slow("raise SystemExit(3)"), slow("raise RuntimeError('x')"), "del batches, loader"]


@pytest.mark.parametrize("end", ENDS)
def test_workers_survive_signals_and_end_with_their_process(tmp_path, end):
    root = photo_folder(tmp_path / "data")
    script = LOADER_SCRIPT.format(paths=PATHS, root=str(root), end=end)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.returncode == {"raise SystemExit(3)": 3, "raise RuntimeError('x')": 1}.get(end, 0), run.stderr
    workers = [int(pid) for pid in run.stdout.split()]
    assert len(workers) == 2
    for _ in range(50):
        alive = [pid for pid in workers if _is_running(pid)]
        if not alive:
            return
        time.sleep(0.1)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    raise AssertionError(f"workers {alive} outlived their process")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_errors_in_workers_reach_the_training_process(tmp_path):
    root = photo_folder(tmp_path / "data")
    args = data_args(root, num_workers=1)
    dataset = build_dataset(args, "train", pretrain_transform(args))
    assert isinstance(dataset, ImageDataset)
    Path(dataset.path_of(4)).write_bytes(b"not an image")
    with pytest.raises(BadImageError, match=r"cannot use image .*2-chelsea.jpg.*not an image in a known format"):
        for _ in build_loader(dataset, [[(0, 0)], [(0, 4)]], args, CPU):
            pass
