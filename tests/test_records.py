"""A run's records are read as they were written, and refused if they do not fit their schema."""

import json
import os
import shutil
from pathlib import Path

import pytest
from small_runs import exit_status, metrics, only_run, small_options, summary

import records

MISSING = "(left out)"  # a string, so that test ids are the same in every process


@pytest.fixture(scope="module")
def done(tiny_folder, tmp_path_factory) -> Path:
    """Return the folder of a finished run."""
    out = tmp_path_factory.mktemp("records") / "runs"
    assert exit_status([*small_options(tiny_folder), "--out", str(out)]) == 0
    return only_run(out)


def test_the_records_of_a_run_are_read_as_they_were_written(done):
    described = records.Config.read(done / "config.json")
    assert json.loads(described.to_json()) == json.loads((done / "config.json").read_text())
    assert described.options.milestones == (1, 2) and described.spec.classes == ("ash", "elm", "oak", "yew")
    result = records.Summary.read(done / "summary.json")
    assert json.loads(result.to_json()) == summary(done) and result.status == "done"
    assert [json.loads(row.to_json()) for row in records.read_epochs(done)] == metrics(done)
    assert records.Analysis.read(done / "analysis.json") is None


def test_an_option_that_an_older_run_lacks_has_its_default(done, tmp_path):
    record = json.loads((done / "config.json").read_text())
    assert record["options"].pop("nonzeros") is record["spec"].pop("nonzeros") is None
    (tmp_path / "config.json").write_text(json.dumps(record))
    before, now = records.Config.read(tmp_path / "config.json"), records.Config.read(done / "config.json")
    assert before.spec == now.spec and before.options == now.options and before.variant == now.variant


CHANGES = [
    ("config.json", "options.lr", "fast"),
    ("config.json", "options.epochs", "3"),
    ("config.json", "options.quick", 1),
    ("config.json", "options.colour", "red"),
    ("config.json", "options.milestones.1", 2.5),
    ("config.json", "options", []),
    ("config.json", "spec", MISSING),
    ("config.json", "spec.dtype", "fp8"),
    ("config.json", "spec.classes", []),
    ("config.json", "spec.mean", [0.0, 0.0]),
    ("config.json", "spec.seed", 2**64),
    ("config.json", "spec.processes", MISSING),
    ("config.json", "parent", "a run"),
    ("config.json", "frozen_sha256", "abc"),
    ("config.json", "versions.torch", 2.13),
    ("summary.json", "status", "finished"),
    ("summary.json", "status", MISSING),
    ("summary.json", "final_test_acc", 101.0),
    ("summary.json", "final_test_acc", float("nan")),
    ("summary.json", "params_total", 0),
    ("summary.json", "params_trained", -1),
    ("summary.json", "train_s", None),
    ("summary.json", "epochs_done", True),
    ("summary.json", "variant.lr", {"a": 1}),
    ("summary.json", "recipe", "best"),
    ("metrics.jsonl", "train_acc", "high"),
    ("metrics.jsonl", "lr", -1.0),
    ("metrics.jsonl", "test_loss", float("inf")),
    ("metrics.jsonl", "epoch_s", MISSING),
    ("metrics.jsonl", "epoch", 7),
    ("metrics.jsonl", "note", "x"),
]


@pytest.mark.parametrize("name, field, value", CHANGES, ids=str)
def test_a_record_that_does_not_fit_is_refused_with_its_file_and_field(done, tmp_path, name, field, value):
    folder = Path(shutil.copytree(done, tmp_path / "run"))
    *lines, last = (
        (folder / name).read_text().splitlines() if name == "metrics.jsonl" else [(folder / name).read_text()]
    )
    record = json.loads(last)
    *parents, key = field.split(".")
    place = record
    for parent in parents:
        place = place[parent]
    key = int(key) if isinstance(place, list) else key
    if value is MISSING:
        del place[key]
    else:
        place[key] = value
    (folder / name).write_text("\n".join([*lines, json.dumps(record)]))
    with pytest.raises(records.RunError) as refused:
        for file, kind in (("config.json", records.Config), ("summary.json", records.Summary)):
            kind.read(folder / file)
        list(records.read_epochs(folder))
    said = str(refused.value)
    assert f"{folder / name}" in said and field in said and "\n" not in said
    assert "line 3" in said or name != "metrics.jsonl"
    assert refused.value.exit_status == 2


HISTOGRAM = {"count": 3, "edges": [0.0, 0.5, 1.0], "counts": [2, 1]}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"edges": [0.0, 1.0, 0.5]}, "edges"),
        ({"edges": [0.0, 1.0]}, "counts"),
        ({"counts": [2, 2]}, "counts"),
        ({"counts": [4, -1]}, "counts.1"),
        ({"count": 0}, "count"),
        ({"edges": [], "counts": []}, "counts"),
    ],
)
def test_a_histogram_whose_counts_and_edges_do_not_fit_is_refused(change, said):
    records.Histogram.parse(json.dumps(HISTOGRAM), "analysis.json")
    with pytest.raises(records.RunError, match=said):
        records.Histogram.parse(json.dumps(HISTOGRAM | change), "analysis.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["test_loss", "train_loss", "epoch_s", "images_per_s"])
def test_an_epoch_with_infinite_or_nan_values_is_refused(done, name, value):
    row = metrics(done)[0]
    assert records.Epoch(**row)
    with pytest.raises(ValueError, match=rf"{name}\n.*finite number"):
        records.Epoch(**row | {name: value})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"options": {}} {}', "\x00", "[" * 10**5])
def test_a_file_that_is_not_one_json_object_is_refused_by_name(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(records.RunError, match=r"config\.json"):
        records.Config.read(tmp_path / "config.json")


def test_links_pipes_folders_and_binary_files_are_refused_by_name(tmp_path):
    (tmp_path / "elsewhere").write_text("{}")
    for make in (
        lambda file: file.symlink_to(tmp_path / "elsewhere"),
        os.mkfifo,
        Path.mkdir,
        lambda file: file.write_bytes(b"\xff\xfe"),
    ):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        make(folder / "summary.json")
        with pytest.raises(records.RunError, match=r"summary\.json"):
            records.Summary.read(folder / "summary.json")


def test_control_characters_are_replaced(done, tmp_path):
    folder = Path(shutil.copytree(done, tmp_path / "run"))
    for name, kind in (("config.json", records.Config), ("summary.json", records.Summary)):
        record = json.loads((folder / name).read_text())
        record["data_title"] = "tiny\x1b[2J"
        (record if "arch" in record else record["options"])["arch"] = "resnet8\x07"
        (folder / name).write_text(json.dumps(record))
        read = kind.read(folder / name)
        assert read.data_title == "tiny\N{REPLACEMENT CHARACTER}[2J"
        assert getattr(read, "options", read).arch == "resnet8\N{REPLACEMENT CHARACTER}"
