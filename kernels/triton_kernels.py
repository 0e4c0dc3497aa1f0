"""The Triton kernels that cuda.py launches; reference.py has their formulas.

Activations are `[positions, C]`: a position is a pixel of an image, numbered in memory order. What is kept
per channel is `[4, C]` in float32. A convolution is one matrix product for each tap of its window, of
`[BLOCK, C_IN]` gathered inputs by `[C_IN, C_OUT]` weights. Arguments that are optional may be None.

Sums over positions go through `partial`, `[2, C, programs]`: each program writes its own, and finish_norm or
finish_sums adds them up, always in the same order.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from kernels.reference import NORM_ROWS, SUMS_ROWS

_MEAN, _RSTD, _SCALE, _SHIFT = map(constexpr, NORM_ROWS)
_D_GAMMA, _D_BETA, _D_B, _D_C = map(constexpr, SUMS_ROWS)
_STEP = constexpr(1024)  # of finish_norm and finish_sums: partial sums read at once


@triton.jit
def _per_channel(values, row: constexpr, channels, C: constexpr):
    return tl.load(values + row * C + channels, mask=channels < C, other=0.0)


@triton.jit
def _normalise(z, norm, channels, C: constexpr):
    scale, shift = _per_channel(norm, _SCALE, channels, C), _per_channel(norm, _SHIFT, channels, C)
    return z.to(tl.float32) * scale + shift


@triton.jit
def _relu(y):
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)  # so that divergence is not hidden


@triton.jit
def _gradient_coefficients(norm, sums, channels, C: constexpr):
    """scale, b and c of dz = g scale + z b + c."""
    b, c = _per_channel(sums, _D_B, channels, C), _per_channel(sums, _D_C, channels, C)
    return _per_channel(norm, _SCALE, channels, C), b, c


@triton.jit
def _tile(positions, C: constexpr, BLOCK: constexpr, BLOCK_C: constexpr):
    """This program's part of an elementwise kernel: channels, offsets, and which positions exist."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return channels, at[:, None] * C + channels, (at < positions)[:, None]


@triton.jit
def _store_partial(partial, first, second, channels, C: constexpr):
    at = partial + channels * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, first)
    tl.store(at + C * tl.num_programs(0), second)


@triton.jit
def _store_statistics(partial, z, live, positions, BLOCK: constexpr, channels, C: constexpr):
    """The sum, and the sum of squares about this block's own mean, so that no digits cancel."""
    count = tl.minimum(positions - tl.program_id(0) * BLOCK, BLOCK)
    total = tl.sum(z, 0)
    centred = tl.where(live, z - total / count, 0.0)
    _store_partial(partial, total, tl.sum(centred * centred, 0), channels, C)


@triton.jit
def _store_gradient_sums(partial, g, z, norm, channels, C: constexpr):
    centred = z.to(tl.float32) - _per_channel(norm, _MEAN, channels, C)
    _store_partial(partial, tl.sum(g, 0), tl.sum(g * centred, 0), channels, C)


@triton.jit
def convolve(
    x, norm, weight, z, partial, positions, H: constexpr, W: constexpr, H_OUT: constexpr, W_OUT: constexpr,
    C_IN: constexpr, C_OUT: constexpr, K: constexpr, STRIDE: constexpr, W_O: constexpr, W_I: constexpr,
    W_TAP: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """z `[positions, C_OUT]` of x, or with norm of relu(x scale + shift); and with partial its statistics."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = (at < positions)[:, None]
    image, h_out, w_out = at // (H_OUT * W_OUT), at // W_OUT % H_OUT, at % W_OUT
    BLOCK_IN: constexpr = 16 if C_IN < 16 else C_IN  # tl.dot wants 16
    c_in, c_out = tl.arange(0, BLOCK_IN), tl.arange(0, C_OUT)
    if norm is not None:
        scale, shift = _per_channel(norm, _SCALE, c_in, C_IN), _per_channel(norm, _SHIFT, c_in, C_IN)
    total = tl.zeros([BLOCK, C_OUT], tl.float32)
    for tap in range(K * K):  # not unrolled: at 64 channels that takes every register
        h = h_out * STRIDE + tap // K - K // 2
        w = w_out * STRIDE + tap % K - K // 2
        inside = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & live & (c_in < C_IN)
        pixels = tl.load(x + ((image * H + h) * W + w)[:, None] * C_IN + c_in, mask=inside, other=0.0)
        if norm is not None:  # padding is zero after BatchNorm, not before
            pixels = _relu(pixels.to(tl.float32) * scale + shift)
            pixels = tl.where(inside, pixels, 0.0).to(x.dtype.element_ty)
        taps = weight + tap * W_TAP + c_in[:, None] * W_I + c_out * W_O
        taps = tl.load(taps, mask=(c_in < C_IN)[:, None], other=0.0)
        total = tl.dot(pixels, taps, total, input_precision="ieee")
    stored = total.to(z.dtype.element_ty)
    tl.store(z + at[:, None] * C_OUT + c_out, stored, mask=live)
    if partial is not None:
        _store_statistics(partial, stored.to(tl.float32), live, positions, BLOCK, c_out, C_OUT)


@triton.jit
def convolve_backward(
    g, z, norm, sums, weight, add, z_below, norm_below, dx, partial, positions, H: constexpr, W: constexpr,
    H_OUT: constexpr, W_OUT: constexpr, C_IN: constexpr, C_OUT: constexpr, K: constexpr, STRIDE: constexpr,
    W_O: constexpr, W_I: constexpr, W_TAP: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """The gradient of x, dx `[positions, C_IN]`; or with z_below, the g of the unit below, and its sums."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = (at < positions)[:, None]
    image, h_in, w_in = at // (H * W), at // W % H, at % W
    c_in, c_out = tl.arange(0, C_IN), tl.arange(0, C_OUT)
    a, b, c = _gradient_coefficients(norm, sums, c_out, C_OUT)
    total = tl.zeros([BLOCK, C_IN], tl.float32)
    for tap in range(K * K):
        h = h_in + K // 2 - tap // K
        w = w_in + K // 2 - tap % K
        inside = (h >= 0) & (h < H_OUT * STRIDE) & (w >= 0) & (w < W_OUT * STRIDE)
        if STRIDE > 1:  # at some inputs, this tap belongs to no output
            inside = inside & (h % STRIDE == 0) & (w % STRIDE == 0)
        inside = inside[:, None] & live
        above = ((image * H_OUT + h // STRIDE) * W_OUT + w // STRIDE)[:, None] * C_OUT + c_out
        d_out = tl.load(g + above, mask=inside, other=0.0).to(tl.float32) * a
        d_out += tl.load(z + above, mask=inside, other=0.0).to(tl.float32) * b + c
        d_out = tl.where(inside, d_out, 0.0).to(g.dtype.element_ty)
        taps = tl.load(weight + tap * W_TAP + c_out[:, None] * W_O + c_in * W_I)
        total = tl.dot(d_out, taps, total, input_precision="ieee")
    here = at[:, None] * C_IN + c_in
    if add is not None:
        total += tl.load(add + here, mask=live, other=0.0).to(tl.float32)
    if z_below is None:
        tl.store(dx + here, total.to(dx.dtype.element_ty), mask=live)
    else:
        below = tl.load(z_below + here, mask=live, other=0.0)
        positive = (_normalise(below, norm_below, c_in, C_IN) > 0) & live
        stored = tl.where(positive, total, 0.0).to(dx.dtype.element_ty)
        tl.store(dx + here, stored, mask=live)
        _store_gradient_sums(partial, stored.to(tl.float32), below, norm_below, c_in, C_IN)


@triton.jit
def statistics(z, partial, positions, C: constexpr, BLOCK: constexpr, BLOCK_C: constexpr):
    """The statistics of z, when the convolution was done by cuDNN."""
    channels, here, live = _tile(positions, C, BLOCK, BLOCK_C)
    values = tl.load(z + here, mask=live, other=0.0).to(tl.float32)
    _store_statistics(partial, values, live, positions, BLOCK, channels, C)


@triton.jit
def activate(
    z, norm, shortcut, y, signs, positions, RELU: constexpr, C: constexpr,
    BLOCK: constexpr, BLOCK_C: constexpr,
):  # fmt: skip
    """y = relu(z scale + shift + shortcut); with signs, also those."""
    channels, here, live = _tile(positions, C, BLOCK, BLOCK_C)
    values = _normalise(tl.load(z + here, mask=live, other=0.0), norm, channels, C)
    if shortcut is not None:
        values += tl.load(shortcut + here, mask=live, other=0.0).to(tl.float32)
    if signs is not None:  # bit k of byte i is element 8i + k
        bits = (values > 0).to(tl.int32).reshape(BLOCK, BLOCK_C // 8, 8) << tl.arange(0, 8)
        _, eights, _ = _tile(positions, C // 8, BLOCK, BLOCK_C // 8)
        tl.store(signs + eights, tl.sum(bits, 2).to(tl.uint8), mask=live)
    if RELU:
        values = _relu(values)
    tl.store(y + here, values.to(y.dtype.element_ty), mask=live)


@triton.jit
def mask_and_sum(
    dy, z, norm, signs, g, partial, positions, C: constexpr, BLOCK: constexpr, BLOCK_C: constexpr
):
    """g and its sums from dy, masked by signs or else by z scale + shift; without g, nothing is masked."""
    channels, here, live = _tile(positions, C, BLOCK, BLOCK_C)
    gradient = tl.load(dy + here, mask=live, other=0.0)
    values = tl.load(z + here, mask=live, other=0.0)
    if g is not None:
        if signs is not None:
            positive = (tl.load(signs + here // 8, mask=live, other=0).to(tl.int32) >> (here % 8)) & 1 == 1
        else:
            positive = _normalise(values, norm, channels, C) > 0
        gradient = tl.where(positive, gradient, 0.0)
        tl.store(g + here, gradient, mask=live)
    _store_gradient_sums(partial, gradient.to(tl.float32), values, norm, channels, C)


@triton.jit
def gradient(g, z, norm, sums, dz, positions, C: constexpr, BLOCK: constexpr, BLOCK_C: constexpr):
    """The gradient dz of a convolution's output, when its weights train or cuDNN does its backward pass."""
    channels, here, live = _tile(positions, C, BLOCK, BLOCK_C)
    a, b, c = _gradient_coefficients(norm, sums, channels, C)
    d_out = tl.load(g + here, mask=live, other=0.0).to(tl.float32) * a
    d_out += tl.load(z + here, mask=live, other=0.0).to(tl.float32) * b + c
    tl.store(dz + here, d_out.to(dz.dtype.element_ty), mask=live)


@triton.jit
def finish_norm(
    partial, norm, positions, programs, gamma, beta, running_mean, running_var, eps, momentum, C: constexpr,
    BLOCK: constexpr,
):  # fmt: skip
    """Norm and running statistics, one program per channel; BLOCK is that of the kernel before."""
    channel = tl.program_id(0)
    total = tl.zeros([_STEP], tl.float32)
    for start in range(0, programs, _STEP):
        at = start + tl.arange(0, _STEP)
        total += tl.load(partial + channel * programs + at, mask=at < programs, other=0.0)
    mean = tl.sum(total, 0) / positions
    total = tl.zeros([_STEP], tl.float32)
    for start in range(0, programs, _STEP):  # the squares within blocks and between them (Chan et al. 1983)
        at = start + tl.arange(0, _STEP)
        live = at < programs
        count = tl.where(live, tl.minimum(positions - at * BLOCK, BLOCK), 1)
        off = tl.load(partial + channel * programs + at, mask=live, other=0.0) / count - mean
        within = tl.load(partial + (C + channel) * programs + at, mask=live, other=0.0)
        total += tl.where(live, within + count * off * off, 0.0)
    squares = tl.sum(total, 0)
    rstd = 1 / tl.sqrt(squares / positions + eps)
    scale = tl.load(gamma + channel) * rstd
    tl.store(norm + _MEAN * C + channel, mean)
    tl.store(norm + _RSTD * C + channel, rstd)
    tl.store(norm + _SCALE * C + channel, scale)
    tl.store(norm + _SHIFT * C + channel, tl.load(beta + channel) - mean * scale)
    before = tl.load(running_mean + channel)
    tl.store(running_mean + channel, before + momentum * (mean - before))
    before = tl.load(running_var + channel)
    tl.store(running_var + channel, before + momentum * (squares / (positions - 1) - before))


@triton.jit
def finish_sums(partial, sums, positions, programs, norm, C: constexpr):
    """The four rows of sums, one program per channel."""
    channel = tl.program_id(0)
    d_beta, d_gamma = tl.zeros([_STEP], tl.float32), tl.zeros([_STEP], tl.float32)
    for start in range(0, programs, _STEP):
        at = start + tl.arange(0, _STEP)
        d_beta += tl.load(partial + channel * programs + at, mask=at < programs, other=0.0)
        d_gamma += tl.load(partial + (C + channel) * programs + at, mask=at < programs, other=0.0)
    scale, rstd = tl.load(norm + _SCALE * C + channel), tl.load(norm + _RSTD * C + channel)
    beta, gamma = tl.sum(d_beta, 0), tl.sum(d_gamma, 0) * rstd
    b = -scale * rstd * gamma / positions
    tl.store(sums + _D_GAMMA * C + channel, gamma)
    tl.store(sums + _D_BETA * C + channel, beta)
    tl.store(sums + _D_B * C + channel, b)
    c = -scale * beta / positions - b * tl.load(norm + _MEAN * C + channel)
    tl.store(sums + _D_C * C + channel, c)
