"""Forecast how long the Triton kernels take on an H100 or H200 from their machine code, without a GPU.

python -m kernels.sm90 --arch resnet32 --batch-size 128

It prints a row per kernel and the total, for a step that trains BatchNorm alone and for an evaluation. A
launch takes the longest of four times, and START_S before: the time for its bytes, for its products, for all
its instructions, and for the instructions and waits of a program, times the waves in which programs run. A
program waits for memory once per iteration of its loops. The constants for instructions and waits are those
with which forecasts of earlier kernels came closest to their times on an H200: 295 convolutions, within a
factor of 1.24 (root mean square); results/speed.md says more. The total is given a second time for programs
that never wait: a launch then takes 2 us, or longer for its bytes or for four instructions a clock.
"""

import argparse
import functools
import math
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

from kernels import infer_block, train_block
from kernels.ahead import Compiler
from kernels.choices import CONFIGS, Config
from kernels.cuda import ELEMENTWISE, CudaPasses, empty_image

HOPPER = GPUTarget("cuda", 90, 32)
BYTES_PER_S, FLOP_PER_S = 4.3e12, 790e12  # of an H200, as others have measured
SMS, CLOCK_HZ, REGISTERS, WARPS, SHARED_BYTES = 132, 1.755e9, 65536, 64, 227 * 1024
START_S, PROGRAM_S, ROUND_S = 1.2e-6, 0.7e-6, 0.5e-6  # per launch, wave of programs, and iteration of a loop
LEAST_S, FULL_ISSUE = 2e-6, 4  # without waiting: of a launch; instructions per clock
CLOCKS, PER_CLOCK = 2.6, 3.2  # clocks per instruction of one warp; instructions per clock of all warps
OPTIONAL = ("norm", "after", "add", "z_below", "shortcut", "signs", "g")  # arguments that tell variants apart
EVALUATION = 24  # launches of PyTorch's kernels per evaluation batch, for the head and the scores


class Code(NamedTuple):
    """What a kernel compiles to. A warp executes `instructions`."""

    registers: int = 0
    spilt_bytes: int = 0
    shared_bytes: int = 0
    matrix: str = "-"  # the matrix instruction, if any
    instructions: int = 0


class Launch(NamedTuple):
    """One launch of a kernel: its name and shape, and the seconds that it is assumed to last."""

    kernel: str
    shape: str = ""
    config: Config = ELEMENTWISE
    programs: int = 0
    code: Code = Code()
    bytes_s: float = 0.0
    issue_s: float = 0.0
    seconds: float = 2e-6


class Forecast(Compiler):
    """Passes over tensors without memory, which compile each kernel and record its launch.

    Each convolution uses whichever of the given `configs` has the shortest forecast.
    """

    def __init__(self, configs: tuple[Config, ...] = CONFIGS):
        super().__init__(HOPPER, self.fastest)
        self.configs, self.launches, self.best = configs, [], {}

    def fastest(self, key, attempt):
        if key not in self.best:
            before, seconds = self.launches, {}
            for config in self.configs:
                self.launches = []
                try:
                    attempt(config)
                except NotImplementedError:  # this config does not suit this convolution
                    continue
                times = [(launch.seconds, launch.issue_s) for launch in self.launches]
                seconds[config] = tuple(map(sum, zip(*times, strict=True)))  # fewer instructions break ties
            self.launches, self.best[key] = before, min(seconds, key=seconds.get)
        return self.best[key]

    def launch(self, kernel, grid, *arguments, config=ELEMENTWISE, **constants):
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        window, patch, group = (constants.get(name, 1) for name in ("WINDOW", "P", "GROUP"))
        taps, loops = window**2, (given.get("each", 1), window**2 // group)
        code = code_of(super().launch(kernel, grid, *arguments, config=config, **constants), loops)
        programs, warps, bytes_s = math.prod(grid), config.warps, sum(map(bytes_of, arguments)) / BYTES_PER_S
        fitting = min(REGISTERS // (32 * warps * max(code.registers, 32)), WARPS // warps)
        waves = -(-programs // SMS // min(fitting, SHARED_BYTES // (code.shared_bytes + 1024)))
        issue_s = code.instructions * -(-programs // SMS) * warps / PER_CLOCK / CLOCK_HZ
        waits = PROGRAM_S + ROUND_S * loops[0] * -(-taps // group)
        alone_s = waves * (waits + CLOCKS * code.instructions / CLOCK_HZ)
        product = taps * patch**2 * constants.get("C_IN", 0) * constants.get("C_OUT", 0)
        product_s = 2 * programs * loops[0] * config.block * product / FLOP_PER_S
        seconds = START_S + max(bytes_s, product_s, issue_s, alone_s)
        form = "{C_IN}->{C_OUT} {H}x{W} k{K} s{STRIDE}" if "K" in constants else "{C}"
        having = [name for name in OPTIONAL if given.get(name) is not None]
        shape = " ".join([form.format_map({"C": ""} | constants), *having])
        self.launches.append(
            Launch(kernel.__name__, shape, config, programs, code, bytes_s, issue_s, seconds)
        )


def bytes_of(value: object) -> int:
    return value.nbytes if isinstance(value, Tensor) else 0  # those of a norm and its sums are few


@functools.cache
def code_of(made: triton.compiler.CompiledKernel, loops: tuple[int, int]) -> Code:
    """Return what a kernel was compiled to; see `executed` for its `loops`."""
    usage, sass = (read(made.asm["cubin"], what) for what in ("--dump-resource-usage", "-sass"))
    registers, stack, local = (int(re.search(rf"{w}:(\d+)", usage)[1]) for w in ("REG", "STACK", "LOCAL"))
    matrix = next((name for name in ("wgmma", "mma.sync") if name in made.asm["ptx"]), "-")
    return Code(registers, stack + local, made.metadata.shared, matrix, executed(sass, *loops))


def read(cubin: bytes, what: str) -> str:
    """Return what cuobjdump, which comes with Triton, prints about compiled code, given the option `what`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, what, file.name], check=True, capture_output=True, text=True).stdout


def executed(sass: str, each: int, trips: int) -> int:
    """Return the instructions that a warp executes, if no code is skipped.

    Loops are, in order, over blocks if there are several (`each`), and over a window (`trips`), which the
    compiler may have unrolled.
    """
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)
    index = {int(address, 16): i for i, (address, _) in enumerate(code)}
    targets = [re.search(r"\bBRA\b.*0x(\w+)", text) for _, text in code]
    jumps = [(index[int(target[1], 16)], i) for i, target in enumerate(targets) if target]
    end = next(i for to, i in jumps if to == i)  # the instruction after a program jumps to itself
    loops, times = sorted((to, i) for to, i in jumps if to < i < end), [1] * end
    expected = [each] * (each > 1) + [trips] * (trips > 1)
    for (first, last), count in zip(loops, expected, strict=False):
        for i in range(first, last + 1):
            times[i] *= count
    return sum(times)


# ---- a CIFAR ResNet, on tensors without memory ----


def block(passes: CudaPasses, x: Tensor, units: list[tuple], shortcut=None, relu=True, train=True) -> Tensor:
    """Return the output of a block of units (channels, kernel, stride); with `train`, also run backward."""
    layers, c_in = [], x.shape[1]
    for c_out, k, stride in units:
        conv = nn.Conv2d(c_in, c_out, k, stride, k // 2, bias=False, device=x.device).requires_grad_(False)
        conv.to(x.dtype, memory_format=torch.channels_last)  # as after its weight is converted
        layers.append((conv, nn.BatchNorm2d(c_out, device=x.device)))
        c_in = c_out
    if not train:
        return infer_block(passes, x, layers, shortcut, relu)
    x.requires_grad_(x.shape[1] > 3)  # images need no gradient
    y = train_block(passes, x, layers, shortcut, relu)
    y.backward(empty_image(y, y.shape))
    return y.detach()


def resnet(passes: Forecast, depth: int, count: int, train: bool = True) -> None:
    """Run a step of `count` images that trains only BatchNorm or, without `train`, one evaluation batch."""
    new = functools.partial(torch.empty, device="meta")
    order, labels, position = new(1, count, dtype=torch.int64), new(count, dtype=torch.int64), new(1).long()
    images, draws, rates = new(count, 32, 32, 3, dtype=torch.uint8), new(1, count, 10 * train), new(1)
    given = images, labels, order, draws, position, new(3), new(3), torch.bfloat16, 4
    x, labels = passes.batch(*given)
    x = block(passes, x, [(16, 3, 1)], train=train)
    for channels in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            stride = 1 if x.shape[1] == channels else 2
            shortcut = x if stride == 1 else block(passes, x, [(channels, 1, 2)], relu=False, train=train)
            x = block(passes, x, [(channels, 3, stride), (channels, 3, 1)], shortcut, train=train)
    if train:
        metrics = new(1, dtype=torch.float64), position, position, position
        passes.head(x, nn.Linear(64, 10, device="meta"), labels, 0.0, metrics, rates, rates)
    others = ["torch.zeros", "torch.cat", "torch.optim.SGD"]
    others = others if train else ["torch, head and scores"] * EVALUATION
    passes.launches += map(Launch, others)


def show(title: str, launches: list[Launch], times: int = 1) -> None:
    """Print a row for each kernel, and the total of the launches repeated `times` times."""
    print(f"\n{'n':>3} {'kernel':24}{'channels, image, kernel, stride, with':39}block wa st p depth", end="")
    print(" most programs  reg spilt  shared matrix instr.  bytes us  issue us    us")
    rows = Counter(launches)
    for launch in sorted(rows, key=lambda launch: -launch.seconds * rows[launch]):
        (block, warps, stages, patch, depth, most), code = launch.config, launch.code
        print(f"{rows[launch]:3} {launch.kernel:24}{launch.shape:39}{block:5}{warps:3}{stages:3}", end="")
        print(f"{patch:2}{depth:6}{most or '-':>5}{launch.programs:9}{code.registers:5}", end="")
        print(f"{code.spilt_bytes:6}{code.shared_bytes:8} {code.matrix:9}{code.instructions:6}", end="")
        print("{:10.2f}{:10.2f}{:6.2f}".format(*(s * 1e6 for s in launch[-3:])))
    ms = 1e3 * times * sum(launch.seconds for launch in launches)
    counted = [max(LEAST_S, launch.bytes_s, launch.issue_s * PER_CLOCK / FULL_ISSUE) for launch in launches]
    print(f"{title}: {times * len(launches)} launches, {ms:.3f} ms", end="")
    print(f"; {1e3 * times * sum(counted):.3f} ms if programs never waited")


def main() -> None:
    parser = argparse.ArgumentParser("python -m kernels.sm90", description=__doc__)
    parser.add_argument("--arch", default="resnet32", help="resnetD, a ResNet for CIFAR [resnet32]")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step [128]")
    options = parser.parse_args()
    depth, step, evaluation = int(options.arch.removeprefix("resnet")), Forecast(), Forecast()
    resnet(step, depth, options.batch_size)
    resnet(evaluation, depth, 1000, train=False)
    show(f"{options.arch}, bn_only, a step of {options.batch_size} images", step.launches)
    show(f"{options.arch}, evaluation of 10,000 images by 1,000", evaluation.launches, times=10)


if __name__ == "__main__":
    main()
