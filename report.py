"""Turn runs into tables, figures and one self-contained page.

    python report.py runs                      # every run folder in runs/, at any depth, to report/index.html
    python report.py results other/RUN --out report
    python report.py --pack runs > runs.jsonl  # one line per run; report.py reads such a file like folders

Runs are averaged over seeds only. Runs that differ in data, epochs, --quick or training subset are never
mixed: each setting has its own section on the page, and its own folder of figures (PNG, PDF) and tables (CSV,
Markdown, LaTeX). Runs that train.py could not have written are named on stderr and left out. Exit status: 0
done, 1 a drawing process was killed or stdout failed, 2 no usable run or nowhere to write.
"""

import progress  # isort: split

import base64
import concurrent.futures
import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jinja2

import records
from records import files
from reporting import answers, figures, reading, series, tables
from reporting.drawing import render
from reporting.reading import Run
from reporting.series import Setting


def main(argv: list[str] | None = None) -> None:
    parser = progress.Parser("report.py", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="runs: folders, packed, or folders of them")
    parser.add_argument("--out", default="report", help="the folder to write to [report]")
    parser.add_argument("--pack", action="store_true", help="print the runs, one per line; make no report")
    given = parser.parse_args(argv)
    found = reading.read_runs(given.runs, lambda text: progress.note("report.py", progress.printable(text)))
    if given.pack:
        sys.stdout.writelines(run.to_json(None) for run in found)
        return
    try:
        write_report(found, Path(given.out))
    except concurrent.futures.BrokenExecutor:
        why = "a drawing process was killed, perhaps for lack of memory; free some, or name fewer runs"
        raise ChildProcessError(why) from None
    except OSError as error:
        why = f"{error.filename or 'it'} cannot be written ({error.strerror})"
        raise records.RunError(f"--out {given.out}: {why}; name a folder that can") from None


def write_report(found: list[Run], out: Path) -> None:
    """Write `index.html` and one folder of figures and tables per setting into the folder `out`."""
    settings = series.by_setting(found)
    for folder in (out, *out.glob("*/*")):  # including settings that only an earlier report had
        files.remove_half_written(folder)
    processes = min(len(settings), os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(processes, initializer=end_with_this) as pool:
        apart = pool.map if len(settings) > 1 else map  # in parallel, because drawing takes most of the time
        try:
            sections = list(apart(write_section, settings, [out] * len(settings)))
        except BaseException:
            for process in multiprocessing.active_children():  # the pool would wait for them
                process.kill()
            raise
    template = (Path(__file__).parent / "reporting" / "page.html").read_text("utf-8")
    page = jinja2.Template(template, autoescape=True, undefined=jinja2.StrictUndefined)
    sections = list(zip(settings, sections, strict=True))
    text = page.render(sections=sections, machines=tables.machines(found))
    files.write_atomically(out / "index.html", text)


def end_with_this() -> None:
    """Make a drawing process ignore Ctrl-C, which its parent handles, and exit when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def write_section(setting: Setting, out: Path) -> dict[str, Any]:
    """Write the figures and tables of one setting; return what the page's template needs for its section."""
    of, machines = series.series_of(setting.runs), series.series_of(setting.runs, by_machine=True)
    answered = [ask(of) for ask in (answers.warm_starts, answers.retraining, answers.tuning)]
    made = [tables.accuracy(of, setting), *(answer.table for answer in answered)]
    made += [tables.stored(of), tables.parameters(setting.runs), tables.time(machines)]
    made += [tables.not_finished(setting.runs), tables.every_run(setting.runs)]
    names = {table.name for table in made}
    made = [table for table in made if table.rows]
    written = {f"{table.name}.{end}": text for table in made for end, text in table.files().items()}
    drawn, shown = figures.figures_of(of, machines, setting.known == "cifar10"), {}
    drawn |= {answer.table.name: answer.drawn for answer in answered}
    for name, (figure, used) in ((name, one) for name, one in drawn.items() if one):
        pictures, counts = render(figure), [figures.counted(name, s) for s in used]
        shown[name] = {
            "webp": base64.b64encode(pictures.pop("webp")).decode(),
            "width": figure.get_figwidth(),
            "n": (min(counts), max(counts)),
            "diverged": sum(s.diverged for s in used),
        }
        written |= {f"{name}.{end}": content for end, content in pictures.items()}
    (out / setting.folder).mkdir(parents=True, exist_ok=True)
    for name, content in written.items():
        files.write_atomically(out / setting.folder / name, content)
    for name in itertools.product(names | drawn.keys(), ("csv", "md", "tex", "png", "pdf")):
        if (file := ".".join(name)) not in written:  # an earlier report's
            (out / setting.folder / file).unlink(missing_ok=True)
    answer_texts = {answer.table.name: answer.text for answer in answered}
    return {"tables": made, "figures": shown, "answers": answer_texts}


if __name__ == "__main__":
    sys.exit(progress.run("report.py", main))
