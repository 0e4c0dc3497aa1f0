"""A forecast of what the Triton kernels take on an H100 or H200, from what they compile to. It needs no GPU.

python -m kernels.sm90 --arch resnet32 --batch-size 128

For a step that trains BatchNorm alone, and for an evaluation, it prints a row per kernel and the total. A launch
is taken to last as long as the largest of these: what it costs by itself; its bytes; its products; and its
instructions, at four a clock on each multiprocessor, and one in two clocks in each warp, because most wait for
the one before. What the last program does alone, to finish sums, comes on top of its instructions. A count
is no measurement: neither waiting for memory nor shared memory is in it.
"""

import argparse
import functools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import conv_bn_relu, train_block
from kernels.cuda import CONFIGS, DTYPES, ELEMENTWISE, Config, CudaPasses, empty_image

HOPPER = GPUTarget("cuda", 90, 32)
BYTES_PER_S, FLOP_PER_S = 4.3e12, 790e12  # an H200's, as measured by others
LAUNCH_S = 2e-6  # of a kernel in a CUDA graph
SMS, CLOCK_HZ = 132, 1.755e9
POINTERS = DTYPES | {torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.float64: "fp64"}


class Code(NamedTuple):
    """What a kernel compiles to. Instructions are those that a warp executes: of every program, of the last one."""

    registers: int
    spilt_bytes: int
    shared_bytes: int
    matrix: str  # instruction
    instructions: int
    last_instructions: int


class Launch(NamedTuple):
    """A kernel with its shape and Config, how many programs it has, and the seconds it is taken to last."""

    kernel: str
    shape: str
    config: Config
    programs: int
    code: Code
    bytes_s: float
    issue_s: float
    seconds: float


class Forecast(CudaPasses):
    """Passes over tensors without memory, which launch nothing and note each launch; `config`: None for the best."""

    def __init__(self, config: Config | None = None):
        self.launches, self.best = [], {}
        super().__init__(lambda key, attempt: config or self.fastest(key, attempt))

    def fastest(self, key, attempt):
        if key not in self.best:
            before, seconds = self.launches, {}
            for config in CONFIGS:
                self.launches = []
                try:
                    attempt(config)
                except NotImplementedError:
                    continue
                seconds[config] = sum(launch.seconds for launch in self.launches)
            self.launches, self.best[key] = before, min(seconds, key=seconds.get)
        return self.best[key]

    def launch(self, kernel, grid, *arguments, config=ELEMENTWISE, **constants):
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        k, p, stride = (constants.get(name, 1) for name in ("K", "P", "STRIDE"))
        back = k // 2 // stride + (p - 1 + k // 2) // stride + 1  # side of the window, see triton_kernels.py
        window = {"convolve": stride * (p - 1) + k, "convolve_backward": back}.get(kernel.__name__, 1)
        programs = grid[0] * (grid[1] if len(grid) > 1 else 1)
        rounds = -(-grid[0] // constants.get("STEP", grid[0]))
        code = compile_for_hopper(kernel, typed(given), config, tuple(constants.items()), window**2, rounds)
        flops = (
            2
            * programs
            * config.block
            * window**2
            * p
            * p
            * constants.get("C_IN", 0)
            * constants.get("C_OUT", 0)
        )
        bytes_s = sum(a.nbytes for a in arguments if isinstance(a, Tensor)) / BYTES_PER_S
        together = -(-programs // SMS) * config.warps / 4
        issue_s = (code.instructions * max(together, 2) + 2 * code.last_instructions) / CLOCK_HZ
        seconds = max(LAUNCH_S, bytes_s, issue_s, flops / FLOP_PER_S)
        shape = (
            "{C_IN}->{C_OUT} {H}x{W} k{K} s{STRIDE}"
            if "K" in constants
            else "{C}"
            if "C" in constants
            else ""
        )
        having = " ".join(name for name in OPTIONAL if given.get(name) is not None)
        shape = f"{shape.format(**constants)} {having}"
        self.launches.append(
            Launch(kernel.__name__, shape, config, programs, code, bytes_s, issue_s, seconds)
        )


OPTIONAL = ("norm", "after", "add", "z_below", "shortcut", "signs", "g")


def typed(given: dict) -> tuple:
    """What the compiler is told of arguments: name, type, and whether it is a multiple of 16."""

    def of(a: object) -> object:
        if isinstance(a, tuple):
            return tuple(map(of, a))
        if isinstance(a, Tensor):
            return "*" + POINTERS[a.dtype], True
        return {int: "i32", float: "fp32", type(None): None}[type(a)], isinstance(a, int) and a % 16 == 0

    return tuple((name, of(a)) for name, a in given.items())


@functools.cache
def compile_for_hopper(
    kernel, given: tuple, config: Config, constants: tuple, trips: int, rounds: int
) -> Code:
    """The code of a kernel: `trips` are those of its loop, `rounds` those of the last program's."""
    signature, fixed, attributes = dict.fromkeys(kernel.arg_names, "constexpr"), dict(constants), {}

    def describe(of: tuple, path: tuple) -> object:
        if of and isinstance(of[0], tuple):
            return tuple(describe(inner, (*path, i)) for i, inner in enumerate(of))
        kind, divisible = of
        if kind is None:
            fixed[kernel.arg_names[path[0]]] = None
        elif divisible:
            attributes[path] = [["tt.divisibility", 16]]
        return kind or "constexpr"

    for i, (name, of) in enumerate(given):
        signature[name] = describe(of, (i,))
    options = {"num_warps": config.warps, "num_stages": config.stages}
    made = triton.compile(ASTSource(kernel, signature, fixed, attributes), target=HOPPER, options=options)
    usage, sass = (read_cubin(made.asm["cubin"], how) for how in ("--dump-resource-usage", "-sass"))
    registers, stack, local = (int(re.search(rf"{w}:(\d+)", usage)[1]) for w in ("REG", "STACK", "LOCAL"))
    matrix = next((name for name in ("wgmma", "mma.sync") if name in made.asm["ptx"]), "-")
    counts = count_instructions(sass, trips, rounds)
    return Code(registers, stack + local, made.metadata.shared, matrix, *counts)


def read_cubin(cubin: bytes, how: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, how, file.name], check=True, capture_output=True, text=True).stdout


def count_instructions(sass: str, trips: int, rounds: int) -> tuple[int, int]:
    """Instructions that a warp executes of this code, of any program and, after the atomic, of the last one.

    Every loop that begins before the atomic is taken to run `trips` times, later ones `rounds` times.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    jumps = [
        (i, int(to[1], 16)) for i, (_, text) in enumerate(code) if (to := re.search(r"BRA\b.*0x(\w+)", text))
    ]
    end = next(i for i, to in jumps if to == code[i][0])  # what follows the program jumps to itself
    split = next((i for i, (_, text) in enumerate(code[:end]) if "ATOM" in text), end)
    times, index = [1] * end, {at: i for i, (at, _) in enumerate(code)}
    for i, to in jumps:
        for j in range(index[to], i + 1 if i < end else 0):
            times[j] *= trips if index[to] < split else rounds
    return sum(times[:split]), sum(times[split:])


# ---- a CIFAR ResNet, on tensors without memory ----


def block(
    passes: CudaPasses, x: Tensor, units: list[tuple], shortcut: Tensor | None = None, relu: bool = True,
    train: bool = True,
) -> Tensor:  # fmt: skip
    """The output of a block whose units are (channels, kernel, stride); in training its backward pass is done, too."""
    layers, c_in = [], x.shape[1]
    for c_out, k, stride in units:
        conv = nn.Conv2d(c_in, c_out, k, stride, k // 2, bias=False, device=x.device).requires_grad_(False)
        conv.to(x.dtype, memory_format=torch.channels_last)
        layers.append((conv, nn.BatchNorm2d(c_out, device=x.device)))
        c_in = c_out
    if not train:
        return infer(passes, x, layers, shortcut, relu)
    x.requires_grad_(x.shape[1] > 3)  # images need no gradient
    y = train_block(passes, x, layers, shortcut, relu)
    y.backward(empty_image(y, y.shape))
    return y.detach()


def resnet(passes: CudaPasses, depth: int, batch_size: int, train: bool = True) -> None:
    """The passes of a step that trains BatchNorm alone, or of the evaluation of a batch."""
    x = empty_image(torch.empty(0, dtype=torch.bfloat16, device="meta"), (batch_size, 3, 32, 32))
    x = block(passes, x, [(16, 3, 1)], train=train)
    for channels in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            stride = 1 if x.shape[1] == channels else 2
            shortcut = x if stride == 1 else block(passes, x, [(channels, 1, 2)], relu=False, train=train)
            x = block(passes, x, [(channels, 3, stride), (channels, 3, 1)], shortcut, train=train)


def show(title: str, forecast: Forecast, times: int = 1) -> None:
    """A row for each kernel, and the total of `times` as many launches."""
    print(
        f"\n{title}\n  n kernel            channels                            block wa st p programs  reg spilt  shared matrix    "
        "instructions     MB-us issue-us     us"
    )
    counts = Counter(forecast.launches)
    for launch, n in sorted(counts.items(), key=lambda item: -item[0].seconds * item[1]):
        c, code = launch.config, launch.code
        config = f"{c.block:5}{c.warps:3}{c.stages:3}{c.patch:2}{launch.programs:9}"
        used = f"{code.registers:5}{code.spilt_bytes:6}{code.shared_bytes:8} {code.matrix:9}{code.instructions:6}+{code.last_instructions:<5}"
        us = f"{launch.bytes_s * 1e6:10.2f}{launch.issue_s * 1e6:9.2f}{launch.seconds * 1e6:7.2f}"
        print(f"{n:3} {launch.kernel:18}{launch.shape:36}{config}{used}{us}")
    seconds = sum(launch.seconds for launch in forecast.launches)
    print(f"{title}: {times * len(forecast.launches)} launches, {times * seconds * 1e3:.3f} ms")


def infer(passes, x, layers, shortcut, relu):
    from kernels import infer_block

    return infer_block(passes, x, layers, shortcut, relu)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("kernels.sm90", description=__doc__)
    parser.add_argument("--arch", default="resnet32", help="resnetD, a CIFAR ResNet [resnet32]")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step [128]")
    options = parser.parse_args()
    depth = int(options.arch.removeprefix("resnet"))
    step, evaluation = Forecast(), Forecast()
    resnet(step, depth, options.batch_size)
    show(f"{options.arch}, bn_only, a step of {options.batch_size}", step)
    resnet(evaluation, depth, 1000, train=False)
    show(f"{options.arch}, evaluation of 10,000 images in batches of 1,000", evaluation, 10)
