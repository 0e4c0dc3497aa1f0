"""Answer three questions from the available runs, each with a figure, a table and plain sentences.

Does training BatchNorm first and everything afterwards reach a higher accuracy than training everything from
the start? Does retraining BatchNorm alone improve a finished network? Which settings reach the highest
accuracy? The sweep's grids `warmstart`, `retrain` and `tuning` make the runs. Differences are paired by seed;
a difference is beyond chance if it exceeds the half-width of its confidence interval.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
from scipy import stats

import config
from records import variant_text
from reporting.drawing import Drawn, lines, points
from reporting.figures import ACCURACY, accuracy_bars, arch_of
from reporting.series import Mean, Series, grouped, mean_of
from reporting.tables import Table

INHERITED = ("init_from", "reset_bn", "warmup_epochs")  # a warm start's first part takes the plain run's
# The macros that write the sentences.
WORDS = jinja2.Template(Path(__file__).with_name("answers.txt").read_text("utf-8")).module
CHANGE = ["change (points)", "interval (points)"]


class Answer(NamedTuple):
    """The answer to one question; `drawn` is None if no runs answer it."""

    table: Table
    drawn: Drawn
    text: str


class Change(NamedTuple):
    """A paired difference in test accuracy, in percentage points, with its confidence interval."""

    mean: Mean | None = None  # None if the two share no seed
    interval: float | None = None  # half-width; None if n is less than 2


def change(of: pd.Series, to: pd.Series, tried: int = 1) -> Change:
    """Return the change `of - to` of accuracies by seed.

    The interval has 95 % confidence for all `tried` changes at once (Student's t, Bonferroni's bound).
    """
    mean = mean_of(of - to)
    if mean is None or mean.n == 1:
        return Change(mean)
    t = float(stats.t.ppf(1 - 0.025 / tried, mean.n - 1))
    return Change(mean, t * mean.std / math.sqrt(mean.n))


def pooled(accs: pd.DataFrame) -> dict[Any, Change]:
    """Return the change of each other column of accuracies against the first one; each row is a seed.

    The intervals have 95 % confidence for all columns at once (Bonferroni). Their variance is pooled over all
    columns, with the seeds as blocks: it is the residual variance after subtracting the means of seeds and of
    columns (a randomised block design). Only seeds with a value in every column count.
    """
    accs, (first, *others) = accs.dropna().astype(float), accs.columns
    n, freedom = len(accs), (len(accs) - 1) * len(others)
    changes = {k: mean_of(accs[k] - accs[first]) for k in others}
    if n < 2:
        return {k: Change(mean) for k, mean in changes.items()}
    left = accs.sub(accs.mean(axis=1), axis=0)
    variance = ((left - left.mean()) ** 2).to_numpy().sum() / freedom
    t = float(stats.t.ppf(1 - 0.025 / len(others), freedom))
    return {k: Change(mean, t * math.sqrt(2 * variance / n)) for k, mean in changes.items()}


def trend(accs: pd.DataFrame) -> Change:
    """Return the change per doubling of a column's number: the seeds' mean slope in its base-2 logarithm."""
    x = pd.Series([math.log2(k) for k in accs.columns], index=accs.columns)
    x -= x.mean()
    slopes = (accs.dropna().astype(float) * x).sum(axis=1) / (x**2).sum()
    return change(slopes, slopes * 0)


# ---- BatchNorm first, everything after ----


def first_parts(series: Sequence[Series]) -> list[tuple[str, dict[int, Series]]]:
    """Return each warm-start comparison: a name, and series by how many epochs train BatchNorm alone first.

    The series of 0 such epochs trains everything from the start. All series of a comparison have the same
    number of epochs in total. They differ otherwise only in options of the first part, which the name states.
    """
    found = []
    having = [s for s in series if s.mode == "all" and s.done and len(s.epochs)]
    having = [s for s in having if s.curves("train_acc").iloc[-1].count() == s.done]  # all have every epoch
    for group in grouped(having, lambda s: (s.arch, s.variant_but(*INHERITED))).values():
        after_bn = [s for s in group if s.origin and s.origin.mode == "bn_only"]
        kinds = grouped(after_bn, lambda s: (s.origin.variant, s.origin.seed))
        for (variant, seed), first in kinds.items():
            own = [option for option in variant if option[0] in INHERITED]
            plain = next((s for s in group if [o for o in s.variant if o[0] in INHERITED] == own), None)
            after = {0: plain} | {s.origin.epochs: s for s in first}
            if plain and len({s.last_epoch for s in after.values()}) == 1:
                hidden = {"patience", "early_stop", *INHERITED}
                more = variant_text(o for o in variant if o[0] not in hidden and o[1] != "constant")
                of_seed = "" if seed is None else f"from seed {seed}"
                found.append((", ".join(filter(None, [arch_of(plain.arch).label, more, of_seed])), after))
    return found


def warm_starts(series: Sequence[Series]) -> Answer:
    """Compare runs of equal length by how many of their first epochs train BatchNorm alone."""
    rows, panels, used, sentences = [], [], [], []
    for name, after in first_parts(series):
        epochs = sorted(after)
        accs = pd.DataFrame({k: after[k].by_seed("final_test_acc") for k in epochs})
        means, changes = {k: mean_of(accs[k]) for k in epochs}, pooled(accs)
        rows += [[name, k, means[k], *changes.get(k, Change())] for k in epochs]
        panels.append((name, [points("everything afterwards", "all", epochs, list(means.values()))]))
        used += [after[k] for k in epochs]
        doubling = trend(accs[epochs[1:]]) if len(epochs) > 3 else Change()
        sentences.append(WORDS.warmstart(name, after[0].last_epoch, changes, doubling))
    table = Table(
        "warmstart", ["architecture", "epochs of BatchNorm first", "test accuracy (%)", *CHANGE], rows
    )
    labels = "first epochs (BatchNorm alone)", ACCURACY
    return Answer(table, lines(panels, used, labels, size=(3.4, 2.6)), " ".join(sentences))


def most(changes: dict[Any, Change]) -> Any:
    """Return the key of the largest change among those with the most seeds; None if no seeds are shared."""
    known = [key for key in changes if changes[key].mean]
    return max(known, key=lambda key: (changes[key].mean.n, changes[key].mean.mean), default=None)


# ---- everything first, BatchNorm after ----

WAYS = ("before", "BatchNorm, kept", "BatchNorm, redrawn", "everything")


def way_of(s: Series) -> int | None:
    """Return the index in WAYS of how a series continued its parent run, or None if it is none of them."""
    ways = {("bn_only", False): 1, ("bn_only", True): 2, ("all", False): 3}
    return ways.get((s.mode, dict(s.variant).get("reset_bn", False)))


def rate_of(s: Series) -> float:
    options = dict(s.variant)
    return options.get("lr", config.defaults(options.get("preset")).lr)


def retraining(series: Sequence[Series]) -> Answer:
    """Compare test accuracy before and after a few more epochs of BatchNorm alone or of everything."""
    rows, panels, used, sentences, varied = [], [], [], [], ("lr", "min_lr", "reset_bn")
    having = [s for s in series if s.done and s.origin and s.origin.mode == "all" and way_of(s)]
    having = [s for s in having if len(s.by_seed("parent_test_acc")) == s.done]
    for group in grouped(having, lambda s: (s.arch, s.variant_but(*varied))).values():
        if not any(s.mode == "bn_only" for s in group):
            continue
        group = sorted(group, key=lambda s: (way_of(s), -rate_of(s)))
        rates = sorted({rate_of(s) for s in group}, reverse=True)
        others = dict(group[0].variant) | dict(group[0].origin.variant)
        more = [(k, v) for k, v in sorted(others.items()) if k not in ("init_from", "milestones", *varied)]
        name = ", ".join(filter(None, [arch_of(group[0].arch).label, variant_text(more)]))
        longest = max(group, key=lambda s: s.done)
        before = longest.mean("parent_test_acc")
        each, found = [points("", "all", [0], [before])], {}
        for way, tried in grouped(group, way_of).items():
            changes = {}
            for s in tried:
                rate, final, parents = rate_of(s), s.mean("final_test_acc"), s.by_seed("parent_test_acc")
                x = way + 0.12 * (rates.index(rate) - (len(rates) - 1) / 2)
                each.append(points(f"learning rate {rate:g}", s.mode, [x], [final], rates.index(rate)))
                changes[rate] = change(s.by_seed("final_test_acc"), parents, len(tried))
                rows.append([name, WAYS[way], f"{rate:g}", mean_of(parents), final, *changes[rate]])
            found[WAYS[way]] = most(changes), changes
        panels.append((name, each))
        used += group
        epochs = longest.origin.epochs, longest.mean("epochs_done").mean
        sentences.append(WORDS.retrain(name, before.mean, *epochs, found))
    columns = ["architecture", "what trains", "learning rate", "before (%)", "after (%)", *CHANGE]
    ticks = {i: text.replace(", ", ",\n") for i, text in enumerate(WAYS)}
    drawn = lines(panels, used, ("what trains in the further epochs", ACCURACY), ticks, size=(4.6, 2.8))
    return Answer(Table("retrain", columns, rows), drawn, " ".join(sentences))


# ---- which settings ----


def tuning(series: Sequence[Series]) -> Answer:
    """Compare validation and test accuracy of each set of options that was tried with validation images.

    The seeds that all sets share choose the best set. Its gain is measured on other seeds, if there are any.
    """
    rows, used, names, sentences = [], [], [], []
    having = [s for s in series if s.done and not s.origin and len(s.by_seed("best_val_acc")) == s.done]
    for (arch, mode), group in grouped(having, lambda s: (s.arch, s.mode)).items():
        common = set.intersection(*(set(s.variant) for s in group))
        base = next((s for s in group if set(s.variant) == common), None)
        group = [s for s in group if base and len(s.results.index.intersection(base.results.index))]
        if len(group) < 2:
            continue
        choosing = set.intersection(*(set(s.results.index) for s in group))
        choosing = sorted(choosing or base.results.index)
        name, tried = f"{arch_of(arch).label}, {mode}", {}
        own = [s._replace(results=s.results[s.results.index.isin(choosing)]) for s in group]
        tests = {id(s): whole.by_seed("final_test_acc") for s, whole in zip(own, group, strict=True)}
        (at_base,) = (tests[id(s)] for s, whole in zip(own, group, strict=True) if whole is base)
        for s in sorted((s for s in own if s.done), key=lambda s: -s.mean("best_val_acc").mean):
            told = variant_text(o for o in s.variant if o not in common) or "defaults"
            test, fresh = tests[id(s)], tests[id(s)].drop(choosing, errors="ignore")
            fresh = fresh if len(fresh.index.intersection(at_base.index)) else fresh[:0]
            gain = change(fresh if len(fresh) else test, at_base) if test is not at_base else Change()
            rows.append(
                [arch, mode, told, s.mean("best_val_acc"), s.mean("final_test_acc"), mean_of(fresh), *gain]
            )
            names.append(f"{name}, {told}")
            used.append(s)
            if s.done == len(choosing):
                tried[told, gain, len(fresh)] = s.mean("best_val_acc").mean
        sentences.append(WORDS.tuning(name, len(tried), choosing, *max(tried, key=tried.get)))
    columns = ["architecture", "mode", "other options", "best on validation (%)", "test accuracy (%)"]
    table = Table("tuning", [*columns, "test accuracy of other seeds (%)", *CHANGE], rows)
    drawn = accuracy_bars(used, names, best_val_acc="best on validation (%)")
    return Answer(table, drawn, " ".join(sentences))
