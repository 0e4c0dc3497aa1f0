"""The Triton kernels that cuda.py launches; reference.py has their formulas.

Activations are `[positions, C]`, where a position is a pixel of an image, in memory order. Per-channel values
are `[4, C]` in float32. Optional arguments may be None.

A convolution computes patches of P x P pixels. Every patch depends on a window of input pixels of the same
size, so a convolution is a matrix product: `[BLOCK, window C_IN]` gathered inputs by
`[window C_IN, P P C_OUT]` weights, which are zero where a pixel contributes nothing to an output (a block
Toeplitz matrix). A program gathers and multiplies GROUP pixels of the window at once. With P above 1, each
input is gathered and normalised less often, at the price of more multiply-adds.

A norm and the sums of a gradient are sums over all positions, so a kernel cannot both compute and use them.
Each program of one kernel stores its part in `partial`, `[2, C, programs]`, and each program of the next
kernel adds up all parts, always in the same order. So these kernels receive a tuple: `(values,)` if the
values are complete, else also what completes them; the first program then stores them for later kernels.
A program computes `each` consecutive blocks, so that large batches have no more parts than small ones.
"""

import triton
import triton.language as tl
from triton.language import constexpr
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.reference import NORM_ROWS, SUMS_ROWS

_MEAN, _RSTD, _SCALE, _SHIFT = map(constexpr, NORM_ROWS)
_D_GAMMA, _D_BETA, _D_B, _D_C = map(constexpr, SUMS_ROWS)
PARTS_AT_ONCE = constexpr(2048)  # parts of sums that a program loads at once


@triton.jit
def _per_channel(values, row: constexpr, channels, C: constexpr):
    return tl.load(values + row * C + channels, mask=channels < C, other=0.0)


@triton.jit
def _relu(y):
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)  # NaN is kept, to reveal divergence


@triton.jit
def _repeat(values, TIMES: constexpr):
    """Return `values`, `[C]`, TIMES times in a row."""
    return tl.broadcast_to(values[None, :], [TIMES, values.shape[0]]).reshape(TIMES * values.shape[0])


@triton.jit
def _wait(PDL: constexpr):
    """Wait until the previous kernel has finished; code before this call must not read or write memory.

    With programmatic dependent launch, a kernel's programs start while those of the previous kernel finish.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


# ---- sums over positions ----


@triton.jit
def _store_parts(partial, first, second, channels, C: constexpr):
    programs = tl.num_programs(0)
    at = partial + channels * programs + tl.program_id(0)
    tl.store(at, first)
    tl.store(at + C * programs, second)


@triton.jit
def _load_parts(partial, programs, row: constexpr, channels, at, C: constexpr):
    """Load the parts of programs `at`, `[channels, at]`; past the last, 0."""
    here = (row * C + channels)[:, None] * programs + at
    return tl.load(partial + here, mask=at < programs, other=0.0)


@triton.jit
def _add_statistics(count, mean, squares, z, live, rows):
    """Add the first `rows` rows of z, which are `live`, to the statistics of `count` earlier rows.

    Squares are summed about each block's own mean and then combined, so that no digits cancel (Chan et al.
    1983).
    """
    here = tl.sum(z, 0) / tl.maximum(rows, 1)
    centred = tl.where(live, z - here, 0.0)
    off, total = here - mean, tl.maximum(count + rows, 1)
    share = rows.to(tl.float32) / total
    squares += tl.sum(centred * centred, 0) + off * off * share * count
    return count + rows, mean + off * share, squares


@triton.jit
def _store_statistics(partial, count, mean, squares, channels, C: constexpr):
    """Store the program's mean and its sum of squares about that, of `[PARTS C]` columns of `count` rows."""
    PARTS: constexpr = mean.shape[0] // channels.shape[0]
    if PARTS > 1:
        mean, squares = mean.reshape(PARTS, C), squares.reshape(PARTS, C)
        middle = tl.sum(mean, 0) / PARTS
        squares = tl.sum(squares + (mean - middle) * (mean - middle) * count, 0)
        mean = middle
    _store_parts(partial, mean, squares, channels, C)


@triton.jit
def _scale_and_shift(norm, channels, C: constexpr):
    """Return the scale and shift of a norm, complete or in parts."""
    if len(norm) == 1:
        scale, shift = _per_channel(norm[0], _SCALE, channels, C), _per_channel(norm[0], _SHIFT, channels, C)
    else:
        scale, shift = _complete_norm(norm, channels, C)
    return scale, shift


@triton.jit
def _complete_norm(norm, channels, C: constexpr):
    """Add up the parts of a norm, and return its scale and shift; also update the running statistics."""
    out, partial, programs, size, positions, gamma, beta, running_mean, running_var, eps, momentum = norm
    STEP: constexpr = PARTS_AT_ONCE // channels.shape[0]
    gamma, beta = tl.load(gamma + channels), tl.load(beta + channels)
    mean_before, var_before = tl.load(running_mean + channels), tl.load(running_var + channels)
    pivot = tl.load(partial + channels * programs)  # near the mean, so that what is squared stays small
    sums = tl.zeros([channels.shape[0], STEP], tl.float32)
    squares = tl.zeros([channels.shape[0], STEP], tl.float32)
    for start in range(0, programs, STEP):
        at = start + tl.arange(0, STEP)
        count = tl.maximum(tl.minimum(positions - at * size, size), 0).to(tl.float32)
        off = _load_parts(partial, programs, 0, channels, at, C) - pivot[:, None]
        sums += count * off
        squares += _load_parts(partial, programs, 1, channels, at, C) + count * off * off
    off = tl.sum(sums, 1) / positions
    total = tl.sum(squares, 1) - positions * off * off
    mean, total = pivot + off, tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    rstd = 1 / tl.sqrt(total / positions + eps)
    scale = gamma * rstd
    shift = beta - mean * scale
    if tl.program_id(0) == 0:
        _store_norm(out, mean, rstd, scale, shift, channels, C)
        tl.store(running_mean + channels, mean_before + momentum * (mean - mean_before))
        tl.store(running_var + channels, var_before + momentum * (total / (positions - 1) - var_before))
    return scale, shift


@triton.jit
def _store_norm(norm, mean, rstd, scale, shift, channels, C: constexpr):
    live = channels < C
    tl.store(norm + _MEAN * C + channels, mean, mask=live)
    tl.store(norm + _RSTD * C + channels, rstd, mask=live)
    tl.store(norm + _SCALE * C + channels, scale, mask=live)
    tl.store(norm + _SHIFT * C + channels, shift, mask=live)


@triton.jit
def _store_gradient(partial, d_beta, products, channels, C: constexpr):
    """Store the program's sums of g and of g (z - mean), given those of `[PARTS C]` columns."""
    PARTS: constexpr = d_beta.shape[0] // channels.shape[0]
    if PARTS > 1:
        d_beta, products = tl.sum(d_beta.reshape(PARTS, C), 0), tl.sum(products.reshape(PARTS, C), 0)
    _store_parts(partial, d_beta, products, channels, C)


@triton.jit
def _gradient_coefficients(norm, sums, channels, C: constexpr):
    """Return scale, b and c of dz = g scale + z b + c, given sums that are complete or in parts."""
    if len(sums) == 1:
        scale = _per_channel(norm, _SCALE, channels, C)
        b, c = _per_channel(sums[0], _D_B, channels, C), _per_channel(sums[0], _D_C, channels, C)
    else:
        scale, b, c = _complete_sums(sums, channels, C)
    return scale, b, c


@triton.jit
def _complete_sums(sums, channels, C: constexpr):
    """Add up the parts of a gradient's sums, and return scale, b and c."""
    out, partial, programs, _, positions, norm = sums
    STEP: constexpr = PARTS_AT_ONCE // channels.shape[0]
    mean, rstd = _per_channel(norm, _MEAN, channels, C), _per_channel(norm, _RSTD, channels, C)
    scale = _per_channel(norm, _SCALE, channels, C)
    totals = tl.zeros([channels.shape[0], STEP], tl.float32)
    products = tl.zeros([channels.shape[0], STEP], tl.float32)
    for start in range(0, programs, STEP):
        at = start + tl.arange(0, STEP)
        totals += _load_parts(partial, programs, 0, channels, at, C)
        products += _load_parts(partial, programs, 1, channels, at, C)
    d_beta, d_gamma = tl.sum(totals, 1), tl.sum(products, 1) * rstd
    b = -scale * rstd * d_gamma / positions
    c = -scale * d_beta / positions - b * mean
    if tl.program_id(0) == 0:
        tl.store(out + _D_GAMMA * C + channels, d_gamma)
        tl.store(out + _D_BETA * C + channels, d_beta)
        tl.store(out + _D_B * C + channels, b)
        tl.store(out + _D_C * C + channels, c)
    return scale, b, c


@triton.jit
def finish(norm, sums, C: constexpr, BLOCK_C: constexpr, PDL: constexpr):
    """Store `norm`, or with `sums` these, when no other kernel does."""
    _wait(PDL)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if sums is None:
        _complete_norm(norm, channels, C)
    else:
        _complete_sums(sums, channels, C)


# ---- convolutions ----


@triton.jit
def _patches(block, patches, H: constexpr, W: constexpr, P: constexpr, BLOCK: constexpr):
    """Return a block's patches: the image, the patch's row and column in it, and which patches exist."""
    DOWN: constexpr = (H + P - 1) // P
    ACROSS: constexpr = (W + P - 1) // P
    patch = block * BLOCK + tl.arange(0, BLOCK)
    return patch // (DOWN * ACROSS), patch // ACROSS % DOWN, patch % ACROSS, (patch < patches)[:, None]


@triton.jit
def _pixels(image, down, across, live, H: constexpr, W: constexpr, C: constexpr, P: constexpr):
    """Return the offsets `[BLOCK, P P C]` of the pixels of each patch, and which of them exist."""
    n = tl.arange(0, P * P * C)
    at = ((image * H + down * P) * W + across * P)[:, None] + (n // C // P * W + n // C % P)
    if H % P > 0 or W % P > 0:
        live = live & ((down * P)[:, None] + n // C // P < H) & ((across * P)[:, None] + n // C % P < W)
    return at * C + n % C, live


@triton.jit
def _window(image, h, w, dh, dw, live, H: constexpr, W: constexpr, C: constexpr, c):
    """Return the offsets `[BLOCK, k]` of channels c of pixels (h + dh, w + dw), and which of these exist."""
    at = ((image * H + h) * W + w)[:, None] + (dh * W + dw)
    h, w = h[:, None] + dh, w[:, None] + dw
    return at * C + c, live & (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def convolve(
    x, norm, weight, z, after, shortcut, partial, patches, each, H: constexpr, W: constexpr,
    H_OUT: constexpr, W_OUT: constexpr, C_IN: constexpr, C_OUT: constexpr, K: constexpr, STRIDE: constexpr,
    W_O: constexpr, W_I: constexpr, W_TAP: constexpr, P: constexpr, RELU: constexpr, BLOCK: constexpr,
    GROUP: constexpr, PDL: constexpr,
):  # fmt: skip
    """Store z = conv(x), `[positions, C_OUT]`, or with `norm` conv(relu(x scale + shift)).

    With `after`, the norm of z, store relu(z scale + shift + shortcut) instead. With `partial`, also store
    the parts of the statistics of z.
    """
    _wait(PDL)
    WIDE_IN: constexpr = 4 if C_IN < 4 else C_IN  # a power of two
    WINDOW: constexpr = STRIDE * (P - 1) + K
    TAPS: constexpr = WINDOW * WINDOW
    k, n = tl.arange(0, GROUP * WIDE_IN), tl.arange(0, P * P * C_OUT)
    c_in = k % WIDE_IN
    if norm is not None:
        scale, shift = _scale_and_shift(norm, tl.arange(0, C_IN), C_IN)
        scale, shift = _repeat(scale, GROUP), _repeat(shift, GROUP)
    if partial is not None:
        count, mean, squares = 0, tl.zeros([P * P * C_OUT], tl.float32), tl.zeros([P * P * C_OUT], tl.float32)
    for i in range(each):
        block = tl.program_id(0) * each + i
        image, down, across, live = _patches(block, patches, H_OUT, W_OUT, P, BLOCK)
        total = tl.zeros([BLOCK, P * P * C_OUT], tl.float32)
        for start in range(0, TAPS, GROUP):  # not unrolled, which at 64 channels takes every register
            tap = start + k // WIDE_IN
            dh, dw, exists = tap // WINDOW - K // 2, tap % WINDOW - K // 2, live
            if C_IN < WIDE_IN or TAPS % GROUP > 0:
                exists = live & (c_in < C_IN) & (tap < TAPS)
            h, w = down * (P * STRIDE), across * (P * STRIDE)
            at, inside = _window(image, h, w, dh, dw, exists, H, W, C_IN, c_in)
            pixels = tl.load(x + at, mask=inside, other=0.0)
            if norm is not None:  # padding is zero after BatchNorm, not before
                pixels = _relu(pixels.to(tl.float32) * scale + shift)
                pixels = tl.where(inside, pixels, 0.0).to(x.dtype.element_ty)
            taps = weight + (tap * W_TAP + c_in * W_I)[:, None] + n * W_O
            if C_IN < WIDE_IN or TAPS % GROUP > 0:
                taps = tl.load(taps, mask=((c_in < C_IN) & (tap < TAPS))[:, None], other=0.0)
            else:
                taps = tl.load(taps)
            total = tl.dot(pixels, taps, total, input_precision="ieee")
        here, there = _pixels(image, down, across, live, H_OUT, W_OUT, C_OUT, P)
        stored = total.to(z.dtype.element_ty)
        if after is not None:
            scale_after, shift_after = _scale_and_shift(after, n % C_OUT, C_OUT)
            values = stored.to(tl.float32) * scale_after + shift_after
            if shortcut is not None:
                values += tl.load(shortcut + here, mask=there, other=0.0).to(tl.float32)
            if RELU:
                values = _relu(values)
            stored = values.to(z.dtype.element_ty)
        tl.store(z + here, stored, mask=there)
        if partial is not None:
            rows = tl.maximum(tl.minimum(patches - block * BLOCK, BLOCK), 0)
            values = stored.to(tl.float32)
            count, mean, squares = _add_statistics(count, mean, squares, values, live, rows)
    if partial is not None:
        _store_statistics(partial, count, mean, squares, tl.arange(0, C_OUT), C_OUT)


@triton.jit
def convolve_backward(
    g, z, norm, sums, weight, add, z_below, norm_below, dx, partial, patches, each, H: constexpr,
    W: constexpr, H_OUT: constexpr, W_OUT: constexpr, C_IN: constexpr, C_OUT: constexpr, K: constexpr,
    STRIDE: constexpr, W_O: constexpr, W_I: constexpr, W_TAP: constexpr, P: constexpr, BLOCK: constexpr,
    GROUP: constexpr, PDL: constexpr,
):  # fmt: skip
    """Store dx, the gradient of x, `[positions, C_IN]`; or with z_below the g of the unit below and its sums.

    Patches are of dx, and P is a multiple of STRIDE. The loop goes through the window from its end.
    """
    _wait(PDL)
    LAST: constexpr = (P - 1 + K // 2) // STRIDE
    WINDOW: constexpr = K // 2 // STRIDE + LAST + 1
    TAPS: constexpr = WINDOW * WINDOW
    k, n = tl.arange(0, GROUP * C_OUT), tl.arange(0, P * P * C_IN)
    c_out = k % C_OUT
    a, b, c = _gradient_coefficients(norm, sums, tl.arange(0, C_OUT), C_OUT)
    a, b, c = _repeat(a, GROUP), _repeat(b, GROUP), _repeat(c, GROUP)
    if partial is not None:
        d_beta, products = tl.zeros([P * P * C_IN], tl.float32), tl.zeros([P * P * C_IN], tl.float32)
    for i in range(each):
        block = tl.program_id(0) * each + i
        image, down, across, live = _patches(block, patches, H, W, P, BLOCK)
        total = tl.zeros([BLOCK, P * P * C_IN], tl.float32)
        for start in range(0, TAPS, GROUP):
            tap, exists = start + k // C_OUT, live
            if TAPS % GROUP > 0:
                exists = live & (tap < TAPS)
            dh, dw = LAST - tap // WINDOW, LAST - tap % WINDOW
            h, w = down * (P // STRIDE), across * (P // STRIDE)
            above, inside = _window(image, h, w, dh, dw, exists, H_OUT, W_OUT, C_OUT, c_out)
            d_out = tl.load(g + above, mask=inside, other=0.0).to(tl.float32) * a
            d_out += tl.load(z + above, mask=inside, other=0.0).to(tl.float32) * b + c
            d_out = tl.where(inside, d_out, 0.0).to(g.dtype.element_ty)
            taps = weight + (tap * W_TAP + c_out * W_O)[:, None] + n * W_I
            exists = None if TAPS % GROUP == 0 else (tap < TAPS)[:, None]
            taps = tl.load(taps, mask=exists, other=None if TAPS % GROUP == 0 else 0.0)
            total = tl.dot(d_out, taps, total, input_precision="ieee")
        here, there = _pixels(image, down, across, live, H, W, C_IN, P)
        if add is not None:
            total += tl.load(add + here, mask=there, other=0.0).to(tl.float32)
        if z_below is None:
            tl.store(dx + here, total.to(dx.dtype.element_ty), mask=there)
        else:
            below = tl.load(z_below + here, mask=there, other=0.0).to(tl.float32)
            scale, shift = _scale_and_shift((norm_below,), n % C_IN, C_IN)
            stored = tl.where(there & (below * scale + shift > 0), total, 0.0).to(dx.dtype.element_ty)
            tl.store(dx + here, stored, mask=there)
            values, centred = stored.to(tl.float32), below - _per_channel(norm_below, _MEAN, n % C_IN, C_IN)
            d_beta, products = d_beta + tl.sum(values, 0), products + tl.sum(values * centred, 0)
    if partial is not None:
        _store_gradient(partial, d_beta, products, tl.arange(0, C_IN), C_IN)


# ---- elementwise ----


@triton.jit
def _tile(block, positions, C: constexpr, BLOCK: constexpr, BLOCK_C: constexpr):
    """Return a block of an elementwise kernel: the offsets, and which positions exist."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return at[:, None] * C + channels, (at < positions)[:, None]


@triton.jit
def statistics(
    z, partial, positions, each, C: constexpr, BLOCK: constexpr, BLOCK_C: constexpr, PDL: constexpr
):
    """Store the parts of the statistics of z, when cuDNN computed the convolution."""
    _wait(PDL)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    count, mean, squares = 0, tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for i in range(each):
        block = tl.program_id(0) * each + i
        here, live = _tile(block, positions, C, BLOCK, BLOCK_C)
        values = tl.load(z + here, mask=live, other=0.0).to(tl.float32)
        rows = tl.maximum(tl.minimum(positions - block * BLOCK, BLOCK), 0)
        count, mean, squares = _add_statistics(count, mean, squares, values, live, rows)
    _store_statistics(partial, count, mean, squares, channels, C)


@triton.jit
def activate(
    z, norm, shortcut, y, signs, positions, each, RELU: constexpr, C: constexpr, BLOCK: constexpr,
    BLOCK_C: constexpr, PDL: constexpr,
):  # fmt: skip
    """Store y = relu(z scale + shift + shortcut) and, if `signs` is given, the signs of y."""
    _wait(PDL)
    scale, shift = _scale_and_shift(norm, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), C)
    for i in range(each):
        block = tl.program_id(0) * each + i
        here, live = _tile(block, positions, C, BLOCK, BLOCK_C)
        values = tl.load(z + here, mask=live, other=0.0).to(tl.float32) * scale + shift
        if shortcut is not None:
            values += tl.load(shortcut + here, mask=live, other=0.0).to(tl.float32)
        if signs is not None:  # bit k of byte i is element 8i + k
            bits = (values > 0).to(tl.int32).reshape(BLOCK, BLOCK_C // 8, 8) << tl.arange(0, 8)
            eights, _ = _tile(block, positions, C // 8, BLOCK, BLOCK_C // 8)
            tl.store(signs + eights, tl.sum(bits, 2).to(tl.uint8), mask=live)
        if RELU:
            values = _relu(values)
        tl.store(y + here, values.to(y.dtype.element_ty), mask=live)


@triton.jit
def mask_and_sum(
    dy, z, norm, signs, g, partial, positions, each, C: constexpr, BLOCK: constexpr, BLOCK_C: constexpr,
    PDL: constexpr,
):  # fmt: skip
    """Store g, dy masked by signs or else by z scale + shift, and its sums; without g, do not mask."""
    _wait(PDL)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = _per_channel(norm, _MEAN, channels, C)
    scale, shift = _scale_and_shift((norm,), channels, C)
    d_beta, products = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for i in range(each):
        here, live = _tile(tl.program_id(0) * each + i, positions, C, BLOCK, BLOCK_C)
        gradient = tl.load(dy + here, mask=live, other=0.0)
        values = tl.load(z + here, mask=live, other=0.0).to(tl.float32)
        if g is not None:
            if signs is not None:
                bits = tl.load(signs + here // 8, mask=live, other=0).to(tl.int32)
                positive = (bits >> (here % 8)) & 1 == 1
            else:
                positive = values * scale + shift > 0
            gradient = tl.where(positive, gradient, 0.0)
            tl.store(g + here, gradient, mask=live)
        gradient = gradient.to(tl.float32)
        d_beta, products = d_beta + tl.sum(gradient, 0), products + tl.sum(gradient * (values - mean), 0)
    _store_gradient(partial, d_beta, products, channels, C)


@triton.jit
def gradient(
    g, z, norm, sums, dz, positions, each, C: constexpr, BLOCK: constexpr, BLOCK_C: constexpr, PDL: constexpr
):
    """Store dz, the gradient of a convolution's output, for weights that train or for cuDNN's backward."""
    _wait(PDL)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    a, b, c = _gradient_coefficients(norm, sums, channels, C)
    for i in range(each):
        here, live = _tile(tl.program_id(0) * each + i, positions, C, BLOCK, BLOCK_C)
        d_out = tl.load(g + here, mask=live, other=0.0).to(tl.float32) * a
        d_out += tl.load(z + here, mask=live, other=0.0).to(tl.float32) * b + c
        tl.store(dz + here, d_out.to(dz.dtype.element_ty), mask=live)


@triton.jit
def norm_of(mean, var, gamma, beta, norm, eps, C: constexpr, BLOCK: constexpr, PDL: constexpr):
    """Store the norm for given statistics, for evaluation."""
    _wait(PDL)
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = channels < C
    rstd = 1 / tl.sqrt(tl.load(var + channels, mask=live, other=1.0) + eps)
    scale, mean = tl.load(gamma + channels, mask=live) * rstd, tl.load(mean + channels, mask=live)
    shift = tl.load(beta + channels, mask=live) - mean * scale
    _store_norm(norm, mean, rstd, scale, shift, channels, C)


# ---- the start and the end of a step ----


@triton.jit
def batch(
    images, labels, order, draws, position, mean, std, out, out_labels, H: constexpr, W: constexpr,
    DRAWS: constexpr, PAD: constexpr, BLOCK: constexpr, PDL: constexpr,
):  # fmt: skip
    """Store the images of a batch, cropped, flipped and normalised, and labels; see datasets/augment.py.

    `order`, `[steps, N]`, holds indices of images; `draws`, `[steps, N, DRAWS]`, starts with their crops and
    flips; `position` is the step.
    """
    _wait(PDL)
    n, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    drawn = tl.load(position) * tl.num_programs(0) + n
    image = tl.load(order + drawn)
    row, column = at // W, at % W
    if DRAWS > 0:
        draws += drawn * DRAWS
        column = tl.where(tl.load(draws + 2) > 0, W - 1 - column, column)
        row += tl.load(draws).to(tl.int32) - PAD
        column += tl.load(draws + 1).to(tl.int32) - PAD
    channel = tl.arange(0, 4)
    inside = ((row >= 0) & (row < H) & (column >= 0) & (column < W))[:, None] & (channel < 3)
    pixels = tl.load(images + ((image * H + row) * W + column)[:, None] * 3 + channel, mask=inside, other=0)
    mean = tl.load(mean + channel, mask=channel < 3, other=0.0)
    std = tl.load(std + channel, mask=channel < 3, other=1.0)
    normal = tl.div_rn(pixels.to(tl.float32) - mean, tl.broadcast_to(std[None, :], [BLOCK, 4]))
    here = (n * H * W + at)[:, None] * 3 + channel
    tl.store(out + here, normal.to(out.dtype.element_ty), mask=(at < H * W)[:, None] & (channel < 3))
    if tl.program_id(1) == 0:
        tl.store(out_labels + n, tl.load(labels + image))


@triton.jit
def head(
    features, weight, bias, labels, d_features, losses, hits, smoothing, HW: constexpr, C: constexpr,
    CLASSES: constexpr, BLOCK: constexpr, BLOCK_CLASSES: constexpr, PDL: constexpr,
):  # fmt: skip
    """Store the gradient of the mean cross-entropy in features `[N, HW, C]`, one image per program.

    Also store each image's loss, and 1 in `hits` if it is classified correctly, else 0.
    """
    _wait(PDL)
    n, count = tl.program_id(0), tl.num_programs(0)
    at, c, k = tl.arange(0, BLOCK), tl.arange(0, C), tl.arange(0, BLOCK_CLASSES)
    here, live = (n * HW + at)[:, None] * C + c, (at < HW)[:, None]
    pooled = tl.sum(tl.load(features + here, mask=live, other=0.0).to(tl.float32), 0) / HW
    taught = k < CLASSES
    weights = tl.load(weight + k[:, None] * C + c, mask=taught[:, None], other=0.0)
    logits = tl.sum(weights * pooled[None, :], 1) + tl.load(bias + k, mask=taught, other=0.0)
    logits = tl.where(taught, logits, float("-inf"))
    greatest, label = tl.max(logits, 0), tl.load(labels + n)
    exponentials = tl.exp(logits - greatest)
    total = tl.sum(exponentials, 0)
    target = tl.where(k == label, 1 - smoothing, 0.0) + smoothing / CLASSES
    d_logits = tl.where(taught, (exponentials / total - target) / count, 0.0)
    d_pooled = tl.sum(weights * d_logits[:, None], 0) / HW
    d_out = tl.broadcast_to(d_pooled[None, :], [BLOCK, C])
    tl.store(d_features + here, d_out.to(d_features.dtype.element_ty), mask=live)
    tl.store(losses + n, tl.log(total) + greatest - tl.sum(tl.where(taught, target * logits, 0.0), 0))
    tl.store(hits + n, (tl.argmax(logits, 0) == label).to(tl.float32))


@triton.jit
def record(
    losses, hits, loss_sum, correct, first_bad_step, position, lrs, lr, count, STEP: constexpr, PDL: constexpr
):
    """Add the batch to the epoch's metrics, set lr to that of this step, and count the step."""
    _wait(PDL)
    loss, right = tl.zeros([STEP], tl.float32), tl.zeros([STEP], tl.float32)
    for start in range(0, count, STEP):
        i = start + tl.arange(0, STEP)
        loss += tl.load(losses + i, mask=i < count, other=0.0)
        right += tl.load(hits + i, mask=i < count, other=0.0)
    batch_loss, step, first = tl.sum(loss, 0), tl.load(position), tl.load(first_bad_step)
    bad = (tl.abs(batch_loss) < float("inf")) == 0  # also NaN
    tl.store(first_bad_step, tl.where(bad & (first < 0), step, first))
    tl.store(loss_sum, tl.load(loss_sum) + batch_loss.to(tl.float64))
    tl.store(correct, tl.load(correct) + tl.sum(right, 0).to(tl.int64))
    if lrs is not None:
        tl.store(lr, tl.load(lrs + step))
    tl.store(position, step + 1)
