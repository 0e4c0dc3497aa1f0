"""What a run is: its name, what sets it apart from the published one, its parent run, its folder's files.

    config.json         every option, the network's spec, the parent run, versions, device, git commit
    metrics.jsonl       a line per epoch
    last.pt             all that resuming needs; removed when the run is done
    model.safetensors   the seed checkpoint
    summary.json        status and results, written last
    analysis.json       written by analysis.py

The records below are the schema of these files, for whoever writes them and whoever reads them. Every file is
written beside its name and renamed onto it, so a run that is killed at any moment leaves whole files only.
"""

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import io
import math
import os
import pickle
import platform
import re
import secrets
import shutil
import stat
import statistics
import subprocess
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NamedTuple, Self

import pydantic
import torch
from filelock import FileLock, Timeout
from pydantic import AfterValidator, Field

import config
import progress
from config import Options
from kernels import device as devices
from progress import printable

CHECKPOINT = "model.safetensors"
HALF_WRITTEN = ".half-written"  # ends the names of files beside those that they will replace


class RunError(progress.OptionError):
    """A run folder that cannot be used as asked."""


# ---- the schema ----


def _usable_options(options: Options) -> Options:
    """The options, their texts printable. ValueError for one that train.py does not take."""
    for name, field in config.FIELDS.items():
        value, choices = getattr(options, name), field.metadata["argparse"].get("choices")
        least, most = field.metadata["limits"] or (value, value)
        if value is not None and not (least <= value <= most and (choices is None or value in choices)):
            raise ValueError(f"{name} is not one of a run")
    shown = {k: printable(v) for k, v in dataclasses.asdict(options).items() if isinstance(v, str)}
    return dataclasses.replace(options, **shown)


Text = Annotated[str, AfterValidator(printable)]
Count = Annotated[int, Field(ge=0, le=2**62)]
Percent = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(ge=-1e100, le=1e100)]  # whose square is still finite
Positive = Annotated[float, Field(ge=0, le=1e100)]
Seed = Annotated[int, Field(ge=0, le=2**64 - 1)]
Epochs = Annotated[int, Field(ge=0, le=10**6)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Value = Text | int | float | bool | None
Variant = dict[Text, Value | tuple[Value, ...]]  # options that set a run apart, in the order of their names
Pairs = tuple[tuple[str, object], ...]  # the same, as what can be a key


def _first(error: pydantic.ValidationError) -> str:
    """The first field that does not fit, why, and what it is instead."""
    first = error.errors(include_url=False)[0]
    field, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    found = "" if not field or first["type"] == "missing" else f" (it is {str(first['input'])[:40]!r})"
    return f"{field}: {what}{found}" if field else what


class Record(pydantic.BaseModel):
    """What a file of a run holds: every field has its type and range, and there are no others."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def to_json(self, indent: int | None = 1) -> str:
        """JSON text, without the fields that were never set, and with a line feed at its end."""
        return self.model_dump_json(indent=indent, exclude_unset=True) + "\n"

    @classmethod
    def parse(cls, text: str | bytes, where: object) -> Self:
        """The record of a JSON text. RunError, naming `where` and the field, where it does not fit."""
        try:
            return cls.model_validate_json(text)
        except pydantic.ValidationError as error:
            raise RunError(printable(f"{where}: {_first(error)}")) from None

    @classmethod
    def read(cls, file: Path) -> Self | None:
        """The record in a run's file; None where there is none. RunError where it does not fit."""
        text = read_text(file)
        return None if text is None else cls.parse(text, file)


class NetworkSpec(Record):
    """What rebuilds a network, besides its trained tensors, and evaluates it as its run did."""

    arch: Text
    mode: Text
    shortcut: Text
    conv_init: Text
    bn_init: Text
    seed: Seed
    per_channel: Annotated[int, Field(ge=1, le=2**31)]
    init_from: Text | None
    reset_bn: bool
    data: Text
    fingerprint: Text  # of the prepared images
    image_size: Annotated[int, Field(ge=1, le=65535)]  # pixels
    classes: Annotated[tuple[Text, ...], Field(min_length=1, max_length=2**16)]
    mean: tuple[Number, Number, Number]  # of the training pixels per channel, on the 0..255 scale, like std
    std: tuple[Number, Number, Number]
    train_images: Count
    val_images: Count
    batch_size: Annotated[int, Field(ge=1, le=2**31)]
    dtype: Literal["bf16", "fp16", "fp32"]
    device: Text
    compiled: bool
    processes: Annotated[int, Field(ge=1, le=2**16)]
    nonzeros: Annotated[int, Field(ge=1, le=2**31)] | None = None


class Parent(Record):
    """The run that another one goes on from; `_in_all` counts in what it went on from itself."""

    run: Text  # its folder's name
    mode: Text
    seed: Seed
    variant: Variant
    epochs: Epochs  # as asked for
    epochs_in_all: Epochs
    epochs_done_in_all: Epochs  # whose shuffles and crops have been drawn
    seconds_in_all: Positive | None  # of training at the median epoch's; None where several devices took part
    device_name: Text
    test_acc: Percent | None
    fingerprint: Text
    train_subset: int | None
    val_images: Count  # of its seed that no run before this one trained on
    processes: int
    quick: bool


class Origin(NamedTuple):
    """What a run went on from, in the words in which runs are told apart."""

    epochs: int
    mode: str
    variant: Pairs
    seed: int | None  # where it is another than the run's

    def __str__(self) -> str:
        """`160 epochs of all, lr 0.05`"""
        what = f"{self.epochs} epoch{'s' * (self.epochs != 1)} of {self.mode}"
        seed = "" if self.seed is None else f"seed {self.seed}"
        return ", ".join(filter(None, [what, variant_text(self.variant), seed]))


class Config(Record):
    """config.json: what was asked for, what it came to, and on what it ran."""

    options: Annotated[Options, AfterValidator(_usable_options)]
    spec: NetworkSpec
    parent: Parent | None
    data_title: Text
    frozen_sha256: Sha256
    initial_sha256: Sha256 | None  # of all weights, where --init-from brought them
    device_name: Text
    passes: Text | None = None  # whose kernels computed it: "cpp", "triton" or PyTorch's, "torch"
    versions: dict[Text, Text | None]
    git_commit: Text | None

    @property
    def origin(self) -> Origin | None:
        """What it went on from, on the same images; None for nothing, or for other images."""
        parent, options, spec = self.parent, self.options, self.spec
        if parent is None or parent.fingerprint != spec.fingerprint:
            return None
        own = config.some(options, "quick train_subset") | config.some(spec, "val_images processes")
        other = {name: getattr(parent, name) for name in own if getattr(parent, name) != own[name]}
        seed = None if parent.seed == options.seed else parent.seed
        return Origin(parent.epochs, parent.mode, tuple(sorted((parent.variant | other).items())), seed)

    @property
    def epochs_in_all(self) -> int:
        """Epochs that were asked for, those of what it went on from included."""
        return self.options.epochs + (self.parent.epochs_in_all if self.origin else 0)

    @property
    def variant(self) -> Pairs:
        """The options that set it apart from the published run on these images, and their values.

        The published learning rate falls after half and three quarters of all epochs, parent runs included.
        """
        options, epochs = self.options, self.epochs_in_all
        usual = dataclasses.replace(config.defaults(options.preset, options.quick), preset=None)
        differing = config.differing(options, usual, "variant")
        if options.schedule == "step":
            milestones = tuple(epochs - options.epochs + m for m in options.milestones if m < options.epochs)
            if milestones != (epochs // 2, 3 * epochs // 4):
                differing["milestones"] = milestones
        if self.spec.processes > 1 and not options.sync_bn:
            differing["processes"] = self.spec.processes  # each of which normalised its own part of a batch
        if options.init_from:
            differing["init_from"] = str(self.origin or short_path(options.init_from))
        return tuple(sorted(differing.items()))

    @property
    def setting(self) -> tuple:
        """What two runs must share to be compared: images, epochs, how many images train and validate."""
        options, spec = self.options, self.spec
        images = options.quick, options.train_subset, spec.val_images, spec.image_size
        return self.data_title, self.epochs_in_all, *images, spec.fingerprint

    @property
    def machine(self) -> tuple[str, str, str]:
        """Device; number format and whatever else changes time and memory alone; version of torch."""
        differing, processes = config.differing(self.options, Options(), "logistics"), self.spec.processes
        costs = [(name, differing[name]) for name in ("loader", "memory", "no_compile") if name in differing]
        shared = f"{processes} processes" if processes > 1 else ""
        computed = ", ".join(filter(None, [self.spec.dtype, variant_text(costs), shared]))
        return self.device_name, computed, self.versions.get("torch") or "unknown"


class Epoch(Record):
    """A line of metrics.jsonl. Losses are mean cross-entropies; the times are of training and evaluation."""

    epoch: Annotated[int, Field(ge=1, le=10**6)]
    lr: Positive
    train_loss: Number
    train_acc: Percent
    test_loss: Number | None  # None where there was no test, or the loss was not finite
    test_acc: Percent | None
    test_top5_acc: Percent | None = None
    val_loss: Number | None = None
    val_acc: Percent | None = None
    epoch_s: Positive
    images_per_s: Positive | None  # of training alone


class Summary(Record):
    """summary.json: how a run ended, and what it reached."""

    status: Literal["done", "diverged", "failed", "interrupted"]
    why: Text | None
    data: Text
    data_title: Text
    arch: Text
    mode: Text
    seed: Seed
    variant: Variant
    params_total: Annotated[int, Field(ge=1, le=2**62)]
    params_trained: Count
    final_test_acc: Percent | None
    best_test_acc: Percent | None
    final_test_top5_acc: Percent | None = None
    chosen_epoch: Annotated[int, Field(ge=1, le=10**6)] | None = None  # by validation images
    chosen_test_acc: Percent | None = None
    best_val_acc: Percent | None = None
    epochs_done: Epochs
    train_s: Positive
    startup_s: Positive
    wall_s: Positive | None = None  # of its processes from start to end, all of it counted
    peak_memory_bytes: Count | None  # of training
    checkpoint_bytes: Count | None
    full_bytes: Annotated[int, Field(ge=1, le=2**62)]
    frozen_sha256: Sha256

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("final_test_acc", "best_test_acc", "checkpoint_bytes"):
            if self.status == "done" and getattr(self, name) is None:
                raise ValueError(f"it says that it is done, and has no {name}")
        return self


class Histogram(Record):
    """How many of `count` values lie between an edge (included) and the next."""

    count: Annotated[int, Field(ge=1, le=2**62)]
    edges: tuple[Number, ...]
    counts: tuple[Count, ...]

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        if list(self.edges) != sorted(set(self.edges)):
            raise ValueError("its edges do not increase")
        if not 0 < len(self.counts) == len(self.edges) - 1 or sum(self.counts) > self.count:
            raise ValueError("its counts do not fit its edges and its count")
        return self


class Gammas(Histogram):
    share_near_zero: Share  # of magnitude under 0.01


class Silence(Histogram):
    """Of each channel of each ReLU, the share of (image, position) pairs at which it gives 0."""

    silent: Share  # of channels that always do
    silent_99: Share  # of channels that do so more than 99 % of the time


class Pruned(Record):
    """Test accuracy once every gamma of a magnitude under `threshold` is set to zero."""

    threshold: Positive
    zeroed: Share  # of all gammas
    test_acc: Percent


class Analysis(Record):
    """analysis.json: what BatchNorm has learned."""

    gamma: Gammas
    pruned: Annotated[tuple[Pruned, ...], Field(min_length=1)]
    relu: Silence
    test_acc: Percent
    images: Count
    frozen_sha256: Sha256


class _Schedule(pydantic.BaseModel):
    """What step.Schedule keeps."""

    model_config = pydantic.ConfigDict(strict=True)
    factor: Positive
    best_acc: Annotated[float, Field(ge=-math.inf, le=100)]  # percent; -inf before the first validation
    since_best: Epochs
    since_cut: Epochs


class Kept(pydantic.BaseModel):
    """last.pt, but for its tensors. What is missing is told by whoever needs it."""

    model_config = pydantic.ConfigDict(strict=True)
    rows: Annotated[list[str], Field(min_length=1)]
    model: object = None
    step: dict[str, object] = {}
    schedule: _Schedule | None = None
    epochs_before: Epochs = 0
    startup_s: Positive = 0.0
    train_s: Positive = 0.0
    wall_s: Positive = 0.0


def read_text(file: Path) -> str | None:
    """The text of a run's file; None where there is none. RunError for a link, a pipe or a huge file."""
    try:
        info = file.lstat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > 2**26:
            raise RunError(f"{file} is not a plain file of a run's size")
        return file.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{file} cannot be read ({error})") from None


def load_tensors(file: Path) -> object:
    """What torch.save wrote to a plain file: no code in it is run, and it unpacks to no more than its size.

    Raises whatever reading rubbish does.
    """
    if file.exists() and not file.is_file():
        raise ValueError("it is no plain file")
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as packed:
            if sum(each.file_size for each in packed.infolist()) > file.stat().st_size:
                raise ValueError("it unpacks to more than its size")
    try:
        with warnings.catch_warnings(action="ignore"):  # of protocols that torch does not write
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's text is long, and says how to run the code
        why = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
        raise ValueError(re.split(r"\. |\n", why)[0]) from None


def read_epochs(folder: Path) -> Iterator[Epoch]:
    """The epochs of metrics.jsonl, if there is one. RunError at the first line that does not fit."""
    file = folder / "metrics.jsonl"
    return parse_epochs((read_text(file) or "").splitlines(), file)


def parse_epochs(lines: Sequence[str], where: object) -> Iterator[Epoch]:
    """The epochs of a run from their lines, the first on. RunError at the first line that does not fit."""
    for number, line in enumerate(lines, start=1):
        row = Epoch.parse(line, f"{where}, line {number}")
        if row.epoch != number:
            raise RunError(f"{where}: line {number} is of epoch {row.epoch}")
        yield row


# ---- what a run is ----


def run_name(options: Options, data: str, seed: str | None = None) -> str:
    """The run folder's name: data, arch, mode, seed, then each option that differs from its default.

    At most 100 characters: where more would be needed, a digest stands for the end, the same for every seed.
    `seed` stands for the run's own in the name of several runs.
    """
    usual = config.defaults(options.preset, options.quick)
    usual = dataclasses.replace(usual, **config.some(options, "data arch mode seed"))  # which come first
    parts = ["quick"] * options.quick + [f"preset{options.preset}"] * (options.preset is not None)
    for name, value in config.differing(options, usual, "variant", "setting").items():
        value = _shortened(short_path(value), 24) if name == "init_from" else value
        parts.append(name if value is True else f"{name}{config.show(value)}")
    base = "-".join(map(_plain, (_shortened(data, 24), options.arch, options.mode, "s")))
    more = _shortened("-".join(map(_plain, parts)), 100 - len(f"{base}{2**64 - 1}-"))
    return f"{base}{options.seed if seed is None else seed}{more and f'-{more}'}"


def _plain(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._+" else "_" for c in text)


def _shortened(text: str, longest: int) -> str:
    """`text`, or of a longer one its beginning and eight digits of its SHA-256."""
    whole = text.encode()
    if len(whole) <= longest:
        return text
    return f"{whole[: longest - 9].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:8]}"


def short_path(init_from: str) -> str:
    """What --init-from is called in a run's name: the run's folder, or the file without its suffix."""
    path = Path(init_from)
    path = path.parent if path.name == CHECKPOINT else path
    return path.stem if path.suffix in (".safetensors", ".pt", ".pth") else path.name


def variant_text(variant: Pairs) -> str:
    """`lr 0.05, milestones 2 3`"""
    return ", ".join(f"{name} {config.show(value)}" for name, value in variant)


def parent_path(options: Options) -> str | None:
    """What --init-from names for this seed, if anything. RunError where there is no such thing."""
    path = options.init_from and options.init_from.replace("{seed}", str(options.seed))
    if path and not Path(path).exists():
        raise RunError(f"--init-from {path}: there is no such file or run")
    return path


def read_parent(init_from: str) -> Parent | None:
    """The parent run that --init-from names; None for mere weights, and for a damaged or unended run."""
    folder = Path(init_from)
    folder = folder.parent if folder.name == CHECKPOINT else folder
    try:
        of, summary = Config.read(folder / "config.json"), Summary.read(folder / "summary.json")
        rows = list(read_epochs(folder))
    except RunError:
        return None
    if not (of and summary and rows):
        return None
    before = [of.parent] if of.origin else []  # one run or none
    timed = all(one.device_name == of.device_name and one.seconds_in_all is not None for one in before)
    held_out = of.options.seed, of.spec.val_images
    seconds = summary.epochs_done * statistics.median(row.epoch_s for row in rows)
    return Parent(
        **config.some(of.options, "mode seed epochs train_subset quick"),
        **config.some(of.spec, "fingerprint processes"),
        **config.some(of, "epochs_in_all device_name"),
        run=folder.resolve().name,
        variant={name: value for name, value in of.variant if name != "processes"},
        epochs_done_in_all=sum((one.epochs_done_in_all for one in before), start=summary.epochs_done),
        seconds_in_all=sum((one.seconds_in_all for one in before), start=seconds) if timed else None,
        test_acc=summary.final_test_acc,
        val_images=of.spec.val_images if all((one.seed, one.val_images) == held_out for one in before) else 0,
    )


def versions() -> dict[str, str | None]:
    """Versions of Python, CUDA and packages, on which a result may depend; None where there is none."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("torch", "triton", "ffcv", "numpy"):
        installed = importlib.metadata.distributions(name=package)
        found[package] = next((distribution.version for distribution in installed), None)
    return found


def environment(device: torch.device, runs_on_it: int) -> dict[str, object]:
    """On what a run runs: fields of Config. The commit is "-dirty" where the code was changed since."""
    command, commit = ["git", "describe", "--always", "--dirty", "--abbrev=40"], None
    with suppress(OSError):  # there is no git
        asked = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = asked.stdout.strip() or None
    device_name = devices.device_name(device, runs_on_it)
    return {"device_name": device_name, "versions": versions(), "git_commit": commit}


# ---- the folder ----


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace the file at `path` by `content`, whole or not at all, also across a power cut.

    What killed processes left half-written in its folder is removed.
    """
    beside = None
    try:
        remove_half_written(path.parent)
        with _open_beside(path) as file:
            beside = Path(file.name)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        if beside:
            beside.unlink(missing_ok=True)


def _open_beside(path: Path) -> BinaryIO:
    """A new hidden file beside `path`, locked for as long as it is open, for `remove_half_written` to see."""
    while True:
        beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}{HALF_WRITTEN}")
        file = open(beside, "xb")  # noqa: SIM115, it stays open
        with suppress(OSError):  # a disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if beside.exists():  # else another process took it for left behind before it was locked
            return file
        file.close()


def remove_half_written(folder: Path) -> None:
    """Remove from a folder the hidden files in which processes that are gone were writing."""
    for beside in folder.glob(f".*{HALF_WRITTEN}"):
        with suppress(OSError), open(beside, "r+b") as file:  # another process is quicker, or holds the lock
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            beside.unlink()


def run_folders(given: Sequence[str | Path], say: Callable[[str], None]) -> Iterator[tuple[Path, str]]:
    """Every run folder in or under `given`, once, and its name as shown; what is left out is told to `say`.

    A folder is taken for a run's if it has config.json or summary.json; links are not followed. RunError
    where there is no such folder.
    """
    seen = set()
    for top in map(Path, given):
        if not top.is_dir():
            raise RunError(f"{top}: there is no such folder; name run folders, or a folder that holds some")
        walk = os.walk(top, onerror=lambda error: say(f"left out {error.filename}: {error.strerror}"))
        for path, folders, files in walk:
            here = Path(path)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for link in (here / name for name in folders if (here / name).is_symlink()):
                if any((link / name).exists() for name in ("config.json", "summary.json")):
                    say(f"left out {link}: it is a link; name it on the command line to have it")
            if {"config.json", "summary.json"} & set(files):
                folders.clear()
                if here.resolve() not in seen:
                    seen.add(here.resolve())
                    yield here, str(here.relative_to(top)) if here != top else here.resolve().name


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, by the files that train.py leaves; others have a config.json, too."""
    if any(os.path.exists(folder / name) for name in ("metrics.jsonl", "summary.json", "last.pt")):
        return True
    return all(os.path.exists(folder / name) for name in ("config.json", ".lock"))  # without an epoch


def in_use(path: Path) -> bool:
    """Whether a process has this run folder open. Whoever looks needs no right to write there."""
    try:
        with open(path / ".lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # the others are: no such folder, or none of ours
        return isinstance(error, BlockingIOError)
    return False


class Run:
    """One run's folder, as `with open_run(...) as run:` gives it. With `writes` False it is only read."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.last, self.writes = path, path / "last.pt", writes
        self.rows: list[Epoch] = []

    @property
    def config(self) -> Config | None:
        return Config.read(self.path / "config.json")

    @property
    def summary(self) -> Summary | None:
        return Summary.read(self.path / "summary.json")

    @property
    def status(self) -> str | None:
        """done, diverged, failed or interrupted; None where the run never came to an end."""
        summary = self.summary
        return summary and summary.status

    def write(self, name: str, content: bytes | str) -> None:
        if self.writes:
            write_atomically(self.path / name, content)

    def refuse_another(self, options: Options, spec: NetworkSpec, hashes: dict[str, str | None]) -> None:
        """RunError where the folder holds another run than one of these options, spec and hashes.

        What does not change a run's result may differ, and so may what is compared otherwise.
        """
        may_differ = config.names("logistics") | {"data", "compiled", "init_from"}
        may_differ |= {"processes"} if options.sync_bn else set()
        try:
            before, ended = self.config, self.summary
            if before is None and (ended or self.last.exists()):
                raise RunError(f"{self.path} has no config.json")
        except RunError as error:
            raise RunError(f"{error};\nstart again with --overwrite") from None
        was = vars(before.options) | vars(before.spec) | vars(before) if before else {}
        now = vars(options) | vars(spec) | hashes
        for name, value in now.items():  # in their order: of other images, the fingerprint is named
            if name in was and name not in may_differ and was[name] != value:
                what = f"{self.path} was run with {name} {was[name]}, not {value}"
                raise RunError(f"{what};\nuse --overwrite or another --out")

    def begin(self, described: Config) -> None:
        """Write the configuration, and take back how an earlier attempt ended."""
        self.described = described
        self.write("config.json", described.to_json())
        if self.writes:
            (self.path / "summary.json").unlink(missing_ok=True)

    def end_epoch(self, row: Epoch, state: dict) -> None:
        """Keep one epoch's metrics, and `state` (tensors, numbers, lists and dicts of them) to resume from.

        last.pt goes first and holds the metrics too: killed between the two, a run loses nothing.
        """
        rows = [*self.rows, row]
        if self.writes:
            saved = io.BytesIO()  # torch.save would not say that a disk is full
            torch.save({**state, "rows": [row.to_json(None) for row in rows]}, saved)
            self.write("last.pt", saved.getvalue())
        self.rows = rows
        self.write_metrics()

    def write_metrics(self) -> None:
        """Replace the whole file: a few hundred short lines, and never half a line."""
        self.write("metrics.jsonl", "".join(row.to_json(None) for row in self.rows))

    def load_last(self) -> dict | None:
        """What `end_epoch` last kept, or None; `rows` are set back to it. Runs no code from the file."""
        if not self.last.exists():
            return None
        try:
            state = load_tensors(self.last)
            Kept.model_validate(state)
            self.rows = list(parse_epochs(state.pop("rows"), self.last.name))
            of = self.config
            if of and len(self.rows) > of.options.epochs:
                raise RunError(f"it has {len(self.rows)} of {of.options.epochs} epochs")
        except pydantic.ValidationError as error:
            raise self.unusable(ValueError(_first(error))) from None
        except Exception as error:  # unpickling rubbish fails in many ways
            raise self.unusable(error) from None
        return state

    def unusable(self, error: Exception) -> RunError:
        """What to raise where last.pt turns out to be rubbish."""
        what = f"{self.last} cannot be resumed from ({progress.reason(error)})"
        return RunError(f"{what};\nstart again with --overwrite")

    def finish(self, summary: Summary) -> None:
        """Write the summary; a run that is done needs no `last.pt` any more."""
        self.write("summary.json", summary.to_json())
        self.tidy()

    def tidy(self) -> None:
        """Remove `last.pt` of a run that is done, also where a process was killed before it could."""
        if self.writes and self.last.exists() and self.status == "done":
            self.last.unlink()


def tidy(path: Path) -> None:
    """Do for a folder that nobody has open what `Run.tidy` does; nothing where that is not possible."""
    if (path / "last.pt").exists():
        with suppress(RunError, OSError), open_run(path, resume=True) as run:
            run.tidy()


@contextmanager
def open_run(path: Path, resume: bool = False, overwrite: bool = False, writes: bool = True) -> Iterator[Run]:
    """A run's folder, made if need be and locked against other processes until the `with` block ends.

    An existing run is refused (RunError) unless `resume` (go on, or show what is done) or `overwrite` (start
    again). Without `writes`, a look at what another process of the same run has opened.
    """
    if not writes:
        yield Run(path, writes=False)
        return
    lock = FileLock(path / ".lock", timeout=1)  # longer than `in_use` takes to look
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        remove_half_written(path)
        entries = [entry for entry in path.iterdir() if entry.name != ".lock"]
        if entries and not resume and not overwrite:
            raise RunError(f"{path} exists; add --resume to continue it, or --overwrite to start again")
        for entry in entries if overwrite else ():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    except Timeout:
        raise RunError(f"{path} is in use by another process; wait, or choose another --out") from None
    except OSError as error:
        raise RunError(f"--out {path.parent}: cannot use {path} ({error.strerror})") from None
    else:
        yield Run(path)
    finally:
        lock.release()
