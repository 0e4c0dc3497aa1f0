"""Tests of progress.py: the exit statuses, error messages, signals and output streams of scripts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import progress

ROOT = Path(progress.__file__).parent


def ends_with(error: BaseException):
    def main():
        raise error

    return main


class Unusable(ValueError):
    exit_status = 2


class Failed(Exception):
    exit_status = 1


def test_the_exit_status_is_what_main_returns_or_0(capsys):
    assert progress.run("x.py", lambda: None) == 0 and progress.run("x.py", lambda: 1) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error, status, said",
    [
        (Unusable("--lr 0: must be more"), 2, "--lr 0: must be more"),
        (Failed("runs/a: diverged"), 1, "runs/a: diverged"),
        (OSError(28, "No space left on device", "runs/a"), 1, "No space left on device: 'runs/a'"),
        (PermissionError(13, "Permission denied", "a/b"), 2, "Permission denied: 'a/b'"),
        (ConnectionError("another process has ended"), 1, "another process has ended"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory; use a machine"),
        (RuntimeError("could not create a primitive"), 1, "out of memory"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("In process 0:\n</a>: No space left on device (28)"), 1, "</a>: No space left"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (KeyboardInterrupt("interrupted before the first cell"), 1, "interrupted before the first cell"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_expected_error_gives_one_line_and_its_exit_status(capsys, error, status, said):
    assert progress.run("x.py", ends_with(error)) == status
    out, err = capsys.readouterr()
    assert err.startswith("x.py: ") and said in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize("script, mend", [("train.py", "try a smaller --batch-size"), ("report.py", "more")])
def test_out_of_memory_suggests_batch_size_only_if_the_script_has_it(capsys, script, mend):
    assert progress.run(script, ends_with(MemoryError())) == 1
    said = capsys.readouterr().err
    assert mend in said and ("--batch-size" in said) is (script == "train.py")


@pytest.mark.parametrize(
    "error", [ValueError("a defect"), RuntimeError("shapes do not fit"), AssertionError(), KeyError("a")]
)
def test_an_unexpected_error_propagates(capsys, error):
    with pytest.raises(type(error)):
        progress.run("x.py", ends_with(error))
    assert capsys.readouterr().err == ""


def test_sigterm_ends_a_script_like_ctrl_c_and_a_second_one_is_ignored(capsys):
    cleaned = []

    def main():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # as if it came while files were being saved
            cleaned.append(True)

    assert progress.run("x.py", main) == 1
    assert cleaned and capsys.readouterr().err == "x.py: interrupted\n"


def test_signal_handlers_are_set_for_a_script_and_restored_afterwards(heeds_ctrl_c):
    def handlers() -> list:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before, main = handlers(), ends_with(KeyboardInterrupt())
    assert before[0] is signal.default_int_handler and progress.interrupt not in before
    assert progress.run("x.py", lambda: handlers().count(progress.interrupt)) == 2
    assert progress.run("x.py", main) == 1 and handlers() == before


SCRIPTS = [path for path in sorted(ROOT.glob("*.py")) if "__main__" in path.read_text().splitlines()[-2]]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_ctrl_c_during_the_imports_of_a_script_gives_no_traceback(script, tmp_path):
    (tmp_path / "torch.py").write_text("import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(20)\n")
    settings = {"env": os.environ | {"PYTHONPATH": str(tmp_path)}, "capture_output": True}
    at_a_terminal = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    ended = subprocess.run([sys.executable, str(script)], **settings, **at_a_terminal)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, b"")


def test_a_closed_pipe_is_no_error():
    code = "import progress, sys\nsys.exit(progress.run('x.py', lambda: print('line\\n' * 100_000)))"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as running:
        running.stdout.readline()
        running.stdout.close()
        error = running.stderr.read()
    assert (running.returncode, error) == (0, b"")


def test_an_invalid_command_line_gives_one_line_and_status_2(capsys):
    parser = progress.Parser("x.py", "What it is for.")
    parser.add_argument("--size", type=int)
    assert progress.run("x.py", lambda: parser.parse_args(["--size", "large"])) == 2
    said = capsys.readouterr().err
    assert "--size" in said and "python x.py --help" in said and said.count("\n") == 1
    assert progress.run("x.py", lambda: parser.parse_args(["--siz", "1"])) == 2, "not by its beginning"


def test_under_torchrun_only_rank_0_prints(capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert progress.run("x.py", ends_with(Unusable("rank " + rank))) == 2
    assert capsys.readouterr().err == "x.py: rank 0\n"


def test_a_too_long_file_name_gives_status_2_and_is_shown_shortened(capsys):
    assert progress.run("x.py", Path("a" * 5000 + "z").read_text) == 2
    said = capsys.readouterr().err
    assert "too long" in said and "aaa...aaa" in said and said.count("\n") == 1 and len(said) < 500


def test_control_codes_in_an_error_do_not_reach_the_terminal(capsys):
    assert progress.run("x.py", ends_with(Unusable("a\x1b[2Jb is no file;\nname another"))) == 2
    assert capsys.readouterr().err == "x.py: a\N{REPLACEMENT CHARACTER}[2Jb is no file;\nname another\n"


@pytest.mark.parametrize("lines", [1, 100_000])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_output_device_gives_one_line(lines, unbuffered):
    code = f"import progress, sys\nsys.exit(progress.run('x.py', lambda: print('line\\n' * {lines})))"
    with open("/dev/full", "w") as full:
        settings = {"cwd": ROOT, "env": os.environ | {"PYTHONUNBUFFERED": unbuffered}}
        ended = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, **settings
        )
    mend = "free some space, or send it elsewhere"
    said = f"x.py: [Errno 28] No space left on device, where its output goes; {mend}\n"
    assert (ended.returncode, ended.stderr) == (1, said)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_closed_or_full_streams_end_no_script_and_reach_no_file(tmp_path, closed):
    code = f"""if True:
        import os, progress, sys
        def main():
            with open({str(tmp_path / "kept")!r}, "w"):
                print("told")
                progress.note("x.py", "told")
                for number in (1, 2):
                    os.write(number, b"told") if sys.argv[1] != "2>/dev/full" else None
            return 3
        sys.exit(progress.run("x.py", main))
    """
    command = f'exec "$0" -c "$1" "{closed}" {closed}'
    ended = subprocess.run(["bash", "-c", command, sys.executable, code], capture_output=True, cwd=ROOT)
    assert ended.returncode == 3 and b"Traceback" not in ended.stderr
    assert (tmp_path / "kept").read_bytes() == b""


def test_characters_that_the_output_cannot_encode_are_escaped():
    code = "import progress, sys\nsys.exit(progress.run('x.py', lambda: progress.Terminal().say('\\u00d7')))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=environment)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"\\xd7\n", b"")


@pytest.mark.parametrize(
    "given, spins",
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=str,
)
def test_openmp_waits_awake_only_briefly_unless_the_user_says_otherwise(given, spins):
    program = "import progress, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", program]
    folder = Path(progress.__file__).parent
    ended = subprocess.run(command, env=environment | given, cwd=folder, capture_output=True, text=True)
    assert ended.stdout.split() == [spins, "False"], "it must be set before torch loads OpenMP"
