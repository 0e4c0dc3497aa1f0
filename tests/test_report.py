"""The report has the runs' numbers, fetches nothing, and is the same each time it is made."""

import base64
import csv
import io
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import write_run
from PIL import Image

import progress
import report
from records import files

DATA = "cifar10"


def render(*given: Path, out: Path) -> tuple[int, str]:
    """Write a report of `given` to `out`; return its exit status, and its page or "" if there is none."""
    status = run([*map(str, given), "--out", str(out)])
    return status, (out / "index.html").read_text() if status == 0 else ""


def run(arguments: list[str]) -> int:
    return progress.run("report.py", lambda: report.main(arguments))


def rows_of(out: Path, name: str) -> list[dict]:
    """Return the rows of the CSV tables `name` of all settings."""
    return [row for file in sorted(out.rglob(f"{name}.csv")) for row in csv.DictReader(file.open())]


def summaries(root: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(root.rglob("summary.json"))]


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Path, Path, str]:
    """Return a folder of runs that fill every figure, the folder of their report, and its page."""
    root, out = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("report")
    for arch, mode in (("resnet14", "bn_only"), ("resnet32", "bn_only"), ("resnet14", "all")):
        for seed in range(3):
            write_run(root / "deep" / "er", arch, mode, seed)
    write_run(root, "resnet14_w2", "bn_only")
    write_run(root, "resnet14", "bn+output")
    write_run(root, "resnet14", "bn_only", bn_init="ones")
    why = "the loss is not finite at epoch 2, step 7; try a lower --lr"
    write_run(root, "resnet14", "all", 3, analysis=False, status="diverged", why=why, final_test_acc=None)
    (write_run(root, "resnet32", "all", 5, analysis=False) / "summary.json").unlink()
    status, page = render(root, out=out)
    assert status == 0
    return root, out, page


def test_means_match_the_summaries(full):
    root, out, page = full
    row = next(
        row
        for row in rows_of(out, "accuracy")
        if (row["architecture"], row["mode"]) == ("resnet32", "bn_only")
    )
    accs = [s["final_test_acc"] for s in summaries(root) if (s["arch"], s["mode"]) == ("resnet32", "bn_only")]
    assert float(row["test accuracy mean (%)"]) == statistics.fmean(accs)
    assert float(row["test accuracy std (%)"]) == statistics.stdev(accs) and row["test accuracy n"] == "3"
    assert f"{statistics.fmean(accs):.2f} ± {statistics.stdev(accs):.2f} (n = 3)" in page
    time = next(row for row in rows_of(out, "time") if row["architecture"] == "resnet32")
    seconds = [s["train_s"] for s in summaries(root) if (s["arch"], s["mode"]) == ("resnet32", "bn_only")]
    assert float(time["training mean (s)"]) == statistics.fmean(seconds)


def test_a_single_seed_is_shown_as_n_1_without_standard_deviation(full):
    root, out, page = full
    [acc] = [s["final_test_acc"] for s in summaries(root) if s["arch"] == "resnet14_w2"]
    row = next(row for row in rows_of(out, "accuracy") if row["architecture"] == "resnet14_w2")
    assert row["test accuracy std (%)"] == "" and float(row["test accuracy mean (%)"]) == acc
    assert f">{acc:.2f} (n = 1)<" in page


def test_every_run_has_a_row(full):
    root, out, _ = full
    rows = {(r["architecture"], r["mode"], r["seed"], r["other options"]): r for r in rows_of(out, "runs")}
    assert len(rows) == len(list(root.rglob("config.json")))
    for s in summaries(root):
        options = "bn_init ones" if s["variant"] else ""
        shown = rows[s["arch"], s["mode"], str(s["seed"]), options]["test accuracy (%)"]
        assert shown == ("" if s["final_test_acc"] is None else str(s["final_test_acc"]))


def test_published_accuracies_are_shown_beside_ours(full):
    _, out, page = full
    row = next(row for row in rows_of(out, "accuracy") if row["architecture"] == "resnet14")
    assert (row["mode"], row["paper (%)"]) == ("all", "about 91")
    assert "46.7" in page and "TensorFlow port" in page and "Hollow markers are published values" in page


def test_diverged_and_unfinished_runs_are_shown(full):
    _, out, page = full
    assert "1 of 4 diverged" in page and "step 7; try a lower --lr" in page
    assert "1 diverged run is left out" in page and "12 runs done, 2 not finished" in page
    states = {row["status"]: row for row in rows_of(out, "not-finished")}
    assert states["diverged"]["epochs done"] == "4 of 4" and "--resume" in states["not ended"]["why"]


FIGURES = {
    *("depth", "trained", "loss", "accuracy", "width", "gamma"),
    *("pruned", "relu", "checkpoint", "stored", "cost", "parts", "init"),
}


def test_all_figures_and_tables_are_written(full):
    _, out, page = full
    folder = out / DATA / "4-epochs"
    for kind, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        files = list(folder.glob(f"*.{kind}"))
        assert {file.stem for file in files} == FIGURES
        assert all(file.read_bytes().startswith(start) for file in files)
    shown = [
        Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"webp;base64,([^\"]+)", page)
    ]
    shown = {image.convert("RGB").tobytes() for image in shown}
    assert shown == {Image.open(file).convert("RGB").tobytes() for file in folder.glob("*.png")}
    for name in ("accuracy", "parameters", "time", "runs", "not-finished"):
        assert {f".{kind}" for kind in ("csv", "md", "tex")} <= {f.suffix for f in folder.glob(f"{name}.*")}


def test_the_page_fetches_nothing(full):
    _, out, page = full
    fetched, linked = [], []

    class Page(HTMLParser):
        def handle_starttag(self, tag, attributes):
            given = dict(attributes)
            fetched.extend([given.get("src", "data:")] + [given.get("href", "data:")] * (tag == "link"))
            if tag == "a" and not given["href"].startswith("#"):
                linked.append(out / given["href"])
            assert tag != "script"

    Page().feed(page)
    assert all(address.startswith("data:") for address in fetched) and "url(" not in page
    assert set(linked) == {file for file in out.rglob("*.*") if file.name != "index.html"}


def test_the_same_runs_give_the_same_files(tmp_path, monkeypatch):
    write_run(tmp_path / "runs", analysis=False)
    for clock in (1e9, 1.5e9):
        monkeypatch.setattr("time.time", lambda clock=clock: clock)
        assert render(tmp_path / "runs", out=tmp_path / str(clock))[0] == 0
    files = [file for file in (tmp_path / str(1e9)).rglob("*") if file.is_file()]
    assert len(files) > 10
    for file in files:
        assert (
            file.read_bytes() == (tmp_path / str(1.5e9) / file.relative_to(tmp_path / str(1e9))).read_bytes()
        )


def test_what_an_earlier_report_showed_and_this_one_does_not_is_removed(tmp_path):
    out = tmp_path / "report"
    folder = write_run(tmp_path / "runs", analysis=False)
    why = {"why": "the loss is not finite", "final_test_acc": None}
    write_run(tmp_path / "runs", seed=1, analysis=False, status="diverged", **why)
    write_run(tmp_path / "runs", "resnet32", analysis=False)
    assert render(tmp_path / "runs", out=out)[0] == 0
    (shown,) = (file.parent for file in out.rglob("not-finished.md"))
    (shown / "mine.png").touch()
    before = {file.name for file in shown.iterdir()}
    assert render(folder, out=out)[0] == 0
    left = {file.name for file in shown.iterdir()}
    assert left < before and {"mine.png", "runs.csv"} <= left and "not-finished.md" not in left
    assert render(folder, out=tmp_path / "new")[0] == 0
    assert left == {file.name for file in (tmp_path / "new" / shown.relative_to(out)).iterdir()} | {
        "mine.png"
    }


def test_temporary_files_of_a_killed_report_are_removed(tmp_path):
    other = tmp_path / "other-data" / "5-epochs"
    other.mkdir(parents=True)
    for folder in (tmp_path, other):
        (folder / f".index.html.0{files.HALF_WRITTEN}").write_text("half")
    write_run(tmp_path / "runs", "resnet14", "bn_only")
    assert render(tmp_path / "runs", out=tmp_path)[0] == 0
    assert not list(tmp_path.rglob(".*"))


@pytest.fixture
def two_sections(tmp_path) -> list[str]:
    """Return the arguments of a report with two sections, which processes draw in parallel."""
    for epochs in (4, 6):
        write_run(tmp_path / "runs", epochs=epochs, analysis=False)
    return [str(tmp_path / "runs"), "--out", str(tmp_path / "report")]


def test_an_interrupted_report_does_not_wait_for_drawing_processes(two_sections, monkeypatch, capsys):
    monkeypatch.setattr(report, "render", lambda _: (os.kill(os.getppid(), signal.SIGTERM), time.sleep(30)))
    began = time.monotonic()
    assert run(two_sections) == 1 and time.monotonic() - began < 20
    assert capsys.readouterr().err == "report.py: interrupted\n" and not multiprocessing.active_children()


def test_a_killed_drawing_process_is_reported_in_one_line(two_sections, monkeypatch, capsys):
    monkeypatch.setattr(report, "render", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    assert run(two_sections) == 1
    said = capsys.readouterr().err
    assert "a drawing process was killed" in said and said.count("\n") == 1


def test_a_killed_report_leaves_no_process(two_sections, monkeypatch, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setattr(report, "render", lambda _: ((marks / str(os.getpid())).touch(), time.sleep(60)))
    whole = multiprocessing.get_context("fork").Process(target=report.main, args=[two_sections])
    whole.start()
    while whole.is_alive() and not list(marks.iterdir()):
        time.sleep(0.05)
    whole.kill()
    whole.join()
    assert list(marks.iterdir()), "it drew"
    for mark in marks.iterdir():
        deadline = time.monotonic() + 10
        while (state := state_of(mark.name)) not in "ZX":  # Z: ended, but not yet waited for
            assert time.monotonic() < deadline, state
            time.sleep(0.05)


def state_of(process: str) -> str:
    """Return the letter of a process's state, see proc(5), or X if there is no such process."""
    status = Path("/proc", process, "status")
    return re.search(r"State:\s+(\w)", status.read_text())[1] if status.exists() else "X"


def test_packed_runs_give_the_same_report(full, tmp_path, capsys):
    root, _, page = full
    assert run(["--pack", str(root)]) == 0
    packed = capsys.readouterr().out
    assert len(packed.splitlines()) == len(list(root.rglob("config.json")))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "grid.jsonl").write_text(packed)
    for given in (tmp_path / "in" / "grid.jsonl", tmp_path / "in"):
        assert render(given, out=tmp_path / given.stem)[1] == page
    assert run(["--pack", str(tmp_path / "in")]) == 0
    assert capsys.readouterr().out == packed


def test_special_characters_in_names_are_escaped_everywhere(tmp_path):
    nasty = "<script>alert(1)</script> $x^2$ \\input{a} 50% & _|_\n`b`"
    write_run(tmp_path / "runs", data_title=nasty, device_name=nasty, analysis=False)
    status, page = render(tmp_path / "runs", out=tmp_path / "out")
    assert status == 0 and "<script>" not in page and "&lt;script&gt;" in page
    [tex] = (tmp_path / "out").rglob("time.tex")
    escaped = r"\textless{}script\textgreater{}alert(1)\textless{}/script\textgreater{} \$x\^{}2\$ "
    assert escaped + r"\textbackslash{}input\{a\} 50\% \& \_|\_" in tex.read_text()
    [markdown] = (tmp_path / "out").rglob("time.md")
    assert r"\<script\>" in markdown.read_text() and r"\_\|\_" in markdown.read_text()
    assert len(markdown.read_text().splitlines()) == 3  # a line break in a name starts no row
    assert tex.parent.parent.parent == tmp_path / "out"  # and a slash in it makes no folder


def test_notes_contain_no_control_characters(tmp_path, capsys):
    write_run(tmp_path, analysis=False)
    bad = write_run(tmp_path / "\x1b[31m", analysis=False)
    (bad / "summary.json").write_text('{"\x1b[2J": 1}')
    assert render(tmp_path, out=tmp_path / "out")[0] == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("report.py: left out ") and line.isprintable()


def test_unusable_input_gives_one_line_and_status_2(tmp_path, capsys):
    made = write_run(tmp_path / "runs", analysis=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for arguments in (
        [str(tmp_path / "nowhere")],
        [str(tmp_path / "nowhere.jsonl")],
        [str(tmp_path / "empty")],
        [str(tmp_path / "file")],
        [],
        [str(made), "--out", str(tmp_path / "file")],
        [str(made), "--outt", "x"],
    ):
        assert run(arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("report.py: ")


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}])
def test_the_script_ends_with_its_exit_status_in_any_locale(tmp_path, locale):
    script, settings = Path(report.__file__), {"cwd": tmp_path, "env": os.environ | locale}
    ended = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, **settings)
    assert ended.returncode == 2 and ended.stderr.startswith("report.py: no usable run in ")


def test_only_modes_that_train_gamma_have_a_figure_of_gammas(tmp_path):
    """The table of parameters has only the modes that train no other part."""
    for mode in ("gamma", "beta", "gamma+output", "beta+output"):
        write_run(tmp_path / mode, "resnet14", mode)
        assert render(tmp_path / mode, out=tmp_path / f"{mode}-report")[0] == 0
        assert bool(list((tmp_path / f"{mode}-report").rglob("gamma.png"))) is mode.startswith("gamma")
        rows = rows_of(tmp_path / f"{mode}-report", "parameters")
        assert [row["mode"] for row in rows] == ([mode] if "+" not in mode else [])


def test_sparse_convolutions_are_compared_with_the_published_ones(tmp_path):
    for inits in ({}, {"conv_init": "sparse", "nonzeros": 3}):
        write_run(tmp_path / "runs", "resnet14", "bn_only", **inits)
    status, page = render(tmp_path / "runs", out=tmp_path / "report")
    assert status == 0 and "conv_init sparse, nonzeros 3" in page
    assert list((tmp_path / "report").rglob("init.png"))
