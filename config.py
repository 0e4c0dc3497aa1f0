"""The options of a run, once: names, help, ranges, presets, and defaults, which are the published ones."""

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

OPTIMIZERS = ("sgd", "adam")  # of torch.optim, in lower case

PRESETS = tomllib.loads(Path(__file__).with_name("presets.toml").read_text("utf-8"))
QUICK = {"train_subset": 3000, "epochs": 8, "milestones": (4, 6), "batch_size": 64, "eval_every": 2}


def option(default: Any, help: str, role: str = "variant", limits: tuple | None = None, **told: Any) -> Any:
    """A field of Options: its default, its help text, and what else argparse is told of it.

    `role` says what the option means for a run: "variant", how it is trained; "setting", what is trained, on
    which images and for how long; "logistics", where and how fast it runs, which does not change its result.
    `limits` are the least and the greatest value; numbers take the type of theirs.
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
    """Each field is an option of the command line; its metadata is what argparse shows and checks."""

    arch: str = setting("resnet32", "resnetD (D = 6n+2), resnetD_wK, vgg11|13|16|19, resnet18|34|50|...|200")
    mode: str = setting("bn_only", f"what trains: all, none, random, or a sum of {MODE_PARTS} with +")
    per_channel: int = option(2, "weights of every filter that --mode random trains", limits=SIZE)
    shortcut: str = option("projection", "shortcut of a block that changes shape", choices=models.SHORTCUTS)
    conv_init: str = option(
        "kaiming_normal", "initial convolution weights; the output layer is kaiming_normal with bias 0 "
        "whatever they are, while in open_lth its weight is drawn as they are", choices=models.CONV_INITS)
    nonzeros: int | None = option(
        None, "weights of every filter that --conv-init sparse leaves, or all where a filter has fewer; "
        "default: a tenth, rounded up", limits=SIZE)
    bn_init: str = option("uniform", "initial gamma and beta", choices=models.BN_INITS)
    init_from: str | None = option(
        None, "load these weights, then freeze: a run folder, .safetensors, .pth or .pt; {seed} in the name "
        "stands for the run's seed")
    reset_bn: bool = option(False, "draw gamma, beta and statistics anew after --init-from")

    optimizer: str = option("sgd", "the optimiser of what trains", choices=OPTIMIZERS)
    lr: float = option(0.1, "learning rate", limits=(1e-30, 1e30))
    momentum: float = option(0.9, "SGD momentum", limits=SHARE)
    weight_decay: float = option(1e-4, "weight decay of everything that trains", limits=RATE)
    label_smoothing: float = option(0.0, "share of the target spread over all classes", limits=(0.0, 0.999))
    batch_size: int = option(128, "images per step, of all processes together", limits=SIZE)
    schedule: str = option(
        "step", "how the learning rate falls: at --milestones, along half a cosine, at plateaus, or never",
        choices=("step", "cosine", "plateau", "constant"))
    gamma: float = option(0.1, "factor of the learning rate at a milestone or plateau", limits=SHARE)
    min_lr: float = option(0.0, "learning rate at which cosine and plateau end", limits=RATE)
    patience: int = option(10, "epochs without a better validation accuracy before a plateau", limits=EPOCHS)
    early_stop: int | None = option(
        None, "end after N epochs without a better validation accuracy; 0: never", limits=SOME_EPOCHS)
    warmup_epochs: int = option(
        0, "epochs in which the learning rate rises linearly to --lr", limits=SOME_EPOCHS)
    epochs: int = setting(160, "passes over the training images", limits=EPOCHS)
    milestones: tuple[int, ...] = setting(
        (80, 120), "epochs after which the learning rate is multiplied by --gamma", type=int, nargs="*")

    data: str = setting("cifar10", f"{', '.join(sources.SETS)}, or a folder: train/<class>/*, test/...")
    data_dir: str = logistics("data", "the folder in which archives are looked for and kept")
    image_size: int | None = setting(
        None, "pixels a side; default: 32, imagenette 128, a folder its own if all are equal squares, "
        "else 128", limits=(sources.SMALLEST, sources.LARGEST))
    augment: str = option(
        "paper", "how training images are changed at random: paper (crop+flip), photo (all but crop), none, "
        f"or a sum of {IMAGE_PARTS} with +")
    train_subset: int | None = setting(None, "train on N images, the same number of each class", limits=SIZE)
    val_split: int | None = setting(
        None, "set N training images apart for validation, the same number of each class; default: none, "
        "and a tenth where plateau or --early-stop need them", limits=COUNT)

    device: str = logistics("auto", "where to train", choices=("auto", "cuda", "cpu"))
    dtype: str | None = setting(
        None, "number format of activations; default: bf16 where the hardware computes in it, else fp16 on a "
        "GPU and fp32 on a CPU", choices=tuple(kernels.device.DTYPES))
    loader: str | None = logistics(
        None, "batches of images resident on the device, or streamed by FFCV; default: resident if they fit",
        choices=("resident", "ffcv"))
    memory: str = logistics(
        "lean", "what is kept for backward: each convolution's output (lean), each block's input "
        "(recompute), or all that autograd keeps (stock)", choices=kernels.MEMORY)
    sync_bn: bool = option(False, "under torchrun, BatchNorm over the whole batch, not each process's part")
    no_compile: bool = logistics(False, "use only PyTorch's own kernels, and no CUDA graph")

    seed: int = setting(
        0, "seed of everything random, 0 to 2**64 - 1; several train side by side", nargs="+",
        limits=(0, 2**64 - 1))
    preset: str | None = option(
        None, f"other defaults, all at once: {', '.join(PRESETS)}", choices=tuple(PRESETS))
    quick: bool = setting(
        False, "3,000 images, 8 epochs, batches of 64, a test every 2 epochs; cifar10 where it can be had, "
        "else synthetic")
    eval_every: int = logistics(
        1, "epochs between evaluations on the test images; the last epoch always has one", limits=SIZE)
    log: str | None = logistics(
        None, "also log to this tracker, which must be installed", choices=("wandb", "trackio"))
    out: str = logistics("runs", "the folder of run folders")
    resume: bool = logistics(False, "continue the run where it stopped")
    overwrite: bool = logistics(False, "discard what the run's folder holds, and begin again")

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012, for whoever reads config.json

    def __post_init__(self):
        object.__setattr__(self, "milestones", tuple(self.milestones))  # command lines and TOML have lists


# fmt: on
SECTIONS = {  # of --help, by the first option in each
    "arch": "the network",
    "optimizer": "training",
    "data": "images",
    "device": "speed and memory",
    "seed": "the run",
}
FIELDS = {field.name: field for field in dataclasses.fields(Options)}


def names(*roles: str) -> set[str]:
    """The options that play one of these roles, see `option`."""
    return {name for name, field in FIELDS.items() if field.metadata["role"] in roles}


def some(source: object, names: str) -> dict[str, Any]:
    """The attributes of `source` that `names` lists, with blanks between them, by name."""
    return {name: getattr(source, name) for name in names.split()}


def differing(options: Options, usual: Options, *roles: str) -> dict[str, Any]:
    """The options of these roles that are not as in `usual`, in their order."""
    each = {name: getattr(options, name) for name in FIELDS if name in names(*roles)}
    return {name: value for name, value in each.items() if value != getattr(usual, name)}


def defaults(preset: str | None = None, quick: bool = False) -> Options:
    """The options of a run with --preset or --quick, and nothing else."""
    differing = (PRESETS[preset] if preset else {}) | (QUICK if quick else {})
    return Options(**differing, preset=preset, quick=quick)


def make_parser(description: str) -> Parser:
    """The command line of train.py: every option once, in sections; those not given are left out."""
    parser = group = Parser("train.py", description)
    for name, field in FIELDS.items():
        group = parser.add_argument_group(SECTIONS[name]) if name in SECTIONS else group
        told = dict(field.metadata["argparse"])
        if field.default is False:
            told["action"] = "store_true"
        elif field.default is not None:
            shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            told["help"] += f" [{shown}]"
        group.add_argument(flag(name), default=argparse.SUPPRESS, **told)
    return parser


def parse_options(
    argv: list[str] | None, description: str, say: Callable[[str], None] = lambda text: None
) -> tuple[list[Options], set[str]]:
    """The options of each seed of a command line, and the names of those given.

    Those that change nothing beside the others keep their defaults, which `say` is told in a line. Raises,
    for the first that is unusable, an exception with exit_status 2, whose message says what would do.
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
    """Of options that may change nothing, beside which other one they do not; else something false."""
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
    """An option's name on the command line."""
    return f"--{name.replace('_', '-')}"


def check(options: Options) -> None:
    """OptionError, or ModelError, for the first value that no run on this machine could use."""

    def need(condition: bool, name: str, what: str) -> None:
        if not condition:
            raise OptionError(f"{flag(name)} {show(getattr(options, name))}: must be {what}")

    for name, field in FIELDS.items():
        value, limits = getattr(options, name), field.metadata["limits"]
        if limits and value is not None:
            least, greatest = limits
            need(least <= value <= greatest, name, f"from {show(least)} to {show(greatest)}")  # nor NaN
        need(value != "", name, "a name, not nothing")
    need(options.min_lr <= options.lr, "min_lr", f"from 0 to --lr, {options.lr:g}")
    need(options.warmup_epochs <= options.epochs, "warmup_epochs", f"at most --epochs, {options.epochs}")
    increasing = sorted({m for m in options.milestones if 0 < m <= EPOCHS[1]})
    need(increasing == list(options.milestones), "milestones", "increasing numbers of epochs")
    kernels.device.choose(options.device)
    sources.expanded(options.data_dir)  # this and the next before any download
    largest = largest_filter(options.arch, options.shortcut)
    need(
        options.per_channel <= largest, "per_channel", f"at most {largest}, the weights of the largest filter"
    )
    chooses = [f"--early-stop {options.early_stop}"] if options.early_stop else []
    chooses += ["--schedule plateau"] if options.schedule == "plateau" else []
    if options.val_split == 0:
        need(not chooses, "val_split", f"above 0, because {' and '.join(chooses)} needs validation images")
    if options.nonzeros and options.conv_init != "sparse":
        raise OptionError(
            f"--nonzeros {options.nonzeros}: no weight is zero; it goes with --conv-init sparse"
        )
    if options.reset_bn and not options.init_from:
        raise OptionError("--reset-bn: every BatchNorm is drawn anyway; it goes with --init-from")
    if options.resume and options.overwrite:
        raise OptionError("--resume and --overwrite contradict each other; give one of them")


@functools.cache
def largest_filter(arch: str, shortcut: str) -> int:
    """The weights of the largest filter of a network. ModelError where these name none."""
    with torch.device("meta"):
        modules = models.build(arch, shortcut=shortcut).modules()
    return max(module.weight[0].numel() for module in modules if isinstance(module, models.Conv2d))


def show(value: object) -> str:
    """An option's value as people write it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(show, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
