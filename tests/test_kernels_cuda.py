"""The fastest correct way to compute a convolution is measured once per machine; failures fall back."""

import pytest
import torch
from test_kernels_triton import DEVICE, assert_close, bn_of, copied, image, layer_of, wide
from torch import nn

import kernels
from kernels import choices, cuda
from kernels.choices import CONFIGS, Choices
from kernels.cuda import CudaPasses
from kernels.reference import Conv, TorchPasses
from step import flatten


@pytest.fixture
def timed(monkeypatch):
    """Return the times that replace a GPU's, in seconds by Config, and a list for the Configs tried.

    None stands for cuDNN. A Config without a time takes 9 s.
    """
    times, last = {None: 5.0}, []

    def recorded(call, pool):
        call()
        return last[-1]

    monkeypatch.setattr(choices, "MEASURED_S", 0.0)
    monkeypatch.setattr(choices, "recorded", recorded)
    monkeypatch.setattr(choices, "seconds", lambda config: times.get(config, 9.0))
    return times, last


def attempt_of(last: list, wrong=(), failing=()):
    def attempt(config):
        last.append(config)
        if config in failing:
            raise RuntimeError("out of resource: shared memory")
        return [torch.full((2, 3), 1.5 if config in wrong else 1.0), None]

    return attempt


def test_the_fastest_correct_config_is_chosen(timed, tmp_path):
    times, last = timed
    times |= {CONFIGS[0]: 1.0, CONFIGS[1]: 2.0, CONFIGS[2]: 3.0, CONFIGS[3]: 4.0}
    attempt = attempt_of(last, wrong=CONFIGS[:1], failing=CONFIGS[1:2])
    assert Choices(tmp_path / "kernels.json")("layer", attempt) == CONFIGS[2]
    log = dict(line.split(": ", 2)[1:] for line in (tmp_path / "kernels.log").read_text().splitlines())
    assert len(log) == 1 + len(CONFIGS) and log["('cuDNN',)"] == "500000.00 us"
    assert log[str(tuple(CONFIGS[0]))] == "differs from cuDNN"
    assert log[str(tuple(CONFIGS[1]))] == "RuntimeError('out of resource: shared memory')"


def test_every_config_is_compiled_before_the_first_is_tried(timed, tmp_path):
    chooses, compiling = Choices(tmp_path / "kernels.json"), []
    attempt = attempt_of(timed[1], failing=CONFIGS[:1])

    def noted(config):
        compiling.append((config, chooses.compiling))
        return attempt(config)

    chooses("layer", noted)
    compiled = [(config, True) for config in CONFIGS]
    assert compiling[: len(CONFIGS) + 1] == [(None, False), *compiled]
    assert not any(compiles for _, compiles in compiling[len(CONFIGS) + 1 :])


def test_while_kernels_compile_none_is_launched(tmp_path):
    passes, ones = CudaPasses(Choices(tmp_path / "kernels.json")), torch.ones(4, 16, device=DEVICE)
    out = torch.zeros_like(ones)
    for passes.choose.compiling in (True, False):
        assert not out.any()
        passes.launch(cuda.triton_kernels.finish, (1, 1), (out, *ones, 1e-5), None, C=16, BLOCK_C=16)
    assert out[:3].all()  # the mean, rstd and scale


def test_a_config_that_gives_nan_is_not_chosen(timed, tmp_path):
    times, last = timed
    times[CONFIGS[0]] = 1.0

    def attempt(config):
        last.append(config)
        return [torch.full((2,), float("nan") if config else 1.0)]

    assert Choices(tmp_path / "kernels.json")("layer", attempt) is None


@pytest.mark.parametrize("fastest", [None, CONFIGS[3]])
def test_choices_are_measured_once_and_kept_in_their_file(timed, tmp_path, fastest):
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.json", "kernels.log"]


RUBBISH = ["{", "[]", "1", "null", "[" * 100_000, '{"layer": ' * 5000 + "1" + "}" * 5000]
RUBBISH += [
    f'{{"layer": {way}}}' for way in ("7", '"x"', "{}", "[]", "[1, 2]", "[0, 0, 0, 0]", '[[], "x", {}]')
]


@pytest.mark.parametrize("rubbish", RUBBISH, ids=lambda text: text[:20])
def test_choices_in_an_invalid_file_are_measured_again(timed, tmp_path, rubbish):
    times, last = timed
    times[CONFIGS[1]] = 1.0
    (tmp_path / "kernels.json").write_text(rubbish)
    assert Choices(tmp_path / "kernels.json")("layer", attempt_of(last)) == CONFIGS[1]
    assert Choices(tmp_path / "kernels.json").made == {"layer": list(CONFIGS[1])}


def test_choices_work_without_a_writable_file(timed, tmp_path):
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


def test_measuring_updates_the_running_statistics_only_once(timed, tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "CONFIGS", CONFIGS[:2])
    _, last = timed
    last.append(None)
    x, weight, bn = image(2, 16, 4, 4), image(16, 16, 3, 3), bn_of(16)
    expected, conv = copied(bn), Conv((1, 1), (1, 1))
    TorchPasses().convolve(*wide((x, None, weight)), conv, expected)
    passes = CudaPasses(Choices(tmp_path / "kernels.json"))
    passes.finish(passes.convolve(x, None, weight, conv, bn)[1])
    assert_close([bn.running_mean, bn.running_var], [expected.running_mean, expected.running_var], 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trained_and_frozen_weights_have_separate_choices(dtype):
    """A trained weight is expanded for patches in every step, which takes time; a frozen one only once."""
    keys = {False: [], True: []}
    for trains, made in keys.items():
        passes = CudaPasses(lambda key, attempt, made=made: made.append(key))
        conv = nn.Conv2d(16, 16, 3, padding=1, bias=False).requires_grad_(trains)
        conv.to(DEVICE, memory_format=torch.channels_last)
        x = image(2, 16, 4, 4, dtype=dtype).requires_grad_()
        kernels.train_block(passes, x, [(conv, layer_of(16))], None, relu=True).sum().backward()
        with torch.no_grad():
            kernels.infer_block(passes, x, [(conv, layer_of(16))], None)
    assert [len(made) for made in keys.values()] == [3, 3] and not {*keys[True]} & {*keys[False]}


def test_a_frozen_weight_is_expanded_again_after_it_was_trained():
    passes, weight = CudaPasses(None), nn.Parameter(torch.zeros(16, 16, 3, 3, device=DEVICE))
    flat = flatten([weight])
    for value in range(3):
        passes.taps(weight.requires_grad_(True), 1, 2, backward=False)
        with torch.no_grad():
            flat.fill_(value)
        taps, _ = passes.taps(weight.requires_grad_(False), 1, 2, backward=False)
        assert taps.amax() == value


def test_without_triton_pytorchs_passes_are_used_with_a_warning(monkeypatch):
    monkeypatch.setattr(cuda, "triton", None)
    with pytest.warns(UserWarning, match="PyTorch's slower kernels are used .*Triton is not installed"):
        assert type(cuda.passes.__wrapped__()) is TorchPasses


def test_without_a_compiler_pytorchs_passes_are_used_with_a_warning(monkeypatch):
    def launch(self, *_, **__):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    if DEVICE == "cpu":  # it stands in for the GPU
        made = torch.device
        monkeypatch.setattr(torch, "device", lambda name: made("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(CudaPasses, "launch", launch)
    with pytest.warns(UserWarning, match="PyTorch's slower kernels are used .*Failed to find C compiler"):
        assert type(cuda.passes.__wrapped__()) is TorchPasses


def test_a_failing_dependent_launch_is_turned_off_with_a_warning(monkeypatch):
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


def test_check_sums_detects_wrong_sums(monkeypatch):
    cuda.check_sums(CudaPasses(lambda key, attempt: None), torch.device(DEVICE))

    class Stale(CudaPasses):
        def mask_and_sum(self, *given):
            g, sums = super().mask_and_sum(*given)
            return g, sums * 0.9

    with pytest.raises(RuntimeError, match="sums over a batch are wrong"):
        cuda.check_sums(Stale(lambda key, attempt: None), torch.device(DEVICE))


def test_tensors_too_large_for_32_bit_offsets_are_left_to_cudnn(monkeypatch):
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
