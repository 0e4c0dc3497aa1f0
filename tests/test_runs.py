"""A run folder has one name per run, holds whole files only, and lets one process in."""

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import SPEC

import config
import runs

ROOT = Path(runs.__file__).parent
CONFIG = runs.Config(
    options=config.Options(data="synthetic", arch="resnet8", seed=3),
    spec=SPEC,
    parent=None,
    data_title="Synthetic",
    frozen_sha256="0" * 64,
    initial_sha256=None,
    device_name="cpu",
    versions={"torch": "2.13.0", "ffcv": None},
    git_commit=None,
)


def epoch(number: int, **changes) -> runs.Epoch:
    metrics = {"lr": 0.1, "train_loss": 2.0, "train_acc": 20.0, "test_loss": None, "test_acc": None}
    return runs.Epoch(**{"epoch": number, "epoch_s": 1.5, "images_per_s": None} | metrics | changes)


def summary(status: str) -> runs.Summary:
    return runs.Summary(
        status=status,
        why=None,
        data="synthetic",
        data_title="Synthetic",
        arch="resnet8",
        mode="bn_only",
        seed=3,
        variant={"lr": 0.05, "milestones": (1, 2)},
        params_total=78_042,
        params_trained=672,
        final_test_acc=50.0,
        best_test_acc=50.0,
        epochs_done=0,
        train_s=0.0,
        startup_s=0.0,
        peak_memory_bytes=None,
        checkpoint_bytes=2000,
        full_bytes=312_168,
        frozen_sha256="0" * 64,
    )


def test_names_tell_runs_apart():
    assert runs.run_name(config.Options(), "cifar10") == "cifar10-resnet32-bn_only-s0"
    settings = {"arch": "resnet14_w2", "mode": "bn+output", "lr": 1e-3, "milestones": (1, 2)}
    settings |= {"seed": 3, "init_from": "../w/a (1).pt"}
    name = runs.run_name(dataclasses.replace(config.defaults(quick=True), **settings), "my set")
    assert name == "my_set-resnet14_w2-bn+output-s3-quick-init_froma__1_-lr0.001-milestones1_2"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "summary.json"
    runs.write_atomically(target, "old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        runs.write_atomically(target, "new")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_an_existing_run_is_refused_resumed_or_overwritten(tmp_path):
    with runs.open_run(tmp_path / "a") as run:
        run.begin(CONFIG)
        run.end_epoch(epoch(1), {"weights": torch.arange(3)})
    with pytest.raises(runs.RunError, match=r"--resume .* --overwrite"), runs.open_run(tmp_path / "a"):
        pass
    with runs.open_run(tmp_path / "a", resume=True) as run:
        assert run.load_last()["weights"].tolist() == [0, 1, 2] and run.rows == [epoch(1)]
        assert run.config == CONFIG
    with runs.open_run(tmp_path / "a", overwrite=True) as run:
        assert run.load_last() is None and run.config is None


def test_a_run_killed_between_its_two_files_loses_no_epoch(tmp_path, monkeypatch):
    with runs.open_run(tmp_path / "a") as run:
        run.end_epoch(epoch(1), {})
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(run, "write_metrics", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
            run.end_epoch(epoch(2), {})  # last.pt is written, metrics.jsonl is not
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 1
    with runs.open_run(tmp_path / "a", resume=True) as run:
        run.load_last()
        assert [row.epoch for row in run.rows] == [1, 2]
        run.write_metrics()
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert list(runs.read_epochs(tmp_path / "a")) == [epoch(1), epoch(2)]


def test_a_run_without_its_configuration_counts_as_begun(tmp_path):
    with runs.open_run(tmp_path / "a") as run:
        run.end_epoch(epoch(1), {})
    with pytest.raises(runs.RunError, match="--resume"), runs.open_run(tmp_path / "a"):
        pass
    with runs.open_run(tmp_path / "a", overwrite=True) as run:
        assert run.load_last() is None


def test_a_full_disk_keeps_the_last_epoch(tmp_path):
    with runs.open_run(tmp_path / "a") as run:
        run.end_epoch(epoch(1), {"x": 1})
        before, (_, most) = set(run.path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, most))  # bytes a file; fails as a full disk does
        try:
            with pytest.raises(OSError, match=r"File too large: .*/a/last\.pt'$"):
                run.end_epoch(epoch(2), {"x": torch.zeros(100_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        assert set(run.path.iterdir()) == before
        assert run.load_last() == {"x": 1} and run.rows == [epoch(1)]


def test_what_is_not_a_number_is_not_written_as_json():
    for name in ("test_loss", "train_loss", "epoch_s", "images_per_s"):
        for value in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match=rf"{name}\n.*finite number"):
                epoch(1, **{name: value})


# Is killed, or waits, just before the file that it writes gets its name
WRITER = """
import os, pathlib, signal, sys, runs
def replace(*_):
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print("ready", flush=True)
    sys.stdin.read()
    os.rename(*_)
os.replace = replace
runs.write_atomically(pathlib.Path(sys.argv[1]), "theirs")
"""


def writer(file, when: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(file), when]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_leftovers_of_a_killed_writer_are_removed(tmp_path):
    writer(tmp_path / "last.pt", "killed").wait()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".last.pt.")
    with runs.open_run(tmp_path, resume=True):
        assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]
    writer(tmp_path / "table.md", "killed").wait()
    runs.write_atomically(tmp_path / "figure.png", b"")  # outside a run, as rebuild and the report do
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "figure.png"}


def test_a_writer_that_is_alive_is_left_alone(tmp_path):
    (tmp_path / ".table.md.swp").write_text("an editor's")
    with writer(tmp_path / "table.md", "waits") as other:
        assert other.stdout.readline() == "ready\n"
        for file in ("table.md", "figure.png"):
            runs.write_atomically(tmp_path / file, "ours")
        assert (tmp_path / "table.md").read_text() == "ours"
        other.communicate("")
    assert other.returncode == 0 and (tmp_path / "table.md").read_text() == "theirs"
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "figure.png", ".table.md.swp"}


def test_a_done_run_that_was_killed_before_it_removed_last_pt_has_it_removed_at_the_next_look(tmp_path):
    with runs.open_run(tmp_path / "a") as run:
        run.end_epoch(epoch(1), {})
        run.finish(summary("interrupted"))
        runs.tidy(tmp_path / "a")  # which is in use
        assert run.last.exists()
    runs.tidy(tmp_path / "a")
    assert run.last.exists()  # to resume from
    run.write("summary.json", summary("done").to_json())
    with runs.open_run(tmp_path / "a", resume=True):
        runs.tidy(tmp_path / "a")
        assert run.last.exists()
    runs.tidy(tmp_path / "a")
    assert not run.last.exists() and run.status == "done"


def test_a_second_process_is_kept_out(tmp_path):
    code = f"import runs\nwith runs.open_run(runs.Path({str(tmp_path / 'a')!r})): pass"
    with runs.open_run(tmp_path / "a"):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert second.returncode == 1 and "is in use by another process" in second.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_rubbish_in_a_run_folder_is_named(tmp_path):
    with runs.open_run(tmp_path / "a") as run:
        (run.path / "last.pt").write_bytes(b"rubbish")
        with pytest.raises(runs.RunError, match=r"last\.pt cannot be resumed from"):
            run.load_last()
        for rubbish in ("{", "[]", "{}", '{"status": "done"}'):
            (run.path / "summary.json").write_text(rubbish)
            with pytest.raises(runs.RunError, match=r"summary\.json"):
                run.summary  # noqa: B018


def test_last_pt_is_removed_when_the_run_is_done_and_kept_when_it_failed(tmp_path):
    with runs.open_run(tmp_path / "a") as run:
        run.end_epoch(epoch(1), {})
        run.finish(summary("diverged"))
        assert (run.path / "last.pt").exists() and run.status == "diverged"
        run.finish(summary("done"))
        assert not (run.path / "last.pt").exists() and run.status == "done"
        assert run.summary == summary("done")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(runs.RunError, match="--out"), runs.open_run(tmp_path / "file" / "a"):
        pass


def test_an_onlooker_reads_what_is_there_and_changes_nothing(tmp_path):
    with runs.open_run(tmp_path / "name") as run:
        run.begin(CONFIG)
        run.end_epoch(epoch(1), {})
        before = {path: path.read_bytes() for path in run.path.iterdir()}
        with runs.open_run(tmp_path / "name", overwrite=True, writes=False) as onlooker:
            assert onlooker.config == CONFIG and onlooker.load_last() == {} and onlooker.rows == run.rows
            onlooker.begin(CONFIG.model_copy(update={"device_name": "another"}))
            onlooker.end_epoch(epoch(2), {})
            onlooker.write("model.safetensors", b"")
            onlooker.finish(summary("done"))
        assert onlooker.rows == [epoch(1), epoch(2)]
        assert before == {path: path.read_bytes() for path in run.path.iterdir()}
