"""The passes for CPUs in C++: cpu.cpp is compiled for this processor on first use, and cached."""

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from kernels.device import cache_folder, open_own
from kernels.reference import TorchPasses

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = "-std=c++17 -O3 -march=native -mprefer-vector-width=512 -fno-math-errno -fno-trapping-math"
FLAGS += " -fopenmp -shared -fPIC"
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_C_TYPES = {int: ctypes.c_int64, bool: ctypes.c_int, float: ctypes.c_double, type(None): ctypes.c_void_p}


@functools.cache
def passes() -> TorchPasses:
    """Return the C++ passes; if compiling fails, as without a C++ compiler, warn and return PyTorch's."""
    try:
        return CpuPasses(_library())
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", "") or str(error)).splitlines()[0]
        warnings.warn(f"cpu.cpp does not compile; PyTorch's slower kernels are used ({why})", stacklevel=2)
        return TorchPasses()


def _library() -> BinaryIO:
    """Return the compiled library as an open file; compile it if the cache folder has no intact copy.

    Its name depends on the source, compiler, flags and processor. Its size and SHA-256 are stored beside it.
    """
    compiler = os.environ.get("CXX", "g++")
    processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    kind = [line for line in processor.splitlines() if line.startswith(("model", "flags"))]
    key = hashlib.sha256("\n".join([SOURCE.read_text(), compiler, FLAGS, *kind]).encode()).hexdigest()[:16]
    cache, name = cache_folder(), f"kernels-{key}.so"
    with contextlib.suppress(OSError), open_own(cache / f"{name}.sha256") as digest:
        library = open_own(cache / name)
        if digest.read(1000) == _digest(library):
            return library
        library.close()
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # so that no half-written file gets the final name
        made, digest = Path(folder) / name, Path(folder) / f"{name}.sha256"
        command = [compiler, *FLAGS.split(), SOURCE, "-o", made]
        subprocess.run(command, check=True, capture_output=True, text=True)
        library = open(made, "rb")  # noqa: SIM115, it stays open
        digest.write_bytes(_digest(library))
        for file in (made, digest):
            file.chmod(0o600)  # regardless of the umask
            file.replace(cache / file.name)
    return library


def _digest(library: BinaryIO) -> bytes:
    content = library.read()
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}\n".encode()


def covers(z: Tensor, per_channel: Tensor) -> bool:
    """Return whether the C++ functions accept activations `z` and per-channel values `per_channel`."""
    channels = z.shape[1]
    return (
        z.dtype in _DTYPES
        and per_channel.dtype == torch.float32
        and (64 % channels == 0 or channels % 64 == 0)
        and z.numel() % 64 == 0
        and z.is_contiguous(memory_format=torch.channels_last)
    )


class _Masked(NamedTuple):
    """g, not stored: `dy` where the unit's output was positive. Functions that need g mask `dy` again."""

    dy: Tensor
    signs: Tensor | None
    relu: bool


class CpuPasses(TorchPasses):
    """Passes that use cpu.cpp for the tensors that it covers, and PyTorch for all others."""

    name = "cpp"

    def __init__(self, library: BinaryIO):
        # Loading by descriptor loads the file that was verified, even if another has taken its name. The file
        # stays open, because the loader takes two libraries with the same descriptor for one.
        self.file, self.temporaries = library, {}
        self.library = ctypes.CDLL(f"/proc/self/fd/{library.fileno()}")

    def call(self, name: str, z: Tensor, *arguments) -> None:
        """Call the C++ function `name` for z's dtype. A tensor is passed as its address, an int64."""
        given = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        getattr(self.library, f"{name}_{_DTYPES[z.dtype]}")(*(_C_TYPES[type(a)](a) for a in given))

    def temporary(self, name: str, like: Tensor) -> Tensor:
        """Return a tensor like `like`, valid until the next of this name. Reuse keeps it in the CPU cache."""
        memory = self.temporaries.get((name, like.dtype))
        if memory is None or memory.numel() < like.numel():
            memory = self.temporaries[name, like.dtype] = like.new_empty(like.numel())
        return memory.as_strided(like.shape, like.stride())

    def convolve(self, x, norm, weight, conv, bn=None):
        if norm is not None and covers(x, norm):
            x, norm = self.activate(x, norm, out=self.temporary("x", x))[0], None
        return super().convolve(x, norm, weight, conv, bn)

    def statistics(self, z, bn):
        if not covers(z, bn.gamma):
            return super().statistics(z, bn)
        norm, given = torch.empty(4, z.shape[1]), (bn.gamma, bn.beta, bn.eps, bn.momentum)
        running = bn.running_mean, bn.running_var
        self.call("statistics", z, z, z.numel(), z.shape[1], *given, *running, norm)
        return norm

    def activate(self, z, norm, shortcut=None, relu=True, want_signs=False, out=None):
        if not covers(z, norm):
            return super().activate(z, norm, shortcut, relu, want_signs)
        y = torch.empty_like(z) if out is None else out
        signs = torch.empty(z.numel() // 8, dtype=torch.uint8) if want_signs else None
        self.call("activate", z, z, z.numel(), z.shape[1], norm, shortcut, relu, y, signs)
        return y, signs

    def mask_and_sum(self, dy, z, norm, signs=None, relu=True):
        if not covers(z, norm):
            return super().mask_and_sum(dy, z, norm, signs, relu)
        sums = torch.empty_like(norm)
        self.call("sum_gradients", z, dy, z, z.numel(), z.shape[1], norm, signs, relu, sums)
        return _Masked(dy, signs, relu) if relu else dy, sums

    def dense(self, g):
        return self.add_masked(torch.zeros_like(g.dy), g) if isinstance(g, _Masked) else g

    def add_masked(self, dx, g):
        self.call("add_masked", dx, g.dy, dx.numel(), g.signs, dx)
        return dx

    def gradient(self, g, z, norm, sums):
        if not isinstance(g, _Masked):
            if not covers(z, norm):
                return super().gradient(g, z, norm, sums)
            g = _Masked(g, None, False)
        dz = self.temporary("dz", z)
        self.call("gradient", z, g.dy, z, z.numel(), z.shape[1], norm, g.signs, g.relu, sums, dz)
        return dz

    def convolve_backward(self, g, z, norm, sums, weight, conv, x_shape, below=None, add=None, dz=None):
        masked = isinstance(add, _Masked)
        rest = weight, conv, x_shape, below, None if masked else add, dz
        dx, sums = super().convolve_backward(g, z, norm, sums, *rest)
        return self.add_masked(dx, add) if masked else dx, sums
