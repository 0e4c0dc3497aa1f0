"""Stress tests of hostile weight files and last.pt: nothing in them runs, and they are refused by name."""

import functools
import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile import attempt, payloads, refused
from small_runs import interrupt_after_an_epoch, only_run, small_options

import models
import records
import train

pytestmark = [pytest.mark.stress, pytest.mark.tried("hostile weight files and last.pt")]
CODE = list(payloads(Path("canary")))
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module", autouse=True)
def begun(tiny_folder, tmp_path_factory) -> dict[str, Path]:
    """Return a run's folder for each entry of OPTIMISERS; the run was interrupted after its first epoch."""
    out = tmp_path_factory.mktemp("begun")
    folders = {}
    for kind, more in OPTIMISERS.items():
        interrupt_after_an_epoch([*small_options(tiny_folder), *more, "--out", str(out / kind)])
        folders[kind] = only_run(out / kind)
    return folders


OPTIMISERS = {"sgd": [], "adam": ["--optimizer", "adam"], "fp16": ["--dtype", "fp16"]}


# ---- files in torch.save's format ----


def zipped(content: bytes, storage: bytes = bytes(16), **more: bytes) -> bytes:
    """Return a file as torch.save writes it, with the pickle `content`; `__` in a name stands for a slash."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        for name, part in {"data.pkl": content, "version": b"3\n", "data/0": storage, **more}.items():
            file.writestr(f"archive/{name.replace('__', '/')}", part)
    return out.getvalue()


@functools.cache
def bomb() -> bytes:
    """Return a file in torch.save's format whose pickle is a compressed gigabyte of zeros."""
    out, megabytes = io.BytesIO(), 1000
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("archive/data.pkl", "w") as part:
            for _ in range(megabytes):
                part.write(bytes(2**20))
        file.writestr("archive/version", "3\n")
    return out.getvalue()


def saved(what: object) -> bytes:
    out = io.BytesIO()
    torch.save(what, out)
    return out.getvalue()


def given() -> dict[str, torch.Tensor]:
    """Return the floating-point tensors of a new network of four classes, by name."""
    model = models.build("resnet8", 4)
    models.initialise(model, seed=1)
    return {name: t for name, t in model.state_dict().items() if t.is_floating_point()}


def with_tensor(make: Callable[[torch.Tensor], object], name: str = "layer1.0.bn1.weight") -> bytes:
    state = given()
    return saved(state | {name: make(state[name])})


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


PTH = {
    "nothing": lambda: b"",
    "text": lambda: b"not weights",
    "zeros": lambda: bytes(10**6),
    "a truncated zip": lambda: saved(given())[:-3000],
    "a truncated pickle": lambda: zipped(b"\x80\x02}("),
    "an empty zip": lambda: b"PK\5\6" + bytes(18),
    "a zip of something else": lambda: zipped(b"\x80\x02N.").replace(b"data.pkl", b"data.txt"),
    "a bomb of a gigabyte": bomb,
    "None": lambda: saved(None),
    "a list": lambda: saved([torch.zeros(3)]),
    "a tensor": lambda: saved(torch.zeros(3)),
    "a number": lambda: saved(10**5000),
    "names that are numbers": lambda: saved({1: torch.zeros(3)}),
    "no tensor": lambda: saved({}),
    "texts for tensors": lambda: saved({"conv1.weight": "x"}),
    "a state within itself": lambda: zipped(b"\x80\x02}q\0X\1\0\0\0ah\0s."),
    "a state 100,000 deep": lambda: zipped(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
    "a name of a million characters": lambda: saved(given() | {"x" * 10**6: torch.zeros(1)}),
    "a name that steers a terminal": lambda: saved(given() | {"\x1b[2J\x07": torch.zeros(1)}),
    "a name that is no UTF-8": lambda: saved(given() | {"\udcff": torch.zeros(1)}),
    "an old file of rubbish": lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"rubbish",
    "an old file of code": lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(os.system, 2),
    "another shape": lambda: with_tensor(lambda t: t[:-1]),
    "no shape": lambda: with_tensor(lambda t: t[0]),
    "an enormous shape without memory": lambda: with_tensor(lambda t: t[:1].expand(10**6, 10**6)),
    "a tensor without values": lambda: with_tensor(lambda t: t.to("meta")),
    "a sparse tensor": lambda: with_tensor(lambda t: t.to_sparse()),
    "a tensor of tensors": lambda: with_tensor(lambda t: torch.nested.nested_tensor([t, t])),
    "a quantised tensor": lambda: with_tensor(lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8)),
    "complex numbers": lambda: with_tensor(lambda t: t.to(torch.complex64)),
    "whole numbers": lambda: with_tensor(lambda t: t.long()),
    "NaN": lambda: with_tensor(filled(NAN)),
    "infinity": lambda: with_tensor(filled(INF), "layer1.0.bn1.running_var"),
    "a number too large for float32": lambda: with_tensor(lambda t: t.double() * 1e300),
    "a missing tensor": lambda: saved({name: t for name, t in given().items() if name != "conv1.weight"}),
    "another network": lambda: saved(models.build("resnet14", 4).state_dict()),
}


@pytest.mark.parametrize("case", [*CODE, *PTH])
def test_an_invalid_or_hostile_weight_file_is_refused(work, tiny_folder, case):
    """Pickles that would run code are in a zip or bare, by turns."""
    file, canary = work / ("w.pth" if len(case) % 2 else "w.pt"), work.parent / "canary"
    if case in CODE:
        code = b"\x80\x04}" + b"X\1\0\0\0a" + payloads(canary)[case] + b"s."
        file.write_bytes(zipped(code) if CODE.index(case) % 2 else code)
    else:
        file.write_bytes(PTH[case]())
    said = refused(train, [*small_options(tiny_folder), "--init-from", file], work)
    assert str(file) in said and not canary.exists()


# ---- last.pt ----


def put(path: str, make: Callable[[object], object]) -> Callable[[dict], None]:
    """Return a function that replaces a value of last.pt by what `make` makes of it; `path` is like a/b/c."""

    def apply(state: dict) -> None:
        *parents, last = path.split("/")
        for key in parents:
            state = state[int(key) if key.isdigit() and key not in state else key]
        last = int(last) if last.isdigit() else last
        state[last] = make(state[last])

    return apply


def as_it_is(value: object) -> Callable[[object], object]:
    return lambda _: value


MOMENTUM, SECOND = "step/optimizer/state/0/momentum_buffer", "step/optimizer/state/0/exp_avg_sq"
KEPT = {  # a key of OPTIMISERS, and what is done to the last.pt of its run
    "no model": ("sgd", put("model", as_it_is({}))),
    "a model of text": ("sgd", put("model", as_it_is("x"))),
    "a model that is a list": ("sgd", put("model", as_it_is([]))),
    "a tensor of another shape": ("sgd", put("model", lambda t: t[:-1])),
    "a tensor without a shape": ("sgd", put("model", lambda t: t[0])),
    "a tensor of whole numbers": ("sgd", put("model", lambda t: t.long())),
    "a tensor of complex numbers": ("sgd", put("model", lambda t: t.to(torch.complex64))),
    "a tensor without values": ("sgd", put("model", lambda t: t.to("meta"))),
    "a sparse tensor": ("sgd", put("model", lambda t: t.to_sparse())),
    "a model of named tensors": ("sgd", put("model", lambda t: {"conv1.weight": t})),
    "a value too many": ("sgd", put("model", lambda t: torch.cat([t, t[:1]]))),
    "a tensor of two axes": ("sgd", put("model", lambda t: t[None])),
    "no optimiser": ("sgd", put("step", as_it_is({}))),
    "an optimiser of text": ("sgd", put("step/optimizer", as_it_is("x"))),
    "an optimiser without groups": ("sgd", put("step/optimizer/param_groups", as_it_is([]))),
    "an optimiser of two groups": ("sgd", put("step/optimizer/param_groups", lambda groups: groups * 2)),
    "an optimiser without state": ("sgd", put("step/optimizer/state", as_it_is({}))),
    "a momentum of another shape": ("sgd", put(MOMENTUM, lambda t: t[:-1])),
    "a momentum without a shape": ("sgd", put(MOMENTUM, lambda t: t[0])),
    "a momentum that would be stretched": ("sgd", put(MOMENTUM, lambda t: t[:1])),
    "a momentum of text": ("sgd", put(MOMENTUM, as_it_is("fast"))),
    "a momentum of a number": ("sgd", put(MOMENTUM, as_it_is(0.5))),
    "no momentum": ("sgd", put("step/optimizer/state/0", as_it_is({}))),
    "no value for momentum": ("sgd", put(MOMENTUM, as_it_is(None))),
    "a momentum without values": ("sgd", put(MOMENTUM, lambda t: t.to("meta"))),
    "Adam's mean of another shape": ("adam", put("step/optimizer/state/0/exp_avg", lambda t: t[:-1])),
    "Adam's square of two axes": ("adam", put(SECOND, lambda t: t[None])),
    "Adam's square of text": ("adam", put(SECOND, as_it_is("x"))),
    "Adam's count of a vector": ("adam", put("step/optimizer/state/0/step", lambda t: t.expand(2))),
    "Adam's count of text": ("adam", put("step/optimizer/state/0/step", as_it_is("x"))),
    "Adam without its mean": ("adam", put("step/optimizer/state/0", lambda kept: {"step": kept["step"]})),
    "Adam with SGD's momentum": (
        "adam",
        put("step/optimizer/state/0", as_it_is({"momentum_buffer": torch.zeros(9)})),
    ),
    "no loss scale": ("fp16", put("step/scaler", as_it_is({}))),
    "a loss scale of text": ("fp16", put("step/scaler/scale", as_it_is("x"))),
    "a loss scale of zero": ("fp16", put("step/scaler/scale", as_it_is(0.0))),
    "a loss scale that is NaN": ("fp16", put("step/scaler/scale", as_it_is(NAN))),
    "a loss scale of 400 digits": ("fp16", put("step/scaler/scale", as_it_is(10**400))),
    "a count of steps below zero": ("fp16", put("step/scaler/_growth_tracker", as_it_is(-1))),
    "a count of steps of 30 digits": ("fp16", put("step/scaler/_growth_tracker", as_it_is(10**30))),
    "an epoch below zero": ("sgd", put("epochs_before", as_it_is(-1))),
    "an epoch of 5,000 digits": ("sgd", put("epochs_before", as_it_is(10**5000))),
    "a time that is NaN": ("sgd", put("train_s", as_it_is(NAN))),
    "a time of text": ("sgd", put("wall_s", as_it_is("1.0"))),
    "a schedule of nothing": ("sgd", put("schedule", as_it_is(None))),
    "a best accuracy that is NaN": ("sgd", put("schedule/best_acc", as_it_is(NAN))),
    "a factor that is infinite": ("sgd", put("schedule/factor", as_it_is(INF))),
    "rows of numbers": ("sgd", put("rows", as_it_is([1, 2]))),
    "rows of tensors": ("sgd", put("rows", as_it_is([torch.zeros(3)]))),
    "rows that are one text": ("sgd", put("rows", as_it_is("rows"))),
    "a row nested 100,000 deep": ("sgd", put("rows", as_it_is(["[" * 10**5]))),
    "a row of rubbish": ("sgd", put("rows", as_it_is(["{}"]))),
    "a row with NaN": ("sgd", put("rows/0", lambda row: row.replace('"lr":', '"lr":NaN,"x":'))),
    "a row that is not UTF-8": ("sgd", put("rows/0", as_it_is("\udcff"))),
    "a row that steers a terminal": ("sgd", put("rows/0", as_it_is("\x1b[2J\x07"))),
    "a row of epoch 5,000 digits": (
        "sgd",
        put("rows/0", lambda row: row.replace(":1,", f":{'1' * 5000},", 1)),
    ),
    "a row of the wrong epoch": ("sgd", put("rows/0", lambda row: row.replace(":1,", ":2,", 1))),
    "more rows than epochs": (
        "sgd",
        put("rows", lambda rows: [rows[0].replace(":1,", f":{n},", 1) for n in range(1, 9)]),
    ),
    "100,000 rows": ("sgd", put("rows", lambda rows: rows * 10**5)),
}
HARMS = {  # what is done to the file as a whole
    "a link out": lambda file: file.symlink_to("/etc/passwd"),
    "a fifo": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "nothing": lambda file: file.write_bytes(b""),
    "a bomb of a gigabyte": lambda file: file.write_bytes(bomb()),
    "a list": lambda file: torch.save([1], file),
}


@pytest.mark.parametrize("case", [*KEPT, *HARMS, *CODE])
def test_a_run_is_not_resumed_from_an_invalid_or_hostile_last_pt(work, begun, tiny_folder, case):
    kind, harm = KEPT.get(case, ("sgd", None))
    folder = Path(shutil.copytree(begun[kind], work / "runs" / begun[kind].name))
    file, canary = folder / "last.pt", work.parent / "canary"
    if harm:
        state = torch.load(file, weights_only=True)
        harm(state)
        torch.save(state, file)
    elif case in HARMS:
        file.unlink()
        HARMS[case](file)
    else:
        file.write_bytes(zipped(b"\x80\x04}X\4\0\0\0rows" + payloads(canary)[case] + b"s."))
    said = refused(train, [*small_options(tiny_folder), *OPTIMISERS[kind], "--resume"], work)
    assert f"{file.relative_to(work)} cannot be resumed from" in said and "--overwrite" in said
    assert not canary.exists()


@pytest.mark.parametrize("place", ["model", MOMENTUM])
def test_a_run_resumed_from_nan_ends_as_diverged(work, begun, tiny_folder, place):
    """NaN is not refused, because the run itself may have saved it after the last step of an epoch."""
    folder = Path(shutil.copytree(begun["sgd"], work / "runs" / begun["sgd"].name))
    state = torch.load(folder / "last.pt", weights_only=True)
    put(place, filled(NAN))(state)
    torch.save(state, folder / "last.pt")
    outcome = attempt(train, [*small_options(tiny_folder), "--resume"], work)
    assert outcome.status == 1 and "the loss is not finite at epoch 2" in outcome.said, outcome
    assert len(outcome.lines) == 2 and outcome.lines[0].startswith("train.py: continuing")
    assert records.Summary.read(folder / "summary.json").status == "diverged"
