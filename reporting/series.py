"""Group runs into settings, which are never mixed, and within a setting into series over seeds."""

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

CIFAR10 = {"CIFAR-10": "cifar10", "CIFAR-10 (not the official bytes)": "cifar10-other-bytes"}  # title: folder


class Mean(NamedTuple):
    """A mean, its sample standard deviation (NaN if n is 1), and n, the number of values."""

    mean: float
    std: float
    n: int

    def text(self, digits: int = 2) -> str:
        return f"{self.mean:,.{digits}f}" + (f" ± {self.std:,.{digits}f}" if self.n > 1 else "")


NO_MEAN = Mean(math.nan, math.nan, 0)


class Setting(NamedTuple):
    """Runs that may be compared, in display order."""

    label: str  # as shown
    folder: str  # for its files, inside the report
    runs: list[Run]

    @property
    def known(self) -> str:
        """The data set in `reported.csv`; "" for others, subsets, and CIFAR-10 with validation images."""
        title, _, quick, subset, held_out, *_ = self.runs[0].config.setting
        cifar10 = "cifar10" if title in CIFAR10 and not held_out else ""
        return "" if quick or subset else "imagenette" if title == "Imagenette" else cifar10


class Series(NamedTuple):
    """Runs that differ only in their seed: one architecture, one mode and the same other options.

    `results` has a row per finished run, indexed by seed: the fields of its summary, the medians of its
    epochs' seconds and images/s, and its parent's test accuracy. `epochs` has a row per epoch and seed with
    the columns of metrics.jsonl; its epochs are counted from the first epoch of the parent run, if any.
    """

    arch: str
    mode: str
    variant: Pairs  # options that differ from the published run, with values
    machine: tuple[str, str, str]  # device, how it computed, torch version; or three empty texts
    origin: Origin | None  # the parent run, if it had the same images
    diverged: int  # seeds that diverged
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
        """Return a column of `results` for the seeds that have a value."""
        return self.results[name].dropna()

    def mean(self, name: str, unit: float = 1) -> Mean | None:
        """Return the Mean of a column of `results`, divided by `unit`; None if it has no values."""
        return mean_of(self.by_seed(name) / unit)

    def curves(self, name: str) -> pd.DataFrame:
        """Return a column of `epochs` with a row per epoch and a column per seed."""
        return self.epochs[name].unstack("seed").astype(float)


def mean_of(values: Iterable[float]) -> Mean | None:
    """Return the mean and sample standard deviation of the values that are not NaN, or None without any."""
    each = [value for value in values if not math.isnan(value)]
    std = statistics.stdev(each) if len(each) > 1 else math.nan
    return Mean(statistics.fmean(each), std, len(each)) if each else None


def drawn_from_seed(series: Iterable[Series]) -> list[Series]:
    """Return the series whose frozen weights follow from the seed alone, without an --init-from."""
    return [s for s in series if "init_from" not in dict(s.variant)]


def grouped(each: Iterable, key: Callable[..., Hashable]) -> dict[Hashable, list]:
    """Group items by key, in the order of their first appearance."""
    groups: dict[Hashable, list] = {}
    for one in each:
        groups.setdefault(key(one), []).append(one)
    return groups


def setting_names(setting: tuple) -> tuple[str, str]:
    """Return the label and folder of a setting, such as `CIFAR-10, 12 epochs` and `cifar10/12-epochs`."""
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
    """Group runs by setting, longest training first, --quick last; all labels and folders are different."""

    def rank(run: Run) -> tuple:  # depths and widths as numbers, the main modes first
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
    """Group the finished and diverged runs of one setting into series over seeds.

    A dtype other than most runs' sets a run apart, like an option; with `by_machine`, so does the machine.
    """
    dtypes = Counter(run.config.spec.dtype for run in members)
    usual = max(sorted(dtypes), key=dtypes.get)

    def key(run: Run) -> tuple:
        of, dtype = run.config, run.config.spec.dtype
        variant = of.variant if dtype == usual else (*of.variant, ("dtype", dtype))
        return of.options.arch, of.options.mode, variant, of.machine if by_machine else ("", "", "")

    gathered = []
    for names, group in grouped((r for r in members if r.status in ("done", "diverged")), key).items():
        # a seed counts once, even if several machines ran it
        by_seed = {run.config.options.seed: run for run in reversed(group) if run.done}
        diverged = len({run.config.options.seed for run in group}) - len(by_seed)
        done = [by_seed[seed] for seed in sorted(by_seed)]
        analyses = [run.analysis for run in done if run.analysis]
        gathered.append(Series(*names, group[0].config.origin, diverged, *_frames(done), analyses))
    return gathered


def _frames(done: list[Run]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return `results` and `epochs` of finished runs, see Series."""
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
    return results.join(typical), epochs  # medians, as the first epochs may wait or compile
