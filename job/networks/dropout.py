"""Layers with random numbers in training: dropout and stochastic depth."""

from torch import nn
from torchvision import ops

LAYERS = (nn.modules.dropout._DropoutNd, ops.StochasticDepth, ops.DropBlock2d)  # with `p`
RATES = ("drop_prob", "drop_rate", "dropout")  # attributes of other layers, such as timm's DropPath


def switch_off_dropout(body: nn.Module) -> nn.Module:
    """Set all rates of dropout and stochastic depth in `body` to 0. Return it.

    A resumed run then computes the same bytes. Calls of torch's functions in a forward pass,
    such as F.dropout, are out of reach.
    """
    for module in body.modules():
        if isinstance(module, LAYERS):
            module.p = 0.0
        for name in RATES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return body
