"""Architectures by name, and their initial weights drawn bit for bit from a seed.

    resnetD       CIFAR ResNet of depth D = 6n+2 (He et al. 2015): 14, 20, 32, 44, 56, 110, 218, 434, 866 ...
    resnetD_wK    the same, K times as wide
    vgg11|13|16|19                VGG with BatchNorm and a single linear layer, as the paper has it
    resnet18|34|50|101|152|200    the ImageNet family (7x7 stem), with torchvision's layout and names

All networks take images of any size from 32x32 up and end in a global average pool and one linear layer `fc`.
"""

import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from kernels import conv_bn_relu

SHORTCUTS = ("projection", "projection_all", "pad")
CONV_INITS = ("kaiming_normal", "kaiming_uniform", "orthogonal", "binary")
BN_INITS = ("uniform", "ones", "one_one", "signed_uniform", "he_normal")
IMAGENET_LAYERS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
IMAGENET_LAYERS[200] = (3, 24, 36, 3)
VGG_WIDTHS = {  # "M" halves the image
    11: (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512),
    13: (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512),
    16: (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512),
    19: (64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512, 512, 512, 512),
}


class ModelError(ValueError):
    """An architecture, initialisation or weight file that cannot be used; the message says what would do."""


class Conv2d(nn.Conv2d):
    """A convolution without bias, whose weights may be frozen but for some that are set apart to train."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int = 1):
        super().__init__(c_in, c_out, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.register_buffer("places", None, persistent=False)
        self.register_parameter("values", None)

    def set_apart(self, places: torch.Tensor) -> None:
        """Give the weights at `places` a small trainable tensor of their own, `values`.

        `places` is int64 `[C_out, K]`: K different positions in every flattened filter. `weight` itself is
        never written to again, so what is frozen stays bitwise frozen under momentum and weight decay, and
        the decay acts on the chosen weights themselves, as it does on a masked network.
        """
        self.places = places.to(self.weight.device)
        self.values = nn.Parameter(self.weight.detach().flatten(1).gather(1, self.places))

    def effective_weight(self) -> torch.Tensor:
        """The weight `[C_out, C_in, k, k]` that the convolution applies."""
        if self.places is None:
            return self.weight
        weight = self.weight.flatten(1).scatter(1, self.places, self.values).view(self.weight.shape)
        return weight.contiguous(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.effective_weight(), None)


class Pad(nn.Module):
    """The shortcut without parameters: every stride-th pixel, new channels filled with zeros."""

    def __init__(self, extra_channels: int, stride: int):
        super().__init__()
        self.extra_channels, self.stride = extra_channels, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))


class Projection(nn.Sequential):
    """1x1 convolution and BatchNorm; a Sequential for torchvision's names `downsample.0` and `.1`."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__(Conv2d(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return conv_bn_relu(x, [(self[0], self[1])], relu=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1, self.bn1 = Conv2d(c_in, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = Conv2d(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return conv_bn_relu(x, [(self.conv1, self.bn1), (self.conv2, self.bn2)], shortcut)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1, self.bn1 = Conv2d(c_in, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = Conv2d(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = Conv2d(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        units = [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]
        return conv_bn_relu(x, units, shortcut)


class Network(nn.Module):
    """`features`, then a global average pool and the output layer `fc`."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """Logits `[N, num_classes]` of features `[N, C, h, w]`."""
        return self.fc(features.mean((2, 3)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `[N, num_classes]` of images `[N, 3, H, W]`."""
        return self.head(self.features(images))


class ResNet(Network):
    """Stages of residual blocks: `layers[i]` blocks of `widths[i]` channels, each stage at half the size."""

    def __init__(
        self, block: type, layers: tuple, widths: tuple, imagenet_stem: bool, shortcut: str, num_classes: int
    ):
        super().__init__()
        self.imagenet_stem = imagenet_stem
        channels = widths[0]
        self.conv1 = Conv2d(3, channels, 7, 2) if imagenet_stem else Conv2d(3, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        for stage, (count, width) in enumerate(zip(layers, widths, strict=True), start=1):
            blocks = []
            for i in range(count):
                stride = 2 if i == 0 and stage > 1 else 1
                out, first = width * block.expansion, i == 0
                downsample = None
                if stride > 1 or channels != out or (first and shortcut == "projection_all"):
                    pads = shortcut == "pad"
                    downsample = Pad(out - channels, stride) if pads else Projection(channels, out, stride)
                blocks.append(block(channels, width, stride, downsample))
                channels = out
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.stages = len(layers)
        self.fc = nn.Linear(channels, num_classes)

    def blocks(self) -> list[nn.Module]:
        return [block for stage in range(1, self.stages + 1) for block in getattr(self, f"layer{stage}")]

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """The last block's output `[N, C, h, w]` for images `[N, 3, H, W]`."""
        x = conv_bn_relu(x, [(self.conv1, self.bn1)])
        if self.imagenet_stem:
            x = F.max_pool2d(x, 3, 2, 1)
        for block in self.blocks():
            x = block(x)
        return x


class VGGLayer(nn.Module):
    def __init__(self, c_in: int, width: int, pool: bool):
        super().__init__()
        self.conv, self.bn, self.pool = Conv2d(c_in, width, 3), nn.BatchNorm2d(width), pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = conv_bn_relu(x, [(self.conv, self.bn)])
        return F.max_pool2d(y, 2) if self.pool else y


class VGG(Network):
    def __init__(self, widths: tuple, num_classes: int):
        super().__init__()
        self.layers, channels = nn.Sequential(), 3
        for width, following in zip(widths, (*widths[1:], None), strict=True):
            if width != "M":
                self.layers.append(VGGLayer(channels, width, pool=following == "M"))
                channels = width
        self.fc = nn.Linear(channels, num_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def build(arch: str, num_classes: int = 10, shortcut: str = "projection") -> Network:
    """The network named `arch`, its weights not yet drawn (see `initialise`).

    `shortcut` is how residual blocks whose shape changes bring their input along: "projection" (1x1
    convolution and BatchNorm), "projection_all" (on the first block of stage 1 too) or "pad" (no
    parameters; He et al.'s option A). Raises ModelError for a name that is none of the forms above.
    """
    if shortcut not in SHORTCUTS:
        raise ModelError(f"--shortcut {shortcut} is not known; choose from {', '.join(SHORTCUTS)}")
    if vgg := re.fullmatch(r"vgg(\d+)", arch):
        if int(vgg[1]) in VGG_WIDTHS:
            return VGG(VGG_WIDTHS[int(vgg[1])], num_classes)
    elif resnet := re.fullmatch(r"resnet([1-9]\d*)(?:_w([1-9]\d*))?", arch):
        depth, width = int(resnet[1]), int(resnet[2] or 1)
        if depth > 10_000 or width > 1_000:
            raise ModelError(f"--arch {arch} is too large: at most 10000 layers, 1000 times as wide")
        if depth in IMAGENET_LAYERS:
            if resnet[2] is None:
                block = BasicBlock if depth < 50 else Bottleneck
                return ResNet(block, IMAGENET_LAYERS[depth], (64, 128, 256, 512), True, shortcut, num_classes)
        elif depth >= 8 and depth % 6 == 2:
            blocks = (depth - 2) // 6
            widths = (16 * width, 32 * width, 64 * width)
            return ResNet(BasicBlock, (blocks,) * 3, widths, False, shortcut, num_classes)
    raise ModelError(
        f"--arch {arch} is not known; try resnet14, 20, 32, 44, 56, 110 (any depth 6n+2 from 8), "
        "resnet14_w2 (any width),\nvgg11, 13, 16, 19, or the ImageNet family resnet18, 34, 50, 101, 152, 200"
    )


def check_batches(arch: str, shortcut: str, batch_size: int, image_size: int) -> None:
    """ModelError where the network cannot train on such batches: too small to normalise, or to halve."""
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
    """The random stream `name` (and, say, epoch `index`) of a run; no two names share draws.

    RandomState because NumPy's policy freezes its sequence for good (NEP 19). `seed` is 0 to 2**64 - 1.
    """
    name_words = np.frombuffer(hashlib.sha256(name.encode()).digest(), "<u4")
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, index, *name_words])


@torch.no_grad()
def initialise(
    model: nn.Module, seed: int, conv_init: str = "kaiming_normal", bn_init: str = "uniform"
) -> None:
    """Draw every parameter of `model` from `seed`, each tensor from a stream of its own.

    Convolutions by `conv_init` with fan-in and ReLU gain: He normal, He uniform (He et al. 2015),
    orthogonal (Saxe et al. 2014, gain 1) or binary (plus or minus the He standard deviation). The output
    layer is He normal with bias 0. BatchNorm's gamma, beta by `bn_init`: uniform U[0, 1], 0; ones 1, 0;
    one_one 1, 1; signed_uniform U[-1, 1], 0; he_normal: Keras's (a normal truncated at two deviations,
    variance 2/C), 0.
    """
    if conv_init not in CONV_INITS:
        raise ModelError(f"the initialisation {conv_init} is not known; choose from {', '.join(CONV_INITS)}")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            draw = _CONV_DRAWS[conv_init](stream(seed, f"weights/{name}"), tuple(module.weight.shape))
            module.weight.copy_(torch.from_numpy(draw.astype(np.float32)))
        elif isinstance(module, nn.Linear):
            draw = _kaiming_normal(stream(seed, f"weights/{name}"), tuple(module.weight.shape))
            module.weight.copy_(torch.from_numpy(draw.astype(np.float32)))
            module.bias.zero_()
    initialise_batchnorm(model, seed, bn_init)


@torch.no_grad()
def initialise_batchnorm(model: nn.Module, seed: int, bn_init: str = "uniform") -> None:
    """Draw gamma and beta as `initialise` does, and forget the running statistics."""
    if bn_init not in BN_INITS:
        raise ModelError(f"the initialisation {bn_init} is not known; choose from {', '.join(BN_INITS)}")
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            gamma = _GAMMA_DRAWS[bn_init](stream(seed, f"batchnorm/{name}"), module.num_features)
            module.weight.copy_(torch.from_numpy(np.asarray(gamma, np.float32)))
            module.bias.fill_(1.0 if bn_init == "one_one" else 0.0)
            module.reset_running_stats()


def _fan_in(shape: tuple) -> int:
    return math.prod(shape[1:])


def _kaiming_normal(rng: np.random.RandomState, shape: tuple) -> np.ndarray:
    return rng.standard_normal(shape) * math.sqrt(2 / _fan_in(shape))


def _kaiming_uniform(rng: np.random.RandomState, shape: tuple) -> np.ndarray:
    bound = math.sqrt(6 / _fan_in(shape))
    return rng.random_sample(shape) * (2 * bound) - bound


def _binary(rng: np.random.RandomState, shape: tuple) -> np.ndarray:
    return np.where(rng.random_sample(shape) < 0.5, -1.0, 1.0) * math.sqrt(2 / _fan_in(shape))


def _orthogonal(rng: np.random.RandomState, shape: tuple) -> np.ndarray:
    """Rows (or columns, if fewer) orthonormal, uniform over such matrices: Gram-Schmidt on a normal draw.

    Not by LAPACK, whose last bits depend on the machine: products and sums here are single IEEE operations
    in a fixed order, so every machine gets the same bits.
    """
    rows, columns = shape[0], _fan_in(shape)
    q = rng.standard_normal((min(rows, columns), max(rows, columns)))
    for i in range(len(q)):
        q[i] /= math.sqrt(_fixed_order_sum((q[i] * q[i])[None])[0])
        rest = q[i + 1 :]
        rest -= _fixed_order_sum(rest * q[i])[:, None] * q[i]
    return (q if rows <= columns else q.T).reshape(shape)


def _fixed_order_sum(x: np.ndarray) -> np.ndarray:
    """Sum over the last axis by halving it, so that the order does not depend on a machine's vector width."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        odd = x[..., 2 * half :]
        x = x[..., :half] + x[..., half : 2 * half]
        if odd.shape[-1]:
            x[..., 0] += odd[..., 0]
    return x[..., 0]


def _keras_he_normal(rng: np.random.RandomState, channels: int) -> np.ndarray:
    draw = rng.standard_normal(channels)
    while (outside := np.abs(draw) > 2).any():
        draw[outside] = rng.standard_normal(int(outside.sum()))
    return draw * (math.sqrt(2 / channels) / 0.87962566103423978)  # the deviation left after truncation


_CONV_DRAWS: dict[str, Callable] = dict(
    zip(CONV_INITS, (_kaiming_normal, _kaiming_uniform, _orthogonal, _binary), strict=True)
)
_GAMMA_DRAWS: dict[str, Callable] = {
    "uniform": lambda rng, channels: rng.random_sample(channels),
    "ones": lambda rng, channels: np.ones(channels),
    "one_one": lambda rng, channels: np.ones(channels),
    "signed_uniform": lambda rng, channels: rng.random_sample(channels) * 2 - 1,
    "he_normal": _keras_he_normal,
}


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` file, or of a state dict saved by `torch.save`, by name.

    Raises ModelError for a file that cannot be read without running code.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"--init-from {path}: there is no such file or run") from None
    except Exception as error:  # the readers' own errors for rubbish are of many kinds
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"--init-from {path}: not a weight file that loads safely ({reason});\n"
            "give a .safetensors file, or a state dict saved with torch.save(model.state_dict(), ...)"
        ) from None
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ModelError(f"--init-from {path}: holds no state dict (names to tensors)")
    return tensors


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], path: str | Path) -> list[str]:
    """Load `tensors`, which are from `path`, into `model`, by name.

    The output layer keeps its draw where theirs has another number of classes; returns the names so left.
    Raises ModelError where names or shapes do not fit.
    """
    own = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}
    heads = [n for n in ("fc.weight", "fc.bias") if n in given and given[n].dim() == own[n].dim()]
    other_head = [n for n in heads if given[n].shape[0] != own[n].shape[0]]
    for name in other_head:
        given[name] = own[name]
    wrong = [f"{n} (missing)" for n in own if n not in given]
    wrong += [f"{n} (not in this network)" for n in given if n not in own]
    wrong += [
        f"{n} ({list(given[n].shape)}, needs {list(own[n].shape)})"
        for n in own
        if n in given and given[n].shape != own[n].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ModelError(f"--init-from {path} does not fit the network: {', '.join(wrong[:4])}{more}")
    try:
        model.load_state_dict(given, strict=False)
    except RuntimeError as error:  # tensors without values, say
        reason = str(error).splitlines()[-1].strip()
        raise ModelError(f"--init-from {path} cannot be loaded ({reason})") from None
    return other_head
