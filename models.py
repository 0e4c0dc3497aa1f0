"""Build networks by name and draw their initial weights, which a seed determines bit for bit.

    resnetD       CIFAR ResNet of depth D = 6n+2 (He et al. 2015): 14, 20, 32, 44, 56, 110, 218, 434, 866 ...
    resnetD_wK    the same, K times as wide
    vgg11|13|16|19                VGG with BatchNorm and a single linear layer, as in the paper
    resnet18|34|50|101|152|200    the ImageNet family (7x7 stem), with torchvision's layout and names

Every network accepts images of 32x32 pixels or more, and smaller ones that pass `check_batches`. It ends in
global average pooling and a linear layer `fc`.
"""

import functools
import hashlib
import math
import re
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import kernels

MOST_PARAMETERS = 10**9  # 4 GB in float32
SHORTCUTS = ("projection", "projection_all", "pad")
BASIC_LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}  # blocks per stage of the ImageNet family
BOTTLENECK_LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}
VGG_LAYERS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class ModelError(ValueError):
    """An architecture or initialisation that cannot be used; the message says what can."""

    exit_status = 2


class Conv2d(nn.Conv2d):
    """A convolution without bias. Some of its weights can be set apart to train while the rest are frozen."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int = 1):
        super().__init__(c_in, c_out, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.register_buffer("places", None, persistent=False)
        self.register_parameter("values", None)

    def set_apart(self, places: torch.Tensor) -> None:
        """Copy the weights at `places` into a small trainable tensor of their own, `values`.

        `places` is int64 `[C_out, K]`: K different positions in each flattened filter. `weight` itself is
        never written again, so the frozen weights stay the same, bit for bit, under momentum and weight
        decay. Weight decay acts on the chosen weights only, as it would in a masked network.
        """
        self.places = places.to(self.weight.device)
        self.values = nn.Parameter(self.weight.detach().flatten(1).gather(1, self.places))

    def effective_weight(self) -> torch.Tensor:
        """Return the weight `[C_out, C_in, k, k]` that the convolution applies, `values` included."""
        if self.places is None:
            return self.weight
        weight = self.weight.flatten(1).scatter(1, self.places, self.values).view(self.weight.shape)
        return weight.contiguous(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.effective_weight(), None)


class Pad(nn.Module):
    """A shortcut without parameters: it takes every stride-th pixel and appends channels of zeros."""

    def __init__(self, extra_channels: int, stride: int):
        super().__init__()
        self.extra_channels, self.stride = extra_channels, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))


class Projection(nn.Sequential):
    """A 1x1 convolution and BatchNorm. A Sequential gives torchvision's names, `downsample.0` and `.1`."""

    execution = kernels.Execution()

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__(Conv2d(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.conv_bn_relu(x, [(self[0], self[1])], relu=False, execution=self.execution)


def basic_block(c_in: int, width: int, stride: int) -> list[Conv2d]:
    """Return the two 3x3 convolutions of a basic block."""
    return [Conv2d(c_in, width, 3, stride), Conv2d(width, width, 3)]


def bottleneck(c_in: int, width: int, stride: int) -> list[Conv2d]:
    """Return the 1x1, 3x3 and 1x1 convolutions of a bottleneck block; the last has 4 * `width` channels."""
    return [Conv2d(c_in, width, 1), Conv2d(width, width, 3, stride), Conv2d(width, 4 * width, 1)]


class Block(nn.Module):
    """A residual block: conv1, bn1 (BatchNorm), conv2, bn2 ..., and a shortcut around them, `downsample`."""

    execution = kernels.Execution()

    def __init__(self, convolutions: list[Conv2d], downsample: nn.Module):
        super().__init__()
        for i, convolution in enumerate(convolutions, start=1):
            self.add_module(f"conv{i}", convolution)
            self.add_module(f"bn{i}", nn.BatchNorm2d(convolution.out_channels))
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *layers, downsample = self.children()
        units = list(zip(layers[::2], layers[1::2], strict=True))
        return kernels.conv_bn_relu(x, units, downsample(x), execution=self.execution)


class Network(nn.Module):
    """Base class: a subclass's `features` `[N, C, h, w]`, then global average pooling and the layer `fc`."""

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits `[N, num_classes]` of features `[N, C, h, w]`."""
        return self.fc(features.mean((2, 3)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits `[N, num_classes]` of images `[N, 3, H, W]`."""
        return self.head(self.features(images))


class ResNet(Network):
    """A ResNet whose stage i has `layers[i]` residual blocks, for CIFAR (3 stages) or ImageNet (4 stages).

    Every stage after the first halves the image and doubles `width`.
    """

    execution = kernels.Execution()

    def __init__(self, block: Callable, layers: tuple, width: int, shortcut: str, num_classes: int):
        super().__init__()
        self.stages, channels, of_imagenet = len(layers), width, len(layers) == 4
        self.conv1 = Conv2d(3, width, 7, 2) if of_imagenet else Conv2d(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if of_imagenet else nn.Identity()
        for stage, count in enumerate(layers, start=1):
            blocks, stride = nn.Sequential(), 1 if stage == 1 else 2
            for i in range(count):
                convolutions, downsample = block(channels, width, stride), nn.Identity()
                out = convolutions[-1].out_channels
                if stride > 1 or channels != out or (i == 0 and shortcut == "projection_all"):
                    pads = shortcut == "pad"
                    downsample = Pad(out - channels, stride) if pads else Projection(channels, out, stride)
                blocks.append(Block(convolutions, downsample))
                channels, stride = out, 1
            setattr(self, f"layer{stage}", blocks)
            width *= 2
        self.fc = nn.Linear(channels, num_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(kernels.conv_bn_relu(x, [(self.conv1, self.bn1)], execution=self.execution))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return x


class VGGLayer(nn.Module):
    """A 3x3 convolution, BatchNorm and ReLU; with `pool`, a max pool then halves the image."""

    execution = kernels.Execution()

    def __init__(self, c_in: int, width: int, pool: bool):
        super().__init__()
        self.conv, self.bn = Conv2d(c_in, width, 3), nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(kernels.conv_bn_relu(x, [(self.conv, self.bn)], execution=self.execution))


class VGG(Network):
    """A VGG whose stage i of five has `layers[i]` 3x3 convolutions; all but the last end in a max pool."""

    def __init__(self, layers: tuple[int, ...], num_classes: int):
        super().__init__()
        self.layers, channels = nn.Sequential(), 3
        for stage, (count, width) in enumerate(zip(layers, (64, 128, 256, 512, 512), strict=True), start=1):
            for i in range(count):
                self.layers.append(VGGLayer(channels, width, pool=i == count - 1 and stage < len(layers)))
                channels = width
        self.fc = nn.Linear(channels, num_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def build(arch: str, num_classes: int = 10, shortcut: str = "projection") -> Network:
    """Return the network named `arch`, whose weights are not drawn yet (see `initialise`).

    `shortcut` says how a residual block adapts its input to an output of another shape: "projection" (1x1
    convolution and BatchNorm), "projection_all" (also in the first block of stage 1), or "pad" (without
    parameters; He et al.'s option A). Raises ModelError if either name is unknown, and also, before anything
    is allocated, if the network would have over 10,000 layers or about MOST_PARAMETERS parameters.
    """
    if shortcut not in SHORTCUTS:
        raise ModelError(f"--shortcut {shortcut} is not known; choose from {', '.join(SHORTCUTS)}")
    if (vgg := re.fullmatch(r"vgg([1-9][0-9]?)", arch)) and int(vgg[1]) in VGG_LAYERS:
        _check_size(arch, 512 * num_classes)
        return VGG(VGG_LAYERS[int(vgg[1])], num_classes)
    if resnet := re.fullmatch(r"resnet([1-9][0-9]{0,9})(?:_w([1-9][0-9]{0,9}))?", arch):
        depth, width = int(resnet[1]), int(resnet[2] or 1)
        if depth > 10_000:
            raise ModelError(f"--arch {arch} is too large: give at most 10,000 layers")
        block, layers = basic_block if depth in BASIC_LAYERS else bottleneck, BASIC_LAYERS | BOTTLENECK_LAYERS
        if depth in layers and resnet[2] is None:
            _check_size(arch, 2048 * num_classes)
            return ResNet(block, layers[depth], 64, shortcut, num_classes)
        if depth not in layers and depth >= 8 and depth % 6 == 2:
            # A stage with c channels has (depth - 2) / 3 convolutions of 9 c**2; c is `width` * 16, 32 or 64.
            _check_size(arch, 3 * (depth - 2) * (16 * width) ** 2 * (1 + 4 + 16) + 64 * width * num_classes)
            return ResNet(basic_block, ((depth - 2) // 6,) * 3, 16 * width, shortcut, num_classes)
    raise ModelError(
        f"--arch {arch} is not known; try resnet14, 20, 32, 44, 56, 110 (any depth 6n+2 from 8), "
        "resnet14_w2 (any width),\nvgg11, 13, 16, 19, or the ImageNet family resnet18, 34, 50, 101, 152, 200"
    )


def _check_size(arch: str, parameters: int) -> None:
    if parameters > MOST_PARAMETERS:
        most = f"give one with at most {MOST_PARAMETERS:,} (models.MOST_PARAMETERS)"
        raise ModelError(f"--arch {arch} is too large: about {parameters:.1e} parameters;\n{most}")


def check_batches(arch: str, shortcut: str, batch_size: int, image_size: int) -> None:
    """Raise ModelError if images (in pixels) are too small to halve, or a batch is too small to normalise."""
    if batch_size > 1 and image_size >= 32:
        return
    with torch.device("meta"):
        try:
            build(arch, 2, shortcut)(torch.zeros(batch_size, 3, image_size, image_size))
        except (RuntimeError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise ModelError(
                f"--arch {arch} cannot train on {batch_size} images of {image_size} pixels a step ({why});\n"
                "use larger images (--image-size) or a larger --batch-size"
            ) from None


def stream(seed: int, name: str, index: int = 0) -> np.random.RandomState:
    """Return the random generator of a `seed`, `name` and `index` (an epoch, say); no two share draws.

    `seed` is from 0 to 2**64 - 1. NumPy guarantees that RandomState's sequences never change (NEP 19).
    """
    name_words = np.frombuffer(hashlib.sha256(name.encode()).digest(), "<u4")
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, index, *name_words])


@torch.no_grad()
def initialise(
    model: nn.Module,
    seed: int,
    conv_init: str | None = "kaiming_normal",
    bn_init: str = "uniform",
    nonzeros: int | None = None,
) -> None:
    """Draw every parameter of `model` from `seed`, each from its own stream; reset the running statistics.

    `conv_init` is the distribution of convolution weights, scaled by fan-in and ReLU's gain: kaiming_normal
    and kaiming_uniform (He et al. 2015), orthogonal (Saxe et al. 2014, gain 1), binary (plus or minus He et
    al.'s standard deviation), or sparse (kaiming_normal for `nonzeros` weights of each filter, by default a
    tenth, and 0 for the others). None leaves everything but BatchNorm unchanged. Otherwise the output layer
    is always kaiming_normal with bias 0; in open_lth, the code of Frankle et al., its weight follows the
    convolutions and its bias is PyTorch's default draw. `bn_init` sets gamma and beta: uniform is U[0, 1] and
    0, ones is 1 and 0, one_one is 1 and 1, signed_uniform is U[-1, 1] and 0, he_normal is Keras's (a normal
    truncated at two standard deviations, variance 2/C) and 0. Raises ModelError for an unknown name.
    """
    for init, known in ((conv_init or "kaiming_normal", CONV_INITS), (bn_init, BN_INITS)):
        if init not in known:
            raise ModelError(f"the initialisation {init} is not known; choose from {', '.join(known)}")
    draws = CONV_INITS | {"sparse": functools.partial(_sparse, nonzeros=nonzeros)}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            gamma = BN_INITS[bn_init](stream(seed, f"batchnorm/{name}"), module.num_features)
            module.weight.copy_(torch.from_numpy(np.asarray(gamma, np.float32)))
            module.bias.fill_(1.0 if bn_init == "one_one" else 0.0)
            module.reset_running_stats()
        elif conv_init and isinstance(module, nn.Conv2d | nn.Linear):
            draw = draws[conv_init if isinstance(module, nn.Conv2d) else "kaiming_normal"]
            weight = draw(stream(seed, f"weights/{name}"), tuple(module.weight.flatten(1).shape))
            module.weight.copy_(torch.from_numpy(weight.astype(np.float32)).view_as(module.weight))
            if module.bias is not None:
                module.bias.zero_()


def _uniform(rng: np.random.RandomState, shape: tuple | int, bound: float) -> np.ndarray:
    return rng.random_sample(shape) * (2 * bound) - bound  # rng.uniform may round differently elsewhere


def _sparse(rng: np.random.RandomState, shape: tuple[int, int], nonzeros: int | None = None) -> np.ndarray:
    """Return a normal draw in which each filter keeps `nonzeros` weights at random places; the rest are 0.

    Their variance is 2 / nonzeros instead of 2 / fan-in, so the variance of the output does not change. A
    filter with fewer weights keeps them all; without `nonzeros`, it keeps a tenth, rounded up.
    """
    kept = min(shape[1], nonzeros or -(-shape[1] // 10))
    weight = rng.standard_normal(shape) * math.sqrt(2 / kept)
    dropped = rng.random_sample(shape).argsort(axis=1, kind="stable")[:, kept:]
    np.put_along_axis(weight, dropped, 0.0, axis=1)
    return weight


def _orthogonal(rng: np.random.RandomState, shape: tuple[int, int]) -> np.ndarray:
    """Return a matrix whose rows (or columns, if fewer) are orthonormal, uniform over all such matrices.

    It applies Gram-Schmidt to a normal draw. LAPACK's last bits would depend on the machine. Here, products
    and sums are single IEEE operations in a fixed order, so every machine gets the same bits.
    """
    q = rng.standard_normal((min(shape), max(shape)))
    for i in range(len(q)):
        q[i] /= math.sqrt(_fixed_order_sum((q[i] * q[i])[None])[0])
        rest = q[i + 1 :]
        rest -= _fixed_order_sum(rest * q[i])[:, None] * q[i]
    return q if q.shape == shape else q.T


def _fixed_order_sum(x: np.ndarray) -> np.ndarray:
    """Return the sum over the last axis by halving, in an order that no machine's vector width changes."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        odd = x[..., 2 * half :]
        x = x[..., :half] + x[..., half : 2 * half]
        x[..., : odd.shape[-1]] += odd  # `odd` has one element or none
    return x[..., 0]


def _keras_he_normal(rng: np.random.RandomState, channels: int) -> np.ndarray:
    draw = rng.standard_normal(channels)
    while (outside := np.abs(draw) > 2).any():
        draw[outside] = rng.standard_normal(int(outside.sum()))
    return draw * (math.sqrt(2 / channels) / 0.87962566103423978)  # its deviation once truncated


CONV_INITS = {  # each draws weights [C_out, fan-in]
    "kaiming_normal": lambda rng, shape: rng.standard_normal(shape) * math.sqrt(2 / shape[1]),
    "kaiming_uniform": lambda rng, shape: _uniform(rng, shape, math.sqrt(6 / shape[1])),
    "orthogonal": _orthogonal,
    "binary": lambda rng, shape: np.copysign(math.sqrt(2 / shape[1]), rng.random_sample(shape) - 0.5),
    "sparse": _sparse,
}
BN_INITS = {
    "uniform": lambda rng, channels: rng.random_sample(channels),
    "ones": lambda rng, channels: np.ones(channels),
    "one_one": lambda rng, channels: np.ones(channels),
    "signed_uniform": lambda rng, channels: _uniform(rng, channels, 1),
    "he_normal": _keras_he_normal,
}
