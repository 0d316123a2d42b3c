"""An encoder as timm's `features_only=True` gives it."""

from timm.models._features import FeatureGetterNet


class FeatureNet(FeatureGetterNet):
    """timm's wrapper of `forward_intermediates`, which can also save memory, as its wrapper of timm's Swin can."""

    def __init__(self, *args, **kwargs):
        # timm before 1.0.31 asks wrappers that it does not know for the model's own format, NHWC.
        super().__init__(*args, **{**kwargs, "output_fmt": "NCHW"})

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)
