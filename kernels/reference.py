"""The passes over activations that a convolution with BatchNorm is made of, in PyTorch: on every device, in
every dtype, and the reference that the compiled ones are held against.

Activations are `[N, C, H, W]`, channels_last, in the run's dtype. What is kept per channel is `[4, C]`, in
gamma's dtype:

    norm    mean, 1/deviation, scale = gamma/deviation, shift = beta - mean scale     y = z scale + shift
    sums    gradients of gamma and of beta, then b and c of the gradient of z         dz = g scale + z b + c

with z the convolution's output, y BatchNorm's, and g the gradient that reaches y through ReLU (Ioffe, Szegedy
2015). Signs are one bit an element, in memory order: whether a unit's output is positive.
"""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

MEAN, RSTD, SCALE, SHIFT = range(4)
D_GAMMA, D_BETA, D_B, D_C = range(4)


class Conv(NamedTuple):
    """What a convolution is, besides its weight."""

    stride: tuple[int, int]
    padding: tuple[int, int]


def cache_folder() -> Path:
    """Where what was compiled and chosen is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchnorm-only"


def affine(z: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """z scale + shift, in one pass and z's dtype."""
    zero, one = torch.zeros_like(norm[MEAN]), torch.ones_like(norm[MEAN])
    return torch.batch_norm(z, norm[SCALE], norm[SHIFT], zero, one, False, 0.0, 0.0, False)  # with eps 0


class TorchPasses:
    """Other implementations override what they have something faster for, and fall back on this."""

    def convolve(
        self,
        x: torch.Tensor,
        norm: torch.Tensor | None,
        weight: torch.Tensor,
        conv: Conv,
        bn: nn.BatchNorm2d | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """z = conv(x), or with `norm` conv(relu(x scale + shift)); and with `bn` the norm of its batch.

        `bn`'s running statistics move towards the batch's.
        """
        if norm is not None:
            x, _ = self.activate(x, norm)
        z = F.conv2d(x, weight, None, conv.stride, conv.padding)
        return z, None if bn is None else self.statistics(z, bn)

    def statistics(self, z: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
        """The norm of z's batch; `bn`'s running statistics move towards it, by its momentum."""
        mean, var = torch.ops.aten.batch_norm_update_stats(z, bn.running_mean, bn.running_var, bn.momentum)
        return self.norm(mean, var, bn)

    def norm(self, mean: torch.Tensor, var: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
        rstd = (var + bn.eps).rsqrt()
        scale = bn.weight * rstd
        return torch.stack([mean, rstd, scale, bn.bias - mean * scale])

    def activate(
        self,
        z: torch.Tensor,
        norm: torch.Tensor,
        shortcut: torch.Tensor | None = None,
        relu: bool = True,
        want_signs: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y = relu(z scale + shift + shortcut), and its signs where asked for."""
        y = affine(z, norm)
        if shortcut is not None:
            y += shortcut
        signs = pack(y > 0) if want_signs else None
        return y.relu_() if relu else y, signs

    def mask_and_sum(
        self,
        dy: torch.Tensor,
        z: torch.Tensor,
        norm: torch.Tensor,
        signs: torch.Tensor | None = None,
        relu: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """g and sums from the gradient of the unit's output; by its signs, or those of z scale + shift."""
        if signs is not None:
            g = dy * unpack(signs, dy)
        elif relu:
            g = dy * (affine(z, norm) > 0)
        else:
            g = dy
        mean, rstd, scale, _ = norm
        settings = None, None, mean, rstd, True, 0.0, (False, True, True)
        _, d_gamma, d_beta = torch.ops.aten.native_batch_norm_backward(g, z, scale, *settings)
        count = z.numel() // z.shape[1]
        b = -scale * rstd * d_gamma / count
        return g, torch.stack([d_gamma, d_beta, b, -scale * d_beta / count - b * mean])

    def whole(self, g: torch.Tensor) -> torch.Tensor:
        """g as a tensor; other implementations may hand it about in another form."""
        return g

    def gradient(
        self, g: torch.Tensor, z: torch.Tensor, norm: torch.Tensor, sums: torch.Tensor
    ) -> torch.Tensor:
        """dz, the gradient of the convolution's output."""
        a, b, c = (coefficients.view(1, -1, 1, 1) for coefficients in (norm[SCALE], sums[D_B], sums[D_C]))
        return torch.addcmul(torch.addcmul(c, z.to(c.dtype), b), g.to(c.dtype), a).to(z.dtype)

    def convolve_backward(
        self,
        g: torch.Tensor,
        z: torch.Tensor,
        norm: torch.Tensor,
        sums: torch.Tensor,
        weight: torch.Tensor,
        conv: Conv,
        x_shape: torch.Size,
        below: tuple[torch.Tensor, torch.Tensor] | None = None,
        add: torch.Tensor | None = None,
        dz: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradient of the convolution's input, plus `add`; from `dz`, where that is known already.

        With `below`, the z and norm of the unit that the input came from: that unit's g, and its sums.
        """
        dz = self.gradient(g, z, norm, sums) if dz is None else dz
        # Not aten::convolution_backward, which wants the input, and copies even one that has no memory.
        sizes = zip(x_shape[2:], z.shape[2:], weight.shape[2:], conv.stride, conv.padding, strict=True)
        rest = [n - ((m - 1) * stride - 2 * padding + k) for n, m, k, stride, padding in sizes]
        dx = F.conv_transpose2d(dz, weight, None, conv.stride, conv.padding, rest)
        if add is not None:
            dx += add
        return (dx, None) if below is None else self.mask_and_sum(dx, *below)

    def weight_gradient(
        self, dz: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, conv: Conv
    ) -> torch.Tensor:
        """The gradient of the weight, of its dtype."""
        _, dw, _ = torch.ops.aten.convolution_backward(
            dz, x, weight, None, conv.stride, conv.padding, (1, 1), False, (0, 0), 1, (False, True, False)
        )
        return dw


def pack(positive: torch.Tensor) -> torch.Tensor:
    """Signs: uint8, bit k of byte i for element 8i + k in memory order; of booleans `[N, C, H, W]`."""
    flat = positive.permute(0, 2, 3, 1).reshape(-1)
    eights = F.pad(flat, (0, -len(flat) % 8)).view(torch.int64)  # bytes 0 or 1, the first the lowest
    return (eights * 0x0102040810204080 >> 56).to(torch.uint8)  # byte k's bit goes to place 56 + k


def unpack(signs: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The booleans that `pack` was given, in the shape of `like`."""
    n, c, h, w = like.shape
    bits = torch.arange(256, device=signs.device)[:, None] >> torch.arange(8, device=signs.device) & 1
    eights = bits.to(torch.uint8).view(torch.int64).view(256)  # what each byte stands for
    return eights[signs.int()].view(torch.bool)[: like.numel()].view(n, h, w, c).permute(0, 3, 1, 2)
