"""A finished run counts as done only if it had the same images and the same initial weights."""

import os
import shutil

import pytest
from PIL import ImageOps
from PIL.Image import open as open_image
from small_runs import SMALL, exit_status

import progress
import sweep


@pytest.fixture
def cell(tiny_folder, tmp_path, monkeypatch):
    """Return a function that runs a sweep of one cell, and returns its exit status."""
    for name, value in {"ARCHS": "resnet8", "MODES": "bn", "SEEDS": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def train(*options: str) -> int:
        given = [*SMALL[2:], "--data-dir", "prepared", *options]
        return progress.run("sweep.py", lambda: sweep.main(given))

    return train


def test_images_of_the_same_name_that_differ_are_not_done(cell, tiny_folder, tmp_path, capsys):
    for place in ("mine", "moved", "other"):
        shutil.copytree(tiny_folder, tmp_path / place / "tiny")
    for file in (tmp_path / "other").rglob("*.png"):
        ImageOps.invert(open_image(file)).save(file)
    assert cell("--data", "mine/tiny") == 0
    (run,) = [path for path in (tmp_path / "runs").iterdir() if path.name != "logs"]
    before = (run / "summary.json").stat().st_mtime_ns
    for same in (str(tmp_path / "mine" / "tiny"), "moved/tiny"):
        assert cell("--data", same) == 0, same
    capsys.readouterr()
    assert cell("--data", "other/tiny") == 1
    assert "fingerprint" in capsys.readouterr().out
    assert (run / "summary.json").stat().st_mtime_ns == before


def test_initial_weights_of_the_same_name_that_differ_are_not_done(cell, tiny_folder, tmp_path, capsys):
    data = ["--data", str(tiny_folder)]
    for seed in ("1", "2"):
        assert exit_status([*SMALL, *data, "--mode", "all", "--seed", seed, "--out", f"from{seed}"]) == 0
        (run,) = (tmp_path / f"from{seed}").iterdir()
        (tmp_path / seed).mkdir()
        os.rename(run / "model.safetensors", tmp_path / seed / "weights.safetensors")
    assert cell(*data, "--init-from", "1/weights.safetensors") == 0
    capsys.readouterr()
    assert cell(*data, "--init-from", "2/weights.safetensors") == 1
    assert "was run with frozen_sha256" in capsys.readouterr().out
