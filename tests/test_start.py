"""What the ranks of a node read when a run starts: each file of weights is verified once, and is then mapped."""

import os
import re
import zipfile
from pathlib import Path

import pytest
import torch
from running import make_images
from trials import TINY, Sabotage, Trial, read_checkpoint, same, state_of

import main_finetune
import util.weights.file
import util.weights.source
from util.run.state import TrainingState

RUN = (*TINY, "--batch_size", 2, "--epochs", 1)
CLASSIFIER = ("--model", "swin_quickstart", "--device", "cpu", "--num_workers", 0, "--epochs", 1, "--lr", "1e-3")
CLASSIFIER = (*CLASSIFIER, "--in_chans", 1, "--batch_size", 2, "--aa", "", "--warmup_epochs", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`images`, the labelled images in `data`, and `first`, the output of one epoch of pretraining."""
    place = tmp_path_factory.mktemp("start")
    make_images(place / "images", 8)
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        make_images(place / "data" / folder, 4)
    Trial(place, *RUN, "--data_path", place / "images", "--output_dir", place / "first").finish()
    return place


def mapped(path: Path) -> bool:
    return str(path.resolve()) in Path("/proc/self/maps").read_text()


def watched(ranks_per_node: int, *paths: Path, spoilt_for: int | None = None) -> Sabotage:
    """As on nodes of `ranks_per_node` ranks: reports passes over whole files, and where `paths` are mapped.

    Args:
        spoilt_for: a rank that reads other bytes than there are.
    """

    def install(rank: int) -> None:
        os.environ |= {"LOCAL_RANK": str(rank % ranks_per_node), "LOCAL_WORLD_SIZE": str(ranks_per_node)}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        hash_of, test_of, restore = util.weights.file.file_hash, zipfile.ZipFile.testzip, TrainingState.restore

        def file_hash(path: Path, without_last: int = 0) -> str:
            print(f"rank {rank} hashes {path}", flush=True)
            return "0" * 64 if rank == spoilt_for else hash_of(path, without_last)

        def testzip(archive: zipfile.ZipFile) -> str | None:
            print(f"rank {rank} hashes {archive.filename}", flush=True)
            return test_of(archive)

        def watched_restore(state: TrainingState, checkpoint: dict, steps_per_epoch: int) -> None:
            print(f"rank {rank} has mapped {sum(map(mapped, paths))} files", flush=True)
            restore(state, checkpoint, steps_per_epoch)
            checkpoint.clear()
            print(f"rank {rank} still maps {sum(map(mapped, paths))} files", flush=True)

        util.weights.file.file_hash = util.weights.source.file_hash = file_hash
        zipfile.ZipFile.testzip = testzip
        TrainingState.restore = watched_restore

    return install


def passes(said: str, *paths: Path) -> list[int]:
    """The ranks that have read one of `paths` from end to end, as often as they have."""
    found = re.findall(r"rank (\d) hashes (.*)", said)
    return sorted(int(rank) for rank, path in found if Path(path) in paths)


@pytest.mark.parametrize("ranks, ranks_per_node, expected", [(1, 1, [0]), (2, 2, [0]), (4, 2, [0, 2])])
def test_a_resumed_run_reads_its_checkpoint_once_per_node(place, tmp_path, ranks, ranks_per_node, expected):
    out = tmp_path / "out"
    flags = (*RUN, "--data_path", place / "images", "--output_dir", out)
    Trial(tmp_path, *flags).finish()
    newest = out / "checkpoint-00000004.pth"
    before = state_of(out)["optimizer"]["state"]
    sabotage = watched(ranks_per_node, newest, out / "checkpoint.pth")
    resume = ("--resume", "auto", "--epochs", 2, "--resume_force")
    said = Trial(tmp_path, *flags, *resume, ranks=ranks, sabotage=sabotage).finish()
    assert passes(said, newest, out / "checkpoint.pth") == expected
    for rank in range(ranks):  # optimizer included; what training goes on with is its own
        assert f"rank {rank} has mapped 1 files" in said and f"rank {rank} still maps 0 files" in said
    assert not same(state_of(out)["optimizer"]["state"], before)


@pytest.mark.parametrize("sealed", [True, False], ids=["ours", "of another program"])
def test_weights_are_read_once_per_node(place, tmp_path, sealed):
    weights = place / "first" / "checkpoint.pth"
    if not sealed:
        torch.save(read_checkpoint(weights), tmp_path / "weights.pth")
        weights = tmp_path / "weights.pth"
    flags = (*RUN, "--data_path", place / "images", "--output_dir", tmp_path / "out", "--finetune", weights)
    said = Trial(tmp_path, *flags, ranks=4, sabotage=watched(2)).finish()
    assert passes(said, weights) == [0, 2] and said.count("tensors from") == 1


def test_an_evaluation_reads_its_weights_once_per_node(place, tmp_path):
    flags = (*CLASSIFIER, "--data_path", place / "data")
    Trial(tmp_path, *flags, "--output_dir", tmp_path / "out", main=main_finetune).finish()
    weights = tmp_path / "out" / "checkpoint.pth"
    flags = (*flags, "--eval", "--finetune", weights)
    said = Trial(tmp_path, *flags, ranks=2, sabotage=watched(2), main=main_finetune).finish()
    assert passes(said, weights) == [0] and "result: top-1" in said


@pytest.mark.parametrize("how", ["--finetune", "--resume"])
def test_a_file_that_is_damaged_on_one_node_ends_all_ranks_at_once_in_one_line(place, tmp_path, how):
    weights = place / "first" / "checkpoint.pth"
    flags = (*RUN, "--data_path", place / "images", "--output_dir", tmp_path / "out", how, weights)
    said = Trial(tmp_path, *flags, ranks=4, sabotage=watched(2, spoilt_for=2)).finish(2, 2, 2, 2, seconds=60)
    assert len(re.findall(r"error: on \S+ \(rank 2\): .*checkpoint.pth is damaged", said)) == 1
    assert said.count("is damaged") == 1


def test_a_missing_file_is_said_once(place, tmp_path):
    flags = (*RUN, "--data_path", place / "images", "--output_dir", tmp_path / "out")
    said = Trial(tmp_path, *flags, "--finetune", tmp_path / "absent.pth", ranks=2).finish(2, 2, seconds=60)
    assert said.count("absent.pth is neither a file nor a published checkpoint") == 1 and "(rank" not in said
