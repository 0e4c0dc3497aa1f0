"""Runs gathered: into settings, which are never mixed, and in each into series over seeds."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import pandas as pd

import config
from records import Analysis, Epoch, Origin, Pairs, Summary, variant_text
from reporting.reading import Run

CIFAR10 = {"CIFAR-10": "cifar10", "CIFAR-10 (not the official bytes)": "cifar10-other-bytes"}  # its folders


class Mean(NamedTuple):
    """A mean, its sample standard deviation (NaN where n is 1), and of how many."""

    mean: float
    std: float
    n: int

    def text(self, digits: int = 2) -> str:
        return f"{self.mean:,.{digits}f}" + (f" ± {self.std:,.{digits}f}" if self.n > 1 else "")


NO_MEAN = Mean(math.nan, math.nan, 0)


class Setting(NamedTuple):
    """Runs that may be compared, in the order in which they are shown."""

    label: str  # as shown
    folder: str  # of its files in a report
    runs: list[Run]

    @property
    def known(self) -> str:
        """The data set in `reported.csv`, where all of its training images trained, as others have it."""
        title, _, quick, subset, held_out, *_ = self.runs[0].config.setting
        cifar10 = "cifar10" if title in CIFAR10 and not held_out else ""
        return "" if quick or subset else "imagenette" if title == "Imagenette" else cifar10


class Series(NamedTuple):
    """Runs that differ in their seed alone: of one architecture and mode, with the same other options.

    results: a row per run that is done, by seed, of the fields of its summary; of the seconds and images/s
    of its median epoch; and of its parent's test accuracy. epochs: a row per epoch, counted from the first
    one of what the runs went on from, and seed, of the columns of metrics.jsonl.
    """

    arch: str
    mode: str
    variant: Pairs  # the options that set it apart from the published run, and their values
    machine: tuple[str, str, str]  # device, how it computed, torch; empty texts where they do not matter
    origin: Origin | None  # what they went on from, on the same images
    diverged: int
    results: pd.DataFrame
    epochs: pd.DataFrame
    analyses: list[Analysis]

    @property
    def done(self) -> int:
        return len(self.results)

    @property
    def variant_text(self) -> str:
        return variant_text(self.variant)

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self.mode, self.variant_text)))

    @property
    def last_epoch(self) -> int:
        return int(self.epochs.index.get_level_values("epoch").max())

    def variant_but(self, *names: str) -> Pairs:
        return tuple(option for option in self.variant if option[0] not in names)

    def by_seed(self, name: str) -> pd.Series:
        """A column of results, of the seeds that have it."""
        return self.results[name].dropna()

    def mean(self, name: str, unit: float = 1) -> Mean | None:
        """Of a column of results, in this unit."""
        return mean_of(self.by_seed(name) / unit)

    def curves(self, name: str) -> pd.DataFrame:
        """A column of epochs: a row per epoch, a column per seed."""
        return self.epochs[name].unstack("seed").astype(float)


def mean_of(values: Iterable[float]) -> Mean | None:
    """Mean and sample standard deviation of numbers, NaN left out; None of nothing."""
    each = [value for value in values if not math.isnan(value)]
    std = statistics.stdev(each) if len(each) > 1 else math.nan
    return Mean(statistics.fmean(each), std, len(each)) if each else None


def drawn_from_seed(series: Iterable[Series]) -> list[Series]:
    """Those whose frozen weights a seed gives; others need the file, or the run, that they began with."""
    return [s for s in series if "init_from" not in dict(s.variant)]


def grouped(each: Iterable, key: Callable[..., Hashable]) -> dict[Hashable, list]:
    """Those with the same key, in the order in which they come."""
    groups: dict[Hashable, list] = {}
    for one in each:
        groups.setdefault(key(one), []).append(one)
    return groups


def setting_names(setting: tuple) -> tuple[str, str]:
    """The label and the folder of a Config's setting: `CIFAR-10, 12 epochs` and `cifar10/12-epochs`."""
    title, epochs, quick, subset, held_out, size, _ = setting
    usual = quick and subset == config.QUICK["train_subset"]
    parts = (
        (quick, "--quick", ""),
        (subset, f"{subset or 0:,} training images", "" if usual else f"{subset}-images"),
        (held_out, f"{held_out:,} for validation", f"{held_out}-validation"),
        (size != 32, f"{size}x{size} pixels", f"{size}-pixels"),
    )
    label = [title, f"{epochs} epoch{'s' if epochs > 1 else ''}", *(label for has, label, _ in parts if has)]
    folder = ["quick"] * quick + [f"{epochs}-epochs", *(name for has, _, name in parts if has and name)]
    data = CIFAR10.get(title) or re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")[:40] or "data"
    return ", ".join(label), f"{data}/{'-'.join(folder)}"


def by_setting(found: list[Run]) -> list[Setting]:
    """The runs of each setting, the longest training first; no two have a label or a folder in common."""

    def rank(run: Run) -> tuple:  # depths and widths as numbers, the modes most compared first
        of, variant = run.config.options, run.config.variant
        arch = re.split("([0-9]{1,9})", of.arch)
        arch[1::2] = map(int, arch[1::2])
        at = ("all", "bn_only", "bn_main", "random", of.mode).index(of.mode)
        return arch, at, of.mode, len(variant), str(variant), of.seed, run.name

    settings, made, places = grouped(found, lambda run: run.config.setting), [], Counter()
    labels = Counter(setting_names(setting)[0] for setting in settings)
    for of in sorted(settings, key=lambda of: (of[2], -of[1], -len(settings[of]), setting_names(of), of[-1])):
        label, folder = setting_names(of)
        places[folder] += 1
        folder += f"-{places[folder]}" if places[folder] > 1 else ""
        label += f", data {of[-1]}" if labels[label] > 1 else ""
        made.append(Setting(label, folder, sorted(settings[of], key=rank)))
    return made


def series_of(members: list[Run], by_machine: bool = False) -> list[Series]:
    """The runs of one setting gathered over seeds: what is done, and how many diverged.

    A number format other than the one in which most of them computed sets a run apart, like an option.
    """
    dtypes = Counter(run.config.spec.dtype for run in members)
    usual = max(sorted(dtypes), key=dtypes.get)

    def key(run: Run) -> tuple:
        of, dtype = run.config, run.config.spec.dtype
        variant = of.variant if dtype == usual else (*of.variant, ("dtype", dtype))
        return of.options.arch, of.options.mode, variant, of.machine if by_machine else ("", "", "")

    gathered = []
    for names, group in grouped((r for r in members if r.status in ("done", "diverged")), key).items():
        # a seed counts once, on however many machines
        by_seed = {run.config.options.seed: run for run in reversed(group) if run.done}
        diverged = len({run.config.options.seed for run in group}) - len(by_seed)
        done = [by_seed[seed] for seed in sorted(by_seed)]
        analyses = [run.analysis for run in done if run.analysis]
        gathered.append(Series(*names, group[0].config.origin, diverged, *_frames(done), analyses))
    return gathered


def _frames(done: list[Run]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The results and the epochs of runs, see Series."""
    rows, epoch_rows = [], []
    for run in done:
        of, parent = run.config, run.config.parent if run.config.origin else None
        before = parent.epochs_done_in_all if parent else 0
        rows.append(vars(run.summary) | {"parent_test_acc": parent and parent.test_acc})
        for row in run.epochs:
            epoch_rows.append(vars(row) | {"epoch": before + row.epoch, "seed": of.options.seed})
    columns = [*Summary.model_fields, "parent_test_acc"]
    results = pd.DataFrame(rows, columns=columns, dtype=object).set_index("seed")
    columns = [*Epoch.model_fields, "seed"]
    epochs = pd.DataFrame(epoch_rows, columns=columns).set_index(["epoch", "seed"])
    typical = epochs[["epoch_s", "images_per_s"]].astype(float).groupby("seed").median()
    return results.join(typical), epochs  # the first epochs may wait or compile
