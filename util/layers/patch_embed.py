"""Patch embedding of images of any size."""

import torch.nn.functional as F
from timm.layers import PatchEmbed, register_notrace_module
from torch import Tensor, nn

from util.errors import UserError
from util.layers.sizes import stage_grids, to_2tuple


@register_notrace_module
class PaddedPatchEmbed(PatchEmbed):
    """timm's patch embedding, normed: images (B, C, H, W) -> (B, rows, columns, embed_dim).

    If patches do not divide a side, zeros complete the last ones at the right and bottom.

    Args:
        img_size: height and width of the images.
        strict_img_size: take no others.
    """

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, strict_img_size: bool
    ):
        super().__init__(
            img_size, patch_size, in_chans, embed_dim, nn.LayerNorm, output_fmt="NHWC", strict_img_size=strict_img_size
        )

    def _init_img_size(self, img_size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int], int]:
        rows, columns = stage_grids(to_2tuple(img_size), self.patch_size[0])[0]
        return to_2tuple(img_size), (rows, columns), rows * columns

    def set_input_size(self, *args, **kwargs) -> None:
        trains = self.proj.weight.requires_grad
        super().set_input_size(*args, **kwargs)
        self.proj.requires_grad_(trains)  # which timm before 1.0.31 may forget

    def forward(self, imgs: Tensor) -> Tensor:
        in_chans, patch_size = self.proj.in_channels, self.patch_size[0]
        if imgs.ndim != 4 or imgs.shape[1] != in_chans or (self.strict_img_size and imgs.shape[2:] != self.img_size):
            sides = ", ".join(map(str, self.img_size)) if self.strict_img_size else "H, W"
            raise UserError(
                f"the model takes images of shape (B, {in_chans}, {sides}), got {tuple(imgs.shape)}: build it with "
                "in_chans and img_size of your images (strict_img_size=False: for any size), or resize them"
            )
        below, right = (-side % patch_size for side in imgs.shape[2:])
        if below or right:
            imgs = F.pad(imgs, (0, right, 0, below))
        return self.norm(self.proj(imgs).permute(0, 2, 3, 1))
