"""Start runs of a few seconds through train.py's command line, and read the files that they write."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

import progress
import records
import runs
import train

ROOT = Path(train.__file__).parent
SMALL = ["--arch", "resnet8", "--batch-size", "32", "--epochs", "3", "--milestones", "1", "2"]
SMALL += ["--no-compile", "--device", "cpu"]


def small_options(images: Path) -> list[str]:
    """Return options of a run of a few seconds on a folder of images, whose prepared copy goes beside it."""
    return [*SMALL, "--data", str(images), "--data-dir", str(images.parent / "prepared")]


def exit_status(options: Sequence[str], script: ModuleType = train) -> int:
    """Run one of our scripts in this process with these options, and return its exit status."""
    return progress.run(f"{script.__name__}.py", lambda: script.main(list(options)))


def cli(options: Sequence[str], **settings) -> subprocess.CompletedProcess:
    """Run train.py in a process of its own, and return the completed process."""
    command = [sys.executable, str(ROOT / "train.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, **settings)


def only_run(root: Path = Path("runs")) -> Path:
    (folder,) = root.iterdir()
    return folder


def config(folder: Path) -> records.Config:
    return records.Config.read(folder / "config.json")


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("epoch_s", "images_per_s")} for row in metrics(folder)]


def interrupt_after_an_epoch(options: Sequence[str]) -> None:
    """Run train.py, and interrupt it, as Ctrl-C would, as soon as its first epoch is saved."""
    end_epoch = runs.Run.end_epoch

    def interrupted(run, row, state):
        end_epoch(run, row, state)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs.Run, "end_epoch", interrupted)
        assert exit_status(options) == 1
