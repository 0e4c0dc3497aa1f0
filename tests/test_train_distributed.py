"""Tests of train.py under torchrun: two processes train the network that one trains, and none hangs.

torchrun takes seconds to start, so one start serves many runs: torchrun runs this file, see `in_each`.
"""

import contextlib
import copy
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import (
    ROOT,
    config,
    exit_status,
    interrupt_after_an_epoch,
    metrics,
    only_run,
    small_options,
    summary,
    without_times,
)
from torch.nn import functional as F

import checkpoint
import data
import freeze
import kernels
import models
import records
import train
from config import OptionError, Options, parse_options
from evaluation import Evaluation
from kernels import distributed
from kernels.distributed import ALONE, Group
from step import Step

SYNCED = {
    "lean": ["--mode", "bn_only"],
    "recompute": ["--mode", "random", "--memory", "recompute"],
    "no-compile": ["--mode", "all", "--no-compile", "--lr", "0.02"],
    "resumed": ["--mode", "bn+output", "--optimizer", "adam", "--lr", "0.01"],
    "chosen": ["--lr", "0.02", "--schedule", "plateau", "--patience", "1", "--early-stop", "2"],
}
SYNCED["chosen"] += ["--val-split", "16", "--epochs", "6"]
LONG = ["--mode", "all", "--epochs", "12", "--milestones", "8", "--lr", "0.02"]


def fp32(images: Path) -> list[str]:
    """Return the options of a small fp32 run with our own kernels."""
    return [*(option for option in small_options(images) if option != "--no-compile"), "--dtype", "fp32"]


def torchrun(script: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *arguments], **pipes, env=environment)


def in_each(todo: str, out: str) -> None:
    """Run train.py in this process, one of torchrun's, with each list of options in the JSON object `todo`.

    The file `out` followed by the rank gets, for each name in `todo`, the exit status and a list of hashes of
    the trained networks. The list is empty if the run failed.
    """
    endings = {}
    with distributed.joined() as group:
        distributed.joined = lambda: contextlib.nullcontext(group)
        networks, seed_checkpoint = [], checkpoint.seed_checkpoint
        checkpoint.seed_checkpoint = lambda model, *rest: (
            networks.append(model) or seed_checkpoint(model, *rest)
        )
        scores = train.Training.scores

        def scores_apart(training, evaluation):
            """Return scores whose validation accuracy differs between processes, but is right on average."""
            found = scores(training, evaluation)
            if evaluation is not training.validation:
                return found
            training.validated = getattr(training, "validated", 0) + 1
            return found._replace(acc=found.acc + 40 * (-1) ** (training.validated + group.rank))

        train.Training.scores = scores_apart
        for name, options in json.loads(todo).items():
            networks.clear()
            endings[name] = exit_status(options), [freeze.full_sha256(network) for network in networks]
    Path(f"{out}{group.rank}").write_text(json.dumps(endings))


@pytest.fixture(scope="module")
def done(tiny_folder, tmp_path_factory):
    """Return a folder of runs, the results of `in_each` in each process, and torchrun's standard error.

    One process trains the runs in one/NAME, and two processes those in two/NAME. In two/resumed and
    two/other number, one process has trained before.
    """
    folder = tmp_path_factory.mktemp("processes")
    options = fp32(tiny_folder)
    two = {name: [*options, "--sync-bn", *more] for name, more in SYNCED.items()}
    for name, given in two.items():
        assert exit_status([*given, "--out", str(folder / "one" / name)]) == 0
    assert exit_status([*options, "--out", str(folder / "two/other number")]) == 0
    interrupt_after_an_epoch([*two["resumed"], "--out", str(folder / "two/resumed")])

    two["resumed"] = [*two["resumed"], "--resume"]
    two["own statistics"] = [*options, "--mode", "all", "--lr", "0.02"]
    two["long"] = [*options, *LONG]
    two["other number"] = [*options, "--resume"]
    two["diverged"] = [*options, "--mode", "all", "--lr", "1e30"]
    two = {name: [*given, "--out", str(folder / "two" / name)] for name, given in two.items()}
    two["refused"] = two["lean"]  # must be last: after it, the processes are out of step
    running = torchrun(Path(__file__), json.dumps(two), str(folder / "ended"))
    _, said = running.communicate(timeout=120)
    assert running.returncode == 0, said
    endings = [json.loads((folder / f"ended{rank}").read_text()) for rank in (0, 1)]
    return folder, endings, said


def compare(folder: Path, rows: list[dict], tensors: dict[str, torch.Tensor]) -> None:
    """Assert that the run in `folder` has these metrics, trained tensors and statistics, up to fp32 rounding.

    Observed differences are 2e-5 (relative) in metrics and 3e-4 in tensors, as for one process with and
    without --no-compile: if rounding changes the sign of a ReLU's input, a whole gradient element changes.
    """
    for row, expected in zip(metrics(folder), rows, strict=True):
        for name in {"train_loss", "train_acc", "test_loss", "test_acc", "val_acc", "lr"} & expected.keys():
            assert row[name] == pytest.approx(expected[name], rel=1e-4), name
    for name, tensor in checkpoint.read_checkpoint(folder)[0].items():
        torch.testing.assert_close(tensor, tensors[name], rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize("way", SYNCED)
def test_with_sync_bn_two_processes_train_the_same_network_as_one(done, way):
    one = only_run(done[0] / "one" / way)
    compare(only_run(done[0] / "two" / way), metrics(one), checkpoint.read_checkpoint(one)[0])


def test_processes_with_different_accuracies_make_the_same_decisions(done):
    one, two = (only_run(done[0] / count / "chosen") for count in ("one", "two"))
    assert len({row["lr"] for row in metrics(one)}) > 1, "something was decided"
    results = [{k: summary(run)[k] for k in ("epochs_done", "chosen_epoch", "why")} for run in (one, two)]
    assert results[0] == results[1]


def test_without_sync_bn_each_part_is_normalised_and_statistics_averaged(done, tiny_folder):
    spec = config(only_run(done[0] / "two/own statistics")).spec
    rows, model = trained_in_halves(spec, tiny_folder)
    compare(only_run(done[0] / "two/own statistics"), rows, model.state_dict())


def trained_in_halves(spec: records.NetworkSpec, images: Path) -> tuple[list[dict], torch.nn.Module]:
    """Train in plain PyTorch as two processes should, and return the metrics per epoch and the network.

    Each half of a batch has its own copy of the network.
    """
    dataset = data.open_dataset(str(images), images.parent / "prepared", say=lambda line: None)
    rng = functools.partial(models.stream, 0)
    settings = {"device": "cpu", "dtype": torch.float32, "batch_size": 32}
    train_loader = data.make_loader(dataset, "train", **settings, rng=rng, augmented="paper")
    test_loader = data.make_loader(dataset, "test", **settings)
    model = checkpoint.create(spec).to(memory_format=torch.channels_last)
    kernels.configure(model, "stock")
    copies, rows = (model, copy.deepcopy(model)), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.02 * 0.1**epoch
        losses, correct = [], 0
        for images, labels in train_loader.epoch(epoch):
            for part, x, y in zip(copies, images.chunk(2), labels.chunk(2), strict=True):
                logits = part.train()(x)
                losses.append(F.cross_entropy(logits, y))
                correct += (logits.argmax(1) == y).sum().item()
                part.zero_grad()
                losses[-1].backward()
            with torch.no_grad():
                for p, q in zip(*(part.parameters() for part in copies), strict=True):
                    p.grad = (p.grad + q.grad) / 2
                optimizer.step()
                for p, q in zip(*(part.parameters() for part in copies), strict=True):
                    q.copy_(p)
        averages = {n: (b + copies[1].get_buffer(n)) / 2 for n, b in model.named_buffers() if "running" in n}
        for part in copies:
            part.load_state_dict(averages, strict=False)
        test = Evaluation(model, test_loader)()
        rows.append({"train_loss": sum(losses).item() / len(losses), "train_acc": 100 * correct / 96})
        rows[-1] |= {"test_loss": test.loss, "test_acc": test.acc}
    checkpoint.set_steps(model, 9)
    return rows, model


def test_the_networks_of_all_processes_are_bitwise_equal(done):
    _, (first, second), _ = done
    networks = [network for _, network in first.values()]
    assert networks == [network for _, network in second.values()]
    assert [len(network) for network in networks] == [1] * 7 + [0] * 3


def test_only_one_process_prints_and_the_others_end_when_it_refuses(done):
    _, (first, second), said = done
    ended = {name: [ending[name][0] for ending in (first, second)] for name in first}
    failed = {name: statuses for name, statuses in ended.items() if any(statuses)}
    assert failed == {"other number": [2, 2], "diverged": [1, 1], "refused": [2, 1]}
    # once each: three errors, "continuing" of "resumed", and that --milestones of "chosen" has no effect
    assert said.count("train.py: ") == 5 and "exists; add --resume" in said
    assert said.count("without effect: --milestones") == 1


def test_resuming_with_another_number_of_processes_needs_sync_bn(done):
    folder, _, said = done
    assert "was run with processes 1, not 2" in said and "continuing" in said
    assert config(only_run(folder / "two/resumed")).spec.processes == 2


def test_a_diverging_loss_ends_every_process(done):
    folder, _, said = done
    assert summary(only_run(folder / "two/diverged"))["status"] == "diverged"
    assert "the loss is not finite at epoch 1, step 2" in said


def test_an_interrupted_run_resumes_to_the_same_bits(done, tmp_path, tiny_folder):
    options = [*fp32(tiny_folder), *LONG, "--out", str(tmp_path / "runs")]
    running = torchrun(ROOT / "train.py", *options)
    while running.poll() is None and not list(tmp_path.glob("runs/*/last.pt")):
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1 and said.count("interrupted; --resume continues after epoch") == 1
    folder = only_run(tmp_path / "runs")
    assert summary(folder)["status"] == "interrupted" and 0 < len(metrics(folder)) < 12

    resumed = torchrun(ROOT / "train.py", *options, "--resume")
    _, said = resumed.communicate(timeout=60)
    whole = only_run(done[0] / "two/long")
    assert resumed.returncode == 0 and without_times(folder) == without_times(whole), said
    tensors = (checkpoint.read_checkpoint(run)[0].values() for run in (folder, whole))
    for a, b in zip(*tensors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options, named",
    [
        ("--seed 0 1", "--seed 0 1"),
        ("--batch-size 33", "--batch-size 33"),
        ("--sync-bn --memory stock", "--sync-bn"),
    ],
)
def test_options_that_two_processes_cannot_share_are_refused_in_a_line(options, named):
    each, _ = parse_options(options.split(), "")
    with pytest.raises(OptionError, match=named) as refused:
        train.check_group(each, Group(0, 2, 2))
    assert "\n" not in str(refused.value) and refused.value.exit_status == 2
    train.check_group(each, Group())


def test_more_processes_than_gpus_are_refused_in_a_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("cuda", "auto"):
        each, _ = parse_options(["--device", device], "")
        with pytest.raises(OptionError, match=f"--device {device}: 2 processes"):
            train.check_group(each, Group(0, 2, 2))
        train.check_group(each, Group(0, 2, 1))  # one process on each of two machines
    train.check_group(parse_options(["--device", "cpu"], "")[0], Group(0, 2, 2))


def test_a_single_process_sends_nothing():
    with distributed.joined() as group:
        assert group is distributed.ALONE and group.leads and not torch.distributed.is_initialized()
        for sync_bn in (False, True):
            assert not Step(
                models.build("resnet8"), Options(sync_bn=sync_bn), group=group
            ).averages_statistics
        group.stop_together()


def test_sync_bn_changes_nothing_in_a_single_process(done, tiny_folder, tmp_path):
    assert exit_status([*fp32(tiny_folder), *SYNCED["lean"], "--out", str(tmp_path / "runs")]) == 0
    without, synced = only_run(tmp_path / "runs"), only_run(done[0] / "one/lean")
    assert without_times(without) == without_times(synced)
    tensors, expected = (checkpoint.read_checkpoint(run)[0] for run in (without, synced))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


@pytest.mark.gpu
def test_steps_in_an_nccl_group_of_one_match_steps_without_a_group(tmp_path):
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        group, results = Group(), []
        group.connected = True
        for own, sync_bn in ((None, False), (group, False), (group, True)):
            model = models.build("resnet14")
            models.initialise(model, 0)
            model.to("cuda", memory_format=torch.channels_last)
            kernels.configure(model, group=group if sync_bn else None)
            step = Step(model, Options(sync_bn=sync_bn), group=own or ALONE)
            generator = torch.Generator().manual_seed(0)
            images = torch.randn(32, 3, 32, 32, generator=generator).to(
                "cuda", memory_format=torch.channels_last
            )
            for _ in range(3):
                step(images, torch.arange(32, device="cuda") % 10, lr=0.02)
            group.stop_together()
            results.append((step.metrics(), model.bn1.weight.detach().clone(), model.bn1.running_var.clone()))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-4)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    in_each(*sys.argv[1:])
    distributed.leave(0)
