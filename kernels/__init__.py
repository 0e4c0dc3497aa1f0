"""What every network here is made of: convolutions with BatchNorm and ReLU in a row, a shortcut around them.

`conv_bn_relu` is one differentiable function that keeps for its backward pass what a frozen network needs and
no more: each convolution's output once, and a bit an element where a shortcut was added. Stock autograd keeps
every convolution's input too, though nothing asks for the gradient of frozen weights (pytorch issue 133566).
"""

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from kernels import cpu
from kernels.distributed import Group
from kernels.reference import D_B, D_BETA, D_GAMMA, Conv, TorchPasses

MEMORY = ("lean", "recompute", "stock")
_memory, _compiled, _group = "lean", True, None


@contextlib.contextmanager
def using(memory: str = "lean", compiled: bool = True, group: Group | None = None) -> Iterator[None]:
    """How `conv_bn_relu` goes about it in this context.

    `memory`: what is kept for backward, "lean" (each convolution's output), "recompute" (each block's input,
    at the price of its convolutions' forward once more) or "stock" (what autograd keeps). `compiled`: by our
    own kernels where they cover device, dtype and shape, else, and where not wanted, by PyTorch's. `group`:
    the processes whose batches BatchNorm takes as one in training, see `Synced`; not with "stock".
    """
    global _memory, _compiled, _group
    if memory not in MEMORY:
        raise ValueError(f"memory {memory!r}: choose from {', '.join(MEMORY)}")
    if memory == "stock" and group is not None:
        raise ValueError("memory 'stock': autograd's BatchNorm knows of no other process's batch")
    before, (_memory, _compiled, _group) = (_memory, _compiled, _group), (memory, compiled, group)
    try:
        yield
    finally:
        _memory, _compiled, _group = before


def conv_bn_relu(
    x: torch.Tensor,
    units: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]],
    shortcut: torch.Tensor | None = None,
    relu: bool = True,
) -> torch.Tensor:
    """relu(unit_n(... relu(unit_1(x))) + shortcut), a unit being bn(conv(x)).

    `x` is `[N, C_in, H, W]`, the result and `shortcut` are `[N, C_out, H', W']`, all channels_last. `bn` in
    training mode normalises with the batch's statistics and updates its running ones, whether or not anything
    is trained; it does not count batches (`num_batches_tracked`), since its momentum is constant.
    """
    training, given = units[0][1].training, x
    if _memory == "stock" or x.is_meta or (torch.is_grad_enabled() and not training):
        return stock(x, units, shortcut, relu)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    passes = _passes(x.device.type) if _compiled else TorchPasses()
    weights = [_weight(conv, x.dtype) for conv, _ in units]
    if training:
        passes = passes if _group is None else Synced(passes, _group)
        bn_parameters = [parameter for _, bn in units for parameter in (bn.weight, bn.bias)]
        identity = shortcut is given  # whose gradient we add to x's, which saves autograd a pass
        plan = (passes, units, relu, identity, _memory == "recompute")
        return _Block.apply(plan, x, None if identity else shortcut, *weights, *bn_parameters)
    x, norm = _channels_last(x), None
    for (conv, bn), weight in zip(units, weights, strict=True):
        x, _ = passes.convolve(x, norm, weight, Conv(conv.stride, conv.padding))
        norm = passes.norm(bn.running_mean, bn.running_var, bn)
    return passes.activate(x, norm, shortcut, relu)[0]


def stock(
    x: torch.Tensor,
    units: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]],
    shortcut: torch.Tensor | None = None,
    relu: bool = True,
) -> torch.Tensor:
    """`conv_bn_relu` as one would write it, differentiated by autograd."""
    for conv, bn in units[:-1]:
        x = F.relu(bn(conv(x)))
    conv, bn = units[-1]
    y = bn(conv(x))
    if shortcut is not None:
        y = y + shortcut
    return F.relu(y) if relu else y


class _Block(torch.autograd.Function):
    """Lists run over the units: weights in `x`'s dtype, z (a convolution's output) and norm (its batch's)."""

    @staticmethod
    def forward(ctx, plan, x, shortcut, *parameters):
        passes, units, relu, identity, recompute = plan
        x = _channels_last(x)
        weights, convs = parameters[: len(units)], [Conv(conv.stride, conv.padding) for conv, _ in units]
        zs, norms, below = [], [], (x, None)
        for (_, bn), weight, conv in zip(units, weights, convs, strict=True):
            if _count(below[0], weight, conv) < 2:
                raise ValueError(f"BatchNorm needs more than one value per channel, of {tuple(x.shape)}")
            below = passes.convolve(*below, weight, conv, bn)
            zs.append(below[0])
            norms.append(below[1])
        added = x if identity else shortcut
        if added is not None:
            added = _channels_last(added)
        y, signs = passes.activate(*below, added, relu, want_signs=relu and added is not None)

        trained = [i for i, needed in enumerate(ctx.needs_input_grad[3 : 3 + len(units)]) if needed]
        keep_x = recompute or 0 in trained
        ctx.plan, ctx.convs, ctx.trained, ctx.x_shape = plan, convs, trained, x.shape
        # Frozen weights are the run's own copy, the same in every step: held, not saved.
        ctx.weights = [None if i in trained else weight for i, weight in enumerate(weights)]
        ctx.save_for_backward(
            x if keep_x else None,
            signs,
            *norms,
            *([] if recompute else zs),
            *(weights[i] for i in trained),
        )
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        passes, units, relu, identity, recompute = ctx.plan
        x, signs, *saved = ctx.saved_tensors
        count, convs = len(units), ctx.convs
        norms, saved = saved[:count], saved[count:]
        zs, saved = ([], saved) if recompute else (saved[:count], saved[count:])
        weights = list(ctx.weights)
        for i, weight in zip(ctx.trained, saved, strict=True):
            weights[i] = weight
        for i in range(count if recompute else 0):
            below = (zs[i - 1], norms[i - 1]) if i else (x, None)
            zs.append(passes.convolve(*below, weights[i], convs[i])[0])

        needs_x, needs_shortcut = ctx.needs_input_grad[1:3]
        needs_parameters = ctx.needs_input_grad[3:]
        d_weights, d_bn = [None] * count, [None] * (2 * count)
        g, sums = passes.mask_and_sum(_channels_last(dy), zs[-1], norms[-1], signs, relu)
        d_shortcut = passes.whole(g) if needs_shortcut else None
        added = g if identity else None
        for i in reversed(range(count)):
            if needs_parameters[count + 2 * i]:
                d_bn[2 * i] = sums[D_GAMMA]
            if needs_parameters[count + 2 * i + 1]:
                d_bn[2 * i + 1] = sums[D_BETA]
            here, dz = (g, zs[i], norms[i], sums), None
            if i in ctx.trained:
                dz = passes.gradient(*here)
                x_i = passes.activate(zs[i - 1], norms[i - 1])[0] if i else x
                d_weights[i] = passes.weight_gradient(dz, x_i, weights[i], convs[i])
            here = (*here, weights[i], convs[i])
            if i:
                below = (zs[i - 1], norms[i - 1])
                g, sums = passes.convolve_backward(*here, below[0].shape, below, dz=dz)
        d_x = None
        if needs_x:
            d_x, _ = passes.convolve_backward(*here, ctx.x_shape, add=added, dz=dz)
        return None, d_x, d_shortcut, *d_weights, *d_bn


class Synced:
    """Passes over one process's part of a batch, with the BatchNorm of all parts, equal in size.

    Only averages over the parts travel, a few numbers per channel. The loss being the mean over a part, so is
    every gradient here; the average over the processes of those that come out is that of the whole batch.
    """

    def __init__(self, passes: TorchPasses, group: Group):
        self.passes, self.group = passes, group

    def __getattr__(self, name: str):
        return getattr(self.passes, name)  # what depends on no other image of the batch

    def convolve(self, x, norm, weight, conv, bn=None):
        if bn is None:
            return self.passes.convolve(x, norm, weight, conv)
        # With momentum 1, running statistics become the part's own: its mean, and its variance over n - 1.
        own = {name: torch.zeros_like(getattr(bn, name)) for name in ("running_mean", "running_var")}
        part = SimpleNamespace(weight=bn.weight, bias=bn.bias, eps=bn.eps, momentum=1.0, **own)
        z, _ = self.passes.convolve(x, norm, weight, conv, part)
        n = z.numel() // z.shape[1]
        mean, var = part.running_mean.double(), part.running_var.double() * ((n - 1) / n)
        mean, square = self.group.average(torch.stack([mean, var + mean**2]))  # whose digits float64 spares
        var, n = (square - mean**2).clamp_min(0), n * self.group.count
        bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), bn.momentum)
        bn.running_var.lerp_((var * (n / (n - 1))).to(bn.running_var.dtype), bn.momentum)
        return z, self.passes.norm(mean.to(bn.weight.dtype), var.to(bn.weight.dtype), bn)

    def mask_and_sum(self, *arguments):
        g, sums = self.passes.mask_and_sum(*arguments)
        return g, self.shared(sums)

    def convolve_backward(self, *arguments, **more):
        dx, sums = self.passes.convolve_backward(*arguments, **more)
        return dx, None if sums is None else self.shared(sums)

    def shared(self, sums: torch.Tensor) -> torch.Tensor:
        """`sums` with the b and c of the whole batch: the average of the parts', since they are linear in
        sums over a part, divided by its size. The gradients of gamma and beta stay the part's."""
        self.group.average(sums[D_B:])
        return sums


def _passes(device_type: str) -> TorchPasses:
    if device_type == "cpu":
        return cpu.passes()
    if device_type == "cuda":
        from kernels import cuda  # here, because Triton takes a second to import

        return cuda.passes()
    return TorchPasses()


def _weight(conv: nn.Conv2d, dtype: torch.dtype) -> torch.Tensor:
    """The weight that `conv` applies, in `dtype`; one that is frozen is converted once."""
    weight = conv.effective_weight() if hasattr(conv, "effective_weight") else conv.weight
    if weight is not conv.weight or weight.dtype == dtype or weight.requires_grad:
        return weight.to(dtype)
    key = (weight.data_ptr(), weight._version, dtype)
    if getattr(conv, "_converted", (None,))[0] != key:
        conv._converted = key, weight.detach().to(dtype)
    return conv._converted[1]


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _count(x: torch.Tensor, weight: torch.Tensor, conv: Conv) -> int:
    """Values per channel that the convolution puts out."""
    sizes = zip(x.shape[2:], weight.shape[2:], conv.stride, conv.padding, strict=True)
    height, width = ((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)
    return len(x) * height * width
