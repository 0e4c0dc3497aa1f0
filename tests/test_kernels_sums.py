"""Sums over a batch are exact enough, and have the same bits in any order, also in the interpreter."""

import pytest
import torch
from test_kernels_triton import DEVICE, assert_close, bn_of, copied, fused, image, wide

from kernels import cuda
from kernels.cuda import CudaPasses
from kernels.reference import TorchPasses


@pytest.mark.parametrize("most", [256, 33, 1])  # 33 programs of 4 blocks, of which the last ones are empty
def test_sums_of_many_programs_are_added_up_in_the_same_order_each_time(most):
    torch.manual_seed(0)
    passes, z, bn = fused(), image(5, 64, 32, 40), bn_of(64)  # 100 blocks
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cuda, "ADDERS", most)
        norms = [passes.statistics(z, copied(bn, torch.float32, DEVICE)) for _ in range(2)]
        sums = [passes.mask_and_sum(z, z, norms[0])[1] for _ in range(2)]
    assert torch.equal(*norms) and torch.equal(*sums)
    expected = TorchPasses().statistics(wide(z), copied(bn))
    assert_close([norms[0]], [expected], 2e-5)
    assert_close([sums[0]], [TorchPasses().mask_and_sum(*wide((z, z, norms[0])))[1]], 2e-5)


def test_the_order_in_which_programs_add_does_not_change_a_bit():
    torch.manual_seed(0)
    z, passes, found = image(5, 64, 32, 40) * 10, CudaPasses(lambda key, attempt: None), []
    blocks = z.permute(0, 2, 3, 1).reshape(100, 64, 64)  # of a program each
    for order in (torch.arange(100), torch.randperm(100)):
        mixed = blocks[order.to(DEVICE)].view(5, 32, 40, 64).permute(0, 3, 1, 2)
        totals = passes.unfinished[passes.statistics(mixed, bn_of(64))].totals
        found.append(totals.view(2, -1, 2, 64).sum(1))  # over the copies, which is exact too
    assert torch.equal(*found) and found[0].all()
    exact = blocks.double().flatten(0, 1)
    assert_close(found[0].sum(1), [exact.sum(0), exact.square().sum(0)], 1e-6)


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_sums_that_are_not_finite_show(value):
    z = image(2, 16, 4, 4)
    z[1, 3, 2, 2] = float(value)
    scale = fused().statistics(z, bn_of(16))[2]
    assert not scale[3].isfinite() and scale[:3].isfinite().all()


def test_each_sum_starts_from_zeros_of_its_own(monkeypatch):
    monkeypatch.setattr(cuda, "ZEROS", 1000)  # enough for three of 256
    passes, z = CudaPasses(lambda key, attempt: None), image(1, 16, 2, 2)
    given = [passes.totals(z) for _ in range(7)]
    for i, zeros in enumerate(given):
        assert not zeros.any() and len(zeros) == 256
        zeros += i + 1
    assert all((zeros == i + 1).all() for i, zeros in enumerate(given))


def test_statistics_are_accurate_for_a_mean_of_10_000_deviations():
    torch.manual_seed(0)
    z, bn = image(3, 16, 31, 33, mean=1e4), bn_of(16)
    expected = copied(bn)
    assert_close([fused().statistics(z, bn)], [TorchPasses().statistics(wide(z), expected)], 1e-4)
    assert_close([bn.running_var], [expected.running_var], 1e-4)
