"""Three questions, answered by the runs at hand: a figure, a table and plain sentences each.

Does training BatchNorm first, and everything after, reach more or reach it sooner than everything from the
start? Does retraining BatchNorm alone improve a finished network? Which recipe reaches the most? The sweep's
grids `warmstart`, `retrain` and `recipe` make the runs. Differences are of the same seed's runs, at equal
time of those on the same machine; one is beyond chance where it exceeds its confidence interval.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from config import DEFAULTS, RECIPES, variant_text
from reporting.drawing import lines, points
from reporting.figures import Drawn, accuracy_bars, arch_label
from reporting.series import Mean, Series, mean_of
from reporting.tables import Table

INTERVAL = "The change is of the same seeds' runs. Intervals have 95 % confidence (Student's t)"
OF_ALL = (
    f"{INTERVAL} for all that were tried at once (Bonferroni's bound); test images tell the best of them. "
)


class Answer(NamedTuple):
    """`drawn` is None where there are no runs to answer by."""

    drawn: Drawn
    table: Table
    text: str
    note: str


class Change(NamedTuple):
    """By how many points the test accuracy of the same seeds differs, and the interval's half width.

    The interval holds for all of `tried` such changes at once, with 95 % confidence (Bonferroni's bound).
    """

    mean: Mean
    interval: float | None  # None where n is 1
    tried: int

    def __str__(self) -> str:
        n, more = self.mean.n, "above" if self.mean.mean >= 0 else "below"
        shown = f"{abs(self.mean.mean):.2f} points {more}"
        if self.interval is None:
            return f"{shown} (n = 1, so nothing is known of chance)"
        sure = "beyond" if abs(self.mean.mean) > self.interval else "within"
        return f"{shown} (± {self.interval:.2f}, n = {n}: {sure} chance)"


def change(of: dict[int, float], to: dict[int, float], tried: int = 1) -> Change | None:
    """Of accuracies by seed; None where they have no seed in common."""
    mean = mean_of([of[seed] - to[seed] for seed in sorted(of.keys() & to.keys())])
    if mean is None or mean.std is None:
        return mean and Change(mean, None, tried)
    t = student_t(1 - 0.025 / tried, mean.n - 1)
    return Change(mean, t * mean.std / math.sqrt(mean.n), tried)


def student_t(probability: float, freedom: int) -> float:
    """A quantile of Student's t above 0: sqrt(freedom) tan(angle), the angle's density a power of cos."""
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    angle = np.interp(2 * probability - 1, below / below[-1], angles)
    return math.sqrt(freedom) * math.tan(angle)


def grouped(series: Sequence[Series], *left_out: str) -> list[list[Series]]:
    """Those of one architecture that have all options in common, but some."""
    groups: dict[tuple, list[Series]] = {}
    for s in series:
        common = s.arch, *(option for option in s.options if option[0] not in left_out)
        groups.setdefault(common, []).append(s)
    return list(groups.values())


def by_seed(s: Series, name: str = "final_test_acc") -> dict[int, float]:
    return dict(zip(s.seeds, s.values[name], strict=True))


# ----------------------------------------------------------------------------------------------------------
# BatchNorm first, everything after


def seconds_by_seed(s: Series) -> dict[int, float]:
    """Of training in all, were every epoch the run's median one; of the runs of which it is known."""
    seconds = zip(s.seeds, s.curves["seconds"][:, -1].tolist(), strict=True)
    return {seed: time for seed, time in seconds if not math.isnan(time)}


def at_time(s: Series, seconds: dict[int, float]) -> dict[int, float]:
    """Test accuracy, by seed, at the last tested epoch within that seed's `seconds` of training."""
    found = {}
    for seed, accs, times in zip(s.seeds, s.curves["test_acc"], s.curves["seconds"], strict=True):
        within = accs[~np.isnan(accs) & (times <= seconds.get(seed, 0.0) * (1 + 1e-9))]
        found |= {seed: float(within[-1])} if len(within) else {}
    return found


def is_whole(s: Series) -> bool:
    """Whether each of its runs has its metrics, and as many epochs as the others."""
    metrics = bool(s.curves) and len(s.curves["seconds"]) == s.done
    return metrics and not np.isnan(s.curves["train_acc"][:, -1]).any()


def first_parts(series: Sequence[Series]) -> list[tuple[str, dict[int, Series]]]:
    """A name, and by the epochs of BatchNorm alone at their start, 0 among them, runs that are as long in all
    and differ in nothing else but what the name says."""
    having, found = [s for s in series if s.mode == "all" and s.done and is_whole(s)], []
    of_the_start = ("init_from", "reset_bn", "warmup_epochs")  # which the first part has, of the plain run's
    for group in grouped(having, *of_the_start):
        kinds: dict[tuple, list[Series]] = {}
        for s in (s for s in group if s.start and s.start.mode == "bn_only"):
            kinds.setdefault((s.start.options, s.start.seed), []).append(s)
        for (options, seed), first in kinds.items():
            origin = [dict(options).get(name) for name in of_the_start]
            alike = (s for s in group if [dict(s.options).get(name) for name in of_the_start] == origin)
            plain = next(alike, None)
            after = {0: plain} | {s.start.epochs: s for s in first}
            if plain and len({s.curves["seconds"].shape[1] for s in after.values()}) == 1:
                hidden = {"patience", "early_stop", *of_the_start}
                more = [variant_text(o for o in options if o[0] not in hidden and o[1] != "constant")]
                more += [f"from seed {seed}"] if seed is not None else []
                found.append((", ".join(filter(None, [arch_label(first[0].arch), *more])), after))
    return found


def warm_starts(series: Sequence[Series]) -> Answer:
    """Test accuracy against the epochs of BatchNorm alone at the start, at equal epochs and at equal time."""
    columns = ["architecture", "epochs of BatchNorm first", "test accuracy (%)", "change (points)"]
    columns += ["interval (points)", "training (s)", "in the shortest time (%)"]
    table = Table("warmstart", "BatchNorm first, then everything", columns, [], 2, True)
    panels, used, sentences = [], [], []
    for name, after in first_parts(series):
        epochs, tried = sorted(after), len(after) - 1
        epochs_in_all = after[0].curves["seconds"].shape[1]
        times = {k: seconds_by_seed(after[k]) for k in epochs}
        shortest = {
            seed: min(of[seed] for of in times.values())
            for seed in times[0]
            if all(seed in of for of in times.values())
            and len({machine(s, seed) for s in after.values()}) == 1
        }
        timed = {k: at_time(after[k], shortest) for k in epochs}
        means = {k: mean_of(list(timed[k].values())) for k in epochs if timed[k]}
        changes = {k: change(by_seed(after[k]), by_seed(after[0]), tried) for k in epochs[1:]}
        sooner = {k: change(timed[k], timed[0], tried) for k in epochs[1:]}
        for k in epochs:
            final, changed = after[k].mean("final_test_acc"), changes.get(k)
            row = [name, k, final, changed and changed.mean, changed and changed.interval]
            table.rows.append([*row, mean_of(list(times[k].values())), means.get(k)])
        finals = [after[k].mean("final_test_acc") for k in epochs]
        each = [points("at equal epochs", "all", epochs, finals)]
        panels.append((name, [*each, points("at equal time", "bn_only", list(means), list(means.values()))]))
        used += [after[k] for k in epochs]
        sentences.append(
            f"{name}, {epochs_in_all} epochs in all: with BatchNorm alone for the first "
            f"{', '.join(map(str, epochs[1:]))} of them, {best(changes)} everything from the start."
        )
        if shortest:
            in_time, in_all = (mean_of([of[seed] for seed in shortest]).mean for of in (shortest, times[0]))
            sentences.append(
                f"In the time of the shortest ({in_time:,.0f} s of training; everything from the start takes "
                f"{in_all:,.0f} s), {best(sooner)} it."
            )
    if not panels:
        return Answer(None, table, "", "")
    figure = lines(panels, "first epochs, of BatchNorm alone", "test accuracy (%)", size=(3.4, 2.6))
    return Answer((figure, used), table, " ".join(sentences), OF_ALL)


def machine(s: Series, seed: int) -> tuple | None:
    return dict(zip(s.seeds, s.machines, strict=True)).get(seed)


def best(changes: dict[int, Change | None]) -> str:
    """`the best, with 5, is 0.12 points above ...`, of changes by epochs of BatchNorm first."""
    most = max((found.mean.n for found in changes.values() if found), default=0)
    known = {k: found for k, found in changes.items() if found and found.mean.n == most}
    k = max(known, key=lambda k: known[k].mean.mean, default=None)
    return "no seed is in common with" if k is None else f"the best, with {k}, ends {known[k]}"


# ----------------------------------------------------------------------------------------------------------
# Everything first, BatchNorm after

WAYS = ("as it was", "BatchNorm, kept", "BatchNorm, redrawn", "everything")


def way_of(s: Series) -> int:
    """Which of WAYS a series went on in."""
    return 2 if dict(s.options).get("reset_bn") else 3 if s.mode == "all" else 1


def rate_of(s: Series) -> float:
    options = dict(s.options)
    return float(options.get("lr", RECIPES.get(options.get("recipe"), {}).get("lr", DEFAULTS["lr"])))


def retraining(series: Sequence[Series]) -> Answer:
    """Test accuracy before, and after BatchNorm alone, or everything, was trained some epochs more."""
    columns = ["architecture", "trained on", "learning rate", "before (%)", "after (%)", "change (points)"]
    columns += ["interval (points)"]
    table = Table("retrain", "Everything first, then BatchNorm", columns, [], 2, True)
    panels, used, sentences = [], [], []
    having = [s for s in series if s.done and s.start and s.start.mode == "all"]
    having = [s for s in having if len(s.values["start_test_acc"]) == s.done]
    having = [s for s in having if s.mode == "bn_only" or (s.mode == "all" and way_of(s) == 3)]
    varied = {"lr", "min_lr", "reset_bn"}
    for group in grouped(having, *varied):
        if not any(s.mode == "bn_only" for s in group):
            continue
        group = sorted(group, key=lambda s: (way_of(s), -rate_of(s)))
        rates = sorted({rate_of(s) for s in group}, reverse=True)
        others = dict(group[0].options) | dict(group[0].start.options)
        others = [(k, v) for k, v in sorted(others.items()) if k not in {"init_from", "milestones", *varied}]
        name = ", ".join(filter(None, [arch_label(group[0].arch), variant_text(others)]))
        before = max(group, key=lambda s: s.done)
        start = before.mean("start_test_acc")
        each, changes = [points("", "all", [0], [start])], {}
        for s in group:
            way, rate, number = way_of(s), rate_of(s), rates.index(rate_of(s))
            x = way + 0.12 * (number - (len(rates) - 1) / 2)
            each.append(points(f"learning rate {rate:g}", s.mode, [x], [s.mean("final_test_acc")], number))
            tried = sum(way_of(other) == way for other in group)
            found = change(by_seed(s), by_seed(s, "start_test_acc"), tried)
            row = [name, WAYS[way], f"{rate:g}", s.mean("start_test_acc"), s.mean("final_test_acc")]
            table.rows.append([*row, found.mean, found.interval])
            changes.setdefault(way, {})[rate] = found
        panels.append((name, each))
        used += group
        told = {}
        for way, found in changes.items():
            rate = max(found, key=lambda rate: (found[rate].mean.n, found[rate].mean.mean))
            tried = f", the better of {len(found)}," if len(found) > 1 else ""
            told[way] = f"{found[rate]} at learning rate {rate:g}{tried}"
        more, hows = before.mean("epochs_done").mean, ((1, "kept"), (2, "drawn anew"))
        kept = [f"{told[way]} with gamma and beta {how}" for way, how in hows if way in told]
        sentences.append(
            f"{name}: after {more:g} more epochs, of BatchNorm alone, a network of {start.mean:.2f} % after "
            f"{before.start.epochs} epochs of everything ends {', and '.join(kept)}."
        )
        if 3 in told:
            sentences.append(f"After as many more of everything it ends {told[3].rstrip(',')}.")
    if not panels:
        return Answer(None, table, "", "")
    ticks = {i: text.replace(", ", ",\n") for i, text in enumerate(WAYS)}
    figure = lines(panels, "what was trained on", "test accuracy (%)", ticks, size=(4.6, 2.8))
    return Answer((figure, used), table, " ".join(sentences), OF_ALL)


# ----------------------------------------------------------------------------------------------------------
# Recipes


def recipes(series: Sequence[Series]) -> Answer:
    """Validation and test accuracy of each set of options that was tried on validation images."""
    columns = ["architecture", "mode", "other options", "best on validation (%)", "test accuracy (%)"]
    columns += ["change in test (points)", "interval (points)"]
    table = Table("recipe", "Recipes, by validation images", columns, [], 2, True)
    used, names, sentences, note = [], [], [], f"{INTERVAL}, each for itself. "
    having = [s for s in series if s.done and not s.start and len(s.values["best_val_acc"]) == s.done]
    groups: dict[tuple, list[Series]] = {}
    for s in having:
        groups.setdefault((s.arch, s.mode), []).append(s)
    for (arch, mode), group in groups.items():
        common = set.intersection(*(set(s.options) for s in group))
        base = next((s for s in group if set(s.options) == common), None)
        if not base or len(group) == 1:
            continue
        told = {id(s): variant_text(o for o in s.options if o not in common) or "as it comes" for s in group}
        group = sorted(group, key=lambda s: -s.mean("best_val_acc").mean)
        for s in group:
            found = change(by_seed(s), by_seed(base)) if s is not base else None
            row = [arch, mode, told[id(s)], s.mean("best_val_acc"), s.mean("final_test_acc")]
            table.rows.append([*row, found and found.mean, found and found.interval])
        used += group
        names += [f"{arch_label(arch)}, {mode}, {told[id(s)]}" for s in group]
        seeds = max((set(s.seeds) & set(base.seeds) for s in group if s is not base), key=len)
        rivals = [s for s in group if seeds and seeds <= set(s.seeds)]
        if rivals:
            chosen = max(rivals, key=lambda s: sum(by_seed(s, "best_val_acc")[seed] for seed in seeds))
            text = f"{arch_label(arch)}, {mode}: of {len(rivals)} recipes, the best on validation images is "
            text += f"{told[id(chosen)]}"
            if chosen is not base:
                text += f": in test {change(by_seed(chosen), by_seed(base))} the recipe as it comes"
            sentences.append(f"{text}.")
    if not used:
        return Answer(None, table, "", "")
    return Answer(accuracy_bars(used, names, validation=True), table, " ".join(sentences), note)
