"""The grid of runs, one after another or spread over the GPUs of this machine.

    bash sweep.sh [--list] [train.py options]    # ARCHS, MODES, SEEDS choose the grid; --list only shows it
    GRID=width bash sweep.sh                     # a named grid: depth, width, vgg, parts, init, recipe, ...
    JOBS=2 REPLICAS=1 bash sweep.sh              # processes per GPU [1], seeds per process [GPU: all, CPU: 1]

A cell is one run of train.py. All that is known of it is in its folder, so any number of sweeps may share the
folders, and the next takes up what a killed one leaves. Exit status 0: all done, 1: not all, 2: unusable.
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

import progress as display
import train
from config import OptionError
from grid import (
    FOLDER,
    Cell,
    Forecast,
    State,
    accuracy,
    duration,
    look,
    make_grid,
    prepare,
    show_list,
    title,
    with_starts,
)

LOOK_AGAIN_S = 2.0  # at cells that another sweep has


@dataclass
class Job:
    """A process that trains cells, on the GPU (or CPUs) that `place` gives it."""

    cells: list[Cell]
    place: dict[str, str]
    log: Path
    process: subprocess.Popen


def places(device: str, jobs: int) -> list[dict[str, str]]:
    """For each process at once, the environment that says where: a GPU `jobs` times, or the CPUs."""
    count = torch.cuda.device_count() if device != "cpu" else 0
    if count:
        gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
        gpus = gpus if gpus[0].startswith("MIG-") else gpus[:count]  # of MIG's parts CUDA counts but one
        return [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(jobs) for gpu in gpus]
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)  # more than there are cores wait for each other
    threads = os.environ.get("OMP_NUM_THREADS", str(threads))
    return [{} if jobs == 1 else {"OMP_NUM_THREADS": threads}] * jobs


def start(cells: list[Cell], place: dict[str, str]) -> Job:
    """train.py for these cells, which differ in nothing but the seed; what it says goes to a log."""
    seeds = [str(cell.options.seed) for cell in cells]
    command = [sys.executable, str(FOLDER / "train.py"), *cells[0].arguments, "--resume", "--seed", *seeds]
    log = cells[0].path.parent / "logs" / f"{title(cells)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        file.write(f"$ {shlex.join(['python', *command[1:]])}\n")
        file.flush()
        # A group of its own, so that Ctrl-C reaches us, who pass it on once, and not every process twice.
        settings = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "process_group": 0}
        environment = {**os.environ, **place}
        process = subprocess.Popen(command, env=environment, preexec_fn=_end_with_parent, **settings)
    return Job(cells, place, log, process)


_libc = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """Be asked to stop (SIGTERM) when the sweep is killed in a way that lets it ask nobody."""
    _libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Sweep:
    """Cells at work: those that nobody trains are started wherever there is a free place."""

    def __init__(self, cells: Sequence[Cell], places: list[dict[str, str]], replicas: int):
        self.cells, self.free, self.replicas = cells, list(places), replicas
        self.at_once = len(places)
        self.states = {cell: look(cell) for cell in cells}
        self.jobs: list[Job] = []
        self.tried: dict[Cell, Path] = {}  # with its log
        self.alone: set[Cell] = set()  # which failed beside other seeds, and may not by themselves
        self.overview = Overview(self)

    def run(self) -> None:
        """Until every cell is done, or was tried. A cell that another sweep has is waited for."""
        with self.overview:
            self.overview.say(f"{self.count()}; logs in {self.cells[0].path.parent / 'logs'}")
            told = False
            while True:
                self.look()
                self.give_up()
                while self.free and (cells := self.next()):
                    job = start(cells, self.free.pop(0))
                    self.jobs.append(job)
                    self.tried |= dict.fromkeys(cells, job.log)
                    self.overview.say(f"started {title(cells)}")
                if not self.jobs and not (waiting := self.waiting()):
                    return
                if not self.jobs and not told:
                    elsewhere = sum(self.states[cell].status == "running" for cell in waiting)
                    self.overview.say(f"waiting for {elsewhere} cells that other processes train")
                    told = True
                self.wait(LOOK_AGAIN_S if self.free and self.waiting() else None)

    def look(self) -> None:
        self.states |= {cell: look(cell) for cell in self.unsettled()}

    def ready(self, cell: Cell) -> bool:
        """Whether what it starts from, if that is a cell too, is done."""
        return all(self.states[other].status == "done" for other in self.cells if other.path == cell.start)

    def give_up(self) -> None:
        """On cells that would start from one that failed."""
        for cell in self.waiting():
            for other in self.failed():
                if other.path == cell.start:
                    self.tried[cell] = self.tried[other]
                    self.states[cell] = State(
                        "failed", [], {"why": f"what it starts from failed: {other.path}"}
                    )

    def unsettled(self) -> list[Cell]:
        """Neither done, nor tried in vain."""
        running = {cell for job in self.jobs for cell in job.cells}
        left = [cell for cell in self.cells if self.states[cell].status != "done"]
        return [cell for cell in left if cell in running or cell not in self.tried]

    def waiting(self) -> list[Cell]:
        """Neither done, nor tried by us."""
        return [cell for cell in self.unsettled() if cell not in self.tried]

    def next(self) -> list[Cell]:
        """The first cell that nobody trains, and further seeds of it where every free place has enough."""
        free = [cell for cell in self.waiting() if self.states[cell].status != "running" and self.ready(cell)]
        if not free or free[0] in self.alone:
            return free[:1]
        same = [cell for cell in free if cell.arguments == free[0].arguments and cell not in self.alone]
        return same[: min(self.replicas, -(-len(free) // len(self.free)))]

    def wait(self, at_most_s: float | None) -> None:
        """Until a process ends."""
        began = time.monotonic()
        while at_most_s is None or time.monotonic() < began + at_most_s:
            self.overview.refresh()
            for job in [job for job in self.jobs if job.process.poll() is not None]:
                self.jobs.remove(job)
                self.free.insert(0, job.place)
                self.ended(job)
                at_most_s = 0
            time.sleep(0.2)

    def ended(self, job: Job) -> None:
        now = {cell: look(cell) for cell in job.cells}
        self.states |= now
        refused = job.process.returncode == 2
        taken = {cell for cell, state in now.items() if state.status == "running"}
        for cell, (status, rows, summary) in now.items():
            if status == "done":
                took = duration(sum(row["epoch_s"] for row in rows))
                self.overview.say(f"done {cell.path.name}: {accuracy(summary)} in {took}; {self.count()}")
            elif cell in taken or (refused and taken):  # another sweep was quicker
                del self.tried[cell]
            elif len(job.cells) > 1 and status not in ("diverged", "interrupted"):
                self.alone.add(cell)
                del self.tried[cell]
            else:
                if refused or status == "to do":  # the summary, if any, is of an earlier attempt
                    status, summary = "failed", {"why": why_ended(job)}
                self.states[cell] = State(status, rows, summary)
                self.overview.say(f"{status} {cell.path.name}: {summary.get('why')}")

    def stop(self) -> None:
        """Ask every process to stop, and wait until it has; it keeps its last epoch."""
        for job in self.jobs:
            job.process.terminate()
        try:
            for job in self.jobs:
                job.process.wait()
        except KeyboardInterrupt:
            for job in self.jobs:
                job.process.kill()
                job.process.wait()

    def failed(self) -> list[Cell]:
        """Tried, and not done."""
        running = {cell for job in self.jobs for cell in job.cells}
        return [cell for cell in self.tried if self.states[cell].status != "done" and cell not in running]

    def count(self) -> str:
        done = sum(state.status == "done" for state in self.states.values())
        forecast = Forecast(self.cells, self.states).text(self.unsettled(), self.replicas, self.at_once)
        return "; ".join(filter(None, [f"{done} of {len(self.cells)} cells done", forecast]))


def why_ended(job: Job) -> str:
    """What train.py last had to say, or the end of its traceback, or the signal that killed it."""
    if (signal_number := -job.process.returncode) > 0:
        return f"killed by {signal.Signals(signal_number).name}"
    lines = job.log.read_text(errors="replace").strip().splitlines()
    lines = lines[max(i for i, line in enumerate(lines) if line.startswith("$ ")) :]  # of this attempt
    noted = [i for i, line in enumerate(lines) if line.startswith("train.py: ")]
    told = not any(line.startswith("Traceback ") for line in lines) and noted
    return " ".join(lines[noted[-1] if told else -1 :]).removeprefix("train.py: ")


# ----------------------------------------------------------------------------------------------------------
# What a person sees


class Overview:
    """On a terminal a live table of what runs; into a file or pipe, a line for whatever starts or ends."""

    def __init__(self, sweep: Sweep):
        self.sweep, self.console, self.shown = sweep, display.Terminal(), 0.0
        self.live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> None:
        if self.console.is_terminal:
            self.live.start()

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def refresh(self) -> None:
        if not self.console.is_terminal or time.monotonic() < self.shown + 1:
            return
        self.shown = time.monotonic()
        sweep = self.sweep
        sweep.look()
        forecast = Forecast(sweep.cells, sweep.states)
        table = Table("run", title=sweep.count(), title_justify="left")
        for column in ("epoch", "", "test", "images/s", "left"):
            table.add_column(column, justify="right")
        elsewhere = [[cell] for cell in sweep.waiting() if sweep.states[cell].status == "running"]
        for cells in [*(job.cells for job in sweep.jobs), *elsewhere]:
            cell = max(cells, key=lambda cell: forecast.seconds(cell) or 0)  # the last to end
            rows, epochs = sweep.states[cell].rows, cell.options.epochs
            last = rows[-1] if rows else {}
            seconds, test_acc, rate = forecast.seconds(cell), last.get("test_acc"), last.get("images_per_s")
            table.add_row(
                escape(title(cells) + (", by another sweep" if cells in elsewhere else "")),
                f"{len(rows)}/{epochs}",
                ProgressBar(total=epochs, completed=len(rows), width=20),
                f"{test_acc:.2f} %" if test_acc is not None else "",
                f"{rate * len(cells):,.0f}" if rate else "",
                duration(seconds) if seconds is not None else "",
            )
        self.live.update(table, refresh=True)


def show_failed(sweep: Sweep) -> None:
    sweep.overview.say(f"{len(sweep.failed())} of {len(sweep.cells)} cells failed:")
    for cell in sweep.failed():
        status, _, summary = sweep.states[cell]
        sweep.overview.say(f"{status:12}{cell.path}\n{'':12}{summary.get('why')}\n{'':12}{sweep.tried[cell]}")


def note(line: str) -> None:
    print(f"sweep.py: {line}", file=sys.stderr, flush=True)


def whole_number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise OptionError(f"{name}={text}: give a whole number from 1")
    return int(text)


def requeue(task: str) -> None:
    """Have Slurm run this task again, unless it ends because it was cancelled, or is requeued already."""
    job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"  # the last task's $SLURM_JOB_ID would mean the array
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    if "JobState=RUNNING" in shown:
        subprocess.run(["scontrol", "requeue", job])


def main(argv: list[str]) -> int:
    signal.signal(signal.SIGTERM, train.interrupt)
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    try:
        cells = make_grid(os.environ, [argument for argument in argv if argument != "--list"])
        options = cells[0].options
        where = places(options.device, whole_number("JOBS", 1))
        on_gpu = "CUDA_VISIBLE_DEVICES" in where[0]
        replicas = whole_number("REPLICAS", len(cells) if on_gpu else 1)
        if "--list" in argv:
            show_list(cells, replicas, len(where))
            return 0
        if task is not None:
            if not task.isdecimal() or int(task) >= len(cells):
                raise OptionError(f"there is no cell {task} in the grid: give --array=0-{len(cells) - 1}")
            cells = with_starts(cells[int(task)], cells)
            signal.signal(signal.SIGUSR1, train.interrupt)  # Slurm's word that time runs out
    except train.UNUSABLE as error:
        note(str(error))
        return 2
    except KeyboardInterrupt:
        return 1
    sweep, interrupted = Sweep(cells, where, replicas), False
    try:
        if not prepare(options):
            return 2
        sweep.run()
    except KeyboardInterrupt:
        note(f"stopping {len(sweep.jobs)} runs; the next call goes on at their last epochs")
        interrupted = True
    except OSError as error:
        note(str(error))
        return 1
    finally:
        sweep.stop()
    if interrupted and task is not None:
        requeue(task)
    if interrupted:
        return 1
    sweep.overview.say(sweep.count())
    if sweep.failed():
        show_failed(sweep)
    return 1 if sweep.failed() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
