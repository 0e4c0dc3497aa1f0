"""Synchronised BatchNorm over the parts of a batch equals BatchNorm over the whole batch."""

import functools
import threading

import pytest
import torch
from test_kernels import BASIC, make
from torch import distributed

import kernels
from kernels import Execution
from kernels.distributed import ALONE, Group, ProcessEnded, joined


class Threads(Group):
    """A Group of two threads instead of processes, so that a test sees what each of them computes."""

    def __init__(self):
        super().__init__(count=2)
        self.meeting, self.said = threading.Barrier(2, timeout=30), {}

    def sum(self, tensor):
        self.said[threading.get_ident()] = tensor.clone()
        self.meeting.wait()
        tensor.copy_(sum(self.said[thread] for thread in sorted(self.said)))
        self.meeting.wait()
        return tensor


@pytest.mark.parametrize("memory", ["lean", "recompute"])
@pytest.mark.parametrize("trained", [("bn",), ("conv", "bn"), ("values",)])
def test_synced_parts_equal_the_whole_batch(memory, trained):
    shape = BASIC | {"kernels": [3, 1], "trained": trained, "size": 8}
    x, _, _, dy = make(shape)
    x.data += 10

    def run(x, dy, execution):
        """Return y and the gradient of x in one tensor, the parameters, and the units."""
        _, units, _, _ = make(shape)
        y = kernels.conv_bn_relu(x, units, x, execution=execution)
        y.backward(dy)
        parameters = [t for unit in units for module in unit for t in module.parameters()]
        return torch.cat([y.detach(), x.grad], 1), parameters, units

    whole = run(x, dy, Execution("stock"))
    group, parts = Threads(), [None, None]

    def part(rank: int) -> None:
        own, own_dy = (t.detach().chunk(2)[rank] for t in (x, dy))
        own = own.contiguous(memory_format=torch.channels_last).requires_grad_()
        parts[rank] = run(own, own_dy, Execution(memory, False, group))

    threads = [threading.Thread(target=part, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    close(torch.cat([parts[0][0], parts[1][0]]), whole[0])
    for one, first, second in zip(whole[1], parts[0][1], parts[1][1], strict=True):
        if one.grad is not None:  # the gradient of a sum; that of a mean would be their average
            close(first.grad + second.grad, one.grad)
    for (_, one), (_, first), (_, second) in zip(whole[2], parts[0][2], parts[1][2], strict=True):
        for name in ("running_mean", "running_var"):
            close(getattr(first, name), getattr(one, name))
            assert torch.equal(getattr(first, name), getattr(second, name))


def test_a_process_alone_sends_nothing():
    with joined() as group:
        assert group is ALONE and group.leads and not distributed.is_initialized()
        group.wait()
        group.stop_together()
        assert group.agree(3.0) == 3.0


def test_a_closed_connection_is_reported_as_an_ended_process(monkeypatch):
    def all_reduce(tensor):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    group = Group(0, 2, 2)
    with pytest.raises(ProcessEnded, match="another process of this run has ended"):
        group.agree(1.0)
    assert group.broken and ProcessEnded.exit_status == 1
