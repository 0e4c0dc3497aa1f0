"""Each mode trains exactly the parameters that it names, and the table counts them."""

import pytest
import torch
from networks import MODES, frozen, trained_for

import config
import freeze
import models
import progress
from step import Step


@pytest.mark.parametrize(
    "mode, spelling",
    [
        ("bn", "bn_only"),
        ("bn_only", "bn_only"),
        ("output+bn", "bn+output"),
        ("bn_only+output", "bn+output"),
        ("bn_main+bn", "bn_only"),
        ("gamma", "gamma"),
        ("gamma+beta", "bn_only"),
        ("output+beta+bn_main+gamma", "bn+output"),
        ("beta+bn", "bn_only"),
        ("bn_main+gamma", "gamma+bn_main"),
        ("shortcut+conv", "conv"),
        ("all", "all"),
    ],
)
def test_modes_are_normalised_to_one_spelling(mode, spelling):
    assert freeze.canonical_mode(mode) == spelling


@pytest.mark.parametrize("mode", ["", "bm", "bn+", "BN"])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(freeze.ModeError, match="is not known; choose"):
        freeze.canonical_mode(mode)


@pytest.mark.parametrize("mode", ["all+bn", "random+bn", "bn+none"])
def test_all_none_and_random_cannot_be_joined_with_parts(mode):
    with pytest.raises(freeze.ModeError, match=r"'(all|none|random)' cannot be joined with others; choose"):
        freeze.canonical_mode(mode)


@pytest.mark.parametrize(
    "shortcut, trained", [("projection", 1_120), ("projection_all", 1_152), ("pad", 928)]
)
def test_bn_only_and_random_train_equally_many_parameters(shortcut, trained):
    for mode in ("bn_only", "random"):
        model = frozen(mode, "resnet14", shortcut=shortcut)
        assert freeze.count(model) == (
            sum(p.numel() for p in models.build("resnet14", 10, shortcut).parameters()),
            trained,
        )


PUBLISHED = {  # total, BatchNorm (projection); total, BatchNorm outside shortcuts (projection_all)
    14: ((175_258, 1_120), (175_546, 928)),
    32: ((466_906, 2_464), (467_194, 2_272)),
    56: ((855_770, 4_256), (856_058, 4_064)),
    110: ((1_730_714, 8_288), (1_731_002, 8_096)),
    218: ((3_480_602, 16_352), (3_480_890, 16_160)),
    434: ((6_980_378, 32_480), (6_980_666, 32_288)),
    866: ((13_979_930, 64_736), (13_980_218, 64_544)),
}


@pytest.mark.parametrize("depth", PUBLISHED)
def test_batchnorm_has_the_published_parameter_counts(depth):
    def counts(mode: str, shortcut: str) -> tuple[int, int]:
        with torch.device("meta"):
            model = models.build(f"resnet{depth}", 10, shortcut)
        freeze.freeze(model, mode)
        return freeze.count(model)

    preset = config.defaults("001")
    assert (counts("bn", "projection"), counts(preset.mode, preset.shortcut)) == PUBLISHED[depth]
    assert counts("gamma", "projection") == counts("beta", "projection")
    assert 2 * counts("gamma", "projection")[1] == counts("bn", "projection")[1]


def test_modes_train_the_parameters_they_name():
    def trained(mode: str) -> set[str]:
        model = frozen(mode)
        return {name for name, p in model.named_parameters() if p.requires_grad}

    every = trained("all")
    assert trained("none") == set()
    assert trained("output") == {"fc.weight", "fc.bias"}
    assert trained("shortcut") == {"layer2.0.downsample.0.weight", "layer3.0.downsample.0.weight"}
    assert trained("bn") - trained("bn_main") == {
        f"layer{i}.0.downsample.1.{name}" for i in (2, 3) for name in ("weight", "bias")
    }
    assert trained("bn") | trained("conv") | trained("output") == every
    assert trained("gamma") == {name for name in trained("bn") if name.endswith(".weight")}
    assert trained("beta") == trained("bn") - trained("gamma") == trained("gamma+beta") - trained("gamma")
    assert trained("beta+shortcut") == trained("beta") | trained("shortcut")
    assert trained("bn+output") == trained("bn") | trained("output")
    assert all(name.endswith(".values") for name in trained("random")) and len(trained("random")) == 9


def test_a_part_that_the_network_lacks_is_refused():
    with pytest.raises(freeze.ModeError, match="no parameters in its shortcut"):
        frozen("shortcut", shortcut="pad")


def test_random_features_are_k_different_places_in_every_filter():
    model = frozen("random", seed=3, per_channel=3)
    for module in model.modules():
        if isinstance(module, models.Conv2d):
            assert module.places.shape == (len(module.weight), 3)
            assert all(len(set(row)) == 3 for row in module.places.tolist())
            assert module.places.max() < module.weight[0].numel()
    other = frozen("random", seed=4, per_channel=3)
    assert not torch.equal(other.conv1.places, model.conv1.places)
    for too_many in (17, 28):  # 28 are too many for the first convolution, too, whose filters have 27
        with pytest.raises(freeze.ModeError, match="must be from 1 to 16, the weights of a filter"):
            frozen("random", per_channel=too_many)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_weights_are_bitwise_the_same_after_training(mode):
    before, (after, _) = frozen(mode, seed=3), trained_for(3, mode=mode)
    assert freeze.frozen_sha256(after) == freeze.frozen_sha256(before)
    for (name, was), now in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(was, now) != was.requires_grad, name
    for (name, was), now in zip(before.named_buffers(), after.buffers(), strict=True):
        if name.endswith(("running_mean", "running_var")):  # these change in every mode
            assert not torch.equal(was, now), name


def test_random_mode_changes_only_the_chosen_weights():
    before, after = frozen("random", seed=3), trained_for(3, mode="random")[0]
    for was, now in zip(before.modules(), after.modules(), strict=True):
        if isinstance(was, models.Conv2d):
            same = (was.effective_weight() == now.effective_weight()).flatten(1)
            chosen = torch.zeros_like(same).scatter(1, was.places, True)
            assert same[~chosen].all() and not same[chosen].any()


def test_the_optimiser_holds_only_the_trained_parameters():
    model, _ = trained_for(1)
    step = Step(model)
    assert (
        sum(p.numel() for group in step.optimizer.param_groups for p in group["params"])
        == freeze.count(model)[1]
    )


def test_table_prints_the_counts(capsys):
    def table(*archs: str) -> int:
        return progress.run("freeze.py", lambda: freeze.main(["table", "--arch", *archs]))

    assert table("resnet56", "vgg16") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][2:8] == ["total", "bn", "bn/total", "gamma", "beta", "bn_main"]
    first, second, third, *others = [[word for word in line if word != "%"] for line in lines[1:]]
    assert first[:8] == ["resnet56", "projection", "855,770", "4,256", "0.50", "2,128", "2,128", "4,064"]
    assert second[:4] == ["resnet56", "projection_all", "856,058", "4,288"]
    assert second[7:9] == ["4,064", "0.47"]
    assert third[:3] == ["resnet56", "pad", "853,018"] and others[0][0] == "vgg16"
    assert table("resnet57") == 2


def test_the_table_lists_every_family():
    listed = {"resnet14", "resnet866", "resnet14_w32", "vgg19"}
    listed |= {f"resnet{depth}" for depth in (18, 34, 50, 101, 152, 200)}
    assert listed <= set(freeze.TABLE_ARCHS)
