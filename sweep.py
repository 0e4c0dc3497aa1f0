"""Train a grid of runs, one after another or spread over the GPUs of this machine.

    bash sweep.sh [--list] [train.py options]    # ARCHS, MODES, SEEDS choose the grid; --list only shows it
    GRID=width bash sweep.sh                     # a named grid: depth, width, vgg, parts, init, tuning, ...
    JOBS=2 REPLICAS=1 bash sweep.sh              # processes per GPU [1], seeds per process [GPU: all, CPU: 1]

Each cell of the grid is one run of train.py, and its run folder holds its whole state. Several sweeps can
therefore share the folders, and a new sweep continues where a killed one stopped. A sweep takes all options
of train.py except --arch, --mode, --seed and --overwrite. Exit status: 0 all cells done, 1 some cells not
done, 2 unusable options or data.
"""

import progress  # isort: split

import contextlib
import ctypes
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from tabulate import tabulate

import config
import records
import runs
from config import OptionError, Options
from datasets import sources

HERE = Path(__file__).parent
GRIDS = tomllib.loads((HERE / "grids.toml").read_text("utf-8"))
DEFAULT = GRIDS.pop("default")  # the other grids override parts of it


@dataclass(eq=False)
class Cell:
    """One run of train.py: its arguments without the seed, its options, its folder and its progress."""

    arguments: tuple[str, ...]
    options: Options
    path: Path
    status: str = "to do"  # or "running", "failed", or the status in summary.json
    why: str | None = None  # why it ended early or failed
    epochs: Sequence[records.Epoch] = ()
    reached: str = ""  # the epochs done, or the test accuracy of a finished run
    seconds: float | None = None  # estimated time left, if known
    log: Path | None = None  # explains the failure; set once this sweep has given the cell up
    verified: bool = False  # whether train.py, called by this sweep, found nothing left to do or did it

    @property
    def parent(self) -> Path | None:
        """The path it starts from, another cell's folder or the user's --init-from; None if there is none."""
        init_from = self.options.init_from
        return Path(init_from.replace("{seed}", str(self.options.seed))) if init_from else None

    @property
    def left(self) -> str:
        return "" if self.seconds is None else f"{duration(self.seconds)} left"

    def look(self) -> None:
        """Update the state from the run folder.

        A run whose files cannot be read, or that is done but has other options, counts as failed.
        """
        self.epochs, self.status, self.why, self.seconds = [], "running", None, None
        with contextlib.suppress(records.RunError):  # at a damaged line; last.pt has the epochs too
            self.epochs.extend(records.read_epochs(self.path))
        self.reached = f"{len(self.epochs)} of {self.options.epochs} epochs" if self.epochs else ""
        if runs.in_use(self.path):
            return
        try:
            summary, found = runs.Run(self.path).summary, runs.Run(self.path).config
            self.status, self.why = (summary.status, summary.why) if summary else ("to do", None)
        except records.RunError as error:
            self.status, self.why = "failed", str(error)
        if self.status == "done":
            differing = found and config.differing(found.options, self.options, "variant", "setting")
            if not found or differing.keys() - {"data", "init_from"}:
                self.status, self.why = "failed", None  # train.py refuses the folder of another run
            elif not self.verified and any(
                os.path.realpath(value or "") != os.path.realpath(getattr(self.options, name) or "")
                for name, value in differing.items()
            ):
                self.status = "to do"  # train.py decides whether these are the same images and weights
            else:
                self.reached = f"{summary.final_test_acc:.2f} %"
                runs.tidy(self.path)


def make_grid(environment: Mapping[str, str], argv: Sequence[str]) -> list[Cell]:
    """Return the cells that ARCHS, MODES, SEEDS and GRID in `environment` choose; `argv` is for train.py.

    Raises OptionError, or the exception that train.py would raise for the first unusable option.
    """
    name = environment.get("GRID", "")
    if name and name not in GRIDS:
        raise OptionError(f"GRID={name}: choose from {', '.join(GRIDS)}")
    grid = DEFAULT | GRIDS.get(name, {})
    chosen = {key: environment.get(key, grid[key]).split() for key in ("ARCHS", "MODES", "SEEDS")}
    for key, values in chosen.items():
        if not values:
            raise OptionError(f'{key}="": name at least one, or leave it out for "{grid[key]}"')
    if wrong := [seed for seed in chosen["SEEDS"] if not seed.isdecimal()]:
        raise OptionError(f"SEEDS: {wrong[0]!r} is not a whole number")
    (options, *_), given = config.parse_options([*argv], __doc__)
    if taken := sorted(given & {"arch", "mode", "seed"}):
        raise OptionError(f"--{taken[0]}: a sweep takes {taken[0].upper()}S from the environment")
    if options.overwrite:
        raise OptionError(f"--overwrite: a sweep resumes; to start again, give --out or move {options.out}")
    if options.quick and "data" not in given:
        if not (found := prepare(options)):
            progress.note("sweep.py", f"--quick uses synthetic images, as there is no {options.data}")
        argv = [*argv, "--data", options.data if found else "synthetic"]
    further = {"warmstart": warm_starts, "retrain": retraining}.get(name, lambda *_: ())
    cells: dict[Path, Cell] = {}
    # A tracker follows one run per process.
    together = [[seed] for seed in chosen["SEEDS"]] if options.log else [chosen["SEEDS"]]
    for variant, arch, mode in product(grid["VARIANTS"], chosen["ARCHS"], chosen["MODES"]):
        usual = ("--arch", arch, "--mode", mode, *grid["OPTIONS"].split(), *variant.split(), *argv)
        for arguments in (usual, *further(usual, options)):
            for seeds in together:
                for each in config.parse_options([*arguments, "--seed", *seeds], __doc__)[0]:
                    cells.setdefault(folder(each), Cell(arguments, each, folder(each)))
    return list(cells.values())


def warm_starts(usual: tuple[str, ...], options: Options) -> Iterator[tuple[str, ...]]:
    """Yield the arguments of pairs of runs: first BatchNorm alone, then what the arguments `usual` train.

    Together, a pair has as many epochs as the run with arguments `usual`. The first run keeps the initial
    learning rate. `options` are those of the user's command line.
    """
    milestones = options.milestones if options.schedule == "step" else ()
    # These options make the first run hold out the same validation images as the second one. With this much
    # patience they change nothing else.
    schedule = f"plateau --patience {options.epochs}" if options.schedule == "plateau" else "constant"
    schedule += f" --early-stop {options.epochs}" if options.early_stop else ""
    for epochs in sorted({max(1, round(of_160 * options.epochs / 160)) for of_160 in (5, 10, 20, 40)}):
        if epochs >= min([options.epochs, *milestones]):
            break
        shorter = f"--mode bn_only --epochs {epochs} --schedule {schedule}{warm_up_within(epochs, options)}"
        parent = (*usual, *shorter.split())
        yield parent
        left = f"--epochs {options.epochs - epochs} --warmup-epochs 0"
        left += f" --milestones {config.show([m - epochs for m in milestones])}" if milestones else ""
        yield going_on(usual, left, parent)


def retraining(usual: tuple[str, ...], options: Options) -> Iterator[tuple[str, ...]]:
    """Yield the arguments of runs that add an eighth of the epochs to the run with arguments `usual`.

    They train BatchNorm alone, with gamma and beta kept or drawn anew, or again what `usual` trains. Each is
    tried at the initial learning rate and at a tenth of it.
    """
    epochs = max(2, options.epochs // 8)
    schedule = f"--epochs {epochs} --milestones {config.show(sorted({epochs // 2, 3 * epochs // 4}))}"
    schedule += warm_up_within(epochs, options)
    for lr in (options.lr, float(f"{options.lr / 10:.12g}")):
        schedule += f" --min-lr {config.show(lr)}" if options.min_lr > lr else ""
        for what in ("--mode bn_only", "--mode bn_only --reset-bn", ""):
            yield going_on(usual, f"{schedule} --lr {config.show(lr)} {what}", parent=usual)


def warm_up_within(epochs: int, options: Options) -> str:
    """Return the train.py option that shortens the user's warm-up to `epochs`, or "" if it is no longer."""
    return f" --warmup-epochs {epochs}" if options.warmup_epochs > epochs else ""


def going_on(usual: tuple[str, ...], more: str, parent: tuple[str, ...]) -> tuple[str, ...]:
    """Return the arguments `usual` and `more` for a run that starts from the run with arguments `parent`."""
    own = [argument for argument in usual if argument != "--reset-bn"]  # it applies to the parent's parent
    path = folder(config.parse_options([*parent], __doc__)[0][0], seed="{seed}")
    return (*own, *more.split(), "--init-from", str(path))


def folder(options: Options, seed: str | None = None) -> Path:
    """Return the run folder for these options; `seed`, if given, replaces the seed in its name."""
    return Path(options.out) / runs.run_name(options, sources.short_name(options.data), seed)


def prepare(options: Options) -> bool:
    """Prepare the data in a child process, so this one gets no FFCV threads; return whether it worked."""
    command = [sys.executable, str(HERE / "data.py"), options.data, "--data-dir", options.data_dir]
    command += ["--image-size", str(options.image_size)] if options.image_size else []
    return subprocess.run(command).returncode == 0


def places(device: str, jobs: int) -> list[dict[str, str]]:
    """Return the environment variables of each parallel process: `jobs` per GPU, or `jobs` on the CPU."""
    if device != "cpu" and (count := torch.cuda.device_count()):
        gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
        gpus = gpus if gpus[0].startswith("MIG-") else gpus[:count]  # CUDA sees at most one MIG instance
        return [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(jobs) for gpu in gpus]
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))  # threads beyond the cores would only wait
    return [{} if jobs == 1 else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}] * jobs


class Job:
    """A train.py process for cells that differ only in the seed; its output is appended to a log file."""

    def __init__(self, cells: list[Cell], place: dict[str, str]):
        self.cells, self.place, seeds = cells, place, [str(cell.options.seed) for cell in cells]
        command = [sys.executable, str(HERE / "train.py"), *cells[0].arguments, "--resume", "--seed", *seeds]
        path = folder(cells[0].options, "_".join(seeds)[:100])
        self.log = path.parent / "logs" / f"{path.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        libc = ctypes.CDLL(None)
        with open(self.log, "a", encoding="utf-8", errors="backslashreplace") as file:
            print("$", shlex.join(["python", *command[1:]]), file=file, flush=True)
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            # Its own process group keeps Ctrl-C away from it, since `close` stops it. PR_SET_PDEATHSIG (1)
            # stops it if the sweep is killed.
            owned = {"process_group": 0, "preexec_fn": lambda: libc.prctl(1, signal.SIGTERM)}
            self.process = subprocess.Popen(command, env=os.environ | place, **streams, **owned)

    def why_ended(self) -> str:
        """Return train.py's last note, the last line of its traceback, or the signal that killed it."""
        if (signal_number := -self.process.returncode) > 0:
            return f"killed by {signal.Signals(signal_number).name}"
        said = self.log.read_text("utf-8", "replace").rpartition("\n$ ")[2].strip()  # of this attempt
        _, noted, last = said.rpartition("\ntrain.py: ")
        lines = last.splitlines() if noted and "\nTraceback " not in said else said.splitlines()[-1:]
        return progress.printable(" ".join(lines))


class Sweep:
    """A sweep at work: it launches cells that no process trains yet whenever a place is free."""

    def __init__(self, cells: Sequence[Cell], places: list[dict[str, str]], replicas: int):
        self.cells, self.free, self.replicas = cells, list(places), replicas
        self.jobs: list[Job] = []
        self.alone: set[Cell] = set()  # failed next to other seeds, so retried alone
        name = TextColumn("{task.description}", table_column=Column(overflow="fold"))
        columns = name, BarColumn(20), MofNCompleteColumn(), "{task.fields[text]}"
        self.bars = Progress(*columns, console=progress.Terminal(), auto_refresh=False, transient=True)
        self.say = self.bars.console.say
        self.look()

    def train_all(self) -> None:
        """Train until every cell is done or has failed; wait for cells that another sweep trains."""
        told = False
        with self.bars.live, contextlib.closing(self):
            self.say(f"{self.count()}; logs in {self.cells[0].path.parent / 'logs'}")
            while self.jobs or self.unsettled():
                ended = [job for job in self.jobs if job.process.poll() is not None]
                self.look()
                for job in ended:
                    self.settle(job)
                while self.free and (cells := self.next()):
                    self.jobs.append(Job(cells, self.free.pop(0)))
                    self.say(f"started {self.jobs[-1].log.stem}")
                if (elsewhere := self.not_ours(trained=True)) and not self.jobs and not told:
                    self.say(f"waiting for {len(elsewhere)} cells that other processes train")
                    told = True
                self.show()
                progress.end_if_interrupted()
                time.sleep(1)

    def show(self) -> None:
        """Redraw the bars: the total, this sweep's processes, and the cells that other sweeps train."""
        for bar in self.bars.task_ids:
            self.bars.remove_task(bar)
        settled = len(self.cells) - len(self.unsettled())
        self.bars.add_task("cells", total=len(self.cells), completed=settled, text=self.count())
        rows = [(job.log.stem, job.cells) for job in self.jobs]
        rows += [(f"{cell.path.name}, by another sweep", [cell]) for cell in self.not_ours(trained=True)]
        for title, cells in rows:
            cell = max(cells, key=lambda cell: cell.seconds or 0)  # expected to end last
            last = cell.epochs[-1] if cell.epochs else None
            told = [f"test {last.test_acc:.2f} %"] if last and last.test_acc is not None else []
            told += [f"{last.images_per_s * len(cells):,.0f} images/s"] if last and last.images_per_s else []
            text = "  ".join([*told, cell.left])
            self.bars.add_task(title, total=cell.options.epochs, completed=len(cell.epochs), text=text)
        self.bars.refresh()

    def look(self) -> None:
        """Update the unsettled cells, and give up those whose parent cell was given up."""
        logs = {cell.path: cell.log for cell in self.cells if cell.log}
        for cell in self.unsettled():
            cell.look()
            if log := logs.get(cell.parent):
                cell.status, cell.why, cell.log = "failed", f"its parent run failed: {cell.parent}", log
        epoch_s = defaultdict(list)  # by arguments, and by architecture
        for cell in self.cells:
            for key in (cell.arguments, cell.options.arch):
                epoch_s[key] += [epoch.epoch_s for epoch in cell.epochs]
        for cell in self.unsettled():
            if alike := epoch_s[cell.arguments] or epoch_s[cell.options.arch]:
                cell.seconds = statistics.fmean(alike) * (cell.options.epochs - len(cell.epochs))

    def unsettled(self) -> list[Cell]:
        """Return the cells that are neither done nor given up."""
        return [cell for cell in self.cells if cell.status != "done" and not cell.log]

    def not_ours(self, trained: bool) -> list[Cell]:
        """Return unsettled cells that other sweeps train or, if not `trained`, that no process trains."""
        ours = {cell for job in self.jobs for cell in job.cells}
        others = [cell for cell in self.unsettled() if cell not in ours]
        return [cell for cell in others if (cell.status == "running") is trained]

    def next(self) -> list[Cell]:
        """Return the next cell to launch, and more seeds of it if enough cells remain for the other places.

        A cell waits until its parent run is done. The list is empty if no cell can be launched.
        """
        not_yet = {cell.path for cell in self.cells if cell.status != "done"}
        free = [cell for cell in self.not_ours(trained=False) if cell.parent not in not_yet]
        if not free or free[0] in self.alone:
            return free[:1]
        same = [cell for cell in free if cell.arguments == free[0].arguments and cell not in self.alone]
        return same[: min(self.replicas, -(-len(free) // len(self.free)))]

    def settle(self, job: Job) -> None:
        """Free the place of an ended job and report its cells; those to be retried stay unsettled."""
        self.jobs.remove(job)
        self.free.insert(0, job.place)
        refused = job.process.returncode == 2
        taken = any(cell.status == "running" for cell in job.cells)  # another sweep started them first
        for cell in job.cells:
            if job.process.returncode == 0:
                cell.verified = True
                cell.look()
            if cell.status == "done":
                took = duration(sum(epoch.epoch_s for epoch in cell.epochs))
                self.say(f"done {cell.path.name}: {cell.reached} in {took}; {self.count()}")
            elif cell.status == "running" or (refused and taken):
                continue
            elif len(job.cells) > 1 and cell.status not in ("diverged", "interrupted"):
                self.alone.add(cell)
            else:
                cell.log = job.log
                if refused or cell.status == "to do":  # a summary would be of an earlier attempt
                    cell.status, cell.why = "failed", job.why_ended()
                self.say(f"{cell.status} {cell.path.name}: {cell.why}")

    def close(self) -> None:
        """Terminate every process and wait until it has ended; its runs keep their last epoch."""
        if self.jobs:
            progress.note("sweep.py", f"stopping {len(self.jobs)} processes; the next sweep resumes them")
        for job in self.jobs:
            job.process.terminate()
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C while waiting kills them
            for job in self.jobs:
                job.process.wait()
        for job in self.jobs:
            job.process.kill()

    def count(self) -> str:
        done = sum(cell.status == "done" for cell in self.cells)
        return f"{done} of {len(self.cells)} cells done{self.time_left()}"

    def time_left(self) -> str:
        """Return text such as `; about 5 min left`, or "" if no cell's time is known.

        This assumes that the seeds that share a process take as long together as one alone.
        """
        known, groups = [cell for cell in self.unsettled() if cell.seconds is not None], defaultdict(list)
        for cell in sorted(known, key=lambda cell: -cell.seconds):
            groups[cell.arguments].append(cell.seconds)
        if not groups:
            return ""
        needed = [s for group in groups.values() for s in group[:: self.replicas]]
        left = duration(max(sum(needed) / (len(self.free) + len(self.jobs)), *needed))
        unknown = len(self.unsettled()) - len(known)
        return f"; about {left} left" + (f" and {unknown} cells of unknown length" if unknown else "")


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def show_list(sweep: Sweep) -> None:
    """Print every cell with its number (its Slurm array index), its status and the time it still needs."""
    rows = [(cell.path.name, cell.status, cell.reached, cell.left) for cell in sweep.cells]
    print(tabulate(rows, tablefmt="plain", showindex=True))
    counts = Counter(cell.status for cell in sweep.cells)
    text = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{len(rows)} cells: {text}{sweep.time_left()}")


def whole_number(name: str, default: int) -> int:
    if not (text := os.environ.get(name)):
        return default
    if not re.fullmatch("0*[1-9][0-9]{0,3}", text):
        raise OptionError(f"{name}={text}: give a whole number from 1 to 9999")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        print(f"{__doc__}\npython train.py --help lists the options of train.py.")
        return 0
    cells = make_grid(os.environ, [argument for argument in argv if argument != "--list"])
    options, task = cells[0].options, os.environ.get("SLURM_ARRAY_TASK_ID")
    where = places(options.device, whole_number("JOBS", 1))
    replicas = whole_number("REPLICAS", len(cells) if "CUDA_VISIBLE_DEVICES" in where[0] else 1)
    replicas = 1 if options.log else replicas
    if "--list" in argv:
        show_list(Sweep(cells, where, replicas))
        return 0
    if task is not None:
        if not re.fullmatch("[0-9]{1,9}", task) or int(task) >= len(cells):
            raise OptionError(f"there is no cell {task} in the grid: give --array=0-{len(cells) - 1}")
        own = cells[int(task)]
        cells = [cell for cell in cells if cell is own or cell.path == own.parent]
        signal.signal(signal.SIGUSR1, progress.interrupt)  # Slurm sends it before the time limit
    sweep = Sweep(cells, where, replicas)
    try:
        if not prepare(options):
            return 2
        sweep.train_all()
    except KeyboardInterrupt:
        if task is not None:  # requeue it, unless it was cancelled or requeued already
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"  # the last task's $SLURM_JOB_ID is the array's
            asked = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True)
            if "JobState=RUNNING" in asked.stdout:
                subprocess.run(["scontrol", "requeue", job])
        raise
    sweep.say(sweep.count())
    failed = [cell for cell in cells if cell.log]
    if failed:
        sweep.say(f"{len(failed)} of {len(cells)} cells failed:")
    for cell in failed:
        sweep.say(f"{cell.status:12}{cell.path}\n{'':12}{cell.why}\n{'':12}{cell.log}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(progress.run("sweep.py", main))
