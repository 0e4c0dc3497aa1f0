"""Tests of runs.py: the names of run folders, their files, and their lock."""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import SPEC

import config
import records
import runs
from config import Options
from runs import run_name

ROOT = Path(runs.__file__).parent
CONFIG = records.Config(
    options=Options(data="synthetic", arch="resnet8", seed=3),
    spec=SPEC,
    parent=None,
    data_title="Synthetic",
    frozen_sha256="0" * 64,
    initial_sha256=None,
    device_name="cpu",
    versions={"torch": "2.13.0", "ffcv": None},
    git_commit=None,
)


def epoch(number: int, **changes) -> records.Epoch:
    metrics = {"lr": 0.1, "train_loss": 2.0, "train_acc": 20.0, "test_loss": None, "test_acc": None}
    return records.Epoch(**{"epoch": number, "epoch_s": 1.5, "images_per_s": None} | metrics | changes)


def summary(status: str) -> records.Summary:
    return records.Summary(
        status=status,
        why=None,
        data="synthetic",
        data_title="Synthetic",
        arch="resnet8",
        mode="bn_only",
        seed=3,
        variant={"lr": 0.05, "milestones": (1, 2)},
        params_total=78_042,
        params_trained=672,
        final_test_acc=50.0,
        best_test_acc=50.0,
        epochs_done=0,
        train_s=0.0,
        startup_s=0.0,
        peak_memory_bytes=None,
        checkpoint_bytes=2000,
        full_bytes=312_168,
        frozen_sha256="0" * 64,
    )


def test_a_name_has_data_network_mode_seed_and_the_options_that_differ():
    assert run_name(Options(), "cifar10") == "cifar10-resnet32-bn_only-s0"
    options = Options(arch="resnet14_w2", mode="bn+output", seed=3, lr=1e-3, milestones=(1, 2))
    options = replace(options, init_from="../w/a.pt", reset_bn=True, data_dir="/x", memory="recompute")
    named = run_name(options, "my set")
    assert named.startswith("my_set-resnet14_w2-bn+output-s3-")
    assert set(named.split("-")[4:]) == {"init_froma", "reset_bn", "lr0.001", "milestones1_2"}
    quick = run_name(replace(config.defaults("best", quick=True), epochs=2), "cifar10")
    assert quick == "cifar10-resnet32-bn_only-s0-quick-presetbest-epochs2"


def test_characters_unsafe_in_file_names_are_replaced():
    options = replace(config.defaults(quick=True), mode="bn+output", init_from="../w/a (1).pt")
    name = run_name(options, "my set")
    assert name == "my_set-resnet32-bn+output-s0-quick-init_froma__1_"


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
def test_a_name_is_a_valid_file_name_of_at_most_100_characters(data, options, tmp_path):
    name = run_name(options, data)
    assert len(name) <= 100 and name == run_name(options, data)
    assert f"-s{options.seed}" in name and all(c.isalnum() or c in "._+-" for c in name)
    (tmp_path / name).mkdir()


def test_different_options_give_different_names_even_if_shortened():
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


def test_rates_that_differ_in_the_last_digit_give_different_names():
    names = {run_name(Options(lr=lr), "cifar10") for lr in (0.12345678, 0.12345679, 1.0)}
    assert len(names) == 3 and any(each.endswith("-lr1") for each in names)


def test_logistics_options_do_not_change_the_name():
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


def test_the_names_of_several_seeds_differ_only_in_the_seed():
    for options in (Options(lr=0.5), LONG):
        own, several = run_name(options, "cifar10"), run_name(options, "cifar10", seed="SEED")
        assert several == own.replace(f"-s{options.seed}", "-sSEED")
        for seed in (0, 7, 2**64 - 1):
            assert run_name(replace(options, seed=seed), "cifar10") == several.replace("SEED", str(seed))


def test_an_existing_run_is_refused_resumed_or_overwritten(tmp_path):
    with runs.open_run(tmp_path / "a") as run:
        run.begin(CONFIG)
        run.end_epoch(epoch(1), {"weights": torch.arange(3)})
    with pytest.raises(records.RunError, match=r"--resume .* --overwrite"), runs.open_run(tmp_path / "a"):
        pass
    with runs.open_run(tmp_path / "a", resume=True) as run:
        assert run.load_last()["weights"].tolist() == [0, 1, 2] and run.rows == [epoch(1)]
        assert run.config == CONFIG
    (tmp_path / "a" / "folder").mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path)
    with runs.open_run(tmp_path / "a", overwrite=True) as run:
        assert run.load_last() is None and run.config is run.summary is None and run.rows == []
        assert records.Config.read(run.path / "config.json") == CONFIG, "the run may still be refused"
        run.begin(CONFIG.model_copy(update={"device_name": "another"}))
        assert {path.name for path in run.path.iterdir()} == {".lock", "config.json"}
        assert run.config.devices == "another"


def test_a_kill_while_a_run_is_overwritten_leaves_nothing_to_resume_or_to_count(tmp_path, monkeypatch):
    with runs.open_run(tmp_path / "a") as run:
        run.begin(CONFIG)
        run.end_epoch(epoch(1), {})
        run.finish(summary("diverged"))
    unlink, gone = Path.unlink, []

    def killed(path, *given, **more):
        if len(gone) == 2:
            raise KeyboardInterrupt
        gone.append(path.name)
        unlink(path, *given, **more)

    with runs.open_run(tmp_path / "a", overwrite=True) as run, monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            run.begin(CONFIG)
    assert gone == ["summary.json", "last.pt"] and runs.Run(tmp_path / "a").status is None
    with runs.open_run(tmp_path / "a", resume=True) as run:
        assert run.load_last() is None, "what was to be overwritten is not resumed"


def test_a_kill_between_last_pt_and_metrics_jsonl_loses_no_epoch(tmp_path, monkeypatch):
    with runs.open_run(tmp_path / "a") as run:
        run.end_epoch(epoch(1), {})
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(run, "write_metrics", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
            run.end_epoch(epoch(2), {})  # last.pt is written, metrics.jsonl is not
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 1
    with runs.open_run(tmp_path / "a", resume=True) as run:
        run.load_last()
        assert [row.epoch for row in run.rows] == [1, 2]
        run.write_metrics()
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert list(records.read_epochs(tmp_path / "a")) == [epoch(1), epoch(2)]


def test_a_run_without_config_json_counts_as_existing(tmp_path):
    with runs.open_run(tmp_path / "a") as run:
        run.end_epoch(epoch(1), {})
    with pytest.raises(records.RunError, match="--resume"), runs.open_run(tmp_path / "a"):
        pass
    with runs.open_run(tmp_path / "a", overwrite=True) as run:
        assert run.load_last() is None


def test_a_full_disk_does_not_lose_the_last_epoch(tmp_path):
    with runs.open_run(tmp_path / "a") as run:
        run.end_epoch(epoch(1), {"x": 1})
        before, (_, most) = set(run.path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, most))  # bytes per file; fails like a full disk
        try:
            with pytest.raises(OSError, match=r"File too large: .*/a/last\.pt'$"):
                run.end_epoch(epoch(2), {"x": torch.zeros(100_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        assert set(run.path.iterdir()) == before
        assert run.load_last() == {"x": 1} and run.rows == [epoch(1)]


def test_tidy_removes_last_pt_of_a_done_run_that_no_process_uses(tmp_path):
    with runs.open_run(tmp_path / "a") as run:
        run.end_epoch(epoch(1), {})
        run.finish(summary("interrupted"))
        runs.tidy(tmp_path / "a")  # does nothing, as the folder is in use
        assert run.last.exists()
    runs.tidy(tmp_path / "a")
    assert run.last.exists()  # kept, because the run can be resumed
    run.write("summary.json", summary("done").to_json())
    with runs.open_run(tmp_path / "a", resume=True):
        runs.tidy(tmp_path / "a")
        assert run.last.exists()
    runs.tidy(tmp_path / "a")
    assert not run.last.exists() and run.status == "done"


def test_a_second_process_is_kept_out(tmp_path):
    code = f"import runs\nwith runs.open_run(runs.Path({str(tmp_path / 'a')!r})): pass"
    with runs.open_run(tmp_path / "a"):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert second.returncode == 1 and "is in use by another process" in second.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_error_names_the_damaged_file_of_a_run(tmp_path):
    with runs.open_run(tmp_path / "a") as run:
        (run.path / "last.pt").write_bytes(b"rubbish")
        with pytest.raises(records.RunError, match=r"last\.pt cannot be resumed from"):
            run.load_last()
        for rubbish in ("{", "[]", "{}", '{"status": "done"}'):
            (run.path / "summary.json").write_text(rubbish)
            with pytest.raises(records.RunError, match=r"summary\.json"):
                run.summary  # noqa: B018


def test_a_run_resumed_on_other_devices_names_all_of_them_in_order(tmp_path):
    for device, epochs in (("one", 1), ("one", 1), ("another", 0), ("third", 2), ("another", 0), ("one", 1)):
        with runs.open_run(tmp_path / "a", resume=True) as run:
            run.load_last()
            run.begin(CONFIG.model_copy(update={"device_name": device}))
            for _ in range(epochs):
                run.end_epoch(epoch(len(run.rows) + 1), {})
    assert run.config.devices == run.described.devices == "one, then third, then one"
    with runs.open_run(tmp_path / "a", overwrite=True) as run:
        run.begin(CONFIG)
    assert run.config == CONFIG and "earlier" not in (run.path / "config.json").read_text()


def test_last_pt_is_removed_when_the_run_is_done_and_kept_if_it_diverged(tmp_path):
    with runs.open_run(tmp_path / "a") as run:
        run.end_epoch(epoch(1), {})
        run.finish(summary("diverged"))
        assert (run.path / "last.pt").exists() and run.status == "diverged"
        run.finish(summary("done"))
        assert not (run.path / "last.pt").exists() and run.status == "done"
        assert run.summary == summary("done")


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(records.RunError, match="--out"), runs.open_run(tmp_path / "file" / "a"):
        pass


def test_open_run_without_writes_reads_the_run_and_changes_no_file(tmp_path):
    with runs.open_run(tmp_path / "name") as run:
        run.begin(CONFIG)
        run.end_epoch(epoch(1), {})
        before = {path: path.read_bytes() for path in run.path.iterdir()}
        with runs.open_run(tmp_path / "name", overwrite=True, writes=False) as onlooker:
            assert onlooker.config is onlooker.load_last() is None, "as for the process that writes"
        with runs.open_run(tmp_path / "name", resume=True, writes=False) as onlooker:
            assert onlooker.config == CONFIG and onlooker.load_last() == {} and onlooker.rows == run.rows
            onlooker.begin(CONFIG.model_copy(update={"device_name": "another"}))
            onlooker.end_epoch(epoch(2), {})
            onlooker.write("model.safetensors", b"")
            onlooker.finish(summary("done"))
        assert onlooker.rows == [epoch(1), epoch(2)]
        assert before == {path: path.read_bytes() for path in run.path.iterdir()}
