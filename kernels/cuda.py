"""The passes for CUDA GPUs: the Triton kernels of triton_kernels.py, where they are faster than cuDNN.

When a convolution loads its input, it applies the BatchNorm and ReLU of the unit below (forward), or computes
the gradient through the BatchNorm above (backward). When it stores its output, it also sums what the next
BatchNorm needs: each program adds its sums to those of all, in such a way that the order does not matter, so
that a step gives the same bits every time. For each layer, choices.py measures whether this beats
cuDNN with elementwise kernels around it, and which block size is fastest.
"""

import functools
import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from kernels import choices, device, reference
from kernels.choices import Attempt, Choices, Config, agrees
from kernels.device import cache_folder, captured
from kernels.reference import BatchNorm, Conv, TorchPasses

try:
    import triton

    from kernels import triton_kernels, triton_sums
except ImportError:  # `passes` warns about it
    triton = triton_kernels = triton_sums = None


ELEMENTWISE = Config(0, 4, 1)
TILE = 4096  # elements per program of an elementwise kernel
LARGEST_TILE = 16384  # the most elements that a program of the head can hold at once
WIDEST = 128  # the most columns of a convolution's matrix product
UNROLLED = 4096  # the most multiplications that a thread does at once in fp32; more would compile slowly
ADDERS = 512  # the most programs of a kernel that adds to sums over a batch
ZEROS = 1 << 16  # numbers that are zeroed at once, for the sums of several kernels
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class NormSums(NamedTuple):
    """What completes a norm in training: sums over positions, see triton_sums.py, and the BatchNorm."""

    totals: Tensor
    positions: int
    gamma: Tensor
    beta: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float
    momentum: float


class GradientSums(NamedTuple):
    """What completes the sums of a gradient: sums over positions, and the norm."""

    totals: Tensor
    positions: int
    norm: Tensor


class Running(NamedTuple):
    """What completes a norm in evaluation."""

    mean: Tensor
    var: Tensor
    gamma: Tensor
    beta: Tensor
    eps: float


@functools.cache
def passes() -> TorchPasses:
    """Return the Triton passes; if Triton is missing, lacks a C compiler or fails, warn and return PyTorch's.

    On a Hopper or newer, they use programmatic dependent launch; if that fails, warn and do without it.
    """
    try:
        if triton is None:
            raise ImportError("Triton is not installed")
        waiting = CudaPasses(Choices(_choices_file(torch.cuda.get_device_name())))
        check_sums(waiting, torch.device("cuda"))
    except Exception as error:  # whatever is wrong, training is possible without Triton
        warnings.warn(f"Triton fails; PyTorch's slower kernels are used ({error!r})", stacklevel=2)
        return TorchPasses()
    if torch.cuda.get_device_capability() < (9, 0):
        return waiting
    try:
        dependent = CudaPasses(waiting.choose, pdl=True)
        check_sums(dependent, torch.device("cuda"))
    except Exception as error:
        what = f"dependent launch fails; each kernel waits for the end of the one before ({error!r})"
        warnings.warn(what, stacklevel=2)
        return waiting
    return dependent


def check_sums(passes: TorchPasses, device: torch.device) -> None:
    """Raise RuntimeError if `passes` computes wrong sums over a batch on this device.

    It does if a kernel does not see what the one before has written.
    """
    z = torch.linspace(-2, 3, 8 * 16 * 1024, device=device).view(8, 32, 32, 16).permute(0, 3, 1, 2)

    def sums_by(way: TorchPasses) -> tuple[Tensor, Tensor]:
        ones = [torch.ones(16, device=device) for _ in range(4)]
        norm = way.statistics(z.clone(), BatchNorm(*ones, 1e-5, 0.1))
        way.activate(z, norm)
        sums = way.mask_and_sum(z, z, norm)[1]
        way.finish(sums)
        return norm, sums

    found = [sums_by(passes)]
    if device.type == "cuda":  # also from a graph, after a copy that is not a kernel
        graph = torch.cuda.CUDAGraph()
        with captured(graph):
            found.append(sums_by(passes))
        for _ in range(2):
            graph.replay()
    if not all(agrees(sums, sums_by(TorchPasses())) for sums in found):
        raise RuntimeError("sums over a batch are wrong")


class CudaPasses(TorchPasses):
    """Passes that use Triton kernels or cuDNN, whichever is faster, and PyTorch for shapes not covered.

    `choose` returns a convolution's Config, or None for cuDNN between elementwise kernels; see Choices. `pdl`
    turns on programmatic dependent launch, for which the device must be a Hopper or newer.
    """

    name = "triton"

    def __init__(self, choose: Callable[[str, Attempt], Config | None], pdl: bool = False):
        self.choose, self.pdl = choose, pdl
        self.expanded, self.unfinished = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self.zeros = {}  # by stream: zeros that are still unused, and the capture that they belong to

    def launch(
        self, kernel, grid: tuple[int, ...], *arguments, config=ELEMENTWISE, compile_only=False, **constants
    ):
        """Launch `kernel`, or only compile it; return the compiled kernel."""
        options = config.options() | ({"launch_pdl": True} if self.pdl else {})
        compile_only = compile_only or getattr(self.choose, "compiling", False)
        return kernel.run(*arguments, grid=grid, warmup=compile_only, **constants, PDL=self.pdl, **options)

    def over(self, kernel, image: Tensor, *arguments, of=None, config: Config = ELEMENTWISE, **constants):
        """Launch `kernel` over the positions of `image`, or over its patches of side P.

        With `of`, the kernel also sums over positions, and this returns the norm of `image` if `of` is a
        BatchNorm, or the sums of a gradient if `of` is a norm. The next pass that needs them completes them.
        Without `of`, it returns None.
        """
        count, channels, height, width = image.shape
        positions = size = count * height * width
        if config is ELEMENTWISE:  # in tiles of up to 64 channels
            block_c = min(64, channels & -channels)
            block, constants = TILE // block_c, constants | {"C": channels, "BLOCK_C": block_c}
        else:
            block, block_c, p = config.block, channels, constants["P"]
            size = count * -(-height // p) * -(-width // p)
        blocks, tiles, each, out = -(-size // block), channels // block_c, 1, None
        if "totals" in kernel.arg_names:
            totals = None
            if of is not None:
                totals, out = self.totals(image), image.new_empty(4, channels, dtype=torch.float32)
                rest = NormSums(totals, positions, *of) if isinstance(of, BatchNorm) else None
                self.unfinished[out] = rest or GradientSums(totals, positions, of)
                each = -(-blocks // max(1, ADDERS // tiles))
            arguments = *arguments, totals
        grid = -(-blocks // each), tiles
        self.launch(kernel, grid, *arguments, size, each, config=config, BLOCK=block, **constants)
        return out

    def totals(self, image: Tensor) -> Tensor:
        """Return zeros for the sums over an image's positions.

        They are cut from many that are zeroed at once; for a captured graph, in that graph.
        """
        stream = torch.cuda.current_stream(image.device) if image.is_cuda else None
        capture = stream and torch.cuda.is_current_stream_capturing() and device.captures
        size = 4 * triton_sums.COPIES.value * image.shape[1]
        unused, owner = self.zeros.get(stream, (None, None))
        if unused is None or owner != capture or len(unused) < size:
            unused = image.new_zeros(max(ZEROS, size), dtype=torch.float64)
        self.zeros[stream] = unused[size:], capture
        return unused[:size]

    def given(self, values: Tensor | None) -> tuple | None:
        """Return a norm or sums as kernels receive them, with what completes them if they are unfinished."""
        return None if values is None else (values, *self.unfinished.pop(values, ()))

    def finish(self, *values):
        for out in (out for out in values if out in self.unfinished):
            is_norm, channels = not isinstance(self.unfinished[out], GradientSums), out.shape[1]
            both = (self.given(out), None) if is_norm else (None, self.given(out))
            block_c = min(64, channels & -channels)
            grid, constants = (1, channels // block_c), {"C": channels, "BLOCK_C": block_c}
            self.launch(triton_kernels.finish, grid, *both, **constants)

    def chosen(self, key: str, attempt: Attempt, needed: Tensor | None) -> Config | None:
        """Return the Config for a convolution; attempts leave the `needed` norm or sums as they were."""
        rest = None if needed is None else self.unfinished.get(needed)

        @functools.cache
        def spare() -> NormSums | GradientSums | Running:  # running statistics must be updated only once
            if not isinstance(rest, NormSums):
                return rest
            mean, var = rest.running_mean.clone(), rest.running_var.clone()
            return rest._replace(running_mean=mean, running_var=var)

        def tried(config: Config | None) -> Sequence[Tensor | None]:
            if rest is not None:
                self.unfinished[needed] = spare()
            return attempt(config)

        config = self.choose(key, tried)
        if rest is not None:
            self.unfinished[needed] = rest
        return config

    def taps(self, weight: Tensor, stride: int, patch: int, backward: bool) -> tuple[Tensor, dict[str, int]]:
        """Return a weight for patches of this side, see `expand`, its strides, and the side of their windows.

        The expansion of a frozen weight is kept for as long as the weight exists; one that trains is expanded
        in every step.
        """
        window = len(_taps(weight.shape[2], stride, patch, backward, weight.device))
        if patch == 1:
            w_o, w_i, _, w_tap = weight.stride()
        else:
            # `_version` does not show that the optimiser has changed the vector of which a weight is a view.
            if weight.requires_grad:
                self.expanded.pop(weight, None)
            kept = {} if weight.requires_grad else self.expanded.setdefault(weight, {})
            key = (weight._version, stride, patch, backward)
            if key not in kept:
                kept[key] = expand(weight, stride, patch, backward)
            weight = kept[key]
            w_tap, inner, _, outer = weight.stride()
            w_o, w_i = (inner, outer) if backward else (outer, inner)
        return weight, {"W_O": w_o, "W_I": w_i, "W_TAP": w_tap, "P": patch, "WINDOW": window}

    def convolve(self, x, norm, weight, conv, bn=None):
        return self._convolve(x, norm, weight, conv, bn)

    def infer(self, x, weight, conv, norm, shortcut=None, relu=True):
        return self._convolve(x, None, weight, conv, after=(norm, shortcut, relu))[0]

    def _convolve(self, x, norm, weight, conv, bn=None, after=None):
        """Compute `convolve`; with `after` = (norm, shortcut, relu), also apply `activate` to the result."""

        def by_cudnn(bn: BatchNorm | None) -> tuple[Tensor, Tensor | None]:
            z, norm_z = TorchPasses.convolve(self, x, norm, weight, conv, bn)
            return (z, norm_z) if after is None else (self.activate(z, *after)[0], None)

        norm_after, shortcut, relu = after or (None, None, False)
        fewest = 3 if norm is None else 16
        covered = covers_conv(x, weight, conv, fewest) and covers(x, norm, bn and bn.gamma, multiple=1)
        covered = covered and x.numel() // x.shape[1] * weight.shape[0] < 2**31 * conv.stride[0] ** 2
        if not (covered and (after is None or covers(x, shortcut, norm_after, multiple=1))):
            return by_cudnn(bn)

        def compute(config: Config | None, bn: BatchNorm | None = bn) -> tuple[Tensor, Tensor | None]:
            if config is None:
                return by_cudnn(bn)
            shape = _shape(x.shape, weight, conv)
            z = empty_image(x, (len(x), shape["C_OUT"], shape["H_OUT"], shape["W_OUT"]))
            if config.patch > 1 and (z.shape[2] % config.patch or z.shape[3] % config.patch):
                raise NotImplementedError("the image is not a whole number of patches")
            taps, strides = self.taps(weight, shape["STRIDE"], config.patch, backward=False)
            constants = shape | strides | {"GROUP": group(config, shape["C_IN"], strides["WINDOW"])}
            depth, columns = constants["GROUP"] * shape["C_IN"], config.patch**2 * shape["C_OUT"]
            check_product(config, depth, columns, x.dtype)
            given = x, self.given(norm), taps, z, self.given(norm_after), shortcut
            kernel = triton_kernels.convolve
            return z, self.over(kernel, z, *given, of=bn, config=config, RELU=relu, **constants)

        def attempt(config: Config | None) -> tuple[Tensor | None, ...]:
            if bn is None:
                return compute(config)
            mean, var = bn.running_mean.clone(), bn.running_var.clone()  # bn's own must be updated only once
            z, norm = compute(config, bn._replace(running_mean=mean, running_var=var))
            self.finish(norm)
            return z, norm, mean, var

        # The key omits whether statistics are wanted: what is faster with them is also faster without.
        key = _key("convolve", x.shape, weight, conv, norm=norm, after=after, shortcut=shortcut)
        return compute(self.chosen(key, attempt, norm if after is None else norm_after))

    def convolve_backward(self, g, z, norm, sums, weight, conv, x_shape, below=None, add=None, dz=None):
        z_below, norm_below = below or (None, None)
        covered = covers(g, z, add, z_below, norm, sums, norm_below) and covers_conv(g, weight, conv)
        covered = covered and x_shape.numel() < 2**31

        def compute(config: Config | None) -> tuple[Tensor, Tensor | None]:
            if config is None:
                rest = weight, conv, x_shape, below, add, dz
                return TorchPasses.convolve_backward(self, g, z, norm, sums, *rest)
            dx, shape = empty_image(g, x_shape), _shape(x_shape, weight, conv)
            patch = max(config.patch, shape["STRIDE"])
            taps, strides = self.taps(weight, shape["STRIDE"], patch, backward=True)
            constants = shape | strides | {"GROUP": group(config, shape["C_OUT"], strides["WINDOW"])}
            depth, columns = constants["GROUP"] * shape["C_OUT"], patch**2 * shape["C_IN"]
            check_product(config, depth, columns, g.dtype)
            self.finish(norm, norm_below)
            given = g, z, norm, self.given(sums), taps, add, z_below, norm_below, dx
            kernel = triton_kernels.convolve_backward
            return dx, self.over(kernel, dx, *given, of=norm_below, config=config, **constants)

        def attempt(config: Config | None) -> tuple[Tensor, Tensor | None]:
            dx, sums_below = compute(config)
            self.finish(sums_below)
            return dx, sums_below

        if not covered:
            return compute(None)
        key = _key("convolve_backward", x_shape, weight, conv, below=below, add=add, dz=dz)
        return compute(self.chosen(key, attempt, sums))

    def norm(self, mean, var, bn):
        if mean.dtype != torch.float32:
            return super().norm(mean, var, bn)
        out = mean.new_empty(4, len(mean))
        self.unfinished[out] = Running(mean, var, bn.gamma, bn.beta, bn.eps)
        return out

    def statistics(self, z, bn):
        if not covers(z, bn.gamma):
            return super().statistics(z, bn)
        return self.over(triton_kernels.statistics, z, z, of=bn)

    def activate(self, z, norm, shortcut=None, relu=True, want_signs=False):
        if not covers(z, shortcut, norm):
            self.finish(norm)
            return super().activate(z, norm, shortcut, relu, want_signs)
        y, signs = torch.empty_like(z), z.new_empty(z.numel() // 8, dtype=torch.uint8) if want_signs else None
        self.over(triton_kernels.activate, z, z, self.given(norm), shortcut, y, signs, RELU=relu)
        return y, signs

    def mask_and_sum(self, dy, z, norm, signs=None, relu=True):
        self.finish(norm)
        if not covers(dy, z, norm):
            return super().mask_and_sum(dy, z, norm, signs, relu)
        g = torch.empty_like(dy) if relu or signs is not None else None
        sums = self.over(triton_kernels.mask_and_sum, z, dy, z, norm, signs, g, of=norm)
        return dy if g is None else g, sums

    def gradient(self, g, z, norm, sums):
        self.finish(norm)
        if not covers(g, z, norm, sums):
            self.finish(sums)
            return super().gradient(g, z, norm, sums)
        dz = torch.empty_like(z)
        self.over(triton_kernels.gradient, z, g, z, norm, self.given(sums), dz)
        return dz

    def head(self, features, fc, labels, smoothing, metrics, lrs=None, lr=None):
        (count, channels, height, width), classes = features.shape, fc.out_features
        block, block_classes = (1 << (size - 1).bit_length() for size in (height * width, classes))
        fits = channels & (channels - 1) == 0 and channels * max(block, block_classes) <= LARGEST_TILE
        if not (fits and covers(features) and fc.weight.dtype == torch.float32 and fc.weight.is_contiguous()):
            return None
        d_features, (losses, hits) = torch.empty_like(features), fc.weight.new_empty(2, count)
        given = features, fc.weight, fc.bias, labels, d_features, losses, hits, smoothing
        constants = {"HW": height * width, "C": channels, "CLASSES": classes, "BLOCK": block}
        self.launch(triton_kernels.head, (count,), *given, **constants, BLOCK_CLASSES=block_classes)
        given = losses, hits, *metrics, lrs, lr, count
        self.launch(triton_kernels.record, (1,), *given, STEP=min(1024, 1 << (count - 1).bit_length()))
        return d_features

    def batch(self, images, labels, order, draws, position, mean, std, dtype, pad):
        (_, count), (_, height, width, _), block = order.shape, images.shape, 256
        out = torch.empty(count, height, width, 3, dtype=dtype, device=images.device)
        out_labels, constants = labels.new_empty(count), {"H": height, "W": width, "DRAWS": draws.shape[2]}
        given, grid = (
            (images, labels, order, draws, position, mean, std, out, out_labels),
            -(-height * width // block),
        )
        self.launch(triton_kernels.batch, (count, grid), *given, **constants, PAD=pad, BLOCK=block)
        return out.permute(0, 3, 1, 2), out_labels


def covers(*tensors: Tensor | None, multiple: int = 8) -> bool:
    """Return whether the kernels accept these tensors; None stands for an absent one.

    Images (4-D) must be channels_last and of one dtype in DTYPES; per-channel values must be float32. Offsets
    must fit 32 bits. The number of channels must be a multiple of `multiple`, by default 8, because one byte
    holds eight signs.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    images = [tensor for tensor in given if tensor.ndim == 4]
    return (
        images[0].dtype in DTYPES
        and all(t.dtype == (images[0].dtype if t.ndim == 4 else torch.float32) for t in given)
        and all(image.is_contiguous(memory_format=torch.channels_last) for image in images)
        and all(image.shape[1] % multiple == 0 and image.numel() < 2**31 for image in images)
    )


def covers_conv(image: Tensor, weight: Tensor, conv: Conv, fewest: int = 16) -> bool:
    """Return whether the kernels accept this convolution.

    It must be 1x1 or 3x3, with stride 1 or 2, "same" padding, and channels that fit one tile. `fewest` is one
    more permitted number of input channels, such as the 3 of an image.
    """
    c_out, c_in, k, width = weight.shape
    # In fp32, which has no matrix instruction, kernels for 128 channels take a minute to compile.
    tiles = (16, 32, 64) if weight.dtype == torch.float32 else (16, 32, 64, 128)
    return (
        weight.dtype == image.dtype
        and k == width in (1, 3)
        and (k == 1 or weight.stride(2) == k * weight.stride(3))
        and tuple(conv.padding) == (k // 2, k // 2)
        and tuple(conv.stride) in ((1, 1), (2, 2))
        and c_out in tiles
        and c_in in (fewest, *tiles)
    )


def _shape(x_shape: Sequence[int], weight: Tensor, conv: Conv) -> dict[str, int]:
    """Return the shape constants that both convolution kernels take."""
    (c_out, c_in, k, _), (h, w), stride = weight.shape, x_shape[2:], conv.stride[0]
    return {
        "H": h, "W": w, "H_OUT": (h - 1) // stride + 1, "W_OUT": (w - 1) // stride + 1,
        "C_IN": c_in, "C_OUT": c_out, "K": k, "STRIDE": stride,
    }  # fmt: skip


def expand(weight: Tensor, stride: int, patch: int, backward: bool) -> Tensor:
    """Return `weight`, `[C_out, C_in, k, k]`, expanded for matrix products that compute whole patches.

    The result is `[window pixels, contracted channels, P P, channels]`. A window starts at the first input of
    a patch of outputs; backward, at the last output to which a patch of inputs contributes.
    """
    taps = _taps(weight.shape[2], stride, patch, backward, weight.device)
    spread = F.pad(weight, (0, 1, 0, 1))[:, :, taps][..., taps]  # [C_out, C_in, window, P, window, P]
    spread = spread.permute(2, 4, 0, 3, 5, 1) if backward else spread.permute(2, 4, 1, 3, 5, 0)
    return spread.flatten(0, 1).flatten(2, 3).contiguous()


@functools.cache
def _taps(k: int, stride: int, patch: int, backward: bool, device: torch.device) -> Tensor:
    """Return the tap that joins each window pixel to each patch pixel on one axis, int64 `[window, patch]`.

    Where no tap joins them, the entry is k, the index just past the last tap.
    """
    in_patch = torch.arange(patch)
    if backward:
        first, last = -(k // 2 // stride), (patch - 1 + k // 2) // stride
        taps = in_patch + k // 2 - stride * torch.arange(last, first - 1, -1)[:, None]
    else:
        taps = torch.arange(stride * (patch - 1) + k)[:, None] - stride * in_patch
    taps = torch.where((taps >= 0) & (taps < k), taps, k)
    return taps.to(device)  # complete once this returns, for other streams too


def group(config: Config, channels: int, window: int) -> int:
    """Return how many pixels of a window of this side a program gathers at once.

    A matrix product needs at least 16 columns, and an image's 3 channels are padded to 4.
    """
    wide, taps = max(4, channels), 1 << (window**2 - 1).bit_length()
    return max(16 // wide, min(config.depth // wide, taps), 1)


def check_product(config: Config, depth: int, columns: int, dtype: torch.dtype) -> None:
    """Raise NotImplementedError if a product `[block, depth]` by `[depth, columns]` needs too many registers.

    In fp32, which has no matrix instruction, every multiplication of a thread is an instruction of its own.
    """
    unrolled = config.block * depth * columns // (32 * config.warps) if dtype == torch.float32 else 0
    if columns > WIDEST or unrolled > UNROLLED:
        raise NotImplementedError(f"{config} needs too many registers for {depth} by {columns} values")


def empty_image(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _key(name: str, x_shape: Sequence[int], weight: Tensor, conv: Conv, **optional) -> str:
    """Return the key of a choice: what it depends on, with the batch size rounded up to a power of two.

    Whether the weight trains is part of it, because it is then expanded in every step.
    """
    (c_out, c_in, k, _), (n, _, h, w) = weight.shape, x_shape
    optional["trains"] = True if weight.requires_grad else None
    flags = "".join(f" {flag}" for flag, value in optional.items() if value is not None)
    batch = 1 << (n - 1).bit_length()
    return f"{name} {c_in}->{c_out} {h}x{w} k{k} s{conv.stride[0]} n{batch} {DTYPES[weight.dtype]}{flags}"


def _choices_file(device: str) -> Path:
    """Return the choices file's path in the cache folder; its name depends on all that affects the times."""
    modules = triton_kernels, triton_sums, choices, reference
    sources = [Path(path).read_text() for path in (__file__, *(module.__file__ for module in modules))]
    versions = [triton.__version__, torch.__version__, device]
    key = hashlib.sha256("\n".join([*sources, *versions]).encode()).hexdigest()[:16]
    return cache_folder() / f"kernels-{key}.json"
