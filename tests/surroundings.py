"""Run scripts in separate processes, in surroundings that a test has changed, and check how they end."""

import contextlib
import importlib
import io
import json
import multiprocessing.pool
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open

import progress

ROOT = Path(progress.__file__).parent
CONTEXT = multiprocessing.get_context("forkserver")  # its processes start with these modules imported
CONTEXT.set_forkserver_preload(
    ["pytest", "ffcv", "train", "sweep", "report", "bench", "analysis", "torch._dynamo"]
)
LONGEST_S = 120
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}
MEASURE = ["--arch", "resnet8", "--mode", "bn_only", "--batch-size", "32", "--repeats", "1", "--steps", "1"]
MEASURE += ["--warm-up", "1"]


class Ended(NamedTuple):
    status: int | None  # None if it hung and was killed
    out: str
    err: str


# ---- running scripts ----


def ended(script: str, argv: list[str], surroundings: Callable[[], None] = int, **environment) -> Ended:
    """Run a script in a process that has all modules imported, and return how it ends.

    `surroundings` is called in that process first; `environment` has variables to set.
    """
    (out, outs), (err, errs) = CONTEXT.Pipe(duplex=False), CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(
        target=_child, args=(script, argv, surroundings, environment, os.getcwd(), outs, errs)
    )
    child.start()
    outs.close(), errs.close()
    told = [multiprocessing.pool.ThreadPool(1).apply_async(_all_of, (end,)) for end in (out, err)]
    child.join(LONGEST_S)
    status = child.exitcode
    child.kill()
    return Ended(status, *(text.get(LONGEST_S) for text in told))


def _all_of(end) -> str:
    with open(os.dup(end.fileno()), "rb") as file:
        return file.read().decode(errors="replace")


def _child(script, argv, surroundings, environment, folder, out, err):
    os.chdir(folder)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
    out.close(), err.close()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    torch.set_num_threads(1)
    try:
        surroundings()
        status = progress.run(f"{script}.py", lambda: importlib.import_module(script).main(argv))
    except BaseException:
        traceback.print_exc()
        status = 99
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def fresh(
    script: str, argv: list[str], surroundings: Callable[[], None] | None = None, **environment: str | None
) -> Ended:
    """Run a script in a new interpreter, as a shell does, and return how it ends; None unsets a variable."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    given = {name: value for name, value in given.items() if value is not None}
    command = [sys.executable, str(ROOT / f"{script}.py"), *argv]
    told = {"capture_output": True, "preexec_fn": surroundings, "timeout": LONGEST_S}
    run = subprocess.run(command, env=given, **told)
    return Ended(run.returncode, *(text.decode(errors="replace") for text in (run.stdout, run.stderr)))


def told_well(script: str, of: Ended, statuses: tuple[int, ...], said: str = "") -> None:
    """Assert that a script ended with one of `statuses` and without a traceback.

    If it failed and wrote to stderr, its message must have at most two lines and match the pattern `said`.
    """
    assert of.status in statuses, of
    assert "Traceback" not in of.out + of.err, of
    if of.status and of.err:
        last = of.err.rpartition(f"{script}.py: ")[2]
        assert f"{script}.py: " in of.err and last.count("\n") <= 2 and re.search(said, last), of


def whole(folder: Path) -> None:
    """Assert that every file below `folder` is complete, and that no temporary file was left."""
    for file in (path for path in folder.rglob("*.*") if path.is_file() and path.name != ".lock"):
        content = file.read_bytes()
        assert not file.name.endswith((".half-written", ".part")), file
        if file.suffix in (".json", ".jsonl"):
            assert all(map(json.loads, content.splitlines() if file.suffix == ".jsonl" else [content])), file
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                assert [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118
        elif file.suffix == ".pt":
            assert torch.load(io.BytesIO(content), weights_only=True)["rows"]
        elif file.suffix in ENDS:
            assert ENDS[file.suffix] in content[-64:], file


ENDS = {".png": b"IEND", ".pdf": b"%%EOF", ".html": b"</html>", ".md": b"|\n", ".csv": b"\n", ".tex": b"\n"}


@contextlib.contextmanager
def disk(folder: Path, kilobytes: int) -> Iterator[Callable[[str], None]]:
    """Mount a disk of this size on a folder; yield a function that mounts it again with other options."""

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"needs the right to mount: {made.stderr.strip()}")

    folder.mkdir(exist_ok=True)
    mount(f"size={kilobytes}k")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@dataclass
class World:
    """A folder with a finished run, prepared images and compiled kernels, and commands that use them."""

    folder: Path
    images: list[str]
    run: Path

    @property
    def environment(self) -> dict[str, str]:
        cache = {"XDG_CACHE_HOME": str(self.folder / "cache")}
        return cache | {"ARCHS": "resnet8", "MODES": "bn_only", "SEEDS": "0"}

    def ends(
        self, name: str, out: Path | str, surroundings: Callable[[], None] = int, **environment
    ) -> Ended:
        """Run the command of this name, which writes into `out`, and return how it ends."""
        return ended(*self.commands(out)[name], surroundings, **self.environment | environment)

    def train(self, out: Path | str, *more: str) -> list[str]:
        options = ["--arch", "resnet8", "--batch-size", "32", "--epochs", "2", "--milestones", "1"]
        return [*options, "--device", "cpu", *self.images, "--out", str(out), *more]

    def commands(self, out: Path | str) -> dict[str, tuple[str, list[str]]]:
        """Return commands, as script and arguments, by name; any files that they write go into `out`."""
        run, rows = str(self.run), ["--json", f"{out}/rows.jsonl"]
        measure = [*MEASURE, *self.images, *rows]
        return {
            "train": ("train", self.train(f"{out}/runs", "--resume")),
            "sweep": ("sweep", [*self.train(f"{out}/runs")[2:], "--list"]),
            "report": ("report", [run, "--out", f"{out}/report"]),
            "speed": ("bench", ["speed", "--impl", "lean", *measure]),
            "memory": ("bench", ["memory", "--impl", "stock", "lean", *measure]),
            "stock": ("bench", ["speed", "--impl", "stock", *measure]),
            "data": ("bench", ["data", "--impl", "resident", *measure[:2], *measure[4:]]),
            "analysis": ("analysis", [f"{out}/{self.run.name}", "--overwrite"]),
            "evaluation": ("evaluation", [run]),
            "rebuild": ("checkpoint", ["rebuild", run, "--out", f"{out}/full.safetensors", "--overwrite"]),
            "freeze": ("freeze", ["table", "--arch", "resnet14"]),
        }


NAMES = ["train", "sweep", "report", "speed", "memory", "data", "analysis", "evaluation", "rebuild", "freeze"]
WRITING = ["train", "report", "speed", "memory", "data", "analysis", "rebuild"]
