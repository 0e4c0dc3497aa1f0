"""Fixtures for the tests of several modules, and hooks that skip GPU tests and count stress tests."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import ROWS, ROWS_100, change_set, tiny_cifar10, write_python
from PIL import Image

from datasets import prepare, sources

if not torch.cuda.is_available():  # set before Triton is imported, so that it interprets its kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    """On a GPU machine, give each of pytest-xdist's workers its share of the cores, as tests use all."""
    if torch.cuda.is_available() and (given := getattr(config, "workerinput", None)):
        first, count = int(given["workerid"].removeprefix("gw")), given["workercount"]
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[first::count] or cores)


@pytest.hookimpl(tryfirst=True)  # before pytest applies -m
def pytest_collection_modifyitems(items):
    """Mark the tests of modules whose DEVICE is "cuda" as `gpu`, and skip such tests if there is no GPU.

    The argument of a test's mark `tried` becomes its property "case", for `pytest_terminal_summary`.
    """
    for item in items:
        if getattr(item.module, "DEVICE", "cpu") == "cuda":
            item.add_marker(pytest.mark.gpu)
        if tried := item.get_closest_marker("tried"):
            item.user_properties.append(("case", tried.args[0]))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; torch finds none"))


def pytest_terminal_summary(terminalreporter):
    """Print what the stress tests tried, and how many of them failed.

    Tests marked `tried` are counted by the argument of the mark. Other tests call
    `record_property("tried", line)`; the line is printed unless the test fails.
    """
    told = [each for of_a_kind in terminalreporter.stats.values() for each in of_a_kind]
    reports = [
        each for each in told if isinstance(each, pytest.TestReport)
    ]  # no deselected tests, no warnings
    reports = [report for report in reports if not report.skipped]
    failed = {report.nodeid for report in reports if report.failed}
    cases, lines = {}, set()
    for report in reports:
        for name, told in report.user_properties:
            if name == "case":
                cases.setdefault(told, set()).add(report.nodeid)
            elif name == "tried" and report.nodeid not in failed:
                lines.add(told)
    lines |= {f"{len(ids)} {what}; lost: {len(ids & failed) or 'nothing'}" for what, ids in cases.items()}
    if lines:
        terminalreporter.section("what was tried")
    for line in sorted(lines):
        terminalreporter.line(line)


@pytest.fixture(scope="session")
def ffcv():
    """Import FFCV, if it is installed, before tests fork processes, so that no fork has to import it."""
    prepare.import_ffcv()


@pytest.fixture
def heeds_ctrl_c():
    """Make SIGINT raise KeyboardInterrupt, even if a script runs the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """Return an image folder of four classes that differ in the spacing and brightness of vertical stripes.

    Each class has 24 training images and 5 test images of 16x16 pixels.
    """
    root, rng = tmp_path_factory.mktemp("data") / "tiny", np.random.RandomState(0)
    for split, count in (("train", 24), ("test", 5)):
        for label, name in enumerate(("ash", "elm", "oak", "yew")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = rng.randint(0, 120, (16, 16, 3))
                image[:, :: label + 1] += 40 * label
                Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def cifar10(tmp_path) -> Path:
    """Return a folder that has a tiny CIFAR-10 in the layout for Python."""
    write_python(tmp_path / "cifar-10-batches-py", tiny_cifar10())
    return tmp_path


@pytest.fixture(scope="session")
def cifar10_folder() -> Path:
    """Return the folder named by CIFAR10_FOLDER, which has CIFAR-10 in any layout, or skip the test."""
    if "CIFAR10_FOLDER" not in os.environ:
        pytest.skip("needs real images: set CIFAR10_FOLDER to a folder that holds CIFAR-10")
    return Path(os.environ["CIFAR10_FOLDER"])


@pytest.fixture
def small_and_offline(monkeypatch, tmp_path):
    """Make the official data sets tiny and their sites unreachable, and give the test an empty cache."""
    change_set(monkeypatch, "cifar10", counts={"train": 5 * ROWS, "test": ROWS})
    change_set(monkeypatch, "cifar100", counts=ROWS_100)
    for name, known in sources.SETS.items():
        if known.url:
            change_set(monkeypatch, name, url="http://127.0.0.1:9/" + known.url.rpartition("/")[2])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def small(tiny_folder, tmp_path, monkeypatch) -> list[str]:
    """Return train.py's options for a run of a few seconds, and change to a temporary folder."""
    from small_runs import small_options  # imported here, because few tests need it

    monkeypatch.chdir(tmp_path)
    return small_options(tiny_folder)


@pytest.fixture
def work(tmp_path) -> Path:
    """Return an empty working folder; a test sees what is written beside it, too."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"
