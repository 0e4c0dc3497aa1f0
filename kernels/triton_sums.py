"""Sums over positions in the Triton kernels: those of a norm, and those of a BatchNorm's gradient.

They are sums over all positions, so a kernel cannot both compute and use them. Each program of one kernel
adds its sums to `totals`, float64 `[2, COPIES, 2, C]`, and each program of the next kernel computes what it
needs from these. So a kernel receives a norm or sums as a tuple: `(values,)` if the values are complete, else
also what completes them; then its first program stores them for later kernels. In evaluation, the running
statistics complete a norm.

A sum is kept in COPIES copies, so that fewer programs add to the same address, and each copy in two numbers,
multiples of COARSE and of FINE. Additions are exact, so the sums do not depend on their order (Demmel and
Nguyen 2013, Fast reproducible floating-point summation), as long as they stay below 2**53 COARSE, about 1e13.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from kernels.reference import NORM_ROWS, SUMS_ROWS

MEAN, RSTD, SCALE, SHIFT = map(constexpr, NORM_ROWS)
D_GAMMA, D_BETA, D_B, D_C = map(constexpr, SUMS_ROWS)
COPIES = constexpr(4)
COARSE, FINE = constexpr(2.0**-10), constexpr(2.0**-54)


@triton.jit
def per_channel(values, row: constexpr, channels, C: constexpr):
    return tl.load(values + row * C + channels, mask=channels < C, other=0.0)


@triton.jit
def add_sums(totals, first, second, channels, C: constexpr):
    """Add `first` and `second`, `[C]`, to the sums in `totals`."""
    at = totals + tl.program_id(0) % COPIES * 2 * C + channels
    _add(at, first.to(tl.float64), C)
    _add(at + COPIES * 2 * C, second.to(tl.float64), C)


@triton.jit
def _add(at, values, C: constexpr):
    coarse = (values + 1.5 * 2**52 * COARSE) - 1.5 * 2**52 * COARSE
    fine = (values - coarse + 1.5 * 2**52 * FINE) - 1.5 * 2**52 * FINE
    tl.atomic_add(at, coarse, sem="relaxed")
    tl.atomic_add(at + C, fine, sem="relaxed")


@triton.jit
def load_totals(totals, channels, C: constexpr):
    """Return both sums of `totals`, float64 `[C]`."""
    at = totals + tl.arange(0, 2 * COPIES)[:, None] * C + channels
    return tl.sum(tl.load(at), 0), tl.sum(tl.load(at + 2 * COPIES * C), 0)


@triton.jit
def statistics_of(z, patches, C: constexpr):
    """Return the sums of z, `[BLOCK, P P C]`, and of its squares, in float64, over its first `patches` rows.

    Squares are summed about the mean of these rows, so that no digits cancel.
    """
    count = tl.maximum(tl.minimum(patches, z.shape[0]), 0) * (z.shape[1] // C)
    z = pixels_of(z, C)
    mean = tl.sum(z, 0) / tl.maximum(count, 1)
    centred = tl.where((tl.arange(0, z.shape[0]) < count)[:, None], z - mean, 0.0)
    squares, mean = tl.sum(centred * centred, 0), mean.to(tl.float64)
    return mean * count, squares + mean * mean * count


@triton.jit
def pixels_of(values, C: constexpr):
    """Return `values` of patches, `[BLOCK, P P C]`, as `[BLOCK P P, C]`."""
    return values.reshape(values.shape[0] * (values.shape[1] // C), C)


@triton.jit
def scale_and_shift(norm, channels, C: constexpr):
    """Return the scale and shift of a norm, complete or not."""
    if len(norm) == 1:
        scale, shift = per_channel(norm[0], SCALE, channels, C), per_channel(norm[0], SHIFT, channels, C)
    elif len(norm) == 6:
        scale, shift = running_norm(norm, channels, C)
    else:
        scale, shift = complete_norm(norm, channels, C)
    return scale, shift


@triton.jit
def complete_norm(norm, channels, C: constexpr):
    """Return scale and shift of a norm, given its sums; also store it and update the running statistics."""
    out, totals, positions, gamma, beta, running_mean, running_var, eps, momentum = norm
    gamma, beta = tl.load(gamma + channels), tl.load(beta + channels)
    mean_before, var_before = tl.load(running_mean + channels), tl.load(running_var + channels)
    share = 1.0 / positions.to(tl.float64)
    first, second = load_totals(totals, channels, C)
    mean = first * share
    var = (second * share - mean * mean).to(tl.float32)
    mean, var = mean.to(tl.float32), tl.maximum(var, 0.0, propagate_nan=tl.PropagateNan.ALL)
    rstd = tl.rsqrt(var + eps)
    scale = gamma * rstd
    shift = beta - mean * scale
    if tl.program_id(0) == 0:
        _store_norm(out, mean, rstd, scale, shift, channels, C)
        unbiased = var * (positions / (positions - 1))
        tl.store(running_mean + channels, mean_before + momentum * (mean - mean_before))
        tl.store(running_var + channels, var_before + momentum * (unbiased - var_before))
    return scale, shift


@triton.jit
def running_norm(norm, channels, C: constexpr):
    """Return scale and shift of a norm, given running statistics; also store it."""
    out, mean, var, gamma, beta, eps = norm
    mean, rstd = tl.load(mean + channels), tl.rsqrt(tl.load(var + channels) + eps)
    scale = tl.load(gamma + channels) * rstd
    shift = tl.load(beta + channels) - mean * scale
    if tl.program_id(0) == 0:
        _store_norm(out, mean, rstd, scale, shift, channels, C)
    return scale, shift


@triton.jit
def _store_norm(norm, mean, rstd, scale, shift, channels, C: constexpr):
    tl.store(norm + MEAN * C + channels, mean)
    tl.store(norm + RSTD * C + channels, rstd)
    tl.store(norm + SCALE * C + channels, scale)
    tl.store(norm + SHIFT * C + channels, shift)


@triton.jit
def gradient_coefficients(norm, sums, channels, C: constexpr):
    """Return scale, b and c of dz = g scale + z b + c, given sums that are complete or not."""
    if len(sums) == 1:
        scale = per_channel(norm, SCALE, channels, C)
        b, c = per_channel(sums[0], D_B, channels, C), per_channel(sums[0], D_C, channels, C)
    else:
        scale, b, c = complete_sums(sums, channels, C)
    return scale, b, c


@triton.jit
def complete_sums(sums, channels, C: constexpr):
    """Return scale, b and c, given a gradient's sums; also store these."""
    out, totals, positions, norm = sums
    mean, rstd = per_channel(norm, MEAN, channels, C), per_channel(norm, RSTD, channels, C)
    scale = per_channel(norm, SCALE, channels, C)
    d_beta, products = load_totals(totals, channels, C)
    d_beta, d_gamma = d_beta.to(tl.float32), products.to(tl.float32) * rstd
    b = -scale * rstd * d_gamma / positions
    c = -scale * d_beta / positions - b * mean
    if tl.program_id(0) == 0:
        tl.store(out + D_GAMMA * C + channels, d_gamma)
        tl.store(out + D_BETA * C + channels, d_beta)
        tl.store(out + D_B * C + channels, b)
        tl.store(out + D_C * C + channels, c)
    return scale, b, c
