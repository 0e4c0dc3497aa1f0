"""The step is SGD on what trains, its metrics are the batch's, and its schedules are the published ones."""

import math

import pytest
import torch
from torch.nn import functional as F

import freeze
import models
from step import Captured, Evaluation, Schedule, Step


def network(seed=0, classes=10) -> torch.nn.Module:
    model = models.build("resnet8", classes)
    models.initialise(model, seed)
    return model.to(memory_format=torch.channels_last)


def batch(n=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 16, 16, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.randint(10, (n,), generator=generator)


def test_lr_steps_at_80_and_120():
    schedule = Schedule(steps_per_epoch=390)
    assert schedule.lr(0) == schedule.lr(80 * 390 - 1) == 0.1
    assert schedule.lr(80 * 390) == schedule.lr(120 * 390 - 1) == pytest.approx(0.01)
    assert schedule.lr(120 * 390) == schedule.lr(160 * 390 - 1) == pytest.approx(0.001)


def test_cosine_ends_at_zero_and_warm_up_rises_linearly():
    schedule = Schedule(10, "cosine", lr=1.0, epochs=5, warmup_epochs=1)
    assert [schedule.lr(i) for i in range(10)] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert schedule.lr(10) == 1.0 and schedule.lr(30) == pytest.approx(0.5)
    assert schedule.lr(50) == pytest.approx(0, abs=1e-12)
    assert Schedule(10, "constant", lr=0.3, milestones=(1,)).lr(999) == 0.3


def test_plateau_cuts_down_to_a_floor_and_survives_a_resume():
    def plateau() -> Schedule:
        return Schedule(1, "plateau", lr=1.0, min_lr=0.05, patience=3)

    schedule = plateau()
    for accuracy in (50.0, 50.0, 49.0):
        schedule.epoch_ended(accuracy)
    assert schedule.lr(3) == 1.0
    again = plateau()
    again.load_state_dict(schedule.state_dict())
    again.epoch_ended(50.0)
    assert again.lr(4) == pytest.approx(0.1)
    again.epoch_ended(60.0)
    third = plateau()
    third.load_state_dict(again.state_dict())
    for _ in range(3):
        assert third.lr(5) == pytest.approx(0.1), "a gain starts the count anew"
        third.epoch_ended(60.0)
    assert third.lr(8) == 0.05 and not third.stopped
    with pytest.raises(KeyError):
        plateau().load_state_dict({"factor": 1.0, "best_loss": 2.0})
    assert Schedule(1, "cosine", lr=1.0, min_lr=0.1, epochs=10).lr(10) == pytest.approx(0.1)


def test_early_stopping_counts_from_the_best_epoch_whatever_the_rate_does():
    schedule = Schedule(1, "plateau", lr=1.0, patience=2, early_stop=4)
    ends = []
    for accuracy in (10.0, 20.0, 19.0, 20.0, 21.0, 21.0, 20.0, 21.0, 20.0):
        schedule.epoch_ended(accuracy)
        ends.append(schedule.stopped)
    assert ends == [False] * 8 + [True]
    assert schedule.lr(9) == pytest.approx(1e-3), "cut after epochs 4, 7 and 9"


def test_a_step_is_sgd_with_momentum_and_weight_decay():
    model = network()
    model.requires_grad_(False)
    gamma = model.bn1.weight.requires_grad_()
    step, (images, labels) = Step(model, momentum=0.9, weight_decay=0.01), batch()
    expected, velocity = gamma.detach().clone(), 0
    for _ in range(3):
        reference = network().train()
        reference.bn1.weight.data.copy_(expected)
        loss = F.cross_entropy(reference(images), labels)
        (gradient,) = torch.autograd.grad(loss, reference.bn1.weight)
        velocity = 0.9 * velocity + gradient + 0.01 * expected
        expected = expected - 0.05 * velocity
        step(images, labels, lr=0.05)
    torch.testing.assert_close(gamma.detach(), expected, rtol=1e-4, atol=1e-5)


def test_metrics_are_the_mean_over_the_epochs_images():
    model = network()
    model.requires_grad_(False)
    step = Step(model)
    losses, correct = [], 0
    for seed in (0, 1):
        images, labels = batch(seed=seed)
        logits = model.train()(images)
        losses.append(F.cross_entropy(logits, labels).item())
        correct += (logits.argmax(1) == labels).sum().item()
        step(images, labels, lr=0.1)
    loss, accuracy = step.metrics()
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-5) and accuracy == pytest.approx(100 * correct / 16)
    step.start_epoch()
    assert step.metrics() == (0.0, 0.0)


def test_the_first_step_whose_loss_is_not_finite_is_remembered():
    step, (images, labels) = Step(network()), batch()
    step(images, labels, lr=0.1)
    assert step.diverged_at() is None
    for bad in (math.nan, 1.0, math.inf):
        step(images * bad, labels, lr=0.1)
    assert step.diverged_at() == 1


def test_a_step_that_fp16_skips_leaves_momentum_as_it_was():
    step, (images, labels) = Step(network(), dtype=torch.float16), batch()
    before = step.flat.detach().clone()
    step(images * math.inf, labels, lr=0.1)
    assert torch.equal(step.flat, before)
    assert not step.optimizer.state[step.flat]["momentum_buffer"].any()


def test_a_state_from_another_device_keeps_this_ones_settings():
    """Adam's step is captured on a GPU, which it refuses with the settings of a CPU."""
    saved = Step(network(), optimizer="adam").state_dict()
    step = Step(network(), optimizer="adam")
    step.optimizer.param_groups[0]["capturable"] = True
    step.load_state_dict(saved)
    assert step.optimizer.param_groups[0]["capturable"] and step.optimizer.param_groups[0]["lr"] is step.lr


def test_label_smoothing_reaches_the_loss():
    model, (images, labels) = network().requires_grad_(False), batch()
    expected = F.cross_entropy(model.train()(images), labels, label_smoothing=0.3).item()
    step = Step(model, label_smoothing=0.3)
    step(images, labels, lr=0.1)
    assert step.metrics()[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_steps_stay_near_fp32(dtype):
    images, labels = batch(32)
    gammas = []
    for d in (torch.float32, dtype):
        model = network()
        step = Step(model, dtype=d)
        for _ in range(2):
            step(images, labels, lr=0.01)
        assert step.diverged_at() is None
        gammas.append(model.layer3[0].bn2.weight.detach())
    assert gammas[1].dtype == torch.float32 and not torch.equal(*gammas)
    torch.testing.assert_close(gammas[1], gammas[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("settings", [{"memory": "recompute"}, {"memory": "stock"}, {"compiled": False}])
def test_every_way_to_a_step_trains_alike(settings):
    results = []
    for way in ({}, settings):
        model = network()
        step = Step(model, **way)
        for seed in range(3):
            step(*batch(seed=seed), lr=0.05)
        results.append((step.metrics()[0], model.bn1.bias.detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2, atol=1e-3)


def test_recomputing_gives_the_very_same_step():
    gammas = []
    for memory in ("lean", "recompute"):
        model = network()
        Step(model, memory=memory)(*batch(), lr=0.05)
        gammas.append(model.layer2[0].bn1.weight.detach())
    assert torch.equal(*gammas)


@pytest.mark.parametrize("mode", ["all", "bn_only", "random", "output"])
def test_the_trained_parameters_are_one_vector_and_keep_their_names_and_values(mode):
    model = network()
    freeze.freeze(model, mode)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = Step(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.is_leaf
        assert p.dim() < 4 or p.is_contiguous(memory_format=torch.channels_last)
    step(*batch(), lr=0.1)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def test_what_a_gpu_compiles_gives_the_same_loss_and_metrics():
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        step = Step(network())
        if compiled:
            step.loss, step.record = (torch.compile(f, dynamic=False) for f in (step.loss, step.record))
        for bad in (1, math.nan):
            step(batch()[0] * bad, batch()[1], lr=0.05)
        results.append((step.flat.grad.clone(), int(step.correct), step.diverged_at(), step.position.item()))
    torch.testing.assert_close(results[0][0], results[1][0], equal_nan=True)
    assert results[0][1:] == results[1][1:] == (results[0][1], 1, 2)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("mode", ["bn_only", "random", "none"])
def test_a_step_that_fetches_its_own_batch_and_rate_equals_one_that_is_given_them(resident, mode):
    """What a GPU captures, here called anew each time instead of replayed."""
    results = []
    for captures in (False, True):
        model = network()
        freeze.freeze(model, mode)
        step, loader = Step(model), Batches(resident)
        step.captures = captures
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("step.Captured", lambda function: function)
            for epoch in range(2):
                assert len(list(step.epoch(loader, epoch, [0.1, 0.05, 0.2]))) == 3
        results.append((step.metrics(), step.seen, model.bn1.weight.detach(), model.bn1.running_mean.clone()))
    (*first, gamma, mean), (*second, other_gamma, other_mean) = results
    assert first == second and torch.equal(gamma, other_gamma) and torch.equal(mean, other_mean)


class Batches:
    """A loader of three batches of 8, others in every epoch."""

    batch_size = 8

    def __init__(self, resident):
        self.resident = resident

    def start(self, epoch):
        self.images, self.labels = map(torch.stack, zip(*self.epoch(epoch), strict=True))

    def batch(self, position):
        images = self.images.index_select(0, position)[0]
        return images.contiguous(memory_format=torch.channels_last), self.labels.index_select(0, position)[0]

    def epoch(self, epoch):
        return (batch(seed=3 * epoch + i) for i in range(3))


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
    loss, accuracy = Evaluation(model, Twenty(images, labels))()
    logits = model.eval()(images)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())


def test_the_fifth_is_among_five_and_the_sixth_is_not():
    ranks = torch.arange(20) % 12  # of the right class
    logits = torch.arange(12.0).expand(20, 12)[..., None, None]
    model = torch.nn.Flatten()
    model.fc = torch.nn.Linear(1, 12)  # not applied: logits are the images; it tells classes and device
    evaluation = Evaluation(model, Twenty(logits, 11 - ranks))
    assert evaluation()[1] == 100 * 2 / 20 and evaluation.top5_acc == 100 * 10 / 20


def test_a_last_batch_that_is_filled_up_counts_what_is_in_it():
    """As on a GPU, where every batch has the same shape."""
    model, (images, labels) = network(classes=40), batch(20)
    evaluation = Evaluation(model, Twenty(images, labels))
    evaluation.captured = Captured(evaluation._batch_from_tensors, eager_calls=3)
    loss, accuracy = evaluation()
    logits = model.eval()(images)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    among = (logits.sort(descending=True).indices[:, :5] == labels[:, None]).any(1)
    assert evaluation.top5_acc == pytest.approx(100 * among.float().mean().item())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_on_the_gpu_matches_the_cpu(dtype, compiled):
    losses = []
    for device in ("cpu", "cuda"):
        model = network().to(device)
        step = Step(model, dtype=dtype if device == "cuda" else torch.float32, compiled=compiled)
        for seed in range(3):
            images, labels = batch(seed=seed)
            step(images.to(device), labels.to(device), lr=0.05)
        losses.append(step.metrics()[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if dtype == torch.float32 else 5e-2)
