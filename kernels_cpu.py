"""The passes for CPUs, in C++: kernels_cpu.cpp, compiled for this very processor on first use and kept."""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import nn

from kernels_torch import TorchPasses

SOURCE = Path(__file__).with_name("kernels_cpu.cpp")
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
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchnorm-only"
    library = cache / f"kernels-{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # a file that is there is whole
            made = Path(folder) / library.name
            subprocess.run([compiler, *FLAGS.split(), SOURCE, "-o", made], check=True, capture_output=True)
            made.replace(library)
    return library


def _address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _size(z: torch.Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    return ctypes.c_int64(z.numel()), ctypes.c_int64(z.shape[1])


def _covers(z: torch.Tensor, per_channel: torch.Tensor) -> bool:
    channels = z.shape[1]
    return (
        z.dtype in _DTYPES
        and per_channel.dtype == torch.float32
        and (64 % channels == 0 or channels % 64 == 0)
        and z.numel() % 64 == 0
        and z.is_contiguous(memory_format=torch.channels_last)
    )


class _CpuPasses(TorchPasses):
    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self.scratch = {}

    def call(self, name: str, dtype: torch.dtype, *arguments) -> None:
        getattr(self.library, f"{name}_{_DTYPES[dtype]}")(*arguments)

    def temporary(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A tensor like `like` that lasts until the next of its name: memory that is in the cache already."""
        memory = self.scratch.get((name, like.dtype), like.new_empty(0))
        if memory.numel() < like.numel():
            memory = self.scratch[name, like.dtype] = like.new_empty(like.numel())
        return memory[: like.numel()].as_strided(like.shape, like.stride())

    def convolve(self, x, norm, weight, conv, bn=None):
        if norm is not None and _covers(x, norm):
            x, norm = self.activate(x, norm, out=self.temporary("x", x))[0], None
        return super().convolve(x, norm, weight, conv, bn)

    def statistics(self, z: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
        if not _covers(z, bn.weight):
            return super().statistics(z, bn)
        norm = torch.empty(4, z.shape[1])
        constants = ctypes.c_double(bn.eps), ctypes.c_double(bn.momentum)
        tensors = [_address(t) for t in (bn.running_mean, bn.running_var, norm)]
        parameters = _address(bn.weight), _address(bn.bias)
        self.call("statistics", z.dtype, _address(z), *_size(z), *parameters, *constants, *tensors)
        return norm

    def activate(self, z, norm, shortcut=None, relu=True, want_signs=False, out=None):
        if not _covers(z, norm):
            return super().activate(z, norm, shortcut, relu, want_signs)  # out: see temporary
        y = torch.empty_like(z) if out is None else out
        signs = torch.empty(z.numel() // 8, dtype=torch.uint8) if want_signs else None
        inputs = _address(z), *_size(z), _address(norm), _address(shortcut)
        self.call("activate", z.dtype, *inputs, ctypes.c_int(relu), _address(y), _address(signs))
        return y, signs

    def mask_and_sum(self, dy, z, norm, signs=None, relu=True, out=None):
        if not _covers(z, norm):
            return super().mask_and_sum(dy, z, norm, signs, relu)
        g, sums = torch.empty_like(z) if out is None else out, torch.empty_like(norm)
        inputs = _address(dy), _address(z), *_size(z), _address(norm), _address(signs)
        self.call("mask_and_sum", z.dtype, *inputs, ctypes.c_int(relu), _address(g), _address(sums))
        return g, sums

    def gradient(self, g, z, norm, sums):
        if not _covers(z, norm):
            return super().gradient(g, z, norm, sums)
        dz = self.temporary("dz", z)
        inputs = _address(g), _address(z), *_size(z), _address(norm), _address(sums)
        self.call("gradient", z.dtype, *inputs, _address(dz))
        return dz

    def convolve_backward(self, g, z, norm, sums, weight, conv, x_shape, below=None, add=None):
        dx, _ = super().convolve_backward(g, z, norm, sums, weight, conv, x_shape, add=add)
        if below is None:
            return dx, None
        return self.mask_and_sum(dx, *below, out=dx)
