"""The pages for people: every command is one that the programs accept, every link leads somewhere, no page is lost."""

import gzip
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from running import QUICK, make_images, run

from util import check_data
from util.weights.settings import PRETRAINING_MODELS

ROOT = Path(__file__).resolve().parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("[etu]*/**/*.md"))}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAMS = ("python", ".venv/bin/python", "torchrun", "srun", "sbatch", "sh")
OTHERS = ("git", "cd", "pip", ".venv/bin/pip", "python3", ".")  # other people's, or the shell's


def shell_lines(page: str) -> Iterator[str]:
    """The commands of a page's shell blocks, and those in its sentences that are written out."""
    text = PAGES[page]
    for language, block in FENCED.findall(text):
        if language == "sh":
            lines = block.replace("\\\n", " ").splitlines()
            yield from (part for line in lines for part in line.split("&&") if part.strip() and part[0] != "#")
    for words in re.findall(r"`([^`]+)`", FENCED.sub("", text)):
        if words.startswith(("python ", "torchrun ", "sh ")) and "..." not in words and "<" not in words:
            yield words


COMMANDS = sorted({(page, line.strip()) for page in PAGES for line in shell_lines(page)})


def program_of(line: str) -> tuple[str, list[str]]:
    """The module whose parser reads a command's flags, and these; '' for another program's command."""
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words.pop(0)  # variables
    assert words[0] in (*PROGRAMS, *OTHERS), f"{words[0]} is no program that the pages may use"
    while words and words[0] not in OTHERS:
        word = words.pop(0)
        if word == "-m" and words[0].startswith(("util.", "exp.")):
            return words[0], words[1 : words.index("--") if "--" in words else None]
        if word.startswith("main_") and word.endswith(".py"):
            return word.removesuffix(".py"), words
        if word.endswith((".sh", ".py")):
            assert (ROOT / word).is_file(), f"{word} does not exist"
        if word.startswith("exp/coco/"):
            return "exp.coco.mask_rcnn", words[3:]
        if word.endswith("_600ep/pretrain.sh"):
            return "main_pretrain", words[3:]  # after partition, GPUs and data
        if re.search(r"_600ep/.*\.sh$", word):
            return "main_finetune", words[3:]
    return "", []


def test_pages_are_complete():
    """No word in capitals that stands for something to be written."""
    for name, page in PAGES.items():
        text = re.sub(r"`[^`]*`", "", FENCED.sub("", page))
        assert not re.findall(r"\b(?:TODO|RESULTS?|XXX|FIXME|[A-Z]+_[A-Z]+)\b", text), name


def test_tests_that_pages_name_exist():
    named = {name for page in PAGES.values() for name in re.findall(r"`(tests/test_\w+\.py(?:::\w+)?)`", page)}
    assert len(named) > 10
    for path, _, name in (name.partition("::") for name in named):
        assert f"def {name}(" in (ROOT / path).read_text() if name else (ROOT / path).is_file(), (path, name)


def test_pages_are_found():
    assert {"README.md", "exp/README.md", "exp/slurm.md", "util/README.md", "tests/README.md"} <= PAGES.keys()
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("page, line", COMMANDS)
def test_every_command_is_accepted(page, line, capsys):
    module, flags = program_of(line)
    if module:
        try:
            importlib.import_module(module).get_args_parser().parse_args(flags)
        except SystemExit as stopped:
            assert stopped.code == 0, capsys.readouterr().err  # of --help


def anchors(text: str) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", PAGES[page])):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(found.read_text()), f"{page} links to {target}, but there is no such heading"


def test_every_page_can_be_reached_from_the_readme():
    linked = set(re.findall(r"\]\(([^)#\s]+\.md)\)", PAGES["README.md"]))
    pages = {page for page in PAGES if not page.startswith(("tests/data/", "tests/golden/"))}
    assert pages - {"README.md"} <= linked


def test_the_models_table_is_right():
    rows = re.findall(r"^\| `(mixmae_\w+)` \| (\d+)x\d+ \| (\d) \| (\d+) \| ([\d.]+) M", PAGES["exp/README.md"], re.M)
    assert [row[0] for row in rows] == PRETRAINING_MODELS
    for name, size, patch, cell, millions in rows:
        with torch.device("meta"):
            model = timm.create_model(name)
        assert model.img_size == (int(size), int(size))
        assert 8 * int(patch) == int(cell) == model.feature_info[-1]["reduction"]
        assert float(millions) == round(sum(p.numel() for p in model.parameters()) / 1e6, 1)


def run_recipe(section: str, *further: str) -> None:
    """Run the commands of a section of exp/README.md in this process; those that train with `further` flags.

    As the page says, pretraining is given the flags that check_data prints.
    """
    text = PAGES["exp/README.md"].partition(f"## {section}\n")[2].partition("\n## ")[0]
    measured = []
    for language, block in FENCED.findall(text):
        for line in block.replace("\\\n", " ").splitlines() if language == "sh" else ():
            module, flags = program_of(line)
            if module.startswith("main_"):
                run(importlib.import_module(module), *flags, *measured, *further)
            elif module == "util.check_data":
                with pytest.raises(SystemExit, match=r"^0$"):
                    run(check_data, *flags)
                found = json.loads(Path("check", "check_data.json").read_text())
                measured = ["--in_chans", found["in_chans"], "--mean", *found["mean"], "--std", *found["std"]]
            elif module:
                run(importlib.import_module(module), *flags)


def test_the_recipe_for_60_photographs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_images(Path("photos"), 8, (48, 64), 3)
    run_recipe("60 photographs", "--epochs", "2", *QUICK)
    with np.load("embeddings.npz") as embeddings:
        assert embeddings["features"].shape == (8, 128)
    assert Path("small_run", "report.html").is_file()


@pytest.mark.slow
def test_the_recipe_for_satellite_bands(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.chdir(tmp_path)
    Path("tiles").mkdir()
    for index, bands in enumerate(np.random.default_rng(0).integers(500, 4000, (8, 32, 32, 13), dtype=np.uint16)):
        tifffile.imwrite(f"tiles/{index}.tif", bands, photometric="minisblack", planarconfig="contig")
    run_recipe("Satellite bands", "--epochs", "2", *QUICK)
    assert torch.load("bands/checkpoint.pth")["model"]["patch_embed.proj.weight"].shape[1] == 13


@pytest.mark.slow
def test_the_recipe_for_grey_medical_images(tmp_path, monkeypatch):
    """The first half: PNG of 12 bits in 16; DICOM is in test_readers.py."""
    monkeypatch.chdir(tmp_path)
    Path("scans").mkdir()
    for index, scan in enumerate(np.random.default_rng(0).integers(0, 4096, (8, 48, 48), dtype=np.uint16)):
        Image.fromarray(scan).save(f"scans/{index}.png")
    page = PAGES["exp/README.md"]
    monkeypatch.setitem(PAGES, "exp/README.md", page.replace("\nDICOM files are", "\n## DICOM\n"))
    run_recipe("Grey medical images", "--epochs", "2", *QUICK)
    assert json.loads(Path("grey/config.json").read_text())["config"]["in_chans"] == 1


@pytest.mark.slow
def test_the_recipes_for_a_small_gpu_and_given_weights(tmp_path, monkeypatch):
    """The second starts from what the first made, in place of the authors' weights."""
    monkeypatch.chdir(tmp_path)
    for folder, count in (("train/cat", 64), ("train/dog", 64), ("val/cat", 4), ("val/dog", 4)):
        make_images(Path("photos", folder), count, seed=count)
    quick = ["--epochs", "1", "--warmup_epochs", "0", "--device", "cpu", "--num_workers", "0"]
    run_recipe("My GPU is small", "--model", "mixmae_quickstart", *quick)
    run_recipe("Continue from the authors' weights", "--finetune", "run/checkpoint.pth", *quick)
    for folder in ("run", "continued", "classifier"):
        assert json.loads(Path(folder, "log.txt").read_text())["epoch"] == 0


def test_the_reference_run_on_fashion_mnist(tmp_path):
    """The script from the original files to folders of images, and what it would start then."""
    for stem in ("train", "t10k"):
        labels = np.repeat(np.arange(10, dtype=np.uint8), 6)
        images = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" != - ] || exec {sys.executable} "$@"\necho "$@"\n')  # reads scripts alone
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "FASHION_MNIST": str(tmp_path), "PER_CLASS": "4"}
    script = ["sh", ROOT / "exp" / "fashion_mnist" / "pretrain.sh", tmp_path / "out"]
    started = subprocess.run(script, env=environment, check=True, capture_output=True, text=True).stdout
    for split, count in (("train", 4), ("val", 6)):
        assert [len(list(folder.iterdir())) for folder in (tmp_path / "out" / "data" / split).iterdir()] == [count] * 10
    with Image.open(tmp_path / "out" / "data" / "val" / "bag" / "00048.png") as image:
        assert image.size == (32, 32) and np.array_equal(np.array(image)[2:-2, 2:-2], images[48])
    pretraining, reporting = (program_of(f"python {line}") for line in started.splitlines())
    assert (pretraining[0], reporting[0]) == ("main_pretrain", "util.report")
    for module, flags in (pretraining, reporting):
        importlib.import_module(module).get_args_parser().parse_args(flags)
