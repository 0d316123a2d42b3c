"""Weights by whatever names them: a file, a published name or a link."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from util.weights.file import CheckpointError, read_checkpoint
from util.weights.layouts import normalise_state_dict
from util.weights.published import locate


@dataclass
class WeightsInfo:
    """Where weights came from.

    source: as the user gave it. path: the file that was read. layout: 'mixmae' (the authors' names, which are ours) or
    'mmpretrain'. args: the recorded configuration, {} where the file has none. epoch: the recorded epoch or None.
    """

    source: str
    path: Path
    layout: str
    args: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None

    def __str__(self) -> str:
        return self.source


def read_weights(source: str | os.PathLike, ema: bool = False) -> tuple[dict[str, Tensor], WeightsInfo]:
    """The weights that `source` names, under the names that the authors' checkpoints use, and where they came from.

    Args:
        source: a file; the name of a published checkpoint (`base_600ep`, see `util.weights.published.PUBLISHED`); or an
            `https://` link with its hash: `https://.../file.pth#sha256=<hex>`, or a name that ends in `-<hex>.pth`.

        ema: take the averaged weights that `--model_ema` keeps, where the file has them.

    Derived tensors (`relative_position_index`, `attn_mask`) are left out, wrappers' prefixes (`module.`) are taken off
    and mmpretrain's MixMIM names and patch-merging order are converted.

    Raises:
        CheckpointError: nothing there, damaged, unsafe, or no weights in it.
    """
    path = locate(os.fspath(source))
    checkpoint = read_checkpoint(path, mmap=True)
    if ema:
        if "model_ema" not in checkpoint:
            raise CheckpointError(f"{path} holds no averaged weights: leave out --model_ema to use its plain ones")
        checkpoint["model"] = checkpoint["model_ema"]
    state_dict, layout = normalise_state_dict(checkpoint, path)
    args = checkpoint.get("args")
    epoch = checkpoint.get("epoch")
    return state_dict, WeightsInfo(
        source=os.fspath(source),
        path=path,
        layout=layout,
        args=args if isinstance(args, dict) else {},
        epoch=epoch if isinstance(epoch, int) else None,
    )
