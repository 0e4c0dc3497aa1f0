"""Stress tests of hostile files of runs, prepared data and caches: they are refused or made again."""

import json
import os
import shutil
import subprocess
import types
from pathlib import Path

import pytest
from hostile import assert_harmless, attempt, listing, refused
from made_runs import write_run
from small_runs import interrupt_after_an_epoch, only_run, small_options

import data
import report
import train
from kernels import choices, cpu
from reporting import reading

pytestmark = [
    pytest.mark.stress,
    pytest.mark.tried("hostile records of runs, of prepared data and of caches"),
]


@pytest.fixture(scope="module", autouse=True)
def begun(tiny_folder, tmp_path_factory) -> Path:
    """Return the folder of a run interrupted after its first epoch; ../../data has its prepared data."""
    out = tmp_path_factory.mktemp("begun")
    options = [*small_options(tiny_folder), "--data-dir", str(out / "data"), "--out", str(out / "runs")]
    interrupt_after_an_epoch(options)
    return only_run(out / "runs")


TEXTS = {  # contents for a JSON file
    "nothing": b"",
    "a zero byte": b"\0",
    "half an object": b'{"a": ',
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "an empty object": b"{}",
    "NaN": b"NaN",
    "an object of NaN": b'{"seed": NaN, "epoch": Infinity}',
    "lists nested 100,000 deep": b"[" * 10**5,
    "objects nested 100,000 deep": b'{"options":' * 10**5 + b"1" + b"}" * 10**5,
    "a number of 5,000 digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "a fraction of 5,000 digits": b'{"seed": 0.' + b"9" * 5000 + b"e-" + b"9" * 5000 + b"}",
    "invalid UTF-8": b'{"arch": "\xff\xfe"}',
    "UTF-16": '{"arch": "resnet8"}'.encode("utf-16"),
    "half a character": b'{"arch": "\\ud800"}',
    "a name that steers a terminal": b'{"\\u001b[2J\\u0007[red]": 1}',
    "a raw escape sequence": b'{"\x1b]0;title\x07": 1}',
    "a name of a million characters": b'{"' + b"a" * 10**6 + b'": 1}',
    "100,000 names": json.dumps(dict.fromkeys(map(str, range(10**5)))).encode(),
    "markup": b'{"[red]": "<script>alert(1)</script>"}',
    "HTML": b"<html>404</html>",
    "code": b"__import__('os').system('touch canary')",
}
KINDS = {  # what can be in place of a small plain file
    "a link out": lambda file: file.symlink_to("/etc/passwd"),
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a fifo": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "a terabyte that takes no space": lambda file: os.truncate(
        os.open(file, os.O_CREAT | os.O_WRONLY), 2**40
    ),
}
CASES = [*TEXTS, *KINDS, "a byte order mark"]


def replace(file: Path, case: str) -> None:
    """Replace a file as this case says."""
    honest = file.read_bytes()
    file.unlink()
    if case in KINDS:
        KINDS[case](file)
    else:
        file.write_bytes(TEXTS.get(case, b"\xef\xbb\xbf" + honest))


FILES = ("config.json", "summary.json", "metrics.jsonl", "analysis.json")
SAME = {("metrics.jsonl", "nothing")}  # a run may have no epochs


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("case", CASES)
def test_a_run_with_a_hostile_file_is_left_out_of_a_report_by_name(work, name, case):
    write_run(work / "runs", seed=1)
    bad = write_run(work / "runs", seed=0)
    replace(bad / name, case)
    before = listing(work.parent)
    outcome = attempt(report, ["runs", "--pack"], work)
    packed = [json.loads(line) for line in outcome.printed.splitlines()]
    seeds = [run["config"]["options"]["seed"] for run in packed]
    assert outcome.status == 0 and listing(work.parent) == before, outcome
    assert_harmless(outcome)
    if (name, case) not in SAME:
        assert len(outcome.lines) == 1 and f"runs/{bad.name}" in outcome.said, outcome
        assert seeds == ([0, 1] if name == "analysis.json" else [1]), outcome
        assert ("left out the analysis" if name == "analysis.json" else "left out") in outcome.said


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_with_a_hostile_file_is_not_resumed(work, begun, tiny_folder, name, case):
    folder = Path(shutil.copytree(begun, work / "runs" / begun.name))
    replace(folder / name, case)
    options = [*small_options(tiny_folder), "--data-dir", begun.parents[1] / "data", "--resume"]
    said = refused(train, options, work)
    assert f"{begun.name}/{name}" in said and "--overwrite" in said


BIG = 10**400
VALUES = [  # places in a valid packed run, and what to put there
    ("config__options__preset", "no such preset"),
    ("config__options__schedule", "[red]"),
    ("config__options__epochs", BIG),
    ("config__options__epochs", -1),
    ("config__options__lr", 1e308),
    ("config__options__batch_size", BIG),
    ("config__options__early_stop", -BIG),
    ("config__options__image_size", 2**40),
    ("config__options__milestones", ["a"]),
    ("config__options__arch", "\x1b[2J"),
    ("config__spec__classes", ["a"] * 10**5),
    ("config__spec__mean", [1e308] * 3),
    ("config__versions", {"torch": None, "\x1b[2J": "\x07"}),
    ("config__parent", {}),
    ("summary__train_s", BIG),
    ("summary__params_total", 0),
    ("summary__variant", {"a": [[1]]}),
    ("summary__why", "x" * 10**6),
    ("summary__final_test_acc", -1),
    ("epochs__1__epoch", 1),
    ("epochs__0__train_loss", 1e200),
    ("epochs__0__epoch_s", -5),
    ("epochs", [None]),
    ("analysis__gamma__count", 0),
    ("analysis__gamma__counts", [1, 2]),
    ("name", 5),
]


def packed_line(folder: Path) -> dict:
    (run,) = reading.read_runs([str(folder)], lambda line: None)
    return json.loads(run.to_json(None))


@pytest.mark.parametrize("case", [*TEXTS, *map(str, range(len(VALUES)))])
def test_a_hostile_line_of_packed_runs_is_left_out_by_its_number(work, case):
    write_run(work.parent / "good", seed=1)
    write_run(work.parent / "bad", seed=0)
    good, bad = (packed_line(work.parent / name) for name in ("good", "bad"))
    line = TEXTS.get(case)
    if line is None:
        path, value = VALUES[int(case)]
        keys = [int(key) if key.isdigit() else key for key in path.split("__")]
        of = bad
        for key in keys[:-1]:
            of = of[key]
        of[keys[-1]] = value
        line = json.dumps(bad).encode()
    (work / "runs.jsonl").write_bytes(b"\n".join([line, json.dumps(good).encode()]))
    before = listing(work.parent)
    outcome = attempt(report, ["runs.jsonl", "--pack"], work)
    assert outcome.status == 0 and listing(work.parent) == before, outcome
    assert_harmless(outcome)
    told = json.loads(outcome.printed.splitlines()[-1])
    if case.isdigit() and VALUES[int(case)][0] in HARMLESS:
        return
    assert told["config"]["options"]["seed"] == 1 and len(outcome.printed.splitlines()) == 1
    assert outcome.said.startswith("report.py: left out runs.jsonl, line 1:") and len(outcome.lines) == 1


HARMLESS = {"summary__why", "config__versions"}  # texts of any length, which are made printable


@pytest.mark.parametrize("case", KINDS)
def test_a_hostile_file_of_packed_runs_is_left_out_or_refused(work, case):
    write_run(work / "runs", seed=1)
    KINDS[case](work / "runs" / "more.jsonl")
    before = listing(work.parent)
    outcome = attempt(report, ["runs", "--pack"], work)
    assert outcome.status in (0, 2) and listing(work.parent) == before, outcome
    assert (
        all("left out" in line or outcome.status == 2 for line in outcome.lines)
        and "root" not in outcome.said
    )
    assert_harmless(outcome)


# ---- prepared data ----


def reopened(work: Path, tiny_folder: Path, begun: Path, harm) -> tuple[Path, Path]:
    """Copy prepared data, apply `harm` and open it again; return the paths of the copy and the original."""
    whole = begun.parents[1] / "data" / "beton"
    beton = Path(shutil.copytree(whole, work / "data" / "beton"))
    harm(beton)
    outcome = attempt(data, [tiny_folder, "--data-dir", work / "data"], work)
    assert outcome.status == 0 and len(outcome.lines) == 1, outcome
    assert_harmless(outcome)
    return beton, whole


@pytest.mark.parametrize("case", [case for case in CASES if case != "a folder"])
def test_an_invalid_index_of_prepared_data_is_made_again(work, tiny_folder, begun, case):
    beton, whole = reopened(work, tiny_folder, begun, lambda beton: replace(beton / "index.json", case))
    assert (beton / "index.json").read_bytes() == (whole / "index.json").read_bytes()
    assert not (beton / "index.json").is_symlink() and listing(beton).keys() == listing(whole).keys()


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "case", [*(case for case in KINDS if case != "a folder"), "nothing", "HTML", "no labels"]
)
def test_invalid_prepared_images_are_made_again(work, tiny_folder, begun, split, case):
    def harm(beton: Path) -> None:
        (file,) = beton.glob(f"*-{split}.beton")
        if case == "no labels":
            file.write_bytes(b"\xff" * file.stat().st_size)
        else:
            replace(file, case)

    beton, whole = reopened(work, tiny_folder, begun, harm)
    for file in whole.glob("*.beton"):
        assert (beton / file.name).read_bytes() == file.read_bytes() and not (beton / file.name).is_symlink()


# ---- caches ----


# "100,000 names" is left out because its entries, null by name, are valid choices.
@pytest.mark.parametrize("case", [case for case in TEXTS if case != "100,000 names"])
def test_invalid_choices_of_kernels_are_not_used(tmp_path, case):
    (tmp_path / "kernels.json").write_bytes(TEXTS[case])
    assert choices.Choices(tmp_path / "kernels.json").made == {}


def plant(library: Path, content: bytes, honest_digest: bool = False, mode: int = 0o600) -> None:
    """Replace the cached library and, unless `honest_digest`, its digest; `mode` is the library's."""
    library.unlink()
    library.write_bytes(content)
    library.chmod(mode)
    if not honest_digest:
        with open(library, "rb") as file:
            library.with_name(f"{library.name}.sha256").write_bytes(cpu._digest(file))


def linked(file: Path) -> None:
    file.symlink_to(file.rename(file.with_name("elsewhere")))


def digest(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def in_a_linked_folder(library: Path) -> None:
    folder = library.parent
    linked(folder)
    folder.chmod(0o770)


LIBRARIES = {  # what is done to the cached library; `code` is one that runs code when it is loaded
    "other code, with the old digest": lambda kept, code: plant(kept, code, honest_digest=True),
    "other code, without a digest": lambda kept, code: (plant(kept, code), digest(kept).unlink()),
    "other code that its group may write to": lambda kept, code: plant(kept, code, mode=0o660),
    "other code that all may write to": lambda kept, code: plant(kept, code, mode=0o602),
    "a digest that all may write to": lambda kept, code: (plant(kept, code), digest(kept).chmod(0o606)),
    "a link to other code": lambda kept, code: (plant(kept, code), linked(kept)),
    "a link to a digest": lambda kept, code: (plant(kept, code), linked(digest(kept))),
    "a folder that its group may write to": lambda kept, code: (plant(kept, code), kept.parent.chmod(0o770)),
    "a folder that all may write to": lambda kept, code: (plant(kept, code), kept.parent.chmod(0o707)),
    "a link to a folder that others may write to": lambda kept, code: (
        plant(kept, code),
        in_a_linked_folder(kept),
    ),
    "other code of another user": lambda kept, code: (plant(kept, code), os.chown(kept, 12345, 12345)),
    "a folder of another user": lambda kept, code: (plant(kept, code), os.chown(kept.parent, 12345, 12345)),
    "a truncated library": lambda kept, code: plant(kept, kept.read_bytes()[:5000], honest_digest=True),
    "a library of zero bytes": lambda kept, code: plant(kept, b"", honest_digest=True),
    "a library of rubbish": lambda kept, code: plant(kept, b"\x7fELF" + b"\xff" * 999, honest_digest=True),
    "a fifo": lambda kept, code: (kept.unlink(), os.mkfifo(kept, 0o600)),
    "a digest that is a fifo": lambda kept, code: (
        plant(kept, code),
        digest(kept).unlink(),
        os.mkfifo(digest(kept)),
    ),
    "a library that is a folder": lambda kept, code: (kept.unlink(), kept.mkdir()),
    "a link to a device": lambda kept, code: (kept.unlink(), kept.symlink_to("/dev/zero")),
    "a digest of rubbish": lambda kept, code: digest(kept).write_bytes(b"\xff" * 10**6),
}


def shared_library(source: Path, code: str) -> bytes:
    source.write_text(code)
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", source, "-o", source.with_suffix(".so")]
    subprocess.run(command, check=True)
    return source.with_suffix(".so").read_bytes()


@pytest.mark.parametrize("case", LIBRARIES)
def test_a_planted_library_is_not_loaded(work, monkeypatch, case):
    if "another user" in case and os.geteuid():
        pytest.skip("only root can give files away")
    canary = work.parent / "canary"
    runs_code = (
        f'#include <fcntl.h>\n__attribute__((constructor)) void now() {{ creat("{canary}", 0600); }}\n'
    )
    planted = shared_library(work / "planted.cpp", runs_code + 'extern "C" int answer() { return 13; }')
    (work / "small.cpp").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(cpu, "SOURCE", work / "small.cpp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "cache"))

    def answer(argv: list[str]) -> int:
        passes = cpu.passes.__wrapped__()
        return passes.library.answer() if type(passes) is cpu.CpuPasses else 3

    script = types.SimpleNamespace(__name__="answer", main=answer)
    assert attempt(script, [], work).status == 42
    (kept,) = (work / "cache").glob("batchnorm-only/*.so")
    LIBRARIES[case](kept, planted)
    outcome = attempt(script, [], work)
    assert outcome.status in (42, 3) and not canary.exists(), outcome
    assert "Traceback" not in outcome.said
