"""Evaluation counts every image once, even if the last batch is not full, and gives the top-5 accuracy."""

import shutil

import pytest
import torch
from layouts import silent, tiny_cifar100, write_python100
from networks import SPEC, batch, network
from small_runs import SMALL, exit_status, only_run, summary
from torch.nn import functional as F

import analysis
import data
import evaluation
from evaluation import Evaluation
from kernels.device import Captured


class Twenty:
    """A loader of 20 images, 8 at a time. `epoch` makes a last batch of 4; `batch` pads it to 8."""

    resident, batch_size, num_images = True, 8, 20

    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        self.index = torch.cat([torch.arange(20), torch.zeros(4, dtype=torch.int64)]).view(3, 8)

    def __len__(self):
        return 3

    def epoch(self, epoch):
        return ((self.images[i : i + 8], self.labels[i : i + 8]) for i in range(0, 20, 8))

    def start(self, epoch):
        pass

    def batch(self, position):
        return self.images[self.index[position[0]]], self.labels[self.index[position[0]]]


def test_every_image_counts_once_if_the_last_batch_is_smaller():
    model, (images, labels) = network(), batch(20)
    scores = Evaluation(model, Twenty(images, labels))()
    logits = model.eval()(images)
    assert scores.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert scores.acc == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert scores.top5_acc is None, "of ten classes, five would say little"


def test_top5_includes_the_fifth_likeliest_class_but_not_the_sixth():
    ranks = torch.arange(20) % 12  # of the true class, from 0
    logits = torch.arange(12.0).expand(20, 12)[..., None, None]
    model = torch.nn.Flatten()
    model.fc = torch.nn.Linear(1, 12)  # not applied; has the number of classes and the device
    scores = Evaluation(model, Twenty(logits, 11 - ranks))()
    assert scores.acc == 100 * 2 / 20 and scores.top5_acc == 100 * 10 / 20


def test_the_padding_of_the_last_batch_does_not_count():
    """On a GPU, the last batch is padded, so that all batches have the same shape."""
    model, (images, labels) = network(classes=40), batch(20)
    evaluation = Evaluation(model, Twenty(images, labels))
    evaluation.captured = Captured(evaluation._next_batch, eager_calls=3)
    scores = evaluation()
    logits = model.eval()(images)
    assert scores.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert scores.acc == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    among = (logits.sort(descending=True).indices[:, :5] == labels[:, None]).any(1)
    assert scores.top5_acc == pytest.approx(100 * among.float().mean().item())


def test_training_and_evaluation_show_top5_accuracy_for_100_classes(
    small_and_offline, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_python100(tmp_path / "data" / "cifar-100-python", tiny_cifar100())
    assert exit_status([*SMALL, "--data", "cifar100", "--epochs", "1", "--milestones"]) == 0
    reached = summary(only_run())
    top5 = f"top 5 {reached['final_test_top5_acc']:.2f} %"
    assert top5 in capsys.readouterr().out and reached["data_title"].startswith("CIFAR-100")
    assert exit_status([str(only_run())], evaluation) == 0
    assert f"{reached['final_test_acc']:.2f} % test accuracy, {top5}, loss " in capsys.readouterr().out


def test_a_class_whose_name_is_shown_otherwise_stays_the_same(tiny_folder, tmp_path, monkeypatch):
    """Persian, among others, needs a character that counts as unprintable."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, "trees")
    for split in ("train", "test"):
        (tmp_path / "trees" / split / "oak").rename(tmp_path / "trees" / split / "o\u200cak")
    assert exit_status([*SMALL, "--data", "trees", "--epochs", "1", "--milestones"]) == 0
    assert exit_status([str(only_run())], evaluation) == 0
    assert exit_status(["runs"], analysis) == 0
    assert (only_run() / "analysis.json").exists()


def test_a_network_whose_loss_is_not_finite_has_no_accuracy(small, capsys, monkeypatch):
    assert exit_status([*small, "--epochs", "1"]) == 0
    monkeypatch.setattr(
        evaluation.Evaluation, "__call__", lambda self: evaluation.Scores(float("nan"), 25.0, None)
    )
    capsys.readouterr()
    assert exit_status([str(only_run())], evaluation) == 2
    said = capsys.readouterr()
    assert "so its accuracy means nothing" in said.err and said.err.count("\n") == 1 and not said.out


def test_the_batch_size_is_at_most_the_number_of_images(tiny_folder):
    """A checkpoint may claim any batch size; without a limit, an enormous one would exhaust memory."""
    dataset = data.open_dataset(str(tiny_folder), tiny_folder.parent / "prepared", say=silent)
    for claimed, taken in ((2**31, 96), (97, 96), (96, 96), (7, 7)):
        spec = SPEC.model_copy(update={"batch_size": claimed, "image_size": 16})
        assert evaluation.test_loader(dataset, spec, torch.device("cpu")).batch_size == taken
