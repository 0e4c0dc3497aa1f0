"""The cells of a grid of runs: which there are, how far each is, and how long the rest will take."""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import provenance
import runs
from config import LOGISTIC, OptionError, Options, as_json, parse_options
from datasets import sources

FOLDER = Path(__file__).parent
DEPTHS = "resnet14 resnet32 resnet56 resnet110 resnet218 resnet434 resnet866"
WIDTHS = "resnet14 resnet14_w2 resnet14_w4 resnet14_w8 resnet14_w16 resnet14_w32"
PARTS = "output shortcut bn+output bn+shortcut bn+output+shortcut none"
STARTS = ["", "--bn-init ones", "--bn-init one_one", "--bn-init signed_uniform", "--bn-init he_normal"]
STARTS += ["--conv-init kaiming_uniform", "--conv-init orthogonal", "--conv-init binary"]
TRIALS = """
--lr 0.03, --lr 0.3, --lr 1, --weight-decay 0, --weight-decay 0.001, --batch-size 32, --batch-size 64,
--batch-size 256, --label-smoothing 0.1, --schedule cosine, --bn-init ones, --bn-init signed_uniform,
--bn-init he_normal, --conv-init orthogonal, --optimizer adam --lr 0.01 --weight-decay 0,
--optimizer adam --lr 0.001 --weight-decay 0, --optimizer adam --lr 0.03 --weight-decay 0,
--lr 3, --lr 1 --schedule cosine, --lr 1 --weight-decay 0, --lr 1 --batch-size 64, --lr 0.3 --batch-size 32,
--lr 1 --bn-init he_normal
"""  # one thing each; then, of what that brought, two
TRIALS = [f"--val-split 5000 {trial.strip()}" for trial in ["", *TRIALS.split(",")]]
FIRST_PARTS = (5, 10, 20, 40)  # of 160 epochs, in which BatchNorm alone trains before everything does
DEFAULT = {"ARCHS": "resnet32 resnet56 resnet110", "MODES": "all bn_only random", "SEEDS": "0 1 2"}
GRIDS = {  # what differs from the default
    "depth": {"ARCHS": DEPTHS},
    "width": {"ARCHS": WIDTHS},
    "vgg": {"ARCHS": "vgg11 vgg13 vgg16 vgg19"},
    "parts": {"MODES": PARTS},
    "init": {"MODES": "bn_only", "STARTS": STARTS},
    "recipe": {"ARCHS": "resnet14", "MODES": "bn_only", "SEEDS": "0", "STARTS": TRIALS},
    "warmstart": {"ARCHS": "resnet32", "MODES": "all"},
    "retrain": {"ARCHS": "resnet32", "MODES": "all"},
}
STATUSES = ("done", "running", "interrupted", "diverged", "failed", "to do")


class Cell(NamedTuple):
    """One run of train.py, with its place in the grid, its arguments but for the seed, and its folder.

    `start` is the folder of the cell that it starts from, if any.
    """

    number: int
    arguments: tuple[str, ...]
    options: Options
    path: Path
    start: Path | None


class State(NamedTuple):
    """How far a cell is: one of STATUSES, its epochs' metrics, its summary."""

    status: str
    rows: list[dict]
    summary: dict


def make_grid(environment: Mapping[str, str], argv: Sequence[str]) -> list[Cell]:
    """The cells that ARCHS, MODES, SEEDS and GRID choose, each with train.py's options `argv`.

    Raises OptionError, FreezeError or ModelError for what no run could use.
    """
    name = environment.get("GRID", "")
    if name and name not in GRIDS:
        raise OptionError(f"GRID={name}: choose from {', '.join(GRIDS)}")
    grid = DEFAULT | GRIDS.get(name, {})
    archs, modes, seeds = (environment.get(key, grid[key]).split() for key in DEFAULT)
    for key, values in zip(DEFAULT, (archs, modes, seeds), strict=True):
        if not values:
            raise OptionError(f'{key}="": name at least one, or leave it out for "{grid[key]}"')
    each, given = parse_options(argv, __doc__)
    if taken := given & {"arch", "mode", "seed"}:
        key = sorted(taken)[0]
        raise OptionError(f"--{key}: a sweep takes {key.upper()}S from the environment")
    if "overwrite" in given:
        raise OptionError(
            f"--overwrite: a sweep goes on; to start again, move {each[0].out} away or give --out"
        )
    argv = [argument for argument in argv if argument != "--resume"]
    if each[0].quick and "data" not in given:
        found = prepare(each[0])
        argv += ["--data", each[0].data if found else "synthetic"]
        if not found:
            print(f"sweep.py: --quick takes synthetic images, for want of {each[0].data}", file=sys.stderr)
    cells: dict[Path, Cell] = {}

    def add(words: list[str], chained: Sequence[str] = (), start: str | None = None) -> str:
        """Cells of all seeds, whose options are `words`, the user's, and `chained`, the last ruling.

        `start` is what --init-from takes; returns what takes these cells for a start. They go on from it as
        it is: --reset-bn is of what the user starts from.
        """
        own = [argument for argument in argv if argument != "--reset-bn"] if start else argv
        arguments = (*words, *own, *chained, *(("--init-from", start) if start else ()))
        for options in parse_options([*arguments, "--seed", *seeds], __doc__)[0]:
            path = folder(options)
            begins = Path(start.replace("{seed}", str(options.seed))) if start else None
            cells.setdefault(path, Cell(len(cells), arguments, options, path, begins))
        mode = f"-{options.mode}-s"
        name = path.name.replace(f"{mode}{options.seed}", mode + "{seed}", 1)
        return str(path.with_name(name))

    for trial in grid.get("STARTS", [""]):
        for arch in archs:
            for mode in modes:
                words = ["--arch", arch, "--mode", mode, *trial.split()]
                done = add(words)
                if name == "warmstart":
                    add_warm_starts(add, words, each[0])
                elif name == "retrain":
                    add_retraining(add, words, done, each[0])
    return list(cells.values())


def add_warm_starts(add: Callable[..., str], words: list[str], options: Options) -> None:
    """Runs as long as that of `words`: of BatchNorm alone, at the first rate, and then of what it trains."""
    steps = options.milestones if options.schedule == "step" else ()
    for first in sorted({max(1, round(part * options.epochs / 160)) for part in FIRST_PARTS}):
        if first >= min([options.epochs, *steps]):
            continue
        only = ["--mode", "bn_only", "--epochs", str(first), "--schedule"]
        # What chooses by validation images sets them apart here too; so late, it never does.
        never = str(options.epochs)
        only += ["plateau", "--patience", never] if options.schedule == "plateau" else ["constant"]
        only += ["--early-stop", never] if options.early_stop else []
        left = ["--milestones", *(str(milestone - first) for milestone in steps)] if steps else []
        then = ["--epochs", str(options.epochs - first), *left, "--warmup-epochs", "0"]
        add(words, then, start=add(words, only))


def add_retraining(add: Callable[..., str], words: list[str], done: str, options: Options) -> None:
    """An eighth as many epochs on top of the run `done`: of BatchNorm alone, kept or drawn anew, and of
    everything, to compare; each at the first rate and at a tenth of it."""
    more = max(2, options.epochs // 8)
    steps = sorted({more // 2, 3 * more // 4})
    course = ["--epochs", str(more), "--milestones", *map(str, steps)]
    for lr in (options.lr, options.lr / 10):
        course += ["--min-lr", f"{lr:g}"] if options.min_lr > lr else []
        for what in (["--mode", "bn_only"], ["--mode", "bn_only", "--reset-bn"], []):
            add(words, [*course, "--lr", f"{lr:g}", *what], start=done)


def folder(options: Options) -> Path:
    return Path(options.out) / provenance.cell_name(options, sources.short_name(options.data))


def with_starts(cell: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """The cell after those, of `cells`, that it starts from."""
    before = [other for other in cells if other.path == cell.start]
    return [*(each for other in before for each in with_starts(other, cells)), cell]


def prepare(options: Options) -> bool:
    """Whether the data is there and prepared; by another process: one with FFCV in it is hard to leave."""
    command = [sys.executable, str(FOLDER / "data.py"), options.data, "--data-dir", options.data_dir]
    command += ["--image-size", str(options.image_size)] if options.image_size else []
    return subprocess.run(command).returncode == 0


def look(cell: Cell) -> State:
    """How far a cell is, by its folder."""
    rows = runs.read_rows(cell.path)
    try:
        summary = runs.Run(cell.path).summary or {}
    except runs.RunError as error:
        summary = {"status": "failed", "why": str(error)}
    status = "running" if runs.in_use(cell.path) else summary.get("status", "to do")
    if status == "done" and not holds(cell):
        status = "failed"  # train.py will say so
    return State(status if status in STATUSES else "failed", rows, summary)


def holds(cell: Cell) -> bool:
    """Whether the run in a cell's folder, whose name does not tell all, has the cell's options."""
    try:
        options = (runs.Run(cell.path).config or {}).get("options") or {}
        wanted = as_json(cell.options)
        differing = {name for name, value in wanted.items() if options.get(name, value) != value}
    except (runs.RunError, AttributeError):
        return False
    return not differing - LOGISTIC - {"data", "init_from"}


class Forecast:
    """How long cells take, by the epochs of those of the same arguments, else of the same architecture."""

    def __init__(self, cells: Sequence[Cell], states: Mapping[Cell, State]):
        self.states, seen = states, {}
        for cell in cells:
            seconds = [row["epoch_s"] for row in states[cell].rows]
            for key in (cell.arguments, cell.options.arch) if seconds else ():
                seen.setdefault(key, []).append(sum(seconds) / len(seconds))
        self.epoch_s = {key: sum(means) / len(means) for key, means in seen.items()}

    def seconds(self, cell: Cell) -> float | None:
        """What is left of a cell; None where nothing like it has run."""
        epoch_s = self.epoch_s.get(cell.arguments, self.epoch_s.get(cell.options.arch))
        left = 0 if self.states[cell].status == "done" else cell.options.epochs - len(self.states[cell].rows)
        return epoch_s and epoch_s * left

    def text(self, cells: Sequence[Cell], replicas: int, at_once: int) -> str:
        """What is left of all cells, where `replicas` seeds take no longer than one."""
        left: dict[tuple, list[float | None]] = {}
        for cell in cells:
            if self.states[cell].status != "done":
                left.setdefault(cell.arguments, []).append(self.seconds(cell))
        known = [s for group in left.values() for s in sorted(filter(None, group), reverse=True)[::replicas]]
        unknown = sum(group.count(None) for group in left.values())
        text = f"about {duration(max(sum(known) / at_once, *known))} left" if known else ""
        if unknown and text:
            text += f" and {unknown} cells of unknown length"
        return text


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def accuracy(summary: dict) -> str:
    value = summary.get("final_test_acc")
    return f"{value:.2f} %" if isinstance(value, float) else ""


def seeds_of(cells: Sequence[Cell]) -> str:
    return "_".join(str(cell.options.seed) for cell in cells)


def title(cells: Sequence[Cell]) -> str:
    """What the folders of cells that differ in the seed alone would be called, were they one."""
    mode = f"-{cells[0].options.mode}-s"
    return cells[0].path.name.replace(mode + seeds_of(cells[:1]), mode + seeds_of(cells), 1)


def show_list(cells: Sequence[Cell], replicas: int, at_once: int) -> None:
    """Every cell with its number, which is its Slurm task's, its state, and the time it still needs."""
    states = {cell: look(cell) for cell in cells}
    forecast, table = Forecast(cells, states), []
    for cell in cells:
        status, rows, summary = states[cell]
        what = f"{len(rows)} of {cell.options.epochs} epochs" if rows else ""
        what = accuracy(summary) if status == "done" else what
        seconds = None if status == "done" else forecast.seconds(cell)
        left = f"{duration(seconds)} left" if seconds is not None else ""
        table.append([str(cell.number), cell.path.name, status, what, left])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for number, *row in table:
        texts = [text.ljust(width) for text, width in zip(row, widths[1:], strict=True)]
        print("  ".join([number.rjust(widths[0]), *texts]).rstrip())
    counts = {status: sum(state.status == status for state in states.values()) for status in STATUSES}
    text = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    print("; ".join(filter(None, [f"{len(cells)} cells: {text}", forecast.text(cells, replicas, at_once)])))
