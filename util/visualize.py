"""Pictures of what a pretraining checkpoint does with images.

    python -m util.visualize --checkpoint output_dir/checkpoint.pth --images /path/to/images --out picture.png

Every row shows an image, the mixture that the encoder sees, the image with its hidden cells filled in, and the image
predicted as a whole. Rows come in pairs, since images are mixed in pairs. For a model that learns to predict only
hidden cells (`--reconstruct single`, `--fill`) there is no fourth column; for one that mixes no images, no pairs.
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import logging
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from models_mixmae import MixMAE
from util.data.display import COLOURS, HAIRLINE, INK, LIGHT, MUTED, OUTLINE, Display, enlarge, outline, render
from util.data.transforms import Normalize
from util.errors import UserError
from util.layers.mixing import images_of_tuples
from util.layers.windows import upsample
from util.run.failures import user_errors
from util.run.flags import flag, get_parser, given_flags
from util.run.logger import setup_logging
from util.run.reconstruction import (
    PREDICTED_UP_TO,
    PictureFlags,
    check_output,
    choose_images,
    load_model,
    reconstruct,
    write_picture,
)
from util.seeding import keyed_generator

logger = logging.getLogger(__name__)

# Sizes in pixels
WIDTH, LEFT, HEAD = 1416, 112, 276  # of the picture; where images start, from its left and from its top
IMAGE_SIDE = 288  # longer side of every image shown
COLUMN_GAP, ROW_GAP, TUPLE_GAP = 32, 16, 48
TEXT, SMALL, LINE = 17, 15, 24  # font sizes, and from one line of the caption to the next
LINE_LENGTH = 148  # characters in a line of the caption

FILLINGS = {  # of models that mix no images: what the input shows where a cell is hidden
    "mask_token": "hidden cells are a mask token (grey)",
    "zero": "hidden cells have the mean's value",
    "noise": "hidden cells are noise",
}


def introduction(model: MixMAE) -> str:
    """What the model does, in one line."""
    if model.fill != "partner":
        return "Of every image, cells are hidden from the encoder; the decoder predicts them from the others."
    attends = "within each image only" if model.masked_attn else "to all images"
    of_whom = "each image" if model.num_branches > 1 else "the row's image"
    return (
        f"Images are mixed {at_a_time(model)}, cell by cell. The encoder attends {attends}; "
        f"the decoder predicts what was hidden of {of_whom}."
    )


def at_a_time(model: MixMAE) -> str:
    return "in pairs" if model.mix_images == 2 else f"{model.mix_images} at a time"


def headings(model: MixMAE) -> list[tuple[str, str]]:
    """The columns that say something of the model, each with what it shows.

    A single branch predicts the visible cells too, but these do not count in its loss: it has no fourth column.
    """
    if model.fill == "partner":
        found = [("Original", "the images of a mixture"), ("Mixed input", "all that the encoder sees")]
    else:
        found = [("Original", "each image by itself"), ("Masked input", FILLINGS[model.fill])]
    found.append(("Hidden cells filled in", "own cells kept, the others predicted"))
    if model.num_branches > 1:
        found.append(("Every cell predicted", "each from a mixture that hid it"))
    return found


def reconstruction_figure(
    model: MixMAE,
    imgs: Tensor,
    mask: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    channels: Sequence[int] | None = None,
    source: str = "",
) -> Image.Image:
    """The picture for a batch: a row for each image, partners (where there are any) below each other.

    Args:
        model: in any mode and on any device; left as it was.
        imgs: (B, C, H, W) normalised, B even: image i is mixed with image B-1-i. In general, a multiple of the images
            in a mixture, `images_of_tuples`.
        mask: (L,) 0/1 over the cells.
        mean, std: what the images were normalised with, per channel.
        channels: one or three channels to show (default: the first).
        source: where model and images come from, for the caption.

    Raises:
        ValueError: for an odd batch, a mask that hides no or all cells, and channels that do not exist.
    """
    display = Display(imgs, mean, std, channels)
    columns = [display(column) for column in (imgs, *reconstruct(model, imgs, mask))]
    mask = model.check_mask(mask).view(model.grid_size)
    tuples = images_of_tuples(len(imgs), model.mix_images if model.fill == "partner" else 1)
    if model.fill == "mask_token":  # which is no pixels
        columns[1][:, upsample(mask.bool(), model.encoder_stride).numpy()] = ImageColor.getrgb(HAIRLINE)
    caption = [f"{mask.count_nonzero()} of the {mask.numel()} cells of every image are hidden."]
    caption += [PREDICTED_UP_TO] if model.norm_pix_loss else []
    caption = " ".join([*caption, *display.caption(imgs.shape[1])])
    return draw_page(list(zip(headings(model), columns)), mask, tuples, introduction(model), caption, source)


def draw_page(
    columns: list[tuple[tuple[str, str], np.ndarray]],
    mask: Tensor,
    tuples: list[list[int]],
    introduction: str,
    caption: str,
    source: str,
) -> Image.Image:
    """The columns of images on one page.

    Args:
        columns: heading and explanation of each, with its images (B, H, W, 3).
        mask: over the cells (rows, columns); where it is k, a mixture shows its k-th image.
        tuples: the images of each mixture; each image alone, where they are not mixed.
        introduction, caption, source: above and below the images.
    """
    # Here, since every rank of a training run imports this module, and one draws.
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    width, height = shown_size(columns[0][1])
    K = len(tuples[0])
    mixed = K > 1
    column_pitch, row_pitch = max(width, IMAGE_SIDE) + COLUMN_GAP, height + ROW_GAP
    tuple_pitch = K * row_pitch + (TUPLE_GAP - ROW_GAP if mixed else 0)
    letters = [list(COLOURS)[number % len(COLOURS)] for number in range(K)]
    lines_below = [*textwrap.wrap(caption, LINE_LENGTH), source]
    top_below = HEAD + len(tuples) * tuple_pitch + 24
    total_height = top_below + len(lines_below) * LINE + 20

    figure = Figure((WIDTH / 72, total_height / 72), dpi=72)  # so that points are pixels
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(total_height, 0))  # pixels from the top left
    axes.axis("off")
    write = partial(axes.text, color=INK, va="baseline", parse_math=False)
    write(LEFT, 84, "MixMAE", size=36)
    write(LEFT, 122, introduction, size=TEXT, color=MUTED)
    legend = [
        (f"pixels of image {letter}" if mixed else "pixels of the image", COLOURS[letter]) for letter in letters[:4]
    ]
    legend.append(("no outline: hidden or predicted", LIGHT))
    for number, (meaning, colour) in enumerate(legend):
        left, top = LEFT + number * 220, 142
        axes.add_patch(Rectangle((left, top), 21, 21, facecolor=LIGHT, edgecolor=colour, linewidth=OUTLINE))
        write(left + 33, top + 11, meaning, size=TEXT, va="center_baseline")
    for number, ((heading, explanation), _) in enumerate(columns):
        write(LEFT + number * column_pitch, HEAD - 56, heading, size=22)
        write(LEFT + number * column_pitch, HEAD - 29, explanation, size=SMALL, color=MUTED)
    around = outline(mask >= 0, (height, width))
    shows = [outline(mask == k, (height, width)) for k in range(K)]
    for number_of_tuple, rows in enumerate(tuples):
        tops = [HEAD + number_of_tuple * tuple_pitch + place * row_pitch for place in range(K)]
        if mixed:
            axes.plot((74, 74), [tops[0] + height / 2, tops[-1] + height / 2], color=HAIRLINE, linewidth=2)
        for place, index in enumerate(rows):
            own, middle = letters[place], tops[place] + height / 2
            mixture = [(letters[(place + k) % K], shows[k]) for k in range(K)]
            axes.plot(74, middle, "o", color=COLOURS[own], markersize=44, markeredgecolor="white", markeredgewidth=8)
            label = own if mixed else str(index + 1)
            write(74, middle, label, size=TEXT, color="white", ha="center", va="center_baseline")
            outlines = [[(own, around)], mixture, [(own, shows[0])], []]
            for number, ((_, images), named_lines) in enumerate(zip(columns, outlines)):
                image = enlarge(images[index], (width, height))
                for name, lines in named_lines:
                    image[lines] = ImageColor.getrgb(COLOURS[name])
                left, top = LEFT + number * column_pitch, tops[place]
                axes.imshow(image, extent=(left, left + width, top + height, top), aspect="auto", interpolation="none")
    for number, line in enumerate(lines_below):
        write(LEFT, top_below + number * LINE, line, size=SMALL, color=MUTED)
    return render(figure)


def shown_size(images: np.ndarray) -> tuple[int, int]:
    """(width, height) at which to show images (B, H, W, 3); small ones are enlarged by a whole factor, to blocks."""
    factor = IMAGE_SIDE / max(images.shape[1:3])
    factor = int(factor) if factor >= 3 else factor
    return max(1, round(images.shape[2] * factor)), max(1, round(images.shape[1] * factor))


# --- The command ---


@dataclass(frozen=True)
class VisualizeConfig(PictureFlags):
    TITLE: ClassVar[str] = "rows"

    num_images: int = flag(
        8, "how many to draw from folders, lists and tars", "N",
        (lambda value: value >= 2, "must be at least 2, since images are mixed in pairs"),
    )  # fmt: skip


def get_args_parser() -> argparse.ArgumentParser:
    description = "Draw a picture of how a pretraining checkpoint mixes and reconstructs images."
    return get_parser(VisualizeConfig, description, "python -m util.visualize")


def visualize(given: VisualizeConfig) -> None:
    """Write the picture.

    Raises:
        UserError: for what the user can put right.
    """
    model, config, origin = load_model(given)
    check_output(config)
    mask = model.random_masking(config.mask_ratio, keyed_generator(config.seed, "mask"))
    dataset, chosen = choose_images(config, config.num_images)
    if len(chosen) < model.mix_images:
        raise UserError(f"this model mixes {model.mix_images} images: give at least as many (--images, --num_images)")
    if left_out := [dataset.path_of(index) for index in chosen[len(chosen) - len(chosen) % model.mix_images :]]:
        how_many, are = ("", "is") if len(left_out) == 1 else (f"{len(left_out)} ", "are")
        logger.warning(
            "images are taken %s: the last %sof the %d, %s, %s left out",
            at_a_time(model), how_many, len(chosen), " and ".join(left_out), are,
        )  # fmt: skip
        chosen = chosen[: -len(left_out)]
    imgs = Normalize(config.mean, config.std)(torch.stack([dataset[(0, index)][0] for index in chosen]))
    picture = reconstruction_figure(model, imgs, mask, config.mean, config.std, config.channels, origin)
    write_picture(picture, config.out)


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        setup_logging()
        visualize(given_flags(VisualizeConfig, flags))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
