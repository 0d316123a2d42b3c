"""What must happen before PyTorch is imported; mains and commands import this first.

Idle threads sleep: by default OpenMP's spin while they wait for work, which takes the cores from processes that
have work (data loading, other ranks, other people's). The setting is read when the library is loaded.

Ctrl-C ends the program in one line, from its first import on; a training run takes over the signal once it can save.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]


def program() -> list[str]:
    """The start of this process's command line, such that any copy of the repository starts its own program."""
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT / "exp"):  # as a module, or it would not find the repository
        return ["-m", ".".join(script.relative_to(ROOT).with_suffix("").parts)]
    return [script.name] if script.parent == ROOT else sys.argv[:1]


def on_interrupt(_signum: int, _frame: FrameType | None) -> NoReturn:
    os.write(2, f"\n{Path(sys.argv[0]).name}: interrupted\n".encode())
    os._exit(128 + signal.SIGINT)  # at once: Python's shutdown would report what it interrupts


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_folder = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve().parent
if _folder in (ROOT, ROOT / "util") or _folder.parent == ROOT / "exp":
    signal.signal(signal.SIGINT, on_interrupt)  # not in a program that only uses us
