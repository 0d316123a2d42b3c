"""The encoder: a Swin-style hierarchical vision transformer with large windows (MixMAE, section 3 and appendix A).

It differs from Swin in three ways: windows are large and never shifted, a fixed sine-cosine position embedding is
added to the tokens, and attention can be restricted to groups of tokens, which is all that pretraining on mixed
images needs from an encoder (`models_mixmae.py`).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from util.errors import UserError
from util.layers.compilation import OPTIONS, compiled, prepare_compiling
from util.layers.conversion import adapt_state_dict, checkpoint_filter_fn, update_model_input_size
from util.layers.feature_net import FeatureNet
from util.layers.initialization import init_linear_and_norm, make_head
from util.layers.patch_embed import PaddedPatchEmbed
from util.layers.pos_embed import get_2d_sincos_pos_embed, position_of, resize_pos_embed
from util.layers.sizes import NUM_STAGES, one_per_stage, stage_grids, stage_windows, to_2tuple, to_side
from util.layers.stage import Block, PatchMerging, Stage
from util.layers.windows import WindowLayout, grid_of, upsample


class SwinTransformer(nn.Module):
    """Hierarchical encoder of MixMAE and, with its head, the fine-tuned classifier (sections 3 and 4.2).

    Args:
        img_size: input size in pixels, an int or (height, width), of any number of pixels.
        patch_size: side of a patch in pixels; a cell of the last stage covers `encoder_stride = 8 * patch_size`.
        in_chans: image channels.
        num_classes: classes of the linear head; 0 for none.
        embed_dim: channels of the first stage, doubled by every further stage.
        depths, num_heads: blocks and heads of each of the four stages.
        window_size: side of the windows, one for all stages or one for each; (height, width) where these are equal.
        mlp_ratio: hidden over outer width of the MLPs.
        qkv_bias: whether queries, keys and values have a bias.
        drop_rate, proj_drop_rate, attn_drop_rate: dropout of the head's input, of embedded tokens and the outputs of
            attention and MLPs, and of attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        global_pool: 'avg', or '' to keep the map of features.
        strict_img_size: accept only images of `img_size`; False: of any size.
        always_partition: keep windows that are larger than their stage's grid; False: fit them to it.
        output_stride: of the last stage, for tools that ask for it; nothing but `encoder_stride` works.
        device, dtype: where the weights are made, and of which type.

    A side that patches do not divide is padded with zeros at the right and bottom. Windows at the edge are
    smaller, so that padding is never attended to. The position embedding is resized to the grid.

    Raises:
        UserError: for a size below 1, windows that are not square, or another `output_stride`.
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
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        strict_img_size: bool = True,
        always_partition: bool = False,
        output_stride: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.img_size = to_2tuple(img_size)
        self.patch_size = patch_size = to_side(patch_size)
        self.check_input_size(self.img_size, patch_size)
        depths = one_per_stage("depths", depths, NUM_STAGES)
        num_heads = one_per_stage("num_heads", num_heads, NUM_STAGES)
        if output_stride not in (None, self.encoder_stride):
            raise UserError(
                f"the last stage's stride is {self.encoder_stride}, not output_stride={output_stride}: take the maps "
                "of earlier stages (out_indices), or build with a smaller patch_size"
            )
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = check_pooling(global_pool)
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (NUM_STAGES - 1)
        self.output_fmt = "NHWC"
        self.one_layout_shape = False  # whether shapes of layouts are independent of the groups
        self.group_sizes_vary = True
        self.masked_attn = True  # whether tokens attend only to their own group, where groups are given
        self.is_compiled = False

        grids = stage_grids(self.img_size, patch_size)
        windows = stage_windows(grids, window_size, always_partition=always_partition)
        drop_path_rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        with torch.device(device or torch.get_default_device()):
            self.patch_embed = PaddedPatchEmbed(self.img_size, patch_size, in_chans, embed_dim, strict_img_size)
            self.absolute_pos_embed = nn.Parameter(get_2d_sincos_pos_embed(embed_dim, grids[0]), requires_grad=False)
            self.pos_drop = nn.Dropout(proj_drop_rate)
            self.layers = nn.ModuleList()
            self.feature_info = []
            for i, (grid, window, depth) in enumerate(zip(grids, windows, depths)):
                dim = embed_dim * 2**i
                shape = (dim, num_heads[i], window, mlp_ratio, qkv_bias, proj_drop_rate, attn_drop_rate)
                blocks = [Block(*shape, next(drop_path_rates)) for _ in range(depth)]
                downsample = PatchMerging(dim) if i < NUM_STAGES - 1 else None
                self.layers.append(Stage(blocks, grid, window, downsample))
                self.feature_info.append(dict(num_chs=dim, reduction=patch_size * 2**i, module=f"layers.{i}"))
            self.norm = nn.LayerNorm(self.num_features)
            self.head = make_head(self.num_features, num_classes)
            self.apply(init_linear_and_norm)
        self.to(dtype=dtype)
        self.register_load_state_dict_pre_hook(adapt_state_dict)

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
    def check_input_size(img_size: tuple[int, int], patch_size: int) -> None:
        """Raise a UserError for sizes that cannot work."""
        if patch_size < 1:
            raise UserError(f"the side of patches must be at least 1 pixel, got {patch_size}")
        if min(img_size) < 1:
            raise UserError(f"the sides of images must be at least 1 pixel, got {img_size[0]}x{img_size[1]}")

    def set_input_size(
        self,
        img_size: int | Sequence[int] | None = None,
        patch_size: int | Sequence[int] | None = None,
        window_size: int | Sequence[int] | None = None,
        window_ratio: int | Sequence[int] | None = None,
        always_partition: bool | None = None,
    ) -> None:
        """Change the sizes that the model is built for, with timm's argument names; what is None stays.

        The position embedding is resized to the new grid, and the kernel of the patch embedding to the new patch.
        Windows and their bias tables stay those that were trained, where timm's Swin would scale them with the grid.
        With another argument they become those of a model that is built for the size, with resized tables.

        `window_ratio` (one for all stages or one for each) is the shorter side of the first grid over a window's side.
        """
        img_size = self.img_size if img_size is None else to_2tuple(img_size)
        patch_size = self.patch_size if patch_size is None else to_side(patch_size)
        self.check_input_size(img_size, patch_size)
        if window_size is None and window_ratio is None:
            window_size = [(stage.window, stage.window) for stage in self.layers]
            always_partition = always_partition is not False
        grids = stage_grids(img_size, patch_size)[: len(self.layers)]
        windows = stage_windows(grids, window_size, window_ratio, always_partition)
        self.patch_embed.set_input_size(img_size, patch_size)
        embedding = resize_pos_embed(self.absolute_pos_embed, self.layers[0].grid, grids[0])
        self.absolute_pos_embed = nn.Parameter(embedding, requires_grad=False)
        for i, (stage, grid, window) in enumerate(zip(self.layers, grids, windows)):
            stage.set_input_size(grid, window)
            self.feature_info[i]["reduction"] = patch_size * 2**i
        self.img_size, self.patch_size = img_size, patch_size
        built = dict(patch_size=patch_size, window_size=tuple(windows), always_partition=True)
        update_model_input_size(self, img_size, **built)  # for timm, which rebuilds a saved model

    # -- What timm's tools expect of a model ---------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """Parameters that never decay besides one-dimensional ones: the position embedding, which is not trained."""
        return {"absolute_pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Patterns that give parameters the layer ids of `util.run.optim.layer_ids`; `coarse`: one id per stage.

        A patch merging goes with what follows it, and final norm and head with the last block.
        """
        merging = [(rf"^layers\.{i}\.downsample", (i + 1,) if coarse else (i + 1, 0)) for i in range(NUM_STAGES - 1)]
        blocks = [(r"^layers\.(\d+)" if coarse else r"^layers\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^patch_embed|^absolute_pos_embed", "blocks": [*merging, *blocks, (r"^norm|^head", (99999,))]}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one for `num_classes` (0: none), and with `global_pool` the pooling before it."""
        self.num_classes = num_classes
        self.global_pool = check_pooling(self.global_pool if global_pool is None else global_pool)
        where = dict(device=self.absolute_pos_embed.device, dtype=self.absolute_pos_embed.dtype)
        self.head = make_head(self.num_features, num_classes, **where)
        self.head.apply(init_linear_and_norm).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Store only each block's input and compute the block again in the backward pass."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, norm and head with them or on request; returns the indices."""
        wanted = stage_indices(indices, len(self.layers))
        ends_early = wanted[-1] + 1 < len(self.layers)
        self.layers = self.layers[: wanted[-1] + 1]
        self.layers[-1].downsample = None
        if prune_norm or ends_early:
            self.norm = nn.Identity()
        self.num_features = self.head_hidden_size = self.feature_info[wanted[-1]]["num_chs"]
        if prune_head or ends_early:
            self.reset_classifier(0, "")
        return wanted

    def compile_parts(self) -> None:
        """Compile the embedding, each stage and each merging with `torch.compile`, all of it in whole graphs.

        In parts, since gradients of the last stages can then be reduced over ranks while the first ones' are computed.
        Shapes then never depend on the mask (see `layouts`).
        """
        self.one_layout_shape = True
        prepare_compiling()
        self.is_compiled = True
        for stage in self.layers:
            for module in (stage, stage.downsample):
                if module is not None:
                    module.compile(**OPTIONS)

    # -- Forward -------------------------------------------------------------------------------------------------

    def layouts(self, grid: tuple[int, int], group: Tensor | None = None) -> list[WindowLayout]:
        """The layout of every stage.

        Args:
            grid: rows and columns of the first stage.
            group: optional ids of the last stage's cells, (rows, columns) or (L,); each holds for a cell's tokens.
        """
        grids = stage_grids(grid)
        if group is None:
            return [stage.layout(grid) for stage, grid in zip(self.layers, grids)]
        group = group.detach().cpu().unique(return_inverse=True)[1].view(grids[-1])
        groups = [
            upsample(group, 2 ** (NUM_STAGES - 1 - i))[:rows, :columns] for i, (rows, columns) in enumerate(grids)
        ]
        how = dict(masked_attn=self.masked_attn, one_shape=self.one_layout_shape, sizes_vary=self.group_sizes_vary)
        return [stage.layout(*of, **how) for stage, of in zip(self.layers, zip(grids, groups))]

    def run_part(self, part: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """A method of the class, compiled if the model is."""
        return (compiled(part) if self.is_compiled else part)(self, *args)

    def embed(self, imgs: Tensor) -> Tensor:
        """Images (B, C, H, W) -> tokens of the first stage (B, rows, columns, embed_dim), with their positions."""
        x = self.patch_embed(imgs)
        return self.pos_drop(x + position_of(x, self.absolute_pos_embed, self.layers[0].grid))

    def forward_stages(self, x: Tensor, group: Tensor | None = None, stages: int = NUM_STAGES) -> list[Tensor]:
        """Embedded tokens -> the outputs of the first `stages` stages, all (B, rows, columns, channels)."""
        layouts = [None] * NUM_STAGES if group is None else self.layouts(grid_of(x), group)
        outputs = []
        for stage, layout in zip(self.layers[:stages], layouts):
            outputs.append(stage(x, layout))
            if len(outputs) < min(stages, len(self.layers)):
                x = stage.downsample(outputs[-1])
        return outputs

    def forward_features(self, imgs: Tensor, group: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, rows, columns, num_features), the normed output of the last stage.

        Args:
            imgs: normalised images.
            group: optional group ids of the cells; a token then attends to tokens of its own group only.
        """
        return self.norm(self.forward_stages(self.run_part(SwinTransformer.embed, imgs), group)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, rows, columns, num_features) -> class logits, or the pooled features with `pre_logits`.

        With `global_pool=''` nothing is pooled, and the logits are those of every cell.
        """
        if self.global_pool:
            x = x.mean(dim=(1, 2))
        x = F.dropout(x, self.drop_rate, self.training)
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
            stop_early: compute no stage after the last of `indices`.
            output_fmt: 'NCHW' or 'NHWC'.
            intermediates_only: return only the list.

        Returns:
            (B, channels, rows, columns) for each stage in the order of the stages, after the features: the normed
            output of the last stage, or the last one's that was computed.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        wanted = stage_indices(indices, len(self.layers))
        x = self.run_part(SwinTransformer.embed, imgs)
        outputs = self.forward_stages(x, stages=wanted[-1] + 1 if stop_early else NUM_STAGES)
        is_whole = len(outputs) == len(self.layers)
        features = self.norm(outputs[-1]) if is_whole else outputs[-1]
        if norm and is_whole:
            outputs[-1] = features
        maps = [outputs[i] for i in wanted]
        if output_fmt == "NCHW":
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return maps if intermediates_only else (features, maps)


def stage_indices(indices: int | Sequence[int] | None, stages: int) -> list[int]:
    """What timm's `indices` mean, in the order of the stages: a choice of them, the last n, or None for all."""
    return sorted(set(feature_take_indices(stages, indices)[0]))


def check_pooling(global_pool: str) -> str:
    """`global_pool`, or a ValueError."""
    if global_pool not in ("avg", ""):
        raise ValueError(f"this encoder pools by averaging (global_pool='avg') or not at all (''), got {global_pool!r}")
    return global_pool


def classification_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits (B, classes) with classes (B,), smoothed, or with class distributions (B, classes).

    Distributions, as mixup and cutmix make them, already carry their smoothing.
    """
    if targets.ndim == 2:
        return SoftTargetCrossEntropy()(logits, targets)
    return LabelSmoothingCrossEntropy(smoothing)(logits, targets) if smoothing else F.cross_entropy(logits, targets)


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


def default_cfg(shape: dict) -> dict:
    """What timm's tools should know about a model of this shape."""
    input_size = shape.get("img_size", 224)
    cells = input_size // (8 * shape.get("patch_size", 4))
    return dict(
        num_classes=1000,
        input_size=(3, input_size, input_size),
        pool_size=(cells, cells),
        crop_pct=0.875 if input_size <= 224 else 1.0,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv="patch_embed.proj",
        classifier="head",
        fixed_input_size=True,
    )


default_cfgs = generate_default_cfgs(
    {"swin_quickstart": default_cfg(SHAPES["quickstart"])}
    | {f"swin_{size}_w14": default_cfg(SHAPES[size]) for size in ("tiny", "base", "large", "huge")}
    | {f"swin_{size}_w16_384": default_cfg(SHAPES[size] | WINDOWS_384) for size in ("base", "large")}
)


def build_swin(variant: str, pretrained: bool, shape: dict, kwargs: dict) -> SwinTransformer:
    return build_model_with_cfg(
        SwinTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(NUM_STAGES)), feature_cls=FeatureNet),
        **{**shape, **kwargs},
    )


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
