"""Stress tests: runs are killed at every change of their folder and at random moments, and lose nothing.

The runs are small, and their processes are forked (see forked.py). The modes and optimisers take turns.
"""

import contextlib
import itertools
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from forked import end, serve, start
from small_runs import config, small_options, summary, without_times

import config as options_of
import records
import runs

pytestmark = pytest.mark.stress

MODES = ["all", "none", "random", "bn", "gamma", "beta", "bn_main", "shortcut", "output", "conv"]
MODES += ["bn+output", "gamma+shortcut", "conv+output"]
KINDS = [["--mode", mode, "--optimizer", ("sgd", "adam")[i % 2]] for i, mode in enumerate(MODES)]
SEEDS = [["0"], ["0", "1"]]
FILES = [".lock", "config.json", "metrics.jsonl", "model.safetensors", "summary.json"]
TIMES = {"train_s", "startup_s", "wall_s", "peak_memory_bytes"}
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


class Runs:
    """Starts runs, resumes them, and compares what they leave with what undisturbed runs leave."""

    def __init__(self, root: Path, images: Path):
        self.root, self.log, self.number = root, root / "log", itertools.count()
        self.options = [*small_options(images), "--epochs", "2", "--milestones", "1"]
        self.undisturbed: dict[str, dict] = {}
        self.pids, self.shared_memory, self.seconds = set(), set(os.listdir("/dev/shm")), 0.0
        serve()
        assert end(start("data", small_options(images)[-3:], self.log)) == 0

    def new(self) -> Path:
        return self.root / f"runs{next(self.number)}"

    def begin(self, kind: list[str], seeds: list[str], out: Path, *more: str, **kill):
        options = [*self.options, *kind, "--seed", *seeds, "--out", str(out), "--resume", *more]
        process = start("train", options, self.log, **kill)
        self.pids.add(process.pid)
        return process

    def whole(self, kind: list[str]) -> dict[int, dict]:
        """Return, by seed, what undisturbed runs of this kind leave; see `left`."""
        if kind[1] not in self.undisturbed:
            out, began = self.new(), time.monotonic()
            assert end(self.begin(kind, SEEDS[1], out)) == 0
            self.seconds = time.monotonic() - began
            self.undisturbed[kind[1]] = {seed: left(folder) for seed, folder in folders(out).items()}
        return self.undisturbed[kind[1]]

    def check(self, kind: list[str], seeds: list[str], out: Path) -> None:
        """Resume the runs, and assert that they leave what undisturbed runs leave."""
        assert end(self.begin(kind, seeds, out)) == 0
        found = {seed: left(folder) for seed, folder in folders(out).items()}
        assert found == {int(seed): self.whole(kind)[int(seed)] for seed in seeds}
        assert "Traceback" not in self.log.read_text()

    def in_shared_memory(self) -> list[str]:
        """Return the names of new files in /dev/shm that our runs may have left.

        A name torch_PID_* contains the id of its process. The process from which the runs are forked removes
        its locks, sem.mp-*, when it ends; train.py has no named locks.
        """
        new = set(os.listdir("/dev/shm")) - self.shared_memory
        numbers = {name: re.match(r"torch_(\d+)_", name) for name in new if not name.startswith("sem.mp-")}
        return [name for name, of in numbers.items() if not of or int(of[1]) in self.pids]


def folders(out: Path) -> dict[int, Path]:
    return {summary(folder)["seed"]: folder for folder in out.iterdir()}


def left(folder: Path) -> dict:
    """Return what a run leaves, except times and those options that do not change its result."""
    found = config(folder)
    return {
        "files": sorted(file.name for file in folder.iterdir()),
        "model": (folder / records.CHECKPOINT).read_bytes(),
        "metrics": without_times(folder),
        "summary": {name: value for name, value in summary(folder).items() if name not in TIMES},
        "spec": found.spec,
        "options": options_of.differing(found.options, options_of.defaults(), "variant", "setting"),
    }


@pytest.fixture(scope="module")
def small_runs(tiny_folder, tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("killed"), tiny_folder)
    yield made
    assert not made.in_shared_memory()


def test_undisturbed_runs_leave_exactly_the_expected_files(small_runs):
    for kind in KINDS:
        assert all(run["files"] == FILES for run in small_runs.whole(kind).values())


@pytest.mark.parametrize("seeds", SEEDS, ids=" ".join)
def test_a_run_killed_before_any_change_of_its_folder_loses_nothing(small_runs, seeds, record_property):
    """If it has one seed, the resumed run is killed again, before its change of the same number."""
    kills = 0
    for number in itertools.count(1):
        kind, out, survived = KINDS[number % len(KINDS)], small_runs.new(), False
        for attempt in range(2 if len(seeds) == 1 else 1):
            status = end(small_runs.begin(kind, seeds, out, kill_at=(number, out)))
            assert status in (0, -signal.SIGKILL)
            survived = attempt == 0 and status == 0
            if status == 0:
                break
            kills += 1
        small_runs.check(kind, seeds, out)
        if survived:
            break
    assert number > 40 * len(seeds) and kills >= number - 1
    what = "a run" if len(seeds) == 1 else f"{len(seeds)} seeds side by side"
    record_property(
        "tried", f"{what}: {kills} kills, before each of {number - 1} changes of files; lost: nothing"
    )


def test_a_run_ended_at_any_moment_resumes_to_the_same_bytes(small_runs, record_property):
    drawn, ended, numbers = random.Random(0), {number: [] for number in SIGNALS}, itertools.cycle(SIGNALS)
    small_runs.whole(KINDS[0])
    for kind, seeds, _ in itertools.product(KINDS, SEEDS, range(2)):
        out = small_runs.new()
        for _ in range(drawn.choice([1, 2])):
            number = next(numbers)
            process = small_runs.begin(kind, seeds, out)
            time.sleep(drawn.uniform(0, small_runs.seconds))
            with contextlib.suppress(ProcessLookupError):  # the process has already ended
                os.kill(process.pid, number)
            status = end(process, seconds=10)
            assert status in (0, -number, 1 if number != signal.SIGKILL else 0)
            ended[number].append(status)
        small_runs.check(kind, seeds, out)
    kills = {number.name: sum(status != 0 for status in ended[number]) for number in SIGNALS}
    assert ended[signal.SIGTERM].count(1) > 5 and ended[signal.SIGINT].count(1) > 5
    told = ", ".join(f"{count} of {name}" for name, count in kills.items())
    record_property("tried", f"runs ended at random moments: {told}; lost: nothing")


MANY = ["--epochs", "100000", "--milestones"]


def begun(small_runs: Runs, seeds: list[str], out: Path, **first):
    """Start or resume runs of 100,000 epochs, and return their process once it has saved another epoch."""
    before = epochs_kept(out)
    process = small_runs.begin(KINDS[3], seeds, out, *MANY, **first)
    deadline = time.monotonic() + 60
    while epochs_kept(out) <= before or epochs_kept(out, min) < 1:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    return process


def epochs_kept(out: Path, of=max) -> int:
    kept = [
        len(list(records.read_epochs(folder))) for folder in out.glob("*") if (folder / "last.pt").exists()
    ]
    return of(kept, default=0)


@pytest.mark.parametrize("seeds", SEEDS, ids=" ".join)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_told_to_end_keeps_its_epochs_and_ends_with_status_1(small_runs, number, seeds):
    out = small_runs.new()
    for _ in range(2):
        process, began = begun(small_runs, seeds, out), time.monotonic()
        os.kill(process.pid, number)
        assert end(process, seconds=10) == 1
    assert time.monotonic() - began < 10
    assert {summary(folder)["status"] for folder in out.iterdir()} == {"interrupted"}
    said = small_runs.log.read_text()
    assert "--resume continues after epoch" in said and "Traceback" not in said


def ends_slowly() -> None:
    """Patch this process: Run.finish takes a minute, and writes nothing."""
    runs.Run.finish = lambda *_: time.sleep(60)


@pytest.mark.parametrize("seeds", SEEDS, ids=" ".join)
def test_a_second_ctrl_c_ends_a_run_at_once(small_runs, seeds):
    out = small_runs.new()
    process = begun(small_runs, seeds, out, first=ends_slowly)
    os.kill(process.pid, signal.SIGINT)
    process.join(1)
    for _ in seeds[1:]:  # the further runs take one Ctrl-C each
        assert process.is_alive(), "it takes its time to write"
        os.kill(process.pid, signal.SIGINT)
        process.join(1)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    assert end(process, seconds=5) in (1, -signal.SIGINT)
    end_of_it = small_runs.log.read_text()
    assert "Traceback" not in end_of_it
    resumed = begun(small_runs, seeds, out)
    os.kill(resumed.pid, signal.SIGTERM)
    assert end(resumed, seconds=10) == 1
