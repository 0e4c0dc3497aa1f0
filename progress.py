"""What a script prints: progress bars (lines in a file or pipe), notes, errors; exit statuses; times."""

# ruff: noqa: E402

import argparse
import errno
import importlib
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

# Our scripts import this module first, so that until `run` is called Ctrl-C ends them without a traceback.
_script = Path(getattr(sys.modules["__main__"], "__file__", "/")).resolve()
if _script.parent == Path(__file__).resolve().parent and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# It also comes before OpenMP is loaded, whose threads wait awake for each other. For as long as they do by
# default, 300,000 rounds or some milliseconds, they keep a core from the very threads that they wait for.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# isort: split
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, user's quota or process's file-size limit
BATCHED = ("train.py", "bench.py")  # the scripts that have --batch-size

# ---- notes, command lines and exit statuses, the same for every script ----


class OptionError(ValueError):
    """Raised when options, files or images cannot be used as requested; the message says what would work."""

    exit_status = 2


class Parser(argparse.ArgumentParser):
    """An argument parser that shows `description` verbatim and raises OptionError with a one-line message."""

    def __init__(self, prog: str, description: str | None = None):
        as_it_is = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=as_it_is, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}; python {self.prog} --help lists the options")


def speaks() -> bool:
    """Return whether this process prints; under torchrun only rank 0 does."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


def note(script: str, text: str) -> None:
    """Print a note of a line or two to standard error if this process prints; ignore a closed stream."""
    if speaks():
        try:
            print(f"{script}: {shown(text)}", file=sys.stderr, flush=True)
        except OSError:
            close_output(sys.stderr)


def printable(text: str) -> str:
    """Return `text` with every unprintable character, such as a terminal control code, replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def shown(message: str) -> str:
    """Return the lines of a note made printable; a word of 450 or more characters loses its middle."""
    short = re.sub(r"(\S{200})\S{200,}(\S{50})", r"\1...\2", message)
    return "\n".join(map(printable, short.split("\n")))


def out_of_memory(error: BaseException) -> bool:
    """Return whether torch, NumPy or Python ran out of memory, on the GPU or on the host."""
    # The last two are oneDNN's messages, which give no other reason.
    texts = "out of memory", "can't allocate memory", "not create a primitive\n", "not execute a primitive\n"
    told = isinstance(error, RuntimeError) and any(text in f"{error}\n" for text in texts)
    return told or isinstance(error, MemoryError)


def no_room(error: BaseException) -> str | None:
    """Return the line of torch's error message that reports a full disk or /dev/shm, or None."""
    lines = str(error).splitlines()
    return next((line for line in lines if any(os.strerror(number) in line for number in FULL)), None)


def run(script: str, main: Callable[[], int | None]) -> int:
    """Call `main` and return the script's exit status: what `main` returns, with None as 0.

    An exception with an attribute `exit_status` (1: the run failed, 2: unusable options or data) gives that
    status. I/O errors, lack of memory, and interruption by Ctrl-C or SIGTERM give 1; a file name that is too
    long, or a file that may not be opened, gives 2. Each of these prints a note of a line or two. A closed
    pipe gives 0 without a note. Every other exception propagates.
    """
    ours = [signal.SIGTERM] + [signal.SIGINT] * (signal.getsignal(signal.SIGINT) != signal.SIG_IGN)
    before = {number: signal.signal(number, interrupt) or signal.SIG_DFL for number in ours}
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: else the next file to be opened would get its descriptor
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115, it stays open
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters its encoding lacks
    try:
        status = main() or 0
        sys.stdout.flush()  # report a full device here, not at interpreter shutdown
        return status
    except BrokenPipeError:  # the reader stopped early, as `| head` does
        close_output()
        return 0
    except KeyboardInterrupt as error:
        status, why = 1, str(error) or "interrupted"
    except Exception as error:
        status, why = getattr(error, "exit_status", None), str(error)
        if isinstance(error, OSError) and status is None:
            status = 2 if error.errno in (errno.ENAMETOOLONG, errno.EACCES) else 1
            if error.errno in FULL and not error.filename:
                why += ", where its output goes; free some space, or send it elsewhere"
        if status is None and out_of_memory(error):
            mend = "try a smaller --batch-size" if script in BATCHED else "use a machine with more memory"
            status, why = 1, f"out of memory; {mend}"
        if status is None and isinstance(error, RuntimeError) and (line := no_room(error)):
            status, why = 1, f"{line}; free some space"
        if status is None:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # else Python would fail again at shutdown
                close_output(stream)
    note(script, why)
    return status


def close_output(stream: TextIO | None = None) -> None:
    """Redirect `stream` (default: standard output) to the null device."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def interrupt(*_: object) -> NoReturn:
    """Signal handler for Ctrl-C and a cluster's SIGTERM: raise KeyboardInterrupt, ignore further SIGTERMs."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def end_if_interrupted() -> None:
    """Raise KeyboardInterrupt again if C code that calls Python, such as numba's, has swallowed it."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        raise KeyboardInterrupt


class Terminal(Console):
    """A console on standard output that survives a closed pipe, as after `| head`."""

    def on_broken_pipe(self) -> None:
        close_output()

    def say(self, text: str) -> None:
        """Print a line verbatim; brackets are not markup."""
        self.print(text, soft_wrap=True, highlight=False, markup=False)


# ---- a training run ----


class Bars(Progress):
    """The live progress bars of `runs` runs that train side by side. Use it as `with bars: ...`."""

    def __init__(self, runs: int = 1):
        self.runs, console = runs, Terminal(quiet=not speaks())
        columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
        columns += [TimeRemainingColumn(), TextColumn("{task.fields[text]}", markup=False)]
        super().__init__(*columns, console=console, disable=not (speaks() and console.is_terminal))


class Stopwatch:
    """The times of a run in seconds, over all its starts.

    `startup_s` is the time until everything has been compiled, `train_s` that of the epochs with their
    evaluations, `wall_s` all of it, from the start of each process. `began` is when
    this process started, a time.perf_counter().
    """

    def __init__(self, began: float):
        self.began, self.starting = began, True  # `starting` until the first steps have compiled
        self.startup_s = self.train_s = self.epoch_s = self.earlier_wall_s = 0.0
        self.lap_began, self.untimed_images = began, 0

    def lap_s(self) -> float:
        """Return the seconds since the previous call, or since the process began."""
        began, self.lap_began = self.lap_began, time.perf_counter()
        return self.lap_began - began

    def epoch_begins(self) -> None:
        if not self.starting:  # otherwise the lap that began with the process still counts as start-up
            self.lap_s()

    def startup_ends(self, images: int) -> None:
        """End start-up within an epoch, `images` of which have been trained on."""
        self.startup_s += self.lap_s()
        self.starting, self.untimed_images = False, images

    def training_ends(self, images: int) -> float | None:
        """Return an epoch's images/s, given its number of images; start-up is left out, None if it is all."""
        timed, self.untimed_images = images - self.untimed_images, 0
        self.epoch_s = self.lap_s()
        return timed / self.epoch_s if timed else None

    def evaluation_ends(self, compiled: bool) -> None:
        """Count an evaluation as start-up if it compiled, else as part of the epoch."""
        if compiled:
            self.startup_s += self.lap_s()
        else:
            self.epoch_s += self.lap_s()

    def epoch_ends(self) -> float:
        """Return the seconds of the epoch, training and evaluations."""
        self.train_s += self.epoch_s
        return self.epoch_s

    def state_dict(self) -> dict[str, float]:
        wall_s = self.earlier_wall_s + time.perf_counter() - self.began
        return {"startup_s": self.startup_s, "train_s": self.train_s, "wall_s": wall_s}

    def load_state_dict(self, state: dict[str, float]) -> None:
        names = "startup_s", "train_s", "wall_s"
        self.startup_s, self.train_s, self.earlier_wall_s = (float(state[name]) for name in names)


class Display:
    """The progress of one run (a runs.Run that has begun), in the terminal and in the tracker of --log.

    The trackers, wandb and trackio, have the same interface.
    """

    def __init__(self, bars: Bars, run, steps_per_epoch: int):
        of, options, self.bars = run.described, run.described.options, bars
        self.epochs = options.epochs
        self.label = f"{of.spec.data}{' quick' * options.quick}{f' s{options.seed}' * (bars.runs > 1)}"
        bars.console.say(f"{run.path}\n{options.arch}, {options.mode}, {of.data_title}")
        done, total = len(run.rows) * steps_per_epoch, self.epochs * steps_per_epoch
        self.run_bar = bars.add_task(self.label, completed=done, total=total, text="")
        self.epoch_bar = bars.add_task("epoch", total=steps_per_epoch, text="", visible=bars.runs == 1)
        self.tracker = None
        if options.log and run.writes:
            settings = {"name": run.path.name, "config": of.model_dump(mode="json", exclude_unset=True)}
            self.tracker = import_tracker(options.log).init(project="batchnorm-only", **settings)

    def start_epoch(self, epoch: int) -> None:
        self.bars.reset(self.epoch_bar, description=f"epoch {epoch}/{self.epochs}")
        self.began = self.looked = time.perf_counter()

    def step(self, step) -> None:
        """Advance the bars a step; at most twice a second, read the metrics, which waits for the device."""
        if self.bars.disable:
            return
        self.bars.advance(self.run_bar)
        self.bars.advance(self.epoch_bar)
        if (now := time.perf_counter()) > self.looked + 0.5:
            self.looked = now
            loss, accuracy = step.metrics()
            rate = step.seen / (now - self.began)
            self.bars.update(self.epoch_bar, text=f"{rate:,.0f} images/s  loss {loss:.3f}  {accuracy:.1f} %")

    def end_epoch(self, row) -> None:
        """Show and log an epoch's metrics; `row` is a records.Epoch."""
        text = f"train {row.train_loss:.3f} {row.train_acc:5.2f} %"
        for name in ("val", "test"):
            loss, accuracy = getattr(row, f"{name}_loss"), getattr(row, f"{name}_acc")
            if accuracy is not None:
                text += f"  {name} {math.nan if loss is None else loss:.3f} {accuracy:5.2f} %"
        self.bars.update(self.run_bar, text=text)
        if self.bars.disable:
            rate = f"{row.images_per_s:,.0f} images/s" if row.images_per_s else ""
            epoch = f"epoch {row.epoch}/{self.epochs}  lr {row.lr:.4g}"
            self.bars.console.say(f"[{self.label}] {epoch}  {text}  {row.epoch_s:.1f} s  {rate}".rstrip())
        if self.tracker:
            self.tracker.log(row.model_dump(exclude_none=True), step=row.epoch)

    def finish(self, summary) -> None:
        if self.tracker:
            self.tracker.log({f"summary/{k}": v for k, v in summary.model_dump(exclude_none=True).items()})
            self.tracker.finish()


def import_tracker(name: str):
    """Import the tracker that --log names. Raises OptionError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise OptionError(f"--log {name}: it is not installed; pip install {name}, or leave it out") from None


def show_results(run) -> None:
    """Print the table of results of `run`, a runs.Run that is done."""
    options, result = run.config.options, run.summary
    size, done = result.checkpoint_bytes, result.epochs_done
    data = f"{result.data_title}, {done} epoch{'s' * (done > 1)}"
    data += f", of {options.epochs}: {result.why}" if result.why else ""
    accuracy = f"{result.final_test_acc:.2f} %  (best epoch {result.best_test_acc:.2f} %)"
    if result.chosen_test_acc is not None:
        chosen = f"{result.chosen_test_acc:.2f} %, epoch {result.chosen_epoch}"
        accuracy += f"; at the best validation accuracy: {chosen}"
    if result.final_test_top5_acc is not None:
        accuracy += f"; top 5 {result.final_test_top5_acc:.2f} %"
    title = f"{result.arch}, {result.mode}, seed {result.seed}"
    in_all = f"; {result.wall_s:,.1f} s in all" if result.wall_s else ""
    table = Table(Column(), Column(overflow="fold"), title=Text(title), show_header=False)
    for name, value in {
        "data": f"{data}, --quick" if options.quick else data,
        "test accuracy": accuracy,
        "parameters trained": f"{result.params_trained:,} of {result.params_total:,}",
        "time": f"{result.train_s:,.1f} s, after {result.startup_s:.1f} s of start-up{in_all}",
        "seed checkpoint": f"{size:,} bytes, {100 * size / result.full_bytes:.2f} % of all weights",
        "folder": str(run.path),
    }.items():
        table.add_row(name, Text(value))  # verbatim: brackets in a path are not markup
    Terminal().print(table)
