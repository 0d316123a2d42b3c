"""The encoder: a Swin-style hierarchical vision transformer with large windows (MixMAE, section 3 and appendix A).

It differs from Swin in three ways: windows are large and never shifted, a fixed sine-cosine position embedding is
added to the tokens, and attention can be restricted to groups of tokens, which is all that pretraining on mixed
images needs from an encoder (`models_mixmae.py`).
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, to_ntuple
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from util.errors import UserError
from util.layers.pos_embed import ResizedPosEmbeds, get_2d_sincos_pos_embed, resize_pos_embed
from util.layers.stage import Block, PatchMerging, Stage
from util.layers.windows import NUM_STAGES, WindowLayout, fit_window, stage_grids, to_2tuple, to_side, upsample


class SwinTransformer(nn.Module):
    """Hierarchical encoder of MixMAE and, with its head, the fine-tuned classifier (sections 3 and 4.2).

    Args:
        img_size: input size in pixels, an int or (height, width), of any number of pixels.
        patch_size: side of a patch in pixels; a cell of the last stage covers `encoder_stride = 8 * patch_size`.
        in_chans: image channels.
        num_classes: classes of the linear head; 0 for none.
        embed_dim: channels of the first stage, doubled by every further stage.
        depths, num_heads, window_size: blocks, heads and window side of each of the four stages.
        mlp_ratio: hidden over outer width of the MLPs.
        qkv_bias: whether queries, keys and values have a bias.
        drop_rate, attn_drop_rate: dropout of tokens and MLPs, and of attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        strict_img_size: take images of `img_size` alone; False: of any size.

    A side that patches do not divide is padded with zeros at the right and bottom. Windows that the edge cuts are
    smaller, so that nothing padded is ever attended to. The position embedding is resized to the grid.

    Raises:
        UserError: for a size below 1.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: int | Sequence[int] = (14, 14, 14, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        strict_img_size: bool = True,
    ):
        super().__init__()
        self.img_size = to_2tuple(img_size)
        self.patch_size = patch_size = to_side(patch_size)
        window_size = to_ntuple(NUM_STAGES)(window_size)
        self.check_input_size(self.img_size, patch_size, window_size)
        for name, values in (("depths", depths), ("num_heads", num_heads), ("window_size", window_size)):
            if len(values) != NUM_STAGES:
                raise ValueError(f"{name} needs one value for each of the {NUM_STAGES} stages, got {tuple(values)}")
        self.strict_img_size = strict_img_size
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (NUM_STAGES - 1)
        self.output_fmt = "NHWC"
        self.one_layout_shape = False

        grids = stage_grids(self.img_size, patch_size)
        self.patch_embed = PatchEmbed(
            tuple(side * patch_size for side in grids[0]),  # it takes padded images
            patch_size,
            in_chans,
            embed_dim,
            norm_layer=nn.LayerNorm,
            output_fmt=self.output_fmt,
            strict_img_size=False,
        )
        self.absolute_pos_embed = nn.Parameter(get_2d_sincos_pos_embed(embed_dim, grids[0]), requires_grad=False)
        self.resized_pos_embeds = ResizedPosEmbeds()
        self.pos_drop = nn.Dropout(drop_rate)
        drop_path_rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList()
        self.feature_info = []
        for i, (grid, depth) in enumerate(zip(grids, depths)):
            dim = embed_dim * 2**i
            window = fit_window(grid, window_size[i])
            make_block = partial(Block, dim, num_heads[i], window, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate)
            blocks = [make_block(drop_path=next(drop_path_rates)) for _ in range(depth)]
            downsample = PatchMerging(dim) if i < NUM_STAGES - 1 else None
            self.layers.append(Stage(blocks, grid, window, downsample))
            self.feature_info.append(dict(num_chs=dim, reduction=patch_size * 2**i, module=f"layers.{i}"))
        self.norm = nn.LayerNorm(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(init_linear_and_norm)

    # -- Sizes ---------------------------------------------------------------------------------------------------

    @property
    def encoder_stride(self) -> int:
        """Side of a cell of the last stage, in pixels."""
        return 2 ** (NUM_STAGES - 1) * self.patch_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the last stage."""
        return stage_grids(self.img_size, self.patch_size)[-1]

    @staticmethod
    def check_input_size(img_size: tuple[int, int], patch_size: int, window_size: Sequence[int]) -> None:
        """Raise a UserError for sizes that cannot work."""
        if min(*img_size, patch_size, *window_size) < 1:
            raise UserError(
                "sides of images, patches and windows must be at least 1, got input size "
                f"{img_size[0]}x{img_size[1]}, patch size {patch_size} and windows {tuple(window_size)}"
            )

    def set_input_size(
        self,
        img_size: int | Sequence[int] | None = None,
        patch_size: int | Sequence[int] | None = None,
        window_size: int | Sequence[int] | None = None,
    ) -> None:
        """Make another size the model's own, with timm's names; what is None stays.

        The position embedding is resized to the new grid, and the kernel of the patch embedding to the new patch.
        Windows and their bias tables stay those that were trained, where timm's Swin would scale them with the grid.
        With `window_size` they become those of a model that is built for the size, with resized tables.
        """
        img_size = self.img_size if img_size is None else to_2tuple(img_size)
        patch_size = self.patch_size if patch_size is None else to_side(patch_size)
        windows = [None] * len(self.layers) if window_size is None else to_ntuple(len(self.layers))(window_size)
        self.check_input_size(img_size, patch_size, [window for window in windows if window is not None])
        if len(windows) != len(self.layers):
            raise ValueError(f"window_size needs one value for each of {len(self.layers)} stages, got {tuple(windows)}")
        grids = stage_grids(img_size, patch_size)
        self.patch_embed.set_input_size(tuple(side * patch_size for side in grids[0]), patch_size)
        embedding = resize_pos_embed(self.absolute_pos_embed, self.layers[0].grid, grids[0])
        self.absolute_pos_embed = nn.Parameter(embedding, requires_grad=False)
        for i, (stage, grid, window) in enumerate(zip(self.layers, grids, windows)):
            stage.set_input_size(grid, window)
            self.feature_info[i]["reduction"] = patch_size * 2**i
        self.img_size, self.patch_size = img_size, patch_size

    # -- What timm's tools expect of a model ---------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """Parameters that never decay besides one-dimensional ones: the position embedding, which is not trained."""
        return {"absolute_pos_embed"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one for `num_classes` (0: none)."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"this encoder pools by averaging (global_pool='avg'), got {global_pool!r}")
        self.num_classes = num_classes
        where = dict(device=self.absolute_pos_embed.device, dtype=self.absolute_pos_embed.dtype)
        self.head = nn.Linear(self.num_features, num_classes, **where) if num_classes > 0 else nn.Identity()
        self.head.apply(init_linear_and_norm)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Store only each block's input and compute the block again in the backward pass."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def compile_blocks(self) -> None:
        """Compile the stages with `torch.compile`. Shapes then never depend on the mask (see `layouts`)."""
        self.one_layout_shape = True
        # All stages share one compiled function, which is specialised for each stage in training and in evaluation,
        # and for a smaller last batch.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for stage in self.layers:
            stage.compile(dynamic=False)

    # -- Forward -------------------------------------------------------------------------------------------------

    def layouts(self, grid: tuple[int, int], group: Tensor | None = None) -> list[WindowLayout]:
        """The layout of every stage.

        Args:
            grid: rows and columns of the first stage.
            group: group ids of the cells of the last stage, (rows, columns) or (L,), or None. A cell's id holds for
                the 8x8, 4x4, 2x2 or 1 tokens that it covers at stages 1 to 4.
        """
        grids = stage_grids(grid)
        if group is None:
            return [stage.layout(grid) for stage, grid in zip(self.layers, grids)]
        group = group.detach().cpu().unique(return_inverse=True)[1].view(grids[-1])
        groups = [
            upsample(group, 2 ** (NUM_STAGES - 1 - i))[:rows, :columns] for i, (rows, columns) in enumerate(grids)
        ]
        return [stage.layout(*of, self.one_layout_shape) for stage, of in zip(self.layers, zip(grids, groups))]

    def forward_stages(self, x: Tensor, group: Tensor | None = None, stages: int = NUM_STAGES) -> list[Tensor]:
        """Patch embeddings -> the first stages' outputs, all (B, rows, columns, channels)."""
        grid = (int(x.shape[1]), int(x.shape[2]))
        layouts = self.layouts(grid, group)[:stages]
        position = self.resized_pos_embeds.get(self.absolute_pos_embed, self.layers[0].grid, grid)
        x = self.pos_drop(x + position.unflatten(1, grid))
        outputs = []
        for stage, layout in zip(self.layers, layouts):
            if outputs:
                x = self.layers[len(outputs) - 1].downsample(x)
            x = stage(x, layout)
            outputs.append(x)
        return outputs

    def forward_features(self, imgs: Tensor, group: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, rows, columns, num_features), the normed output of the last stage.

        Args:
            imgs: normalised images.
            group: optional group ids of the cells; a token then attends to tokens of its own group only.
        """
        return self.norm(self.forward_stages(self.embed(imgs), group)[-1])

    def embed(self, imgs: Tensor) -> Tensor:
        """Patch embeddings (B, rows, columns, embed_dim) of images (B, C, H, W); no position is added yet."""
        if (
            imgs.ndim != 4
            or imgs.shape[1] != self.in_chans
            or (self.strict_img_size and imgs.shape[2:] != self.img_size)
        ):
            sides = ", ".join(map(str, self.img_size)) if self.strict_img_size else "H, W"
            raise UserError(
                f"the model takes images of shape (B, {self.in_chans}, {sides}), got {tuple(imgs.shape)}: build it "
                "with in_chans and img_size of your images, or resize them"
            )
        padding = [-side % self.patch_size for side in imgs.shape[2:]]
        if any(padding):
            imgs = F.pad(imgs, (0, padding[1], 0, padding[0]))
        return self.patch_embed(imgs)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, rows, columns, num_features) -> class logits, or the pooled features with `pre_logits`."""
        x = x.mean(dim=(1, 2))
        return x if pre_logits else self.head(x)

    def forward(self, imgs: Tensor) -> Tensor:
        """Class logits (B, num_classes) of normalised images (B, C, H, W)."""
        return self.forward_head(self.forward_features(imgs))

    def forward_intermediates(
        self,
        imgs: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Dense features of the stages for detection and segmentation, with timm's signature.

        Args:
            imgs: normalised images (B, C, H, W).
            indices: stages to return, numbered from 0: a sequence, the last n, or None for all.
            norm: apply the final norm to the last stage's features.
            stop_early: accepted for timm; stages that are never wanted are dropped by `prune_intermediate_layers`.
            output_fmt: 'NCHW' or 'NHWC'.
            intermediates_only: return the list alone.

        Returns:
            (B, channels, rows, columns) for each stage, after the normed output of the last stage unless
            `intermediates_only`.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        outputs = self.forward_stages(self.embed(imgs))
        last = self.norm(outputs[-1])
        if norm:
            outputs[-1] = last
        maps = [outputs[i] for i in stage_indices(indices)]
        if output_fmt == "NCHW":
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return maps if intermediates_only else (last, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and norm and head on request; returns `indices` as numbers."""
        wanted = stage_indices(indices)
        self.layers = self.layers[: max(wanted) + 1]
        self.layers[-1].downsample = None
        if prune_norm or len(self.layers) < NUM_STAGES:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return wanted


def stage_indices(indices: int | Sequence[int] | None) -> list[int]:
    """What timm's `indices` mean: a choice of stages, the last n, or None for all."""
    stages = range(NUM_STAGES)
    if indices is None or isinstance(indices, int):
        return list(stages[-(indices or NUM_STAGES) :])
    return [stages[i] for i in indices]


def classification_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits (B, classes) with classes (B,), smoothed, or with class distributions (B, classes).

    Distributions, as mixup and cutmix make them, already carry their smoothing.
    """
    if targets.ndim == 2:
        return SoftTargetCrossEntropy()(logits, targets)
    return LabelSmoothingCrossEntropy(smoothing)(logits, targets) if smoothing else F.cross_entropy(logits, targets)


def init_linear_and_norm(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero bias, LayerNorm at identity (MixMAE, appendix A)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------------------------
# Published and small shapes

SHAPES = {
    "quickstart": dict(
        img_size=32, patch_size=1, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=(8, 8, 8, 4)
    ),
    "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
    "huge": dict(embed_dim=352, depths=(2, 2, 18, 2), num_heads=(11, 22, 44, 88)),
}
WINDOWS_384 = dict(img_size=384, window_size=(16, 16, 24, 12))


def default_cfg(input_size: int = 224) -> dict:
    """What timm's data tools should know of a model."""
    return dict(
        num_classes=1000,
        input_size=(3, input_size, input_size),
        pool_size=None,
        crop_pct=0.875 if input_size <= 224 else 1.0,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv="patch_embed.proj",
        classifier="head",
        fixed_input_size=True,
    )


default_cfgs = generate_default_cfgs(
    {"swin_quickstart": default_cfg(32)}
    | {f"swin_{size}_w14": default_cfg() for size in ("tiny", "base", "large", "huge")}
    | {f"swin_{size}_w16_384": default_cfg(384) for size in ("base", "large")}
)


def build_swin(variant: str, pretrained: bool, shape: dict, kwargs: dict) -> SwinTransformer:
    features = dict(out_indices=tuple(range(NUM_STAGES)), feature_cls="getter")  # what `features_only` asks for
    return build_model_with_cfg(SwinTransformer, variant, pretrained, feature_cfg=features, **{**shape, **kwargs})


@register_model
def swin_quickstart(pretrained: bool = False, **kwargs) -> SwinTransformer:
    """The quickstart's encoder: 32x32 inputs, patches of one pixel, 4x4 cells."""
    return build_swin("swin_quickstart", pretrained, SHAPES["quickstart"], kwargs)


@register_model
def swin_tiny_w14(pretrained: bool = False, **kwargs) -> SwinTransformer:
    """About the size of Swin-T."""
    return build_swin("swin_tiny_w14", pretrained, SHAPES["tiny"], kwargs)


@register_model
def swin_base_w14(pretrained: bool = False, **kwargs) -> SwinTransformer:
    """Swin-B/W14 of the paper: 88 M parameters, 16.3 G multiply-adds at 224."""
    return build_swin("swin_base_w14", pretrained, SHAPES["base"], kwargs)


@register_model
def swin_base_w16_384(pretrained: bool = False, **kwargs) -> SwinTransformer:
    """Swin-B for fine-tuning at 384: windows 16, 16, 24, 12."""
    return build_swin("swin_base_w16_384", pretrained, SHAPES["base"] | WINDOWS_384, kwargs)


@register_model
def swin_large_w14(pretrained: bool = False, **kwargs) -> SwinTransformer:
    """Swin-L/W14 of the paper: 197 M parameters, 35.9 G multiply-adds at 224."""
    return build_swin("swin_large_w14", pretrained, SHAPES["large"], kwargs)


@register_model
def swin_large_w16_384(pretrained: bool = False, **kwargs) -> SwinTransformer:
    """Swin-L for fine-tuning at 384: windows 16, 16, 24, 12."""
    return build_swin("swin_large_w16_384", pretrained, SHAPES["large"] | WINDOWS_384, kwargs)


@register_model
def swin_huge_w14(pretrained: bool = False, **kwargs) -> SwinTransformer:
    """Swin-H/W14 of the paper: 659 M parameters."""
    return build_swin("swin_huge_w14", pretrained, SHAPES["huge"], kwargs)
