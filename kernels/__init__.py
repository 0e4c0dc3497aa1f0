"""The block that every network here is made of: convolutions with BatchNorm and ReLU, and perhaps a shortcut.

`conv_bn_relu` computes a block as one differentiable function. With frozen weights, it keeps for its backward
pass only each convolution's output once, and one bit per element if a shortcut is added. Autograd on its own
also keeps every ReLU's output, which is the next convolution's input.
reference.py has the formulas; cpu.py and cuda.py compute them faster.
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
Units = Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]]  # a block's, in order from its input to its output


class Execution(NamedTuple):
    """How `conv_bn_relu` computes.

    `memory` selects what training keeps for backward. "lean" keeps each convolution's output; "recompute"
    keeps each block's input and computes its convolutions twice; "stock" keeps what autograd keeps. If
    `compiled`, our own kernels run where they cover the device, dtype and shape, and PyTorch's run elsewhere;
    otherwise only PyTorch's run. If a `group` of processes is given, BatchNorm normalises over their combined
    batches in training; see `Synced`. If `passes` are given, they run, even on tensors without memory.
    """

    memory: str = "lean"
    compiled: bool = True
    group: Group | None = None
    passes: TorchPasses | None = None


DEFAULT = Execution()


def configure(
    model: nn.Module, memory: str = "lean", compiled: bool = True, group: Group | None = None
) -> None:
    """Set the `execution` attribute of every module of `model` that has one; see `Execution`.

    Raises ValueError if `memory` is unknown, or if it is "stock" and a group is given.
    """
    if memory not in MEMORY:
        raise ValueError(f"memory {memory!r} is unknown; choose from {', '.join(MEMORY)}")
    if memory == "stock" and group is not None:
        raise ValueError("memory 'stock' takes no group: PyTorch's BatchNorm sees only one process's batch")
    for module in model.modules():
        if hasattr(module, "execution"):
            module.execution = Execution(memory, compiled, group)


def conv_bn_relu(
    x: Tensor, units: Units, shortcut: Tensor | None = None, relu: bool = True, execution: Execution = DEFAULT
) -> Tensor:
    """Return relu(unit_n(... relu(unit_1(x))) + shortcut), where a unit is bn(conv(x)).

    The last ReLU is applied only if `relu`. `x` is `[N, C_in, H, W]`; the result and `shortcut` are
    `[N, C_out, H', W']`; all are channels_last. In training mode, each `bn` normalises with the batch's
    statistics and updates its running statistics, even if nothing is trained. Except with memory "stock", it
    does not count batches (`num_batches_tracked`), because its momentum is constant. Raises ValueError in
    training if a channel has only one value, because that cannot be normalised.
    """
    training = units[0][1].training
    keeps_all = execution.memory == "stock" if training else torch.is_grad_enabled()
    passes = execution.passes
    if keeps_all or (x.is_meta and passes is None):
        return stock(x, units, shortcut, relu)
    device_type = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device_type):
        cast = x.to(torch.get_autocast_dtype(device_type))
        x, shortcut = cast, cast if shortcut is x else shortcut
    passes = passes or passes_for(device_type, execution.compiled)
    if training:
        passes = passes if execution.group is None else Synced(passes, execution.group)
        return train_block(passes, x, units, shortcut, relu, execution.memory == "recompute")
    return infer_block(passes, x, units, shortcut, relu)


def stock(x: Tensor, units: Units, shortcut: Tensor | None = None, relu: bool = True) -> Tensor:
    """Compute `conv_bn_relu` with ordinary PyTorch modules and autograd's backward pass."""
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
    """Compute `conv_bn_relu` in training with `passes`; `recompute` stands for memory "recompute"."""
    identity = shortcut is x  # its gradient is added to x's inside the block, which saves autograd a pass
    convs = [Conv(conv.stride, conv.padding) for conv, _ in units]
    batch_norms = [BatchNorm.of(bn) for _, bn in units]
    plan = passes, convs, batch_norms, relu, identity, recompute
    weights = [_weight(conv, x.dtype) for conv, _ in units]
    bn_parameters = [parameter for bn in batch_norms for parameter in (bn.gamma, bn.beta)]
    return _Block.apply(plan, x, None if identity else shortcut, *weights, *bn_parameters)


def infer_block(
    passes: TorchPasses, x: Tensor, units: Units, shortcut: Tensor | None, relu: bool = True
) -> Tensor:
    """Compute `conv_bn_relu` in evaluation with `passes`."""
    x = channels_last(x)
    for i, (conv, bn) in enumerate(units, start=1):
        last, weight = i == len(units), _weight(conv, x.dtype)
        norm = passes.norm(bn.running_mean, bn.running_var, BatchNorm.of(bn))
        ends = (shortcut, relu) if last else ()
        x = passes.infer(x, weight, Conv(conv.stride, conv.padding), norm, *ends)
    return x


class _Block(torch.autograd.Function):
    """A block in training. Lists run over units; weights have x's dtype; reference.py defines z and norm."""

    @staticmethod
    def forward(ctx, plan: tuple, x: Tensor, shortcut: Tensor | None, *parameters: Tensor) -> Tensor:
        passes, convs, batch_norms, relu, identity, recompute = plan
        count, x = len(convs), channels_last(x)
        weights, done = parameters[:count], [(x, None)]
        for bn, weight, conv in zip(batch_norms, weights, convs, strict=True):
            done.append(passes.convolve(*done[-1], weight, conv, bn))
            if done[-1][0].numel() == len(bn.gamma):
                raise ValueError(f"BatchNorm needs more than one value per channel, not {tuple(x.shape)}")
        zs, norms = zip(*done[1:], strict=True)
        added = x if identity else channels_last(shortcut)
        y, signs = passes.activate(*done[-1], added, relu, want_signs=relu and added is not None)

        needed = ctx.needs_input_grad[3 : 3 + count]
        trained = [weight if train else None for weight, train in zip(weights, needed, strict=True)]
        kept_x, kept_zs = x if recompute or needed[0] else None, () if recompute else zs
        ctx.save_for_backward(kept_x, signs, *norms, *trained, *kept_zs)
        # Frozen weights are the same tensors in every step, so a reference to them costs no memory.
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
        g, sums = passes.mask_and_sum(channels_last(dy), zs[-1], norms[-1], signs, relu)
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
        passes.finish(sums)
        return None, d_x, d_shortcut, *d_weights, *d_bn


def passes_for(device_type: str, compiled: bool = True) -> TorchPasses:
    """Return the passes for a device type; their `name` is "cpp" or "triton" (our own kernels) or "torch"."""
    if compiled and device_type == "cpu":
        return cpu.passes()
    if compiled and device_type == "cuda":
        from kernels import cuda  # here, because importing Triton takes a second

        return cuda.passes()
    return TorchPasses()


def compile_ahead(model: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Compile, several at once, what a GPU will try for `model` and images of `shape` `[N, 3, H, W]`.

    It is optional: each kernel is compiled when it is first tried. The mode of `model`, training or not, is
    the one that it will run in. On a CPU, this does nothing.
    """
    passes = passes_for(next(model.parameters()).device.type)
    if passes.name == "triton":
        from kernels import ahead

        ahead.compile_all(passes, model, shape, dtype)


def _weight(conv: nn.Conv2d, dtype: torch.dtype) -> Tensor:
    """Return the weight that `conv` applies, in `dtype`; a frozen weight is converted only once.

    One that trains requires a gradient even in evaluation, so that nothing made from it is kept.
    """
    weight = conv.effective_weight() if hasattr(conv, "effective_weight") else conv.weight
    if weight is not conv.weight or weight.requires_grad:
        conv._converted = None, None  # the optimiser's changes do not show in `_version`
        return weight.to(dtype).requires_grad_(weight.requires_grad or not torch.is_grad_enabled())
    if weight.dtype == dtype:
        return weight
    key = (weight.data_ptr(), weight._version, dtype)
    if getattr(conv, "_converted", (None,))[0] != key:
        conv._converted = key, weight.detach().to(dtype)
    return conv._converted[1]


def channels_last(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)
