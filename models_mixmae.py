"""MixMAE: mixed and masked autoencoder (Liu et al., CVPR 2023, https://arxiv.org/abs/2205.13137).

Two images are mixed token by token, a hierarchical encoder sees the mixture with attention inside each image only,
and a decoder reconstructs both images from it. The mask has one polarity everywhere: 0 = the token is the image's
own, 1 = it is replaced by its partner's token, so the image's own content there is hidden.
"""

from collections.abc import Sequence

import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from models_swin import SHAPES, SwinTransformer, default_cfg
from util.errors import UserError
from util.layers.conversion import checkpoint_filter_fn
from util.layers.initialization import init_linear_and_norm
from util.layers.pos_embed import get_2d_sincos_pos_embed, resize_pos_embed
from util.layers.sizes import NUM_STAGES, to_side
from util.layers.stage import Block, run_block
from util.layers.windows import to_device, upsample


class MixMAE(SwinTransformer):
    """The encoder with mixing in front of it and a dual-reconstruction decoder behind it (section 3).

    Args:
        decoder_dim, decoder_depth, decoder_num_heads: width, blocks and heads of the decoder.
        norm_pix_loss: normalise each target cell by its own mean and variance.
        range_mask_ratio: adds U(0, range_mask_ratio) to the mask ratio of every step.
        **encoder: arguments of `SwinTransformer`; an unknown one is a TypeError.

    Raises:
        UserError: when the sides of images are no multiples of `encoder_stride`, the side of a cell in pixels.
        ValueError: when the decoder is empty.
    """

    def __init__(
        self,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
        range_mask_ratio: float = 0.0,
        **encoder,
    ):
        super().__init__(**{"num_classes": 0, **encoder})
        if decoder_depth < 1:
            raise ValueError(f"the decoder needs at least one block, got decoder_depth={decoder_depth}")
        self.norm_pix_loss = norm_pix_loss
        self.range_mask_ratio = range_mask_ratio
        self.group_sizes_vary = range_mask_ratio > 0

        with torch.device(self.absolute_pos_embed.device):
            self.decoder_embed = nn.Linear(self.num_features, decoder_dim)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
            pos_embed = get_2d_sincos_pos_embed(decoder_dim, self.grid_size)
            self.decoder_pos_embed = nn.Parameter(pos_embed, requires_grad=False)
            self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_num_heads) for _ in range(decoder_depth))
            self.decoder_norm = nn.LayerNorm(decoder_dim)
            self.decoder_pred = nn.Linear(decoder_dim, self.encoder_stride**2 * self.in_chans)
            for module in (self.decoder_embed, self.decoder_blocks, self.decoder_norm, self.decoder_pred):
                module.apply(init_linear_and_norm)
            trunc_normal_(self.mask_token, std=0.02)
        self.to(self.absolute_pos_embed.dtype)

    @property
    def num_cells(self) -> int:
        """Cells of the last stage, L: what a mask hides and a prediction restores."""
        return self.grid_size[0] * self.grid_size[1]

    @staticmethod
    def check_input_size(img_size: tuple[int, int], patch_size: int) -> None:
        """Raise a UserError for sizes that cannot work: masks and predictions are made of whole cells."""
        SwinTransformer.check_input_size(img_size, patch_size)
        stride = 2 ** (NUM_STAGES - 1) * patch_size
        if any(side % stride for side in img_size):
            nearest = (str(max(1, round(side / stride)) * stride) for side in img_size)
            raise UserError(
                f"pretraining masks cells of {stride}x{stride} pixels (8 patches of {patch_size}): both sides must be "
                f"multiples of {stride}, got input size {img_size[0]}x{img_size[1]}; use {'x'.join(nearest)}"
            )

    def set_input_size(
        self,
        img_size: int | Sequence[int] | None = None,
        patch_size: int | Sequence[int] | None = None,
        window_size: int | Sequence[int] | None = None,
        window_ratio: int | Sequence[int] | None = None,
        always_partition: bool | None = None,
    ) -> None:
        """As the encoder's; the patch must stay, since the decoder predicts cells of 8x8 patches."""
        if patch_size is not None and to_side(patch_size) != self.patch_size:
            raise UserError(f"the decoder predicts cells of patches of {self.patch_size} pixels, got {patch_size}")
        cells = self.grid_size
        super().set_input_size(img_size, patch_size, window_size, window_ratio, always_partition)
        embedding = resize_pos_embed(self.decoder_pos_embed, cells, self.grid_size)
        self.decoder_pos_embed = nn.Parameter(embedding, requires_grad=False)

    def forward(
        self, imgs: Tensor, mask_ratio: float = 0.5, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pretraining step's loss.

        Args:
            imgs: (B, C, H, W) normalised images, B even: image i is mixed with image B-1-i.
            mask_ratio: share of the cells that is replaced by the partner's.
            mask: optional (L,) 0/1 over the cells in row-major order, best on the CPU; drawn when None.

        Returns:
            loss: scalar.
            pred: (B, L, s*s*C), the reconstruction; every cell comes from the branch in which it was hidden.
            mask: (L,) the mask used, on the CPU.

        Raises:
            UserError: for an odd batch, and for a mask or ratio that hides no or all cells.
            ValueError: for a mask of another form.
        """
        mask = self.random_masking(mask_ratio) if mask is None else self.check_mask(mask)
        latent = self.forward_encoder(imgs, mask)
        pred = self.forward_decoder(latent, mask)
        loss = self.run_part(MixMAE.forward_loss, imgs, pred)
        return loss, pred, mask

    # -- Mask ----------------------------------------------------------------------------------------------------

    def random_masking(self, mask_ratio: float, generator: torch.Generator | None = None) -> Tensor:
        """Draw one mask for the whole batch: (L,) float, `int(L * mask_ratio)` ones placed uniformly (section 3.1)."""
        if not 0 < mask_ratio < 1 or not 0 <= self.range_mask_ratio < 1 - mask_ratio:
            raise UserError(
                f"mask_ratio must lie between 0 and 1, and mask_ratio + range_mask_ratio below 1; "
                f"got mask_ratio={mask_ratio}, range_mask_ratio={self.range_mask_ratio}"
            )
        if self.range_mask_ratio:
            mask_ratio += self.range_mask_ratio * torch.rand((), generator=generator, device="cpu").item()
        hidden = int(self.num_cells * mask_ratio)
        mask = torch.zeros(self.num_cells, device="cpu")
        mask[torch.randperm(self.num_cells, generator=generator, device="cpu")[:hidden]] = 1
        return self.check_mask(mask)

    def check_mask(self, mask: Tensor) -> Tensor:
        """The mask on the CPU; raises as `forward` does."""
        mask = mask.detach().cpu()
        hidden = int(mask.count_nonzero())
        if mask.shape != (self.num_cells,) or not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(
                f"a mask is 0 or 1 for each of the {self.num_cells} cells, shape ({self.num_cells},); "
                f"got shape {tuple(mask.shape)} with values from {mask.min():g} to {mask.max():g}"
            )
        if self.num_cells < 2:
            height, width = self.img_size
            raise UserError(
                f"an image of {height}x{width} is one cell of {self.encoder_stride}x{self.encoder_stride} pixels, of "
                "which no part can be hidden and another visible: use a larger input size or smaller patches"
            )
        if not 0 < hidden < self.num_cells:
            raise UserError(
                f"the mask hides {hidden} of {self.num_cells} cells: there is nothing to learn unless at least one is "
                f"hidden and one visible; use a mask_ratio between {1 / self.num_cells:.3g} and "
                f"{1 - 1 / self.num_cells:.3g}"
            )
        return mask

    # -- Mix and encode ------------------------------------------------------------------------------------------

    def forward_encoder(self, imgs: Tensor, mask: Tensor) -> Tensor:
        """Mix the images (B, C, H, W) and encode the mixtures: latent (B, L, num_features).

        Row i holds image i where the mask is 0 and image B-1-i where it is 1; tokens of the two never attend to each
        other (masked self-attention, section 3.2).
        """
        if len(imgs) % 2:
            raise UserError(
                f"MixMAE mixes image i with image B-1-i: the batch size must be even, got B={len(imgs)} "
                "(the middle image would be its own partner and nothing of it would be hidden)"
            )
        if imgs.shape[2:] != self.img_size:
            raise UserError(f"pretraining takes images of {self.img_size[0]}x{self.img_size[1]}: call set_input_size")
        partner = to_selector(upsample(mask.view(self.grid_size), 2 ** (NUM_STAGES - 1)), imgs.device)
        x = self.run_part(MixMAE.embed_mixture, imgs, partner)
        return self.norm(self.forward_stages(x, group=mask)[-1]).flatten(1, 2)

    def embed_mixture(self, imgs: Tensor, partner: Tensor) -> Tensor:
        """x * (1 - m) + x.flip(0) * m for the tokens x of the images; `partner` (rows, columns, 1) is where m is 1.

        Positions, which all images share, are the mixture's too.
        """
        x = self.embed(imgs)
        return torch.where(partner, x.flip(0), x)

    # -- Unmix and decode ----------------------------------------------------------------------------------------

    def forward_decoder(self, latent: Tensor, mask: Tensor) -> Tensor:
        """Latent (B, L, num_features) -> pixels (B, L, s*s*C) of every cell, from the branch where it was hidden.

        The mixture is unmixed into two rows per input, each image's visible tokens with mask tokens elsewhere
        (dual reconstruction, section 3.3). Only hidden cells are ever predicted.
        """
        return self.run_part(MixMAE.decode, latent, to_selector(mask, latent.device))

    def decode(self, latent: Tensor, partner: Tensor) -> Tensor:
        """`forward_decoder` on the device alone: `partner` (L, 1) is where the mask is 1."""
        x = self.decoder_embed(latent)
        mask_token = self.mask_token.to(x.dtype)
        x = torch.cat([torch.where(partner, mask_token, x), torch.where(partner, x, mask_token)])  # (2B, L, D)
        x = x + self.decoder_pos_embed
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = run_block(block, x, recompute=self.layers[0].grad_checkpointing)
        # After the last attention tokens are independent of each other: go on with the hidden ones alone.
        x = last(x, select=lambda x: self.keep_hidden(x, partner))  # (B, L, D)
        return self.decoder_pred(self.decoder_norm(x))

    @staticmethod
    def keep_hidden(x: Tensor, partner: Tensor) -> Tensor:
        """Both branches (2B, L, D) -> image i's hidden cells (B, L, D): branch 1 where the mask is 1, else branch 2.

        Row i of the second branch reconstructs image B-1-i, hence the flip.
        """
        first, second = x.chunk(2)
        return torch.where(partner, first, second.flip(0))

    # -- Loss ----------------------------------------------------------------------------------------------------

    def forward_loss(self, imgs: Tensor, pred: Tensor) -> Tensor:
        """Mean squared error over the pixels of all cells (section 3.3); each was hidden from its prediction."""
        target = self.patchify(imgs)
        if self.norm_pix_loss:
            mean, std = self.cell_statistics(target)
            target = (target - mean) / std
        return (pred.float() - target).square().mean()

    @staticmethod
    def cell_statistics(cells: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (unbiased, eps 1e-6 in the root) of each cell: (B, L, P) -> 2 x (B, L, 1)."""
        var, mean = torch.var_mean(cells, dim=-1, keepdim=True)
        return mean, (var + 1e-6).sqrt()

    def patchify(self, imgs: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, s*s*C); the pixels of a cell in the order (row, column, channel)."""
        rows, columns, s = *self.grid_size, self.encoder_stride
        x = imgs.unflatten(3, (columns, s)).unflatten(2, (rows, s))  # (B, C, rows, s, columns, s)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, cells: Tensor) -> Tensor:
        """(B, L, s*s*C) -> (B, C, H, W), the inverse of `patchify`."""
        rows, columns, s = *self.grid_size, self.encoder_stride
        x = cells.view(-1, rows, columns, s, s, self.in_chans)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def to_selector(mask: Tensor, device: torch.device) -> Tensor:
    """A 0/1 mask over tokens as booleans (*tokens, 1) that broadcast over batch and channels."""
    return to_device(mask[..., None].bool(), device)


default_cfgs = generate_default_cfgs({f"mixmae_{size}": default_cfg(shape) for size, shape in SHAPES.items()})


def build_mixmae(variant: str, pretrained: bool, shape: dict, kwargs: dict) -> MixMAE:
    arguments = {"num_classes": 0, **shape, **kwargs}
    return build_model_with_cfg(MixMAE, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **arguments)


@register_model
def mixmae_quickstart(pretrained: bool = False, **kwargs) -> MixMAE:
    """Small enough to pretrain on a laptop in minutes: 32x32 inputs, 4x4 cells."""
    decoder = dict(decoder_dim=64, decoder_depth=1, decoder_num_heads=4)
    return build_mixmae("mixmae_quickstart", pretrained, SHAPES["quickstart"] | decoder, kwargs)


@register_model
def mixmae_tiny(pretrained: bool = False, **kwargs) -> MixMAE:
    """Encoder of about the size of Swin-T."""
    return build_mixmae("mixmae_tiny", pretrained, SHAPES["tiny"], kwargs)


@register_model
def mixmae_base(pretrained: bool = False, **kwargs) -> MixMAE:
    """MixMAE with Swin-B/W14 (paper, table 1): 114.7 M parameters."""
    return build_mixmae("mixmae_base", pretrained, SHAPES["base"], kwargs)


@register_model
def mixmae_large(pretrained: bool = False, **kwargs) -> MixMAE:
    """MixMAE with Swin-L/W14: 223.5 M parameters."""
    return build_mixmae("mixmae_large", pretrained, SHAPES["large"], kwargs)


@register_model
def mixmae_huge(pretrained: bool = False, **kwargs) -> MixMAE:
    """MixMAE with Swin-H/W14: 684.7 M parameters."""
    return build_mixmae("mixmae_huge", pretrained, SHAPES["huge"], kwargs)
