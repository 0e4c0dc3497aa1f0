"""bench.py through its command line: the rows of each part, a second count of saved bytes, and errors."""

import argparse
import gc
import itertools
import json
import locale
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
import data
import kernels
import models
import progress
from datasets import prepare
from kernels import roofline
from records import measured

ROOT = Path(bench.__file__).parent
SMALL = ["--arch", "resnet8", "--batch-size", "16", "--device", "cpu"]
KEYS = (  # of every row that --json writes, unchanged since the first results
    *("part", "arch", "mode", "impl", "device", "dtype", "batch_size", "images_per_s", "step_ms"),
    *("saved_bytes_per_image", "peak_memory_bytes", "seconds", "ratio_to_stock", "n"),
    *("step_ms_min", "step_ms_max", "run_seconds", "share_of_floor", "bytes_per_s", "flops_per_s"),
    *("device_name", "threads", "versions", "date", "warm_up", "passes", "kernel", "launches"),
    "largest_batch",
)


@pytest.fixture
def small(tiny_folder, tmp_path):
    """Return options of a measurement of a few seconds."""
    where = ["--data", str(tiny_folder), "--data-dir", str(tiny_folder.parent / "prepared")]
    return [*SMALL, *where, "--json", str(tmp_path / "rows.jsonl")]


def status_of(*options: str) -> int:
    """Run bench.py with these options, and return its exit status."""
    return progress.run("bench.py", lambda: bench.main(list(options)))


def rows_in(options: list[str], part: str) -> list[dict]:
    """Return the rows of `part` that --json wrote; assert that each is complete."""
    rows = [json.loads(line) for line in Path(options[options.index("--json") + 1]).read_text().splitlines()]
    for row in rows:
        assert set(row) == set(KEYS) and row["part"] == part and row["batch_size"] in (16, None)
        assert row["device_name"] and torch.__version__.startswith(row["versions"]["torch"]) and row["date"]
    return rows


def test_speed_compares_implementations(small):
    impls = ["stock", "amp", "plain", "lean", "recompute"]
    turns = ["--repeats", "2", "--steps", "1", "--warm-up", "1", "--mode", "bn_only", "all"]
    command = [sys.executable, str(ROOT / "bench.py"), "speed", *small, *turns, "--impl", *impls]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert all(f"  {impl}  " in ended.stdout for impl in impls) and "warm-up: 1 steps" in ended.stdout
    rows = rows_in(small, "speed")
    assert [(row["mode"], row["impl"]) for row in rows] == [(m, i) for m in ("bn_only", "all") for i in impls]
    for row in rows:
        assert 0 < row["step_ms_min"] <= row["step_ms"] <= row["step_ms_max"] and row["n"] == 2
        assert row["images_per_s"] == pytest.approx(16e3 / row["step_ms"])
        stock = next(r for r in rows if r["mode"] == row["mode"] and r["impl"] == "stock")
        assert row["ratio_to_stock"] == pytest.approx(row["images_per_s"] / stock["images_per_s"])
        assert row["dtype"] == "fp32" or row["impl"] != "stock"
        assert row["passes"] == kernels.passes_for("cpu", row["impl"] in ("lean", "recompute")).name


@pytest.mark.stress
@pytest.mark.parametrize("impl", ["compiled", "graphed"])
def test_speed_measures_a_compiled_network(small, impl):
    turns = ["--repeats", "1", "--steps", "1", "--mode", "bn_only"]
    assert status_of("speed", *small, *turns, "--impl", impl) == 0
    (row,) = rows_in(small, "speed")
    assert row["images_per_s"] > 0 and row["ratio_to_stock"] is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_replayed_step_sees_every_batch(device):
    total = torch.zeros(3, device=device)
    step = bench.replayed(lambda a, b: total.add_(a * b), torch.device(device))
    batches = [[torch.full((3,), float(x), device=device) for x in (i, i + 1)] for i in range(6)]
    for batch in batches:
        step(*batch)
        for tensor in batch:
            tensor.zero_()
    assert total.tolist() == [sum(i * (i + 1) for i in range(6))] * 3


@pytest.mark.parametrize(
    "impls",
    [
        ["stock", "stock_workers", "resident"],
        pytest.param(["stock", "resident", "ffcv"], marks=pytest.mark.stress),
    ],
)
def test_data_compares_the_loaders(small, impls):
    turns = ["--repeats", "1", "--steps", "2", "--warm-up", "1"]
    assert status_of("data", *small, *turns, "--impl", *impls) == 0
    rows = rows_in(small, "data")
    assert [row["impl"] for row in rows] == impls
    assert all(row["images_per_s"] > 0 and row["seconds"] > 0 for row in rows)


def test_turns_rotate_and_each_follows_a_lead_in(monkeypatch):
    monkeypatch.setitem(bench.LEAD_IN_S, "cpu", 0.2)
    taken = []

    def steps(name: str):
        while True:
            time.sleep(0.001)
            taken.append(name)
            yield

    given = {"repeats": 2, "steps": 3, "warm_up": 1, "batch_size": 8, "part": "speed"}
    options = argparse.Namespace(device=torch.device("cpu"), **given)
    timed = bench.take_turns({name: partial(steps, name) for name in ("stock", "lean")}, options)
    assert [name for name, _ in itertools.groupby(taken)] == ["stock", "lean", "stock", "lean", "stock"]
    queued = 1 + bench.QUEUED["stock"]  # which takes much less than the lead-in's 0.2 s
    assert [len(list(turn)) for _, turn in itertools.groupby(taken)][2] >= queued + 10 + 3
    for row in timed.values():
        assert (
            row["n"] == 6
            and row["step_ms"] >= 1
            and row["images_per_s"] == pytest.approx(8e3 / row["step_ms"])
        )


def test_a_failed_run_is_reported_in_one_line(small, capsys, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "something before\ntrain.py: it diverged")
    monkeypatch.setattr(bench.subprocess, "run", lambda *command, **settings: failed)
    assert status_of("startup", *small, "--repeats", "1") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "bench.py: train.py: train.py: it diverged"


def test_help_describes_every_implementation(capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(["--help"])
    text = capsys.readouterr().out
    assert not ended.value.code and all(f"    {impl} " in text for impl in bench.STEPS)


def test_startup_is_measured_cold_and_warm(small):
    assert status_of("startup", *small, "--repeats", "1") == 0
    rows = rows_in(small, "startup")
    assert [row["impl"] for row in rows] == ["cold", "warm"]
    assert all(0 < row["seconds"] < row["run_seconds"] for row in rows)


def test_memory_falls_from_stock_to_amp_to_lean_to_recompute(small):
    assert status_of("memory", *small, "--mode", "bn_only", "all") == 0
    rows = rows_in(small, "memory")
    saved = {(row["mode"], row["impl"]): row["saved_bytes_per_image"] for row in rows}
    assert len(rows) == 10 and {row["dtype"] for row in rows} == {"fp32", "bf16"}
    for mode in ("bn_only", "all"):
        assert saved[mode, "recompute"] < saved[mode, "lean"] < saved[mode, "amp"] < saved[mode, "stock"]


def batch_of(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    return images.to(dtype).contiguous(memory_format=torch.channels_last), labels


class Allocations(TorchDispatchMode):
    """Records the storages that operators allocate in this context, but not those of their arguments."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        self.made += [
            (StorageWeakRef(storage), storage.nbytes())
            for storage in storages(out)
            if storage._cdata not in given
        ]
        return out

    def alive_bytes(self) -> int:
        gc.collect()
        return sum({reference.cdata: n for reference, n in self.made if not reference.expired()}.values())


def storages(values) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize(
    ("impl", "mode"), [("lean", "bn_only"), ("lean", "all"), ("recompute", "bn_only"), ("stock", "bn_only")]
)
def test_saved_bytes_equal_the_bytes_alive_between_forward_and_backward(impl, mode):
    dtype = torch.float32 if impl == "stock" else torch.bfloat16
    model = bench.network(impl, "resnet14", mode, 10, torch.device("cpu"))
    batch = batch_of(8, dtype)
    saved = bench.saved_bytes(model, *batch, dtype)  # which also converts frozen weights
    model.zero_grad()
    with Allocations() as allocations:
        loss = bench.loss_of(model, *batch, dtype)
        alive = allocations.alive_bytes()
    assert loss.requires_grad
    images_bytes = batch[0].nbytes if impl != "lean" or mode == "all" else 0  # saved, but not allocated here
    assert saved == pytest.approx(alive + images_bytes, rel=0.03)


def test_a_frozen_resnet32_keeps_at_most_5_percent_more_than_the_floor():
    with torch.device("meta"):
        cost = roofline.cost(models.build("resnet32"), 32)
    least = roofline.least_bytes(cost, torch.bfloat16)
    assert least["floor"] == 2 * 315_392 + 143_360 / 8 and 325e3 < least["floor_recompute"] < 335e3
    images, labels = batch_of(8, torch.bfloat16)
    for impl, bound in (("lean", "floor"), ("recompute", "floor_recompute")):
        model = bench.network(impl, "resnet32", "bn_only", 10, torch.device("cpu"))
        saved = bench.saved_bytes(model, images, labels, torch.bfloat16) / 8
        assert least[bound] <= saved <= 1.05 * least[bound] + (images[0].nbytes if impl == "recompute" else 0)


def test_the_stock_loader_crops_flips_and_normalises():
    image, size = torch.arange(1, 49, dtype=torch.uint8).view(4, 4, 3).numpy(), 4
    split = prepare.Split(image[None], torch.tensor([7]).numpy(), None)
    statistics = (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)
    dataset = data.Dataset("one", "one", "", ("a",), size, *statistics, split, split)
    torch.manual_seed(0)
    drawn = [bench.PerImage(dataset)[0] for _ in range(600)]
    assert all(label == 7 and x.shape == (3, size, size) and x.dtype == torch.float32 for x, label in drawn)
    padded = torch.nn.functional.pad(torch.from_numpy(image).permute(2, 0, 1).float() / 255, (4, 4, 4, 4))
    crops = [padded[:, i : i + size, j : j + size] for i in range(9) for j in range(9)]
    possible = {x.numpy().tobytes() for crop in crops for x in (crop, crop.flip(2))}
    seen = {x.numpy().tobytes() for x, _ in drawn}
    assert seen <= possible and len(seen) > 0.9 * len(possible)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["speed", "--impl", "lena"], "--impl lena: speed has stock"),
        (["data", "--impl", "lean"], "--impl lean: data has stock"),
        (["speed", "--arch", "resnet33"], "--arch resnet33 is not known"),
        (["speed", "--mode", "none"], "--mode none: nothing trains"),
        (["speed", "--mode", "bm"], "--mode bm"),
        (["memory", "--mode", "shortcut", "--arch", "vgg11"], "no parameters in its shortcut"),
        (["speed", "--batch-size", "0"], "--batch-size 0: must be 1 or more"),
        (["speed", "--json", "no/such/folder.jsonl"], "--json no/such/folder.jsonl: name a file"),
        (["velocity"], "velocity"),
        (["table"], "table: name files"),
        (["speed", "rows.jsonl"], "the other parts take none"),
        (["speed", "--json", "/dev/null"], "--json /dev/null: name a file"),
        (["speed", "--dtype", "int8"], "int8"),
        (["data", "--batch-size", "100"], "--batch-size 100"),
        (["memory", "--arch", "resnet9998_w1000"], "--arch resnet9998_w1000 is too large: about 1.6e+14"),
        (["speed", "--arch", "resnet" + "9" * 5000], "is not known"),
        *(([part, "--steps", "9" * 5000], "--steps") for part in ("speed", "data")),
        (["memory", "--budget", "9" * 5000 + "GB"], "give bytes"),
    ],
)
def test_unusable_options_are_refused_in_one_or_two_lines(
    small, capsys, monkeypatch, tmp_path, options, said
):
    monkeypatch.chdir(tmp_path)
    where = small[small.index("--data") : small.index("--json")]
    assert status_of(*options, "--device", "cpu", *where) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.startswith("bench.py: ") and not captured.out
    assert captured.err.count("\n") <= 2


def test_the_largest_batch_fills_the_budget(small):
    turns = ["--impl", "stock", "lean", "--mode", "bn_only", "--budget", "1GB"]
    assert status_of("memory", *small, *turns) == 0
    rows = {row["impl"]: row for row in rows_in(small, "memory")}
    for impl in ("stock", "lean"):
        kept = rows[impl]["largest_batch"] * rows[impl]["saved_bytes_per_image"]
        assert 0.99e9 < kept < 1e9, "the weights take the rest"
    assert rows["lean"]["largest_batch"] > 2 * rows["stock"]["largest_batch"]
    assert rows["floor"]["largest_batch"] is None
    assert [bench.to_bytes(text) for text in ("7", "1.5KB", "2 GiB")] == [7, 1500, 2**31]


@pytest.mark.parametrize("impl", ["compiled", "graphed"])
def test_compiling_in_an_ascii_locale_is_refused_before_measuring(small, monkeypatch, capsys, impl):
    """torch.compile reads torch's own files, which are in UTF-8, in the encoding of the locale."""
    monkeypatch.setattr(locale, "getpreferredencoding", lambda _: "ANSI_X3.4-1968")
    assert status_of("speed", *small, "--impl", impl, "--mode", "bn_only") == 2
    said = capsys.readouterr().err
    assert "PYTHONUTF8=1" in said and said.count("\n") == 2
    assert bench.parse_options(["speed", *small, "--impl", "lean"]).impl == ["lean"]


@pytest.mark.parametrize("impl", ["compiled", "graphed"])
def test_compiling_without_a_compiler_is_refused_before_measuring(small, monkeypatch, capsys, impl):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert status_of("speed", *small, "--impl", impl, "--mode", "bn_only") == 2
    said = capsys.readouterr().err
    assert "no-such-compiler" in said and "--impl" in said and said.count("\n") == 1


def test_rows_that_cannot_be_written_are_shown(small, monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(measured, "write_atomically", full)
    assert status_of("memory", *small, "--impl", "lean", "--mode", "bn_only") == 1
    said = capsys.readouterr()
    assert "resnet8" in said.out and "No space left on device" in said.err
    monkeypatch.setattr(bench.os, "access", lambda *_: False)
    assert status_of("memory", *small) == 2
    assert "can be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changed", [{"batch_size": None}, {"step_ms": 10**400}, {"versions": {}}, None], ids=str
)
def test_rows_that_bench_did_not_write_are_refused(tmp_path, capsys, changed):
    rows = tmp_path / "rows.jsonl"
    few = ("--arch", "resnet8", "--impl", "lean", "--batch-size", "8")
    assert status_of("memory", *few, "--json", str(rows)) == 0
    row = json.loads(rows.read_text().splitlines()[0])
    assert status_of("table", str(rows)) == 0
    row = {name: value for name, value in (row | (changed or {})).items() if value is not None}
    rows.write_text(json.dumps(row) if changed else "[" * 10**5)
    capsys.readouterr()
    assert status_of("table", str(rows)) == 2
    said = capsys.readouterr()
    assert "is not what --json has written" in said.err and not said.out


@pytest.mark.parametrize("given", [["memory", "--budget", "much"], ["speed", "--budget", "1GB"]])
def test_an_unusable_budget_gives_one_line(given, capsys):
    assert status_of(*given) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_profile_has_every_operator_and_their_sum(small):
    assert status_of("profile", *small, "--steps", "2", "--warm-up", "1") == 0
    *rows, total = rows_in(small, "profile")
    assert total["kernel"] == "all" and {"_Block", "_BlockBackward"} <= {row["kernel"] for row in rows}
    assert total["step_ms"] == pytest.approx(sum(row["step_ms"] for row in rows))
    assert total["launches"] == pytest.approx(sum(row["launches"] for row in rows)) and total["n"] == 2


def test_rows_are_shown_in_markdown(small, capsys):
    assert status_of("memory", *small, "--impl", "lean", "--mode", "bn_only") == 0
    file = small[-1]
    capsys.readouterr()
    assert status_of("table", file) == 0
    title, _, head, rule, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("rows.jsonl, ") and "batches of 16" in title and set(rule) <= set("|:-")
    assert "saved KB/image" in head and rows[0].split("|")[3].strip() == "lean"
    assert status_of("table", __file__) == 2 and "is not what --json has written" in capsys.readouterr().err


@pytest.mark.gpu
def test_gpu_rows_have_rates_share_of_floor_and_peak_memory(tiny_folder, tmp_path):
    options = ["--arch", "resnet8", "--batch-size", "16", "--json", str(tmp_path / "rows.jsonl")]
    options += ["--data", str(tiny_folder), "--data-dir", str(tiny_folder.parent / "prepared")]
    options += ["--repeats", "2", "--steps", "4", "--mode", "bn_only"]
    assert status_of("speed", *options, "--impl", "stock", "amp", "plain", "lean") == 0
    rows = rows_in(options, "speed")
    assert len(rows) == 6 and rows[0]["bytes_per_s"] > 1e11 and rows[1]["flops_per_s"] > 1e12
    for row in rows[2:]:
        assert 0 < row["share_of_floor"] < 1 and row["peak_memory_bytes"] > 0


def test_rows_before_an_interruption_are_kept_and_shown(small, monkeypatch, capsys):
    def interrupted(options, dataset):
        yield "lean", {"arch": "resnet8", "mode": "bn_only", "n": 1}
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "memory", interrupted)
    assert status_of("memory", *small) == 1
    (row,) = rows_in(small, "memory")
    assert row["impl"] == "lean" and "resnet8" in capsys.readouterr().out


def test_without_ffcv_the_other_loaders_are_compared(monkeypatch):
    monkeypatch.setattr(prepare, "import_ffcv", lambda: False)
    assert "ffcv" not in bench.parse_options(["data"]).impl
    assert bench.parse_options(["data", "--impl", "ffcv"]).impl == ["ffcv"], "which then says what is missing"
