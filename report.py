"""Finished runs in; tables, figures and one self-contained page out.

    python report.py runs                  # every run folder in runs/, at any depth, to report/index.html
    python report.py results other/RUN --out report

Runs are averaged over seeds alone. Data, epochs, --quick and training subsets are never mixed: each has its
own section, figures (PNG, PDF) and tables (CSV, Markdown, LaTeX). A folder that train.py would not have left
is named on stderr and left out. Exit status: 0 done, 2 no usable run or nowhere to write.
"""

import argparse
import base64
import concurrent.futures
import itertools
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NoReturn

import runs
from reporting import answers, figures, tables
from reporting import reading as finished
from reporting import series as gather
from reporting.answers import Answer
from reporting.drawing import render
from reporting.reading import Run
from reporting.series import Series
from reporting.tables import Table, as_csv, as_html, as_latex, as_markdown, e


def drawings(
    series: list[Series], machines: list[Series], answered: list[Answer], whole: bool
) -> list[tuple]:
    """(name, title, caption, figure and its series or None, what would give it): each figure of a setting."""
    deviation = "Error bars are one sample standard deviation over seeds. "
    final = "After the last epoch. " + deviation
    band = "Mean over seeds, in a band of one sample standard deviation; dashed in training, solid in test. "
    others = placed = ""
    if whole:
        others = (
            "Hollow are values others report on the official CIFAR-10 after 160 epochs: squares the paper "
        )
        others += (
            "(arXiv 2003.00152; those of everything trained are approximate), diamonds a TensorFlow port. "
        )
        placed = "They stand at the parameter counts of the paper's networks. "
    zero = "After every gamma of a magnitude under the threshold is set to zero. " + deviation
    gamma = "Mean over seeds, of modes that train gamma; the outermost bins hold what lies beyond. Above "
    gamma += "each panel is the share of gammas of a magnitude under 0.01. "
    silent = "Mean over seeds. A ReLU is silent where it gives 0; above each panel is the share of channels "
    silent += "that are silent at every position of every test image. "
    size = "Bytes of the seed, trained tensors and BatchNorm statistics, beside those of every weight. "
    shared = deviation + "Runs side by side in one process share its time and its memory. "

    at_depths, at_params = (
        figures.references(series, by_params) if whole else [] for by_params in (False, True)
    )
    gammas = ("gamma", "share_under_0.01", "|γ| < 0.01", "learned γ", "share of γ per bin (%)")
    relus = ("relu", "silent", "always silent", "(image, position) pairs silent (%)")
    cifar, metrics = "python train.py --arch resnet14", "the runs' metrics.jsonl"
    analyse, done = "python analysis.py RUNS", "runs that are done"
    grid = "GRID={} bash sweep.sh".format
    draw = figures
    return [
        ("depth", "Test accuracy against depth", final + others, draw.depth(series, at_depths), cifar),
        (
            *("trained", "Test accuracy against trained parameters", final + others + placed),
            *(draw.trained(series, at_params), cifar),
        ),
        ("loss", "Loss per epoch", band, draw.curves(series, "loss"), metrics),
        ("accuracy", "Accuracy per epoch", band, draw.curves(series, "acc"), metrics),
        ("width", "Test accuracy against width", final, draw.width(series), grid("width")),
        ("gamma", "Learned gammas", gamma, draw.histograms(series, *gammas), analyse),
        ("pruned", "Small gammas set to zero", zero, draw.pruned(series), analyse),
        ("relu", "Silent ReLUs", silent, draw.histograms(series, *relus, "channels (%)"), analyse),
        ("checkpoint", "Seed checkpoint against all weights", size, draw.checkpoints(series), done),
        ("cost", "Time and memory of a run", shared, draw.costs(machines), done),
        ("parts", "Test accuracy by what trains", final, draw.parts(series), grid("parts")),
        ("starts", "Test accuracy by initialisation", final, draw.starts(series), grid("init")),
        *(
            (*(a.table.name, a.table.title, f"{a.text} {final}{a.note}"), a.drawn, grid(a.table.name))
            for a in answered
        ),
    ]


def section(label: str, slug: str, members: list[Run], out: Path) -> str:
    """One setting's part of the page; writes its figures and tables on the way."""
    series, machines = gather.series_of(members), gather.series_of(members, by_machine=True)
    data_title = members[0].config["data_title"]
    cifar10 = re.fullmatch(r"CIFAR-10( \(not the official bytes\))?", data_title) is not None
    _, epochs, quick, subset, held_out, _, _ = members[0].setting
    whole = cifar10 and not (quick or subset or held_out)
    done = sum(run.summary["status"] == "done" for run in members)
    ended = f"{done} run{'s' if done != 1 else ''} done"
    ended += f", {len(members) - done} not finished" if done < len(members) else ""
    parts = [f'<section id="{slug}">\n<h2>{e(label)}</h2>\n<p>{ended}.</p>\n']

    def add(table: Table, note: str = "") -> None:
        if table.rows:
            links = []
            for kind, form in (("csv", as_csv), ("md", as_markdown), ("tex", as_latex)):
                file = f"tables/{slug}-{table.name}.{kind}"
                runs.write_atomically(out / file, form(table).encode("utf-8"))
                links.append(f'<a href="{file}">{kind}</a>')
            parts.append(as_html(table, note, " ".join(links)))

    note = "Mean ± sample standard deviation over seeds."
    note += " The best epoch is chosen on the test set, of those that were tested: not a result."
    note += " Device and number format are not told apart; a seed counts once."
    note += " Paper and port: the official CIFAR-10, 160 epochs." if whole else ""
    add(tables.accuracy_table(series, whole, whole and epochs == 160), note)
    missing = []
    answered = [ask(series) for ask in (answers.warm_starts, answers.retraining, answers.recipes)]
    for name, title, caption, drawn, source in drawings(series, machines, answered, whole):
        if drawn is None:
            missing.append(f"<li>{e(title)}: needs <code>{e(source)}</code></li>\n")
            continue
        figure, used = drawn
        analysed = name in ("gamma", "pruned", "relu")
        counted = [len(s.analyses) if analysed else s.done for s in used]
        if name in ("loss", "accuracy"):
            counted = [len(s.curves["train_loss"]) for s in used]
        counts = sorted(set(counted))
        caption += f"n = {counts[0]}" + (f" to {counts[-1]}" if counts[1:] else "") + " per mean."
        left_out = sum(s.diverged for s in used)
        caption += f" {left_out} diverged runs are left out." if left_out else ""
        files = render(figure)
        links = []
        for kind in ("png", "pdf"):
            file = f"figures/{slug}-{name}.{kind}"
            runs.write_atomically(out / file, files[kind])
            links.append(f'<a href="{file}">{kind}</a>')
        source = f"data:image/webp;base64,{base64.b64encode(files['webp']).decode()}"
        image = f'<img src="{source}" alt="{e(title)}" style="width:{figure.get_figwidth():.2f}in">'
        text = f"<b>{e(title)}.</b> {e(caption)} {' '.join(links)}"
        parts.append(f"<figure>{image}\n<figcaption>{text}</figcaption></figure>\n")
    for answer in answered:
        add(answer.table, answer.note)
    add(tables.parameter_table(members))
    add(
        tables.time_table(machines),
        "Epoch and images/s: the median of a run's epochs; images/s is of training alone. "
        "Runs side by side in one process share its time and its memory; one that started from another has "
        "its own time alone.",
    )
    add(tables.not_finished_table(members))
    add(tables.runs_table(members))
    if missing:
        parts.append(f"<h3>Not shown, for want of data</h3>\n<ul>{''.join(missing)}</ul>\n")
    return "".join(parts) + "</section>\n"


def slugs(labels: list[str]) -> list[str]:
    """A name for files and anchors per label, no two alike."""
    made: list[str] = []
    for label in labels:
        slug = base = re.sub("[^a-z0-9]+", "-", label.lower()).strip("-")[:80] or "data"
        for number in range(2, len(labels) + 2):
            if slug in made:
                slug = f"{base}-{number}"
        made.append(slug)
    return made


def write_report(found: list[Run], out: Path) -> None:
    """`index.html`, `figures/` and `tables/` of the runs, in the folder `out`."""
    for folder in ("figures", "tables"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    settings = gather.by_setting(found)
    names = slugs(list(settings))
    contents = ""
    if len(settings) > 1:
        items = (
            f'<li><a href="#{slug}">{e(label)}</a></li>' for slug, label in zip(names, settings, strict=True)
        )
        contents = f"<nav><ul>{''.join(items)}</ul></nav>\n"
    with concurrent.futures.ProcessPoolExecutor(min(len(settings), os.cpu_count() or 1)) as pool:
        apart = pool.map if len(settings) > 1 else map  # drawing takes most of the time
        body = list(apart(section, settings, names, settings.values(), itertools.repeat(out)))
    made = Counter()
    for run in found:
        versions = [run.config["versions"].get(name) or "" for name in ("python", "torch", "cuda")]
        made[(run.config["device_name"], *versions, run.config.get("git_commit") or "")] += 1
    columns = ["device", "Python", "torch", "CUDA", "git commit", "runs"]
    where = Table("machines", "Machines and versions", columns, [[*key, made[key]] for key in sorted(made)])
    foot = as_html(where, "", "")
    runs.write_atomically(
        out / "index.html", PAGE.format(contents=contents, body="".join(body), foot=foot).encode()
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training BatchNorm and only BatchNorm: results</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 66rem;
  margin: 2rem auto; padding: 0 1rem; }}
h1, h2, h3 {{ line-height: 1.25; overflow-wrap: anywhere; }}
h2 {{ margin-top: 3rem; padding-top: 1rem; border-top: 2px solid #222; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .85rem; border-top: 1.5px solid; border-bottom: 1.5px solid; }}
th, td {{ padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top; white-space: nowrap; }}
td {{ max-width: 32rem; overflow-wrap: anywhere; }}
thead th {{ border-bottom: 1px solid; vertical-align: bottom; }}
tbody tr + tr td {{ border-top: 1px solid #e8e8e8; }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
figure {{ margin: 2.5rem 0; }}
img {{ max-width: 100%; height: auto; }}
figcaption, .note {{ font-size: .85rem; color: #555; max-width: 45rem; }}
a {{ color: #0060a0; }}
@media print {{ body {{ font-size: 10pt; max-width: none; }} figure, tr {{ break-inside: avoid; }}
  th, td {{ white-space: normal; }} }}
</style>
</head>
<body>
<h1>Training BatchNorm and only BatchNorm: results</h1>
<p>Test accuracies are of the last epoch, in percent, averaged over seeds alone.</p>
{contents}{body}<footer>
{foot}</footer>
</body>
</html>
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def refuse(message: str) -> NoReturn:
        raise finished.NoRuns(f"{message}; python report.py --help shows how")

    parser.error = refuse
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or folders that hold some")
    parser.add_argument("--out", default="report", help="the folder to write [report]")
    try:
        options = parser.parse_args(argv)
        write_report(finished.read_runs(options.runs), Path(options.out))
    except (finished.NoRuns, runs.RunError) as error:
        finished.note(str(error))
        return 2
    except OSError as error:
        why = f"{error.filename or 'it'} cannot be written ({error.strerror})"
        finished.note(f"--out {options.out}: {why}; name a folder that can")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
