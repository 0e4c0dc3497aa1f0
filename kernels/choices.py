"""Choose the fastest correct way to compute each convolution on this GPU: measured once, then cached."""

import contextlib
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.device import captured


class Config(NamedTuple):
    """How a kernel is launched: patches per block, warps per program, stages of its pipeline, and more.

    `patch` is the side, in pixels, of the patches of a convolution's output. A gradient's patches have this
    side or the convolution's stride, whichever is larger. `depth` is how many values of a window, its pixels
    times channels, a program gathers at once for each patch. `registers` is the most that a thread may use,
    so that several programs fit on a multiprocessor; None leaves it to the compiler.
    """

    block: int
    warps: int
    stages: int
    patch: int = 1
    depth: int = 16
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """Return the options for Triton's compiler."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


# Computes a convolution with a Config, or with cuDNN for None. It returns all results, without side effects.
Attempt = Callable[[Config | None], Sequence[Tensor | None]]

# With 64 rows or more, a pipelined product (wgmma, with its left factor in registers) may overwrite a factor
# that is still being read (triton issue 9433). So configurations of several stages have 32 rows.
CONFIGS = (
    Config(64, 4, 1), Config(64, 8, 1, 1, 128), Config(32, 8, 1, 1, 256), Config(64, 16, 1, 1, 256),
    Config(32, 4, 3, 2), Config(64, 8, 1, 2, 128), Config(32, 8, 1, 2, 128), Config(64, 16, 1, 2, 256),
    Config(128, 8, 1, 2, 64, 128), Config(128, 8, 1, 2, 128), Config(128, 8, 1, 2, 256),
    Config(256, 16, 1, 2, 64),
)  # fmt: skip
CALLS = 10  # calls that are timed at once
MEASURED_S = 0.3  # how long all are timed in turn; a GPU that was idle is slow at first
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 4e-2, torch.float16: 8e-3}  # cuDNN's fp32 may be TF32


class Choices:
    """The fastest correct Config for each key, measured on first use and kept in `file`; None means cuDNN.

    Nothing can be measured while a CUDA graph is captured, so a key that is still unmeasured then gets cuDNN.
    The file of the same name that ends in .log says how long each Config took, or why it was not used. While
    `compiling`, an attempt compiles its kernels and launches none.
    """

    def __init__(self, file: Path):
        self.file, self.compiling = file, False
        self.made = self.read()

    def __call__(self, key: str, attempt: Attempt) -> Config | None:
        if key not in self.made:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return None
            expected = attempt(None)
            if not all(bool(tensor.isfinite().all()) for tensor in expected if tensor is not None):
                return None  # fp16's loss scale is still too high, so there is nothing to compare with
            self.made[key] = self.fastest(key, attempt, expected)
            self.write()
        return self.made[key] and Config(*self.made[key])

    def fastest(self, key: str, attempt: Attempt, expected: Sequence[Tensor | None]) -> Config | None:
        self.compile(attempt)
        pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        graphs, found = {None: recorded(functools.partial(attempt, None), pool)}, {}
        for config in CONFIGS:
            try:
                if agrees(attempt(config), expected):
                    graphs[config] = recorded(functools.partial(attempt, config), pool)
                else:
                    found[config] = "differs from cuDNN"
            except Exception as error:  # it does not compile, or needs more than this GPU has
                # Triton may keep the error; its traceback would keep these tensors and graphs.
                found[config] = repr(error.with_traceback(None))
        times, until = dict.fromkeys(graphs, math.inf), time.perf_counter() + MEASURED_S
        while math.inf in times.values() or time.perf_counter() < until:
            times = {way: min(times[way], seconds(graph) / CALLS) for way, graph in graphs.items()}
        found |= {way: f"{1e6 * time:.2f} us" for way, time in times.items()}
        with contextlib.suppress(OSError), self.file.with_suffix(".log").open("a") as log:
            log.writelines(f"{key}: {tuple(way or ['cuDNN'])}: {what}\n" for way, what in found.items())
        return min(times, key=times.get)

    def compile(self, attempt: Attempt) -> None:
        """Compile the kernels of all Configs at once, a thread per core; failures show when they are used."""
        from triton import AsyncCompileMode  # here, because importing Triton takes a second

        self.compiling = True
        try:
            with (
                ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
                AsyncCompileMode(threads, ignore_errors=True),
            ):
                for config in CONFIGS:
                    with contextlib.suppress(Exception):
                        attempt(config)
        finally:
            self.compiling = False

    def read(self) -> dict[str, list[int] | None]:
        """Return the valid choices in the file. All other entries are ignored, and measured again."""
        try:
            kept = json.loads(self.file.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        kept, ways = kept if isinstance(kept, dict) else {}, [None, *map(list, CONFIGS)]
        return {key: ways[ways.index(way)] for key, way in kept.items() if way in ways}

    def write(self) -> None:
        """Add the new choices to the file. If it cannot be written, every process measures again."""
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.file.parent) as folder:
                made = Path(folder) / self.file.name
                made.write_text(json.dumps(self.read() | self.made, indent=1))
                made.replace(self.file)


def agrees(out: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    """Return whether results agree within the dtype's tolerance; a None in `expected` agrees with anything.

    `[4, C]` tensors are compared row by row, because their rows differ in scale.
    """
    tolerance = TOLERANCE[expected[0].dtype]

    def near(one: Tensor, other: Tensor) -> bool:
        if other.ndim == 2:
            return all(map(near, one, other))
        return bool((one.float() - other.float()).norm() <= tolerance * other.float().norm())

    return all(near(a, b) for a, b in zip(out, expected, strict=True) if b is not None)


def recorded(call: Callable[[], object], pool: tuple[int, int] | None) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of CALLS calls, whose memory is shared with other graphs of the same pool."""
    graph = torch.cuda.CUDAGraph()
    with captured(graph, pool=pool):
        for _ in range(CALLS):
            call()
    return graph


def seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Return the seconds that one replay of `graph` takes, right after another one.

    Alone, it would include the time that the host takes to launch it.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
