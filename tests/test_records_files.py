"""Files are written whole or not at all, and the temporary files of killed writers are removed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import runs
from records import files

ROOT = Path(runs.__file__).parent


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "summary.json"
    files.write_atomically(target, "old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(target, "new")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_only_a_file_is_replaced(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(OSError, match="something else than a file is there"):
        files.write_atomically(tmp_path / "out", "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] and not (tmp_path / "out").is_file()


# A process that kills itself, or waits for its stdin to end, just before it renames its temporary file.
WRITER = """
import os, pathlib, signal, sys
from records import files
def replace(*_):
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print("ready", flush=True)
    sys.stdin.read()
    os.rename(*_)
os.replace = replace
files.write_atomically(pathlib.Path(sys.argv[1]), "theirs")
"""


def writer(file, when: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(file), when]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_temporary_file_of_a_killed_writer_is_removed(tmp_path):
    writer(tmp_path / "last.pt", "killed").wait()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".last.pt.")
    with runs.open_run(tmp_path, resume=True):
        assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]
    writer(tmp_path / "table.md", "killed").wait()
    files.write_atomically(tmp_path / "figure.png", b"")  # as report.py does, which opens no run
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "figure.png"}


def test_the_temporary_file_of_a_live_writer_is_kept(tmp_path):
    (tmp_path / ".table.md.swp").write_text("an editor's")
    with writer(tmp_path / "table.md", "waits") as other:
        assert other.stdout.readline() == "ready\n"
        for file in ("table.md", "figure.png"):
            files.write_atomically(tmp_path / file, "ours")
        assert (tmp_path / "table.md").read_text() == "ours"
        other.communicate("")
    assert other.returncode == 0 and (tmp_path / "table.md").read_text() == "theirs"
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "figure.png", ".table.md.swp"}
