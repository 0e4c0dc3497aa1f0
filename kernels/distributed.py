"""The processes that torchrun starts to train one model: which one this is, and what they tell each other.

    torchrun --standalone --nproc_per_node=2 train.py --arch resnet32 --mode bn_only

Each has the whole network, takes its part of every batch, and makes the same update from the average
gradient; the first speaks and writes for all. Numbers travel over gloo on CPUs, over nccl on GPUs. A process
that torchrun did not start, or started alone, is a group of one, in which nothing is sent.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import distributed


class Group:
    """`count` processes, of which this is number `rank`; `count_here` of them are on this machine.

    Every process must make the same calls in the same order. Those that speak over gloo raise ConnectionError
    where another process has ended; on GPUs too, `wait` and `stop_together` do.
    """

    def __init__(self, rank: int = 0, count: int = 1, count_here: int = 1):
        self.rank, self.count, self.count_here = rank, count, count_here
        self.connected, self.signalled, self.broken = count > 1, False, False

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, in place, summed over the processes: in each of them the same, to the last bit."""
        if self.connected:
            try:
                distributed.all_reduce(tensor)
            except RuntimeError as error:
                if tensor.is_cuda:  # nccl says itself what is wrong
                    raise
                self.broken = True
                raise ConnectionError("another process of this run has ended; torchrun says which") from error
        return tensor

    def average(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, in place, averaged over the processes."""
        return self.sum(tensor).div_(self.count) if self.connected else tensor

    def average_all(self, tensors: Sequence[torch.Tensor]) -> None:
        """The same for many tensors of one dtype, in one message."""
        if self.connected and tensors:
            flat = self.average(torch.cat([tensor.reshape(-1) for tensor in tensors]))
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def agree(self, number: float) -> float:
        """Its average, for what all must decide alike."""
        return float(self.average(torch.tensor(number, dtype=torch.float64)))

    def wait(self) -> None:
        """Until every process is here. From now on Ctrl-C and SIGTERM are remembered for `stop_together`: a
        process that left in the middle of a step would leave the others waiting for its gradient."""
        if self.connected:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._remember)
            self.sum(torch.zeros(1))

    def stop_together(self) -> None:
        """KeyboardInterrupt in every process, once a signal to end has reached one; call it between steps.

        It costs a message over gloo, and waits for no GPU.
        """
        if self.connected and self.sum(torch.tensor(float(self.signalled))) > 0:
            raise KeyboardInterrupt

    def _remember(self, *_) -> None:
        self.signalled = True


ALONE = Group()


def rank() -> int:
    """This process's number, from 0, among those that torchrun started; 0 without torchrun."""
    return int(os.environ["RANK"]) if distributed.is_torchelastic_launched() else 0


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """The group of all that torchrun started, connected until the `with` block ends; CUDA's current device
    is then this process's own."""
    count = int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1
    if count == 1:
        yield ALONE
        return
    here, count_here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if count_here == count:  # one machine, whose name need not resolve to anything
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    gpus = torch.cuda.device_count()
    if here < gpus:  # options.check_processes refuses more processes than GPUs
        torch.cuda.set_device(here)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    group = Group(rank(), count, count_here)
    try:
        yield group
    finally:
        if not group.broken:
            distributed.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process. One that torchrun started does so at once: where another has gone, gloo's threads may
    abort it as they are taken down ("terminate called without an active exception")."""
    if distributed.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
