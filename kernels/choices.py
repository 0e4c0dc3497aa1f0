"""Choose the fastest correct way to compute each convolution on this GPU: measured once, then cached."""

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.device import captured


class Config(NamedTuple):
    """How a kernel is launched: patches per program, warps per program, pipeline stages, and patch side.

    `patch` is the side, in pixels, of the patches of a convolution's output. A gradient's patches have this
    side or the convolution's stride, whichever is larger.
    """

    block: int
    warps: int
    stages: int
    patch: int = 1


# Computes a convolution with a Config, or with cuDNN for None. It returns all results, without side effects.
Attempt = Callable[[Config | None], Sequence[Tensor | None]]

CONFIGS = (
    Config(64, 4, 1), Config(32, 8, 1), Config(64, 8, 1), Config(64, 8, 3),
    Config(32, 4, 1, 2), Config(64, 8, 1, 2), Config(64, 8, 3, 2), Config(128, 4, 1, 2), Config(256, 8, 1, 2),
)  # fmt: skip
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 4e-2, torch.float16: 8e-3}  # cuDNN's fp32 may be TF32


class Choices:
    """The fastest correct Config for each key, measured on first use and kept in `file`; None means cuDNN.

    Nothing can be measured while a CUDA graph is captured, so a key that is still unmeasured then gets cuDNN.
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
                return None  # fp16's loss scale is still too high, so there is nothing to compare with
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


def seconds(call: Callable[[], object], calls: int = 10, replays: int = 5) -> float:
    """Return the seconds per call in the fastest of several replays of a CUDA graph of several calls."""
    graph, times = torch.cuda.CUDAGraph(), []
    with captured(graph):
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
