"""Tests of sweep.py: the grids, and cells that are shared, fail, are killed or resume."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import progress
import records
import runs
import sweep
from sweep import make_grid

ROOT = Path(sweep.__file__).parent
EPOCHS = 12


@pytest.fixture
def small(tiny_folder, tmp_path, monkeypatch):
    """Set the environment of a grid of four small cells, and return their train.py options."""
    for name in ("GRID", "JOBS", "REPLICAS", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    chosen = {"ARCHS": "resnet8", "MODES": "bn_only random", "SEEDS": "0 1", "OMP_NUM_THREADS": "1"}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    options = ["--data", str(tiny_folder), "--data-dir", str(tiny_folder.parent / "prepared")]
    options += ["--device", "cpu", "--batch-size", "32", "--epochs", str(EPOCHS), "--milestones", "8"]
    return [*options, "--no-compile", "--out", str(tmp_path / "runs")]


def begin(options: list[str], **settings) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "sweep.py"), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings)


def end(process: subprocess.Popen, status: int) -> str:
    try:
        said, _ = process.communicate(timeout=600)
    finally:
        process.kill()  # its train.py processes end with it
    assert process.returncode == status, said
    return said


def main(options: list[str]) -> int:
    """Return the exit status of `python sweep.py`, run in this process."""
    return progress.run("sweep.py", lambda: sweep.main(options))


def folders(out: Path) -> list[Path]:
    return sorted(path for path in out.iterdir() if path.name != "logs")


def epochs_trained(out: Path) -> dict[str, list[int]]:
    """Return for each log, by its name, the epochs that its processes trained, in order."""
    logs = (out / "logs").glob("*.log")
    return {
        log.stem: [int(e) for e in re.findall(rf"epoch (\d+)/{EPOCHS} ", log.read_text())] for log in logs
    }


def test_the_named_grids_have_the_expected_cells(monkeypatch):
    for name in ("ARCHS", "MODES", "SEEDS"):
        monkeypatch.delenv(name, raising=False)
    counts = {name: len(make_grid({"GRID": name}, [])) for name in ("", *sweep.GRIDS)}
    assert len(make_grid({"SEEDS": "0 1"}, ["--log", "wandb"])) == 18, "though a tracker follows only one run"
    counts_of_the_questions = {name: counts.pop(name) for name in ("tuning", "warmstart", "retrain")}
    assert counts == {"": 27, "depth": 63, "width": 54, "vgg": 36, "parts": 63, "init": 72}
    assert counts_of_the_questions == {"tuning": 24, "warmstart": 3 * (1 + 2 * 4), "retrain": 3 * (1 + 6)}
    assert [cell.path.name for cell in make_grid({"SEEDS": "0 1"}, [])[:3]] == [
        "cifar10-resnet32-all-s0",
        "cifar10-resnet32-all-s1",
        "cifar10-resnet32-bn_only-s0",
    ]
    parts = {cell.options.mode for cell in make_grid({"GRID": "parts"}, [])}
    assert {"bn+shortcut+output", "output+conv", "none"} < parts, "the last but one: all but BatchNorm"
    names = {cell.path.name for cell in make_grid({"GRID": "init"}, [])}
    assert {"cifar10-resnet56-bn_only-s2", "cifar10-resnet56-bn_only-s2-conv_initbinary"} <= names


def write_config(cell: sweep.Cell, **options) -> None:
    """Write config.json of a run with the cell's options, changed by `options`."""
    asked = dataclasses.replace(cell.options, **options)
    spec = {
        name: getattr(asked, name) for name in records.NetworkSpec.model_fields if hasattr(asked, name)
    } | {
        "fingerprint": "0",
        "image_size": 16,
        "classes": ("ash", "elm"),
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "train_images": 96,
        "val_images": 0,
        "dtype": "fp32",
        "compiled": False,
        "processes": 1,
    }
    config = records.Config(
        options=asked,
        spec=records.NetworkSpec(**spec),
        parent=None,
        data_title="tiny",
        frozen_sha256="0" * 64,
        initial_sha256=None,
        device_name="a CPU",
        versions={},
        git_commit=None,
    )
    (cell.path / "config.json").write_text(config.to_json())


def write_summary(cell: sweep.Cell, status: str, test_acc: float | None = None) -> None:
    """Write summary.json of a run of the cell with this status and accuracy (percent)."""
    summary = records.Summary(
        status=status,
        why=None,
        data="tiny",
        data_title="tiny",
        arch=cell.options.arch,
        mode=cell.options.mode,
        seed=cell.options.seed,
        variant={},
        params_total=2,
        params_trained=1,
        final_test_acc=test_acc,
        best_test_acc=test_acc,
        epochs_done=EPOCHS,
        train_s=1.0,
        startup_s=1.0,
        peak_memory_bytes=None,
        checkpoint_bytes=4,
        full_bytes=8,
        frozen_sha256="0" * 64,
    )
    (cell.path / "summary.json").write_text(summary.to_json())


def metrics(epochs: int) -> str:
    """Return the text of metrics.jsonl after this many epochs of a minute each."""
    measured = {"train_loss": 1.0, "train_acc": 50.0, "test_loss": 1.0, "test_acc": 50.0, "images_per_s": 9.0}
    rows = [records.Epoch(epoch=epoch + 1, lr=0.1, epoch_s=60.0, **measured) for epoch in range(epochs)]
    return "".join(row.to_json(None) for row in rows)


def test_list_shows_the_status_and_progress_of_every_cell(small, tmp_path, capsys):
    cells = make_grid(os.environ, small)
    done, running, failed, begun = (cell.path for cell in cells)
    for cell in cells:
        cell.path.mkdir(parents=True)
        write_config(cell)
    (done / "metrics.jsonl").write_text(metrics(EPOCHS))
    (done / "last.pt").touch()  # as if the run was killed before it removed last.pt
    write_summary(cells[0], "done", 51.234)
    write_summary(cells[2], "diverged")
    (begun / "metrics.jsonl").write_text(metrics(2) + '{"epoch": 3, "epo')
    with runs.open_run(tmp_path / "runs" / running.name, resume=True):
        assert main([*small, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:4]] == [
        ["0", done.name, "done"],
        ["1", running.name, "running"],
        ["2", failed.name, "diverged"],
        ["3", begun.name, "to"],
    ]
    assert lines[0].endswith("51.23 %")
    assert lines[1].endswith("12 min left") and lines[3].endswith("to do     2 of 12 epochs  10 min left")
    assert lines[4] == "4 cells: 1 done, 1 running, 1 diverged, 1 to do; about 34 min left"
    looked_at = sorted(path.name for path in running.iterdir())
    assert looked_at == [".lock", "config.json"], "looking leaves nothing"
    assert not (done / "last.pt").exists()
    write_config(cells[0], lr=0.2)
    assert main([*small, "--list"]) == 0
    assert capsys.readouterr().out.split()[2] == "failed", "another run, that is done, is not this one"


def test_a_cell_with_an_unreadable_summary_counts_as_failed(small):
    cell = make_grid(os.environ, small)[0]
    cell.path.mkdir(parents=True)
    (cell.path / "summary.json").write_text('{"status": "do')
    cell.look()
    assert cell.status == "failed" and cell.why.startswith(f"{cell.path / 'summary.json'}: ")


def test_a_sweep_that_is_killed_twice_trains_every_cell_once(small, tmp_path):
    out = tmp_path / "runs"
    for kill, status in ((signal.SIGTERM, 1), (signal.SIGKILL, -signal.SIGKILL)):
        before = sum(map(len, epochs_trained(out).values()))
        process = begin(small)
        deadline = time.monotonic() + 120
        while sum(map(len, epochs_trained(out).values())) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(kill)
        end(process, status)
        for path in folders(out):  # even if the sweep had no time to stop them
            while runs.in_use(path) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not runs.in_use(path), "no process is left behind"
    assert any(runs.Run(path).status == "interrupted" for path in folders(out))
    end(begin(small), 0)
    assert [runs.Run(path).status for path in folders(out)] == 4 * ["done"]
    trained = epochs_trained(out)  # the signal may have prevented the line of a saved epoch
    assert len(trained) == 4 and all(sorted(set(epochs)) == epochs for epochs in trained.values())
    for path in folders(out):
        assert [row.epoch for row in records.read_epochs(path)] == list(range(1, EPOCHS + 1))
    assert "4 of 4 cells done" in end(begin(small), 0)
    assert epochs_trained(out) == trained, "what is done is not trained again"


def test_two_sweeps_share_the_cells(small, tmp_path, monkeypatch):
    monkeypatch.setenv("SEEDS", "0")
    pair = [begin(small), begin(small)]
    for process in pair:
        assert "2 of 2 cells done" in end(process, 0)
    trained = epochs_trained(tmp_path / "runs")
    assert len(trained) == 2 and all(epochs == list(range(1, EPOCHS + 1)) for epochs in trained.values())


def test_replicas_share_a_process_and_jobs_run_at_once(small, tmp_path, monkeypatch):
    monkeypatch.setenv("JOBS", "2")
    monkeypatch.setenv("REPLICAS", "2")
    said = end(begin(small), 0)
    assert said.count("\ndone ") == 4 and "stopping" not in said, "each process is left to end by itself"
    logs = sorted((tmp_path / "runs" / "logs").iterdir())
    assert [re.search(r"resnet8-(.*?)-batch", log.name)[1] for log in logs] == [
        "bn_only-s0_1",
        "random-s0_1",
    ]
    assert [runs.Run(path).status for path in folders(tmp_path / "runs")] == 4 * ["done"]
    assert all("--seed 0 1\n" in log.read_text() for log in logs)


def test_every_visible_gpu_gets_its_processes(monkeypatch):
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in sweep.places("auto", 2)] == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7a")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in sweep.places("cuda", 1)] == ["5", "GPU-7a"]
    assert sweep.places("cpu", 1) == [{}], "no GPU where none is wanted"
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in sweep.places("auto", 1)] == ["MIG-a", "MIG-b"]


def test_seeds_spread_over_free_places_before_they_share_a_process(small, monkeypatch):
    monkeypatch.setenv("SEEDS", "0 1 2")
    cells = make_grid(os.environ, small)
    at_work = sweep.Sweep(cells, 4 * [{}], 3)
    assert len(at_work.next()) == 2, "six cells, four places"
    at_work.free = [{}]
    assert [cell.options.seed for cell in at_work.next()] == [0, 1, 2]
    at_work.alone = {cells[0]}
    assert at_work.next() == cells[:1], "what failed beside others is tried by itself"
    at_work.alone = {cells[1]}
    assert at_work.next() == [cells[0], cells[2]]


def test_a_cell_that_fails_is_named_and_the_rest_go_on(small, tmp_path, monkeypatch):
    monkeypatch.setenv("MODES", "shortcut bn_only")
    monkeypatch.setenv("SEEDS", "0")
    said = end(begin([*small, "--shortcut", "pad"]), 1)
    header, cell, why, log = said.splitlines()[-4:]
    assert header == "1 of 2 cells failed:" and cell.startswith("failed ") and "-shortcut-s0-" in cell
    assert why.strip() == "--mode shortcut: this network has no parameters in its shortcut"
    assert why.strip() in Path(log.strip()).read_text()
    assert [runs.Run(path).status for path in folders(tmp_path / "runs")] == ["done"]


@pytest.fixture
def chained(small, monkeypatch):
    """Set the environment of a grid of one cell and six that start from it, and return the options."""
    monkeypatch.setenv("GRID", "retrain")
    monkeypatch.setenv("MODES", "all")
    monkeypatch.setenv("SEEDS", "0")
    return [*small, "--lr", "0.05"]


def test_cells_whose_parent_failed_are_not_tried(chained, tmp_path):
    said = end(begin([*chained, "--lr", "1e30"]), 1)
    assert said.count("diverged ") == 2 and said.count("started ") == 1, "once as it happens, once at the end"
    assert "7 of 7 cells failed" in said and said.count("its parent run failed") == 6
    assert len(folders(tmp_path / "runs")) == 1


def test_a_slurm_task_trains_the_parent_of_its_cell_first(chained, monkeypatch):
    first, *rest = make_grid(os.environ, chained)
    assert first.parent is None and [cell.parent for cell in rest] == [first.path] * 6
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("JOBS", "2")
    end(begin(chained), 0)
    assert folders(first.path.parent) == sorted([first.path, rest[1].path])
    assert all(runs.Run(path).status == "done" for path in (first.path, rest[1].path))
    done = (first.path / "summary.json").stat().st_mtime_ns
    assert (rest[1].path / "config.json").stat().st_mtime_ns > done
    config = runs.Run(rest[1].path).config
    assert config.parent.run == first.path.name and config.options.reset_bn


def test_the_runs_of_a_warm_start_have_160_epochs_together(monkeypatch):
    cells = make_grid({"GRID": "warmstart", "SEEDS": "0 1", "ARCHS": "resnet14"}, [])
    later = [cell for cell in cells if cell.parent]
    by_path = {cell.path: cell for cell in cells}
    assert [cell.options.milestones for cell in later[::2]] == [(75, 115), (70, 110), (60, 100), (40, 80)]
    for cell in later:
        before = by_path[cell.parent]
        assert before.options.epochs + cell.options.epochs == 160 and before.options.mode == "bn_only"
        assert before.options.seed == cell.options.seed and cell.options.mode == "all"
    assert later[0].arguments == later[1].arguments, "so that seeds may train side by side"


@pytest.mark.parametrize("name", ["warmstart", "retrain"])
def test_a_run_shorter_than_the_warm_up_shortens_it(name):
    cells = make_grid({"GRID": name, "SEEDS": "0", "ARCHS": "resnet14"}, ["--warmup-epochs", "30"])
    assert {cell.options.warmup_epochs for cell in cells} == (
        {0, 5, 10, 20, 30} if name == "warmstart" else {20, 30}
    )


@pytest.mark.parametrize("name", ["warmstart", "retrain"])
def test_reset_bn_does_not_apply_to_cells_that_start_from_a_cell(name):
    """--reset-bn would discard the BatchNorm that the parent cell has trained."""
    own = ["--init-from", __file__, "--reset-bn", "--schedule", "cosine", "--min-lr", "0.05"]
    cells = make_grid({"GRID": name, "SEEDS": "0", "ARCHS": "resnet14"}, own)
    later = [cell for cell in cells if str(cell.parent) != __file__]
    assert all(cell.options.reset_bn for cell in cells if cell not in later)
    assert sum(not cell.options.reset_bn for cell in later) == 4
    assert {cell.options.min_lr for cell in cells} == {0.05, 0.0 if name == "warmstart" else 0.01}


def test_a_slurm_task_runs_its_own_cell(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    end(begin(small), 0)
    assert [path.name.split("-batch")[0] for path in folders(tmp_path / "runs")] == ["tiny-resnet8-random-s0"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert main(small) == 2
    assert "no cell 4 in the grid: give --array=0-3" in capsys.readouterr().err


def test_a_terminal_shows_live_progress(small, monkeypatch):
    monkeypatch.setenv("SEEDS", "0")
    monkeypatch.setenv("MODES", "bn_only")
    pty = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
    command = [sys.executable, "-c", pty, sys.executable, str(ROOT / "sweep.py"), *small]
    environment = {**os.environ, "COLUMNS": "200", "LINES": "40", "TERM": "xterm"}
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120).stdout
    assert "0 of 1 cells done" in shown and "images/s" in shown
    assert re.search(rf"\d+/{EPOCHS}", shown) and "1 of 1 cells done" in shown


@pytest.mark.parametrize(
    "environment, options, named",
    [
        ({"GRID": "breadth"}, [], "GRID=breadth: choose from depth"),
        ({"SEEDS": ""}, [], 'SEEDS=""'),
        ({"SEEDS": "0 --lr 3"}, [], "SEEDS: '--lr' is not a whole number"),
        ({"ARCHS": "resnet32 resnet33"}, [], "--arch resnet33"),
        ({"MODES": "batchnorm"}, [], "--mode batchnorm"),
        ({"JOBS": "0"}, [], "JOBS=0"),
        ({"JOBS": "9" * 5000}, [], "JOBS=9"),
        ({"SEEDS": "9" * 5000}, [], "--seed"),
        ({"SLURM_ARRAY_TASK_ID": "9" * 5000}, [], "give --array=0-26"),
        ({"SLURM_ARRAY_TASK_ID": "x"}, [], "there is no cell x in the grid"),
        ({}, ["--seed", "1"], "--seed: a sweep takes SEEDS"),
        ({}, ["--overwrite"], "--overwrite: a sweep resumes"),
        ({}, ["--lr", "fast"], "--lr"),
        ({}, ["--data", "nowhere"], "--data nowhere: no such folder"),
    ],
)
def test_unusable_settings_are_refused_before_the_first_run(environment, options, named, monkeypatch, capfd):
    for name in ("ARCHS", "MODES", "SEEDS", "GRID", "JOBS", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(options) == 2
    said = capfd.readouterr().err
    assert named in said and said.count("\n") <= 2


def test_the_shell_script_works_from_any_folder(tmp_path):
    if not (ROOT / ".venv" / ".ready").exists():
        pytest.skip("needs the environment that run.sh makes")
    command = ["bash", str(ROOT / "sweep.sh"), "--list"]
    listed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert listed.splitlines()[26].split()[:2] == ["26", "cifar10-resnet110-random-s2"]


def test_an_interruption_lost_while_a_process_starts_ends_the_sweep(small, monkeypatch, capsys):
    started = sweep.Job.__init__

    def start_and_lose(*given):
        started(*given)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the only trace of a lost `progress.interrupt`

    monkeypatch.setattr(sweep.Job, "__init__", start_and_lose)
    assert main(small) == 1 and "interrupted" in capsys.readouterr().err
