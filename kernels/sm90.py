"""What the Triton kernels compile to for an H100 or H200: registers, spills, least time. It needs no GPU.

python -m kernels.sm90
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import train_block
from kernels.cuda import CONFIGS, DTYPES, ELEMENTWISE, Config, CudaPasses, empty_image

HOPPER = GPUTarget("cuda", 90, 32)
BYTES_PER_S = 4.3e12  # an H200's, as measured by others; so are the next two
FLOP_PER_S = 790e12
LAUNCH_S = 2e-6


class Forecast(CudaPasses):
    """Passes that launch nothing, over tensors without memory, and add up the least time of every launch.

    With `seen`, each kernel that is not in it is compiled and printed.
    """

    def __init__(self, config: Config, seen: set | None = None):
        super().__init__(lambda key, attempt: config)
        self.seen, self.seconds, self.launches = seen, 0.0, 0

    def launch(self, kernel, grid, *arguments, config=ELEMENTWISE, **constants):
        moved = sum(a.nbytes for a in arguments if isinstance(a, Tensor))
        k = constants.get("K", 0)
        flops = 2 * grid[0] * config.block * k * k * constants.get("C_IN", 0) * constants.get("C_OUT", 0)
        least_s = max(moved / BYTES_PER_S, flops / FLOP_PER_S, LAUNCH_S)
        self.seconds, self.launches = self.seconds + least_s, self.launches + 1
        types = (a.dtype if isinstance(a, Tensor) else type(a) for a in arguments)
        variant = (kernel.__name__, *types, config, *constants.items())
        if self.seen is None or variant in self.seen:
            return
        self.seen.add(variant)
        given, block = dict(zip(kernel.arg_names, arguments, strict=False)), constants.get("BLOCK", "")
        shape = ("{C_IN}->{C_OUT} {H}x{W} k{K} s{STRIDE}" if k else "{C}").format(**constants)
        used = resources(kernel, given, config, constants)
        optional = ("norm", "add", "z_below", "shortcut", "signs", "g")
        having = " ".join(name for name in optional if given.get(name) is not None)
        launched = f"{kernel.__name__:18}{shape:18}{block:>5}{config.warps:3}{config.stages:3}"
        print(f"{launched} {used} {moved / 1e6:8.2f}{least_s * 1e6:7.1f}  {having}", flush=True)


def resources(kernel, given: dict, config: Config, constants: dict) -> str:
    """Registers, bytes spilt, bytes of shared memory and the matrix instruction, compiled for Hopper."""
    pointers, types = DTYPES | {torch.uint8: "u8"}, {int: "i32", float: "fp32", type(None): "constexpr"}
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    for name, a in given.items():
        signature[name] = "*" + pointers[a.dtype] if isinstance(a, Tensor) else types[type(a)]
    divisible = (isinstance(a, Tensor) or (isinstance(a, int) and a % 16 == 0) for a in given.values())
    attributes = {(i,): [["tt.divisibility", 16]] for i, yes in enumerate(divisible) if yes}
    fixed = constants | {name: None for name, a in given.items() if a is None}
    options = {"num_warps": config.warps, "num_stages": config.stages}
    made = triton.compile(ASTSource(kernel, signature, fixed, attributes), target=HOPPER, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [tool, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{w}:(\d+)", usage)[1]) for w in ("REG", "STACK", "LOCAL"))
    instruction = next((name for name in ("wgmma", "mma.sync") if name in made.asm["ptx"]), "-")
    return f"{registers:4}{stack + local:6}{made.metadata.shared:8} {instruction:9}"


def block(
    passes: CudaPasses, x: Tensor, units: list[tuple], shortcut: Tensor | None = None, relu: bool = True
) -> Tensor:
    """The output of a block whose units are (channels, kernel, stride); its backward pass is done, too."""
    layers, c_in = [], x.shape[1]
    for c_out, k, stride in units:
        conv = nn.Conv2d(c_in, c_out, k, stride, k // 2, bias=False, device=x.device).requires_grad_(False)
        layers.append((conv.to(memory_format=torch.channels_last), nn.BatchNorm2d(c_out, device=x.device)))
        c_in = c_out
    x.requires_grad_(x.shape[1] > 3)  # images need no gradient
    y = train_block(passes, x, layers, shortcut, relu)
    y.backward(empty_image(y, y.shape))
    return y.detach()


def resnet32(passes: CudaPasses, batch: int, blocks: int = 5) -> None:
    """The passes of one step that trains BatchNorm alone, with `blocks` blocks in each stage."""
    x = empty_image(torch.empty(0, dtype=torch.bfloat16, device="meta"), (batch, 3, 32, 32))
    x = block(passes, x, [(16, 3, 1)])
    for channels in (16, 32, 64):
        for _ in range(blocks):
            stride = 1 if x.shape[1] == channels else 2
            shortcut = x if stride == 1 else block(passes, x, [(channels, 1, 2)], relu=False)
            x = block(passes, x, [(channels, 3, stride), (channels, 3, 1)], shortcut)


if __name__ == "__main__":
    print("kernel            channels        block wa st  reg spilt  shared matrix         MB     us  with")
    seen = set()
    for config in CONFIGS:
        resnet32(Forecast(config, seen), 128, blocks=2)
    for batch in (128, 1024):
        forecast = Forecast(CONFIGS[0])
        resnet32(forecast, batch)
        step = f"{forecast.launches} launches, {forecast.seconds * 1e3:.2f} ms"
        print(f"ResNet-32, bn_only, batch {batch}: {step}, {batch / forecast.seconds:,.0f} images/s at best")
