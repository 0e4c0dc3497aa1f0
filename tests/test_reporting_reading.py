"""Runs are read and checked; unusable runs and analyses are named and left out."""

import json
import os
from pathlib import Path

import pytest
from made_runs import change, write_run

import records
from reporting import reading


def read(*given: Path) -> list[reading.Run]:
    return reading.read_runs([str(path) for path in given], told.append)


told: list[str] = []


@pytest.fixture(autouse=True)
def nothing_told():
    told.clear()


def test_the_same_run_twice_is_named_and_counts_once(tmp_path):
    kept = write_run(tmp_path / "a")
    twin = write_run(tmp_path / "b")
    assert len(read(tmp_path, kept)) == 1  # `kept` is given twice, its twin once
    assert told == [f"left out {twin}: {kept} is the same run with the same seed"]


def test_of_two_folders_of_the_same_run_the_finished_one_is_kept(tmp_path):
    (write_run(tmp_path / "a") / "summary.json").unlink()
    done = write_run(tmp_path / "b")
    [run] = read(tmp_path)
    assert run.done and told == [
        f"left out {tmp_path / 'a' / done.name}: {done} is the same run with the same seed"
    ]


def without(name: str, key: str):
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        del content[key]
        (folder / name).write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize("key", ["final_test_top5_acc", "best_val_acc", "chosen_epoch"])
def test_optional_fields_of_a_summary_may_be_missing(tmp_path, key):
    run = write_run(tmp_path, **{key: 5 if key == "chosen_epoch" else 50.0})
    assert getattr(read(tmp_path)[0].summary, key) in (5, 50.0)
    without("summary.json", key)(run)
    assert getattr(read(tmp_path)[0].summary, key) is None


@pytest.mark.parametrize(
    "values",
    [
        *({"gamma": bad} for bad in (None, {}, {"count": 1, "edges": [1, 0], "counts": [1]})),
        *({"pruned": bad} for bad in ([], [{}], [{"threshold": 0, "zeroed": 0, "test_acc": "x"}])),
        {"frozen_sha256": "f" * 64},
    ],
)
def test_a_run_with_an_unusable_analysis_is_kept_without_it(tmp_path, values):
    change("analysis.json", **values)(write_run(tmp_path))
    [run] = read(tmp_path)
    assert run.analysis is None and run.done
    assert len(told) == 1 and told[0].startswith("left out the analysis")


def test_an_analysis_with_other_bin_edges_is_left_out(tmp_path):
    first = write_run(tmp_path, seed=0)
    change("analysis.json", gamma__edges=[3.0 * i for i in range(61)])(write_run(tmp_path, seed=1))
    kept = {run.config.options.seed: run.analysis for run in read(tmp_path)}
    assert kept[0] == records.Analysis.read(first / "analysis.json") and kept[1] is None
    assert len(told) == 1 and "other bin edges than the first" in told[0]


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def halve(folder: Path) -> None:
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[: len(text) // 2])


def drop_epoch(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))


def link(folder: Path) -> None:
    (folder / "summary.json").rename(folder / "elsewhere")
    (folder / "summary.json").symlink_to("elsewhere")


RUBBISH = {
    "summary.json": [
        *({"final_test_acc": bad} for bad in (float("nan"), "51", None, 101, True)),
        *({"train_s": 10**400}, {"params_total": 10**400}, {"status": 1}),
        *({"arch": "resnet20"}, {"mode": "all"}, {"seed": 7}, {"data": "synthetic"}, {"data_title": "x"}),
        *({"variant": {"lr": 0.2}}, {"frozen_sha256": "f" * 64}),
        *({"best_test_acc": None}, {"checkpoint_bytes": None}, {"epochs_done": 3}, {"newer_field": 1}),
    ],
    "config.json": [
        *({key: bad} for key in ("options", "spec", "data_title") for bad in (None, 7, [])),
        *({"options__epochs": bad} for bad in (-1, 0, "4", None)),
        *({f"options__{key}": 0.5} for key in ("train_subset", "loader", "arch", "milestones")),
        *({"options__preset": "none"}, {"options__schedule": "[red]"}, {"options__batch_size": 10**400}),
        *(
            {"spec__classes": []},
            {"spec__mean": [1, 2]},
            {"versions": {"torch": 2}},
            {"options__recipe": "x"},
        ),
    ],
}


@pytest.mark.parametrize(
    "damage",
    [
        *(change(name, **values) for name, each in RUBBISH.items() for values in each),
        *(write("summary.json", content) for content in (b"{", b"[]", b"\xff\xfe", b"[" * 99999, b"{}")),
        *(write("metrics.jsonl", content) for content in (b"not json\n", b'{"epoch": 1}\n')),
        *(halve, drop_epoch, link, lambda folder: (folder / "config.json").unlink()),
    ],
)
def test_a_damaged_run_is_named_in_one_line_and_left_out(tmp_path, damage):
    write_run(tmp_path, seed=1)
    bad = write_run(tmp_path, seed=0)
    damage(bad)
    [run] = read(tmp_path)
    assert run.config.options.seed == 1
    [line] = told
    assert line.startswith((f"left out {bad}: ", f"left out {bad}/")) and len(line.splitlines()) == 1


def test_packed_runs_are_checked_like_run_folders(tmp_path):
    write_run(tmp_path / "runs", seed=0)
    text = read(tmp_path / "runs")[0].to_json(None)
    packed = tmp_path / "grid.jsonl"
    good = json.loads(text)
    summary = good["summary"]
    lines = [
        *("not json", "[]", "{}", json.dumps(good | {"name": 1}), json.dumps(good | {"epochs": None})),
        json.dumps(good | {"summary": summary | {"final_test_acc": 101}}),
        json.dumps(good | {"summary": summary | {"mode": "all"}}),
        json.dumps(good | {"summary": None, "epochs": good["epochs"][1:]}),
        json.dumps(good | {"summary": None, "epochs": good["epochs"][:1] * 2}),
        text.strip(),
    ]
    packed.write_text("\n".join(lines))
    [run] = read(packed)
    assert run == reading.read_runs([str(tmp_path / "runs")], told.append)[0]
    where = [line.removeprefix(f"left out {packed}, line ").partition(":")[0] for line in told]
    assert where == [str(number) for number in range(1, len(lines))]


def test_a_run_without_summary_has_not_ended(tmp_path):
    (write_run(tmp_path) / "summary.json").unlink()
    [run] = read(tmp_path)
    assert (run.status, run.done, run.epochs_done) == ("not ended", False, 4)


def test_runs_below_another_tools_configuration_are_read(tmp_path):
    write_run(tmp_path / "runs")
    (tmp_path / "config.json").write_text("{}")
    assert len(read(tmp_path)) == 1 and not told


def test_control_characters_in_names_are_replaced(tmp_path):
    write_run(tmp_path / "\x1b[31m", data_title="a\x1b[2Jb\nc")
    [run] = read(tmp_path)
    assert run.config.data_title == "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}c"
    assert run.name.isprintable()


def test_pipes_and_enormous_packed_files_are_not_read(tmp_path):
    write_run(tmp_path / "a")
    os.mkfifo(tmp_path / "runs.jsonl")
    assert len(read(tmp_path)) == 1 and not told
    (tmp_path / "more.jsonl").touch()
    os.truncate(tmp_path / "more.jsonl", 2**40)
    with pytest.raises(records.RunError, match=r"more\.jsonl is larger"):
        read(tmp_path)
