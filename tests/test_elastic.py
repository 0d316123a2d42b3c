"""A run is the same for any number of ranks and data-loading processes, and for every division of its steps' batches.

An effective batch of 8 images is divided in every way into 1, 2 and 4 ranks, --accum_iter and --batch_size. Images with
their augmentation and their partners are equal to the bit; so is which images make up a micro-batch of a given size.
Losses are too but for the order in which ranks and micro-batches are added up, where --batch_size stays: each
micro-batch draws one mask.
"""

import shutil
from pathlib import Path

import pytest
import torch
from photos import data_args, photo_folder
from running import make_images
from trials import TINY, Trial, steps_of

from util.data.datasets import ImageDataset, build_dataset, build_loader
from util.data.samplers import TrainBatchSampler
from util.data.transforms import finetune_transform

EFFECTIVE, SEED, WORKERS = 8, 5, (0, 1, 3)
DIVISIONS = [  # ranks, micro-batches, images
    (ranks, accum_iter, EFFECTIVE // (ranks * accum_iter))
    for ranks in (1, 2, 4)
    for accum_iter in (1, 2, 4)
    if ranks * accum_iter <= EFFECTIVE // 2  # images are mixed in pairs
]
POSITIONS = [(0, 0), (1, 1), (1, 2)]  # epoch and first step: a start, and resuming in the second epoch
TOLERANCE = 1e-5  # relative, of the losses of 6 steps


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageDataset:
    """28 photographs with fine-tuning's augmentation: 3 effective batches per epoch and 4 images left over."""
    folder = photo_folder(tmp_path_factory.mktemp("elastic"), copies=28)
    config = data_args(folder, seed=SEED)
    dataset = build_dataset(config, "train", finetune_transform(config))
    assert len(dataset) >= 28
    return dataset


def micro_batches(images: ImageDataset, division: tuple[int, int, int], workers: int, position: tuple[int, int]):
    """Step -> its micro-batches in the order of their pieces, each a list of images as bytes."""
    ranks, accum_iter, batch_size = division
    steps: list[list[list[bytes]]] = []
    for rank in range(ranks):
        sampler = TrainBatchSampler(28, batch_size, accum_iter, rank, ranks, SEED)
        sampler.set_position(*position)
        steps = steps or [[[] for _ in range(sampler.pieces)] for _ in range(len(sampler) // accum_iter)]
        loader = build_loader(images, sampler, data_args("", num_workers=workers), torch.device("cpu"))
        for number, (imgs, _) in enumerate(loader):
            step, micro = divmod(number, accum_iter)
            steps[step][micro * ranks + rank] = [img.contiguous().numpy().tobytes() for img in imgs]
    return steps


def pairs(micro: list[bytes]) -> set[frozenset[bytes]]:
    return {frozenset((img, micro[-1 - i])) for i, img in enumerate(micro[: len(micro) // 2])}


@pytest.fixture(scope="module")
def reference(images) -> dict:
    """Of one rank without workers, for every micro-batch size and position."""
    sizes = {batch_size: (1, EFFECTIVE // batch_size, batch_size) for _, _, batch_size in DIVISIONS}
    return {
        (size, position): micro_batches(images, division, 0, position)
        for size, division in sizes.items()
        for position in POSITIONS
    }


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("division", DIVISIONS, ids=lambda division: "{}x{}x{}".format(*division))
def test_images_and_partners_of_a_step_are_equal_to_the_bit(images, reference, division, workers):
    for position in (POSITIONS[0], POSITIONS[-1]):
        steps = micro_batches(images, division, workers, position)
        assert len(steps) == 3 - position[1]
        assert steps == reference[division[2], position]
        whole = reference[EFFECTIVE, position]
        for step, [all_images] in zip(steps, whole):
            assert set().union(*map(pairs, step)) == pairs(all_images)


def test_resuming_goes_on_with_the_steps_that_are_left(reference):
    for size in {batch_size for _, _, batch_size in DIVISIONS}:
        assert reference[size, (1, 1)][1:] == reference[size, (1, 2)]
    flat = [img for [micro] in reference[EFFECTIVE, (0, 0)] for img in micro]
    assert len(set(flat)) == len(flat) == 24


# --- Losses -----------------------------------------------------------------------------------------------------------

RECIPE = (*TINY, "--batch_size", 2, "--epochs", 2, "--drop_path", 0.3, "--range_mask_ratio", 0.2, "--clip_grad", 1)
RECIPE = (*RECIPE, "--save_steps", 1, "--keep_checkpoints", 9)
LAYOUTS = {1: ("--accum_iter", 4, "--num_workers", 0), 2: ("--accum_iter", 2, "--num_workers", 1)}
LAYOUTS[4] = ("--accum_iter", 1, "--num_workers", 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`images`, and the runs `1`, `2` and `4` by their numbers of ranks."""
    place = tmp_path_factory.mktemp("elastic runs")
    make_images(place / "images", 28)
    for ranks, layout in LAYOUTS.items():
        flags = (*RECIPE, *layout, "--data_path", place / "images", "--output_dir", place / str(ranks))
        Trial(place, *flags, ranks=ranks).finish()
    return place


def assert_same_losses(out: Path, reference: Path) -> None:
    assert [record["step"] for record in steps_of(out)] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm", "lr"):
        values, expected = (torch.tensor([record[name] for record in steps_of(run)]) for run in (out, reference))
        torch.testing.assert_close(values, expected, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_do_not_depend_on_ranks_and_workers(runs, ranks):
    assert_same_losses(runs / str(ranks), runs / "1")


@pytest.mark.parametrize("before, after", [(4, 1), (1, 2), (2, 4)])
def test_losses_after_resuming_with_another_number_of_ranks(runs, tmp_path, before, after):
    out = tmp_path / "out"
    shutil.copytree(runs / str(before), out)
    flags = (*RECIPE, *LAYOUTS[after], "--data_path", runs / "images", "--output_dir", out)
    said = Trial(tmp_path, *flags, "--resume", out / "checkpoint-00000004.pth", ranks=after).finish()
    assert f"world_size: {before} -> {after}" in said
    assert_same_losses(out, runs / "1")
