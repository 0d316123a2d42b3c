"""Validation images that are training images too: of them a classifier knows the answers."""

import filecmp
import os

import numpy as np

from util.data.sources import FileSource, Source

LOOKED_AT = 200  # images of a folder; the names in lists are all compared


def shared_with_training(train: Source, val: Source) -> tuple[int, int]:
    """How many images of `val` are in `train` too, and how many were looked at; (0, 0) where they are no files.

    Found are the same files, and in folders files of the same name and content; not copies under other names, for
    which all files would have to be read (`python -m util.check_data` does).
    """
    if not isinstance(train, FileSource) or not isinstance(val, FileSource):
        return 0, 0
    if not train.numbered and train.index.root == val.index.root:  # one folder: given twice, or divided by --val_share
        return (len(val) if train.fingerprint == val.fingerprint else 0), len(val)
    if train.numbered:
        paths = {os.path.normpath(train.path(i)) for i in range(len(train))}
        return sum(os.path.normpath(val.path(i)) in paths for i in range(len(val))), len(val)
    chosen = np.unique(np.linspace(0, len(val) - 1, min(len(val), LOOKED_AT), dtype=int))
    return sum(_is_copy(val.path(i), os.path.join(train.index.root, val.index.names[i])) for i in chosen), len(chosen)


def _is_copy(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other) or filecmp.cmp(path, other, shallow=False)
    except OSError:  # there is no other
        return False
