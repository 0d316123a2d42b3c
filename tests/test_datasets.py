"""Where images come from, and what is refused before training."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import PHOTOS, data_args
from PIL import Image, ImageOps
from torch.utils.data import IterableDataset
from torchvision.datasets import ImageFolder

from util.data import timm_source
from util.data.datasets import BadImageError, build_dataset, build_loader
from util.data.transforms import eval_transform, finetune_transform, pretrain_transform
from util.errors import UserError
from util.run.checks import check_data

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXMAE_CACHE", str(tmp_path / "cache"))


def picture(path: Path, colour=(10, 200, 30), size=(40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def labelled(tmp_path) -> Path:
    """Three classes; in `train` 2 + 1 + 3 images, in `val` one each."""
    root = tmp_path / "data"
    for name, number in (("ant", 2), ("bee", 1), ("cat", 3)):
        for i in range(number):
            picture(root / "train" / name / f"{i}.png", colour=(len(name) * 20 + i, i * 50, 7))
        picture(root / "val" / name / "v.png")
    return root


def plain(args, split="train", **kwargs):
    """A data set without augmentation."""
    return build_dataset(args, split, eval_transform(args), **kwargs)


# --- where images come from


def test_class_folders_are_read_as_torchvision_reads_them(labelled):
    theirs = ImageFolder(labelled / "train")
    ours = build_dataset(data_args(labelled), "train", lambda image: image, require_labels=True)
    assert ours.classes == theirs.classes and len(ours) == len(theirs)
    for i in range(len(ours)):
        image, target = ours[(0, i)]
        assert np.array_equal(image.permute(1, 2, 0), np.array(theirs[i][0])) and target == theirs[i][1]
        assert ours.path_of(i) == theirs.samples[i][0]
    assert len(plain(data_args(labelled), "val")) == 3


@pytest.mark.parametrize("folder", ["", "train"])
def test_images_without_class_folders(tmp_path, folder):
    root = tmp_path / "data" / folder
    for name in ("1.jpg", "deep/2.png", "deep/er/3.webp"):
        picture(root / name)
    dataset = plain(data_args(tmp_path / "data"))
    assert len(dataset) == 3 and dataset.classes is None
    assert [dataset[(0, i)][1] for i in range(3)] == [-1, -1, -1]
    message = "labels need one folder per class" if folder else "train does not exist"
    with pytest.raises(UserError, match=message):
        plain(data_args(tmp_path / "data"), require_labels=True)


def test_a_list_of_images(tmp_path):
    picture(tmp_path / "pics" / "a b 7.png")
    picture(tmp_path / "pics" / "c.jpeg")
    absolute = picture(tmp_path / "elsewhere" / "d.jpg")
    images = tmp_path / "list.txt"
    images.write_text(f"pics/a b 7.png\n\npics/c.jpeg\r\n{absolute}\n")
    dataset = plain(data_args(images))
    assert len(dataset) == 3 and dataset.classes is None
    assert dataset.path_of(0) == str(tmp_path / "pics" / "a b 7.png") and dataset.path_of(2) == str(absolute)
    assert [dataset[(0, i)][1] for i in range(3)] == [-1] * 3
    images.write_text(f"pics/a b 7.png 4\npics/c.jpeg\t0\n{absolute} 2\n")
    dataset = plain(data_args(images), require_labels=True)
    assert dataset.classes == ["0", "1", "2", "3", "4"]
    assert [dataset[(0, i)][1] for i in range(3)] == [4, 0, 2]


@pytest.mark.parametrize(
    "content, message",
    [
        ("\n\n", "image list .* is empty"),
        ("a.png 1\nb.png\n", "line 2 has no label"),
        ("a.png\nnotes.txt\n", "line 2: expected an image file"),
        ("a.png -1\n", "line 1: expected an image file"),
        ("a.png one\n", "line 1: expected an image file"),
        ("$(touch hacked).sh\n", "line 1: expected an image file"),
        ("gone.png\n", "gone.png.*No such file"),
        ("a.png 1\nb.png 0\na.png 0\n", "line 3: a.png has another label, 1, in an earlier line"),
    ],
)
def test_bad_lists(tmp_path, content, message):
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        plain(data_args(tmp_path / "list.txt"))
    with pytest.raises(UserError, match="list of training images"):
        plain(data_args(tmp_path / "list.txt"), "val")


def make_tar(path: Path, prefix: str, names) -> None:
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(names):
            stream = io.BytesIO()
            Image.new("RGB", (30, 20), (i * 40, 100, 0)).save(stream, "PNG")
            info = tarfile.TarInfo(f"{prefix}{name}")
            info.size = stream.tell()
            stream.seek(0)
            tar.addfile(info, stream)


def test_tars_and_folders_number_their_classes_alike(tmp_path):
    """timm sorts class2 before class10."""
    for name, red in (("class10", 10), ("class2", 20)):
        picture(tmp_path / "train" / name / "0.png", colour=(red, 0, 0))
    make_tar(tmp_path / "val.tar", "", ["class10/0.png", "class2/0.png"])
    train, val = (plain(data_args(tmp_path), split) for split in ("train", "val"))
    assert train.classes == val.classes == ["class10", "class2"]
    for dataset in (train, val):
        labels = [dataset[(0, i)][1] for i in range(2)]
        names = [Path(dataset.path_of(i)).parent.name for i in range(2)]
        assert [dataset.classes[label] for label in labels] == names
    make_tar(tmp_path / "val.tar", "", ["class10/0.png", "class3/0.png"])
    with pytest.raises(UserError, match=r"differ in their classes: \['class2', 'class3'\]"):
        plain(data_args(tmp_path), "val")
    make_tar(tmp_path / "train.tar", "", ["class2/0.png"])
    with pytest.raises(UserError, match=r"both .*train\.tar and .*train exist"):
        plain(data_args(tmp_path))


def test_damaged_tars(tmp_path):
    make_tar(tmp_path / "train.tar", "", [f"ant/{i}.png" for i in range(8)])
    whole = (tmp_path / "train.tar").read_bytes()
    for content in (b"<html>not found</html>" * 100, whole[:700]):
        (tmp_path / "train.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"train\.tar is damaged or not a tar"):
            plain(data_args(tmp_path))
    (tmp_path / "train.tar").write_bytes(whole)
    dataset = plain(data_args(tmp_path))
    os.truncate(tmp_path / "train.tar", 700)
    with pytest.raises(BadImageError, match="cannot use image"):
        dataset[(0, 7)]


def test_tars_that_are_compressed_or_named_otherwise(tmp_path):
    make_tar(tmp_path / "images.TAR", "", ["ant/0.png", "bee/0.png"])
    assert plain(data_args(tmp_path / "images.TAR")).classes == ["ant", "bee"]
    with pytest.raises(UserError, match=r"no images found under .*; \.tar in it are not opened: unpack them, or give"):
        plain(data_args(tmp_path))
    for open_compressed in (gzip.open, bz2.open, lzma.open):
        with open_compressed(tmp_path / "train.tar", "wb") as file:
            file.write((tmp_path / "images.TAR").read_bytes())
        with pytest.raises(UserError, match=r"train\.tar is compressed: decompress it"):
            plain(data_args(tmp_path))
    (tmp_path / "train.tar").rename(tmp_path / "train.tar.gz")
    with pytest.raises(UserError, match=r"no images found under .*; \.gz, \.tar in it are not opened"):
        plain(data_args(tmp_path))


def test_a_large_number_in_a_list_is_no_label(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png 1\na.png 1700000000\n")
    with pytest.raises(UserError, match="line 2: a label is a class from 0 to 99999, got 1700000000"):
        plain(data_args(tmp_path / "list.txt"))


def test_tars(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    names = [f"{c}/{i}.png" for c in ("ant", "bee") for i in range(3)]
    make_tar(root / "train.tar", "", names)
    make_tar(root / "val.tar", "", names[1:5])
    for path in (root, root / "train.tar"):
        args = data_args(path, num_workers=2)
        dataset = plain(args, require_labels=True)
        assert dataset.classes == ["ant", "bee"] and dataset.path_of(3).endswith("bee/0.png")
        loader = build_loader(dataset, [[(0, 0), (0, 1), (0, 2)], [(0, 3), (0, 4), (0, 5)]] * 4, args, CPU)
        seen = [(images[:, 0, 0, 0].tolist(), targets.tolist()) for images, targets in loader]
        assert seen == [([0, 40, 80], [0, 0, 0]), ([120, 160, 200], [1, 1, 1])] * 4
    assert len(plain(data_args(root), "val")) == 4
    make_tar(root / "val.tar", "", ["bee/0.png"])
    with pytest.raises(UserError, match=r"differ in their classes: \['ant'\]"):
        plain(data_args(root), "val")
    with pytest.raises(UserError, match="tar of training images"):
        plain(data_args(root / "train.tar"), "val")
    assert len(pickle.loads(pickle.dumps(dataset.source))) == 6


def test_what_a_tar_holds_besides_its_images(tmp_path, caplog):
    """timm took PNG and JPEG only, without a word, and hidden files for images; and '.thumbs' was a class."""
    make_tar(tmp_path / "train.tar", "./", ["ant/1.png", "ant/._1.png", ".thumbs/1.png", "bee/1.webp", "bee/3.jxl"])
    source = plain(data_args(tmp_path)).source
    assert [source.path(i) for i in range(len(source))] == ["./ant/1.png", "./bee/1.webp"]
    assert source.classes == ["ant", "bee"] and source.targets.tolist() == [0, 1]
    assert [source.read(i)[1] for i in range(2)] == [0, 1]
    assert "left out 1 .jxl" in caplog.text
    before = plain(data_args(tmp_path)).fingerprint()
    older = before | {"names": f"{(tmp_path / 'train.tar').stat().st_size} bytes", "labels": "", "sizes": ""}
    check_data({"data": {"train": older}}, {"train": before})
    assert "images are not those" not in caplog.text
    check_data({"data": {"train": older | {"names": "7 bytes"}}}, {"train": before})
    assert "images are not those" in caplog.text
    make_tar(tmp_path / "train.tar", "./", ["ant/2.png", "ant/._1.png", ".thumbs/1.png", "bee/1.webp", "bee/3.jxl"])
    assert plain(data_args(tmp_path)).fingerprint()["names"] != before["names"]  # though the tar is as large
    make_tar(tmp_path / "train.tar", "", ["ant/1.png", "0.png"])
    assert plain(data_args(tmp_path)).classes is None
    for names in ([], ["ant/1.jxl"], [".x/1.png"]):
        make_tar(tmp_path / "train.tar", "", names)
        with pytest.raises(UserError, match=r"^no images found in .*train\.tar \(looked for \.jpg"):
            plain(data_args(tmp_path))


@pytest.mark.parametrize("above", ["", "train"])
def test_a_tar_is_read_as_the_folder_that_it_was_made_of(tmp_path, caplog, above):
    """Links vanished, and with them whole classes; of nested folders the innermost became classes."""
    root = tmp_path / "data" / "train"
    for number, name in enumerate(("cat/left", "cat/right", "dog/left", "dog/right/far")):
        picture(root / name / "0.png", colour=(number, 0, 0))
    for name in ("eel/hard.png", "eel/soft.png", "eel/soft of soft.png"):
        (root / name).parent.mkdir(exist_ok=True)
    (root / "eel" / "hard.png").hardlink_to(root / "cat" / "left" / "0.png")
    (root / "eel" / "soft.png").symlink_to("../dog/left/0.png")
    (root / "eel" / "soft of soft.png").symlink_to("soft.png")
    (root / "eel" / "loop.png").symlink_to("loop.png")
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(root, above)
    (root / "eel" / "loop.png").unlink()
    sources = [plain(data_args(path)).source for path in (tmp_path / "data", tmp_path / "data.tar")]
    assert sources[0].classes == sources[1].classes == ["cat", "dog", "eel"]
    of_folder, of_tar = (
        {os.path.relpath(source.path(i), place): (int(source.read(i)[0][0, 0, 0]), source.read(i)[1]) for i in range(7)}
        for source, place in zip(sources, (root, above))
    )
    assert of_folder == of_tar
    assert len(sources[0]) == len(sources[1]) == 7 and "left out 1 links that lead to no image" in caplog.text


def test_of_files_of_one_name_in_a_tar_the_last_one_counts(tmp_path):
    make_tar(tmp_path / "train.tar", "", ["ant/0.png", "bee/0.png", "./ant/0.png"])
    source = plain(data_args(tmp_path)).source
    assert [int(source.read(i)[0][0, 0, 0]) for i in range(len(source))] == [80, 40]


def test_a_tar_of_tars_has_a_class_for_each(tmp_path):
    """As ImageNet's training images are published."""
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in ("n02", "n01"):
            make_tar(tmp_path / f"{name}.tar", "", [f"{name}_{i}.png" for i in range(2)])
            tar.add(tmp_path / f"{name}.tar", f"{name}.tar")
    dataset = plain(data_args(tmp_path / "train.tar"))
    assert dataset.classes == ["n01", "n02"] and [dataset.path_of(i) for i in (0, 3)] == ["n01_0.png", "n02_1.png"]
    read = [dataset[(0, i)] for i in range(4)]
    assert [(int(image[0, 0, 0]), target) for image, target in read] == [(0, 0), (40, 0), (0, 1), (40, 1)]


def test_a_tar_of_arrays(tmp_path):
    np.save(tmp_path / "0.npy", np.ones((9, 8, 2), np.float32))
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(tmp_path / "0.npy", "a/0.npy")
    assert plain(data_args(tmp_path, in_chans=2))[(0, 0)][0].shape[0] == 2


def test_torchvision_sets_by_timms_name(tmp_path):
    root = tmp_path / "FashionMNIST" / "raw"
    root.mkdir(parents=True)
    for part, number in (("train", 5), ("t10k", 3)):
        header = np.array([0x803, number, 28, 28], ">i4").tobytes()
        (root / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(range(number)) * 784)
        labels = np.array([0x801, number], ">i4").tobytes()
        (root / f"{part}-labels-idx1-ubyte").write_bytes(labels + bytes(range(number)))
    for in_chans in (1, 3):
        args = data_args(tmp_path, dataset="torch/fashion_mnist", in_chans=in_chans, input_size=(28, 28))
        train, val = plain(args), plain(args, "val")
        assert (len(train), len(val)) == (5, 3) and len(train.classes) == 10
        image, target = train[(0, 4)]
        assert image.shape == (in_chans, 28, 28) and target == 4
    with pytest.raises(UserError, match=r"timm cannot open --dataset torch/cifar10 \(train\)"):
        plain(data_args(tmp_path, dataset="torch/cifar10"))


@pytest.mark.parametrize("name, package", [("hfds/user/set", "datasets"), ("wds/set", "webdataset")])
def test_missing_packages_are_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setattr(timm_source.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"needs the package {package}.*pip install {package}"):
        plain(data_args(tmp_path, dataset=name))


class Stream(IterableDataset):
    """As timm's streamed sets: shared out among workers, reshuffled by `set_epoch`."""

    reader = object()

    def __init__(self, length=6):
        self.length, self.epoch = length, 0

    def __len__(self):
        return self.length

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        start, step = (info.id, info.num_workers) if info else (0, 1)
        for i in range(start, self.length, step):
            yield Image.new("RGB", (40, 40), (i, self.epoch, 0)), i


def test_streamed_sets_train_without_an_order_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(timm_source.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(timm_source, "create_dataset", lambda *args, **kwargs: Stream())
    args = data_args(tmp_path, dataset="wds/set", num_workers=2)
    dataset = plain(args)
    batches = [[(0, 0), (0, 1), (0, 2)], [(0, 3), (0, 4), (0, 5)]] * 2
    seen = [set(map(tuple, images[:, :2, 0, 0].tolist())) for images, _ in build_loader(dataset, batches, args, CPU)]
    assert seen[0] | seen[1] == {(i, 0) for i in range(6)}
    assert seen[2] | seen[3] == {(i, 1) for i in range(6)}  # the next epoch of the stream
    assert {int(image[0, 0, 0]) for image in dataset.sample()} == set(range(6))
    first = [dataset.source.read(99)[0][:2, 0, 0].tolist() for _ in range(2)]
    assert first == [[0, 0], [1, 0]]  # as if nobody had looked
    with pytest.raises(UserError, match="can only be streamed"):
        plain(args, "val")
    monkeypatch.setattr(timm_source, "create_dataset", lambda *args, **kwargs: Stream(0))
    with pytest.raises(UserError, match="does not say how many images"):
        plain(args)


def sideways(path: Path) -> Path:
    """An image with the EXIF orientation of a camera that was held upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(PHOTOS[0]).convert("RGB").resize((48, 32)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_without_exif_images_are_what_torchvisions_folder_reads(tmp_path, name):
    sideways(tmp_path / "train" / "ant" / name)
    (theirs, _), *_ = ImageFolder(tmp_path / "train")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "train" / "ant", "ant")
    for path in (tmp_path, tmp_path / "images.tar"):
        stored, upright = (
            build_dataset(data_args(path, ignore_exif=ignore_exif), "train", lambda image: image)[(0, 0)][0]
            for ignore_exif in (True, False)
        )
        assert np.array_equal(stored.permute(1, 2, 0), np.array(theirs))
        assert upright.shape == (3, 48, 32) and stored.shape == (3, 32, 48)


class Pictures(torch.utils.data.Dataset):
    """As torchvision's sets: Pillow images, opened from files."""

    def __init__(self, path: Path):
        self.path = path

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return Image.open(self.path), i


class PictureStream(Pictures, IterableDataset):
    reader = object()

    def __iter__(self):
        return (self[i] for i in range(3))


@pytest.mark.parametrize("kind", [Pictures, PictureStream])
def test_exif_of_sets_that_hand_out_pillow_images(tmp_path, monkeypatch, kind):
    path = sideways(tmp_path / "a.jpg")
    monkeypatch.setattr(timm_source, "create_dataset", lambda *args, **kwargs: kind(path))
    stored = Image.open(path)
    for ignore_exif, expected in ((True, stored), (False, ImageOps.exif_transpose(stored))):
        args = data_args(tmp_path, dataset="torch/pictures", ignore_exif=ignore_exif)
        image, _ = build_dataset(args, "train", lambda image: image)[(0, 0)]
        assert np.array_equal(image.permute(1, 2, 0), np.array(expected))


# --- what is refused before training


def test_missing_and_empty_paths(tmp_path):
    with pytest.raises(UserError, match=r"--data_path .*nowhere does not exist"):
        plain(data_args(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere\.tar does not exist: give a tar of images"):
        plain(data_args(tmp_path / "nowhere.tar"))
    with pytest.raises(UserError, match="nowhere does not exist: give the folder that --dataset torch/cifar10 is in"):
        plain(data_args(tmp_path / "nowhere", dataset="torch/cifar10"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images found under"):
        plain(data_args(tmp_path / "empty"))


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot read --data_path xxx.*: File name too long"):
        plain(data_args("x" * 5000))
    picture(tmp_path / "data" / "train" / "ant" / "0.png")
    (tmp_path / "data" / "train" / "ant" / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"cannot list the folder .*data/train/ant: Too many levels of symbolic links"):
        plain(data_args(tmp_path / "data"))
    images = tmp_path / "list.txt"
    images.write_text("data/train/ant/0.png\n")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(UserError, match=r"cannot read the image list .*list.txt: Permission denied"):
        plain(data_args(images))
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"cannot list the folder .*data/train: Permission denied"):
        plain(data_args(tmp_path / "data"))


def test_validation_needs_labels_of_the_training_set(labelled):
    picture(labelled / "val" / "dog" / "v.png")
    with pytest.raises(UserError, match=r"classes that the training set lacks: \['dog'\]"):
        plain(data_args(labelled), "val")
    shutil.rmtree(labelled / "val" / "dog")
    shutil.rmtree(labelled / "val" / "ant")  # a class without validation images keeps its number
    dataset = plain(data_args(labelled), "val")
    assert dataset.classes == ["ant", "bee", "cat"] and [dataset[(0, i)][1] for i in range(2)] == [1, 2]
    (labelled / "val" / "ant").mkdir()
    with pytest.raises(UserError, match=r"class folders without any image in .*val: \['ant'\]"):
        plain(data_args(labelled), "val")
    shutil.rmtree(labelled / "val")
    with pytest.raises(UserError, match="val does not exist; it must hold the val images"):
        plain(data_args(labelled), "val")


@pytest.mark.parametrize("names", [("Train", "Val"), ("training", "validation"), ("set/train", "set/val"), ("test",)])
def test_parts_of_a_data_set_are_no_classes(tmp_path, caplog, names):
    """They were: a classifier told training from validation images. Pretraining may use both, and says so."""
    for name in names:
        for i in range(4):
            picture(tmp_path / "data" / name / "ant" / f"{i}.png")
    args = data_args(tmp_path / "data", val_share=0.5)
    place = (tmp_path / "data" / names[0]).parent
    found = [Path(name).name for name in names]
    refused = re.escape(f"{place} holds {found}, named like ") + "(parts|a part) of a data set"
    with pytest.raises(UserError, match=refused):
        plain(args, require_labels=True)
    plain(args)
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(tmp_path / "data", "data")
    plain(data_args(tmp_path / "data.tar"))
    several = len(names) > 1
    assert caplog.text.count("in folders named like parts of a data set") == 2 * several
    if several:
        with pytest.raises(UserError, match=r"data\.tar holds .*, named like parts of a data set"):
            plain(data_args(tmp_path / "data.tar"), require_labels=True)
    if names[0] == "Train":
        with pytest.raises(UserError, match=refused):
            plain(data_args(tmp_path / "data"), require_labels=True)


def test_the_classes_of_a_part_that_was_named_are_what_they_are(tmp_path):
    for name in ("train/test", "train/train", "train/car", "val/train"):
        for i in range(2):
            picture(tmp_path / name / f"{i}.png")
    assert plain(data_args(tmp_path), require_labels=True).classes == ["car", "test", "train"]
    assert [plain(data_args(tmp_path), "val", require_labels=True)[(0, i)][1] for i in range(2)] == [2, 2]


def test_output_among_images_is_a_class_of_neither_part(tmp_path):
    """Validation images had other numbers than training images: accuracy was that of other classes."""
    for name in ("train/cat", "train/zebra", "val/cat", "val/zebra"):
        picture(tmp_path / name / "0.png")
    for name in ("config.json", "times.jsonl", "0.png"):
        (tmp_path / "train" / "output_dir").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "val" / "cat" / "0.png", tmp_path / "train" / "output_dir" / name)
    train, val = (plain(data_args(tmp_path), split, require_labels=True) for split in ("train", "val"))
    assert train.classes == val.classes == ["cat", "zebra"]
    assert [[dataset[(0, i)][1] for i in range(len(dataset))] for dataset in (train, val)] == [[0, 1]] * 2


def test_names_of_parts_that_are_legal(tmp_path, caplog):
    for name in ("bus", "car", "train"):
        picture(tmp_path / "vehicles" / "train" / name / "0.png")
    assert plain(data_args(tmp_path / "vehicles")).classes == ["bus", "car", "train"]
    assert "named like" not in caplog.text
    picture(tmp_path / "vehicles" / "val2017" / "0.png")
    picture(tmp_path / "others" / "0.png")
    assert len(plain(data_args(tmp_path))) == 5
    assert "in folders named like parts of a data set, ['train', 'val2017'], all images are used" in caplog.text


def test_fine_tuning_refuses_an_empty_class_and_pretraining_does_not(labelled):
    (labelled / "train" / "dog").mkdir()
    with pytest.raises(UserError, match=r"class folders without any image in .*train: \['dog'\]"):
        plain(data_args(labelled), require_labels=True)
    assert len(plain(data_args(labelled))) == 6


def test_evaluation_alone_needs_no_training_folder(labelled):
    shutil.rmtree(labelled / "train")
    assert plain(data_args(labelled), "val").classes == ["ant", "bee", "cat"]
    with pytest.raises(UserError, match="train does not exist"):
        plain(data_args(labelled), require_labels=True)


def test_the_first_image_must_have_the_channels_asked_for(tmp_path, labelled):
    with pytest.raises(UserError, match=r"ant/0.png.*4 channels are read from TIFF and .npy files, \(H, W, 4\)"):
        plain(data_args(labelled, in_chans=4))
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "a.npy", np.zeros((20, 30, 5), np.uint8))
    with pytest.raises(UserError, match=r"shape \(20, 30, 5\), \(H, W, 4\) is needed \(--in_chans 4\)"):
        plain(data_args(tmp_path / "arrays", in_chans=4))
    with pytest.raises(UserError, match="--in_chans must be 1 or 3, got 4"):
        plain(data_args(tmp_path, dataset="torch/cifar10", in_chans=4))


# --- arrays


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, np.float64, ">u2"])
def test_arrays_of_many_channels(tmp_path, dtype):
    values = np.arange(32 * 32 * 16).reshape(32, 32, 16) % 200
    np.save(tmp_path / "a.npy", values.astype(dtype))
    args = data_args(tmp_path, in_chans=16)
    image, target = build_dataset(args, "train", lambda image: image)[(0, 0)]
    assert target == -1 and image.shape == (16, 32, 32)
    assert image.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), values)
    for transform in (pretrain_transform(args), finetune_transform(args), eval_transform(args)):
        out = build_dataset(args, "train", transform)[(0, 0)][0]
        assert out.shape == (16, 32, 32) and out.dtype == image.dtype


def test_arrays_of_one_channel_may_leave_it_out(tmp_path):
    np.save(tmp_path / "a.npy", np.full((9, 8), 7, np.uint8))
    image, _ = build_dataset(data_args(tmp_path, in_chans=1), "train", lambda image: image)[(0, 0)]
    assert image.shape == (1, 9, 8) and int(image.min()) == int(image.max()) == 7
