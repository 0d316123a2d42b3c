"""The nearest-neighbour classifier agrees with a plain computation, for every way to run it."""

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from running import QUICK, fails, read_lines, run
from trials import Trial

import main_pretrain
from util import knn
from util.data.transforms import Normalize
from util.run.features import own_features
from util.run.flags import given_flags
from util.run.launch import detect_launch
from util.weights.file import read_checkpoint, write_checkpoint
from util.weights.settings import ENCODERS

SMALL = {"model": "mixmae_quickstart", "input_size": (16, 16), "window_size": (4, 4, 4, 2), "in_chans": 1}
RECORDED = SMALL | {"patch_size": None, "mean": (0.4,), "std": (0.2,), "norm_pix_loss": True}
CLASSES = ("bars", "blocks", "noise")


def draw(kind: str, generator: np.random.Generator) -> np.ndarray:
    """A 16x16 grey picture of a class."""
    pixels = generator.integers(0, 256, (16, 16))
    if kind == "bars":
        pixels = np.broadcast_to(generator.integers(0, 256, (16, 1)), (16, 16))
    if kind == "blocks":
        pixels = generator.integers(0, 256, (2, 2)).repeat(8, 0).repeat(8, 1)
    return pixels.astype(np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 11), ("val", 7)):  # 33 and 21 images: no multiple of ranks or batches
        for kind in CLASSES:
            (folder / split / kind).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw(kind, generator)).save(folder / split / kind / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A pretraining checkpoint."""
    torch.manual_seed(0)
    model = timm.create_model("mixmae_quickstart", img_size=16, window_size=(4, 4, 4, 2), in_chans=1)
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pth"
    write_checkpoint(path, {"model": model.state_dict(), "epoch": 4, "args": RECORDED})
    return str(path)


SINGLE = detect_launch({})  # one process on the CPU


def command(checkpoint: str, images: Path, *flags: str) -> knn.KnnConfig:
    flags = ["--checkpoint", checkpoint, "--data_path", images, "--num_workers", "0", "--device", "cpu", *flags]
    return given_flags(knn.KnnConfig, knn.get_args_parser().parse_args([str(flag) for flag in flags]))


def measure(flags: knn.KnnConfig) -> dict:
    return knn.evaluate(flags, SINGLE)


def textbook_accuracy(checkpoint: str, images: Path, k: int, temperature: float) -> float:
    """Image by image, neighbour by neighbour."""
    model = timm.create_model("swin_quickstart", img_size=16, window_size=(4, 4, 4, 2), in_chans=1, num_classes=0)
    weights = torch.load(checkpoint)["model"]
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    features = {}
    for split in ("train", "val"):
        features[split] = []
        for path in sorted((images / split).glob("*/*.png")):
            pixels = Image.open(path).resize((18, 18), Image.Resampling.BICUBIC)
            img = (torch.tensor(np.asarray(pixels)[1:17, 1:17]) / 255 - 0.4) / 0.2
            with torch.no_grad():
                feature = model.eval().forward_features(img[None, None]).mean((1, 2))[0]
            features[split].append((feature / feature.norm(), path.parent.name))
    correct = 0
    for feature, truth in features["val"]:
        by_similarity = sorted(((float(feature @ other), name) for other, name in features["train"]), reverse=True)
        votes = dict.fromkeys(CLASSES, 0.0)
        for similarity, name in by_similarity[:k]:
            votes[name] += np.exp((similarity - 1) / temperature)  # without the -1, an overflow
        correct += max(votes, key=votes.get) == truth
    return 100 * correct / len(features["val"])


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (33, 1.0), (33, 0.001)])
def test_accuracy_equals_the_textbook(checkpoint, images, k, temperature):
    result = measure(command(checkpoint, images, "--k", k, "--temperature", temperature, "--batch_size", "5"))
    assert result["accuracy"] == {str(k): pytest.approx(textbook_accuracy(checkpoint, images, k, temperature))}


def test_batches_and_chunks_do_not_matter(checkpoint, images, monkeypatch):
    flags = ["--k", "1", "3", "10"]
    accuracy = measure(command(checkpoint, images, *flags))["accuracy"]
    assert max(accuracy.values()) > 50  # of three classes
    monkeypatch.setattr(knn, "CHUNK_ELEMENTS", 70)  # two validation images at a time
    assert measure(command(checkpoint, images, *flags, "--batch_size", "1"))["accuracy"] == accuracy


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_work_and_agree(checkpoint, images, tmp_path, ranks):
    """33 and 21 images on two and three ranks, with fewer than k images on each."""
    accuracy = measure(command(checkpoint, images, "--k", "1", "20"))["accuracy"]
    flags = ("--checkpoint", checkpoint, "--data_path", images, "--num_workers", "0", "--device", "cpu")
    flags = (*flags, "--k", "1", "20", "--out", tmp_path / "result.json")
    said = Trial(tmp_path, *flags, ranks=ranks, main=knn).finish()
    assert said.count("kNN top-1") == 1
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["accuracy"] == accuracy
    assert record["train_images"] == 33 and record["val_images"] == 21 and record["temperature"] == 0.07


def test_neighbours_beyond_this_ranks_images(monkeypatch):
    """A rank with fewer images than k offers what it has; the sum over ranks fills in the rest."""
    monkeypatch.setattr(knn.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(knn.distributed, "all_reduce_sum", lambda tensor: tensor)
    similarity, label = knn.nearest(torch.eye(3)[:1], torch.eye(3)[:2], torch.tensor([7, 8]), k=3)
    assert similarity.tolist() == [[1.0, 0.0, 0.0]] and label.tolist()[0][0] == 7


def test_result_names_everything(checkpoint, images, tmp_path, capfd):
    flags = ["--checkpoint", checkpoint, "--data_path", images, "--num_workers", "0", "--device", "cpu", "--k", "5"]
    run(knn, *flags, "--out", tmp_path / "new" / "result.json")
    line = capfd.readouterr().out.splitlines()[-1]
    record = json.loads((tmp_path / "new" / "result.json").read_text())
    assert f"kNN top-1: k=5 {record['accuracy']['5']:.3f}% of {checkpoint} after 5 epochs (swin_quickstart at" in line
    assert "16x16, mean of the last stage, 128 channels, temperature 0.07, fp32) on 21 images of" in line
    assert record["mean"] == [0.4] and record["model"] == "swin_quickstart" and not record["random_weights"]


def test_random_weights_depend_on_the_seed_alone(checkpoint, images):
    results = [
        measure(command(checkpoint, images, "--random_weights", "--seed", seed, "--k", "3")) for seed in (1, 1, 2)
    ]
    assert results[0] == results[1]
    assert "of random weights (seed 2) (swin_quickstart" in knn.describe(results[2])
    models = [
        knn.load_model(command(checkpoint, images, "--random_weights", "--seed", seed), SINGLE)[0] for seed in (1, 1, 2)
    ]
    weights = [model.patch_embed.proj.weight for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], torch.load(checkpoint)["model"]["patch_embed.proj.weight"])


def test_classifiers_bare_weights_and_the_authors_files(checkpoint, images, tmp_path):
    expected = measure(command(checkpoint, images, "--k", "3"))["accuracy"]
    weights = torch.load(checkpoint)["model"]
    head = {"head.weight": torch.zeros(3, 128), "head.bias": torch.zeros(3)}
    encoder = {name: tensor for name, tensor in weights.items() if not name.startswith(("decoder", "mask_token"))}

    write_checkpoint(
        tmp_path / "ours.pth", {"model": encoder | head, "epoch": 1, "args": RECORDED | {"model": "swin_quickstart"}}
    )
    assert measure(command(tmp_path / "ours.pth", images, "--k", "3"))["accuracy"] == expected
    # The authors' files: a Namespace under 'args' that records fewer settings.
    authors = {"model": weights, "epoch": 1, "args": argparse.Namespace(**SMALL | {"model": "mixmim_quickstart"})}
    torch.save(authors, tmp_path / "authors.pth")
    statistics = ["--mean", "0.4", "--std", "0.2"]
    assert measure(command(tmp_path / "authors.pth", images, "--k", "3", *statistics))["accuracy"] == expected

    torch.save(encoder, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"bare\.pth does not record which model it is: give --model"):
        measure(command(tmp_path / "bare.pth", images))
    # Tables and embedding are resized from the recorded 16x16 to the model's 32x32.
    flags = ["--model", "mixmae_quickstart", "--in_chans", "1", "--k", "3", *statistics]
    result = measure(command(tmp_path / "bare.pth", images, *flags))
    assert result["input_size"] == (32, 32) and result["epoch"] is None


def test_averaged_weights(checkpoint, images, tmp_path):
    plain = torch.load(checkpoint)
    both = plain | {"model_ema": plain["model"], "model": {"head.bias": torch.ones(1)}}
    write_checkpoint(tmp_path / "both.pth", both)
    result = measure(command(tmp_path / "both.pth", images, "--model_ema", "--k", "3"))
    assert result["accuracy"] == measure(command(checkpoint, images, "--k", "3"))["accuracy"]
    assert "both.pth after 5 epochs (averaged weights)" in knn.describe(result)


def test_a_result_that_cannot_be_written_is_said_before_the_work(checkpoint, images, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(knn, "evaluate", lambda args: pytest.fail("evaluated first"))
    shared = ["--checkpoint", checkpoint, "--data_path", images, "--num_workers", "0", "--device", "cpu"]
    fails(knn, capfd, r"error: .*Is a directory", *shared, "--out", tmp_path)
    fails(knn, capfd, "exists and is not replaced, since a result would be a .json file", *shared, "--out", checkpoint)


def test_a_checkpoint_that_records_nonsense_is_said_in_one_line(checkpoint, images, tmp_path, capfd):
    content = read_checkpoint(checkpoint)
    odd = tmp_path / "odd.pth"
    for name, value in (("in_chans", "x"), ("input_size", [16.5]), ("mean", ["a"])):
        write_checkpoint(odd, content | {"args": content["args"] | {name: value}})
        fails(knn, capfd, f"records {name}=", "--checkpoint", odd, "--data_path", images, "--device", "cpu")
    endless = {"model": content["model"], "args": {}}
    endless["args"]["self"] = endless
    torch.save(endless, odd)
    fails(knn, capfd, "it contains itself", "--checkpoint", odd, "--data_path", images, "--device", "cpu")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--k", "34"], r"k must lie between 1 and the 33 training images, got \[34\]"),
        (["--temperature", "0"], r"--temperature must be positive, got 0"),
        (["--model", "resnet50"], r"--model resnet50 is not known"),
        (["--in_chans", "3"], r"trained on images with 1 channels, the model takes 3"),
        (["--checkpoint", "nowhere.pth"], r"nowhere\.pth"),
        (["--data_path", "nowhere"], r"nowhere"),
        (["--mean", "0.5", "0.5"], r"--mean needs one value for each of 1 channels, got \(0.5, 0.5\)"),
    ],
)
def test_mistakes_are_explained(checkpoint, images, capfd, flags, message):
    shared = ["--checkpoint", checkpoint, "--data_path", images, "--num_workers", "0", "--device", "cpu"]
    fails(knn, capfd, message, *shared, *flags)


def test_one_class_is_refused_and_classes_without_validation_images_are_named(checkpoint, images, tmp_path, capfd):
    """One class was a kNN accuracy of 100%."""
    shutil.copytree(images, tmp_path / "data")
    shared = ["--checkpoint", checkpoint, "--num_workers", "0", "--device", "cpu", "--k", "3", "--data_path"]
    shutil.rmtree(tmp_path / "data" / "val" / "bars")
    run(knn, *shared, tmp_path / "data")
    assert "1 of 3 classes have no validation image: ['bars']" in capfd.readouterr().out
    for split in ("train", "val"):
        lines = [f"{path} 1" for path in sorted((images / split).glob("*/*.png"))]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    fails(knn, capfd, "classification needs at least 2 classes, found 1 in", *shared, tmp_path / "train.txt")


# --- During pretraining ---------------------------------------------------------------------------------------------

PRETRAINING = [
    *QUICK, "--model", "mixmae_quickstart", "--input_size", "16", "--window_size", "4", "4", "4", "2",
    "--in_chans", "1", "--mean", "0.4", "--std", "0.2", "--batch_size", "16",
]  # fmt: skip


def test_pretraining_measures_itself(images, tmp_path):
    flags = [*PRETRAINING, "--data_path", images, "--epochs", "5"]
    also = ["--probe_every", "3", "--rank_every", "1"]
    run(main_pretrain, *flags, "--output_dir", tmp_path / "measured", "--knn_every", "2", *also)
    records = read_lines(tmp_path / "measured" / "log.txt")
    assert [record["epoch"] for record in records if "knn_acc1_k20" in record] == [1, 3, 4]  # and at the end
    assert [record["epoch"] for record in records if "probe_acc1" in record] == [2, 4]
    assert all(1 <= record["rankme"] <= 33 for record in records)
    result = measure(command(tmp_path / "measured" / "checkpoint.pth", images))
    assert records[-1]["knn_acc1_k10"] == result["accuracy"]["10"]
    assert records[-1]["knn_acc1_k20"] == result["accuracy"]["20"]
    assert records[-1]["rankme"] == pytest.approx(result["rankme"], rel=1e-4)  # of the same validation images
    run(main_pretrain, *flags, "--output_dir", tmp_path / "plain")
    steps = [[line["loss"] for line in read_lines(tmp_path / name / "steps.jsonl")] for name in ("measured", "plain")]
    assert steps[0] == steps[1]  # measuring leaves training as it is


def test_pretraining_without_labels_cannot_be_measured(images, tmp_path, capfd):
    flags = [*PRETRAINING, "--output_dir", tmp_path / "out", "--epochs", "1", "--knn_every", "1", "--data_path"]
    fails(main_pretrain, capfd, r"train does not exist; it must hold the train images", *flags, images / "train")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(images / "train")
    fails(main_pretrain, capfd, r"val does not exist; it must hold the val images", *flags, tmp_path / "data")
    assert not (tmp_path / "out" / "steps.jsonl").exists()


def test_model_is_left_in_its_mode(checkpoint, images):
    args = command(checkpoint, images, "--precision", "fp32")
    model, config, _ = knn.load_model(args, SINGLE)
    datasets = knn.labelled_datasets(config, [1])
    for mode in (True, False):
        model.train(mode)
        own_features(model, datasets[0], Normalize(config.mean, config.std), config)
        assert model.training is mode


def test_every_pretraining_model_has_its_encoder():
    assert re.fullmatch(r"swin_base_w14", ENCODERS["mixmae_base"]) and len(set(ENCODERS.values())) == 5
