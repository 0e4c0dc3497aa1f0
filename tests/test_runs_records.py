"""runs.py: names of runs, and the records in their files, which are refused where they do not fit."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import exit_status, metrics, only_run, small_options, summary

import config
import runs
from config import Options
from runs import run_name

MISSING = "(left out)"  # a text, so that tests have the same names in every process


# ---- names ----


def test_a_run_is_named_after_its_data_network_mode_seed_and_whatever_differs():
    assert run_name(Options(), "cifar10") == "cifar10-resnet32-bn_only-s0"
    options = Options(arch="resnet14_w2", mode="bn+output", seed=3, lr=1e-3, milestones=(1, 2))
    options = replace(options, init_from="../w/a.pt", reset_bn=True, data_dir="/x", memory="recompute")
    named = run_name(options, "my set")
    assert named.startswith("my_set-resnet14_w2-bn+output-s3-")
    assert set(named.split("-")[4:]) == {"init_froma", "reset_bn", "lr0.001", "milestones1_2"}
    quick = run_name(replace(config.defaults("best", quick=True), epochs=2), "cifar10")
    assert quick == "cifar10-resnet32-bn_only-s0-quick-presetbest-epochs2"


LONG = Options(
    arch="resnet14_w32",
    mode="bn_main+shortcut+output",
    seed=2**64 - 1,
    conv_init="kaiming_uniform",
    bn_init="signed_uniform",
    init_from="runs/" + 9 * "a-name-that-goes-on-" + "/model.safetensors",
    reset_bn=True,
    optimizer="adam",
    lr=0.0123456,
    label_smoothing=0.123,
    milestones=tuple(range(1, 40)),
    augment="crop+flip+brightness",
    train_subset=12345,
)


@pytest.mark.parametrize("data", ["cifar10", "a data set with a name " * 9, "\N{SNOWMAN}" * 90])
@pytest.mark.parametrize("options", [Options(), Options(seed=2**64 - 1), LONG], ids=["short", "seed", "long"])
def test_a_name_has_at_most_100_characters_and_is_one_that_a_file_system_takes(data, options, tmp_path):
    name = run_name(options, data)
    assert len(name) <= 100 and name == run_name(options, data)
    assert f"-s{options.seed}" in name and all(c.isalnum() or c in "._+-" for c in name)
    (tmp_path / name).mkdir()


def test_runs_with_other_options_have_other_names_however_long_they_are():
    others = [
        LONG,
        replace(LONG, lr=0.0123457),
        replace(LONG, milestones=(*LONG.milestones, 40)),
        replace(LONG, init_from=LONG.init_from.replace("on-/", "on-2/")),
        replace(LONG, train_subset=12346),
        replace(LONG, sync_bn=True),
        replace(LONG, seed=2**64 - 2),
        replace(LONG, mode="bn_main+shortcut"),
    ]
    names = [run_name(options, data) for options in others for data in ("d" * 80 + "1", "d" * 80 + "2")]
    assert len(set(names)) == len(names)


def test_options_that_change_only_where_and_how_fast_a_run_goes_leave_its_name():
    logistics = {
        "data_dir": "/x",
        "device": "cpu",
        "loader": "ffcv",
        "memory": "recompute",
        "no_compile": True,
    }
    logistics |= {"eval_every": 7, "log": "wandb", "out": "/y", "resume": True, "overwrite": True}
    assert logistics.keys() == config.names("logistics")
    assert run_name(replace(LONG, **logistics), "cifar10") == run_name(LONG, "cifar10")


def test_several_runs_have_a_name_in_which_their_seeds_are_not_counted():
    for options in (Options(lr=0.5), LONG):
        own, several = run_name(options, "cifar10"), run_name(options, "cifar10", seed="SEED")
        assert several == own.replace(f"-s{options.seed}", "-sSEED")
        for seed in (0, 7, 2**64 - 1):
            assert run_name(replace(options, seed=seed), "cifar10") == several.replace("SEED", str(seed))


# ---- records ----


@pytest.fixture(scope="module")
def done(tiny_folder, tmp_path_factory) -> Path:
    """The folder of a run that is done."""
    out = tmp_path_factory.mktemp("records") / "runs"
    assert exit_status([*small_options(tiny_folder), "--out", str(out)]) == 0
    return only_run(out)


def test_what_a_run_writes_is_read_as_what_it_was(done):
    described = runs.Config.read(done / "config.json")
    assert json.loads(described.to_json()) == json.loads((done / "config.json").read_text())
    assert described.options.milestones == (1, 2) and described.spec.classes == ("ash", "elm", "oak", "yew")
    result = runs.Summary.read(done / "summary.json")
    assert json.loads(result.to_json()) == summary(done) and result.status == "done"
    assert [json.loads(row.to_json()) for row in runs.read_epochs(done)] == metrics(done)
    assert runs.Analysis.read(done / "analysis.json") is None


def test_a_run_from_before_an_option_was_there_has_its_default(done, tmp_path):
    record = json.loads((done / "config.json").read_text())
    assert record["options"].pop("nonzeros") is record["spec"].pop("nonzeros") is None
    (tmp_path / "config.json").write_text(json.dumps(record))
    before, now = runs.Config.read(tmp_path / "config.json"), runs.Config.read(done / "config.json")
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
    with pytest.raises(runs.RunError) as refused:
        for file, kind in (("config.json", runs.Config), ("summary.json", runs.Summary)):
            kind.read(folder / file)
        list(runs.read_epochs(folder))
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
    runs.Histogram.parse(json.dumps(HISTOGRAM), "analysis.json")
    with pytest.raises(runs.RunError, match=said):
        runs.Histogram.parse(json.dumps(HISTOGRAM | change), "analysis.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"options": {}} {}', "\x00", "[" * 10**5])
def test_a_file_that_is_no_json_object_is_refused_by_name(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(runs.RunError, match=r"config\.json"):
        runs.Config.read(tmp_path / "config.json")


def test_what_is_no_plain_file_of_text_is_refused_by_name(tmp_path):
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
        with pytest.raises(runs.RunError, match=r"summary\.json"):
            runs.Summary.read(folder / "summary.json")


def test_characters_that_would_steer_a_terminal_are_replaced(done, tmp_path):
    folder = Path(shutil.copytree(done, tmp_path / "run"))
    for name, kind in (("config.json", runs.Config), ("summary.json", runs.Summary)):
        record = json.loads((folder / name).read_text())
        record["data_title"] = "tiny\x1b[2J"
        (record if "arch" in record else record["options"])["arch"] = "resnet8\x07"
        (folder / name).write_text(json.dumps(record))
        read = kind.read(folder / name)
        assert read.data_title == "tiny\N{REPLACEMENT CHARACTER}[2J"
        assert getattr(read, "options", read).arch == "resnet8\N{REPLACEMENT CHARACTER}"
