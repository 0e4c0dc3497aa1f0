"""The Triton kernels that cuda.py launches; reference.py has their formulas.

Activations are `[positions, C]`, where a position is a pixel of an image, in memory order. Per-channel values
are `[4, C]` in float32. Optional arguments may be None.

A convolution computes patches of P x P pixels. Every patch depends on a window of input pixels of the same
size, so a convolution is a matrix product: `[BLOCK, window C_IN]` gathered inputs by
`[window C_IN, P P C_OUT]` weights, which are zero where a pixel contributes nothing to an output (a block
Toeplitz matrix). A program gathers and multiplies GROUP pixels of the window at once. With P above 1, each
input is gathered and normalised less often, at the price of more multiply-adds.

A norm and the sums of a gradient may be incomplete; see triton_sums.py. A program computes `each` consecutive
blocks, so that large batches need no more additions to sums than small ones.
"""

import triton
import triton.language as tl
from triton.language import constexpr
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton_sums import (
    MEAN,
    add_sums,
    complete_sums,
    gradient_coefficients,
    per_channel,
    pixels_of,
    scale_and_shift,
    statistics_of,
)


@triton.jit
def _relu(y):
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)  # NaN is kept, to reveal divergence


@triton.jit
def _repeat(values, TIMES: constexpr):
    """Return `values`, `[C]`, TIMES times in a row."""
    return tl.gather(values, tl.arange(0, TIMES * values.shape[0]) % values.shape[0], 0)


@triton.jit
def _wait(PDL: constexpr):
    """Wait until the previous kernel has finished; code before this call must not read or write memory.

    With programmatic dependent launch, a kernel's programs start while those of the previous kernel finish.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


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
def _window(where, dh, dw, H: constexpr, W: constexpr, C: constexpr, c):
    """Return the offsets `[BLOCK, k]` of channels c of pixels (h + dh, w + dw), and which of these exist."""
    image, h, w, live, _ = where
    at = ((image * H + h) * W + w)[:, None] + (dh * W + dw)
    h, w = h[:, None] + dh, w[:, None] + dw
    return at * C + c, live & (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def _zero(count):
    """Return a zero that the compiler does not know; with a known one, it would mask more slowly."""
    return tl.minimum(count, 0).to(tl.float32)


@triton.constexpr_function
def _rest(taps, group, wide):
    """Return how many pixels of a window to multiply after all whole groups, a power of two; or 0."""
    rest = taps % group
    return max(triton.next_power_of_2(rest), 16 // wide) if rest else 0


@triton.jit
def _taps(weight, taps, exists, MASKED: constexpr):
    """Load weights; if `MASKED`, 0 where none exist."""
    return tl.load(weight + taps, mask=exists[:, None], other=0.0) if MASKED else tl.load(weight + taps)


@triton.jit
def _forward(
    total, x, norm, weight, n, where, start, H: constexpr, W: constexpr, C: constexpr, WINDOW: constexpr,
    PAD: constexpr, W_I: constexpr, W_TAP: constexpr, GROUP: constexpr, MASKED: constexpr,
):  # fmt: skip
    """Return `total` plus the products of GROUP pixels of a window, from `start`, and their weights."""
    WIDE: constexpr = 4 if C < 4 else C  # a power of two
    k = tl.arange(0, GROUP * WIDE)
    c, tap = k % WIDE, start + k // WIDE
    at, inside = _window(where, tap // WINDOW - PAD, tap % WINDOW - PAD, H, W, C, c)
    exists, zero = (c < C) & (tap < WINDOW * WINDOW), where[4]
    if MASKED:
        inside = inside & exists
    pixels = tl.load(x + at, mask=inside, other=0.0)
    if norm is not None:
        scale, shift = _repeat(norm[0], GROUP), _repeat(norm[1], GROUP)
        pixels = pixels.to(tl.float32) * scale + shift
        pixels = _relu(tl.where(inside, pixels, zero)).to(x.dtype.element_ty)  # padding, after BatchNorm
    taps = _taps(weight, (tap * W_TAP + c * W_I)[:, None] + n, exists, MASKED)
    return tl.dot(pixels, taps, total, input_precision="ieee")


@triton.jit
def _backward(
    total, g, z, coefficients, weight, n, where, start, H: constexpr, W: constexpr, C: constexpr,
    WINDOW: constexpr, LAST: constexpr, W_O: constexpr, W_TAP: constexpr, GROUP: constexpr,
    MASKED: constexpr,
):  # fmt: skip
    """Return `total` plus the products of GROUP gradients of a window, from `start`, and their weights."""
    k = tl.arange(0, GROUP * C)
    c, tap = k % C, start + k // C
    at, inside = _window(where, LAST - tap // WINDOW, LAST - tap % WINDOW, H, W, C, c)
    exists, zero = tap < WINDOW * WINDOW, where[4]
    if MASKED:
        inside = inside & exists
    scale_g, scale_z, shift = coefficients
    scale_g, scale_z, shift = _repeat(scale_g, GROUP), _repeat(scale_z, GROUP), _repeat(shift, GROUP)
    d_out = tl.load(g + at, mask=inside, other=0.0).to(tl.float32) * scale_g
    d_out += tl.load(z + at, mask=inside, other=0.0).to(tl.float32) * scale_z + shift
    d_out = tl.where(inside, d_out, zero)
    taps = _taps(weight, (tap * W_TAP + c * W_O)[:, None] + n, exists, MASKED)
    return tl.dot(d_out.to(g.dtype.element_ty), taps, total, input_precision="ieee")


@triton.jit
def convolve(
    x, norm, weight, z, after, shortcut, totals, patches, each, H: constexpr, W: constexpr,
    H_OUT: constexpr, W_OUT: constexpr, C_IN: constexpr, C_OUT: constexpr, K: constexpr, STRIDE: constexpr,
    W_O: constexpr, W_I: constexpr, W_TAP: constexpr, P: constexpr, WINDOW: constexpr, GROUP: constexpr,
    RELU: constexpr, BLOCK: constexpr, PDL: constexpr,
):  # fmt: skip
    """Store z = conv(x), `[positions, C_OUT]`, or with `norm` conv(relu(x scale + shift)).

    With `after`, the norm of z, store relu(z scale + shift + shortcut) instead. With `totals`, also add the
    sums of z and its squares to these.
    """
    _wait(PDL)
    TAPS: constexpr = WINDOW * WINDOW
    REST: constexpr = _rest(TAPS, GROUP, 4 if C_IN < 4 else C_IN)
    n, affine = tl.arange(0, P * P * C_OUT), None
    if norm is not None:
        affine = scale_and_shift(norm, tl.arange(0, C_IN), C_IN)
    sums, squares = tl.zeros([C_OUT], tl.float64), tl.zeros([C_OUT], tl.float64)
    for i in range(each):
        block = tl.program_id(0) * each + i
        image, down, across, live = _patches(block, patches, H_OUT, W_OUT, P, BLOCK)
        total = tl.zeros([BLOCK, P * P * C_OUT], tl.float32)
        where = image, down * (P * STRIDE), across * (P * STRIDE), live, _zero(patches)
        for start in range(0, TAPS // GROUP * GROUP, GROUP):  # not unrolled, which would take every register
            total = _forward(
                total, x, affine, weight, n * W_O, where, start, H, W, C_IN, WINDOW, K // 2, W_I,
                W_TAP, GROUP, C_IN < 4,
            )  # fmt: skip
        if REST > 0:
            total = _forward(
                total, x, affine, weight, n * W_O, where, TAPS // GROUP * GROUP, H, W, C_IN, WINDOW,
                K // 2, W_I, W_TAP, REST, C_IN < 4 or TAPS % GROUP < REST,
            )  # fmt: skip
        here, there = _pixels(image, down, across, live, H_OUT, W_OUT, C_OUT, P)
        stored = total.to(z.dtype.element_ty)
        if after is not None:
            scale_after, shift_after = scale_and_shift(after, n % C_OUT, C_OUT)
            values = stored.to(tl.float32) * scale_after + shift_after
            if shortcut is not None:
                values += tl.load(shortcut + here, mask=there, other=0.0).to(tl.float32)
            if RELU:
                values = _relu(values)
            stored = values.to(z.dtype.element_ty)
        tl.store(z + here, stored, mask=there)
        if totals is not None:
            first, second = statistics_of(stored.to(tl.float32), patches - block * BLOCK, C_OUT)
            sums, squares = sums + first, squares + second
    if totals is not None:
        add_sums(totals, sums, squares, tl.arange(0, C_OUT), C_OUT)


@triton.jit
def convolve_backward(
    g, z, norm, sums, weight, add, z_below, norm_below, dx, totals, patches, each, H: constexpr,
    W: constexpr, H_OUT: constexpr, W_OUT: constexpr, C_IN: constexpr, C_OUT: constexpr, K: constexpr,
    STRIDE: constexpr, W_O: constexpr, W_I: constexpr, W_TAP: constexpr, P: constexpr,
    WINDOW: constexpr, GROUP: constexpr, BLOCK: constexpr, PDL: constexpr,
):  # fmt: skip
    """Store dx, the gradient of x, `[positions, C_IN]`; or with z_below the g of the unit below and its sums.

    Patches are of dx, and P is a multiple of STRIDE. The loop goes through the window from its end.
    """
    _wait(PDL)
    LAST: constexpr = (P - 1 + K // 2) // STRIDE
    TAPS: constexpr = WINDOW * WINDOW
    REST: constexpr = _rest(TAPS, GROUP, C_OUT)
    n = tl.arange(0, P * P * C_IN)
    coefficients = gradient_coefficients(norm, sums, tl.arange(0, C_OUT), C_OUT)
    d_beta, products = tl.zeros([C_IN], tl.float32), tl.zeros([C_IN], tl.float32)
    for i in range(each):
        block = tl.program_id(0) * each + i
        image, down, across, live = _patches(block, patches, H, W, P, BLOCK)
        total = tl.zeros([BLOCK, P * P * C_IN], tl.float32)
        where = image, down * (P // STRIDE), across * (P // STRIDE), live, _zero(patches)
        for start in range(0, TAPS // GROUP * GROUP, GROUP):
            total = _backward(
                total, g, z, coefficients, weight, n * W_I, where, start, H_OUT, W_OUT, C_OUT, WINDOW, LAST,
                W_O, W_TAP, GROUP, False,
            )  # fmt: skip
        if REST > 0:
            total = _backward(
                total, g, z, coefficients, weight, n * W_I, where, TAPS // GROUP * GROUP, H_OUT, W_OUT, C_OUT,
                WINDOW, LAST, W_O, W_TAP, REST, TAPS % GROUP < REST,
            )  # fmt: skip
        here, there = _pixels(image, down, across, live, H, W, C_IN, P)
        if add is not None:
            total += tl.load(add + here, mask=there, other=0.0).to(tl.float32)
        if z_below is None:
            tl.store(dx + here, total.to(dx.dtype.element_ty), mask=there)
        else:
            # Joined, both have one layout; otherwise Triton moves the mask between layouts, bit by bit.
            below = tl.load(z_below + here, mask=there, other=0.0)
            stored, below = tl.split(tl.join(total.to(dx.dtype.element_ty), below))
            below = below.to(tl.float32)
            scale, shift = scale_and_shift((norm_below,), n % C_IN, C_IN)
            stored = tl.where(there & (below * scale + shift > 0), stored, 0.0)
            tl.store(dx + here, stored, mask=there)
            values, centred = stored.to(tl.float32), below - per_channel(norm_below, MEAN, n % C_IN, C_IN)
            d_beta += tl.sum(pixels_of(values, C_IN), 0)
            products += tl.sum(pixels_of(values * centred, C_IN), 0)
    if totals is not None:
        add_sums(totals, d_beta, products, tl.arange(0, C_IN), C_IN)


# ---- elementwise ----


@triton.jit
def _tile(block, positions, C: constexpr, BLOCK: constexpr, BLOCK_C: constexpr):
    """Return a block of an elementwise kernel: the offsets, and which positions exist."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return at[:, None] * C + channels, (at < positions)[:, None]


@triton.jit
def statistics(
    z, totals, positions, each, C: constexpr, BLOCK: constexpr, BLOCK_C: constexpr, PDL: constexpr
):
    """Add the sums of z and its squares to `totals`, when cuDNN computed the convolution."""
    _wait(PDL)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums, squares = tl.zeros([BLOCK_C], tl.float64), tl.zeros([BLOCK_C], tl.float64)
    for i in range(each):
        block = tl.program_id(0) * each + i
        here, live = _tile(block, positions, C, BLOCK, BLOCK_C)
        values = tl.load(z + here, mask=live, other=0.0).to(tl.float32)
        first, second = statistics_of(values, positions - block * BLOCK, BLOCK_C)
        sums, squares = sums + first, squares + second
    add_sums(totals, sums, squares, channels, C)


@triton.jit
def activate(
    z, norm, shortcut, y, signs, positions, each, RELU: constexpr, C: constexpr, BLOCK: constexpr,
    BLOCK_C: constexpr, PDL: constexpr,
):  # fmt: skip
    """Store y = relu(z scale + shift + shortcut) and, if `signs` is given, the signs of y."""
    _wait(PDL)
    scale, shift = scale_and_shift(norm, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), C)
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
    dy, z, norm, signs, g, totals, positions, each, C: constexpr, BLOCK: constexpr, BLOCK_C: constexpr,
    PDL: constexpr,
):  # fmt: skip
    """Store g, dy masked by signs or else by z scale + shift, and its sums; without g, do not mask."""
    _wait(PDL)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = per_channel(norm, MEAN, channels, C)
    scale, shift = scale_and_shift((norm,), channels, C)
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
    add_sums(totals, d_beta, products, channels, C)


@triton.jit
def gradient(
    g, z, norm, sums, dz, positions, each, C: constexpr, BLOCK: constexpr, BLOCK_C: constexpr, PDL: constexpr
):
    """Store dz, the gradient of a convolution's output, for weights that train or for cuDNN's backward."""
    _wait(PDL)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    a, b, c = gradient_coefficients(norm, sums, channels, C)
    for i in range(each):
        here, live = _tile(tl.program_id(0) * each + i, positions, C, BLOCK, BLOCK_C)
        d_out = tl.load(g + here, mask=live, other=0.0).to(tl.float32) * a
        d_out += tl.load(z + here, mask=live, other=0.0).to(tl.float32) * b + c
        tl.store(dz + here, d_out.to(dz.dtype.element_ty), mask=live)


@triton.jit
def finish(norm, sums, C: constexpr, BLOCK_C: constexpr, PDL: constexpr):
    """Store `norm`, or with `sums` these, when no other kernel does."""
    _wait(PDL)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if sums is None:
        scale_and_shift(norm, channels, C)
    else:
        complete_sums(sums, channels, C)


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
