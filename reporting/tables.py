"""The report's tables: their rows, and as CSV, Markdown, LaTeX and HTML."""

import csv
import html
import io
import re
from typing import NamedTuple

from config import variant_text
from reporting.reading import Run
from reporting.series import Mean, Series, mean_of

# Test accuracy on CIFAR-10 in percent: of the paper (arXiv 2003.00152; about, where everything trains), of
# the TensorFlow community port, and of a Keras study (Adam, batches of 1024; without and with augmentation)
REPORTED = {
    "paper": {
        "bn_only": {"resnet14": "48", "resnet110": "69.5", "resnet866": "82"},
        "all": {"resnet14": "about 91", "resnet110": "about 93.3", "resnet866": "about 93"},
    },
    "TensorFlow port": {
        "bn_only": {
            **{"resnet14": "46.7", "resnet32": "51.3", "resnet56": "55.2", "resnet110": "65.2"},
            **{"resnet218": "70.1", "resnet434": "73.7", "resnet866": "77.8"},
        },
    },
    "Keras study": {"bn_only": {"resnet50": "69 and 73"}, "all": {"resnet50": "86"}},
}


def reported(arch: str, mode: str) -> list[str]:
    """What each of REPORTED has of it, or nothing."""
    return [of.get(mode, {}).get(arch, "") for of in REPORTED.values()]


class Table(NamedTuple):
    """Rows under named columns. A cell is a text, a number, a Mean or None; `digits` come after the point."""

    name: str
    title: str
    columns: list[str]  # with units
    rows: list[list]
    digits: int = 2
    says_n: bool = False  # beside each mean, where no column does


def accuracy_table(series: list[Series], cifar10: bool, others: bool) -> Table:
    """Ours beside what others report: a row per architecture, mode, variant; `others`: also without ours."""
    columns = ["architecture", "mode", "other options", "test accuracy (%)", "best epoch (%)", "diverged"]
    more = {"final_test_top5_acc": "top 5 (%)", "best_val_acc": "best on validation (%)"}
    more |= {"chosen_test_acc": "test, at validation's best epoch (%)"}
    more = {name: column for name, column in more.items() if any(s.values[name] for s in series)}
    columns[4:4] = more.values()
    columns += [f"{who} (%)" for who in REPORTED] if cifar10 else []
    rows = []
    for s in series:
        diverged = f"{s.diverged} of {s.done + s.diverged} diverged" if s.diverged else ""
        row = [s.arch, s.mode, s.variant, s.mean("final_test_acc"), *map(s.mean, more)]
        row += [s.mean("best_test_acc"), diverged]
        theirs = [""] * len(REPORTED) if s.variant else reported(s.arch, s.mode)
        rows.append(row + (theirs if cifar10 else []))
    ours = {(s.arch, s.mode) for s in series if not s.variant}
    named = {(mode, arch) for of in REPORTED.values() for mode in of for arch in of[mode]}
    named = named if cifar10 and others else ()
    for mode, arch in sorted(named, key=lambda key: (key[0] == "all", int(key[1].removeprefix("resnet")))):
        if (arch, mode) not in ours:
            rows.append([arch, mode, "", None, *[None] * len(more), None, "", *reported(arch, mode)])
    return Table(
        "accuracy", "Test accuracy after the last epoch, and of the best epoch", columns, rows, 2, True
    )


def parameter_table(found: list[Run]) -> Table:
    """All parameters, those of BatchNorm that train, and their share."""
    columns = ["architecture", "shortcut", "mode", "parameters", "BatchNorm, trained", "trained (%)"]
    rows = {}
    for run in found:
        mode, total = run.options["mode"], run.summary["params_total"]
        if mode in ("bn_only", "bn_main") and total:
            trained = run.summary["params_trained"]
            row = [run.options["arch"], run.options["shortcut"], mode, total, trained, 100 * trained / total]
            rows[tuple(row)] = row
    return Table("parameters", "Parameters, and those of BatchNorm that train", columns, list(rows.values()))


def time_table(series: list[Series]) -> Table:
    """What a run takes: one row per architecture, mode, variant and machine."""
    columns = ["architecture", "mode", "other options", "n", "training (s)", "start-up (s)", "images/s"]
    columns += ["epoch (s)", "peak memory (MiB)", "checkpoint (bytes)", "all weights (bytes)"]
    columns += ["device", "computed in", "torch"]
    rows = []
    for s in filter(lambda s: s.done, series):
        peak = mean_of([size / 2**20 for size in s.values["peak_memory_bytes"]])
        means = [s.mean(name) for name in ("train_s", "startup_s", "images_per_s", "epoch_s")]
        sizes = [round(s.mean(name).mean) for name in ("checkpoint_bytes", "full_bytes")]
        rows.append([s.arch, s.mode, s.variant, s.done, *means, peak, *sizes, *s.machine])
    return Table("time", "Time and memory of a run", columns, rows, 1)


def runs_table(found: list[Run]) -> Table:
    columns = ["run", "architecture", "mode", "seed", "other options", "status", "epochs done"]
    columns += ["test accuracy (%)", "best epoch (%)"]
    rows = []
    for run in found:
        o, s = run.options, run.summary
        row = [
            run.folder,
            o["arch"],
            o["mode"],
            str(o["seed"]),
            variant_text(run.variant),
            s["status"],
        ]
        rows.append([*row, s["epochs_done"], s["final_test_acc"], s["best_test_acc"]])
    return Table("runs", "Every run", columns, rows)


def not_finished_table(found: list[Run]) -> Table:
    rows = []
    for run in found:
        if run.summary["status"] != "done":
            epochs = f"{run.summary['epochs_done']} of {run.options['epochs']}"
            rows.append([run.folder, run.summary["status"], epochs, run.summary["why"] or ""])
    return Table("not-finished", "Not finished", ["run", "status", "epochs done", "why"], rows)


def shown(cell: object, table: Table) -> str:
    """A cell as people read it."""
    if isinstance(cell, Mean):
        text = f"{cell.mean:,.{table.digits}f}"
        text += "" if cell.std is None else f" ± {cell.std:,.{table.digits}f}"
        return f"{text} (n = {cell.n})" if table.says_n else text
    if isinstance(cell, (int, float)):
        return f"{cell:,}" if isinstance(cell, int) else f"{cell:,.{table.digits}f}"
    return cell or ""


def as_csv(table: Table) -> str:
    """Full precision; a column of means becomes three: mean, std, n."""
    means = [any(isinstance(row[i], Mean) for row in table.rows) for i in range(len(table.columns))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header: list[str] = []
    for name, is_mean in zip(table.columns, means, strict=True):
        what, unit = re.fullmatch(r"(.*?)( \(.*\))?", name).groups()
        unit = unit or ""
        header += [f"{what} mean{unit}", f"{what} std{unit}", f"{what} n"] if is_mean else [name]
    writer.writerow(header)
    for row in table.rows:
        cells: list[object] = []
        for cell, is_mean in zip(row, means, strict=True):
            cells += (cell or (None, None, 0)) if is_mean else [cell]
        writer.writerow(cells)
    return out.getvalue()


def numeric(table: Table) -> list[bool]:
    """Which columns hold numbers, and stand at the right."""
    columns = range(len(table.columns))
    return [any(isinstance(row[i], (int, float, Mean)) for row in table.rows) for i in columns]


def as_markdown(table: Table) -> str:
    def escape(text: str) -> str:
        return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", text)

    rules = ["---:" if right else "---" for right in numeric(table)]
    rows = [[escape(shown(cell, table)) for cell in row] for row in table.rows]
    lines = [[escape(name) for name in table.columns], rules, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_latex(table: Table) -> str:
    """A tabular of the booktabs package."""
    signs = {c: f"\\{c}" for c in "{}$&#_%"} | {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}"}
    signs |= {
        "[": "{[}",
        "*": "{*}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    }

    def line(cells: list[str]) -> str:
        return " & ".join(cell.translate(str.maketrans(signs)) for cell in cells) + r" \\" + "\n"

    columns = "".join("r" if right else "l" for right in numeric(table))
    text = f"% \\usepackage{{booktabs}}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n"
    text += line(table.columns) + "\\midrule\n"
    text += "".join(line([shown(cell, table) for cell in row]) for row in table.rows)
    return text + "\\bottomrule\n\\end{tabular}\n"


def as_html(table: Table, note: str, links: str) -> str:
    sides = [' class="n"' if right else "" for right in numeric(table)]

    def line(cells: list[str], tag: str) -> str:
        each = (f"<{tag}{side}>{e(cell)}</{tag}>" for cell, side in zip(cells, sides, strict=True))
        return f"<tr>{''.join(each)}</tr>\n"

    body = "".join(line([shown(cell, table) for cell in row], "td") for row in table.rows)
    head = line(table.columns, "th")
    text = f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>{body}</tbody>\n</table></div>'
    if len(table.rows) > 40:
        text = f"<details><summary>{len(table.rows):,} rows</summary>{text}</details>"
    return f'<h3>{e(table.title)}</h3>\n{text}\n<p class="note">{note} {links}</p>\n'


def e(text: object) -> str:
    return html.escape(str(text))
