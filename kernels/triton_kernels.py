"""The Triton kernels that cuda.py launches; reference.py has their formulas.

Activations are `[positions, C]`, where a position is a pixel of an image, in memory order. Per-channel values
are `[4, C]` in float32. Optional arguments may be None.

A convolution computes patches of P x P pixels. Every patch depends on a window of input pixels of the same
size, so a convolution is one matrix product for each pixel of the window: `[BLOCK, C_IN]` gathered inputs by
`[C_IN, P P C_OUT]` weights, which are zero where the pixel contributes nothing to an output (a block Toeplitz
matrix). With P above 1, each input is gathered and normalised less often, at the price of more multiply-adds.

Sums over positions go through `partial`, `[2, C, programs]`. Each program writes its own sums, and the last
one to do so adds up all of them, always in the same order. `counter` shows which program is the last.
"""

import triton
import triton.language as tl
from triton.language import constexpr
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.reference import NORM_ROWS, SUMS_ROWS

_MEAN, _RSTD, _SCALE, _SHIFT = map(constexpr, NORM_ROWS)
_D_GAMMA, _D_BETA, _D_B, _D_C = map(constexpr, SUMS_ROWS)


@triton.jit
def _per_channel(values, row: constexpr, channels, C: constexpr):
    return tl.load(values + row * C + channels, mask=channels < C, other=0.0)


@triton.jit
def _normalise(z, norm, channels, C: constexpr):
    scale, shift = _per_channel(norm, _SCALE, channels, C), _per_channel(norm, _SHIFT, channels, C)
    return z.to(tl.float32) * scale + shift


@triton.jit
def _relu(y):
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)  # NaN is kept, to reveal divergence


@triton.jit
def _gradient_coefficients(norm, sums, channels, C: constexpr):
    """Return scale, b and c of dz = g scale + z b + c."""
    b, c = _per_channel(sums, _D_B, channels, C), _per_channel(sums, _D_C, channels, C)
    return _per_channel(norm, _SCALE, channels, C), b, c


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
def _is_last(counter, programs):
    """Return whether this is the last program for its channels to get here; the last resets the counter."""
    tl.debug_barrier()  # all threads must have written before one of them counts
    counter += tl.program_id(1)
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _store_partial(partial, programs, first, second, channels, C: constexpr):
    at = partial + channels * programs + tl.program_id(0)
    tl.store(at, first)
    tl.store(at + C * programs, second)


@triton.jit
def _load_partial(partial, programs, row: constexpr, channels, at, C: constexpr):
    """Load the sums of programs `at`, `[channels, at]`, 0 past the last. Bypass L1, which may be stale."""
    here = (row * C + channels)[:, None] * programs + at
    return tl.load(partial + here, mask=at < programs, other=0.0, cache_modifier=".cg")


@triton.jit
def _sum_statistics(
    ends, z, live, rows, channels, positions, C: constexpr, BLOCK_C: constexpr, COUNT: constexpr,
    STEP: constexpr,
):  # fmt: skip
    """Sum this program's z, `[BLOCK, COUNT / BLOCK C]`; the last program stores norm and running statistics.

    Only the first `rows` rows of z are `live`; in all blocks but the last, these are all rows. Squares are
    summed about each program's own mean and then combined, so that no digits cancel (Chan et al. 1983).
    """
    PARTS: constexpr = COUNT // z.shape[0]
    sums = tl.sum(z, 0)
    centred = tl.where(live, z - sums / rows, 0.0)
    squares = tl.sum(centred * centred, 0)
    if PARTS > 1:
        sums, squares = sums.reshape(PARTS, C), squares.reshape(PARTS, C)
        total = tl.sum(sums, 0)
        off = (sums - total / PARTS) / rows
        sums, squares = total, tl.sum(squares + off * off * rows, 0)
    _store_partial(ends[0], ends[2], sums, squares, channels, C)
    if _is_last(ends[1], ends[2]):
        _finish_statistics(ends, channels, positions, C, BLOCK_C, COUNT, STEP)


@triton.jit
def _finish_statistics(
    ends, channels, positions, C: constexpr, BLOCK_C: constexpr, COUNT: constexpr, STEP: constexpr
):
    partial, _, programs, norm, gamma, beta, running_mean, running_var, eps, momentum = ends
    first = tl.load(partial + channels * programs, cache_modifier=".cg")
    pivot = first / tl.minimum(COUNT, positions)  # near the mean, so that what is squared stays small
    sums, squares = tl.zeros([BLOCK_C, STEP], tl.float32), tl.zeros([BLOCK_C, STEP], tl.float32)
    for start in range(0, programs, STEP):
        at = start + tl.arange(0, STEP)
        count = tl.maximum(tl.minimum(positions - at * COUNT, COUNT), 0).to(tl.float32)
        share = 1 / tl.maximum(count, 1.0)
        total = _load_partial(partial, programs, 0, channels, at, C)
        off = total * share - pivot[:, None]
        sums += total
        squares += _load_partial(partial, programs, 1, channels, at, C) + count * off * off
    mean = tl.sum(sums, 1) / positions
    total = tl.sum(squares, 1) - positions * (mean - pivot) * (mean - pivot)
    total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    _store_norm(norm, mean, total / positions, gamma, beta, eps, channels, C)
    before = tl.load(running_mean + channels)
    tl.store(running_mean + channels, before + momentum * (mean - before))
    before = tl.load(running_var + channels)
    tl.store(running_var + channels, before + momentum * (total / (positions - 1) - before))


@triton.jit
def _store_norm(norm, mean, var, gamma, beta, eps, channels, C: constexpr):
    rstd = 1 / tl.sqrt(var + eps)
    scale = tl.load(gamma + channels) * rstd
    tl.store(norm + _MEAN * C + channels, mean)
    tl.store(norm + _RSTD * C + channels, rstd)
    tl.store(norm + _SCALE * C + channels, scale)
    tl.store(norm + _SHIFT * C + channels, tl.load(beta + channels) - mean * scale)


@triton.jit
def _sum_gradient(
    ends, g, z, norm, all_channels, channels, positions, C: constexpr, BLOCK_C: constexpr, STEP: constexpr
):
    """Sum this program's g and g (z - mean); the last program stores the sums of g.

    g and z are `[BLOCK, PARTS C]`, and `all_channels` are the channels of their columns.
    """
    PARTS: constexpr = g.shape[1] // BLOCK_C
    centred = z.to(tl.float32) - _per_channel(norm, _MEAN, all_channels, C)
    d_beta, d_gamma = tl.sum(g, 0), tl.sum(g * centred, 0)
    if PARTS > 1:
        d_beta, d_gamma = tl.sum(d_beta.reshape(PARTS, C), 0), tl.sum(d_gamma.reshape(PARTS, C), 0)
    _store_partial(ends[0], ends[2], d_beta, d_gamma, channels, C)
    if _is_last(ends[1], ends[2]):
        partial, _, programs, sums = ends
        totals, products = tl.zeros([BLOCK_C, STEP], tl.float32), tl.zeros([BLOCK_C, STEP], tl.float32)
        for start in range(0, programs, STEP):
            at = start + tl.arange(0, STEP)
            totals += _load_partial(partial, programs, 0, channels, at, C)
            products += _load_partial(partial, programs, 1, channels, at, C)
        scale, rstd = tl.load(norm + _SCALE * C + channels), tl.load(norm + _RSTD * C + channels)
        beta, gamma = tl.sum(totals, 1), tl.sum(products, 1) * rstd
        b = -scale * rstd * gamma / positions
        c = -scale * beta / positions - b * tl.load(norm + _MEAN * C + channels)
        tl.store(sums + _D_GAMMA * C + channels, gamma)
        tl.store(sums + _D_BETA * C + channels, beta)
        tl.store(sums + _D_B * C + channels, b)
        tl.store(sums + _D_C * C + channels, c)


# ---- convolutions ----


@triton.jit
def _patches(patches, H: constexpr, W: constexpr, P: constexpr, BLOCK: constexpr):
    """Return this program's patches: the image, the patch's row and column in it, and which patches exist."""
    DOWN: constexpr = (H + P - 1) // P
    ACROSS: constexpr = (W + P - 1) // P
    patch = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
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
def convolve(
    x, norm, weight, z, after, shortcut, ends, patches, positions, H: constexpr, W: constexpr,
    H_OUT: constexpr, W_OUT: constexpr, C_IN: constexpr, C_OUT: constexpr, K: constexpr, STRIDE: constexpr,
    W_O: constexpr, W_I: constexpr, W_TAP: constexpr, P: constexpr, RELU: constexpr, BLOCK: constexpr,
    STEP: constexpr, PDL: constexpr,
):  # fmt: skip
    """Store z = conv(x), `[positions, C_OUT]`, or with `norm` conv(relu(x scale + shift)).

    With `after`, the norm of z, store relu(z scale + shift + shortcut) instead. With `ends`, also compute the
    statistics of z.
    """
    _wait(PDL)
    image, down, across, live = _patches(patches, H_OUT, W_OUT, P, BLOCK)
    BLOCK_IN: constexpr = 16 if C_IN < 16 else C_IN  # tl.dot needs 16
    WINDOW: constexpr = STRIDE * (P - 1) + K
    c_in, n = tl.arange(0, BLOCK_IN), tl.arange(0, P * P * C_OUT)
    if norm is not None:
        scale, shift = _per_channel(norm, _SCALE, c_in, C_IN), _per_channel(norm, _SHIFT, c_in, C_IN)
    total = tl.zeros([BLOCK, P * P * C_OUT], tl.float32)
    for tap in range(WINDOW * WINDOW):  # not unrolled, which at 64 channels takes every register
        h = down * (P * STRIDE) + tap // WINDOW - K // 2
        w = across * (P * STRIDE) + tap % WINDOW - K // 2
        inside = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & live & (c_in < C_IN)
        pixels = tl.load(x + ((image * H + h) * W + w)[:, None] * C_IN + c_in, mask=inside, other=0.0)
        if norm is not None:  # padding is zero after BatchNorm, not before
            pixels = _relu(pixels.to(tl.float32) * scale + shift)
            pixels = tl.where(inside, pixels, 0.0).to(x.dtype.element_ty)
        taps = weight + tap * W_TAP + c_in[:, None] * W_I + n * W_O
        taps = tl.load(taps, mask=(c_in < C_IN)[:, None], other=0.0)
        total = tl.dot(pixels, taps, total, input_precision="ieee")
    here, there = _pixels(image, down, across, live, H_OUT, W_OUT, C_OUT, P)
    stored = total.to(z.dtype.element_ty)
    if after is not None:
        values = _normalise(stored, after, n % C_OUT, C_OUT)
        if shortcut is not None:
            values += tl.load(shortcut + here, mask=there, other=0.0).to(tl.float32)
        if RELU:
            values = _relu(values)
        stored = values.to(z.dtype.element_ty)
    tl.store(z + here, stored, mask=there)
    if ends is not None:
        rows = tl.minimum(patches - tl.program_id(0) * BLOCK, BLOCK)
        channels = tl.arange(0, C_OUT)
        values = stored.to(tl.float32)
        _sum_statistics(ends, values, live, rows, channels, positions, C_OUT, C_OUT, BLOCK * P * P, STEP)


@triton.jit
def convolve_backward(
    g, z, norm, sums, weight, add, z_below, norm_below, dx, ends, patches, positions, H: constexpr,
    W: constexpr, H_OUT: constexpr, W_OUT: constexpr, C_IN: constexpr, C_OUT: constexpr, K: constexpr,
    STRIDE: constexpr, W_O: constexpr, W_I: constexpr, W_TAP: constexpr, P: constexpr, BLOCK: constexpr,
    STEP: constexpr, PDL: constexpr,
):  # fmt: skip
    """Store dx, the gradient of x, `[positions, C_IN]`; or with z_below the g of the unit below and its sums.

    Patches are of dx, and P is a multiple of STRIDE. The loop goes through the window from its end.
    """
    _wait(PDL)
    image, down, across, live = _patches(patches, H, W, P, BLOCK)
    LAST: constexpr = (P - 1 + K // 2) // STRIDE
    WINDOW: constexpr = K // 2 // STRIDE + LAST + 1
    n, c_out = tl.arange(0, P * P * C_IN), tl.arange(0, C_OUT)
    a, b, c = _gradient_coefficients(norm, sums, c_out, C_OUT)
    total = tl.zeros([BLOCK, P * P * C_IN], tl.float32)
    for tap in range(WINDOW * WINDOW):
        h = down * (P // STRIDE) + LAST - tap // WINDOW
        w = across * (P // STRIDE) + LAST - tap % WINDOW
        inside = ((h >= 0) & (h < H_OUT) & (w >= 0) & (w < W_OUT))[:, None] & live
        above = ((image * H_OUT + h) * W_OUT + w)[:, None] * C_OUT + c_out
        d_out = tl.load(g + above, mask=inside, other=0.0).to(tl.float32) * a
        d_out += tl.load(z + above, mask=inside, other=0.0).to(tl.float32) * b + c
        d_out = tl.where(inside, d_out, 0.0).to(g.dtype.element_ty)
        taps = tl.load(weight + tap * W_TAP + c_out[:, None] * W_O + n * W_I)
        total = tl.dot(d_out, taps, total, input_precision="ieee")
    here, there = _pixels(image, down, across, live, H, W, C_IN, P)
    if add is not None:
        total += tl.load(add + here, mask=there, other=0.0).to(tl.float32)
    if z_below is None:
        tl.store(dx + here, total.to(dx.dtype.element_ty), mask=there)
    else:
        below = tl.load(z_below + here, mask=there, other=0.0)
        positive = there & (_normalise(below, norm_below, n % C_IN, C_IN) > 0)
        stored = tl.where(positive, total, 0.0).to(dx.dtype.element_ty)
        tl.store(dx + here, stored, mask=there)
        channels, values = tl.arange(0, C_IN), stored.to(tl.float32)
        _sum_gradient(ends, values, below, norm_below, n % C_IN, channels, positions, C_IN, C_IN, STEP)


# ---- elementwise ----


@triton.jit
def _tile(positions, C: constexpr, BLOCK: constexpr, BLOCK_C: constexpr):
    """Return this program's part of an elementwise kernel: channels, offsets, and which positions exist."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return channels, at[:, None] * C + channels, (at < positions)[:, None]


@triton.jit
def statistics(
    z, ends, positions, C: constexpr, BLOCK: constexpr, BLOCK_C: constexpr, STEP: constexpr, PDL: constexpr
):
    """Compute the statistics of z, when cuDNN computed the convolution."""
    _wait(PDL)
    channels, here, live = _tile(positions, C, BLOCK, BLOCK_C)
    values = tl.load(z + here, mask=live, other=0.0).to(tl.float32)
    rows = tl.minimum(positions - tl.program_id(0) * BLOCK, BLOCK)
    _sum_statistics(ends, values, live, rows, channels, positions, C, BLOCK_C, BLOCK, STEP)


@triton.jit
def activate(
    z, norm, shortcut, y, signs, positions, RELU: constexpr, C: constexpr, BLOCK: constexpr,
    BLOCK_C: constexpr, PDL: constexpr,
):  # fmt: skip
    """Store y = relu(z scale + shift + shortcut) and, if `signs` is given, the signs of y."""
    _wait(PDL)
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
    dy, z, norm, signs, g, ends, positions, C: constexpr, BLOCK: constexpr, BLOCK_C: constexpr,
    STEP: constexpr, PDL: constexpr,
):  # fmt: skip
    """Store g, dy masked by signs or else by z scale + shift, and its sums; without g, do not mask."""
    _wait(PDL)
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
    gradient = gradient.to(tl.float32)
    _sum_gradient(ends, gradient, values, norm, channels, channels, positions, C, BLOCK_C, STEP)


@triton.jit
def gradient(
    g, z, norm, sums, dz, positions, C: constexpr, BLOCK: constexpr, BLOCK_C: constexpr, PDL: constexpr
):
    """Store dz, the gradient of a convolution's output, for weights that train or for cuDNN's backward."""
    _wait(PDL)
    channels, here, live = _tile(positions, C, BLOCK, BLOCK_C)
    a, b, c = _gradient_coefficients(norm, sums, channels, C)
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
    scale, middle = tl.load(gamma + channels, mask=live) * rstd, tl.load(mean + channels, mask=live)
    tl.store(norm + _MEAN * C + channels, middle, mask=live)
    tl.store(norm + _RSTD * C + channels, rstd, mask=live)
    tl.store(norm + _SCALE * C + channels, scale, mask=live)
    tl.store(norm + _SHIFT * C + channels, tl.load(beta + channels, mask=live) - middle * scale, mask=live)


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
    features, weight, bias, labels, d_features, partial, counter, loss_sum, correct, first_bad_step, position,
    lrs, lr, smoothing, HW: constexpr, C: constexpr, CLASSES: constexpr, BLOCK: constexpr,
    BLOCK_CLASSES: constexpr, STEP: constexpr, PDL: constexpr,
):  # fmt: skip
    """Store the gradient of the mean cross-entropy in features `[N, HW, C]`, one image per program.

    The last program adds the batch to the epoch's metrics, sets lr to that of this step, and counts the step.
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
    loss = tl.log(total) + greatest - tl.sum(tl.where(taught, target * logits, 0.0), 0)
    d_logits = tl.where(taught, (exponentials / total - target) / count, 0.0)
    d_pooled = tl.sum(weights * d_logits[:, None], 0) / HW
    d_out = tl.broadcast_to(d_pooled[None, :], [BLOCK, C])
    tl.store(d_features + here, d_out.to(d_features.dtype.element_ty), mask=live)
    tl.store(partial + n, loss)
    tl.store(partial + count + n, (tl.argmax(logits, 0) == label).to(tl.float32))
    if _is_last(counter, count):
        losses, hits = tl.zeros([STEP], tl.float32), tl.zeros([STEP], tl.float32)
        for start in range(0, count, STEP):
            i = start + tl.arange(0, STEP)
            losses += tl.load(partial + i, mask=i < count, other=0.0, cache_modifier=".cg")
            hits += tl.load(partial + count + i, mask=i < count, other=0.0, cache_modifier=".cg")
        batch_loss, step, first = tl.sum(losses, 0), tl.load(position), tl.load(first_bad_step)
        bad = (tl.abs(batch_loss) < float("inf")) == 0  # also NaN
        tl.store(first_bad_step, tl.where(bad & (first < 0), step, first))
        tl.store(loss_sum, tl.load(loss_sum) + batch_loss.to(tl.float64))
        tl.store(correct, tl.load(correct) + tl.sum(hits, 0).to(tl.int64))
        if lrs is not None:
            tl.store(lr, tl.load(lrs + step))
        tl.store(position, step + 1)
