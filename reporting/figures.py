"""The report's figures: which numbers of which series each of them shows."""

import itertools
import re
import statistics
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from reporting.drawing import Column, Line, bars, lines, points, short, wrap
from reporting.series import Mean, Series, mean_of
from reporting.tables import REPORTED

IMAGENET_DEPTHS = {18, 34, 50, 101, 152, 200}
PARAMS = {  # trained by bn_only and by all, of the paper's networks
    **{14: (1120, 175258), 32: (2464, 466906), 56: (4256, 855770), 110: (8288, 1730714)},
    **{218: (16352, 3480602), 434: (32480, 6980378), 866: (64736, 13979930)},
}
MAX_MODES = 6  # in a panel
STARTS = {"conv_init", "bn_init"}
MODES_COMPARED = {"bn_only", "bn_main", "all", "random"}  # every other mode trains other parts

Drawn = tuple[Figure, list[Series]] | None  # a figure and the series in it; None where none has its data


def arch_label(arch: str) -> str:
    """`resnet14_w2` as people write it: ResNet-14 x2."""
    match = re.fullmatch(r"(resnet|vgg)([0-9]+)(?:_w([0-9]+))?", arch)
    if not match:
        return arch
    family, depth, width = match.groups()
    return f"{'ResNet' if family == 'resnet' else 'VGG'}-{depth}" + (f" ×{width}" if width else "")


def cifar_depth(arch: str) -> int | None:
    """The depth D of a CIFAR network `resnetD`; None for every other."""
    match = re.fullmatch(r"resnet([0-9]{1,6})", arch)
    return int(match[1]) if match and int(match[1]) not in IMAGENET_DEPTHS else None


def width_of(arch: str) -> int | None:
    """1 for `resnet14`, K for `resnet14_wK`; None for every other."""
    match = re.fullmatch(r"resnet14(?:_w([0-9]{1,6}))?", arch)
    return int(match[1] or 1) if match else None


def references(series: list[Series], by_params: bool) -> list[Line]:
    """What others report, at its depth or, of the paper's networks, its number of trained parameters."""
    lines = []
    modes = {s.mode for s in series if s.done}
    for who, look in (("paper", "paper"), ("TensorFlow port", "port")):
        for mode, found in REPORTED[who].items():
            depths = map(cifar_depth, found)
            x = [PARAMS[depth][mode == "all"] if by_params else depth for depth in depths]
            if mode in modes:
                y = [float(value.split()[-1]) for value in found.values()]
                lines.append(Line(f"{mode}, {look}", mode, x, y, None, look))
    return lines


def across(series: list[Series], x_of: Callable[[Series], float | None]) -> tuple[list[Line], list]:
    """Test accuracy against `x_of`, a line per mode and variant"""
    placed = [(x, s) for s in series if s.done and (x := x_of(s))]
    spans: dict[str, set] = {}
    for x, s in placed:
        spans.setdefault(s.variant, set()).add(x)
    if "" in spans:  # other starts than the published have a figure of their own
        for s in (s for _, s in placed if s.options and {name for name, _ in s.options} <= STARTS):
            spans.pop(s.variant, None)
    longest = sorted(spans, key=lambda variant: (-len(spans[variant]), variant))
    kept = [v for v in longest if not v or len(spans[v]) > 1][:4] or longest[:4]
    drawn, used = [], []
    for variant, mode in itertools.product(kept, dict.fromkeys(s.mode for s in series)):
        found = [(x, s) for x, s in placed if (s.variant, s.mode) == (variant, mode)]
        if found := sorted(found, key=lambda pair: pair[0]):
            means = [s.mean("final_test_acc") for _, s in found]
            xs, label = [x for x, _ in found], found[0][1].label
            drawn.append(points(label, mode, xs, means, kept.index(variant)))
            used += [s for _, s in found]
    return drawn, used


def depth(series: list[Series], references: list[Line]) -> Drawn:
    """Test accuracy against depth; `references` are what others report, at their depths."""
    drawn, used = across(series, lambda s: cifar_depth(s.arch))
    drawn = _compared(drawn, references)
    ticks = {x: f"{x:g}" for x in sorted({x for line in drawn for x in line.x})}
    last = 0.0
    for x in list(ticks):  # no label over its neighbour
        if len(ticks) > 1 and x < last * 1.13:
            ticks[x] = ""
        else:
            last = x
    return (_accuracy(drawn, "depth (layers)", ticks), used) if drawn else None


def trained(series: list[Series], references: list[Line]) -> Drawn:
    """Test accuracy against the number of trained parameters, of the networks that `depth` shows."""
    drawn, used = across(series, lambda s: s.values["params_trained"][0] if cifar_depth(s.arch) else None)
    drawn = _compared(drawn, references)
    return (_accuracy(drawn, "trained parameters"), used) if drawn else None


def _compared(drawn: list[Line], references: list[Line]) -> list[Line]:
    """All lines, or none where there is a single place."""
    every = drawn + references if drawn else []
    return every if len({x for line in every for x in line.x}) > 1 else []


def width(series: list[Series]) -> Drawn:
    """Test accuracy of ResNet-14 against its width."""
    drawn, used = across(series, lambda s: width_of(s.arch))
    widths = sorted({x for line in drawn for x in line.x})
    ticks = {x: f"×{x}" for x in widths}
    return (_accuracy(drawn, "width of ResNet-14", ticks), used) if widths[1:] else None


def _accuracy(drawn: list[Line], xlabel: str, ticks: dict[float, str] | None = None) -> Figure:
    return lines([("", drawn)], xlabel, "test accuracy (%)", ticks, log=True, size=(6.4, 3.7))


def panels_of(series: list[Series]) -> list[tuple[str, list[Series]]]:
    """A title and its series per architecture and variant, split evenly where there are too many modes."""
    groups: dict[tuple[str, str], list[Series]] = {}
    for s in sorted(series, key=lambda s: (bool(s.variant), cifar_depth(s.arch) is None)):  # stable
        groups.setdefault((s.arch, s.variant), []).append(s)
    panels = []
    for (arch, variant), members in groups.items():
        title = arch_label(arch) + ("\n" + wrap(variant, 34) if variant else "")
        splits = np.array_split(np.arange(len(members)), -(-len(members) // MAX_MODES))
        panels += [(title, [members[i] for i in split]) for split in splits]
    return panels


def curves(series: list[Series], what: str) -> Drawn:
    """`what` (loss or acc) in training and test per epoch: a panel per architecture, mean ± deviation."""
    panels, used = [], []
    for title, members in panels_of([s for s in series if s.curves]):
        each = []
        for s in members:
            for look, name in (("train", f"train_{what}"), ("test", f"test_{what}")):
                values = s.curves[name]
                epochs = np.flatnonzero(
                    ~np.isnan(values).any(axis=0)
                )  # those at which every seed has a value
                std = values[:, epochs].std(axis=0, ddof=1) if len(values) > 1 else None
                label = s.mode if look == "test" else ""
                each.append(Line(label, s.mode, epochs + 1, values[:, epochs].mean(axis=0), std, look))
        panels.append((title, each))
        used += members
    ylabel = "loss (cross-entropy)" if what == "loss" else "accuracy (%)"
    return (lines(panels, "epoch", ylabel), used) if panels else None


def histograms(series: list[Series], part: str, share: str, told: str, xlabel: str, ylabel: str) -> Drawn:
    """`part` (gamma or relu) of the analyses: a panel per architecture, `share` per mode in its title."""
    panels, used = [], []
    having = [s for s in series if s.analyses]
    if part == "gamma":  # in other modes it stays where it started
        having = [s for s in having if s.mode == "all" or s.mode.startswith("bn")]
    for title, members in panels_of(having):
        each, shares = [], []
        for s in members:
            found = [analysis[part] for analysis in s.analyses]
            scale = 100 if part == "relu" else 1
            edges = [scale * edge for edge in found[0]["edges"]]
            counts = np.mean([np.array(one["counts"]) / one["count"] for one in found], axis=0)
            each.append(Line(s.mode, s.mode, edges, 100 * counts, look="steps"))
            mean = statistics.fmean(one[share] for one in found)
            shares.append(f"{s.mode}\N{NO-BREAK SPACE}{100 * mean:.1f}\N{NO-BREAK SPACE}%")
        panels.append((f"{title}\n{wrap(told + ': ' + ', '.join(shares), 36, 4)}", each))
        used += members
    return (lines(panels, xlabel, ylabel), used) if panels else None


def pruned(series: list[Series]) -> Drawn:
    """Test accuracy after gammas under a threshold are set to zero: a panel per architecture."""
    having = [s for s in series if s.analyses]
    thresholds = sorted({p["threshold"] for s in having for a in s.analyses for p in a["pruned"]})
    panels, used = [], []
    for title, members in panels_of(having):
        each = []
        for s in members:
            means = [
                mean_of(list(accs))
                for accs in zip(*([p["test_acc"] for p in a["pruned"]] for a in s.analyses), strict=True)
            ]
            x = [thresholds.index(p["threshold"]) for p in s.analyses[0]["pruned"]]
            each.append(points(s.mode, s.mode, x, means))
        panels.append((title, each))
        used += members
    step = -(-len(thresholds) // (6 if len(panels) > 1 else 12))
    ticks = {i: f"{t:g}" if i % step == 0 else "" for i, t in enumerate(thresholds)}
    xlabel = "threshold for |γ| (steps not to scale)"
    return (lines(panels, xlabel, "test accuracy (%)", ticks), used) if panels else None


def _names(series: list[Series]) -> list[str]:
    return [", ".join(filter(None, (arch_label(s.arch), s.label))) for s in series]


def checkpoints(series: list[Series]) -> Drawn:
    """The seed checkpoint's bytes, before the outlined bar of every weight's; by architecture and mode, for
    other options hardly change them."""
    first = {(s.arch, s.mode): s for s in reversed(series) if s.values["checkpoint_bytes"]}
    used = list(first.values())[::-1]
    if not used:
        return None
    sizes, full = [s.mean("checkpoint_bytes") for s in used], [s.mean("full_bytes").mean for s in used]
    texts = [
        f"{short(m.mean)} of {short(f)}, {100 * m.mean / f:.3g} %" for m, f in zip(sizes, full, strict=True)
    ]
    column = Column("bytes; outlined: every weight", sizes, texts, full, log=True)
    names = [f"{arch_label(s.arch)}, {s.mode}" for s in used]
    return bars(names, [s.mode for s in used], [column]), used


def costs(series: list[Series]) -> Drawn:
    """Training time and peak memory; a bar per architecture, mode, machine and number format."""
    used = [s for s in series if s.done]
    if not used:
        return None
    times, peaks = [s.mean("train_s") for s in used], [s.mean("peak_memory_bytes") for s in used]
    longest = max(time.mean for time in times)
    unit, seconds = ("s", 1) if longest < 300 else ("min", 60) if longest < 10800 else ("h", 3600)
    scaled = []
    for values, by in ((times, seconds), (peaks, 2**20)):
        scaled.append([v and Mean(v.mean / by, None if v.std is None else v.std / by, v.n) for v in values])
    texts = [
        ["" if v is None else f"{v.mean:,.4g}" if v.mean < 1000 else f"{v.mean:,.0f}" for v in each]
        for each in scaled
    ]
    on = [f"{', '.join(s.machine[:2])}, torch {s.machine[2]}" for s in used]
    machines, names = dict.fromkeys(on), _names(used)
    if len(machines) > 1:
        names = [f"{name}; {machine}" for name, machine in zip(names, on, strict=True)]
    titles = [f"training time ({unit})", "peak memory (MiB)"]
    columns = [Column(*each) for each in zip(titles, scaled, texts, strict=True)]
    return bars(
        names, [s.mode for s in used], columns, next(iter(machines)) if len(machines) == 1 else ""
    ), used


def accuracy_bars(used: list[Series], names: list[str], validation: bool = False) -> Drawn:
    """A named bar per series, of test accuracy, and beside it of the best on validation images."""
    columns = {"test accuracy (%)": "final_test_acc"}
    columns = {"best on validation (%)": "best_val_acc"} | columns if validation else columns
    drawn = []
    for label, name in columns.items():
        values = [s.mean(name) for s in used]
        texts = [f"{v.mean:.2f}" + (f" ± {v.std:.2f}" if v.std is not None else "") for v in values]
        drawn.append(Column(label, values, texts))
    return bars(names, [s.mode for s in used], drawn), used


def parts(series: list[Series]) -> Drawn:
    """Test accuracy by what trains, of the architectures that were trained in parts."""
    done = [s for s in series if s.done]
    grids = {(s.arch, s.variant) for s in done if s.mode not in MODES_COMPARED}
    used = [s for s in done if (s.arch, s.variant) in grids]
    return accuracy_bars(used, _names(used)) if used[1:] else None


def starts(series: list[Series]) -> Drawn:
    """Test accuracy by how convolutions and BatchNorm start, where more than one start was tried."""
    groups: dict[tuple, list[Series]] = {}
    for s in series:
        if s.done:
            others = tuple(option for option in s.options if option[0] not in STARTS)
            groups.setdefault((s.arch, s.mode, others), []).append(s)
    used = [s for group in groups.values() if len(group) > 1 for s in group]
    names = [
        name if s.options else f"{name}, published start" for name, s in zip(_names(used), used, strict=True)
    ]
    return accuracy_bars(used, names) if used else None
