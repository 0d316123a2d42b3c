"""The method in one picture: what a pretraining checkpoint does with a pair of images, step by step.

    python -m util.explain --checkpoint output_dir/checkpoint.pth --images a.jpg b.jpg --out method.png

Nothing in it is made up: mask, mixtures, layout of the window, predictions and shapes are those of one forward
pass of the model.
"""

import util.run.startup  # noqa: F401 - before PyTorch

# isort: split
import argparse
import logging
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image, ImageColor
from torch import Tensor, nn

from models_mixmae import MixMAE
from util.data.display import COLOURS, HAIRLINE, INK, LIGHT, MUTED, Display, outline, render
from util.data.transforms import Normalize
from util.errors import UserError
from util.layers.sizes import NUM_STAGES
from util.layers.windows import upsample
from util.run.failures import user_errors
from util.run.flags import flag, get_parser, given_flags
from util.run.logger import setup_logging
from util.run.reconstruction import (
    PREDICTED_UP_TO,
    PictureFlags,
    assemble,
    check_output,
    choose_images,
    load_model,
    write_picture,
)
from util.seeding import keyed_generator

logger = logging.getLogger(__name__)

# --- What the model does ---


@dataclass(frozen=True)
class Window:
    """One window of a stage, with its n tokens."""

    stage: int  # from 0
    rows: slice  # of the stage's grid
    columns: slice
    group: Tensor  # (rows, columns) True where a token is the partner's
    order: Tensor  # (n,) which token stands at each place of the model's layout; tokens are numbered row by row
    pairs: Tensor  # (n, n) True where a token (row) attends to another (column); in the order of rows
    segments: tuple[int, ...]  # tokens of each dense attention, in the layout's order


@dataclass(frozen=True)
class Steps:
    """One forward pass with two images: A is image 0 and B is image 1."""

    imgs: Tensor  # (2, C, H, W) normalised, as all images here
    hidden: Tensor  # (rows, columns) the mask over the cells, True where it is 1
    mixed: Tensor  # (2, C, H, W) the mixtures: image i where the mask is 0, its partner where it is 1
    predicted: Tensor  # (2, C, H, W) every cell from the branch in which it was hidden
    loss: float
    mix_embed: bool  # whether the stages add a vector that says which image of its mixture a token is of
    window: Window
    shapes: dict[str, tuple[int, ...]]  # of `tokens`, `stages.0` to `stages.3`, `latent`, `branches` and `pred`


@torch.no_grad()
def run_steps(model: MixMAE, imgs: Tensor, mask: Tensor, stage: int | None = None) -> Steps:
    """One forward pass of a model in evaluation mode.

    Args:
        imgs: (2, C, H, W) normalised.
        mask: (L,) 0/1 over the cells.
        stage: whose window to show, from 0; None: the first where a window holds tokens of both images.

    Raises:
        UserError: for a mask that hides no or all cells, and a variant of the method that the picture does not show.
    """
    if model.num_branches != 2 or not model.masked_attn:
        mixtures = f"mixtures of {model.mix_images} images, {model.num_branches} reconstructed"
        trained_with = mixtures if model.fill == "partner" else f"--fill {model.fill}"
        trained_with += "" if model.masked_attn else ", without masked attention"
        raise UserError(
            "the picture shows mixtures of two images, masked attention and the reconstruction of both images; this "
            f"checkpoint was trained with {trained_with}: util.visualize shows what it reconstructs"
        )
    mask = model.check_mask(mask)
    hidden = mask.bool().view(model.grid_size)
    with recorded_shapes(model) as shapes:
        loss, pred, _ = model(imgs, mask=mask)
    mixed, _, predicted = assemble(model, imgs, mask, pred.float())
    windows = [find_window(model, hidden, number) for number in range(NUM_STAGES)]
    if stage is None:
        window = next((window for window in windows if window.group.any() and not window.group.all()), windows[0])
    else:
        window = windows[stage]
    mix_embed = model.layers[0].mix_embed is not None
    return Steps(imgs, hidden, mixed, predicted, loss.item(), mix_embed, window, shapes | {"pred": tuple(pred.shape)})


@contextmanager
def recorded_shapes(model: MixMAE) -> Iterator[dict[str, tuple[int, ...]]]:
    """The shapes of a forward pass under the names of `Steps.shapes`, filled in while it runs."""
    shapes = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor | None = None) -> None:
        shapes[name] = tuple((inputs[0] if output is None else output).shape)

    before = {"tokens": model.layers[0], "latent": model.decoder_embed, "branches": model.decoder_blocks[0]}
    with ExitStack() as hooks:
        for name, module in before.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(note, name)))
        for number, layer in enumerate(model.layers):
            hooks.enter_context(layer.register_forward_hook(partial(note, f"stages.{number}")))
        yield shapes


def find_window(model: MixMAE, hidden: Tensor, stage: int) -> Window:
    """The first of a stage's windows (from 0) in which the smaller group is largest, as the model lays it out."""
    layout = model.layouts(model.layers[0].grid, hidden)[stage]
    grid, side = model.layers[stage].grid, model.layers[stage].window
    group = upsample(hidden, 2 ** (NUM_STAGES - 1 - stage))[: grid[0], : grid[1]]
    corners = [(row, column) for row in range(0, grid[0], side) for column in range(0, grid[1], side)]

    def balance(corner: tuple[int, int]) -> int:
        inside = group[corner[0] : corner[0] + side, corner[1] : corner[1] + side]
        return min(int(inside.sum()), int((~inside).sum()))

    top, left = max(corners, key=balance)
    rows, columns = slice(top, min(top + side, grid[0])), slice(left, min(left + side, grid[1]))
    number = torch.arange(grid[0] * grid[1])
    place = (number if layout.inverse is None else layout.inverse).view(grid)[rows, columns].flatten()
    lengths = torch.tensor([length for count, length in layout.segments for _ in range(count)])
    segment_at = torch.arange(len(lengths)).repeat_interleave(lengths)
    segment = segment_at[place]
    order = place.argsort()
    segments = tuple(segment[order].unique_consecutive(return_counts=True)[1].tolist())
    return Window(stage, rows, columns, group[rows, columns], order, segment[:, None] == segment, segments)


# --- The picture ---

# Lengths in pixels of a web page; the file has twice as many
WIDTH, HEIGHT, MARGIN = 1000, 872, 20
SIDE = 120  # longer side of an image
UPPER, LOWER = (112, 284), (572, 744)  # tops of images in the upper and the lower half, A's and B's
MASK, MIX, ENCODE = 176, 308, 462  # lefts in the upper half, after the images
BRANCH, DECODER, PREDICTED, UNMIXED, TARGET = 176, 336, 444, 652, 860  # lefts in the lower half, after the latent cells
DECODER_WIDTH = 72
SMALL_SIDE = 88  # of the mask and the latent cells
STAGE_SIDES, STAGE_PITCH = (112, 88, 66, 48), 146
STRIP = 6  # width of the tokens beside their attention
LINE, LINE_LENGTH = 16, 120  # of the caption
SHAPE_SIZE = 9  # of the font of shapes, whose characters are 0.602 times as wide

BLUE, ORANGE, MASK_TOKEN, NOTHING = np.array(
    [ImageColor.getrgb(colour) for colour in (COLOURS["A"], COLOURS["B"], HAIRLINE, LIGHT)]
)


class Page:
    """Draws in pixels from the top left."""

    def __init__(self, height: int):
        self.figure = Figure((WIDTH / 72, height / 72), dpi=144)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")

    def write(self, x: float, y: float, text: str, size: float = 11, color: str = INK, **style) -> None:
        """Lines of text, the first one's baseline at `y`."""
        for number, line in enumerate(text.split("\n")):
            self.axes.text(x, y + number * 1.45 * size, line, size=size, color=color, parse_math=False, **style)

    def heading(self, x: float, top: float, title: str, explanation: str) -> None:
        self.write(x, top, title, size=16)
        self.write(x, top + 21, explanation, size=10.5, color=MUTED)

    def label(self, x: float, top: float, name: str, shape: str) -> None:
        """Above what is drawn at `top`: its name and the shape of its tensor."""
        self.write(x, top - 22, name)
        self.write(x, top - 8, shape, size=SHAPE_SIZE, color=MUTED, family="monospace")

    def arrow(self, *ends: tuple[float, float]) -> None:
        style = dict(arrowstyle="-|>,head_width=0.2,head_length=0.4", color=MUTED, linewidth=1.2, shrinkA=0, shrinkB=0)
        self.axes.annotate("", ends[1], ends[0], arrowprops=style)

    def frame(self, left: float, top: float, width: float, height: float) -> None:
        self.axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=INK, linewidth=2.2, zorder=3))

    def place(self, image: np.ndarray, left: float, top: float, width: float, height: float) -> None:
        """An image (H, W, 3) or, partly transparent, (H, W, 4), at any size."""
        self.axes.imshow(image, extent=(left, left + width, top + height, top), aspect="auto")

    def show(self, left: float, top: float, name: str, shape: str, image: np.ndarray, **outlined: Tensor) -> None:
        """An image (H, W, 3) with the contours of the cells that are A's or B's."""
        self.label(left, top, name, shape)
        width, height = fitted(image.shape[:2], SIDE)
        self.place(image, left, top, width, height)
        for owner, region in outlined.items():
            lines = outline(region, (round(2 * height), round(2 * width)))  # as many pixels as the file has
            self.place(lines[..., None] * np.array(to_rgba(COLOURS[owner])), left, top, width, height)

    def show_tokens(
        self, left: float, top: float, name: str, shape: str, group: Tensor, side: float
    ) -> tuple[float, float]:
        """A grid of tokens (rows, columns) in the colours of their images; returns its width and height."""
        self.label(left, top, name, shape)
        width, height = fitted(group.shape, side)
        self.place(select(BLUE, ORANGE, group), left, top, width, height)
        rows, columns = group.shape
        style = dict(color="white", linewidth=min(1.5, width / columns / 7))
        self.axes.vlines(np.linspace(left, left + width, columns + 1), top, top + height, **style)
        self.axes.hlines(np.linspace(top, top + height, rows + 1), left, left + width, **style)
        return width, height

    def show_attention(self, left: float, top: float, name: str, shape: str, window: Window, order: Tensor) -> None:
        """Who attends to whom in a window, its tokens standing in `order`: pairs, and the tokens beside them."""
        self.label(left, top, name, shape)
        tokens = select(BLUE, ORANGE, window.group.flatten()[order][:, None])  # (n, 1, 3)
        pairs = select(np.uint8(255), tokens // 2 + 127, window.pairs[order][:, order])
        start = STRIP + 3
        self.place(tokens, left, top + start, STRIP, SIDE - start)
        self.place(tokens.swapaxes(0, 1), left + start, top, SIDE - start, STRIP)
        self.place(pairs, left + start, top + start, SIDE - start, SIDE - start)


def fitted(shape: tuple[int, int], side: float) -> tuple[float, float]:
    """(width, height) with the proportions of (rows, columns), the longer one `side`."""
    rows, columns = shape
    return side * columns / max(rows, columns), side * rows / max(rows, columns)


def select(own: np.ndarray, other: np.ndarray, chosen: Tensor) -> np.ndarray:
    """`own` where (H, W) is False, `other` where it is True: images (H, W, 3) or colours."""
    return np.where(chosen.numpy()[..., None], other, own).astype(np.uint8)


def explanation_figure(steps: Steps, display: Display, captions: list[str]) -> Image.Image:
    """The picture of the steps; `captions` are paragraphs at its end."""
    lines = [line for caption in captions for line in textwrap.wrap(caption, LINE_LENGTH)]
    page = Page(HEIGHT + LINE * len(lines) + 8)
    draw_encoding(page, steps, display)
    page.axes.plot((MARGIN, WIDTH - MARGIN), (472, 472), color=HAIRLINE, linewidth=1)
    draw_decoding(page, steps, display)
    for number, line in enumerate(lines):
        page.write(MARGIN, HEIGHT + 20 + number * LINE, line, size=9.5, color=MUTED)
    return render(page.figure)


def draw_encoding(page: Page, steps: Steps, display: Display) -> None:
    """The upper half: mask, mix, encode."""
    hidden, shapes, window = steps.hidden, steps.shapes, steps.window
    half, small = (fitted(hidden.shape, side)[1] / 2 for side in (SIDE, SMALL_SIDE))
    middle = sum(UPPER) / 2 + half
    page.heading(MARGIN, 32, "Two images", "of a batch")
    page.heading(MASK, 32, "1  Mask", f"{hidden.sum()} of {hidden.numel()} cells")
    page.heading(MIX, 32, "2  Mix", "swap masked tokens")
    encoding = "hierarchical; every token attends to tokens of its own image only"
    if steps.mix_embed:
        encoding += "\neach stage first adds a learned vector: one to a mixture's own tokens, another to its partner's"
    page.heading(ENCODE, 32, "3  Encode", encoding)

    for image, mixture, top, name, partner, row in zip(
        display(steps.imgs), display(steps.mixed), UPPER, "AB", "BA", (0, 1)
    ):
        shape, tokens = f"{tuple(steps.imgs.shape)}[{row}]", f"{shapes['tokens']}[{row}]"
        page.show(MARGIN, top, f"image {name}", shape, image, **{name: torch.ones_like(hidden)})
        page.show(MIX, top, f"mixture {row + 1}", tokens, mixture, **{name: ~hidden, partner: hidden})
    page.write(MIX, UPPER[1] + SIDE + 22, "encoded and\ndecoded likewise", size=10, color=MUTED)
    page.show_tokens(MASK, middle - small, "mask", f"({hidden.numel()},)", hidden, SMALL_SIDE)
    for top, toward in zip(UPPER, (-1, 1)):
        centre = top + half
        page.arrow((MARGIN + SIDE + 6, centre), (MASK - 6, middle + toward * small / 2))
        page.arrow((MASK + SMALL_SIDE + 6, middle + toward * small / 2), (MIX - 6, centre))

    top = UPPER[0]
    page.arrow((MIX + SIDE + 6, top + 24), (ENCODE - 6, top + 24))
    for stage, side in enumerate(STAGE_SIDES):
        shape = shapes[f"stages.{stage}"]
        left = min(ENCODE + stage * STAGE_PITCH, WIDTH - MARGIN - 0.602 * SHAPE_SIZE * len(str(shape)))
        _, rows, columns, _ = shape
        tokens = upsample(hidden, 2 ** (NUM_STAGES - 1 - stage))[:rows, :columns]
        width, height = page.show_tokens(left, top, f"stage {stage + 1}", str(shape), tokens, side)
        if stage == window.stage:
            corner = (left + window.columns.start / columns * width, top + window.rows.start / rows * height)
            size = (window.group.shape[1] / columns * width, window.group.shape[0] / rows * height)
            page.frame(*corner, *size)
        if stage:
            page.arrow((left - 30, top + 24), (left - 8, top + 24))

    top, places = UPPER[1], (ENCODE, (ENCODE + TARGET) / 2, TARGET)
    n, middle = window.group.numel(), UPPER[1] + SIDE / 2
    name, blocks = (
        f"a window of stage {window.stage + 1}",
        " + ".join(f"{size} \u00d7 {size}" for size in window.segments),
    )
    width, height = page.show_tokens(places[0], top, name, f"{n} tokens", window.group, SIDE)
    page.frame(places[0], top, width, height)
    page.show_attention(places[1], top, "masked attention", f"{n} \u00d7 {n} pairs", window, torch.arange(n))
    page.show_attention(places[2], top, "the same, sorted", blocks, window, window.order)
    for left, right in pairwise(places):
        page.arrow((left + SIDE + 8, middle), (right - 8, middle))
    page.write(places[2] - (places[2] - places[1] - SIDE) / 2, middle - 8, "sort", ha="center")
    share = 100 * window.pairs.float().mean().item()
    page.write(
        places[0],
        top + SIDE + 22,
        "Sorted by image, the masked attention of a window is one dense attention for each image,\n"
        f"with exactly the same result: here it computes {share:.0f}% of the {n} \u00d7 {n} pairs of tokens.",
        size=10,
        color=MUTED,
    )


def draw_decoding(page: Page, steps: Steps, display: Display) -> None:
    """The lower half: decode twice, unmix, loss."""
    hidden, shapes = steps.hidden, steps.shapes
    stride = steps.imgs.shape[2] // hidden.shape[0]
    half, small = (fitted(hidden.shape, side)[1] / 2 for side in (SIDE, SMALL_SIDE))
    middle = sum(LOWER) / 2 + half
    page.heading(
        MARGIN, 504, "4  Decode twice", "each mixture once for either image, with mask tokens where the other was"
    )
    page.heading(UNMIXED, 504, "5  Unmix", "from where it was hidden")
    page.heading(TARGET, 504, "6  Loss", "of all cells")

    page.show_tokens(MARGIN, middle - small, "latent cells", f"{shapes['latent']}[0]", hidden, SMALL_SIDE)
    style = dict(boxstyle="round,pad=0,rounding_size=8", color=LIGHT, linewidth=0)
    page.axes.add_patch(FancyBboxPatch((DECODER, LOWER[0]), DECODER_WIDTH, LOWER[1] + 2 * half - LOWER[0], **style))
    page.write(DECODER + DECODER_WIDTH / 2, middle - 12, "decoder,\nthe same\nfor both", ha="center")
    error = f"mean squared\nerror {steps.loss:.3f}"
    page.write((UNMIXED + SIDE + TARGET) / 2, middle - 4, error, size=9.5, ha="center")
    originals, predictions = display(steps.imgs), display(steps.predicted)
    for number, (top, name, visible) in enumerate(zip(LOWER, "AB", (~hidden, hidden))):
        image, predicted, centre = originals[number], predictions[number], top + half
        seen, branch, pred = (
            upsample(visible, stride),
            f"{shapes['branches']}[{2 * number}]",
            f"{shapes['pred']}[{number}]",
        )
        tokens, shape = select(MASK_TOKEN, image, seen), f"{tuple(steps.imgs.shape)}[{number}]"
        page.show(BRANCH, top, f"branch {number + 1}: tokens of {name}", branch, tokens, **{name: visible})
        page.show(PREDICTED, top, f"predicted cells of {name}", pred, select(predicted, NOTHING, seen))
        page.show(UNMIXED, top, f"{name}, reconstructed", pred, predicted)
        page.show(TARGET, top, f"image {name}", shape, image, **{name: torch.ones_like(hidden)})
        others = dict(size=9, color=MUTED, ha="center")
        page.write((PREDICTED + SIDE + UNMIXED) / 2, centre + 16, "and those of\nmixture 2", **others)
        page.arrow((MARGIN + SMALL_SIDE + 6, middle + (number - 0.5) * small), (BRANCH - 6, centre))
        for left, right in pairwise((BRANCH, DECODER, PREDICTED, UNMIXED, TARGET)):
            page.arrow((left + (DECODER_WIDTH if left == DECODER else SIDE) + 6, centre), (right - 6, centre))


# --- The command ---


@dataclass(frozen=True)
class ExplainConfig(PictureFlags):
    TITLE: ClassVar[str] = "window"

    stage: int | None = flag(
        None, "stage whose window is shown (default: the first where a window holds tokens of both images)", "1-4",
        (lambda value: 1 <= value <= NUM_STAGES, f"must be between 1 and {NUM_STAGES}"),
    )  # fmt: skip


def get_args_parser() -> argparse.ArgumentParser:
    description = "Draw what a pretraining checkpoint does with a pair of images, step by step."
    return get_parser(ExplainConfig, description, "python -m util.explain")


def explain(given: ExplainConfig) -> None:
    """Write the picture.

    Raises:
        UserError: for what the user can put right.
    """
    model, config, origin = load_model(given)
    check_output(config)
    mask = model.random_masking(config.mask_ratio, keyed_generator(config.seed, "mask"))
    dataset, chosen = choose_images(config, 2)
    if len(chosen) > 2:
        raise UserError(
            f"the picture shows one pair: name two images or a folder to draw from, --images gives {len(chosen)}"
        )
    imgs = Normalize(config.mean, config.std)(torch.stack([dataset[(0, index)][0] for index in chosen]))
    if torch.equal(imgs[0], imgs[1]):
        logger.warning("both images are the same (%s, %s): mixing changes nothing", *map(dataset.path_of, chosen))
    steps = run_steps(model, imgs, mask, None if config.stage is None else config.stage - 1)
    display = Display(imgs, config.mean, config.std, config.channels)
    captions = [PREDICTED_UP_TO] if model.norm_pix_loss else []
    captions += [" ".join(display.caption(config.in_chans)), origin]
    picture = explanation_figure(steps, display, captions)
    if config.out.lower().endswith(".png"):
        picture = picture.quantize()  # 256 colours: a third of the size, for a page that is read on the web
    write_picture(picture, config.out)


def main(flags: argparse.Namespace) -> None:
    with user_errors():
        setup_logging()
        explain(given_flags(ExplainConfig, flags))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
