"""Evaluation counts every image once, whatever the last batch, and says how often the class is likely."""

import pytest
import torch
from layouts import silent, tiny_cifar100, write_python100
from networks import SPEC, batch, network
from small_runs import SMALL, exit_status, only_run, summary
from torch.nn import functional as F

import data
import evaluation
from evaluation import Evaluation
from kernels.device import Captured


class Twenty:
    """A loader of 20 images, 8 at a time."""

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


def test_evaluation_counts_every_image_once_whatever_the_last_batch():
    model, (images, labels) = network(), batch(20)
    scores = Evaluation(model, Twenty(images, labels))()
    logits = model.eval()(images)
    assert scores.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert scores.acc == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert scores.top5_acc is None, "of ten classes, five would say little"


def test_the_fifth_is_among_five_and_the_sixth_is_not():
    ranks = torch.arange(20) % 12  # of the right class
    logits = torch.arange(12.0).expand(20, 12)[..., None, None]
    model = torch.nn.Flatten()
    model.fc = torch.nn.Linear(1, 12)  # not applied: logits are the images; it tells classes and device
    scores = Evaluation(model, Twenty(logits, 11 - ranks))()
    assert scores.acc == 100 * 2 / 20 and scores.top5_acc == 100 * 10 / 20


def test_a_last_batch_that_is_filled_up_counts_what_is_in_it():
    """As on a GPU, where every batch has the same shape."""
    model, (images, labels) = network(classes=40), batch(20)
    evaluation = Evaluation(model, Twenty(images, labels))
    evaluation.captured = Captured(evaluation._next_batch, eager_calls=3)
    scores = evaluation()
    logits = model.eval()(images)
    assert scores.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert scores.acc == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    among = (logits.sort(descending=True).indices[:, :5] == labels[:, None]).any(1)
    assert scores.top5_acc == pytest.approx(100 * among.float().mean().item())


def test_a_run_on_a_hundred_classes_shows_top5_and_so_does_its_evaluation(
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


def test_a_network_whose_loss_is_not_finite_has_no_accuracy(small, capsys, monkeypatch):
    assert exit_status([*small, "--epochs", "1"]) == 0
    monkeypatch.setattr(
        evaluation.Evaluation, "__call__", lambda self: evaluation.Scores(float("nan"), 25.0, None)
    )
    capsys.readouterr()
    assert exit_status([str(only_run())], evaluation) == 2
    said = capsys.readouterr()
    assert "so its accuracy means nothing" in said.err and said.err.count("\n") == 1 and not said.out


def test_a_batch_is_no_larger_than_there_are_images(tiny_folder):
    """A file may claim any batch size, and memory would be taken for it."""
    dataset = data.open_dataset(str(tiny_folder), tiny_folder.parent / "prepared", say=silent)
    for claimed, taken in ((2**31, 96), (97, 96), (96, 96), (7, 7)):
        spec = SPEC.model_copy(update={"batch_size": claimed, "image_size": 16})
        assert evaluation.test_loader(dataset, spec, torch.device("cpu")).batch_size == taken
