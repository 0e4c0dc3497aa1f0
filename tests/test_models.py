"""Networks have the published sizes and names, and a seed determines their initial weights."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import models

CIFAR_TOTALS = {  # parameters by shortcut: projection, projection_all, pad
    14: (175_258, 175_546, 172_506),
    32: (466_906, 467_194, 464_154),
    56: (855_770, 856_058, 853_018),
    110: (1_730_714, 1_731_002, 1_727_962),
    218: (3_480_602, 3_480_890, 3_477_850),
    434: (6_980_378, 6_980_666, 6_977_626),
    866: (13_979_930, 13_980_218, 13_977_178),
}
WIDTH_TOTALS = {2: 696_618, 4: 2_777_674, 8: 11_093_130, 16: 44_337_418, 32: 177_279_498}
IMAGENET_TOTALS = {
    18: 11_689_512,
    34: 21_797_672,
    50: 25_557_032,
    101: 44_549_160,
    152: 60_192_808,
    200: 64_673_832,
}


def on_meta(*arguments) -> nn.Module:
    with torch.device("meta"):
        return models.build(*arguments)


def total(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def drawn(arch="resnet8", seed=0, shortcut="projection", **inits) -> nn.Module:
    model = models.build(arch, 10, shortcut)
    models.initialise(model, seed, **inits)
    return model


@pytest.mark.parametrize("depth", CIFAR_TOTALS)
def test_cifar_resnets_have_the_published_parameter_counts(depth):
    assert tuple(total(on_meta(f"resnet{depth}", 10, s)) for s in models.SHORTCUTS) == CIFAR_TOTALS[depth]


@pytest.mark.parametrize("width", WIDTH_TOTALS)
def test_wide_resnet14_has_the_published_parameter_counts(width):
    assert total(on_meta(f"resnet14_w{width}")) == WIDTH_TOTALS[width]


@pytest.mark.parametrize("depth", IMAGENET_TOTALS)
def test_imagenet_resnets_have_torchvisions_parameter_counts(depth):
    assert total(on_meta(f"resnet{depth}", 1000)) == IMAGENET_TOTALS[depth]


def test_imagenet_resnets_have_torchvisions_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in on_meta("resnet50", 1000).state_dict().items()}
    expected = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer1.0.downsample.1.bias": (256,),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer3.5.bn3.weight": (1024,),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
        "fc.weight": (1000, 2048),
        "fc.bias": (1000,),
    }
    assert expected.items() <= shapes.items()
    assert len(shapes) == 320  # as in torchvision, num_batches_tracked included


FAMILIES = itertools.product(["resnet8", "resnet14_w2", "resnet18", "resnet50"], models.SHORTCUTS)


@pytest.mark.parametrize("arch, shortcut", [("vgg11", "projection"), *FAMILIES])
def test_every_family_gives_logits_for_any_image_size(arch, shortcut):
    model = models.build(arch, 7, shortcut).eval()
    for size in (32, 40):
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    "arch",
    [
        "resnet15",
        "resnet0",
        "resnet2",
        "resnet18_w2",
        "vgg12",
        "alexnet",
        "",
        "resnet32x",
        "resnet\u0663\u0662",
        "resnet" + "9" * 5000,
    ],
)
def test_an_unknown_architecture_is_refused_by_name(arch):
    with pytest.raises(models.ModelError, match=f"--arch {arch} is not known"):
        models.build(arch)


@pytest.mark.parametrize(
    "arch, classes, said",
    [
        ("resnet9998_w1000", 10, "about 1.6e+14 parameters"),
        ("resnet14_w1000", 10, "about 1.9e+11 parameters"),
        ("resnet9998_w3", 10, "about 1.5e+09 parameters"),
        ("resnet14", 10**17, "parameters"),
        ("vgg11", 10**7, "parameters"),
        ("resnet18", 10**7, "parameters"),
        ("resnet10004", 10, "10,000 layers"),
    ],
)
def test_a_network_that_is_too_large_is_refused_before_it_is_built(monkeypatch, arch, classes, said):
    for maker in ("ResNet", "VGG"):
        monkeypatch.setattr(models, maker, lambda *_: pytest.fail("it is being built"))
    with pytest.raises(models.ModelError) as refused:
        models.build(arch, classes)
    assert said in str(refused.value) and "at most" in str(refused.value)


@pytest.mark.parametrize("arch", ["resnet14", "resnet218", "resnet14_w8"])
def test_the_size_check_estimates_parameters_within_15_percent(monkeypatch, arch):
    counted = []
    monkeypatch.setattr(models, "_check_size", lambda _, parameters: counted.append(parameters))
    with torch.device("meta"):
        model = models.build(arch)
    assert counted == [pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.15)]


def test_an_unusable_architecture_gives_exit_status_2():
    assert models.ModelError.exit_status == 2


def test_initial_weights_are_the_same_on_every_machine_and_version():
    """If a digest changed, seed checkpoints from earlier versions could not be rebuilt."""
    digests = {}
    for init in models.CONV_INITS:
        model = drawn(conv_init=init)
        content = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        digests[init] = hashlib.sha256(content).hexdigest()[:16]
    assert digests == {
        "kaiming_normal": "cbaa0f8261937627",
        "kaiming_uniform": "a5c799a158f14fb0",
        "orthogonal": "d6e65fd8af1b2c87",
        "binary": "5243047b62fc3c67",
        "sparse": "d09651bc0502ef22",
    }


def test_each_tensor_is_drawn_from_its_own_stream():
    base = drawn()
    for other in (drawn(shortcut="projection_all"), drawn("resnet14"), drawn(bn_init="ones")):
        assert torch.equal(other.layer3[0].conv1.weight, base.layer3[0].conv1.weight)
    assert torch.equal(drawn(conv_init="binary").bn1.weight, base.bn1.weight)
    assert not torch.equal(drawn(seed=1).conv1.weight, base.conv1.weight)
    assert not torch.equal(base.layer1[0].conv1.weight, base.layer1[0].conv2.weight)


def test_streams_differ_by_seed_name_and_index():
    keys = [
        (0, "order", 0),
        (1, "order", 0),
        (0, "augment", 0),
        (0, "order", 1),
        (2**32, "order", 0),
        (2**64 - 1, "x", 0),
    ]
    assert len({models.stream(*key).randint(2**31) for key in keys}) == len(keys)


def test_he_initialisations_have_the_he_variance():
    conv = "layer3.0.conv2"
    for init in ("kaiming_normal", "kaiming_uniform", "binary"):
        weight = drawn("resnet14", conv_init=init).get_submodule(conv).weight
        assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert len(weight.unique()) == 2
    fc = drawn("resnet14_w8").fc
    assert fc.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.05)
    assert not fc.bias.any()


def test_sparse_filters_keep_the_given_number_of_weights_at_random_places():
    def kept(**inits) -> dict[str, torch.Tensor]:
        model = drawn(conv_init="sparse", **inits)
        return {n: m.weight.flatten(1) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}

    dense = {n: m.weight for n, m in drawn().named_modules() if isinstance(m, nn.Conv2d)}
    five, tenth, every = kept(nonzeros=5), kept(), kept(nonzeros=2**31)
    for name, weight in five.items():
        size = weight.shape[1]
        assert (weight.count_nonzero(1) == 5).all()
        assert (tenth[name].count_nonzero(1) == -(-size // 10)).all(), "a tenth, rounded up"
        assert torch.equal(every[name], dense[name].flatten(1)), "a filter with fewer weights keeps all"
        places = weight != 0
        torch.testing.assert_close(weight[places], every[name][places] * (size / 5) ** 0.5)
        assert len({tuple(row.nonzero().flatten().tolist()) for row in places}) > 1
        more = kept(nonzeros=6)[name] != 0
        assert (more & places).sum() == places.sum(), "other draws are not shifted by N"
    assert torch.equal(drawn(conv_init="sparse").fc.weight, drawn(conv_init="orthogonal").fc.weight)


def test_sparse_and_dense_convolutions_have_outputs_of_equal_variance():
    images = torch.randn(64, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    stds = []
    for inits in ({}, {"conv_init": "sparse", "nonzeros": 3}, {"conv_init": "sparse"}):
        conv = drawn("resnet14_w4", **inits).layer1[0].conv1
        stds.append(conv(images)[:, :, 1:-1, 1:-1].std().item())
    assert stds[1:] == pytest.approx(stds[:1] * 2, rel=0.1)


@pytest.mark.parametrize("shape", [(16, 27), (16, 144), (32, 16), (64, 33), (33, 33)])
def test_orthogonal_convolutions_are_orthogonal(shape):
    q = models._orthogonal(models.stream(0, "q"), shape)
    assert q.shape == shape
    gram = q @ q.T if q.shape[0] <= q.shape[1] else q.T @ q
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-12)


def test_batchnorm_initialisations():
    gammas = {init: drawn("resnet14_w8", bn_init=init).layer3[0].bn1 for init in models.BN_INITS}
    assert {init for init, bn in gammas.items() if bn.bias.eq(1).all()} == {"one_one"}
    assert all(bn.bias.eq(0).all() for init, bn in gammas.items() if init != "one_one")
    assert gammas["ones"].weight.eq(1).all() and gammas["one_one"].weight.eq(1).all()
    assert 0 <= gammas["uniform"].weight.min() < 0.02 and 0.98 < gammas["uniform"].weight.max() <= 1
    assert -1 <= gammas["signed_uniform"].weight.min() < -0.98
    assert gammas["he_normal"].weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.1)
    assert gammas["he_normal"].weight.abs().max() <= 2 * (2 / 512) ** 0.5 / 0.8796


def test_one_table_entry_adds_another_vgg(monkeypatch):
    monkeypatch.setitem(models.VGG_LAYERS, 9, (1, 1, 1, 1, 2))
    convolutions = [m for m in models.build("vgg9").modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64, 128, 256, 512, 512, 512]
    with pytest.raises(models.ModelError, match="vgg09 is not known"):
        models.build("vgg09")
