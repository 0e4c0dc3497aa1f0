"""The Triton passes equal TorchPasses in float64. Without a GPU, Triton interprets them."""

import functools

import interpreted
import pytest
import torch
from torch import nn

import data
import kernels
import models
from kernels import cuda, device
from kernels.choices import CONFIGS, Choices, Config
from kernels.cuda import CudaPasses
from kernels.reference import BatchNorm, Conv, TorchPasses, pack

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
LAYERS = {  # layers of CIFAR ResNets: C_in, C_out, kernel, stride
    "stem": (3, 16, 3, 1),
    "16": (16, 16, 3, 1),
    "16 to 32": (16, 32, 3, 2),
    "32": (32, 32, 3, 1),
    "32 to 64": (32, 64, 3, 2),
    "64": (64, 64, 3, 1),
    "shortcut to 32": (16, 32, 1, 2),
    "shortcut to 64": (32, 64, 1, 2),
}
CASES = [
    (dtype, size) for dtype in DTYPES for size in (7, 8) if GPU or (size == 7) == (dtype == torch.float16)
]
if not GPU:
    interpreted.mend_bfloat16()
cases = pytest.mark.parametrize("dtype, size", CASES, ids=lambda value: str(value).removeprefix("torch."))


@pytest.fixture(autouse=True)
def memory_starts_as_nan():
    """Fill new tensors with NaN, so that a value that a kernel fails to write causes a mismatch."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Finished(CudaPasses):
    """Passes that complete every norm and all sums that they return."""

    def over(self, *arguments, **constants):
        out = super().over(*arguments, **constants)
        if out is not None:
            self.finish(out)
        return out

    def norm(self, *arguments):
        self.finish(out := super().norm(*arguments))
        return out


def fused(config: Config = CONFIGS[0]) -> CudaPasses:
    return Finished(lambda key, attempt: config)


def configs(dtype: torch.dtype, channels: int, *sides: int, stride: int = 1) -> list[Config]:
    """Return the configs by which a convolution can compute images of so many channels and these sides."""
    some = CONFIGS if GPU else (CONFIGS[3], CONFIGS[4])  # many pixels of a window at once, and single ones
    fit = [c for c in some if allowed(c, max(stride, c.patch) ** 2 * channels, dtype)]
    return [c for c in fit if not any(side % c.patch for side in sides)]


def allowed(config: Config, columns: int, dtype: torch.dtype) -> bool:
    try:
        cuda.check_product(config, config.depth, columns, dtype)
    except NotImplementedError:
        return False
    return True


def image(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> torch.Tensor:
    drawn = (torch.randn(shape, dtype=torch.float64) + mean).to(DEVICE, dtype)
    return drawn.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else drawn


def norm_of(channels: int) -> torch.Tensor:
    mean, rstd, scale, shift = image(4, channels)
    return torch.stack([mean, rstd.abs() + 0.5, scale, 0.3 * shift])


def wide(value):
    """Return a tensor, or the tensors of a tuple, on the CPU and in float64 if floating-point."""
    if isinstance(value, torch.Tensor):
        return value.cpu().double() if value.is_floating_point() else value.cpu()
    return tuple(wide(v) for v in value) if type(value) is tuple else value


def layer_of(channels: int) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels, momentum=0.3)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    return bn.to(DEVICE)


def bn_of(channels: int) -> BatchNorm:
    return BatchNorm.of(layer_of(channels).requires_grad_(False))


def copied(bn: BatchNorm, dtype: torch.dtype = torch.float64, device: str = "cpu") -> BatchNorm:
    return BatchNorm(*(v.clone().to(device, dtype) if isinstance(v, torch.Tensor) else v for v in bn))


def assert_close(out, expected, tolerance: float) -> None:
    """Assert that ||out - expected|| <= `tolerance` ||expected|| for every tensor, or row of a matrix."""
    for a, b in zip(out, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            for one, other in zip(a, b, strict=True) if a.ndim == 2 else [(a, b)]:
                assert (wide(one) - wide(other)).norm() <= tolerance * wide(other).norm()


@pytest.mark.parametrize("layer", LAYERS)
@cases
def test_convolve_normalises_its_input_and_computes_output_statistics(layer, dtype, size):
    torch.manual_seed(0)
    c_in, c_out, k, stride = LAYERS[layer]
    x, conv = image(3, c_in, size, size, dtype=dtype), Conv((stride, stride), (k // 2, k // 2))
    weight = image(c_out, c_in, k, k, dtype=dtype) * (2 / (c_in * k * k)) ** 0.5
    norm, bn = None if layer == "stem" else norm_of(c_in), bn_of(c_out)
    reference = copied(bn)
    expected = TorchPasses().convolve(*wide((x, norm, weight)), conv, reference)
    for config in configs(dtype, c_out, (size - 1) // stride + 1):
        moved = copied(bn, torch.float32, DEVICE)
        assert_close(fused(config).convolve(x, norm, weight, conv, moved), expected, TOLERANCE[dtype])
        running = (moved.running_mean, moved.running_var)
        assert_close(running, (reference.running_mean, reference.running_var), TOLERANCE[dtype])


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "stem"])
@cases
def test_convolve_backward_includes_batchnorm_above_and_relu_below(layer, dtype, size):
    torch.manual_seed(0)
    c_in, c_out, k, stride = LAYERS[layer]
    conv, small = Conv((stride, stride), (k // 2, k // 2)), (size - 1) // stride + 1
    g, z = (image(3, c_out, small, small, dtype=dtype) for _ in range(2))
    x, add = (image(3, c_in, size, size, dtype=dtype) for _ in range(2))
    weight = image(c_out, c_in, k, k, dtype=dtype) * (2 / (c_in * k * k)) ** 0.5
    here = g, z, norm_of(c_out), image(4, c_out), weight
    ways = [{"below": (x, norm_of(c_in))}, {"add": add}] if "shortcut" not in layer else [{}]
    for way in ways:
        given = {name: wide(value) for name, value in way.items()}
        expected = TorchPasses().convolve_backward(*wide(here), conv, x.shape, **given)
        for config in configs(dtype, c_in, stride=stride):
            out = fused(config).convolve_backward(*here, conv, x.shape, **way)
            assert_close(out, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_handles_an_incomplete_last_block(config):
    torch.manual_seed(0)
    dtype = torch.float32 if allowed(config, config.patch**2 * 16, torch.float32) else torch.float16
    weight, conv = image(16, 16, 3, 3, dtype=dtype) / 8, Conv((1, 1), (1, 1))
    height, width = 5 * config.patch, 7 * config.patch
    x, passes, norm, bn = image(3, 16, height, width, dtype=dtype), fused(config), norm_of(16), bn_of(16)
    expected = TorchPasses().convolve(*wide((x, norm, weight)), conv, copied(bn))
    z, norm_above = passes.convolve(x, norm, weight, conv, bn)
    assert_close((z, norm_above), expected, TOLERANCE[dtype])
    assert torch.equal(passes.convolve(x, norm, weight, conv)[0], z), "without statistics"
    added = image(*x.shape, dtype=dtype)
    here, both = (x, z, norm_above, image(4, 16), weight), {"below": (x, norm), "add": added}
    expected = TorchPasses().convolve_backward(
        *wide(here), conv, x.shape, **{n: wide(v) for n, v in both.items()}
    )
    assert_close(passes.convolve_backward(*here, conv, x.shape, **both), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("layer", LAYERS)
@cases
def test_infer_normalises_the_output_of_a_convolution(layer, dtype, size):
    torch.manual_seed(0)
    c_in, c_out, k, stride = LAYERS[layer]
    x, small = image(3, c_in, size, size, dtype=dtype), (size - 1) // stride + 1
    conv = Conv((stride, stride), (k // 2, k // 2))
    weight = image(c_out, c_in, k, k, dtype=dtype) * (2 / (c_in * k * k)) ** 0.5
    norm, shortcut = norm_of(c_out), image(3, c_out, small, small, dtype=dtype)
    for rest in ((None, True), (None, False), (shortcut, True)):
        expected = TorchPasses().infer(*wide((x, weight, conv, norm, *rest)))
        for config in configs(dtype, c_out, small):
            assert_close([fused(config).infer(x, weight, conv, norm, *rest)], [expected], TOLERANCE[dtype])


@pytest.mark.parametrize("order", ["as PyTorch has it", "channels_last", "transposed"])
def test_weights_may_have_any_memory_layout(order):
    torch.manual_seed(0)
    x, weight, conv = image(2, 16, 4, 4), image(32, 16, 3, 3), Conv((1, 1), (1, 1))
    weight = weight.contiguous() if order == "as PyTorch has it" else weight
    weight = weight.transpose(2, 3) if order == "transposed" else weight
    expected = TorchPasses().convolve(*wide((x, None, weight)), conv)
    assert_close(fused().convolve(x, None, weight, conv), expected, 2e-5)


@pytest.mark.parametrize("channels", [8, 24, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activate_mask_and_sum_and_gradient_equal_pytorchs(channels, dtype):
    torch.manual_seed(0)
    passes, reference, tolerance = fused(), TorchPasses(), TOLERANCE[dtype]
    z, dy, shortcut = (
        image(3, channels, *((9, 7) if channels < 64 else (2, 3)), dtype=dtype) for _ in range(3)
    )
    norm, sums = norm_of(channels), image(4, channels)
    for added in (None, shortcut):
        for relu in (True, False):
            y, signs = passes.activate(z, norm, added, relu, want_signs=relu)
            expected, positive = reference.activate(*wide((z, norm, added)), relu, want_signs=relu)
            assert_close([y], [expected], tolerance)
            assert signs is None if positive is None else torch.equal(signs.cpu(), positive)
    signs = pack(shortcut > 0)
    for how in ((signs, True), (None, True), (None, False)):
        expected = reference.mask_and_sum(*wide((dy, z, norm, *how)))
        assert_close(passes.mask_and_sum(dy, z, norm, *how), expected, tolerance)
    assert_close(
        [passes.gradient(dy, z, norm, sums)], [reference.gradient(*wide((dy, z, norm, sums)))], tolerance
    )


@pytest.mark.parametrize("channels", [16, 200])
def test_the_norm_of_running_statistics_equals_pytorchs(channels):
    bn = bn_of(channels)
    mean, var = image(channels, mean=1.0), image(channels).abs() + 0.1
    expected = TorchPasses().norm(*wide((mean, var)), copied(bn))
    assert_close([fused().norm(mean, var, bn)], [expected], 2e-5)


def test_nan_passes_through_activate_and_convolve():
    x, norm = image(2, 16, 4, 4), norm_of(16)
    x[0, 3, 2, 2] = float("nan")
    assert fused().activate(x, norm)[0][0, 3, 2, 2].isnan()
    z = fused().convolve(x, norm, image(16, 16, 3, 3), Conv((1, 1), (1, 1)))[0]
    assert z[0, :, 1:, 1:].isnan().all() and not z[1].isnan().any()


@pytest.mark.parametrize("c_out, stride", [(16, 1), (32, 2)])
@pytest.mark.parametrize("memory, train_weights", [("lean", True), ("recompute", False)])
@pytest.mark.parametrize("most", [256, 1])  # programs of a kernel; with 1, it computes all blocks
def test_a_block_and_all_its_gradients_equal_pytorchs(
    memory, c_out, stride, train_weights, most, monkeypatch
):
    monkeypatch.setattr(cuda, "ADDERS", most)
    c_in = 16

    def results_of(passes: TorchPasses, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        x, identity = image(3, c_in, 6, 6).to(device, dtype).requires_grad_(), stride == 1
        shortcut = None if identity else image(3, c_out, 3, 3).to(device, dtype).requires_grad_()
        units = []
        for channels, s in ((c_in, stride), (c_out, 1)):
            conv = nn.Conv2d(channels, c_out, 3, s, 1, bias=False).requires_grad_(train_weights)
            units.append((conv.to(device, dtype), layer_of(c_out).to(device, dtype)))
        added = x if identity else shortcut
        y = kernels.train_block(passes, x, units, added, relu=True, recompute=memory == "recompute")
        y.backward(image(*y.shape).to(device, dtype))
        weights = [conv.weight for conv, _ in units]
        bn_parameters = [p for _, bn in units for p in (bn.weight, bn.bias)]
        leaves = [leaf for leaf in (x, shortcut, *weights, *bn_parameters) if leaf is not None]
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]

    unfinished, expected = (
        CudaPasses(lambda key, attempt: CONFIGS[0]),
        results_of(TorchPasses(), torch.float64, "cpu"),
    )
    assert_close(results_of(unfinished, torch.float32, DEVICE), expected, 2e-5)
    assert not unfinished.unfinished


@pytest.mark.parametrize(
    "dtype, c_in, c_out, k, padding",
    [
        (torch.float64, 16, 16, 3, 1),
        (torch.float32, 5, 16, 3, 1),
        (torch.float32, 16, 48, 3, 1),
        (torch.float32, 16, 16, 3, 0),
        (torch.float32, 16, 16, 5, 2),
    ],
)
def test_uncovered_convolutions_are_left_to_pytorch(monkeypatch, dtype, c_in, c_out, k, padding):
    passes, conv = fused(), Conv((1, 1), (padding, padding))
    launched, launch, wider = [], passes.launch, torch.promote_types(dtype, torch.float32)

    def counted(kernel, *arguments, **constants):
        launched.append(kernel.__name__)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(passes, "launch", counted)
    x, weight = image(2, c_in, 6, 6, dtype=dtype), image(c_out, c_in, k, k, dtype=dtype)
    bn, norm = copied(bn_of(c_out), wider, DEVICE), norm_of(c_in).to(wider)
    expected = TorchPasses().convolve(*wide((x, norm, weight)), conv, copied(bn))
    assert_close(passes.convolve(x, norm, weight, conv, bn), expected, 2e-5)
    assert "convolve" not in launched


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_captured_block_replays_to_the_same_bits(dtype, tmp_path):
    torch.manual_seed(0)
    passes, conv = CudaPasses(Choices(tmp_path / "kernels.json")), Conv((1, 1), (1, 1))
    x, weight, bn = image(128, 16, 32, 32, dtype=dtype), image(16, 16, 3, 3, dtype=dtype) / 12, bn_of(16)

    def step():
        z, norm = passes.convolve(x, None, weight, conv, bn)
        y, signs = passes.activate(z, norm, x, want_signs=True)
        g, sums = passes.mask_and_sum(y, z, norm, signs)
        return z, norm, g, sums, passes.convolve_backward(g, z, norm, sums, weight, conv, x.shape, add=g)[0]

    eager = step()
    assert len(passes.choose.made) == 2
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with device.captured(graph):
        captured = step()
    for _ in range(3):
        graph.replay()
        for a, b in zip(captured, eager, strict=True):
            assert torch.equal(a, b)


def test_a_deeper_network_needs_no_more_choices():
    chosen = []
    for arch in ("resnet14", "resnet20"):
        keys = set()
        passes = CudaPasses(lambda key, attempt, keys=keys: keys.add(key))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(kernels, "passes_for", lambda *_, passes=passes: passes)
            model = models.build(arch).requires_grad_(False).to(DEVICE, memory_format=torch.channels_last)
            model.bn1.requires_grad_(True)
            images = torch.randn(2, 3, 8, 8, device=DEVICE).contiguous(memory_format=torch.channels_last)
            model(images).sum().backward()
        chosen.append(keys)
    # There are 11 forward and 10 backward: none for the stem, whose images need no gradient.
    assert chosen[0] == chosen[1] and len(chosen[0]) > 12


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "dtype, classes", [(torch.float32, 10), (torch.float16, 13), (torch.bfloat16, 10)], ids=str
)
def test_the_head_gives_the_gradient_of_the_mean_loss_and_counts_the_batch(dtype, classes, smoothing):
    torch.manual_seed(0)
    features, fc = image(5, 16, 3, 5, dtype=dtype), nn.Linear(16, classes).to(DEVICE)
    labels, lrs = torch.arange(5, device=DEVICE), torch.tensor([0.5, 0.25], device=DEVICE)
    exact, wide_fc = wide(features).requires_grad_(), nn.Linear(16, classes).double()
    wide_fc.load_state_dict(fc.state_dict())
    logits = wide_fc(exact.mean((2, 3)))
    labels[3] = logits[3].argmax()  # at least one prediction is correct
    loss = nn.functional.cross_entropy(logits, labels.cpu(), label_smoothing=smoothing)
    loss.backward()
    metrics = metrics_at(position=1)
    out = fused().head(features, fc, labels, smoothing, metrics, lrs, lr := torch.zeros((), device=DEVICE))
    assert_close([out], [exact.grad], TOLERANCE[dtype])
    loss_sum, correct, first_bad_step, position = (metric.item() for metric in metrics)
    assert loss_sum == pytest.approx(100 + 5 * loss.item(), rel=1e-6) and first_bad_step == -1
    assert (correct, position) == (7 + int((logits.argmax(1) == labels.cpu()).sum()), 2) and lr.item() == 0.25
    features[2, 3, 1, 1] = float("inf")
    for _ in range(2):
        fused().head(features, fc, labels, smoothing, metrics)
    assert metrics[2].item() == 2, "the first step whose loss is not finite"


def metrics_at(position: int) -> tuple[torch.Tensor, ...]:
    """Return loss_sum 100, correct 7, first_bad_step -1 and `position`, laid out as in step.py."""
    numbers = torch.tensor([7, -1, position], device=DEVICE)
    return torch.tensor(100.0, dtype=torch.float64, device=DEVICE), numbers[0], numbers[1], numbers[2:]


@pytest.mark.parametrize("augmented", ["paper", "flip", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_of_resident_images_has_the_same_bits_as_pytorchs(dtype, augmented, tiny_folder, tmp_path):
    dataset = data.open_dataset(str(tiny_folder), tmp_path, say=lambda _: None)

    def batches_by(passes: TorchPasses) -> list[torch.Tensor]:
        given = {"rng": functools.partial(models.stream, 3), "augmented": augmented, "kind": "resident"}
        loader = data.make_loader(dataset, "train", batch_size=9, device=DEVICE, dtype=dtype, **given)
        loader.passes, loader.checked = passes, True
        return [tensor for images, labels in loader.epoch(1) for tensor in (images, labels)]

    for a, b in zip(batches_by(fused()), batches_by(TorchPasses()), strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
