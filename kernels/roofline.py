"""The roofline of a training step: the least seconds it could take, and the least bytes it could keep.

A step must move its activations through memory and do its multiply-adds. So it takes no less than the bytes
divided by the device's bandwidth, and no less than the operations divided by its peak rate; the larger of
the two is its floor (Williams, Waterman, Patterson 2009).
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer


@dataclass
class Cost:
    """What one image costs a network: elements of activations, and multiply-adds of convolutions."""

    conv_outputs: int = 0
    block_inputs: int = 0
    signs: int = 0  # outputs of blocks with a shortcut, for each of which backward needs one bit
    multiply_adds: int = 0


def cost(model: nn.Module, image_size: int) -> Cost:
    """The cost of `model`, best built on the meta device, for images of `image_size` pixels a side."""
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
    """The least bytes per image kept for backward where only BatchNorm trains.

    They are each convolution's output once, or with recomputation each block's input; and one bit for each
    output of a block with a shortcut.
    """
    kept = {"floor": of.conv_outputs, "floor_recompute": of.block_inputs}
    return {name: elements * dtype.itemsize + of.signs / 8 for name, elements in kept.items()}


def least_s(of: Cost, weights_train: bool, dtype: torch.dtype, rates: tuple[float, float]) -> float:
    """The least seconds per image, at the `rates` that `device_rates` gives.

    Each convolution's output passes through memory six times: written by the convolution, read by the next;
    in backward, written once and read three times. The arithmetic is forward, the gradient of the input and,
    where weights train, theirs.
    """
    passes_s = 6 * of.conv_outputs * dtype.itemsize / rates[0]
    return max(passes_s, 2 * of.multiply_adds * (3 if weights_train else 2) / rates[1])


def device_rates(device: torch.device) -> tuple[float, float]:
    """What a GPU attains: bytes/s of a copy, read and written, and FLOP/s of a product of bf16 matrices."""
    size, side = 1 << 30, 8192
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    works = (lambda: target.copy_(source)), (lambda: a @ b)
    copy_s, product_s = (Timer("f()", globals={"f": f}).blocked_autorange().median for f in works)
    return 2 * size / copy_s, 2 * side**3 / product_s
