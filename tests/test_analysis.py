"""analysis.json agrees with independent counts, and runs that cannot be analysed are named."""

import bisect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import analysis
import checkpoint
import data
import freeze
import models
import progress
import records
import train
from evaluation import Evaluation, Scores
from kernels import device as devices

SMALL = ["--arch", "resnet8", "--batch-size", "32", "--epochs", "8", "--milestones", "6", "--no-compile"]
SMALL += ["--device", "cpu", "--dtype", "fp32", "--augment", "none"]
GAMMAS = 336  # in a resnet8


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory) -> Path:
    """Return the folder of a finished run of eight epochs."""
    out = tmp_path_factory.mktemp("finished")
    where = ["--data", str(tiny_folder), "--data-dir", str(out / "prepared"), "--out", str(out / "runs")]
    train.main([*SMALL, *where])
    (folder,) = (out / "runs").iterdir()
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """Return a copy of the finished run's folder, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / "a"))


def analyse(*arguments: object) -> int:
    """Run analysis.py with these arguments and return its exit status."""
    return progress.run("analysis.py", lambda: analysis.main([str(argument) for argument in arguments]))


def content_of(folder: Path) -> dict:
    return json.loads((folder / "analysis.json").read_text())


def without_small_gammas(folder: Path, threshold: float) -> torch.nn.Module:
    model, _ = checkpoint.restore(folder)
    for name, parameter in model.named_parameters():
        if name.endswith(".weight") and parameter.dim() == 1:
            parameter.data[parameter.abs() < threshold] = 0
    return model


def save_with_gammas(folder: Path, values: list[float], **changes) -> None:
    """Rewrite the run's checkpoint with `values` as the first gammas of bn1, and `changes` to its spec."""
    model, spec = checkpoint.restore(folder)
    model.bn1.weight.data[: len(values)] = torch.tensor(values)
    sealed = checkpoint.seed_checkpoint(model, spec.model_copy(update=changes), steps=24)
    (folder / "model.safetensors").write_bytes(sealed)


def test_gamma_counts_match_the_gammas_in_the_checkpoint(run):
    save_with_gammas(run, [5.0, -4.0, 3.0, -0.0099, 0.0, 0.0101, -3.0, 0.5])
    tensors = load_file(run / "model.safetensors")
    gammas = [x for name, t in tensors.items() if name.endswith(".weight") for x in t.tolist()]
    counts = [0] * 120
    for gamma in gammas:
        counts[min(max(bisect.bisect_right(analysis.GAMMA_EDGES, gamma) - 1, 0), 119)] += 1
    assert analyse(run) == 0
    found = content_of(run)["gamma"]
    assert found["counts"] == counts and found["count"] == len(gammas) == sum(counts) == GAMMAS
    assert counts[0] >= 2 and counts[-1] >= 2  # the outermost bins also count the values outside
    assert len(found["edges"]) == 121 and found["edges"][0] == -3 and found["edges"][61] == 0.05
    last = content_of(run)["pruned"][-1]  # a gamma equal to the threshold is kept
    assert last["zeroed"] == sum(abs(x) < 0.5 for x in gammas) / len(gammas)
    assert found["share_near_zero"] == sum(abs(x) < 0.01 for x in gammas) / len(gammas) >= 2 / GAMMAS


def test_pruned_accuracies_are_those_of_networks_without_small_gammas(run, tiny_folder):
    assert analyse(run) == 0
    summary, content = json.loads((run / "summary.json").read_text()), content_of(run)
    assert content["test_acc"] == summary["final_test_acc"] and content["images"] == 20
    assert content["frozen_sha256"] == summary["frozen_sha256"]

    dataset = data.open_dataset(str(tiny_folder), run.parent, image_size=16)
    images = torch.from_numpy(dataset.test.images[:]).float()
    images = (images - torch.tensor(dataset.mean)) / torch.tensor(dataset.std)
    rows = content["pruned"]
    assert [row["threshold"] for row in rows] == list(analysis.THRESHOLDS)
    for row in rows:
        model = without_small_gammas(run, row["threshold"]).eval()
        logits = model(images.permute(0, 3, 1, 2))  # PyTorch's own modules, because gradients are enabled
        right = logits.argmax(1) == torch.from_numpy(dataset.test.labels)
        assert row["test_acc"] == 100 * int(right.sum()) / 20
        gammas = torch.cat([bn.weight.detach() for bn in analysis.batchnorms(model)])
        assert row["zeroed"] == int((gammas == 0).sum()) / GAMMAS
    assert rows[0]["zeroed"] == 0 and len({row["test_acc"] for row in rows}) > 1


def test_prune_sets_only_small_gammas_to_zero_and_restores_them(run):
    model, before = checkpoint.restore(run)[0], freeze.full_state(checkpoint.restore(run)[0])
    tried = []

    def evaluate() -> Scores:
        tried.append({name: t.clone() for name, t in freeze.full_state(model).items()})
        return Scores(loss=0.0, acc=float(len(tried)), top5_acc=None)

    def interrupted() -> Scores:
        if len(tried) == 3:
            raise KeyboardInterrupt
        return evaluate()

    rows = analysis.prune(model, evaluate)
    assert rows[-1].test_acc == len(tried) == len({row.zeroed for row in rows})
    for row in rows:
        wanted = freeze.full_state(without_small_gammas(run, row.threshold))
        state = tried[int(row.test_acc) - 1]
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    tried.clear()
    with pytest.raises(KeyboardInterrupt):
        analysis.prune(model, interrupted)
    after = freeze.full_state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


class Batches:
    """A loader of `images` without labels, in batches of `counts` images."""

    def __init__(self, images: torch.Tensor, *counts: int):
        self.device, self.batches = images.device, [(part, None) for part in images.split(counts)]

    def epoch(self, epoch: int):
        return iter(self.batches)


@pytest.mark.parametrize(
    "arch, shortcut, mode",
    [
        ("resnet8", "projection_all", "random"),
        ("resnet14", "pad", "bn_only"),
        ("vgg11", "projection", "all"),
        ("resnet50", "projection", "none"),
    ],
)
def test_relu_zeros_match_those_that_forward_hooks_see(arch, shortcut, mode):
    torch.manual_seed(0)
    model = models.build(arch, 4, shortcut)
    for bn in analysis.batchnorms(model):
        torch.nn.init.normal_(bn.weight)
        torch.nn.init.normal_(bn.bias)
    freeze.freeze(model, mode)
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found, of = analysis.relu_zeros(model, Batches(images, 3, 2), torch.float32)

    seen, blocks = [], [m for m in model.modules() if isinstance(m, models.Block)]
    before_shortcut = [block.bn3 if hasattr(block, "bn3") else block.bn2 for block in blocks]
    for name, module in model.named_modules():
        inside = isinstance(module, torch.nn.BatchNorm2d) and ".downsample." not in name
        if module in blocks or (inside and module not in before_shortcut):
            module.register_forward_hook(lambda _, __, y: seen.append(y))
    model.eval()(images)  # PyTorch's own modules, because gradients are enabled
    expected = torch.cat([(F.relu(y) == 0).sum((0, 2, 3)) for y in seen])
    positions = torch.cat([torch.full((y.shape[1],), 5 * y.shape[2] * y.shape[3]) for y in seen])
    assert np.array_equal(of, positions.numpy())
    assert len(found) == len(expected)
    assert np.abs(found - expected.numpy()).max() <= 1  # the size of a batch may change rounding
    assert 0 < (found == 0).sum() + (found == of).sum() < len(of)


def test_with_a_gamma_of_zero_beta_decides_whether_a_channel_is_silent(run):
    model, spec = checkpoint.restore(run)
    with torch.no_grad():
        for bn in (model.bn1, model.layer1[0].bn1):  # the stem's; one inside a block
            bn.weight[:3], bn.bias[:3] = 0, torch.tensor([-0.5, 0.5, 0.0])
    (run / "model.safetensors").write_bytes(checkpoint.seed_checkpoint(model, spec, steps=24))
    images = torch.randn(4, 3, 16, 16)
    zeros, of = analysis.relu_zeros(model, Batches(images, 4), torch.bfloat16)
    for first in (0, 16):
        assert (zeros / of)[first : first + 3].tolist() == [1, 0, 1]
    assert analyse(run) == 0
    relu = content_of(run)["relu"]
    assert relu["count"] == sum(relu["counts"]) == 16 + 2 * (16 + 32 + 64)
    assert relu["edges"] == [i / 20 for i in range(21)]
    assert 4 / relu["count"] <= relu["silent"] <= relu["silent_99"] <= relu["counts"][-1] / relu["count"] < 1


def test_silent_99_excludes_channels_silent_at_exactly_99_percent(monkeypatch, run):
    zeros, of = np.array([100, 990, 991, 0]), np.array([100, 1000, 1000, 100])
    monkeypatch.setattr(analysis, "relu_zeros", lambda *_: (zeros, of))
    pruned = records.Pruned(threshold=0.0, zeroed=0.0, test_acc=1.0)
    monkeypatch.setattr(analysis, "prune", lambda *_: [pruned])
    model, spec = checkpoint.restore(run)
    loader = Batches(torch.zeros(1, 3, 16, 16), 1)
    loader.num_images = 1
    relu = analysis.analyse(model, loader, spec).relu
    assert (relu.silent, relu.silent_99, relu.counts) == (0.25, 0.5, (1, *[0] * 18, 3))


def test_runs_that_cannot_be_analysed_are_named_and_the_others_analysed(run, capsys, monkeypatch):
    root, opened, open_dataset = run.parent, [], data.open_dataset
    monkeypatch.setattr(data, "open_dataset", lambda *a, **k: opened.append(a) or open_dataset(*a, **k))
    for name in "bcdefgh":
        shutil.copytree(run, root / name)
    summary = json.loads((run / "summary.json").read_text())
    (root / "b" / "summary.json").write_text(json.dumps(summary | {"status": "diverged"}))
    (root / "c" / "summary.json").unlink()
    (root / "d" / "model.safetensors").unlink()
    (root / "e" / "model.safetensors").write_bytes(b"\xff" * 100)
    (root / "f" / "summary.json").write_text("[")
    save_with_gammas(root / "g", [], fingerprint="f" * 16)
    config = json.loads((run / "config.json").read_text())
    config["options"]["data"] = str(root / "nowhere")
    (root / "h" / "config.json").write_text(json.dumps(config))
    shutil.copytree(run, root / "z")
    save_with_gammas(root / "z", [1.0])
    (root / "nothing").mkdir()

    assert analyse(root, root / "absent", run) == 1
    said = capsys.readouterr()
    for name in "az":
        assert content_of(root / name)["images"] == 20
    assert [line.split(":")[0][-1] for line in said.out.splitlines()] == list("abcz")
    assert "/a: " in said.out and f"{content_of(run)['test_acc']:.2f} % test accuracy, " in said.out
    assert "/b: skipped, diverged\n" in said.out and "/c: skipped, not finished\n" in said.out
    errors = [line for line in said.err.splitlines() if "% on this cpu" not in line]
    assert all(line.startswith(f"analysis.py: {root}/") for line in errors) and "Traceback" not in said.err
    assert [line.removeprefix(f"analysis.py: {root}/").split(":")[0] for line in errors] == [
        "absent",
        *"defgh",
    ]
    for what in (
        "no model.safetensors",
        "not a checkpoint of",
        "summary.json: Invalid JSON",
        "are not the run's",
        "nowhere",
    ):
        assert sum(what in line for line in errors) == 1, what
    assert {path.parent.name for path in root.glob("*/analysis.json")} == {"a", "z"}
    assert len(opened) == 1


def test_an_existing_analysis_is_replaced_only_with_overwrite(run, capsys):
    (run / "analysis.json").write_text("{}")
    assert analyse(run.parent) == 0
    assert content_of(run) == {} and "has analysis.json" in capsys.readouterr().out
    assert analyse(run.parent, "--overwrite") == 0
    assert content_of(run)["images"] == 20
    assert not [path for path in run.iterdir() if path.name.startswith(".analysis")]


def test_unusable_options_give_exit_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert analyse(tmp_path) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert analyse(tmp_path, "--device", "cuda") == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    assert analyse() == 2
    assert "RUNS" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_captured_evaluation_uses_the_gammas_of_each_threshold(tiny_folder, tmp_path, dtype):
    without = ("--no-compile", "cpu", "fp32", "--device", "--dtype")
    where = ["--data", str(tiny_folder), "--data-dir", str(tmp_path / "prepared")]
    where += ["--out", str(tmp_path / "runs"), "--device", "cuda", "--dtype", dtype]
    train.main([*(option for option in SMALL if option not in without), *where])
    (run,) = (tmp_path / "runs").iterdir()
    assert analyse(run) == 0
    content = content_of(run)
    assert content["test_acc"] == json.loads((run / "summary.json").read_text())["final_test_acc"]
    dataset = data.open_dataset(str(tiny_folder), tmp_path / "prepared", image_size=16)
    settings = {"device": torch.device("cuda"), "dtype": devices.DTYPES[dtype], "compiled": True}
    loader = data.make_loader(dataset, "test", batch_size=1000, **settings)
    for row in content["pruned"]:
        model = without_small_gammas(run, row["threshold"]).to("cuda", memory_format=torch.channels_last)
        assert Evaluation(model, loader, devices.DTYPES[dtype])().acc == row["test_acc"]
    assert len({row["test_acc"] for row in content["pruned"]}) > 1
    model = checkpoint.restore(run)[0]
    here = torch.cat([images.float().cpu() for images, _ in loader.epoch(0)])
    zeros, of = analysis.relu_zeros(model, Batches(here, len(here)), torch.float32)
    share = np.array(content["relu"]["counts"]) / content["relu"]["count"]
    near, _ = np.histogram(zeros / of, analysis.SILENCE_EDGES)
    assert np.abs(share - near / len(of)).max() < 0.1
