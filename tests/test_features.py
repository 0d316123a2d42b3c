"""What features are worth: their effective rank, and a linear probe in closed form."""

import logging

import numpy as np
import pytest
import torch
from photos import data_args
from running import QUICK, make_images, read_lines
from trials import Trial

from util.data.datasets import build_dataset
from util.data.decoding import BadImageError
from util.errors import UserError
from util.run import distributed, features
from util.run.features import RIDGE, held_out_images, probe_accuracy, rankme


@pytest.mark.parametrize("rank", [1, 2, 5, 16])
def test_rankme_counts_equal_singular_values(rank):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in (64, 16))
    features = left[:, :rank] @ right[:rank]
    assert rankme(features) == pytest.approx(rank, rel=1e-3)
    assert rankme(7 * features) == pytest.approx(rank, rel=1e-3)


def test_rankme_is_the_entropy_of_the_paper():
    features = np.random.default_rng(0).normal(size=(200, 24)) * np.linspace(0.1, 3, 24)
    values = np.linalg.svd(features, compute_uv=False)
    shares = values / values.sum() + 1e-7
    assert rankme(torch.from_numpy(features)) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    collapsed = features[:1] + 1e-3 * features
    assert rankme(torch.from_numpy(collapsed)) < 1.5 < rankme(torch.from_numpy(features))


def made_up_features(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count)
    centres = np.random.default_rng(9).normal(size=(3, 12)) * 2
    return (centres[labels] + generator.normal(size=(count, 12)) * 2 + 5) * np.linspace(0.01, 30, 12), labels


def test_the_probe_is_ridge_regression_on_standardised_features():
    (train, labels), (val, targets) = made_up_features(300, 0), made_up_features(100, 1)
    x = (train - train.mean(0)) / (train.std(0) + 1e-6)
    y = np.eye(3)[labels]
    weights = np.linalg.solve(x.T @ x + RIDGE * 300 * np.eye(12), x.T @ (y - y.mean(0)))
    scores = (val - train.mean(0)) / (train.std(0) + 1e-6) @ weights + y.mean(0)
    expected = 100 * (scores.argmax(1) == targets).mean()
    tensors = [(torch.from_numpy(a).float(), torch.from_numpy(b)) for a, b in ((train, labels), (val, targets))]
    assert probe_accuracy(*tensors, 3) == pytest.approx(expected, abs=1.01) and 50 < expected < 100


def test_the_probe_takes_features_in_chunks(monkeypatch):
    sets = [made_up_features(300, 0), made_up_features(100, 1)]
    tensors = [(torch.from_numpy(a).float(), torch.from_numpy(b)) for a, b in sets]
    expected = probe_accuracy(*tensors, 3)
    monkeypatch.setattr(features, "CHUNK", 7)
    assert probe_accuracy(*tensors, 3) == expected


def test_a_sample_that_tells_little_or_nothing(tmp_path, caplog):
    make_images(tmp_path, 12, (16, 16))
    dataset = build_dataset(data_args(tmp_path, in_chans=1), "train", lambda image: image)
    caplog.clear()
    features.check_sample(dataset, 12)
    assert not caplog.text
    features.check_sample(dataset, 13)
    assert "RankMe of 12 images is at most that" in caplog.text
    dataset.source.streamed = True
    with pytest.raises(UserError, match="--rank_every needs images that can be read again"):
        features.check_sample(dataset, 12)


def test_the_rank_is_of_the_same_images_however_it_is_measured(monkeypatch):
    monkeypatch.setattr(features, "RANK_IMAGES", 10)
    everything = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    chosen = features.rank_sample(50, 3)
    assert chosen == list(range(0, 50, 5)) and features.rank_sample(7, 3) == list(range(7))
    assert len(features.rank_sample(50, 20)) == 40  # twice as many as there are features
    assert features.rank_of_features(everything, 50) == rankme(everything[chosen])


def test_every_rank_gives_its_own_rows_of_the_sample(monkeypatch):
    monkeypatch.setattr(features, "RANK_IMAGES", 10)
    found, rows = torch.randn(37, 4), []
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda own: rows.append(own) or own)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "get_rank", lambda: rank)  # noqa: B023 - called at once
        features.rank_of_features(found[rank::3], 37)
    assert torch.equal(sum(rows), found[features.rank_sample(37, 4)])


@pytest.mark.parametrize("place, share, expected", [("val", 0.0, 5), ("more", 0.0, 12), ("more", 0.25, 3)])
def test_the_rank_is_of_held_out_images_which_need_no_labels(tmp_path, caplog, place, share, expected):
    make_images(tmp_path / "train", 12 - (place == "more" and 4), (16, 16))
    make_images(tmp_path / place if place == "val" else tmp_path / "train" / place, 5 - (place == "more"), (16, 16))
    config = data_args(tmp_path, in_chans=1, mean=(0.5,), std=(0.25,), val_share=share, allow_odd_statistics=False)
    with caplog.at_level(logging.INFO):
        assert len(held_out_images(config)) == expected
    assert ("RankMe is measured on training images" in caplog.text) == (expected == 12)


@pytest.mark.parametrize("bad_images", ["skip", "error"])
def test_a_broken_validation_image_counts_as_a_training_image_does(tmp_path, bad_images):
    """It ended pretraining at the first measure, after every resume."""
    for split in ("train", "val"):
        make_images(tmp_path / split, 4, (16, 16))
        (tmp_path / split / "0000.png").write_bytes(b"")
    statistics = dict(mean=(0.5,), std=(0.25,), allow_odd_statistics=True)
    config = data_args(tmp_path, in_chans=1, bad_images=bad_images, max_bad_images=0.5, **statistics)
    if bad_images == "error":
        with pytest.raises(BadImageError, match=r"val/0000\.png"):
            held_out_images(config)
    else:
        dataset = held_out_images(config)
        assert all(dataset[(0, index)][0].shape == (1, 32, 32) for index in range(4)) and dataset.bad_images() == [0]


def test_an_empty_val_is_no_reason_not_to_start(tmp_path, caplog):
    make_images(tmp_path / "train", 4, (16, 16))
    (tmp_path / "val").mkdir()
    config = data_args(tmp_path, in_chans=1, mean=(0.5,), std=(0.25,), val_share=0.0, allow_odd_statistics=True)
    assert len(held_out_images(config)) == 4
    assert "RankMe is measured on training images: no images found under" in caplog.text


def test_what_can_be_separated_is():
    features = torch.eye(4).repeat(5, 1) + 0.01 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4).repeat(5)
    assert probe_accuracy((features, labels), (features, labels), 4) == 100


@pytest.mark.parametrize("ranks", [2, 3])
def test_measures_do_not_depend_on_the_number_of_ranks(tmp_path, ranks):
    """Nor does a run on images without labels: RankMe needs none."""
    for split, count in (("train", 12), ("val", 5)):
        for number, name in enumerate("abc"):
            make_images(tmp_path / "data" / split / name, count, (16, 16), seed=number + 10 * (split == "val"))
    shape = ("--model", "mixmae_quickstart", "--input_size", 16, "--window_size", 4, 4, 4, 2, "--in_chans", 1)
    flags = (*shape, *QUICK, "--lr", 1e-12, "--epochs", 1, "--knn_every", 1, "--probe_every", 1, "--rank_every", 1)
    found = []
    for number in (1, ranks):
        out = tmp_path / f"{number} ranks"
        batch = ("--batch_size", 12 // number, "--data_path", tmp_path / "data", "--output_dir", out)
        Trial(tmp_path, *flags, *batch, ranks=number).finish()
        found.append(read_lines(out / "log.txt")[0])
    for name in ("knn_acc1_k10", "probe_acc1"):
        assert found[0][name] == found[1][name]
    assert found[0]["rankme"] == pytest.approx(found[1]["rankme"], rel=1e-4) and found[0]["rankme"] > 2


def test_rankme_needs_no_labels(tmp_path):
    make_images(tmp_path / "data", 12, (16, 16))
    shape = ("--model", "mixmae_quickstart", "--input_size", 16, "--window_size", 4, 4, 4, 2, "--in_chans", 1)
    flags = (*shape, *QUICK, "--epochs", 1, "--batch_size", 4, "--rank_every", 1)
    Trial(tmp_path, *flags, "--data_path", tmp_path / "data", "--output_dir", tmp_path / "out").finish()
    assert read_lines(tmp_path / "out" / "log.txt")[0]["rankme"] >= 1
