"""Stress tests of hostile pickles and archives of images: nothing in them runs, or is unpacked to disk."""

import gzip
import os
import pickle
import stat
import struct
import tarfile
from pathlib import Path

import pytest
from hostile import attempt, call, name, payloads, refused, text
from layouts import (
    change_set,
    pack,
    python_file,
    tiny_cifar10,
    tiny_cifar100,
    write_images,
    write_python,
    write_python100,
)

import data
from datasets import sources

pytestmark = [
    pytest.mark.stress,
    pytest.mark.tried("hostile pickles and archives of images"),
    pytest.mark.usefixtures("ffcv", "small_and_offline"),
]
PIXELS, LABELS = tiny_cifar10()["data_batch_3"]


# ---- pickles ----


def value(of: object) -> bytes:
    """Return opcodes that push a plain value."""
    return pickle.dumps(of, 3)[2:-1]


def batch(data: bytes = b"", labels: bytes = b"", keys: tuple[bytes, bytes] = (b"data", b"labels")) -> bytes:
    """Return a pickled CIFAR-10 file; `data` and `labels` are opcodes that push values (default: valid)."""
    items = value(keys[0]) + (data or array()) + value(keys[1]) + (labels or value(LABELS.tolist()))
    return b"\x80\x04}(" + items + b"u."


def array(
    shape: object = (20, 3072), raw: object = PIXELS.tobytes(), dtype: str = "u1", kind: bytes = b""
) -> bytes:
    """Return opcodes that push an array as NumPy pickles it, with any state."""
    maker, of = name("numpy.core.multiarray", "_reconstruct"), kind or name("numpy", "ndarray")
    made = call(maker, of, value((0,)), value(b"b"))
    of = call(name("numpy", "dtype"), text(dtype), b"\x89", b"\x88")
    of += value((3, "|", None, None, None, -1, -1, 0)) + b"b"
    return made + b"(K\x01" + value(shape) + of + b"\x89" + value(raw) + b"tb"


NDARRAY, DTYPE = name("numpy", "ndarray"), name("numpy", "dtype")
BYTEARRAY = b"\x96" + struct.pack("<Q", 8) + b"\0" * 8
PICKLES = {
    "an object array over a buffer, and an object": call(NDARRAY, value((1,)), text("O"), BYTEARRAY)
    + value(0),
    "an object in memory of the file's choice": batch(call(NDARRAY, value((1,)), text("O"), value(b"A" * 8))),
    "an array of a gigabyte that nobody fills": batch(labels=call(NDARRAY, value((2**30,)), text("u1"))),
    "an array of objects": batch(array(dtype="O", raw=[None] * 20 * 3072)),
    "an array of objects in bytes": batch(array(dtype="O", raw=b"A" * 20 * 3072 * 8)),
    "an array of records": batch(array(dtype="u1,O")),
    "an array of enormous elements": batch(array(dtype="S2000000000")),
    "a dtype that says that it is another": batch(
        call(DTYPE, text("O"), b"\x89", b"\x88") + value((3, "|", None)) + b"b"
    ),
    "an array of a false shape": batch(array((20, 3071))),
    "an array of a negative shape": batch(array((-20, -3072))),
    "an array of an enormous shape": batch(array((2**40, 2**40))),
    "an array of a thousand axes": batch(array((1,) * 1000)),
    "an array without a shape": batch(array(None)),
    "an array of too few bytes": batch(array(raw=b"abc")),
    "an array of text": batch(array(raw="abc")),
    "an array of a list": batch(array(raw=[1, 2, 3])),
    "an array of another class": batch(array(kind=name("builtins", "bytearray"))),
    "an array without its second part": batch(array()[: -20 * 3072 - 200] + b"0" * 9),
    "a frame of a terabyte": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",
    "bytes of a terabyte": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.",
    "bytes of a gigabyte": b"\x80\x04B" + struct.pack("<I", 2**30) + b"abc.",
    "a text of a terabyte": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.",
    "a bytearray of a gigabyte": batch(b"\x96" + struct.pack("<Q", 2**30) + b"abc"),
    "a number of two gigabytes": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",
    "a number of negative length": b"\x80\x02\x8b" + struct.pack("<i", -5) + b"abc.",
    "a string of negative length": b"T" + struct.pack("<i", -5) + b"abc.",
    "a memo of two gigabytes": b"\x80\x02Nr" + struct.pack("<I", 2**27) + b".",
    "a memo of text": b"Np" + b"9" * 5000 + b"\n.",
    "a memo that is not there": b"\x80\x02h\x05.",
    "lists nested 100,000 deep": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "labels nested 100,000 deep": batch(labels=b"]" * 10**5 + b"a" * (10**5 - 1)),
    "a key that takes years to look up": b"\x80\x02}N" + b"2\x86" * 80 + b"Ns.",
    "a key that takes years, in a set": b"\x80\x04\x8f(N" + b"2\x86" * 80 + b"\x90.",
    "keys that collide": b"\x80\x02}(" + b"".join(value((2**61 - 1) * i) + b"N" for i in range(3000)) + b"u.",
    "many opcodes": b"\x80\x02" + b"]0" * 10**7 + b".",
    "a text that is encoded a hundred times": batch(
        b"("
        + text("x" * 2**24)
        + b"q\0"
        + (call(name("_codecs", "encode"), b"h\0", text("latin1"))) * 99
        + b"t"
    ),
    "a list within itself": b"\x80\x02]q\0h\0a.",
    "labels within themselves": batch(labels=b"]q\0(" + b"h\0" * 20 + b"e"),
    "labels of 5,000 digits": batch(labels=value([10**5000] * 20)),
    "labels of text": batch(labels=value(["1"] * 20)),
    "labels that are not numbers": batch(labels=value([float("nan")] * 20)),
    "labels that are true": batch(labels=value([True] * 20)),
    "labels of lists": batch(labels=value([[1]] * 20)),
    "labels below zero": batch(labels=value([-1] * 20)),
    "labels above the last": batch(labels=value([10] * 20)),
    "too many labels": batch(labels=value([1] * 10**6)),
    "no labels": batch(labels=value([])),
    "no label key": batch(keys=(b"data", b"names")),
    "keys that are no text": batch(keys=(b"\xff\xfe", b"labels")),
    "keys that steer a terminal": batch(keys=(b"\x1b[2J", b"\x1b]0;title\x07")),
    "a number of 5,000 digits as text": b"I" + b"9" * 5000 + b"\n.",
    "a list": value([1, 2]) + b".",
    "nothing": b"",
    "None": b"N.",
    "no end": b"\x80\x02}",
    "an empty stack": b"\x80\x02u.",
    "a protocol of the future": b"\x80\xff}.",
    "an opcode that there is not": b"\x80\x02\xff.",
    "zeros": bytes(10**5),
}


def write_batch(folder: Path, content: bytes, where: int) -> list[str]:
    """Put a pickle in place of an official file, and return the arguments with which data.py opens the set.

    `where` is 0 for data_batch_3 in a folder, 1 for test_batch in an archive, and 2 for CIFAR-100's meta.
    """
    if where == 2:
        (write_python100(folder / "cifar-100-python", tiny_cifar100()) / "meta").write_bytes(content)
        return ["cifar100", "--data-dir", str(folder)]
    files = write_python(folder / "cifar-10-batches-py", tiny_cifar10())
    (files / ("data_batch_3", "test_batch")[where]).write_bytes(content)
    if where == 1:
        pack(folder / "cifar-10-python.tar.gz", files.rename(folder / "packed"))
    return ["cifar10", "--data-dir", str(folder)]


CODE = list(payloads(Path("canary")))


@pytest.mark.parametrize("route", CODE)
def test_a_pickle_of_images_that_would_run_code_is_refused(work, route):
    canary = work.parent / "canary"
    content = b"\x80\x04}(" + value(b"data") + payloads(canary)[route] + b"u."
    said = refused(data, write_batch(work, content, CODE.index(route) % 3), work)
    assert "copy or unpack it again" in said and not canary.exists()


@pytest.mark.parametrize("case", PICKLES)
def test_an_invalid_pickle_of_images_is_refused(work, case):
    said = refused(data, write_batch(work, PICKLES[case], list(PICKLES).index(case) % 2), work)
    assert "is missing, truncated or not CIFAR-10's" in said


# ---- archives ----


def header(called: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """Return the header block of a tar member, with any claims."""
    member = tarfile.TarInfo(called)
    member.type, member.linkname = kind, link
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape"))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(called: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(called, len(content), kind) + content + b"\0" * (-len(content) % 512)


def pax(**records: str) -> bytes:
    """Return an extended header with these records for the next member; `__` in a key stands for a dot."""
    lines = b""
    for key, said in records.items():
        line = f" {key.replace('__', '.')}={said}\n".encode()
        lines += next(
            b"%d%b" % (n, line) for n in range(len(line), len(line) + 9) if len(str(n)) + len(line) == n
        )
    return member("pax", lines, tarfile.XHDTYPE)


def honest(but: str = "") -> bytes:
    files = [member(f"a/{file}", python_file(*rows)) for file, rows in tiny_cifar10().items() if file != but]
    return b"".join(files)


def zeros(gigabytes: float) -> bytes:
    """Return zeros compressed by gzip, a thousand times as small."""
    return gzip.compress(bytes(2**23)) * int(gigabytes * 2**7)


ROW, LOST = "a/data_batch_2", honest(but="data_batch_2")
GOOD = python_file(*tiny_cifar10()["data_batch_2"])
FIFO, DEVICE, BLOCK = tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE
HARD, LINK, SPARSE = tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE
LONG, END = tarfile.GNUTYPE_LONGNAME, bytes(1024)
IGNORED = {  # members beside the six valid files
    "a name with ..": member("../../canary", b"x"),
    "an absolute name": member("/CANARY", b"x"),
    "a name with .. in the middle": member("a/../../../canary", b"x"),
    "a link out, and a member through it": header("a/out", kind=LINK, link="..")
    + member("a/out/canary", b"x"),
    "a hard link out": header("a/hard", kind=HARD, link="/etc/passwd") + member("a/hard", b"x"),
    "a fifo": header("a/pipe", kind=FIFO),
    "devices": header("a/zero", kind=DEVICE) + header("a/disk", kind=BLOCK),
    "a program that runs as root": member("a/../canary.sh", b"#!/bin/sh\ntouch canary\n"),
    "names that are not UTF-8": member("a/\udcff\udcfe", b"x") + member("\udcff/data", b"x"),
    "a name of 3,000 characters": member("long", b"a/" * 1500, LONG) + member("a/short", b"x"),
    "a member twice, the second one good": member(ROW, b"rubbish") + member(ROW, GOOD),
    "a header of rubbish": member("pax", b"5 a\n" * 99, tarfile.XHDTYPE) + member(ROW, GOOD),
    "a member whose name steers a terminal": member("a/\x1b[2J\x07", b"x"),
}
ARCHIVES = {
    "a member twice, the first one good": LOST + member(ROW, GOOD) + member(ROW, b"rubbish") + END,
    "a file that is a link": LOST + header(ROW, kind=LINK, link="/etc/passwd") + END,
    "a file that is a hard link": LOST + header(ROW, kind=HARD, link="/etc/passwd") + END,
    "a file that is a link to itself": LOST + header(ROW, kind=LINK, link=ROW) + END,
    "a file that is a fifo": LOST + header(ROW, kind=FIFO) + END,
    "a file that is a device": LOST + header(ROW, kind=DEVICE) + END,
    "a file that is a folder": LOST + header(ROW, kind=tarfile.DIRTYPE) + END,
    "a file that is sparse": LOST + header(ROW, 2**30, SPARSE) + END,
    "a sparse file whose map has no end": LOST + header(ROW, 512, SPARSE)[:482] + b"\1" + bytes(29),
    "a sparse file of rubbish": pax(GNU__sparse__major="1", GNU__sparse__minor="0") + member(ROW, b"rubbish"),
    "a sparse file of a false size": pax(GNU__sparse__map="0,5", GNU__sparse__size="9" * 30)
    + member(ROW, b"x"),
    "a file of a terabyte": LOST + header(ROW, 2**40) + END,
    "a file of more than there is": LOST + header(ROW, 10**6) + GOOD,
    "a file of less than there is": LOST + header(ROW, 100) + GOOD + END,
    "a negative size, which goes back": LOST + header(ROW, -1024) + END,
    "a negative size, which goes back to itself": LOST + header(ROW, -512) + GOOD + END,
    "a size of 2 to the 87": LOST + header(ROW, 2**87) + END,
    "a negative size, extended": LOST + pax(size="-2048") + member(ROW, GOOD) + END,
    "a size of 4,000 digits, extended": LOST + pax(size="9" * 4000) + member(ROW, GOOD) + END,
    "a size of rubbish, extended": LOST + pax(size="\u0661e5") + member(ROW, GOOD) + END,
    "a name of two gigabytes": header("long", 2**31, LONG) + honest() + END,
    "a negative name": header("long", -512, LONG) + honest() + END,
    "a header of many digits": member("pax", b"1" * 200_000, tarfile.XHDTYPE) + honest() + END,
    "headers of headers": pax(a="b") * 3000 + honest() + END,
    "names of names": member("long", b"x", LONG) * 3000 + honest() + END,
    "a damaged header": LOST + header(ROW, len(GOOD)).replace(b"0000644", b"0000777") + GOOD + END,
    "a truncated header": LOST + header(ROW, len(GOOD))[:300],
    "a truncated file": honest()[:-30_000],
    "an end before the beginning": END + honest(),
    "an archive in an archive": member("a/cifar-10-python.tar.gz", gzip.compress(honest() + END)) + END,
    "no member": END,
    "nothing": b"",
}
BOMBS = {  # made only for their test
    "files of three gigabytes": lambda: b"".join(
        gzip.compress(header(f"a/{file}", 2**28 - 512))
        + zeros(1 / 4)[: -len(gzip.compress(bytes(2**23)))]
        + gzip.compress(bytes(2**23 - 512))
        for file in tiny_cifar10()
    ),
    "a file that nobody asks for, of ten gigabytes": lambda: (
        gzip.compress(header("a/more", 10 * 2**30)) + zeros(10)
    ),
    "a name of two gigabytes, all there": lambda: gzip.compress(header("long", 2**31, LONG)) + zeros(2),
    "a header of two gigabytes, all there": lambda: (
        gzip.compress(header("pax", 2**31, tarfile.XHDTYPE)) + zeros(2)
    ),
    "two million members": lambda: gzip.compress(header("a/x") * 2**14) * 2**7,
    "a truncated gzip": lambda: gzip.compress(honest() + END)[:-30_000],
    "a gzip's first bytes": lambda: gzip.compress(honest())[:10],
    "a gzip with a wrong checksum": lambda: gzip.compress(honest() + END)[:-8] + bytes(8),
    "a damaged gzip": lambda: gzip.compress(honest())[:50_000] + b"\xff" * 9999,
    "a gzip of a gzip": lambda: gzip.compress(gzip.compress(honest() + END)),
    "an HTML page": lambda: b"<html>404</html>",
}


@pytest.mark.parametrize("case", IGNORED)
def test_other_members_of_an_archive_are_ignored_and_not_unpacked(work, case):
    entry, file = IGNORED[case], work / "cifar-10-python.tar.gz"
    if b"/CANARY" in entry:
        entry = member(str(work.parent / "canary"), b"x")
    file.write_bytes(gzip.compress((LOST if "twice" in case else honest()) + entry + END))
    before = set(os.listdir(work.parent)) | {".said", ".printed", ".began"}
    outcome = attempt(data, ["cifar10", "--data-dir", work], work)
    assert outcome.status == 0 and "Traceback" not in outcome.said and len(outcome.lines) == 2, outcome
    assert set(os.listdir(work.parent)) == before and set(os.listdir(work)) == {file.name, "beton"}
    dataset = data.open_dataset("cifar10", work, say=lambda line: None)
    assert sources.SETS["cifar10"].counts == {
        "train": len(dataset.train.labels),
        "test": len(dataset.test.labels),
    }
    assert (dataset.train.images[40:60].transpose(0, 3, 1, 2).reshape(20, 3072) == PIXELS).all()


@pytest.mark.parametrize("case", [*ARCHIVES, *BOMBS])
def test_a_damaged_or_hostile_archive_is_refused(work, case):
    file = work / ("cifar-10-binary.tar.gz" if len(case) % 3 == 0 else "cifar-10-python.tar.gz")
    file.write_bytes(BOMBS[case]() if case in BOMBS else ARCHIVES[case])
    assert file.name in refused(data, ["cifar10", "--data-dir", work], work)


IMAGES = {
    "a name with ..": "../../../canary.png",
    "an absolute name": "/canary.png",
    "a name without folders": "canary.png",
    "a class that is not UTF-8": "i/train/\udcff\udcfe/1.png",
    "a class that steers a terminal": "i/train/\x1b[2J/1.png",
    "no class": "i/train//1.png",
}


@pytest.mark.parametrize("case", IMAGES)
def test_an_archive_of_images_with_odd_names_is_refused(work, case, monkeypatch):
    change_set(monkeypatch, "imagenette", counts={"train": 10, "test": 10})
    folder = write_images(
        work.parent / "imagenette2-160", ["train", "val"], sources.SETS["imagenette"].classes, 1
    )
    files = [(str(path.relative_to(folder.parent)), path.read_bytes()) for path in folder.rglob("*.png")]
    whole = b"".join(member(*file) for file in files) + member(IMAGES[case], files[0][1]) + END
    (work / "imagenette2-160.tgz").write_bytes(gzip.compress(whole))
    assert "imagenette2-160.tgz" in refused(data, ["imagenette", "--data-dir", work], work)


def test_a_huge_file_fifo_socket_or_folder_is_refused(work):
    arguments = write_batch(work, b"", 0)
    with open(work / "cifar-10-batches-py" / "data_batch_3", "wb") as file:
        file.truncate(2**40)  # sparse, so it takes no space
    assert "data_batch_3" in refused(data, arguments, work)
    for make in (os.mkfifo, lambda path: os.mknod(path, 0o600 | stat.S_IFSOCK), lambda path: path.mkdir()):
        (work / "cifar-10-batches-py" / "data_batch_3").unlink()
        make(work / "cifar-10-batches-py" / "data_batch_3")
        assert "data_batch_3" in refused(data, arguments, work)
