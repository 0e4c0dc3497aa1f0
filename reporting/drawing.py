"""Draw the report's figures with matplotlib: each consists of lines in panels, or of bars.

A mode has the same colour (Okabe and Ito's palette), marker and line style in every figure. Black is
everything and blue is BatchNorm, so that the paper's comparison stands out. The same numbers give the same
files, byte for byte.
"""

import io
import textwrap
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator
from PIL import Image

from reporting.series import NO_MEAN, Mean, Series

warnings.filterwarnings("ignore", message="Glyph .* missing")  # for names in other scripts
matplotlib.style.use(Path(__file__).with_name("report.mplstyle"))
MODES = pd.read_csv(Path(__file__).with_name("modes.csv"), index_col="mode", keep_default_na=False)
TRAIN = (0, (3, 1.5))  # dashes
VARIANT_MARKERS = ("", "*", "H", "8")  # for lines of one mode that differ in other options
MAX_BARS, MAX_PANELS = 40, 12
wrap = partial(textwrap.fill, max_lines=3, placeholder=" …")

Drawn = tuple[Figure, list[Series]] | None  # a figure and its series; None if none has the data


class Line(NamedTuple):
    """A line for `lines`; `look` is points, train, test, steps (x has the n + 1 edges), paper or port."""

    label: str
    mode: str
    x: list[float]
    y: list[float]
    std: list[float] | None = None
    look: str = "points"
    variant: int = 0


Panel = tuple[str, list[Line]]  # its title and its lines
Labels = tuple[str, str]  # of the x and y axes
Ticks = dict[float, str] | None  # positions on the x axis and their labels


class Column(NamedTuple):
    """A column of `bars`: each bar's value and text and, on a log axis, the outlined value behind it."""

    label: str
    values: list[Mean | None]
    texts: list[str]
    outlines: list[float] | None = None


def short(number: float, _: object = None) -> str:
    """Return a number in short form for an axis, such as 12.3k for 12345."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def look_of(mode: str) -> tuple[str, str, object]:
    """Return a mode's colour, marker and line style."""
    colour, marker, dashes = MODES.loc[mode if mode in MODES.index else "other"]
    return colour, marker, (0, tuple(map(float, dashes.split()))) if dashes else "-"


def render(figure: Figure) -> dict[str, bytes]:
    """Return the figure's files by format: pdf, and png and webp at 160 dpi with 256 colours, undated."""
    files, drawn = {name: io.BytesIO() for name in ("png", "pdf", "webp")}, io.BytesIO()
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine(None)  # with "none", each savefig would draw twice
    figure.savefig(files["pdf"], format="pdf", metadata={"CreationDate": None})
    figure.savefig(drawn, format="png", dpi=160)
    image = Image.open(drawn).convert("RGB").quantize(256)  # a third of the bytes
    image.save(files["webp"], "webp", lossless=True)
    image.save(files["png"], "png", optimize=True, dpi=(160, 160))
    return {name: file.getvalue() for name, file in files.items()}


def points(label: str, mode: str, x: list[float], means: list[Mean], variant: int = 0) -> Line:
    """Return a line of means over seeds, with their standard deviations."""
    return Line(label, mode, x, [m.mean for m in means], [m.std for m in means], "points", variant)


def draw_line(ax: Axes, line: Line) -> object:
    """Draw one line and return the artist that its legend shows."""
    colour, marker, dashes = look_of(line.mode)
    marker = VARIANT_MARKERS[line.variant % len(VARIANT_MARKERS)] or marker
    if line.look == "steps":
        ax.stairs(line.y, line.x, linestyle=dashes, linewidth=1.4, color=colour)
        return Line2D([], [], linestyle=dashes, color=colour)
    if line.look in ("paper", "port"):
        hollow = {"markerfacecolor": "none", "markersize": 7, "linestyle": ""}
        return ax.plot(line.x, line.y, color=colour, marker="s" if line.look == "paper" else "D", **hollow)[0]
    if line.look == "points":
        return ax.errorbar(line.x, line.y, line.std, color=colour, marker=marker, linestyle=dashes, capsize=3)
    tested, (x, y, std) = line.look == "test", line[2:5]
    dots = {"marker": marker if tested or len(x) == 1 else "", "markersize": 4}
    look = {"linestyle": "-", "linewidth": 1.3} if tested else {"linestyle": TRAIN, "linewidth": 1}
    ax.fill_between(x, y - std, y + std, color=colour, alpha=0.18, linewidth=0)
    return ax.plot(x, y, color=colour, markevery=max(1, len(x) // 6), **dots, **look)[0]


def lines(
    panels: list[Panel], used: list[Series], labels: Labels, ticks: Ticks = None, log=False, size=(2.75, 2.2)
) -> Drawn:
    """Draw up to MAX_PANELS panels, three to a row on shared axes, one legend below; None without panels.

    `log` makes the x axis logarithmic. `size` is that of a panel, in inches.
    """
    if not panels:
        return None
    figure, count, panels, handles = Figure(layout="constrained"), len(panels), panels[:MAX_PANELS], {}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for i, (ax, (title, each)) in enumerate(zip(axes, panels, strict=False)):
        ax.set(title=title, ylabel=labels[1] if i % columns == 0 else "")
        for line in each:
            handle = draw_line(ax, line)
            if line.label:
                handles.setdefault(line.label, handle)
        if i + columns >= len(panels):  # the lowest panel of its column
            ax.set_xlabel(labels[0])
            ax.tick_params(labelbottom=True)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    curves = any(line.look == "train" for _, each in panels for line in each)
    for name, dashes in {"test": "-", "train": TRAIN}.items() if curves else ():
        handles[name] = Line2D([], [], color="#666666", linewidth=1.2, linestyle=dashes)
    if log:
        axes[0].set_xscale("log")
        axes[0].xaxis.set(major_formatter=short, minor_formatter=NullFormatter())
    if ticks:
        axes[0].xaxis.set_minor_locator(NullLocator())
        axes[0].set_xticks(list(ticks), list(ticks.values()))
    elif not log:
        axes[0].xaxis.set_major_locator(MaxNLocator(5, integer=curves))
    if count > len(panels):
        figure.suptitle(f"the first {len(panels)} of {count}", fontsize=9)
    width = max(columns * size[0] + 0.4, 5.2)
    abreast = max(1, min(len(handles), int(width * 12.5 / (min(60, max(map(len, handles))) + 7))))
    names = [wrap(name, 60) for name in handles]
    figure.legend(handles.values(), names, loc="outside lower center", ncols=abreast)
    title_lines = max(title.count("\n") for title, _ in panels)
    height = rows * (size[1] + 0.17 * title_lines) + 0.5 + 0.19 * -(-len(handles) // abreast)
    figure.set_size_inches(width, height)
    return figure, used


def bars(used: list[Series], names: list[str], columns: list[Column], title: str = "") -> Drawn:
    """Draw up to MAX_BARS horizontal bars in their modes' colours, names at the left; None without series."""
    if not used:
        return None
    if len(used) > MAX_BARS:
        title = f"{title}, the first {MAX_BARS} of {len(used)}".removeprefix(", ")
    labels = [wrap(name, 46) for name in names[:MAX_BARS]]
    colours = [look_of(s.mode)[0] for s in used[:MAX_BARS]]
    heights = np.array([1 + 0.3 * label.count("\n") for label in labels])
    at = np.cumsum(heights) - heights / 2
    left = 0.07 * max(len(line) for label in labels for line in label.split("\n"))
    size = (left + 3.6 * len(columns) + (1.2 if len(columns) == 1 else 0), 0.26 * heights.sum() + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for ax, (label, values, texts, outlines) in zip(axes, columns, strict=True):
        means, stds, _ = np.array([value or NO_MEAN for value in values[:MAX_BARS]], dtype=float).T
        stds[stds == 0] = np.nan  # no error bar
        behind = (outlines or [0.0] * len(used))[:MAX_BARS]
        ends = np.fmax(np.fmax(means, means + stds), behind)
        top = max(ends.max(), 1e-9)
        if outlines:
            ax.barh(at, behind, 0.72, color="none", edgecolor="#888888", linewidth=0.8)
            low = 10 ** np.floor(np.log10(max(np.nanmin(means), 1)) - 0.3)
            ax.set(xscale="log", xlim=(low, top * (top / low) ** 0.6))
        else:
            ax.set_xlim(0, top * (1.18 + 0.022 * max(map(len, texts))))
        ax.barh(at, means, 0.72, color=colours, edgecolor="#333333", linewidth=0.5)
        ax.errorbar(means, at, xerr=stds, fmt="none", ecolor="#333333", capsize=2.5, elinewidth=0.9)
        ax.xaxis.set(major_formatter=short, minor_formatter=NullFormatter())
        if label.endswith("(%)"):
            ax.set_xticks([tick for tick in ax.get_xticks() if 0 <= tick <= 100])
        for x, y, text in zip(np.fmax(ends, ax.get_xlim()[0]), at, texts, strict=False):
            ax.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
        ax.set_xlabel(label)
        ax.grid(False, axis="y")
    axes[0].set(yticks=at, yticklabels=labels, ylim=(heights.sum(), 0))
    if title:
        figure.suptitle(wrap(title, 100), fontsize=9)
    return figure, used
