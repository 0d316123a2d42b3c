"""Pictures of what a pretraining checkpoint does with images.

    python -m util.visualize --checkpoint output_dir/checkpoint.pth --images /path/to/images --out picture.png

Every row shows an image, the mixture that the encoder sees, the image with its hidden cells filled in, and the image
predicted as a whole. Rows come in pairs, since images are mixed in pairs.
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import logging
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor

from models_mixmae import MixMAE
from util.data.datasets import NumberedImages
from util.data.display import Display, shown_channels
from util.data.reader import extensions_of
from util.data.sources import open_images
from util.data.transforms import Normalize, ResizeAndCentreCrop
from util.errors import UserError, unreadable_is_user_error
from util.run.config import CheckpointFlags, DecodingFlags, with_settings
from util.run.failures import user_errors
from util.run.flags import flag, get_parser, given_flags
from util.run.logger import setup_logging
from util.seeding import keyed_generator
from util.weights.file import CheckpointError
from util.weights.layouts import load_pretraining
from util.weights.settings import mixing_arguments, model_arguments, weight_settings
from util.weights.source import WeightsInfo, read_weights

logger = logging.getLogger(__name__)

OUTPUT_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")

# Sizes in pixels
WIDTH, LEFT, HEAD = 1416, 112, 276  # of the picture; where images start, from its left and from its top
IMAGE_SIDE = 288  # longer side of every image shown
COLUMN_GAP, ROW_GAP, PAIR_GAP = 32, 16, 48
OUTLINE = 3
TEXT, SMALL, LINE = 17, 15, 24  # font sizes, and from one line of the caption to the next
LINE_LENGTH = 148  # characters in a line of the caption

INK, MUTED, HAIRLINE, LIGHT = "#1d2129", "#667080", "#d9dde3", "#f1f3f5"
COLOURS = {"A": "#2f7fe8", "B": "#f0821e"}  # told apart by every kind of colour vision, and on black and on white

INTRODUCTION = (
    "Images are mixed in pairs, cell by cell. The encoder attends within each image only; "
    "the decoder predicts what was hidden of both."
)
COLUMNS = (
    ("Original", "two images, A and B"),
    ("Mixed input", "all that the encoder sees"),
    ("Hidden cells filled in", "own cells kept, the others predicted"),
    ("Every cell predicted", "each from the mixture that hid it"),
)
LEGEND = (
    ("pixels of image A", COLOURS["A"]),
    ("pixels of image B", COLOURS["B"]),
    ("no outline: predicted pixels", LIGHT),
)


@torch.no_grad()
def reconstruct(model: MixMAE, imgs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mix, encode and reconstruct normalised images.

    A model trained with `norm_pix_loss` predicts every cell up to the cell's mean and contrast. These two numbers are
    taken from the original cell, so the picture shows structure that was predicted, in brightness that was not.

    Args:
        imgs: (B, C, H, W) normalised, B even, on the model's device.
        mask: (L,) 0/1 over the cells.

    Returns:
        Normalised images, each (B, C, H, W).
        mixed: the image's own cells where the mask is 0, its partner's where it is 1.
        filled: the image's own cells where the mask is 0, predictions where it is 1.
        predicted: predictions everywhere, every cell from the branch in which it was hidden.

    Raises:
        ValueError: for an odd batch, and for a mask that hides no or all cells.
    """
    mask = model.check_mask(mask)
    was_training = model.training
    model.eval()
    try:
        pred = model.forward_decoder(model.forward_encoder(imgs, mask), mask).float()  # (B, L, s*s*C)
    finally:
        model.train(was_training)
    cells = model.patchify(imgs)
    if model.norm_pix_loss:
        mean, std = model.cell_statistics(cells)
        pred = pred * std + mean
    hidden = mask.bool().to(imgs.device)[:, None]  # (L, 1)
    mixed = torch.where(hidden, cells.flip(0), cells)
    filled = torch.where(hidden, pred, cells)
    return model.unpatchify(mixed), model.unpatchify(filled), model.unpatchify(pred)


def reconstruction_figure(
    model: MixMAE,
    imgs: Tensor,
    mask: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    channels: Sequence[int] | None = None,
    source: str = "",
) -> Image.Image:
    """The picture for a batch: a row for each image, partners below each other.

    Args:
        model: in any mode and on any device; left as it was.
        imgs: (B, C, H, W) normalised, B even: image i is mixed with image B-1-i.
        mask: (L,) 0/1 over the cells.
        mean, std: what the images were normalised with, per channel.
        channels: one or three channels to show (default: the first).
        source: where model and images come from, for the caption.

    Raises:
        ValueError: for an odd batch, a mask that hides no or all cells, and channels that do not exist.
    """
    in_chans = imgs.shape[1]
    display = Display(imgs, mean, std, shown_channels(in_chans, channels))
    columns = [display(column) for column in (imgs, *reconstruct(model, imgs, mask))]
    hidden = model.check_mask(mask).bool().view(model.grid_size)
    caption = (
        f"{int(hidden.sum())} of the {hidden.numel()} cells of every image are hidden: its partner's take their place. "
    )
    if model.norm_pix_loss:
        caption += (
            "The model predicts cells normalised by their own mean and contrast (norm_pix_loss). Both are taken from "
            "the original cell here: a cell's overall brightness and contrast are not predicted, its structure is. "
        )
    return draw_page(columns, hidden, caption + " ".join(display.caption(in_chans)), source)


def draw_page(columns: list[np.ndarray], hidden: Tensor, caption: str, source: str) -> Image.Image:
    """The columns of images, each (B, H, W, 3), on one page; `hidden` is the mask over the cells (rows, columns)."""
    # Here, since every rank of a training run imports this module, and one draws.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    width, height = shown_size(columns[0])
    column_pitch, pair_pitch = max(width, IMAGE_SIDE) + COLUMN_GAP, 2 * height + ROW_GAP + PAIR_GAP
    num_pairs = len(columns[0]) // 2
    caption_lines = textwrap.wrap(caption, LINE_LENGTH)
    caption_top = HEAD + num_pairs * pair_pitch + 4
    total_height = caption_top + (len(caption_lines) + bool(source)) * LINE + 20

    figure = Figure((WIDTH / 72, total_height / 72), dpi=72)  # so that points are pixels
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(total_height, 0))  # pixels from the top left
    axes.axis("off")
    write = partial(axes.text, color=INK, va="baseline", parse_math=False)
    write(LEFT, 84, "MixMAE", size=36)
    write(LEFT, 122, INTRODUCTION, size=TEXT, color=MUTED)
    for number, (meaning, colour) in enumerate(LEGEND):
        left, top = LEFT + number * 220, 142
        axes.add_patch(Rectangle((left, top), 21, 21, facecolor=LIGHT, edgecolor=colour, linewidth=OUTLINE))
        write(left + 33, top + 11, meaning, size=TEXT, va="center_baseline")
    for number, (heading, explanation) in enumerate(COLUMNS):
        write(LEFT + number * column_pitch, HEAD - 56, heading, size=22)
        write(LEFT + number * column_pitch, HEAD - 29, explanation, size=SMALL, color=MUTED)
    around, visible, replaced = (outline(region, (height, width)) for region in (hidden | True, ~hidden, hidden))
    for pair in range(num_pairs):
        tops = {"A": HEAD + pair * pair_pitch, "B": HEAD + pair * pair_pitch + height + ROW_GAP}
        axes.plot((74, 74), [top + height / 2 for top in tops.values()], color=HAIRLINE, linewidth=2)
        for own, partner, index in (("A", "B", pair), ("B", "A", -1 - pair)):
            middle = tops[own] + height / 2
            axes.plot(74, middle, "o", color=COLOURS[own], markersize=44, markeredgecolor="white", markeredgewidth=8)
            write(74, middle, own, size=TEXT, color="white", ha="center", va="center_baseline")
            outlines = [{own: around}, {own: visible, partner: replaced}, {own: visible}, {}]
            for number, (images, named_lines) in enumerate(zip(columns, outlines)):
                image = enlarge(images[index], (width, height))
                for name, lines in named_lines.items():
                    image[lines] = ImageColor.getrgb(COLOURS[name])
                left, top = LEFT + number * column_pitch, tops[own]
                axes.imshow(image, extent=(left, left + width, top + height, top), aspect="auto", interpolation="none")
    for number, line in enumerate(caption_lines):
        write(LEFT, caption_top + number * LINE, line, size=SMALL)
    write(LEFT, caption_top + len(caption_lines) * LINE, source, size=SMALL, color=MUTED)

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def shown_size(images: np.ndarray) -> tuple[int, int]:
    """(width, height) at which to show images (B, H, W, 3); small ones are enlarged by a whole factor, to blocks."""
    factor = IMAGE_SIDE / max(images.shape[1:3])
    factor = int(factor) if factor >= 3 else factor
    return max(1, round(images.shape[2] * factor)), max(1, round(images.shape[1] * factor))


def enlarge(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image (H, W, 3) at `size` (width, height): its pixels as blocks where the factor is whole, else smoothly."""
    method = Image.Resampling.LANCZOS if size[0] % image.shape[1] else Image.Resampling.NEAREST
    return np.array(Image.fromarray(image).resize(size, method))


def outline(region: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Cells (rows, columns) -> pixels (H, W) that are True along the contours of the True cells, just inside them."""
    inside = F.interpolate(region[None, None].float(), size)
    outside = F.pad(1 - inside, (OUTLINE,) * 4, value=1)
    near_outside = F.max_pool2d(outside, 2 * OUTLINE + 1, stride=1)
    return (inside * near_outside)[0, 0].bool().numpy()


# --- The command ---


@dataclass(frozen=True)
class VisualizeConfig(CheckpointFlags, DecodingFlags):
    TITLE: ClassVar[str] = "picture"

    images: tuple[str, ...] = flag(
        (), "image files, all of which are shown; or folders, lists and tars to draw from", "PATH",
        required="image files, a folder of images or a list of them",
    )  # fmt: skip
    out: str = flag("", "the picture to write", "FILE.png", required="the name of the picture to write")
    num_images: int = flag(
        8, "how many to draw from folders, lists and tars", "N",
        (lambda value: value >= 2, "must be at least 2, since images are mixed in pairs"),
    )  # fmt: skip
    mask_ratio: float = flag(0.5, "share of the cells to hide", "SHARE")
    channels: tuple[int, ...] | None = flag(None, "one or three channels to show, from 0 (default: the first)", "C")
    seed: int = flag(0, "draws the images and the mask", "N")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out.lower().endswith(OUTPUT_EXTENSIONS):
            raise UserError(f"--out {self.out} must end in one of {', '.join(OUTPUT_EXTENSIONS)}")


def get_args_parser() -> argparse.ArgumentParser:
    description = "Draw a picture of how a pretraining checkpoint mixes and reconstructs images."
    return get_parser(VisualizeConfig, description, "python -m util.visualize")


def load_model(given: VisualizeConfig) -> tuple[MixMAE, VisualizeConfig, WeightsInfo]:
    """The pretraining model of `--checkpoint`, the configuration completed by what is recorded with it, and its origin.

    Raises:
        UserError: the weights cannot be used, have no decoder, or do not say which model they are.
    """
    weights, info = read_weights(given.checkpoint)
    if "mask_token" not in weights:
        raise CheckpointError(
            f"{info} has no decoder, so it cannot reconstruct images (it was fine-tuned, or is an encoder "
            "alone): give a checkpoint of main_pretrain.py"
        )
    settings = weight_settings(info.args, info.source, given.as_dict(), pretraining=True)
    model = timm.create_model(settings.model, **mixing_arguments(info.args), **model_arguments(settings))
    logger.info("%s", load_pretraining(model, weights, info))
    return model.eval(), with_settings(given, settings), info


def choose_images(config: VisualizeConfig) -> tuple[NumberedImages, list[int]]:
    """The images that are given, and the numbers of those to show: all if files are named, else a random draw.

    Raises:
        UserError: nothing there, unreadable, or fewer than a pair.
    """
    transform = ResizeAndCentreCrop(config.input_size, crop_ratio=1.0)
    dataset = NumberedImages(open_images(config.images, config), transform, config.seed)
    if len(dataset) < 2:
        raise UserError(f"images are mixed in pairs: at least 2 are needed, --images gives {len(dataset)}")
    chosen = list(range(len(dataset)))
    if not all(path.lower().endswith(extensions_of(config.reader)) for path in config.images):
        chosen = torch.randperm(len(dataset), generator=keyed_generator(config.seed, "images")).tolist()
        chosen = chosen[: config.num_images]
    if len(chosen) % 2:
        left_out = dataset.path_of(chosen.pop())
        logger.warning("images are mixed in pairs: the last of the %d, %s, is left out", len(chosen) + 1, left_out)
    return dataset, chosen


def visualize(given: VisualizeConfig) -> None:
    """Write the picture.

    Raises:
        UserError: for what the user can put right.
    """
    model, config, info = load_model(given)
    mask = model.random_masking(config.mask_ratio, keyed_generator(config.seed, "mask"))
    channels = shown_channels(config.in_chans, config.channels)
    dataset, chosen = choose_images(config)
    imgs = Normalize(config.mean, config.std)(torch.stack([dataset[(0, index)][0] for index in chosen]))
    source = f"{info.args.get('model', config.model)}, {info.path.parent.name}/{info.path.name}"
    if info.epoch is not None:
        source += f", after {info.epoch + 1} epochs"
    out = Path(config.out)
    with unreadable_is_user_error(f"--out {out} cannot be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        reconstruction_figure(model, imgs, mask, config.mean, config.std, channels, source).save(out)
    logger.info("wrote %s", out)


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        setup_logging()
        visualize(given_flags(VisualizeConfig, flags))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
