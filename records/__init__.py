"""What the files of a run hold: one schema, for whoever writes them and whoever reads them.

    config.json     Config: every option, the network's spec, the parent run, versions, device, git commit
    metrics.jsonl   Epoch, a line each
    summary.json    Summary: status and results
    analysis.json   Analysis: what BatchNorm learned
    last.pt         Kept, whose tensors are not checked here

`NetworkSpec` is also in the metadata of model.safetensors.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import pydantic
from pydantic import AfterValidator, Field

import config
from config import Options
from progress import printable
from records.files import RunError, read_text

CHECKPOINT = "model.safetensors"

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


def _usable_options(options: Options) -> Options:
    """The options, their texts printable. ValueError for one that train.py does not take."""
    for name, field in config.FIELDS.items():
        value, choices = getattr(options, name), field.metadata["argparse"].get("choices")
        least, most = field.metadata["limits"] or (value, value)
        if value is not None and not (least <= value <= most and (choices is None or value in choices)):
            raise ValueError(f"{name} is not one of a run")
    shown = {k: printable(v) for k, v in dataclasses.asdict(options).items() if isinstance(v, str)}
    return dataclasses.replace(options, **shown)


def first_misfit(error: pydantic.ValidationError) -> str:
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
            raise RunError(printable(f"{where}: {first_misfit(error)}")) from None

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
    """The run that another one goes on from. Fields that end in `_in_all` include its own parent runs."""

    run: Text  # its folder's name
    mode: Text
    seed: Seed
    variant: Variant
    epochs: Epochs  # as asked for
    epochs_in_all: Epochs
    epochs_done_in_all: Epochs  # whose shuffles and crops have been drawn
    seconds_in_all: (
        Positive | None
    )  # of training, as if each epoch took the median time; None where several devices took part
    device_name: Text
    test_acc: Percent | None
    fingerprint: Text
    train_subset: int | None
    val_images: Count  # that neither it nor a parent run of its own trained on, else 0
    processes: int
    quick: bool


class Origin(NamedTuple):
    """The parent run, by what tells it from other parent runs."""

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
        """Device; number format and the options that change only time and memory; version of torch."""
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
    wall_s: Positive | None = None  # from start to end of each of its processes, added up
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
    """What last.pt holds; its tensors are not checked here, and whoever needs a missing field says so."""

    model_config = pydantic.ConfigDict(strict=True)
    rows: Annotated[list[str], Field(min_length=1)]
    model: object = None
    step: dict[str, object] = {}
    schedule: _Schedule | None = None
    epochs_before: Epochs = 0
    startup_s: Positive = 0.0
    train_s: Positive = 0.0
    wall_s: Positive = 0.0


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


def variant_text(variant: Pairs) -> str:
    """`lr 0.05, milestones 2 3`"""
    return ", ".join(f"{name} {config.show(value)}" for name, value in variant)


def short_path(init_from: str) -> str:
    """What --init-from is called in a run's name: the run's folder, or the file without its suffix."""
    path = Path(init_from)
    path = path.parent if path.name == CHECKPOINT else path
    return path.stem if path.suffix in (".safetensors", ".pt", ".pth") else path.name
