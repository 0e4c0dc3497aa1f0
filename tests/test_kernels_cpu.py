"""The C++ passes equal PyTorch's for any number of threads, and only intact libraries are loaded."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import kernels
from kernels import cpu, device
from kernels.reference import BatchNorm, TorchPasses, unpack

COMPILED = cpu.passes()
needs_compiler = pytest.mark.skipif(type(COMPILED) is TorchPasses, reason="needs a C++ compiler")


@needs_compiler
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
        # Where the input of the ReLU is close to 0, rounding decides its sign, so a few elements may differ.
        tolerance, share = (2e-4, 1e-4) if dtype == torch.float32 else (4e-2, 1e-2)
        off = (out - expected).abs() > tolerance * expected.abs().max()
        assert off.float().mean() < share, (out, expected)


@needs_compiler
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


def test_without_a_compiler_pytorchs_passes_are_used_with_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="PyTorch's slower kernels are used .*no-such-compiler"):
        assert type(cpu.passes.__wrapped__()) is TorchPasses


def test_a_warning_quotes_the_compilers_error(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "SOURCE", tmp_path / "broken.cpp")
    cpu.SOURCE.write_text("this is no C++")
    with pytest.warns(UserWarning, match=r"PyTorch's slower kernels are used .*broken\.cpp"):
        assert type(cpu.passes.__wrapped__()) is TorchPasses
    assert not list((tmp_path / "cache").glob("**/*.so"))


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> Path:
    """Return the library that was compiled into an empty cache, from a source with one function, `answer`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "SOURCE", tmp_path / "small.cpp")
    cpu.SOURCE.write_text('extern "C" int answer() { return 42; }')
    assert answer() == 42
    (library,) = (tmp_path / "cache").glob("batchnorm-only/*.so")
    return library


def answer() -> int | None:
    """Load the library as a new process would, and call its `answer`; return None for PyTorch's passes."""
    passes = cpu.passes.__wrapped__()
    return passes.library.answer() if type(passes) is cpu.CpuPasses else None


def harm(library: Path, what: str) -> None:
    digest, content = library.with_name(f"{library.name}.sha256"), library.read_bytes()
    if what in ("truncated", "other code"):
        library.unlink()  # write a new file, because this process has mapped the old one
    if what == "truncated":
        library.write_bytes(content[:5000])
    elif what == "other code":
        library.write_bytes(Path(math.__file__).read_bytes())
    elif what == "no digest":
        digest.unlink()
    elif what == "others may write to it":
        library.chmod(0o666)
    elif what == "others may write to its digest":
        digest.chmod(0o666)
    else:
        library.symlink_to(library.rename(library.with_name("elsewhere")))


@needs_compiler
@pytest.mark.parametrize(
    "what",
    [
        "truncated",
        "other code",
        "no digest",
        "others may write to it",
        "others may write to its digest",
        "a link",
    ],
)
def test_an_altered_cached_library_is_compiled_again(compiled, what):
    whole, before = compiled.read_bytes(), compiled.stat().st_ino
    assert answer() == 42 and compiled.stat().st_ino == before  # loaded, not compiled again
    harm(compiled, what)
    # In another process, because a broken library may crash it.
    code = f"import sys; sys.path[:0] = {sys.path!r}\nfrom pathlib import Path\nfrom kernels import cpu\n"
    code += f"cpu.SOURCE = Path({str(cpu.SOURCE)!r})\nassert cpu.passes().library.answer() == 42"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert compiled.read_bytes() == whole and not compiled.is_symlink()
    assert not compiled.stat().st_mode & 0o022 and answer() == 42


@needs_compiler
def test_a_library_in_a_folder_that_others_may_write_to_is_not_loaded(compiled, capfd, monkeypatch):
    cache = compiled.parents[1].rename(cpu.SOURCE.with_name("another"))  # device.py remembers the old path
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    compiled = cache / compiled.parent.name / compiled.name
    compiled.parent.chmod(0o777)
    planted = cpu.SOURCE.with_name("planted.cpp")
    planted.write_text('extern "C" int answer() { return 13; }')
    compiled.unlink()
    subprocess.run([os.environ.get("CXX", "g++"), "-shared", "-fPIC", planted, "-o", compiled], check=True)
    assert answer() == 42
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and str(compiled.parent) in said and "chmod go-w" in said
    private = device.cache_folder()
    assert private != compiled.parent and private.stat().st_mode & 0o777 == 0o700
    assert answer() == 42 and not capfd.readouterr().err  # the warning appears only once


def test_without_a_home_or_a_writable_folder_pytorchs_passes_are_used(monkeypatch, capfd):
    def nowhere(*_, **__):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    assert device.user_cache() == Path("/nonexistent/.cache/batchnorm-only")
    monkeypatch.setattr(device.Path, "mkdir", nowhere)
    monkeypatch.setattr(device.tempfile, "mkdtemp", nowhere)
    device._own_folder.cache_clear()
    with pytest.warns(UserWarning, match="PyTorch's slower kernels are used"):
        assert type(cpu.passes.__wrapped__()) is TorchPasses
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "/nonexistent" in said and "XDG_CACHE_HOME" in said
    device._own_folder.cache_clear()


def test_passes_for_gives_each_device_type_its_passes():
    assert kernels.passes_for("cpu").name == ("torch" if type(COMPILED) is TorchPasses else "cpp")
    assert kernels.passes_for("cpu", compiled=False).name == "torch"
    assert kernels.passes_for("cuda", compiled=False).name == "torch"
    assert kernels.passes_for("meta").name == "torch"
