"""The passes for CPUs, in C++: kernels_cpu.cpp, compiled for this very processor on first use and kept."""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.reference import TorchPasses, cache_folder

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = "-std=c++17 -O3 -march=native -mprefer-vector-width=512 -fno-math-errno -fno-trapping-math"
FLAGS += " -fopenmp -shared -fPIC"
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@functools.cache
def passes() -> TorchPasses:
    """The compiled passes; PyTorch's, where there is no C++ compiler."""
    try:
        return _CpuPasses(ctypes.CDLL(str(_library())))
    except (OSError, subprocess.CalledProcessError):
        return TorchPasses()


def _library() -> Path:
    """The compiled file, from the user's cache; named by the source, the flags and the processor."""
    compiler = os.environ.get("CXX", "g++")
    processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    kind = [line for line in processor.splitlines() if line.startswith(("model", "flags"))]
    key = hashlib.sha256("\n".join([SOURCE.read_text(), compiler, FLAGS, *kind]).encode()).hexdigest()[:16]
    cache = cache_folder()
    library = cache / f"kernels-{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # a file that is there is whole
            made = Path(folder) / library.name
            subprocess.run([compiler, *FLAGS.split(), SOURCE, "-o", made], check=True, capture_output=True)
            made.replace(library)
    return library


# Arguments of the C++ functions: tensors are addresses or None, sizes 64 bits.
_TENSOR, _SIZE, _FLAG, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
_SIGNATURES = {
    "statistics": (_TENSOR, _SIZE, _SIZE, _TENSOR, _TENSOR, _NUMBER, _NUMBER, _TENSOR, _TENSOR, _TENSOR),
    "activate": (_TENSOR, _SIZE, _SIZE, _TENSOR, _TENSOR, _FLAG, _TENSOR, _TENSOR),
    "sum_gradients": (_TENSOR, _TENSOR, _SIZE, _SIZE, _TENSOR, _TENSOR, _FLAG, _TENSOR),
    "gradient": (_TENSOR, _TENSOR, _SIZE, _SIZE, _TENSOR, _TENSOR, _FLAG, _TENSOR, _TENSOR),
    "add_masked": (_TENSOR, _SIZE, _TENSOR, _TENSOR),
}


def _covers(z: torch.Tensor, per_channel: torch.Tensor) -> bool:
    channels = z.shape[1]
    return (
        z.dtype in _DTYPES
        and per_channel.dtype == torch.float32
        and (64 % channels == 0 or channels % 64 == 0)
        and z.numel() % 64 == 0
        and z.is_contiguous(memory_format=torch.channels_last)
    )


class _Masked(NamedTuple):
    """g, as what it is made of: `dy` where the unit's output was positive."""

    dy: torch.Tensor
    signs: torch.Tensor | None
    relu: bool


class _CpuPasses(TorchPasses):
    def __init__(self, library: ctypes.CDLL):
        self.functions = {}
        for name, signature in _SIGNATURES.items():
            for dtype, suffix in _DTYPES.items():
                function = self.functions[name, dtype] = getattr(library, f"{name}_{suffix}")
                function.argtypes, function.restype = signature, None
        self.temporaries = {}

    def call(self, name: str, dtype: torch.dtype, *arguments) -> None:
        self.functions[name, dtype](*[a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments])

    def temporary(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A tensor like `like` that lasts until the next of its name: memory that is in the cache already."""
        key = name, like.dtype, like.shape
        if key not in self.temporaries:
            memory = self.temporaries.get((name, like.dtype))
            if memory is None or memory.numel() < like.numel():
                memory = self.temporaries[name, like.dtype] = like.new_empty(like.numel())
            self.temporaries[key] = memory[: like.numel()].as_strided(like.shape, like.stride())
        return self.temporaries[key]

    def convolve(self, x, norm, weight, conv, bn=None):
        if norm is not None and _covers(x, norm):
            x, norm = self.activate(x, norm, out=self.temporary("x", x))[0], None
        return super().convolve(x, norm, weight, conv, bn)

    def statistics(self, z, bn):
        if not _covers(z, bn.weight):
            return super().statistics(z, bn)
        norm = torch.empty(4, z.shape[1])
        constants = bn.weight, bn.bias, bn.eps, bn.momentum
        self.call(
            "statistics", z.dtype, z, z.numel(), z.shape[1], *constants, bn.running_mean, bn.running_var, norm
        )
        return norm

    def activate(self, z, norm, shortcut=None, relu=True, want_signs=False, out=None):
        if not _covers(z, norm):
            return super().activate(z, norm, shortcut, relu, want_signs)
        y = torch.empty_like(z) if out is None else out
        signs = torch.empty(z.numel() // 8, dtype=torch.uint8) if want_signs else None
        self.call("activate", z.dtype, z, z.numel(), z.shape[1], norm, shortcut, relu, y, signs)
        return y, signs

    def mask_and_sum(self, dy, z, norm, signs=None, relu=True):
        if not _covers(z, norm):
            return super().mask_and_sum(dy, z, norm, signs, relu)
        sums = torch.empty_like(norm)
        self.call("sum_gradients", z.dtype, dy, z, z.numel(), z.shape[1], norm, signs, relu, sums)
        return _Masked(dy, signs, relu) if relu else dy, sums

    def whole(self, g):
        return self.add_masked(torch.zeros_like(g.dy), g) if isinstance(g, _Masked) else g

    def add_masked(self, dx, g):
        self.call("add_masked", dx.dtype, g.dy, dx.numel(), g.signs, dx)
        return dx

    def gradient(self, g, z, norm, sums):
        if not isinstance(g, _Masked):
            if not _covers(z, norm):
                return super().gradient(g, z, norm, sums)
            g = _Masked(g, None, False)
        dz, sizes = self.temporary("dz", z), (z.numel(), z.shape[1])
        self.call("gradient", z.dtype, g.dy, z, *sizes, norm, g.signs, g.relu, sums, dz)
        return dz

    def convolve_backward(self, g, z, norm, sums, weight, conv, x_shape, below=None, add=None, dz=None):
        masked = isinstance(add, _Masked)
        rest = weight, conv, x_shape, below, None if masked else add, dz
        dx, sums_below = super().convolve_backward(g, z, norm, sums, *rest)
        return self.add_masked(dx, add) if masked else dx, sums_below
