"""The index of a folder: torchvision's order, a cache that is never stale, arrays that workers share."""

import itertools
import logging
import multiprocessing
import os
import time

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from util.data import image_index
from util.data.image_index import ImageIndex, StringTable, class_folders, load_index
from util.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MIXMAE_CACHE", str(folder))
    monkeypatch.setattr(image_index, "SETTLED_AFTER_NS", -(10**12))  # files of this second are settled too
    return folder


def tree(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def paths(index: ImageIndex) -> list[str]:
    return [index.path(i) for i in range(len(index))]


NAMES = [
    "b/2.jpg",
    "b/10.PNG",
    "a/z.jpeg",
    "a/deep/er/y.webp",
    "a-b/x.tif",
    "B/w.bmp",
    "a/deep-1/v.jpg",
    "b/notes.txt",
]


def test_order_and_classes_are_torchvisions(tmp_path):
    root = tree(tmp_path / "data", NAMES)
    theirs = ImageFolder(root)
    index = load_index(root)
    assert paths(index) == [path for path, _ in theirs.samples]
    assert index.targets.tolist() == theirs.targets
    assert index.classes == theirs.classes == class_folders(root)


def test_images_outside_class_folders_have_no_labels(tmp_path):
    root = tree(tmp_path / "data", ["b/1.jpg", "0.jpg", "a/x/2.jpg"])
    index = load_index(root)
    assert index.classes is None and index.targets.tolist() == [-1, -1, -1]
    assert [os.path.relpath(path, root) for path in paths(index)] == ["0.jpg", "a/x/2.jpg", "b/1.jpg"]


def test_second_start_lists_no_folder(tmp_path, monkeypatch):
    root = tree(tmp_path / "data", [f"class{i % 7}/sub{i % 3}/{i}.jpg" for i in range(500)])
    first = load_index(root)

    def scandir(path):
        raise AssertionError(f"listed {path} again")

    monkeypatch.setattr(os, "scandir", scandir)
    second = load_index(root)
    assert paths(second) == paths(first) and second.classes == first.classes
    assert np.array_equal(second.targets, first.targets)


@pytest.mark.parametrize("change", ["add", "remove", "rename", "deep", "class"])
def test_a_changed_tree_is_scanned_again(tmp_path, change):
    root = tree(tmp_path / "data", NAMES)
    before = paths(load_index(root))
    time.sleep(0.02)  # the kernel's clock moves in ticks
    if change == "add":
        (root / "b" / "new.jpg").write_bytes(b"")
    elif change == "remove":
        (root / "b" / "2.jpg").unlink()
    elif change == "rename":
        (root / "b" / "2.jpg").rename(root / "b" / "3.jpg")
    elif change == "deep":
        (root / "a" / "deep" / "er" / "new.jpg").write_bytes(b"")
    elif change == "class":
        (root / "b").rename(root / "c")
    after = load_index(root)
    assert paths(after) == [path for path, _ in ImageFolder(root).samples] != before


def test_times_set_back_do_not_hide_a_change(tmp_path):
    root = tree(tmp_path / "data", NAMES)
    load_index(root)
    status = os.stat(root / "b")
    time.sleep(0.02)
    (root / "b" / "new.jpg").write_bytes(b"")
    os.utime(root / "b", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert str(root / "b" / "new.jpg") in paths(load_index(root))


def test_a_tree_that_just_changed_is_not_cached(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(image_index, "SETTLED_AFTER_NS", 60 * 10**9)
    load_index(tree(tmp_path / "data", NAMES))
    assert not list(cache.glob("*.npz"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "method", "encrypted", "empty", "text", "pickle"])
def test_a_damaged_cache_is_scanned_again(tmp_path, cache, damage, caplog):
    root = tree(tmp_path / "data", NAMES)
    expected = paths(load_index(root))
    (file,) = cache.glob("*.npz")
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[content.index(b"z.jpeg")] ^= 1
    elif damage in ("method", "encrypted"):  # flipped bits in the archive's directory
        content[content.index(b"PK\x01\x02") + {"method": 10, "encrypted": 8}[damage]] ^= 1
    elif damage == "empty":
        content = b""
    elif damage == "text":
        content = b"not an archive"
    if damage == "pickle":
        with open(file, "wb") as stream:
            np.savez(stream, names=np.array([object()], dtype=object))
    else:
        file.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING):
        assert paths(load_index(root)) == expected
    assert "scanning again" in caplog.text
    caplog.clear()
    load_index(root)  # the scan replaced the damaged file
    assert "scanning again" not in caplog.text


def test_works_without_a_writable_cache(tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")  # a file where the cache folder should be: not writable, for root neither
    monkeypatch.setenv("MIXMAE_CACHE", str(blocked / "cache"))
    root = tree(tmp_path / "data", NAMES)
    with caplog.at_level(logging.WARNING):
        assert len(load_index(root)) == 7
    assert "is not cached" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "file"]


def test_the_data_folder_is_never_written(tmp_path):
    root = tree(tmp_path / "data", NAMES)
    before = sorted(root.rglob("*"))
    load_index(root)
    assert sorted(root.rglob("*")) == before


def _load_and_report(root, started, scans, results):
    scan = image_index.scan

    def slow_scan(path, *extensions):
        with scans.get_lock():
            scans.value += 1
        time.sleep(0.5)
        return scan(path, *extensions)

    image_index.scan = slow_scan
    started.wait()
    results.put(len(load_index(root)))


def test_processes_that_start_together_scan_once(tmp_path):
    root = tree(tmp_path / "data", NAMES)
    context = multiprocessing.get_context("fork")
    started, scans, results = context.Barrier(4), context.Value("i", 0), context.Queue()
    processes = [context.Process(target=_load_and_report, args=(root, started, scans, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=30) for _ in processes] == [7] * 4
    for process in processes:
        process.join()
    assert scans.value == 1


def test_links_are_followed_and_loops_end(tmp_path):
    root = tree(tmp_path / "data", ["a/1.jpg"])
    other = tree(tmp_path / "elsewhere", ["2.jpg"])
    (root / "b").symlink_to(other)
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    names = [os.path.relpath(path, root) for path in paths(load_index(root))]
    assert names == ["a/1.jpg", "b/2.jpg"]


def test_any_file_name_survives(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    names = [b"\xff\xfe.jpg", "ü 猫.jpg".encode(), b"new\nline.jpg", b"%s $(x) '.jpg"]
    for name in names:
        with open(os.path.join(os.fsencode(root), name), "wb"):
            pass
    for _ in range(2):  # scanned, then cached
        assert sorted(os.fsencode(os.path.basename(path)) for path in paths(load_index(root))) == sorted(names)


def test_an_empty_folder_is_an_error_that_names_it(tmp_path):
    root = tree(tmp_path / "data", ["a/readme.txt"])
    with pytest.raises(UserError, match=r"no images found under .*/data \(looked for .jpg,"):
        load_index(root)


def test_validation_targets_count_in_the_training_classes(tmp_path):
    index = load_index(tree(tmp_path / "val", ["b/1.jpg", "d/2.jpg"]))
    assert index.with_classes(["a", "b", "c", "d"]).targets.tolist() == [1, 3]
    with pytest.raises(UserError, match=r"classes that the training set lacks: \['d'\]"):
        index.with_classes(["a", "b", "c"])
    assert index.empty_classes() == []


def test_the_index_is_a_few_flat_arrays():
    number = 100_000
    names = [b"n%08d/%d.JPEG" % (i % 1000, i) for i in range(number)]
    table = StringTable.of(names)
    index = ImageIndex("/data", table, np.zeros(number, np.int32), ["x"])
    nbytes = table.blob.nbytes + table.ends.nbytes + index.targets.nbytes
    assert nbytes == sum(map(len, names)) + 12 * number
    assert index.path(number - 1) == "/data/n00000999/99999.JPEG" and index.path(0) == "/data/n00000000/0.JPEG"
    held = [value for value in vars(table).values()] + [index.targets]
    assert all(isinstance(value, np.ndarray) and value.dtype != object for value in held)


LEFT_OUT = [".thumbs/a.jpg", "b/.thumbs/x/c.jpg", "b/._2.jpg", "b/.DS_Store", "b/1.JXL", "a/2.jxl", "a/3.psd"]
LEFT_OUT += ["a/README", "a/scan.0001", "a/scan.0002"]


def test_what_is_left_out_is_counted_and_named(tmp_path, caplog):
    """Hidden files and folders, and images in formats that are not read; scanned, then cached."""
    root = tree(tmp_path / "data", NAMES)
    expected = paths(load_index(root)), load_index(root).classes
    tree(root, LEFT_OUT)
    (root / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            index = load_index(root)
        assert (paths(index), index.classes) == expected
        assert class_folders(root) == expected[1]
        assert index.left_out == {".jxl": 2, ".psd": 1, ".txt": 1, "": 3, "broken link": 1} and index.hidden == 3
        assert f"{root}: left out 2 .jxl, 1 .psd, which this program does not read: convert" in caplog.text
        assert "left out 1 links that lead to no image" in caplog.text
        assert "left out files without an image's ending: 3 without ending, 1 .txt" in caplog.text
        assert "left out 3 hidden images or folders" in caplog.text
    hidden_root = tree(tmp_path / ".data", ["a/1.jpg"])
    assert len(load_index(hidden_root)) == 1  # what was asked for is not left out


def test_folders_of_runs_and_checks_are_left_out(tmp_path, caplog):
    """Reconstructions became training images of the next run."""
    root = tree(tmp_path / "data", NAMES)
    expected = paths(load_index(root))
    tree(root, [f"run/{name}" for name in ("config.json", "times.jsonl", "reconstructions/epoch0001.png")])
    tree(root, ["a/check/check_data.json", "a/check/check_data.png"])
    for _ in range(2):
        with caplog.at_level(logging.INFO):
            index = load_index(root)
        assert paths(index) == expected and "run" not in index.folders and index.left_out["own output"] == 2
    assert f"{root}: left out 2 folders with the output of a run or of check_data" in caplog.text
    assert len(load_index(root / "run")) == 1  # what was asked for is not left out
    (root / "run" / "times.jsonl").unlink()
    assert len(load_index(root)) == len(expected) + 1


def test_a_run_scans_once_where_the_index_cannot_be_cached(tmp_path, monkeypatch):
    """It looks at its images twice: to choose settings, and to train."""
    root, scans, scan = tree(tmp_path / "data", NAMES), [], image_index.scan
    monkeypatch.setattr(image_index, "scan", lambda *args: scans.append(args) or scan(*args))
    monkeypatch.setenv("MIXMAE_CACHE", str(root / "b" / "notes.txt"))  # a file
    monkeypatch.setattr(image_index, "TICK_NS", -(10**12))
    first, second = load_index(root), load_index(root)
    assert paths(first) == paths(second) and len(scans) == 1
    tree(root, ["c/1.jpg"])
    os.utime(root, (0, 0))
    assert "c/1.jpg" in "".join(paths(load_index(root))) and len(scans) == 2


def test_a_folder_of_formats_that_are_not_read(tmp_path, caplog):
    with pytest.raises(UserError, match="no images found under"):
        load_index(tree(tmp_path / "data", ["1.jxl", "2.jxl"]))
    assert "2 .jxl" in caplog.text


def test_a_scan_asks_nothing_of_single_files(tmp_path, monkeypatch):
    """A stat of each would be slow on network file systems: the listing of a folder has names and kinds."""
    root = tree(tmp_path / "data", [*NAMES, *LEFT_OUT])
    asked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: asked.append(path) or stat(path, **options))
    load_index(root)
    assert asked and not [path for path in asked if str(path).lower().endswith((".jpg", ".jxl", ".png"))]


def test_the_fingerprint_follows_names_and_order_alone(tmp_path):
    first = load_index(tree(tmp_path / "data", NAMES))
    os.rename(tmp_path / "data", tmp_path / "moved")
    moved = load_index(tmp_path / "moved")
    assert moved.fingerprint() == first.fingerprint()
    os.rename(tmp_path / "moved" / "b" / "2.jpg", tmp_path / "moved" / "b" / "3.jpg")
    assert load_index(tmp_path / "moved").fingerprint() != first.fingerprint()
    one, other = (
        ImageIndex("/", StringTable.of(names), np.zeros(2, np.int32), None) for names in ([b"a", b"bc"], [b"ab", b"c"])
    )
    assert one.fingerprint() != other.fingerprint()


def test_a_long_scan_says_how_far_it_is(tmp_path, caplog, monkeypatch):
    tree(tmp_path / "data", [f"{name}/{i}.jpg" for name in "abcdef" for i in range(3)])
    now = itertools.count(step=3.0)  # a look at the clock in each folder, and one more for a line
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with caplog.at_level(logging.INFO):
        image_index.scan(str(tmp_path / "data"))
    said = [record.getMessage() for record in caplog.records if "so far" in record.getMessage()]
    assert said == ["9 images in 4 folders so far"]
