"""The report's numbers are the runs', settings are never mixed, and rubbish is named and left out."""

import base64
import csv
import io
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import write_run
from PIL import Image

import report
from reporting import reading as finished
from reporting import series as gather


def render(*given: Path, out: Path) -> tuple[int, str]:
    """The report's exit status and its page."""
    status = report.main([*map(str, given), "--out", str(out)])
    return status, (out / "index.html").read_text() if status == 0 else ""


def rows_of(out: Path, name: str) -> list[dict]:
    """The rows of every setting's table of that name."""
    return [
        row for file in sorted((out / "tables").glob(f"*-{name}.csv")) for row in csv.DictReader(file.open())
    ]


def summaries(root: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(root.rglob("summary.json"))]


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Path, Path, str]:
    """Runs that have something for every figure, the report of them, and its page."""
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


def test_means_are_those_of_the_summaries(full):
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


def test_one_seed_says_so_and_has_no_deviation(full):
    root, out, page = full
    [acc] = [s["final_test_acc"] for s in summaries(root) if s["arch"] == "resnet14_w2"]
    row = next(row for row in rows_of(out, "accuracy") if row["architecture"] == "resnet14_w2")
    assert row["test accuracy std (%)"] == "" and float(row["test accuracy mean (%)"]) == acc
    assert f">{acc:.2f} (n = 1)<" in page


def test_every_run_has_its_row(full):
    root, out, _ = full
    rows = {(r["architecture"], r["mode"], r["seed"], r["other options"]): r for r in rows_of(out, "runs")}
    assert len(rows) == len(list(root.rglob("config.json")))
    for s in summaries(root):
        options = "bn_init ones" if s["bn_init"] == "ones" else ""
        shown = rows[s["arch"], s["mode"], str(s["seed"]), options]["test accuracy (%)"]
        assert shown == ("" if s["final_test_acc"] is None else str(s["final_test_acc"]))


def test_what_others_report_stands_beside(full):
    _, out, page = full
    row = next(row for row in rows_of(out, "accuracy") if row["architecture"] == "resnet14")
    assert (row["mode"], row["paper (%)"]) == ("all", "about 91")
    assert "46.7" in page and "TensorFlow port" in page


def test_diverged_and_unfinished_runs_are_shown(full):
    _, out, page = full
    assert "1 of 4 diverged" in page and "step 7; try a lower --lr" in page
    states = {row["status"]: row for row in rows_of(out, "not-finished")}
    assert states["diverged"]["epochs done"] == "4 of 4" and "--resume" in states["not ended"]["why"]


def test_every_figure_is_there(full):
    _, out, page = full
    names = {
        "depth",
        "trained",
        "loss",
        "accuracy",
        "width",
        "gamma",
        "pruned",
        "relu",
        "checkpoint",
        "cost",
        "parts",
        "starts",
    }
    for kind, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        files = list((out / "figures").glob(f"*.{kind}"))
        assert {file.stem.rpartition("-")[2] for file in files} == names
        assert all(file.read_bytes().startswith(start) for file in files)
    shown = [
        Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"webp;base64,([^\"]+)", page)
    ]
    shown = {image.convert("RGB").tobytes() for image in shown}
    assert shown == {Image.open(file).convert("RGB").tobytes() for file in (out / "figures").glob("*.png")}
    for name in ("accuracy", "parameters", "time", "runs", "not-finished"):
        assert {file.suffix for file in (out / "tables").glob(f"*-{name}.*")} == {".csv", ".md", ".tex"}


def test_the_page_fetches_nothing(full):
    _, out, page = full
    fetched = []

    class Page(HTMLParser):
        def handle_starttag(self, tag, attributes):
            given = dict(attributes)
            fetched.extend([given.get("src", "data:")] + [given.get("href", "data:")] * (tag == "link"))
            if tag == "a" and not given["href"].startswith("#"):
                assert (out / given["href"]).is_file()
            assert tag != "script"

    Page().feed(page)
    assert all(address.startswith("data:") for address in fetched) and "url(" not in page


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


def read(*given: Path) -> list[finished.Run]:
    return finished.read_runs([str(path) for path in given])


@pytest.mark.parametrize(
    "other",
    [
        *({"epochs": 8}, {"quick": True}, {"train_subset": 10}, {"val_split": 10}),
        *({"data_title": "CIFAR-10 (not official)"}, {"image_size": 64}, {"recipe": {"fingerprint": "ff"}}),
    ],
)
def test_settings_are_never_mixed(tmp_path, other):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, **other)
    settings = gather.by_setting(read(tmp_path))
    assert sorted(len(members) for members in settings.values()) == [1, 1]
    assert len(set(report.slugs(list(settings)))) == 2


@pytest.mark.parametrize("other", [{"milestones": [1]}, {"milestones": []}, {"schedule": "cosine"}])
def test_another_course_of_the_rate_is_another_series(tmp_path, other):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, **other)
    (members,) = gather.by_setting(read(tmp_path)).values()
    text = {"milestones": "milestones 1", "schedule": "schedule cosine"}[next(iter(other))]
    text = "milestones none" if other == {"milestones": []} else text
    assert [(s.variant, s.seeds) for s in gather.series_of(members)] == [("", [0]), (text, [1])]


def test_other_options_make_other_series_and_logistics_do_not(tmp_path):
    for seed, more in enumerate(({}, {"out": "x", "memory": "stock"}, {"lr": 0.01}, {"dtype": "fp32"})):
        write_run(tmp_path, seed=seed, **more)
    found = read(tmp_path)
    assert {s.variant: s.done for s in gather.series_of(found)} == {"": 3, "lr 0.01": 1}
    assert len(gather.series_of(found, by_machine=True)) == 3  # stock memory costs otherwise


def test_a_seed_counts_once(tmp_path, capsys):
    kept = write_run(tmp_path / "a")
    twin = write_run(tmp_path / "b")
    assert len(read(tmp_path, kept)) == 1  # the folder twice, its twin once
    assert capsys.readouterr().err.splitlines() == [
        f"report.py: left out {twin}: {kept} is the same run, seed and all"
    ]


def test_a_seed_on_two_machines_is_one_of_the_mean_and_a_row_of_each(tmp_path):
    write_run(tmp_path / "a", device_name="one")
    write_run(tmp_path / "b", device_name="another")
    found = read(tmp_path)
    assert [s.done for s in gather.series_of(found)] == [1]
    assert [s.done for s in gather.series_of(found, by_machine=True)] == [1, 1]


def without(name: str, key: str):
    def apply(folder: Path) -> None:
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if k != key} for line in lines]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in kept))

    return apply


@pytest.mark.parametrize("key", ["peak_memory_bytes", "why", "images_per_s", "test_acc"])
def test_what_may_be_missing_is_not_missed(tmp_path, key):
    run = write_run(tmp_path / "runs")
    without("summary.json" if key in ("peak_memory_bytes", "why") else "metrics.jsonl", key)(run)
    assert render(tmp_path / "runs", out=tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    "values",
    [
        *({"gamma": bad} for bad in (None, {}, {"count": 1, "edges": [1, 0], "counts": [1]})),
        *({"pruned": bad} for bad in ([], [{}], [{"threshold": 0, "zeroed": 0, "test_acc": "x"}])),
        {"frozen_sha256": "f" * 64},
    ],
)
def test_an_analysis_that_is_not_the_runs_costs_it_no_more_than_that(tmp_path, capsys, values):
    change("analysis.json", **values)(write_run(tmp_path))
    [run] = read(tmp_path)
    assert run.analysis is None and run.summary["status"] == "done"
    assert capsys.readouterr().err.startswith("report.py: without its analysis, ")


def change(name: str, **values):
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return apply


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def halve(folder: Path) -> None:
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[: len(text) // 2])


def link(folder: Path) -> None:
    (folder / "summary.json").rename(folder / "elsewhere")
    (folder / "summary.json").symlink_to("elsewhere")


RUBBISH = {
    "summary.json": [
        *({"final_test_acc": bad} for bad in (float("nan"), "51", None, 101, True)),
        *({"train_s": 10**400}, {"params_total": 10**400}, {"status": 1}, {"mode": "all"}),
    ],
    "config.json": [
        *({key: bad} for key in ("options", "recipe", "data_title") for bad in (None, 7, [])),
        {"options": {"arch": "resnet14", "mode": "bn_only", "seed": 0, "epochs": -1}},
        {"options": {"arch": ["a"], "mode": "bn_only", "seed": 0}},
        *(
            {"options": {"arch": "vgg11", "mode": "all", "seed": 0, key: 0.5}}
            for key in ("train_subset", "loader")
        ),
    ],
}


@pytest.mark.parametrize(
    "damage",
    [
        *(change(name, **values) for name, each in RUBBISH.items() for values in each),
        *(write("summary.json", content) for content in (b"{", b"[]", b"\xff\xfe", b"[" * 99999, b"{}")),
        *(write("metrics.jsonl", content) for content in (b"not json\n", b'{"epoch": 1}\n')),
        *(halve, link),
    ],
)
def test_rubbish_is_named_in_a_line_and_left_out(tmp_path, capsys, damage):
    write_run(tmp_path, seed=1)
    bad = write_run(tmp_path, seed=0)
    damage(bad)
    [run] = read(tmp_path)
    assert run.options["seed"] == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"report.py: left out {bad}: ")


def test_hostile_names_are_text_everywhere(tmp_path):
    nasty = "<script>alert(1)</script> $x^2$ \\input{a} 50% & _|_\n`b`"
    write_run(tmp_path / "runs", data_title=nasty, device_name=nasty, analysis=False)
    status, page = render(tmp_path / "runs", out=tmp_path / "out")
    assert status == 0 and "<script>" not in page and "&lt;script&gt;" in page
    [tex] = (tmp_path / "out" / "tables").glob("*-time.tex")
    escaped = r"\textless{}script\textgreater{}alert(1)\textless{}/script\textgreater{} \$x\^{}2\$ "
    assert escaped + r"\textbackslash{}input\{a\} 50\% \& \_|\_" in tex.read_text()
    [markdown] = (tmp_path / "out" / "tables").glob("*-time.md")
    assert r"\<script\>" in markdown.read_text() and r"\_\|\_" in markdown.read_text()
    assert len(markdown.read_text().splitlines()) == 3  # a line break in a name makes no row


def test_unusable_input_is_one_line_and_status_2(tmp_path, capsys):
    run = write_run(tmp_path / "runs", analysis=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for arguments in (
        [str(tmp_path / "nowhere")],
        [str(tmp_path / "empty")],
        [str(tmp_path / "file")],
        [],
        [str(run), "--out", str(tmp_path / "file")],
        [str(run), "--outt", "x"],
    ):
        assert report.main(arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("report.py: ")
