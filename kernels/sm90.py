"""What the Triton kernels become on an H100 or H200, GPU or none: registers, spills, expected time.

python kernels_sm90.py
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import triton
from torch import nn

from kernels.cuda import CONFIGS, DTYPES, ELEMENTWISE, Config, CudaPasses, empty_image
from kernels.reference import Conv

HOPPER, BYTES_PER_S, FLOP_PER_S, LAUNCH_S = (
    ("cuda", 90, 32),
    4.3e12,
    790e12,
    2e-6,
)  # an H200, measured elsewhere


class Forecast(CudaPasses):
    """Launches nothing, on tensors without memory. With `seen`, compiles and prints each kernel not in it."""

    def __init__(self, config: Config, seen: set | None = None):
        super().__init__(lambda key, attempt: config)
        self.seen, self.seconds, self.launches = seen, 0.0, 0

    def launch(self, kernel, grid, *arguments, config=ELEMENTWISE, **constants):
        tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
        moved = sum(t.nbytes for t in tensors)
        k = constants.get("K", 0)
        flops = 2 * grid[0] * config.block * k * k * constants.get("C_IN", 0) * constants.get("C_OUT", 0)
        predicted = max(moved / BYTES_PER_S, flops / FLOP_PER_S, LAUNCH_S)
        self.seconds, self.launches = self.seconds + predicted, self.launches + 1
        types = (a.dtype if isinstance(a, torch.Tensor) else type(a) for a in arguments)
        what = (kernel.__name__, *types, config, *constants.items())
        if self.seen is None or what in self.seen:
            return
        self.seen.add(what)
        shape = f"{constants['C_IN']}->{constants['C_OUT']}" if k else f"{constants['C']}"
        shape += f" {constants['H']}x{constants['W']} k{k} s{constants['STRIDE']}" if k else ""
        block = config.block or constants.get("BLOCK", constants.get("STEP"))
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        optional = [name for name in ("norm", "add", "z_below", "shortcut", "signs", "g") if name in given]
        print(f"{kernel.__name__:18}{shape:18}{block:5}{config.warps:3}{config.stages:3}", end=" ")
        print(compiled(kernel, arguments, config, constants), end=" ")
        used = (name for name in optional if given[name] is not None)
        print(f"{moved / 1e6:8.2f}{predicted * 1e6:7.1f} ", *used, flush=True)


def compiled(kernel, arguments: Sequence, config: Config, constants: dict) -> str:
    """Registers, bytes spilt, bytes of shared memory and the matrix instruction, compiled for Hopper."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {**DTYPES, torch.uint8: "u8"}
    signature, fixed, attributes = dict.fromkeys(constants, "constexpr"), dict(constants), {}
    for i, (name, a) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if a is None:
            signature[name], fixed[name] = "constexpr", None
        elif isinstance(a, torch.Tensor):
            signature[name] = "*" + pointers[a.dtype]
        else:
            signature[name] = "i32" if isinstance(a, int) else "fp32"
        if isinstance(a, torch.Tensor) or (isinstance(a, int) and a % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, fixed, attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    made = triton.compile(source, target=GPUTarget(*HOPPER), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [tool, "--dump-resource-usage", cubin.name]
        used = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{w}:(\d+)", used)[1]) for w in ("REG", "STACK", "LOCAL"))
    instruction = next((name for name in ("wgmma", "mma.sync") if name in made.asm["ptx"]), "-")
    return f"{registers:4}{stack + local:6}{made.metadata.shared:8} {instruction:9}"


def block(
    passes: CudaPasses, x: torch.Tensor, units: list[tuple], shortcut=True, relu=True, first=False
) -> torch.Tensor:
    """The output of a block whose units are (channels, kernel, stride), once its backward has run too."""
    dtype, below, kept = x.dtype, (x, None), []
    for channels, k, stride in units:
        weight = torch.empty(channels, below[0].shape[1], k, k, dtype=dtype, device=x.device)
        weight = weight.contiguous(memory_format=torch.channels_last)
        bn, conv = nn.BatchNorm2d(channels, device=x.device), Conv((stride, stride), (k // 2, k // 2))
        z, norm = passes.convolve(*below, weight, conv, bn)
        kept.append((below, z, norm, weight, conv))
        below = z, norm
    added = torch.empty_like(below[0]) if shortcut else None
    y, signs = passes.activate(*below, added, relu, want_signs=shortcut)
    g, sums = passes.mask_and_sum(y, *below, signs, relu)
    for i, (below, z, norm, weight, conv) in reversed(list(enumerate(kept))):
        identity = g if i == 0 and below[0].shape == y.shape else None
        if i:
            g, sums = passes.convolve_backward(g, z, norm, sums, weight, conv, below[0].shape, below)
        elif not first:
            passes.convolve_backward(g, z, norm, sums, weight, conv, below[0].shape, add=identity)
    return y


def resnet32(passes: CudaPasses, batch: int, repeats: int = 5) -> None:
    """The passes of one step in which BatchNorm alone is trained."""
    x = torch.empty(batch, 3, 32, 32, dtype=torch.bfloat16, device="meta")
    x = block(passes, empty_image(x, x.shape), [(16, 3, 1)], shortcut=False, first=True)
    for channels in (16, 32, 64):
        for _ in range(repeats):
            stride = 1 if x.shape[1] == channels else 2
            if stride == 2:
                block(passes, x, [(channels, 1, 2)], shortcut=False, relu=False)
            x = block(passes, x, [(channels, 3, stride), (channels, 3, 1)])


if __name__ == "__main__":
    print("kernel            channels        block wa st  reg spilt  shared matrix         MB     us  with")
    seen = set()
    for config in CONFIGS:
        resnet32(Forecast(config, seen), 128, repeats=2)
    for batch in (128, 1024):
        forecast = Forecast(CONFIGS[0])
        resnet32(forecast, batch)
        step = f"{forecast.launches} launches, {forecast.seconds * 1e3:.2f} ms"
        print(f"ResNet-32, bn_only, batch {batch}: {step}, {batch / forecast.seconds:,.0f} images/s at best")
