"""What every network here is made of: convolutions with BatchNorm and ReLU, and a shortcut around them.

`conv_bn_relu` is one differentiable function that keeps for its backward pass no more than a frozen network
needs: each convolution's output once, and one bit per element where a shortcut was added. Autograd by itself
also keeps every convolution's input, although no gradient of frozen weights is wanted (pytorch issue 133566).
The formulas are in reference.py; cpu.py and cuda.py compute them faster.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import cpu
from kernels.distributed import Group, Synced
from kernels.reference import D_BETA, D_GAMMA, BatchNorm, Conv, TorchPasses

MEMORY = ("lean", "recompute", "stock")
Units = Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]]  # of a block, from its input to its output


class Execution(NamedTuple):
    """How `conv_bn_relu` computes.

    `memory` is what it keeps for backward: "lean" (each convolution's output), "recompute" (each block's
    input, at the price of computing its convolutions twice) or "stock" (what autograd keeps). `compiled`: use
    our own kernels where they cover device, dtype and shape, and PyTorch's elsewhere; or only PyTorch's.
    `group`: the processes over whose batches, taken together, BatchNorm normalises in training; see `Synced`.
    """

    memory: str = "lean"
    compiled: bool = True
    group: Group | None = None


DEFAULT = Execution()


def configure(
    model: nn.Module, memory: str = "lean", compiled: bool = True, group: Group | None = None
) -> None:
    """Set the `execution` of every module of `model` that has one.

    Raises ValueError for an unknown `memory`, and for "stock" with a group.
    """
    if memory not in MEMORY:
        raise ValueError(f"memory {memory!r} is unknown; choose from {', '.join(MEMORY)}")
    if memory == "stock" and group is not None:
        raise ValueError("memory 'stock' takes no group: autograd's BatchNorm sees one process's batch alone")
    for module in model.modules():
        if hasattr(module, "execution"):
            module.execution = Execution(memory, compiled, group)


def conv_bn_relu(
    x: Tensor, units: Units, shortcut: Tensor | None = None, relu: bool = True, execution: Execution = DEFAULT
) -> Tensor:
    """relu(unit_n(... relu(unit_1(x))) + shortcut), a unit being bn(conv(x)); the last ReLU only with `relu`.

    `x` is `[N, C_in, H, W]`, the result and `shortcut` are `[N, C_out, H', W']`, all channels_last. A `bn` in
    training mode normalises with the batch's statistics and updates its running ones, whether or not anything
    is trained. Batches are not counted (`num_batches_tracked`), because momentum is constant. Raises
    ValueError in training when a channel has only one value, which cannot be normalised.
    """
    training = units[0][1].training
    keeps_all = execution.memory == "stock" if training else torch.is_grad_enabled()
    if keeps_all or x.is_meta:
        return stock(x, units, shortcut, relu)
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        cast = x.to(torch.get_autocast_dtype(device_type))
        x, shortcut = cast, cast if shortcut is x else shortcut
    passes = passes_for(device_type, execution.compiled)
    if training:
        passes = passes if execution.group is None else Synced(passes, execution.group)
        return train_block(passes, x, units, shortcut, relu, execution.memory == "recompute")
    return infer_block(passes, x, units, shortcut, relu)


def stock(x: Tensor, units: Units, shortcut: Tensor | None = None, relu: bool = True) -> Tensor:
    """`conv_bn_relu` as one would write it in PyTorch, differentiated by autograd."""
    for conv, bn in units[:-1]:
        x = F.relu(bn(conv(x)))
    conv, bn = units[-1]
    y = bn(conv(x))
    if shortcut is not None:
        y = y + shortcut
    return F.relu(y) if relu else y


def train_block(
    passes: TorchPasses, x: Tensor, units: Units, shortcut: Tensor | None, relu: bool, recompute: bool = False
) -> Tensor:
    """`conv_bn_relu` in training, computed by `passes`."""
    identity = shortcut is x  # its gradient is added to x's within the block, which saves autograd a pass
    convs = [Conv(conv.stride, conv.padding) for conv, _ in units]
    batch_norms = [BatchNorm.of(bn) for _, bn in units]
    plan = passes, convs, batch_norms, relu, identity, recompute
    weights = [_weight(conv, x.dtype) for conv, _ in units]
    bn_parameters = [parameter for bn in batch_norms for parameter in (bn.gamma, bn.beta)]
    return _Block.apply(plan, x, None if identity else shortcut, *weights, *bn_parameters)


def infer_block(
    passes: TorchPasses, x: Tensor, units: Units, shortcut: Tensor | None, relu: bool = True
) -> Tensor:
    """`conv_bn_relu` in evaluation, computed by `passes`."""
    x = _channels_last(x)
    for i, (conv, bn) in enumerate(units, start=1):
        last, weight = i == len(units), _weight(conv, x.dtype)
        norm = passes.norm(bn.running_mean, bn.running_var, BatchNorm.of(bn))
        ends = (shortcut, relu) if last else ()
        x = passes.infer(x, weight, Conv(conv.stride, conv.padding), norm, *ends)
    return x


class _Block(torch.autograd.Function):
    """A block. The lists are over its units; weights are in x's dtype, zs and norms as in reference.py."""

    @staticmethod
    def forward(ctx, plan: tuple, x: Tensor, shortcut: Tensor | None, *parameters: Tensor) -> Tensor:
        passes, convs, batch_norms, relu, identity, recompute = plan
        count, x = len(convs), _channels_last(x)
        weights, done = parameters[:count], [(x, None)]
        for bn, weight, conv in zip(batch_norms, weights, convs, strict=True):
            done.append(passes.convolve(*done[-1], weight, conv, bn))
            if done[-1][0].numel() == len(bn.gamma):
                raise ValueError(f"BatchNorm needs more than one value per channel, of {tuple(x.shape)}")
        zs, norms = zip(*done[1:], strict=True)
        added = x if identity else _channels_last(shortcut)
        y, signs = passes.activate(*done[-1], added, relu, want_signs=relu and added is not None)

        needed = ctx.needs_input_grad[3 : 3 + count]
        trained = [weight if train else None for weight, train in zip(weights, needed, strict=True)]
        kept_x, kept_zs = x if recompute or needed[0] else None, () if recompute else zs
        ctx.save_for_backward(kept_x, signs, *norms, *trained, *kept_zs)
        # Frozen weights are the same tensors in every step: a reference to them costs no memory.
        frozen = [None if train else weight for weight, train in zip(weights, needed, strict=True)]
        ctx.plan, ctx.frozen, ctx.x_shape = plan, frozen, x.shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        passes, convs, _, relu, identity, recompute = ctx.plan
        count, (x, signs, *saved) = len(convs), ctx.saved_tensors
        norms, trained, zs = saved[:count], saved[count : 2 * count], saved[2 * count :]
        weights = [a if b is None else b for a, b in zip(ctx.frozen, trained, strict=True)]
        for i in range(count if recompute else 0):
            below = (zs[i - 1], norms[i - 1]) if i else (x, None)
            zs.append(passes.convolve(*below, weights[i], convs[i])[0])

        needs_x, needs_shortcut = ctx.needs_input_grad[1:3]
        d_weights, d_bn = [None] * count, [None] * (2 * count)
        g, sums = passes.mask_and_sum(_channels_last(dy), zs[-1], norms[-1], signs, relu)
        d_shortcut, added = passes.dense(g) if needs_shortcut else None, g if identity else None
        for i in reversed(range(count)):
            d_bn[2 * i : 2 * i + 2] = sums[D_GAMMA], sums[D_BETA]
            here, dz = (g, zs[i], norms[i], sums), None
            if trained[i] is not None:
                dz = passes.gradient(*here)
                x_i = passes.activate(zs[i - 1], norms[i - 1])[0] if i else x
                d_weights[i] = passes.weight_gradient(dz, x_i, weights[i], convs[i])
            here = (*here, weights[i], convs[i])
            if i:
                below = (zs[i - 1], norms[i - 1])
                g, sums = passes.convolve_backward(*here, below[0].shape, below, dz=dz)
        d_x = passes.convolve_backward(*here, ctx.x_shape, add=added, dz=dz)[0] if needs_x else None
        return None, d_x, d_shortcut, *d_weights, *d_bn


def passes_for(device_type: str, compiled: bool = True) -> TorchPasses:
    """The passes of a device of this type; their `name` is "cpp" or "triton", our own, or "torch"."""
    if compiled and device_type == "cpu":
        return cpu.passes()
    if compiled and device_type == "cuda":
        from kernels import cuda  # here, because importing Triton takes a second

        return cuda.passes()
    return TorchPasses()


def _weight(conv: nn.Conv2d, dtype: torch.dtype) -> Tensor:
    """The weight that `conv` applies, in `dtype`. A frozen one is converted only once."""
    weight = conv.effective_weight() if hasattr(conv, "effective_weight") else conv.weight
    if weight is not conv.weight or weight.dtype == dtype or weight.requires_grad:
        return weight.to(dtype)
    key = (weight.data_ptr(), weight._version, dtype)
    if getattr(conv, "_converted", (None,))[0] != key:
        conv._converted = key, weight.detach().to(dtype)
    return conv._converted[1]


def _channels_last(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)
