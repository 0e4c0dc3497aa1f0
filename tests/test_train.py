"""train.py through its command line: modes, the files of a run, resuming, errors that a person can mend."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import write_images
from PIL import Image

import data
import freeze
import loaders
import models
import runs
import step as steps
import train
from config import RECIPES
from datasets import sources

ROOT = Path(train.__file__).parent
SMALL = ["--arch", "resnet8", "--batch-size", "32", "--epochs", "3", "--milestones", "1", "2"]
SMALL += ["--no-compile", "--device", "cpu"]
CLASSES = sources.CLASSES["cifar10"].split()
MODES = ("all", "none", "random", "bn_only", "bn_main", "shortcut", "output", "conv", "bn+output")


@pytest.fixture
def small(tiny_folder, tmp_path, monkeypatch):
    """Options of a run of a few seconds, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return [*SMALL, "--data", str(tiny_folder), "--data-dir", str(tiny_folder.parent / "prepared")]


def only_run(root: Path = Path("runs")) -> Path:
    (folder,) = root.iterdir()
    return folder


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def cli(arguments, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, **settings)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_runs(small, mode, capsys):
    before = freeze.create(recipe_of(small, mode))
    if mode == "bn_only":  # from the command line
        ended = cli([*small, "--mode", mode])
        status, said = ended.returncode, ended.stdout
    else:
        status, said = train.main([*small, "--mode", mode]), capsys.readouterr().out
    assert status == 0
    folder = only_run()
    assert folder.name == f"tiny-resnet8-{freeze.canonical_mode(mode)}-s0-epochs3-milestones1_2-batch_size32"
    result = summary(folder)
    assert result["status"] == "done" and result["params_trained"] == freeze.count(before)[1]
    after, _ = freeze.restore(folder)
    assert result["frozen_sha256"] == freeze.frozen_sha256(before) == freeze.frozen_sha256(after)
    assert len(re.findall(r"^\[tiny\] epoch \d/3  lr ", said, re.MULTILINE)) == 3


def recipe_of(small, mode) -> dict:
    (options,), _ = train.parse_options([*small, "--mode", mode], "")
    recipe = {key: getattr(options, key) for key in freeze.RECIPE if hasattr(options, key)}
    return recipe | {"classes": ["ash", "elm", "oak", "yew"]}


def test_a_run_leaves_the_files_that_people_rely_on(small):
    assert train.main(small) == 0
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
    assert {"startup_s", "peak_memory_bytes", "checkpoint_bytes", "full_bytes", "arch", "mode"} <= set(result)
    assert result["final_test_acc"] == rows[-1]["test_acc"] <= result["best_test_acc"]
    assert result["train_s"] == pytest.approx(sum(row["epoch_s"] for row in rows))
    assert result["checkpoint_bytes"] == (folder / "model.safetensors").stat().st_size
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["lr"] == 0.1 and config["recipe"]["dtype"] in ("fp32", "bf16")
    assert config["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert re.fullmatch("[0-9a-f]{16}", config["recipe"]["fingerprint"]) and config["device_name"]


def test_training_learns(small):
    assert train.main([*small, "--mode", "all", "--epochs", "8", "--milestones", "6", "--no-augment"]) == 0
    assert summary(only_run())["final_test_acc"] > 60  # of four classes


def test_evaluate_reproduces_the_final_accuracy(small, capsys):
    assert train.main(small) == 0
    folder, images = only_run(), small[small.index("--data") + 1]
    assert freeze.main(["rebuild", str(folder), "--out", "full.safetensors"]) == 0
    for source in ([str(folder)], ["full.safetensors", "--data", images]):
        capsys.readouterr()
        assert freeze.main(["evaluate", *source, "--device", "cpu"]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{summary(folder)['final_test_acc']:.2f} % test accuracy")
        assert f"loss {metrics(folder)[-1]['test_loss']:.4f}" in said


def test_eval_every_skips_evaluations_but_not_the_last(small):
    assert train.main([*small, "--eval-every", "2"]) == 0
    assert [row["test_acc"] is None for row in metrics(only_run())] == [True, False, False]


PLATEAU = ["--optimizer", "adam", "--schedule", "plateau", "--patience", "1", "--augment", "photo"]


@pytest.mark.parametrize(
    "settings", [["--mode", "random"], ["--optimizer", "adam", "--dtype", "fp16"], PLATEAU], ids=" ".join
)
def test_a_resumed_run_equals_an_uninterrupted_one(small, monkeypatch, settings):
    assert train.main([*small, *settings, "--out", "whole"]) == 0
    end_epoch = runs.Run.end_epoch

    def interrupted(run, row, state):
        if row["epoch"] == 2:
            raise KeyboardInterrupt
        end_epoch(run, row, state)

    with monkeypatch.context() as patched:
        patched.setattr(runs.Run, "end_epoch", interrupted)
        assert train.main([*small, *settings]) == 1
    halved = only_run()
    assert summary(halved)["status"] == "interrupted" and summary(halved)["epochs_done"] == 1
    assert train.main([*small, *settings, "--resume"]) == 0
    whole = only_run(Path("whole"))
    for a, b in zip(metrics(whole), metrics(halved), strict=True):
        assert {k: a[k] for k in a if k not in ("epoch_s", "images_per_s")} == {
            k: b[k] for k in b if k not in ("epoch_s", "images_per_s")
        }
    assert freeze.read_checkpoint(whole)[1] == freeze.read_checkpoint(halved)[1]  # with its SHA-256
    freeze.restore(halved)  # every weight is what that says


@pytest.mark.parametrize("kill, status", [(signal.SIGTERM, "interrupted"), (signal.SIGKILL, None)])
def test_a_killed_run_resumes(small, kill, status):
    many = [*small, "--epochs", "12", "--milestones", "8"]
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *many], stderr=subprocess.PIPE, text=True
    )
    while running.poll() is None and not list(Path().glob("runs/*/metrics.jsonl")):  # written after last.pt
        time.sleep(0.05)
    running.send_signal(kill)
    _, said = running.communicate(timeout=30)
    folder = only_run()
    assert 0 < len(metrics(folder)) < 12
    if status:
        assert running.returncode == 1 and "--resume goes on after epoch" in said and "Traceback" not in said
        assert summary(folder)["status"] == status
    resumed = cli([*many, "--resume"])
    assert resumed.returncode == 0 and "continuing" in resumed.stderr
    assert summary(folder)["status"] == "done" and not (folder / "last.pt").exists()
    assert [row["epoch"] for row in metrics(folder)] == list(range(1, 13))
    freeze.restore(folder)


def test_what_is_chosen_is_chosen_on_validation_images(small):
    options = ["--mode", "all", "--epochs", "12", "--early-stop", "2", "--val-split", "16"]
    assert train.main([*small, *options]) == 0
    rows, result = metrics(only_run()), summary(only_run())
    config = json.loads((only_run() / "config.json").read_text())
    assert (config["recipe"]["train_images"], config["recipe"]["val_images"]) == (80, 16)
    accs = [row["val_acc"] for row in rows]
    assert len(rows) < 12, "it does not rise for ever on four classes of 24 images"
    assert max(accs[-2:]) <= max(accs[:-2]) == accs[-3] and rows[-1]["test_acc"] is not None
    assert result["status"] == "done" and result["why"] == "no better validation accuracy for 2 epochs"
    assert result["epochs_done"] == len(rows) and result["final_test_acc"] == rows[-1]["test_acc"]
    chosen = rows[accs.index(max(accs))]
    assert result["best_val_acc"] == chosen["val_acc"] == max(accs)
    assert (result["chosen_epoch"], result["chosen_test_acc"]) == (chosen["epoch"], chosen["test_acc"])
    assert train.main([*small, *options, "--resume"]) == 0
    assert metrics(only_run()) == rows
    freeze.restore(only_run())


def test_the_epoch_that_validation_chose_is_tested_whatever_eval_every_is(small):
    assert (
        train.main([*small, "--mode", "all", "--epochs", "7", "--val-split", "16", "--eval-every", "7"]) == 0
    )
    rows, result = metrics(only_run()), summary(only_run())
    accs = [row["val_acc"] for row in rows]
    best = max(accs)
    assert result["chosen_epoch"] == accs.index(best) + 1 and result["best_val_acc"] == best
    assert result["chosen_test_acc"] == rows[accs.index(best)]["test_acc"] is not None
    tested = {row["epoch"] for row in rows if row["test_acc"] is not None}
    assert tested == {7} | {i + 1 for i, acc in enumerate(accs) if acc > max([-1, *accs[:i]])}


def test_the_epochs_of_what_a_run_started_from_use_up_their_draws(small, monkeypatch):
    """So that its batches are those of the later epochs of one run from the start."""
    seen, drawn = [], loaders.Loader.drawn

    def noted(loader, epoch):
        seen.extend([epoch] if loader.train else [])
        return drawn(loader, epoch)

    assert train.main([*small, "--mode", "all"]) == 0
    start = only_run()
    monkeypatch.setattr(loaders.Loader, "drawn", noted)
    assert train.main([*small, "--init-from", str(start), "--out", "more"]) == 0
    assert seen == [3, 4, 5]


def test_a_run_that_stopped_early_is_not_resumed_past_its_end(small, monkeypatch):
    options = ["--mode", "all", "--epochs", "12", "--early-stop", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(freeze, "seed_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train.main([*small, *options]) == 1
    stopped = metrics(only_run())
    assert summary(only_run())["status"] == "interrupted" and len(stopped) < 12
    assert train.main([*small, *options, "--resume"]) == 0
    assert metrics(only_run()) == stopped and summary(only_run())["status"] == "done"


@pytest.mark.parametrize("recipe", RECIPES)
def test_test_images_enter_no_decision_of_any_recipe(small, tiny_folder, tmp_path, recipe):
    """Other test images, same training images: the same epochs, rates and weights, bit for bit."""
    other = tmp_path / "other" / "tiny"
    other.parent.mkdir()
    subprocess.run(["cp", "-r", str(tiny_folder), str(other)], check=True)
    for image in other.glob("test/*/*"):
        Image.fromarray(np.random.RandomState(1).randint(0, 256, (16, 16, 3), dtype=np.uint8)).save(image)
    options = ["--recipe", recipe, "--arch", "resnet8", "--image-size", "32", "--batch-size", "16"]
    options += ["--data-dir", str(tmp_path / "prepared"), "--epochs", "9", "--patience", "1"]
    if RECIPES[recipe].get("early_stop"):
        options += ["--early-stop", "4"]
    options += ["--device", "cpu", "--no-compile"]
    for out, images in (("a", tiny_folder), ("b", other)):
        assert train.main([*options, "--data", str(images), "--out", out]) == 0
    one, two = only_run(Path("a")), only_run(Path("b"))
    ends = [
        [summary(run).get(key) for key in ("status", "epochs_done", "chosen_epoch")] for run in (one, two)
    ]
    assert ends[0] == ends[1]
    if RECIPES[recipe].get("schedule") == "plateau":
        assert len({row["lr"] for row in metrics(one)}) > 1, "something was decided"
    tests = ("epoch_s", "images_per_s", "test_loss", "test_acc")
    a, b = ([{k: v for k, v in row.items() if k not in tests} for row in metrics(run)] for run in (one, two))
    assert a == b and [row["test_acc"] for row in metrics(one)] != [row["test_acc"] for row in metrics(two)]
    tensors = [freeze.read_checkpoint(run)[0] for run in (one, two)]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def test_a_recipe_is_other_defaults_and_is_recorded(small):
    options = ["--recipe", "000-3", "--arch", "resnet18", "--data", small[small.index("--data") + 1]]
    options += ["--data-dir", small[small.index("--data-dir") + 1], "--image-size", "48", "--epochs", "2"]
    options += ["--batch-size", "24", "--train-subset", "48", "--device", "cpu"]
    assert train.main(options) == 0
    folder = only_run()
    assert folder.name == (
        "tiny-resnet18-bn_only-s0-recipe000_3-image_size48-train_subset48-epochs2-batch_size24"
    )
    config = json.loads((folder / "config.json").read_text())
    recorded = {"recipe": "000-3", "optimizer": "adam", "lr": 0.01, "schedule": "plateau", "min_lr": 1e-5}
    recorded |= {"early_stop": 20, "augment": "photo", "image_size": 48, "weight_decay": 0.0}
    assert recorded.items() <= config["options"].items()
    assert config["recipe"]["train_images"] == 48 and config["recipe"]["val_images"] == 8


def test_a_run_starts_from_another_and_comes_back_from_both(small, tmp_path, monkeypatch, capsys):
    first = [*small, "--mode", "all", "--seed", "3", "--out", "first"]
    assert train.main(first) == 0
    start = only_run(Path("first"))
    trained = freeze.full_state(freeze.restore(start)[0])
    template = str(start).replace("-s3-", "-s{seed}-")
    for more in ([], ["--reset-bn"]):
        assert train.main([*small, "--seed", "3", "--init-from", template, *more]) == 0
    folders = sorted(Path("runs").iterdir())
    for folder, kept in zip(folders, (True, False), strict=True):
        config = json.loads((folder / "config.json").read_text())
        assert config["options"]["init_from"] == template and config["recipe"]["init_from"] == str(start)
        began = config["started_from"]
        assert (began["run"], began["mode"], began["epochs"], began["seed"]) == (start.name, "all", 3, 3)
        assert began["test_acc"] == summary(start)["final_test_acc"] and began["seconds"] > 0
        assert began["options"] == {"batch_size": 32}, "1 and 2 of 3 epochs are half and three quarters"
        state = freeze.full_state(freeze.create(config["recipe"]))
        for name, tensor in trained.items():
            same = torch.equal(state[name], tensor)
            statistics_or_gamma = re.search(r"bn\d|downsample\.1", name) and "num_batches" not in name
            assert same == (kept or not statistics_or_gamma) or "num_batches" in name, name
        freeze.restore(folder)  # through the run it started from, to the last bit
    first_of_two = ["--seed", "3", "--init-from", str(folders[0] / "model.safetensors"), "--out", "third"]
    assert train.main([*small, *first_of_two]) == 0
    third = only_run(Path("third"))
    freeze.restore(third)
    began = json.loads((third / "config.json").read_text())["started_from"]
    assert (began["run"], began["epochs"], began["course"], began["epochs_done"]) == (
        folders[0].name,
        3,
        6,
        6,
    )
    monkeypatch.chdir(tmp_path.parent)
    freeze.restore(tmp_path / folders[0], init_from=str(tmp_path / start))
    for folder in (start, *folders, third):  # moved, all of them
        shutil.copytree(tmp_path / folder, tmp_path / "moved" / folder.name, dirs_exist_ok=True)
    freeze.restore(tmp_path / "moved" / third.name)
    monkeypatch.chdir(tmp_path)
    assert train.main([*small, "--arch", "resnet14", "--init-from", str(start)]) == 2
    assert "layer1.1.conv1.weight (missing)" in capsys.readouterr().err
    (start / "model.safetensors").unlink()
    assert train.main([*small, "--init-from", str(start)]) == 2
    assert "a run leaves one when it is done" in capsys.readouterr().err


def test_resuming_goes_on_from_the_same_weights_and_draws(small, tmp_path, monkeypatch, capsys):
    """Of the start a copy of its weights is enough; other weights under its name are refused."""
    options = [*small, "--mode", "all", "--init-from"]
    for seed in ("3", "4"):
        assert train.main([*small, "--mode", "all", "--seed", seed, "--out", f"first{seed}"]) == 0
        (tmp_path / f"copy{seed}").mkdir()
        shutil.copy(only_run(Path(f"first{seed}")) / "model.safetensors", f"copy{seed}/w.safetensors")
    start = str(only_run(Path("first3")))
    assert train.main([*options, start, "--out", "whole"]) == 0
    folder = interrupted_after_an_epoch([*options, start], monkeypatch)
    shutil.rmtree("first3")
    assert train.main([*options, "copy3/w.safetensors", "--out", "elsewhere"]) == 0
    assert train.main([*options, "copy4/w.safetensors", "--resume", "--out", "elsewhere"]) == 2
    assert "was run with initial_sha256" in capsys.readouterr().err
    Path(start).mkdir(parents=True)
    shutil.copy("copy3/w.safetensors", f"{start}/model.safetensors")
    assert train.main([*options, start, "--resume"]) == 0
    whole = only_run(Path("whole"))
    assert without_times(folder) == without_times(whole)
    began = [json.loads((run / "config.json").read_text())["started_from"] for run in (folder, whole)]
    assert began[0] == began[1] and began[0]["epochs_done"] == 3


def test_what_its_start_trained_on_is_said_to_validate(small, capsys):
    for split in ("0", "16"):
        assert train.main([*small, "--mode", "all", "--val-split", split, "--out", f"first{split}"]) == 0
        start = str(only_run(Path(f"first{split}")))
        for seed in ("0", "1"):
            more = ["--seed", seed, "--val-split", "16", "--out", f"then{split}"]
            assert train.main([*small, "--init-from", start, *more]) == 0
            said = "trained on images that validate here" in capsys.readouterr().err
            assert said == ((split, seed) != ("16", "0"))


def test_torchvisions_resnet18_is_frozen_and_its_batchnorm_trains(small, capsys):
    """A state dict of 1,000 classes with torchvision's names, as its published file has it."""
    rng = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        state = models.build("resnet18", 1000).state_dict()
    state = {n: torch.rand(t.shape, generator=rng) * 0.1 for n, t in state.items() if t.is_floating_point()}
    torch.save(state, "resnet18.pth")
    options = [*small, "--arch", "resnet18", "--image-size", "32", "--epochs", "1", "--milestones"]
    assert train.main([*options, "--init-from", "resnet18.pth"]) == 0
    assert "fc.weight is drawn anew: resnet18.pth has another number of classes" in capsys.readouterr().err
    after = freeze.full_state(freeze.restore(only_run())[0])
    for name, tensor in state.items():
        if not name.startswith("fc."):
            moves = "bn" in name or "downsample.1" in name
            assert torch.equal(after[name], tensor) != moves, name
    state["layer2.0.conv9.weight"] = state.pop("layer2.0.conv1.weight")
    torch.save(state, "renamed.pth")
    assert train.main([*options, "--init-from", "renamed.pth"]) == 2
    said = capsys.readouterr().err
    assert "layer2.0.conv1.weight (missing), layer2.0.conv9.weight (not in this network)" in said


def test_more_than_ten_classes_have_a_top_5_accuracy(small, tmp_path):
    names = [f"class{i:03}" for i in range(1000)]
    write_images(tmp_path / "many", classes=names, each=1, size=(32, 32))
    options = ["--data", str(tmp_path / "many"), "--data-dir", str(tmp_path), "--batch-size", "100"]
    options += ["--epochs", "1", "--milestones", "--arch", "resnet8", "--loader", "ffcv", "--device", "cpu"]
    assert train.main(options) == 0
    row, result = metrics(only_run())[0], summary(only_run())
    assert result["final_test_top5_acc"] == row["test_top5_acc"] >= row["test_acc"]
    loader = make_test_loader(tmp_path, only_run())
    model = freeze.restore(only_run())[0].eval()
    evaluation = steps.Evaluation(model, loader, torch.float32)
    assert evaluation()[1] == row["test_acc"] and evaluation.top5_acc == row["test_top5_acc"]


def make_test_loader(tmp_path, run):
    dataset = data.open_dataset(str(tmp_path / "many"), tmp_path, say=lambda line: None)
    return loaders.make_loader(dataset, "test", batch_size=100, device="cpu", dtype=torch.float32)


def test_a_done_run_is_not_run_again(small, capsys):
    assert train.main(small) == 0
    before = (only_run() / "metrics.jsonl").stat().st_mtime_ns
    assert train.main(small) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert train.main([*small, "--resume"]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert (only_run() / "metrics.jsonl").stat().st_mtime_ns == before
    assert train.main([*small, "--overwrite"]) == 0
    assert (only_run() / "metrics.jsonl").stat().st_mtime_ns > before


def test_resuming_on_other_images_is_refused(small, tiny_folder, tmp_path, capsys):
    copy = tmp_path / "other" / "tiny"
    copy.parent.mkdir()
    subprocess.run(["cp", "-r", str(tiny_folder), str(copy)], check=True)
    next(copy.glob("train/ash/*")).unlink()
    assert train.main(small) == 0
    assert train.main([*small, "--data", str(copy), "--resume"]) == 2
    assert "fingerprint" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run_at_once(small, capsys):
    assert train.main([*small, "--mode", "all", "--lr", "1e30"]) == 1
    error = capsys.readouterr().err
    assert re.search(r"the loss is not finite at epoch 1, step 2\b", error), error
    result = summary(only_run())
    assert result["status"] == "diverged" and result["final_test_acc"] is None and "step 2" in result["why"]
    assert not (only_run() / "model.safetensors").exists()


def test_a_network_that_breaks_in_its_last_step_has_diverged_too(small, capsys):
    assert train.main([*small, "--mode", "all", "--lr", "1e30", "--epochs", "1", "--batch-size", "96"]) == 1
    assert "the last test loss is not finite" in capsys.readouterr().err
    assert summary(only_run())["status"] == "diverged"


def interrupted_after_an_epoch(small, monkeypatch, *more) -> Path:
    end_epoch = runs.Run.end_epoch

    def interrupted(run, row, state):
        end_epoch(run, row, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runs.Run, "end_epoch", interrupted)
        assert train.main([*small, *more]) == 1
    return only_run()


def test_resuming_on_other_frozen_weights_is_refused(small, monkeypatch, capsys):
    model = models.build("resnet8", 4)
    for seed in (5, 6):
        models.initialise(model, seed)
        torch.save(model.state_dict(), "w.pt")
        if seed == 5:
            interrupted_after_an_epoch(small, monkeypatch, "--init-from", "w.pt")
    assert train.main([*small, "--init-from", "w.pt", "--resume"]) == 2
    assert "sha256" in capsys.readouterr().err


HARMS = ("no tensors", "nothing", "no rows", "rubbish", "no config", "list", "empty summary")


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_run_folder_is_refused_in_two_lines(small, monkeypatch, capsys, harm):
    folder = interrupted_after_an_epoch(small, monkeypatch)
    state = torch.load(folder / "last.pt", weights_only=True)
    if harm in ("no tensors", "nothing"):
        torch.save(state | {"model": {}} if harm == "no tensors" else {"rows": []}, folder / "last.pt")
    elif harm == "no rows":
        torch.save(state | {"rows": [1]}, folder / "last.pt")
    elif harm == "rubbish":
        (folder / "last.pt").write_bytes(b"rubbish")
    elif harm == "no config":
        (folder / "config.json").unlink()
    elif harm == "list":
        (folder / "config.json").write_text('{"options": []}')
    else:
        (folder / "summary.json").write_text('{"status": "done"}')
    capsys.readouterr()
    assert train.main([*small, "--resume"]) == 2
    said = capsys.readouterr().err
    assert "--overwrite" in said and said.count("\n") <= 2
    assert train.main([*small, "--overwrite"]) == 0


def test_a_reader_that_closes_the_pipe_ends_no_run(small):
    command = [sys.executable, str(ROOT / "train.py"), *small]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.readline()
        running.stdout.close()
        error = running.stderr.read()
    assert running.returncode == 0 and "Traceback" not in error and "BrokenPipe" not in error
    assert summary(only_run())["status"] == "done"


def test_a_disk_that_fills_up_ends_the_run_in_a_line(small, monkeypatch, capsys):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.Run, "end_epoch", full_disk)
    assert train.main(small) == 1
    assert "No space left on device" in capsys.readouterr().err and summary(only_run())["status"] == "failed"


def test_seeds_give_different_runs_and_the_same_seed_the_same(small):
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert train.main([*small, "--epochs", "1", "--out", out, "--seed", seed]) == 0
    a, b, c = (metrics(only_run(Path(out)))[0]["train_loss"] for out in "abc")
    assert a == b != c


def without_times(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("epoch_s", "images_per_s")} for row in metrics(folder)]


@pytest.fixture
def seeds(small):
    """Options of three runs side by side."""
    return [*small, "--seed", "0", "1", "2"]


def folders() -> dict[int, Path]:
    return {summary(folder)["seed"]: folder for folder in Path("runs").iterdir()}


def test_seeds_side_by_side_equal_their_solo_runs(small, seeds, capsys):
    assert train.main(seeds) == 0
    said = capsys.readouterr().out
    assert all(f"[tiny s{seed}] epoch 3/3" in said and f"bn_only, seed {seed}" in said for seed in range(3))
    together = folders()
    assert train.main([*small, "--seed", "1", "--out", "solo"]) == 0
    solo = only_run(Path("solo"))
    assert without_times(solo) == without_times(together[1]) != without_times(together[0])
    assert freeze.read_checkpoint(solo)[1] == freeze.read_checkpoint(together[1])[1]
    assert solo.name == together[1].name


def test_seeds_side_by_side_are_interrupted_and_resumed_together(seeds, monkeypatch):
    end_epoch = runs.Run.end_epoch

    def interrupted(run, row, state):
        end_epoch(run, row, state)
        if row["epoch"] == 2 and "-s1-" in run.path.name:
            raise KeyboardInterrupt

    assert train.main([*seeds, "--out", "whole"]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(runs.Run, "end_epoch", interrupted)
        assert train.main(seeds) == 1
    assert {summary(folder)["status"] for folder in folders().values()} == {"interrupted"}
    assert train.main([*seeds, "--resume"]) == 0
    for folder in folders().values():
        assert without_times(folder) == without_times(Path("whole") / folder.name)


def test_a_seed_that_fails_does_not_stop_the_others(seeds, monkeypatch, capsys):
    end_epoch = runs.Run.end_epoch

    def full(run, row, state):
        if "-s1-" in run.path.name:
            raise OSError(28, "No space left on device")
        end_epoch(run, row, state)

    monkeypatch.setattr(runs.Run, "end_epoch", full)
    assert train.main(seeds) == 1
    assert [summary(folder)["status"] for _, folder in sorted(folders().items())] == [
        "done",
        "failed",
        "done",
    ]
    assert "No space left on device" in capsys.readouterr().err


def test_no_seed_starts_where_one_of_them_is_refused(small, seeds, capsys):
    assert train.main([*small, "--seed", "2"]) == 0
    assert train.main(seeds) == 2
    assert "--resume" in capsys.readouterr().err
    assert [folder.name for folder in Path("runs").iterdir() if (folder / "config.json").exists()] == [
        only.name for only in Path("runs").iterdir() if "-s2-" in only.name
    ]


def test_every_way_to_train_has_the_same_loss_curve(small):
    curves = []
    for i, way in enumerate(([], ["--memory", "recompute"], ["--memory", "stock"], ["--no-compile"])):
        fast = [option for option in small if option != "--no-compile"]
        assert train.main([*fast, *way, "--dtype", "fp32", "--out", str(i)]) == 0
        curves.append([row["train_loss"] for row in metrics(only_run(Path(str(i))))])
    assert curves[0] == curves[1]
    for curve in curves[2:]:
        assert curve == pytest.approx(curves[0], rel=2e-3)


def test_quick_takes_synthetic_images_where_cifar10_cannot_be_had_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sources.URLS, "cifar10", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    small = ["--quick", "--arch", "resnet8", "--train-subset", "200", "--epochs", "1", "--no-compile"]
    assert train.main(small) == 0
    said = capsys.readouterr()
    assert "synthetic" in said.err
    assert "[synthetic quick] epoch 1/1" in said.out
    assert re.search(r"│ data +│ synthetic .*, --quick", said.out)  # in the table at the end
    assert only_run().name.startswith("synthetic-resnet8-bn_only-s0-quick-")
    result = summary(only_run())
    assert result["data"] == "synthetic" and result["quick"] and "synthetic" in result["data_title"]
    assert train.main([*small, "--data", "cifar10", "--overwrite"]) == 2  # asked for by name: no substitute


@pytest.mark.parametrize(
    "options, named",
    [
        ("--arch resnet33", "--arch resnet33"),
        ("--mode bnn", "--mode bnn"),
        ("--epochs 0", "--epochs 0"),
        ("--epochs two", "--epochs"),
        ("--lr nan", "--lr nan"),
        ("--batch-size -1", "--batch-size"),
        ("--batch-size 97", "batch"),
        ("--milestones 2 1", "--milestones 2 1"),
        ("--seed -1", "--seed -1"),
        ("--seed 0 1 0", "--seed 0 1 0"),
        ("--memory none", "--memory"),
        ("--label-smoothing 1", "--label-smoothing"),
        ("--train-subset 33", "33"),
        ("--train-subset 400", "400"),
        ("--shortcut none", "--shortcut"),
        ("--no-such-option", "--no-such-option"),
        ("--resume --overwrite", "--resume"),
        ("--data no_such_folder", "no_such_folder"),
        ("--init-from absent.pt", "absent.pt"),
        ("--reset-bn", "--reset-bn"),
        ("--augment blur", "--augment blur"),
        ("--val-split 10", "--val-split 10"),
        ("--val-split 96", "--val-split 96"),
        ("--val-split 0 --early-stop 3", "--val-split 0"),
        ("--val-split 0 --schedule plateau", "--val-split 0"),
        ("--early-stop -1", "--early-stop -1"),
        ("--min-lr 0.2", "--min-lr 0.2"),
        ("--augment +", "--augment +"),
        ("--recipe 000-4", "--recipe"),
        ("--mode shortcut --shortcut pad", "shortcut"),
        ("--mode random --per-channel 28", "--per-channel 28"),
        ("--out {file}", "--out"),
        ("--data ", "--data"),
        ("--image-size 100000", "--image-size"),
        ("--arch vgg16 --image-size 8", "--arch vgg16"),
        ("--arch resnet18 --batch-size 1", "--batch-size"),
    ],
)
def test_an_error_the_user_can_mend_is_a_line_or_two_and_exit_status_2(small, capsys, options, named):
    Path("file").write_text("")
    assert train.main([*small, *options.format(file="file").split(" ")]) == 2
    said = capsys.readouterr()
    assert named in said.err and said.err.count("\n") <= 2 and "Traceback" not in said.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU, and there is one")
def test_asking_for_cuda_without_a_gpu_is_refused(small, capsys):
    assert train.main([*small, "--device", "cuda"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_milestones_past_the_end_are_pointed_out(small, capsys):
    assert train.main([*small, "--milestones", "80", "120"]) == 0
    assert "the learning rate stays 0.1" in capsys.readouterr().err


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
        except OSError:  # the other side has closed
            pass
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert running.returncode == 0
    assert "epoch 3/3" in text and "━" in text and "test accuracy" in text and "parameters trained" in text


@pytest.mark.gpu
def test_photographs_validation_and_many_classes_on_the_gpu(small, tmp_path):
    """The captured step and evaluations beside PyTorch's own, in fp32: sums in another order, no more."""
    write_images(tmp_path / "many", classes=[f"class{i:02}" for i in range(20)], each=12, size=(32, 32))
    options = ["--data", str(tmp_path / "many"), "--data-dir", str(tmp_path), "--batch-size", "32"]
    options += ["--epochs", "4", "--schedule", "plateau", "--patience", "1", "--early-stop", "3"]
    options += ["--arch", "resnet8", "--augment", "photo", "--val-split", "40", "--dtype", "fp32"]
    for out, way in (("fast", []), ("plain", ["--no-compile"])):
        assert train.main([*options, *way, "--out", out]) == 0
    fast, plain = (metrics(only_run(Path(out))) for out in ("fast", "plain"))
    assert fast[0]["train_loss"] == pytest.approx(plain[0]["train_loss"], rel=0.01)
    assert fast[0]["val_loss"] == pytest.approx(plain[0]["val_loss"], rel=0.05)
    assert all(0 <= row["test_top5_acc"] <= 100 for row in fast)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["bn_only", "random", "all", "none"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("way", [["--memory", "lean"], ["--memory", "recompute"], ["--no-compile"]])
def test_a_run_on_the_gpu(small, capsys, mode, dtype, way):
    small = [option for option in small if option != "--no-compile"]
    assert train.main([*small, "--device", "cuda", "--mode", mode, "--dtype", dtype, *way]) == 0
    result = summary(only_run())
    assert result["peak_memory_bytes"] > 0
    assert freeze.main(["evaluate", str(only_run()), "--device", "cuda"]) == 0
    assert f"{result['final_test_acc']:.2f} % test accuracy" in capsys.readouterr().out


def test_on_real_images_the_fast_path_has_the_plain_ones_loss_curve(cifar10_folder, tmp_path):
    """In fp32 its sums are taken in another order; in half precision every activation is rounded."""
    options = ["--arch", "resnet14", "--data", "cifar10", "--data-dir", str(cifar10_folder), "--epochs", "3"]
    options += ["--train-subset", "5000", "--milestones", "2"]
    curves = []
    for out, way in (("fast", []), ("plain", ["--no-compile", "--dtype", "fp32"])):
        ended = cli([*options, *way, "--device", "cpu", "--out", str(tmp_path / out)])
        assert ended.returncode == 0, ended.stderr
        curves.append([row["train_loss"] for row in metrics(only_run(tmp_path / out))])
    half = steps.default_dtype(torch.device("cpu")) != "fp32"
    assert curves[0] == pytest.approx(curves[1], rel=0.02 if half else 0.005)


@pytest.mark.parametrize(
    "layout", ["as it is", *(pytest.param(x, marks=pytest.mark.stress) for x in ("binary", "folder"))]
)
def test_resnet14_reaches_30_percent_on_real_images_in_two_epochs(cifar10_folder, tmp_path, layout):
    folder = (
        cifar10_folder if layout == "as it is" else rewritten(cifar10_folder, tmp_path / "images", layout)
    )
    options = ["--arch", "resnet14", "--mode", "bn_only", "--data", "cifar10", "--epochs", "2"]
    ended = cli([*options, "--milestones", "1", "--data-dir", str(folder), "--out", str(tmp_path / "runs")])
    assert ended.returncode == 0, ended.stderr
    assert summary(only_run(tmp_path / "runs"))["final_test_acc"] >= 30


def rewritten(source: Path, folder: Path, layout: str) -> Path:
    """The images of `source` in the official binary layout, or as a PNG each in class folders."""
    folder.mkdir()
    dataset = data.open_dataset("cifar10", source)
    for split_name, split in (("train", dataset.train), ("test", dataset.test)):
        if layout == "folder":
            for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
                path = folder / split_name / CLASSES[label] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path, compress_level=0)
            continue
        planes = split.images.transpose(0, 3, 1, 2).reshape(-1, 3072)
        rows = np.concatenate([split.labels[:, None].astype(np.uint8), planes], 1)
        names = [f"data_batch_{i}" for i in range(1, 6)] if split_name == "train" else ["test_batch"]
        for name, part in zip(names, np.split(rows, len(names)), strict=True):
            (folder / f"{name}.bin").write_bytes(part.tobytes())
    return folder
