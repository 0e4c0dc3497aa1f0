"""The unit that every network here is made of: convolution, BatchNorm, then (optionally) a shortcut and ReLU.

The models call `conv_bn_relu` and nothing else between two block boundaries, so a faster or leaner way to
compute the unit replaces its body and every architecture has it.
"""

import torch
from torch import nn
from torch.nn import functional as F


def conv_bn_relu(
    x: torch.Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    shortcut: torch.Tensor | None = None,
    relu: bool = True,
) -> torch.Tensor:
    """relu(bn(conv(x)) + shortcut).

    `x` is `[N, C_in, H, W]`, the result and `shortcut` are `[N, C_out, H', W']`, all channels_last. `bn` in
    training mode normalises with the batch's statistics and updates its running ones, whether or not
    anything is trained.
    """
    y = bn(conv(x))
    if shortcut is not None:
        y = y + shortcut
    return F.relu(y) if relu else y
