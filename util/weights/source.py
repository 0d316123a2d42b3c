"""Where weights come from: files, https links with a hash, and the published checkpoints, by name."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from filelock import FileLock
from torch import Tensor

from util.weights.file import CheckpointError, file_hash, read_checkpoint, temporary_path
from util.weights.layouts import load_classifier, load_encoder, normalise_state_dict
from util.weights.settings import ENCODERS, SIZES


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

    Derived tensors (`relative_position_index`, `attn_mask`) are left out, wrappers' prefixes (`module.`) are removed
    and mmpretrain's MixMIM names and patch-merging order are converted. Tensors stay in the file until they are used.

    Args:
        source: a file; the name of a published checkpoint (`base_600ep`, see `PUBLISHED`); or an
            `https://` link with its hash: `https://.../file.pth#sha256=<hex>`, or a name that ends in `-<hex>.pth`.
        ema: take the averaged weights, ours (kept by `--model_ema`) or those of timm's training script.
        verify: check all bytes first, by their checksums. False if that has been done already.

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

    None in files of other programs, and older ones of this program. Raises CheckpointError unless names are distinct.
    """
    classes = checkpoint.get("classes") if checkpoint.get("format") is not None else None
    if classes is None:
        return None
    named = isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)
    if not named or len(set(classes)) != len(classes):
        raise CheckpointError(f"{source} records classes={str(classes)[:200]}, which are not distinct names")
    return list(classes)


# --- Published checkpoints, and links ---


@dataclass(frozen=True)
class Published:
    """A published checkpoint: from the authors' table on Google Drive, or behind a link whose name ends in its hash.

    The authors published no hashes: their downloads are checked by names and shapes.
    """

    drive_id: str  # '' for a link
    model: str  # that it fits: a pretraining model, or a classifier of 1000 classes
    url: str = ""

    @property
    def link(self) -> str:
        return self.url or f"https://drive.google.com/file/d/{self.drive_id}/view"


MMSELFSUP = "https://download.openmmlab.com/mmselfsup/1.x/mixmim/mixmim-base-p16_16xb128-coslr-300e_in1k"
MIXMIM_BASE = f"{MMSELFSUP}/mixmim-base-p16_16xb128-coslr-300e_in1k_20221208-44fe8d2c.pth"
MIXMIM_BASE_FT = "mixmim-base-p16_ft-8xb128-coslr-100e_in1k"
MIXMIM_BASE_FT = f"{MMSELFSUP}/{MIXMIM_BASE_FT}/{MIXMIM_BASE_FT}_20221208-41ecada9.pth"
PUBLISHED = {
    "base_600ep": Published("1pZYmTv08xK_kOe2kk6ahuvgJVkHm-ZIa", "mixmae_base"),
    "base_600ep_ft": Published("1zkOyh8jnFW7iYG3sOfp6LLG5wu4VbiXb", "swin_base_w14"),
    "base_600ep_ft_384x384": Published("1MIng19USn5T770YZ6mFfqTgNCCz_kEGL", "swin_base_w16_384"),
    "large_600ep": Published("1dM8Lu2nVEukxPwn7PLmDmRAYwQV59ttx", "mixmae_large"),
    "large_600ep_ft": Published("1b1BxGAewK1ICxxCEwF24YEDSjlQ9Ts9n", "swin_large_w14"),
    "large_600ep_ft_384x384": Published("1_IfqoQvAe2Z2jC7HBKi3umKD6c8qOu0P", "swin_large_w16_384"),
    # Trained by mmpretrain: 300 epochs, and 100 of fine-tuning, which by its own account give 84.63 top-1.
    "mixmim_base_300ep": Published("", "mixmae_base", MIXMIM_BASE),
    "mixmim_base_300ep_ft": Published("", "swin_base_w14", MIXMIM_BASE_FT),
}


def locate(source: str, verify: bool = True) -> tuple[Path, bool]:
    """The local file behind a path, a name of `PUBLISHED` or an https link with its hash, downloaded if need be.

    Args:
        source: what the user gave.
        verify: compare the file behind a link with the link's hash. False if that has been done already.

    Returns:
        The file, and whether its bytes are known to be right: those behind a link are.

    Raises:
        CheckpointError: there is no such file, or it could not be downloaded.
    """
    if "://" in source:
        return locate_link(source, verify), True
    if os.path.exists(source):
        in_folder = Path(source, "model.safetensors")  # as on the Hugging Face hub
        return (in_folder if in_folder.is_file() else Path(source)), False
    if source in PUBLISHED and PUBLISHED[source].url:
        return locate_link(PUBLISHED[source].url, verify), True
    if source in PUBLISHED:
        return locate_published(source), False
    raise CheckpointError(
        f"{source} is neither a file nor a published checkpoint; the published ones are {', '.join(PUBLISHED)}"
    )


def locate_published(name: str) -> Path:
    """The file of one of the authors' checkpoints, from the cache or from Google Drive with the optional `gdown`."""
    published = PUBLISHED[name]
    path = cache_folder() / f"mixmae_{name}.pth"
    by_hand = f"download {published.link} in a browser and put the file at {path}"

    def download(target: Path) -> None:
        import gdown

        gdown.download(id=published.drive_id, output=str(target))
        state_dict = normalise_state_dict(read_checkpoint(target, mmap=True), target)
        load = load_encoder if published.model in ENCODERS else load_classifier
        model = timm.create_model(ENCODERS.get(published.model, published.model))
        load(model, state_dict, target)  # refuses other names and shapes

    try:
        return _downloaded_once(path, download)
    except ImportError as error:
        raise CheckpointError(
            f"the checkpoint {name} is not on this machine: `pip install gdown` to have it fetched, or {by_hand}"
        ) from error
    except CheckpointError as error:
        raise CheckpointError(f"the download of {name} is not that checkpoint: {error}; {by_hand}") from error
    except Exception as error:  # gdown raises what its own libraries raise
        raise CheckpointError(f"the checkpoint {name} could not be downloaded ({error}): {by_hand}") from error


def locate_link(link: str, verify: bool = True) -> Path:
    """The file behind an https link, from the cache or downloaded; with `verify`, its SHA-256 is checked either way.

    The hash, of 8 digits or more, is given as `https://.../file.pth#sha256=<hex>`, or ends the file's name as in
    PyTorch's and OpenMMLab's links: `.../mixmim-base-e40e2c8c.pth`.
    """
    address, _, fragment = link.partition("#")
    file_name = address.partition("?")[0].rsplit("/", 1)[-1]
    if fragment:
        given = re.fullmatch(r"sha256=([0-9a-fA-F]{8,64})", fragment)
    else:
        given = re.search(r"-([0-9a-f]{8,64})\.\w+$", file_name)
    if not link.startswith("https://"):
        raise CheckpointError(f"{link}: only https:// links are downloaded; fetch the file and give its path")
    if given is None:
        raise CheckpointError(
            f"{link}: a link needs the file's hash, so that nothing else is loaded: add #sha256=<hex>, the output of "
            "`sha256sum` on the file or what its publisher states"
        )
    expected = given[1].lower()
    path = cache_folder() / f"{expected[:8]}-{re.sub(r'[^A-Za-z0-9._-]', '_', file_name) or 'weights.pth'}"

    def download(target: Path) -> None:
        torch.hub.download_url_to_file(address, str(target), hash_prefix=expected, progress=sys.stderr.isatty())

    try:
        _downloaded_once(path, download)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{address} could not be downloaded: {error}. Or fetch the file yourself and put it at {path}"
        ) from error
    if verify and not file_hash(path).startswith(expected):
        raise CheckpointError(f"{path} no longer has the hash {expected}: delete it to download it again")
    return path


def cache_folder() -> Path:
    """Where downloads are kept: PyTorch's own folder, which $TORCH_HOME moves."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _downloaded_once(path: Path, download: Callable[[Path], None]) -> Path:
    """`path`, made by `download(target)` if it is not there: by one process on a machine while the others wait.

    `target` takes the name `path` when it is complete, so the file is used without a lock, also in a read-only folder.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                target = temporary_path(path)
                try:
                    download(target)
                    os.replace(target, path)
                finally:
                    target.unlink(missing_ok=True)
    return path
