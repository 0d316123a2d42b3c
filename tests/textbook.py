"""MixMAE as a textbook would write it: the oracle that the tests trust and the baseline of `benchmark.py`.

Every block partitions its tokens into windows and reverses that; masked attention computes all pairs of a window
and adds a large negative number to those of different groups; both branches are decoded and predicted in full and
selected afterwards. Plain PyTorch, nothing shared with the models under test but the names of the parameters, so
that one state dict loads into both.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    """Sizes of a model; the defaults are mixmae_base at 224."""

    img_size: int | tuple[int, int] = 224
    patch_size: int = 4
    in_chans: int = 3
    embed_dim: int = 128
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    window_size: tuple[int, ...] = (14, 14, 14, 7)
    mlp_ratio: float = 4.0
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    norm_pix_loss: bool = False
    num_classes: int = 0
    drop_path_rate: float = 0.0

    def __post_init__(self):
        rows, columns = (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size
        self.grids = [(rows // self.patch_size // 2**i, columns // self.patch_size // 2**i) for i in range(4)]
        self.stride = 8 * self.patch_size


class WindowAttention(nn.Module):
    def __init__(self, dim, num_heads, window):
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if window:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
            row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
            row, column = row.flatten(), column.flatten()
            row_offset = row[:, None] - row[None, :] + window - 1
            column_offset = column[:, None] - column[None, :] + window - 1
            index = row_offset * (2 * window - 1) + column_offset
            self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x, mask=None):
        """x (B * windows, N, C); mask (B * windows, N, 1) of 0 and 1, or None."""
        windows, N, C = x.shape
        qkv = self.qkv(x).reshape(windows, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q = q * (C // self.num_heads) ** -0.5
        scores = q @ k.transpose(-2, -1)
        if self.window:
            bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
            scores = scores + bias.view(N, N, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            mask = mask.view(windows, 1, N, 1)
            same = mask * mask.transpose(2, 3) + (1 - mask) * (1 - mask).transpose(2, 3)
            scores = scores - 1e30 * (1 - same)
        x = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(windows, N, C)
        return self.proj(x)


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0 or not self.training:
            return x
        return x * x.new_empty((len(x), 1, 1)).bernoulli_(1 - self.rate).div_(1 - self.rate)


def window_partition(x, window):
    """(B, rows, columns, C) -> (B * windows, window * window, C)"""
    B, rows, columns, C = x.shape
    x = x.view(B, rows // window, window, columns // window, window, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, C)


def window_reverse(x, window, rows, columns):
    """(B * windows, window * window, C) -> (B, rows, columns, C)"""
    x = x.view(-1, rows // window, columns // window, window, window, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, rows, columns, x.shape[-1])


class SwinBlock(nn.Module):
    def __init__(self, dim, num_heads, grid, window, mlp_ratio, drop_path):
        super().__init__()
        self.grid, self.window = grid, window
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x, mask=None):
        """x (B, T, C); mask (B, T, 1) or None."""
        B, _, C = x.shape
        windows = window_partition(self.norm1(x).view(B, *self.grid, C), self.window)
        if mask is not None:
            mask = window_partition(mask.view(B, *self.grid, 1), self.window)
        windows = self.attn(windows, mask)
        x = x + self.drop_path(window_reverse(windows, self.window, *self.grid).view(B, -1, C))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DecoderBlock(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, None)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, imgs):
        return self.norm(self.proj(imgs).flatten(2).transpose(1, 2))


class PatchMerging(nn.Module):
    def __init__(self, grid, dim):
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        x = x.view(B, *self.grid, C)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
        return self.reduction(self.norm(x.view(B, T // 4, 4 * C)))


class Stage(nn.Module):
    def __init__(self, blocks, downsample):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class TextbookEncoder(nn.Module):
    """The encoder, with a head when `num_classes` is not 0."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, config.embed_dim)
        tokens = config.grids[0][0] * config.grids[0][1]
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, tokens, config.embed_dim), requires_grad=False)
        rates = iter(torch.linspace(0, config.drop_path_rate, sum(config.depths)).tolist())
        self.layers = nn.ModuleList()
        for i, grid in enumerate(config.grids):
            dim = config.embed_dim * 2**i
            window = min(config.window_size[i], *grid)
            blocks = [
                SwinBlock(dim, config.num_heads[i], grid, window, config.mlp_ratio, next(rates))
                for _ in range(config.depths[i])
            ]
            self.layers.append(Stage(blocks, PatchMerging(grid, dim) if i < 3 else None))
        self.norm = nn.LayerNorm(8 * config.embed_dim)
        self.head = nn.Linear(8 * config.embed_dim, config.num_classes) if config.num_classes else None

    def encode(self, x, masks=(None, None, None, None)):
        """Patch embeddings -> normed last stage; masks: one (B, tokens, 1) for each stage, or none."""
        x = x + self.absolute_pos_embed
        for stage, mask in zip(self.layers, masks):
            for block in stage.blocks:
                x = block(x, mask)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return self.norm(x)

    def forward(self, imgs):
        return self.head(self.encode(self.patch_embed(imgs)).mean(dim=1))


class TextbookMixMAE(TextbookEncoder):
    def __init__(self, config):
        super().__init__(config)
        dim, (rows, columns) = config.decoder_dim, config.grids[3]
        self.decoder_embed = nn.Linear(8 * config.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, rows * columns, dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(dim, config.decoder_num_heads) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, config.stride**2 * config.in_chans)

    def stage_masks(self, mask, B):
        """(L,) -> a (B, tokens, 1) mask for each stage."""
        cells = mask.view(1, 1, *self.config.grids[3])
        return [
            F.interpolate(cells, size=grid, mode="nearest").view(1, -1, 1).expand(B, -1, -1)
            for grid in self.config.grids
        ]

    def forward(self, imgs, mask):
        """Images (B, C, H, W) and the mask (L,) -> loss, reconstruction (B, L, s*s*C), both branches' predictions."""
        masks = self.stage_masks(mask, len(imgs))
        x = self.patch_embed(imgs)
        x = x * (1 - masks[0]) + x.flip(0) * masks[0]
        latent = self.encode(x, masks)

        m = masks[3]
        z = self.decoder_embed(latent)
        mask_token = self.mask_token.expand(*z.shape[:2], -1)
        x = torch.cat([z * (1 - m) + mask_token * m, z * m + mask_token * (1 - m)])
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        both = self.decoder_pred(self.decoder_norm(x))

        first, second = both.chunk(2)
        pred = first * m + second.flip(0) * (1 - m)
        target = self.patchify(imgs)
        if self.config.norm_pix_loss:
            mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        return ((pred - target) ** 2).mean(), pred, both

    def patchify(self, imgs):
        s, (rows, columns) = self.config.stride, self.config.grids[3]
        cells = imgs.view(len(imgs), -1, rows, s, columns, s)
        return torch.einsum("bchiwj->bhwijc", cells).reshape(len(imgs), rows * columns, -1)
