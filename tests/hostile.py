"""Run scripts on hostile files in forked processes with limits, and make pickles that would run code."""

import contextlib
import os
import resource
import signal
import stat
import struct
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

import progress

MOST_SECONDS, MOST_GROWTH = 60, 600 * 2**20  # limits for a script that reads a hostile file


class Outcome(NamedTuple):
    status: int  # the exit status, or minus the number of the signal that ended the process
    said: str  # stderr
    printed: str  # stdout
    growth: int  # peak memory in bytes, minus what was in use at the start

    @property
    def lines(self) -> list[str]:
        return self.said.splitlines()


def attempt(script: ModuleType, argv: Sequence[object], folder: Path) -> Outcome:
    """Run `script` with the arguments `argv` in a fork of this process, in the folder `folder`.

    The fork gets 4 GiB of address space beyond what it starts with, so that no file can exhaust the machine's
    memory. The fork is killed after MOST_SECONDS. Its output goes to files beside `folder`.
    """
    said, printed, began = (folder.parent / name for name in (".said", ".printed", ".began"))
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            status = 70
            try:
                _settle(folder, printed, said)
                began.write_text(str(_bytes_in_use()[1]))
                status = progress.run(f"{script.__name__}.py", lambda: script.main(list(map(str, argv))))
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    _, ended, used = os.wait4(child, 0)
    texts = [path.read_text(errors="surrogateescape") for path in (said, printed)]
    growth = 1024 * used.ru_maxrss - int(began.read_text())
    return Outcome(os.waitstatus_to_exitcode(ended), *texts, growth)


def _bytes_in_use() -> list[int]:
    """Return the sizes of this process's address space and resident memory, in bytes."""
    return [resource.getpagesize() * int(n) for n in Path("/proc/self/statm").read_text().split()[:2]]


def _settle(folder: Path, *outputs: Path) -> None:
    """Make this fork of pytest resemble a process started by a shell, and limit its memory and time."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.chdir(folder)
    torch.set_num_threads(1)  # a fork does not have its parent's other threads
    resource.setrlimit(resource.RLIMIT_AS, (_bytes_in_use()[0] + 2**32, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(MOST_SECONDS)
    warnings.resetwarnings()
    warnings.simplefilter("default")
    warnings.showwarning = lambda *what, **how: print(warnings.formatwarning(*what[:4]), file=sys.stderr)


def listing(folder: Path) -> dict[str, tuple]:
    """Return each entry below `folder`, by path: its type and, if not a folder, size and modification time.

    Locks, the files of `attempt` and the folder beton itself are left out: refused scripts may make them.
    """
    entries = {}
    for path in folder.rglob("*"):
        info = path.lstat()
        if path.name not in (".lock", ".said", ".printed", ".began") and path.name != "beton":
            kind = stat.S_IFMT(info.st_mode)
            written = () if kind == stat.S_IFDIR else (info.st_size, info.st_mtime_ns)
            entries[str(path.relative_to(folder))] = (kind, *written)
    return entries


def refused(script: ModuleType, argv: Sequence[object], folder: Path, statuses: Sequence[int] = (2,)) -> str:
    """Assert that a script refuses `argv` in one or two lines, with one of `statuses`; return these lines.

    The script must write nothing into the parent of `folder`, and stay within the limits on memory and lines.
    """
    before = listing(folder.parent)
    outcome = attempt(script, argv, folder)
    assert outcome.status in statuses, outcome
    assert 1 <= len(outcome.lines) <= 2 and "Traceback" not in outcome.said, outcome
    assert_harmless(outcome)
    assert listing(folder.parent) == before, "it has written something"
    return outcome.said


def assert_harmless(outcome: Outcome) -> None:
    assert all(line.isprintable() and len(line) < 1000 for line in outcome.lines), outcome
    assert outcome.growth < MOST_GROWTH, outcome


# ---- pickles ----


def text(value: str) -> bytes:
    """Return an opcode that pushes a text."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(module: str, name: str) -> bytes:
    """Return an opcode that pushes the object of this name."""
    return f"c{module}\n{name}\n".encode()


def stack_name(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def payloads(canary: Path) -> dict[str, bytes]:
    """Return pickles, without PROTO and STOP, that ask to run code. Most of it would make `canary`."""
    touch, python = text(f"touch {canary}"), text(f"open({str(canary)!r}, 'w')")
    system, where = name("posix", "system"), text(str(canary))
    builtin = call(name("builtins", "__import__"), text("os"))
    code = text(f"from pathlib import Path\nPath({str(canary)!r}).touch()")
    once_more = b"B" + struct.pack("<I", len(inner := call(system, touch) + b".")) + inner
    return {
        "GLOBAL and REDUCE": call(system, touch),
        "GLOBAL of os": call(name("os", "system"), touch),
        "STACK_GLOBAL": call(stack_name("posix", "system"), touch),
        "STACK_GLOBAL of a dotted name": call(stack_name("os", "path.os.system"), touch),
        "GLOBAL of a dotted name": b"\x80\x04" + call(name("shutil", "os.system"), touch),
        "INST": b"(" + touch + b"iposix\nsystem\n",
        "OBJ": b"(" + system + touch + b"o",
        "NEWOBJ": name("subprocess", "Popen") + text("true") + b"\x85\x81",
        "NEWOBJ_EX": name("subprocess", "Popen") + b")}" + b"\x92",
        "BUILD": name("builtins", "object") + b")\x81}" + text("__class__") + system + b"sb",
        "BUILD with slots": name("_codecs", "encode") + b"N}" + text("__code__") + system + b"s\x86b",
        "exec": call(name("builtins", "exec"), python),
        "eval": call(name("builtins", "eval"), python),
        "exec of Python 2": call(name("__builtin__", "eval"), python),
        "compile": call(name("builtins", "compile"), code, text("x"), text("exec")),
        "getattr chain": call(call(name("builtins", "getattr"), builtin, text("system")), touch),
        "import_module": call(name("importlib", "import_module"), text("antigravity")),
        "open": call(name("builtins", "open"), where, text("w")),
        "io.open": call(name("io", "open"), where, text("w")),
        "mkdir": call(name("posix", "mkdir"), where),
        "Popen": call(name("subprocess", "Popen"), b"]" + text("touch") + b"a" + where + b"a"),
        "check_output": call(name("subprocess", "check_output"), b"]" + text("touch") + b"a" + where + b"a"),
        "a partial function": call(call(name("functools", "partial"), system, touch)),
        "attrgetter": call(call(name("operator", "attrgetter"), text("system")), builtin),
        "methodcaller": call(call(name("operator", "methodcaller"), text("system"), touch), builtin),
        "map": call(name("builtins", "list"), call(name("builtins", "map"), system, b"]" + touch + b"a")),
        "timeit": call(name("timeit", "timeit"), python),
        "run_path": call(name("runpy", "run_path"), where),
        "a pickle in the pickle": call(name("_pickle", "loads"), once_more),
        "a pickle that torch loads": call(name("torch.serialization", "load"), where),
        "a pickle that NumPy loads": call(name("numpy", "load"), where),
        "NumPy's save": call(name("numpy", "save"), where, b"K\x01"),
        "an array's method": call(name("numpy", "ndarray.tofile"), where),
        "NumPy's scalar": call(name("numpy.core.multiarray", "scalar"), where),
        "a library": call(name("ctypes", "CDLL"), where),
        "a copy": call(name("shutil", "copyfile"), text("/dev/null"), where),
        "what the reader itself imports": call(name("datasets.untrusted", "pickle.loads"), once_more),
        "__main__": call(name("__main__", "system"), touch),
        "an extension code": b"\x82\x01",
        "a persistent id": b"P" + str(canary).encode() + b"\n",
        "a persistent id from the stack": where + b"Q",
        "a codec": call(name("_codecs", "encode"), touch, text("rot13")),
        "a codec that packs": call(name("_codecs", "encode"), touch, text("zlib")),
    }
