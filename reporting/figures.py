"""The report's figures: which numbers of which series each of them shows."""

import itertools
import re
import statistics
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from reporting.drawing import Column, Drawn, Labels, Line, Ticks, bars, lines, points, short, wrap
from reporting.series import Mean, Series, grouped, mean_of
from reporting.tables import REPORTED

IMAGENET_DEPTHS = {18, 34, 50, 101, 152, 200}
MAX_MODES = 6  # in a panel
INITIALISATIONS = {"conv_init", "bn_init"}
MODES_COMPARED = {"bn_only", "bn_main", "all", "random"}  # every other mode trains other parts
ACCURACY = "test accuracy (%)"
LinesOf, TitleOf = Callable[[Series], list[Line]], Callable[[list[Series]], str]
ANALYSED, PER_EPOCH = {"gamma", "pruned", "relu"}, {"loss", "accuracy"}  # figures


class Arch(NamedTuple):
    """An architecture: its name as people write it, the depth of a CIFAR ResNet, the width of a ResNet-14."""

    label: str
    depth: int | None
    width: int | None


def arch_of(name: str) -> Arch:
    """`resnet14_w2` is ResNet-14 ×2."""
    match = re.fullmatch(r"(resnet|vgg)([0-9]{1,6})(?:_w([0-9]{1,6}))?", name)
    if not match:
        return Arch(name, None, None)
    family, depth, width = match[1], int(match[2]), int(match[3] or 1)
    label = f"{'ResNet' if family == 'resnet' else 'VGG'}-{depth}" + (f" ×{width}" if match[3] else "")
    cifar = family == "resnet" and depth not in IMAGENET_DEPTHS
    return Arch(label, depth if cifar and not match[3] else None, width if cifar and depth == 14 else None)


def figures_of(series: list[Series], machines: list[Series], others: bool) -> dict[str, Drawn]:
    """Every figure of a setting but the answers', by name. `machines`: the series by machine; `others`: what
    others report of CIFAR-10 is drawn beside.
    """
    done = [s for s in series if s.done]
    depths = {s.arch: arch_of(s.arch).depth for s in done}
    deep = [s for s in done if depths[s.arch]]
    at_depth, at_trained = ("depth", "trained") if others else ("", "")

    def trained(s: Series) -> int:
        return s.results["params_trained"].iloc[0]

    gammas = ("gamma", "share_near_zero", "|γ| < 0.01", "learned γ", "share of γ per bin (%)")
    relus = ("relu", "silent", "always silent", "(image, position) pairs silent (%)", "channels (%)")
    return {
        "depth": against(deep, lambda s: depths[s.arch], "depth (layers)", "{:g}", at_depth),
        "trained": against(deep, trained, "trained parameters", "", at_trained),
        "loss": curves(series, "loss", "loss (cross-entropy)"),
        "accuracy": curves(series, "acc", "accuracy (%)"),
        "width": against(done, lambda s: arch_of(s.arch).width, "width of ResNet-14", "×{}"),
        "gamma": histograms(series, *gammas),
        "pruned": pruned(series),
        "relu": histograms(series, *relus),
        "checkpoint": checkpoints(done),
        "cost": costs([s for s in machines if s.done]),
        "parts": parts(done),
        "init": initialisations(done),
    }


def counted(figure: str, s: Series) -> int:
    """How many runs are in a mean of this series in a figure."""
    if figure in ANALYSED:
        return len(s.analyses)
    return s.curves("train_loss").shape[1] if figure in PER_EPOCH else s.done


def against(
    series: list[Series], x_of: Callable[[Series], float | None], label: str, form: str, others: str = ""
) -> Drawn:
    """Test accuracy against `x_of`, a line per mode and variant, with ticks of this form; beside what others
    report, at the column `others` of REPORTED. None where there is a single place.
    """
    placed = [(x, s) for s in series if (x := x_of(s))]
    spans = {text: {x for x, _ in of} for text, of in grouped(placed, lambda at: at[1].variant_text).items()}
    if "" in spans:  # other initialisations than the published have a figure of their own
        for s in (s for _, s in placed if s.variant and not s.variant_but(*INITIALISATIONS)):
            spans.pop(s.variant_text, None)
    longest = sorted(spans, key=lambda variant: (-len(spans[variant]), variant))
    kept = [v for v in longest if not v or len(spans[v]) > 1][:4] or longest[:4]
    drawn, used, modes = [], [], dict.fromkeys(s.mode for s in series)
    for variant, mode in itertools.product(kept, modes):
        found = [(x, s) for x, s in placed if (s.variant_text, s.mode) == (variant, mode)]
        if found := sorted(found, key=lambda at: at[0]):
            xs, means = zip(*((x, s.mean("final_test_acc")) for x, s in found), strict=True)
            drawn.append(points(found[0][1].label, mode, xs, means, kept.index(variant)))
            used += [s for _, s in found]
    reported = REPORTED[REPORTED["depth"].notna() & REPORTED["mode"].isin(modes)]
    for (source, mode), of in reported.groupby(["source", "mode"], sort=False) if drawn and others else ():
        look = "paper" if source == "paper" else "port"
        drawn.append(Line(f"{mode}, {look}", mode, of[others].tolist(), of["accuracy"].tolist(), None, look))
    ticks, last = {}, 0.0
    for x in sorted({x for line in drawn for x in line.x}):
        ticks[x], last = ("", last) if x < last * 1.13 else (form.format(x), x)  # no label over its neighbour
    panels = [("", drawn)] if len(ticks) > 1 else []
    return lines(panels, used, (label, ACCURACY), ticks if form else None, True, (6.4, 3.7))


def panelled(
    series: list[Series], lines_of: LinesOf, labels: Labels, ticks: Ticks = None, more: TitleOf | None = None
) -> Drawn:
    """The lines of each series, in a panel per architecture and variant, split evenly where there are too
    many modes; `more` ends the panels' titles.
    """
    ordered = sorted(series, key=lambda s: (bool(s.variant), arch_of(s.arch).depth is None))  # stable
    panels = []
    for (arch, variant), members in grouped(ordered, lambda s: (s.arch, s.variant_text)).items():
        title = arch_of(arch).label + ("\n" + wrap(variant, 34) if variant else "")
        for split in np.array_split(np.arange(len(members)), -(-len(members) // MAX_MODES)):
            shown = [members[i] for i in split]
            each = [line for s in shown for line in lines_of(s)]
            panels.append((title + (more(shown) if more else ""), each))
    return lines(panels, ordered, labels, ticks)


def curves(series: list[Series], what: str, ylabel: str) -> Drawn:
    """`what` (loss or acc) in training and test per epoch, mean ± deviation."""

    def line(s: Series, look: str) -> Line:
        values = s.curves(f"{look}_{what}").dropna()  # of epochs at which every seed has a value
        std = values.std(axis=1, ddof=1).to_numpy() if values.shape[1] > 1 else None
        label, epochs = s.mode if look == "test" else "", values.index.to_numpy()
        return Line(label, s.mode, epochs, values.mean(axis=1).to_numpy(), std, look)

    having = [s for s in series if len(s.epochs)]
    return panelled(having, lambda s: [line(s, "train"), line(s, "test")], ("epoch", ylabel))


def histograms(series: list[Series], part: str, share: str, told: str, *labels: str) -> Drawn:
    """`part` (gamma or relu) of the analyses; `share` per mode is in the titles."""
    scale = 100 if part == "relu" else 1

    def steps(s: Series) -> list[Line]:
        found = [getattr(analysis, part) for analysis in s.analyses]
        counts = np.mean([np.array(one.counts) / one.count for one in found], axis=0)
        edges = [scale * edge for edge in found[0].edges]
        return [Line(s.mode, s.mode, edges, 100 * counts, look="steps")]

    def shares(members: list[Series]) -> str:
        means = {
            s.mode: statistics.fmean(getattr(getattr(a, part), share) for a in s.analyses) for s in members
        }
        each = [f"{mode}\N{NO-BREAK SPACE}{100 * m:.1f}\N{NO-BREAK SPACE}%" for mode, m in means.items()]
        return "\n" + wrap(f"{told}: {', '.join(each)}", 36, max_lines=4)

    having = [s for s in series if s.analyses]
    if part == "gamma":  # in other modes it is as it was drawn
        having = [s for s in having if s.mode == "all" or s.mode.startswith("bn")]
    return panelled(having, steps, labels, more=shares)


def pruned(series: list[Series]) -> Drawn:
    """Test accuracy after gammas under a threshold are set to zero."""
    having = [s for s in series if s.analyses]

    def line(s: Series) -> list[Line]:
        accs = zip(*([row.test_acc for row in analysis.pruned] for analysis in s.analyses), strict=True)
        means = [mean_of(each) for each in accs]
        return [points(s.mode, s.mode, range(len(means)), means)]

    thresholds = [row.threshold for row in having[0].analyses[0].pruned] if having else []
    every = -(-len(thresholds) // (6 if len({(s.arch, s.variant) for s in having}) > 1 else 12))
    ticks = {i: f"{t:g}" if i % every == 0 else "" for i, t in enumerate(thresholds)}
    return panelled(having, line, ("threshold for |γ| (steps not to scale)", ACCURACY), ticks)


def checkpoints(series: list[Series]) -> Drawn:
    """The seed checkpoint's bytes, before the outlined bar of every weight's; by architecture and mode, for
    other options hardly change them.
    """
    used = [of[0] for of in grouped(series, lambda s: (s.arch, s.mode)).values()]
    sizes, full = [s.mean("checkpoint_bytes") for s in used], [s.mean("full_bytes").mean for s in used]
    each = [(m.mean, f) for m, f in zip(sizes, full, strict=True)]
    texts = [f"{short(mean)} of {short(f)}, {100 * mean / f:.3g} %" for mean, f in each]
    names = [f"{arch_of(s.arch).label}, {s.mode}" for s in used]
    return bars(used, names, [Column("bytes; outlined: every weight", sizes, texts, full)])


def costs(series: list[Series]) -> Drawn:
    """Training time and peak memory; a bar per architecture, mode, machine and number format."""
    longest = max((s.mean("train_s").mean for s in series), default=0)
    unit, seconds = ("s", 1) if longest < 300 else ("min", 60) if longest < 10800 else ("h", 3600)
    scales = (
        (f"training time ({unit})", "train_s", seconds),
        ("peak memory (MiB)", "peak_memory_bytes", 2**20),
    )
    columns = []
    for label, name, by in scales:
        means = [s.mean(name) for s in series]
        means = [m and Mean(m.mean / by, m.std and m.std / by, m.n) for m in means]
        texts = ["" if m is None else f"{m.mean:,.4g}" if m.mean < 1000 else f"{m.mean:,.0f}" for m in means]
        columns.append(Column(label, means, texts))
    on = [f"{', '.join(s.machine[:2])}, torch {s.machine[2]}" for s in series]
    several = len(set(on)) > 1
    names = [f"{name}; {of}" if several else name for name, of in zip(_names(series), on, strict=True)]
    return bars(series, names, columns, "" if several else "".join(on[:1]))


def _names(series: list[Series]) -> list[str]:
    return [", ".join(filter(None, (arch_of(s.arch).label, s.label))) for s in series]


def accuracy_bars(used: list[Series], names: list[str], validation: bool = False) -> Drawn:
    """A named bar per series, of test accuracy, and beside it of the best on validation images."""
    columns = [("best on validation (%)", "best_val_acc")] if validation else []
    drawn = []
    for label, name in (*columns, (ACCURACY, "final_test_acc")):
        means = [s.mean(name) for s in used]
        texts = [f"{m.mean:.2f}" + ("" if m.std is None else f" ± {m.std:.2f}") for m in means]
        drawn.append(Column(label, means, texts))
    return bars(used, names, drawn)


def parts(series: list[Series]) -> Drawn:
    """Test accuracy by what trains, of the architectures that were trained in parts."""
    grids = {(s.arch, s.variant) for s in series if s.mode not in MODES_COMPARED}
    used = [s for s in series if (s.arch, s.variant) in grids]
    return accuracy_bars(used, _names(used)) if used[1:] else None


def initialisations(series: list[Series]) -> Drawn:
    """Test accuracy by how convolutions and BatchNorm are drawn, where more than one way was tried."""
    groups = grouped(series, lambda s: (s.arch, s.mode, s.variant_but(*INITIALISATIONS)))
    used = [s for group in groups.values() if group[1:] for s in group]
    each = zip(used, _names(used), strict=True)
    return accuracy_bars(used, [name if s.variant else f"{name}, as published" for s, name in each])
