"""Stress tests of scripts without disk space, memory, a home, a compiler, open streams or a UTF-8 locale."""

import contextlib
import fcntl
import functools
import json
import multiprocessing.pool
import os
import re
import resource
import shutil
import struct
import sys
import termios
from pathlib import Path

import pytest
from surroundings import (
    ASCII,
    LONGEST_S,
    MEASURE,
    NAMES,
    WRITING,
    World,
    disk,
    ended,
    fill,
    fresh,
    told_well,
    whole,
)

pytestmark = [
    pytest.mark.stress,
    pytest.mark.tried("surroundings taken away: room, memory, home, compiler, streams, columns"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_folder) -> World:
    folder = tmp_path_factory.mktemp("world")
    world = World(folder, ["--data", str(tiny_folder), "--data-dir", str(folder / "data")], folder)
    told_well("train", world.ends("train", folder), (0,))
    (world.run,) = (folder / "runs").iterdir()
    return world


@pytest.fixture
def world(prepared, tmp_path, monkeypatch) -> World:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(prepared.run, tmp_path / prepared.run.name)
    return prepared


# ---- disks ----


def test_a_run_that_fills_a_disk_ends_in_a_line_and_resumes_with_room(world, tmp_path):
    there, sizes = tmp_path / "disk", (0, *range(4, 49, 4))
    for kilobytes in sizes:
        with disk(there, max(4, kilobytes)) as mount:
            if kilobytes == 0:
                fill(there)
            told_well("train", world.ends("train", there), (0, 1), "No space left on device")
            whole(there)
            mount("remount,size=9m")
            told_well("train", world.ends("train", there), (0,))
            (made,) = there.glob("runs/*/model.safetensors")
            assert made.read_bytes() == (world.run / made.name).read_bytes()


@pytest.mark.parametrize("how", ["full", "read-only"])
@pytest.mark.parametrize("name", WRITING)
def test_an_unwritable_disk_is_reported_and_used_once_it_has_room(world, tmp_path, name, how):
    there, script = tmp_path / "disk", world.commands("")[name][0]
    with disk(there, 300) as mount:
        shutil.copytree(world.run, there / world.run.name)
        fill(there) if how == "full" else mount("remount,ro")
        said = "No space left on device" if how == "full" else "Read-only file system|can be written to"
        of = world.ends(name, there)
        told_well(script, of, (1, 2), said)
        assert script != "bench" or how != "full" or "batches of 32" in of.out, "rows are shown at least"
        whole(there)
        mount("remount,rw,size=20m")
        told_well(script, world.ends(name, there), (0,))
        whole(there)


@pytest.mark.parametrize("kilobytes", [8, 80, 96])
def test_images_are_prepared_once_there_is_room_and_until_then_refused(world, tmp_path, kilobytes):
    there = tmp_path / "disk"
    argv = [*world.train(tmp_path / "runs", "--overwrite"), "--data-dir", str(there)]
    with disk(there, kilobytes) as mount:
        told_well(
            "train", ended("train", argv, **world.environment), (2,), "bytes for prepared data|No space"
        )
        assert not list(there.rglob("*.part*"))
        mount("remount,size=9m")
        told_well("train", ended("train", argv, **world.environment), (0,))
        mount("remount,ro")
        told_well("train", ended("train", argv, **world.environment), (0,))


@pytest.mark.parametrize("options", ["remount,size=4k", "remount,ro"])
def test_runs_need_no_room_for_compiled_code_or_temporary_files(world, tmp_path, options):
    there = tmp_path / "disk"
    with disk(there, 4) as mount:
        fill(there)
        mount(options)
        for name, compiles in {"XDG_CACHE_HOME": options.endswith("ro"), "TMPDIR": True}.items():
            of = world.ends("train", tmp_path / name, **{name: str(there)})
            told_well("train", of, (0,))
            assert compiles or "PyTorch's slower kernels are used" in of.err
            assert of.err.count("\n") <= 3  # a warning takes two


# ---- limits ----


def at_most(kind: int, size: int) -> None:
    resource.setrlimit(kind, (size, size))


def more_memory(size: int) -> None:
    """Limit the process to `size` bytes of address space beyond what it has now."""
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    at_most(resource.RLIMIT_AS, used + size)


@pytest.mark.parametrize("name", WRITING)
def test_a_limit_on_the_size_of_files_is_reported(world, tmp_path, name):
    script, out = world.commands("")[name][0], tmp_path / "out"
    shutil.copytree(world.run, out / world.run.name)
    for size in (0, 1000, 10_000) if name == "train" else (300,):
        limit = functools.partial(at_most, resource.RLIMIT_FSIZE, size)
        told_well(script, world.ends(name, out, limit), (1, 2), "File too large")
        whole(out)
    told_well(script, world.ends(name, out), (0,))
    whole(out)


def test_a_limit_on_the_size_of_files_is_reported_with_a_dataloader(world, tmp_path):
    script, argv = world.commands(tmp_path)["stock"]
    limit = functools.partial(at_most, resource.RLIMIT_FSIZE, 300)
    outcome = fresh(script, argv, limit, **world.environment)
    told_well(script, outcome, (1,), "File too large.*free some space")


@pytest.mark.parametrize("more", [[], ["--mode", "all"], ["--memory", "stock", "--no-compile"]])
def test_out_of_memory_names_the_batch_size_and_how_to_find_one_that_fits(world, tmp_path, more):
    large = ["--data", "synthetic", "--arch", "resnet14", "--train-subset", "4000", "--batch-size", "4000"]
    large += ["--epochs", "1", "--milestones", "--eval-every", "9", *more]
    argv, said = [*world.train(tmp_path / "runs", "--overwrite"), *large], ""
    for megabytes in (450, 600, 750):  # the smallest may not suffice to start
        of = ended("train", argv, functools.partial(more_memory, megabytes << 20), **world.environment)
        told_well("train", of, (1,), "out of memory.* try a smaller")
        said += of.err
        whole(tmp_path / "runs")
    assert re.search(r"out of memory at --batch-size 4000; .* says what would fit", said), said


# ---- no home, no compiler ----


@pytest.mark.parametrize("home", [None, "/proc/none", "/proc"])
def test_train_and_report_work_without_a_home(world, tmp_path, home):
    nothing = dict.fromkeys(("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"))
    for name in ("train", "report") if home == "/proc" else ("train",):
        script, argv = world.commands(tmp_path / "out")[name]
        argv = [*argv, *(["--no-compile"] if name == "train" else [])]
        of = fresh(script, argv, **nothing, HOME=home)
        told_well(script, of, (0,))
        assert (home is None) or ("compiled kernels are not cached there" in of.err)


def test_without_a_compiler_train_works_and_torch_compile_is_refused(world, tmp_path):
    nothing = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    of = world.ends("train", tmp_path / "out", **nothing)
    told_well("train", of, (0,))
    assert "PyTorch's slower kernels are used" in of.err
    argv = ["speed", "--impl", "compiled", *MEASURE, *world.images]
    told_well("bench", ended("bench", argv, **world.environment | nothing), (2,), "no C\\+\\+ compiler .g")


# ---- streams, locale, terminal ----


def streams(closed: tuple[int, ...] = (), full: tuple[int, ...] = ()) -> None:
    """Close standard streams, by number, or send them to /dev/full, as if a shell had done so."""
    for number in (*closed, *full):
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    for number in full:
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], open(number, "w", closefd=False))  # noqa: SIM115


STREAMS = {"all closed": {"closed": (0, 1, 2)}, "output full": {"full": (1,)}, "errors full": {"full": (2,)}}
FEW = {"input closed": {"closed": (0,)}, "output closed": {"closed": (1,)}, "errors closed": {"closed": (2,)}}


@pytest.mark.parametrize("how", STREAMS | FEW)
def test_closed_or_full_streams_cause_no_traceback(world, tmp_path, how):
    for name in NAMES if how in STREAMS else ("train", "memory", "rebuild"):
        script, out = world.commands("")[name][0], tmp_path / name
        shutil.copytree(world.run, out / world.run.name)
        of = world.ends(name, out, functools.partial(streams, **(STREAMS | FEW)[how]))
        fails = how == "output full" and name != "report"  # report prints nothing
        told_well(script, of, (1,) if fails else (0,), "No space left on device, where its output goes")
        whole(out)
        if name == "train":
            told_well(script, world.ends(name, out), (0,))
            (made,) = out.glob("runs/*/model.safetensors")
            assert made.read_bytes() == (world.run / made.name).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_scripts_work_in_an_ascii_locale_and_a_folder_with_accents(world, tmp_path, name):
    script, argv = world.commands(out := tmp_path / "\N{LATIN SMALL LETTER E WITH ACUTE}t\xe9")[name]
    shutil.copytree(world.run, out / world.run.name)
    argv = [argument for argument in argv if argument != "--list"]  # so that sweep.py trains
    told_well(script, fresh(script, argv, **world.environment, **ASCII), (0,))
    whole(out)


def on_terminal(name: str) -> None:
    for number in (0, 1, 2):
        os.dup2(os.open(name, os.O_RDWR | os.O_NOCTTY), number)
    for variable in ("COLUMNS", "LINES"):
        os.environ.pop(variable, None)


@pytest.mark.parametrize("kind", ["xterm-256color", "dumb"])
def test_a_terminal_of_20_columns_shows_everything(world, tmp_path, kind):
    for name in NAMES:
        script, out = world.commands("")[name][0], tmp_path / name
        shutil.copytree(world.run, out / world.run.name)
        shown, terminal = os.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
        reading = multiprocessing.pool.ThreadPool(1).apply_async(_until_closed, (shown,))
        of = world.ends(name, out, functools.partial(on_terminal, os.ttyname(terminal)), TERM=kind)
        os.close(terminal)
        told_well(script, of._replace(out=reading.get(LONGEST_S)), (0,))
        if name == "train":
            summary = json.loads(next(out.glob("runs/*/summary.json")).read_text())
            letters = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[^\w.%]", "", reading.get())
            for shows in (f"{summary['final_test_acc']:.2f}", f"{summary['params_trained']:,}", "2epochs"):
                assert shows in letters, letters


def _until_closed(terminal: int) -> str:
    text = b""
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 4096):
            text += part
    return text.decode(errors="replace")
