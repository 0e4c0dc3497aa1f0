"""What a person sees: live bars, or a line per epoch into a file or pipe; notes, errors and exit statuses."""

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

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, or a user's or a process's share of it
BATCHED = ("train.py", "bench.py")  # the scripts that have --batch-size

# Every script of ours imports this module first: from here to `run`, Ctrl-C ends it without a traceback.
_script = Path(getattr(sys.modules["__main__"], "__file__", "/")).resolve()
if _script.parent == Path(__file__).resolve().parent and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# ---- notes, command lines and exit statuses, the same for every script ----


class OptionError(ValueError):
    """Options, files or images that cannot be used as asked; the message says what would do."""

    exit_status = 2


class Parser(argparse.ArgumentParser):
    """A script's command line; `description` is shown as it is, and an error is one line."""

    def __init__(self, prog: str, description: str | None = None):
        as_it_is = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=as_it_is, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}; python {self.prog} --help lists the options")


def speaks() -> bool:
    """Whether this process speaks to people: of those that torchrun started together, the first does."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


def note(script: str, text: str) -> None:
    """Tell a person something in a line or two of standard error, if that can be written to."""
    if speaks():
        try:
            print(f"{script}: {shown(text)}", file=sys.stderr, flush=True)
        except OSError:
            close_output(sys.stderr)


def printable(text: str) -> str:
    """`text`, in which each character that would steer a terminal is replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def reason(error: BaseException) -> str:
    """The first line of what an error says, or else its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def shown(message: str) -> str:
    """The lines of a note, printable; of a word that fills several lines of a screen, the two ends."""
    short = re.sub(r"(\S{200})\S{200,}(\S{50})", r"\1...\2", message)
    return "\n".join(map(printable, short.split("\n")))


def out_of_memory(error: BaseException) -> bool:
    """Whether torch, NumPy or Python found too little memory, of a GPU or of the machine."""
    # The last two are oneDNN's, which says no more
    texts = "out of memory", "can't allocate memory", "not create a primitive\n", "not execute a primitive\n"
    told = isinstance(error, RuntimeError) and any(text in f"{error}\n" for text in texts)
    return told or isinstance(error, MemoryError)


def no_room(error: BaseException) -> str | None:
    """The line in which torch says that a disk, or /dev/shm, has no room for a file; None where none does."""
    lines = str(error).splitlines()
    return next((line for line in lines if any(os.strerror(number) in line for number in FULL)), None)


def run(script: str, main: Callable[[], int | None]) -> int:
    """The exit status of a script: what `main` returns, 0 for None, or what the exception that ends it says.

    An exception says so by an attribute `exit_status`: 1 the run failed, 2 unusable options or data. It is
    told in a line or two, as are a failing disk, too little memory, and an interruption by Ctrl-C or SIGTERM;
    each of these is 1. A name that the file system does not take is 2. Every other exception passes.
    """
    ours = [signal.SIGTERM] + [signal.SIGINT] * (signal.getsignal(signal.SIGINT) != signal.SIG_IGN)
    before = {number: signal.signal(number, interrupt) or signal.SIG_DFL for number in ours}
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: else the next file that is opened would take its number
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115, it stays open
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a character that its encoding lacks
    try:
        status = main() or 0
        sys.stdout.flush()  # a full device is told here, not by Python as it ends
        return status
    except BrokenPipeError:  # the reader has seen enough, as `| head` does
        close_output()
        return 0
    except KeyboardInterrupt as error:
        status, why = 1, str(error) or "interrupted"
    except Exception as error:
        status, why = getattr(error, "exit_status", None), str(error)
        if isinstance(error, OSError) and status is None:
            status = 2 if error.errno == errno.ENAMETOOLONG else 1
            if error.errno in FULL and not error.filename:
                why += ", where its output goes; make room, or send it elsewhere"
        if status is None and out_of_memory(error):
            mend = "try a smaller --batch-size" if script in BATCHED else "it needs a machine with more"
            status, why = 1, f"out of memory; {mend}"
        if status is None and isinstance(error, RuntimeError) and (line := no_room(error)):
            status, why = 1, f"{line}; make room"
        if status is None:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # else Python would fail in it again as it ends
                close_output(stream)
    note(script, why)
    return status


def close_output(stream: TextIO | None = None) -> None:
    """Let what is still printed to `stream`, by default standard output, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def interrupt(*_: object) -> NoReturn:
    """End by Ctrl-C, which is what a cluster's SIGTERM comes to. Another SIGTERM changes nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def end_if_interrupted() -> None:
    """End as `interrupt` did, where that was lost: C code that calls Python, as numba's, drops exceptions."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        raise KeyboardInterrupt


class Terminal(Console):
    """Standard output; a reader who has closed it, as `| head` does, ends no run."""

    def on_broken_pipe(self) -> None:
        close_output()

    def say(self, text: str) -> None:
        """Print a line as it is: brackets in it are no markup."""
        self.print(text, soft_wrap=True, highlight=False, markup=False)


# ---- a training run ----


class Bars(Progress):
    """The live bars of `runs` runs that train side by side, in one terminal. Use it as `with bars: ...`."""

    def __init__(self, runs: int = 1):
        self.runs, console = runs, Terminal(quiet=not speaks())
        columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
        columns += [TimeRemainingColumn(), TextColumn("{task.fields[text]}", markup=False)]
        super().__init__(*columns, console=console, disable=not (speaks() and console.is_terminal))


class Display:
    """The progress of one run (a runs.Run that has begun): in the terminal, and at the tracker of --log.

    The trackers are wandb and trackio, whose interface is the same.
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
            settings = {"name": run.path.name, "config": of.model_dump(mode="json")}
            self.tracker = import_tracker(options.log).init(project="batchnorm-only", **settings)

    def start_epoch(self, epoch: int) -> None:
        self.bars.reset(self.epoch_bar, description=f"epoch {epoch}/{self.epochs}")
        self.began = self.looked = time.perf_counter()

    def step(self, step) -> None:
        """Advance by a step; twice a second at most, look at the device's numbers, which waits for them."""
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
        """Show an epoch's metrics, a records.Epoch."""
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
    """The module that --log names. OptionError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise OptionError(f"--log {name}: it is not installed; pip install {name}, or leave it out") from None


def show_results(run) -> None:
    """The table at the end of a run, a runs.Run that is done."""
    options, result = run.config.options, run.summary
    size, done = result.checkpoint_bytes, result.epochs_done
    data = f"{result.data_title}, {done} epoch{'s' * (done > 1)}"
    data += f", of {options.epochs}: {result.why}" if result.why else ""
    accuracy = f"{result.final_test_acc:.2f} %  (best epoch {result.best_test_acc:.2f} %)"
    if result.chosen_test_acc is not None:
        chosen = f"{result.chosen_test_acc:.2f} %, epoch {result.chosen_epoch}"
        accuracy += f"; where validation was best: {chosen}"
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
        table.add_row(name, Text(value))  # as it is: brackets in a path are no markup
    Terminal().print(table)
