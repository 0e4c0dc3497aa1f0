"""What a run is called, what it starts from, and what it was run on."""

import dataclasses
import importlib.metadata
import platform
import statistics
import subprocess
from pathlib import Path

import torch

import data
import runs
from options import LOGISTIC, RECIPES, Options, defaults


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


def started_from(init_from: str | None) -> dict | None:
    """Of the run that another starts from: what it trained, on what, for how long, and how far it got.

    `epochs` are its own, as asked for; `course` adds those of what it had started from. `epochs_done` and
    `seconds`, at the median epoch's, are of all these runs together; `seconds` is None where they ran on
    several devices. `options` differ from the published. None for weights alone, or a run without results.
    """
    folder = Path(init_from or "")
    folder = folder.parent if folder.name == runs.CHECKPOINT else folder
    if not init_from or not (folder / "config.json").is_file():
        return None
    run = runs.Run(folder)
    try:
        options, before = run.config["options"], run.config["started_from"]
        epochs, done, device = options["epochs"], run.summary["epochs_done"], run.config["device_name"]
        seconds = done * statistics.median([row["epoch_s"] for row in runs.read_rows(folder)])
        told = {
            "run": folder.resolve().name,
            "mode": options["mode"],
            "seed": options["seed"],
            "epochs": epochs,
        }
        told |= {"test_acc": run.summary["final_test_acc"], "device_name": device, "seconds": seconds}
        told |= {"fingerprint": run.config["recipe"]["fingerprint"], "options": differing_course(options)}
        if before:
            epochs, done = epochs + before["course"], done + before["epochs_done"]
            alike = before["device_name"] == device and before["seconds"] is not None
            told["seconds"] = before["seconds"] + seconds if alike else None
        return told | {"course": int(epochs), "epochs_done": int(done)}
    except (KeyError, TypeError, ValueError, AttributeError):  # not all there, or damaged
        return None


def differing_course(options: dict) -> dict:
    """Those of a run's recorded options that differ from the published; its length and images left out."""
    recipe = options["recipe"] if options["recipe"] in RECIPES else None
    published = dataclasses.asdict(defaults(recipe, options["quick"]))
    apart = {
        "arch",
        "mode",
        "data",
        "seed",
        "dtype",
        "init_from",
        "epochs",
        "milestones",
        "schedule",
        *LOGISTIC,
    }
    apart |= {"quick", "train_subset", "val_split", "image_size"}
    differing = {k: v for k, v in options.items() if k not in apart and v != published.get(k)}
    steps = [m / options["epochs"] for m in options["milestones"]]
    if options["schedule"] == "step" and steps != [0.5, 0.75]:
        differing["milestones"] = options["milestones"]
    return differing


def device_name(device: torch.device) -> str:
    """What its maker calls it; of a CPU that tells nothing, the architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    named = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def describe(
    options: Options,
    recipe: dict,
    start: dict | None,
    frozen_sha256: str,
    dataset: data.Dataset,
    device: torch.device,
) -> dict:
    """The content of config.json: what was asked for, what it came to, and on what."""

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
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    versions = {package: version(package) for package in ("torch", "triton", "ffcv", "numpy")}
    return {
        "options": dataclasses.asdict(options) | {"milestones": list(options.milestones)},
        "recipe": recipe,
        "frozen": {"sha256": frozen_sha256},
        "started_from": start,
        "data_title": dataset.title,
        "device": device.type,
        "device_name": device_name(device) + threads,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **versions},
        "git_commit": commit or None,
    }
