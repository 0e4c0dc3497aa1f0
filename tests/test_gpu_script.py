"""gpu.sh on a CPU, at a small scale: slices run, report their results and name the next slice."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench

ROOT = Path(bench.__file__).parent
SLICES = ["smoke", "tests", "short", "full", "speed", "large", "seeds", "deep", "memory", "startup", "rest"]
SLICES.append("grid")


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    where = {"RESULTS": f"{folder}/results", "CACHE": f"{folder}/cache", "DATA_DIR": f"{folder}/data"}
    command = ["bash", str(ROOT / "gpu.sh"), *arguments]
    return subprocess.run(command, env=os.environ | where, capture_output=True, text=True)


def test_list_shows_every_slice_and_those_already_done(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "slices.txt").write_text("speed 212 s, done, 2026-12-01, a GPU\n")
    lines = run("--list", folder=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*SLICES, "speed"] and lines[-1].endswith("a GPU")


def test_the_most_telling_tests_exist():
    named = "".join(re.findall(r'^MOST\+?="(.*)"', (ROOT / "gpu.sh").read_text(), re.MULTILINE)).split(" or ")
    rooms = "kernels_triton", "kernels_sums", "kernels_cuda", "step_triton"
    files = [f"tests/test_{room}.py" for room in rooms]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert len(named) > 7 and [name for name in named if name not in listed.stdout] == []


def test_at_its_time_limit_a_slice_waits_for_its_command_to_end(tmp_path):
    saving = tmp_path / "python3"  # stands for a run that takes a second to save its state
    saving.write_text("#!/bin/bash\ntrap 'sleep 1; touch saved; exit 1' TERM\ntouch begun\nsleep 60 & wait\n")
    saving.chmod(0o755)
    (tmp_path / "gpu.sh").write_bytes((ROOT / "gpu.sh").read_bytes())  # without .venv, it calls our python3
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "gpu.sh", "--dry-run", "--only", "full"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True) as slice:
        while not (tmp_path / "begun").exists():
            assert slice.poll() is None
            time.sleep(0.05)
        os.killpg(slice.pid, signal.SIGTERM)
        assert slice.wait() != 0 and (tmp_path / "saved").exists()


STANDS_FOR_PYTHON = """#!/bin/bash
[[ $1 == train.py ]] || exit 0
echo training
mkdir -p "$RESULTS/runs" "$CACHE/triton"
touch "$CACHE/triton/kernel.cubin" "$CACHE/triton/kernel.ptx"
trap 'sleep 1; echo saved; touch "$RESULTS/runs/last.pt"; exit 1' TERM
touch begun
sleep 60 & wait
"""


def test_a_signal_ends_it_after_the_slice_has_saved_and_is_packed_and_another_machine_continues(tmp_path):
    machines = [tmp_path / "one", tmp_path / "other"]
    for machine in machines:
        machine.mkdir()
        (machine / "gpu.sh").write_bytes((ROOT / "gpu.sh").read_bytes())
        (machine / "python3").write_text(STANDS_FOR_PYTHON)
        (machine / "python3").chmod(0o755)
    one, other = machines
    path = {"PATH": f"{one}:{os.environ['PATH']}", "GIT_COMMIT": "abc", "PACK": str(tmp_path / "pack")}
    command, how = ["bash", "gpu.sh", "--dry-run", "full", "deep"], {"cwd": one, "env": os.environ | path}
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True, **how) as ran:
        while not (one / "begun").exists():
            assert ran.poll() is None
            time.sleep(0.05)
        os.killpg(ran.pid, signal.SIGTERM)
        said = ran.communicate()[0]
    assert ran.returncode == 1 and re.search(r"full \d+ s, stopped or failed", said)
    assert "saved" in said and "gpu.sh: deep:" not in said
    assert sorted(file.name for file in (tmp_path / "pack").iterdir()) == ["cache.tar.gz", "results.tar.gz"]
    (tmp_path / "pack" / "cache.tar.gz").write_bytes(b"not an archive")
    (other / "python3").write_text("#!/bin/bash\n")
    path["PATH"] = f"{other}:{os.environ['PATH']}"
    ended = subprocess.run(command[:3], cwd=other, env=os.environ | path, capture_output=True, text=True)
    assert ended.returncode == 0 and "cache.tar.gz is damaged" in ended.stderr
    results = other / "runs" / "gpu-dry-run" / "results"
    assert (results / "runs" / "last.pt").exists() and "saved" in (results / "full.log").read_text()
    lines = (results / "slices.txt").read_text().splitlines()
    assert "stopped" in lines[0] and lines[0].endswith(", abc")
    assert [line.split()[0] for line in lines[1:]] == SLICES


def test_an_unknown_slice_and_a_missing_gpu_are_refused(tmp_path):
    ended = run("nonsense", folder=tmp_path)
    assert ended.returncode == 2 and "there is no such slice; choose from smoke tests short" in ended.stderr
    if not torch.cuda.is_available():
        ended = run("speed", folder=tmp_path)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "--dry-run" in ended.stderr


IN_SMALL = [["smoke", "short", "full", "seeds", "deep"], ["speed", "large", "memory", "startup"], ["grid"]]


@pytest.mark.parametrize("slices", IN_SMALL)
def test_slices_run_at_a_small_scale_and_name_the_next_slice(tmp_path, slices):
    ended = run("--dry-run", *slices, folder=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for name in slices:
        (said,) = (line for line in ended.stdout.splitlines() if line.startswith(f"gpu.sh: {name} "))
        follows = SLICES[SLICES.index(name) + 1 :]
        assert " s, done, " in said and said.endswith(
            f"next: bash gpu.sh {follows[0]}" if follows else "results"
        )
        assert (tmp_path / "results" / f"{name}.log").stat().st_size > 0
    done = (tmp_path / "results" / "slices.txt").read_text().splitlines()
    assert [line.split()[0] for line in done] == slices
    for rows in (tmp_path / "results").glob("*.jsonl"):
        table = subprocess.run(
            [sys.executable, str(ROOT / "bench.py"), "table", str(rows)], capture_output=True, text=True
        )
        assert table.returncode == 0 and "| n " in table.stdout.replace("|:", "| "), rows
