"""Tests of --resume: a stopped run resumes to the same bits, and is refused if anything has changed."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from made_runs import change
from small_runs import (
    ROOT,
    cli,
    exit_status,
    interrupt_after_an_epoch,
    metrics,
    only_run,
    small_options,
    summary,
    without_times,
)

import checkpoint
import models
import progress
import records
import runs
import train

GAMMA = ["--mode", "gamma+output", "--conv-init", "sparse", "--nonzeros", "3"]
PLATEAU = ["--optimizer", "adam", "--schedule", "plateau", "--patience", "1", "--augment", "photo"]


@pytest.mark.parametrize(
    "settings",
    [["--mode", "random"], ["--optimizer", "adam", "--dtype", "fp16"], PLATEAU, GAMMA],
    ids=" ".join,
)
def test_a_resumed_run_equals_an_uninterrupted_one(small, monkeypatch, settings):
    assert exit_status([*small, *settings, "--out", "whole"]) == 0
    end_epoch = runs.Run.end_epoch

    def interrupted(run, row, state):
        if row.epoch == 2:
            raise KeyboardInterrupt
        end_epoch(run, row, state)

    with monkeypatch.context() as patched:
        patched.setattr(runs.Run, "end_epoch", interrupted)
        assert exit_status([*small, *settings]) == 1
    halved = only_run()
    assert summary(halved)["status"] == "interrupted" and summary(halved)["epochs_done"] == 1
    assert exit_status([*small, *settings, "--resume"]) == 0
    whole = only_run(Path("whole"))
    assert without_times(whole) == without_times(halved)
    assert checkpoint.read_checkpoint(whole)[1] == checkpoint.read_checkpoint(halved)[1]  # has a SHA-256
    checkpoint.restore(halved)  # verifies all weights by that SHA-256


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
        assert running.returncode == 1
        assert "--resume continues after epoch" in said and "Traceback" not in said
        assert summary(folder)["status"] == status
    resumed = cli([*many, "--resume"])
    assert resumed.returncode == 0 and "continuing" in resumed.stderr
    assert summary(folder)["status"] == "done" and not (folder / "last.pt").exists()
    assert [row["epoch"] for row in metrics(folder)] == list(range(1, 13))
    checkpoint.restore(folder)


def test_a_run_goes_on_in_its_own_number_format_where_another_is_the_fastest(small, monkeypatch, capsys):
    def fastest(dtype):
        monkeypatch.setattr(train.devices, "default_dtype", lambda device: dtype)

    fastest("bf16")
    assert exit_status([*small, "--out", "whole"]) == 0
    interrupt_after_an_epoch(small)
    fastest("fp32")
    assert exit_status([*small, "--resume"]) == 0
    assert "after epoch 1, in bf16" in capsys.readouterr().err
    whole, halved = only_run(Path("whole")), only_run()
    assert without_times(whole) == without_times(halved)
    assert (whole / "model.safetensors").read_bytes() == (halved / "model.safetensors").read_bytes()


def test_a_run_interrupted_while_saving_resumes_after_the_epoch_before(small, monkeypatch, capsys):
    save = torch.save

    def interrupted(state, path):
        if len(state["rows"]) == 2:
            raise KeyboardInterrupt
        save(state, path)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", interrupted)
        assert exit_status(small) == 1
    assert "--resume continues after epoch 1" in capsys.readouterr().err
    assert summary(only_run())["epochs_done"] == len(metrics(only_run())) == 1
    assert exit_status([*small, "--resume"]) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_even_if_c_code_drops_its_exception(small, monkeypatch, heeds_ctrl_c, number):
    def called_back():
        os.kill(os.getpid(), number)
        time.sleep(0.01)  # the handler runs and raises here

    drops, step = ctypes.CFUNCTYPE(None)(called_back), progress.Display.step
    monkeypatch.setattr(progress.Display, "step", lambda *given: (step(*given), drops()))
    assert exit_status(small) == 1
    assert summary(only_run())["status"] == "interrupted" and summary(only_run())["epochs_done"] == 0


def test_resuming_a_run_that_stopped_early_adds_no_epochs(small, monkeypatch):
    options = ["--mode", "all", "--epochs", "12", "--early-stop", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "seed_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert exit_status([*small, *options]) == 1
    stopped = metrics(only_run())
    assert summary(only_run())["status"] == "interrupted" and len(stopped) < 12
    assert exit_status([*small, *options, "--resume"]) == 0
    assert metrics(only_run()) == stopped and summary(only_run())["status"] == "done"


def test_a_done_run_is_not_run_again(small, capsys):
    assert exit_status(small) == 0
    before = (only_run() / "metrics.jsonl").stat().st_mtime_ns
    assert exit_status(small) == 2
    assert "--overwrite" in capsys.readouterr().err
    (only_run() / "last.pt").write_bytes(b"")  # as if the run was killed before it removed last.pt
    assert exit_status([*small, "--resume"]) == 0
    assert not (only_run() / "last.pt").exists()
    assert "test accuracy" in capsys.readouterr().out
    assert (only_run() / "metrics.jsonl").stat().st_mtime_ns == before
    assert exit_status([*small, "--overwrite"]) == 0
    assert (only_run() / "metrics.jsonl").stat().st_mtime_ns > before


def test_resuming_on_other_images_is_refused(small, tiny_folder, tmp_path, capsys):
    copy = tmp_path / "other" / "tiny"
    copy.parent.mkdir()
    subprocess.run(["cp", "-r", str(tiny_folder), str(copy)], check=True)
    next(copy.glob("train/ash/*")).unlink()
    assert exit_status(small) == 0
    assert exit_status([*small, "--data", str(copy), "--resume"]) == 2
    assert "fingerprint" in capsys.readouterr().err


def test_resuming_on_other_frozen_weights_is_refused(small, capsys):
    model = models.build("resnet8", 4)
    for seed in (5, 6):
        models.initialise(model, seed)
        torch.save(model.state_dict(), "w.pt")
        if seed == 5:
            interrupt_after_an_epoch([*small, "--init-from", "w.pt"])
    assert exit_status([*small, "--init-from", "w.pt", "--resume"]) == 2
    assert "sha256" in capsys.readouterr().err


def test_resuming_needs_only_the_weights_of_the_parent_run(small, tmp_path, capsys):
    """What the run recorded about its parent is kept. Other weights under the parent's name are refused."""
    options = [*small, "--mode", "all", "--init-from"]
    for seed in ("3", "4"):
        assert exit_status([*small, "--mode", "all", "--seed", seed, "--out", f"first{seed}"]) == 0
        (tmp_path / f"copy{seed}").mkdir()
        shutil.copy(only_run(Path(f"first{seed}")) / "model.safetensors", f"copy{seed}/w.safetensors")
    parent = str(only_run(Path("first3")))
    assert exit_status([*options, parent, "--out", "whole"]) == 0
    interrupt_after_an_epoch([*options, parent])
    folder = only_run()
    shutil.rmtree("first3")
    assert exit_status([*options, "copy3/w.safetensors", "--out", "elsewhere"]) == 0
    assert exit_status([*options, "copy4/w.safetensors", "--resume", "--out", "elsewhere"]) == 2
    assert "was run with initial_sha256" in capsys.readouterr().err
    Path(parent).mkdir(parents=True)
    shutil.copy("copy3/w.safetensors", f"{parent}/model.safetensors")
    assert exit_status([*options, parent, "--resume"]) == 0
    whole = only_run(Path("whole"))
    assert without_times(folder) == without_times(whole)
    parents = [runs.Run(run).config.parent for run in (folder, whole)]
    assert parents[0] == parents[1] and parents[0].epochs_done_in_all == 3


HARMS = ("no tensors", "nothing", "no rows", "rubbish", "no config", "list", "empty summary")
ROW = '{"epoch": 1, "lr": 0.1, "train_loss": 1.0, "train_acc": 1.0, "test_loss": 1.0, "test_acc": 1.0, '
ROW += '"epoch_s": 1.0, "images_per_s": 1.0}'
KEPT = [
    ("epochs_before", -1),
    ("epochs_before", 2**70),
    ("epochs_before", "3"),
    ("epochs_before", 1.5),
    ("wall_s", float("nan")),
    ("rows", []),
    ("rows", "rows"),
    ("rows", ["{"]),
    ("rows", ["[" * 9999]),
    ("rows", [ROW.replace("1", "-1", 1)]),
    ("rows", [ROW.replace("1", '"1"', 1)]),
    ("rows", [ROW, ROW]),
    ("rows", [ROW.replace("1", str(number), 1) for number in (1, 2, 3, 4)]),
    ("schedule", {"factor": 1.0, "best_acc": "high", "since_best": 0, "since_cut": 0}),
    ("schedule", {"factor": 1.0, "best_acc": 50.0, "since_best": -1, "since_cut": 0}),
]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_run_folder_is_refused_in_two_lines(small, capsys, harm):
    interrupt_after_an_epoch(small)
    folder = only_run()
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
    assert exit_status([*small, "--resume"]) == 2
    said = capsys.readouterr().err
    assert "--overwrite" in said and said.count("\n") <= 2
    assert exit_status([*small, "--overwrite"]) == 0


@pytest.mark.parametrize("name, value", KEPT, ids=lambda value: str(value)[:40])
def test_a_last_pt_with_impossible_numbers_or_rows_is_refused(begun, capsys, name, value):
    state = torch.load(begun / "last.pt", weights_only=True)
    assert state["rows"] and name in state
    torch.save(state | {name: value}, begun / "last.pt")
    with pytest.raises(records.RunError) as refused:
        runs.Run(begun, writes=False).load_last()
    said = str(refused.value)
    assert "last.pt cannot be resumed from" in said and "--overwrite" in said and said.count("\n") == 1
    torch.save(state, begun / "last.pt")
    runs.Run(begun, writes=False).load_last()


BUFFER = "momentum_buffer"
MISFITS = {
    "a momentum of another shape": lambda state, of: of.update({BUFFER: of[BUFFER][:-1]}),
    "a momentum that would be stretched": lambda state, of: of.update({BUFFER: of[BUFFER][:1]}),
    "a momentum of text": lambda state, of: of.update({BUFFER: "fast"}),
    "no momentum": lambda state, of: of.clear(),
    "another optimiser's": lambda state, of: of.update(exp_avg=of[BUFFER]),
    "no groups": lambda state, of: state["step"]["optimizer"].update(param_groups=[]),
    "weights of whole numbers": lambda state, of: state.update(model=state["model"].long()),
    "a weight too many": lambda state, of: state.update(model=state["model"].repeat(2)),
}


@pytest.mark.parametrize("harm", MISFITS)
def test_a_last_pt_with_tensors_that_do_not_fit_is_refused(small, tmp_path, begun, capsys, harm):
    folder = Path(shutil.copytree(begun, tmp_path / "runs" / begun.name))
    state = torch.load(folder / "last.pt", weights_only=True)
    MISFITS[harm](state, state["step"]["optimizer"]["state"][0])
    torch.save(state, folder / "last.pt")
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    capsys.readouterr()
    assert exit_status([*small, "--resume"]) == 2
    said = capsys.readouterr().err
    assert "last.pt cannot be resumed from" in said and "--overwrite" in said and said.count("\n") == 2
    assert before == {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


@pytest.fixture(scope="module")
def begun(tiny_folder, tmp_path_factory):
    """Return the folder of a run that was interrupted after its first epoch."""
    out = tmp_path_factory.mktemp("begun") / "runs"
    interrupt_after_an_epoch([*small_options(tiny_folder), "--out", str(out)])
    return only_run(out)


def test_a_done_run_whose_summary_lacks_a_result_is_refused(small, capsys):
    options = [*small, "--epochs", "1", "--val-split", "4"]
    assert exit_status(options) == 0
    whole = (only_run() / "summary.json").read_text()
    for lacks in ("final_test_acc", "best_test_acc", "checkpoint_bytes"):
        change("summary.json", **{lacks: None})(only_run())
        capsys.readouterr()
        assert exit_status([*options, "--resume"]) == 2
        said = capsys.readouterr().err
        assert f"its status is done, but it has no {lacks}" in said and "--overwrite" in said
        (only_run() / "summary.json").write_text(whole)
    change("summary.json", chosen_test_acc=None)(only_run())
    assert exit_status([*options, "--resume"]) == 0, "it may have been chosen before it was tested"


def test_brackets_in_a_summary_are_shown_verbatim(small, capsys):
    assert exit_status([*small, "--epochs", "1"]) == 0
    change("summary.json", arch="[red]a[/blue]", why="[/]", data_title="[b]")(only_run())
    capsys.readouterr()
    assert exit_status([*small, "--epochs", "1", "--resume"]) == 0
    said = capsys.readouterr().out
    assert "[red]a[/blue]" in said and "[/]" in said and "[b]" in said


def test_a_done_run_without_config_json_is_refused(small, capsys):
    assert exit_status(small) == 0
    (only_run() / "config.json").unlink()
    assert exit_status([*small, "--resume"]) == 2
    said = capsys.readouterr().err
    assert "has no config.json" in said and "--overwrite" in said
