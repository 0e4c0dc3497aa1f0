"""The roofline of a training step: the least time it could take, and the least memory it could keep.

A step must move its activations through memory and do its multiply-adds. So it takes at least the bytes
divided by the device's bandwidth, and at least the operations divided by its peak rate. The larger of the two
is its floor (Williams, Waterman, Patterson 2009).
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer


@dataclass
class Cost:
    """What one image costs: elements of activations, and multiply-adds of convolutions."""

    conv_outputs: int = 0
    block_inputs: int = 0
    signs: int = 0  # outputs of blocks with a shortcut; backward needs one bit for each
    multiply_adds: int = 0


def cost(model: nn.Module, image_size: int) -> Cost:
    """Return the cost of `model`, best built on the meta device, for images of `image_size` pixels a side."""
    total, images, model = Cost(), 2, copy.deepcopy(model).to("meta")
    shortcuts = {id(getattr(module, "downsample", None)) for module in model.modules()}

    def convolution(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        total.conv_outputs += output.numel() // images
        total.multiply_adds += output.numel() // images * conv.weight[0].numel()

    def block(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        total.block_inputs += inputs[0].numel() // images
        total.signs += output.numel() // images if hasattr(module, "downsample") else 0

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(convolution)
        elif hasattr(module, "execution") and module is not model and id(module) not in shortcuts:
            module.register_forward_hook(block)
    model(torch.zeros(images, 3, image_size, image_size, device="meta"))
    return total


def least_bytes(of: Cost, dtype: torch.dtype) -> dict[str, float]:
    """Return the least bytes per image kept for backward when only BatchNorm trains.

    "floor" counts each convolution's output once, and "floor_recompute" each block's input. Both add one bit
    for each output of a block with a shortcut.
    """
    kept = {"floor": of.conv_outputs, "floor_recompute": of.block_inputs}
    return {name: elements * dtype.itemsize + of.signs / 8 for name, elements in kept.items()}


def least_s(of: Cost, weights_train: bool, dtype: torch.dtype, rates: tuple[float, float]) -> float:
    """Return the least seconds per image, at the `rates` that `device_rates` returns.

    Six passes over each convolution's output are counted: forward, it is written and read once; backward, a
    gradient of its size is written and three such tensors are read. The arithmetic is that of the forward
    pass, of the input gradient and, if `weights_train`, of the weight gradient.
    """
    passes_s = 6 * of.conv_outputs * dtype.itemsize / rates[0]
    return max(passes_s, 2 * of.multiply_adds * (3 if weights_train else 2) / rates[1])


def device_rates(device: torch.device) -> tuple[float, float]:
    """Measure a GPU's rates: bytes/s of a copy, read plus written, and FLOP/s of a bf16 matrix product."""
    size, side = 1 << 30, 8192
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    works = (lambda: target.copy_(source)), (lambda: a @ b)
    # A GPU that was idle is slow at first, which the median of a second leaves out.
    timers = [Timer("f()", globals={"f": work}) for work in works]
    copy_s, product_s = (timer.blocked_autorange(min_run_time=1).median for timer in timers)
    return 2 * size / copy_s, 2 * side**3 / product_s
