"""Other weights load by torchvision's names; files that do not fit, or would run code, are refused."""

import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
import models


def torchvision_like(classes: int = 10) -> dict:
    """Return a state dict for ResNet-18 with torchvision's names and random values."""
    generator = torch.Generator().manual_seed(0)
    state = models.build("resnet18", classes).state_dict()
    return {
        n: torch.rand(t.shape, generator=generator) if t.is_floating_point() else t for n, t in state.items()
    }


def load(model, path) -> list[str]:
    return checkpoint.load_weights(model, checkpoint.read_initial(path), path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_load_by_torchvisions_names(tmp_path, suffix):
    state, path = torchvision_like(), tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = models.build("resnet18")
    assert load(model, path) == []
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_the_output_layer_keeps_its_draw_if_class_counts_differ(tmp_path):
    torch.save(torchvision_like(classes=1000), tmp_path / "w.pth")
    model = models.build("resnet18")
    models.initialise(model, seed=0)
    before = model.fc.weight.clone()
    assert load(model, tmp_path / "w.pth") == ["fc.weight", "fc.bias"]
    assert torch.equal(model.fc.weight, before)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    state = torchvision_like()
    state["layer1.0.bn1.running_var"][2] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"w\.pth: this network has infinite or NaN values \(layer1\.0\.bn1"
    ):
        load(models.build("resnet18"), tmp_path / "w.pth")


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    state = torchvision_like()
    state["layer1.0.conv9.weight"] = state.pop("layer1.0.conv1.weight")
    state["bn1.weight"] = torch.zeros(65)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(checkpoint.CheckpointError) as refusal:
        load(models.build("resnet18"), tmp_path / "w.pth")
    for text in (
        "layer1.0.conv1.weight (missing)",
        "layer1.0.conv9.weight (not in",
        "bn1.weight ([65], needs [64])",
    ):
        assert text in str(refusal.value)


class Trap:
    sprung = False

    def __reduce__(self):
        return (setattr, (Trap, "sprung", True))


@pytest.mark.parametrize("content", ["code", "text", "tensor", "nothing", "empty"])
def test_a_file_that_is_no_state_dict_is_refused_and_runs_no_code(tmp_path, content):
    path = tmp_path / "w.pt"
    if content == "code":
        torch.save({"conv1.weight": Trap()}, path)
    elif content == "text":
        path.write_text("not a checkpoint")
    elif content == "empty":
        path.touch()
    elif content == "tensor":
        torch.save(torch.zeros(3), path)
    with pytest.raises(checkpoint.CheckpointError, match=r"w\.pt"):
        load(models.build("resnet8"), path)
    assert not Trap.sprung


def test_a_file_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(checkpoint.CheckpointError, match=r"w\.pt: .*would unpack to more than its own size"):
        load(models.build("resnet8"), tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_named_pipe_is_refused_without_waiting_for_it(tmp_path, suffix):
    os.mkfifo(tmp_path / f"w{suffix}")
    with pytest.raises(checkpoint.CheckpointError, match=f"w{suffix}"):
        checkpoint.read_initial(tmp_path / f"w{suffix}")


@pytest.mark.parametrize("kind", ["nested", "whole numbers", "complex"])
def test_tensors_that_are_not_plain_floating_point_are_refused(tmp_path, kind):
    state = torchvision_like()
    gamma = state["bn1.weight"]
    nested = torch.nested.nested_tensor([gamma, gamma])
    made = {"nested": nested, "whole numbers": gamma.long(), "complex": gamma.to(torch.complex64)}
    torch.save(state | {"bn1.weight": made[kind]}, tmp_path / "w.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"bn1\.weight|not a state dict"):
        load(models.build("resnet18"), tmp_path / "w.pt")


def test_the_refusal_of_code_does_not_say_how_to_run_it(tmp_path):
    torch.save({"conv1.weight": Trap()}, tmp_path / "w.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"Unsupported global: GLOBAL .*setattr") as refused:
        load(models.build("resnet8"), tmp_path / "w.pt")
    assert "weights_only" not in str(refused.value) and str(refused.value).count("\n") == 1
