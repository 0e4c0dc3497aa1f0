"""The C++ passes equal PyTorch's, whatever the number of threads; without a compiler PyTorch's are used."""

import pytest
import torch
from torch import nn

import kernels
from kernels import cpu
from kernels.reference import BatchNorm, TorchPasses, unpack

COMPILED = cpu.passes()


@pytest.mark.skipif(type(COMPILED) is TorchPasses, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "n, channels, size", [(7, 16, 32), (8, 32, 16), (9, 64, 8), (3, 128, 4), (8, 8, 7), (8, 2, 8)]
)
def test_the_compiled_passes_equal_pytorchs(n, channels, size, dtype):
    generator = torch.Generator().manual_seed(channels)
    z, dy, shortcut = (
        (3 + torch.randn(n, channels, size, size, generator=generator)).to(dtype) for _ in range(3)
    )
    z, dy, shortcut = (t.contiguous(memory_format=torch.channels_last) for t in (z, dy, shortcut))
    assert cpu.covers(z, torch.ones(channels))
    results = []
    for passes in (TorchPasses(), COMPILED):
        bn = nn.BatchNorm2d(channels)
        bn.weight.data.copy_(torch.linspace(-1, 2, channels))
        norm = passes.statistics(z, BatchNorm.of(bn))
        y, signs = passes.activate(z, norm, shortcut, True, True)
        g, sums = passes.mask_and_sum(dy, z, norm, signs)
        results.append([norm, bn.running_mean, bn.running_var, y, unpack(signs, z).float()])
        results[-1] += [passes.dense(g), sums, passes.gradient(g, z, norm, sums).clone()]
        for relu in (True, False):
            g, sums = passes.mask_and_sum(dy, z, norm, None, relu)
            results[-1] += [sums, passes.gradient(g, z, norm, sums).clone()]
    for expected, out in zip(*results, strict=True):
        # Where the sum is all but 0, its sign is a matter of rounding.
        tolerance, share = (2e-4, 1e-4) if dtype == torch.float32 else (4e-2, 1e-2)
        off = (out - expected).abs() > tolerance * expected.abs().max()
        assert off.float().mean() < share, (out, expected)


def test_the_compiled_passes_do_not_depend_on_the_number_of_threads():
    z, bn = torch.randn(8, 16, 32, 32).contiguous(memory_format=torch.channels_last), nn.BatchNorm2d(16)
    before, norms = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            norms.append(COMPILED.statistics(z, BatchNorm.of(bn)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(norms[0], norms[1]) and torch.equal(norms[0], norms[2])


def test_without_a_compiler_the_passes_are_pytorchs_and_a_warning_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="PyTorch's slower kernels are used .*no-such-compiler"):
        assert type(cpu.passes.__wrapped__()) is TorchPasses


def test_a_source_that_does_not_compile_is_warned_of_with_the_compilers_words(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "SOURCE", tmp_path / "broken.cpp")
    cpu.SOURCE.write_text("this is no C++")
    with pytest.warns(UserWarning, match=r"PyTorch's slower kernels are used .*broken\.cpp"):
        assert type(cpu.passes.__wrapped__()) is TorchPasses
    assert not list((tmp_path / "cache").glob("**/*.so"))


def test_which_passes_a_device_uses_can_be_asked():
    assert kernels.passes_name("cpu") == ("torch" if type(COMPILED) is TorchPasses else "cpp")
    assert kernels.passes_name("cpu", compiled=False) == "torch"
    assert kernels.passes_name("cuda", compiled=False) == "torch"
    assert kernels.passes_name("meta") == "torch"
