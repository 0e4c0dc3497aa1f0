"""Lines in panels, and bars, as every figure of the report is made of; drawn with matplotlib.

Every mode has one colour (Okabe and Ito's palette), marker and line style wherever it appears. The same
numbers give the same files, byte for byte.
"""

import io
import textwrap
import warnings
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from PIL import Image

from reporting.series import Mean

matplotlib.rcParams.update(
    {
        **{"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8.5, "legend.frameon": False},
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4"},
        **{"axes.axisbelow": True, "lines.linewidth": 1.4, "lines.markersize": 5},
        **{"text.parse_math": False},  # a $ in a name is a $
    }
)
# Colour, marker, dashes. Black is everything, blue BatchNorm: what the paper compares stands out.
MODES = {
    "bn_only": ("#0072B2", "o", "-"),
    "all": ("#000000", "s", (0, (5, 1.5))),
    "random": ("#D55E00", "^", (0, (1.2, 1.2))),
    "bn_main": ("#56B4E9", "p", "-"),
    "output": ("#E69F00", "v", (0, (4, 1.2, 1, 1.2))),
    "shortcut": ("#CC79A7", "<", (0, (5, 1.5))),
    "bn+output": ("#009E73", "D", "-"),
    "bn+shortcut": ("#CC79A7", ">", "-"),
    "bn+shortcut+output": ("#009E73", "P", (0, (3, 1, 1, 1, 1, 1))),
    "conv": ("#F0E442", "h", (0, (5, 1.5))),
    "none": ("#999999", "X", (0, (1.2, 1.2))),
}
TRAIN = (0, (3, 1.5))  # dashes
OTHER_MODE = ("#666666", "d", (0, (4, 1.2, 1, 1.2)))
VARIANT_MARKERS = ("", "*", "H", "8")  # of lines of one mode whose other options differ
MAX_BARS, MAX_PANELS = 40, 12


class Line(NamedTuple):
    """What `lines` draws; `look` is points, train, test, steps (x are the n + 1 edges), paper or port."""

    label: str
    mode: str
    x: list[float]
    y: list[float]
    std: list[float] | None = None  # NaN where n is 1
    look: str = "points"
    variant: int = 0


class Column(NamedTuple):
    """What `bars` draws side by side: a number per bar, its text, and an outlined number behind it."""

    label: str
    values: list[Mean | None]
    texts: list[str]
    outlines: list[float] | None = None
    log: bool = False


def short(number: float, _: object = None) -> str:
    """12345 -> 12.3k, for axes."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def wrap(text: str, width: int, lines: int = 3) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


# ----------------------------------------------------------------------------------------------------------
# Drawing


def render(figure: Figure) -> dict[str, bytes]:
    """The figure as PDF, and as PNG and WebP (160 dpi, 256 colours: a third of the bytes); without dates."""
    files = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a name in another script
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine(None)  # "none" would lay out again for each file
        for kind, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
            files[kind] = buffer.getvalue()
    image = Image.open(io.BytesIO(files["png"])).convert("RGB").quantize(256)
    for kind, options in (("png", {"optimize": True, "dpi": (160, 160)}), ("webp", {"lossless": True})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files[kind] = buffer.getvalue()
    return files


def points(label: str, mode: str, x: list[float], means: list[Mean], variant: int = 0) -> Line:
    """Means over seeds, with their standard deviations."""
    std = [np.nan if mean.std is None else mean.std for mean in means]
    return Line(label, mode, x, [mean.mean for mean in means], std, "points", variant)


def draw_line(ax: Axes, line: Line) -> object:
    """Draw one line; what its legend shows."""
    colour, marker, dashes = MODES.get(line.mode, OTHER_MODE)
    marker = VARIANT_MARKERS[line.variant % len(VARIANT_MARKERS)] or marker
    if line.look == "steps":
        ax.stairs(line.y, line.x, linestyle=dashes, linewidth=1.4, color=colour)
        return Line2D([], [], linestyle=dashes, color=colour)
    if line.look in ("paper", "port"):
        shape = "s" if line.look == "paper" else "D"
        hollow = {"marker": shape, "markerfacecolor": "none", "markersize": 7, "linestyle": ""}
        return ax.plot(line.x, line.y, color=colour, **hollow)[0]
    if line.look == "points":
        return ax.errorbar(line.x, line.y, line.std, color=colour, marker=marker, linestyle=dashes, capsize=3)
    tested, x, y = line.look == "test", np.asarray(line.x), np.asarray(line.y)
    dots = {"marker": marker if tested or len(x) == 1 else "", "markersize": 4}
    look = {"linestyle": "-", "linewidth": 1.3} if tested else {"linestyle": TRAIN, "linewidth": 1}
    if line.std is not None:
        ax.fill_between(x, y - line.std, y + line.std, color=colour, alpha=0.18, linewidth=0)
    return ax.plot(x, y, color=colour, markevery=max(1, len(x) // 6), **dots, **look)[0]


def lines(
    panels: list[tuple[str, list[Line]]],
    xlabel: str,
    ylabel: str,
    xticks: dict[float, str] | None = None,
    log: bool = False,
    size: tuple[float, float] = (2.75, 2.2),
) -> Figure:
    """A panel per (title, lines), three abreast on common axes, with one legend below; size in inches."""
    count, panels = len(panels), panels[:MAX_PANELS]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    looks = {line.look for _, each in panels for line in each}
    names = dict.fromkeys(line.label for _, each in panels for line in each if line.label)
    names |= dict.fromkeys(("test", "train") if "train" in looks else ())
    width = max(columns * size[0] + 0.4, 5.2)
    abreast = max(1, min(len(names), int(width * 12.5 / (min(60, max(map(len, names))) + 7))))
    title_lines = max(title.count("\n") for title, _ in panels)
    height = rows * (size[1] + 0.17 * title_lines) + 0.5 + 0.19 * -(-len(names) // abreast)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for i, (ax, (title, each)) in enumerate(zip(axes, panels, strict=False)):
        ax.set_title(title)
        for line in each:
            handle = draw_line(ax, line)
            names[line.label] = names.get(line.label) or handle
        if i % columns == 0:
            ax.set_ylabel(ylabel)
        if i + columns >= len(panels):  # the lowest of its column
            ax.set_xlabel(xlabel)
            ax.tick_params(labelbottom=True)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    if log:
        axes[0].set_xscale("log")
        axes[0].xaxis.set_major_formatter(FuncFormatter(short))
        axes[0].xaxis.set_minor_formatter(NullFormatter())
    if xticks:
        axes[0].xaxis.set_minor_locator(NullLocator())
        axes[0].set_xticks(list(xticks), list(xticks.values()))
    elif not log:
        axes[0].xaxis.set_major_locator(MaxNLocator(5, integer="train" in looks))
    for name, dashes in (("test", "-"), ("train", TRAIN)) if "train" in looks else ():
        names[name] = Line2D([], [], color="#666666", linewidth=1.2, linestyle=dashes)
    if count > len(panels):
        figure.suptitle(f"the first {len(panels)} of {count}", fontsize=9)
    names.pop("", None)
    texts = [wrap(name, 60) for name in names]
    figure.legend(names.values(), texts, loc="outside lower center", ncols=abreast)
    return figure


def bars(labels: list[str], modes: list[str], columns: list[Column], title: str = "") -> Figure:
    """Horizontal bars, in the colours of `modes`, labelled at the left, with their text at their ends."""
    if len(labels) > MAX_BARS:
        title = f"{title}, the first {MAX_BARS} of {len(labels)}".removeprefix(", ")
    shown = slice(MAX_BARS)
    labels = [wrap(label, 46) for label in labels[shown]]
    heights = np.array([1 + 0.3 * label.count("\n") for label in labels])
    at = np.cumsum(heights) - heights / 2
    left = 0.07 * max(len(line) for label in labels for line in label.split("\n"))
    size = (left + 3.6 * len(columns) + (1.2 if len(columns) == 1 else 0), 0.26 * heights.sum() + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    colours = [MODES.get(mode, OTHER_MODE)[0] for mode in modes[shown]]
    for ax, column in zip(axes, columns, strict=True):
        means = np.array([value.mean if value else np.nan for value in column.values[shown]])
        stds = np.array([value.std if value and value.std else 0.0 for value in column.values[shown]])
        ends = np.nan_to_num(means + stds)
        if column.outlines:
            ax.barh(at, column.outlines[shown], 0.72, color="none", edgecolor="#888888", linewidth=0.8)
            ends = np.maximum(ends, column.outlines[shown])
        ax.barh(at, means, 0.72, color=colours, edgecolor="#333333", linewidth=0.5)
        spread = stds > 0
        error = {"fmt": "none", "ecolor": "#333333", "capsize": 2.5, "elinewidth": 0.9}
        ax.errorbar(means[spread], at[spread], xerr=stds[spread], **error)
        top = max(ends.max(), 1e-9)
        if column.log:
            ax.set_xscale("log")
            low = 10 ** np.floor(np.log10(max(np.nanmin(means), 1)) - 0.3)
            ax.set_xlim(low, top * (top / low) ** 0.6)
        else:
            ax.set_xlim(0, top * (1.18 + 0.022 * max(map(len, column.texts))))
        ax.xaxis.set_major_formatter(FuncFormatter(short))
        ax.xaxis.set_minor_formatter(NullFormatter())
        if column.label.endswith("(%)"):
            ax.set_xticks([tick for tick in ax.get_xticks() if 0 <= tick <= 100])
        for end, y, text in zip(ends, at, column.texts[shown], strict=True):
            ax.annotate(
                text,
                (max(end, ax.get_xlim()[0]), y),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        ax.set_xlabel(column.label)
        ax.grid(False, axis="y")
    axes[0].set_yticks(at, labels)
    axes[0].set_ylim(heights.sum(), 0)
    if title:
        figure.suptitle(wrap(title, 100), fontsize=9)
    return figure
