"""The encoder: a Swin-style hierarchical vision transformer with large windows (MixMAE, section 3 and appendix A).

It differs from Swin in three ways: windows are large and never shifted, a fixed sine-cosine position embedding is
added to the tokens, and attention can be restricted to groups of tokens, which is all that pretraining on mixed
images needs from an encoder (`models_mixmae.py`).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, drop_path, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from util.pos_embed import get_2d_sincos_pos_embed

NUM_STAGES = 4

# ---------------------------------------------------------------------------------------------------------------
# Geometry: pure functions from sizes to indices


def to_2tuple(size: int | Sequence[int]) -> tuple[int, int]:
    """`size` as (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def stage_grids(img_size: tuple[int, int], patch_size: int) -> list[tuple[int, int]]:
    """(rows, columns) of tokens at each of the four stages; the last one is the grid of cells."""
    return [tuple(side // (patch_size << stage) for side in img_size) for stage in range(NUM_STAGES)]


def fit_window(grid: tuple[int, int], window: int) -> int:
    """The window's side on `grid`: the shorter side of the grid where the window would not fit."""
    return min(window, *grid)


def largest_window(grid: tuple[int, int], window: int) -> int:
    """The largest side up to `window` that tiles `grid`."""
    return max(side for side in range(1, fit_window(grid, window) + 1) if grid[0] % side == grid[1] % side == 0)


def img_size_works(img_size: tuple[int, int], patch_size: int, window_size: Sequence[int]) -> bool:
    """Whether every stage's grid is whole and is tiled exactly by its windows."""
    if min(img_size) <= 0 or any(side % (8 * patch_size) for side in img_size):
        return False
    grids = stage_grids(img_size, patch_size)
    return all(side % fit_window(grid, window) == 0 for grid, window in zip(grids, window_size) for side in grid)


def check_img_size(img_size: tuple[int, int], patch_size: int, window_size: Sequence[int]) -> None:
    """Raise a ValueError that names the nearest sizes that work when `img_size` does not."""
    if patch_size < 1 or min(window_size) < 1:
        raise ValueError(f"patch and window sizes must be at least 1, got {patch_size} and {tuple(window_size)}")
    if img_size_works(img_size, patch_size, window_size):
        return
    stride = 8 * patch_size
    reach = max(window_size) * 2
    sides = [[stride * k for k in range(max(1, side // stride - reach), side // stride + reach)] for side in img_size]
    working = [(h, w) for h in sides[0] for w in sides[1] if img_size_works((h, w), patch_size, window_size)]
    if img_size[0] == img_size[1]:
        working = [size for size in working if size[0] == size[1]]
    working.sort(key=lambda size: abs(size[0] - img_size[0]) + abs(size[1] - img_size[1]))
    near = tuple(max(1, round(side / stride)) * stride for side in img_size)
    windows = [largest_window(grid, window) for grid, window in zip(stage_grids(near, patch_size), window_size)]
    raise ValueError(
        f"input size {img_size[0]}x{img_size[1]} does not work with patch size {patch_size} and windows "
        f"{tuple(window_size)}: both sides must be multiples of {stride}, and the token grid of every stage must be "
        f"tiled by its window. Nearest sizes that work: {', '.join(f'{h}x{w}' for h, w in working[:3])}; or "
        f"{near[0]}x{near[1]} with windows {' '.join(map(str, windows))} (--window_size)"
    )


class WindowLayout(NamedTuple):
    """The order in which a stage's tokens stand while its blocks run, and who attends to whom.

    Tokens stand in runs, one after another, and a token attends to the tokens of its own run only. Without groups
    a run is a window. With groups a run is the part of one group inside one window (see `group_layout`).
    """

    order: Tensor | None  # (T,) raster index of the token at each place; None where that is the raster order
    inverse: Tensor | None  # (T,) place of each token in raster order
    runs: tuple[tuple[int, int], ...]  # (how many, tokens in each) for neighbouring runs of equal length
    bias_index: Tensor  # rows of the relative position bias table, run by run; of one window if all are the same
    separate: Tensor | None = None  # (windows, 1, N, N) True where two tokens of a window must not see each other


def raster_to_windows(grid: tuple[int, int], window: int) -> Tensor:
    """(windows, N) raster index of each token, window by window; N = window * window."""
    rows, columns = grid
    index = torch.arange(rows * columns, device="cpu")
    index = index.view(rows // window, window, columns // window, window)
    return index.transpose(1, 2).reshape(-1, window * window)


@lru_cache
def window_layout(grid: tuple[int, int], window: int, device: torch.device) -> WindowLayout:
    """Layout for ordinary window attention: every window is one run."""
    with torch.inference_mode(False):  # the cached tensors serve training too, whoever asks first
        order = raster_to_windows(grid, window)
        with torch.device("cpu"):
            bias_index = get_relative_position_index(window, window).flatten().to(device)
        runs = ((len(order), window * window),)
        if len(order) == 1:
            return WindowLayout(None, None, runs, bias_index)
        order = order.flatten()
        return WindowLayout(order.to(device), order.argsort().to(device), runs, bias_index)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, without waiting for it: only a copy from page-locked memory lets a GPU run on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def group_layout(group: Tensor, window: int, device: torch.device) -> WindowLayout:
    """Layout for attention inside groups: the tokens of each window are sorted by group.

    Sorting is exact. Attention is equivariant to the order of its tokens (the position bias is looked up for the
    sorted pairs), and a token that masking would hide has an attention weight of exactly zero, so the dense masked
    attention of a window is block-diagonal after the sort: one smaller attention per group, with nothing left out.

    Args:
        group: (rows, columns) group ids of the stage's tokens, on the CPU, where this index arithmetic is cheap and
            the lengths of the runs are known without waiting for a device.
        window: side of the square windows that tile the grid.
        device: where the layout's tensors are wanted.
    """
    order = raster_to_windows(tuple(group.shape), window)  # (nW, N)
    sorted_group, place = group.flatten()[order].sort(dim=1, stable=True)  # (nW, N)
    order = order.gather(1, place).flatten()
    sorted_group = sorted_group - sorted_group.min()
    run_ids = sorted_group + torch.arange(len(place))[:, None] * (int(sorted_group.max()) + 1)
    lengths = run_ids.flatten().unique_consecutive(return_counts=True)[1].tolist()
    with torch.device("cpu"):
        relative_index = get_relative_position_index(window, window)
    bias_index = [relative_index[run][:, run].flatten() for run in place.flatten().split(lengths)]
    return WindowLayout(
        to_device(order, device),
        to_device(order.argsort(), device),
        tuple((len(list(same)), length) for length, same in groupby(lengths)),
        to_device(torch.cat(bias_index), device),
    )


def separated_layout(group: Tensor, window: int, device: torch.device) -> WindowLayout:
    """Layout for attention inside groups with shapes that do not depend on the groups: the textbook's masked windows.

    It computes every pair of a window and hides those of different groups. That wastes work but is one operation
    for all windows, which is what a GPU and `torch.compile` want where windows are many and small.
    """
    window_group = group.flatten()[raster_to_windows(tuple(group.shape), window)]  # (nW, N)
    separate = window_group[:, None, :, None] != window_group[:, None, None, :]  # (nW, 1, N, N)
    layout = window_layout(tuple(group.shape), window, device)
    return layout._replace(separate=to_device(separate, device))


# ---------------------------------------------------------------------------------------------------------------
# Layers


class BiasedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d) + bias) v inside runs, with a gradient for a learned bias, for a CPU.

    PyTorch's fused attention has no such gradient on a CPU, and composed of single operations the gradients of
    queries, keys and values are gathered and copied several times. Here each part is read once from where the linear
    layer left it and its gradient is written once to where that layer takes it.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, runs: tuple[tuple[int, int], ...], *biases: Tensor) -> Tensor:
        """qkv (B, T, 3, nH, d), the runs of a `WindowLayout`, (R or 1, nH, n, n) for each of them -> (B, T, nH, d)."""
        B, T, _, nH, d = qkv.shape
        mixed = qkv.new_empty(B, T, nH, d)
        saved = []
        for part, mixed_part, bias in zip(split_runs(qkv, runs), split_runs(mixed, runs), biases):
            _, R, n = part.shape[:3]
            q, k, v = part.permute(3, 0, 1, 4, 2, 5).flatten(1, 3)  # (B * R * nH, n, d), copied
            weights = scaled_bmm(q, k.transpose(1, 2), d**-0.5)
            weights.view(B, R, nH, n, n).add_(bias)
            torch.softmax(weights, dim=-1, out=weights)
            mixed_part.copy_((weights @ v).view(B, R, nH, n, d).transpose(2, 3))
            saved += (q, k, v, weights)
        ctx.save_for_backward(*saved)
        ctx.runs = runs
        ctx.shared = [len(bias) == 1 for bias in biases]
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        B, T, nH, d = grad.shape
        grad_qkv = grad.new_empty(B, T, 3, nH, d)
        grad_biases = []
        saved = iter(ctx.saved_tensors)
        for part, qkv_part, shared in zip(split_runs(grad, ctx.runs), split_runs(grad_qkv, ctx.runs), ctx.shared):
            q, k, v, weights = (next(saved) for _ in range(4))
            R, n = part.shape[1:3]
            part = part.transpose(2, 3).flatten(0, 2)  # (B * R * nH, n, d)
            grad_scores = part @ v.transpose(1, 2)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_scores, weights, -1, weights.dtype)
            grads = q.new_empty(3, B, R, nH, n, d)
            grad_q, grad_k, grad_v = grads.flatten(1, 3)
            scaled_bmm(grad_scores, k, d**-0.5, out=grad_q)
            scaled_bmm(grad_scores.transpose(1, 2), q, d**-0.5, out=grad_k)
            torch.bmm(weights.transpose(1, 2), part, out=grad_v)
            qkv_part.copy_(grads.permute(1, 2, 4, 0, 3, 5))
            grad_bias = grad_scores.view(B, R, nH, n, n).sum(0)
            grad_biases.append(grad_bias.sum(0, keepdim=True) if shared else grad_bias)
        return grad_qkv, None, *grad_biases


def split_runs(x: Tensor, runs: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Views (B, R, n, ...) of x (B, T, ...), one for each `R` neighbouring runs of `n` tokens."""
    parts = x.split([count * n for count, n in runs], dim=1)
    return [part.unflatten(1, (count, n)) for part, (count, n) in zip(parts, runs)]


def scaled_bmm(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale * (a @ b), (M, n, d) and (M, d, m) -> (M, n, m), in one pass: `beta=0` adds nothing."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale, out=out)


def attend(qkv: Tensor, bias: Tensor | None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v by PyTorch's kernels.

    Args:
        qkv: (3, B, R, nH, n, d), queries, keys and values of `R` runs of `n` tokens.
        bias: (R or 1, nH, n, n) or None.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, R, nH, n, d)
    """
    shape = qkv.shape[1:]
    # Fused kernels take four dimensions: runs join the batch where they share a bias, else the heads.
    joined = (0, 1) if bias is None or len(bias) == 1 else (1, 2)
    q, k, v = (t.flatten(*joined) for t in qkv)
    if bias is not None:
        bias = bias.flatten(0, 1)[None].to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout).view(shape)


class Attention(nn.Module):
    """Multi-head self-attention inside the runs of a `WindowLayout`, with a learned relative position bias.

    Args:
        dim: channels.
        num_heads: attention heads.
        window_size: side of the window that the bias table covers; None: plain attention among all tokens, no bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if window_size is not None:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
            trunc_normal_(self.relative_position_bias_table, std=0.02)

    def position_bias(self, layout: WindowLayout) -> list[Tensor]:
        """The bias of each entry of `layout.runs`: (how many or 1, nH, n, n)."""
        # Transposed by `stack`, whose gradient has the table's own memory layout, as DDP wants it.
        table = torch.stack(self.relative_position_bias_table.unbind(1))  # (nH, offsets)
        bias = table.index_select(1, layout.bias_index)  # (nH, pairs)
        pairs = [count * n * n for count, n in layout.runs]
        if len(pairs) == 1:  # possibly one window's bias, shared by all
            n = layout.runs[0][1]
            bias = bias.unflatten(1, (-1, n, n)).transpose(0, 1)
            return [bias if layout.separate is None else bias.masked_fill(layout.separate, float("-inf"))]
        parts = bias.split(pairs, dim=1)
        return [part.unflatten(1, (-1, n, n)).transpose(0, 1) for part, (_, n) in zip(parts, layout.runs)]

    def mix_tokens(self, x: Tensor, layout: WindowLayout | None = None) -> Tensor:
        """Attention without its output projection: (B, T, C) -> (B, T, C)."""
        T = x.shape[1]
        runs, biases = (((1, T),), [None]) if layout is None else (layout.runs, self.position_bias(layout))
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, T, 3, nH, d)
        dropout = self.attn_drop if self.training else 0.0
        learned = biases[0] is not None and biases[0].requires_grad and biases[0].dtype == qkv.dtype
        if learned and qkv.device.type == "cpu" and not dropout and not torch.compiler.is_compiling():
            return BiasedAttention.apply(qkv, runs, *biases).flatten(2)
        mixed = []
        for part, bias in zip(split_runs(qkv, runs), biases):
            part = part.permute(3, 0, 1, 4, 2, 5)  # (3, B, R, nH, n, d)
            mixed.append(attend(part, bias, dropout).transpose(2, 3).flatten(1, 2))  # (B, R * n, nH, d)
        return torch.cat(mixed, dim=1).flatten(2)

    def forward(self, x: Tensor, layout: WindowLayout | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C); tokens in the layout's order, or of one run in any order without a layout."""
        return self.proj_drop(self.proj(self.mix_tokens(x, layout)))


class Mlp(nn.Module):
    """Linear, GELU, linear: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def activate_and_project(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.drop(F.gelu(hidden)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # A quarter of all stored activations is GELU's output, and GELU is cheap: compute it again when needed.
            hidden = checkpoint(
                self.activate_and_project, hidden, use_reentrant=False, preserve_rng_state=self.drop.p > 0
            )
        else:
            hidden = self.activate_and_project(hidden)
        return self.drop(hidden)


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

    def forward(self, x: Tensor, layout: WindowLayout | None = None) -> Tensor:
        x = self.add_branch(x, lambda x: self.attn(self.norm1(x), layout))
        return self.add_branch(x, lambda x: self.mlp(self.norm2(x)))

    def add_branch(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x + branch(x), with stochastic depth in training: the branch of a dropped row is not even computed."""
        if not self.training or self.drop_path_rate == 0:
            return x + branch(x)
        if torch.compiler.is_compiling():  # wants shapes that do not depend on what is dropped
            return x + drop_path(branch(x), self.drop_path_rate, training=True)
        keep_prob = 1 - self.drop_path_rate
        kept = torch.empty(len(x), device="cpu").bernoulli_(keep_prob).nonzero().flatten()
        if len(kept) == len(x):
            return torch.add(x, branch(x), alpha=1 / keep_prob)
        scale = 1 / keep_prob
        if len(kept) == 0:  # one row times zero, so that every parameter has a gradient, which DDP waits for
            kept, scale = kept.new_zeros(1), 0.0
        index = to_device(kept, x.device)
        return x.index_add(0, index, branch(x.index_select(0, index)).to(x.dtype), alpha=scale)


class PatchMerging(nn.Module):
    """Halves the grid: the channels of 2x2 neighbours, normed, become twice the channels of one token.

    (B, T, C) in raster order -> (B, T / 4, 2 * C).
    """

    def __init__(self, grid: tuple[int, int], dim: int):
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        rows, columns = self.grid
        x = x.view(B, rows // 2, 2, columns // 2, 2, C)
        # Neighbours in the order (row, column) = (0,0), (1,0), (0,1), (1,1), which the published weights expect.
        x = x.permute(0, 1, 3, 4, 2, 5).reshape(B, T // 4, 4 * C)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """Blocks that share one grid and one window, then (but for the last stage) a patch merging."""

    def __init__(self, blocks: list[Block], grid: tuple[int, int], window: int, downsample: nn.Module | None):
        super().__init__()
        self.grid = grid
        self.window = window
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor, layout: WindowLayout) -> Tensor:
        """(B, T, C) -> (B, T, C) in raster order, before the downsampling."""
        if layout.order is not None:  # once for the whole stage: windows are never shifted
            x = x.index_select(1, layout.order)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, layout, use_reentrant=False)
            else:
                x = block(x, layout)
        if layout.inverse is not None:
            x = x.index_select(1, layout.inverse)
        return x


# ---------------------------------------------------------------------------------------------------------------
# The encoder


class SwinTransformer(nn.Module):
    """Hierarchical encoder of MixMAE and, with its head, the fine-tuned classifier (sections 3 and 4.2).

    Args:
        img_size: input size in pixels, an int or (height, width).
        patch_size: side of a patch in pixels; a cell of the last stage covers `encoder_stride = 8 * patch_size`.
        in_chans: image channels.
        num_classes: classes of the linear head; 0 for none.
        embed_dim: channels of the first stage, doubled by every further stage.
        depths, num_heads, window_size: blocks, heads and window side of each of the four stages.
        mlp_ratio: hidden over outer width of the MLPs.
        qkv_bias: whether queries, keys and values have a bias.
        drop_rate, attn_drop_rate: dropout of tokens and MLPs, and of attention weights.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.

    Raises:
        ValueError: when the image size does not fit patches and windows (the message names the nearest that do).
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: Sequence[int] = (14, 14, 14, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.img_size = to_2tuple(img_size)
        check_img_size(self.img_size, patch_size, window_size)
        for name, values in (("depths", depths), ("num_heads", num_heads), ("window_size", window_size)):
            if len(values) != NUM_STAGES:
                raise ValueError(f"{name} needs one value for each of the {NUM_STAGES} stages, got {tuple(values)}")
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.encoder_stride = 2 ** (NUM_STAGES - 1) * patch_size
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (NUM_STAGES - 1)
        self.one_layout_shape = False
        grids = stage_grids(self.img_size, patch_size)
        self.grid_size = grids[-1]

        self.patch_embed = PatchEmbed(self.img_size, patch_size, in_chans, embed_dim, norm_layer=nn.LayerNorm)
        self.absolute_pos_embed = nn.Parameter(get_2d_sincos_pos_embed(embed_dim, grids[0]), requires_grad=False)
        self.pos_drop = nn.Dropout(drop_rate)
        drop_path_rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList()
        self.feature_info = []
        for i, (grid, depth) in enumerate(zip(grids, depths)):
            dim = embed_dim * 2**i
            window = fit_window(grid, window_size[i])
            make_block = partial(Block, dim, num_heads[i], window, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate)
            blocks = [make_block(drop_path=next(drop_path_rates)) for _ in range(depth)]
            downsample = PatchMerging(grid, dim) if i < NUM_STAGES - 1 else None
            self.layers.append(Stage(blocks, grid, window, downsample))
            self.feature_info.append(dict(num_chs=dim, reduction=patch_size * 2**i, module=f"layers.{i}"))
        self.norm = nn.LayerNorm(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(init_linear_and_norm)

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

    def layouts(self, group: Tensor | None, device: torch.device) -> list[WindowLayout]:
        """The layout of every stage.

        Args:
            group: group ids of the cells of the last stage, (rows, columns) or (L,), or None. A cell's id holds for
                the 1, 2x2, 4x4 or 8x8 tokens that it covers at stages 4 to 1.
        """
        if group is None:
            layouts = [window_layout(stage.grid, stage.window, device) for stage in self.layers]
            if type(layouts[0].bias_index) is not Tensor:  # torch.export's stand-ins, of no use to anybody else
                window_layout.cache_clear()
            return layouts
        group = group.detach().to("cpu", torch.long).view(self.grid_size)
        layouts = []
        for i, stage in enumerate(self.layers):
            scale = 2 ** (NUM_STAGES - 1 - i)
            stage_group = group.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
            many_windows = stage.grid != (stage.window, stage.window)
            one_shape = many_windows and (self.one_layout_shape or device.type != "cpu")
            layouts.append((separated_layout if one_shape else group_layout)(stage_group, stage.window, device))
        return layouts

    def forward_stages(self, x: Tensor, group: Tensor | None = None) -> list[Tensor]:
        """Patch embeddings (B, T, C) -> the four stages' outputs, each (B, tokens, channels) in raster order."""
        x = self.pos_drop(x + self.absolute_pos_embed)
        outputs = []
        for stage, layout in zip(self.layers, self.layouts(group, x.device)):
            x = stage(x, layout)
            outputs.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return outputs

    def forward_features(self, imgs: Tensor, group: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, L, num_features), the normed output of the last stage.

        Args:
            imgs: normalised images.
            group: optional group ids of the L cells; a token then attends to tokens of its own group only.
        """
        return self.norm(self.forward_stages(self.embed(imgs), group)[-1])

    def embed(self, imgs: Tensor) -> Tensor:
        """Patch embeddings (B, T, embed_dim) of images (B, C, H, W); no position is added yet."""
        if imgs.ndim != 4 or imgs.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(
                f"the model takes images of shape (B, {self.in_chans}, {self.img_size[0]}, {self.img_size[1]}), "
                f"got {tuple(imgs.shape)}: build it with in_chans and img_size of your images, or resize them"
            )
        return self.patch_embed(imgs)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, L, num_features) -> class logits, or the pooled features with `pre_logits`."""
        x = x.mean(dim=1)
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
            indices: stages to return: a list, the last n, or None for all.
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
        stages = range(NUM_STAGES)
        indices = stages if indices is None else stages[-indices:] if isinstance(indices, int) else indices
        indices = [stages[i] for i in indices]
        outputs = self.forward_stages(self.embed(imgs))
        last = self.norm(outputs[-1])
        if norm:
            outputs[-1] = last
        maps = [outputs[i].unflatten(1, self.layers[i].grid) for i in indices]
        if output_fmt == "NCHW":
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return maps if intermediates_only else (last, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and norm and head on request (timm's `features_only`).

        Returns:
            The stages whose features `forward_intermediates` shall return.
        """
        stages = range(NUM_STAGES)
        wanted = [stages[i] for i in (stages[-indices:] if isinstance(indices, int) else indices)]
        self.layers = self.layers[: max(wanted) + 1]
        self.layers[-1].downsample = None
        if prune_norm or len(self.layers) < NUM_STAGES:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return wanted


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
        img_size=32,
        patch_size=1,
        embed_dim=16,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 4, 8),
        window_size=(8, 8, 8, 4),
    ),
    "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
    "huge": dict(embed_dim=352, depths=(2, 2, 18, 2), num_heads=(11, 22, 44, 88)),
}
WINDOWS_384 = dict(img_size=384, window_size=(16, 16, 24, 12))


def default_cfg(input_size: int = 224, **kwargs) -> dict:
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
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "swin_quickstart": default_cfg(32),
        "swin_tiny_w14": default_cfg(),
        "swin_base_w14": default_cfg(),
        "swin_base_w16_384": default_cfg(384),
        "swin_large_w14": default_cfg(),
        "swin_large_w16_384": default_cfg(384),
        "swin_huge_w14": default_cfg(),
    }
)


def build_swin(variant: str, pretrained: bool, shape: dict, kwargs: dict) -> SwinTransformer:
    return build_model_with_cfg(
        SwinTransformer,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=tuple(range(NUM_STAGES)), feature_cls="getter"),
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
