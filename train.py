"""Train a convolutional network of which only a part trains: by default BatchNorm's gamma and beta alone.

    python train.py --arch resnet32 --mode bn_only              # the paper's schedule: 160 epochs of CIFAR-10
    python train.py --arch resnet32 --mode bn_only --quick      # the same idea in a few minutes on a CPU
    python train.py --arch resnet56 --mode random --seed 1      # as many random convolution weights instead
    python train.py --arch resnet110 --mode bn+output --resume  # go on where the run stopped

Every default is the published one: Frankle, Schwab, Morcos, "Training BatchNorm and Only BatchNorm" (2020).
A run leaves a folder in --out; exit status 0: done, 1: the run failed, 2: unusable options or data.
"""

import time

STARTED = time.perf_counter()  # before the imports: start-up is what a user waits for

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

import data
import display
import freeze
import models
import runs
import step as steps

# ----------------------------------------------------------------------------------------------------------
# Options


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
    no_augment: bool = option(False, "no random crops and flips")
    epochs: int = option(160, "passes over the training images", type=int)
    milestones: tuple = option(
        (80, 120), "epochs after which lr is multiplied by --gamma", type=int, nargs="*"
    )
    gamma: float = option(0.1, "factor at each milestone or plateau", type=float)
    schedule: str = option(
        "step", "the learning rate's course", choices=("step", "cosine", "plateau", "constant")
    )
    warmup_epochs: int = option(0, "epochs of linear rise to --lr", type=int)
    optimizer: str = option("sgd", "of the trained tensors", choices=("sgd", "adam"))
    lr: float = option(0.1, "learning rate", type=float)
    momentum: float = option(0.9, "of SGD", type=float)
    weight_decay: float = option(1e-4, "on everything that trains", type=float)
    batch_size: int = option(128, "images per step", type=int)
    label_smoothing: float = option(0.0, "share of the target spread over all classes", type=float)
    shortcut: str = option("projection", "of residual blocks that change shape", choices=models.SHORTCUTS)
    conv_init: str = option("kaiming_normal", "of convolutions", choices=models.CONV_INITS)
    bn_init: str = option("uniform", "of gamma and beta", choices=models.BN_INITS)
    per_channel: int = option(2, "weights of every filter that --mode random trains", type=int)
    init_from: str | None = option(None, "start from these weights (.safetensors or .pt), then freeze")
    seed: int = option(0, "of everything random, 0 to 2**64 - 1", type=int)
    device: str = option("auto", "where to train", choices=("auto", "cuda", "cpu"))
    dtype: str | None = option(
        None,
        "default: bf16 where the hardware has it, else fp16 on a GPU, fp32 on a CPU",
        choices=tuple(steps.DTYPES),
    )
    loader: str | None = option(None, "default: resident where the images fit", choices=("resident", "ffcv"))
    compile: bool | None = option(
        None, "torch.compile; default: on a GPU, not on a CPU", action=argparse.BooleanOptionalAction
    )
    eval_every: int = option(1, "epochs between evaluations; the last epoch always has one", type=int)
    out: str = option("runs", "the folder of run folders")
    resume: bool = option(False, "continue the run where it stopped")
    overwrite: bool = option(False, "start the run again")
    quick: bool = option(
        False,
        "3,000 images, 8 epochs, batches of 64, a test every 2; cifar10 if it can be had, else synthetic",
    )


QUICK = Options(quick=True, train_subset=3000, epochs=8, milestones=(4, 6), batch_size=64, eval_every=2)
# Options that change where or how fast a run goes, not what it computes: no part of its name.
LOGISTIC = {"data_dir", "device", "loader", "compile", "eval_every", "out", "resume", "overwrite"}


class OptionError(ValueError):
    """An option's value that cannot be used; the message says what can."""


def parse_options(argv: list[str] | None) -> tuple[Options, set[str]]:
    """The options, and the names of those that were given. OptionError for the first that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
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
    given = vars(parser.parse_args(argv))
    options = dataclasses.replace(QUICK if "quick" in given else Options(), **given)
    options = dataclasses.replace(
        options, milestones=tuple(options.milestones), mode=freeze.canonical_mode(options.mode)
    )
    check_ranges(options)
    return options, set(given)


def check_ranges(options: Options) -> None:
    """OptionError for the first value that no run could use."""

    def need(condition: bool, name: str, what: str) -> None:
        if not condition:
            value = getattr(options, name)
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise OptionError(f"--{name.replace('_', '-')} {shown}: must be {what}")

    for name in ("epochs", "batch_size", "eval_every", "per_channel", "train_subset", "image_size", "lr"):
        value = getattr(options, name)
        need(value is None or 0 < value < float("inf"), name, "greater than 0")
    for name in ("warmup_epochs", "momentum", "weight_decay", "gamma"):
        need(0 <= getattr(options, name) < float("inf"), name, "0 or more")
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
    with torch.device("meta"):  # before any download: a name that is no network's
        models.build(options.arch, shortcut=options.shortcut)
    if options.init_from and not Path(options.init_from).is_file():
        raise OptionError(f"--init-from {options.init_from}: there is no such file")
    if options.resume and options.overwrite:
        raise OptionError("--resume and --overwrite contradict each other; give one of them")


def open_data(options: Options, given: set[str]) -> tuple[Options, data.Dataset]:
    """The data set; with --quick and no --data, the synthetic one where CIFAR-10 cannot be had."""
    wanted = {"data_dir": options.data_dir, "image_size": options.image_size, "say": note}
    try:
        return options, data.open_dataset(options.data, **wanted)
    except data.DataError as error:
        if not options.quick or "data" in given:
            raise
        note(f"--quick takes synthetic images, for want of CIFAR-10: {str(error).splitlines()[0]}")
    return dataclasses.replace(options, data="synthetic"), data.open_dataset("synthetic", **wanted)


# ----------------------------------------------------------------------------------------------------------
# What a run is called, and what it was run on


def cell_name(options: Options, dataset: data.Dataset) -> str:
    """The run folder's name: data, arch, mode, seed, then each option that differs from its default."""
    defaults = QUICK if options.quick else Options()
    named = {"data", "arch", "mode", "seed", "quick"} | LOGISTIC
    differing = {"quick": True} if options.quick else {}
    for name, value in dataclasses.asdict(options).items():
        if name not in named and value != getattr(defaults, name):
            differing[name] = Path(value).stem if name == "init_from" else value
    return runs.run_name(dataset.name, options.arch, options.mode, options.seed, differing)


def describe(
    options: Options, recipe: dict, frozen_sha256: str, dataset: data.Dataset, device: torch.device
) -> dict:
    """The content of config.json: what was asked for, what it came to, and on what."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    device_name = platform.machine()
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    elif (cpu_info := Path("/proc/cpuinfo")).exists():
        lines = [line for line in cpu_info.read_text().splitlines() if line.startswith("model name")]
        device_name = (
            f"{lines[0].split(': ')[1] if lines else device_name}, {torch.get_num_threads()} threads"
        )
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        commit = ""
    versions = {package: version(package) for package in ("torch", "triton", "ffcv", "numpy")}
    return {
        "options": dataclasses.asdict(options) | {"milestones": list(options.milestones)},
        "recipe": recipe,
        "frozen": {"sha256": frozen_sha256},
        "data_title": dataset.title,
        "device": device.type,
        "device_name": device_name,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **versions},
        "git_commit": commit or None,
    }


def note(line: str) -> None:
    print(f"train.py: {line}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------
# The run


class RunFailed(Exception):
    """The run ended before its last epoch; the message says why."""


def train_epoch(
    epoch: int, step: steps.Step, schedule: steps.Schedule, loader: Any, bars: display.Display, at: dict
) -> dict:
    """One pass over the training images: its row of metrics, without the evaluation's.

    A process's first step, which compiles, counts as start-up and not as training. Raises FloatingPointError,
    naming epoch and step, at a loss that is not finite.
    """
    step.start_epoch()
    bars.start_epoch(epoch)
    first_step, untimed_images, began = (epoch - 1) * len(loader), 0, time.perf_counter()
    look_every = 1 if step.device.type == "cpu" else 50  # to look at a GPU's numbers is to wait for it
    for i, (images, labels) in enumerate(loader.epoch(epoch - 1)):
        step(images, labels, schedule.lr(first_step + i))
        if (i % look_every == 0 or i + 1 == len(loader)) and (bad := step.diverged_at()) is not None:
            raise FloatingPointError(
                f"the loss is not finite at epoch {epoch}, step {bad + 1}; try a lower --lr"
            )
        if not at["started"]:
            untimed_images, began = len(labels), time.perf_counter()
            at |= {"started": True, "startup_s": at["startup_s"] + began - STARTED}
        bars.step(step)
    train_loss, train_acc = step.metrics()
    seconds, images = time.perf_counter() - began, step.seen - untimed_images
    lr = float(f"{schedule.lr(first_step):.6g}")
    row = {"epoch": epoch, "lr": lr, "train_loss": train_loss, "train_acc": train_acc}
    return row | {"epoch_s": seconds, "images_per_s": images / seconds if images else None}


def train(options: Options, dataset: data.Dataset) -> None:
    """One run, from the draw of the network to the table of results. RunFailed where it ends early."""
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    dtype_name = options.dtype or steps.default_dtype(device)
    dtype = steps.DTYPES[dtype_name]

    # What a stranger needs, besides the trained tensors, to make the same network again
    recipe = {key: getattr(options, key) for key in freeze.RECIPE if hasattr(options, key)}
    recipe |= {"data": dataset.name, "fingerprint": dataset.fingerprint, "image_size": dataset.image_size}
    recipe |= {key: list(getattr(dataset, key)) for key in ("classes", "mean", "std")}
    # Inductor's BatchNorm is several times slower than the eager one on a CPU, and takes a minute to compile.
    compiled = device.type == "cuda" if options.compile is None else options.compile
    recipe |= {"dtype": dtype_name, "device": device.type, "compile": compiled}
    models.check_batches(options.arch, options.shortcut, options.batch_size, dataset.image_size)

    # The network at its seed's weights, of which only what the mode trains has gradients
    model = freeze.create(recipe, say=note)
    frozen_sha256 = freeze.frozen_sha256(model)
    model.to(device, memory_format=torch.channels_last)
    if compiled:
        steps.compile_units(model)

    # Batches, whose order and augmentation come from the seed and the epoch alone
    rng = functools.partial(models.stream, options.seed)
    subset = None
    if options.train_subset:
        subset = data.class_subset(dataset.train.labels, options.train_subset, rng("subset", 0))
    batches = {"kind": options.loader, "batch_size": options.batch_size, "device": device, "dtype": dtype}
    drawn = {"rng": rng, "augment": not options.no_augment, "subset": subset}
    train_loader = data.make_loader(dataset, "train", **batches, **drawn)
    test_loader = data.make_loader(dataset, "test", **batches)

    # The step and the course of its learning rate
    settings = ("optimizer", "momentum", "weight_decay", "label_smoothing")
    step = steps.Step(model, dtype=dtype, **{key: getattr(options, key) for key in settings})
    settings = ("schedule", "lr", "epochs", "milestones", "gamma", "warmup_epochs")
    schedule = steps.Schedule(len(train_loader), **{key: getattr(options, key) for key in settings})
    if options.schedule == "step" and min(options.milestones, default=0) >= options.epochs:
        note(f"all of --milestones lie past the last epoch: the learning rate stays {options.lr:g}")

    with runs.open_run(options.out, cell_name(options, dataset), options.resume, options.overwrite) as run:
        # Where the run stopped, if it was run before
        config = describe(options, recipe, frozen_sha256, dataset, device)
        run.refuse_another(config, ignoring=LOGISTIC | {"data"})
        if run.status == "done":
            return show_results(run)
        at = {"epoch": 0, "train_s": 0.0, "startup_s": 0.0, "best_test_acc": None}
        if (state := run.load_last()) is not None:
            at = restore(run, state, model, step, schedule)
            freeze.set_steps(model, at["epoch"] * len(train_loader))
            note(f"continuing {run.path} after epoch {at['epoch']}")
        elif options.resume:
            note(f"no epoch of {run.path} is there to resume from: starting it")
        at["started"] = False
        run.start(config)
        title = f"{run.path}\n{options.arch}, {options.mode}, {dataset.title}"
        what = f"{dataset.name} quick" if options.quick else dataset.name
        bars = display.Display(title, what, options.epochs, len(train_loader), at["epoch"])

        # The epochs
        ending, checkpoint = {"status": "failed", "why": "an unforeseen error"}, b""
        try:
            with bars.bars:
                for epoch in range(at["epoch"] + 1, options.epochs + 1):
                    row = train_epoch(epoch, step, schedule, train_loader, bars, at)
                    row |= {"test_loss": None, "test_acc": None}
                    best = at["best_test_acc"]
                    if epoch % options.eval_every == 0 or epoch == options.epochs:
                        began = time.perf_counter()
                        row["test_loss"], row["test_acc"] = steps.evaluate(model, test_loader, dtype)
                        row["epoch_s"] += time.perf_counter() - began
                        best = max(best or 0.0, row["test_acc"])
                        if not math.isfinite(row["test_loss"]):
                            raise FloatingPointError(
                                f"the test loss is not finite after epoch {epoch}; try a lower --lr"
                            )
                    schedule.epoch_ended(row["train_loss"])
                    after = {"epoch": epoch, "train_s": at["train_s"] + row["epoch_s"], "best_test_acc": best}
                    state = {"model": freeze.trained_state(model), "step": step.state_dict()}
                    run.end_epoch(row, state | {"schedule": schedule.state_dict(), "at": at | after})
                    at |= after
                    bars.end_epoch(row)
            if freeze.frozen_sha256(model) != frozen_sha256:
                raise AssertionError("frozen weights have changed")
            checkpoint = freeze.seed_checkpoint(model, recipe, options.epochs * len(train_loader))
            runs.write_atomically(run.path / "model.safetensors", checkpoint)
            ending = {"status": "done", "why": None}
        except FloatingPointError as error:
            ending = {"status": "diverged", "why": str(error)}
        except OSError as error:
            ending["why"] = f"a file cannot be written: {error}"
        except KeyboardInterrupt:
            why = f"interrupted; --resume goes on after epoch {at['epoch']}"
            ending = {"status": "interrupted", "why": why}
        except RuntimeError as error:
            if not steps.out_of_memory(error):
                raise
            ending["why"] = f"out of memory at --batch-size {options.batch_size}; try a smaller one"
        finally:  # what came of it, also where an unforeseen error is passing through
            total, trained = freeze.count(model)
            summary = ending | {"params_total": total, "params_trained": trained}
            summary |= {"final_test_acc": run.rows[-1]["test_acc"] if ending["status"] == "done" else None}
            summary |= {"epochs_done": at["epoch"], "peak_memory_bytes": steps.peak_memory_bytes(device)}
            summary |= {key: at[key] for key in ("best_test_acc", "train_s", "startup_s")}
            summary |= {"checkpoint_bytes": len(checkpoint) or None, "full_bytes": freeze.full_bytes(model)}
            summary |= {"data_title": dataset.title, "frozen_sha256": frozen_sha256}
            with contextlib.suppress(OSError if ending["status"] != "done" else ()):
                run.finish(summary | config["options"] | {"data": dataset.name})
        if ending["status"] != "done":
            raise RunFailed(f"{run.path}: {ending['why']}")
        show_results(run)


def restore(
    run: runs.Run, state: dict, model: torch.nn.Module, step: steps.Step, schedule: steps.Schedule
) -> dict:
    """Put everything where `state`, of last.pt, left it; returns how far that was. RunError for rubbish."""
    try:
        if state["model"].keys() != freeze.trained_state(model).keys():
            raise KeyError("its tensors are not those that this run trains")
        model.load_state_dict(state["model"], strict=False)
        step.load_state_dict(state["step"])
        schedule.load_state_dict(state["schedule"])
        return {key: state["at"][key] for key in ("epoch", "train_s", "startup_s", "best_test_acc")}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise runs.RunError(
            f"{run.path / 'last.pt'} cannot be resumed from ({reason});\nstart again with --overwrite"
        ) from None


def show_results(run: runs.Run) -> None:
    try:
        display.show_results(str(run.path), run.summary)
    except (KeyError, TypeError):
        raise runs.RunError(f"{run.path / 'summary.json'} is damaged; start again with --overwrite") from None


def main(argv: list[str] | None = None) -> int:
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a cluster's polite kill ends a run as Ctrl-C does
    try:
        train(*open_data(*parse_options(argv)))
    except (OptionError, data.DataError, models.ModelError, freeze.FreezeError, runs.RunError) as error:
        note(str(error))
        return 2
    except (RunFailed, OSError) as error:
        note(str(error))
        return 1
    except RuntimeError as error:
        if not steps.out_of_memory(error):
            raise
        note("out of memory before the first step; try a smaller --batch-size, or --loader ffcv")
        return 1
    except KeyboardInterrupt:
        note("interrupted before the first epoch")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
