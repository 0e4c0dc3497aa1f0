"""The schemas of a run's files, shared by the code that writes them and the code that reads them.

    config.json     Config: every option, the network's spec, the parent run, versions, device, git commit
    metrics.jsonl   Epoch, one per line
    summary.json    Summary: status and results
    analysis.json   Analysis: what BatchNorm learned
    last.pt         Kept; its tensors are not checked here

The metadata of model.safetensors also holds the `NetworkSpec`.
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
Number = Annotated[float, Field(ge=-1e100, le=1e100)]  # so that its square is finite
Positive = Annotated[float, Field(ge=0, le=1e100)]
Seed = Annotated[int, Field(ge=0, le=2**64 - 1)]
Epochs = Annotated[int, Field(ge=0, le=10**6)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Value = Text | int | float | bool | None
Variant = dict[Text, Value | tuple[Value, ...]]  # non-default options, sorted by name
Pairs = tuple[tuple[str, object], ...]  # the same, but hashable


def _usable_options(options: Options) -> Options:
    """Replace unprintable characters in `options`. Raises ValueError for a value that train.py rejects."""
    for name, field in config.FIELDS.items():
        value, choices = getattr(options, name), field.metadata["argparse"].get("choices")
        least, most = field.metadata["limits"] or (value, value)
        if value is not None and not (least <= value <= most and (choices is None or value in choices)):
            raise ValueError(f"{name} is not one of a run")
    shown = {k: printable(v) for k, v in dataclasses.asdict(options).items() if isinstance(v, str)}
    return dataclasses.replace(options, **shown)


def first_misfit(error: pydantic.ValidationError) -> str:
    """Describe the first validation error: the field, the reason, and the value found."""
    first = error.errors(include_url=False)[0]
    field, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    found = "" if not field or first["type"] == "missing" else f" (it is {str(first['input'])[:40]!r})"
    return f"{field}: {what}{found}" if field else what


class Record(pydantic.BaseModel):
    """Base class of the schemas: strict types, checked ranges, no NaN or infinity, no unknown fields."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def to_json(self, indent: int | None = 1) -> str:
        """Return JSON text that ends in a newline and omits fields that were never set."""
        return self.model_dump_json(indent=indent, exclude_unset=True) + "\n"

    @classmethod
    def parse(cls, text: str | bytes, where: object) -> Self:
        """Parse JSON `text`. Raises RunError, naming `where` and the field, if it does not fit the schema."""
        try:
            return cls.model_validate_json(text)
        except pydantic.ValidationError as error:
            raise RunError(printable(f"{where}: {first_misfit(error)}")) from None

    @classmethod
    def read(cls, file: Path) -> Self | None:
        """Read a record from `file`; None if it does not exist. Raises RunError if it is unusable."""
        text = read_text(file)
        return None if text is None else cls.parse(text, file)


class NetworkSpec(Record):
    """What is needed, besides the trained tensors, to rebuild a network and evaluate it as its run did."""

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
    mean: tuple[Number, Number, Number]  # per channel, of the training pixels on the 0..255 scale, like std
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
    """The run whose weights another run starts from.

    Fields that end in `_in_all` include its own parent runs if they had the same images.
    """

    run: Text  # its folder's name
    mode: Text
    seed: Seed
    variant: Variant
    epochs: Epochs  # requested
    epochs_in_all: Epochs
    epochs_done_in_all: Epochs  # a run that starts from it does not repeat their shuffles and crops
    seconds_in_all: Positive | None  # epochs done times median epoch_s; None if devices differed
    device_name: Text
    test_acc: Percent | None
    fingerprint: Text
    train_subset: int | None
    val_images: Count  # images on which neither it nor its own parent runs trained, else 0
    processes: int
    quick: bool


class Origin(NamedTuple):
    """The properties of a parent run that distinguish it from other parent runs."""

    epochs: int
    mode: str
    variant: Pairs
    seed: int | None  # None if it is the run's own seed

    def __str__(self) -> str:
        """Return, for example, `160 epochs of all, lr 0.05`."""
        what = f"{self.epochs} epoch{'s' * (self.epochs != 1)} of {self.mode}"
        seed = "" if self.seed is None else f"seed {self.seed}"
        return ", ".join(filter(None, [what, variant_text(self.variant), seed]))


class Config(Record):
    """config.json: the options of a run, what they resolved to, and its environment."""

    options: Annotated[Options, AfterValidator(_usable_options)]
    spec: NetworkSpec
    parent: Parent | None
    data_title: Text
    frozen_sha256: Sha256
    initial_sha256: Sha256 | None  # of all initial weights, with --init-from
    device_name: Text  # where its last epoch was trained
    earlier_devices: tuple[Text, ...] = ()  # of earlier epochs, in order, if the run has moved
    passes: Text | None = None  # kernels used: "cpp", "triton" or "torch" (PyTorch's own)
    versions: dict[Text, Text | None]
    git_commit: Text | None

    @property
    def origin(self) -> Origin | None:
        """The parent run, or None if there is none or it was trained on other images."""
        parent, options, spec = self.parent, self.options, self.spec
        if parent is None or parent.fingerprint != spec.fingerprint:
            return None
        own = config.some(options, "quick train_subset") | config.some(spec, "val_images processes")
        other = {name: getattr(parent, name) for name in own if getattr(parent, name) != own[name]}
        seed = None if parent.seed == options.seed else parent.seed
        return Origin(parent.epochs, parent.mode, tuple(sorted((parent.variant | other).items())), seed)

    @property
    def epochs_in_all(self) -> int:
        """The number of epochs requested, including those of parent runs on the same images."""
        return self.options.epochs + (self.parent.epochs_in_all if self.origin else 0)

    @property
    def variant(self) -> Pairs:
        """The options that differ from the published run on these images, as sorted (name, value) pairs.

        The published learning rate drops after half and three quarters of all epochs, parent runs included.
        """
        options, epochs = self.options, self.epochs_in_all
        usual = dataclasses.replace(config.defaults(options.preset, options.quick), preset=None)
        differing = config.differing(options, usual, "variant")
        if options.schedule == "step":
            milestones = tuple(epochs - options.epochs + m for m in options.milestones if m < options.epochs)
            if milestones != (epochs // 2, 3 * epochs // 4):
                differing["milestones"] = milestones
        if self.spec.processes > 1 and not options.sync_bn:
            differing["processes"] = self.spec.processes  # each normalised its own part of a batch
        if options.init_from:
            differing["init_from"] = str(self.origin or short_path(options.init_from))
        return tuple(sorted(differing.items()))

    @property
    def setting(self) -> tuple:
        """What two comparable runs share: images and their size, epochs, training and validation subsets."""
        options, spec = self.options, self.spec
        images = options.quick, options.train_subset, spec.val_images, spec.image_size
        return self.data_title, self.epochs_in_all, *images, spec.fingerprint

    @property
    def devices(self) -> str:
        """The devices that the run trained on, in order; with several, its times hold for none of them."""
        return ", then ".join([*self.earlier_devices, self.device_name])

    @property
    def machine(self) -> tuple[str, str, str]:
        """The devices, the dtype with the options that affect only time and memory, and torch's version."""
        differing, processes = config.differing(self.options, Options(), "logistics"), self.spec.processes
        costs = [(name, differing[name]) for name in ("loader", "memory", "no_compile") if name in differing]
        shared = f"{processes} processes" if processes > 1 else ""
        computed = ", ".join(filter(None, [self.spec.dtype, variant_text(costs), shared]))
        return self.devices, computed, self.versions.get("torch") or "unknown"


class Epoch(Record):
    """One line of metrics.jsonl. Losses are mean cross-entropies; `epoch_s` includes evaluation."""

    epoch: Annotated[int, Field(ge=1, le=10**6)]
    lr: Positive
    train_loss: Number
    train_acc: Percent
    test_loss: Number | None  # None if not evaluated or not finite
    test_acc: Percent | None
    test_top5_acc: Percent | None = None
    val_loss: Number | None = None
    val_acc: Percent | None = None
    epoch_s: Positive
    images_per_s: Positive | None  # of training only


class Summary(Record):
    """summary.json: how a run ended, and its results."""

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
    chosen_epoch: Annotated[int, Field(ge=1, le=10**6)] | None = None  # with the best validation accuracy
    chosen_test_acc: Percent | None = None
    best_val_acc: Percent | None = None
    epochs_done: Epochs
    train_s: Positive
    startup_s: Positive
    wall_s: Positive | None = None  # from process start to end, summed over resumptions
    peak_memory_bytes: Count | None  # during training
    checkpoint_bytes: Count | None
    full_bytes: Annotated[int, Field(ge=1, le=2**62)]
    frozen_sha256: Sha256

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("final_test_acc", "best_test_acc", "checkpoint_bytes"):
            if self.status == "done" and getattr(self, name) is None:
                raise ValueError(f"its status is done, but it has no {name}")
        return self


class Histogram(Record):
    """A histogram: counts[i] of the `count` values lie between edges[i] (included) and edges[i + 1]."""

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
    share_near_zero: Share  # magnitude below 0.01


class Silence(Histogram):
    """A histogram over all ReLU channels of the share of (image, position) pairs at which the output is 0."""

    silent: Share  # of channels that are always 0
    silent_99: Share  # of channels that are 0 at more than 99 % of the pairs


class Pruned(Record):
    """Test accuracy with every gamma of magnitude below `threshold` set to zero."""

    threshold: Positive
    zeroed: Share  # of all gammas
    test_acc: Percent


class Analysis(Record):
    """analysis.json: what BatchNorm learned."""

    gamma: Gammas
    pruned: Annotated[tuple[Pruned, ...], Field(min_length=1)]
    relu: Silence
    test_acc: Percent
    images: Count
    frozen_sha256: Sha256


class _Schedule(pydantic.BaseModel):
    """The state dict of step.Schedule."""

    model_config = pydantic.ConfigDict(strict=True)
    factor: Positive
    best_acc: Annotated[float, Field(ge=-math.inf, le=100)]  # percent; -inf before the first validation
    since_best: Epochs
    since_cut: Epochs


class Kept(pydantic.BaseModel):
    """The contents of last.pt. Tensors and missing fields are checked where they are used, not here."""

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
    """Yield the epochs of metrics.jsonl, if it exists. Raises RunError at the first invalid line."""
    file = folder / "metrics.jsonl"
    return parse_epochs((read_text(file) or "").splitlines(), file)


def parse_epochs(lines: Sequence[str], where: object) -> Iterator[Epoch]:
    """Yield the epochs in `lines`, numbered from 1. Raises RunError at the first line that is invalid."""
    for number, line in enumerate(lines, start=1):
        row = Epoch.parse(line, f"{where}, line {number}")
        if row.epoch != number:
            raise RunError(f"{where}: line {number} is of epoch {row.epoch}")
        yield row


def variant_text(variant: Pairs) -> str:
    """Format a variant: `lr 0.05, milestones 2 3`."""
    return ", ".join(f"{name} {config.show(value)}" for name, value in variant)


def short_path(init_from: str) -> str:
    """Return a short name for --init-from: that of the run's folder, or of the file without its suffix."""
    path = Path(init_from)
    path = path.parent if path.name == CHECKPOINT else path
    return path.stem if path.suffix in (".safetensors", ".pt", ".pth") else path.name
