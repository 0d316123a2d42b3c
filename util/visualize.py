"""Pictures of what a pretraining checkpoint does with images.

    python -m util.visualize --checkpoint output_dir/checkpoint.pth --images /path/to/images --out picture.png

Every row shows an image, the mixture that the encoder sees, the image with its hidden cells filled in, and the image
predicted as a whole. Rows come in pairs, since images are mixed in pairs.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from models_mixmae import MixMAE
from util.data.datasets import build_dataset
from util.data.decoding import BadImageError, PixelType, decode
from util.data.image_index import IMAGE_EXTENSIONS
from util.data.transforms import Normalize, ResizeAndCentreCrop
from util.errors import UserError, unreadable_is_user_error
from util.run.config import HelpFormatter
from util.run.failures import user_errors
from util.run.logger import setup_logging
from util.seeding import keyed_generator
from util.weights.file import CheckpointError
from util.weights.layouts import load_pretraining
from util.weights.settings import WeightSettings, model_arguments, weight_settings
from util.weights.source import WeightsInfo, read_weights

logger = logging.getLogger(__name__)

OUTPUT_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")

# Sizes in pixels of the picture
IMAGE_SIDE = 288  # longer side of every image shown
MARGIN = 56
COLUMN_GAP = 32
ROW_GAP = 16
PAIR_GAP = 48
BADGE = 36
OUTLINE = 3
LINE = 27  # from one line of text to the next
TITLE, HEADING, TEXT, SMALL = 38, 23, 20, 17  # font sizes

INK, MUTED, HAIRLINE = "#1d2129", "#667080", "#d9dde3"
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


class Reconstruction(NamedTuple):
    """Normalised images, each (B, C, H, W)."""

    mixed: Tensor  # the image's own cells where the mask is 0, its partner's where it is 1
    filled: Tensor  # the image's own cells where the mask is 0, predictions where it is 1
    predicted: Tensor  # predictions everywhere: every cell from the branch in which it was hidden


@torch.no_grad()
def reconstruct(model: MixMAE, imgs: Tensor, mask: Tensor) -> Reconstruction:
    """Mix, encode and reconstruct normalised images.

    A model trained with `norm_pix_loss` predicts every cell up to the cell's mean and contrast. These two numbers are
    taken from the original cell, so the picture shows structure that was predicted, in brightness that was not.

    Args:
        imgs: (B, C, H, W) normalised, B even, on the model's device.
        mask: (L,) 0/1 over the cells.

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
    return Reconstruction(*map(model.unpatchify, (mixed, filled, pred)))


# --- From tensors to pixels ---------------------------------------------------------------------------------


def shown_channels(in_chans: int, channels: Sequence[int] | None = None) -> tuple[int, ...]:
    """The channels to show: one as grey or three as red, green and blue; the first ones unless `channels` says which.

    Raises:
        ValueError: for channels that do not exist, or other than one or three.
    """
    if channels is None:
        channels = (0, 1, 2) if in_chans >= 3 else (0,)
    if len(channels) not in (1, 3) or not all(0 <= channel < in_chans for channel in channels):
        raise UserError(
            f"one channel can be shown as grey or three as red, green and blue, numbered from 0 to {in_chans - 1}; "
            f"got {' '.join(map(str, channels))}"
        )
    return tuple(channels)


class Display:
    """Turns normalised images into 8-bit ones, all with the same scale.

    Images of one or three channels with values from 0 to 1, as files of 8 bits have them, are shown as they are. Of
    others nobody knows which value is white: every channel is scaled from the 1st to the 99th percentile of `imgs`.
    """

    def __init__(self, imgs: Tensor, mean: Sequence[float], std: Sequence[float], channels: tuple[int, ...]):
        self.mean, self.std = (torch.tensor(values, device=imgs.device).view(-1, 1, 1) for values in (mean, std))
        self.channels = channels
        pixels = self.pixels(imgs)
        in_range = bool((pixels > -1e-3).all() and (pixels < 1 + 1e-3).all())
        self.stretched = imgs.shape[1] not in (1, 3) or not in_range
        self.low, self.high = 0.0, 1.0
        if self.stretched:
            values = pixels.transpose(0, 1).flatten(1)  # (channels, B * H * W)
            values = values[:, :: max(1, values.shape[1] // 100_000)]  # quantile() takes a limited number
            low, high = values.quantile(torch.tensor([0.01, 0.99], device=values.device), dim=1)
            self.low, self.high = low.view(-1, 1, 1), torch.maximum(high, low + 1e-6).view(-1, 1, 1)

    def pixels(self, imgs: Tensor) -> Tensor:
        """The shown channels of normalised images, in the units of `mean` and `std`."""
        return (imgs.float() * self.std + self.mean)[:, list(self.channels)]

    def __call__(self, imgs: Tensor) -> list[Image.Image]:
        """(B, C, H, W) normalised -> B images, RGB."""
        pixels = (self.pixels(imgs) - self.low) / (self.high - self.low)
        pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
        array = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return [Image.fromarray(image) for image in array]

    def caption(self, in_chans: int) -> list[str]:
        """Sentences that say what is shown, where that is not obvious."""
        sentences = []
        if in_chans not in (1, 3) or self.channels not in ((0,), (0, 1, 2)):
            names = " ".join(map(str, self.channels))
            how = "as grey" if len(self.channels) == 1 else "as red, green and blue"
            sentences.append(f"Of the {in_chans} channels (numbered from 0), {names} shown {how}.")
        if self.stretched:
            sentences.append("Brightness runs from the 1st to the 99th percentile of the originals, per channel.")
        return sentences


# --- The picture --------------------------------------------------------------------------------------------


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

    sentences = [
        f"{int(hidden.sum())} of the {hidden.numel()} cells of every image are hidden: its partner's take their place."
    ]
    if model.norm_pix_loss:
        sentences.append(
            "The model predicts cells normalised by their own mean and contrast (norm_pix_loss). Both are taken from "
            "the original cell here: a cell's overall brightness and contrast are not predicted, its structure is."
        )
    sentences += display.caption(in_chans)
    return Page(columns, hidden, " ".join(sentences), source).image


class Page:
    """Lays out the picture: title, legend, column heads, pairs of rows, caption. The result is `image`."""

    def __init__(self, columns: list[list[Image.Image]], hidden: Tensor, caption: str, source: str):
        self.hidden = hidden
        self.image_size = width, height = fit(*columns[0][0].size)
        self.column_width = max(width, IMAGE_SIDE)
        self.left = MARGIN + BADGE + 20
        text_width = len(COLUMNS) * (self.column_width + COLUMN_GAP) - COLUMN_GAP
        intro_lines, caption_lines = wrap(INTRODUCTION, TEXT, text_width), wrap(caption, SMALL, text_width)

        num_images = len(columns[0])
        head = 2 * MARGIN + len(intro_lines) * LINE + 134
        body = num_images * (height + ROW_GAP) + (num_images // 2) * (PAIR_GAP - ROW_GAP)
        foot = (len(caption_lines) + bool(source)) * LINE + MARGIN
        self.image = Image.new("RGB", (self.left + text_width + MARGIN, head + body + foot), "white")
        self.draw = ImageDraw.Draw(self.image)

        self.write(self.left, MARGIN - 8, "MixMAE", TITLE, INK)
        y = self.write_lines(MARGIN + 46, intro_lines, TEXT, MUTED)
        self.legend(y + 12)
        for number, (heading, explanation) in enumerate(COLUMNS):
            self.write(self.column_left(number), y + 66, heading, HEADING, INK)
            self.write(self.column_left(number), y + 97, explanation, SMALL, MUTED)
        y = head
        for first in range(num_images // 2):
            last = num_images - 1 - first
            self.row([column[first] for column in columns], y, own="A", partner="B")
            self.row([column[last] for column in columns], y + height + ROW_GAP, own="B", partner="A")
            x, middle, gap = MARGIN + BADGE // 2, y + height // 2, BADGE // 2 + 8
            self.draw.line((x, middle + gap, x, middle + height + ROW_GAP - gap), HAIRLINE, 2)
            y += 2 * height + ROW_GAP + PAIR_GAP
        y = self.write_lines(y - 12, caption_lines, SMALL, INK)
        self.write(self.left, y, source, SMALL, MUTED)

    def column_left(self, number: int) -> int:
        return self.left + number * (self.column_width + COLUMN_GAP)

    def write(self, x: float, y: float, text: str, size: int, colour: str, anchor: str = "la") -> None:
        self.draw.text((x, y), text, fill=colour, font=ImageFont.load_default(size), anchor=anchor)

    def write_lines(self, y: int, lines: list[str], size: int, colour: str) -> int:
        """Write lines below each other; where the next one would start."""
        for number, line in enumerate(lines):
            self.write(self.left, y + number * LINE, line, size, colour)
        return y + len(lines) * LINE

    def legend(self, y: int) -> None:
        x = self.left
        for name, meaning in (
            ("A", "pixels of image A"),
            ("B", "pixels of image B"),
            ("", "no outline: predicted pixels"),
        ):
            box = (x, y, x + 24, y + 24)
            self.draw.rectangle(box, "#f1f3f5", COLOURS[name] if name else None, OUTLINE if name else 0)
            self.write(x + 36, y + 12, meaning, TEXT, INK, "lm")
            x += 36 + round(ImageFont.load_default(TEXT).getlength(meaning)) + 44

    def row(self, images: list[Image.Image], y: int, own: str, partner: str) -> None:
        """One image through all columns, with its badge; outlines tell whose pixels they are."""
        self.badge(y + self.image_size[1] // 2 - BADGE // 2, own)
        everywhere = torch.ones_like(self.hidden)
        outlines = [
            [(everywhere, own)],
            [(~self.hidden, own), (self.hidden, partner)],
            [(~self.hidden, own)],
            [],
        ]
        for number, (image, regions) in enumerate(zip(images, outlines)):
            x = self.column_left(number)
            blocks = self.image_size[0] % image.width == 0
            resample = Image.Resampling.NEAREST if blocks else Image.Resampling.LANCZOS
            self.image.paste(image.resize(self.image_size, resample), (x, y))
            for region, name in regions:
                self.outline(region, x, y, COLOURS[name])

    def outline(self, region: Tensor, x: int, y: int, colour: str) -> None:
        """Draw the outline of the cells in `region` just inside of them, for an image at (x, y)."""
        rows, cols = region.shape
        inside = torch.nn.functional.pad(region, (1, 1, 1, 1)).tolist()
        width, height = self.image_size
        xs = [x + round(width * col / cols) for col in range(cols + 1)]
        ys = [y + round(height * row / rows) for row in range(rows + 1)]
        for row, col in region.nonzero().tolist():
            left, top, right, bottom = xs[col], ys[row], xs[col + 1] - 1, ys[row + 1] - 1
            line = OUTLINE - 1
            strips = {
                (-1, 0): (left, top, right, top + line),
                (1, 0): (left, bottom - line, right, bottom),
                (0, -1): (left, top, left + line, bottom),
                (0, 1): (right - line, top, right, bottom),
                (-1, -1): (left, top, left + line, top + line),  # corners, where an outline turns around its outside
                (-1, 1): (right - line, top, right, top + line),
                (1, -1): (left, bottom - line, left + line, bottom),
                (1, 1): (right - line, bottom - line, right, bottom),
            }
            for (down, across), strip in strips.items():
                if not inside[row + 1 + down][col + 1 + across]:
                    self.draw.rectangle(strip, colour)

    def badge(self, y: int, name: str) -> None:
        smooth = 4  # Pillow's circles are jagged: draw larger, then reduce
        disc = Image.new("L", (BADGE * smooth, BADGE * smooth))
        ImageDraw.Draw(disc).ellipse((0, 0, BADGE * smooth - 1, BADGE * smooth - 1), 255)
        self.image.paste(COLOURS[name], (MARGIN, y), disc.resize((BADGE, BADGE), Image.Resampling.LANCZOS))
        self.write(MARGIN + BADGE / 2, y + BADGE / 2, name, TEXT, "white", "mm")


def fit(width: int, height: int) -> tuple[int, int]:
    """The size at which an image is shown; small ones are enlarged by a whole factor, so that pixels become blocks."""
    factor = IMAGE_SIDE / max(width, height)
    factor = int(factor) if factor >= 3 else factor
    return max(1, round(width * factor)), max(1, round(height * factor))


def wrap(text: str, size: int, width: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels."""
    font = ImageFont.load_default(size)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


# --- The command --------------------------------------------------------------------------------------------


def load_model(checkpoint: str) -> tuple[MixMAE, WeightSettings, WeightsInfo]:
    """The pretraining model of a checkpoint, as its recorded arguments describe it, and where it came from.

    Raises:
        CheckpointError: the file is missing, damaged, not a pretraining checkpoint, or records no model.
    """
    weights, info = read_weights(checkpoint)
    if "mask_token" not in weights:
        raise CheckpointError(
            f"{checkpoint} has no decoder, so it cannot reconstruct images (it was fine-tuned, or is an encoder "
            "alone): give a checkpoint of main_pretrain.py"
        )
    settings = weight_settings(info.args, checkpoint, pretraining=True)
    norm_pix_loss = bool(info.args.get("norm_pix_loss", False))
    model = timm.create_model(settings.model, norm_pix_loss=norm_pix_loss, **model_arguments(settings))
    logger.info("%s", load_pretraining(model, weights, checkpoint))
    return model.eval(), settings, info


@dataclass(frozen=True)
class FolderOfImages:
    """The images of one folder or list, as `build_dataset` takes them."""

    data_path: str
    in_chans: int
    seed: int
    dataset: str = ""
    bad_images: str = "error"
    max_bad_images: float = 0.0
    ignore_exif: bool = False


def load_images(paths: list[str], num_images: int, in_chans: int, seed: int) -> tuple[list[Tensor], list[str]]:
    """Images (in_chans, h, w) and their paths: the files in `paths`, or `num_images` drawn from a folder or list.

    Raises:
        UserError: nothing there, unreadable, or of another number of channels.
    """
    for path in paths:
        if not Path(path).exists():
            raise UserError(f"--images {path} does not exist: give image files, a folder of images or a list of them")
    if len(paths) == 1 and not paths[0].lower().endswith(IMAGE_EXTENSIONS):
        dataset = build_dataset(FolderOfImages(paths[0], in_chans, seed), "train", transform=lambda image: image)
        chosen = torch.randperm(len(dataset), generator=keyed_generator(seed, "images"))[:num_images].tolist()
        return [dataset[(0, index)][0] for index in chosen], [dataset.path_of(index) for index in chosen]
    images = []
    for path in paths:
        try:
            image = decode(Path(path).read_bytes(), in_chans)
            images.append(PixelType(image.dtype).convert(image))
        except (BadImageError, OSError) as error:
            raise BadImageError(f"{path}: {error}") from error
    return images, paths


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m util.visualize",
        description="Draw a picture of how a pretraining checkpoint mixes and reconstructs images.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a checkpoint of main_pretrain.py")
    parser.add_argument(
        "--images", required=True, nargs="+", metavar="PATH", help="image files; or one folder or list to draw from"
    )
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture to write")
    parser.add_argument("--num_images", type=int, default=8, metavar="N", help="how many to draw from a folder or list")
    parser.add_argument("--mask_ratio", type=float, default=0.5, metavar="SHARE", help="share of the cells to hide")
    parser.add_argument("--channels", type=int, nargs="+", metavar="C", help="one or three channels to show, from 0")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws the images and the mask")
    return parser


def visualize(args: argparse.Namespace) -> None:
    """Write the picture.

    Raises:
        UserError: for what the user can put right.
    """
    out = Path(args.out)
    if out.suffix.lower() not in OUTPUT_EXTENSIONS:
        raise UserError(f"--out {out} must end in one of {', '.join(OUTPUT_EXTENSIONS)}")
    if args.num_images < 2:
        raise UserError(f"--num_images must be at least 2, since images are mixed in pairs; got {args.num_images}")
    model, settings, info = load_model(args.checkpoint)
    mask = model.random_masking(args.mask_ratio, keyed_generator(args.seed, "mask"))
    channels = shown_channels(model.in_chans, args.channels)
    images, paths = load_images(args.images, args.num_images, model.in_chans, args.seed)
    if len(images) < 2:
        raise UserError(f"images are mixed in pairs: at least 2 are needed, --images gives {len(images)}")
    if len(images) % 2:
        logger.warning("images are mixed in pairs: the last of the %d, %s, is left out", len(images), paths.pop())
        images.pop()
    mean, std = settings.mean, settings.std
    crop, normalize = ResizeAndCentreCrop(model.img_size, crop_ratio=1.0), Normalize(mean, std)
    imgs = torch.stack([normalize(crop(image)) for image in images])
    source = f"{info.args.get('model', settings.model)}, {info.path.parent.name}/{info.path.name}"
    if info.epoch is not None:
        source += f", after {info.epoch + 1} epochs"
    with unreadable_is_user_error(f"--out {out} cannot be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        reconstruction_figure(model, imgs, mask, mean, std, channels, source).save(out)
    logger.info("wrote %s", out)


if __name__ == "__main__":
    with user_errors():
        setup_logging()
        visualize(get_args_parser().parse_args())
