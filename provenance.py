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
from options import LOGISTIC, Options, defaults


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
    """The folder's name, or the file's without its suffix."""
    path = Path(init_from)
    return path.stem if path.suffix in (".safetensors", ".pt", ".pth") else path.name


def started_from(path: str | None) -> dict | None:
    """Of the run in a folder that another starts from: what trained for how long, and how far it got.

    `epoch_s` is the median of its epochs. None for a file of weights.
    """
    if not path or not Path(path).is_dir():
        return None
    run = runs.Run(Path(path))
    summary, seconds = run.summary or {}, [row["epoch_s"] for row in runs.read_rows(run.path)]
    told = {"run": run.path.resolve().name, "mode": summary.get("mode"), "epochs": summary.get("epochs_done")}
    told |= {"epoch_s": statistics.median(seconds or [0.0]), "test_acc": summary.get("final_test_acc")}
    return told | {"started_from": (run.config or {}).get("started_from")}


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
        "started_from": started_from(recipe["init_from"]),
        "data_title": dataset.title,
        "device": device.type,
        "device_name": device_name,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **versions},
        "git_commit": commit or None,
    }
