"""The grid of runs, one after another or spread over the GPUs of this machine.

    bash sweep.sh [--list] [train.py options]    # ARCHS, MODES, SEEDS choose the grid; --list only shows it
    GRID=width bash sweep.sh                     # a named grid: depth, width, vgg, parts, init, tuning, ...
    JOBS=2 REPLICAS=1 bash sweep.sh              # processes per GPU [1], seeds per process [GPU: all, CPU: 1]

A cell of the grid is one run of train.py. All that is known of it is in its run folder, so any number of
sweeps may share the folders, and the next one goes on where a killed one stopped. Exit status 0: all done, 1:
not all, 2: unusable options or data.
"""

import contextlib
import ctypes
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import config
import progress
import runs
from config import OptionError, Options
from datasets import sources

HERE = Path(__file__).parent
LOOK_AGAIN_S = 2.0  # between two looks at the cells that another sweep trains
INITIALISATIONS = """, --bn-init ones, --bn-init one_one, --bn-init signed_uniform, --bn-init he_normal,
--conv-init kaiming_uniform, --conv-init orthogonal, --conv-init binary"""
CHANGES = """, --lr 0.03, --lr 0.3, --lr 1, --weight-decay 0, --weight-decay 0.001, --batch-size 32,
--batch-size 64, --batch-size 256, --label-smoothing 0.1, --schedule cosine, --bn-init ones,
--bn-init signed_uniform, --bn-init he_normal, --conv-init orthogonal,
--optimizer adam --lr 0.01 --weight-decay 0, --optimizer adam --lr 0.001 --weight-decay 0,
--optimizer adam --lr 0.03 --weight-decay 0, --lr 3, --lr 1 --schedule cosine, --lr 1 --weight-decay 0,
--lr 1 --batch-size 64, --lr 0.3 --batch-size 32, --lr 1 --bn-init he_normal
"""  # none, one at a time, and then pairs of those that brought most
TUNING = [f"--val-split 5000 {change}" for change in CHANGES.split(",")]
BN_FIRST_EPOCHS = (5, 10, 20, 40)  # of 160, in which BatchNorm alone trains before everything does
DEFAULT = {"ARCHS": "resnet32 resnet56 resnet110", "MODES": "all bn_only random", "SEEDS": "0 1 2"}
GRIDS = {  # what differs from the default; VARIANTS are further options of train.py
    "depth": {"ARCHS": "resnet14 resnet32 resnet56 resnet110 resnet218 resnet434 resnet866"},
    "width": {"ARCHS": "resnet14 resnet14_w2 resnet14_w4 resnet14_w8 resnet14_w16 resnet14_w32"},
    "vgg": {"ARCHS": "vgg11 vgg13 vgg16 vgg19"},
    "parts": {"MODES": "output shortcut bn+output bn+shortcut bn+output+shortcut none"},
    "init": {"MODES": "bn_only", "VARIANTS": INITIALISATIONS.split(",")},
    "tuning": {"ARCHS": "resnet14", "MODES": "bn_only", "SEEDS": "0", "VARIANTS": TUNING},
    "warmstart": {"ARCHS": "resnet32", "MODES": "all"},
    "retrain": {"ARCHS": "resnet32", "MODES": "all"},
}


class Cell(NamedTuple):
    """One run of train.py: its arguments but for the seed, its options, its folder."""

    arguments: tuple[str, ...]
    options: Options
    path: Path

    @property
    def parent(self) -> Path | None:
        """What it goes on from: the folder of another cell, or whatever the user's --init-from names."""
        init_from = self.options.init_from
        return Path(init_from.replace("{seed}", str(self.options.seed))) if init_from else None


def make_grid(environment: Mapping[str, str], argv: Sequence[str]) -> list[Cell]:
    """The cells that ARCHS, MODES, SEEDS and GRID choose, each with train.py's options `argv`.

    Raises the error of the first option that no run can use, which has exit_status 2.
    """
    name = environment.get("GRID", "")
    if name and name not in GRIDS:
        raise OptionError(f"GRID={name}: choose from {', '.join(GRIDS)}")
    grid = DEFAULT | GRIDS.get(name, {})
    archs, modes, seeds = (environment.get(key, grid[key]).split() for key in DEFAULT)
    for key, values in zip(DEFAULT, (archs, modes, seeds), strict=True):
        if not values:
            raise OptionError(f'{key}="": name at least one, or leave it out for "{grid[key]}"')
    (options, *_), given = config.parse_options([*argv], __doc__)
    if taken := sorted(given & {"arch", "mode", "seed"}):
        raise OptionError(f"--{taken[0]}: a sweep takes {taken[0].upper()}S from the environment")
    if options.overwrite:
        raise OptionError(f"--overwrite: a sweep goes on; to start again, give --out or move {options.out}")
    if options.quick and "data" not in given:
        if not (found := prepare(options)):
            progress.note("sweep.py", f"--quick takes synthetic images, for want of {options.data}")
        argv = [*argv, "--data", options.data if found else "synthetic"]
    further = {"warmstart": warm_starts, "retrain": retraining}.get(name, lambda *_: ())
    cells: dict[Path, Cell] = {}
    for variant, arch, mode in itertools.product(grid.get("VARIANTS", [""]), archs, modes):
        usual = ("--arch", arch, "--mode", mode, *variant.split(), *argv)
        for arguments in (usual, *further(usual, options)):
            for each in config.parse_options([*arguments, "--seed", *seeds], __doc__)[0]:
                cells.setdefault(folder(each), Cell(arguments, each, folder(each)))
    return list(cells.values())


def warm_starts(usual: tuple[str, ...], options: Options) -> Iterator[tuple[str, ...]]:
    """Runs as long as that of the arguments `usual`: first of BatchNorm alone, at the initial learning rate,
    and then of what `usual` trains. `options` are the user's.
    """
    milestones = options.milestones if options.schedule == "step" else ()
    for epochs in sorted({max(1, round(of_160 * options.epochs / 160)) for of_160 in BN_FIRST_EPOCHS}):
        if epochs >= min([options.epochs, *milestones]):
            continue
        # Validation images set both parts apart in the same way. With so much patience they change nothing.
        patience = str(options.epochs)
        plateau = ["plateau", "--patience", patience] if options.schedule == "plateau" else ["constant"]
        early_stop = ["--early-stop", patience] if options.early_stop else []
        parent = (*usual, "--mode", "bn_only", "--epochs", str(epochs), "--schedule", *plateau, *early_stop)
        yield parent
        left = ["--epochs", str(options.epochs - epochs), "--warmup-epochs", "0"]
        left += ["--milestones", *(str(milestone - epochs) for milestone in milestones)] if milestones else []
        yield going_on(usual, left, parent)


def retraining(usual: tuple[str, ...], options: Options) -> Iterator[tuple[str, ...]]:
    """An eighth as many epochs on top of the run of the arguments `usual`: of BatchNorm alone, kept or drawn
    anew, and of everything, to compare; each at the initial learning rate and at a tenth of it.
    """
    epochs = max(2, options.epochs // 8)
    milestones = sorted({epochs // 2, 3 * epochs // 4})
    schedule = ["--epochs", str(epochs), "--milestones", *map(str, milestones)]
    for lr in (options.lr, options.lr / 10):
        schedule += ["--min-lr", f"{lr:g}"] if options.min_lr > lr else []
        for what in (["--mode", "bn_only"], ["--mode", "bn_only", "--reset-bn"], []):
            yield going_on(usual, [*schedule, "--lr", f"{lr:g}", *what], parent=usual)


def going_on(usual: tuple[str, ...], more: list[str], parent: tuple[str, ...]) -> tuple[str, ...]:
    """The arguments of a run with `usual` and `more` that goes on from the run with arguments `parent`."""
    own = [argument for argument in usual if argument != "--reset-bn"]  # which is about the parent's parent
    path = folder(config.parse_options([*parent], __doc__)[0][0], seed="{seed}")
    return (*own, *more, "--init-from", str(path))


def folder(options: Options, seed: str | None = None) -> Path:
    """The run folder of these options; `seed` stands for the seed in the name of several runs."""
    return Path(options.out) / runs.run_name(options, sources.short_name(options.data), seed)


def prepare(options: Options) -> bool:
    """Whether the data is there and prepared, by another process: this one stays free of FFCV's threads."""
    command = [sys.executable, str(HERE / "data.py"), options.data, "--data-dir", options.data_dir]
    command += ["--image-size", str(options.image_size)] if options.image_size else []
    return subprocess.run(command).returncode == 0


STATUSES = ("done", "running", "interrupted", "diverged", "failed", "to do")


class State(NamedTuple):
    """How far a cell is: one of STATUSES, its epochs, why it ended early, its final test accuracy as text."""

    status: str
    epochs: list[runs.Epoch]
    why: str | None = None
    accuracy: str = ""


def look(cell: Cell) -> State:
    """How far a cell is, by its folder. A summary that cannot be read counts as failed."""
    epochs = []
    with contextlib.suppress(runs.RunError):  # at the first damaged line: last.pt has the epochs too
        for line in (runs.read_text(cell.path / "metrics.jsonl") or "").splitlines():
            epochs.append(runs.parse(runs.Epoch, line, cell.path))
    if runs.in_use(cell.path):
        return State("running", epochs)
    try:
        summary = runs.read(cell.path, "summary.json", runs.Summary)
        if not summary or (summary.status == "done" and not holds(cell)):  # the latter train.py will refuse
            return State("failed" if summary else "to do", epochs)
        accuracy = "" if summary.final_test_acc is None else f"{summary.final_test_acc:.2f} %"
        return State(summary.status, epochs, summary.why, accuracy)
    except runs.RunError as error:
        return State("failed", epochs, str(error))


def holds(cell: Cell) -> bool:
    """Whether the run in a cell's folder has the cell's options; the folder's name does not tell all."""
    found = runs.read(cell.path, "config.json", runs.Config)
    told = config.names("variant", "setting") - {"data", "init_from"}  # these two have several spellings
    return found is not None and all(getattr(found.options, n) == getattr(cell.options, n) for n in told)


def forecast(states: Mapping[Cell, State]) -> dict[Cell, float | None]:
    """The seconds that each cell still takes, by the epochs of cells with its arguments, else with its
    architecture; None where there are none, and for cells that are done.
    """
    epoch_s, left = defaultdict(list), {}
    for cell, state in states.items():
        for key in (cell.arguments, cell.options.arch):
            epoch_s[key] += [epoch.epoch_s for epoch in state.epochs]
    for cell, state in states.items():
        alike = epoch_s[cell.arguments] or epoch_s[cell.options.arch]
        known = alike and state.status != "done"
        left[cell] = sum(alike) / len(alike) * (cell.options.epochs - len(state.epochs)) if known else None
    return left


class Job(NamedTuple):
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
        gpus = gpus if gpus[0].startswith("MIG-") else gpus[:count]  # CUDA counts one MIG instance at most
        return [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(jobs) for gpu in gpus]
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))  # more than cores would wait for each other
    return [{} if jobs == 1 else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}] * jobs


def launch(cells: list[Cell], place: dict[str, str]) -> Job:
    """train.py for these cells, which differ in nothing but the seed; what it says goes to a log."""
    seeds = [str(cell.options.seed) for cell in cells]
    command = [sys.executable, str(HERE / "train.py"), *cells[0].arguments, "--resume", "--seed", *seeds]
    path = folder(cells[0].options, "_".join(seeds)[:100])
    log = path.parent / "logs" / f"{path.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None)
    with open(log, "a") as file:
        print("$", shlex.join(["python", *command[1:]]), file=file, flush=True)
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        # In a group of its own, for Ctrl-C is passed on; it stops (PR_SET_PDEATHSIG) if the sweep is killed.
        owned = {"process_group": 0, "preexec_fn": lambda: libc.prctl(1, signal.SIGTERM)}
        process = subprocess.Popen(command, env=os.environ | place, **streams, **owned)
    return Job(cells, place, log, process)


def why_ended(job: Job) -> str:
    """What train.py last had to say, or the end of its traceback, or the signal that killed it."""
    if (signal_number := -job.process.returncode) > 0:
        return f"killed by {signal.Signals(signal_number).name}"
    said = job.log.read_text(errors="replace").rpartition("\n$ ")[2].strip()  # in this attempt
    _, noted, last = said.rpartition("\ntrain.py: ")
    lines = last.splitlines() if noted and "\nTraceback " not in said else said.splitlines()[-1:]
    return runs.printable(" ".join(lines))


class Sweep:
    """Cells at work: those that nobody trains are launched wherever a place is free."""

    def __init__(self, cells: Sequence[Cell], places: list[dict[str, str]], replicas: int):
        self.free, self.replicas = list(places), replicas
        self.states = {cell: look(cell) for cell in cells}
        self.jobs: list[Job] = []
        self.failed: dict[Cell, Path] = {}  # with the log that tells of it
        self.alone: set[Cell] = set()  # these failed beside other seeds, and may not by themselves
        self.live = Live(console=progress.Terminal(), auto_refresh=False, transient=True)
        self.say = self.live.console.say

    def train_all(self) -> None:
        """Until every cell is done or has failed. A cell that another sweep trains is waited for."""
        looked, told = 0.0, False
        with self.live, contextlib.ExitStack() as at_end:
            at_end.callback(self.stop)
            self.say(f"{self.count()}; logs in {next(iter(self.states)).path.parent / 'logs'}")
            while self.unsettled():
                ended = [job for job in self.jobs if job.process.poll() is not None]
                for job in ended:
                    self.settle(job)
                if ended or time.monotonic() > looked + LOOK_AGAIN_S:
                    self.look()
                    while self.free and (cells := self.next()):
                        self.jobs.append(launch(cells, self.free.pop(0)))
                        self.say(f"started {self.jobs[-1].log.stem}")
                    if (elsewhere := self.not_ours(trained=True)) and not self.jobs and not told:
                        self.say(f"waiting for {len(elsewhere)} cells that other processes train")
                        told = True
                    self.live.update(overview(self), refresh=True)
                    looked = time.monotonic()
                time.sleep(0.2)

    def look(self) -> None:
        """Look again at what is neither done nor failed, and give up what goes on from a cell that failed."""
        logs = {cell.path: log for cell, log in self.failed.items()}
        for cell in self.unsettled():
            self.states[cell] = look(cell)
            if cell.parent in logs:
                self.failed[cell] = logs[cell.parent]
                self.states[cell] = State("failed", [], f"its parent run failed: {cell.parent}")

    def unsettled(self) -> list[Cell]:
        """Cells that are neither done nor failed."""
        return [c for c, state in self.states.items() if state.status != "done" and c not in self.failed]

    def not_ours(self, trained: bool) -> list[Cell]:
        """Unsettled cells that this sweep does not train, but another does (or nobody: not `trained`)."""
        ours = {cell for job in self.jobs for cell in job.cells}
        others = [cell for cell in self.unsettled() if cell not in ours]
        return [cell for cell in others if (self.states[cell].status == "running") is trained]

    def next(self) -> list[Cell]:
        """The first cell that nobody trains, and further seeds of it where every free place has enough."""
        not_yet = {cell.path for cell, state in self.states.items() if state.status != "done"}
        free = [cell for cell in self.not_ours(trained=False) if cell.parent not in not_yet]
        if not free or free[0] in self.alone:
            return free[:1]
        same = [cell for cell in free if cell.arguments == free[0].arguments and cell not in self.alone]
        return same[: min(self.replicas, -(-len(free) // len(self.free)))]

    def settle(self, job: Job) -> None:
        """What became of the cells of a process that has ended; those to be tried again are left waiting."""
        self.jobs.remove(job)
        self.free.insert(0, job.place)
        self.states |= {cell: look(cell) for cell in job.cells}
        refused = job.process.returncode == 2
        taken = any(self.states[cell].status == "running" for cell in job.cells)  # another sweep was quicker
        for cell in job.cells:
            state = self.states[cell]
            if state.status == "done":
                took = duration(sum(epoch.epoch_s for epoch in state.epochs))
                self.say(f"done {cell.path.name}: {state.accuracy} in {took}; {self.count()}")
            elif state.status == "running" or (refused and taken):
                continue
            elif len(job.cells) > 1 and state.status not in ("diverged", "interrupted"):
                self.alone.add(cell)
            else:
                if refused or state.status == "to do":  # the summary, if any, is of an earlier attempt
                    state = State("failed", state.epochs, why_ended(job))
                self.states[cell], self.failed[cell] = state, job.log
                self.say(f"{state.status} {cell.path.name}: {state.why}")

    def stop(self) -> None:
        """Ask every process to stop, and wait until it has; it keeps its last epoch."""
        if self.jobs:
            progress.note("sweep.py", f"stopping {len(self.jobs)} processes; the next sweep resumes them")
        for stop in (subprocess.Popen.terminate, subprocess.Popen.kill):
            with contextlib.suppress(KeyboardInterrupt):  # at which they are killed
                for job in self.jobs:
                    stop(job.process)
                for job in self.jobs:
                    job.process.wait()
                return

    def count(self) -> str:
        done = sum(state.status == "done" for state in self.states.values())
        return "; ".join(filter(None, [f"{done} of {len(self.states)} cells done", self.time_left()]))

    def time_left(self) -> str:
        """What is left of all cells, where the seeds of one process take no longer than one alone."""
        seconds, groups = forecast(self.states), defaultdict(list)
        for cell in self.unsettled():
            groups[cell.arguments].append(seconds[cell])
        unknown, n = sum(group.count(None) for group in groups.values()), self.replicas
        known = [s for group in groups.values() for s in sorted(filter(None, group), reverse=True)[::n]]
        at_once = len(self.free) + len(self.jobs)
        text = f"about {duration(max(sum(known) / at_once, *known))} left" if known else ""
        return f"{text} and {unknown} cells of unknown length" if text and unknown else text


# ---- what a person sees ----


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def show_list(sweep: Sweep) -> None:
    """Every cell with its number, which is its Slurm task's, its state, and the time it still needs."""
    seconds, rows, digits = forecast(sweep.states), [], len(str(len(sweep.states) - 1))
    for number, (cell, state) in enumerate(sweep.states.items()):
        epochs = f"{len(state.epochs)} of {cell.options.epochs} epochs" if state.epochs else ""
        what = state.accuracy if state.status == "done" else epochs
        left = "" if seconds[cell] is None else f"{duration(seconds[cell])} left"
        rows.append([f"{number:{digits}}", cell.path.name, state.status, what, left])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    all_states = [state.status for state in sweep.states.values()]
    text = ", ".join(f"{n} {status}" for status in STATUSES if (n := all_states.count(status)))
    print("; ".join(filter(None, [f"{len(rows)} cells: {text}", sweep.time_left()])))


def overview(sweep: Sweep) -> Table:
    """What runs, a row for each process of this sweep and for each cell of another."""
    seconds = forecast(sweep.states)
    table = Table("run", title=Text(sweep.count()), title_justify="left")
    for column in ("epoch", "", "test", "images/s", "left"):
        table.add_column(column, justify="right")
    rows = [(job.log.stem, job.cells) for job in sweep.jobs]
    rows += [(f"{cell.path.name}, by another sweep", [cell]) for cell in sweep.not_ours(trained=True)]
    for title, cells in rows:
        cell = max(cells, key=lambda cell: seconds[cell] or 0)  # the last to end
        epochs = sweep.states[cell].epochs
        test_acc, rate = (epochs[-1].test_acc, epochs[-1].images_per_s) if epochs else (None, None)
        table.add_row(
            Text(title),
            f"{len(epochs)}/{cell.options.epochs}",
            ProgressBar(total=cell.options.epochs, completed=len(epochs), width=20),
            f"{test_acc:.2f} %" if test_acc is not None else "",
            f"{rate * len(cells):,.0f}" if rate else "",
            duration(seconds[cell]) if seconds[cell] is not None else "",
        )
    return table


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


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cells = make_grid(os.environ, [argument for argument in argv if argument != "--list"])
    options, task = cells[0].options, os.environ.get("SLURM_ARRAY_TASK_ID")
    where = places(options.device, whole_number("JOBS", 1))
    replicas = whole_number("REPLICAS", len(cells) if "CUDA_VISIBLE_DEVICES" in where[0] else 1)
    if "--list" in argv:
        show_list(Sweep(cells, where, replicas))
        return 0
    if task is not None:
        if not task.isdecimal() or int(task) >= len(cells):
            raise OptionError(f"there is no cell {task} in the grid: give --array=0-{len(cells) - 1}")
        own = cells[int(task)]
        cells = [cell for cell in cells if cell is own or cell.path == own.parent]
        signal.signal(signal.SIGUSR1, progress.interrupt)  # Slurm sends it before time runs out
    sweep = Sweep(cells, where, replicas)
    try:
        if not prepare(options):
            return 2
        sweep.train_all()
    except KeyboardInterrupt:
        if task is not None:
            requeue(task)
        raise
    sweep.say(sweep.count())
    if sweep.failed:
        sweep.say(f"{len(sweep.failed)} of {len(cells)} cells failed:")
    for cell, log in sweep.failed.items():
        status, _, why, _ = sweep.states[cell]
        sweep.say(f"{status:12}{cell.path}\n{'':12}{why}\n{'':12}{log}")
    return 1 if sweep.failed else 0


if __name__ == "__main__":
    sys.exit(progress.run("sweep.py", main))
