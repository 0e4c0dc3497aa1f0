"""Small networks, and noise to train them on, for the tests of several modules."""

import torch

import checkpoint
import models
import records
from config import Options
from step import Step

SPEC = records.NetworkSpec(
    arch="resnet8",
    mode="bn_only",
    shortcut="projection",
    conv_init="kaiming_normal",
    bn_init="uniform",
    seed=3,
    per_channel=2,
    init_from=None,
    reset_bn=False,
    data="synthetic",
    fingerprint="0" * 16,
    image_size=32,
    classes=tuple("abcdefghij"),
    mean=(120.0,) * 3,
    std=(60.0,) * 3,
    train_images=24,
    val_images=0,
    batch_size=8,
    dtype="fp32",
    device="cpu",
    compiled=False,
    processes=1,
)
MODES = ("all", "none", "random", "bn_only", "bn_main", "shortcut", "output", "conv", "bn+output+shortcut")
MODES += ("gamma", "beta", "gamma+output", "beta+shortcut")


def network(seed: int = 0, classes: int = 10) -> torch.nn.Module:
    """Return a resnet8 with the initial weights of `seed`, all of which train."""
    model = models.build("resnet8", classes)
    models.initialise(model, seed)
    return model.to(memory_format=torch.channels_last)


def frozen(mode: str, arch: str = "resnet8", **changes) -> torch.nn.Module:
    """Return a network with its initial weights, frozen as in `mode`; `changes` override fields of SPEC."""
    return checkpoint.create(SPEC.model_copy(update={"arch": arch, "mode": mode, **changes}))


def batch(n: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise as images, `[n, 3, 16, 16]`, and random labels from ten classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 16, 16, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.randint(10, (n,), generator=generator)


def trained_for(steps: int, **changes) -> tuple[torch.nn.Module, records.NetworkSpec]:
    """Return a network trained on noise for `steps` steps, and its spec; `changes` override fields of SPEC.

    It trains with momentum and a weight decay so large that a change of frozen weights would show.
    """
    spec = SPEC.model_copy(update=changes)
    model = checkpoint.create(spec).to(memory_format=torch.channels_last)
    step, generator = Step(model, Options(weight_decay=0.1)), torch.Generator().manual_seed(0)
    for _ in range(steps):
        images = torch.randn(8, 3, 16, 16, generator=generator).to(memory_format=torch.channels_last)
        step(images, torch.randint(10, (8,), generator=generator), lr=0.1)
    return model, spec
