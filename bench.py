"""Measure the training step's speed and memory against the usual alternatives and the hardware's limit.

    python bench.py speed --arch resnet32 --mode bn_only all   # images/s of a training step
    python bench.py memory --arch resnet32                     # bytes kept for the backward pass
    python bench.py memory --budget 16GB                       # also the largest batch that fits in 16 GB
    python bench.py data                                       # images/s of the loaders alone
    python bench.py startup                                    # seconds until train.py's first step is done
    python bench.py profile                                    # one step of train.py, kernel by kernel
    python bench.py table results/gpu/*.jsonl                  # the rows that --json wrote, in Markdown

`speed` and `memory` compare (--impl) the common baselines
    stock          eager fp32 (TF32 on a GPU, torch's default), NCHW, DataLoader, transforms image by image
    stock_workers  stock with one DataLoader worker per core, at most 16, instead of two
    amp            eager autocast, channels_last, images resident on the device
    compiled       amp with torch.compile of the whole network
    graphed        compiled, with each whole step replayed from a CUDA graph; only if --impl names it
with this project's step:
    plain          train.py's step without its own kernels, differentiated by autograd
    lean           train.py's step: a frozen network keeps each convolution's output once, and nothing else
    recompute      lean, but keeping each block's input instead
`data` compares the loaders of stock and stock_workers with train.py's, resident and ffcv. `startup` compares
train.py with empty caches of compiled code (cold) and with the caches that a cold run has filled (warm).

All implementations are built and warmed up first, and then take turns in rotating order. A row has the median
of its turns, and the fastest and slowest one. `/ stock` is the ratio of images/s to those of stock; in
`memory`, it is the ratio of bytes. On a GPU, peak memory is what an implementation adds, and `floor` is the
share it reaches of the images/s that the GPU's measured copy and matrix rates allow (kernels/roofline.py).
"""

import progress  # isort: split

import codecs
import contextlib
import gc
import itertools
import json
import locale
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F

import data
import freeze
import kernels.device
import models
import runs
from datasets import augment, prepare
from kernels import roofline
from kernels.device import DTYPES, synchronize
from progress import OptionError
from records import measured
from step import Step

STEPS = ("stock", "stock_workers", "amp", "compiled", "graphed", "plain", "lean", "recompute")
WORKERS = {"stock": 2, "stock_workers": min(16, len(os.sched_getaffinity(0)))}  # worker processes
IMPLS = {
    "speed": STEPS,
    "memory": STEPS,
    "data": (*WORKERS, "resident", "ffcv"),
    "startup": ("cold", "warm"),
    "profile": ("lean", "recompute", "plain"),
    "table": (),
}
UNITS = {"": 1} | {f"{k}B": 1000**i for i, k in enumerate("KMGT", 1)}
UNITS |= {f"{k}iB": 1024**i for i, k in enumerate("KMGT", 1)}
LR = 0.1
QUEUED = {"stock": 4, "stock_workers": 2 * WORKERS["stock_workers"], "ffcv": 4}  # batches prepared ahead
LEAD_IN_S = {"cuda": 0.5, "cpu": 0.0}  # an idle GPU lowers its clocks and takes a while to raise them
note = partial(progress.note, "bench.py")


# ---- what is compared ----
class PerImage(torch.utils.data.Dataset):
    """Training images, each transformed on access by the same calls that torchvision would make.

    These are the calls of RandomCrop(padding=4), RandomHorizontalFlip, ToTensor and Normalize.
    """

    def __init__(self, dataset: data.Dataset):
        self.images, self.labels, self.size = dataset.train.images, dataset.train.labels, dataset.image_size
        self.mean, self.std = ([value / 255 for value in values] for values in (dataset.mean, dataset.std))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = ImageOps.expand(Image.fromarray(self.images[index]), border=augment.PAD, fill=0)
        top, left = (torch.randint(0, 2 * augment.PAD + 1, size=(1,)).item() for _ in range(2))
        image = image.crop((left, top, left + self.size, top + self.size))
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous()
        pixels = pixels.to(torch.get_default_dtype()).div(255)
        mean, std = (torch.as_tensor(x, dtype=pixels.dtype).view(-1, 1, 1) for x in (self.mean, self.std))
        return pixels.clone().sub_(mean).div_(std), int(self.labels[index])


def our_loader(impl: str, dataset: data.Dataset, options: Namespace):
    """Return train.py's loader of augmented batches; on a GPU it is compiled, except for amp and plain."""
    batch = {"batch_size": options.batch_size, "device": options.device, "dtype": DTYPES[options.dtype]}
    order = {"rng": partial(models.stream, 0), "augmented": "paper"}
    kind, compiled = "ffcv" if impl == "ffcv" else "resident", impl not in ("amp", "plain")
    return data.make_loader(dataset, "train", kind=kind, compiled=compiled, **order, **batch)


def batches(impl: str, dataset: data.Dataset, options: Namespace) -> Iterator[tuple]:
    """Yield training batches forever, from a DataLoader for stock and stock_workers, else from train.py's."""
    if impl not in WORKERS:
        loader = our_loader(impl, dataset, options)
        for epoch in itertools.count():
            yield from loader.epoch(epoch)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores
    shuffled = {"shuffle": True, "drop_last": True, "pin_memory": options.device.type == "cuda"}
    processes = {"num_workers": WORKERS[impl], "prefetch_factor": 2, "persistent_workers": True}
    loader = torch.utils.data.DataLoader(PerImage(dataset), options.batch_size, **shuffled, **processes)
    while True:
        for batch in loader:
            yield tuple(tensor.to(options.device, non_blocking=True) for tensor in batch)


def network(impl: str, arch: str, mode: str, num_classes: int, device: torch.device) -> nn.Module:
    """Return the network as `impl` trains it: drawn from seed 0, frozen as in `mode`, on `device`."""
    model = freeze.empty(arch, num_classes).train()
    models.initialise(model, seed=0)
    freeze.freeze(model, mode)
    model.to(device, memory_format=torch.contiguous_format if impl in WORKERS else torch.channels_last)
    own_kernels = impl in ("lean", "recompute")
    kernels.configure(model, memory=impl if own_kernels else "stock", compiled=own_kernels)
    if impl in ("compiled", "graphed"):
        model.compile(dynamic=False)
    return model


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the training loss, computed under autocast unless `dtype` is float32."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return F.cross_entropy(model(images).float(), labels)


def training(impl: str, arch: str, mode: str, dataset: data.Dataset, options: Namespace) -> Iterator[None]:
    """Train forever as `impl` does; each `next` runs one optimisation step."""
    model = network(impl, arch, mode, len(dataset.classes), options.device)
    if impl in ("plain", "lean", "recompute"):
        loader = our_loader(impl, dataset, options)
        step = Step(model, dtype=loader.dtype, compiled=impl != "plain")
        for epoch in itertools.count():
            yield from step.epoch(loader, epoch, [LR] * len(loader))
    dtype = torch.float32 if impl in WORKERS else DTYPES[options.dtype]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(options.device.type, enabled=dtype == torch.float16)
    # stock has torch's defaults: TF32, which train.py turns off, and no search for the fastest algorithm.
    flags = {"enabled": True, "benchmark": impl not in WORKERS, "allow_tf32": True}

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.backends.cudnn.flags(**flags):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, images, labels, dtype)).backward()
            scaler.step(optimizer)
            scaler.update()

    step = replayed(step, options.device) if impl == "graphed" else step
    for batch in batches(impl, dataset, options):
        step(*batch)
        yield


def replayed(step: Callable[..., None], device: torch.device) -> Callable[..., None]:
    """Return `step`, replayed from a CUDA graph, into whose own tensors each batch is copied.

    It runs on a stream of its own, because gradients remember the stream of the first backward pass, and the
    default stream cannot be captured.
    """
    held = []

    def replay() -> None:
        step(*held)

    def copy_and_replay(*batch: torch.Tensor) -> None:
        held.extend(map(torch.clone, batch[len(held) :]))
        for tensor, new in zip(held, batch, strict=True):
            tensor.copy_(new)
        replay()

    if device.type != "cuda":
        return copy_and_replay
    replay, stream = kernels.device.Captured(replay), torch.cuda.Stream(device)

    def on_its_stream(*batch: torch.Tensor) -> None:
        outer = torch.cuda.current_stream(device)
        stream.wait_stream(outer)
        with torch.cuda.stream(stream):
            copy_and_replay(*batch)
        outer.wait_stream(stream)

    return on_its_stream


# ---- how steps are timed ----
def take(count: int, steps: Iterator, device: torch.device) -> float:
    """Run `count` steps and return the seconds until the device has finished them."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        next(steps)
    synchronize(device)
    return time.perf_counter() - began


def take_turns(makes: dict[str, Callable[[], Iterator]], options: Namespace) -> dict[str, dict]:
    """Build and warm up every implementation, time them in turns, and return the fields of each one's row."""
    device, running, first_s = options.device, {}, {}
    for impl, make in makes.items():
        note(f"{impl} warms up")
        running[impl] = make()
        first_s[impl] = take(1, running[impl], device)  # this starts workers or compiles
        take(options.warm_up, running[impl], device)
    settle()
    names, turns = list(makes), {impl: [] for impl in makes}
    for i in range(options.repeats):
        for impl in names[i % len(names) :] + names[: i % len(names)]:
            lead_in_s = take(1 + QUEUED.get(impl, 0), running[impl], device)  # also empties the queue
            while lead_in_s < LEAD_IN_S[device.type]:
                lead_in_s += take(10, running[impl], device)
            turns[impl].append(take(options.steps, running[impl], device) / options.steps)
            settle()
    for steps in running.values():
        steps.close()
    medians = {impl: statistics.median(step_s) for impl, step_s in turns.items()}
    return {
        impl: {
            "images_per_s": options.batch_size / medians[impl],
            "step_ms": 1e3 * medians[impl],
            "step_ms_min": 1e3 * min(step_s),
            "step_ms_max": 1e3 * max(step_s),
            "seconds": first_s[impl] if options.part == "data" else None,
            "ratio_to_stock": medians["stock"] / medians[impl] if "stock" in medians else None,
            "n": options.repeats * options.steps,
        }
        for impl, step_s in turns.items()
    }


def settle(longest_s: float = 10.0) -> None:
    """Wait at most `longest_s` until loaders have filled their queues; busy ones would slow the next turn."""
    deadline, used_s = time.perf_counter() + longest_s, -1.0
    while time.perf_counter() < deadline:
        # A process's CPU clock ID is computed from its process ID, see clock_getcpuclockid(3).
        clocks = [~child.pid << 3 | 2 for child in multiprocessing.active_children()]
        before_s, used_s = used_s, time.process_time() + sum(map(time.clock_gettime, clocks))
        if used_s - before_s < 0.005:
            return
        time.sleep(0.05)


def peak_bytes(make: Callable[[], Iterator], device: torch.device) -> int:
    """Return the peak GPU memory, in bytes, that an implementation takes beyond what was in use before."""
    gc.collect()  # a captured step is in a reference cycle
    torch._C._cuda_clearCublasWorkspaces()  # cached per stream: the first user would pay for all
    before, steps = torch.cuda.memory_allocated(device), make()
    take(kernels.device.EAGER_CALLS, steps, device)  # cuDNN tries its algorithms in these steps
    kernels.device.reset_peak_memory(device)
    take(2, steps, device)  # these steps capture the CUDA graph, if there is one
    steps.close()
    return kernels.device.peak_memory_bytes(device) - before


# ---- the parts of the command line; each yields the measurements of one implementation at a time ----
Measured = Iterator[tuple[str, dict]]


def speed(options: Namespace, dataset: data.Dataset) -> Measured:
    """Time training steps; on a GPU, also measure its copy and matrix rates and the share of them reached."""
    device, rates, peaks = options.device, None, {}
    if device.type == "cuda":
        rates = roofline.device_rates(device)
        dataset.train.on(device)  # the resident images count for no implementation
        yield "copy", {"bytes_per_s": rates[0], "dtype": None, "batch_size": None}
        yield "matmul", {"flops_per_s": rates[1], "dtype": "bf16", "batch_size": None}
    for arch, mode in itertools.product(options.arch, options.mode):
        torch._dynamo.reset()  # it gives up on a function that it has compiled too often
        note(f"{arch} {mode}")
        makes = {i: partial(training, i, arch, mode, dataset, options) for i in options.impl}
        if rates:
            peaks = {impl: peak_bytes(make, device) for impl, make in makes.items()}
            least_s = least_seconds(arch, mode, dataset, options, rates)
        for impl, timed in take_turns(makes, options).items():
            share = timed["images_per_s"] * least_s if rates else None
            on_gpu = {"peak_memory_bytes": peaks.get(impl), "share_of_floor": share}
            yield impl, {"arch": arch, "mode": mode, **on_gpu, **timed}


def least_seconds(
    arch: str, mode: str, dataset: data.Dataset, options: Namespace, rates: tuple[float, float]
) -> float:
    """Return the least seconds of a step per image, at a GPU's copy and matrix rates; see roofline.py."""
    cost = roofline.cost(freeze.empty(arch), dataset.image_size)
    convolutions_train = mode in ("all", "random") or "conv" in mode.split("+")
    return roofline.least_s(cost, convolutions_train, DTYPES[options.dtype], rates)


def memory(options: Namespace, dataset: data.Dataset) -> Measured:
    """Measure the bytes per image that autograd keeps, and yield the least a frozen network must keep.

    The largest batch for a budget is the one whose kept bytes fit beside the weights, gradients and momentum.
    On a GPU, the peak memory at two batch sizes gives the bytes per image and those that all images share.
    """
    dtype = DTYPES[options.dtype]
    images, labels = next(our_loader("plain", dataset, options).epoch(0))
    stock_batch = (images.float().contiguous(), labels, torch.float32)
    for arch in options.arch:
        for mode in options.mode:
            saved = {}
            for impl in options.impl:
                torch._dynamo.reset()
                note(f"{arch} {mode}: {impl}")
                model = network(impl, arch, mode, len(dataset.classes), options.device)
                batch = stock_batch if impl in WORKERS else (images, labels, dtype)
                saved[impl] = saved_bytes(model, *batch) / len(labels)
            for impl, each in saved.items():
                told = {"ratio_to_stock": each / saved["stock"] if "stock" in saved else None}
                if options.budget:
                    told["largest_batch"] = largest_batch(impl, arch, mode, dataset, options, each)
                yield impl, {"arch": arch, "mode": mode, "saved_bytes_per_image": each, **told, "n": 1}
        cost = roofline.cost(freeze.empty(arch), dataset.image_size)
        for limit, least in roofline.least_bytes(cost, dtype).items():
            yield limit, {"arch": arch, "saved_bytes_per_image": least}


def largest_batch(
    impl: str, arch: str, mode: str, dataset: data.Dataset, options: Namespace, each: float
) -> int:
    """Return the largest batch size whose step fits in `options.budget` bytes if an image keeps `each`."""
    if options.device.type == "cuda":
        sizes, peaks = (options.batch_size, 2 * options.batch_size), []
        for batch_size in sizes:
            given = Namespace(**vars(options) | {"batch_size": batch_size})
            peaks.append(peak_bytes(partial(training, impl, arch, mode, dataset, given), options.device))
        each = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
        fixed = peaks[0] - each * sizes[0]
    else:
        model = network(impl, arch, mode, len(dataset.classes), options.device)
        fixed = sum(p.nbytes * (3 if p.requires_grad else 1) for p in model.parameters())
    return max(0, int((options.budget - fixed) / each))


def to_bytes(text: str) -> int:
    """Return the number of bytes that text such as 16GB or 512MiB means."""
    number, unit = re.fullmatch(r"([\d.]*) *(.*)", text).groups()
    try:
        return int(float(number) * UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ArgumentTypeError(f"{text}: give bytes, as in 16GB or 512MiB") from None


def saved_bytes(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> int:
    """Return the bytes that autograd keeps for the backward pass of `loss_of`, without the model's tensors.

    Each storage counts once and in full. So do weights that every step casts anew (amp: 1 % at batch 128).
    """
    loss_of(model, images, labels, dtype).backward()  # compiles, and converts frozen weights, beforehand
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}  # keeps storages alive, so that no address is reused

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model, images, labels, dtype)
    return sum(storage.nbytes() for storage in kept.values())


def loading(options: Namespace, dataset: data.Dataset) -> Measured:
    """Time the loaders alone."""
    makes = {impl: partial(batches, impl, dataset, options) for impl in options.impl}
    yield from take_turns(makes, options).items()


def startup(options: Namespace, dataset: data.Dataset) -> Measured:
    """Time starts of train.py on prepared data: a cold one, then a warm one that reuses its caches."""
    classes = len(dataset.classes)
    subset = min(-(-5 * options.batch_size // classes) * classes, len(dataset.train.labels))  # five steps
    command = [sys.executable, Path(__file__).with_name("train.py"), "--overwrite", "--train-subset", subset]
    command += ["--epochs", "1", "--milestones", "--data", options.data, "--data-dir", options.data_dir]
    command += ["--batch-size", options.batch_size, "--device", options.device.type, "--dtype", options.dtype]
    caches = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
    for arch, mode in itertools.product(options.arch, options.mode):
        seconds = {"cold": [], "warm": []}
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory() as folder:
                train = [*map(str, command), "--arch", arch, "--mode", mode, "--out", f"{folder}/runs"]
                environment = os.environ | {name: f"{folder}/{name}" for name in caches}
                for impl in ("cold", "warm") if "warm" in options.impl else ("cold",):
                    note(f"{arch} {mode}: {impl} start of train.py")
                    began = time.perf_counter()
                    ended = subprocess.run(train, env=environment, capture_output=True, text=True)
                    run_s = time.perf_counter() - began
                    if ended.returncode:
                        raise ChildProcessError(f"train.py: {['it fails', *ended.stderr.splitlines()][-1]}")
                    (summary,) = Path(folder, "runs").glob("*/summary.json")
                    seconds[impl].append((json.loads(summary.read_bytes())["startup_s"], run_s))
        for impl in options.impl:
            first_s, run_s = map(statistics.median, zip(*seconds[impl], strict=True))
            seconds_of = {"seconds": first_s, "run_seconds": run_s}
            yield impl, {"arch": arch, "mode": mode, **seconds_of, "n": options.repeats}


def profile(options: Namespace, dataset: data.Dataset) -> Measured:
    """Profile train.py's step: time and launches of each kernel (on a CPU, of each operator), and totals."""
    device = options.device
    rates = roofline.device_rates(device) if device.type == "cuda" else None
    for arch, mode, impl in itertools.product(options.arch, options.mode, options.impl):
        steps = training(impl, arch, mode, dataset, options)
        take(1, steps, device)  # which chooses kernels as they will be launched, with dependent launch
        with plainly_launched(device):
            take(options.warm_up, steps, device)
            with torch.profiler.profile() as profiled:
                take(options.steps, steps, device)
        steps.close()
        # Kernels are events of their own; the operators that launch them would count their time again.
        kind = torch.autograd.DeviceType.CUDA if rates else torch.autograd.DeviceType.CPU
        events = [event for event in profiled.key_averages() if event.device_type == kind]
        where = "self_device_time_total" if rates else "self_cpu_time_total"  # microseconds
        rows = [(event.key, event.count, getattr(event, where)) for event in events]
        rows = sorted((row for row in rows if row[2]), key=lambda row: -row[2])
        total = "all", sum(count for _, count, _ in rows), sum(us for *_, us in rows)
        for name, count, us in [*rows, total]:
            each = {"step_ms": us / 1e3 / options.steps, "launches": count / options.steps}
            if rates and name == "all" and us:
                least_s = least_seconds(arch, mode, dataset, options, rates)
                each["share_of_floor"] = 1e3 * least_s * options.batch_size / each["step_ms"]
            yield impl, {"arch": arch, "mode": mode, "kernel": name[:60], **each, "n": options.steps}


@contextlib.contextmanager
def plainly_launched(device: torch.device) -> Iterator[None]:
    """Launch kernels without dependent launch, with which the time of each would include a wait."""
    passes = kernels.passes_for(device.type)
    before = getattr(passes, "pdl", False)
    passes.pdl = False
    try:
        yield
    finally:
        passes.pdl = before


# ---- options and table ----
def parse_options(argv: list[str] | None) -> Namespace:
    """Return the options with each part's defaults.

    Raises OptionError, DeviceError or ModelError for the first option that cannot be used.
    """
    parser = progress.Parser("bench.py", __doc__)
    parser.add_argument("part", choices=tuple(IMPLS), help="what to measure or show")
    parser.add_argument("files", nargs="*", help="for table: files that --json wrote")
    add = parser.add_argument_group("what is compared").add_argument
    add("--impl", nargs="+", help="implementations to compare [all that suit the part and the machine]")
    add("--arch", nargs="+", default=["resnet32"], help="networks, as in train.py [resnet32]")
    add("--mode", nargs="+", help="what trains [bn_only; speed also all; memory also random and all]")
    add("--batch-size", type=int, default=128, help="images per step [128]")
    add("--dtype", choices=tuple(DTYPES), help="number format of all but stock [the fastest; memory: bf16]")
    add("--budget", type=to_bytes, help="memory: also the largest batch that fits in so much, such as 16GB")
    add = parser.add_argument_group("device and images").add_argument
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to measure [a GPU, if any]")
    add("--data", default="synthetic", help="the images, as in train.py [synthetic]")
    add("--data-dir", default="data", help="the folder in which images are looked for and kept [data]")
    add = parser.add_argument_group("duration and output").add_argument
    add("--repeats", type=int, help="turns of each implementation [5]; startup: starts of each kind [3]")
    add("--steps", type=int, help="steps in a turn [GPU: 50,000 images, CPU: 4; data: an epoch]")
    add("--warm-up", type=int, help="steps before the first turn, not timed [10 on a GPU, 2 on a CPU]")
    add("--json", metavar="FILE", help="write the rows to FILE, one JSON object per line")
    options = parser.parse_args(argv)
    part, options.device = options.part, kernels.device.choose(options.device)
    if (part == "table") != bool(options.files):
        raise OptionError("table: name files that --json wrote; the other parts take none")
    on_gpu = options.device.type == "cuda"
    skipped = {"graphed"}
    if WORKERS["stock_workers"] <= 2 or part == "memory":
        skipped |= {"stock_workers"}
    if part == "memory" and not on_gpu:
        skipped |= {"compiled", "plain"}  # compiling takes minutes, and plain keeps what amp keeps
    if part == "data" and not prepare.import_ffcv():
        skipped |= {"ffcv"}
    defaults = {
        "impl": ["lean"] if part == "profile" else [i for i in IMPLS[part] if i not in skipped],
        "mode": {"speed": ["bn_only", "all"], "memory": ["bn_only", "random", "all"]}.get(part, ["bn_only"]),
        "dtype": "bf16" if part == "memory" else kernels.device.default_dtype(options.device),
        "repeats": 3 if part == "startup" else 5,
        # On a GPU, a turn is an epoch of CIFAR-10, so that each turn prepares one epoch.
        "steps": None if part == "data" else max(1, 50_000 // max(1, options.batch_size)) if on_gpu else 4,
        "warm_up": 10 if on_gpu else 2,
    }
    vars(options).update({name: value for name, value in defaults.items() if getattr(options, name) is None})
    for name in ("batch_size", "repeats", "steps", "warm_up"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    options.mode = list(dict.fromkeys(map(freeze.canonical_mode, options.mode)))
    options.impl, options.arch = (list(dict.fromkeys(given)) for given in (options.impl, options.arch))
    if unknown := [impl for impl in options.impl if impl not in IMPLS[part]]:
        raise OptionError(f"--impl {unknown[0]}: {part} has {', '.join(IMPLS[part])}")
    if "none" in options.mode:
        raise OptionError("--mode none: nothing trains, so there is no backward pass to measure")
    if options.budget is not None and part != "memory":
        raise OptionError(f"--budget: {part} takes none; it goes with memory")
    file = Path(options.json or "rows.jsonl").absolute()
    usable = file.is_file() or not file.exists()
    if options.json and not (usable and file.parent.is_dir() and os.access(file.parent, os.W_OK)):
        raise OptionError(f"--json {options.json}: name a file in a folder that exists and can be written to")
    if "graphed" in options.impl and on_gpu and options.dtype == "fp16":
        raise OptionError("--impl graphed: fp16 needs its loss scale between steps; give another --dtype")
    if compiled := [impl for impl in ("compiled", "graphed") if impl in options.impl]:
        encoding, compiler = locale.getpreferredencoding(False), os.environ.get("CXX", "g++")
        if codecs.lookup(encoding).name == "ascii":
            what = f"--impl {compiled[0]}: torch.compile cannot read its files in this locale's {encoding}"
            raise OptionError(f"{what};\nset PYTHONUTF8=1, or name others with --impl")
        if not on_gpu and not shutil.which(compiler):
            what = f"--impl {compiled[0]}: torch.compile finds no C++ compiler ({compiler})"
            raise OptionError(f"{what}; install it, or name others with --impl")
    for arch, mode in itertools.product(options.arch, options.mode):
        with torch.device("meta"):  # check that both exist before minutes of measuring
            model = models.build(arch)
        if mode != "random":  # every network has it, and drawing its positions takes long
            freeze.freeze(model, mode)
    return options


def row(options: Namespace, impl: str, found: dict) -> dict:
    """Return a row of measured.COLUMNS: what was `found` for `impl`, and its dtype, passes and batch size."""
    dtype, passes = options.dtype, None
    if impl in WORKERS:
        # Tensor cores round the factors of an fp32 product to TF32.
        on_cores = options.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
        dtype = "tf32" if on_cores and options.part == "speed" else "fp32"
    if impl in STEPS and options.part != "data":
        passes = kernels.passes_for(options.device.type, impl in ("lean", "recompute")).name
    told = {"impl": impl, "dtype": dtype, "passes": passes, "batch_size": options.batch_size}
    return dict.fromkeys(measured.COLUMNS) | told | found


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    if options.part == "table":
        return measured.show_markdown(options.files)
    dataset = data.open_dataset(options.data, options.data_dir, say=note)
    images = len(dataset.train.labels)
    if options.batch_size > images:
        raise OptionError(f"--batch-size {options.batch_size}: there are {images:,} training images")
    for arch in options.arch:
        models.check_batches(arch, "projection", options.batch_size, dataset.image_size)
    options.steps = options.steps or images // options.batch_size
    measure = {"speed": speed, "memory": memory, "data": loading, "startup": startup, "profile": profile}
    measure = measure[options.part]
    where = {
        "part": options.part,
        "device": options.device.type,
        "device_name": kernels.device.maker_name(options.device),
        "threads": torch.get_num_threads(),
        "versions": runs.versions(),
        "date": time.strftime("%Y-%m-%d"),
        "warm_up": options.warm_up,
    }
    rows, how = [], ""
    if options.part in ("speed", "data"):
        lasting = f" (for {LEAD_IN_S['cuda']} s or more)" if where["device"] == "cuda" else ""
        how = f"warm-up: {options.warm_up} steps, then 1 and those queued before each turn{lasting}"

    def keep() -> None:
        if options.json:
            measured.write(rows, options.json)

    try:
        for impl, found in measure(options, dataset):
            rows.append(where | row(options, impl, found))
            with contextlib.suppress(OSError):  # the last `keep` reports it; keep measuring
                keep()
        keep()
    finally:  # even after an error or Ctrl-C: they took minutes
        if rows:
            measured.show(rows, how)


if __name__ == "__main__":
    sys.exit(progress.run("bench.py", main))
