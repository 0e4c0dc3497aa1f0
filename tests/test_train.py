"""Tests of train.py's command line: modes, the files of a run, validation, presets, output and trackers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import change_set, write_images
from networks import frozen
from PIL import Image
from small_runs import ROOT, cli, config, exit_status, metrics, only_run, summary

import checkpoint
import data
import evaluation
import freeze
import models
import runs
from config import PRESETS, parse_options

MODES = ("all", "none", "random", "bn_only", "bn_main", "shortcut", "output", "conv", "bn+output")
MODES += ("gamma", "beta")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_runs(small, mode, capsys):
    (options,), _ = parse_options([*small, "--mode", mode], "")
    before = frozen(mode, seed=0, classes=tuple("abcd"))
    if mode == "bn_only":  # in a process of its own
        ended = cli([*small, "--mode", mode])
        status, said = ended.returncode, ended.stdout
    else:
        status, said = exit_status([*small, "--mode", mode]), capsys.readouterr().out
    assert status == 0
    folder = only_run()
    assert folder.name == runs.run_name(options, "tiny") and folder.name.startswith(
        f"tiny-resnet8-{freeze.canonical_mode(mode)}-s0-"
    )
    result = summary(folder)
    assert result["status"] == "done" and result["params_trained"] == freeze.count(before)[1]
    after, _ = checkpoint.restore(folder)
    assert result["frozen_sha256"] == freeze.frozen_sha256(before) == freeze.frozen_sha256(after)
    assert len(re.findall(r"^\[tiny\] epoch \d/3  lr ", said, re.MULTILINE)) == 3


def test_a_done_run_leaves_the_documented_files_and_fields(small):
    assert exit_status(small) == 0
    folder = only_run()
    assert {entry.name for entry in folder.iterdir()} == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "summary.json",
    }
    keys = {"epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "epoch_s", "images_per_s"}
    rows = metrics(folder)
    assert [set(row) for row in rows] == [keys] * 3
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.01, 0.001])
    result = summary(folder)
    assert {"status", "params_total", "params_trained", "final_test_acc", "best_test_acc", "train_s"} <= set(
        result
    )
    assert result["wall_s"] > result["startup_s"] + result["train_s"] > 0, "all of it counts"
    assert {"startup_s", "peak_memory_bytes", "checkpoint_bytes", "full_bytes", "arch", "mode"} <= set(result)
    assert {"data", "seed", "variant"} <= set(result)
    assert result["final_test_acc"] == rows[-1]["test_acc"] <= result["best_test_acc"]
    assert result["train_s"] == pytest.approx(sum(row["epoch_s"] for row in rows))
    assert result["checkpoint_bytes"] == (folder / "model.safetensors").stat().st_size
    described = json.loads((folder / "config.json").read_text())
    assert described["options"]["lr"] == 0.1 and described["spec"]["dtype"] in ("fp32", "bf16")
    assert described["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert re.fullmatch("[0-9a-f]{16}", described["spec"]["fingerprint"]) and described["device_name"]


def test_evaluation_reproduces_the_final_accuracy(small, capsys):
    assert exit_status(small) == 0
    folder, images = only_run(), small[small.index("--data") + 1]
    assert exit_status(["rebuild", str(folder), "--out", "full.safetensors"], checkpoint) == 0
    rebuilt = ["full.safetensors", "--data", images]
    for source in ([str(folder)], [str(folder / "model.safetensors")], rebuilt):
        capsys.readouterr()
        assert exit_status([*source, "--device", "cpu"], evaluation) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{summary(folder)['final_test_acc']:.2f} % test accuracy")
        assert f"loss {metrics(folder)[-1]['test_loss']:.4f}" in said


def test_eval_every_skips_evaluations_but_not_the_last(small):
    assert exit_status([*small, "--eval-every", "2"]) == 0
    assert [row["test_acc"] is None for row in metrics(only_run())] == [True, False, False]


def test_early_stopping_and_the_chosen_epoch_use_validation_images(small):
    options = ["--mode", "all", "--epochs", "12", "--early-stop", "2", "--val-split", "16"]
    assert exit_status([*small, *options]) == 0
    rows, result = metrics(only_run()), summary(only_run())
    spec = config(only_run()).spec
    assert (spec.train_images, spec.val_images) == (80, 16)
    accs = [row["val_acc"] for row in rows]
    assert len(rows) < 12, "it does not rise for ever on four classes of 24 images"
    assert max(accs[-2:]) <= max(accs[:-2]) == accs[-3] and rows[-1]["test_acc"] is not None
    assert result["status"] == "done" and result["why"] == "no better validation accuracy for 2 epochs"
    assert result["epochs_done"] == len(rows) and result["final_test_acc"] == rows[-1]["test_acc"]
    chosen = rows[accs.index(max(accs))]
    assert result["best_val_acc"] == chosen["val_acc"] == max(accs)
    assert (result["chosen_epoch"], result["chosen_test_acc"]) == (chosen["epoch"], chosen["test_acc"])
    assert exit_status([*small, *options, "--resume"]) == 0
    assert metrics(only_run()) == rows
    checkpoint.restore(only_run())


def test_epochs_with_a_new_best_validation_accuracy_are_always_tested(small):
    options = ["--mode", "all", "--epochs", "7", "--val-split", "16", "--eval-every", "7"]
    assert exit_status([*small, *options]) == 0
    rows, result = metrics(only_run()), summary(only_run())
    accs = [row["val_acc"] for row in rows]
    best = max(accs)
    assert result["chosen_epoch"] == accs.index(best) + 1 and result["best_val_acc"] == best
    assert result["chosen_test_acc"] == rows[accs.index(best)]["test_acc"] is not None
    tested = {row["epoch"] for row in rows if row["test_acc"] is not None}
    assert tested == {7} | {i + 1 for i, acc in enumerate(accs) if acc > max([-1, *accs[:i]])}


@pytest.mark.parametrize("preset", PRESETS)
def test_test_images_affect_no_decision_of_any_preset(small, tiny_folder, tmp_path, preset):
    """Runs that differ only in their test images have bitwise equal epochs, learning rates and weights."""
    other = tmp_path / "other" / "tiny"
    other.parent.mkdir()
    subprocess.run(["cp", "-r", str(tiny_folder), str(other)], check=True)
    for image in other.glob("test/*/*"):
        Image.fromarray(np.random.RandomState(1).randint(0, 256, (16, 16, 3), dtype=np.uint8)).save(image)
    options = ["--preset", preset, "--arch", "resnet8", "--image-size", "32", "--batch-size", "16"]
    options += ["--data-dir", str(tmp_path / "prepared"), "--epochs", "9", "--patience", "1"]
    if PRESETS[preset].get("early_stop"):
        options += ["--early-stop", "4"]
    options += ["--device", "cpu", "--no-compile"]
    for out, images in (("a", tiny_folder), ("b", other)):
        assert exit_status([*options, "--data", str(images), "--out", out]) == 0
    one, two = only_run(Path("a")), only_run(Path("b"))
    ends = [
        [summary(run).get(key) for key in ("status", "epochs_done", "chosen_epoch")] for run in (one, two)
    ]
    assert ends[0] == ends[1]
    if PRESETS[preset].get("schedule") == "plateau":
        assert len({row["lr"] for row in metrics(one)}) > 1, "something was decided"
    tests = ("epoch_s", "images_per_s", "test_loss", "test_acc")
    a, b = ([{k: v for k, v in row.items() if k not in tests} for row in metrics(run)] for run in (one, two))
    assert a == b and [row["test_acc"] for row in metrics(one)] != [row["test_acc"] for row in metrics(two)]
    tensors = [checkpoint.read_checkpoint(run)[0] for run in (one, two)]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def test_a_preset_changes_the_defaults_and_is_recorded(small):
    options = ["--preset", "000-3", "--arch", "resnet18", "--data", small[small.index("--data") + 1]]
    options += ["--data-dir", small[small.index("--data-dir") + 1], "--image-size", "48", "--epochs", "2"]
    options += ["--batch-size", "24", "--train-subset", "48", "--device", "cpu"]
    assert exit_status(options) == 0
    folder, ((asked,), _) = only_run(), parse_options(options, "")
    assert folder.name == runs.run_name(asked, "tiny")
    assert folder.name.startswith("tiny-resnet18-bn_only-s0-preset000")
    described = json.loads((folder / "config.json").read_text())
    recorded = {"preset": "000-3", "optimizer": "adam", "lr": 0.01, "schedule": "plateau", "min_lr": 1e-5}
    recorded |= {"early_stop": 20, "augment": "photo", "image_size": 48, "weight_decay": 0.0}
    assert recorded.items() <= described["options"].items()
    assert described["spec"]["train_images"] == 48 and described["spec"]["val_images"] == 8


def test_torchvisions_resnet18_is_frozen_and_its_batchnorm_trains(small, capsys):
    """The weights have torchvision's names and 1,000 classes, like the published ones, but random values."""
    rng = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        state = models.build("resnet18", 1000).state_dict()
    state = {n: torch.rand(t.shape, generator=rng) * 0.1 for n, t in state.items() if t.is_floating_point()}
    torch.save(state, "resnet18.pth")
    options = [*small, "--arch", "resnet18", "--image-size", "32", "--epochs", "1", "--milestones"]
    assert exit_status([*options, "--init-from", "resnet18.pth"]) == 0
    said = capsys.readouterr().err
    assert "fc.weight keeps its random draw: resnet18.pth has another number of classes" in said
    after = freeze.full_state(checkpoint.restore(only_run())[0])
    for name, tensor in state.items():
        if not name.startswith("fc."):
            moves = "bn" in name or "downsample.1" in name
            assert torch.equal(after[name], tensor) != moves, name
    state["layer2.0.conv9.weight"] = state.pop("layer2.0.conv1.weight")
    torch.save(state, "renamed.pth")
    assert exit_status([*options, "--init-from", "renamed.pth"]) == 2
    said = capsys.readouterr().err
    assert "layer2.0.conv1.weight (missing), layer2.0.conv9.weight (not in this network)" in said


def test_more_than_ten_classes_give_a_top_5_accuracy(small, tmp_path):
    names = [f"class{i:03}" for i in range(1000)]
    write_images(tmp_path / "many", classes=names, each=1, size=(32, 32))
    options = ["--data", str(tmp_path / "many"), "--data-dir", str(tmp_path), "--batch-size", "100"]
    options += ["--epochs", "1", "--milestones", "--arch", "resnet8", "--loader", "ffcv", "--device", "cpu"]
    assert exit_status(options) == 0
    row, result = metrics(only_run())[0], summary(only_run())
    assert result["final_test_top5_acc"] == row["test_top5_acc"] >= row["test_acc"]
    dataset = data.open_dataset(str(tmp_path / "many"), tmp_path, say=lambda line: None)
    loader = data.make_loader(dataset, "test", batch_size=100, device="cpu", dtype=torch.float32)
    scores = evaluation.Evaluation(checkpoint.restore(only_run())[0], loader, torch.float32)()
    assert scores.acc == row["test_acc"] and scores.top5_acc == row["test_top5_acc"]


def test_quick_falls_back_to_synthetic_images_with_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    change_set(monkeypatch, "cifar10", url="http://127.0.0.1:9/cifar-10-python.tar.gz")
    small = ["--quick", "--arch", "resnet8", "--train-subset", "200", "--epochs", "1", "--no-compile"]
    assert exit_status(small) == 0
    said = capsys.readouterr()
    assert "synthetic" in said.err
    assert "[synthetic quick] epoch 1/1" in said.out
    assert re.search(r"│ data +│ synthetic .*, --quick", said.out)  # in the table of results
    assert only_run().name.startswith("synthetic-resnet8-bn_only-s0-quick-")
    result = summary(only_run())
    assert result["data"] == "synthetic" and "synthetic" in result["data_title"]
    assert config(only_run()).options.quick
    # If --data names cifar10, nothing replaces it
    assert exit_status([*small, "--data", "cifar10", "--overwrite"]) == 2


def test_a_closed_pipe_does_not_end_the_run(small):
    command = [sys.executable, str(ROOT / "train.py"), *small]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.readline()
        running.stdout.close()
        error = running.stderr.read()
    assert running.returncode == 0 and "Traceback" not in error and "BrokenPipe" not in error
    assert summary(only_run())["status"] == "done"


def test_a_terminal_shows_live_progress(small):
    ours, theirs = os.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "160", "LINES": "40"}
    command = [sys.executable, str(ROOT / "train.py"), *small]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as running:
        os.close(theirs)
        seen = b""
        try:
            while chunk := os.read(ours, 65536):
                seen += chunk
        except OSError:  # train.py has closed its side
            pass
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert running.returncode == 0
    assert "epoch 3/3" in text and "━" in text and "test accuracy" in text and "parameters trained" in text


class FakeTracker:
    """The interface that train.py uses of wandb and trackio; it stores what it receives."""

    def __init__(self):
        self.told, self.finished = [], False

    def init(self, project: str, name: str, config: dict) -> "FakeTracker":
        self.project, self.name, self.config = project, name, config
        return self

    def log(self, metrics: dict, step: int | None = None) -> None:
        json.dumps(metrics)
        self.told.append((step, metrics))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_receives_the_config_the_epochs_and_the_summary(small, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, tracker := FakeTracker())
    assert exit_status([*small, "--log", name, "--eval-every", "2"]) == 0
    folder = only_run()
    assert name not in folder.name, "where a run is logged does not change what it is"
    assert tracker.name == folder.name and tracker.finished
    assert tracker.config == json.loads((folder / "config.json").read_text())
    *epochs, (_, last) = tracker.told
    found = [{k: v for k, v in row.items() if v is not None} for row in metrics(folder)]
    assert epochs == [(1, found[0]), (2, found[1]), (3, found[2])]
    result = summary(folder)
    assert last == {f"summary/{k}": v for k, v in result.items() if v is not None}


def test_a_tracker_receives_the_status_of_a_diverged_run(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", tracker := FakeTracker())
    assert exit_status([*small, "--log", "wandb", "--mode", "all", "--lr", "1e30"]) == 1
    assert tracker.finished and tracker.told[-1][1]["summary/status"] == "diverged"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_tracker_is_refused_before_training(small, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert exit_status([*small, "--log", name]) == 2
    said = capsys.readouterr().err
    assert f"pip install {name}" in said and said.count("\n") == 1
    assert not Path("runs").exists()
