"""Tests of train.py's accuracy and loss curves, on tiny and on real images, with fast and plain kernels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import CIFAR10_CLASSES, write_images
from PIL import Image
from small_runs import cli, exit_status, metrics, only_run, summary

import data
import evaluation
from kernels import device


def test_training_learns(small):
    options = ["--mode", "all", "--epochs", "8", "--milestones", "6", "--augment", "none"]
    assert exit_status([*small, *options]) == 0
    assert summary(only_run())["final_test_acc"] > 60  # percent; chance is 25


def test_memory_settings_and_no_compile_give_the_same_loss_curve(small):
    curves = []
    for i, way in enumerate(([], ["--memory", "recompute"], ["--memory", "stock"], ["--no-compile"])):
        fast = [option for option in small if option != "--no-compile"]
        assert exit_status([*fast, *way, "--dtype", "fp32", "--out", str(i)]) == 0
        curves.append([row["train_loss"] for row in metrics(only_run(Path(str(i))))])
    assert curves[0] == curves[1]
    for curve in curves[2:]:
        assert curve == pytest.approx(curves[0], rel=2e-3)


@pytest.mark.gpu
def test_photo_runs_on_the_gpu_have_the_losses_of_pytorchs_own_kernels(small, tmp_path):
    """In fp32, captured steps and evaluations differ from PyTorch's own only in the order of sums."""
    write_images(tmp_path / "many", classes=[f"class{i:02}" for i in range(20)], each=12, size=(32, 32))
    options = ["--data", str(tmp_path / "many"), "--data-dir", str(tmp_path), "--batch-size", "32"]
    options += ["--epochs", "4", "--schedule", "plateau", "--patience", "1", "--early-stop", "3"]
    options += ["--arch", "resnet8", "--augment", "photo", "--val-split", "40", "--dtype", "fp32"]
    for out, way in (("fast", []), ("plain", ["--no-compile"])):
        assert exit_status([*options, *way, "--out", out]) == 0
    fast, plain = (metrics(only_run(Path(out))) for out in ("fast", "plain"))
    assert fast[0]["train_loss"] == pytest.approx(plain[0]["train_loss"], rel=0.01)
    assert fast[0]["val_loss"] == pytest.approx(plain[0]["val_loss"], rel=0.05)
    assert all(0 <= row["test_top5_acc"] <= 100 for row in fast)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["bn_only", "random", "all", "none"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("way", [["--memory", "lean"], ["--memory", "recompute"], ["--no-compile"]])
def test_evaluation_on_the_gpu_reproduces_the_final_accuracy(small, capsys, mode, dtype, way):
    small = [option for option in small if option != "--no-compile"]
    assert exit_status([*small, "--device", "cuda", "--mode", mode, "--dtype", dtype, *way]) == 0
    result = summary(only_run())
    assert result["peak_memory_bytes"] > 0
    assert exit_status([str(only_run()), "--device", "cuda"], evaluation) == 0
    assert f"{result['final_test_acc']:.2f} % test accuracy" in capsys.readouterr().out


def test_fast_and_plain_kernels_have_one_loss_curve_on_real_images(cifar10_folder, tmp_path):
    """The tolerance allows for another order of sums, and in half precision for rounded activations."""
    options = ["--arch", "resnet14", "--data", "cifar10", "--data-dir", str(cifar10_folder), "--epochs", "3"]
    options += ["--train-subset", "5000", "--milestones", "2"]
    curves = []
    for out, way in (("fast", []), ("plain", ["--no-compile", "--dtype", "fp32"])):
        ended = cli([*options, *way, "--device", "cpu", "--out", str(tmp_path / out)])
        assert ended.returncode == 0, ended.stderr
        curves.append([row["train_loss"] for row in metrics(only_run(tmp_path / out))])
    half = device.default_dtype(torch.device("cpu")) != "fp32"
    assert curves[0] == pytest.approx(curves[1], rel=0.02 if half else 0.005)


@pytest.mark.parametrize(
    "layout", ["as it is", *(pytest.param(x, marks=pytest.mark.stress) for x in ("binary", "folder"))]
)
def test_resnet14_reaches_30_percent_on_real_images_in_two_epochs(cifar10_folder, tmp_path, layout):
    folder = (
        cifar10_folder if layout == "as it is" else rewritten(cifar10_folder, tmp_path / "images", layout)
    )
    options = ["--arch", "resnet14", "--mode", "bn_only", "--data", "cifar10", "--epochs", "2"]
    ended = cli([*options, "--milestones", "1", "--data-dir", str(folder), "--out", str(tmp_path / "runs")])
    assert ended.returncode == 0, ended.stderr
    assert summary(only_run(tmp_path / "runs"))["final_test_acc"] >= 30


def rewritten(source: Path, folder: Path, layout: str) -> Path:
    """Write the CIFAR-10 images in `source` to the new folder `folder`, and return it.

    `layout` is "binary" (the official binary files) or "folder" (a PNG per image, in a folder per class).
    """
    folder.mkdir()
    dataset = data.open_dataset("cifar10", source)
    for split_name, split in (("train", dataset.train), ("test", dataset.test)):
        if layout == "folder":
            for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
                path = folder / split_name / CIFAR10_CLASSES[label] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path, compress_level=0)
            continue
        planes = split.images.transpose(0, 3, 1, 2).reshape(-1, 3072)
        rows = np.concatenate([split.labels[:, None].astype(np.uint8), planes], 1)
        names = [f"data_batch_{i}" for i in range(1, 6)] if split_name == "train" else ["test_batch"]
        for name, part in zip(names, np.split(rows, len(names)), strict=True):
            (folder / f"{name}.bin").write_bytes(part.tobytes())
    return folder
