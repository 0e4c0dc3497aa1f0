"""Tests of --init-from: what a run takes from its parent run, and what it records about it."""

import re
import shutil
from pathlib import Path

import torch
from small_runs import config, exit_status, only_run, summary

import checkpoint
import data
import freeze


def test_a_run_starts_from_its_parent_run_and_is_restored_from_both(small, tmp_path, monkeypatch, capsys):
    assert exit_status([*small, "--mode", "all", "--seed", "3", "--out", "first"]) == 0
    parent = only_run(Path("first"))
    trained = freeze.full_state(checkpoint.restore(parent)[0])
    template = str(parent).replace("-s3-", "-s{seed}-")
    for more in ([], ["--reset-bn"]):
        assert exit_status([*small, "--seed", "3", "--init-from", template, *more]) == 0
    folders = sorted(Path("runs").iterdir(), key=lambda folder: config(folder).options.reset_bn)
    for folder, kept in zip(folders, (True, False), strict=True):
        described = config(folder)
        assert described.options.init_from == template and described.spec.init_from == str(parent)
        of = described.parent
        assert (of.run, of.mode, of.epochs, of.seed) == (parent.name, "all", 3, 3)
        assert of.test_acc == summary(parent)["final_test_acc"] and of.seconds_in_all > 0
        assert of.variant == {"batch_size": 32}, "1 and 2 of 3 epochs are half and three quarters"
        state = freeze.full_state(checkpoint.create(described.spec))
        for name, tensor in trained.items():
            same = torch.equal(state[name], tensor)
            statistics_or_gamma = re.search(r"bn\d|downsample\.1", name) and "num_batches" not in name
            assert same == (kept or not statistics_or_gamma) or "num_batches" in name, name
        checkpoint.restore(folder)  # from its parent run; verifies every bit
    first_of_two = ["--seed", "3", "--init-from", str(folders[0] / "model.safetensors"), "--out", "third"]
    assert exit_status([*small, *first_of_two]) == 0
    third = only_run(Path("third"))
    checkpoint.restore(third)
    of = config(third).parent
    assert (of.run, of.epochs, of.epochs_in_all, of.epochs_done_in_all) == (folders[0].name, 3, 6, 6)
    monkeypatch.chdir(tmp_path.parent)
    checkpoint.restore(tmp_path / folders[0], init_from=str(tmp_path / parent))
    for folder in (parent, *folders, third):  # as if all were moved
        shutil.copytree(tmp_path / folder, tmp_path / "moved" / folder.name, dirs_exist_ok=True)
    checkpoint.restore(tmp_path / "moved" / third.name)
    monkeypatch.chdir(tmp_path)
    assert exit_status([*small, "--arch", "resnet14", "--init-from", str(parent)]) == 2
    assert "layer1.1.conv1.weight (missing)" in capsys.readouterr().err
    (parent / "model.safetensors").unlink()
    assert exit_status([*small, "--init-from", str(parent)]) == 2
    assert "a run writes it when it is done" in capsys.readouterr().err


def test_the_epochs_are_counted_on_from_the_parent_run(small, monkeypatch):
    """A batch depends on the epoch's number, so the batches are those of the later epochs of one long run."""
    seen, start = [], data._ResidentLoader.start

    def noted(loader, epoch):
        seen.extend([epoch] if loader.train else [])
        start(loader, epoch)

    assert exit_status([*small, "--mode", "all"]) == 0
    parent = only_run()
    monkeypatch.setattr(data._ResidentLoader, "start", noted)
    assert exit_status([*small, "--init-from", str(parent), "--out", "more"]) == 0
    assert seen == [3, 4, 5]


def test_validating_on_the_parents_training_images_gives_a_note(small, capsys):
    for split in ("0", "16"):
        assert exit_status([*small, "--mode", "all", "--val-split", split, "--out", f"first{split}"]) == 0
        parent = str(only_run(Path(f"first{split}")))
        for seed in ("0", "1"):
            more = ["--seed", seed, "--val-split", "16", "--out", f"then{split}"]
            assert exit_status([*small, "--init-from", parent, *more]) == 0
            said = "trained on images that are for validation here" in capsys.readouterr().err
            assert said == ((split, seed) != ("16", "0"))
