"""kernels_cuda.py: its passes equal TorchPasses' in float64; interpreted by Triton where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import kernels
import models
from kernels import cuda as kernels_cuda
from kernels.cuda import CONFIGS, Choices, Config, CudaPasses
from kernels.reference import Conv, TorchPasses, pack

GPU = torch.cuda.is_available()
ROOT = Path(kernels_cuda.__file__).parent
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [
    torch.bfloat16
] * GPU  # bf16 products are garbage in the interpreter
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
LAYERS = {  # of CIFAR ResNets: C_in, C_out, kernel, stride
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
cases = pytest.mark.parametrize("dtype, size", CASES, ids=lambda value: str(value).removeprefix("torch."))


@pytest.fixture(autouse=True)
def memory_starts_as_nan():
    """What a kernel should have written and did not is NaN, which equals nothing."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def fused(config: Config = CONFIGS[0]) -> CudaPasses:
    return CudaPasses(lambda key, attempt: config)


def image(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> torch.Tensor:
    drawn = (torch.randn(shape, dtype=torch.float64) + mean).to(DEVICE, dtype)
    return drawn.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else drawn


def norm_of(channels: int) -> torch.Tensor:
    mean, rstd, scale, shift = image(4, channels)
    return torch.stack([mean, rstd.abs() + 0.5, scale, 0.3 * shift])


def wide(value):
    """The same for TorchPasses: tensors in float64, on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu().double() if value.is_floating_point() else value.cpu()
    return tuple(wide(v) for v in value) if type(value) is tuple else value


def bn_of(channels: int) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels, momentum=0.3)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    return bn.to(DEVICE)


def copied(bn: nn.BatchNorm2d) -> nn.BatchNorm2d:
    other = nn.BatchNorm2d(bn.num_features, momentum=bn.momentum).double()
    other.load_state_dict(bn.state_dict())
    return other


def assert_close(out, expected, tolerance: float) -> None:
    """||out - expected|| within `tolerance` ||expected||; of `[4, C]`, in every row."""
    for a, b in zip(out, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            for one, other in zip(a, b, strict=True) if a.ndim == 2 else [(a, b)]:
                assert (wide(one) - wide(other)).norm() <= tolerance * wide(other).norm()


@pytest.mark.parametrize("layer", LAYERS)
@cases
def test_a_convolution_normalises_what_it_reads_and_sums_what_it_writes(layer, dtype, size):
    torch.manual_seed(0)
    c_in, c_out, k, stride = LAYERS[layer]
    x, conv = image(3, c_in, size, size, dtype=dtype), Conv((stride, stride), (k // 2, k // 2))
    weight = image(c_out, c_in, k, k, dtype=dtype) * (2 / (c_in * k * k)) ** 0.5
    norm, bn = None if layer == "stem" else norm_of(c_in), bn_of(c_out)
    reference = copied(bn)
    expected = TorchPasses().convolve(*wide((x, norm, weight)), conv, reference)
    for config in CONFIGS if GPU else CONFIGS[:1]:
        moved = copied(bn).float().to(DEVICE)
        assert_close(fused(config).convolve(x, norm, weight, conv, moved), expected, TOLERANCE[dtype])
        running = (moved.running_mean, moved.running_var)
        assert_close(running, (reference.running_mean, reference.running_var), TOLERANCE[dtype])
        assert moved.num_batches_tracked == 0


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "stem"])
@cases
def test_the_backward_convolution_goes_through_batchnorm_above_and_relu_below(layer, dtype, size):
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
        for config in CONFIGS if GPU else CONFIGS[:1]:
            out = fused(config).convolve_backward(*here, conv, x.shape, **way)
            assert_close(out, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_covers_a_last_block_that_is_not_full(config):
    torch.manual_seed(0)
    x, weight, conv = image(3, 16, 5, 7), image(16, 16, 3, 3), Conv((1, 1), (1, 1))
    passes, norm, bn = fused(config), norm_of(16), bn_of(16)
    expected = TorchPasses().convolve(*wide((x, norm, weight)), conv, copied(bn))
    z, norm_above = passes.convolve(x, norm, weight, conv, bn)
    assert_close((z, norm_above), expected, 2e-5)
    assert torch.equal(passes.convolve(x, norm, weight, conv)[0], z), "evaluation, without statistics"
    here, both = (x, z, norm_above, image(4, 16), weight), {"below": (x, norm), "add": image(3, 16, 5, 7)}
    expected = TorchPasses().convolve_backward(
        *wide(here), conv, x.shape, **{n: wide(v) for n, v in both.items()}
    )
    assert_close(passes.convolve_backward(*here, conv, x.shape, **both), expected, 2e-5)


@pytest.mark.parametrize("order", ["as PyTorch has it", "channels_last", "transposed"])
def test_a_weight_may_lie_in_memory_in_any_order(order):
    torch.manual_seed(0)
    x, weight, conv = image(2, 16, 4, 4), image(32, 16, 3, 3), Conv((1, 1), (1, 1))
    weight = weight.contiguous() if order == "as PyTorch has it" else weight
    weight = weight.transpose(2, 3) if order == "transposed" else weight
    expected = TorchPasses().convolve(*wide((x, None, weight)), conv)
    assert_close(fused().convolve(x, None, weight, conv), expected, 2e-5)


@pytest.mark.parametrize("channels", [8, 24, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_passes_over_one_unit(channels, dtype):
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


def test_statistics_hold_where_the_mean_is_ten_thousand_deviations_from_zero():
    torch.manual_seed(0)
    z, bn = image(3, 16, 31, 33, mean=1e4), bn_of(16)
    expected = copied(bn)
    assert_close([fused().statistics(z, bn)], [TorchPasses().statistics(wide(z), expected)], 1e-4)
    assert_close([bn.running_var], [expected.running_var], 1e-4)


def test_a_run_that_diverges_shows_it():
    x, norm = image(2, 16, 4, 4), norm_of(16)
    x[0, 3, 2, 2] = float("nan")
    assert fused().activate(x, norm)[0][0, 3, 2, 2].isnan()
    z = fused().convolve(x, norm, image(16, 16, 3, 3), Conv((1, 1), (1, 1)))[0]
    assert z[0, :, 1:, 1:].isnan().all() and not z[1].isnan().any()


@pytest.mark.parametrize("c_out, stride", [(16, 1), (32, 2)])
@pytest.mark.parametrize("memory, train_weights", [("lean", True), ("recompute", False)])
def test_a_block_and_all_its_gradients(memory, c_out, stride, train_weights):
    c_in = 16

    def run(passes: TorchPasses, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        x, identity = image(3, c_in, 6, 6).to(device, dtype).requires_grad_(), stride == 1
        shortcut = None if identity else image(3, c_out, 3, 3).to(device, dtype).requires_grad_()
        units = []
        for channels, s in ((c_in, stride), (c_out, 1)):
            conv = (
                nn.Conv2d(channels, c_out, 3, s, 1, bias=False)
                .to(device, dtype)
                .requires_grad_(train_weights)
            )
            units.append((conv, bn_of(c_out).to(device, dtype)))
        weights = [conv.weight for conv, _ in units]
        bn_parameters = [p for _, bn in units for p in (bn.weight, bn.bias)]
        plan = (passes, units, True, identity, memory == "recompute")
        y = kernels._Block.apply(plan, x, shortcut, *weights, *bn_parameters)
        y.backward(image(*y.shape).to(device, dtype))
        leaves = [leaf for leaf in (x, shortcut, *weights, *bn_parameters) if leaf is not None]
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]

    assert_close(run(fused(), torch.float32, DEVICE), run(TorchPasses(), torch.float64, "cpu"), 2e-5)


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
def test_what_the_kernels_do_not_cover_is_left_to_pytorch(monkeypatch, dtype, c_in, c_out, k, padding):
    passes, conv = fused(), Conv((1, 1), (padding, padding))
    launched, launch, wider = [], passes.launch, torch.promote_types(dtype, torch.float32)

    def counted(kernel, *arguments, **constants):
        launched.append(kernel.__name__)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(passes, "launch", counted)
    x, weight = image(2, c_in, 6, 6, dtype=dtype), image(c_out, c_in, k, k, dtype=dtype)
    bn, norm = bn_of(c_out).to(wider), norm_of(c_in).to(wider)
    expected = TorchPasses().convolve(*wide((x, norm, weight)), conv, copied(bn))
    assert_close(passes.convolve(x, norm, weight, conv, bn), expected, 2e-5)
    assert "convolve" not in launched


# What is chosen.


@pytest.fixture
def timed(monkeypatch):
    """Times by Config in place of a GPU's; None is cuDNN."""
    times, last = {None: 5.0}, []

    def seconds(call):
        call()
        return times.get(last[-1], 9.0)

    monkeypatch.setattr(kernels_cuda, "seconds", seconds)
    return times, last


def attempt_of(last: list, wrong=(), failing=()):
    def attempt(config):
        last.append(config)
        if config in failing:
            raise RuntimeError("out of resource: shared memory")
        return [torch.full((2, 3), 1.5 if config in wrong else 1.0), None]

    return attempt


def test_the_fastest_way_that_is_right_is_chosen(timed, tmp_path):
    times, last = timed
    times |= {CONFIGS[0]: 1.0, CONFIGS[1]: 2.0, CONFIGS[2]: 3.0, CONFIGS[3]: 4.0}
    attempt = attempt_of(last, wrong=CONFIGS[:1], failing=CONFIGS[1:2])
    assert Choices(tmp_path / "made" / "kernels.json")("layer", attempt) == CONFIGS[2]


def test_a_way_that_gives_nan_is_wrong(timed, tmp_path):
    times, last = timed
    times[CONFIGS[0]] = 1.0
    attempt = lambda config: [torch.full((2,), float("nan") if config else 1.0)]  # noqa: E731
    last.append(CONFIGS[0])
    assert Choices(tmp_path / "kernels.json")("layer", attempt) is None


@pytest.mark.parametrize("fastest", [None, CONFIGS[3]])
def test_a_choice_is_made_once_a_machine(timed, tmp_path, fastest):
    times, last = timed
    times[fastest] = 1.0
    one, other = Choices(tmp_path / "kernels.json"), Choices(tmp_path / "kernels.json")
    assert one("layer", attempt_of(last)) == fastest
    other("another layer", attempt_of(last))
    tried = len(last)
    for choices in (one, Choices(tmp_path / "kernels.json")):
        assert choices("layer", attempt_of(last)) == fastest
    assert len(last) == tried
    assert set(Choices(tmp_path / "kernels.json").made) == {"layer", "another layer"}
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.json"]


def test_a_spoilt_or_unwritable_file_costs_time_and_nothing_else(timed, tmp_path):
    _, last = timed
    (tmp_path / "kernels.json").write_text("{")
    assert Choices(tmp_path / "kernels.json")("layer", attempt_of(last)) is None
    assert Choices(tmp_path / "kernels.json" / "below a file.json")("layer", attempt_of(last)) is None


def test_nothing_is_tried_while_a_graph_is_captured(timed, tmp_path, monkeypatch):
    times, last = timed
    times[CONFIGS[0]] = 1.0
    choices = Choices(tmp_path / "kernels.json")
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_available", lambda: True)
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choices("layer", attempt_of(last)) is None and not last
    assert choices("layer", attempt_of(last)) == CONFIGS[0]


def test_trying_moves_the_running_statistics_once(timed, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels_cuda, "CONFIGS", CONFIGS[:2])
    _, last = timed
    last.append(None)
    x, weight, bn = image(2, 16, 4, 4), image(16, 16, 3, 3), bn_of(16)
    expected, conv = copied(bn), Conv((1, 1), (1, 1))
    TorchPasses().convolve(*wide((x, None, weight)), conv, expected)
    CudaPasses(Choices(tmp_path / "kernels.json")).convolve(x, None, weight, conv, bn)
    assert_close([bn.running_mean, bn.running_var], [expected.running_mean, expected.running_var], 2e-5)


def test_without_triton_or_a_gpu_the_passes_are_pytorchs(monkeypatch):
    monkeypatch.setattr(kernels_cuda, "triton", None)
    assert type(kernels_cuda.passes.__wrapped__()) is TorchPasses


def test_without_a_compiler_the_passes_are_pytorchs(monkeypatch):
    def launch(self, *_, **__):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(CudaPasses, "launch", launch)
    assert type(kernels_cuda.passes.__wrapped__()) is TorchPasses


def test_the_kernels_compile_for_hopper_to_its_own_matrix_instructions_without_spilling(tmp_path):
    program = """if True:
        import torch, kernels_cuda, kernels_sm90
        like = torch.empty(0, dtype=torch.bfloat16, device="meta")
        x = kernels_cuda.empty_image(like, (128, 64, 8, 8))
        kernels_sm90.block(kernels_sm90.Forecast(kernels_cuda.CONFIGS[0], set()), x, [(64, 3, 1)])
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", program]
    rows = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    convolutions = [row for row in rows if row.startswith("convolve")]
    assert len(convolutions) == 2 and all("wgmma" in row for row in convolutions)
    assert all(int(row.split()[9]) == 0 for row in convolutions), "bytes spilt"


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
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        graph.replay()
        for a, b in zip(captured, eager, strict=True):
            assert torch.equal(a, b)


def test_a_deeper_network_has_no_more_to_choose_and_to_compile():
    chosen = []
    for arch in ("resnet14", "resnet20"):
        keys = set()
        passes = CudaPasses(lambda key, attempt, keys=keys: keys.add(key))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(kernels, "_passes", lambda device_type, passes=passes: passes)
            model = models.build(arch).requires_grad_(False).to(DEVICE, memory_format=torch.channels_last)
            model.bn1.requires_grad_(True)
            images = torch.randn(2, 3, 8, 8, device=DEVICE).contiguous(memory_format=torch.channels_last)
            model(images).sum().backward()
        chosen.append(keys)
    # 9 forward: stem, three stages' usual ones and those that change shape; 9 backward, of which some add
    assert chosen[0] == chosen[1] and len(chosen[0]) > 12
