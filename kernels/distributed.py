"""Data-parallel training of one network under torchrun, and BatchNorm over the batches of all processes.

    torchrun --standalone --nproc_per_node=2 train.py --arch resnet32 --mode bn_only

Each process has the whole network, takes its part of every batch, and makes the same update from the average
gradient. Rank 0 prints and writes files for all. The processes communicate through gloo on CPUs and nccl on
GPUs. A process that torchrun did not start, or started alone, is a group of one, which sends nothing.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor, distributed

from kernels.reference import D_B, TorchPasses


class ProcessEnded(ConnectionError):
    """Another process of the group has ended."""

    exit_status = 1


class Group:
    """`count` processes, of which this one has rank `rank`; `count_here` of them run on this machine.

    Every process must make the same calls in the same order. When another process has ended, communication
    through gloo raises ProcessEnded. `agree`, `wait` and `stop_together` use gloo even on GPUs.
    """

    def __init__(self, rank: int = 0, count: int = 1, count_here: int = 1):
        self.rank, self.count, self.count_here = rank, count, count_here
        self.connected, self.signalled, self.broken = count > 1, False, False

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes files for the group; only rank 0 does."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the processes in place, and return it; every process gets the same bits."""
        if self.connected:
            try:
                distributed.all_reduce(tensor)
            except RuntimeError as error:
                if tensor.is_cuda:  # nccl's own message explains the error
                    raise
                self.broken = True
                raise ProcessEnded("another process of this run has ended; torchrun names it") from error
        return tensor

    def average(self, tensor: Tensor) -> Tensor:
        """Average `tensor` over the processes in place, and return it."""
        return self.sum(tensor).div_(self.count) if self.connected else tensor

    def average_all(self, tensors: Sequence[Tensor]) -> None:
        """Average many tensors of one dtype over the processes, in place and in one message."""
        if self.connected and tensors:
            flat = self.average(torch.cat([tensor.reshape(-1) for tensor in tensors]))
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def agree(self, number: float) -> float:
        """Return the average of all processes' `number`, so that all of them make the same decision."""
        return self.average(torch.tensor(number, dtype=torch.float64)).item()

    def wait(self) -> None:
        """Wait until every process gets here; from now on, Ctrl-C and SIGTERM take effect in `stop_together`.

        A process that ended in the middle of a step would leave the others waiting for its gradient.
        """
        if self.connected:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._remember)
            self.sum(torch.zeros(1))

    def stop_together(self) -> None:
        """Raise KeyboardInterrupt in every process once one has got Ctrl-C or SIGTERM. Waits for no GPU."""
        if self.connected and self.sum(torch.tensor(float(self.signalled))) > 0:
            raise KeyboardInterrupt

    def _remember(self, *_) -> None:
        self.signalled = True


ALONE = Group()


class Synced:
    """`passes` for one process's part of a batch, with BatchNorm over all parts, which must be equal in size.

    Processes exchange only a few numbers per channel, which they average over the parts. The loss is the mean
    over a part, so averaging a resulting gradient over the processes gives the gradient of the whole batch.
    """

    def __init__(self, passes: TorchPasses, group: Group):
        self.passes, self.group = passes, group

    def __getattr__(self, name: str):
        return getattr(self.passes, name)  # the other passes treat every image by itself

    def convolve(self, x, norm, weight, conv, bn=None):
        if bn is None:
            return self.passes.convolve(x, norm, weight, conv)
        # With momentum 1, the running statistics become the part's: its mean and its unbiased variance.
        means, variances = torch.zeros_like(bn.running_mean), torch.zeros_like(bn.running_var)
        part = bn._replace(running_mean=means, running_var=variances, momentum=1.0)
        z, norm = self.passes.convolve(x, norm, weight, conv, part)
        self.passes.finish(norm)
        n = z.numel() // z.shape[1]
        mean, var = means.double(), variances.double() * ((n - 1) / n)
        # Average in float64, because the difference below loses digits.
        mean, square = self.group.average(torch.stack([mean, var + mean**2]))
        var, n = (square - mean**2).clamp_min(0), n * self.group.count
        bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), bn.momentum)
        bn.running_var.lerp_((var * (n / (n - 1))).to(bn.running_var.dtype), bn.momentum)
        return z, self.passes.norm(mean.to(bn.gamma.dtype), var.to(bn.gamma.dtype), bn)

    def mask_and_sum(self, *arguments):
        g, sums = self.passes.mask_and_sum(*arguments)
        self.passes.finish(sums)
        # d_gamma and d_beta stay the part's. b and c are linear in them, so averages give the whole batch's.
        self.group.average(sums[D_B:])
        return g, sums

    def convolve_backward(self, *arguments, **more):
        dx, sums = self.passes.convolve_backward(*arguments, **more)
        if sums is not None:  # as in mask_and_sum
            self.passes.finish(sums)
            self.group.average(sums[D_B:])
        return dx, sums


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """Connect the processes that torchrun started, and yield their Group until the `with` block ends.

    If this process has a GPU, it becomes CUDA's current device. Without other processes, ALONE is yielded.
    """
    if not distributed.is_torchelastic_launched() or os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
    *numbers, here = (int(os.environ[name]) for name in names)
    group = Group(*numbers)
    if group.count_here == group.count:  # on one machine, whose host name might not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    gpus = torch.cuda.device_count()
    if here < gpus:  # train.py refuses more processes than GPUs
        torch.cuda.set_device(here)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    try:
        yield group
    finally:
        if not group.broken:
            distributed.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process with exit status `status`."""
    if distributed.is_torchelastic_launched():
        # Exit at once. If another process has gone, an ordinary exit shuts down gloo's threads, which may
        # abort this process ("terminate called without an active exception").
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
