"""Files that are written whole or not at all, and files of a run, read without trusting them."""

import fcntl
import os
import pickle
import re
import secrets
import stat
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch

import progress

HALF_WRITTEN = ".half-written"  # ends the names of files beside those that they will replace


class RunError(progress.OptionError):
    """A run, a file of one, or a place to write that cannot be used as asked."""


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
