"""The report's figures: which numbers of which series each figure shows."""

import itertools
import re
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from reporting.drawing import Column, Drawn, Labels, Line, Ticks, bars, lines, points, short, wrap
from reporting.series import Series, drawn_from_seed, grouped, mean_of
from reporting.tables import REPORTED

IMAGENET_DEPTHS = {18, 34, 50, 101, 152, 200}
MAX_MODES = 6  # per panel
INITIALISATIONS = {"conv_init", "nonzeros", "bn_init"}
MODES_COMPARED = {"bn_only", "bn_main", "all", "random"}  # all other modes train other parts
LEARN_GAMMA = {"all", "bn_only", "bn", "gamma", "bn_main"}  # modes and parts; others keep the initial gamma
ACCURACY = "test accuracy (%)"
LinesOf = Callable[[Series], list[Line]]


class Arch(NamedTuple):
    """An architecture: its usual name, the depth of a CIFAR ResNet, and the width factor of a ResNet-14."""

    label: str
    depth: int | None = None
    width: int | None = None


def arch_of(name: str) -> Arch:
    """Return the Arch of a name; `resnet14_w2` is ResNet-14 ×2."""
    match = re.fullmatch(r"(resnet|vgg)([0-9]{1,6})(?:_w([0-9]{1,6}))?", name)
    if not match:
        return Arch(name)
    depth, width = int(match[2]), int(match[3] or 1)
    label = f"{'ResNet' if match[1] == 'resnet' else 'VGG'}-{depth}" + (f" ×{width}" if match[3] else "")
    if match[1] == "vgg" or depth in IMAGENET_DEPTHS:
        return Arch(label)
    return Arch(label, None if match[3] else depth, width if depth == 14 else None)


def name_of(s: Series) -> str:
    return f"{arch_of(s.arch).label}, {s.label}"


def figures_of(series: list[Series], machines: list[Series], others: bool) -> dict[str, Drawn]:
    """Return a setting's figures by name, except the answers'; `others` adds published CIFAR-10 results."""
    done, analysed = [s for s in series if s.done], [s for s in series if s.analyses]
    deep, begun = [s for s in done if arch_of(s.arch).depth], [s for s in series if len(s.epochs)]
    learned = [s for s in analysed if not LEARN_GAMMA.isdisjoint(s.mode.split("+"))]
    at = ("depth", "trained") if others else ("", "")
    return {
        "depth": against(deep, lambda s: arch_of(s.arch).depth, "depth (layers)", "{:g}", at[0]),
        "trained": against(deep, lambda s: s.mean("params_trained").mean, "trained parameters", "", at[1]),
        "loss": panelled(begun, partial(curves, "loss"), ("epoch", "loss (cross-entropy)")),
        "accuracy": panelled(begun, partial(curves, "acc"), ("epoch", "accuracy (%)")),
        "width": against(done, lambda s: arch_of(s.arch).width, "width of ResNet-14", "×{}"),
        "gamma": histograms(learned, "gamma", "learned γ", "share of γ per bin (%)"),
        "pruned": pruned(analysed),
        "relu": histograms(analysed, "relu", "(image, position) pairs silent (%)", "channels (%)"),
        "checkpoint": checkpoints(done),
        "stored": against(
            drawn_from_seed(done),
            lambda s: s.mean("checkpoint_bytes").mean,
            "stored besides the seed (bytes)",
            "",
        ),
        "cost": costs([s for s in machines if s.done]),
        "parts": parts(done),
        "init": initialisations(done),
    }


def counted(figure: str, s: Series) -> int:
    """Return how many runs a mean of this series includes in a figure."""
    if figure in ("gamma", "pruned", "relu"):
        return len(s.analyses)
    return s.curves("train_loss").shape[1] if figure in ("loss", "accuracy") else s.done


def against(
    series: list[Series], x_of: Callable[[Series], float | None], label: str, form: str, others: str = ""
) -> Drawn:
    """Draw test accuracy against `x_of`, a line per mode and variant; None if there is a single x value.

    `form` formats the tick labels. Published results are drawn too, at the x values that they have in the
    column `others` of REPORTED, if it is given.
    """
    placed, modes = sorted(filter(x_of, series), key=x_of), dict.fromkeys(s.mode for s in series)
    if not all(s.variant for s in placed):  # initialisations have a figure of their own
        placed = [s for s in placed if not s.variant or s.variant_but(*INITIALISATIONS)]
    spans = grouped(placed, lambda s: s.variant_text)
    spans = {variant: len(set(map(x_of, of))) for variant, of in spans.items()}
    longest = sorted(spans, key=lambda variant: (-spans[variant], variant))
    kept = [v for v in longest if not v or spans[v] > 1][:4] or longest[:4]
    drawn, used = [], []
    for variant, mode in itertools.product(kept, modes):
        if of := [s for s in placed if (s.variant_text, s.mode) == (variant, mode)]:
            means = [s.mean("final_test_acc") for s in of]
            drawn.append(points(of[0].label, mode, list(map(x_of, of)), means, kept.index(variant)))
            used += of
    reported = REPORTED[REPORTED["depth"].notna() & REPORTED["mode"].isin(modes)]  # all for CIFAR-10
    for (source, mode), of in reported.groupby(["source", "mode"], sort=False) if drawn and others else ():
        look = source.split()[-1]  # paper or port
        drawn.append(Line(f"{mode}, {look}", mode, of[others].tolist(), of["accuracy"].tolist(), None, look))
    ticks, last = {}, 0.0
    for x in sorted({x for line in drawn for x in line.x}):
        ticks[x], last = ("", last) if x < last * 1.13 else (form.format(x), x)  # labels must not overlap
    panels = [("", drawn)] if len(ticks) > 1 else []
    return lines(panels, used, (label, ACCURACY), ticks if form else None, True, (6.4, 3.7))


def panelled(
    series: list[Series], lines_of: LinesOf, labels: Labels, ticks: Ticks = None, more=lambda shown: ""
) -> Drawn:
    """Draw each series' lines in a panel per architecture and variant, split evenly if it has many modes.

    `more` returns text to append to a panel's title, given the series in the panel.
    """
    ordered = sorted(series, key=lambda s: (bool(s.variant), arch_of(s.arch).depth is None))  # a stable sort
    panels = []
    for (arch, variant), members in grouped(ordered, lambda s: (s.arch, s.variant_text)).items():
        title = arch_of(arch).label + ("\n" + wrap(variant, 34) if variant else "")
        for split in np.array_split(np.arange(len(members)), -(-len(members) // MAX_MODES)):
            shown = [members[i] for i in split]
            panels.append((title + more(shown), [line for s in shown for line in lines_of(s)]))
    return lines(panels, ordered, labels, ticks)


def curves(what: str, s: Series) -> list[Line]:
    """Return lines of `what` (loss or acc) per epoch, in training and test: mean ± standard deviation."""
    drawn = []
    for look in ("train", "test"):
        values = s.curves(f"{look}_{what}").dropna()  # keeps epochs at which every seed has a value
        label, mean, std = s.mode if look == "test" else "", values.mean(axis=1), values.std(axis=1)
        drawn.append(Line(label, s.mode, values.index.to_numpy(), mean.to_numpy(), std.to_numpy(), look))
    return drawn


def histograms(series: list[Series], part: str, *labels: str) -> Drawn:
    """Draw histograms of `part` (gamma or relu); titles give the share of tiny gammas or silent channels."""
    gamma, relu = (1, "share_near_zero", "|γ| < 0.01"), (100, "silent", "always silent")
    scale, share, told = gamma if part == "gamma" else relu

    def steps(s: Series) -> list[Line]:
        found = [getattr(analysis, part) for analysis in s.analyses]
        counts = np.mean([np.array(one.counts) / one.count for one in found], axis=0)
        return [Line(s.mode, s.mode, scale * np.array(found[0].edges), 100 * counts, look="steps")]

    def shares(members: list[Series]) -> str:
        each = []
        for s in members:
            mean = statistics.fmean(getattr(getattr(analysis, part), share) for analysis in s.analyses)
            each.append(f"{s.mode}\N{NO-BREAK SPACE}{100 * mean:.1f}\N{NO-BREAK SPACE}%")
        return "\n" + wrap(f"{told}: {', '.join(each)}", 36, max_lines=4)

    return panelled(series, steps, labels, more=shares)


def pruned(series: list[Series]) -> Drawn:
    """Draw test accuracy after gammas under a threshold are set to zero."""

    def line(s: Series) -> list[Line]:
        accs = zip(*([row.test_acc for row in analysis.pruned] for analysis in s.analyses), strict=True)
        means = [mean_of(each) for each in accs]
        return [points(s.mode, s.mode, range(len(means)), means)]

    thresholds = [row.threshold for row in series[0].analyses[0].pruned] if series else []
    every = -(-len(thresholds) // (6 if len({(s.arch, s.variant) for s in series}) > 1 else 12))
    ticks = {i: f"{t:g}" if i % every == 0 else "" for i, t in enumerate(thresholds)}
    return panelled(series, line, ("threshold for |γ| (steps not to scale)", ACCURACY), ticks)


def checkpoints(series: list[Series]) -> Drawn:
    """Draw the seed checkpoint's bytes over an outlined bar for all weights, by architecture and mode."""
    used = [of[0] for of in grouped(series, lambda s: (s.arch, s.mode)).values()]  # the first variant
    sizes, full = [s.mean("checkpoint_bytes") for s in used], [s.mean("full_bytes").mean for s in used]
    each = zip((size.mean for size in sizes), full, strict=True)
    texts = [f"{short(size)} of {short(all_)}, {100 * size / all_:.3g} %" for size, all_ in each]
    names = [f"{arch_of(s.arch).label}, {s.mode}" for s in used]
    return bars(used, names, [Column("bytes (outlined: all weights)", sizes, texts, full)])


def costs(series: list[Series]) -> Drawn:
    """Draw training time and peak memory, a bar per architecture, mode, variant, machine and dtype."""
    longest = max((s.mean("train_s").mean for s in series), default=0)
    unit, seconds = ("s", 1) if longest < 300 else ("min", 60) if longest < 10800 else ("h", 3600)
    columns, memory = [], ("peak memory (MiB)", "peak_memory_bytes", 2**20)
    for label, name, size in ((f"training time ({unit})", "train_s", seconds), memory):
        means = [s.mean(name, size) for s in series]
        texts = ["" if m is None else f"{m.mean:,.4g}" if m.mean < 1000 else f"{m.mean:,.0f}" for m in means]
        columns.append(Column(label, means, texts))
    on = [f"{', '.join(s.machine[:2])}, torch {s.machine[2]}" for s in series]
    several = len(set(on)) > 1
    names = [f"{name_of(s)}; {of}" if several else name_of(s) for s, of in zip(series, on, strict=True)]
    return bars(series, names, columns, "" if several else "".join(on[:1]))


def accuracy_bars(used: list[Series], names: list[str], **columns: str) -> Drawn:
    """Draw test accuracy, a named bar per series, to the right of the labelled `columns` of its results."""
    drawn = []
    for name, label in (columns | {"final_test_acc": ACCURACY}).items():
        means = [s.mean(name) for s in used]
        drawn.append(Column(label, means, [mean.text() for mean in means]))
    return bars(used, names, drawn)


def parts(series: list[Series]) -> Drawn:
    """Draw test accuracy by what trains, for the architectures that were trained in parts."""
    grids = {(s.arch, s.variant) for s in series if s.mode not in MODES_COMPARED}
    used = [s for s in series if (s.arch, s.variant) in grids]
    return accuracy_bars(used, list(map(name_of, used))) if used[1:] else None


def initialisations(series: list[Series]) -> Drawn:
    """Draw test accuracy by the initialisation of convolutions and BatchNorm, if several were tried."""
    groups = grouped(series, lambda s: (s.arch, s.mode, s.variant_but(*INITIALISATIONS)))
    used = [s for group in groups.values() if group[1:] for s in group]
    return accuracy_bars(used, [name_of(s) + ("" if s.variant else ", as published") for s in used])
