"""What commands that draw a pretraining checkpoint share: flags, the model, images and their reconstructions."""

import logging
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, TypeVar

import timm
import torch
from PIL import Image
from torch import Tensor

from models_mixmae import MixMAE
from util.data.custom_reader import extensions_of
from util.data.datasets import NumberedImages
from util.data.display import shown_channels
from util.data.open_source import open_images
from util.data.transforms import ResizeAndCentreCrop
from util.errors import UserError, unreadable_is_user_error
from util.layers.mixing import PARTNERS
from util.run.config import CheckpointFlags, DecodingFlags, with_settings
from util.run.flags import FRACTION, flag
from util.seeding import keyed_generator
from util.weights.file import CheckpointError
from util.weights.layouts import load_pretraining
from util.weights.settings import mixing_arguments, model_arguments, weight_settings
from util.weights.source import WeightsInfo, read_weights

logger = logging.getLogger(__name__)

OUTPUT_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
PREDICTED_UP_TO = (
    "The model predicts cells normalised by their own mean and contrast (norm_pix_loss). Both are taken from the "
    "original cell here: a cell's overall brightness and contrast are not predicted, its structure is."
)


@dataclass(frozen=True)
class PictureFlags(CheckpointFlags, DecodingFlags):
    TITLE: ClassVar[str] = "picture"

    images: tuple[str, ...] = flag(
        (), "image files, all of which are shown; or folders, lists and tars to draw from", "PATH",
        required="image files, a folder of images or a list of them",
    )  # fmt: skip
    out: str = flag("", "the picture to write", "FILE.png", required="the name of the picture to write")
    mask_ratio: float | None = flag(
        None, "share of the cells to hide (default: as in the run that made the weights, else 0.5)", "SHARE", FRACTION
    )
    channels: tuple[int, ...] | None = flag(None, "one or three channels to show, from 0 (default: the first)", "C")
    seed: int = flag(0, "seed of the images that are drawn and of the mask", "N")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out.lower().endswith(OUTPUT_EXTENSIONS):
            raise UserError(f"--out {self.out} must end in one of {', '.join(OUTPUT_EXTENSIONS)}")


P = TypeVar("P", bound=PictureFlags)


def load_model(given: P) -> tuple[MixMAE, P, str]:
    """The pretraining model of `--checkpoint`, the configuration completed by what is recorded with it, and where the
    model is from, in a few words.

    Raises:
        UserError: the weights cannot be used, have no decoder, or do not record which model they are; a mask ratio that
            leaves some image of a mixture no cell.
    """
    weights, info = read_weights(given.checkpoint)
    if "mask_token" not in weights:
        raise CheckpointError(
            f"{info} has no decoder, so it cannot reconstruct images (it was fine-tuned, or is only an "
            "encoder): give a checkpoint of main_pretrain.py"
        )
    settings = weight_settings(info.args, info.source, given.as_dict(), pretraining=True)
    variant = mixing_arguments(info.args) | {"range_mask_ratio": 0.0}  # --mask_ratio says how much to hide
    model = timm.create_model(settings.model, **variant, **model_arguments(settings))
    logger.info("%s", load_pretraining(model, weights, info))
    config = replace(with_settings(given, settings), mask_ratio=choose_mask_ratio(model, given.mask_ratio, info))
    origin = f"{info.args.get('model', config.model)}, {info.path.parent.name}/{info.path.name}"
    if info.epoch is not None:
        origin += f", after {info.epoch + 1} {'epochs' if info.epoch else 'epoch'}"
    return model.eval(), config, origin


def choose_mask_ratio(model: MixMAE, given: float | None, info: WeightsInfo) -> float:
    """What is given, else what is recorded with the weights, else 0.5; logs which.

    Raises:
        UserError: it leaves some image of a mixture no cell.
    """
    recorded, more = (info.args.get(name) for name in ("mask_ratio", "range_mask_ratio"))
    trained = "record no mask ratio" if recorded is None else f"were trained with {recorded:g}"
    trained += f" or up to {more:g} more" if more else ""
    ratio = given or recorded or 0.5
    logger.info("mask ratio %g, %s: the weights %s", ratio, "as given" if given else "not given", trained)
    cells, least = model.num_cells, model.mix_images - 1  # every partner takes the place of one
    hidden = int(cells * ratio)
    if hidden < least < cells:  # for images of too few cells the model's own error says what to do
        raise UserError(
            f"--mask_ratio {ratio:g} hides {hidden} of the {cells} cells of an image, at least {least} must be "
            f"hidden for a picture of this model: give --mask_ratio {math.ceil(1000 * least / cells) / 1000:g} or more"
        )
    return ratio


def check_output(config: PictureFlags) -> None:
    """Make the folder of `--out`, before images are read.

    Raises:
        UserError: it cannot be made; a picture that is one of `--images`; channels that the model does not have.
    """
    shown_channels(config.in_chans, config.channels)
    out = Path(os.path.realpath(config.out))
    if out.exists() and any(out.is_relative_to(os.path.realpath(place)) for place in config.images):
        raise UserError(f"--out {config.out} is one of --images, which it would replace: give another name")
    with unreadable_is_user_error(f"--out {config.out} cannot be written"):
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)


def choose_images(config: PictureFlags, number: int) -> tuple[NumberedImages, list[int]]:
    """The images that are given, and the numbers of those to show: all if files are named, else `number` at random.

    Raises:
        UserError: nothing there, unreadable, or fewer than a pair.
    """
    transform = ResizeAndCentreCrop(config.input_size, crop_ratio=1.0)
    dataset = NumberedImages(open_images(config.images, config), transform, config.seed)
    if len(dataset) < 2:
        raise UserError(f"the model takes images in pairs: at least 2 are needed, --images gives {len(dataset)}")
    chosen = list(range(len(dataset)))
    if not all(path.lower().endswith(extensions_of(config.reader)) for path in config.images):
        chosen = torch.randperm(len(dataset), generator=keyed_generator(config.seed, "images")).tolist()
        chosen = chosen[:number]
    return dataset, chosen


def write_picture(picture: Image.Image, out: str) -> None:
    """Write it into a folder that exists (`check_output`); raises UserError if it cannot be written."""
    with unreadable_is_user_error(f"--out {out} cannot be written"):
        picture.save(out)
    logger.info("wrote %s", out)


@torch.no_grad()
def reconstruct(model: MixMAE, imgs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mix, encode and reconstruct normalised images.

    A model trained with `norm_pix_loss` predicts every cell up to the cell's mean and contrast. These two numbers are
    taken from the original cell, so the picture shows structure that was predicted, in brightness that was not.

    Args:
        imgs: (B, C, H, W) normalised, B even (a multiple of the images in a mixture), on the model's device.
        mask: (L,) 0/1 over the cells.

    Returns:
        Normalised images, each (B, C, H, W).
        mixed: the image's own cells where the mask is 0, its partner's where it is 1. With another filling, what
            the model embeds there, zeros or the noise; for a mask token, which has no pixels, zeros.
        filled: the image's own cells where the mask is 0, predictions where it is 1.
        predicted: predictions everywhere, every cell from the branch in which it was hidden; of several, the first. A
            model that reconstructs one image of a mixture predicts only hidden cells: others stay.

    Raises:
        ValueError: for an odd batch, and for a mask that hides no or all cells.
    """
    mask = model.check_mask(mask)
    was_training, partner = model.training, model.partner
    model.eval()
    model.partner = PARTNERS["pairs"]  # rows show tuples, however the images of a batch were mixed in training
    embedded = []  # the images, and with some fillings what takes the place of their hidden cells
    hook = model.patch_embed.register_forward_hook(lambda module, inputs, output: embedded.append(inputs[0]))
    try:
        # The same noise in every picture, and a run goes on as if nothing had been drawn.
        with torch.random.fork_rng([imgs.device] if imgs.is_cuda else []):
            torch.manual_seed(0)
            pred = model.forward_decoder(model.forward_encoder(imgs, mask), mask).float()
        return assemble(model, imgs, mask, pred[: len(imgs)], embedded[1] if len(embedded) > 1 else None)
    finally:
        hook.remove()
        model.train(was_training)
        model.partner = partner


def assemble(
    model: MixMAE, imgs: Tensor, mask: Tensor, pred: Tensor, filling: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `reconstruct` returns, from the decoder's output (B, L, s*s*C) and what is embedded in place of hidden cells
    (B or 1, C, H, W)."""
    cells = model.patchify(imgs)
    if model.norm_pix_loss:
        mean, std = model.cell_statistics(cells)
        pred = pred * std + mean
    mask = mask.to(imgs.device)[:, None]  # (L, 1)
    mixed = cells
    if model.fill != "partner":
        mixed = torch.where(mask == 0, cells, 0 if filling is None else model.patchify(filling))
    for k in range(1, model.mix_images if model.fill == "partner" else 0):
        mixed = torch.where(mask == k, model.partner(cells, k, model.mix_images), mixed)
    filled = torch.where(mask == 0, cells, pred)
    predicted = pred if model.num_branches > 1 else filled
    return model.unpatchify(mixed), model.unpatchify(filled), model.unpatchify(predicted)
