"""Compile Triton kernels without a GPU: for a network, all that it will try, before its first step.

If each kernel were compiled on first use, a first step would wait a minute or more: a ResNet has about thirty
different convolutions, each with a dozen configurations. Threads would wait for each other, because a quarter
of the work holds Python's lock, so there is a process per core. Each runs the network once, on tensors
without memory, and compiles those of its kernels that no other process has taken. Triton's cache keeps them.
"""

import contextlib
import ctypes
import functools
import hashlib
import io
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels import channels_last, device
from kernels.choices import CONFIGS, Attempt, Config
from kernels.cuda import ELEMENTWISE, CudaPasses

BYTES_PER_PROCESS = 2 << 30  # more than a process needs
MOST_PROCESSES = 16  # each takes seconds to start
LONGEST_S = 600  # after this, training starts with what has been compiled


class OnMeta(CudaPasses):
    """Passes over tensors without memory, on which PyTorch's convolutions forget the memory format."""

    def statistics(self, z, bn):
        return super().statistics(channels_last(z), bn)

    def activate(self, z, *arguments, **more):
        return super().activate(channels_last(z), *arguments, **more)

    def mask_and_sum(self, dy, *arguments):
        return super().mask_and_sum(channels_last(dy), *arguments)

    def convolve_backward(self, *arguments, **more):
        dx, sums = super().convolve_backward(*arguments, **more)
        return channels_last(dx), sums


class Compiler(OnMeta):
    """Passes over tensors without memory, which compile kernels for `target` and launch none.

    From then on, all of Triton in this process compiles for `target`. `choose` is as in CudaPasses.
    """

    def __init__(self, target: GPUTarget, choose, pdl: bool = True):
        super().__init__(choose, pdl)
        driver.set_active(Driver(target))

    def launch(self, kernel, grid, *arguments, config=ELEMENTWISE, **constants):
        return super().launch(kernel, grid, *arguments, config=config, compile_only=True, **constants)


class Driver:
    """What Triton's compiler asks of a GPU's driver."""

    def __init__(self, target: GPUTarget):
        self.get_current_target = lambda: target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Trials(OnMeta):
    """Passes over tensors without memory, which collect the keys of a network's choices; see Choices."""

    def __init__(self):
        super().__init__(self.choose_first)
        self.keys = set()

    def choose_first(self, key, attempt) -> Config | None:
        self.keys.add(key)
        return next(filter(functools.partial(_suits, attempt), CONFIGS), None)

    def launch(self, *_, **__):
        pass


class Share(Compiler):
    """Passes that compile what a network tries, except for kernels that another process has claimed.

    A claim is a file in the folder `claims`.
    """

    def __init__(self, claims: Path, target: GPUTarget, pdl: bool):
        super().__init__(target, self.choose_all, pdl)
        self.claims, self.tried = claims, {}

    def choose_all(self, key, attempt) -> Config | None:
        if key not in self.tried:
            attempt(None)
            self.tried[key] = [config for config in CONFIGS if _suits(attempt, config)]
        return next(iter(self.tried[key]), None)

    def launch(self, kernel, grid, *arguments, config=ELEMENTWISE, **constants):
        what = kernel.__name__, config, sorted(constants.items()), list(map(_kind, arguments))
        with contextlib.suppress(FileExistsError):
            (self.claims / hashlib.sha256(repr(what).encode()).hexdigest()).touch(exist_ok=False)
            with contextlib.suppress(Exception):  # it does not compile, which shows again when it is tried
                super().launch(kernel, grid, *arguments, config=config, **constants)


def _suits(attempt: Attempt, config: Config) -> bool:
    try:
        attempt(config)
    except NotImplementedError:
        return False
    return True


def _kind(argument: object) -> object:
    """Return all on which a kernel's code may depend in an argument, or more."""
    if isinstance(argument, tuple):
        return list(map(_kind, argument))
    return argument.dtype if isinstance(argument, Tensor) else argument


def compile_all(passes: CudaPasses, model: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Compile all that `passes` will try for `model`, in its mode, on images of `shape` `[N, 3, H, W]`.

    Does nothing if all choices are made. Nor does it if torchrun has started processes that would all do the
    same, or if the model cannot be run in another process, as when its class is local to a function; then
    kernels are compiled when they are tried.
    """
    if distributed.is_available() and distributed.is_initialized():
        return
    try:
        given = pickled((model, tuple(shape), dtype))
        trials = Trials()
        run(trials, *pickle.loads(given))
    except Exception:
        return
    if trials.keys <= passes.choose.made.keys():
        return
    fitting = device.memory_bytes(torch.device("cpu")) // BYTES_PER_PROCESS
    count = max(1, min(len(os.sched_getaffinity(0)), fitting, MOST_PROCESSES))
    work = pickle.dumps((driver.active.get_current_target(), passes.pdl))
    # Without room for a file, or for more processes, training does without.
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as folder:
        Path(folder, "work").write_bytes(work + given)
        in_processes(count, folder)


def in_processes(count: int, folder: str) -> None:
    """Run this module as a program in `count` processes, and wait for all."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [sys.executable or "python3", "-P", "-m", "kernels.ahead", folder]  # -P: no module from here
    processes, until = [], time.monotonic() + LONGEST_S
    try:
        for _ in range(count):
            processes.append(subprocess.Popen(command, env=os.environ | environment, **silent))
        for process in processes:
            process.wait(max(0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()


class _WithoutValues(pickle.Pickler):
    def reducer_override(self, value: object):
        if not isinstance(value, Tensor):
            return NotImplemented
        is_parameter = isinstance(value, nn.Parameter)
        return _on_meta, (is_parameter, value.shape, value.stride(), value.dtype, value.requires_grad)


def _on_meta(is_parameter: bool, shape, stride, dtype: torch.dtype, requires_grad: bool) -> Tensor:
    made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return nn.Parameter(made, requires_grad) if is_parameter else made.requires_grad_(requires_grad)


def pickled(value: object) -> bytes:
    """Return `value`, pickled without the values of tensors; when it is read, they have no memory."""
    file = io.BytesIO()
    _WithoutValues(file).dump(value)
    return file.getvalue()


def run(passes: CudaPasses, model: nn.Module, shape: Iterable[int], dtype: torch.dtype) -> None:
    """Run `model`, which has no memory, up to its output layer: in training mode forward and backward."""
    for module in model.modules():
        if hasattr(module, "execution"):
            module.execution = module.execution._replace(group=None, passes=passes)
    trained = [p for p in model.parameters() if p.requires_grad and model.training]
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    with torch.set_grad_enabled(bool(trained)):
        y = model.features(x)
    if y.requires_grad:
        torch.autograd.grad(y, trained, torch.empty_like(y), allow_unused=True)


def main(folder: str) -> None:
    """Do this process's share of the work that `compile_all` has written to a folder."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the process that started this one
    with open(Path(folder, "work"), "rb") as file:
        target, pdl = pickle.load(file)
        given = pickle.load(file)
    run(Share(Path(folder), target, pdl), *given)


if __name__ == "__main__":
    main(sys.argv[1])
