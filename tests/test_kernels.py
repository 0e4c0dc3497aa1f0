"""conv_bn_relu: lean and recomputing blocks equal stock ones in values and gradients, and keep less."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kernels
import models
from kernels import Execution
from kernels.distributed import Group
from kernels.reference import pack, unpack
from models import Conv2d
from step import flatten

ROOT = Path(models.__file__).parent
PARTS_TRAINED = [("bn",), ("gamma",), ("beta",), ("conv",), ("values",), ("bn", "conv"), ()]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the median absolute error of `out`, relative to the mean magnitude of `expected`.

    The largest error would say little: where the input of a ReLU is close to 0, rounding decides its sign,
    and with it whether the whole gradient of that element passes.
    """
    out, expected = out.double(), expected.double()
    return ((out - expected).abs().median() / expected.abs().mean().clamp_min(1e-12)).item()


@st.composite
def blocks(draw) -> dict:
    """Draw a block of one to three units: its sizes, kernels, strides, shortcut, and what trains."""
    channels = draw(st.sampled_from([3, 5, 16, 32, 64, 128]))
    units = draw(st.integers(1, 3))
    shape = {
        "c_in": draw(st.sampled_from([3, 16, channels])),
        "channels": [draw(st.sampled_from([5, 16, 64])) for _ in range(units - 1)] + [channels],
        "kernels": [draw(st.sampled_from([1, 3])) for _ in range(units)],
        "strides": [draw(st.sampled_from([1, 1, 2])) for _ in range(units)],
        "n": draw(st.integers(2, 5)),
        "size": draw(st.sampled_from([4, 7, 8])),
        "relu": draw(st.booleans()),
        "shortcut": draw(st.sampled_from(["none", "other", "identity"])),
        "trained": draw(st.sampled_from(PARTS_TRAINED)),
        "x_trains": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }
    if shape["shortcut"] == "identity":
        shape["c_in"], shape["strides"] = channels, [1] * units
    return shape


def make(shape: dict, dtype: torch.dtype = torch.float64):
    """Return x, units, shortcut and the gradient of the output.

    Tensors are in `dtype`, and parameters in float64 if `dtype` is float64, else in float32.
    """
    generator = torch.Generator().manual_seed(shape["seed"])
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    wide = dtype if dtype == torch.float64 else torch.float32
    x = draw(shape["n"], shape["c_in"], shape["size"], shape["size"])
    x = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_(shape["x_trains"])
    units, c_in, size = [], shape["c_in"], shape["size"]
    for c_out, k, stride in zip(shape["channels"], shape["kernels"], shape["strides"], strict=True):
        conv, bn = Conv2d(c_in, c_out, k, stride).to(wide), nn.BatchNorm2d(c_out).to(wide)
        conv.weight.data.copy_(draw(*conv.weight.shape) * (2 / (c_in * k * k)) ** 0.5)
        bn.weight.data.copy_(draw(c_out))
        bn.bias.data.copy_(0.3 * draw(c_out))
        conv.requires_grad_("conv" in shape["trained"])
        bn.weight.requires_grad_(not {"bn", "gamma"}.isdisjoint(shape["trained"]))
        bn.bias.requires_grad_(not {"bn", "beta"}.isdisjoint(shape["trained"]))
        if "values" in shape["trained"]:
            places = [torch.randperm(c_in * k * k, generator=generator)[:2] for _ in range(c_out)]
            conv.set_apart(torch.stack(places))
        units.append((conv.to(memory_format=torch.channels_last), bn))
        c_in, size = c_out, (size - 1) // stride + 1
    shortcut = {"none": None, "identity": x}.get(shape["shortcut"], "other")
    if shortcut == "other":
        shortcut = draw(shape["n"], c_in, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
        shortcut.requires_grad_(shape["x_trains"])
    return x, units, shortcut, draw(shape["n"], c_in, size, size).to(dtype)


def results_of(
    shape: dict, dtype: torch.dtype, memory: str, compiled: bool = True, dy: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return the output, running statistics and every gradient, by name; `dy` replaces the drawn gradient."""
    x, units, shortcut, drawn = make(shape, dtype)
    dy = drawn if dy is None else dy
    half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast("cpu", dtype) if half else contextlib.nullcontext():
        y = kernels.conv_bn_relu(x, units, shortcut, shape["relu"], Execution(memory, compiled))
    out = {"y": y.detach()}
    if y.requires_grad:
        y.backward(dy.to(y.dtype))
    for i, (conv, bn) in enumerate(units):
        out |= {f"mean{i}": bn.running_mean, f"var{i}": bn.running_var}
        out |= {f"{n}{i}": p.grad for n, p in (*conv.named_parameters(), *bn.named_parameters())}
    out |= {"x": x.grad, "shortcut": None if shortcut is None else shortcut.grad}
    return {name: value for name, value in out.items() if value is not None}


@pytest.mark.parametrize("memory", ["lean", "recompute"])
@settings(max_examples=120, deadline=None, derandomize=True)
@given(shape=blocks())
def test_values_and_gradients_equal_stock_autograd_in_float64(memory, shape):
    expected, out = results_of(shape, torch.float64, "stock"), results_of(shape, torch.float64, memory)
    assert out.keys() == expected.keys()
    for name, value in expected.items():
        allowed = {"rtol": 1e-10, "atol": 1e-10 * max(1, value.abs().max())}
        torch.testing.assert_close(out[name], value, **allowed, msg=name)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=blocks())
def test_each_dtype_is_as_near_to_float64_as_stock_autograd_is(dtype, compiled, shape):
    before_relu = results_of(shape | {"relu": False}, torch.float64, "stock")["y"]
    dy = make(shape)[-1] * (before_relu.abs() > 0.05)  # 0 where rounding may flip a sign
    exact = results_of(shape, torch.float64, "stock", dy=dy)
    stock, out = results_of(shape, dtype, "stock", dy=dy), results_of(shape, dtype, "lean", compiled, dy)
    assert out.keys() == exact.keys()
    for name, value in exact.items():
        if value.abs().mean() > 1e-2:  # below, terms of about 1 cancel and lose digits
            assert error(out[name], value) <= 2 * error(stock[name], value) + TOLERANCE[dtype], name


@pytest.mark.parametrize("shape", [(3, 5, 3, 3), (2, 16, 8, 8)])
def test_signs_take_one_bit_per_element_in_memory_order(shape):
    positive = torch.randn(shape).contiguous(memory_format=torch.channels_last) > 0
    signs = pack(positive)
    assert signs.numel() == -(-positive.numel() // 8) and torch.equal(unpack(signs, positive), positive)
    assert [int(signs[0]) >> channel & 1 for channel in range(2)] == positive[0, :2, 0, 0].int().tolist()


def saved_bytes(memory: str, shape: dict, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the bytes kept for backward, without parameters and x; each storage counts once."""
    x, units, shortcut, _ = make(shape, dtype)
    own = {p.untyped_storage().data_ptr() for unit in units for m in unit for p in m.parameters()}
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with torch.autocast("cpu", dtype), hooks:
        y = kernels.conv_bn_relu(x, units, shortcut, shape["relu"], Execution(memory))
    del y
    own.add(x.untyped_storage().data_ptr())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for address, size in storages.items() if address not in own)


BASIC = {
    "c_in": 16, "channels": [16, 16], "kernels": [3, 3], "strides": [1, 1], "n": 4, "size": 32, "relu": True,
    "shortcut": "identity", "trained": ("bn",), "x_trains": True, "seed": 0,
}  # fmt: skip


def test_a_frozen_block_keeps_conv_outputs_and_one_bit_per_output_element():
    elements, per_channel = 4 * 16 * 32 * 32, 2 * 4 * 16 * 4
    assert saved_bytes("lean", BASIC) == 2 * 2 * elements + elements // 8 + per_channel
    assert saved_bytes("recompute", BASIC) == elements // 8 + per_channel  # x is the block below's output
    assert saved_bytes("stock", BASIC) > 2 * saved_bytes("lean", BASIC) - elements


def test_configure_sets_the_execution_of_every_block():
    for arch, blocks in (("resnet8", 6), ("resnet50", 21), ("vgg11", 8)):  # with stem and projections
        with torch.device("meta"):
            model = models.build(arch)
        for chosen in (("recompute", False, None), ("stock",), ("lean", True, Group()), ()):
            kernels.configure(model, *chosen)
            executions = [m.execution for m in model.modules() if hasattr(m, "execution")]
            assert executions == [Execution(*chosen)] * blocks
        assert models.build("resnet8").execution == Execution(), "other networks keep the defaults"


def test_invalid_execution_settings_are_refused():
    model = models.build("resnet8")
    with pytest.raises(ValueError, match="'lena' is unknown; choose from lean, recompute, stock"):
        kernels.configure(model, "lena")
    with pytest.raises(ValueError, match="'stock' takes no group"):
        kernels.configure(model, "stock", group=Group())
    assert model.execution == Execution()


@pytest.mark.parametrize("training", [True, False])
def test_a_stock_network_compiles_as_a_whole(training):
    """The benchmark's baseline `compiled` applies torch.compile to the whole network."""
    images, outputs = torch.randn(4, 3, 32, 32), []
    for wrap in (
        lambda model: model,
        lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"),
    ):
        model = models.build("resnet8").train(training)
        models.initialise(model, 0)
        kernels.configure(model, "stock")
        outputs.append(wrap(model)(images))
        outputs[-1].sum().backward()
        outputs.append(model.conv1.weight.grad)
    torch.testing.assert_close(outputs[2:], outputs[:2], rtol=1e-4, atol=1e-4)


def test_stock_memory_uses_autograds_own_backward():
    x, units, _, _ = make(BASIC, torch.float32)
    y = kernels.conv_bn_relu(x, units, execution=Execution("stock"))
    assert type(y.grad_fn).__name__ == "ReluBackward0"


def test_one_value_per_channel_cannot_be_normalised():
    x, units, _, _ = make(BASIC | {"n": 1, "size": 1, "shortcut": "none"}, torch.float32)
    with pytest.raises(ValueError, match="more than"):
        kernels.conv_bn_relu(x, units)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_nan_in_the_input_reaches_the_whole_output(compiled):
    """ReLU must not hide that a run has diverged."""
    x, units, _, _ = make(BASIC, torch.float32)
    x.data[0, 0, 0, 0] = torch.nan
    execution = Execution(compiled=compiled)
    assert kernels.conv_bn_relu(x, units, x, execution=execution).isnan().all()


@pytest.mark.parametrize("memory", ["lean", "recompute"])
def test_training_does_not_count_batches(memory):
    x, units, _, _ = make(BASIC, torch.float32)
    kernels.conv_bn_relu(x, units, x, execution=Execution(memory))
    assert all(bn.num_batches_tracked == 0 and bn.running_mean.any() for _, bn in units)


@pytest.mark.parametrize("memory", kernels.MEMORY)
@pytest.mark.parametrize("compiled", [True, False])
def test_evaluation_uses_the_running_statistics(memory, compiled):
    x, units, _, _ = make(BASIC, torch.float32)
    for _, bn in units:
        bn.running_mean.uniform_(-1, 1)
        bn.running_var.uniform_(0.5, 2)
        bn.eval()
    with torch.no_grad():
        y = kernels.conv_bn_relu(x, units, x, execution=Execution(memory, compiled))
        torch.testing.assert_close(y, kernels.stock(x, units, x), rtol=1e-4, atol=1e-4)


def test_evaluation_in_float64_equals_stock():
    x, units, _, _ = make(BASIC, torch.float64)
    for _, bn in units:
        bn.running_mean.uniform_(-1, 1)
        bn.running_var.uniform_(0.5, 2)
        bn.eval()
    with torch.no_grad():
        torch.testing.assert_close(kernels.conv_bn_relu(x, units, x), kernels.stock(x, units, x))


def test_a_frozen_weight_is_converted_again_only_after_a_change():
    _, units, _, _ = make(BASIC, torch.float32)
    conv = units[0][0]
    first = kernels._weight(conv, torch.bfloat16)
    assert kernels._weight(conv, torch.bfloat16) is first and first.dtype == torch.bfloat16
    with torch.no_grad():
        conv.weight.mul_(2)
    assert torch.equal(kernels._weight(conv, torch.bfloat16), 2 * first)


def test_a_frozen_weight_is_converted_again_after_it_was_trained():
    """A step changes the vector of which the weight is a view; the weight's version does not show that."""
    _, units, _, _ = make(BASIC, torch.float32)
    conv = units[0][0].requires_grad_(True)
    flat = flatten([conv.weight])
    for value in range(3):
        assert kernels._weight(conv.requires_grad_(True), torch.bfloat16).requires_grad
        with torch.no_grad():
            flat.fill_(value)
        assert (kernels._weight(conv.requires_grad_(False), torch.bfloat16) == value).all()


def test_weights_with_trained_values_are_converted_every_time(monkeypatch):
    """In evaluation they need no gradient, and the allocator may give each the address of the last."""
    _, units, _, _ = make(BASIC, torch.float32)
    conv, memory = units[0][0], np.zeros((16, 16, 3, 3), np.float32)
    monkeypatch.setattr(conv, "effective_weight", lambda: torch.from_numpy(memory))
    for value in range(3):
        memory[:] = value
        assert (kernels._weight(conv, torch.bfloat16) == value).all()


def test_a_machines_memory_is_that_of_its_container(tmp_path, monkeypatch):
    cpu, files = torch.device("cpu"), [tmp_path / "memory.max", tmp_path / "none"]
    monkeypatch.setattr(kernels.device, "CONTAINER_LIMITS", files)
    files[0].write_text("max\n")
    machine = kernels.device.memory_bytes(cpu)
    files[0].write_text(f"{machine // 2}\n")
    assert kernels.device.memory_bytes(cpu) == machine // 2


def test_importing_kernels_sets_cache_folders_and_cudnn_flags(tmp_path):
    program = """if True:
        import os, kernels, torch
        print(os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"])
        print(torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark)
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TRITON_CACHE_DIR": "/mine"}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [f"{tmp_path}/batchnorm-only/inductor", "/mine", "False", "True"]
