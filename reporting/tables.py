"""The report's tables: their rows, and their text as CSV, Markdown and LaTeX."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pandas as pd

import records
from reporting.reading import Run
from reporting.series import NO_MEAN, Mean, Series, Setting, drawn_from_seed

REPORTED = pd.read_csv(Path(__file__).with_name("reported.csv"), comment="#")
CELL = ["architecture", "mode", "other options"]  # the first columns of most tables
MARKDOWN = str.maketrans({sign: f"\\{sign}" for sign in r"\`*_{}[]<>#|~$&"})
LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "{}$&#_%"}
    | {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}", "[": "{[}", "*": "{*}"}
    | {"±": r"$\pm$", "×": r"$\times$", "<": r"\textless{}", ">": r"\textgreater{}"}
)


class Table(NamedTuple):
    """Rows under named columns. A cell is text, a number, a Mean or None; `digits` counts decimal places."""

    name: str
    columns: list[str]  # a unit comes last, in parentheses
    rows: list[list]
    digits: int = 2

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether it holds numbers and is therefore right-aligned."""
        return [
            any(isinstance(cell, (int, float, Mean)) for cell in of) for of in zip(*self.rows, strict=True)
        ]

    def texts(self, escapes: dict[int, str]) -> pd.DataFrame:
        """Return the cells as displayed text, with `escapes` (see str.translate) applied."""
        cells = [[self._text(cell).translate(escapes) for cell in row] for row in self.rows]
        return pd.DataFrame(cells, columns=[column.translate(escapes) for column in self.columns])

    def _text(self, cell: object) -> str:
        if isinstance(cell, Mean):
            return cell.text(self.digits) + ("" if "n" in self.columns else f" (n = {cell.n})")
        if isinstance(cell, (int, float)):
            return f"{cell:,}" if isinstance(cell, int) else f"{cell:,.{self.digits}f}"
        return cell or ""

    def files(self) -> dict[str, str]:
        """Return the contents of the table's csv, md and tex files by suffix.

        The CSV has full precision and splits a column of means into three. The LaTeX is a booktabs tabular.
        """
        full = {}
        for column, *cells in zip(self.columns, *self.rows, strict=True):
            if any(isinstance(cell, Mean) for cell in cells):
                name, unit = re.fullmatch(r"(.*?)( \(.*)?", column).groups("")
                means = zip(*(cell or NO_MEAN for cell in cells), strict=True)
                full |= zip((f"{name} mean{unit}", f"{name} std{unit}", f"{name} n"), means, strict=True)
            else:
                full[column] = cells
        markdown, latex = self.texts(MARKDOWN), self.texts(LATEX).style.hide(axis="index")
        sides = ["right" if numbers else "left" for numbers in self.numeric]
        form = "".join(side[0] for side in sides)
        return {
            "csv": pd.DataFrame(full, dtype=object).to_csv(index=False, lineterminator="\n"),
            "md": markdown.to_markdown(index=False, disable_numparse=True, colalign=sides) + "\n",
            "tex": "% \\usepackage{booktabs}\n" + latex.to_latex(hrules=True, column_format=form),
        }


def accuracy(series: list[Series], setting: Setting) -> Table:
    """Return a row per architecture, mode and variant, with published accuracies beside it.

    Published networks without a run here get a row of their own; for CIFAR-10, only after 160 epochs.
    """
    _, epochs, *_ = setting.runs[0].config.setting
    others = REPORTED[REPORTED["data"] == setting.known]
    sources = others["source"].unique()
    shown = others.pivot(index=["mode", "architecture"], columns="source", values="shown")[sources]
    theirs = {network: list(of) for network, of in shown.fillna("").iterrows()}
    some = {
        "final_test_top5_acc": "top 5 (%)",
        "best_val_acc": "best on validation (%)",
        "chosen_test_acc": "test at the best validation epoch (%)",
    }
    some = {name: column for name, column in some.items() if any(len(s.by_seed(name)) for s in series)}
    means = {"final_test_acc": "test accuracy (%)", **some, "best_test_acc": "best epoch (%)"}
    rows, nothing = [], [""] * len(sources)
    for s in series:
        diverged = f"{s.diverged} of {s.done + s.diverged} diverged" if s.diverged else ""
        beside = nothing if s.variant else theirs.pop((s.mode, s.arch), nothing)
        rows.append([s.arch, s.mode, s.variant_text, *map(s.mean, means), diverged, *beside])
    for mode, arch in sorted(theirs, key=lambda key: (key[0] == "all", int(key[1].removeprefix("resnet")))):
        if epochs == 160 or setting.known != "cifar10":
            rows.append([arch, mode, "", *[None] * len(means), "", *theirs[mode, arch]])
    columns = [*CELL, *means.values(), "diverged", *(f"{source} (%)" for source in sources)]
    return Table("accuracy", columns, rows)


def stored(series: list[Series]) -> Table:
    """Return what must be stored of a network besides its seed, and its accuracy, smallest first."""
    rows = []
    alone = (s for s in drawn_from_seed(series) if s.done)
    for s in sorted(alone, key=lambda s: s.mean("checkpoint_bytes").mean):
        kept, full = (round(s.mean(name).mean) for name in ("checkpoint_bytes", "full_bytes"))
        rows.append([s.arch, s.mode, s.variant_text, kept, 100 * kept / full, s.mean("final_test_acc")])
    columns = [*CELL, "stored (bytes)", "of all weights (%)", "test accuracy (%)"]
    return Table("stored", columns, rows)


def parameters(found: list[Run]) -> Table:
    """Return the numbers of all parameters and of trained BatchNorm parameters, and their share."""
    rows = {}  # a dict, so that each row is there once
    for of, summary in ((run.config.options, run.summary) for run in found if run.summary):
        if of.mode in ("bn_only", "bn_main", "gamma", "beta"):
            total, trained = summary.params_total, summary.params_trained
            rows[of.arch, of.shortcut, of.mode, total, trained, 100 * trained / total] = None
    columns = ["architecture", "shortcut", "mode", "parameters", "BatchNorm, trained", "trained (%)"]
    return Table("parameters", columns, list(rows))


def time(series: list[Series]) -> Table:
    """Return the time, memory and bytes of a run, a row per architecture, mode, variant and machine."""
    rows = []
    for s in (s for s in series if s.done):
        means = [s.mean(name) for name in ("train_s", "startup_s", "images_per_s", "epoch_s")]
        means.append(s.mean("peak_memory_bytes", unit=2**20))
        sizes = [round(s.mean(name).mean) for name in ("checkpoint_bytes", "full_bytes")]
        rows.append([s.arch, s.mode, s.variant_text, s.done, *means, *sizes, *s.machine])
    columns = [*CELL, "n", "training (s)", "start-up (s)", "images/s", "epoch (s)", "peak memory (MiB)"]
    columns += ["checkpoint (bytes)", "all weights (bytes)", "device", "number format", "torch"]
    return Table("time", columns, rows, digits=1)


def every_run(found: list[Run]) -> Table:
    rows = []
    for run in found:
        of, summary, more = run.config.options, run.summary, records.variant_text(run.config.variant)
        accs = [summary.final_test_acc, summary.best_test_acc] if summary else [None, None]
        rows.append([run.name, of.arch, of.mode, str(of.seed), more, run.status, run.epochs_done, *accs])
    columns = ["run", "architecture", "mode", "seed", "other options", "status", "epochs done"]
    return Table("runs", [*columns, "test accuracy (%)", "best epoch (%)"], rows)


def not_finished(found: list[Run]) -> Table:
    killed, rows = "no summary.json: it is still running or was killed; --resume continues it", []
    for run in (run for run in found if not run.done):
        why = run.summary.why if run.summary else killed
        rows.append([run.name, run.status, f"{run.epochs_done} of {run.config.options.epochs}", why])
    return Table("not-finished", ["run", "status", "epochs done", "why"], rows)


def machines(found: list[Run]) -> Table:
    made = Counter()
    for of in (run.config for run in found):
        versions = [of.versions.get(name) or "" for name in ("python", "torch", "cuda")]
        made[of.devices, *versions, of.git_commit or ""] += 1
    columns = ["device", "Python", "torch", "CUDA", "git commit", "runs"]
    return Table("machines", columns, [[*key, count] for key, count in sorted(made.items())])
