"""Runs killed at every change of their folder and at random moments: resumed, they lose nothing.

Each is small, and its process is forked, see forked.py. Every mode and both optimisers take turns.
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
    """Runs of each kind in folders of their own, and how they end undisturbed."""

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
        """By its seed, what an undisturbed run of this kind leaves."""
        if kind[1] not in self.undisturbed:
            out, began = self.new(), time.monotonic()
            assert end(self.begin(kind, SEEDS[1], out)) == 0
            self.seconds = time.monotonic() - began
            self.undisturbed[kind[1]] = {seed: left(folder) for seed, folder in folders(out).items()}
        return self.undisturbed[kind[1]]

    def check(self, kind: list[str], seeds: list[str], out: Path) -> None:
        """Resume the runs, and compare what they leave with what undisturbed ones do."""
        assert end(self.begin(kind, seeds, out)) == 0
        found = {seed: left(folder) for seed, folder in folders(out).items()}
        assert found == {int(seed): self.whole(kind)[int(seed)] for seed in seeds}
        assert "Traceback" not in self.log.read_text()

    def in_shared_memory(self) -> list[str]:
        """What is new there, and neither bears the number of another process nor is the forking process's.

        That one removes its locks, `sem.mp-*`, when it ends; train.py by itself has none with a name.
        """
        new = set(os.listdir("/dev/shm")) - self.shared_memory
        numbers = {name: re.match(r"torch_(\d+)_", name) for name in new if not name.startswith("sem.mp-")}
        return [name for name, of in numbers.items() if not of or int(of[1]) in self.pids]


def folders(out: Path) -> dict[int, Path]:
    return {summary(folder)["seed"]: folder for folder in out.iterdir()}


def left(folder: Path) -> dict:
    """All that a run leaves but times, and which options it was given that do not change its result."""
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


def test_the_undisturbed_runs_leave_their_files_alone(small_runs):
    for kind in KINDS:
        assert all(run["files"] == FILES for run in small_runs.whole(kind).values())


@pytest.mark.parametrize("seeds", SEEDS, ids=" ".join)
def test_killed_before_any_change_of_its_folder_a_run_ends_as_undisturbed(small_runs, seeds, record_property):
    """And killed once more, at the change of the same number, when it was resumed."""
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


def test_ended_at_any_moment_a_run_is_resumed_to_the_same_bytes(small_runs, record_property):
    drawn, ended, numbers = random.Random(0), {number: [] for number in SIGNALS}, itertools.cycle(SIGNALS)
    small_runs.whole(KINDS[0])
    for kind, seeds, _ in itertools.product(KINDS, SEEDS, range(2)):
        out = small_runs.new()
        for _ in range(drawn.choice([1, 2])):
            number = next(numbers)
            process = small_runs.begin(kind, seeds, out)
            time.sleep(drawn.uniform(0, small_runs.seconds))
            with contextlib.suppress(ProcessLookupError):  # it has ended
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
    """A process of runs without end, when each has kept an epoch more than before."""
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
def test_told_to_end_a_run_keeps_its_epochs_and_ends_with_status_1(small_runs, number, seeds):
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
    """Let it take a minute to write how a run ended."""
    runs.Run.finish = lambda *_: time.sleep(60)


@pytest.mark.parametrize("seeds", SEEDS, ids=" ".join)
def test_a_second_ctrl_c_ends_a_run_at_once(small_runs, seeds):
    out = small_runs.new()
    process = begun(small_runs, seeds, out, first=ends_slowly)
    os.kill(process.pid, signal.SIGINT)
    process.join(1)
    for _ in seeds[1:]:  # one for each run that it would still tell
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
