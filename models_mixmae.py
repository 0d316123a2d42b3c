"""MixMAE: mixed and masked autoencoder (Liu et al., CVPR 2023, https://arxiv.org/abs/2205.13137).

Two images are mixed cell by cell, a hierarchical encoder sees the mixture with attention inside each image only,
and a decoder reconstructs both images from it. The mask has one polarity everywhere: 0 = the token is the image's
own, 1 = it is replaced by its partner's token, so the image's own content there is hidden. (With more than two images
in a mixture, k = it is replaced by the k-th partner's.)
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
from util.layers.mixing import FILLINGS, PARTNERS, images_of_tuples
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
        mix_embed: add a learned vector to the tokens at the start of each stage, one for each image of a mixture ("mix
            embeddings", section 2.3). They start at zero.
        masked_attn: let tokens attend only to those of the same image. False: to all of their window.
        mix_images: images in a mixture, K.
        partners: 'pairs' (tuples of K images, whose K mixtures contain every token once) or 'cycle' (each image with
            the K-1 after it, so that it meets others in each of its mixtures).
        reconstruct: 'dual' (every image of a mixture) or 'single' (only its first image).
        fill: what takes the place of hidden tokens: 'partner' (another image's, the method); 'mask_token' (a learned
            token, as in SimMIM), 'zero' or 'noise' (embedded pixels of value 0, the mean, or of Gaussian noise). With
            the last three, one image is reconstructed from what the encoder gives at every cell.
        **encoder: arguments of `SwinTransformer`; an unknown one is a TypeError.

    Raises:
        UserError: when the sides of images are not multiples of `encoder_stride`, the side of a cell in pixels; for
            settings that exclude each other.
        ValueError: when the decoder is empty.
    """

    def __init__(
        self,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
        range_mask_ratio: float = 0.0,
        mix_embed: bool = False,
        masked_attn: bool = True,
        mix_images: int = 2,
        partners: str = "pairs",
        reconstruct: str = "dual",
        fill: str = "partner",
        **encoder,
    ):
        super().__init__(**{"num_classes": 0, **encoder})
        if decoder_depth < 1:
            raise ValueError(f"the decoder needs at least one block, got decoder_depth={decoder_depth}")
        if decoder_dim % 4 or decoder_dim % decoder_num_heads:
            raise UserError(
                f"decoder_dim must be a multiple of 4 (for its position embedding) and of decoder_num_heads, got "
                f"decoder_dim={decoder_dim}, decoder_num_heads={decoder_num_heads}"
            )
        check_mixing(mix_embed, masked_attn, mix_images, partners, reconstruct, fill)
        self.norm_pix_loss = norm_pix_loss
        self.range_mask_ratio = range_mask_ratio
        self.group_sizes_vary = range_mask_ratio > 0
        self.masked_attn = masked_attn
        self.mix_images = mix_images
        self.partner = PARTNERS[partners]
        self.fill = fill
        self.num_branches = mix_images if reconstruct == "dual" and fill == "partner" else 1

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
            if mix_embed:
                for stage, info in zip(self.layers, self.feature_info):
                    stage.mix_embed = nn.Parameter(torch.zeros(mix_images, info["num_chs"]))
            if fill != "partner":
                self.mask_token.requires_grad_(False)  # no token is taken away between encoder and decoder
            if fill == "mask_token":
                self.fill_token = nn.Parameter(torch.zeros(self.feature_info[0]["num_chs"]))
                trunc_normal_(self.fill_token, std=0.02)
        self.to(self.absolute_pos_embed.dtype)

    @property
    def num_cells(self) -> int:
        """Cells of the last stage, L: what a mask hides and a prediction restores."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def uses_groups(self) -> bool:
        """Whether the encoder treats tokens differently by the image of the mixture that they belong to."""
        return self.masked_attn or self.layers[0].mix_embed is not None

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
            mask: optional (L,) 0/1 (of K images, 0 to K-1) over the cells in row-major order, best on the CPU; drawn
                when None. Or (B, L), the same for images that are mixed, at the cost of one pass through the encoder
                for each pair.

        Returns:
            loss: scalar.
            pred: (B, L, s*s*C), the reconstruction; every cell comes from the branch in which it was hidden. Of K
                images, ((K-1) * B, L, s*s*C), one after another from each of the K-1 branches.
            mask: the mask used, on the CPU.

        Raises:
            UserError: for an odd batch (one that is not a multiple of K), and for a mask or ratio that hides no or all
                cells.
            ValueError: for a mask of another form.
        """
        mask = self.random_masking(mask_ratio) if mask is None else self.check_mask(mask)
        latent = self.forward_encoder(imgs, mask)
        pred = self.forward_decoder(latent, mask)
        loss = self.forward_loss(imgs, pred, mask)
        return loss, pred, mask

    # -- Mask ----------------------------------------------------------------------------------------------------

    def random_masking(
        self, mask_ratio: float, generator: torch.Generator | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Draw one mask for the whole batch: (L,) float, `int(L * mask_ratio)` ones placed uniformly (section 3.1).

        With a `batch_size`, one for each pair (or tuple) of images: (batch_size, L). With K images in a mixture, the
        partners have equal shares of the cells, as far as these can be divided.
        """
        if not 0 < mask_ratio < 1 or not 0 <= self.range_mask_ratio < 1 - mask_ratio:
            raise UserError(
                f"mask_ratio must lie between 0 and 1, and mask_ratio + range_mask_ratio below 1; "
                f"got mask_ratio={mask_ratio}, range_mask_ratio={self.range_mask_ratio}"
            )
        if self.range_mask_ratio:
            mask_ratio += self.range_mask_ratio * torch.rand((), generator=generator, device="cpu").item()
        hidden = int(self.num_cells * mask_ratio)
        partners = 1 + torch.arange(hidden, device="cpu") % (self.mix_images - 1)

        def draw() -> Tensor:
            mask = torch.zeros(self.num_cells, device="cpu")
            mask[torch.randperm(self.num_cells, generator=generator, device="cpu")[:hidden]] = partners.float()
            return mask

        if batch_size is None:
            return self.check_mask(draw())
        mask = torch.empty(batch_size, self.num_cells, device="cpu")
        for rows in images_of_tuples(batch_size, self.mix_images):
            mask[rows] = draw()
        return self.check_mask(mask)

    def check_mask(self, mask: Tensor) -> Tensor:
        """The mask on the CPU; raises as `forward` does."""
        mask = mask.detach().cpu().float()
        legal = torch.arange(self.mix_images, device="cpu")
        if mask.shape[-1:] != (self.num_cells,) or mask.ndim > 2 or not bool(torch.isin(mask, legal).all()):
            raise ValueError(
                f"a mask is {' or '.join(map(str, legal.tolist()))} for each of the {self.num_cells} cells, shape "
                f"({self.num_cells},) or one row of these for each image; "
                f"got shape {tuple(mask.shape)} with values from {mask.min():g} to {mask.max():g}"
            )
        if mask.ndim == 2:
            if len(mask) % self.mix_images or self.partner is not PARTNERS["pairs"]:
                raise ValueError(
                    f"a mask for each image needs tuples of {self.mix_images} images that are mixed with each other "
                    f"alone (partners='pairs'), got masks of {len(mask)} images"
                )
            for rows in images_of_tuples(len(mask), self.mix_images):
                if not (mask[rows] == mask[rows[0]]).all():
                    raise ValueError(f"images that are mixed must have one mask, those of images {rows} differ")
            for row in mask.unique(dim=0):
                self.check_mask(row)
            return mask
        if self.num_cells < self.mix_images:
            height, width = self.img_size
            cells = "one cell" if self.num_cells == 1 else f"{self.num_cells} cells"
            raise UserError(
                f"an image of {height}x{width} is {cells} of {self.encoder_stride}x{self.encoder_stride} pixels, of "
                f"which no part can be hidden and another visible for each of {self.mix_images} images: use a larger "
                "input size or smaller patches"
            )
        shown = [int((mask == k).sum()) for k in range(self.mix_images)]
        if not all(shown):
            raise UserError(
                f"the mask hides {self.num_cells - shown[0]} of {self.num_cells} cells: there is nothing to learn "
                f"unless at least one is visible of each of {self.mix_images} images; use a mask_ratio between "
                f"{(self.mix_images - 1) / self.num_cells:.3g} and {1 - 1 / self.num_cells:.3g}"
            )
        return mask

    # -- Mix and encode ------------------------------------------------------------------------------------------

    def forward_encoder(self, imgs: Tensor, mask: Tensor) -> Tensor:
        """Mix the images (B, C, H, W) and encode the mixtures: latent (B, L, num_features).

        Row i holds image i where the mask is 0 and image B-1-i where it is 1; tokens of the two never attend to each
        other (masked self-attention, section 3.2), unless the model is built without it.
        """
        if mask.ndim == 2 and len(mask) != len(imgs):
            raise ValueError(f"masks of {len(mask)} images, but there are {len(imgs)}: give one mask, or one for each")
        if len(imgs) % self.mix_images:
            raise UserError(
                f"MixMAE mixes image i with image B-1-i: the batch size must be even, got B={len(imgs)} "
                "(the middle image would be its own partner and nothing of it would be hidden)"
                if self.mix_images == 2
                else f"mixtures have {self.mix_images} images: the batch size must be a multiple, got B={len(imgs)}"
            )
        if imgs.shape[2:] != self.img_size:
            raise UserError(f"pretraining takes images of {self.img_size[0]}x{self.img_size[1]}: call set_input_size")
        tokens = upsample(mask.unflatten(-1, self.grid_size), 2 ** (NUM_STAGES - 1))
        x = self.run_part(MixMAE.embed_mixture, imgs, to_device(tokens[..., None], imgs.device))
        return self.norm(self.encode_by_mask(x, mask)).flatten(1, 2)

    def embed_mixture(self, imgs: Tensor, mask: Tensor) -> Tensor:
        """x * (1 - m) + x.flip(0) * m for the tokens x of the images; `mask` (rows, columns, 1) is m.

        Positions, which all images share, are the mixture's too.
        """
        x = mixture = self.embed(imgs)
        if self.fill != "partner":
            return torch.where(mask == 0, x, FILLINGS[self.fill](self, imgs))
        for k in range(1, self.mix_images):
            mixture = torch.where(mask == k, self.partner(x, k, self.mix_images), mixture)
        return mixture

    def encode_by_mask(self, x: Tensor, mask: Tensor) -> Tensor:
        """Mixed tokens -> the last stage's (B, rows, columns, num_features), with groups from each image's mask."""
        if mask.ndim == 1:
            return self.forward_stages(x, group=mask)[-1]
        if not self.uses_groups:
            return self.forward_stages(x)[-1]
        tuples = images_of_tuples(len(x), self.mix_images)
        # A GPU would wait for an index from the CPU, so images are taken one by one, and the way back is copied.
        mixtures = (torch.stack([x[i] for i in rows]) for rows in tuples)
        latent = torch.cat([self.forward_stages(x, mask[rows[0]])[-1] for x, rows in zip(mixtures, tuples)])
        back = torch.tensor(tuples, device="cpu").flatten().argsort()
        return latent.index_select(0, to_device(back, latent.device))

    # -- Unmix and decode ----------------------------------------------------------------------------------------

    def forward_decoder(self, latent: Tensor, mask: Tensor) -> Tensor:
        """Latent (B, L, num_features) -> pixels (B, L, s*s*C) of every cell, from the branch where it was hidden.

        The mixture is unmixed into two rows per input, each image's visible tokens with mask tokens elsewhere
        (dual reconstruction, section 3.3). Only hidden cells are ever predicted. (For other numbers of images and
        branches see `forward`; a single branch predicts every cell of its image.)
        """
        return self.run_part(MixMAE.decode, latent, to_device(mask[..., None], latent.device))

    def decode(self, latent: Tensor, mask: Tensor) -> Tensor:
        """`forward_decoder` on the device alone: `mask` is (L, 1) or (B, L, 1)."""
        x = self.unmix(self.decoder_embed(latent), mask)  # (2B, L, D)
        x = x + self.decoder_pos_embed
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = run_block(block, x, recompute=self.layers[0].grad_checkpointing)
        # After the last attention tokens are independent of each other: go on with the hidden ones alone.
        x = last(x, select=lambda x: self.keep_hidden(x, mask))  # (B, L, D)
        return self.decoder_pred(self.decoder_norm(x))

    def unmix(self, x: Tensor, mask: Tensor) -> Tensor:
        """Mixtures (B, L, D) -> a branch for each of their images (2B, L, D), with mask tokens for the others'."""
        if self.fill != "partner":
            return x
        mask_token = self.mask_token.to(x.dtype)
        return torch.cat([torch.where(mask == k, x, mask_token) for k in range(self.num_branches)])

    def keep_hidden(self, x: Tensor, mask: Tensor) -> Tensor:
        """Both branches (2B, L, D) -> image i's hidden cells (B, L, D): branch 1 where the mask is 1, else branch 2.

        Row i of the second branch reconstructs image B-1-i, hence the flip. With K branches, ((K-1) * B, L, D): for a
        cell that branch k shows, first the branch after k, then the next.
        """
        if self.num_branches == 1:
            return x
        K = self.num_branches
        branches = [self.partner(branch, -k, K) for k, branch in enumerate(x.chunk(K))]  # row i: image i
        kept = []  # of two branches, where(mask == 0, branches[1], branches[0])
        for step in range(1, K):
            rows = branches[0]
            for k in range(1, K):
                rows = torch.where(mask == (k - step) % K, branches[k], rows)
            kept.append(rows)
        return torch.cat(kept) if K > 2 else kept[0]

    # -- Loss ----------------------------------------------------------------------------------------------------

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean squared error over the pixels of all cells (section 3.3); each was hidden from its prediction.

        A single branch predicts visible cells too: given its `mask`, they do not count.
        """
        alone = self.num_branches == 1 and mask is not None
        counts = [to_device(mask[..., None] != 0, imgs.device)] if alone else []
        return self.run_part(MixMAE.mean_error, imgs, pred, *counts)

    def mean_error(self, imgs: Tensor, pred: Tensor, counts: Tensor | None = None) -> Tensor:
        """`forward_loss` on the device alone: `counts` (L, 1) or (B, L, 1) says which cells count."""
        target = self.patchify(imgs)
        if self.norm_pix_loss:
            mean, std = self.cell_statistics(target)
            target = (target - mean) / std
        if self.num_branches > 2:
            target = target.repeat(self.num_branches - 1, 1, 1)
        error = (pred.float() - target).square()
        if counts is None:
            return error.mean()
        error = error.mean(dim=-1, keepdim=True)  # (B, L, 1)
        return (error * counts).sum() / counts.expand_as(error).sum()

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


def check_mixing(
    mix_embed: bool, masked_attn: bool, mix_images: int, partners: str, reconstruct: str, fill: str
) -> None:
    """Raise a UserError for settings of `MixMAE` that do not exist or exclude each other."""
    choices = dict(partners=(*PARTNERS,), reconstruct=("dual", "single"), fill=("partner", *FILLINGS))
    for name, given in dict(partners=partners, reconstruct=reconstruct, fill=fill).items():
        if given not in choices[name]:
            raise UserError(f"{name} must be one of {', '.join(choices[name])}, got {given!r}")
    if mix_images < 2:
        raise UserError(f"a mixture has at least 2 images, got mix_images={mix_images}")
    if partners == "cycle" and masked_attn:
        raise UserError(
            "partners=cycle changes nothing where tokens attend only to those of their own image, since they never see "
            "the others of the mixture: add --no_masked_attn"
        )
    others = mix_embed or mix_images != 2 or partners != "pairs" or reconstruct != "dual"
    if fill != "partner" and (masked_attn or others):
        needed = ["add --no_masked_attn, since every cell is to be seen"] if masked_attn else []
        useless = ["leave out --mix_embed, --mix_images, --partners and --reconstruct"] if others else []
        raise UserError(f"with fill={fill} nothing is mixed: {', and '.join(needed + useless)}")


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
