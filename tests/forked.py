"""Run our scripts in processes forked from one that has imported them, for the tests that kill scripts.

A fork takes milliseconds, whereas starting a script takes seconds. Both give the same results, because the
process that is forked only imports modules and never computes.
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
# The fork server skips modules that are not installed.
IMPORTED = [
    "pytest",
    "torch._dynamo",
    "train",
    "report",
    "sweep",
    "ffcv",
]
CHANGES = {"os.mkdir", "os.rmdir", "os.rename", "os.remove", "os.truncate", "os.fsync", "fcntl.flock"}


def serve() -> None:
    """Start the fork server, unless it runs already, and wait until it has imported all modules."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        environment.setenv("NUMBA_THREADING_LAYER", "omp")  # with TBB, a forked process may hang
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
    """Start `python SCRIPT.py OPTIONS` in a fork, and return the process once it appends its output to `log`.

    If `kill_at` is given, a number n and a folder, SIGKILL ends the process just before its n-th change in or
    under the folder. The process calls `first`, a function defined in a module, before the script's main.
    """
    ready = log.with_suffix(f".{time.monotonic_ns()}")
    process = CONTEXT.Process(target=_run, args=(script, options, log, ready, kill_at, first))
    process.start()
    while not ready.exists() and process.is_alive():
        time.sleep(0.002)
    ready.unlink(missing_ok=True)
    return process


def end(process: BaseProcess, seconds: float = 120) -> int:
    """Wait for a process, and return its exit status, which is negative if a signal ended it.

    If it still runs after `seconds`, kill it and fail the test.
    """
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"a process still ran after {seconds} s")
    return process.exitcode


def _run(script: str, options: list[str], log: Path, ready: Path, kill_at, first) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as progress.py does for our scripts
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

    A change is to open a file for writing; to lock, synchronise, rename, remove or truncate a file; or to
    make or remove a folder.
    """
    changes, fsync = itertools.count(1), os.fsync

    def look(event: str, arguments: tuple) -> None:
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            path = arguments[0]
            path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
            if Path(path).is_relative_to(folder) and next(changes) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    def audited(fd: int) -> None:  # Python itself raises no audit event for fsync
        sys.audit("os.fsync", fd)
        fsync(fd)

    os.fsync = audited
    sys.addaudithook(look)
