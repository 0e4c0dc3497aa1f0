"""A step updates the trained parameters as its optimiser should, and its metrics describe the epoch."""

import copy
import math

import pytest
import torch
from networks import batch, network
from torch.nn import functional as F

import freeze
import kernels
import step as steps
from config import Options
from step import Step


def test_a_step_is_sgd_with_momentum_and_weight_decay():
    model = network()
    model.requires_grad_(False)
    gamma = model.bn1.weight.requires_grad_()
    step, (images, labels) = Step(model, Options(momentum=0.9, weight_decay=0.01)), batch()
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


def test_diverged_at_is_the_first_step_with_a_non_finite_loss():
    step, (images, labels) = Step(network()), batch()
    step(images, labels, lr=0.1)
    assert step.diverged_at() is None
    for bad in (math.nan, 1.0, math.inf):
        step(images * bad, labels, lr=0.1)
    assert step.diverged_at() == 1


def test_a_skipped_fp16_step_leaves_weights_and_momentum_unchanged():
    step, (images, labels) = Step(network(), dtype=torch.float16), batch()
    before = step.flat.detach().clone()
    step(images * math.inf, labels, lr=0.1)
    assert torch.equal(step.flat, before)
    assert not step.optimizer.state[step.flat]["momentum_buffer"].any()


def test_loading_a_state_keeps_this_devices_settings():
    """On a GPU, Adam must be `capturable`, which is off in a state that a CPU has saved."""
    saved = Step(network(), Options(optimizer="adam")).state_dict()
    step = Step(network(), Options(optimizer="adam"))
    step.optimizer.param_groups[0]["capturable"] = True
    step.load_state_dict(saved)
    assert step.optimizer.param_groups[0]["capturable"] and step.optimizer.param_groups[0]["lr"] is step.lr


TAKEN = {  # which of momentum and weight decay each optimiser accepts
    "sgd": {"momentum", "weight_decay"},
    "rmsprop": {"momentum", "weight_decay"},
    "adam": {"weight_decay"},
    "adamw": {"weight_decay"},
    "nadam": {"weight_decay"},
    "adagrad": {"weight_decay"},
    "rprop": set(),
}


@pytest.mark.parametrize("optimizer", TAKEN)
def test_each_optimiser_gets_the_options_it_accepts_and_trains(optimizer):
    model, given = network(), {"momentum": 0.5, "weight_decay": 0.25}
    step, before = Step(model, Options(optimizer=optimizer, **given)), model.bn1.weight.detach().clone()
    taken = {name: step.optimizer.defaults[name] for name in given.keys() & step.optimizer.defaults.keys()}
    assert taken == {name: given[name] for name in TAKEN[optimizer]}
    assert type(step.optimizer).__name__.lower() == optimizer
    assert step.optimizer.param_groups[0]["lr"] is step.lr, "each step sets it, also where it is captured"
    for seed in range(3):
        step(*batch(seed=seed), lr=0.01)
    assert step.diverged_at() is None and not torch.equal(model.bn1.weight, before)

    again = Step(network(), Options(optimizer=optimizer, **given))  # continues from that state
    again.load_state_dict(copy.deepcopy(step.state_dict()))
    again.flat.data.copy_(step.flat)
    for one in (step, again):
        one(*batch(seed=3), lr=0.01)
    assert torch.equal(step.flat, again.flat)


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adamw"])
def test_updates_equal_those_of_torch_optim_on_each_parameter(optimizer):
    model, reference = network(), network()
    step = Step(model, Options(optimizer=optimizer, momentum=0.5, weight_decay=0.01))
    known = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop, "adamw": torch.optim.AdamW}[optimizer]
    momentum = {} if optimizer == "adamw" else {"momentum": 0.5}
    of_torch = known(reference.parameters(), lr=0.01, weight_decay=0.01, **momentum)
    for seed in range(3):
        images, labels = batch(seed=seed)
        step(images, labels, lr=0.01)
        gradients = step.flat.grad.split([p.numel() for p in reference.parameters()])
        for p, gradient in zip(reference.parameters(), gradients, strict=True):
            p.grad = gradient.view_as(p)
            if p.dim() == 4:
                p.grad = gradient.view(p.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        of_torch.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_on_a_cpu_nothing_is_compiled(monkeypatch):
    """Above all not `_record`: compiled for a CPU by torch 2.13, it loses the epoch's sum of losses."""
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    step = Step(network(), compiled=True)
    assert step.record is steps._record and step.loss == step._loss and not step.captures
    step(*batch(), lr=0.1)
    assert float(step.loss_sum) > 0 and int(step.position) == 1


def test_label_smoothing_reaches_the_loss():
    model, (images, labels) = network().requires_grad_(False), batch()
    expected = F.cross_entropy(model.train()(images), labels, label_smoothing=0.3).item()
    step = Step(model, Options(label_smoothing=0.3))
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
def test_memory_and_compiled_settings_do_not_change_training(settings):
    results = []
    for way in ({}, settings):
        model = network()
        kernels.configure(model, **way)
        step = Step(model, compiled=way.get("compiled", True))
        for seed in range(3):
            step(*batch(seed=seed), lr=0.05)
        results.append((step.metrics()[0], model.bn1.bias.detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2, atol=1e-3)


def test_recomputing_gives_the_same_bits():
    gammas = []
    for memory in ("lean", "recompute"):
        model = network()
        kernels.configure(model, memory=memory)
        Step(model)(*batch(), lr=0.05)
        gammas.append(model.layer2[0].bn1.weight.detach())
    assert torch.equal(*gammas)


@pytest.mark.parametrize("mode", ["all", "bn_only", "random", "output"])
def test_flattening_keeps_values_and_only_trained_parameters_change(mode):
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


def test_compiled_loss_and_metrics_equal_eager_ones():
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
def test_an_epoch_equals_separate_steps_on_its_batches(resident, mode):
    """A GPU captures and replays the step of `epoch`, which is here called each time instead."""
    results, lrs = [], [0.1, 0.05, 0.2]
    for given in (True, False):
        model = network()
        freeze.freeze(model, mode)
        step, loader = Step(model), Batches(resident)
        for epoch in range(2):
            if given:
                step.start_epoch()
                for (images, labels), lr in zip(loader.epoch(epoch), lrs, strict=True):
                    step(images, labels, lr)
            else:
                assert len(list(step.epoch(loader, epoch, lrs))) == 3
        results.append((step.metrics(), step.seen, model.bn1.weight.detach(), model.bn1.running_mean.clone()))
    (*first, gamma, mean), (*second, other_gamma, other_mean) = results
    assert first == second and torch.equal(gamma, other_gamma) and torch.equal(mean, other_mean)


class Batches:
    """A loader of three batches of 8 images, which differ between epochs."""

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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_on_the_gpu_matches_the_cpu(dtype, compiled):
    losses = []
    for device in ("cpu", "cuda"):
        model = network().to(device)
        kernels.configure(model, compiled=compiled)
        step = Step(model, dtype=dtype if device == "cuda" else torch.float32, compiled=compiled)
        for seed in range(3):
            images, labels = batch(seed=seed)
            step(images.to(device), labels.to(device), lr=0.05)
        losses.append(step.metrics()[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if dtype == torch.float32 else 5e-2)
