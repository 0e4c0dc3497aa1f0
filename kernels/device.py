"""The device that a network runs on: its name, fastest dtype, memory, code cache and CUDA graphs."""

import atexit
import contextlib
import ctypes
import functools
import gc
import os
import platform
import resource
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
captures = 0  # how many CUDA graphs this process has begun to capture
CONTAINER_LIMITS = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"  # cgroup v2, v1
EAGER_CALLS = 3  # before a graph is captured, to initialise libraries and to compile and choose kernels

torch.backends.cudnn.allow_tf32 = False  # float32 keeps its full precision; bf16 is there for speed
torch.backends.cudnn.benchmark = True  # shapes never change, so searching for the fastest algorithm pays


class DeviceError(ValueError):
    """The requested device is not available; the message says what to do instead."""

    exit_status = 2


# ---- the cache of compiled code ----


def cache_folder() -> Path:
    """Return the folder that keeps compiled kernels and choices between runs; only the user can write to it.

    If the folder in the user's cache belongs to someone else, is writable by others, or cannot be created, a
    private one takes its place until this process ends, and a line on stderr says so. If that cannot be
    created either, return a path at which nothing can be read or written.
    """
    return _own_folder(user_cache())


def user_cache() -> Path:
    """Return the path of our folder in the user's cache; for a user without a home, it cannot be created."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given, "batchnorm-only")
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and the system does not know the user
        home = Path("/nonexistent")
    return home / ".cache" / "batchnorm-only"


@functools.cache
def _own_folder(folder: Path) -> Path:
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        if _is_own(folder.stat()):
            return folder
        why = "it is not yours, or others may write to it; remove it, or mend it with chown and chmod go-w"
    except OSError as error:
        why = f"{error.strerror}; set XDG_CACHE_HOME to another folder"
    with contextlib.suppress(OSError):
        print(f"{folder}: compiled kernels are not cached there ({why})", file=sys.stderr)
    try:
        private = tempfile.mkdtemp(prefix="batchnorm-only-")  # later runs do not find it
    except OSError:
        return Path(os.devnull, "batchnorm-only")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return Path(private)


def _is_own(info: os.stat_result) -> bool:
    return info.st_uid == os.geteuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def open_own(file: Path) -> BinaryIO:
    """Open for reading a regular file that only the user may write to. Raises OSError if there is none."""
    opened = open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")  # noqa: SIM115
    info = os.fstat(opened.fileno())
    if stat.S_ISREG(info.st_mode) and _is_own(info):
        return opened
    opened.close()
    raise PermissionError(f"{file} is not a plain file that only its user may write to")


# torch.compile and Triton cache their code in this folder too. torch.compile's default is in /tmp, which may
# be emptied.
for _variable, _name in {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}.items():
    if _variable not in os.environ:
        os.environ[_variable] = str(_own_folder(cache_folder() / _name))
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # else more than 8 seeds wait for each other


# ---- the device ----


def choose(name: str = "auto") -> torch.device:
    """Return the device for `--device`; `auto` prefers a GPU. Raises DeviceError for `cuda` without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: torch finds no CUDA GPU; leave it out, or give --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def maker_name(device: torch.device) -> str:
    """Return the device's model name; for a CPU that has none, return its architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    named = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def device_name(device: torch.device, runs_on_it: int = 1) -> str:
    """Return the device's name and a run's share of it. Only times under the same name are comparable."""
    threads = [f"{torch.get_num_threads()} threads"] if device.type == "cpu" else []
    beside = [f"{runs_on_it} runs side by side"] if runs_on_it > 1 else []
    return ", ".join([maker_name(device), *threads, *beside])


def default_dtype(device: torch.device) -> str:
    """Return the fastest dtype that the hardware supports: bf16, else fp16 on a GPU and fp32 on a CPU."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() else "fp32"


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished all queued work; on a CPU, do nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory; Linux would zero returned pages before handing them out again."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its upper limit
    mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def memory_bytes(device: torch.device) -> int:
    """Return a GPU's total memory; on a CPU the machine's, or the limit of `ulimit -v` or a container."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        limits.append(limit)
    for file in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or it says "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)


def reset_peak_memory(device: torch.device) -> None:
    """Reset a GPU's peak memory, because trials at start-up use more than training needs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the process's peak memory: on a GPU what torch allocated, on a CPU the resident set size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


@contextlib.contextmanager
def captured(
    graph: torch.cuda.CUDAGraph,
    stream: torch.cuda.Stream | None = None,
    pool: tuple[int, int] | None = None,
) -> Iterator[None]:
    """Capture the work of the `with` block into `graph`, regardless of what a loader's threads do meanwhile.

    Garbage collection is off until the block ends, because no other graph may be freed before then.
    """
    global captures
    before, captures = torch.cuda.current_stream(), captures + 1
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    finally:
        torch.cuda.set_stream(before)  # a capture that fails does not return to it
        gc.enable()


class Captured:
    """A function that is replayed from a CUDA graph after its first `eager_calls` calls.

    It takes no arguments and returns nothing. Tensors at fixed addresses hold what changes between calls.
    """

    def __init__(self, function: Callable[[], None], eager_calls: int = EAGER_CALLS):
        self.function, self.eager_calls, self.graph = function, eager_calls, None

    def __call__(self) -> None:
        if self.eager_calls > 0:
            self.eager_calls -= 1
            return self.function()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # Capture on the run's own stream, because the graph uses its cuBLAS workspace. The default stream
            # cannot be captured.
            stream = torch.cuda.current_stream()
            stream = None if stream == torch.cuda.default_stream() else stream
            gc.collect()
            with captured(self.graph, stream):
                self.function()
        self.graph.replay()
