"""Modes train what they say and nothing else; a seed checkpoint gives every weight back, or is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import freeze
import models
from step import Step

RECIPE = {
    "arch": "resnet8",
    "mode": "bn_only",
    "seed": 3,
    "shortcut": "projection",
    "conv_init": "kaiming_normal",
    "bn_init": "uniform",
    "per_channel": 2,
    "init_from": None,
    "reset_bn": False,
    "classes": list("abcdefghij"),
    "data": "synthetic",
    "fingerprint": "0" * 16,
    "image_size": 32,
    "mean": [120.0] * 3,
    "std": [60.0] * 3,
    "dtype": "fp32",
    "device": "cpu",
    "batch_size": 8,
    "compile": False,
}
MODES = ("all", "none", "random", "bn_only", "bn_main", "shortcut", "output", "conv", "bn+output+shortcut")


def trained_for(steps: int, **changes) -> tuple[torch.nn.Module, dict]:
    """A network after a few steps on noise, with momentum and a weight decay that would show."""
    recipe = RECIPE | changes
    model = freeze.create(recipe).to(memory_format=torch.channels_last)
    step, generator = Step(model, weight_decay=0.1), torch.Generator().manual_seed(0)
    for _ in range(steps):
        images = torch.randn(8, 3, 16, 16, generator=generator).to(memory_format=torch.channels_last)
        step(images, torch.randint(10, (8,), generator=generator), lr=0.1)
    return model, recipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model, recipe = trained_for(2)
    folder = tmp_path_factory.mktemp("run")
    (folder / "model.safetensors").write_bytes(freeze.seed_checkpoint(model, recipe, steps=2))
    return folder, model


@pytest.mark.parametrize(
    "mode, spelling",
    [
        ("bn", "bn_only"),
        ("bn_only", "bn_only"),
        ("output+bn", "bn+output"),
        ("bn_only+output", "bn+output"),
        ("bn_main+bn", "bn_only"),
        ("shortcut+conv", "conv"),
        ("all", "all"),
    ],
)
def test_a_mode_has_one_spelling(mode, spelling):
    assert freeze.canonical_mode(mode) == spelling


@pytest.mark.parametrize("mode", ["", "bm", "bn+", "all+bn", "random+bn", "BN"])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(freeze.FreezeError, match="is not known; choose"):
        freeze.canonical_mode(mode)


@pytest.mark.parametrize(
    "shortcut, trained", [("projection", 1_120), ("projection_all", 1_152), ("pad", 928)]
)
def test_bn_only_and_random_train_equally_many_parameters(shortcut, trained):
    for mode in ("bn_only", "random"):
        model = freeze.create(RECIPE | {"arch": "resnet14", "shortcut": shortcut, "mode": mode})
        assert freeze.count(model) == (
            sum(p.numel() for p in models.build("resnet14", 10, shortcut).parameters()),
            trained,
        )


def test_modes_train_the_parameters_they_name():
    def trained(mode: str) -> set[str]:
        model = freeze.create(RECIPE | {"mode": mode})
        return {name for name, p in model.named_parameters() if p.requires_grad}

    every = trained("all")
    assert trained("none") == set()
    assert trained("output") == {"fc.weight", "fc.bias"}
    assert trained("shortcut") == {"layer2.0.downsample.0.weight", "layer3.0.downsample.0.weight"}
    assert trained("bn") - trained("bn_main") == {
        f"layer{i}.0.downsample.1.{name}" for i in (2, 3) for name in ("weight", "bias")
    }
    assert trained("bn") | trained("conv") | trained("output") == every
    assert trained("bn+output") == trained("bn") | trained("output")
    assert all(name.endswith(".values") for name in trained("random")) and len(trained("random")) == 9


def test_a_part_that_the_network_lacks_is_refused():
    with pytest.raises(freeze.FreezeError, match="no parameters in its shortcut"):
        freeze.create(RECIPE | {"mode": "shortcut", "shortcut": "pad"})


def test_random_features_are_k_different_places_in_every_filter():
    model = freeze.create(RECIPE | {"mode": "random", "per_channel": 3})
    for module in model.modules():
        if isinstance(module, models.Conv2d):
            assert module.places.shape == (len(module.weight), 3)
            assert all(len(set(row)) == 3 for row in module.places.tolist())
            assert module.places.max() < module.weight[0].numel()
    other = freeze.create(RECIPE | {"mode": "random", "per_channel": 3, "seed": 4})
    assert not torch.equal(other.conv1.places, model.conv1.places)
    with pytest.raises(freeze.FreezeError, match="filters of 1 to 16 weights"):
        freeze.create(RECIPE | {"mode": "random", "per_channel": 17})


@pytest.mark.parametrize("mode", MODES)
def test_frozen_weights_are_bitwise_the_same_after_training(mode):
    before, (after, _) = freeze.create(RECIPE | {"mode": mode}), trained_for(3, mode=mode)
    assert freeze.frozen_sha256(after) == freeze.frozen_sha256(before)
    for (name, was), now in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(was, now) != was.requires_grad, name
    for (name, was), now in zip(before.named_buffers(), after.buffers(), strict=True):
        if name.endswith(("running_mean", "running_var")):  # whatever trains, they follow the data
            assert not torch.equal(was, now), name


def test_random_mode_changes_the_chosen_places_alone():
    before, after = freeze.create(RECIPE | {"mode": "random"}), trained_for(3, mode="random")[0]
    for was, now in zip(before.modules(), after.modules(), strict=True):
        if isinstance(was, models.Conv2d):
            same = (was.effective_weight() == now.effective_weight()).flatten(1)
            chosen = torch.zeros_like(same).scatter(1, was.places, True)
            assert same[~chosen].all() and not same[chosen].any()


def test_the_optimiser_holds_the_trained_tensors_only():
    model, _ = trained_for(1)
    step = Step(model)
    assert (
        sum(p.numel() for group in step.optimizer.param_groups for p in group["params"])
        == freeze.count(model)[1]
    )


@pytest.mark.parametrize("mode", MODES)
def test_rebuild_gives_every_weight_back_bit_for_bit(tmp_path, mode):
    model, recipe = trained_for(2, mode=mode)
    (tmp_path / "model.safetensors").write_bytes(freeze.seed_checkpoint(model, recipe, steps=2))
    freeze.rebuild(tmp_path, tmp_path / "full.safetensors")
    expected = freeze.full_state(model)
    for source in (tmp_path, tmp_path / "full.safetensors"):
        rebuilt = freeze.full_state(freeze.restore(source)[0])
        assert rebuilt.keys() == expected.keys()
        assert all(torch.equal(rebuilt[name], expected[name]) for name in expected)
    with safe_open(tmp_path / "full.safetensors", "pt") as file:
        plain = models.build("resnet8").state_dict()  # a plain network, as other programs would build it
        assert set(file.keys()) == set(plain)


def test_rebuilt_random_features_give_the_same_logits(tmp_path):
    model, recipe = trained_for(2, mode="random")
    (tmp_path / "model.safetensors").write_bytes(freeze.seed_checkpoint(model, recipe, steps=2))
    freeze.rebuild(tmp_path, tmp_path / "full.safetensors")
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    restored = freeze.restore(tmp_path / "full.safetensors")[0].to(memory_format=torch.channels_last)
    assert torch.equal(restored.eval()(images), model.eval()(images))


def test_the_checkpoint_of_resnet56_is_at_most_2_percent_of_its_weights():
    model = freeze.create(RECIPE | {"arch": "resnet56"})
    size = len(freeze.seed_checkpoint(model, RECIPE | {"arch": "resnet56"}, steps=62_400))
    assert size <= 0.02 * freeze.full_bytes(model)


def altered(folder, out, *, recipe=None, tensor=None, metadata=None):
    with safe_open(folder / "model.safetensors", "pt") as file:
        kept = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if recipe:
        kept["recipe"] = json.dumps(json.loads(kept["recipe"]) | recipe)
    kept |= metadata or {}
    if tensor:
        tensors[tensor] = tensors[tensor] + 1e-6
    save_file(tensors, out, kept)
    return out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"recipe": {"seed": 4}}, "does not match: its seed gives other"),
        ({"recipe": {"conv_init": "binary"}}, "does not match: its seed gives other"),
        ({"recipe": {"arch": "resnet14"}}, "does not match"),
        ({"tensor": "layer1.0.bn1.weight"}, "it was altered"),
        ({"tensor": "layer1.0.bn1.running_mean"}, "it was altered"),
        ({"metadata": {"frozen_sha256": "0" * 64}}, "does not match"),
        ({"metadata": {"full_sha256": "0" * 64}}, "it was altered"),
        ({"metadata": {"steps": "3"}}, "it was altered"),
        ({"metadata": {"recipe": "{}"}}, "no checkpoint of train.py"),
        ({"metadata": {"recipe": "["}}, "no checkpoint of train.py"),
        ({"recipe": {"arch": "resnet9"}}, "is not known"),
        ({"recipe": {"conv_init": "x"}}, "initialisation x is not known"),
        ({"recipe": {"seed": "1"}}, "no checkpoint of train.py"),
        ({"recipe": {"seed": -1}}, "unusable: seed"),
        ({"recipe": {"dtype": "x", "batch_size": 0}}, "unusable: batch_size, dtype"),
        (
            {"recipe": {"mean": ["a"], "classes": [1], "image_size": 10**9}},
            "unusable: classes, image_size, mean",
        ),
        ({"recipe": {"arch": "resnet44_w9999999999"}}, "too large"),
        ({"metadata": {"steps": "9" * 30}}, "out of range"),
    ],
)
def test_a_checkpoint_that_does_not_match_is_refused(checkpoint, tmp_path, capsys, change, message):
    file = altered(checkpoint[0], tmp_path / "altered.safetensors", **change)
    assert freeze.main(["rebuild", str(file), "--out", str(tmp_path / "full.safetensors")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "full.safetensors").exists()


def test_rubbish_is_refused_in_a_line_or_two(tmp_path, capsys):
    (tmp_path / "rubbish.safetensors").write_bytes(b"\xff" * 100)
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "empty").mkdir()
    for name in ("rubbish.safetensors", "foreign.safetensors", "empty", "absent", "absent.safetensors"):
        assert freeze.main(["rebuild", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") <= 2 and "Traceback" not in error


def test_table_prints_the_counts(capsys):
    assert freeze.main(["table", "--arch", "resnet56", "vgg16"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1][:7] == ["resnet56", "projection", "855,770", "4,256", "0.50", "%", "4,064"]
    assert lines[2][:7] == ["resnet56", "projection_all", "856,058", "4,288", "0.50", "%", "4,064"]
    assert lines[3][:3] == ["resnet56", "pad", "853,018"] and lines[4][0] == "vgg16"
    assert freeze.main(["table", "--arch", "resnet57"]) == 2


def test_init_from_freezes_the_given_weights(tmp_path):
    given = models.build("resnet8")
    models.initialise(given, seed=99)
    torch.save(given.state_dict(), tmp_path / "given.pt")
    model, recipe = trained_for(1, init_from=str(tmp_path / "given.pt"))
    assert torch.equal(model.conv1.weight, given.conv1.weight)
    (tmp_path / "model.safetensors").write_bytes(freeze.seed_checkpoint(model, recipe, steps=1))
    (tmp_path / "given.pt").rename(tmp_path / "moved.pt")
    with pytest.raises(models.ModelError, match="no such file"):
        freeze.restore(tmp_path)
    freeze.restore(tmp_path, init_from=str(tmp_path / "moved.pt"))
    models.initialise(given, seed=100)
    torch.save(given.state_dict(), tmp_path / "moved.pt")
    with pytest.raises(freeze.FreezeError, match=r"moved\.pt has changed"):
        freeze.restore(tmp_path, init_from=str(tmp_path / "moved.pt"))
