"""kernels.py: the unit is convolution, BatchNorm, shortcut and ReLU, in this order."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernels import conv_bn_relu


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_shortcut", [True, False])
def test_the_unit_equals_its_parts_in_float64(relu, with_shortcut):
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False).double(), nn.BatchNorm2d(5).double()
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    x, shortcut = (
        torch.randn(4, 3, 9, 9).double(),
        torch.randn(4, 5, 5, 5).double() if with_shortcut else None,
    )
    z = F.conv2d(x, conv.weight, stride=2, padding=1)
    mean, var = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), unbiased=False, keepdim=True)
    expected = (z - mean) / (var + 1e-5).sqrt() * bn.weight.view(-1, 1, 1) + bn.bias.view(-1, 1, 1)
    expected = expected + shortcut if with_shortcut else expected
    torch.testing.assert_close(
        conv_bn_relu(x, conv, bn, shortcut, relu), expected.relu() if relu else expected
    )
    torch.testing.assert_close(bn.running_mean, 0.1 * mean.flatten())
