"""Calling the mains from tests, and the small data they train on."""

import functools
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

QUICK = ["--device", "cpu", "--num_workers", "0", "--warmup_epochs", "1", "--print_freq", "1", "--vis_every", "0"]


def make_images(folder: Path, count: int, size: tuple[int, int] = (32, 32), channels: int = 1, seed: int = 0) -> None:
    """Smooth random images with `channels` channels: PNG for 1 and 3, else .npy."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        coarse = generator.integers(0, 256, (4, 4, channels), dtype=np.uint8)
        pixels = coarse.repeat(-(-size[0] // 4), 0).repeat(-(-size[1] // 4), 1)[: size[0], : size[1]]
        if channels in (1, 3):
            Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels).save(folder / f"{i:04d}.png")
        else:
            np.save(folder / f"{i:04d}.npy", pixels)


def run(module, *flags: str) -> None:
    """Run `main_pretrain` or `main_finetune` in this process."""
    try:
        module.main(module.get_args_parser().parse_args([str(flag) for flag in flags]))
    finally:
        logging.getLogger().handlers.clear()


def fails(module, capfd, message: str, *flags: str) -> None:
    """The main ends with exit code 2 and one line that matches `message`, before training."""
    with pytest.raises(SystemExit) as stopped:
        run(module, *flags)
    said = capfd.readouterr().err
    assert stopped.value.code == 2
    assert re.search(message, said), said
    assert "Traceback" not in said


def in_a_fork(test: Callable[..., None]) -> Callable[..., None]:
    """A test in a process of its own: of threads that PyTorch starts in this one, later tests could not fork."""

    @functools.wraps(test)
    def wrapper(*args, **kwargs) -> None:
        process = os.fork()
        if not process:
            code = 1
            try:
                torch.set_num_threads(1)
                test(*args, **kwargs)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0

    return wrapper


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(output_dir: Path) -> list[float]:
    """The loss of every optimizer step of a run."""
    return [record["loss"] for record in read_lines(output_dir / "steps.jsonl")]
