"""The measurements of bench.py: rows, stored as one JSON object per line, and tables of them."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from tabulate import tabulate

from progress import OptionError, printable
from records.files import read_text, write_atomically

COLUMNS = {  # key of a row (its value may be None): title, format and unit of the table's column
    "arch": ("arch", "", 1),
    "mode": ("mode", "", 1),
    "impl": ("impl", "", 1),
    "dtype": ("dtype", "", 1),
    "kernel": ("kernel", "", 1),
    "launches": ("launches", ",.1f", 1),
    "images_per_s": ("images/s", ",.0f", 1),
    "step_ms": ("ms", ",.3f", 1),
    "step_ms_min": ("min ms", ",.3f", 1),
    "step_ms_max": ("max ms", ",.3f", 1),
    "peak_memory_bytes": ("peak MB", ",.1f", 1e6),
    "saved_bytes_per_image": ("saved KB/image", ",.1f", 1e3),
    "largest_batch": ("largest batch", ",.0f", 1),
    "seconds": ("first s", ".2f", 1),  # until the first batch (data) or step (startup)
    "run_seconds": ("run s", ".2f", 1),
    "ratio_to_stock": ("/ stock", ".2f", 1),
    "share_of_floor": ("floor", ".1%", 1),
    "bytes_per_s": ("TB/s", ".2f", 1e12),
    "flops_per_s": ("TFLOP/s", ".0f", 1e12),
    "n": ("n", ",.0f", 1),
}
WHERE = "{device_name}, {threads} threads, torch {versions[torch]}, {date}"


def write(rows: Sequence[dict], file: str | Path) -> None:
    """Replace the file with these rows. Raises OSError if it cannot be written."""
    write_atomically(Path(file), "".join(json.dumps(row) + "\n" for row in rows))


def cells(rows: Sequence[dict]) -> dict[str, list[str]]:
    """Return the formatted cells of each column, by title; columns without any value are omitted."""
    columns = {}
    for key, (title, form, unit) in COLUMNS.items():
        values = [row.get(key) for row in rows]
        if any(value is not None for value in values):
            told = ["" if x is None else format(x / unit if form else x, form) for x in values]
            columns[title] = told
    return columns


def show_markdown(paths: Sequence[str]) -> None:
    """Print each file's rows as a Markdown table, after a line on where and when they were measured.

    Raises OptionError if a file is not one that bench.py --json wrote.
    """
    for file in paths:
        if (text := read_text(Path(file))) is None:
            raise OptionError(f"{file}: there is no such file")
        try:
            rows = [json.loads(line) for line in text.splitlines()]
            title = f"{Path(file).name}, {WHERE.format_map(rows[0])}, batches of {rows[-1]['batch_size']}"
            table = tabulate(cells(rows), headers="keys", tablefmt="pipe", disable_numparse=True)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError) as error:
            raise OptionError(f"{file}: is not what --json has written ({error})") from None
        print(*map(printable, f"{title}\n\n{table}\n".split("\n")), sep="\n")


def show(rows: Sequence[dict], how: str = "") -> None:
    """Print the rows as a table; the caption names the device and ends with `how`."""
    title, caption = f"{rows[-1]['part']}, batches of {rows[-1]['batch_size']}", WHERE.format_map(rows[-1])
    table = Table(title=title, caption=f"{caption}{how and chr(10)}{how}", box=box.SIMPLE_HEAD)
    formats = {title: form for title, form, _ in COLUMNS.values()}
    columns = cells(rows)
    for title in columns:
        table.add_column(title, justify="right" if formats[title] else "left", no_wrap=True)
    for texts in zip(*columns.values(), strict=True):
        table.add_row(*texts)
    Console(width=1000).print(table)  # wide, so that nothing is cut off in a file or pipe
