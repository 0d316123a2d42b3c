"""Draws figures/method.png, the method on one pair of photographs: `python figures/method.py`.

Mask, mixture, sorted tokens, the decoder's inputs and the targets are exact. Reconstructions would take a trained
model, so none are shown.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import ImageColor
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models_mixmae import mixmae_tiny
from util.data.decoding import decode
from util.data.transforms import ResizeAndCentreCrop
from util.layers.windows import sorted_layout, stage_grids, upsample
from util.visualize import COLOURS, HAIRLINE, INK, LIGHT, MUTED, enlarge, outline

WIDTH, HEIGHT = 1000, 668  # in pixels of a README; the file has twice as many
TOP, MIDDLE, BOTTOM = 142, 238, 334  # centres of the rows: image A, what is common to both, image B
PANEL = 432  # where the lower part starts
BLUE, ORANGE, MASK_TOKEN, NOTHING = map(ImageColor.getrgb, (COLOURS["A"], COLOURS["B"], HAIRLINE, LIGHT))

figure = Figure((WIDTH / 72, HEIGHT / 72), dpi=144)
axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
axes.axis("off")


def write(x: float, y: float, text: str, size: float = 11, color: str = INK, ha: str = "center") -> None:
    axes.text(x, y, text, size=size, color=color, ha=ha, va="center", linespacing=1.35)


def heading(x: float, number: int, title: str, explanation: str) -> None:
    write(x, 26, f"{number}  {title}", size=15, ha="left")
    write(x, 49, explanation, color=MUTED, ha="left")


def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
    style = dict(arrowstyle="-|>,head_width=0.22,head_length=0.45", color=MUTED, linewidth=1.3, shrinkA=0, shrinkB=0)
    axes.annotate("", end, start, arrowprops=style)


def box(left: float, top: float, width: float, height: float) -> None:
    axes.add_patch(FancyBboxPatch((left, top), width, height, "round,pad=0,rounding_size=8", color=LIGHT, linewidth=0, zorder=-1))


def show(image: np.ndarray, left: float, middle: float, side: float, **outlined: Tensor) -> None:
    """An image (H, W, 3), with the contours of the cells that are A's or B's."""
    if outlined:
        size = (2 * side, 2 * side)
        image = enlarge(image, size)
        for name, region in outlined.items():
            image[outline(region, size)] = ImageColor.getrgb(COLOURS[name])
    top = middle - side / 2
    axes.imshow(image, extent=(left, left + side, top + side, top), aspect="auto", interpolation="none")


def show_tokens(hidden: Tensor, left: float, middle: float, side: float) -> None:
    """A grid of tokens (rows, columns) in the colours of their images."""
    show(select(np.array(BLUE), np.array(ORANGE), hidden), left, middle, side)
    lines, pitch = np.arange(len(hidden) + 1), side / len(hidden)
    style = dict(color="white", linewidth=min(1.5, pitch / 5))
    axes.vlines(left + lines * pitch, middle - side / 2, middle + side / 2, **style)
    axes.hlines(middle - side / 2 + lines * pitch, left, left + side, **style)


def show_attention(group: Tensor, left: float, middle: float, side: float) -> None:
    """Who attends to whom: (N, N) pairs of tokens in the colour of their image, beside the tokens (N,) themselves."""
    pairs = np.where((group[:, None] == group).numpy()[..., None], select(BLUE, ORANGE, group), np.uint8(255))
    show(pairs.astype(np.uint8), left, middle, side)
    tokens = select(np.array(BLUE), np.array(ORANGE), group[:, None])
    top = middle - side / 2
    axes.imshow(tokens, extent=(left - 9, left - 3, top + side, top), aspect="auto", interpolation="none")
    tokens = tokens.swapaxes(0, 1)
    axes.imshow(tokens, extent=(left, left + side, top - 3, top - 9), aspect="auto", interpolation="none")


def select(own: np.ndarray, other: np.ndarray, hidden: Tensor) -> np.ndarray:
    """`own` where the mask is False, `other` where it is True: images (H, W, 3) or colours; the mask (H, W)."""
    return np.where(hidden.numpy()[..., None], other, own).astype(np.uint8)


def draw() -> None:
    model = mixmae_tiny()
    hidden = model.random_masking(0.5, torch.Generator().manual_seed(int(sys.argv[1]) if len(sys.argv)>1 else 4)).bool().view(model.grid_size)
    own, everywhere, pixels = ~hidden, hidden | True, upsample(hidden, model.encoder_stride)
    crop = ResizeAndCentreCrop(model.img_size, crop_ratio=1.0)
    paths = [ROOT / "tests" / "data" / name for name in ("astronaut.jpg", "chelsea.jpg")]
    a, b = (crop(decode(path.read_bytes(), 3)).permute(1, 2, 0).contiguous().numpy() for path in paths)

    heading(20, 1, "Mask and mix", "two images, cell by cell")
    show(a, 20, TOP, 130, A=everywhere)
    write(85, TOP + 78, "image A")
    show(b, 20, BOTTOM, 130, B=everywhere)
    write(85, BOTTOM + 78, "image B")
    show_tokens(hidden, 212, 108, 64)
    write(286, 108, f"random mask:\n{hidden.sum()} of {hidden.numel()} cells\nshow image B", ha="left")
    show(select(a, b, pixels), 212, MIDDLE, 130, A=own, B=hidden)
    write(277, MIDDLE + 78, "mixture")
    write(277, MIDDLE + 108, "A and B swapped: a second\nmixture, encoded as well", color=MUTED, size=10)
    arrow((156, TOP), (206, MIDDLE - 25))
    arrow((156, BOTTOM), (206, MIDDLE + 25))
    arrow((244, 144), (244, MIDDLE - 69))

    heading(396, 2, "Encode", "attention within each image only")
    arrow((348, MIDDLE), (390, MIDDLE))
    box(396, MIDDLE - 65, 206, 130)
    write(499, MIDDLE - 47, "Swin encoder, 4 stages")
    left = 406
    for stage, (rows, columns) in enumerate(stage_grids(model.img_size, patch_size=4)):
        side = 58 - 10 * stage
        show_tokens(upsample(hidden, rows // len(hidden)), left, MIDDLE + 2, side)
        write(left + side / 2, MIDDLE + 47, f"{rows}×{columns}", size=9.5)
        left += side + 7

    heading(640, 3, "Decode twice", "unmixed, mask tokens filled in")
    arrow((608, MIDDLE - 30), (634, TOP))
    arrow((608, MIDDLE + 30), (634, BOTTOM))
    show(select(a, np.array(MASK_TOKEN), pixels), 640, TOP, 110, A=own)
    show(select(np.array(MASK_TOKEN), b, pixels), 640, BOTTOM, 110, B=hidden)
    write(695, TOP + 68, "tokens of A")
    write(695, BOTTOM + 68, "tokens of B")
    box(774, TOP - 55, 76, BOTTOM - TOP + 110)
    write(812, MIDDLE, "decoder,\nthe same\nfor both")

    heading(874, 4, "Loss", "on what was hidden")
    for row in (TOP, BOTTOM):
        arrow((754, row), (771, row))
        arrow((853, row), (870, row))
    show(select(np.array(NOTHING), a, pixels), 874, TOP, 110, A=hidden)
    show(select(b, np.array(NOTHING), pixels), 874, BOTTOM, 110, B=own)
    write(929, TOP + 68, "hidden cells of A")
    write(929, BOTTOM + 68, "hidden cells of B")
    write(929, MIDDLE + 4, "mean squared\nerror of both")

    axes.plot((499, 499), (MIDDLE + 70, PANEL - 5), color=HAIRLINE, linewidth=2)
    box(20, PANEL, WIDTH - 40, HEIGHT - PANEL - 20)
    write(44, PANEL + 58, "In every window", size=15, ha="left")
    write(
        44,
        PANEL + 128,
        "Tokens attend only to tokens of\ntheir own image. Sorted by image,\nmasked attention is two smaller\n"
        "dense attentions: half the pairs,\nexactly the same result.",
        color=MUTED,
        ha="left",
    )
    group, middle = hidden.flatten(), PANEL + 96
    order = sorted_layout(hidden.int(), len(hidden), hidden.device).order
    show_tokens(hidden, 312, middle, 112)
    show_attention(group, 528, middle, 147)
    show_attention(group[order], 800, middle, 147)
    arrow((436, middle), (506, middle))
    arrow((686, middle), (778, middle))
    write(732, middle - 14, "sort")
    visible, number = int(own.sum()), len(group)
    write(368, PANEL + 195, f"{number} tokens")
    write(601, PANEL + 195, f"masked: {number}×{number} pairs")
    write(873, PANEL + 195, f"dense: {visible}×{visible} and {number - visible}×{number - visible}")


draw()
figure.savefig(sys.argv[2] if len(sys.argv)>2 else Path(__file__).with_suffix(".png"))
