"""The passes for CUDA GPUs: the Triton kernels of triton_kernels.py, where they are faster than cuDNN's.

When a convolution loads its input, it applies the BatchNorm and ReLU of the unit below (forward), or forms
the gradient through the BatchNorm above (backward); when it stores its output, it also sums what the next
BatchNorm needs. Each program writes its own sums, which a second kernel adds up in a fixed order, so that a
step gives the same bits every time.

Whether this is faster than cuDNN between elementwise kernels, and in blocks of which size, is measured for
each layer when it is first computed, and remembered.
"""

import contextlib
import functools
import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.device import cache_folder
from kernels.reference import BatchNorm, Conv, TorchPasses

try:
    import triton

    from kernels import triton_kernels
except ImportError:  # `passes` warns of it
    triton = triton_kernels = None


class Config(NamedTuple):
    """How a kernel is launched: positions per program, warps that share them, and loads in flight."""

    block: int
    warps: int
    stages: int


# Computes a convolution as the Config says, or by cuDNN for None; has all results, and no lasting effect.
Attempt = Callable[[Config | None], Sequence[Tensor | None]]

CONFIGS = (Config(64, 4, 1), Config(64, 4, 3), Config(128, 4, 3), Config(128, 8, 3), Config(256, 8, 1))
ELEMENTWISE = Config(0, 4, 1)
TILE = 2048  # elements per program of an elementwise kernel
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 4e-2, torch.float16: 8e-3}  # cuDNN's fp32 may be TF32


@functools.cache
def passes() -> TorchPasses:
    """Triton's passes; or a warning and PyTorch's, where Triton is missing or lacks, say, a C compiler."""
    try:
        if triton is None:
            raise ImportError("Triton is not installed")
        made = CudaPasses(Choices(_choices_file(torch.cuda.get_device_name())))
        z = torch.ones(2, 8, 1, 1, device="cuda").contiguous(memory_format=torch.channels_last)
        made.activate(z, torch.ones(4, 8, device="cuda"))
    except Exception as error:  # training is possible without Triton, whatever is wrong
        warnings.warn(f"Triton fails; PyTorch's slower kernels are used ({error!r})", stacklevel=2)
        return TorchPasses()
    return made


class CudaPasses(TorchPasses):
    """`choose` gives a convolution's Config, or None for cuDNN between elementwise kernels; see Choices."""

    name = "triton"

    def __init__(self, choose: Callable[[str, Attempt], Config | None]):
        self.choose = choose

    def launch(self, kernel, grid: tuple[int, ...], *arguments, config: Config = ELEMENTWISE, **constants):
        kernel[grid](*arguments, **constants, num_warps=config.warps, num_stages=config.stages)

    def over(self, kernel, image: Tensor, *arguments, of=None, config: Config = ELEMENTWISE, **constants):
        """Launch `kernel` over the positions of `image`, and with `of` what finishes its partial sums.

        Returns the norm of `image` if `of` is a BatchNorm, and the sums of a gradient if it is a norm.
        """
        channels, block, block_c = image.shape[1], config.block, image.shape[1]
        if config is ELEMENTWISE:  # in tiles of up to 64 channels
            block_c = min(64, channels & -channels)
            block = TILE // block_c
            constants |= {"C": channels, "BLOCK_C": block_c}
        positions = image.numel() // channels
        grid = programs, _ = -(-positions // block), channels // block_c
        empty = functools.partial(image.new_empty, dtype=torch.float32)
        partial, out = (None, None) if of is None else (empty(2, channels, programs), empty(4, channels))
        last = (partial, positions) if "partial" in kernel.arg_names else (positions,)
        self.launch(kernel, grid, *arguments, *last, config=config, BLOCK=block, **constants)
        counts = partial, out, positions, programs
        if isinstance(of, BatchNorm):
            self.launch(triton_kernels.finish_norm, (channels,), *counts, *of, C=channels, BLOCK=block)
        elif of is not None:
            self.launch(triton_kernels.finish_sums, (channels,), *counts, of, C=channels)
        return out

    def convolve(self, x, norm, weight, conv, bn=None):
        fewest = 3 if norm is None else 16
        if not (covers_conv(x, weight, conv, fewest) and covers(x, norm, bn and bn.gamma, multiple=1)):
            return super().convolve(x, norm, weight, conv, bn)

        def compute(config: Config | None, bn: BatchNorm | None) -> tuple[Tensor, Tensor | None]:
            if config is None:
                return TorchPasses.convolve(self, x, norm, weight, conv, bn)
            shape = _shape(x.shape, weight, conv)
            z = empty_image(x, (len(x), shape["C_OUT"], shape["H_OUT"], shape["W_OUT"]))
            return z, self.over(triton_kernels.convolve, z, x, norm, weight, z, of=bn, config=config, **shape)

        def attempt(config: Config | None) -> tuple[Tensor | None, ...]:
            if bn is None:
                return compute(config, None)
            mean, var = bn.running_mean.clone(), bn.running_var.clone()  # bn's own must move only once
            return *compute(config, bn._replace(running_mean=mean, running_var=var)), mean, var

        # Whether statistics are wanted is not in the key: what is faster with them is faster without.
        key = _key("convolve", x.shape, weight, conv, norm=norm)
        return compute(self.choose(key, attempt), bn)

    def convolve_backward(self, g, z, norm, sums, weight, conv, x_shape, below=None, add=None, dz=None):
        z_below, norm_below = below or (None, None)
        covered = covers(g, z, add, z_below, norm, sums, norm_below) and covers_conv(g, weight, conv)
        covered = covered and x_shape.numel() < 2**31

        def compute(config: Config | None) -> tuple[Tensor, Tensor | None]:
            if config is None:
                rest = weight, conv, x_shape, below, add, dz
                return TorchPasses.convolve_backward(self, g, z, norm, sums, *rest)
            dx, shape = empty_image(g, x_shape), _shape(x_shape, weight, conv)
            tensors = g, z, norm, sums, weight, add, z_below, norm_below, dx
            kernel = triton_kernels.convolve_backward
            return dx, self.over(kernel, dx, *tensors, of=norm_below, config=config, **shape)

        if not covered:
            return compute(None)
        key = _key("convolve_backward", x_shape, weight, conv, below=below, add=add, dz=dz)
        return compute(self.choose(key, compute))

    def statistics(self, z, bn):
        if not covers(z, bn.gamma):
            return super().statistics(z, bn)
        return self.over(triton_kernels.statistics, z, z, of=bn)

    def activate(self, z, norm, shortcut=None, relu=True, want_signs=False):
        if not covers(z, shortcut, norm):
            return super().activate(z, norm, shortcut, relu, want_signs)
        y, signs = torch.empty_like(z), z.new_empty(z.numel() // 8, dtype=torch.uint8) if want_signs else None
        self.over(triton_kernels.activate, z, z, norm, shortcut, y, signs, RELU=relu)
        return y, signs

    def mask_and_sum(self, dy, z, norm, signs=None, relu=True):
        if not covers(dy, z, norm):
            return super().mask_and_sum(dy, z, norm, signs, relu)
        g = torch.empty_like(dy) if relu or signs is not None else None
        sums = self.over(triton_kernels.mask_and_sum, z, dy, z, norm, signs, g, of=norm)
        return dy if g is None else g, sums

    def gradient(self, g, z, norm, sums):
        if not covers(g, z, norm, sums):
            return super().gradient(g, z, norm, sums)
        dz = torch.empty_like(z)
        self.over(triton_kernels.gradient, z, g, z, norm, sums, dz)
        return dz


def covers(*tensors: Tensor | None, multiple: int = 8) -> bool:
    """Whether the kernels take these images, channels_last and of one dtype, and float32 values per channel.

    Offsets must fit 32 bits, and channels be a multiple of `multiple`: 8, as a byte holds the signs of eight.
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
    """Whether the kernels take this convolution: 1x1 or 3x3, with "same" padding, and channels of one tile.

    `fewest` input channels are allowed, too: the 3 of an image.
    """
    c_out, c_in, k, width = weight.shape
    # In fp32, without a matrix instruction, 128 channels take a minute to compile.
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
    """The constants that both convolution kernels take."""
    (c_out, c_in, k, _), (h, w), stride = weight.shape, x_shape[2:], conv.stride[0]
    return {
        "H": h, "W": w, "H_OUT": (h - 1) // stride + 1, "W_OUT": (w - 1) // stride + 1,
        "C_IN": c_in, "C_OUT": c_out, "K": k, "STRIDE": stride,
        "W_O": weight.stride(0), "W_I": weight.stride(1), "W_TAP": weight.stride(3),
    }  # fmt: skip


def empty_image(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _key(name: str, x_shape: Sequence[int], weight: Tensor, conv: Conv, **optional) -> str:
    """What a choice depends on; the batch size is rounded up to a power of two."""
    (c_out, c_in, k, _), (n, _, h, w) = weight.shape, x_shape
    flags = "".join(f" {flag}" for flag, value in optional.items() if value is not None)
    batch = 1 << (n - 1).bit_length()
    return f"{name} {c_in}->{c_out} {h}x{w} k{k} s{conv.stride[0]} n{batch} {DTYPES[weight.dtype]}{flags}"


def _choices_file(device: str) -> Path:
    """A file in the cache folder, named by all that the times depend on."""
    sources = [path.read_text() for path in (Path(__file__), Path(triton_kernels.__file__))]
    versions = [triton.__version__, torch.__version__, device]
    key = hashlib.sha256("\n".join([*sources, *versions]).encode()).hexdigest()[:16]
    return cache_folder() / f"kernels-{key}.json"


class Choices:
    """For each key the fastest way with right results, found on first use and kept in `file`; None is cuDNN.

    Nothing can be tried while a graph is captured: what was not computed before is left to cuDNN there.
    """

    def __init__(self, file: Path):
        self.file = file
        self.made = self.read()

    def __call__(self, key: str, attempt: Attempt) -> Config | None:
        if key not in self.made:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return None
            expected = attempt(None)
            if not all(bool(tensor.isfinite().all()) for tensor in expected if tensor is not None):
                return None  # fp16's loss scale is still too high: there is nothing to compare with
            self.made[key] = self.fastest(attempt, expected)
            self.write()
        return self.made[key] and Config(*self.made[key])

    def fastest(self, attempt: Attempt, expected: Sequence[Tensor | None]) -> Config | None:
        times = {None: seconds(lambda: attempt(None))}
        for config in CONFIGS:
            with contextlib.suppress(Exception):  # it does not compile, or needs more than this GPU has
                if agrees(attempt(config), expected):
                    times[config] = seconds(functools.partial(attempt, config))
        return min(times, key=times.get)

    def read(self) -> dict[str, list[int] | None]:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self.file.read_text())
        return {}

    def write(self) -> None:
        """Add to the file what is new. Where it cannot be written, every process measures anew."""
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.file.parent) as folder:
                made = Path(folder) / self.file.name
                made.write_text(json.dumps(self.read() | self.made, indent=1))
                made.replace(self.file)


def agrees(out: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    """Whether results are as near as the dtype allows; `[4, C]` row by row, because rows differ in scale."""
    tolerance = TOLERANCE[expected[0].dtype]

    def near(one: Tensor, other: Tensor) -> bool:
        if other.ndim == 2:
            return all(map(near, one, other))
        return bool((one.float() - other.float()).norm() <= tolerance * other.float().norm())

    return all(near(a, b) for a, b in zip(out, expected, strict=True) if b is not None)


def seconds(call: Callable[[], object], calls: int = 10, replays: int = 5) -> float:
    """The time of one call among several in a CUDA graph, in its fastest replay."""
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # whatever a loader's threads do
        for _ in range(calls):
            call()
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return min(times)
