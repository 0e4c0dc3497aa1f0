"""A seed checkpoint is rebuilt bit for bit, or refused."""

import json

import pytest
import torch
from networks import MODES, SPEC, trained_for
from safetensors import safe_open
from safetensors.torch import load, save_file

import checkpoint
import evaluation
import freeze
import models
import progress


def rebuild(run, out, *more) -> int:
    """Run the command `checkpoint.py rebuild` and return its exit status."""
    command = ["rebuild", str(run), "--out", str(out), *more]
    return progress.run("checkpoint.py", lambda: checkpoint.main(command))


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """Return a folder with the seed checkpoint of a network trained for two steps."""
    model, spec = trained_for(2)
    folder = tmp_path_factory.mktemp("run")
    (folder / "model.safetensors").write_bytes(checkpoint.seed_checkpoint(model, spec, steps=2))
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_rebuild_restores_every_weight_bit_for_bit(tmp_path, mode):
    model, spec = trained_for(2, mode=mode)
    (tmp_path / "model.safetensors").write_bytes(checkpoint.seed_checkpoint(model, spec, steps=2))
    checkpoint.rebuild(tmp_path / "model.safetensors", tmp_path / "full.safetensors")
    expected = freeze.full_state(model)
    for source in (tmp_path, tmp_path / "full.safetensors"):
        restored, spec_again = checkpoint.restore(source)
        rebuilt = freeze.full_state(restored)
        assert rebuilt.keys() == expected.keys() and spec_again == spec
        assert all(torch.equal(rebuilt[name], expected[name]) for name in expected)
    with safe_open(tmp_path / "full.safetensors", "pt") as file:
        plain = models.build("resnet8").state_dict()  # a network as other programs build it
        assert set(file.keys()) == set(plain)


def test_a_sparse_network_is_rebuilt_from_nonzeros_in_its_spec(tmp_path):
    model, spec = trained_for(2, mode="beta", conv_init="sparse", nonzeros=4)
    (tmp_path / "model.safetensors").write_bytes(checkpoint.seed_checkpoint(model, spec, steps=2))
    restored, spec_again = checkpoint.restore(tmp_path)
    assert spec_again.nonzeros == 4 and (restored.conv1.weight.flatten(1).count_nonzero(1) == 4).all()
    for nonzeros in (5, None):
        file = altered(tmp_path, tmp_path / "altered.safetensors", spec={"nonzeros": nonzeros})
        with pytest.raises(checkpoint.CheckpointError, match="its seed gives different frozen weights"):
            checkpoint.restore(file)


@pytest.mark.parametrize("mode, ends", [("gamma", {"weight"}), ("beta", {"bias"})])
def test_gamma_and_beta_modes_store_only_their_part_and_the_statistics(mode, ends):
    model, spec = trained_for(1, mode=mode)
    names = [name.split(".") for name in load(checkpoint.seed_checkpoint(model, spec, steps=1))]
    assert {name[-1] for name in names} == ends | {"running_mean", "running_var"}
    assert {name[-2] for name in names} == {"bn1", "bn2", "1"}  # "1" is that of a shortcut


def test_the_same_network_gives_the_same_bytes(sealed, tmp_path):
    model, spec = trained_for(2)
    expected = (sealed / "model.safetensors").read_bytes()
    assert {checkpoint.seed_checkpoint(model, spec, steps=2) for _ in range(20)} == {expected}
    for name in "abcd":
        checkpoint.rebuild(sealed, tmp_path / name)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_rebuild_overwrites_only_if_asked_and_writes_to_no_run_folder(sealed, tmp_path, capsys):
    out = tmp_path / "full.safetensors"
    out.write_text("precious")
    assert rebuild(sealed, out) == 2 and out.read_text() == "precious"
    said = capsys.readouterr().err
    assert "--overwrite" in said and said.count("\n") == 1
    assert rebuild(sealed, out, "--overwrite") == 0 and checkpoint.restore(out)
    other, link = tmp_path / "other", tmp_path / "link"
    other.mkdir()
    (other / "metrics.jsonl").write_text("")
    link.symlink_to(sealed)
    before = {path: path.read_bytes() for path in sealed.iterdir()}
    for folder in (sealed, link, other, other / "below"):
        for name in ("model.safetensors", "config.json", "new.safetensors"):
            assert rebuild(sealed, folder / name, "--overwrite") == 2
            said = capsys.readouterr().err
            assert "is a run's folder" in said and said.count("\n") == 1
    assert before == {path: path.read_bytes() for path in sealed.iterdir()}
    assert len(list(other.iterdir())) == 1


def test_rebuilt_random_features_give_the_same_logits(tmp_path):
    model, spec = trained_for(2, mode="random")
    (tmp_path / "model.safetensors").write_bytes(checkpoint.seed_checkpoint(model, spec, steps=2))
    checkpoint.rebuild(tmp_path / "model.safetensors", tmp_path / "full.safetensors")
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    restored = checkpoint.restore(tmp_path / "full.safetensors")[0].to(memory_format=torch.channels_last)
    assert torch.equal(restored.eval()(images), model.eval()(images))


def test_the_checkpoint_of_resnet56_is_at_most_2_percent_of_its_weights():
    spec = SPEC.model_copy(update={"arch": "resnet56"})
    model = checkpoint.create(spec)
    size = len(checkpoint.seed_checkpoint(model, spec, steps=62_400))
    assert size <= 0.02 * freeze.full_bytes(model)


def altered(folder, out, *, spec=None, tensor=None, metadata=None):
    with safe_open(folder / "model.safetensors", "pt") as file:
        kept = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if spec:
        kept["spec"] = json.dumps(json.loads(kept["spec"]) | spec)
    kept |= metadata or {}
    if tensor:
        tensors[tensor] = tensors[tensor] + 1e-6
    save_file(tensors, out, kept)
    return out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"spec": {"seed": 4}}, "does not match: its seed gives different"),
        ({"spec": {"conv_init": "binary"}}, "does not match: its seed gives different"),
        ({"spec": {"arch": "resnet14"}}, "does not match"),
        ({"tensor": "layer1.0.bn1.weight"}, "it was altered"),
        ({"tensor": "layer1.0.bn1.running_mean"}, "it was altered"),
        ({"metadata": {"frozen_sha256": "0" * 64}}, "does not match"),
        ({"metadata": {"full_sha256": "0" * 64}}, "it was altered"),
        ({"metadata": {"steps": "3"}}, "it was altered"),
        ({"metadata": {"spec": "{}"}}, "not a checkpoint of train.py"),
        ({"metadata": {"spec": "["}}, "not a checkpoint of train.py"),
        ({"metadata": {"spec": "[" * 100_000}}, "not a checkpoint of train.py"),
        ({"spec": {"arch": "resnet9"}}, "is not known"),
        ({"spec": {"mode": "bm"}}, "is not known"),
        ({"spec": {"conv_init": "x"}}, "initialisation x is not known"),
        ({"spec": {"seed": "1"}}, "not a checkpoint of train.py"),
        ({"spec": {"seed": -1}}, "not a checkpoint of train.py (its spec: seed: "),
        ({"spec": {"dtype": "x", "batch_size": 0}}, "not a checkpoint of train.py (its spec: batch_size: "),
        ({"spec": {"dtype": "x"}}, "not a checkpoint of train.py (its spec: dtype: "),
        (
            {"spec": {"mean": ["a"], "classes": [1], "image_size": 10**9}},
            "not a checkpoint of train.py (its spec: image_size: ",
        ),
        ({"spec": {"mean": ["a"] * 3}}, "not a checkpoint of train.py (its spec: mean.0: "),
        ({"spec": {"mean": [1.0]}}, "not a checkpoint of train.py (its spec: mean.1: "),
        ({"spec": {"classes": [1]}}, "not a checkpoint of train.py (its spec: classes.0: "),
        ({"spec": {"classes": []}}, "not a checkpoint of train.py (its spec: classes: "),
        ({"spec": {"arch": "resnet44_w9999999999"}}, "too large"),
        ({"spec": {"arch": "resnet9998_w1000"}}, "too large: about 1.6e+14 parameters"),
        ({"spec": {"arch": "resnet" + "9" * 5000}}, "is not known"),
        ({"metadata": {"steps": "9" * 30}}, "out of range"),
    ],
)
def test_a_checkpoint_that_does_not_match_is_refused(sealed, tmp_path, capsys, change, message):
    file = altered(sealed, tmp_path / "altered.safetensors", **change)
    assert rebuild(file, tmp_path / "full.safetensors") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") <= 2
    assert not (tmp_path / "full.safetensors").exists()


@pytest.mark.parametrize(
    "name", ["layer1.0.bn1.running_var", "layer1.0.bn1.running_mean", "bn1.weight", "bn1.bias"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_is_not_finite_is_refused_although_its_digests_match(tmp_path, capsys, name, value):
    model, spec = trained_for(1)
    model.state_dict()[name][3] = value
    (tmp_path / "model.safetensors").write_bytes(checkpoint.seed_checkpoint(model, spec, steps=1))
    assert progress.run("evaluation.py", lambda: evaluation.main([str(tmp_path)])) == 2
    said = capsys.readouterr()
    assert f"this network has infinite or NaN values ({name})" in said.err
    assert said.err.count("\n") == 1 and not said.out


def test_unusable_files_are_refused_in_at_most_two_lines(tmp_path, capsys):
    (tmp_path / "rubbish.safetensors").write_bytes(b"\xff" * 100)
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "empty").mkdir()
    for name in ("rubbish.safetensors", "foreign.safetensors", "empty", "absent", "absent.safetensors"):
        assert rebuild(tmp_path / name, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") <= 2 and "Traceback" not in error


def test_init_from_freezes_the_given_weights(tmp_path):
    given = models.build("resnet8")
    models.initialise(given, seed=99)
    torch.save(given.state_dict(), tmp_path / "given.pt")
    model, spec = trained_for(1, init_from=str(tmp_path / "given.pt"))
    assert torch.equal(model.conv1.weight, given.conv1.weight)
    (tmp_path / "model.safetensors").write_bytes(checkpoint.seed_checkpoint(model, spec, steps=1))
    (tmp_path / "given.pt").rename(tmp_path / "moved.pt")
    with pytest.raises(checkpoint.CheckpointError, match="no such file"):
        checkpoint.restore(tmp_path)
    checkpoint.restore(tmp_path, init_from=str(tmp_path / "moved.pt"))
    models.initialise(given, seed=100)
    torch.save(given.state_dict(), tmp_path / "moved.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"moved\.pt has changed"):
        checkpoint.restore(tmp_path, init_from=str(tmp_path / "moved.pt"))


def test_tensors_of_another_network_are_refused_before_weights_are_drawn(sealed, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "create", lambda spec: pytest.fail("it was drawn"))
    for arch in ("resnet8_w2", "resnet14", "resnet14_w40"):
        file = altered(sealed, tmp_path / "altered.safetensors", spec={"arch": arch})
        with pytest.raises(checkpoint.CheckpointError, match="missing or has another shape"):
            checkpoint.restore(file)
