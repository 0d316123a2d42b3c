"""Weights by whatever names them: a file, a published name or a link."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from util.weights.file import CheckpointError, read_checkpoint
from util.weights.layouts import normalise_state_dict
from util.weights.published import PUBLISHED, locate
from util.weights.settings import SIZES


@dataclass
class WeightsInfo:
    """Where weights came from; `str(info)` is the name that the user gave them."""

    source: str
    path: Path  # the file that was read
    args: dict[str, Any] = field(default_factory=dict)  # the recorded configuration, if there is one
    epoch: int | None = None  # the recorded epoch, if there is one
    classes: list[str] | None = None  # the recorded names of a classifier's classes, if there are any
    data: dict[str, Any] = field(default_factory=dict)  # the recorded fingerprints of its images

    def __str__(self) -> str:
        return self.source


def read_weights(
    source: str | os.PathLike, ema: bool = False, verify: bool = True
) -> tuple[dict[str, Tensor], WeightsInfo]:
    """The weights that `source` names, under the names that the authors' checkpoints use, and where they came from.

    Derived tensors (`relative_position_index`, `attn_mask`) are left out, wrappers' prefixes (`module.`) are taken off
    and mmpretrain's MixMIM names and patch-merging order are converted. Tensors stay in the file until they are used.

    Args:
        source: a file; the name of a published checkpoint (`base_600ep`, see `util.weights.published.PUBLISHED`); or an
            `https://` link with its hash: `https://.../file.pth#sha256=<hex>`, or a name that ends in `-<hex>.pth`.
        ema: take the averaged weights, ours (kept by `--model_ema`) or those of timm's training script.
        verify: read all bytes first, by their checksums. False where that has been done already.

    Raises:
        CheckpointError: nothing there, damaged, unsafe, or no (averaged) weights in it.
    """
    source = os.fspath(source)
    path, known_to_be_right = locate(source, verify)
    checkpoint = read_checkpoint(path, mmap=True, verify=verify and not known_to_be_right)
    state_dict = normalise_state_dict(checkpoint, path, ema)
    args, epoch, data = checkpoint.get("args"), checkpoint.get("epoch"), checkpoint.get("data")
    args = args if isinstance(args, dict) else {}
    if source in PUBLISHED and not os.path.exists(source):  # known better than the file may record it
        args = {name: value for name, value in args.items() if name not in SIZES} | {"model": PUBLISHED[source].model}
    return state_dict, WeightsInfo(
        source=source,
        path=path,
        args=args,
        epoch=epoch if isinstance(epoch, int) else None,
        classes=recorded_classes(checkpoint, source),
        data=data if isinstance(data, dict) else {},
    )


def recorded_classes(checkpoint: dict[str, Any], source: object) -> list[str] | None:
    """The names of the classes that a checkpoint of a classifier records, in the order of the head's rows.

    None in files of other programs, and older ones of this program. Raises CheckpointError for what are no names.
    """
    classes = checkpoint.get("classes") if checkpoint.get("format") is not None else None
    if classes is None:
        return None
    named = isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)
    if not named or len(set(classes)) != len(classes):
        raise CheckpointError(f"{source} records classes={str(classes)[:200]}, which are no different names")
    return list(classes)
