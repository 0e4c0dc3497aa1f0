"""Which way a convolution is computed is measured once per machine, and only right ones count."""

import pytest
import torch
from test_kernels_triton import DEVICE, assert_close, bn_of, copied, image, layer_of, wide
from torch import nn

import kernels
from kernels import choices, cuda
from kernels.choices import CONFIGS, Choices
from kernels.cuda import CudaPasses
from kernels.reference import Conv, TorchPasses


@pytest.fixture
def timed(monkeypatch):
    """Times by Config in place of a GPU's; None is cuDNN."""
    times, last = {None: 5.0}, []

    def seconds(call):
        call()
        return times.get(last[-1], 9.0)

    monkeypatch.setattr(choices, "seconds", seconds)
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
    for again in (one, Choices(tmp_path / "kernels.json")):
        assert again("layer", attempt_of(last)) == fastest
    assert len(last) == tried
    assert set(Choices(tmp_path / "kernels.json").made) == {"layer", "another layer"}
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.json"]


RUBBISH = ["{", "[]", "1", "null", "[" * 100_000, '{"layer": ' * 5000 + "1" + "}" * 5000]
RUBBISH += [
    f'{{"layer": {way}}}' for way in ("7", '"x"', "{}", "[]", "[1, 2]", "[0, 0, 0, 0]", '[[], "x", {}]')
]


@pytest.mark.parametrize("rubbish", RUBBISH, ids=lambda text: text[:20])
def test_a_spoilt_file_costs_time_and_nothing_else(timed, tmp_path, rubbish):
    times, last = timed
    times[CONFIGS[1]] = 1.0
    (tmp_path / "kernels.json").write_text(rubbish)
    assert Choices(tmp_path / "kernels.json")("layer", attempt_of(last)) == CONFIGS[1]
    assert Choices(tmp_path / "kernels.json").made == {"layer": list(CONFIGS[1])}


def test_an_unwritable_file_costs_time_and_nothing_else(timed, tmp_path):
    (tmp_path / "file").write_text("")
    assert Choices(tmp_path / "file" / "kernels.json")("layer", attempt_of(timed[1])) is None


def test_nothing_is_tried_while_a_graph_is_captured(timed, tmp_path, monkeypatch):
    times, last = timed
    times[CONFIGS[0]] = 1.0
    chooses = Choices(tmp_path / "kernels.json")
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_available", lambda: True)
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert chooses("layer", attempt_of(last)) is None and not last
    assert chooses("layer", attempt_of(last)) == CONFIGS[0]


def test_trying_moves_the_running_statistics_once(timed, tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "CONFIGS", CONFIGS[:2])
    _, last = timed
    last.append(None)
    x, weight, bn = image(2, 16, 4, 4), image(16, 16, 3, 3), bn_of(16)
    expected, conv = copied(bn), Conv((1, 1), (1, 1))
    TorchPasses().convolve(*wide((x, None, weight)), conv, expected)
    CudaPasses(Choices(tmp_path / "kernels.json")).convolve(x, None, weight, conv, bn)
    assert_close([bn.running_mean, bn.running_var], [expected.running_mean, expected.running_var], 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_that_trains_has_choices_of_its_own(dtype):
    """Its expansion for patches takes time in every step; that of a frozen weight is kept."""
    keys = {False: [], True: []}
    for trains, made in keys.items():
        passes = CudaPasses(lambda key, attempt, made=made: made.append(key))
        conv = nn.Conv2d(16, 16, 3, padding=1, bias=False).requires_grad_(trains)
        conv.to(DEVICE, memory_format=torch.channels_last)
        x = image(2, 16, 4, 4, dtype=dtype).requires_grad_()
        kernels.train_block(passes, x, [(conv, layer_of(16))], None, relu=True).sum().backward()
    assert [len(made) for made in keys.values()] == [2, 2] and not {*keys[True]} & {*keys[False]}


def test_without_triton_or_a_gpu_the_passes_are_pytorchs_and_a_warning_says_so(monkeypatch):
    monkeypatch.setattr(cuda, "triton", None)
    with pytest.warns(UserWarning, match="PyTorch's slower kernels are used .*Triton is not installed"):
        assert type(cuda.passes.__wrapped__()) is TorchPasses


def test_without_a_compiler_the_passes_are_pytorchs_and_a_warning_says_so(monkeypatch):
    def launch(self, *_, **__):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    if DEVICE == "cpu":  # where nothing is launched
        made = torch.device
        monkeypatch.setattr(torch, "device", lambda name: made("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(CudaPasses, "launch", launch)
    with pytest.warns(UserWarning, match="PyTorch's slower kernels are used .*Failed to find C compiler"):
        assert type(cuda.passes.__wrapped__()) is TorchPasses


def test_where_dependent_launch_fails_kernels_wait_for_each_other_and_a_warning_says_so(monkeypatch):
    launch = CudaPasses.launch

    def without(self, *arguments, **constants):
        if self.pdl:
            raise RuntimeError("operation not supported")
        launch(self, *arguments, **constants)

    if DEVICE == "cpu":
        made = torch.device
        monkeypatch.setattr(torch, "device", lambda name: made("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(CudaPasses, "launch", without)
    with pytest.warns(UserWarning, match="waits for the end of the one before.*operation not supported"):
        passes = cuda.passes.__wrapped__()
    assert type(passes) is CudaPasses and not passes.pdl


def test_kernels_whose_sums_are_wrong_are_found_out(monkeypatch):
    cuda.check_sums(CudaPasses(lambda key, attempt: None), torch.device(DEVICE))

    class Stale(CudaPasses):
        def mask_and_sum(self, *given):
            g, sums = super().mask_and_sum(*given)
            return g, sums * 0.9

    with pytest.raises(RuntimeError, match="sums over a batch are wrong"):
        cuda.check_sums(Stale(lambda key, attempt: None), torch.device(DEVICE))


def test_what_is_larger_than_32_bits_can_count_is_left_to_cudnn(monkeypatch):
    passes, launched = CudaPasses(lambda key, attempt: CONFIGS[0]), []
    monkeypatch.setattr(passes, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
    weight = torch.empty(64, 3, 3, 3, device="meta")  # the stem of a VGG at 224 pixels
    for images in (668, 669):
        x = cuda.empty_image(weight, (images, 3, 224, 224))
        passes.convolve(x, None, weight.contiguous(memory_format=torch.channels_last), Conv((1, 1), (1, 1)))
        assert launched == ["convolve"]


@pytest.mark.gpu
def test_on_a_gpu_the_passes_are_tritons():
    assert kernels.passes_for("cuda").name == "triton"
