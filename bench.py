"""The same step, timed and weighed beside what people would otherwise use: one process, one machine.

    python bench.py speed --arch resnet32 --mode bn_only all   # images/s of a training step
    python bench.py memory --arch resnet32                     # bytes kept for the backward pass
    python bench.py data                                       # images/s of the loaders by themselves
    python bench.py startup                                    # seconds until train.py's first step

What is compared (--impl) is in rivals.py: stock, amp and compiled, and of ours plain, lean and recompute.
All are built and warmed up before anything is timed; then they take turns, in rotating order. A row is the
median of its turns, beside the fastest and slowest. `/ stock` is of images/s, in `memory` of bytes. On a GPU,
peak memory is what an implementation takes by itself, and the floor (floor.py) follows from the device's own
copy and matrix rates. --json FILE gets one JSON object per row, with what it was measured on.
"""

import argparse
import dataclasses
import datetime
import functools
import gc
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import data
import freeze
import models
import provenance
import rivals
import step as steps
from kernels import roofline as floor

IMPLS = {"data": ("stock", "resident", "ffcv"), "startup": ("cold", "warm")}
IMPLS |= {"speed": rivals.STEPS, "memory": rivals.STEPS}
KEYS = (
    *("part", "arch", "mode", "impl", "device", "dtype", "batch_size", "images_per_s", "step_ms"),
    *("saved_bytes_per_image", "peak_memory_bytes", "seconds", "ratio_to_stock", "n"),
    *("step_ms_min", "step_ms_max", "run_seconds", "share_of_floor", "bytes_per_s", "flops_per_s"),
)


class BenchError(ValueError):
    """An option that cannot be used; the message says what can."""


class BenchFailed(Exception):
    """A measurement that came to nothing; the message says why."""


# ---- turns, and what they come to ----


@dataclasses.dataclass
class Contender:
    """Something that goes on for ever, a step at a time, and how long a step took in each of its turns."""

    turns: Iterator[object]
    lead_in: int  # steps at the start of each turn that are not timed
    step_s: list[float] = dataclasses.field(default_factory=list)

    def go(self, count: int, device: torch.device) -> float:
        """Seconds that `count` steps took, the device's part included."""
        synchronize(device)
        began = time.perf_counter()
        for _ in range(count):
            next(self.turns)
        synchronize(device)
        return time.perf_counter() - began


def lead_in(impl: str) -> int:
    """A loader with a queue starts a turn with a full one: that many steps look faster than they are."""
    return 1 + rivals.WORKERS * rivals.PREFETCH if impl in ("stock", "ffcv") else 1


def alternate(contenders: dict[str, Contender], options: argparse.Namespace) -> dict[str, dict]:
    """Time each in turn, `options.repeats` times, another one first each time: their columns of time."""
    names, device, times = list(contenders), options.device, {}
    settle()
    for i in range(options.repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            contenders[name].go(contenders[name].lead_in, device)
            contenders[name].step_s.append(contenders[name].go(options.steps, device) / options.steps)
            settle()
    medians = {name: statistics.median(contender.step_s) for name, contender in contenders.items()}
    for name, contender in contenders.items():
        contender.turns.close()
        step_ms = {"": medians[name], "_min": min(contender.step_s), "_max": max(contender.step_s)}
        times[name] = {f"step_ms{which}": 1e3 * seconds for which, seconds in step_ms.items()}
        times[name] |= {"images_per_s": options.batch_size / medians[name]}
        times[name] |= {"ratio_to_stock": medians["stock"] / medians[name] if "stock" in medians else None}
        times[name] |= {"n": options.repeats * options.steps}
    return times


def settle(longest_s: float = 10.0) -> None:
    """Wait until loaders have filled their queues and idle: they would slow whoever is next."""

    def cpu_s() -> float:
        # A process's clock has a number made from its id, as in clock_getcpuclockid(3)
        clocks = [~child.pid << 3 | 2 for child in multiprocessing.active_children()]
        return time.process_time() + sum(map(time.clock_gettime, clocks))

    deadline = time.perf_counter() + longest_s
    while time.perf_counter() < deadline:
        before = cpu_s()
        time.sleep(0.05)
        if cpu_s() - before < 0.005:
            return


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(make: Callable[[], Iterator], device: torch.device) -> int | None:
    """The most GPU memory that an implementation takes beyond what was in use before. None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()  # a captured step is part of a cycle
    torch._C._cuda_clearCublasWorkspaces()  # kept per stream: the first to need one would pay for all
    before = torch.cuda.memory_allocated(device)
    contender = Contender(make(), 0)
    contender.go(steps.EAGER_STEPS, device)  # in which algorithms are tried
    torch.cuda.reset_peak_memory_stats(device)
    contender.go(2, device)  # in which a graph is captured, if any
    contender.turns.close()
    return torch.cuda.max_memory_allocated(device) - before


# ---- the parts: from options to rows, which `complete` finishes ----


def speed(options: argparse.Namespace, dataset: data.Dataset) -> list[dict]:
    device, settings, rows, rates = options.device, batch_settings(options), [], None
    if device.type == "cuda":
        rates = floor.device_rates(device)
        dataset.train.on(device)  # the images, which are no implementation's own
        rows.append({"impl": "copy", "bytes_per_s": rates[0], "dtype": None, "batch_size": None})
        rows.append({"impl": "matmul", "flops_per_s": rates[1], "dtype": "bf16", "batch_size": None})
    for arch, mode in itertools.product(options.arch, options.mode):
        torch._dynamo.reset()  # which counts how often it has compiled the same function, and gives up
        makes = {
            impl: functools.partial(rivals.start, impl, arch, mode, dataset, **settings)
            for impl in options.impl
        }
        peaks = {impl: peak_bytes(make, device) for impl, make in makes.items()}
        contenders = {}
        for impl, make in makes.items():
            note(f"{arch} {mode}: {impl} warms up")
            contenders[impl] = Contender(make(), lead_in(impl))
            contenders[impl].go(options.warm_up, device)
        for impl, row in alternate(contenders, options).items():
            row |= {"arch": arch, "mode": mode, "impl": impl, "peak_memory_bytes": peaks[impl]}
            if rates:
                weights_train = mode in ("all", "random") or "conv" in mode
                cost = floor.cost(arch, dataset.image_size)
                row["share_of_floor"] = row["images_per_s"] * floor.least_s(
                    cost, weights_train, settings["dtype"], rates
                )
            rows.append(row)
    return rows


def memory(options: argparse.Namespace, dataset: data.Dataset) -> list[dict]:
    rows, dtype = [], steps.DTYPES[options.dtype]
    loader = rivals.our_loader(dataset, compiled=False, **batch_settings(options))
    images, labels = next(loader.epoch(0))
    for arch in options.arch:
        for mode in options.mode:
            saved = {}
            for impl in options.impl:
                torch._dynamo.reset()
                note(f"{arch} {mode}: {impl}")
                model = rivals.network(impl, arch, mode, dataset.classes, options.device)
                batch = images, labels, dtype
                if impl == "stock":
                    batch = images.float().contiguous(), labels, torch.float32
                way = rivals.OURS.get(impl, ("stock", False))
                saved[impl] = saved_bytes(model, *batch, *way) / len(labels)
            for impl, each in saved.items():
                row = {"arch": arch, "mode": mode, "impl": impl, "saved_bytes_per_image": each, "n": 1}
                rows.append(row | {"ratio_to_stock": each / saved["stock"] if "stock" in saved else None})
        for impl, least in floor.least_bytes(floor.cost(arch, dataset.image_size), dtype).items():
            rows.append({"arch": arch, "impl": impl, "saved_bytes_per_image": least})
    return rows


def saved_bytes(model: nn.Module, *settings: object) -> int:
    """Bytes that autograd keeps for the backward of `rivals.loss_of`, the model's own tensors aside.

    `settings` are all that `loss_of` takes after the model.

    Every storage is counted once, and whole. Copies of weights in `dtype` that a step makes anew are among
    them: at batch 128 about 1 % of stock autocast's bytes.
    """
    forward = functools.partial(rivals.loss_of, model, *settings)
    forward().backward()  # compiles, and converts frozen weights
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}  # holds the storages, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def batches(options: argparse.Namespace, dataset: data.Dataset) -> list[dict]:
    contenders, first_s = {}, {}
    for impl in options.impl:
        note(f"{impl} warms up")
        began = time.perf_counter()
        if impl == "stock":
            turns = rivals.stock_batches(dataset, options.batch_size, options.device)
        else:
            loader = rivals.our_loader(dataset, compiled=True, kind=impl, **batch_settings(options))
            turns = rivals.our_batches(loader)
        contenders[impl] = Contender(turns, lead_in(impl))
        contenders[impl].go(1, options.device)  # starts processes, or compiles
        first_s[impl] = time.perf_counter() - began
        contenders[impl].go(options.warm_up, options.device)
    return [row | {"impl": i, "seconds": first_s[i]} for i, row in alternate(contenders, options).items()]


def batch_settings(options: argparse.Namespace) -> dict:
    dtype = steps.DTYPES[options.dtype]
    return {"batch_size": options.batch_size, "device": options.device, "dtype": dtype}


def startup(options: argparse.Namespace, dataset: data.Dataset) -> list[dict]:
    """Runs of train.py: cold ones with empty caches of their own, warm ones with what those left there.

    Files that the operating system keeps in memory are warm in both, and the data is prepared.
    """
    classes, rows = len(dataset.classes), []
    subset = min(-(-5 * options.batch_size // classes) * classes, len(dataset.train.labels))
    command = [sys.executable, Path(__file__).with_name("train.py"), "--overwrite", "--train-subset", subset]
    command += ["--epochs", "1", "--milestones", "--data", options.data, "--data-dir", options.data_dir]
    command += ["--batch-size", options.batch_size, "--device", options.device.type, "--dtype", options.dtype]
    caches = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
    for arch, mode in itertools.product(options.arch, options.mode):
        seconds = {"cold": [], "warm": []}
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory() as folder:
                run = [*map(str, command), "--arch", arch, "--mode", mode, "--out", f"{folder}/runs"]
                environment = os.environ | {name: f"{folder}/{name}" for name in caches}
                for impl in ("cold", "warm") if "warm" in options.impl else ("cold",):
                    note(f"{arch} {mode}: {impl} start of train.py")
                    began = time.perf_counter()
                    ended = subprocess.run(run, env=environment, capture_output=True, text=True)
                    run_s = time.perf_counter() - began
                    if ended.returncode:
                        raise BenchFailed(f"train.py: {(ended.stderr.splitlines() or ['it fails'])[-1]}")
                    (summary,) = Path(folder, "runs").glob("*/summary.json")
                    seconds[impl].append((json.loads(summary.read_text())["startup_s"], run_s))
        for impl in options.impl:
            startup_s, run_s = map(statistics.median, zip(*seconds[impl], strict=True))
            row = {"arch": arch, "mode": mode, "impl": impl, "seconds": startup_s, "run_seconds": run_s}
            rows.append(row | {"n": options.repeats})
    return rows


# ---- options, rows, tables ----


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """The options, each part's defaults filled in. BenchError for the first that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def refuse(message: str) -> NoReturn:
        raise BenchError(f"{message}; python bench.py --help lists the options")

    parser.error, add = refuse, parser.add_argument
    add("part", choices=tuple(IMPLS), help="what to measure")
    add("--impl", nargs="+", help="of these: the above; data: stock, resident, ffcv; startup: cold, warm")
    add("--arch", nargs="+", default=["resnet32"], help="networks, as in train.py [resnet32]")
    add("--mode", nargs="+", help="what trains [bn_only; speed: and all; memory: and random, all]")
    add("--batch-size", type=int, default=128, help="images per step [128]")
    add("--dtype", choices=tuple(steps.DTYPES), help="of all but stock [the fastest; memory: bf16]")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to measure")
    add("--data", default="synthetic", help="the images, as in train.py [synthetic]")
    add("--data-dir", default="data", help="where they are looked for and kept [data]")
    add("--repeats", type=int, help="turns of each [5]; startup: starts [3]")
    add("--steps", type=int, help="steps in a turn [50 on a GPU, 4 on a CPU; data: an epoch]")
    add("--warm-up", type=int, help="steps before the first turn, not timed [10 on a GPU, 2 on a CPU]")
    add("--json", metavar="FILE", help="write the rows there, one JSON object a line")
    options = parser.parse_args(argv)
    part, on_gpu = options.part, torch.cuda.is_available() and options.device != "cpu"
    if options.device == "cuda" and not on_gpu:
        raise BenchError("--device cuda: torch finds no CUDA GPU here; leave it out, or use --device cpu")
    options.device = torch.device("cuda" if on_gpu else "cpu")
    # Elsewhere compiling takes minutes
    weighed = rivals.STEPS if on_gpu else ("stock", "amp", "lean", "recompute")
    modes = {"speed": ["bn_only", "all"], "memory": ["bn_only", "random", "all"]}
    options.impl = options.impl or (weighed if part == "memory" else IMPLS[part])
    options.mode = [freeze.canonical_mode(mode) for mode in options.mode or modes.get(part, ["bn_only"])]
    options.dtype = options.dtype or ("bf16" if part == "memory" else steps.default_dtype(options.device))
    usual = {"repeats": 3 if part == "startup" else 5, "steps": 50 if on_gpu else 4, "batch_size": 128}
    usual |= {"steps": None} if part == "data" else {}
    for name, value in (usual | {"warm_up": 10 if on_gpu else 2}).items():
        given = getattr(options, name)
        if given is not None and given < 1:
            raise BenchError(f"--{name.replace('_', '-')} {given}: must be 1 or more")
        setattr(options, name, given or value)
    for name in ("impl", "arch", "mode"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    if unknown := [impl for impl in options.impl if impl not in IMPLS[part]]:
        raise BenchError(f"--impl {unknown[0]}: {part} has {', '.join(IMPLS[part])}")
    if "none" in options.mode:
        raise BenchError("--mode none: nothing trains, so there is no backward pass to measure")
    if options.json and (Path(options.json).is_dir() or not Path(options.json).absolute().parent.is_dir()):
        raise BenchError(f"--json {options.json}: name a file in a folder that exists")
    for arch, mode in itertools.product(options.arch, options.mode):
        with torch.device("meta"):  # before minutes of measuring: an unknown network, or a part it lacks
            freeze.freeze(models.build(arch), mode)
    return options


def complete(rows: list[dict], options: argparse.Namespace) -> list[dict]:
    """The rows with every key, and with what they were measured on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    where = {
        "device_name": provenance.maker_name(options.device),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
    where |= {"date": datetime.date.today().isoformat(), "warm_up": options.warm_up}
    usual = dict.fromkeys(KEYS) | {"part": options.part, "device": options.device.type}
    usual |= {"dtype": options.dtype, "batch_size": options.batch_size}
    # Tensor cores take the factors of an fp32 product rounded to TF32, which torch lets cuDNN do
    on_cores = options.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    stock = {"dtype": "tf32" if on_cores and options.part == "speed" else "fp32"}
    return [usual | row | where | (stock if row["impl"] == "stock" else {}) for row in rows]


def show(rows: list[dict]) -> None:
    """The table on the terminal: the columns in which some row has something to say."""
    first = rows[-1]
    part = first["part"]
    columns = {
        "images/s": "{images_per_s:,.0f}",
        "ms (min–max)": "{step_ms:,.2f} ({step_ms_min:,.2f}–{step_ms_max:,.2f})",
        "peak MB": "{peak_memory_mb:,.1f}",
        "saved KB/image": "{saved_kb:,.1f}",
        "first batch s" if part == "data" else "first step s": "{seconds:.2f}",
        "run s": "{run_seconds:.2f}",
        "/ stock": "{ratio_to_stock:.2f}",
        "floor": "{share_of_floor:.1%}",
        "TB/s": "{tb_per_s:.2f}",
        "TFLOP/s": "{tflop_per_s:.0f}",
        "n": "{n}",
    }
    units = {"peak_memory_mb": ("peak_memory_bytes", 1e6), "saved_kb": ("saved_bytes_per_image", 1e3)}
    units |= {"tb_per_s": ("bytes_per_s", 1e12), "tflop_per_s": ("flops_per_s", 1e12)}

    def cell(template: str, row: dict) -> str:
        values = {key: value for key, value in row.items() if value is not None}
        values |= {name: values[key] / unit for name, (key, unit) in units.items() if key in values}
        try:
            return template.format(**values)
        except KeyError:
            return ""

    names = [name for name in ("arch", "mode", "impl", "dtype") if any(row[name] for row in rows)]
    columns = {title: [cell(template, row) for row in rows] for title, template in columns.items()}
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    versions, queued = first["versions"], lead_in("stock")
    caption = (
        f"{first['device_name']}, {first['threads']} threads, torch {versions['torch']}, {first['date']}"
    )
    if part in ("speed", "data"):
        caption += f"\nwarm-up: {first['warm_up']} steps, then 1 before each turn ({queued} if queued)"
    table = Table(title=f"{part}, batches of {first['batch_size']}", caption=caption, box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(name, no_wrap=True)
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        table.add_row(*(row[name] or "" for name in names), *(cells[i] for cells in columns.values()))
    whole = Console(width=1000).measure(table).maximum  # not cut off in a file or pipe
    Console(width=max(whole, Console().width)).print(table)


def write_rows(path: Path, rows: list[dict]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(part, path)


def note(line: str) -> None:
    print(f"bench.py: {line}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    try:
        options = parse_options(argv)
        dataset = data.open_dataset(options.data, options.data_dir, say=note)
        images = len(dataset.train.labels)
        if options.batch_size > images:
            raise BenchError(f"--batch-size {options.batch_size}: there are {images:,} training images")
        for arch in options.arch:
            models.check_batches(arch, rivals.RECIPE["shortcut"], options.batch_size, dataset.image_size)
        options.steps = options.steps or images // options.batch_size
        measure = {"speed": speed, "memory": memory, "data": batches, "startup": startup}[options.part]
        rows = complete(measure(options, dataset), options)
        if options.json:
            write_rows(Path(options.json), rows)
        show(rows)
    except (BenchError, data.DataError, models.ModelError, freeze.FreezeError) as error:
        note(str(error))
        return 2
    except (BenchFailed, OSError) as error:
        note(str(error))
        return 1
    except RuntimeError as error:
        if not steps.out_of_memory(error):
            raise
        note(f"out of memory at --batch-size {options.batch_size}; try a smaller one")
        return 1
    except KeyboardInterrupt:
        note("interrupted")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
