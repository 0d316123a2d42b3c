"""How new weights are drawn."""

from torch import nn

from util.errors import UserError


def init_linear_and_norm(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero bias, LayerNorm at identity (MixMAE, appendix A)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def make_head(features: int, num_classes: int, **where) -> nn.Module:
    """A linear classifier, or nothing for 0 classes; `where`: device and dtype. Raises a UserError for fewer."""
    if num_classes < 0:
        raise UserError(f"num_classes must be 0, for no head, or more, got {num_classes}")
    return nn.Linear(features, num_classes, **where) if num_classes else nn.Identity()
