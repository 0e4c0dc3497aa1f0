"""Decide which parameters train (modes and random features), and count them.

    python freeze.py table [--arch resnet32 vgg16 ...]    # parameters in total, and trained by each part

A mode is `all`, `none`, `random` (K weights of every filter), or some of PARTS joined by +; `bn_only` is `bn`
alone.
"""

import progress  # isort: split

import hashlib
import itertools
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

import models

# The parts of a mode. Each function returns whether the part trains a parameter, given its module, its name
# in that module, and whether the module belongs to a block's shortcut.
PARTS: dict[str, Callable[[nn.Module, str, bool], bool]] = {
    "bn": lambda module, name, in_shortcut: isinstance(module, nn.BatchNorm2d),
    "gamma": lambda module, name, in_shortcut: isinstance(module, nn.BatchNorm2d) and name == "weight",
    "beta": lambda module, name, in_shortcut: isinstance(module, nn.BatchNorm2d) and name == "bias",
    "bn_main": lambda module, name, in_shortcut: isinstance(module, nn.BatchNorm2d) and not in_shortcut,
    "shortcut": lambda module, name, in_shortcut: isinstance(module, nn.Conv2d) and in_shortcut,
    "output": lambda module, name, in_shortcut: isinstance(module, nn.Linear),
    "conv": lambda module, name, in_shortcut: isinstance(module, nn.Conv2d),
}
CONTAINED = {"bn": ("gamma", "beta", "bn_main"), "conv": ("shortcut",)}  # a part: the parts within it
TABLE_ARCHS = [f"resnet{depth}" for depth in (14, 20, 32, 44, 56, 110, 218, 434, 866)]
TABLE_ARCHS += [f"resnet14_w{width}" for width in (2, 4, 8, 16, 32)]
TABLE_ARCHS += [f"vgg{depth}" for depth in models.VGG_LAYERS]
TABLE_ARCHS += [f"resnet{depth}" for depth in models.BASIC_LAYERS | models.BOTTLENECK_LAYERS]
SHARES = ("bn", "bn_main")  # parts whose percentage of all parameters the table shows


class ModeError(progress.OptionError):
    """A mode that cannot be used."""


def canonical_mode(mode: str) -> str:
    """Return the canonical spelling of a mode: its parts in a fixed order, each once.

    A part within another one is dropped, `gamma+beta` becomes `bn`, and `bn` alone becomes `bn_only`. Raises
    ModeError for an unknown part.
    """
    if mode in ("all", "none", "random"):
        return mode
    asked = {"bn" if part == "bn_only" else part for part in mode.split("+")}
    if unknown := asked - PARTS.keys():
        known = f"all, none, random, bn_only, or parts joined by +: {', '.join(PARTS)}"
        alone = unknown & {"all", "none", "random"}
        what = f"{min(alone)!r} cannot be joined with others" if alone else f"{min(unknown)!r} is not known"
        raise ModeError(f"--mode {mode}: {what}; choose {known}")
    asked |= {"bn"} if {"gamma", "beta"} <= asked else set()
    asked -= {within for part in asked for within in CONTAINED.get(part, ())}
    return "bn_only" if asked == {"bn"} else "+".join(part for part in PARTS if part in asked)


def parameter_parts(model: nn.Module) -> dict[str, set[str]]:
    """Return, by parameter name, the parts to which each parameter of `model` belongs."""
    parts = {}
    for name, module in model.named_modules():
        in_shortcut = ".downsample." in f"{name}."
        for full, _ in module.named_parameters(prefix=name, recurse=False):
            own = full.rpartition(".")[2]
            parts[full] = {part for part, holds in PARTS.items() if holds(module, own, in_shortcut)}
    return parts


def choose_random_features(model: nn.Module, per_channel: int, seed: int) -> None:
    """Set apart `per_channel` weights, at random places, in every filter of every convolution of `model`.

    Two per filter are as many as BatchNorm trains; this is the control experiment of Frankle et al. 2020.
    Raises ModeError if `per_channel` is below 1, or above the number of weights in some filter.
    """
    convolutions = {n: module for n, module in model.named_modules() if isinstance(module, models.Conv2d)}
    sizes = {name: conv.weight[0].numel() for name, conv in convolutions.items()}
    smallest = min(sizes, key=sizes.get)
    if not 1 <= per_channel <= sizes[smallest]:
        what = f"must be from 1 to {sizes[smallest]}, the weights of a filter of {smallest}"
        raise ModeError(f"--per-channel {per_channel}: {what}")
    for name, conv in convolutions.items():
        rng = models.stream(seed, f"random/{name}")
        places = [rng.choice(sizes[name], per_channel, replace=False) for _ in range(len(conv.weight))]
        conv.set_apart(torch.from_numpy(np.stack(places).astype(np.int64)))


def freeze(model: nn.Module, mode: str, per_channel: int = 2, seed: int = 0) -> None:
    """Set `requires_grad` on exactly what `mode` trains. Call this once, on initialised weights.

    Raises ModeError for an unusable `mode` or `per_channel`, or if a part of the mode has no parameters here.
    """
    mode = canonical_mode(mode)
    model.requires_grad_(mode == "all")
    if mode == "random":
        choose_random_features(model, per_channel, seed)
    elif mode not in ("all", "none"):
        asked, parts = mode.replace("bn_only", "bn").split("+"), parameter_parts(model)
        for part in asked:
            if not any(part in own for own in parts.values()):
                raise ModeError(f"--mode {mode}: this network has no parameters in its {part}")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not parts[name].isdisjoint(asked))


def empty(arch: str, num_classes: int = 10, shortcut: str = "projection") -> nn.Module:
    """Return a network on the CPU with uninitialised tensors, for the caller to set. Raises ModelError."""
    with torch.device("meta"):  # so that torch draws no weights
        model = models.build(arch, num_classes, shortcut)
    return model.to_empty(device="cpu")


def count(model: nn.Module) -> tuple[int, int]:
    """Return the total and trained parameters of `model`; weights set apart count once, and as trained."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for name, p in model.named_parameters() if not name.endswith(".values"))
    return total, trained


# ---- trained and frozen tensors ----


def sha256(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 (hex) of the names, shapes, dtypes and bytes of tensors, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def frozen_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of what must not change: frozen parameters, and the places of weights set apart."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    frozen |= {name: b for name, b in model.named_buffers() if name.endswith(".places")}
    return sha256(frozen)


def full_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of `full_state`: every weight and BatchNorm statistic."""
    return sha256(full_state(model))


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every weight (as applied) and BatchNorm statistic, by torchvision's names, on the CPU."""
    state = {name: t for name, t in model.state_dict().items() if not name.endswith(".values")}
    for name, module in model.named_modules():
        if isinstance(module, models.Conv2d):
            state[f"{name}.weight"] = module.effective_weight()
    return {name: t.detach().cpu().contiguous() for name, t in state.items()}


def full_bytes(model: nn.Module) -> int:
    """Return the bytes of a full checkpoint's tensors: every weight and BatchNorm statistic."""
    return sum(t.nbytes for name, t in model.state_dict().items() if not name.endswith(".values"))


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes, by name: the trained tensors and BatchNorm's running statistics."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return state | {n: b for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))}


def trained_vector(model: nn.Module) -> torch.Tensor:
    """Return `trained_state` as one vector, because thousands of tensors take 0.3 s to save."""
    return torch.cat([tensor.reshape(-1) for tensor in trained_state(model).values()])


def load_trained_vector(model: nn.Module, vector: torch.Tensor) -> None:
    """Load what `trained_vector` returned. Raises ValueError if it does not fit this network and mode."""
    own = list(trained_state(model).values())
    sizes = [tensor.numel() for tensor in own]
    if (vector.shape, vector.dtype, vector.layout) != ((sum(sizes),), own[0].dtype, own[0].layout):
        raise ValueError("its tensors are not those that this run trains")
    for tensor, part in zip(own, vector.split(sizes), strict=True):
        tensor.copy_(part.view_as(tensor))


# ---- python freeze.py table ----


def table(archs: list[str], num_classes: int = 10) -> Iterator[list[str]]:
    """Yield the rows of the table as text, the headings first, then a row for each architecture and shortcut.

    The columns are arch, shortcut and total, then how many parameters each part trains, with percentages for
    SHARES, then how many two random weights per filter make.
    """
    heads = [[part, f"{part}/total"] if part in SHARES else [part] for part in PARTS]
    yield ["arch", "shortcut", "total", *itertools.chain(*heads), "random (2)"]
    for arch in archs:
        for shortcut in models.SHORTCUTS if arch.startswith("resnet") else models.SHORTCUTS[:1]:
            with torch.device("meta"):
                model = models.build(arch, num_classes, shortcut)
            parts, sizes = parameter_parts(model), {n: p.numel() for n, p in model.named_parameters()}
            row, total = [], sum(sizes.values())
            for part in PARTS:
                trained = sum(sizes[n] for n in sizes if part in parts[n])
                row += [f"{trained:,}"] + [f"{100 * trained / total:.2f} %"] * (part in SHARES)
            filters = sum(len(m.weight) for m in model.modules() if isinstance(m, models.Conv2d))
            yield [arch, shortcut, f"{total:,}", *row, f"{2 * filters:,}"]


def main(argv: list[str] | None = None) -> None:
    parser = progress.Parser("freeze.py", __doc__)
    parser.add_argument("command", choices=["table"], help="parameter counts")
    parser.add_argument(
        "--arch", nargs="+", default=TABLE_ARCHS, help="architectures [the paper's, and the ImageNet family]"
    )
    parser.add_argument("--num-classes", type=int, default=10, help="classes of the output layer [10]")
    options = parser.parse_args(argv)
    if options.num_classes < 1:
        raise ModeError(f"--num-classes {options.num_classes}: must be 1 or more")
    heads, *rows = table(options.arch, options.num_classes)
    aligned = ["left", "left", *["right"] * (len(heads) - 2)]
    print(tabulate(rows, heads, tablefmt="plain", disable_numparse=True, colalign=aligned))


if __name__ == "__main__":
    sys.exit(progress.run("freeze.py", main))
