"""An encoder as timm's `features_only=True` gives it."""

from timm.models._features import FeatureGetterNet


class FeatureNet(FeatureGetterNet):
    """timm's wrapper of `forward_intermediates`, which can also save memory, as its wrapper of timm's Swin can."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)
