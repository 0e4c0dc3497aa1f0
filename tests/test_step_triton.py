"""Steps and an evaluation with the Triton passes equal PyTorch's. Without a GPU, Triton interprets them."""

import interpreted
import pytest
import torch
from networks import network

import freeze
import kernels
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
        model.eval()
        with torch.no_grad(), torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            logits = model(images).float()
        found.append((one.flat.detach(), one.loss_sum, logits))
    for tensor, expected in zip(*found, strict=True):
        assert (tensor - expected).norm() <= tolerance * expected.norm()
    assert not torch.equal(found[0][2], found[1][2]), "both were computed by the same passes"
