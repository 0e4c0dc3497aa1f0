"""The Keras study's two questions, answered by the runs at hand: a figure, a table and plain sentences each.

Does training BatchNorm first, and everything after, reach more or reach it sooner than everything from the
start? Does retraining BatchNorm alone improve a finished network? The sweep's grids `warmstart` and `retrain`
make the runs. Differences are of the same seed's runs; one is beyond chance where it exceeds its 95 %
confidence interval (Student's t).
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drawing import Line, lines
from figures import Drawn, arch_label
from finished import DEFAULTS
from gather import Mean, Series, mean_of
from tables import Table

# Student's t at 97.5 %, for 1, 2, ... degrees of freedom; then 2 is near enough
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


class Answer(NamedTuple):
    """`drawn` is None where there are no runs to answer by."""

    drawn: Drawn
    table: Table
    text: str


class Change(NamedTuple):
    """By how many points the test accuracy of the same seeds differs, and the 95 % interval's half width."""

    mean: Mean
    interval: float | None  # None where n is 1

    def __str__(self) -> str:
        shown = f"{self.mean.mean:+.2f} points"
        if self.interval is None:
            return f"{shown} (n = 1: nothing is known of chance)"
        sure = "beyond" if abs(self.mean.mean) > self.interval else "within"
        return f"{shown} (± {self.interval:.2f}, n = {self.mean.n}: {sure} chance)"


def change(of: dict[int, float], to: dict[int, float]) -> Change | None:
    """Of accuracies by seed; None where they have no seed in common."""
    mean = mean_of([of[seed] - to[seed] for seed in sorted(of.keys() & to.keys())])
    if mean is None or mean.std is None:
        return mean and Change(mean, None)
    t = T_975[mean.n - 2] if mean.n - 2 < len(T_975) else 2.0
    return Change(mean, t * mean.std / math.sqrt(mean.n))


def started_after(s: Series) -> tuple[int, str] | None:
    """Epochs and mode of the run that these started from."""
    found = re.fullmatch(r"(\d+) epochs? of (\S+)", str(dict(s.options).get("init_from", "")))
    return (int(found[1]), found[2]) if found else None


def grouped(series: Sequence[Series], *left_out: str) -> list[list[Series]]:
    """Those of one architecture that have all options in common, but some."""
    groups: dict[tuple, list[Series]] = {}
    for s in series:
        common = s.arch, *(option for option in s.options if option[0] not in left_out)
        groups.setdefault(common, []).append(s)
    return list(groups.values())


def by_seed(s: Series, name: str = "final_test_acc") -> dict[int, float]:
    return dict(zip(s.seeds, s.values[name], strict=True))


def points(label: str, mode: str, x: list[float], means: list[Mean], variant: int = 0) -> Line:
    std = [np.nan if mean.std is None else mean.std for mean in means]
    return Line(label, mode, x, [mean.mean for mean in means], std, "points", variant)


# ----------------------------------------------------------------------------------------------------------
# BatchNorm first, everything after


def at_time(s: Series, seconds: float) -> dict[int, float]:
    """Test accuracy, by seed, at the last tested epoch within `seconds` of training."""
    found = {}
    for seed, accs, times in zip(s.seeds, s.curves["test_acc"], s.curves["seconds"], strict=True):
        within = accs[~np.isnan(accs) & (times <= seconds)]
        found |= {seed: float(within[-1])} if len(within) else {}
    return found


def total_seconds(s: Series) -> float:
    return float(np.nanmax(s.curves["seconds"], axis=1).mean())


def warm_starts(series: Sequence[Series]) -> Answer:
    """Test accuracy against the epochs of BatchNorm alone at the start, at equal epochs and at equal time."""
    columns = ["architecture", "epochs of BatchNorm first", "test accuracy (%)", "change (points)"]
    columns += ["95 % interval (points)", "training (s)", "in the shortest time (%)"]
    table = Table("warmstart", "BatchNorm first, then everything", columns, [], 2, True)
    having = [s for s in series if s.mode == "all" and s.curves and len(s.curves["test_acc"]) == s.done]
    panels, used, sentences = [], [], []
    for group in grouped(having, "init_from"):
        after = {(started_after(s) or (0, ""))[0]: s for s in group}
        first = {started_after(s)[1] for s in group if started_after(s)}
        if 0 not in after or first != {"bn_only"}:
            continue
        epochs, name, shortest = sorted(after), arch_label(after[0].arch), min(map(total_seconds, group))
        timed = {k: at_time(after[k], shortest) for k in epochs}
        means = {k: mean_of(list(timed[k].values())) for k in epochs if timed[k]}
        changes = {k: change(by_seed(after[k]), by_seed(after[0])) for k in epochs[1:]}
        for k in epochs:
            final, changed = after[k].mean("final_test_acc"), changes.get(k)
            row = [name, k, final, changed and changed.mean, changed and changed.interval]
            table.rows.append([*row, total_seconds(after[k]), means.get(k)])
        finals = [after[k].mean("final_test_acc") for k in epochs]
        each = [points("at equal epochs", "all", epochs, finals)]
        panels.append((name, [*each, points("at equal time", "bn_only", list(means), list(means.values()))]))
        used += [after[k] for k in epochs]
        total, many = after[0].curves["test_acc"].shape[1], ", ".join(map(str, epochs[1:]))
        timed_changes = {k: change(timed[k], timed[0]) for k in epochs[1:]}
        sentences.append(
            f"{name}, {total} epochs: with BatchNorm alone for the first {many} of them, the best ends "
            f"{best(changes)} from everything from the start."
        )
        sentences.append(
            f"When the shortest ends, after {shortest:,.0f} s of training (everything from the start takes "
            f"{total_seconds(after[0]):,.0f} s), the best stands {best(timed_changes)} from it."
        )
    if not panels:
        return Answer(None, table, "")
    figure = lines(panels, "first epochs, of BatchNorm alone", "test accuracy (%)", size=(3.4, 2.6))
    return Answer((figure, used), table, " ".join(sentences))


def best(changes: dict[int, Change | None]) -> str:
    """The largest of changes by epochs of BatchNorm first."""
    known = {k: found for k, found in changes.items() if found}
    k = max(known, key=lambda k: known[k].mean.mean, default=None)
    return "at an unknown distance" if k is None else f"{known[k]}, by {k},"


# ----------------------------------------------------------------------------------------------------------
# Everything first, BatchNorm after

WAYS = ("as it was", "BatchNorm, kept", "BatchNorm, redrawn", "everything")


def way_of(s: Series) -> int:
    """Which of WAYS a series went on in."""
    return 3 if s.mode == "all" else 2 if dict(s.options).get("reset_bn") else 1


def rate_of(s: Series) -> float:
    return float(dict(s.options).get("lr", DEFAULTS["lr"]))


def retraining(series: Sequence[Series]) -> Answer:
    """Test accuracy before, and after BatchNorm alone, or everything, was trained some epochs more."""
    columns = ["architecture", "trained on", "learning rate", "before (%)", "after (%)", "change (points)"]
    columns += ["95 % interval (points)"]
    table = Table("retrain", "Everything first, then BatchNorm", columns, [], 2, True)
    having = [s for s in series if s.done and (started_after(s) or ("", ""))[1] == "all"]
    having = [s for s in having if s.mode in ("bn_only", "all") and len(s.values["start_test_acc"]) == s.done]
    panels, used, sentences = [], [], []
    for group in grouped(having, "lr", "reset_bn"):
        if not any(s.mode == "bn_only" for s in group):
            continue
        group = sorted(group, key=lambda s: (way_of(s), -rate_of(s)))
        name, rates = arch_label(group[0].arch), sorted({rate_of(s) for s in group}, reverse=True)
        before = max(group, key=lambda s: s.done)
        each, changes = [points("", "all", [0], [before.mean("start_test_acc")])], {}
        for s in group:
            number, rate = rates.index(rate_of(s)), rate_of(s)
            x = way_of(s) + 0.12 * (number - (len(rates) - 1) / 2)
            each.append(points(f"learning rate {rate:g}", s.mode, [x], [s.mean("final_test_acc")], number))
            found = change(by_seed(s), by_seed(s, "start_test_acc"))
            row = [name, WAYS[way_of(s)], f"{rate:g}", s.mean("start_test_acc"), s.mean("final_test_acc")]
            table.rows.append([*row, found.mean, found.interval])
            changes.setdefault(way_of(s), {})[rate] = found
        panels.append((name, each))
        used += group
        epochs, more = started_after(before)[0], before.curves["test_acc"].shape[1] if before.curves else 0
        told = {}
        for way, found in changes.items():
            rate = max(found, key=lambda rate: found[rate].mean.mean)
            told[way] = f"{found[rate]} at learning rate {rate:g}"
        hows = ((1, "kept"), (2, "drawn anew"))
        kept = [f"with gamma and beta {how} by {told[way]}" for way, how in hows if way in told]
        sentences.append(
            f"{name}: {more - epochs} epochs of BatchNorm alone, after {epochs} of everything, change the "
            f"test accuracy of {before.mean('start_test_acc').mean:.2f} %, {', and '.join(kept)}."
        )
        if 3 in told:
            sentences.append(f"As many more epochs of everything change it by {told[3]}.")
    if not panels:
        return Answer(None, table, "")
    ticks = {i: text.replace(", ", ",\n") for i, text in enumerate(WAYS)}
    figure = lines(panels, "what was trained on", "test accuracy (%)", ticks, size=(4.6, 2.8))
    return Answer((figure, used), table, " ".join(sentences))
