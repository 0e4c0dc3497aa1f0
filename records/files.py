"""Write files atomically, and read the files of a run without trusting them."""

import errno
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

HALF_WRITTEN = ".half-written"  # suffix of temporary files, which are then renamed


class RunError(progress.OptionError):
    """Raised when a run, one of its files, or an output path cannot be used as requested."""


def read_text(file: Path) -> str | None:
    """Return the text of a run's file, or None if it does not exist.

    Raises RunError for a link, a pipe, a file over 64 MiB, or one that cannot be read as UTF-8.
    """
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
    """Load what torch.save wrote, on the CPU and without running code from the file.

    Raises ValueError if it is not a plain file, would unpack to more than its own size, or does not unpickle
    safely. Other exceptions of torch.load propagate; a corrupt file can raise almost any.
    """
    if file.exists() and not file.is_file():
        raise ValueError("it is not a plain file")
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as packed:
            if sum(each.file_size for each in packed.infolist()) > file.stat().st_size:
                raise ValueError("it would unpack to more than its own size")
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols that torch does not write
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message is long, and says how to run the code
        why = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
        raise ValueError(re.split(r"\. |\n", why)[0]) from None


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace the file at `path` with `content` atomically, even if the power fails.

    Also removes temporary files that killed processes left in its folder. Raises OSError if writing fails, or
    if something else than a file is there, such as a folder, a device or a pipe.
    """
    beside = None
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "something else than a file is there")
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
    """Open a new hidden file next to `path`, locked while open so that `remove_half_written` spares it."""
    while True:
        beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}{HALF_WRITTEN}")
        file = open(beside, "xb")  # noqa: SIM115, it stays open
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if beside.exists():  # else another process removed it before it was locked
            return file
        file.close()


def remove_half_written(folder: Path) -> None:
    """Remove the hidden temporary files that killed processes left in a folder."""
    for beside in folder.glob(f".*{HALF_WRITTEN}"):
        with suppress(OSError), open(beside, "r+b") as file:  # already removed, or in use
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            beside.unlink()
