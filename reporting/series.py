"""Runs gathered: into settings, which are never mixed, and in each into series over seeds."""

import dataclasses
import re
import statistics
from typing import NamedTuple

import numpy as np
from provenance import Start

from config import variant_text
from reporting.reading import SUMMARY, Run

CURVES = ("train_loss", "train_acc", "test_loss", "test_acc", "val_acc")


class Mean(NamedTuple):
    """A mean, its sample standard deviation (None where n is 1), and of how many."""

    mean: float
    std: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class Series:
    """Runs that differ in their seed alone: of one architecture and mode, with the same other options.

    values: per name of a summary's field, one number per run. curves: per name of CURVES, an array [runs,
    epochs] from the first epoch of what they started from, NaN where there was no test, or no epoch of their
    own; `seconds`: the time until then, were all epochs the run's median one. analyses: what analysis.json
    held, of the runs that have one.
    """

    arch: str
    mode: str
    options: tuple[tuple[str, object], ...]  # those that differ from the published, and their values
    machine: tuple[str, str, str]  # device, how it computed, torch; empty texts where they do not matter
    start: Start | None  # the run that they started from, on the same images
    done: int
    diverged: int
    seeds: list[int]  # of those done, in the order of values and analyses
    machines: list[tuple[str, str, str]]  # of those done
    values: dict[str, list[float]]
    curves: dict[str, np.ndarray]
    analyses: list[dict]

    @property
    def variant(self) -> str:
        return variant_text(self.options)

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self.mode, self.variant)))

    def mean(self, name: str) -> Mean | None:
        return mean_of(self.values[name])


def mean_of(values: list[float]) -> Mean | None:
    """Mean and sample standard deviation; None of nothing."""
    if not values:
        return None
    return Mean(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def setting_label(setting: tuple) -> str:
    """`CIFAR-10, 4 epochs, --quick, 3,000 training images`; the fingerprint is left out."""
    title, epochs, quick, subset, held_out, size, _ = setting
    parts = [title, f"{epochs} epoch{'s' if epochs > 1 else ''}"]
    parts += ["--quick"] if quick else []
    parts += [f"{subset:,} training images"] if subset else []
    parts += [f"{held_out:,} for validation"] if held_out else []
    parts += [f"{size}x{size} pixels"] if size not in (None, 32) else []
    return ", ".join(parts)


def by_setting(found: list[Run]) -> dict[str, list[Run]]:
    """Runs by their setting's label, the longest training first; every label is of one setting."""
    settings: dict[tuple, list[Run]] = {}
    for run in found:
        settings.setdefault(run.setting, []).append(run)
    labels = [setting_label(setting) for setting in settings]
    named = {}
    for label, (setting, members) in zip(labels, settings.items(), strict=True):
        told = f"{label}, data {setting[-1] or 'without a fingerprint'}" if labels.count(label) > 1 else label
        while told in named:
            told += "'"
        named[told] = sorted(members, key=lambda run: (*_place(run), run.options["seed"], run.folder))
    first = {label: (runs[0].options["quick"], -runs[0].setting[1]) for label, runs in named.items()}
    return dict(sorted(named.items(), key=lambda item: (*first[item[0]], -len(item[1]), item[0])))


def series_of(members: list[Run], by_machine: bool = False) -> list[Series]:
    """The runs of one setting gathered over seeds: what is done, and how many diverged."""
    groups: dict[tuple, dict[tuple, Run]] = {}
    for run in members:
        if run.summary["status"] in ("done", "diverged"):
            machine = run.machine if by_machine else ("", "", "")
            group = groups.setdefault((run.options["arch"], run.options["mode"], run.variant, machine), {})
            before = group.get(run.options["seed"])  # which counts once, on however many machines it ran
            if before is None or before.summary["status"] != "done":
                group[run.options["seed"]] = run
    gathered = []
    for key, group in groups.items():
        each = list(group.values())
        done = [run for run in each if run.summary["status"] == "done"]
        numbers = [name for name, (kind, *_) in SUMMARY.items() if kind is not str]
        values = {
            name: [run.summary[name] for run in done if run.summary[name] is not None] for name in numbers
        }
        before = [run.start or {} for run in done]
        values["start_test_acc"] = [
            start["test_acc"] for start in before if start.get("test_acc") is not None
        ]
        having = [run for run in done if run.epochs]
        for name in ("epoch_s", "images_per_s"):  # of a typical epoch: the first ones may wait or compile
            rows = [[row[name] for row in run.epochs if row[name] is not None] for run in having]
            values[name] = [statistics.median(one) for one in rows if one]
        curves = {name: curve(having, name) for name in CURVES if having}
        if having:
            epoch_s = curve(having, "epoch_s")
            number, typical = np.arange(epoch_s.shape[1]) + 1, np.nanmedian(epoch_s, axis=1, keepdims=True)
            first, seconds = np.array([run.before for run in having]).T[..., None]
            curves["seconds"] = np.where(np.isnan(epoch_s), np.nan, seconds + (number - first) * typical)
        analyses = [run.analysis for run in done if run.analysis]
        of_each = [run.options["seed"] for run in done], [run.machine for run in done]
        counts = len(done), len(each) - len(done)
        gathered.append(Series(*key, each[0].began, *counts, *of_each, values, curves, analyses))
    return gathered


def curve(each: list[Run], name: str) -> np.ndarray:
    """`name` per run and epoch, [runs, epochs], NaN where there is none."""
    found = np.full((len(each), max(run.before[0] + len(run.epochs) for run in each)), np.nan)
    for row, run in zip(found, each, strict=True):
        row[run.before[0] :][: len(run.epochs)] = [epoch[name] for epoch in run.epochs]
    return found


def _place(run: Run) -> tuple:
    """Where a run stands among others: depths and widths as numbers, the modes most compared first."""
    first = ("all", "bn_only", "bn_main", "random")
    mode = run.options["mode"]
    rank = first.index(mode) if mode in first else len(first)
    arch = re.split("([0-9]{1,9})", run.options["arch"])
    arch[1::2] = map(int, arch[1::2])
    return arch, rank, mode, len(run.variant), str(run.variant)
