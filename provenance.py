"""What a run is called, what it starts from, and what it was run on."""

import dataclasses
import importlib.metadata
import platform
import statistics
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

import data
import runs
from config import LOGISTIC, OptionError, Options, as_json, defaults, recorded, variant, variant_text


def cell_name(options: Options, data_name: str) -> str:
    """The run folder's name: data, arch, mode, seed, then each option that differs from its default."""
    published = defaults(options.recipe, options.quick)
    named = {"data", "arch", "mode", "seed", "quick", "recipe"} | LOGISTIC
    differing = {"quick": True} if options.quick else {}
    differing |= {"recipe": options.recipe} if options.recipe else {}
    for name, value in dataclasses.asdict(options).items():
        if name not in named and value != getattr(published, name):
            differing[name] = start_name(value) if name == "init_from" else value
    return runs.run_name(data_name, options.arch, options.mode, options.seed, differing)


def start_name(init_from: str) -> str:
    """The run's name, or the file's without its suffix."""
    path = Path(init_from)
    path = path.parent if path.name == runs.CHECKPOINT else path
    return path.stem if path.suffix in (".safetensors", ".pt", ".pth") else path.name


def start_path(options: Options) -> str:
    """What --init-from names for this seed. OptionError where there is no such thing."""
    path = options.init_from.replace("{seed}", str(options.seed))
    if not Path(path).exists():
        raise OptionError(f"--init-from {path}: there is no such file or run")
    return path


class Start(NamedTuple):
    """What a run started from: so many epochs of `mode`, in the words in which runs are told apart."""

    epochs: int
    mode: str
    options: tuple[tuple[str, object], ...]  # that differ from the published, its own start among them
    seed: int | None  # where it is not the run's

    def __str__(self) -> str:
        """`160 epochs of all, lr 0.05`"""
        what = f"{self.epochs} epoch{'s' * (self.epochs != 1)} of {self.mode}"
        seed = "" if self.seed is None else f"seed {self.seed}"
        return ", ".join(filter(None, [what, variant_text(self.options), seed]))


def start_of(config: dict) -> Start | None:
    """What the run of a config.json started from, on the same images; None for nothing, or other images."""
    started, recipe, options = config.get("started_from"), config["recipe"], recorded(config["options"])
    if not started or started["fingerprint"] != recipe.get("fingerprint"):
        return None
    own = {"quick": options["quick"], "train_subset": options["train_subset"]}
    own |= {"val_images": recipe.get("val_images") or 0, "processes": recipe.get("processes") or 1}
    other = {name: started[name] for name, value in own.items() if started.get(name, value) != value}
    seed = None if started["seed"] == options["seed"] else started["seed"]
    return Start(started["epochs"], started["mode"], pairs(started["options"] | other), seed)


def start_text(config: dict) -> str:
    """What --init-from came to, in the words in which runs are told apart."""
    return str(start_of(config) or start_name(config["options"]["init_from"]))


def pairs(options: dict) -> tuple[tuple[str, object], ...]:
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(options.items()))


def started_from(init_from: str | None) -> dict | None:
    """Of the run that another starts from: what it trained, on what, for how long, and how far it got.

    `epochs` are its own, as asked for; `course` adds those of what it had started from. `epochs_done` and
    `seconds`, at the median epoch's, are of all these runs together; `seconds` is None where they ran on
    several devices. `options` differ from the published; `val_images` of its seed were never trained on.
    None for weights alone, or a run without results.
    """
    folder = Path(init_from or "")
    folder = folder.parent if folder.name == runs.CHECKPOINT else folder
    if not init_from or not (folder / "config.json").is_file():
        return None
    run = runs.Run(folder)
    try:
        options, recipe = recorded(run.config["options"]), run.config["recipe"]
        before = run.config["started_from"] if start_of(run.config) else None
        done, device = run.summary["epochs_done"], run.config["device_name"]
        seconds = done * statistics.median([row["epoch_s"] for row in runs.read_rows(folder)])
        told = {"run": folder.resolve().name, "mode": options["mode"], "seed": options["seed"]}
        told |= {"epochs": options["epochs"], "options": variant(options, (before or {}).get("course", 0))}
        told |= {"test_acc": run.summary["final_test_acc"], "device_name": device, "seconds": seconds}
        told |= {"fingerprint": recipe["fingerprint"], "val_images": recipe.get("val_images") or 0}
        told |= {"course": options["epochs"], "epochs_done": done}
        told |= {"quick": options["quick"], "train_subset": options["train_subset"]}
        told |= {"processes": recipe.get("processes") or 1}
        if options["init_from"]:
            told["options"]["init_from"] = start_text(run.config)
        if before:
            alike = before["device_name"] == device and before["seconds"] is not None
            told["seconds"] = before["seconds"] + seconds if alike else None
            told |= {key: told[key] + before[key] for key in ("course", "epochs_done")}
            if (before["seed"], before.get("val_images")) != (told["seed"], told["val_images"]):
                told["val_images"] = 0
        return told | {"course": int(told["course"]), "epochs_done": int(told["epochs_done"])}
    except (KeyError, TypeError, ValueError, AttributeError):  # not all there, or damaged
        return None


def maker_name(device: torch.device) -> str:
    """What its maker calls it; of a CPU that tells nothing, the architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    named = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def device_name(device: torch.device, runs_on_it: int = 1) -> str:
    """The device, and what of it a run has: times of runs with other names do not compare."""
    threads = [f"{torch.get_num_threads()} threads"] if device.type == "cpu" else []
    beside = [f"{runs_on_it} runs side by side"] if runs_on_it > 1 else []
    return ", ".join([maker_name(device), *threads, *beside])


def describe(
    options: Options,
    recipe: dict,
    start: dict | None,
    weights: dict,
    dataset: data.Dataset,
) -> dict:
    """The content of config.json, but for `device_name`: what was asked for, what it came to, and on what."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        commit = ""
    versions = {package: version(package) for package in ("torch", "triton", "ffcv", "numpy")}
    return {
        "options": as_json(options),
        "recipe": recipe,
        "frozen": weights,
        "started_from": start,
        "data_title": dataset.title,
        "device": recipe["device"],
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **versions},
        "git_commit": commit or None,
    }
