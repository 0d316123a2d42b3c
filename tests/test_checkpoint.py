"""Files of weights: atomic writing, detection of every damage, and nothing executed."""

import argparse
import errno
import hashlib
import os
import pathlib
import pickle
import random
import resource
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import util.weights.file
from util.errors import UserError
from util.weights.file import CheckpointError, read_checkpoint, saved_at, temporary_path, write_checkpoint


def small_checkpoint(value: float = 1.0) -> dict:
    return {
        "model": {"weight": torch.full((10, 9), value), "bias": torch.arange(7, dtype=torch.float16)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]},
        "epoch": 4,
        "args": {"model": "mixmae_base", "input_size": (224, 224), "data_path": None},
        "format": 1,
    }


def authors_checkpoint() -> dict:
    """A file as the authors' code saves it: the arguments are a pickled Namespace, with submitit's path in it."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model="mixmim_base", output_dir=pathlib.Path("/a/b"), betas=[0.9, 0.95], lr=1e-3)
    scaler = {"scale": 65536.0, "growth_tracker": 3}
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 599,
        "scaler": scaler,
        "args": args,
    }


class RunsACommand:
    """Unpickling an instance with `pickle` would run a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_equal(left, right)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


# -- Writing ---------------------------------------------------------------------------------------------------


def test_round_trip_and_open_to_every_tool(tmp_path):
    path = tmp_path / "checkpoint.pth"
    write_checkpoint(path, small_checkpoint())
    assert_equal(read_checkpoint(path), small_checkpoint())
    assert_equal(read_checkpoint(path, mmap=True), small_checkpoint())
    assert_equal(torch.load(path, weights_only=True), small_checkpoint())  # an ordinary file for PyTorch
    assert zipfile.ZipFile(path).testzip() is None
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_a_tensor_of_a_few_bytes(tmp_path):
    write_checkpoint(tmp_path / "a.pth", {"w": torch.ones(1)})
    assert read_checkpoint(tmp_path / "a.pth")["w"].item() == 1


@pytest.mark.parametrize(
    "value, where",
    [
        (np.float64(1.0), r"checkpoint\['args'\]\['value'\] is a numpy.float64"),
        (pathlib.Path("a"), "PosixPath"),
        (argparse.Namespace(), "argparse.Namespace"),
        ([{"deep": {1, 2}}], r"\['value'\]\[0\]\['deep'\] is a builtins.set"),
        (RunsACommand("true"), "RunsACommand"),
    ],
)
def test_what_is_not_plain_is_refused_before_writing(tmp_path, value, where):
    with pytest.raises(CheckpointError, match=where):
        write_checkpoint(tmp_path / "checkpoint.pth", {"args": {"value": value}})
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_midway_leaves_the_previous_file(tmp_path):
    """A real failing write: the kernel refuses bytes beyond a limit on the file size."""
    path = tmp_path / "checkpoint.pth"
    write_checkpoint(path, small_checkpoint(1.0))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_checkpoint(path, {"model": {"weight": torch.ones(1 << 20)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pth"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_step_leaves_the_previous_file(tmp_path, monkeypatch, step):
    path = tmp_path / "checkpoint.pth"
    write_checkpoint(path, small_checkpoint(1.0))

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, small_checkpoint(2.0))
    monkeypatch.undo()
    assert_equal(read_checkpoint(path), small_checkpoint(1.0))
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    write_checkpoint(path, small_checkpoint(1.0))
    real_hash = util.weights.file.file_hash

    def hash_of_damaged(temporary, **kwargs):
        data = bytearray(temporary.read_bytes())
        data[1000] ^= 1
        temporary.write_bytes(data)
        return real_hash(temporary, **kwargs)

    monkeypatch.setattr(util.weights.file, "file_hash", hash_of_damaged)
    with pytest.raises(OSError, match="other bytes"):
        write_checkpoint(path, small_checkpoint(2.0))
    monkeypatch.undo()
    assert_equal(read_checkpoint(path), small_checkpoint(1.0))


def test_temporary_files_are_hidden_and_beside_the_file(tmp_path):
    temporary = temporary_path(tmp_path / "checkpoint.pth")
    assert temporary.parent == tmp_path and temporary.name.startswith(".checkpoint.pth.")
    assert str(os.getpid()) in temporary.name.split(".")


def test_the_moment_of_saving_survives_copying_and_a_clock_set_back(tmp_path):
    path = tmp_path / "checkpoint.pth"
    write_checkpoint(path, small_checkpoint())
    copied = tmp_path / "copied.pth"
    copied.write_bytes(path.read_bytes())
    os.utime(copied, (0, 0))
    assert saved_at(copied) == saved_at(path) > 0
    write_checkpoint(path, small_checkpoint(), later_than=2**62)
    assert saved_at(path) == 2**62 + 1
    torch.save({}, copied)
    assert saved_at(copied) == copied.stat().st_mtime_ns


def sealed(data: bytes, moment: int) -> bytes:
    """The bytes of a `torch.save` archive with a seal, as files of every version of this project carry it."""
    comment = b"mixmae seal time=%020d sha256=" % moment
    data = data[:-2] + struct.pack("<H", len(comment) + 64) + comment
    return data + hashlib.sha256(data).hexdigest().encode()


def test_the_format_of_the_seal_is_fixed(tmp_path):
    """What was sealed by any version can be read by every other one."""
    path = tmp_path / "checkpoint.pth"
    torch.save(small_checkpoint(), path)
    plain = path.read_bytes()
    path.write_bytes(sealed(plain, 123))
    assert_equal(read_checkpoint(path), small_checkpoint())
    assert saved_at(path) == 123
    write_checkpoint(path, small_checkpoint())
    written = path.read_bytes()
    length = len(zipfile.ZipFile(path).comment)
    assert length > 64 and written == sealed(written[: -length - 2] + b"\0\0", saved_at(path))


# -- Damage ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "checkpoint.pth"
    write_checkpoint(path, small_checkpoint())
    return path.read_bytes()


def test_every_flipped_bit_is_detected(whole_file, tmp_path):
    """At each byte of the file: in the zip's headers and padding too, which its CRCs leave out, and in the seal."""
    path = tmp_path / "damaged.pth"
    rng = random.Random(0)
    for position in range(len(whole_file)):
        data = bytearray(whole_file)
        data[position] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def test_every_truncation_and_any_addition_is_detected(whole_file, tmp_path):
    path = tmp_path / "damaged.pth"
    tail = range(len(whole_file) - 200, len(whole_file))
    for size in [*range(0, len(whole_file), 97), *tail]:
        path.write_bytes(whole_file[:size])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    for extra in (b"\0", whole_file):
        path.write_bytes(whole_file + extra)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def test_flipped_bits_in_the_tensors_of_any_torch_file_are_detected(tmp_path):
    """torch.load opens such a file without a word."""
    path = tmp_path / "theirs.pth"
    torch.save({"model": {"weight": torch.zeros(1000)}}, path)
    data = bytearray(path.read_bytes())
    start = data.index(bytes(4000))
    data[start + 2000] ^= 16
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["model"]["weight"].any()
    with pytest.raises(CheckpointError, match=r"damaged: the checksum of \S+ in it does not match"):
        read_checkpoint(path)


# -- Everything that is given to --finetune and --resume --------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_the_authors_files_load(tmp_path, zipped):
    path = tmp_path / "theirs.pth"
    theirs = authors_checkpoint()
    torch.save(theirs, path, _use_new_zipfile_serialization=zipped)
    allowed_before = set(torch.serialization.get_safe_globals())  # listed in no particular order
    checkpoint = read_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == allowed_before  # the allowance ends with the call
    assert checkpoint["args"] == {"model": "mixmim_base", "output_dir": "/a/b", "betas": [0.9, 0.95], "lr": 1e-3}
    assert type(checkpoint["args"]["output_dir"]) is str
    assert_equal(checkpoint["model"], dict(theirs["model"]))
    assert_equal(checkpoint["optimizer"], theirs["optimizer"])
    assert checkpoint["epoch"] == 599 and checkpoint["scaler"] == theirs["scaler"]
    write_checkpoint(tmp_path / "ours.pth", checkpoint)


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle 0", "pickle 2", "pickle 4"])
def test_a_file_that_would_run_a_command_is_refused(tmp_path, container):
    marker = tmp_path / "it_ran"
    path = tmp_path / "hostile.pth"
    content = {"model": {"weight": torch.ones(2)}, "args": RunsACommand(f"touch {marker}")}
    if container in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    else:
        path.write_bytes(pickle.dumps(content["args"], protocol=int(container[-1])))
    with pytest.raises(CheckpointError, match=r"nothing (in it )?was run"):
        read_checkpoint(path)
    assert not marker.exists()


def test_a_namespace_cannot_smuggle_a_call(tmp_path):
    marker = tmp_path / "it_ran"
    path = tmp_path / "hostile.pth"
    torch.save({"model": {}, "args": argparse.Namespace(lr=RunsACommand(f"touch {marker}"))}, path)
    with pytest.raises(CheckpointError, match=r"is refused.*system"):
        read_checkpoint(path)
    assert not marker.exists()


def test_a_training_checkpoint_of_mmengine_says_how_to_make_plain_weights_of_it(tmp_path, monkeypatch):
    """A Runner's epoch_N.pth holds its logs as objects of mmengine."""
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__})
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging", module.__name__):
            patch.setitem(sys.modules, name, module)
        logs = {"log_scalars": OrderedDict(loss=module.HistoryBuffer())}
        torch.save({"state_dict": {"w": torch.ones(1)}, "message_hub": logs}, tmp_path / "epoch_3.pth")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "epoch_3.pth")
    message = str(caught.value)
    assert "epoch_3.pth is refused" in message and "mmengine.logging.history_buffer.HistoryBuffer" in message
    assert "nothing was run" in message and "tools/model_converters/publish_model.py" in message
    assert "save only its 'state_dict' with torch.save" in message


def test_every_error_is_one_for_the_user(tmp_path):
    with pytest.raises(UserError):
        read_checkpoint(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(300), "truncated or damaged"),
        (b"just some text\n" * 10, "damaged or not a checkpoint"),
        (bytes(range(256)) * 8, "damaged or not a checkpoint"),
        (b"\x00\x00\x00\x00\x00\x00\x00\x00{}", "damaged or not a checkpoint"),
    ],
)
def test_what_is_not_a_checkpoint_gets_one_clear_message(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_other_archives_objects_and_places(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.pth", "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(CheckpointError, match=r"not a checkpoint: it has no data\.pkl"):
        read_checkpoint(tmp_path / "images.pth")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match="holds a Tensor, not a dict"):
        read_checkpoint(tmp_path / "tensor.pth")
    write_checkpoint(tmp_path / "newer.pth", {"format": 2})
    with pytest.raises(CheckpointError, match=r"newer version of this project \(format 2"):
        read_checkpoint(tmp_path / "newer.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "absent.pth")


def test_a_truncated_legacy_file(tmp_path):
    path = tmp_path / "old.pth"
    torch.save(authors_checkpoint(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        read_checkpoint(path)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    safetensors.save_file({"weight": torch.ones(3)}, path)
    assert_equal(read_checkpoint(path), {"model": {"weight": torch.ones(3)}})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        read_checkpoint(path)


def test_a_checkpoint_that_contains_itself(tmp_path):
    endless = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "endless.pth")
    with pytest.raises(CheckpointError, match="is not a checkpoint: it contains itself"):
        read_checkpoint(tmp_path / "endless.pth")


def test_ordered_dicts_and_parameters_are_plain(tmp_path):
    write_checkpoint(tmp_path / "a.pth", OrderedDict(weight=nn.Parameter(torch.ones(2)), size=torch.Size([1])))
    assert read_checkpoint(tmp_path / "a.pth")["size"] == torch.Size([1])


@pytest.mark.parametrize("name", ["classifier.onnx", "encoder.pt2"])
def test_exported_programs_are_told_from_weights(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 whatever")
    with pytest.raises(CheckpointError, match=f"{name} is an exported program, not weights: .*--format safetensors"):
        read_checkpoint(tmp_path / name)
