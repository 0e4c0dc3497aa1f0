"""Tests of datasets/untrusted.py: archives and pickles are not trusted, and nothing in them runs."""

import gzip
import pickle
import struct
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hostile import call, name, text

from datasets import untrusted

NDARRAY, DTYPE = name("numpy", "ndarray"), name("numpy", "dtype")


@pytest.mark.parametrize(
    "made", [call(NDARRAY, b"K\x01\x85", text("O"), b"C\x08AAAAAAAA"), call(NDARRAY, b"K\x01\x85")]
)
def test_a_pickle_cannot_call_numpys_constructors(made):
    """An array of objects over bytes of the file would hold pointers to anywhere in memory."""
    with pytest.raises(TypeError, match="not callable"):
        untrusted.unpickled(b"\x80\x04}" + text("data") + made + b"s.")


@pytest.mark.parametrize("dtype", ["O", "S1000", "u1,O", "f4"])
def test_a_pickle_can_make_only_arrays_of_bytes(dtype):
    with pytest.raises(pickle.UnpicklingError, match="no CIFAR file"):
        untrusted.unpickled(b"\x80\x04}" + text("data") + call(DTYPE, text(dtype), b"\x89", b"\x88") + b"s.")


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_in_both_memory_orders(order):
    rows = np.asarray(np.arange(6, dtype=np.uint8).reshape(2, 3), order=order)
    read = untrusted.unpickled(pickle.dumps({b"data": rows}, protocol=2))["data"].pixels
    assert read.tolist() == rows.tolist() and read.dtype == np.uint8


@pytest.mark.parametrize(
    "claim",
    [b"N}r" + struct.pack("<I", 2**23), b"}(" + text("a") + b"\x96" + struct.pack("<Q", 2**26) + b"u"],
)
def test_large_claims_in_a_pickle_take_no_memory(claim):
    tracemalloc.start()
    try:
        with pytest.raises((EOFError, pickle.UnpicklingError)):
            untrusted.unpickled(b"\x80\x04" + claim)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("key", [b"K\x01", b"N" + b"2\x86" * 99, b")"])
def test_dictionary_keys_must_be_text_or_bytes(key):
    """To hash the second key, a pair of pairs of pairs ..., would take years."""
    for made in (b"}" + key + b"Ns.", b"(" + key + b"Nd.", b"}(" + key + b"Nu."):
        with pytest.raises(pickle.UnpicklingError, match="key"):
            untrusted.unpickled(b"\x80\x04" + made)


def test_a_pickle_with_more_opcodes_than_any_cifar_file_is_refused():
    with pytest.raises(pickle.UnpicklingError, match="opcodes"):
        untrusted.unpickled(b"N0" * 10**6 + b"}.")


# ---- archives ----


def header(called: str, size: int) -> bytes:
    member = tarfile.TarInfo(called)
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[148:156] = tarfile.itn(size, 12, tarfile.GNU_FORMAT), b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def contents(file: Path, packed: bytes) -> dict[str, bytes]:
    file.write_bytes(packed)
    return dict(untrusted.members(file, lambda name: not name.startswith("no")))


GOOD = header("a", 3) + b"abc".ljust(512, b"\0")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_wanted_members_are_read_and_the_last_of_a_name_counts(tmp_path, pack):
    second = GOOD.replace(b"abc", b"xyz")
    assert contents(
        tmp_path / "a.tar", pack(GOOD + header("no", 512) + bytes(512) + second + bytes(1024))
    ) == {"a": b"xyz"}


@pytest.mark.parametrize("size", [-512, -1024, -(2**40), 2**40, 2**87])
def test_an_archive_with_negative_or_too_large_sizes_is_refused(tmp_path, size):
    with pytest.raises(tarfile.ReadError):
        contents(tmp_path / "a.tar", GOOD + header("no", size) + GOOD + bytes(1024))


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path):
    zeros = gzip.compress(bytes(2**22))
    with pytest.raises(tarfile.ReadError):
        contents(tmp_path / "a.tgz", gzip.compress(header("no", 2**30)) + zeros * 2**8)
    with pytest.raises(tarfile.ReadError, match="far more than its size"):
        contents(tmp_path / "a.tgz", gzip.compress(GOOD + bytes(1024)) + zeros * 2**8)


def test_the_checksum_at_the_end_of_a_gzip_is_verified(tmp_path):
    with pytest.raises(gzip.BadGzipFile):
        contents(tmp_path / "a.tgz", gzip.compress(GOOD + bytes(1024))[:-8] + bytes(8))
