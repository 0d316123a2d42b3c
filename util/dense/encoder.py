"""The encoder under a task on dense features: maps of four scales, of images of any size."""

import timm
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from models_swin import SwinTransformer
from util.dense.config import DenseConfig
from util.run.optim import autocast
from util.seeding import seed_all
from util.weights.settings import model_arguments


class DenseEncoder(nn.Module):
    """Images (B, in_chans, H, W), normalised, of any size -> four maps (B, channels[i], rows, columns), float32.

    Map i has a cell for every `patch_size * 2**i` pixels. Each has its own LayerNorm, as in Swin for detection and
    segmentation: blocks are pre-norm, so the output of a stage has no particular scale.

    It sets the precision of the run itself, and what is built on it computes in float32: torchvision's detectors
    round boxes to the type of their heads, which in bf16 is off by pixels.

    Args:
        config: model and its settings, `drop_path`, `grad_checkpointing`, `freeze_stages`, `precision`.
    """

    def __init__(self, config: DenseConfig):
        super().__init__()
        seed_all(config.seed, "weights")  # the same initial weights on every rank
        self.body = timm.create_model(
            config.model,
            features_only=True,
            strict_img_size=False,
            drop_path_rate=config.drop_path,
            **model_arguments(config),
        )
        self.body.model.set_grad_checkpointing(config.grad_checkpointing)
        self.channels = self.body.feature_info.channels()
        self.norms = nn.ModuleList(LayerNorm2d(channels) for channels in self.channels)
        self.precision = config.precision
        swin = self.body.model
        self.frozen = [swin.patch_embed, *swin.layers[: config.freeze_stages]] if config.freeze_stages >= 0 else []
        for part in self.frozen:
            part.requires_grad_(False)

    @property
    def swin(self) -> SwinTransformer:
        """The encoder itself."""
        return self.body.model

    def train(self, mode: bool = True) -> "DenseEncoder":
        """As for every module; frozen parts drop no path."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(self, imgs: Tensor) -> list[Tensor]:
        with autocast(self.precision, imgs.device):
            maps = [norm(x) for norm, x in zip(self.norms, self.body(imgs))]
        return [x.float() for x in maps]
