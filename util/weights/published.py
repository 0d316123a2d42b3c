"""Where weights come from: files, https links with a hash, and the checkpoints published with the paper, by name."""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from util.weights.file import CheckpointError, file_hash, read_checkpoint
from util.weights.layouts import load_classifier, load_encoder, normalise_state_dict


@dataclass(frozen=True)
class Published:
    """A checkpoint of the authors' table. Its hash is not published: a download is checked by names and shapes."""

    drive_id: str  # Google Drive
    model: str  # the encoder that it fits, by its timm name
    classifier: bool  # fine-tuned, with a head of 1000 classes

    @property
    def link(self) -> str:
        return f"https://drive.google.com/file/d/{self.drive_id}/view"


PUBLISHED = {
    "base_600ep": Published("1pZYmTv08xK_kOe2kk6ahuvgJVkHm-ZIa", "swin_base_w14", False),
    "base_600ep_ft": Published("1zkOyh8jnFW7iYG3sOfp6LLG5wu4VbiXb", "swin_base_w14", True),
    "base_600ep_ft_384x384": Published("1MIng19USn5T770YZ6mFfqTgNCCz_kEGL", "swin_base_w16_384", True),
    "large_600ep": Published("1dM8Lu2nVEukxPwn7PLmDmRAYwQV59ttx", "swin_large_w14", False),
    "large_600ep_ft": Published("1b1BxGAewK1ICxxCEwF24YEDSjlQ9Ts9n", "swin_large_w14", True),
    "large_600ep_ft_384x384": Published("1_IfqoQvAe2Z2jC7HBKi3umKD6c8qOu0P", "swin_large_w16_384", True),
}


def locate(source: str) -> Path:
    """The local file that `source` names, downloaded where need be.

    Args:
        source: a path, a name of `PUBLISHED`, or an https link with its hash (see `locate_link`).

    Raises:
        CheckpointError: there is no such file, or it could not be downloaded; says what to do.
    """
    if "://" in source:
        return locate_link(source)
    if source in PUBLISHED and not os.path.exists(source):
        return locate_published(source)
    if not os.path.exists(source):
        raise CheckpointError(
            f"{source} is neither a file nor a published checkpoint; the published ones are {', '.join(PUBLISHED)}"
        )
    return Path(source)


def cache_folder() -> Path:
    """Where downloads are kept: PyTorch's own folder, which $TORCH_HOME moves."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def locate_published(name: str) -> Path:
    """The file of a published checkpoint, from the cache or from Google Drive by the optional `gdown`."""
    published = PUBLISHED[name]
    path = cache_folder() / f"mixmae_{name}.pth"
    by_hand = f"download {published.link} in a browser and put the file at {path}"
    if path.exists():  # whole, since a download appears by being renamed
        return path
    with _one_process_at_a_time(path):
        if path.exists():
            return path
        try:
            import gdown
        except ImportError as error:
            raise CheckpointError(
                f"the checkpoint {name} is not on this machine: `pip install gdown` to have it fetched, or {by_hand}"
            ) from error
        partial = path.with_suffix(".partial")
        try:
            gdown.download(id=published.drive_id, output=str(partial))
            _check_published(partial, name)
            os.replace(partial, path)
        except CheckpointError as error:
            raise CheckpointError(f"the download of {name} is not that checkpoint: {error}; {by_hand}") from error
        except Exception as error:  # gdown raises what its own libraries raise
            raise CheckpointError(f"the checkpoint {name} could not be downloaded ({error}): {by_hand}") from error
        finally:
            partial.unlink(missing_ok=True)
    return path


def _check_published(path: Path, name: str) -> None:
    """CheckpointError unless the file's tensors have the names and shapes of the model that `name` stands for."""
    import timm

    import models_swin  # noqa: F401  registers the encoders with timm

    state_dict, _ = normalise_state_dict(read_checkpoint(path, mmap=True), path)
    load = load_classifier if PUBLISHED[name].classifier else load_encoder
    load(timm.create_model(PUBLISHED[name].model), state_dict, path)


def locate_link(link: str) -> Path:
    """The file behind an https link, from the cache or downloaded, with its SHA-256 verified either way.

    The hash, of 8 digits or more, is given as `https://.../file.pth#sha256=<hex>`, or ends the file's name as in
    PyTorch's and OpenMMLab's links: `.../mixmim-base-e40e2c8c.pth`.
    """
    address, _, fragment = link.partition("#")
    file_name = address.partition("?")[0].rsplit("/", 1)[-1]
    given = re.fullmatch(r"sha256=([0-9a-fA-F]{8,64})", fragment) or re.search(
        r"-([0-9a-f]{8,64})\.\w+$", file_name if not fragment else ""
    )
    if not link.startswith("https://"):
        raise CheckpointError(f"{link}: only https:// links are downloaded; fetch the file and give its path")
    if given is None:
        raise CheckpointError(
            f"{link}: a link needs the file's hash, so that nothing else is loaded: add #sha256=<hex>, the output of "
            "`sha256sum` on the file or what its publisher states"
        )
    expected = given[1].lower()
    path = cache_folder() / f"{expected[:8]}-{re.sub(r'[^A-Za-z0-9._-]', '_', file_name) or 'weights.pth'}"
    if not path.exists():  # it appears whole, by being renamed
        with _one_process_at_a_time(path):
            if path.exists():
                return path
            try:
                torch.hub.download_url_to_file(address, str(path), hash_prefix=expected, progress=False)
            except (OSError, RuntimeError) as error:
                raise CheckpointError(
                    f"{address} could not be downloaded: {error}. Or fetch the file yourself and put it at {path}"
                ) from error
    elif not file_hash(path).startswith(expected):
        raise CheckpointError(f"{path} no longer has the hash {expected}: delete it to download it again")
    return path


@contextlib.contextmanager
def _one_process_at_a_time(path: Path):
    """Let one process of a machine (of all ranks that start at once) download `path` while the others wait for it."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
