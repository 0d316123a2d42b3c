"""Draws figures/method.png, the method on one pair of photographs: `python figures/method.py`.

Mask, mixture, sorted tokens, the decoder's inputs and the targets are exact. Predictions would take a trained model,
so none are shown.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import ImageColor
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models_mixmae import mixmae_tiny
from util.data.decoding import decode
from util.data.transforms import ResizeAndCentreCrop
from util.layers.sizes import stage_grids
from util.layers.windows import sort_tokens, upsample
from util.visualize import COLOURS, HAIRLINE, INK, LIGHT, MUTED, enlarge, outline

FOLDER = Path(__file__).resolve().parent
WIDTH, HEIGHT = 1000, 664  # in pixels of a README; the file has twice as many
TOP, MIDDLE, BOTTOM, PANEL = 142, 238, 334, 432  # centres of image A, of both, and of image B; top of the lower part
BLUE, ORANGE, MASK_TOKEN, NOTHING = np.array([ImageColor.getrgb(c) for c in (*COLOURS.values(), HAIRLINE, LIGHT)])

figure = Figure((WIDTH / 72, HEIGHT / 72), dpi=144)
axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
axes.axis("off")


def write(x: float, y: float, text: str, size: float = 11, color: str = INK, ha: str = "center") -> None:
    """Lines of text, the first one's baseline at `y`."""
    for number, line in enumerate(text.split("\n")):
        axes.text(x, y + number * 1.5 * size, line, size=size, color=color, ha=ha)


def heading(x: float, y: float, title: str, explanation: str) -> None:
    write(x, y, title, size=15, ha="left")
    write(x, y + 22, explanation, color=MUTED, ha="left")


def arrow(*ends: tuple[float, float]) -> None:
    style = dict(arrowstyle="-|>,head_width=0.22,head_length=0.45", color=MUTED, linewidth=1.3, shrinkA=0, shrinkB=0)
    axes.annotate("", ends[1], ends[0], arrowprops=style)


def box(left: float, top: float, width: float, height: float) -> None:
    style = dict(boxstyle="round,pad=0,rounding_size=8", color=LIGHT, linewidth=0, zorder=-1)
    axes.add_patch(FancyBboxPatch((left, top), width, height, **style))


def place(image: np.ndarray, left: float, top: float, width: float, height: float) -> None:
    axes.imshow(image, extent=(left, left + width, top + height, top), aspect="auto", interpolation="none")


def show(image: np.ndarray, left: float, middle: float, side: float, label: str, **outlined: Tensor) -> None:
    """An image (H, W, 3) with its label, and the contours of the cells that are A's or B's."""
    image = enlarge(image, (2 * side, 2 * side))
    for name, region in outlined.items():
        image[outline(region, image.shape[:2])] = ImageColor.getrgb(COLOURS[name])
    place(image, left, middle - side / 2, side, side)
    write(left + side / 2, middle + side / 2 + 18, label)


def show_tokens(hidden: Tensor, left: float, middle: float, side: float) -> None:
    """A grid of tokens (rows, columns) in the colours of their images."""
    place(select(BLUE, ORANGE, hidden), left, middle - side / 2, side, side)
    lines = np.linspace(0, side, len(hidden) + 1)
    style = dict(color="white", linewidth=min(1.5, side / len(hidden) / 7))
    axes.vlines(left + lines, middle - side / 2, middle + side / 2, **style)
    axes.hlines(middle - side / 2 + lines, left, left + side, **style)


def show_attention(group: Tensor, left: float, top: float, side: float) -> None:
    """Who attends to whom: the pairs (N, N) of tokens that see each other, beside the tokens (N,) themselves."""
    tokens = select(BLUE, ORANGE, group[:, None])  # (N, 1, 3)
    place(tokens, left - 9, top, 6, side)
    place(tokens.swapaxes(0, 1), left, top - 9, side, 6)
    place(select(np.uint8(255), tokens // 2 + 127, group[:, None] == group), left, top, side, side)


def select(own: np.ndarray, other: np.ndarray, hidden: Tensor) -> np.ndarray:
    """`own` where the mask (H, W) is False, `other` where it is True: images (H, W, 3) or colours."""
    return np.where(hidden.numpy()[..., None], other, own).astype(np.uint8)


def draw() -> None:
    model = mixmae_tiny()
    hidden = model.random_masking(0.5, torch.Generator().manual_seed(22)).bool().view(model.grid_size)
    own, pixels = ~hidden, upsample(hidden, model.encoder_stride)
    crop = ResizeAndCentreCrop(model.img_size, crop_ratio=1.0)
    photos = [FOLDER.parent / "tests" / "data" / name for name in ("astronaut.jpg", "chelsea.jpg")]
    a, b = (crop(decode(path.read_bytes(), 3)).permute(1, 2, 0).numpy() for path in photos)

    heading(20, 32, "1  Mask and mix", "two images, cell by cell")
    show(a, 20, TOP, 130, "image A", A=own | hidden)
    show(b, 20, BOTTOM, 130, "image B", B=own | hidden)
    show_tokens(hidden, 212, 109, 64)
    write(286, 96, f"random mask:\n{hidden.sum()} of {hidden.numel()} cells\nshow image B", ha="left")
    show(select(a, b, pixels), 212, MIDDLE, 130, "mixture", A=own, B=hidden)
    write(277, MIDDLE + 105, "its complement, with A and B\nswapped, is encoded as well", size=10, color=MUTED)
    arrow((156, TOP), (206, MIDDLE - 25))
    arrow((156, BOTTOM), (206, MIDDLE + 25))
    arrow((244, 145), (244, MIDDLE - 69))

    heading(396, 32, "2  Encode", "attention within each image only")
    arrow((348, MIDDLE), (390, MIDDLE))
    box(396, MIDDLE - 65, 213, 130)
    write(502, MIDDLE - 43, "Swin encoder, 4 stages")
    for left, side, grid in zip((406, 471, 526, 571), (58, 48, 38, 28), stage_grids(model.img_size, patch_size=4)):
        show_tokens(upsample(hidden, grid[0] // len(hidden)), left, MIDDLE + 4, side)
        write(left + side / 2, MIDDLE + 52, "{}\u00d7{}".format(*grid), size=9.5)

    heading(640, 32, "3  Decode twice", "unmixed, mask tokens filled in")
    show(select(a, MASK_TOKEN, pixels), 640, TOP, 110, "tokens of A", A=own)
    show(select(MASK_TOKEN, b, pixels), 640, BOTTOM, 110, "tokens of B", B=hidden)
    box(774, TOP - 55, 76, BOTTOM - TOP + 110)
    write(812, MIDDLE - 12, "decoder,\nthe same\nfor both")

    heading(874, 32, "4  Loss", "on what was hidden")
    show(select(NOTHING, a, pixels), 874, TOP, 110, "hidden cells of A", A=hidden)
    show(select(b, NOTHING, pixels), 874, BOTTOM, 110, "hidden cells of B", B=own)
    write(929, MIDDLE + 3, "mean squared\nerror", color=MUTED)
    for row, leaving in ((TOP, MIDDLE - 30), (BOTTOM, MIDDLE + 30)):
        arrow((614, leaving), (634, row))
        arrow((754, row), (771, row))
        arrow((853, row), (870, row))

    axes.plot((502, 502), (MIDDLE + 70, PANEL - 5), color=HAIRLINE, linewidth=2)
    box(20, PANEL, WIDTH - 40, HEIGHT - PANEL - 16)
    explanation = (
        "Tokens attend only to tokens of\ntheir own image. Sorted by image,\nmasked attention is two smaller\n"
        "dense attentions: half the pairs,\nexactly the same result."
    )
    heading(44, PANEL + 66, "In every window", explanation)
    group = hidden.flatten()
    order, _, _ = sort_tokens(model.grid_size, len(hidden), group.int().numpy())
    number, visible, middle = len(group), int(own.sum()), PANEL + 101
    show_tokens(hidden, 312, middle, 112)
    arrow((436, middle), (506, middle))
    show_attention(group, 528, middle - 73.5, 147)
    arrow((686, middle), (778, middle))
    write(732, middle - 9, "sort")
    show_attention(group[order], 800, middle - 73.5, 147)
    write(368, PANEL + 198, f"{number} tokens")
    write(601, PANEL + 198, f"masked: {number}\u00d7{number} pairs")
    write(873, PANEL + 198, f"dense: {visible}\u00d7{visible} and {number - visible}\u00d7{number - visible}")


if __name__ == "__main__":
    draw()
    figure.savefig(FOLDER / "method.png")
