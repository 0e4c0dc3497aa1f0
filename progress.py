"""What a person sees of a run: live bars, or a line per epoch into a file or pipe; a table at the end."""

import math
import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class Terminal(Console):
    """Standard output; a reader who has closed it, as `| head` does, ends no run."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Bars:
    """The live bars of runs that train side by side, in one terminal. Use it as `with bars.bars: ...`."""

    def __init__(self, runs: int = 1, shown: bool = True):
        self.runs, self.console = runs, Terminal(quiet=not shown)
        columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}")
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            *columns,
            console=self.console,
            disable=not (shown and self.console.is_terminal),
        )


class Display:
    """Progress of a run of `epochs` epochs. `what` names its data, and that it is quick, on every line."""

    def __init__(
        self, group: Bars, title: str, what: str, epochs: int, steps_per_epoch: int, epochs_done: int
    ):
        self.bars, self.what, self.epochs = group.bars, what, epochs
        self.live = not self.bars.disable
        self.say(title)
        self.run_bar = self.bars.add_task(what, total=epochs * steps_per_epoch, text="")
        self.bars.update(self.run_bar, completed=epochs_done * steps_per_epoch)
        self.epoch_bar = self.bars.add_task("epoch", total=steps_per_epoch, text="", visible=group.runs == 1)

    def say(self, text: str) -> None:
        self.bars.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def start_epoch(self, epoch: int) -> None:
        self.bars.reset(self.epoch_bar, description=f"epoch {epoch}/{self.epochs}")
        self.began = self.looked = time.perf_counter()

    def step(self, step) -> None:
        """Advance by a step; twice a second at most, look at the device's numbers, which waits for them."""
        if not self.live:
            return
        self.bars.advance(self.run_bar)
        self.bars.advance(self.epoch_bar)
        if (now := time.perf_counter()) > self.looked + 0.5:
            self.looked = now
            loss, accuracy = step.metrics()
            rate = step.seen / (now - self.began)
            self.bars.update(self.epoch_bar, text=f"{rate:,.0f} images/s  loss {loss:.3f}  {accuracy:.1f} %")

    def end_epoch(self, row: dict) -> None:
        text = f"train {row['train_loss']:.3f} {row['train_acc']:5.2f} %"
        for name in ("val", "test"):
            if row.get(f"{name}_acc") is not None:
                loss = row[f"{name}_loss"]
                text += f"  {name} {math.nan if loss is None else loss:.3f} {row[f'{name}_acc']:5.2f} %"
        self.bars.update(self.run_bar, text=text)
        if not self.live:
            rate = f"{row['images_per_s']:,.0f} images/s" if row["images_per_s"] else ""
            epoch = f"epoch {row['epoch']}/{self.epochs}  lr {row['lr']:.4g}"
            self.say(f"[{self.what}] {epoch}  {text}  {row['epoch_s']:.1f} s  {rate}".rstrip())


def show_results(folder: str, result: dict) -> None:
    """The table at the end of a run, from its summary. KeyError or TypeError for one that is not whole."""
    size, epochs = result["checkpoint_bytes"], result["epochs_done"]
    table = Table(title=f"{result['arch']}, {result['mode']}, seed {result['seed']}", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    data = f"{result['data_title']}, {epochs} epoch{'s' if epochs > 1 else ''}"
    data += f", of {result['epochs']}: {result['why']}" if result["why"] else ""
    accuracy = f"{result['final_test_acc']:.2f} %  (best epoch {result['best_test_acc']:.2f} %)"
    if "chosen_epoch" in result:
        chosen = f"{result['chosen_test_acc']:.2f} %, epoch {result['chosen_epoch']}"
        accuracy += f"; where validation was best: {chosen}"
    if "final_test_top5_acc" in result:
        accuracy += f"; top 5 {result['final_test_top5_acc']:.2f} %"
    for name, value in {
        "data": f"{data}, --quick" if result["quick"] else data,
        "test accuracy": accuracy,
        "parameters trained": f"{result['params_trained']:,} of {result['params_total']:,}",
        "time": f"{result['train_s']:,.1f} s, after {result['startup_s']:.1f} s of start-up",
        "seed checkpoint": f"{size:,} bytes, {100 * size / result['full_bytes']:.2f} % of all weights",
        "folder": folder,
    }.items():
        table.add_row(name, Text(value))  # as it is: brackets in a path are no markup
    Terminal().print(table)
