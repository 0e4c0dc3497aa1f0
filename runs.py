"""The run folder: configuration, metrics, checkpoints.

Every file is written beside its name and renamed onto it: a run killed at any moment leaves whole files only.

    config.json         every option, resolved values, versions, device, data fingerprint
    metrics.jsonl       a line per epoch
    last.pt             all that resuming needs; removed when the run is done
    model.safetensors   the seed checkpoint
    summary.json        status and results, written last
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

CHECKPOINT = "model.safetensors"


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message says what would do."""


def run_name(data: str, arch: str, mode: str, seed: int, differing: dict) -> str:
    """`<data>-<arch>-<mode>-s<seed>`, then each further option that differs from its default."""

    def text(value: object) -> str:
        if isinstance(value, (list, tuple)):
            return "_".join(map(text, value))
        return f"{value:g}" if isinstance(value, float) else str(value)

    def joined(parts: list[str]) -> str:
        return "-".join("".join(c if c.isalnum() or c in "._+" else "_" for c in part) for part in parts)

    name = joined([data, arch, mode, f"s{seed}"])
    more = joined([o if value is True else f"{o}{text(value)}" for o, value in differing.items()])
    if len(whole := more.encode()) > 160:  # file systems take 255 bytes, and a log's name is longer
        more = f"{whole[:150].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:8]}"
    return f"{name}-{more}" if more else name


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace the file at `path` by `content`, whole or not at all, also across a power cut."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path: Path) -> dict | None:
    """The object in a JSON file; None where there is no such file. RunError where it holds no object."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error}); delete it, or start again with --overwrite"
        ) from None
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no JSON object; delete it, or start again with --overwrite")
    return content


def run_folders(given: Sequence[str | Path], say: Callable[[str], None]) -> Iterator[tuple[Path, str]]:
    """Every run folder in or under `given`, once, and its name as shown; what is left out is told to `say`.

    A folder is taken for a run's if it has config.json or summary.json; links are not followed. RunError
    where there is no such folder.
    """
    seen = set()
    for top in map(Path, given):
        if not top.is_dir():
            raise RunError(f"{top}: there is no such folder; name run folders, or a folder that holds some")
        for path, folders, files in os.walk(
            top, onerror=lambda error: say(f"left out {error.filename}: {error.strerror}")
        ):
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


def read_rows(path: Path) -> list[dict]:
    """The epochs of a run folder's metrics.jsonl, as far as they are whole."""
    rows = []
    with suppress(OSError, ValueError):
        for line in (path / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("epoch_s"), float):
                break
            rows.append(row)
    return rows


def in_use(path: Path) -> bool:
    """Whether a process has this run folder open; lookers need no right to write, nor see each other."""
    try:
        with open(path / ".lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such folder, or none of ours
        return False
    return False


class Run:
    """One run's folder, as `with open_run(...) as run:` gives it."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict] = []

    @property
    def status(self) -> str | None:
        """done, diverged, failed or interrupted; None where the run never came to an end."""
        return (self.summary or {}).get("status")

    @property
    def summary(self) -> dict | None:
        return read_json(self.path / "summary.json")

    @property
    def config(self) -> dict | None:
        return read_json(self.path / "config.json")

    def write(self, name: str, content: bytes | str) -> None:
        write_atomically(self.path / name, content)

    def write_json(self, name: str, content: dict) -> None:
        self.write(name, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def refuse_another(self, config: dict, ignoring: set[str]) -> None:
        """RunError where the folder holds another run than the one that `config` describes."""
        before = self.config
        if before is None and (self.path / "last.pt").exists():
            raise RunError(f"{self.path} has no config.json; start again with --overwrite")
        for part in ("options", "recipe", "frozen") if before is not None else ():
            if not isinstance(before.get(part), dict):
                raise RunError(f"{self.path / 'config.json'} is damaged; start again with --overwrite")
            for name, value in config[part].items():
                was = before[part].get(name, value)  # an option that did not exist then had its default
                if was != value and name not in ignoring:
                    what = f"{self.path} was run with {name} {was}, not {value}"
                    raise RunError(f"{what};\nuse --overwrite or another --out")

    def start(self, config: dict) -> None:
        """Write the configuration, and take back how an earlier attempt ended."""
        self.write_json("config.json", config)
        (self.path / "summary.json").unlink(missing_ok=True)

    def end_epoch(self, row: dict, state: dict) -> None:
        """Keep one epoch's metrics, and `state` (tensors, numbers, lists and dicts of them) to resume from.

        last.pt goes first and holds the metrics too: killed between the two, a run loses nothing.
        """
        self.rows.append(row)
        beside = self.path / f".last.pt.{os.getpid()}"
        try:
            torch.save({**state, "rows": self.rows}, beside)
            os.replace(beside, self.path / "last.pt")
        except RuntimeError as error:  # what torch.save makes of a full disk
            raise OSError(
                f"{self.path / 'last.pt'} cannot be written: {str(error).splitlines()[0]}"
            ) from None
        finally:
            beside.unlink(missing_ok=True)
        self.write_metrics()

    def write_metrics(self) -> None:
        """Replace the whole file: 160 short lines, and never half a line."""
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in self.rows]
        self.write("metrics.jsonl", "".join(lines))

    def load_last(self) -> dict | None:
        """What `end_epoch` last kept, or None; the metrics are set back to it. Runs no code from the file."""
        path = self.path / "last.pt"
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.rows = list(state.pop("rows"))
        except Exception as error:  # unpickling rubbish fails in many ways
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(
                f"{path} cannot be resumed from ({reason});\nstart again with --overwrite"
            ) from None
        self.write_metrics()
        return state

    def finish(self, summary: dict) -> None:
        """Write the summary; a run that is done needs no `last.pt` any more."""
        self.write_json("summary.json", summary)
        if summary["status"] == "done":
            (self.path / "last.pt").unlink(missing_ok=True)


class Onlooker(Run):
    """The folder of a run that another process writes: this one only reads it."""

    def write(self, name: str, content: bytes | str) -> None:
        pass

    def start(self, config: dict) -> None:
        pass

    def end_epoch(self, row: dict, state: dict) -> None:
        self.rows.append(row)

    def finish(self, summary: dict) -> None:
        pass


@contextmanager
def open_run(
    root: str | Path, name: str, resume: bool = False, overwrite: bool = False, writes: bool = True
) -> Iterator[Run]:
    """The folder `root/name`, made if need be and locked against other processes until the `with` block ends.

    An existing run is refused (RunError) unless `resume` (go on, or show what is done) or `overwrite`
    (start again). Without `writes`, an Onlooker at what another process has opened.
    """
    path = Path(root) / name
    if not writes:
        yield Onlooker(path)
        return
    lock = FileLock(path / ".lock")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=1)  # longer than `in_use` takes to look
    except Timeout:
        raise RunError(f"{path} is in use by another process; wait for it, or choose another --out") from None
    except OSError as error:
        raise RunError(f"--out {root}: cannot use {path} ({error.strerror})") from None
    try:
        try:
            for leftover in path.glob(".*.*"):  # of a process that was killed while it wrote
                leftover.unlink()
            entries = [entry for entry in path.iterdir() if entry.name != ".lock"]
            if entries and not resume and not overwrite:
                raise RunError(f"{path} exists; add --resume to continue it, or --overwrite to start again")
            for entry in entries if overwrite else ():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        except OSError as error:
            raise RunError(f"--out {root}: cannot use {path} ({error.strerror})") from None
        yield Run(path)
    finally:
        lock.release()
