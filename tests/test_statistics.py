"""Images in other units than --mean and --std stop a run before it starts; what people do on purpose does not."""

import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from photos import PHOTOS, data_args, decode, photo_folder
from running import fails, losses, make_images, run
from trials import Trial

import main_finetune
import main_pretrain
import util.knn
import util.predict
from util.data.datasets import NumberedImages, build_dataset
from util.data.decoding import BadImageError
from util.data.statistics import check_images, check_units, measure
from util.data.transforms import Normalize
from util.run.checks import check_statistics
from util.weights.settings import IMAGENET_MEAN, IMAGENET_STD

SHAPE = ["--model", "mixmae_quickstart", "--input_size", "16", "--window_size", "4", "4", "4", "2"]
QUICK = ["--device", "cpu", "--num_workers", "0", "--warmup_epochs", "0", "--batch_size", "4", "--epochs", "1"]
PRETRAIN = [*SHAPE, *QUICK, "--vis_every", "0"]


def photos(scale: float = 1.0) -> list[torch.Tensor]:
    images = [decode(path.read_bytes(), 3) for path in PHOTOS]
    return images if scale == 1 else [image.float() / 255 * scale for image in images]


def grey(*values: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(*values, (1, 30, 20), generator=generator, dtype=torch.uint8) for _ in range(8)]


def test_measured_statistics_are_those_that_normalise():
    images = [torch.rand(3, 20, 30, dtype=torch.float64).float() * 700 - 50 for _ in range(5)]
    mean, std = measure(images)
    normalised = torch.stack([Normalize(mean.tolist(), std.tolist())(image) for image in images])
    assert normalised.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (normalised.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    of_bytes = measure(photos())
    of_floats = measure(photos(scale=1 + 1e-9))
    for a, b in zip(of_bytes, of_floats):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "images, mean, std",
    [
        (photos(10_000), IMAGENET_MEAN, IMAGENET_STD),  # .npy in units of their own
        (photos(255), IMAGENET_MEAN, IMAGENET_STD),
        (photos(), (123, 117, 104), (58, 57, 57)),  # statistics of 0..255
        (photos(), (123, 117, 104), IMAGENET_STD),
        (photos(), IMAGENET_MEAN, (58, 57, 57)),
        (photos(0.001), IMAGENET_MEAN, IMAGENET_STD),
    ],
)
def test_wrong_units_are_an_error_that_says_what_to_give(images, mean, std):
    error, warning = check_images(images, mean, std)
    assert error and not warning
    flags = re.search(r"--mean ([\d. e-]+) --std ([\d. e-]+)$", error)
    pasted = [tuple(map(float, values.split())) for values in flags.groups()]
    assert check_images(images, *pasted) == ("", "")


@pytest.mark.parametrize(
    "images, mean, std",
    [
        (photos(), IMAGENET_MEAN, IMAGENET_STD),
        (photos()[:1], IMAGENET_MEAN, IMAGENET_STD),
        ([image[:, :2, :2] for image in photos()], IMAGENET_MEAN, IMAGENET_STD),  # tiny
        ([image // 6 for image in photos()], IMAGENET_MEAN, IMAGENET_STD),  # dark
        ([255 - image // 6 for image in photos()], IMAGENET_MEAN, IMAGENET_STD),  # bright
        ([image.expand(3, -1, -1) for image in grey(0, 40)], IMAGENET_MEAN, IMAGENET_STD),  # most of it black
        (grey(0, 256), (0.286,), (0.353,)),  # Fashion-MNIST's
        (grey(0, 256), (0.5,), (0.25,)),
        (photos(10_000), (5000, 4500, 4000), (2500, 2500, 2500)),
        (
            [torch.cat([*photos(3)[:1], torch.zeros(1, *photos()[0].shape[1:])])] * 1,
            (1,) * 4,
            (1,) * 4,
        ),  # a dead channel
    ],
)
def test_what_is_not_an_error(images, mean, std):
    assert check_images(images, mean, std) == ("", "")


def test_constant_and_identical_images_are_a_warning():
    flat = [torch.tensor([value, 3, 9], dtype=torch.uint8).view(3, 1, 1).expand(3, 9, 9) for value in (0, 200)]
    for images, expected in ((flat, "a single colour"), (photos()[:1] * 3, "are identical")):
        error, warning = check_images(images, IMAGENET_MEAN, IMAGENET_STD)
        assert not error and expected in warning
    very_dark = [image // 20 for image in photos()]
    error, warning = check_images(very_dark, IMAGENET_MEAN, IMAGENET_STD)
    assert not error and "--std" in warning


def test_a_damaged_image_among_others_decides_nothing():
    images = photos(1 + 1e-9)
    damaged = images[0].clone()
    damaged[0, 0, 0] = -3e38
    assert check_images([*images, damaged], IMAGENET_MEAN, IMAGENET_STD) == ("", "")
    assert check_images([*images, *[torch.zeros_like(images[0])] * 9], IMAGENET_MEAN, IMAGENET_STD) == ("", "")
    assert check_images([damaged] * 2 + [damaged + 1], IMAGENET_MEAN, IMAGENET_STD)[0]


def mixed(images: list[torch.Tensor], factor: float) -> list[torch.Tensor]:
    return [*images, *images, *(image * factor for image in images)]


def test_images_in_units_of_each_other_s_own():
    """40% of 0..1 among 0..10000 were trained on: pooled, their mean and deviation are ordinary."""
    of_two = mixed(photos(10_000), 1e-4)
    assert check_images(of_two, (4000,) * 3, (3000,) * 3) == ("", "")
    error, warning = check_units(of_two)
    assert f"in {len(PHOTOS)} of {len(of_two)} images, and at least" in error and not warning
    for images in (mixed(photos(1 + 1e-9), 1 / 16), [*photos(), *photos(), *(image // 128 for image in photos())]):
        error, warning = check_units(images)  # 12 bits among 16; 0 and 1 in files of bytes
        assert not error and "as if they were in different units" in warning
    dark = [*photos(), *(image // 6 for image in photos())]
    blank = [*photos(7.0), *[torch.zeros(3, 4, 4)] * 9]
    for images in (photos(), dark, blank, [*photos(7.0) * 2, photos(7e30)[0]], grey(0, 256), photos()[:1]):
        assert check_units(images) == ("", "")


def test_one_channel_with_a_far_too_large_deviation_is_told():
    """An error it cannot be: a channel that hardly says anything is usual in microscopy and satellite images."""
    error, warning = check_images(photos(), IMAGENET_MEAN, (0.229, 58, 0.225))
    assert not error and "--std 0.229 58 0.225, these images have mean" in warning
    weak = [torch.cat([image[:2], image[2:] // 64]) for image in photos()]
    error, warning = check_images(weak, IMAGENET_MEAN, IMAGENET_STD)
    assert not error and "Measured on" in warning


def watched(folder: Path, factors: dict[int, float], count: int = 40, numbered=False, training=True, **flags):
    """A data set of float arrays of 2 channels, of which some are multiplied by `factors`, watched as in a run."""
    make_images(folder, count, (16, 16), channels=2)
    for number, path in enumerate(sorted(folder.iterdir())):
        np.save(path, np.load(path) * np.float32(factors.get(number, 1.0)))
    dataset = build_dataset(data_args(folder, in_chans=2), "train", flags.pop("transform", lambda image: image))
    dataset = NumberedImages(dataset.source, lambda image: image, 0, True) if numbered else dataset
    dataset.sample = lambda: []
    config = SimpleNamespace(**{"mean": (128,) * 2, "std": (74,) * 2, "allow_odd_statistics": False} | flags)
    check_statistics(config, dataset, "x", training)
    return dataset


@pytest.mark.parametrize("kind", ["training", "skipping", "evaluation", "prediction", "allowed"])
def test_every_image_is_looked_at_while_it_is_read(tmp_path, caplog, kind):
    """Evaluation and prediction go on: two bright frames ended a prediction, or lost an epoch."""
    numbered, training = kind == "prediction", kind not in ("evaluation", "prediction")
    dataset = watched(
        tmp_path, {7: 1e4, 9: 1e4, 12: 1e4}, 40, numbered, training, allow_odd_statistics=kind == "allowed"
    )
    dataset.skip_bad = kind == "skipping"
    for index in [*range(9), 7]:
        dataset[(0, index)]
    assert ("0007.npy is far from --mean and --std: normalised" in caplog.text) == (kind != "allowed")
    assert ("Training stops when more than 1% of the images are" in caplog.text) == (kind in ("training", "skipping"))
    if kind in ("training", "skipping"):
        with pytest.raises(BadImageError, match=r"^2 of 10 images read so far are far .*; the last one: .*0009\.npy\."):
            dataset[(0, 9)]
    else:
        assert [dataset[(0, index)][0].max() > 1000 for index in (8, 9, 12)] == [False, True, True]
    assert caplog.text.count("far from --mean") == (kind != "allowed") and len(dataset.bad_images()) == 0


def test_a_run_goes_on_with_images_that_the_start_accepts(tmp_path, caplog):
    """Crops of bright spots added up over epochs until a run of hours died; so did the worst of many channels."""
    spots = torch.full((2, 16, 16), 128.0)
    spots[:, :2, :2] += 74 * 300
    crop = lambda image: spots[:, :2, :2]  # noqa: E731
    far_channel = watched(tmp_path / "a", {}, transform=crop, mean=(128, 1e6))
    offset = watched(tmp_path / "b", {}, mean=(128 - 9.5 * 74,) * 2, std=(74 / 4.5,) * 2)
    for dataset in (far_channel, offset):
        for epoch in range(3):
            for index in range(len(dataset)):
                dataset[(epoch, index)]
    assert "far from" not in caplog.text


def test_one_in_a_hundred_images_may_be_far(tmp_path, caplog):
    """Of the set, or of those read so far in a large one; none is counted again in a later epoch."""
    dataset = watched(tmp_path, {0: 1e4, 1: 1e4, 2: 1e4, 3: 1e4}, 300)
    for epoch in range(3):
        for index in (*range(3), *range(4, 300)):
            dataset[(epoch, index)]
    assert caplog.text.count("far from --mean") == 1
    with pytest.raises(BadImageError, match="4 of 300 images read so far"):
        dataset[(3, 3)]


def test_a_run_stops_at_images_in_other_units_that_the_sample_did_not_show(tmp_path):
    make_images(tmp_path / "data", 100, (16, 16), channels=2)
    sampled = {i * 100 // 32 for i in range(32)}
    for number, path in enumerate(sorted((tmp_path / "data").iterdir())):
        np.save(path, np.load(path) * (1.0 if number in sampled else 1e4))
    flags = [*PRETRAIN, "--in_chans", 2, "--mean", 128, 128, "--std", 74, 74, "--data_path", tmp_path / "data"]
    said = Trial(tmp_path, *flags, "--num_workers", 2, "--output_dir", tmp_path / "out").finish(1)
    assert said.count("is far from --mean and --std") == 1 and "Traceback" not in said
    assert re.search(r"[2-9] of \d+ images read so far are far from --mean and --std", said)


def test_a_sample_comes_from_all_over_and_draws_nothing(tmp_path):
    dataset = build_dataset(data_args(photo_folder(tmp_path, copies=20)), "train", lambda image: 1 / 0)
    read, source_read = [], dataset.source.read
    dataset.source.read = lambda i: read.append(i) or source_read(i)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert len(dataset.sample(8)) == 8
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert len(set(read)) == 8 and min(read) < 10 and max(read) >= 50
    assert len(dataset.sample(1000, seconds=0)) == 4  # slow disks and enormous images end it
    Path(dataset.path_of(0)).write_bytes(b"")
    assert len(dataset.sample(1000, seconds=60)) == 59


def arrays(folder: Path, dtype: str) -> Path:
    """Values in 0..10000, with labels."""
    for split in ("train", "val"):
        for label in "ab":
            make_images(folder / split / label, 4, (16, 16), channels=2, seed=ord(label))
            for path in (folder / split / label).iterdir():
                np.save(path, (np.load(path) / 255 * 10_000).astype(dtype))
    return folder


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_arrays_in_their_own_units_do_not_train_by_default(tmp_path, capfd, dtype):
    """The loss was 332,901,472."""
    data, out = arrays(tmp_path / "data", dtype), tmp_path / "out"
    flags = [*PRETRAIN, "--no-norm_pix_loss", "--in_chans", "2", "--data_path", data, "--output_dir", out]
    with pytest.raises(SystemExit) as stopped:
        run(main_pretrain, *flags)
    said = capfd.readouterr().err
    assert stopped.value.code == 2 and "--allow_odd_statistics continues all the same" in said
    assert not list(out.glob("*.jsonl")) and not list(out.glob("*.pth"))
    measured = re.search(r"of them: (--mean \S+ \S+ --std \S+ \S+)\. Give", said)[1].split()
    run(main_pretrain, *flags, *measured)
    assert max(losses(out)) < 10
    run(main_pretrain, *flags[:-1], tmp_path / "anyway", "--allow_odd_statistics")
    assert min(losses(tmp_path / "anyway")) > 1e4
    assert "far from 0 and 1" in capfd.readouterr().out


def test_evaluation_fine_tuning_and_knn_stop_too(tmp_path, capfd):
    """What they would print is a number, with nothing to show that it means nothing."""
    data, out = arrays(tmp_path / "data", "float32"), tmp_path / "out"
    message = r"far from 0 and 1\. Measured on 8 of them: --mean \d+ \d+ --std \d+ \d+\. Give these flags"
    shared = ["--in_chans", "2", "--data_path", data]
    finetune = [*QUICK, "--model", "swin_quickstart", *SHAPE[2:], *shared, "--output_dir", out]
    fails(main_finetune, capfd, message, *finetune)
    run(main_finetune, *finetune, "--mean", "5000", "5000", "--std", "2900", "2900")
    capfd.readouterr()
    weights, cpu = ["--finetune", out / "checkpoint.pth", "--eval"], ["--device", "cpu", "--num_workers", "0"]
    run(main_finetune, *cpu, *shared, *weights)  # the units are recorded with the weights
    assert "result: top-1" in capfd.readouterr().out
    for path in data.glob("*/*/*.npy"):
        np.save(path, np.load(path) / 10_000)
    message = r"Bring them into the units of the images that were trained on, or if those are in these units too"
    fails(main_finetune, capfd, message, *cpu, *shared, *weights)
    fails(util.knn, capfd, message, *cpu, *shared, "--checkpoint", out / "checkpoint.pth", "--k", "1")
    run(util.knn, *cpu, *shared, "--checkpoint", out / "checkpoint.pth", "--k", "1", "--allow_odd_statistics")


def test_validation_images_in_other_units_stop_what_reads_them(tmp_path, capfd):
    """Accuracies of 59% instead of 75%, and exit code 0: only the training images were looked at."""
    data, out = arrays(tmp_path / "data", "float32"), tmp_path / "out"
    for path in data.glob("train/*/*.npy"):
        np.save(path, np.load(path) / 10_000)
    shared = [*QUICK, *SHAPE[2:], "--in_chans", "2", "--data_path", data]
    message = (
        r"data \(val\): normalised with .* far from 0 and 1\. Measured on 8 of them: .*\. Bring them into the units of"
    )
    train = ["--model", "mixmae_quickstart", *shared, "--output_dir", out]
    fails(main_pretrain, capfd, message, *train, "--knn_every", "1")
    run(main_pretrain, *train)
    capfd.readouterr()
    weights = out / "checkpoint.pth"
    cpu = ["--device", "cpu", "--num_workers", "0", "--checkpoint", weights]
    fails(util.knn, capfd, message, *cpu, "--data_path", data, "--k", "1")
    finetuned = ["--model", "swin_quickstart", *shared, "--finetune", weights, "--output_dir", tmp_path / "finetuned"]
    fails(main_finetune, capfd, message, *finetuned)
    fails(util.predict, capfd, "far from 0 and 1", *cpu, data / "val", "--features", "--out", tmp_path / "a.npz")
    run(util.predict, *cpu, data / "train", "--features", "--out", tmp_path / "a.npz")


def test_12_bits_in_files_of_16_are_an_error(tmp_path):
    deep = [(image.float() / 255 * 4095 / 65535) for image in photos()]
    error, _ = check_images(deep, IMAGENET_MEAN, IMAGENET_STD)
    assert error and check_images(deep, *(values.tolist() for values in measure(deep))) == ("", "")


def test_a_mean_that_is_not_a_number_is_an_error():
    """Of which all comparisons are false."""
    assert "far from 0 and 1" in check_images(photos(), (0.5, float("nan"), 0.5), IMAGENET_STD)[0]


def test_all_ranks_stop_with_one_message(tmp_path):
    data = arrays(tmp_path / "data", "uint16")
    flags = [*PRETRAIN, "--in_chans", "2", "--data_path", data, "--batch_size", "2"]
    said = Trial(tmp_path / "out", *flags, "--output_dir", tmp_path / "out", ranks=2).finish(2, 2)
    assert said.count("far from 0 and 1. Measured on 8 of them") == 1 and "Traceback" not in said
