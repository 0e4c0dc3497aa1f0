"""Steps and an evaluation with the Triton passes equal PyTorch's. Without a GPU, Triton interprets them."""

import contextlib
import functools

import interpreted
import pytest
import torch
from networks import network

import data
import freeze
import kernels
import models
import step
from kernels.choices import Config
from kernels.cuda import CudaPasses
from kernels.reference import TorchPasses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    interpreted.mend_bfloat16()


def by_largest_patch():
    """Return a function that chooses patches of 2x2 for each convolution that allows them, else of 1x1."""
    chosen = {}

    def choose(key, attempt):
        if key not in chosen:
            chosen[key] = Config(32, 4, 1, patch=2)
            try:
                attempt(chosen[key])
            except NotImplementedError:
                chosen[key] = Config(32, 4, 1, patch=1)
        return chosen[key]

    return choose


@pytest.mark.parametrize(
    "mode, dtype, tolerance",
    [
        ("all", torch.float32, 2e-6),
        ("random", torch.float32, 2e-6),
        ("bn_only", torch.float32, 2e-6),
        ("bn_only", torch.bfloat16, 2e-2),
    ],
)
def test_two_steps_and_an_evaluation_equal_pytorchs(mode, dtype, tolerance, monkeypatch):
    """The second step and the evaluation must use the weights that the step before has updated."""
    found = []
    for ours in (CudaPasses(by_largest_patch()), TorchPasses()):
        for module in (step, kernels):
            monkeypatch.setattr(module, "passes_for", lambda _, on=True, of=ours: of if on else TorchPasses())
        generator, model = torch.Generator().manual_seed(0), network()
        freeze.freeze(model, mode, seed=0)
        # A reference in float32 would depend on which convolutions cuDNN chooses.
        wider = torch.float64 if dtype == torch.float32 and type(ours) is TorchPasses else torch.float32
        one = step.Step(model.to(DEVICE, wider), dtype=dtype)
        for _ in range(2):
            images = torch.randn(4, 3, 8, 8, generator=generator).to(wider)
            images = images.to(DEVICE, memory_format=torch.channels_last)
            one(images, torch.arange(4, device=DEVICE), lr=0.05)
        assert one.head_checked == (type(ours) is CudaPasses and mode != "all")
        model.eval()
        with torch.no_grad(), torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            logits = model(images).float()
        found.append((one.flat.detach(), one.loss_sum, logits))
    for tensor, expected in zip(*found, strict=True):
        assert (tensor - expected).norm() <= tolerance * expected.norm()
    assert not torch.equal(found[0][2], found[1][2]), "both were computed by the same passes"


def changed_loss(of: step.Step) -> None:
    loss = of._loss
    of._loss = of.loss = lambda *given: (1.02 * loss(*given)[0], loss(*given)[1])


def loss_with_a_small_penalty(of: step.Step) -> None:
    loss = of._loss

    def penalised(features, labels):
        mean, correct = loss(features, labels)
        return mean + 1e-3 * features.float().abs().mean(), correct

    of._loss = of.loss = penalised


def changed_head(of: step.Step) -> None:
    of.model.head = lambda features: of.model.fc(features.amax((2, 3)))


@pytest.mark.parametrize("change", [None, changed_loss, loss_with_a_small_penalty, changed_head])
def test_the_kernel_for_the_loss_is_used_only_while_it_equals_the_loss(change, monkeypatch):
    monkeypatch.setattr(kernels, "passes_for", lambda *_: TorchPasses())
    images = torch.randn(4, 3, 8, 8, device=DEVICE).contiguous(memory_format=torch.channels_last)
    found, ours = [], CudaPasses(by_largest_patch())
    for passes in (ours, TorchPasses()):
        monkeypatch.setattr(step, "passes_for", lambda *_, of=passes: of)
        model = network()
        freeze.freeze(model, "bn_only")
        one = step.Step(model.to(DEVICE))
        if change:
            change(one)
        with pytest.warns(match="Step._loss") if change and passes is ours else contextlib.nullcontext():
            for _ in range(2):
                one(images, torch.arange(4, device=DEVICE), lr=0.05)
        assert one.head_checked == (passes is ours and not change)
        found.append((one.flat.detach(), one.loss_sum, one.correct, one.position))
    for tensor, expected in zip(*found, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changed", [False, True])
def test_the_kernel_for_batches_is_used_only_while_it_equals_transform(
    changed, tiny_folder, tmp_path, monkeypatch
):
    transform = data.Loader.transform
    if changed:  # as by a user who wants more contrast
        monkeypatch.setattr(data.Loader, "transform", lambda self, *given: 1.02 * transform(self, *given))
    dataset = data.open_dataset(str(tiny_folder), tmp_path, say=lambda _: None)
    given = {"rng": functools.partial(models.stream, 3), "augmented": "paper", "kind": "resident"}
    loader = data.make_loader(dataset, "train", batch_size=9, device=DEVICE, dtype=torch.bfloat16, **given)
    expected = [images.clone() for images, _ in loader.epoch(1)]
    loader.passes = CudaPasses(by_largest_patch())
    with pytest.warns(match="Loader.transform") if changed else contextlib.nullcontext():
        found = [images.clone() for images, _ in loader.epoch(1)]
    assert all(map(torch.equal, found, expected)) and len(found) > 1
    assert loader.checked and (type(loader.passes) is TorchPasses) == changed
