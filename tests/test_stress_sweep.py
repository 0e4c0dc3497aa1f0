"""Stress tests: after a sweep, data preparation, rebuild or report is killed, the next call completes it."""

import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from forked import end, serve, start
from made_runs import write_run
from small_runs import SMALL, only_run

import progress
import report
import runs
import sweep
import train
from records import files

pytestmark = pytest.mark.stress

SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


@pytest.fixture(scope="module", autouse=True)
def served():
    serve()


def send(process: BaseProcess, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the process has already ended
        os.kill(process.pid, number)


# ---- a sweep ----

LRS = [f"--batch-size 32 --lr 0.{i:02d}" for i in range(1, 19)]
FAILING = {
    "--batch-size 32 --lr 1e30": "the loss is not finite",
    "--batch-size 4096": "--batch-size 4096: give",
}
VARIANTS = [*LRS[:9], *FAILING, *LRS[9:]]
SEEDS = 10
CELLS = len(VARIANTS) * SEEDS


class ForkedTrainer(multiprocessing.get_context("fork").Process):
    """A replacement for subprocess.Popen: runs train.py in a fork of the sweep, which has imported it."""

    def __init__(self, command, env, stdin, stdout, stderr, process_group, preexec_fn):
        super().__init__(
            target=self.train, args=(command[2:], env, stdout.fileno(), process_group, preexec_fn)
        )
        self.start()

    @staticmethod
    def train(options, env, said, process_group, preexec_fn):
        for number in SIGNALS[1:]:
            signal.signal(number, signal.SIG_DFL)
        os.setpgid(0, process_group)
        preexec_fn()
        os.dup2(said, 1), os.dup2(said, 2)
        os.environ.update(env)
        subprocess.Popen = popen
        sys.exit(progress.run("train.py", lambda: train.main(options)))

    def poll(self) -> int | None:
        return self.exitcode

    returncode, wait = property(poll), BaseProcess.join


popen = subprocess.Popen


def two_hundred_cells() -> None:
    """Patch this process: its sweep has 200 cells, trains them in forks of itself, and prepares no data."""
    sweep.GRIDS["cells"] = {"VARIANTS": VARIANTS, "ARCHS": "resnet8", "MODES": "bn_only"}
    seeds = " ".join(map(str, range(SEEDS)))
    os.environ.update(GRID="cells", SEEDS=seeds, JOBS="6", REPLICAS="2")
    for name in ("ARCHS", "MODES", "SLURM_ARRAY_TASK_ID"):
        os.environ.pop(name, None)
    sweep.prepare, subprocess.Popen = lambda options: True, ForkedTrainer


def epochs_trained(logs: Path) -> Counter:
    """Return how often the logs say that each (learning rate, seed, epoch) was trained to its end."""
    counts = Counter()
    for log in logs.glob("*.log"):
        for line in log.read_text().splitlines():
            if line.startswith("$ "):
                lr = re.search(r"--lr (\S+)", line) or re.search(r"(--batch-size \d{4})", line)
                seeds = re.search(r"--seed ([\d ]+)$", line)[1].split()
            elif trained := re.match(r"\[tiny(?: s(\d+))?\] epoch (\d+)/2 ", line):
                counts[lr[1], trained[1] or seeds[0], trained[2]] += 1
    return counts


def trainers(process: BaseProcess) -> list[int]:
    """Return the ids of a sweep's child processes."""
    with contextlib.suppress(OSError):
        return [
            int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
    return []


def statuses(out: Path) -> Counter:
    return Counter(runs.Run(path).status for path in out.glob("tiny-*"))


def wait_for(condition, process: BaseProcess, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_killed_sweep_ends_with_every_cell_done_or_named_as_failed(tiny_folder, tmp_path, record_property):
    """Unlike in a real sweep, train.py runs in forks of the sweep, and the data is prepared before."""
    out, log, drawn, kills = tmp_path / "runs", tmp_path / "log", random.Random(0), Counter()
    images = ["--data", str(tiny_folder), "--data-dir", str(tmp_path / "prepared")]
    options = [*images, *SMALL[4:], "--epochs", "2", "--milestones", "1", "--out", str(out)]
    assert end(start("data", [images[1], *images[2:]], log)) == 0

    def kill(pid: int, number: int, what: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            kills[f"{number.name} of {what}"] += 1

    for number in itertools.islice(itertools.cycle([signal.SIGKILL, *SIGNALS]), 8):
        enough = statuses(out)["done"] + drawn.randint(2, 12)
        process = start("sweep", options, log, first=two_hundred_cells)
        wait_for(lambda enough=enough: statuses(out)["done"] >= enough, process)
        for pid in drawn.sample(pids := trainers(process), min(2, len(pids))):
            kill(pid, signal.SIGKILL, "a cell's process")
        time.sleep(drawn.uniform(0, 0.5))
        kill(process.pid, number, "the sweep")
        assert end(process, seconds=10) in (-number, 1)
    assert 0 < statuses(out)["done"] < CELLS - 2 * SEEDS, "it was killed on its way"

    process = start("sweep", options, tmp_path / "before", first=two_hundred_cells)
    for _ in range(10):  # it goes on although its processes are killed
        wait_for(lambda: trainers(process), process)
        for pid in trainers(process)[:1]:
            kill(pid, signal.SIGKILL, "a cell's process")
        time.sleep(drawn.uniform(0, 1))
    assert end(process, seconds=300) == 1
    ended = (tmp_path / "before").read_text().rpartition("cells failed:\n")[2]
    done, named = statuses(out)["done"], re.findall(r"^(?:failed|diverged|interrupted) +(\S+)$", ended, re.M)
    assert done + len(set(named)) == CELLS, "every cell is done, or failed by name"

    assert end(start("sweep", options, tmp_path / "last", first=two_hundred_cells), seconds=300) == 1
    ended = (tmp_path / "last").read_text()
    assert f"{CELLS - 2 * SEEDS} of {CELLS} cells done" in ended
    assert f"{2 * SEEDS} of {CELLS} cells failed:" in ended
    for variant, why in FAILING.items():
        assert (
            len(re.findall(rf"^ +.*{re.escape(why)}", ended.rpartition("cells failed:")[2], re.M)) == SEEDS
        ), variant
    assert statuses(out) == {"done": CELLS - 2 * SEEDS, "diverged": SEEDS}, "what was refused has no folder"
    trained = epochs_trained(out / "logs")
    assert len([cell for cell in trained if cell[2] == "2"]) <= CELLS - 2 * SEEDS
    assert max(trained.values()) == 1, "no epoch was trained twice to its end"
    strays = [p for p in out.glob("tiny-*/*") if p.name == "last.pt" or files.HALF_WRITTEN in p.name]
    assert all(runs.Run(path.parent).status == "diverged" for path in strays)
    told = ", ".join(f"{count} {what}" for what, count in kills.items())
    record_property(
        "tried", f"a sweep of {CELLS} cells: {told}; {CELLS - 2 * SEEDS} done, {2 * SEEDS} failed by name"
    )


# ---- data preparation, rebuild and report ----


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Killed:
    """A script that is killed and called again, and must then leave the same files as an undisturbed call.

    Each trial has a new folder under `root`. The path of this folder, or of the file `name` in it, follows
    `options` on the command line. `first` is as in forked.start.
    """

    def __init__(self, script: str, options: list[str], root: Path, name: str = "", first=None):
        self.script, self.options, self.name, self.first = script, options, name, first
        self.root, self.log, self.number, self.kills = root, root / f"{script}.log", itertools.count(), 0
        out, began = self.new(), time.monotonic()
        self.again(out)
        self.seconds, self.undisturbed = time.monotonic() - began, contents(out)

    def new(self) -> Path:
        out = self.root / f"{self.script}{next(self.number)}"
        out.mkdir()
        return out

    def begin(self, out: Path, **kill) -> BaseProcess:
        return start(self.script, [*self.options, str(out / self.name)], self.log, first=self.first, **kill)

    def again(self, out: Path) -> None:
        assert end(self.begin(out)) == 0
        assert "Traceback" not in self.log.read_text()

    def check(self, out: Path) -> None:
        assert contents(out) == self.undisturbed

    def at_changes(self, numbers: Iterator[int], together: int = 1) -> int:
        """Kill calls before their n-th change of files, for each n in `numbers`, until one has fewer changes.

        `numbers` is endless. After every `together` kills in one folder, call the script again and check its
        files. Returns n - 1 for the first n that a call does not reach.
        """
        out = self.new()
        for count, number in enumerate(numbers, start=1):
            status = end(self.begin(out, kill_at=(number, out)))
            assert status in (0, -signal.SIGKILL)
            if status == 0:
                self.check(out)
                return number - 1
            self.kills += 1
            if count % together == 0:
                self.again(out)
                self.check(out)
                out = self.new()

    def at_random(self, count: int) -> None:
        """End `count` calls at random moments, by each signal in turn; check the files after another call."""
        drawn = random.Random(0)
        for number in itertools.islice(itertools.cycle(SIGNALS), count):
            out = self.new()
            process = self.begin(out)
            time.sleep(drawn.uniform(0, self.seconds))
            send(process, number)
            status = end(process, seconds=10)
            assert status in (0, -number, 1 if number != signal.SIGKILL else 0)
            self.kills += status != 0
            self.again(out)
            self.check(out)

    def two_at_once(self, count: int) -> None:
        """Start `count` pairs of calls in one folder; in three of four pairs, end the first by a signal."""
        drawn = random.Random(1)
        for number in itertools.islice(itertools.cycle([*SIGNALS, None]), count):
            out = self.new()
            pair = [self.begin(out), self.begin(out)]
            if number:
                time.sleep(drawn.uniform(0, self.seconds))
                send(pair[0], number)
            ended = [end(process) for process in pair]
            assert ended[1] == 0 and (number or ended[0] == 0)
            self.kills += ended[0] != 0
            self.again(out)
            self.check(out)

    def tried(self, what: str, changes: str, pairs: int) -> str:
        told = f"{self.kills} kills, before {changes} changes of files and at random moments"
        return f"{what}: {told}, {pairs} pairs at once; lost: nothing"


def test_a_call_completes_killed_data_preparation(tiny_folder, tmp_path, record_property):
    if not importlib.util.find_spec("ffcv"):
        pytest.skip("needs ffcv, without which no prepared data is written")
    data = Killed("data", [str(tiny_folder), "--data-dir"], tmp_path)
    assert [name.rpartition("-")[2] for name in sorted(data.undisturbed)] == [
        "beton/.lock",
        "beton/index.json",
        "test.beton",
        "train.beton",
    ]
    changes = data.at_changes(itertools.count(1))
    assert changes > 10
    data.at_random(15)
    data.two_at_once(12)
    record_property("tried", data.tried("data preparation", f"each of {changes}", 12))


def test_a_call_completes_a_killed_rebuild(tiny_folder, tmp_path, record_property):
    images = ["--data", str(tiny_folder), "--data-dir", str(tmp_path / "prepared")]
    options = [*SMALL, *images, "--epochs", "1", "--milestones", "--out", str(tmp_path / "runs")]
    assert end(start("train", options, tmp_path / "log")) == 0
    run = str(only_run(tmp_path / "runs"))
    rebuilt = Killed("checkpoint", ["rebuild", run, "--overwrite", "--out"], tmp_path, "full.safetensors")
    changes = rebuilt.at_changes(itertools.count(1))
    assert changes > 3 and list(rebuilt.undisturbed) == ["full.safetensors"]
    rebuilt.at_random(15)
    rebuilt.two_at_once(12)
    record_property("tried", rebuilt.tried("rebuild", f"each of {changes}", 12))


def draws_nothing() -> None:
    """Patch the report to write empty figures, because drawing them takes most of its time."""
    report.render = lambda figure: dict.fromkeys(("png", "pdf", "webp"), b"")


def test_a_call_completes_a_killed_report(tmp_path, record_property):
    for seed in range(2):
        write_run(tmp_path / "runs", "resnet14", "bn_only", seed, analysis=False)
    options = [str(tmp_path / "runs"), "--out"]
    killed = Killed("report", options, tmp_path, first=draws_nothing)
    changes = killed.at_changes(itertools.count(1, 4), together=10)  # a file takes five changes
    assert changes > 4 * len(killed.undisturbed)
    write_run(tmp_path / "runs", "resnet14", "bn_only", 0, epochs=6, analysis=False)  # adds a section
    (tmp_path / "two").mkdir()
    two = Killed("report", options, tmp_path / "two")
    assert len(two.undisturbed) > len(killed.undisturbed)
    two.at_random(6)
    two.two_at_once(4)
    killed.kills += two.kills
    record_property("tried", killed.tried("report", f"every fourth of {changes}", 4))
