"""Imports point down only, by the plan of rooms in `HOUSE`; they never run in a circle; and no file is too long.

The imports are read from the source of all Python files outside tests/, those inside functions included.
"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("*.py", "util/**/*.py", "exp/**/*.py")
MOST_LINES = 450


@dataclass(frozen=True)
class Room:
    """A file belongs to the first room with a pattern that matches its path.

    Args:
        name: as messages call it.
        floor: its files may import files of lower floors.
        files: patterns of paths from the repository's root.
        shared: whether its files may import each other (never in a circle).
        knows: the rooms of lower floors that its files may import; None: all of them.
        beside: the rooms of its own floor that its files may import all the same.
        packages: the third-party packages that its files may import; None: all of them.
    """

    name: str
    floor: int
    files: tuple[str, ...]
    shared: bool = False
    knows: tuple[str, ...] | None = None
    beside: tuple[str, ...] = ()
    packages: tuple[str, ...] | None = None


HOUSE = (
    Room("mains", 7, ("main_*.py",)),
    Room("engines", 6, ("engine_*.py",)),
    Room("task engines", 6, ("exp/*/engine_*.py",)),
    Room("task scripts", 7, ("exp/*/*.py",)),
    Room("dense", 5, ("util/dense/*.py",), shared=True),
    Room("run", 4, ("util/run/*.py",), shared=True),
    Room(
        "weights",
        3,
        ("util/weights/*.py",),
        shared=True,
        knows=("models_mixmae", "models_swin", "layers", "errors"),  # the models' names
        beside=("models_mixmae",),
    ),
    Room("models_mixmae", 3, ("models_mixmae.py",), knows=("models_swin", "layers", "errors")),
    Room("models_swin", 2, ("models_swin.py",), knows=("layers", "errors")),
    Room("data", 2, ("util/data/*.py",), shared=True, knows=("seeding", "errors")),
    Room(
        "layers",
        1,
        ("util/layers/*.py",),
        shared=True,
        knows=("errors",),
        beside=("errors",),
        packages=("torch", "timm", "numpy"),
    ),
    Room("seeding", 1, ("util/seeding.py",)),
    Room("errors", 1, ("util/errors.py",)),
    Room("util", 0, ("util/__init__.py",)),  # it runs before every file of util/
    Room("commands", 6, ("util/*.py",)),
)


def room_of(path: str) -> Room | None:
    """The room of the file at `path`, relative to the root; None if it has none."""
    for room in HOUSE:
        for pattern in room.files:
            if path.count("/") == pattern.count("/") and Path(path).match(pattern):
                return room
    return None


def imported_names(source: str, path: str) -> Iterator[str]:
    """What the file imports, anywhere in it, as absolute dotted names: `from a.b import c` gives a.b.c."""
    folder = path.split("/")[:-1]
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) + 1 - node.level] if node.level else []
            package = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{package}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if ast.unparse(node.func) in ("__import__", "import_module", "importlib.import_module"):
                yield str(node.args[0].value)


def find_file(name: str, root: Path) -> str | None:
    """The file below `root` that the import of `name` reads last; None for packages from elsewhere."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):  # the last parts may be a class or a function
        stem = "/".join(parts[:length])
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if (root / path).is_file():
                return path
    return None


def faults(root: Path) -> list[str]:
    """A line for every breach of the plan by the files below `root`."""
    found = []
    test_modules = {"tests", *(path.stem for path in (root / "tests").glob("*.py"))}
    graph = {}  # of the imports that the rooms allow
    for path in sorted({file.relative_to(root).as_posix() for pattern in SOURCES for file in root.glob(pattern)}):
        source = (root / path).read_text(encoding="utf-8")
        if (lines := source.count("\n")) > MOST_LINES:
            found.append(f"{path} has {lines} lines: at most {MOST_LINES}")
        if (room := room_of(path)) is None:
            found.append(f"{path} is in no room: give it one in HOUSE ({Path(__file__).name})")
            continue
        graph[path] = set()
        for name in sorted(set(imported_names(source, path))):
            package = name.split(".")[0]
            imported = find_file(name, root)
            if package in test_modules:
                found.append(f"{path} imports {name}: only tests may know tests")
            elif imported is None:
                if room.packages is not None and package not in (*room.packages, *sys.stdlib_module_names):
                    allowed = ", ".join(room.packages)
                    found.append(f"{path} imports {package}: of other packages {room.name} may know only {allowed}")
            elif imported == path:
                pass
            elif fault := fault_of_import(room, room_of(imported)):
                found.append(f"{path} imports {imported}: {fault}")
            else:
                graph[path].add(imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"imports run in a circle: {' -> '.join(reversed(error.args[1]))}")
    return found


def fault_of_import(room: Room, other: Room | None) -> str | None:
    """Why a file in `room` may not import one in `other`; None if it may, or if `other` has no room."""
    if other is None or (other is room and room.shared):
        return None
    if other is room:
        return f"{room.name} may not know each other"
    if other.floor >= room.floor and other.name not in room.beside:
        return f"{room.name} (floor {room.floor}) may not know {other.name} (floor {other.floor})"
    if room.knows is not None and other.name not in room.knows:
        return f"{room.name} may not know {other.name}, only {', '.join(room.knows)}"
    return None


def test_every_room_has_files():
    """A pattern that matches nothing enforces nothing."""
    paths = [path.relative_to(ROOT).as_posix() for pattern in SOURCES for path in ROOT.glob(pattern)]
    inhabited = {room_of(path) for path in paths}
    assert [room.name for room in HOUSE if room not in inhabited] == []


def test_imports_follow_the_plan():
    found = faults(ROOT)
    assert not found, "\n" + "\n".join(found)


# ---------------------------------------------------------------------------------------------------------------
# The test of the test: a tree that keeps to the plan, and one more line that does not

SOUND = {
    "main_finetune.py": "import engine_finetune\nimport util.run.session\nfrom util import knn\n",
    "main_pretrain.py": "import engine_pretrain\n",
    "engine_finetune.py": "from util.run import session\nimport models_mixmae\n",
    "engine_pretrain.py": "from util.seeding import seed_all\n",
    "models_mixmae.py": "from models_swin import Swin\n",
    "models_swin.py": "import torch, timm, torchvision\nfrom util.layers.attention import Attention\n",
    "util/__init__.py": "",
    "util/knn.py": "from util.run import session\nfrom util.weights.file import read\n",
    "util/submit.py": "def main():\n    from util.submit import main\n",
    "util/run/__init__.py": "",
    "util/run/session.py": "from util.run.state import State\nimport util.data.datasets\nimport models_mixmae\n",
    "util/run/state.py": "import util.weights.file, models_swin\nfrom .. import errors\n",
    "util/weights/__init__.py": "",
    "util/weights/file.py": "def read():\n    import models_swin\n",
    "util/weights/layouts.py": "from .file import read\n",
    "util/data/__init__.py": "",
    "util/data/datasets.py": "from util.data import decoding\nfrom util.seeding import seed_all\n",
    "util/data/decoding.py": "import PIL.Image\nfrom util.errors import UserError\n",
    "util/layers/__init__.py": "",
    "util/layers/attention.py": "import math\nimport numpy as np\nimport torch.nn\nfrom util.layers import windows\n",
    "util/layers/windows.py": "import timm.layers\n",
    "util/dense/__init__.py": "",
    "util/dense/encoder.py": "from util.run.session import Run\nimport models_swin\n",
    "util/dense/detector.py": "from util.dense import encoder\n",
    "exp/coco/mask_rcnn.py": "from exp.coco.engine_mask_rcnn import evaluate\nimport util.run.session\n",
    "exp/coco/engine_mask_rcnn.py": "import util.dense.detector\n",
    "exp/coco/engine_x.py": "",
    "util/seeding.py": "import torch\n",
    "util/errors.py": "",
    "tests/textbook.py": "import util.knn\n",
}

BREACHES = {
    # imports that climb
    ("util/data/decoding.py", "import util.run.session"): "data (floor 2) may not know run (floor 4)",
    ("util/weights/file.py", "from util.run import state"): "weights (floor 3) may not know run (floor 4)",
    ("models_swin.py", "import models_mixmae"): "models_swin (floor 2) may not know models_mixmae (floor 3)",
    ("util/run/state.py", "import util.knn"): "run (floor 4) may not know commands (floor 6)",
    ("util/run/state.py", "from engine_pretrain import x"): "run (floor 4) may not know engines (floor 6)",
    ("util/run/state.py", "import util.dense.encoder"): "run (floor 4) may not know dense (floor 5)",
    ("util/dense/encoder.py", "import exp.coco.engine_x"): "dense (floor 5) may not know task engines (floor 6)",
    ("util/knn.py", "import exp.coco.mask_rcnn"): "commands (floor 6) may not know task scripts (floor 7)",
    ("exp/coco/mask_rcnn.py", "import main_finetune"): "task scripts (floor 7) may not know mains (floor 7)",
    ("util/knn.py", "import main_finetune"): "commands (floor 6) may not know mains (floor 7)",
    ("util/__init__.py", "import util.errors"): "util (floor 0) may not know errors (floor 1)",
    # into another room, or another file, of the same floor
    ("util/knn.py", "import util.submit"): "commands may not know each other",
    ("main_pretrain.py", "from main_finetune import build"): "mains may not know each other",
    ("engine_pretrain.py", "import engine_finetune"): "engines may not know each other",
    ("util/knn.py", "import engine_finetune"): "commands (floor 6) may not know engines (floor 6)",
    ("engine_finetune.py", "import util.knn"): "engines (floor 6) may not know commands (floor 6)",
    ("util/data/decoding.py", "import models_swin"): "data (floor 2) may not know models_swin (floor 2)",
    ("models_mixmae.py", "import util.weights.file"): "models_mixmae (floor 3) may not know weights (floor 3)",
    ("util/seeding.py", "import util.errors"): "seeding (floor 1) may not know errors (floor 1)",
    # down, but past what the room may know
    ("util/weights/file.py", "import util.data.decoding"): "weights may not know data, only",
    ("util/data/decoding.py", "import util.layers.windows"): "data may not know layers, only seeding, errors",
    ("models_mixmae.py", "import util.data.datasets"): "models_mixmae may not know data, only",
    ("util/layers/windows.py", "import PIL"): "of other packages layers may know only torch, timm, numpy",
    ("util/layers/windows.py", "import torchvision.ops"): "imports torchvision: of other packages layers",
    # however it is written
    ("util/data/decoding.py", "def f():\n    from util.run.session import Run"): "data (floor 2) may not know run",
    ("util/data/decoding.py", "class A:\n    from ..run import session"): "data (floor 2) may not know run",
    ("util/data/decoding.py", "from .. import knn"): "data (floor 2) may not know commands",
    ("util/knn.py", "import importlib\nimportlib.import_module('main_finetune')"): "may not know mains",
    # the tests, circles, files without a room, long files
    ("util/knn.py", "import tests.textbook"): "util/knn.py imports tests.textbook: only tests may know tests",
    ("util/knn.py", "from textbook import Config"): "imports textbook.Config: only tests may know tests",
    ("util/data/decoding.py", "from .datasets import x"): "circle: util/data/d",
    ("util/run/state.py", "def f():\n    import util.run.session"): "circle: util/run/s",
    ("util/viewer/page.py", ""): "util/viewer/page.py is in no room",
    ("exp/train.py", ""): "exp/train.py is in no room",
    ("compare.py", ""): "compare.py is in no room",
    ("util/knn.py", "\n" * MOST_LINES): "util/knn.py has 453 lines: at most 450",
}


def build_tree(root: Path, files: dict[str, str]) -> None:
    for path, source in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(source)


def test_a_sound_tree_has_no_faults(tmp_path):
    build_tree(tmp_path, SOUND)
    assert faults(tmp_path) == []


@pytest.mark.parametrize("path, line", BREACHES)
def test_every_breach_is_reported(tmp_path, path, line):
    """One line, once: it names the file and what is wrong."""
    build_tree(tmp_path, SOUND | {path: SOUND.get(path, "") + line + "\n"})
    [fault] = faults(tmp_path)
    assert path in fault and BREACHES[path, line] in fault


def test_all_breaches_are_reported(tmp_path):
    line = "import util.run.session, util.weights.file\n"
    build_tree(tmp_path, SOUND | {"util/layers/windows.py": line, "util/seeding.py": line})
    assert faults(tmp_path) == [
        "util/layers/windows.py imports util/run/session.py: layers (floor 1) may not know run (floor 4)",
        "util/layers/windows.py imports util/weights/file.py: layers (floor 1) may not know weights (floor 3)",
        "util/seeding.py imports util/run/session.py: seeding (floor 1) may not know run (floor 4)",
        "util/seeding.py imports util/weights/file.py: seeding (floor 1) may not know weights (floor 3)",
    ]


def test_a_circle_is_shown_in_the_order_of_its_imports(tmp_path):
    build_tree(tmp_path, SOUND | {"util/run/a.py": "import util.run.b\n", "util/run/b.py": "import util.run.c\n"})
    build_tree(tmp_path, {"util/run/c.py": "import util.run.a\n"})
    [fault] = faults(tmp_path)
    files = fault.removeprefix("imports run in a circle: ").split(" -> ")
    assert len(files) == 4 and files[0] == files[-1]
    assert {"util/run/a.py", "util/run/b.py", "util/run/c.py"} == set(files)
    assert files[files.index("util/run/b.py", 0) + 1] == "util/run/c.py"
