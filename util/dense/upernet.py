"""Semantic segmentation: UPerNet (Xiao et al., 2018, arXiv 1807.10221) on the four stages of the encoder.

It differs from the usual implementations in two ways. Norms are GroupNorm, not BatchNorm synchronised over GPUs:
an optimizer step then depends on its images alone, not on how they are divided among ranks and micro-batches. And maps
are enlarged cell by cell and cut, as the encoder pads at the right and bottom, so they stay aligned at any image size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.data.label_maps import IGNORED
from util.dense.encoder import DenseEncoder

POOLED = (1, 2, 3, 6)  # sides of the pooled maps of the pyramid pooling module
GROUP = 16  # channels that are normed together
DROPOUT = 0.1  # of whole channels before the classifiers
AUXILIARY_WEIGHT = 0.4  # of the auxiliary head's loss


class ConvNormAct(nn.Sequential):
    """Convolution, GroupNorm, ReLU; (B, C, rows, columns) -> (B, out_channels, rows, columns)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
            nn.GroupNorm(max(1, out_channels // GROUP), out_channels),
            nn.ReLU(inplace=True),
        )


class PyramidPooling(nn.Module):
    """Joins averages over 1x1, 2x2, 3x3 and 6x6 parts of the map to every cell; keeps the grid."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.pooled = nn.ModuleList(ConvNormAct(in_channels, channels, 1) for _ in POOLED)
        self.fuse = ConvNormAct(in_channels + len(POOLED) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for side, conv in zip(POOLED, self.pooled):
            maps.append(F.interpolate(conv(average_parts(x, side)), x.shape[-2:], mode="bilinear"))
        return self.fuse(torch.cat(maps, dim=1))


def average_parts(x: Tensor, side: int) -> Tensor:
    """Averages (B, C, side, side) over side x side parts of maps (B, C, rows, columns), which may overlap by a cell."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.adaptive_avg_pool2d(x, side)
    # The same as products, for which PyTorch has deterministic gradients on a GPU.
    weights = (F.adaptive_avg_pool1d(torch.eye(length, device=x.device), side) for length in x.shape[-2:])
    rows, columns = (weight.to(x.dtype) for weight in weights)  # (length, side)
    return rows.mT @ x @ columns


class PyramidHead(nn.Module):
    """Pyramid pooling on the last stage, a feature pyramid over all, and a classifier of the fused maps.

    Maps of the stages, (B, C_i, rows_i, columns_i) -> logits (B, num_classes, rows_0, columns_0).
    """

    def __init__(self, in_channels: list[int], channels: int, num_classes: int):
        super().__init__()
        self.pooling = PyramidPooling(in_channels[-1], channels)
        self.lateral = nn.ModuleList(ConvNormAct(dim, channels, 1) for dim in in_channels[:-1])
        self.smooth = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in in_channels[:-1])
        self.fuse = ConvNormAct(len(in_channels) * channels, channels, 3)
        self.classifier = nn.Sequential(nn.Dropout2d(DROPOUT), nn.Conv2d(channels, num_classes, 1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        pyramid = [self.pooling(maps[-1])]
        for x, lateral in zip(maps[-2::-1], reversed(self.lateral)):  # from the coarsest to the finest
            x = lateral(x)
            pyramid.insert(0, x + enlarge(pyramid[0], 2, x.shape[-2:]))
        pyramid[:-1] = [smooth(x) for smooth, x in zip(self.smooth, pyramid)]
        grid = pyramid[0].shape[-2:]
        fused = torch.cat([enlarge(x, 2**i, grid) for i, x in enumerate(pyramid)], dim=1)
        return self.classifier(self.fuse(fused))


class UPerNet(nn.Module):
    """An encoder with a segmentation head; in training also the usual auxiliary head, on the last stage but one.

    Args:
        encoder: gives the normed maps of the four stages.
        num_classes: classes of a pixel, at least 2.
        channels: of the maps in the head; the auxiliary head has half as many.
    """

    def __init__(self, encoder: DenseEncoder, num_classes: int, channels: int):
        super().__init__()
        self.num_classes = num_classes
        self.head = PyramidHead(encoder.channels, channels, num_classes)
        self.auxiliary = nn.Sequential(
            ConvNormAct(encoder.channels[-2], channels // 2, 3),
            nn.Dropout2d(DROPOUT),
            nn.Conv2d(channels // 2, num_classes, 1),
        )
        self.apply(init_convolution)
        self.encoder = encoder

    def forward(self, imgs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, num_classes, H, W) of normalised images (B, C, H, W); in training also the auxiliary head's."""
        maps = self.encoder(imgs)
        patch, size = self.encoder.swin.patch_size, imgs.shape[-2:]
        # In float32: in bf16, neighbours between two cells would be rounded to the same.
        logits = enlarge(self.head(maps).float(), patch, size)
        if not self.training:
            return logits
        return logits, enlarge(self.auxiliary(maps[-2]).float(), patch * 2 ** (len(maps) - 2), size)


def enlarge(x: Tensor, factor: int, size: torch.Size) -> Tensor:
    """Every cell of maps (B, C, rows, columns) `factor` times as large, bilinear; what exceeds `size` is cut off."""
    if factor > 1:
        x = F.interpolate(x, scale_factor=float(factor), mode="bilinear")
    return x[..., : size[0], : size[1]]


def segmentation_loss(logits: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of both heads' logits (B, classes, H, W) with labels (B, H, W), those that are IGNORED left out.

    The sum is divided by the number of all pixels, as is usual. So it is an average over images, each with the same
    weight however they are divided into batches, and 0 where nothing is labelled.
    """
    labels = labels.long()
    if torch.are_deterministic_algorithms_enabled():  # as a list of pixels, which PyTorch sums in one order on a GPU
        logits, labels = (values.movedim(1, -1).flatten(0, -2) for values in logits), labels.flatten()
    main, auxiliary = (
        F.cross_entropy(values.float(), labels, ignore_index=IGNORED, reduction="sum") / labels.numel()
        for values in logits
    )
    return main + AUXILIARY_WEIGHT * auxiliary


def init_convolution(module: nn.Module) -> None:
    """He initialisation before a ReLU; classifiers, which have a bias, near 0, so that classes start equal."""
    if isinstance(module, nn.Conv2d):
        if module.bias is None:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
