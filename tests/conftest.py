"""What the tests of several modules need: a tiny image folder, and the real images where they are at hand."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import ROWS, ROWS_100, change_set
from PIL import Image

from datasets import prepare, sources

if not torch.cuda.is_available():  # before anything imports Triton: without a GPU its kernels run in Python
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items):
    """Skip what is marked `gpu` where there is none; where there is one, mark so all that computes on it."""
    for item in items:
        if getattr(item.module, "DEVICE", "cpu") == "cuda":
            item.add_marker(pytest.mark.gpu)
        if tried := item.get_closest_marker("tried"):
            item.user_properties.append(("case", tried.args[0]))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; torch finds none"))


def pytest_terminal_summary(terminalreporter):
    """Print what the stress tests tried, and what was lost.

    Tests marked `tried` are counted, by what they try. Others say it by `record_property("tried", line)`,
    which is shown where they pass.
    """
    told = [each for of_a_kind in terminalreporter.stats.values() for each in of_a_kind]
    reports = [
        each for each in told if isinstance(each, pytest.TestReport)
    ]  # not what was deselected, or a warning
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
    """Imported once, and not in every fork."""
    prepare.import_ffcv()


@pytest.fixture
def heeds_ctrl_c():
    """Handle SIGINT as at a terminal, also where the tests run in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """Four classes of 16x16 images that differ in colour and grain; 24 to train on and 5 to test in each."""
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


@pytest.fixture(scope="session")
def cifar10_folder() -> Path:
    """A folder that holds CIFAR-10 in any layout."""
    if "CIFAR10_FOLDER" not in os.environ:
        pytest.skip("needs real images: set CIFAR10_FOLDER to a folder that holds CIFAR-10")
    return Path(os.environ["CIFAR10_FOLDER"])


@pytest.fixture
def small_and_offline(monkeypatch, tmp_path):
    """Tiny official files, no site but those a test makes, and no cache but the test's own."""
    change_set(monkeypatch, "cifar10", counts={"train": 5 * ROWS, "test": ROWS})
    change_set(monkeypatch, "cifar100", counts=ROWS_100)
    for name, known in sources.SETS.items():
        if known.url:
            change_set(monkeypatch, name, url="http://127.0.0.1:9/" + known.url.rpartition("/")[2])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def small(tiny_folder, tmp_path, monkeypatch) -> list[str]:
    """Options of a run of a few seconds, in a folder of its own."""
    from small_runs import small_options  # here, because few tests need all that it imports

    monkeypatch.chdir(tmp_path)
    return small_options(tiny_folder)
