"""A stage of the encoder: blocks that attend inside windows, then a patch merging."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from util.layers.attention import Attention
from util.layers.drop_path import add_branch
from util.layers.mlp import Mlp
from util.layers.windows import WindowLayout, grid_of, group_layout, to_device, window_layout


class Block(nn.Module):
    """Pre-norm transformer block; serves the encoder (with a window) and the decoder (without)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, window_size, qkv_bias, attn_drop, drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path_rate = drop_path

    def forward(
        self, x: Tensor, layout: WindowLayout | None = None, select: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C), tokens in the layout's order.

        With `select`, which picks tokens of x: `select(block(x))`, computed only for these, once they have attended to
        all. For blocks without stochastic depth.
        """
        rate = self.drop_path_rate if self.training else 0.0
        if select is None:
            x = add_branch(x, lambda x: self.attn(self.norm1(x), layout), rate)
        else:
            x = select(x) + self.attn(self.norm1(x), layout, select)
        return add_branch(x, lambda x: self.mlp(self.norm2(x)), rate)


@register_notrace_module
class PatchMerging(nn.Module):
    """Halves the grid: the channels of 2x2 neighbours, normed, become twice the channels of one token.

    (B, rows, columns, C) -> (B, ceil(rows / 2), ceil(columns / 2), 2 * C): zero tokens complete an odd side.
    """

    def __init__(self, dim: int):
        super().__init__()
        # Registered in this order because the optimizer states in the authors' checkpoints are.
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[1:3]
        if rows % 2 or columns % 2:
            x = F.pad(x, (0, 0, 0, columns % 2, 0, rows % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, rows / 2, 2, columns / 2, 2, C)
        # Neighbours in the order (row, column) = (0,0), (1,0), (0,1), (1,1), which the published weights expect.
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


@register_notrace_module
class Stage(nn.Module):
    """Blocks that share one grid and one window, then (but for the last stage) a patch merging."""

    def __init__(self, blocks: list[Block], grid: tuple[int, int], window: int, downsample: nn.Module | None):
        super().__init__()
        self.grid = grid
        self.window = window
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False
        self.register_parameter("mix_embed", None)  # (groups, C), if a pretraining model has them
        self.init_non_persistent_buffers()
        # A model built on the meta device, whose weights are assigned or whose memory is made before they are loaded,
        # would have a layout without values.
        self.register_load_state_dict_post_hook(Stage.init_non_persistent_buffers)

    def init_non_persistent_buffers(self, *_) -> None:
        """Make the layout of the grid that the model is built for; timm calls it for a model without memory."""
        layout = window_layout(self.grid, self.window, self.blocks[0].norm1.weight.device)
        self.segments = layout.segments
        for name in ("order", "inverse", "bias_index"):
            tensor = getattr(layout, name)
            self.register_buffer(name, None if tensor is None else tensor.clone(), persistent=False)

    def set_input_size(self, grid: tuple[int, int], window: int) -> None:
        """Take another grid as the model's own, and other windows, whose bias tables are resized."""
        self.grid = grid
        if window != self.window:
            self.window = window
            for block in self.blocks:
                block.attn.set_window_size(window)
        self.init_non_persistent_buffers()

    def layout(
        self, grid: tuple[int, int], group: Tensor | None = None, masked_attn: bool = True, **shapes: bool
    ) -> WindowLayout:
        """Who attends to whom: the tokens of each window, or with `group` and `masked_attn` those of each window and
        group.

        `shapes` are arguments of `group_layout`.
        """
        if grid == self.grid:
            layout = WindowLayout(self.order, self.inverse, self.segments, self.bias_index)
        else:
            layout = window_layout(grid, self.window, self.bias_index.device)
        if group is None:
            return layout
        device = layout.bias_index.device
        if masked_attn:
            layout = group_layout(group, self.window, layout, **shapes)
        return layout if self.mix_embed is None else layout._replace(group_of=to_device(group.flatten(), device))

    def forward(self, x: Tensor, layout: WindowLayout | None = None) -> Tensor:
        """(B, rows, columns, C) -> the same, before the downsampling; without a layout in ordinary windows."""
        grid = grid_of(x)
        layout = layout or self.layout(grid)
        x = x.flatten(1, 2)
        if self.mix_embed is not None:
            vectors = self.mix_embed.to(x.dtype)  # so that they do not change the precision of what follows
            x = x + (vectors[0] if layout.group_of is None else vectors[layout.group_of])
        if layout.order is not None:  # once for the whole stage: windows are never shifted
            x = x.index_select(1, layout.order)
        for block in self.blocks:
            x = run_block(block, x, layout, recompute=self.grad_checkpointing)
        if layout.inverse is not None:
            x = x.index_select(1, layout.inverse)
        return x.unflatten(1, grid)


def run_block(block: Block, x: Tensor, layout: WindowLayout | None = None, recompute: bool = False) -> Tensor:
    """`block(x, layout)`; with `recompute`, only x is stored, and the block is run again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, layout, use_reentrant=False)
    return block(x, layout)
