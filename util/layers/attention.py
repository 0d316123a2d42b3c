"""Attention inside the runs of a `WindowLayout`, with a learned relative position bias."""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from util.layers.windows import WindowLayout


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
