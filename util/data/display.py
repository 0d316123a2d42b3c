"""Images of any number of channels and in any units as 8-bit pictures for people."""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from util.errors import UserError

INK, MUTED, HAIRLINE, LIGHT = "#1d2129", "#667080", "#d9dde3", "#f1f3f5"
# Of the images in a mixture. The first two differ to every kind of colour vision, and show on black and on white.
COLOURS = {"A": "#2f7fe8", "B": "#f0821e", "C": "#3a9d5d", "D": "#b04fc4", "E": "#c23b4b", "F": "#0f9aa8"}
OUTLINE = 3  # width of the contours of cells, in pixels


def shown_channels(in_chans: int, channels: Sequence[int] | None = None) -> tuple[int, ...]:
    """The channels to show: one as grey or three as red, green and blue; the first ones unless `channels` says which.

    Raises:
        UserError: for channels that do not exist, or other than one or three.
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

    Images of one or three channels with values from 0 to 1, as files of 8 bits have them, are shown as they are. For
    others it is unknown which value is white: every channel is scaled from the 1st to the 99th percentile of `imgs`.
    """

    def __init__(
        self, imgs: Tensor, mean: Sequence[float], std: Sequence[float], channels: Sequence[int] | None = None
    ):
        self.mean, self.std = (np.array(values, np.float32)[:, None, None] for values in (mean, std))
        self.channels = shown_channels(imgs.shape[1], channels)
        self.low, self.high = 0.0, 1.0
        pixels = self.pixels(imgs)
        self.stretched = imgs.shape[1] not in (1, 3) or pixels.min() < -1e-3 or pixels.max() > 1 + 1e-3
        if self.stretched:
            self.low, high = np.percentile(pixels, (1, 99), axis=(0, 2, 3), keepdims=True)
            self.high = np.maximum(high, self.low + 1e-6)

    def pixels(self, imgs: Tensor) -> np.ndarray:
        """The shown channels of normalised images, in the units of `mean` and `std`."""
        return (imgs.float().cpu().numpy() * self.std + self.mean)[:, self.channels]

    def __call__(self, imgs: Tensor) -> np.ndarray:
        """(B, C, H, W) normalised -> (B, H, W, 3) in 8 bits."""
        pixels = (self.pixels(imgs) - self.low) / (self.high - self.low)
        pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
        return pixels if len(self.channels) == 3 else pixels.repeat(3, axis=-1)

    def caption(self, in_chans: int) -> list[str]:
        """Sentences that describe what is shown, if that is not obvious."""
        sentences = []
        if in_chans not in (1, 3) or self.channels not in ((0,), (0, 1, 2)):
            names = " ".join(map(str, self.channels))
            how = "as grey" if len(self.channels) == 1 else "as red, green and blue"
            sentences.append(f"Of the {in_chans} channels (numbered from 0), {names} shown {how}.")
        if self.stretched:
            sentences.append("Brightness runs from the 1st to the 99th percentile of the originals, per channel.")
        return sentences


def without_formulas(legend) -> None:
    """Show the texts of a matplotlib legend as they are: a name with two `$` would become a formula."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def render(figure) -> Image.Image:
    """A matplotlib figure as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # only one rank of a run draws

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def enlarge(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image (H, W, 3) at `size` (width, height): its pixels as blocks if the factor is whole, else smoothly."""
    method = Image.Resampling.LANCZOS if size[0] % image.shape[1] else Image.Resampling.NEAREST
    return np.array(Image.fromarray(image).resize(size, method))


def outline(region: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Cells (rows, columns) -> pixels (H, W) that are True along the contours of the True cells, just inside them."""
    inside = F.interpolate(region[None, None].float(), size)
    outside = F.pad(1 - inside, (OUTLINE,) * 4, value=1)
    near_outside = F.max_pool2d(outside, 2 * OUTLINE + 1, stride=1)
    return (inside * near_outside)[0, 0].bool().numpy()
