"""Tests of train.py's errors: unusable options are refused at once, and a run that fails says why."""

import re
from pathlib import Path

import pytest
import torch
from small_runs import exit_status, only_run, summary

import bench
import runs
import train


@pytest.mark.parametrize(
    "options, named",
    [
        ("--arch resnet33", "--arch resnet33"),
        ("--batch-size 97", "batch"),
        ("--train-subset 33", "33"),
        ("--train-subset 400", "400"),
        ("--data no_such_folder", "no_such_folder"),
        ("--init-from absent.pt", "absent.pt"),
        ("--val-split 10", "--val-split 10"),
        ("--val-split 96", "--val-split 96"),
        ("--mode shortcut --shortcut pad", "shortcut"),
        ("--mode random --per-channel 28", "--per-channel 28"),
        ("--out {file}", "--out"),
        ("--arch vgg16 --image-size 8", "--arch vgg16"),
        ("--arch resnet18 --batch-size 1", "--batch-size"),
    ],
)
def test_unusable_options_give_a_line_or_two_and_exit_status_2(small, capsys, options, named):
    Path("file").write_text("")
    assert exit_status([*small, *options.format(file="file").split(" ")]) == 2
    said = capsys.readouterr()
    assert named in said.err and said.err.count("\n") <= 2 and "Traceback" not in said.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU, and there is one")
def test_asking_for_cuda_without_a_gpu_is_refused(small, capsys):
    assert exit_status([*small, "--device", "cuda"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_milestones_past_the_last_epoch_give_a_note(small, capsys):
    assert exit_status([*small, "--milestones", "80", "120"]) == 0
    assert "the learning rate stays at 0.1" in capsys.readouterr().err


def test_a_non_finite_loss_ends_the_run_at_once(small, capsys):
    assert exit_status([*small, "--mode", "all", "--lr", "1e30"]) == 1
    error = capsys.readouterr().err
    assert re.search(r"the loss is not finite at epoch 1, step 2\b", error), error
    result = summary(only_run())
    assert result["status"] == "diverged" and result["final_test_acc"] is None and "step 2" in result["why"]
    assert not (only_run() / "model.safetensors").exists()


def test_a_non_finite_last_test_loss_counts_as_diverged(small, capsys):
    assert exit_status([*small, "--mode", "all", "--lr", "1e30", "--epochs", "1", "--batch-size", "96"]) == 1
    assert "the last test loss is not finite" in capsys.readouterr().err
    assert summary(only_run())["status"] == "diverged"


def test_a_full_disk_ends_the_run_with_a_message(small, monkeypatch, capsys):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.Run, "end_epoch", full_disk)
    assert exit_status(small) == 1
    said = capsys.readouterr().err
    assert "No space left on device; mend that, and --resume continues after epoch 0\n" in said
    assert summary(only_run())["status"] == "failed"


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_out_of_memory_suggests_smaller_batches_and_a_bench_command(small, monkeypatch, capsys, error):
    def step(*_):
        raise error

    monkeypatch.setattr(train.Step, "_step", step)
    assert exit_status(small) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "out of memory at --batch-size 32; try a smaller one" in said
    assert summary(only_run())["status"] == "failed" and "out of memory" in summary(only_run())["why"]
    asked = re.search(r"\(python bench\.py (memory .*) says what would fit\)", said)[1].split()
    assert bench.parse_options(asked).impl == ["lean"] and "--budget" in asked
