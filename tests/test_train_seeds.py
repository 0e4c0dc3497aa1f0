"""Tests of --seed: the same seed gives the same run, and several seeds train side by side in a process."""

from pathlib import Path

import pytest
from small_runs import exit_status, metrics, only_run, summary, without_times

import checkpoint
import records
import runs
from records import files


@pytest.fixture
def seeds(small):
    """Return the options of three runs side by side."""
    return [*small, "--seed", "0", "1", "2"]


def folders() -> dict[int, Path]:
    return {summary(folder)["seed"]: folder for folder in Path("runs").iterdir()}


def test_the_same_seed_gives_the_same_run_and_another_seed_another(small):
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert exit_status([*small, "--epochs", "1", "--out", out, "--seed", seed]) == 0
    a, b, c = (metrics(only_run(Path(out)))[0]["train_loss"] for out in "abc")
    assert a == b != c


def test_seeds_side_by_side_equal_their_solo_runs(small, seeds, capsys):
    assert exit_status(seeds) == 0
    said = capsys.readouterr().out
    assert all(f"[tiny s{seed}] epoch 3/3" in said and f"bn_only, seed {seed}" in said for seed in range(3))
    together = folders()
    assert exit_status([*small, "--seed", "1", "--out", "solo"]) == 0
    solo = only_run(Path("solo"))
    assert without_times(solo) == without_times(together[1]) != without_times(together[0])
    assert checkpoint.read_checkpoint(solo)[1] == checkpoint.read_checkpoint(together[1])[1]
    assert solo.name == together[1].name


def test_seeds_side_by_side_are_interrupted_and_resumed_together(seeds, monkeypatch):
    end_epoch = runs.Run.end_epoch

    def interrupted(run, row, state):
        end_epoch(run, row, state)
        if row.epoch == 2 and "-s1-" in run.path.name:
            raise KeyboardInterrupt

    assert exit_status([*seeds, "--out", "whole"]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(runs.Run, "end_epoch", interrupted)
        assert exit_status(seeds) == 1
    assert {summary(folder)["status"] for folder in folders().values()} == {"interrupted"}
    assert exit_status([*seeds, "--resume"]) == 0
    for folder in folders().values():
        whole = Path("whole") / folder.name
        assert without_times(folder) == without_times(whole)
        assert (folder / records.CHECKPOINT).read_bytes() == (whole / records.CHECKPOINT).read_bytes()


def test_no_seed_is_overwritten_if_one_of_them_is_refused(seeds, capsys):
    assert exit_status(seeds) == 0
    before = {file: file.read_bytes() for file in Path("runs").glob("*/*")}
    with runs.open_run(folders()[1], resume=True):
        assert exit_status([*seeds, "--overwrite"]) == 2
    assert "is in use" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in Path("runs").glob("*/*")}
    assert exit_status([*seeds, "--overwrite"]) == 0
    now = {file: file.read_bytes() for file in before}
    assert all(now[file] != before[file] for file in before if file.name == "summary.json"), "other times"


def test_a_seed_that_fails_does_not_stop_the_others(seeds, monkeypatch, capsys):
    end_epoch = runs.Run.end_epoch

    def full(run, row, state):
        if "-s1-" in run.path.name:
            raise OSError(28, "No space left on device")
        end_epoch(run, row, state)

    monkeypatch.setattr(runs.Run, "end_epoch", full)
    assert exit_status(seeds) == 1
    assert [summary(folder)["status"] for _, folder in sorted(folders().items())] == [
        "done",
        "failed",
        "done",
    ]
    assert "No space left on device" in capsys.readouterr().err


def test_an_unwritable_folder_of_one_seed_does_not_stop_the_others(seeds, monkeypatch, capsys):
    write = files.write_atomically

    def full(path, content):
        if "-s1-" in path.parent.name:
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(files, "write_atomically", full)
    assert exit_status(seeds) == 1
    ended = [folder / "summary.json" for folder in sorted(Path("runs").iterdir())]
    assert [file.exists() and summary(file.parent)["status"] for file in ended] == ["done", False, "done"]
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_no_seed_starts_if_one_of_them_is_refused(small, seeds, capsys):
    assert exit_status([*small, "--seed", "2"]) == 0
    assert exit_status(seeds) == 2
    assert "--resume" in capsys.readouterr().err
    assert [folder.name for folder in Path("runs").iterdir() if (folder / "config.json").exists()] == [
        only.name for only in Path("runs").iterdir() if "-s2-" in only.name
    ]
