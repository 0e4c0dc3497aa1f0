"""The passes over activations that make up convolution, BatchNorm and ReLU, in PyTorch.

They run on every device in every dtype, and the compiled passes are tested against them. A unit is a
convolution and its BatchNorm; a block is one or more units, with ReLU between them. These are the formulas of
a unit with n values per channel in the batch (Ioffe and Szegedy 2015):

    z = conv(x)              mean, var = those of z over the batch     rstd = 1 / sqrt(var + eps)
    y = z scale + shift      scale = gamma rstd                        shift = beta - mean scale
    g, gradient of y         d_gamma = rstd sum(g (z - mean))          d_beta = sum(g)
    dz = g scale + z b + c   b = -scale rstd d_gamma / n               c = -scale d_beta / n - b mean

g is the gradient of relu(y), or of relu(y + shortcut), set to zero where that is not positive. Activations
are `[N, C, H, W]`, channels_last, in the run's dtype. Per-channel values are `[4, C]`, in gamma's dtype:

    norm    mean, rstd, scale, shift          rows MEAN, RSTD, SCALE, SHIFT
    sums    d_gamma, d_beta, b, c             rows D_GAMMA, D_BETA, D_B, D_C

Signs are one bit per element, in memory order, set where the block's output is positive; see `pack`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, RSTD, SCALE, SHIFT = NORM_ROWS = range(4)
D_GAMMA, D_BETA, D_B, D_C = SUMS_ROWS = range(4)


class Conv(NamedTuple):
    """What the passes need to know about a convolution besides its weight."""

    stride: tuple[int, int]
    padding: tuple[int, int]


class BatchNorm(NamedTuple):
    """What the passes need from a BatchNorm layer. They update its running statistics in place."""

    gamma: Tensor
    beta: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float
    momentum: float

    @classmethod
    def of(cls, bn: nn.BatchNorm2d) -> "BatchNorm":
        return cls(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, bn.momentum)


def affine(z: Tensor, norm: Tensor) -> Tensor:
    """Return z scale + shift, computed in one pass and in z's dtype."""
    zero, one = torch.zeros_like(norm[MEAN]), torch.ones_like(norm[MEAN])
    return torch.batch_norm(z, norm[SCALE], norm[SHIFT], zero, one, False, 0.0, 0.0, False)  # with eps 0


class TorchPasses:
    """The passes in PyTorch. Other implementations override those that they can compute faster."""

    name = "torch"

    def convolve(
        self, x: Tensor, norm: Tensor | None, weight: Tensor, conv: Conv, bn: BatchNorm | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return z = conv(x), or with `norm` conv(relu(x scale + shift)), and `statistics(z, bn)` or None."""
        if norm is not None:
            x, _ = self.activate(x, norm)
        z = F.conv2d(x, weight, None, conv.stride, conv.padding)
        return z, None if bn is None else self.statistics(z, bn)

    def statistics(self, z: Tensor, bn: BatchNorm) -> Tensor:
        """Return the norm of the batch z, and update `bn`'s running statistics with its momentum."""
        mean, var = torch.ops.aten.batch_norm_update_stats(z, bn.running_mean, bn.running_var, bn.momentum)
        return self.norm(mean, var, bn)

    def norm(self, mean: Tensor, var: Tensor, bn: BatchNorm) -> Tensor:
        """Return the norm for a given mean and variance, each `[C]`."""
        rstd = (var + bn.eps).rsqrt()
        scale = bn.gamma * rstd
        return torch.stack([mean, rstd, scale, bn.beta - mean * scale])

    def activate(
        self, z: Tensor, norm: Tensor, shortcut: Tensor | None = None, relu: bool = True,
        want_signs: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return y = relu(z scale + shift + shortcut), and its signs if `want_signs`, else None."""
        y = affine(z, norm)
        if shortcut is not None:
            y += shortcut
        signs = pack(y > 0) if want_signs else None
        return y.relu_() if relu else y, signs

    def infer(
        self, x: Tensor, weight: Tensor, conv: Conv, norm: Tensor, shortcut: Tensor | None = None,
        relu: bool = True,
    ) -> Tensor:  # fmt: skip
        """Return relu(conv(x) scale + shift + shortcut), for evaluation."""
        return self.activate(self.convolve(x, None, weight, conv)[0], norm, shortcut, relu)[0]

    def mask_and_sum(
        self, dy: Tensor, z: Tensor, norm: Tensor, signs: Tensor | None = None, relu: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return g and its sums, given the gradient dy of the unit's output.

        The output was positive where `signs` are set or, without them, where z scale + shift is positive.
        """
        g, (mean, rstd, scale, _) = dy, norm
        if relu or signs is not None:
            g = dy * (affine(z, norm) > 0 if signs is None else unpack(signs, dy))
        settings = None, None, mean, rstd, True, 0.0, (False, True, True)
        _, d_gamma, d_beta = torch.ops.aten.native_batch_norm_backward(g, z, scale, *settings)
        n = z.numel() // z.shape[1]
        b = -scale * rstd * d_gamma / n
        return g, torch.stack([d_gamma, d_beta, b, -scale * d_beta / n - b * mean])

    def finish(self, *values: Tensor | None) -> None:
        """Complete norms and sums, which some implementations leave to the next pass that uses them."""

    def dense(self, g: Tensor) -> Tensor:
        """Return g as a tensor; some implementations represent it in another form."""
        return g

    def gradient(self, g: Tensor, z: Tensor, norm: Tensor, sums: Tensor) -> Tensor:
        """Return dz, the gradient of the convolution's output."""
        scale, b, c = (row.view(1, -1, 1, 1) for row in (norm[SCALE], sums[D_B], sums[D_C]))
        return torch.addcmul(torch.addcmul(c, z.to(c.dtype), b), g.to(c.dtype), scale).to(z.dtype)

    def convolve_backward(
        self, g: Tensor, z: Tensor, norm: Tensor, sums: Tensor, weight: Tensor, conv: Conv,
        x_shape: torch.Size, below: tuple[Tensor, Tensor] | None = None, add: Tensor | None = None,
        dz: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return the gradient of the convolution's input, `[N, C_in, H, W]`, plus `add`; and None.

        With `below`, the z and norm of the unit that the input came from, return that unit's g and its sums
        instead. If `dz` is given, it is not computed again from g, z, norm and sums.
        """
        dz = self.gradient(g, z, norm, sums) if dz is None else dz
        # aten::convolution_backward requires the input, and would copy even one that has no memory.
        sizes = zip(x_shape[2:], z.shape[2:], weight.shape[2:], conv.stride, conv.padding, strict=True)
        rest = [n - ((m - 1) * stride - 2 * padding + k) for n, m, k, stride, padding in sizes]
        dx = F.conv_transpose2d(dz, weight, None, conv.stride, conv.padding, rest)
        if add is not None:
            dx += add
        return (dx, None) if below is None else self.mask_and_sum(dx, *below)

    def weight_gradient(self, dz: Tensor, x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
        """Return the gradient of the weight, in the weight's dtype."""
        settings = None, conv.stride, conv.padding, (1, 1), False, (0, 0), 1, (False, True, False)
        return torch.ops.aten.convolution_backward(dz, x, weight, *settings)[1]

    def head(
        self, features: Tensor, fc: nn.Linear, labels: Tensor, smoothing: float,
        metrics: tuple[Tensor, ...], lrs: Tensor | None = None, lr: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """Return the gradient in `features` of the mean cross-entropy of fc(average pool), for a frozen `fc`.

        Also add the batch to `metrics` (loss_sum, correct, first_bad_step and position; see step.py), and set
        `lr` to the entry of `lrs`, if given, at this position. Return None where autograd must do it instead.
        """
        return None

    def batch(
        self, images: Tensor, labels: Tensor, order: Tensor, draws: Tensor, position: Tensor, mean: Tensor,
        std: Tensor, dtype: torch.dtype, pad: int,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """Return the images of step `position`, cropped, flipped and normalised, and their labels.

        `images`, uint8 `[n, H, W, 3]`, is a split on the device; `order`, int64 `[steps, N]`, holds each
        step's indices into it. `draws`, `[steps, N, k]`, starts with the row and column of the crop and the
        flip; with k = 0, images are only normalised. Return None where PyTorch's kernels must do it instead.
        """
        return None


def pack(positive: Tensor) -> Tensor:
    """Pack booleans `[N, C, H, W]` into signs: uint8, bit k of byte i for element 8i + k in memory order."""
    flat = positive.permute(0, 2, 3, 1).reshape(-1)
    eights = F.pad(flat, (0, -len(flat) % 8)).view(torch.int64)  # eight bytes of 0 or 1, the lowest first
    return (eights * 0x0102040810204080 >> 56).to(torch.uint8)  # byte k's bit moves to bit 56 + k


def unpack(signs: Tensor, like: Tensor) -> Tensor:
    """Return the booleans that `pack` received, in the shape of `like`."""
    n, c, h, w = like.shape
    bits = torch.arange(256, device=signs.device)[:, None] >> torch.arange(8, device=signs.device) & 1
    eights = bits.to(torch.uint8).view(torch.int64).view(256)  # the eight booleans of each byte value
    return eights[signs.int()].view(torch.bool)[: like.numel()].view(n, h, w, c).permute(0, 3, 1, 2)
