"""Attention inside the segments of a `WindowLayout`, with a learned relative position bias.

`segment_attention` chooses the kernel: `BiasedAttention` for training on a CPU, FlexAttention for long segments when
torch.compile generates code for a GPU, and else PyTorch's fused attention.
"""

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table_simple, trunc_normal_
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from util.layers.tracing import is_compiled_here, is_transformed, runs_eagerly
from util.layers.windows import Segments, WindowLayout

FLEX_ROWS = 2**16  # windows times heads that one dimension of a GPU's grid of programs can hold
FLEX_TOKENS = 128  # for fewer queries FlexAttention uses a kernel made for decoding text
# PyTorch 2.6 loses the gradient of a bias that is computed in the same graph.
FLEX_LEARNS = tuple(map(int, torch.__version__.split(".")[:2])) > (2, 6)


class Attention(nn.Module):
    """Multi-head self-attention inside the segments of a `WindowLayout`, with a learned relative position bias.

    Args:
        dim: channels.
        num_heads: attention heads.
        window_size: side of the window that the bias table covers; None: plain attention among all tokens, no bias.
        qkv_bias: whether queries, keys and values have a bias.
        attn_drop, proj_drop: dropout of attention weights and of the output.
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

    def forward(
        self, x: Tensor, layout: WindowLayout | None = None, select: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C), tokens in the layout's order, or of one segment in any order without a layout.

        With `select`, the tokens that it picks from the attention's (B, T, C); the others are not projected.
        """
        T = x.shape[1]
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, T, 3, nH, d)
        dropout = self.attn_drop if self.training else 0.0
        if layout is None:
            x = segment_attention(qkv, ((1, T),), [None], dropout=dropout)
        else:
            x = segment_attention(qkv, layout.segments, self.position_bias(layout), layout.groups, dropout)
        x = x.flatten(2)
        if select is not None:
            x = select(x)
        return self.proj_drop(self.proj(x))

    def set_window_size(self, window_size: int) -> None:
        """Resize the bias table to that of another window."""
        table = self.relative_position_bias_table
        resized = resize_bias_table(table.detach(), window_size)
        self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)

    def position_bias(self, layout: WindowLayout) -> list[Tensor]:
        """The bias of each entry of `layout.segments`: (how many or 1, nH, n, n)."""
        table = self.relative_position_bias_table
        if is_compiled_for_gpu(table):
            # Without a backward pass FlexAttention computes this where it needs it, and does not support `stack` there.
            bias = table.index_select(0, layout.bias_index).t().contiguous()  # (nH, pairs)
        else:
            # Transposed by `stack`, whose gradient has the table's own memory layout, as DDP wants it.
            bias = torch.stack(table.unbind(1)).index_select(1, layout.bias_index)
        shapes = [(1 if layout.one_bias else count, n, n) for count, n in layout.segments]
        parts = bias.split([math.prod(shape) for shape in shapes], dim=1)
        return [part.unflatten(1, shape).transpose(0, 1) for part, shape in zip(parts, shapes)]


def resize_bias_table(table: Tensor, window_size: int) -> Tensor:
    """The rows ((2 * old - 1)^2, nH) of another window's table, resized bicubically to those of `window_size`."""
    rows = (2 * window_size - 1) ** 2
    window = (window_size, window_size)
    return resize_rel_pos_bias_table_simple(table.float(), window, (rows, table.shape[1])).to(table.dtype)


def segment_attention(
    qkv: Tensor,
    segments: Segments,
    biases: Sequence[Tensor | None],
    groups: Sequence[Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v inside each segment and group.

    Args:
        qkv: (B, T, 3, nH, d), queries, keys and values of tokens that stand segment by segment.
        segments: (how many, tokens in each), as in a `WindowLayout`.
        biases: for each entry of `segments` (how many or 1, nH, n, n), or None.
        groups: for each entry the groups of its tokens (how many, n), or None if all are of one group.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, T, nH, d)
    """
    groups = groups or [None] * len(biases)
    has_bias = biases[0] is not None
    generates = FLEX_LEARNS and has_bias and not dropout and is_compiled_for_gpu(qkv)
    learned = has_bias and biases[0].requires_grad and biases[0].dtype == qkv.dtype
    if learned and qkv.device.type == "cpu" and not dropout and runs_eagerly() and fused_kernels_allowed():
        return BiasedAttention.apply(qkv, segments, *map(hide_other_groups, biases, groups))
    parts = []
    for part, bias, group in zip(split_segments(qkv, segments), biases, groups):
        B, S, n, _, nH, _ = part.shape
        if generates and n >= FLEX_TOKENS and B * S * nH < FLEX_ROWS:
            parts.append(flexible_attention(part, bias, group))
        else:
            parts.append(fused_attention(part, hide_other_groups(bias, group), dropout))
    return torch.cat([part.flatten(1, 2) for part in parts], dim=1)


def is_compiled_for_gpu(x: Tensor) -> bool:
    """Whether torch.compile records the operations on x, to generate code for a GPU."""
    return x.device.type == "cuda" and is_compiled_here()


def hide_other_groups(bias: Tensor | None, group: Tensor | None) -> Tensor | None:
    """The bias (S or 1, nH, n, n), minus infinity for pairs that are not of one `group` (S, n)."""
    if group is None:
        return bias
    return bias.masked_fill(group[:, None, :, None] != group[:, None, None, :], float("-inf"))


def fused_kernels_allowed() -> bool:
    """False under `sdpa_kernel(SDPBackend.MATH)`, which asks for operations that have all derivatives."""
    return torch.backends.cuda.flash_sdp_enabled()  # of CPUs too


def split_segments(x: Tensor, segments: Segments) -> list[Tensor]:
    """Views (B, S, n, ...) of x (B, T, ...), one for each `S` neighbouring segments of `n` tokens."""
    parts = x.split([count * n for count, n in segments], dim=1)
    return [part.unflatten(1, (count, n)) for part, (count, n) in zip(parts, segments)]


def fused_attention(qkv: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """PyTorch's kernels: qkv (B, S, n, 3, nH, d), bias (S or 1, nH, n, n) or None -> (B, S, n, nH, d)."""
    qkv = qkv.permute(3, 0, 1, 4, 2, 5)  # (3, B, S, nH, n, d)
    S, nH = qkv.shape[2:4]
    # Fused kernels take four dimensions: segments join the batch if they share a bias, else the heads.
    shared = bias is None or len(bias) == 1
    q, k, v = (t.flatten(0, 1) if shared else t.flatten(1, 2) for t in qkv)
    if bias is not None:
        bias = bias.flatten(0, 1)[None].to(q.dtype)
    # Under torch.func PyTorch would not see that the bias has a gradient, and choose a kernel without one.
    backends = SDPBackend.MATH if bias is not None and is_transformed() else None
    with sdpa_kernel(backends) if backends else contextlib.nullcontext():
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    x = x.unflatten(0, (-1, S)) if shared else x.unflatten(1, (S, nH))  # never by B, which exporters leave open
    x = x.transpose(2, 3)
    # Kernels differ in the strides of what they give: a recorded view of one fails if another kernel is chosen.
    return x if runs_eagerly() else x.clone(memory_format=torch.contiguous_format)


def flexible_attention(qkv: Tensor, bias: Tensor, group: Tensor | None) -> Tensor:
    """FlexAttention: qkv (B, S, n, 3, nH, d), bias (S or 1, nH, n, n), group (S, n) or None -> (B, S, n, nH, d).

    The bias is added and pairs of other groups are hidden where the scores are made, in one kernel, which also sums the
    bias's gradient: fused attention writes that for every window of every image first.
    """
    from torch.nn.attention.flex_attention import flex_attention  # here, since it takes a second to import

    S, bias_step = qkv.shape[1], int(len(bias) > 1)
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(1, 2)  # (B * S, nH, n, d)

    def change_score(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        window = row % S
        score = score + bias[window * bias_step, head, query, key]
        if group is None:
            return score
        return torch.where(group[window, query] == group[window, key], score, -float("inf"))

    return flex_attention(q, k, v, score_mod=change_score).unflatten(0, (-1, S)).transpose(2, 3)


class BiasedAttention(torch.autograd.Function):
    """Attention inside segments with a gradient for a learned bias, for a CPU.

    PyTorch's fused attention has no such gradient on a CPU, and if composed of single operations, the gradients of
    queries, keys and values are gathered and copied several times. Here each part is read once from where the linear
    layer left it and its gradient is written once to where that layer takes it.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, segments: Segments, *biases: Tensor) -> Tensor:
        """See `segment_attention`."""
        B, T, _, nH, d = qkv.shape
        out = qkv.new_empty(B, T, nH, d)
        saved = []
        for part, out_part, bias in zip(split_segments(qkv, segments), split_segments(out, segments), biases):
            _, S, n = part.shape[:3]
            q, k, v = part.permute(3, 0, 1, 4, 2, 5).flatten(1, 3)  # (B * S * nH, n, d), copied
            weights = scaled_bmm(q, k.transpose(1, 2), d**-0.5)
            weights.view(B, S, nH, n, n).add_(bias)
            torch.softmax(weights, dim=-1, out=weights)
            out_part.copy_((weights @ v).view(B, S, nH, n, d).transpose(2, 3))
            saved += (q, k, v, weights)
        ctx.save_for_backward(*saved)
        ctx.segments = segments
        ctx.shared = [len(bias) == 1 for bias in biases]
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        # By create_graph=True, or is_grads_batched=True.
        if torch.is_grad_enabled() or torch._C._dispatch_keys(grad).has(torch._C._dispatch_key_parse("Batched")):
            raise RuntimeError(
                "attention on a CPU has first derivatives only, and of one number at a time: for second ones "
                "(create_graph=True) and many at once (is_grads_batched=True, vectorize=True), run the forward pass "
                "under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            )
        B, T, nH, d = grad.shape
        grad_qkv = grad.new_empty(B, T, 3, nH, d)
        grad_biases = []
        saved = iter(ctx.saved_tensors)
        parts = zip(split_segments(grad, ctx.segments), split_segments(grad_qkv, ctx.segments), ctx.shared)
        for part, qkv_part, shared in parts:
            q, k, v, weights = (next(saved) for _ in range(4))
            S, n = part.shape[1:3]
            part = part.transpose(2, 3).flatten(0, 2)  # (B * S * nH, n, d)
            grad_scores = part @ v.transpose(1, 2)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_scores, weights, -1, weights.dtype)
            grads = q.new_empty(3, B, S, nH, n, d)
            grad_q, grad_k, grad_v = grads.flatten(1, 3)
            scaled_bmm(grad_scores, k, d**-0.5, out=grad_q)
            scaled_bmm(grad_scores.transpose(1, 2), q, d**-0.5, out=grad_k)
            torch.bmm(weights.transpose(1, 2), part, out=grad_v)
            qkv_part.copy_(grads.permute(1, 2, 4, 0, 3, 5))
            grad_bias = grad_scores.view(B, S, nH, n, n).sum(0)
            grad_biases.append(grad_bias.sum(0, keepdim=True) if shared else grad_bias)
        return grad_qkv, None, *grad_biases


def scaled_bmm(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale * (a @ b), (M, n, d) and (M, d, m) -> (M, n, m), in one pass: `beta=0` adds nothing."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale, out=out)
