"""What a run was made with, so that it can be repeated: settings, data, versions, machine and commit."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision

from util.run import distributed
from util.run.config import TrainingConfig
from util.run.flags import FREE
from util.run.startup import ROOT, program
from util.run.state import TrainingState

logger = logging.getLogger(__name__)

CONFIGURATION, CHANGES = "config.json", "uncommitted.diff"  # of a run's folder


def describe_environment(device: torch.device) -> dict[str, str]:
    """Versions, machine, commit and command line."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"CPU ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
    modules = {"torch": torch, "torchvision": torchvision, "timm": timm, "numpy": np, "Pillow": PIL}
    versions = [f"{name} {module.__version__}" for name, module in modules.items()]
    if device.type == "cuda":
        versions.append(f"cuDNN {torch.backends.cudnn.version()}")
    return {
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "device": machine,
        "commit": describe_commit(),
        "command": shlex.join([*program(), *sys.argv[1:]]),
    }


def log_environment(device: torch.device) -> None:
    """Only on rank 0: others need not ask git."""
    if not distributed.is_main_process():
        return
    environment = describe_environment(device)
    logger.info("%s, %s", environment["versions"], environment["device"])
    logger.info("commit %s", environment["commit"])
    logger.info("command: %s", environment["command"])


def describe_commit() -> str:
    """The commit of this code; if tracked files were changed since, with a digest of the changes."""
    try:
        commit = ask_git("describe", "--always", "--dirty", "--abbrev=12").decode().strip()
        if commit.endswith("-dirty"):
            commit += f" (uncommitted changes {hashlib.sha256(uncommitted_changes()).hexdigest()[:12]})"
    except (OSError, subprocess.SubprocessError):
        return "unknown (git is missing, or this is not a git checkout)"
    return commit


def uncommitted_changes() -> bytes:
    """Those of tracked files, as `git apply` takes them. Raises OSError and SubprocessError."""
    return ask_git("diff", "HEAD", "--binary", "--no-ext-diff")


@functools.cache  # so that log, config.json and uncommitted.diff describe one moment
def ask_git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, timeout=10, check=True).stdout


def write_provenance(config: TrainingConfig, state: TrainingState) -> None:
    """Write config.json into the run's folder, and uncommitted.diff if the code differs from its commit (rank 0).

    config.json holds the `program`, `config` (every setting), `free` and `other_bits` (which of them change nothing in
    a resumed run, or no more than bits, and why), `data` (the fingerprint of every set of images), `environment`, and
    of a resumed run `earlier`: what differed before, with the number of optimizer steps that were done by then.

    Raises:
        OSError: the folder cannot be written to.
    """
    if not distributed.is_main_process():
        return
    folder = Path(config.output_dir)
    meaning = {field.name: field.metadata["on_resume"] for field in dataclasses.fields(config)}
    content = {
        "program": state.program,
        "config": dict(state.settings),
        "free": [name for name, change in meaning.items() if change == FREE],
        "other_bits": {name: change for name, change in meaning.items() if change},
        "data": state.data,
        "environment": describe_environment(torch.device(config.device)),
    }
    if state.progress.step:
        content["earlier"] = earlier_starts(folder / CONFIGURATION, content, state.progress.step)
    replace_file(folder / CONFIGURATION, json.dumps(content, indent=2).encode("utf-8", "surrogateescape") + b"\n")
    differs = "-dirty" in content["environment"]["commit"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if changes := uncommitted_changes() if differs else b"":
            replace_file(folder / CHANGES, changes)
        else:
            (folder / CHANGES).unlink(missing_ok=True)


def earlier_starts(path: Path, now: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """`earlier` of the config.json at `path`, and what the last start had that differs from `now`."""
    try:
        before = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        after = json.loads(json.dumps(now))
        found = {
            part: {name: value for name, value in before[part].items() if after[part].get(name) != value}
            for part in ("config", "data", "environment")
        }
        found["config"] = {name: value for name, value in found["config"].items() if name not in now["free"]}
        if found["environment"].keys() <= {"command"}:
            del found["environment"]
        found = {part: changed for part, changed in found.items() if changed}
        return [*before.get("earlier", []), *([{"until_step": step, **found}] if found else [])]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # nothing there, or another program's
        return []


def replace_file(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
