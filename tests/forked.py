"""Our scripts in processes forked from one that has imported them, and killed there: for the tests of kills.

A fork costs milliseconds where a start costs seconds, and it computes as a start does: the process that is
forked imports, but never computes.
"""

import importlib
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

import progress

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = [
    "pytest",
    "torch._dynamo",
    "train",
    "report",
    "sweep",
    "ffcv",
]  # what is not installed is left out
CHANGES = {"os.mkdir", "os.rmdir", "os.rename", "os.remove", "os.truncate", "os.fsync", "fcntl.flock"}


def serve() -> None:
    """Start the process that is forked, unless it runs, and wait until it has imported all."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        environment.setenv("NUMBA_THREADING_LAYER", "omp")  # with TBB, a process that forked may never end
        environment.setenv("OMP_NUM_THREADS", "1")
        CONTEXT.set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()
    process = CONTEXT.Process(target=os.getpid)
    process.start()
    process.join()


def start(
    script: str,
    options: list[str],
    log: Path,
    kill_at: tuple[int, Path] | None = None,
    first: Callable[[], None] | None = None,
) -> BaseProcess:
    """A process of `python SCRIPT.py OPTIONS`, begun; what it says is added to the file `log`.

    `kill_at`, a number n and a folder: SIGKILL ends it before its n-th change in or under that folder.
    `first` is a function of a module that it calls before the script's own.
    """
    ready = log.with_suffix(f".{time.monotonic_ns()}")
    process = CONTEXT.Process(target=_run, args=(script, options, log, ready, kill_at, first))
    process.start()
    while not ready.exists() and process.is_alive():
        time.sleep(0.002)
    ready.unlink(missing_ok=True)
    return process


def end(process: BaseProcess, seconds: float = 120) -> int:
    """The exit status of a process, or less than 0 where a signal ended it; it has so many seconds."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"a process still ran after {seconds} s")
    return process.exitcode


def _run(script: str, options: list[str], log: Path, ready: Path, kill_at, first) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as progress.py does for a script that imports it
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(said, stream.fileno())
    ready.touch()
    if first:
        first()
    if kill_at:
        kill_at_change(*kill_at)
    main = importlib.import_module(script).main
    sys.exit(progress.run(f"{script}.py", lambda: main(options)))


def kill_at_change(number: int, folder: Path) -> None:
    """Let SIGKILL end this process just before its `number`-th change of a file or folder under `folder`.

    What counts is every file that is opened to be written, locked, synchronised, renamed, removed or cut, and
    every folder that is made or removed.
    """
    changes, fsync = itertools.count(1), os.fsync

    def look(event: str, arguments: tuple) -> None:
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            path = arguments[0]
            path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
            if Path(path).is_relative_to(folder) and next(changes) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    def audited(fd: int) -> None:  # of this one, Python tells its audit hooks nothing
        sys.audit("os.fsync", fd)
        fsync(fd)

    os.fsync = audited
    sys.addaudithook(look)
