"""Read archives and pickles of unknown origin: run nothing in them, and trust nothing that they claim."""

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

MOST_BYTES = 1 << 28  # limit for a file, and for a member of an archive


# ---- archives ----


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each plain file in a tar archive, gzipped or not, whose name is `wanted`.

    Images and pixels hardly compress, so reading stops at 16 times the archive's size plus 16 MiB. Raises
    tarfile.ReadError or EOFError if the archive goes beyond that or is damaged; gzip can raise others.
    """
    with open(path, "rb") as file:
        opener, end = gzip.open if file.read(2) == b"\x1f\x8b" else open, 2**24 + 16 * path.stat().st_size
    with opener(path, "rb") as file, tarfile.open(fileobj=_Headers(file, end), mode="r:") as tar:
        for member in tar:
            size, starts = member.size, member.offset_data
            if member.isfile() and not member.issparse() and wanted(member.name) and 0 <= size < MOST_BYTES:
                file.seek(starts)
                content = file.read(min(size, end - starts))
                if len(content) < size:
                    raise EOFError(f"it ends within {member.name}")
                yield member.name, content
        while file.read(2**20):  # read to the end, where gzip has a checksum
            if file.tell() > end:
                raise tarfile.ReadError("it unpacks to far more than its size")


class _Headers:
    """A file object for tarfile, which trusts headers: it allows only small reads and seeks forwards."""

    def __init__(self, file: BinaryIO, end: int):
        self.file, self.end, self.tell = file, end, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= 4096 or self.tell() > self.end:
            raise tarfile.ReadError(f"it has a header of {size} bytes, or unpacks to far more than its size")
        return self.file.read(size)

    def seek(self, position: int) -> int:
        if not self.tell() <= position <= self.end:
            raise tarfile.ReadError("its members have impossible sizes")
        return self.file.seek(position)


# ---- pickles ----


def unpickled(data: bytes) -> dict:
    """Return the dictionary in a pickled CIFAR file; its keys, which Python 2 wrote as bytes, are text."""
    content = _Unpickler(data).load()
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}


class _Named(dict):
    """A dictionary that allows only text and bytes as keys; others can be made to take years to look up."""

    def __setitem__(self, key: str | bytes, value: object) -> None:
        if type(key) not in (str, bytes):
            raise pickle.UnpicklingError(f"it has a key of {type(key)}, as no CIFAR file does")
        super().__setitem__(key, value)


class _Array:
    """A stand-in for an array, which NumPy pickles in two parts; the second part sets `pixels`."""

    def __init__(self, kind: str, shape: tuple, dtype: bytes):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, _, in_columns, raw = state
        self.pixels = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if in_columns else "C")


class _Dtype:
    """A stand-in for the dtype of an array; only uint8 is accepted."""

    def __init__(self, name: str | bytes, align: bool, copy: bool):
        if name not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"it asks for an array of {name!r}, which no CIFAR file does")

    def __setstate__(self, state: tuple) -> None:
        pass


class _Opcodes(dict):
    """The handler of each opcode, for a million opcodes at most, more than any CIFAR file has."""

    left = 10**6

    def __getitem__(self, opcode: int) -> Callable:
        self.left -= 1
        if self.left < 0 or opcode not in self:
            raise pickle.UnpicklingError("it has more or other opcodes than any CIFAR file")
        return super().__getitem__(opcode)


class _Unpickler(pickle._Unpickler):
    """An unpickler for byte arrays and the containers around them, all that CIFAR's files hold; runs no code.

    It avoids NumPy's constructors, which can be made to write anywhere in memory, and the C unpickler, which
    takes as much memory as a file asks for.
    """

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.dispatch, self.encoded = _Opcodes(_Unpickler.known), 0

    def load_empty_dictionary(self) -> None:
        self.append(_Named())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_Named())
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][key] = value

    known = pickle._Unpickler.dispatch | {
        pickle.EMPTY_DICT[0]: load_empty_dictionary,
        pickle.DICT[0]: load_dict,
    }
    for _opcode in (pickle.EMPTY_SET, pickle.FROZENSET, pickle.BYTEARRAY8):
        del known[_opcode[0]]

    def find_class(self, module: str, name: str) -> object:
        admitted = {
            "numpy.ndarray": "ndarray",
            "numpy.dtype": _Dtype,
            "numpy.core.multiarray._reconstruct": _Array,
            "numpy._core.multiarray._reconstruct": _Array,  # since NumPy 2
            "_codecs.encode": self.encode_latin1,
        }
        if f"{module}.{name}" not in admitted:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does")
        return admitted[f"{module}.{name}"]

    def encode_latin1(self, text: str, encoding: str) -> bytes:
        self.encoded += len(text)
        if encoding != "latin1" or self.encoded > MOST_BYTES:
            raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r} as no CIFAR file does")
        return text.encode("latin1")
