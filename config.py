"""The options of a run: their names, defaults and ranges. Every default is the published one."""

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterable
from typing import Any, NoReturn

import torch

import freeze
import kernels
import models
import step as steps
from datasets import augment as augmentation
from kernels.distributed import ALONE, Group

# What --recipe stands for. `best` is what reached the most on validation images in the runs of results/.
# 000-1 to 000-3 are the experiments of a Keras study of ResNet-50, made honest: what it chose on test images
# is chosen on validation images.
KERAS = {
    **{"arch": "resnet50", "optimizer": "adam", "lr": 0.01, "weight_decay": 0.0, "bn_init": "he_normal"},
    **{"schedule": "plateau", "min_lr": 1e-5, "early_stop": 20, "epochs": 500, "batch_size": 1024},
}
RECIPES = {
    "best": {"lr": 1.0},
    "000-1": {**KERAS, "augment": "none"},
    "000-2": {**KERAS, "augment": "flip+brightness+rotation"},
    "000-3": {**KERAS, "augment": "photo", "data": "imagenette", "image_size": 128, "batch_size": 128},
}


def option(default: Any, help: str, **argparse_arguments: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **argparse_arguments})


@dataclasses.dataclass(frozen=True)
class Options:
    """Each field is an option of the command line; its metadata is what argparse shows and checks."""

    arch: str = option(
        "resnet32", "resnetD (D = 6n+2), resnetD_wK, vgg11|13|16|19, resnet18|34|50|101|152|200"
    )
    mode: str = option(
        "bn_only", f"what trains: all, none, random, or a sum of {', '.join(freeze.PARTS)} with +"
    )
    data: str = option(
        "cifar10", "cifar10, imagenette, synthetic, or a folder: train/<class>/*, test/<class>/*"
    )
    data_dir: str = option("data", "where archives are looked for and kept")
    image_size: int | None = option(
        None,
        "pixels a side; default: 32, imagenette 128, a folder its own if all are equal squares, else 128",
        type=int,
    )
    train_subset: int | None = option(None, "train on N images, the same number of each class", type=int)
    val_split: int | None = option(
        None,
        "set N training images apart, the same number of each class, to choose by; default: none, and a "
        "tenth where plateau or --early-stop choose",
        type=int,
    )
    augment: str = option(
        "paper",
        "of training images: paper (crop+flip), photo (all but crop), none, or a sum of "
        f"{', '.join(augmentation.PARTS)} with +",
    )
    epochs: int = option(160, "passes over the training images", type=int)
    milestones: tuple = option(
        (80, 120), "epochs after which lr is multiplied by --gamma", type=int, nargs="*"
    )
    gamma: float = option(0.1, "factor at each milestone or plateau", type=float)
    schedule: str = option(
        "step", "the learning rate's course", choices=("step", "cosine", "plateau", "constant")
    )
    min_lr: float = option(0.0, "where cosine and plateau end", type=float)
    patience: int = option(
        10, "epochs without a better validation accuracy before plateau cuts the rate", type=int
    )
    early_stop: int | None = option(
        None, "end after N epochs without a better validation accuracy; 0: never", type=int
    )
    warmup_epochs: int = option(0, "epochs of linear rise to --lr", type=int)
    optimizer: str = option("sgd", "of the trained tensors", choices=("sgd", "adam"))
    lr: float = option(0.1, "learning rate", type=float)
    momentum: float = option(0.9, "of SGD", type=float)
    weight_decay: float = option(1e-4, "on everything that trains", type=float)
    batch_size: int = option(128, "images per step, of all processes together", type=int)
    label_smoothing: float = option(0.0, "share of the target spread over all classes", type=float)
    shortcut: str = option("projection", "of residual blocks that change shape", choices=models.SHORTCUTS)
    conv_init: str = option("kaiming_normal", "of convolutions", choices=models.CONV_INITS)
    bn_init: str = option("uniform", "of gamma and beta", choices=models.BN_INITS)
    per_channel: int = option(2, "weights of every filter that --mode random trains", type=int)
    init_from: str | None = option(
        None,
        "start from these weights, then freeze: a run folder, .safetensors, .pth or .pt; {seed} in the name "
        "is the run's",
    )
    reset_bn: bool = option(False, "draw BatchNorm anew after --init-from")
    seed: int = option(
        0, "of everything random, 0 to 2**64 - 1; several train side by side", type=int, nargs="+"
    )
    device: str = option("auto", "where to train", choices=("auto", "cuda", "cpu"))
    dtype: str | None = option(
        None,
        "default: bf16 where the hardware has it, else fp16 on a GPU, fp32 on a CPU",
        choices=tuple(steps.DTYPES),
    )
    loader: str | None = option(None, "default: resident where the images fit", choices=("resident", "ffcv"))
    memory: str = option(
        "lean",
        "kept for backward: convolutions' outputs; recompute: blocks' inputs; stock: all that autograd does",
        choices=kernels.MEMORY,
    )
    sync_bn: bool = option(False, "under torchrun, BatchNorm over the whole batch, not each process's part")
    no_compile: bool = option(False, "only PyTorch's own kernels, and no CUDA graph")
    eval_every: int = option(1, "epochs between evaluations; the last epoch always has one", type=int)
    recipe: str | None = option(
        None, f"other defaults, all at once: {', '.join(RECIPES)}", choices=tuple(RECIPES)
    )
    out: str = option("runs", "the folder of run folders")
    resume: bool = option(False, "continue the run where it stopped")
    overwrite: bool = option(False, "start the run again")
    quick: bool = option(
        False,
        "3,000 images, 8 epochs, batches of 64, a test every 2; cifar10 if it can be had, else synthetic",
    )


QUICK = {
    **{"quick": True, "train_subset": 3000, "epochs": 8, "milestones": (4, 6), "batch_size": 64},
    "eval_every": 2,
}
# Options that change where or how fast a run goes, not what it computes: no part of its name.
LOGISTIC = {"data_dir", "device", "loader", "memory", "no_compile", "eval_every"}
LOGISTIC |= {"out", "resume", "overwrite"}
# Options that say what was run, on which images and for how long, not how: no variant of a run.
NOT_VARIANTS = {"arch", "mode", "data", "seed", "dtype", *LOGISTIC}
NOT_VARIANTS |= {"epochs", "milestones", "quick", "train_subset", "val_split", "image_size"}


class OptionError(ValueError):
    """An option's value that cannot be used; the message says what can."""


def parse_options(
    argv: list[str] | None, description: str, group: Group = ALONE
) -> tuple[list[Options], set[str]]:
    """The options of each seed, and the names of those given.

    OptionError, or what canonical names raise, for the first that is unusable.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def refuse(message: str) -> NoReturn:
        raise OptionError(f"{message}; python train.py --help lists the options")

    parser.error = refuse
    for field in dataclasses.fields(Options):
        arguments = dict(field.metadata)
        if field.default is False:
            arguments["action"] = "store_true"
        elif field.default is not None:
            shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            arguments["help"] += f" [{shown}]"
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, **arguments)
    none = {"action": "store_const", "const": "none", "default": argparse.SUPPRESS}
    parser.add_argument("--no-augment", dest="augment", help="--augment none", **none)
    given = vars(parser.parse_args(argv))
    options = dataclasses.replace(defaults(given.get("recipe"), "quick" in given), **given)
    canonical = {"milestones": tuple(options.milestones), "mode": freeze.canonical_mode(options.mode)}
    options = dataclasses.replace(options, **canonical, augment=augmentation.canonical(options.augment))
    seeds = given.get("seed", [options.seed])
    if len(set(seeds)) < len(seeds):
        raise OptionError(f"--seed {' '.join(map(str, seeds))}: give each seed once")
    each = [dataclasses.replace(options, seed=seed) for seed in seeds]
    for options in each:
        check_ranges(options)
        check_processes(options, group)
    if len(each) > 1 and group.count > 1:
        raise OptionError(f"--seed {' '.join(map(str, seeds))}: torchrun trains one model; give one seed")
    return each, set(given)


def defaults(recipe: str | None = None, quick: bool = False) -> Options:
    """What a run with --recipe or --quick, and nothing else, does."""
    chosen = (RECIPES[recipe] if recipe else {}) | (QUICK if quick else {})
    return Options(**chosen, recipe=recipe)


def as_json(options: Options) -> dict:
    """The options as config.json has them."""
    return json.loads(json.dumps(dataclasses.asdict(options)))


DEFAULTS = as_json(Options())


def recorded(found: dict) -> dict:
    """The options that a run recorded; those that there were not yet have their defaults."""
    options = DEFAULTS | found
    if options.pop("no_augment", False):  # as it was before there were several
        options["augment"] = "none"
    return options


def variant(options: dict, before: int = 0) -> dict:
    """Of a run's recorded options, those that set it apart from the published run of as many epochs, whose
    learning rate falls after 1/2 and 3/4 of them. It came after `before` epochs of what it started from.
    """
    recipe = options["recipe"] if options["recipe"] in RECIPES else None
    published = as_json(defaults(recipe, options["quick"])) | {"recipe": None}
    differing = {k: v for k, v in options.items() if k not in NOT_VARIANTS and v != published.get(k)}
    if options["schedule"] == "step":
        epochs = before + options["epochs"]
        steps = [before + milestone for milestone in options["milestones"] if milestone < options["epochs"]]
        if steps != [epochs // 2, 3 * epochs // 4]:
            differing["milestones"] = steps
    return differing


def variant_text(options: Iterable[tuple[str, object]]) -> str:
    """`lr 0.05, milestones 2 3`"""
    return ", ".join(f"{name} {show(value)}" for name, value in options)


def show(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(show, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


@functools.cache
def check_arch(arch: str, shortcut: str) -> None:
    """ModelError for what names no network."""
    with torch.device("meta"):
        models.build(arch, shortcut=shortcut)


def check_ranges(options: Options) -> None:
    """OptionError for the first value that no run could use."""

    def need(condition: bool, name: str, what: str) -> None:
        if not condition:
            value = getattr(options, name)
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise OptionError(f"--{name.replace('_', '-')} {shown}: must be {what}")

    counts = ("epochs", "batch_size", "eval_every", "per_channel", "train_subset", "image_size")
    for name in (*counts, "lr", "patience"):
        value = getattr(options, name)
        need(value is None or 0 < value < float("inf"), name, "greater than 0")
    for name in ("warmup_epochs", "momentum", "weight_decay", "gamma", "early_stop", "val_split"):
        need(0 <= (getattr(options, name) or 0) < float("inf"), name, "0 or more")
    need(0 <= options.min_lr <= options.lr, "min_lr", f"from 0 to --lr, {options.lr:g}")
    for name in ("arch", "data", "data_dir", "out", "init_from"):
        need(getattr(options, name) != "", name, "a name, not nothing")
    need(not options.image_size or options.image_size < 65536, "image_size", "below 65536")
    need(0 <= options.seed < 2**64, "seed", "from 0 to 2**64 - 1")
    need(0 <= options.label_smoothing < 1, "label_smoothing", "at least 0 and below 1")
    increasing = sorted({m for m in options.milestones if m > 0})
    need(increasing == list(options.milestones), "milestones", "increasing numbers of epochs")
    need(
        options.device != "cuda" or torch.cuda.is_available(),
        "device",
        "cpu or auto: there is no CUDA GPU here",
    )
    check_arch(options.arch, options.shortcut)  # before any download
    chooses = [f"--early-stop {options.early_stop}"] if options.early_stop else []
    chooses += ["--schedule plateau"] if options.schedule == "plateau" else []
    if options.val_split == 0:
        need(not chooses, "val_split", f"above 0, for {' and '.join(chooses)} to look at")
    if options.reset_bn and not options.init_from:
        raise OptionError("--reset-bn: there is nothing to draw anew; it goes with --init-from")
    if options.resume and options.overwrite:
        raise OptionError("--resume and --overwrite contradict each other; give one of them")


def check_processes(options: Options, group: Group) -> None:
    """OptionError for the first value that `group` could not share."""
    if options.batch_size % group.count:
        what = f"--batch-size {options.batch_size}: must be a multiple of {group.count}"
        raise OptionError(f"{what}, the number of processes")
    if options.sync_bn and options.memory == "stock" and group.count > 1:
        what = "--sync-bn with --memory stock: autograd's BatchNorm knows its own process's batch only"
        raise OptionError(f"{what}; give lean or recompute")
    gpus = torch.cuda.device_count()
    if group.count > 1 and options.device != "cpu" and torch.cuda.is_available() and group.count_here > gpus:
        what = f"--device {options.device}: {group.count_here} processes need as many GPUs, here are {gpus}"
        raise OptionError(f"{what}; start fewer, or give --device cpu")
