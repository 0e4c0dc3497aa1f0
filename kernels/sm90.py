"""Forecast how long the Triton kernels take on an H100 or H200 from their machine code, without a GPU.

python -m kernels.sm90 --arch resnet32 --batch-size 128

It prints a row per kernel and the total, for a step that trains BatchNorm alone and for an evaluation. Each
launch is assumed to take the longest of four times: the fixed cost of any launch, and the time for its bytes,
its products and its instructions. A multiprocessor issues four instructions per clock, and a warp issues one
every two clocks, because most wait for the one before. The instructions with which the last program alone
finishes sums are added. This is a count, not a measurement: it omits waits for memory and shared memory. On
an H200, a step of ResNet-32 took four times as long; results/speed.md says where.
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
from triton.compiler import ASTSource

from kernels import infer_block, train_block
from kernels.choices import CONFIGS, Config
from kernels.cuda import DTYPES, ELEMENTWISE, CudaPasses, empty_image

HOPPER = GPUTarget("cuda", 90, 32)
BYTES_PER_S, FLOP_PER_S = 4.3e12, 790e12  # of an H200, as others have measured
LAUNCH_S = 2e-6  # per kernel in a CUDA graph
SMS, CLOCK_HZ = 132, 1.755e9
POINTERS = DTYPES | {torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.float64: "fp64"}
OPTIONAL = ("norm", "after", "add", "z_below", "shortcut", "signs", "g")  # arguments that tell variants apart
EVALUATION = 24  # launches of PyTorch's kernels per evaluation batch, for the head and the scores


class Code(NamedTuple):
    """What a kernel compiles to. A warp executes `instructions` and, in the last program, `at_last` more."""

    registers: int = 0
    spilt_bytes: int = 0
    shared_bytes: int = 0
    matrix: str = "-"  # the matrix instruction, if any
    instructions: int = 0
    at_last: int = 0


class Launch(NamedTuple):
    """One launch of a kernel: its name and shape, and the seconds that it is assumed to last."""

    kernel: str
    shape: str = ""
    config: Config = ELEMENTWISE
    programs: int = 0
    code: Code = Code()
    bytes_s: float = 0.0
    issue_s: float = 0.0
    seconds: float = LAUNCH_S


class Forecast(CudaPasses):
    """Passes over tensors without memory, which record each launch instead of launching it.

    Each convolution uses whichever of the given `configs` has the shortest forecast.
    """

    def __init__(self, configs: tuple[Config, ...] = CONFIGS):
        super().__init__(self.fastest, pdl=True)
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
        k, p, stride = (constants.get(name, 1) for name in ("K", "P", "STRIDE"))
        back = k // 2 // stride + (p - 1 + k // 2) // stride + 1
        windows = {"convolve": stride * (p - 1) + k, "convolve_backward": back}
        trips = windows.get(kernel.__name__, 1) ** 2
        rounds, programs = -(-grid[0] // constants.get("STEP", grid[0])), math.prod(grid)
        fixed = (*constants.items(), ("PDL", self.pdl))
        code = compiled(kernel, typed(tuple(given.items())), config, fixed, trips, rounds)
        together = max(2, config.warps / 4 * -(-programs // SMS))  # clocks per instruction of all warps
        issue_s = (code.instructions * together + 2 * code.at_last) / CLOCK_HZ
        bytes_s = sum(a.nbytes for a in arguments if isinstance(a, Tensor)) / BYTES_PER_S
        product = trips * p * p * constants.get("C_IN", 0) * constants.get("C_OUT", 0)
        seconds = max(LAUNCH_S, bytes_s, issue_s, 2 * programs * config.block * product / FLOP_PER_S)
        form = "{C_IN}->{C_OUT} {H}x{W} k{K} s{STRIDE}" if "K" in constants else "{C}"
        having = [name for name in OPTIONAL if given.get(name) is not None]
        shape = " ".join([form.format_map({"C": ""} | constants), *having])
        self.launches.append(
            Launch(kernel.__name__, shape, config, programs, code, bytes_s, issue_s, seconds)
        )


def typed(value: object) -> object:
    """Return arguments as the compiler sees them: a type, and whether the value is a multiple of 16."""
    if isinstance(value, tuple):
        return tuple(map(typed, value))
    if isinstance(value, Tensor):
        return ("*" + POINTERS[value.dtype], True)
    kinds = {int: "i32", float: "fp32", type(None): "constexpr"}
    return (
        value if isinstance(value, str) else (kinds[type(value)], isinstance(value, int) and value % 16 == 0)
    )


@functools.cache
def compiled(kernel, given: tuple, config: Config, constants: tuple, trips: int, rounds: int) -> Code:
    """Compile a kernel for Hopper; its loop runs `trips` times, the last program's loop `rounds` times."""
    signature, fixed, attributes = dict.fromkeys(kernel.arg_names, "constexpr"), dict(constants), {}

    def kind_of(value: tuple, path: tuple[int, ...]) -> object:
        if isinstance(value[0], tuple):
            return tuple(kind_of(inner, (*path, i)) for i, inner in enumerate(value))
        kind, divisible = value
        if divisible:
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    for i, (name, value) in enumerate(given):
        signature[name] = kind_of(value, (i,))
        if signature[name] == "constexpr":
            fixed[name] = None
    options = {"num_warps": config.warps, "num_stages": config.stages}
    made = triton.compile(ASTSource(kernel, signature, fixed, attributes), target=HOPPER, options=options)
    usage, sass = (read(made.asm["cubin"], what) for what in ("--dump-resource-usage", "-sass"))
    registers, stack, local = (int(re.search(rf"{w}:(\d+)", usage)[1]) for w in ("REG", "STACK", "LOCAL"))
    matrix = next((name for name in ("wgmma", "mma.sync") if name in made.asm["ptx"]), "-")
    return Code(registers, stack + local, made.metadata.shared, matrix, *executed(sass, trips, rounds))


def read(cubin: bytes, what: str) -> str:
    """Return what cuobjdump, which comes with Triton, prints about compiled code, given the option `what`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, what, file.name], check=True, capture_output=True, text=True).stdout


def executed(sass: str, trips: int, rounds: int) -> tuple[int, int]:
    """Return the instructions that a warp executes before the atomic and, in the last program only, after it.

    A loop before the atomic is assumed to run `trips` times, and one after it `rounds` times. No code is
    assumed to be skipped.
    """
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)
    index = {int(address, 16): i for i, (address, _) in enumerate(code)}
    targets = [re.search(r"\bBRA\b.*0x(\w+)", text) for _, text in code]
    jumps = [(i, index[int(target[1], 16)]) for i, target in enumerate(targets) if target]
    end = next(i for i, to in jumps if to == i)  # the instruction after a program jumps to itself
    split = next((i for i, (_, text) in enumerate(code[:end]) if "ATOM" in text), end)
    times = [1] * end
    for i, to in jumps:
        for j in range(to, i + 1 if i < end else to):
            times[j] *= trips if to < split else rounds
    return sum(times[:split]), sum(times[split:])


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
    others = ("torch.cat", "torch.optim.SGD") if train else ["torch, head and scores"] * EVALUATION
    passes.launches += map(Launch, others)


def show(title: str, launches: list[Launch], times: int = 1) -> None:
    """Print a row for each kernel, and the total of the launches repeated `times` times."""
    print(
        f"\n{'n':>3} {'kernel':24}{'channels, image, kernel, stride, with':39}block wa st p programs", end=""
    )
    print("  reg spilt  shared matrix   instructions   MB us  issue us    us")
    rows = Counter(launches)
    for launch in sorted(rows, key=lambda launch: -launch.seconds * rows[launch]):
        (block, warps, stages, patch), code = launch.config, launch.code
        print(f"{rows[launch]:3} {launch.kernel:24}{launch.shape:39}{block:5}{warps:3}{stages:3}", end="")
        print(f"{patch:2}{launch.programs:9}{code.registers:5}{code.spilt_bytes:6}", end="")
        print(f"{code.shared_bytes:8} {code.matrix:9}{code.instructions:6}+{code.at_last:<6}", end="")
        print("{:8.2f}{:10.2f}{:6.2f}".format(*(s * 1e6 for s in launch[-3:])))
    seconds = times * sum(launch.seconds for launch in launches)
    print(f"{title}: {times * len(launches)} launches, {1e3 * seconds:.3f} ms")


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
