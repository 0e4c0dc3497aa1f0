"""All options of a run: their names, help texts, ranges and presets, and their defaults (the paper's)."""

import argparse
import dataclasses
import functools
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import freeze
import kernels.device
import models
from datasets import augment, sources
from progress import OptionError, Parser

OPTIMIZERS = ("sgd", "adam")  # classes of torch.optim, in lower case

PRESETS = tomllib.loads(Path(__file__).with_name("presets.toml").read_text("utf-8"))
QUICK = {"train_subset": 3000, "epochs": 8, "milestones": (4, 6), "batch_size": 64, "eval_every": 2}


def option(default: Any, help: str, role: str = "variant", limits: tuple | None = None, **told: Any) -> Any:
    """Return a dataclass field for Options; `told` holds further keyword arguments of add_argument.

    `role` says what the option affects: "variant", how the network is trained; "setting", what is trained, on
    which images and for how long; "logistics", where and how fast the run computes, but not its result.
    `limits` are the smallest and largest allowed values; their type is also the option's type.
    """
    told |= {"help": help} | ({"type": type(limits[0])} if limits else {})
    return dataclasses.field(default=default, metadata={"argparse": told, "role": role, "limits": limits})


setting, logistics = (functools.partial(option, role=role) for role in ("setting", "logistics"))
COUNT, SIZE, RATE, SHARE = (0, 2**31), (1, 2**31), (0.0, 1e30), (0.0, 1.0)
EPOCHS, SOME_EPOCHS = (1, 1_000_000), (0, 1_000_000)
IMAGE_PARTS, MODE_PARTS = ", ".join(augment.PARTS), ", ".join(freeze.PARTS)
# fmt: off


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a run. Each field is a command-line option; argparse and `check` use its metadata."""

    arch: str = setting(
        "resnet32", "the network: resnetD (D = 6n+2), resnetD_wK (K times as wide), vgg11|13|16|19, "
        "resnet18|34|50|...|200")
    mode: str = setting(
        "bn_only", f"what trains: all, none, random, bn_only, or any of {MODE_PARTS}, joined by +")
    per_channel: int = option(2, "with --mode random, train N weights of each filter", limits=SIZE)
    shortcut: str = option(
        "projection", "shortcut of a block whose output has another shape", choices=models.SHORTCUTS)
    conv_init: str = option(
        "kaiming_normal", "initial convolution weights; the output layer is always kaiming_normal with bias "
        "0 (in open_lth its weight follows the convolutions')", choices=models.CONV_INITS)
    nonzeros: int | None = option(
        None, "with --conv-init sparse, keep N weights of each filter, or all if it has fewer; default: a "
        "tenth, rounded up", limits=SIZE)
    bn_init: str = option("uniform", "initial gamma and beta", choices=models.BN_INITS)
    init_from: str | None = option(
        None, "start from these weights: a run folder, or a .safetensors, .pth or .pt file; {seed} in the "
        "path stands for the run's seed")
    reset_bn: bool = option(False, "after --init-from, redraw gamma and beta and reset the statistics")

    optimizer: str = option("sgd", "optimiser", choices=OPTIMIZERS)
    lr: float = option(0.1, "learning rate", limits=(1e-30, 1e30))
    momentum: float = option(0.9, "SGD momentum", limits=SHARE)
    weight_decay: float = option(1e-4, "weight decay of all trained parameters", limits=RATE)
    label_smoothing: float = option(
        0.0, "share of the target that is spread evenly over all classes", limits=(0.0, 0.999))
    batch_size: int = option(128, "images per step, over all processes", limits=SIZE)
    schedule: str = option(
        "step", "how the learning rate falls: at --milestones (step), along half a cosine, when validation "
        "accuracy stalls (plateau), or never", choices=("step", "cosine", "plateau", "constant"))
    gamma: float = option(
        0.1, "factor applied to the learning rate at a milestone or plateau", limits=SHARE)
    min_lr: float = option(
        0.0, "final learning rate of cosine, and lower bound of plateau", limits=RATE)
    patience: int = option(
        10, "epochs without a better validation accuracy that make a plateau", limits=EPOCHS)
    early_stop: int | None = option(
        None, "stop after N epochs without a better validation accuracy; 0: never", limits=SOME_EPOCHS)
    warmup_epochs: int = option(
        0, "epochs over which the learning rate first rises linearly to --lr", limits=SOME_EPOCHS)
    epochs: int = setting(160, "passes over the training images", limits=EPOCHS)
    milestones: tuple[int, ...] = setting(
        (80, 120), "epochs after which the learning rate is multiplied by --gamma", type=int, nargs="*")

    data: str = setting(
        "cifar10", f"{', '.join(sources.SETS)}, or a folder with train/<class>/* and test/<class>/* or "
        "val/<class>/*")
    data_dir: str = logistics("data", "folder in which data sets are looked for and kept")
    image_size: int | None = setting(
        None, "side of the images in pixels; default: 32; imagenette: 128; a folder: that of its images if "
        "all are squares of one size, else 128", limits=(sources.SMALLEST, sources.LARGEST))
    augment: str = option(
        "paper", "random augmentation of training images: paper (crop+flip), photo (all but crop), none, "
        f"or any of {IMAGE_PARTS}, joined by +")
    train_subset: int | None = setting(
        None, "train on only N images, the same number of each class", limits=SIZE)
    val_split: int | None = setting(
        None, "set N training images aside for validation, the same number of each class; default: none, "
        "or a tenth if plateau or --early-stop needs them", limits=COUNT)

    device: str = logistics("auto", "where to train", choices=("auto", "cuda", "cpu"))
    dtype: str | None = setting(
        None, "number format of activations; default: bf16 where the hardware supports it, else fp16 on a "
        "GPU and fp32 on a CPU", choices=tuple(kernels.device.DTYPES))
    loader: str | None = logistics(
        None, "keep all images on the device (resident), or stream them with FFCV; default: resident if they "
        "fit", choices=("resident", "ffcv"))
    memory: str = logistics(
        "lean", "what is kept for the backward pass: each convolution's output (lean), each block's input "
        "(recompute), or whatever autograd keeps (stock)", choices=kernels.MEMORY)
    sync_bn: bool = option(
        False, "under torchrun, BatchNorm over the whole batch instead of each process's part")
    no_compile: bool = logistics(False, "use only PyTorch's own kernels, and no CUDA graph")

    seed: int = setting(
        0, "seed of everything random, 0 to 2**64 - 1; several seeds train side by side", nargs="+",
        limits=(0, 2**64 - 1))
    preset: str | None = option(
        None, "another set of defaults; docs/experiments.md describes them", choices=tuple(PRESETS))
    quick: bool = setting(
        False, "3,000 images, 8 epochs, batches of 64, a test every 2 epochs; cifar10 if it can be had, "
        "else synthetic")
    eval_every: int = logistics(
        1, "epochs between evaluations on the test images; the last epoch is always evaluated", limits=SIZE)
    log: str | None = logistics(
        None, "also log to this tracker, which must be installed", choices=("wandb", "trackio"))
    out: str = logistics("runs", "folder that holds the run folders")
    resume: bool = logistics(False, "continue the run where it stopped")
    overwrite: bool = logistics(False, "discard the contents of the run's folder and start again")

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012, pydantic reads this name

    def __post_init__(self):
        object.__setattr__(self, "milestones", tuple(self.milestones))  # argparse and TOML give lists


# fmt: on
SECTIONS = {  # of --help: first option of each section, and its title
    "arch": "the network",
    "optimizer": "training",
    "data": "images",
    "device": "speed and memory",
    "seed": "the run",
}
METAVARS = {int: "N", float: "X"}  # placeholders of numbers in --help
FIELDS = {field.name: field for field in dataclasses.fields(Options)}


def names(*roles: str) -> set[str]:
    """Return the names of the options that have one of these roles (see `option`)."""
    return {name for name, field in FIELDS.items() if field.metadata["role"] in roles}


def some(source: object, names: str) -> dict[str, Any]:
    """Return a dict of the attributes of `source` that are named in the space-separated `names`."""
    return {name: getattr(source, name) for name in names.split()}


def differing(options: Options, usual: Options, *roles: str) -> dict[str, Any]:
    """Return the options with these roles whose values differ from those in `usual`, in field order."""
    each = {name: getattr(options, name) for name in FIELDS if name in names(*roles)}
    return {name: value for name, value in each.items() if value != getattr(usual, name)}


def defaults(preset: str | None = None, quick: bool = False) -> Options:
    """Return the options of a run that gives only --preset, --quick or both."""
    differing = (PRESETS[preset] if preset else {}) | (QUICK if quick else {})
    return Options(**differing, preset=preset, quick=quick)


def make_parser(description: str) -> Parser:
    """Return the parser of train.py's command line; its namespace holds only the options that were given."""
    parser = group = Parser("train.py", description)
    for name, field in FIELDS.items():
        group = parser.add_argument_group(SECTIONS[name]) if name in SECTIONS else group
        told = dict(field.metadata["argparse"])
        if field.default is False:
            told["action"] = "store_true"
        elif field.default is not None:
            shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            told["help"] += f" [{shown}]"
        if told.get("type") in METAVARS:
            told["metavar"] = METAVARS[told["type"]]
        group.add_argument(flag(name), default=argparse.SUPPRESS, **told)
    return parser


def parse_options(
    argv: list[str] | None, description: str, say: Callable[[str], None] = lambda text: None
) -> tuple[list[Options], set[str]]:
    """Return the options for each seed on the command line, and the names of the options that were given.

    A given option that has no effect in combination with the others is reset to its default; `say` receives
    a one-line note of these. For the first unusable option, raises an exception whose exit_status is 2 and
    whose message says what would work.
    """
    given = vars(make_parser(description).parse_args(argv))
    usual = defaults(given.get("preset"), "quick" in given)
    options = dataclasses.replace(usual, **given)
    spelt = {"mode": freeze.canonical_mode(options.mode), "augment": augment.canonical(options.augment)}
    seeds = given.get("seed", [options.seed])
    if len(set(seeds)) < len(seeds):
        raise OptionError(f"--seed {' '.join(map(str, seeds))}: give each seed once")
    if options.log and len(seeds) > 1:
        raise OptionError(f"--log {options.log}: a tracker follows one run; give one seed")
    each = [dataclasses.replace(options, seed=seed, **spelt) for seed in seeds]
    for options in each:
        check(options)
    if idle := {name: beside for name, beside in without_effect(options).items() if name in given and beside}:
        say(f"without effect: {', '.join(f'{flag(name)} with {beside}' for name, beside in idle.items())}")
        each = [dataclasses.replace(options, **some(usual, " ".join(idle))) for options in each]
    return each, set(given)


def without_effect(options: Options) -> dict[str, object]:
    """Return, for each option that can be without effect, the flag that makes it so, or a false value."""
    schedule, of = f"--schedule {options.schedule}", options.schedule
    return {
        "per_channel": options.mode != "random" and f"--mode {options.mode}",
        "shortcut": options.arch.startswith("vgg") and f"--arch {options.arch}",
        "conv_init": options.init_from and "--init-from",
        "nonzeros": options.init_from and "--init-from",
        "bn_init": options.init_from and not options.reset_bn and "--init-from",
        "momentum": options.optimizer != "sgd" and f"--optimizer {options.optimizer}",
        "gamma": of not in ("step", "plateau") and schedule,
        "milestones": of != "step" and schedule,
        "min_lr": of not in ("cosine", "plateau") and schedule,
        "patience": of != "plateau" and schedule,
    }


def flag(name: str) -> str:
    """Return the command-line flag of an option."""
    return f"--{name.replace('_', '-')}"


def check(options: Options) -> None:
    """Raise OptionError, ModelError, DeviceError or DataError at the first value unusable on this machine."""

    def need(condition: bool, name: str, what: str) -> None:
        if not condition:
            raise OptionError(f"{flag(name)} {show(getattr(options, name))}: must be {what}")

    for name, field in FIELDS.items():
        value, limits = getattr(options, name), field.metadata["limits"]
        if limits and value is not None:
            least, greatest = limits
            need(least <= value <= greatest, name, f"from {show(least)} to {show(greatest)}")  # NaN fails too
        need(value != "", name, "a non-empty name")
        for character in value if isinstance(value, str) else ():
            what = f"spelt without U+{ord(character):04X}, which the records of a run cannot hold"
            need(character.isprintable(), name, what)
    need(options.min_lr <= options.lr, "min_lr", f"from 0 to --lr, {show(options.lr)}")
    need(options.warmup_epochs <= options.epochs, "warmup_epochs", f"at most --epochs, {options.epochs}")
    increasing = sorted({m for m in options.milestones if 0 < m <= EPOCHS[1]})
    need(increasing == list(options.milestones), "milestones", "increasing numbers of epochs")
    kernels.device.choose(options.device)
    sources.expanded(options.data_dir)  # like the next check, before any download
    largest = largest_filter(options.arch, options.shortcut)
    need(
        options.per_channel <= largest, "per_channel", f"at most {largest}, the weights of the largest filter"
    )
    chooses = [f"--early-stop {options.early_stop}"] if options.early_stop else []
    chooses += ["--schedule plateau"] if options.schedule == "plateau" else []
    if options.val_split == 0:
        need(not chooses, "val_split", f"above 0: validation images are needed by {' and '.join(chooses)}")
    if options.nonzeros and options.conv_init != "sparse":
        raise OptionError(f"--nonzeros {options.nonzeros}: applies only to --conv-init sparse")
    if options.reset_bn and not options.init_from:
        raise OptionError("--reset-bn: needs --init-from; without it every BatchNorm is newly drawn anyway")
    if options.resume and options.overwrite:
        raise OptionError("--resume and --overwrite contradict each other; give one of them")


@functools.cache
def largest_filter(arch: str, shortcut: str) -> int:
    """Return the number of weights in a network's largest filter. Raises ModelError if models.build does."""
    with torch.device("meta"):
        modules = models.build(arch, shortcut=shortcut).modules()
    return max(module.weight[0].numel() for module in modules if isinstance(module, models.Conv2d))


def show(value: object) -> str:
    """Format an option's value as in a command line; None and empty sequences give "none"."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(show, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return "none" if value is None else str(value)
