"""Stress tests of altered seed checkpoints: scripts that evaluate, rebuild or train refuse them by name."""

import functools
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import assert_harmless, attempt, refused
from networks import SPEC, trained_for
from small_runs import small_options

import checkpoint
import data
import evaluation
import models
import train

pytestmark = [pytest.mark.stress, pytest.mark.tried("altered seed checkpoints")]
NAN, INF = float("nan"), float("inf")


@functools.cache
def sealed() -> bytes:
    """Return the seed checkpoint of a network after two steps."""
    return checkpoint.seed_checkpoint(*trained_for(2), steps=2)


@pytest.fixture(scope="module", autouse=True)
def warm(tiny_folder):
    """Do once what every fork would otherwise do on first use, such as imports."""
    sealed()
    data.open_dataset(str(tiny_folder), tiny_folder.parent / "prepared", say=lambda line: None)
    models.check_batches("resnet8", "projection", 32, 16)


def packed(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def whole() -> tuple[dict, bytes]:
    end = 8 + struct.unpack("<Q", sealed()[:8])[0]
    return json.loads(sealed()[8:end]), sealed()[end:]


def with_header(change: Callable[[dict], object]) -> bytes:
    header, data = whole()
    change(header)
    return packed(header, data)


def metadata(**texts: object) -> bytes:
    return with_header(lambda header: header["__metadata__"].update(texts))


def spec(**values: object) -> bytes:
    """Return the checkpoint with these values changed in its spec."""
    of = json.loads(whole()[0]["__metadata__"]["spec"])
    return metadata(spec=json.dumps(of | values))


def tensor(**values: object) -> bytes:
    return with_header(lambda header: header[BN].update(values))


def resealed(name: str, value: float) -> bytes:
    """Return a checkpoint of a network that has `value` in the tensor `name`; its digests fit."""
    model, of = trained_for(1)
    model.state_dict()[name].view(-1)[0] = value
    return checkpoint.seed_checkpoint(model, of, steps=1)


def of_sizes(**values: object) -> bytes:
    """Return a checkpoint with valid tensors and digests, and these values in its spec."""
    model, of = trained_for(1)
    return checkpoint.seed_checkpoint(model, of.model_copy(update=values), steps=1)


BN, VAR = "layer1.0.bn1.weight", "layer1.0.bn1.running_var"
TWICE = b', "bn1.bias": {"dtype": "F32", "shape": [16], "data_offsets": [4, 68]}}'
SIZE = 64  # bytes of a tensor with one float32 for each of 16 channels
FILES = {
    "nothing": lambda: b"",
    "zeros": lambda: bytes(10**5),
    "a zip": lambda: b"PK\3\4" + bytes(1000),
    "a header beyond the file": lambda: struct.pack("<Q", 10**6) + sealed()[8:],
    "a header of 2 to the 63 bytes": lambda: struct.pack("<Q", 2**63) + sealed()[8:],
    "a header of all ones": lambda: b"\xff" * 8 + sealed()[8:],
    "a header of zero bytes": lambda: bytes(8) + sealed()[8:],
    "a header that ends early": lambda: struct.pack("<Q", 50) + sealed()[8:],
    "a truncated file": lambda: sealed()[:-100],
    "a truncated header": lambda: sealed()[:1000],
    "bytes after the end": lambda: sealed() + b"#!/bin/sh",
    "a header that is no JSON": lambda: packed(b"not JSON"),
    "a header that is a list": lambda: packed(b"[1, 2]"),
    "a header that is null": lambda: packed(b"null"),
    "a header nested 100,000 deep": lambda: packed(b"[" * 10**5),
    "a header of objects nested 100,000 deep": lambda: packed(b'{"a":' * 10**5),
    "a header of invalid UTF-8": lambda: packed(b'{"\xff\xfe": 1}'),
    "a header with a byte order mark": lambda: packed(
        b"\xef\xbb\xbf" + json.dumps(whole()[0]).encode(), whole()[1]
    ),
    "a header with half a character": lambda: packed(b'{"\\ud800": 1}'),
    "a header with a number of 5,000 digits": lambda: packed(b'{"a": ' + b"9" * 5000 + b"}"),
    "a header with NaN": lambda: packed(b'{"a": NaN}'),
    "a header of 20,000 names": lambda: packed(
        {str(n): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(20_000)}
    ),
    "a name twice": lambda: packed(json.dumps(whole()[0]).encode()[:-1] + TWICE, whole()[1]),
    "no metadata": lambda: with_header(lambda header: header.pop("__metadata__")),
    "metadata that is a list": lambda: with_header(lambda header: header.update(__metadata__=[])),
    "metadata of numbers": lambda: metadata(steps=2),
    "offsets that descend": lambda: tensor(data_offsets=[SIZE, 0]),
    "offsets below zero": lambda: tensor(data_offsets=[-SIZE, 0]),
    "offsets out of the file": lambda: tensor(data_offsets=[10**9, 10**9 + SIZE]),
    "offsets of 30 digits": lambda: tensor(data_offsets=[10**30, 10**30 + SIZE]),
    "offsets that overlap": lambda: tensor(data_offsets=[8, 8 + SIZE]),
    "offsets of text": lambda: tensor(data_offsets=["0", "64"]),
    "three offsets": lambda: tensor(data_offsets=[0, SIZE, SIZE]),
    "no offsets": lambda: with_header(lambda header: header[BN].pop("data_offsets")),
    "another shape": lambda: tensor(shape=[17]),
    "another shape of as many": lambda: tensor(shape=[4, 4]),
    "a negative shape": lambda: tensor(shape=[-16]),
    "an enormous shape": lambda: tensor(shape=[2**40, 2**40]),
    "a shape whose product overflows": lambda: tensor(shape=[2**63, 2]),
    "a shape of a thousand axes": lambda: tensor(shape=[1] * 1000 + [16]),
    "a shape of fractions": lambda: tensor(shape=[16.5]),
    "a dtype of rubbish": lambda: tensor(dtype="F31"),
    "a dtype of four bytes": lambda: tensor(dtype="I32"),
    "a dtype of eight bytes": lambda: tensor(dtype="F64", shape=[8]),
    "a tensor missing": lambda: with_header(lambda header: header.pop(BN)),
    "a tensor of another name": lambda: with_header(
        lambda header: header.update({"\x1b[2J": header.pop(BN)})
    ),
    "a frozen tensor too many": lambda: with_header(
        lambda h: h.update({"bn9.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})
    ),
    "a value changed": lambda: sealed()[:-1] + bytes([sealed()[-1] ^ 1]),
    **{
        f"{value} in {name}": (lambda name=name, value=value: resealed(name, value))
        for name in ("bn1.weight", "bn1.bias", VAR)
        for value in (NAN, INF, -INF)
    },
    "another seed": lambda: spec(seed=4),
    "a seed below zero": lambda: spec(seed=-1),
    "a seed of 5,000 digits": lambda: metadata(spec=json.dumps({"seed": 0}).replace("0", "9" * 5000)),
    "a mode that there is not": lambda: spec(mode="bn+everything"),
    "another mode": lambda: spec(mode="all"),
    "the mode of another part": lambda: spec(mode="gamma"),
    "another architecture": lambda: spec(arch="resnet14"),
    "an architecture of rubbish": lambda: spec(arch="../../etc/passwd"),
    "an enormous architecture": lambda: spec(arch="resnet9998_w1000"),
    "an architecture just not too large": lambda: spec(arch="resnet14_w40"),
    "an architecture of 5,000 digits": lambda: spec(arch="resnet" + "8" * 5000),
    "an architecture that steers a terminal": lambda: spec(arch="\x1b[2J"),
    "a million classes": lambda: spec(classes=["a"] * 10**6),
    "no classes": lambda: spec(classes=[]),
    "images of 2 to the 31 pixels": lambda: spec(image_size=2**31),
    "a mean that is NaN": lambda: metadata(
        spec=json.dumps(json.loads(whole()[0]["__metadata__"]["spec"]) | {"mean": [NAN] * 3})
    ),
    "a spec that is no JSON": lambda: metadata(spec="{"),
    "a spec nested 100,000 deep": lambda: metadata(spec='{"a":' * 10**5),
    "a spec with half a character": lambda: metadata(spec='{"arch": "\\ud800"}'),
    "a spec of null": lambda: metadata(spec="null"),
    "other frozen weights": lambda: metadata(frozen_sha256="0" * 64),
    "other weights": lambda: metadata(full_sha256="0" * 64),
    "a digest of rubbish": lambda: metadata(full_sha256="x"),
    "no frozen digest": lambda: with_header(lambda header: header["__metadata__"].pop("frozen_sha256")),
    "steps of 5,000 digits": lambda: metadata(steps="9" * 5000),
    "steps below zero": lambda: metadata(steps="-1"),
    "steps of rubbish": lambda: metadata(steps="2.5"),
    "a parent that is a device": lambda: of_sizes(init_from="/dev/zero"),
    "a parent that there is not": lambda: of_sizes(init_from="../no/such/file.pt"),
    "a parent with a zero byte": lambda: of_sizes(init_from="a\0b"),
}
SCRIPTS = {
    "evaluation": lambda file, images: (evaluation, [file]),
    "rebuild": lambda file, images: (
        checkpoint,
        ["rebuild", file, "--out", file.parent / "full.safetensors"],
    ),
    "train": lambda file, images: (train, [*small_options(images), "--init-from", file]),
}
PLAIN = {"no metadata"}  # train.py reads such a file as plain weights


@pytest.mark.parametrize("case", FILES)
def test_an_altered_checkpoint_is_refused(work, tiny_folder, case):
    scripts = list(SCRIPTS)
    of = scripts[list(FILES).index(case) % 3] if case not in PLAIN else "evaluation"
    (work / "w.safetensors").write_bytes(FILES[case]())
    script, arguments = SCRIPTS[of](work / "w.safetensors", tiny_folder)
    said = refused(script, arguments, work)
    assert "w.safetensors" in said or ("a parent" in case and "--init-from" in said)


PLACES = {
    "a link out": lambda file: file.symlink_to("/etc/passwd"),
    "a fifo": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "a terabyte that takes no space": lambda file: os.truncate(
        os.open(file, os.O_CREAT | os.O_WRONLY), 2**40
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("case", PLACES)
def test_a_path_that_is_not_a_plain_checkpoint_file_is_refused(work, tiny_folder, case, script):
    PLACES[case](work / "w.safetensors")
    module, arguments = SCRIPTS[script](work / "w.safetensors", tiny_folder)
    assert "w.safetensors" in refused(module, arguments, work)


def test_an_enormous_batch_size_takes_no_memory(work, tiny_folder):
    """The network is valid and is evaluated, in batches with at most as many images as there are."""
    sizes = {"classes": ("ash", "elm", "oak", "yew"), "image_size": 16, "batch_size": 2**31}
    of = SPEC.model_copy(update=sizes)
    (work / "w.safetensors").write_bytes(checkpoint.seed_checkpoint(checkpoint.create(of), of, steps=0))
    where = ["--data", tiny_folder, "--data-dir", tiny_folder.parent / "prepared"]
    outcome = attempt(evaluation, [work / "w.safetensors", *where], work)
    assert outcome.status == 0 and "% test accuracy" in outcome.printed, outcome
    assert_harmless(outcome)
