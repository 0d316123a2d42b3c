"""`python -m util.check_data` finds what is wrong with images before training does."""

import json
import re
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import make_images, run

import util.check_data
from util.check_data import CheckDataConfig, check_data, get_args_parser
from util.run.flags import given_flags

COUNT = 2_000


def check(*flags: object) -> dict:
    return check_data(
        given_flags(CheckDataConfig, get_args_parser().parse_args([*map(str, flags), "--num_workers", "2"]))
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """2,000 colour pictures, and ten faults among them."""
    root = tmp_path_factory.mktemp("planted")
    generator = np.random.default_rng(0)
    for split, count in (("train", COUNT - 200), ("val", 200)):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / "ab"[i % 2] / f"{i:04d}.png")
    train, photo = root / "train" / "a", Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    (train / "0000.png").write_bytes((train / "0002.png").read_bytes()[:200])  # truncated
    (train / "0004.png").write_bytes(b"")
    np.save(train / "five.npy", np.zeros((9, 9, 5), np.uint8))  # wrong channels
    np.save(train / "nan.npy", np.full((9, 9, 3), np.nan, np.float32))
    (train / "copy.png").write_bytes((train / "0006.png").read_bytes())
    (root / "val" / "c").mkdir()
    photo.save(root / "val" / "c" / "only.png")  # a class of val alone
    Image.new("RGB", (3000, 2), (9, 9, 9)).save(train / "long.png")
    photo.convert("CMYK").save(train / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(train / "turned.jpg", exif=exif)
    photo.convert("P").save(train / "palette.png")
    return root


@pytest.mark.slow
def test_ten_planted_faults_are_found(planted, tmp_path, capfd):
    started = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        run(util.check_data, planted, "--in_chans", "3", "--num_workers", "2", "--out", tmp_path)
    assert time.monotonic() - started < 60
    said = capfd.readouterr().out
    assert stopped.value.code == 1
    faults = "\n".join(re.findall("FAULT: (.*)", said))
    notes = "\n".join(re.findall("note: (.*)", said))
    for expected in (
        r"unreadable \(.*[Tt]runcated.*\): \['.*0000.png",
        r"unreadable \(the file is empty\): \['.*0004.png",
    ):
        assert re.search(expected, faults)
    assert re.search(r"unreadable \(the array has shape \(9, 9, 5\).*five.npy", faults)
    assert re.search(r"unreadable \(.*not finite.*nan.npy", faults)
    assert re.search(r"1 classes have validation images but no training images: \['c'\]", faults)
    assert re.search(r"1 are copies of another image, byte for byte: .*(copy|0006).png", notes)
    assert re.search(r"1 are more than 10 times longer in one direction: .*long.png", notes)
    assert re.search("1 are CMYK.*cmyk.jpg", notes) and re.search("1 have a palette: .*palette.png", notes)
    assert re.search("1 have an EXIF orientation, and are turned accordingly: .*turned.jpg", notes)
    report = json.loads((tmp_path / "check_data.json").read_text())
    assert (
        len(report["faults"]) == 5
        and report["train"]["images"] == COUNT - 200 + 7
        and report["train"]["unreadable"] == 4
    )
    assert report["train"]["classes"]["a"] == 907 and report["train"]["height"]["largest"] == 60
    assert Image.open(tmp_path / "check_data.png").size == (8 * 228 + 4, 5 * 228 + 4)


@pytest.mark.parametrize("kind", ["grey", "colour", "uint16", "float32"])
def test_mean_and_std_are_numpys(tmp_path, kind):
    generator, arrays = np.random.default_rng(1), []
    for i in range(20):
        shape = (*generator.integers(8, 30, 2), 1 if kind == "grey" else 3 if kind == "colour" else 7)
        values = generator.integers(0, 256 if kind in ("grey", "colour") else 9000, shape)
        if kind in ("grey", "colour"):
            arrays.append(values / 255)
            Image.fromarray(values.astype(np.uint8).squeeze()).save(tmp_path / f"{i}.png")
        else:
            arrays.append(values.astype(kind))
            np.save(tmp_path / f"{i}.npy", arrays[-1])
    report = check(tmp_path)
    pixels = np.concatenate([array.reshape(-1, array.shape[2]).astype(np.float64) for array in arrays])
    np.testing.assert_allclose(report["mean"], pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(report["std"], pixels.std(0), rtol=1e-6)
    assert report["in_chans"] == pixels.shape[1] and not report["faults"]


def test_statistics_of_values_far_from_zero(tmp_path):
    arrays = [np.random.default_rng(i).normal(1e6, 1, (9, 11, 1)).astype(np.float64) for i in range(5)]
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", array)
    pixels = np.concatenate([array.astype(np.float32).ravel() for array in arrays]).astype(np.float64)
    np.testing.assert_allclose(check(tmp_path)["std"], [pixels.std()], rtol=1e-9)


@pytest.mark.parametrize("bits", [8, 16])
def test_the_sheet_shows_what_the_model_sees(tmp_path, bits):
    """After the crop of evaluation, in the images' own brightness: of a long picture the middle."""
    (tmp_path / "data").mkdir()
    values = [10, 120, 240]
    for i, value in enumerate(values):
        pixels = np.full((40, 100), value, np.uint8)
        pixels[:, :25] = pixels[:, 75:] = 77
        Image.fromarray(pixels if bits == 8 else pixels.astype(np.uint16) * 257).save(tmp_path / "data" / f"{i}.png")
    check(tmp_path / "data", "--input_size", "32", "--out", tmp_path / "out")
    sheet = np.asarray(Image.open(tmp_path / "out" / "check_data.png"))
    assert sheet.shape[:2] == (32 + 8, 3 * (32 + 4) + 4)
    tiles = [sheet[4:-4, 4 + 36 * i : 36 + 36 * i] for i in range(3)]
    assert all(np.ptp(tile) == 0 for tile in tiles)  # nothing of the sides
    brightness = [int(tile.max()) for tile in tiles]
    assert brightness == sorted(brightness) and (bits == 16 or np.allclose(brightness, values, atol=1))


def test_flags_that_would_stop_training_are_a_fault(tmp_path):
    make_images(tmp_path, 6)
    assert not check(tmp_path, "--mean", "0.5", "--std", "0.25")["faults"]
    [fault] = check(tmp_path, "--mean", "123", "--std", "58")["faults"]
    assert "far from 0 and 1" in fault


def test_pictures_among_arrays_are_a_fault_and_no_failure(tmp_path):
    make_images(tmp_path / "data", 4)
    np.save(tmp_path / "data" / "0003.npy", np.ones((32, 32), np.float32))
    report = check(tmp_path / "data", "--out", tmp_path / "out")
    assert any("arrays in their own units among pictures" in fault for fault in report["faults"])
    assert (tmp_path / "out" / "check_data.png").exists()


def test_a_list_has_its_own_validation_list(tmp_path):
    make_images(tmp_path / "val" / "a", 3, seed=1)
    make_images(tmp_path / "more", 5, seed=2)
    for name, count in (("train.txt", 3), ("val.txt", 2)):
        (tmp_path / name).write_text("\n".join(f"more/{i:04d}.png" for i in range(count)))
    assert check(tmp_path / "train.txt")["val"]["images"] == 2


def test_validation_images_that_were_trained_on(tmp_path):
    make_images(tmp_path / "train" / "a", 4, seed=0)
    make_images(tmp_path / "val" / "a", 3, seed=0)
    assert re.search(
        "3 validation images are training images too: .*val/a/0000.png", "\n".join(check(tmp_path)["faults"])
    )


def test_images_set_aside_and_in_tars_are_looked_at_too(tmp_path):
    """A broken validation image ended a run after its training."""
    root = tmp_path / "data"
    for seed, name in enumerate("ab"):
        make_images(root / "train" / name, 5, seed=seed)
    for path in (root / "train").glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:60])
    report = check(root, "--val_share", "0.2")
    assert [report[split]["unreadable"] for split in ("train", "val")] == [8, 2]
    with tarfile.open(root / "val.tar", "w") as tar:
        tar.add(root / "train", "val")
    report = check(root)
    assert report["val"]["unreadable"] == 10 and report["val"]["classes"] == {"a": 5, "b": 5}
    assert any("10 validation images are training images too: ['val/a/0000.png'" in fault for fault in report["faults"])


def test_what_fine_tuning_would_refuse_is_a_note(tmp_path):
    for split, seed in (("train", 0), ("val", 10)):
        for number, name in enumerate("ab"):
            make_images(tmp_path / split / name, 3, seed=seed + number)
    assert not check(tmp_path)["remarks"]
    (tmp_path / "train" / "c").mkdir()
    make_images(tmp_path / "val", 1, seed=20)
    report = check(tmp_path)
    assert not report["faults"] and report["remarks"] == [
        f"fine-tuning and kNN would stop: class folders without any image in {tmp_path}/train: ['c']",
        f"fine-tuning and kNN would stop: '{tmp_path}/val/0000.png' lies outside any class folder; labels need one "
        f"folder per class in {tmp_path}/val",
    ]


def test_one_image_in_two_classes_and_missing_files_are_one_fault_each(tmp_path):
    make_images(tmp_path / "a", 3)
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "train.txt").write_text(
        "".join(f"{name}/000{i}.png {name == 'b':d}\n" for name in "ab" for i in range(9))
    )
    missing, unclear = check(tmp_path / "train.txt")["faults"]
    assert missing.startswith("12 unreadable (No such file or directory): [")
    assert unclear.startswith(
        f"6 images are in several classes, byte for byte: ['{tmp_path}/a/0000.png', '{tmp_path}/b/"
    )


@pytest.mark.parametrize("shape", [(9,), (2, 9, 9, 3)])
def test_arrays_that_are_no_images_are_named_and_no_failure(tmp_path, shape):
    np.save(tmp_path / "0.npy", np.zeros(shape, np.uint8))
    [fault] = check(tmp_path)["faults"]
    assert f"the array has shape {shape}, (H, W, 3) is needed" in fault


def test_sizes_speed_and_a_part_of_the_images(tmp_path, capfd):
    make_images(tmp_path / "train", 30)
    report = check(tmp_path, "--sample", "10", "--model", "mixmae_quickstart")
    assert report["train"]["images"] == 10
    assert report["train"]["images_per_second"] > 1 and report["model_images_per_second"] > 0


def test_nothing_to_check(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    for flags, message in (((tmp_path / "empty",), "no images found under"), ((), "--data_path is missing"),
                           ((tmp_path / "absent",), "absent does not exist")):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            run(util.check_data, *flags)
        assert stopped.value.code == 2 and message in capfd.readouterr().err
