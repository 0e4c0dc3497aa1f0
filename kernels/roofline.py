"""The least that a step of a network could take: bytes kept for backward, and seconds on a device."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable

import torch
from torch import nn

import models


@dataclasses.dataclass
class Cost:
    """What an image costs a network: elements of its tensors, and multiply-adds of its convolutions."""

    conv_outputs: int = 0
    block_inputs: int = 0
    signs: int = 0  # outputs of blocks with a shortcut, of whose sign backward needs a bit each
    multiply_adds: int = 0


def cost(arch: str, image_size: int) -> Cost:
    total, count = Cost(), 2

    def convolution(conv: nn.Conv2d, inputs: tuple, output: torch.Tensor) -> None:
        total.conv_outputs += output.numel() // count
        total.multiply_adds += output.numel() // count * conv.weight[0].numel()

    def block(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        total.block_inputs += inputs[0].numel() // count
        total.signs += output.numel() // count if hasattr(module, "downsample") else 0

    with torch.device("meta"):
        model = models.build(arch)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(convolution)
            elif isinstance(module, (models.BasicBlock, models.Bottleneck, models.VGGLayer)):
                module.register_forward_hook(block)
        model(torch.zeros(count, 3, image_size, image_size))
    return total


def least_bytes(of: Cost, dtype: torch.dtype) -> dict[str, float]:
    """Bytes an image must leave for backward where only BatchNorm trains, without and with recomputation.

    Each convolution's output once, or each block's input; and a bit an output of every block's ReLU.
    """
    kept = {"floor": of.conv_outputs, "floor_recompute": of.block_inputs}
    return {name: elements * dtype.itemsize + of.signs / 8 for name, elements in kept.items()}


def least_s(of: Cost, weights_train: bool, dtype: torch.dtype, rates: tuple[float, float]) -> float:
    """The least seconds an image takes: six passes over every convolution's output, or all arithmetic.

    The passes: written by the convolution, read by the next; backward, written once and read three times. The
    arithmetic: forward, gradient of the input, and of the weights where these train.
    """
    passes_s = 6 * of.conv_outputs * dtype.itemsize / rates[0]
    return max(passes_s, 2 * of.multiply_adds * (3 if weights_train else 2) / rates[1])


def device_rates(device: torch.device) -> tuple[float, float]:
    """What a GPU reaches: bytes/s of a copy, read and written ones counted, and FLOP/s of a bf16 product."""

    def seconds(work: Callable[[], object], repeats: int = 20) -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        work()
        for event in events[:-1]:
            event.record()
            work()
        events[-1].record()
        torch.cuda.synchronize(device)
        return statistics.median(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events))

    size, side = 1 << 30, 8192
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * size / seconds(lambda: target.copy_(source)), 2 * side**3 / seconds(lambda: a @ b)
