"""Mask R-CNN and Faster R-CNN with a feature pyramid, torchvision's, on the encoder."""

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from util.dense.config import DenseConfig
from util.dense.encoder import DenseEncoder

ASPECT_RATIOS = (0.5, 1.0, 2.0)
LEVELS = 5  # four of the encoder, and one of half the last one's size
POOLED = 7  # side of what a box's features are pooled to


class Pyramid(nn.Module):
    """The encoder's maps as a feature pyramid: a torchvision backbone."""

    def __init__(self, encoder: DenseEncoder, out_channels: int):
        super().__init__()
        self.encoder, self.out_channels = encoder, out_channels
        self.fpn = FeaturePyramidNetwork(encoder.channels, out_channels, LastLevelMaxPool())

    def forward(self, imgs: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): x for i, x in enumerate(self.encoder(imgs))})


def build_detector(config: DenseConfig, num_classes: int) -> FasterRCNN:
    """A detector of normalised images (C, h, w) of any size, with torchvision's inputs and outputs.

    In training it draws each image's size from `config.min_size` (the shorter side; the longer is at most
    `config.max_size`), in evaluation it takes the last of them. Images of a batch are padded to the largest, which
    changes their features near the padding. Anchors begin at 8 patches, torchvision's usual 32 pixels with patches of
    4.

    Args:
        config: of a `DetectionConfig`.
        num_classes: without the background.
    """
    encoder = DenseEncoder(config)
    channels = config.head_channels
    side = 8 * encoder.swin.patch_size
    settings = dict(
        min_size=config.min_size,
        max_size=config.max_size,
        size_divisible=side,  # cells of the coarsest map: torchvision infers strides from the sizes of maps
        image_mean=(0.0,) * config.in_chans,  # they are normalised already
        image_std=(1.0,) * config.in_chans,
        rpn_anchor_generator=AnchorGenerator(tuple((side * 2**i,) for i in range(LEVELS)), (ASPECT_RATIOS,) * LEVELS),
        box_batch_size_per_image=config.sampled_boxes,
        box_head=TwoMLPHead(channels * POOLED**2, 4 * channels),
        box_predictor=FastRCNNPredictor(4 * channels, num_classes + 1),
    )
    pyramid = Pyramid(encoder, channels)
    if config.detector == "faster_rcnn":
        return FasterRCNN(pyramid, **settings)
    return MaskRCNN(
        pyramid,
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, dilation=1),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
        **settings,
    )
