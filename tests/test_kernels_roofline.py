"""The least bytes and seconds of a step, for networks whose tensors were counted by hand."""

import pytest
import torch

import models
from kernels import roofline


def cost_of(arch: str, image_size: int = 32) -> roofline.Cost:
    with torch.device("meta"):
        model = models.build(arch)
    return roofline.cost(model, image_size)


def test_a_resnet32_keeps_at_least_its_conv_outputs_and_signs():
    least = roofline.least_bytes(cost_of("resnet32"), torch.bfloat16)
    assert least["floor"] == 2 * 315_392 + 143_360 / 8 and 325e3 < least["floor_recompute"] < 335e3


@pytest.mark.parametrize(
    "arch, image_size, cost",
    [
        ("resnet8", 32, (86_016, 40_960, 28_672, 12_500_992)),
        ("resnet32", 32, (315_392, 155_648, 143_360, 69_124_096)),
        ("vgg16", 32, (276_480, 185_344, 0, 313_196_544)),
        ("resnet50", 224, (11_113_984, 5_619_712, 5_519_360, 4_087_136_256)),
    ],
)
def test_cost_counts_every_family_of_networks(arch, image_size, cost):
    assert cost_of(arch, image_size) == roofline.Cost(*cost)


def test_cost_does_not_change_the_network():
    model = models.build("resnet8")
    models.initialise(model, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert roofline.cost(model, 32) == cost_of("resnet8")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_least_time_follows_from_the_rates_of_the_device():
    of = cost_of("resnet32")
    assert 68e6 < of.multiply_adds < 70e6
    by_copies = roofline.least_s(of, False, torch.bfloat16, (4.3e12, 790e12))
    assert by_copies == pytest.approx(6 * 2 * 315_392 / 4.3e12)
    by_arithmetic = roofline.least_s(of, True, torch.bfloat16, (1e30, 790e12))
    assert by_arithmetic == pytest.approx(6 * of.multiply_adds / 790e12)


@pytest.mark.gpu
def test_a_gpu_attains_plausible_rates():
    bytes_per_s, flop_per_s = roofline.device_rates(torch.device("cuda"))
    assert bytes_per_s > 1e11 and flop_per_s > 1e12
