"""The passes for CUDA GPUs: the Triton kernels of kernels_triton.py, where they beat cuDNN.

As a convolution loads, it applies the BatchNorm and ReLU below it (forward) or forms the gradient through the
BatchNorm above it (backward); as it stores, it sums what the next BatchNorm needs. Every program writes sums
of its own and a second kernel adds them up in a fixed order, so that a step gives the same bits each time.

Whether this, and in blocks of which size, is faster than cuDNN between elementwise kernels is measured for
each layer when it first runs, and remembered.
"""

import contextlib
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

from kernels.reference import Conv, TorchPasses, cache_folder

try:
    import triton

    from kernels import triton_kernels as kernels
except ImportError:  # see passes
    triton = kernels = None


class Config(NamedTuple):
    """How a kernel is cut: positions in a program's block, warps that share it, loads in flight."""

    block: int
    warps: int
    stages: int


# Runs a convolution in one way, without lasting effect, and gives all that it computes.
Attempt = Callable[[Config | None], Sequence[torch.Tensor | None]]

CONFIGS = (
    Config(64, 4, 1),
    Config(64, 4, 3),
    Config(128, 4, 3),
    Config(128, 8, 3),
    Config(256, 8, 1),
)
ELEMENTWISE, TILE = Config(0, 4, 1), 2048  # elements in a program of the elementwise kernels
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 4e-2, torch.float16: 8e-3}  # cuDNN's fp32 may be TF32


@functools.cache
def passes() -> TorchPasses:
    """Triton's passes; PyTorch's, where Triton is missing, or lacks what it needs to run (a C compiler)."""
    if triton is None or not torch.cuda.is_available():
        return TorchPasses()
    try:
        made = CudaPasses(Choices(_choices_file(torch.cuda.get_device_name())))
        z = torch.ones(2, 8, 1, 1, device="cuda").contiguous(memory_format=torch.channels_last)
        made.activate(z, torch.ones(4, 8, device="cuda"))
    except Exception:  # whatever it is, training is possible without
        return TorchPasses()
    return made


class CudaPasses(TorchPasses):
    """`choose` says how a convolution is run, None being cuDNN between elementwise kernels: see Choices."""

    def __init__(self, choose: Callable[[str, Attempt], Config | None]):
        self.choose = choose

    def launch(self, kernel, grid: tuple[int, ...], *arguments, config: Config = ELEMENTWISE, **constants):
        kernel[grid](*arguments, **constants, num_warps=config.warps, num_stages=config.stages)

    def convolve(self, x, norm, weight, conv, bn=None):
        per_channel = [norm, None if bn is None else bn.weight]
        if not (_covers_conv(x, weight, conv, 3 if norm is None else 16) and _covers([x], per_channel, 1)):
            return super().convolve(x, norm, weight, conv, bn)

        def run(config: Config | None, bn: nn.BatchNorm2d | None) -> tuple[torch.Tensor, torch.Tensor | None]:
            if config is None:
                return TorchPasses.convolve(self, x, norm, weight, conv, bn)
            shape = _shape(x.shape, weight, conv)
            z = empty_image(x, (len(x), shape["C_OUT"], shape["H_OUT"], shape["W_OUT"]))
            positions, programs = _grid(z, config.block)
            partial = None if bn is None else _partial(z, programs)
            shape |= {"BLOCK": config.block, "BLOCK_IN": max(16, shape["C_IN"])}
            arguments = x, norm, weight, z, partial, positions
            self.launch(kernels.convolve, (programs,), *arguments, config=config, **shape)
            return z, None if bn is None else self.finish_norm(partial, z, bn, config.block)

        def attempt(config: Config | None) -> list[torch.Tensor]:
            spare = None if bn is None else _spare(bn)
            moved = [] if bn is None else [spare.running_mean, spare.running_var]
            return [*run(config, spare), *moved]

        flags = (
            "" if norm is None else " norm"
        )  # with statistics or without: what is faster for one is for both
        return run(self.choose(_key("convolve", x.shape, weight, conv, flags), attempt), bn)

    def convolve_backward(self, g, z, norm, sums, weight, conv, x_shape, below=None, add=None, dz=None):
        z_below, norm_below = below or (None, None)
        covered = _covers([g, z, add, z_below], [norm, sums, norm_below])
        if not (covered and _covers_conv(g, weight, conv) and x_shape.numel() < 2**31):
            return super().convolve_backward(g, z, norm, sums, weight, conv, x_shape, below, add, dz)

        def run(config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:
            if config is None:
                rest = weight, conv, x_shape, below, add, dz
                return TorchPasses.convolve_backward(self, g, z, norm, sums, *rest)
            dx = empty_image(g, x_shape)
            positions, programs = _grid(dx, config.block)
            partial = None if below is None else _partial(dx, programs)
            tensors = g, z, norm, sums, weight, add, z_below, norm_below, dx, partial
            shape = _shape(x_shape, weight, conv) | {"BLOCK": config.block}
            self.launch(kernels.convolve_backward, (programs,), *tensors, positions, config=config, **shape)
            return dx, None if below is None else self.finish_sums(partial, dx, norm_below)

        extras = {"below": below, "add": add, "dz": dz}
        flags = "".join(f" {name}" for name, extra in extras.items() if extra is not None)
        return run(self.choose(_key("convolve_backward", x_shape, weight, conv, flags), run))

    def statistics(self, z, bn):
        if not _covers([z], [bn.weight]):
            return super().statistics(z, bn)
        grid, positions, tile = _tiles(z)
        partial = _partial(z, grid[0])
        self.launch(kernels.statistics, grid, z, partial, positions, **tile)
        return self.finish_norm(partial, z, bn, tile["BLOCK"])

    def finish_norm(self, partial: torch.Tensor, z: torch.Tensor, bn: nn.BatchNorm2d, block: int):
        """The norm of z's batch, from sums over every `block` positions, `[2, C, programs]`."""
        channels, programs = partial.shape[1:]
        norm = z.new_empty(4, channels, dtype=torch.float32)
        tensors = partial, bn.weight, bn.bias, bn.running_mean, bn.running_var, norm
        scalars = z.numel() // channels, programs, bn.eps, bn.momentum
        self.launch(kernels.finish_norm, (channels,), *tensors, *scalars, C=channels, BLOCK=block, STEP=1024)
        return norm

    def finish_sums(self, partial: torch.Tensor, g: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """The sums of g, likewise."""
        channels, programs = partial.shape[1:]
        sums, positions = torch.empty_like(norm), g.numel() // channels
        arguments = partial, norm, sums, positions, programs
        self.launch(kernels.finish_sums, (channels,), *arguments, C=channels, STEP=1024)
        return sums

    def activate(self, z, norm, shortcut=None, relu=True, want_signs=False):
        if not _covers([z, shortcut], [norm]):
            return super().activate(z, norm, shortcut, relu, want_signs)
        y, (grid, positions, tile) = empty_image(z, z.shape), _tiles(z)
        signs = z.new_empty(z.numel() // 8, dtype=torch.uint8) if want_signs else None
        self.launch(kernels.activate, grid, z, norm, shortcut, y, signs, positions, RELU=relu, **tile)
        return y, signs

    def mask_and_sum(self, dy, z, norm, signs=None, relu=True):
        if not _covers([dy, z], [norm]):
            return super().mask_and_sum(dy, z, norm, signs, relu)
        masked = relu or signs is not None
        g, (grid, positions, tile) = empty_image(dy, dy.shape) if masked else None, _tiles(z)
        partial = _partial(z, grid[0])
        self.launch(kernels.mask_and_sum, grid, dy, z, norm, signs, g, partial, positions, **tile)
        return g if masked else dy, self.finish_sums(partial, z, norm)

    def gradient(self, g, z, norm, sums):
        if not _covers([g, z], [norm, sums]):
            return super().gradient(g, z, norm, sums)
        dz, (grid, positions, tile) = empty_image(z, z.shape), _tiles(z)
        self.launch(kernels.gradient, grid, g, z, norm, sums, dz, positions, **tile)
        return dz


def _covers(
    images: Sequence[torch.Tensor | None], per_channel: Sequence[torch.Tensor | None], multiple: int = 8
) -> bool:
    """One dtype, channels_last, channels a multiple (signs come in eights), offsets that fit 32 bits."""
    images = [image for image in images if image is not None]
    return (
        images[0].dtype in DTYPES
        and all(image.dtype == images[0].dtype for image in images)
        and all(image.is_contiguous(memory_format=torch.channels_last) for image in images)
        and all(image.shape[1] % multiple == 0 and image.numel() < 2**31 for image in images)
        and all(values is None or values.dtype == torch.float32 for values in per_channel)
    )


def _covers_conv(image: torch.Tensor, weight: torch.Tensor, conv: Conv, smallest: int = 16) -> bool:
    """Square windows of 1 or 3 with "same" padding; channels that make one tile, or the three of an image."""
    c_out, c_in, k, width = weight.shape
    # Without a matrix instruction, as in fp32, 128 channels take a minute to compile.
    tiles = (16, 32, 64) if weight.dtype == torch.float32 else (16, 32, 64, 128)
    return (
        weight.dtype == image.dtype
        and k == width
        and k in (1, 3)
        and (k == 1 or weight.stride(2) == k * weight.stride(3))
        and tuple(conv.padding) == (k // 2, k // 2)
        and tuple(conv.stride) in ((1, 1), (2, 2))
        and c_out in tiles
        and c_in in (smallest, *tiles)
    )


def _shape(x_shape: Sequence[int], weight: torch.Tensor, conv: Conv) -> dict[str, int]:
    """The constants that both convolution kernels take."""
    (c_out, c_in, k, _), (h, w), stride = weight.shape, x_shape[2:], conv.stride[0]
    sizes = {"H": h, "W": w, "C_IN": c_in, "H_OUT": (h - 1) // stride + 1, "W_OUT": (w - 1) // stride + 1}
    strides = {"W_O": weight.stride(0), "W_I": weight.stride(1), "W_TAP": weight.stride(3)}
    return {**sizes, "C_OUT": c_out, "K": k, "STRIDE": stride, **strides}


def _grid(image: torch.Tensor, block: int) -> tuple[int, int]:
    """Positions, and the programs that share them."""
    positions = image.numel() // image.shape[1]
    return positions, -(-positions // block)


def _tiles(image: torch.Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Grid, positions and constants of an elementwise kernel: tiles of up to 64 channels."""
    channels = image.shape[1]
    tile = {"C": channels, "BLOCK_C": min(64, channels & -channels)}
    tile["BLOCK"] = TILE // tile["BLOCK_C"]
    positions, programs = _grid(image, tile["BLOCK"])
    return (programs, channels // tile["BLOCK_C"]), positions, tile


def _partial(image: torch.Tensor, programs: int) -> torch.Tensor:
    return image.new_empty(2, image.shape[1], programs, dtype=torch.float32)


def empty_image(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _spare(bn: nn.BatchNorm2d) -> SimpleNamespace:
    """What the passes ask of `bn`, with running statistics that may be spoilt."""
    moved = {name: getattr(bn, name).clone() for name in ("running_mean", "running_var")}
    return SimpleNamespace(weight=bn.weight, bias=bn.bias, eps=bn.eps, momentum=bn.momentum, **moved)


# Which Config, or cuDNN: measured once a machine.


def _key(name: str, x_shape: Sequence[int], weight: torch.Tensor, conv: Conv, flags: str) -> str:
    """Batches within a factor of two share a choice."""
    (c_out, c_in, k, _), (n, _, h, w) = weight.shape, x_shape
    batch = 1 << (n - 1).bit_length()
    return f"{name} {c_in}->{c_out} {h}x{w} k{k} s{conv.stride[0]} n{batch} {DTYPES[weight.dtype]}{flags}"


def _choices_file(device: str) -> Path:
    """In the user's cache; named by all that the times depend on."""
    sources = [path.read_text() for path in (Path(__file__), Path(kernels.__file__))]
    versions = [triton.__version__, torch.__version__, device]
    key = hashlib.sha256("\n".join([*sources, *versions]).encode()).hexdigest()[:16]
    return cache_folder() / f"kernels-{key}.json"


class Choices:
    """The fastest way for each key that is right. Tried on first use, and kept in `file` for later processes.

    Nothing can be tried while a graph is captured: what has not run before is left to cuDNN there.
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
        chosen = self.made[key]
        return None if chosen is None else Config(*chosen)

    def fastest(self, attempt: Attempt, expected: Sequence[torch.Tensor | None]) -> Config | None:
        times = {None: seconds(lambda: attempt(None))}
        for config in CONFIGS:
            with contextlib.suppress(Exception):  # does not compile, or asks for more than this GPU has
                if agrees(attempt(config), expected):
                    times[config] = seconds(functools.partial(attempt, config))
        return min(times, key=times.get)

    def read(self) -> dict[str, list[int] | None]:
        try:
            return json.loads(self.file.read_text())
        except (OSError, ValueError):
            return {}

    def write(self) -> None:
        """With what other processes have found meanwhile. A machine without a cache measures every time."""
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.file.parent) as folder:
                made = Path(folder) / self.file.name
                made.write_text(json.dumps({**self.read(), **self.made}, indent=1))
                made.replace(self.file)


def agrees(out: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]) -> bool:
    """Within what the dtype can tell apart; row by row what is kept per channel, for rows differ in scale."""
    tolerance = TOLERANCE[expected[0].dtype]
    for one, other in zip(out, expected, strict=True):
        if other is None:
            continue
        rows = zip(one, other, strict=True) if other.ndim == 2 else [(one, other)]
        for a, b in rows:
            a, b = a.float(), b.float()
            if not (a - b).norm() <= tolerance * b.norm():
                return False
    return True


def seconds(call: Callable[[], object], calls: int = 10, replays: int = 5) -> float:
    """Of one call among several in a CUDA graph; the best replay's."""
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
