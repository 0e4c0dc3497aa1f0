"""A run's name, its parent run, its software and hardware environment, and its folder of files.

    config.json         the options, the network's spec and the environment
    metrics.jsonl       one line per epoch
    last.pt             the state to resume from; removed when the run is done
    model.safetensors   the seed checkpoint
    summary.json        status and results, written last
    analysis.json       written by analysis.py

`records/` defines their schemas. Each file is written under a temporary name and then renamed, so a run that
is killed at any moment leaves only complete files.
"""

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import io
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pydantic
import torch
from filelock import FileLock, Timeout

import config
import progress
import records
from config import Options
from kernels import device as devices
from records import CHECKPOINT, Config, Epoch, NetworkSpec, Parent, RunError, Summary, files


def run_name(options: Options, data: str, seed: str | None = None) -> str:
    """Return the name of the run's folder: data, arch, mode, seed, then each option that is not the default.

    The name has at most 100 characters; if it would be longer, a digest that does not depend on the seed
    replaces its end. `seed`, if given, stands in for the run's seed, to name the runs of several seeds.
    """
    usual = config.defaults(options.preset, options.quick)
    usual = dataclasses.replace(usual, **config.some(options, "data arch mode seed"))  # already in the name
    parts = ["quick"] * options.quick + [f"preset{options.preset}"] * (options.preset is not None)
    for name, value in config.differing(options, usual, "variant", "setting").items():
        value = _shortened(records.short_path(value), 24) if name == "init_from" else value
        parts.append(name if value is True else f"{name}{config.show(value)}")
    base = "-".join(map(_plain, (_shortened(data, 24), options.arch, options.mode, "s")))
    more = _shortened("-".join(map(_plain, parts)), 100 - len(f"{base}{2**64 - 1}-"))
    return f"{base}{options.seed if seed is None else seed}{more and f'-{more}'}"


def _plain(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._+" else "_" for c in text)


def _shortened(text: str, longest: int) -> str:
    """Return `text`, or if it exceeds `longest` bytes, its beginning and eight hex digits of its SHA-256."""
    whole = text.encode(errors="surrogateescape")
    if len(whole) <= longest:
        return text
    return f"{whole[: longest - 9].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:8]}"


def parent_path(options: Options) -> str | None:
    """Return the path that --init-from names for this seed, or None. Raises RunError if it does not exist."""
    path = options.init_from and options.init_from.replace("{seed}", str(options.seed))
    if path and not Path(path).exists():
        raise RunError(f"--init-from {path}: there is no such file or run")
    return path


def read_parent(init_from: str) -> Parent | None:
    """Return the parent run at `init_from`, or None for bare weights or a damaged or unended run."""
    folder = Path(init_from)
    folder = folder.parent if folder.name == CHECKPOINT else folder
    try:
        of, summary = Config.read(folder / "config.json"), Summary.read(folder / "summary.json")
        rows = list(records.read_epochs(folder))
    except RunError:
        return None
    if not (of and summary and rows):
        return None
    before = [of.parent] if of.origin else []  # at most one run
    timed = not of.earlier_devices
    timed &= all(one.device_name == of.devices and one.seconds_in_all is not None for one in before)
    held_out = of.options.seed, of.spec.val_images
    seconds = summary.epochs_done * statistics.median(row.epoch_s for row in rows)
    return Parent(
        **config.some(of.options, "mode seed epochs train_subset quick"),
        **config.some(of.spec, "fingerprint processes"),
        epochs_in_all=of.epochs_in_all,
        device_name=of.devices,
        run=folder.resolve().name,
        variant={name: value for name, value in of.variant if name != "processes"},
        epochs_done_in_all=sum((one.epochs_done_in_all for one in before), start=summary.epochs_done),
        seconds_in_all=sum((one.seconds_in_all for one in before), start=seconds) if timed else None,
        test_acc=summary.final_test_acc,
        val_images=of.spec.val_images if all((one.seed, one.val_images) == held_out for one in before) else 0,
    )


def versions() -> dict[str, str | None]:
    """Return the versions of Python, CUDA and the packages that can affect a result; None if absent."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("torch", "triton", "ffcv", "numpy"):
        installed = importlib.metadata.distributions(name=package)
        found[package] = next((distribution.version for distribution in installed), None)
    return found


def environment(device: torch.device, runs_on_it: int) -> dict[str, object]:
    """Return Config's fields `device_name`, `versions` and `git_commit`; `runs_on_it` runs share the device.

    The commit is what GIT_COMMIT says, or else git; it then ends in "-dirty" if the code has uncommitted
    changes. It is None if neither says anything.
    """
    command, commit = ["git", "describe", "--always", "--dirty", "--abbrev=40"], os.environ.get("GIT_COMMIT")
    if not commit:
        with suppress(OSError):  # git is not installed
            asked = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
            commit = asked.stdout.strip() or None
    device_name = devices.device_name(device, runs_on_it)
    return {"device_name": device_name, "versions": versions(), "git_commit": commit or None}


def run_folders(given: Sequence[str | Path], say: Callable[[str], None]) -> Iterator[tuple[Path, str]]:
    """Yield every run folder in or under `given` once, with its display name.

    Folders of which `is_run` says so are runs. Hidden folders and symbolic links are
    skipped. `say` receives a one-line note on each link to a run and each unreadable folder. Raises RunError
    if a folder in `given` does not exist.
    """
    seen = set()
    for top in map(Path, given):
        if not top.is_dir():
            raise RunError(f"{top}: no such folder; give run folders, or a folder that contains some")
        walk = os.walk(top, onerror=lambda error: say(f"left out {error.filename}: {error.strerror}"))
        for path, folders, _ in walk:
            here = Path(path)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for link in (here / name for name in folders if (here / name).is_symlink()):
                if is_run(link):
                    say(f"left out {link}: it is a symbolic link; give it on the command line to include it")
            if is_run(here):
                folders.clear()
                if here.resolve() not in seen:
                    seen.add(here.resolve())
                    yield here, str(here.relative_to(top)) if here != top else here.resolve().name


def is_run(folder: Path) -> bool:
    """Return whether a folder belongs to a run. config.json alone is no proof: other tools write one, too."""
    if any(os.path.exists(folder / name) for name in ("metrics.jsonl", "summary.json", "last.pt")):
        return True
    return all(os.path.exists(folder / name) for name in ("config.json", ".lock"))  # no epoch done yet


def dtype_of(path: Path) -> str | None:
    """Return the number format of the run in a folder; None if there is none, or if it is damaged."""
    with suppress(RunError):
        if of := Config.read(path / "config.json"):
            return of.spec.dtype
    return None


def in_use(path: Path) -> bool:
    """Return whether a process has this run folder open. Needs only read permission."""
    try:
        with open(path / ".lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # any other error: no such folder, or not a run's
        return isinstance(error, BlockingIOError)
    return False


class Run:
    """The folder of one run, as `open_run` yields it. With `writes` False, nothing is written to it.

    With `overwrites`, it seems empty, and what it holds is deleted when the run begins.
    """

    def __init__(self, path: Path, writes: bool = True, overwrites: bool = False):
        self.path, self.last, self.writes, self.overwrites = path, path / "last.pt", writes, overwrites
        self.rows: list[Epoch] = []
        self.moved = False  # since its last epoch, to another device

    @property
    def config(self) -> Config | None:
        return None if self.overwrites else Config.read(self.path / "config.json")

    @property
    def summary(self) -> Summary | None:
        return None if self.overwrites else Summary.read(self.path / "summary.json")

    @property
    def status(self) -> str | None:
        """The status in summary.json: done, diverged, failed or interrupted; None if there is no summary."""
        summary = self.summary
        return summary and summary.status

    def write(self, name: str, content: bytes | str) -> None:
        if self.writes:
            files.write_atomically(self.path / name, content)

    def refuse_another(self, options: Options, spec: NetworkSpec, hashes: dict[str, str | None]) -> None:
        """Raise RunError if the folder is damaged or holds a run with different options, spec or hashes.

        Options that do not change the result may differ, as may those that spec or hashes cover.
        """
        may_differ = config.names("logistics") | {"data", "compiled", "init_from"}
        may_differ |= {"processes"} if options.sync_bn else set()
        try:
            before, ended = self.config, self.summary
            if before is None and (ended or self.last.exists()) and not self.overwrites:
                raise RunError(f"{self.path} has no config.json")
        except RunError as error:
            raise RunError(f"{error};\nstart again with --overwrite") from None
        was = vars(before.options) | vars(before.spec) | vars(before) if before else {}
        now = vars(options) | vars(spec) | hashes
        for name, value in now.items():  # if the images differ, the fingerprint comes first
            if name in was and name not in may_differ and was[name] != value:
                what = f"{self.path} was run with {name} {was[name]}, not {value}"
                raise RunError(f"{what};\nuse --overwrite or another --out")

    def begin(self, described: Config) -> None:
        """Write config.json, and delete the summary.json of an earlier attempt, or all that is overwritten.

        If the run has moved, config.json names its new device only when an epoch has been trained there.
        """
        if self.writes:
            (self.path / "summary.json").unlink(missing_ok=True)
        if self.writes and self.overwrites:
            self.last.unlink(missing_ok=True)  # first, so that what is to be overwritten is never resumed
            for entry in [entry for entry in self.path.iterdir() if entry.name != ".lock"]:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        before = self.config if self.rows else None
        trained_on = (*before.earlier_devices, before.device_name) if before else (described.device_name,)
        self.overwrites, self.moved = False, trained_on[-1] != described.device_name
        self.write("config.json", _trained_on(described, trained_on).to_json())
        more = (described.device_name,) if self.moved else ()
        self.described = _trained_on(described, trained_on + more)

    def end_epoch(self, row: Epoch, state: dict) -> None:
        """Save an epoch's metrics, and in last.pt `state` (nested dicts and lists of tensors and numbers).

        last.pt is written first and holds the metrics too, so a kill between the two writes loses nothing.
        """
        rows = [*self.rows, row]
        if self.writes:
            saved = io.BytesIO()  # on a full disk, torch.save to a file gives no clear error
            torch.save({**state, "rows": [row.to_json(None) for row in rows]}, saved)
            self.write("last.pt", saved.getvalue())
        self.rows = rows
        self.write_metrics()
        if self.moved:
            self.write("config.json", self.described.to_json())
            self.moved = False

    def write_metrics(self) -> None:
        """Rewrite metrics.jsonl as a whole; it is short, and this never leaves half a line."""
        self.write("metrics.jsonl", "".join(row.to_json(None) for row in self.rows))

    def load_last(self) -> dict | None:
        """Return the state that `end_epoch` last saved, and restore `rows` from it; None if there is none.

        Runs no code from the file. Raises RunError if last.pt cannot be resumed from.
        """
        if self.overwrites or not self.last.exists():
            return None
        try:
            state = files.load_tensors(self.last)
            records.Kept.model_validate(state)
            self.rows = list(records.parse_epochs(state.pop("rows"), self.last.name))
            of = self.config
            if of and len(self.rows) > of.options.epochs:
                raise RunError(f"it has {len(self.rows)} of {of.options.epochs} epochs")
        except pydantic.ValidationError as error:
            raise self.unusable(ValueError(records.first_misfit(error))) from None
        except Exception as error:  # unpickling a corrupt file can raise almost anything
            raise self.unusable(error) from None
        return state

    def unusable(self, error: Exception) -> RunError:
        """Return the RunError to raise when last.pt is corrupt."""
        what = f"{self.last} cannot be resumed from ({progress.reason(error)})"
        return RunError(f"{what};\nstart again with --overwrite")

    def finish(self, summary: Summary) -> None:
        """Write summary.json, and remove last.pt if the run is done."""
        self.write("summary.json", summary.to_json())
        self.tidy()

    def tidy(self) -> None:
        """Remove last.pt if the run is done. Its own process may have been killed before it could."""
        if self.writes and self.last.exists() and self.status == "done":
            self.last.unlink()


def _trained_on(described: Config, devices: Sequence[str]) -> Config:
    *earlier, last = devices
    more = {"earlier_devices": tuple(earlier)} if earlier else {}
    return described.model_copy(update={"device_name": last, **more})


def tidy(path: Path) -> None:
    """Call `Run.tidy` on a folder; do nothing if a process has it open or it cannot be used."""
    if (path / "last.pt").exists():
        with suppress(RunError, OSError), open_run(path, resume=True) as run:
            run.tidy()


@contextmanager
def open_run(path: Path, resume: bool = False, overwrite: bool = False, writes: bool = True) -> Iterator[Run]:
    """Open a run's folder, created if necessary and locked against other processes for the `with` block.

    Raises RunError if the folder is in use or cannot be used, or if it has files and neither `resume` (keep
    them) nor `overwrite` (delete them in `Run.begin`) is set. With `writes` False, creates and locks nothing;
    this is for the other processes of a distributed run.
    """
    if not writes:
        yield Run(path, writes=False, overwrites=overwrite)
        return
    lock = FileLock(path / ".lock", timeout=1)  # longer than `in_use` holds the lock
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        files.remove_half_written(path)
        entries = [entry for entry in path.iterdir() if entry.name != ".lock"]
        if entries and not resume and not overwrite:
            raise RunError(f"{path} exists; add --resume to continue it, or --overwrite to start again")
    except Timeout:
        raise RunError(f"{path} is in use by another process; wait, or choose another --out") from None
    except OSError as error:
        raise RunError(f"--out {path.parent}: cannot use {path} ({error.strerror})") from None
    else:
        yield Run(path, overwrites=overwrite)
    finally:
        lock.release()
