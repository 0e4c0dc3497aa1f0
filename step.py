"""One optimisation step: forward, loss, backward, update; and the learning rate's schedule.

Metrics stay on the device until they are asked for, so that nothing here waits for the GPU. There, the whole
step, fetching its batch included, becomes a CUDA graph after a few steps, and the host only replays it; a
step that is shared among processes does not.
"""

import inspect
import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from kernels.device import EAGER_CALLS, Captured, keep_freed_memory
from kernels.distributed import ALONE, Group


class Schedule:
    """The learning rate of every step, and whether there is to be another epoch.

    "step": it is multiplied by `gamma` after each of the `milestones` (in epochs). "cosine": it falls along
    half a cosine to `min_lr`. "plateau": it is multiplied by `gamma`, down to `min_lr`, whenever the
    validation accuracy has not risen for `patience` epochs (He et al. 2015, section 3.4). "constant": it
    stays. In the first `warmup_epochs` it rises linearly (Goyal et al. 2017). `stopped` becomes True once the
    validation accuracy has not risen for `early_stop` epochs.
    """

    def __init__(
        self,
        steps_per_epoch: int,
        schedule: str = "step",
        lr: float = 0.1,
        epochs: int = 160,
        milestones: Sequence[int] = (80, 120),
        gamma: float = 0.1,
        warmup_epochs: int = 0,
        min_lr: float = 0.0,
        patience: int = 10,
        early_stop: int | None = None,
    ):
        self.kind, self.base_lr, self.gamma, self.min_lr = schedule, lr, gamma, min_lr
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.milestones, self.warmup_steps = milestones, warmup_epochs * steps_per_epoch
        self.patience, self.early_stop = patience, early_stop
        self.factor, self.best_acc, self.since_best, self.since_cut = 1.0, -math.inf, 0, 0

    def lr(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0 over the whole run."""
        if step < self.warmup_steps:
            return self.base_lr * (step + 1) / self.warmup_steps
        if self.kind == "step":
            passed = sum(step >= m * self.steps_per_epoch for m in self.milestones)
            return self.base_lr * self.gamma**passed
        if self.kind == "cosine":
            total = self.epochs * self.steps_per_epoch
            done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
            return self.min_lr + (self.base_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
        return max(self.base_lr * self.factor, self.min_lr) if self.kind == "plateau" else self.base_lr

    def epoch_ended(self, validation_acc: float) -> None:
        """Note an epoch's validation accuracy (percent), which decides on plateaus and on stopping."""
        if validation_acc > self.best_acc:
            self.best_acc, self.since_best, self.since_cut = validation_acc, 0, 0
            return
        self.since_best, self.since_cut = self.since_best + 1, self.since_cut + 1
        if self.kind == "plateau" and self.since_cut >= self.patience:
            self.factor, self.since_cut = self.factor * self.gamma, 0

    @property
    def stopped(self) -> bool:
        return bool(self.early_stop) and self.since_best >= self.early_stop

    def state_dict(self) -> dict:
        return {k: getattr(self, k) for k in ("factor", "best_acc", "since_best", "since_cut")}

    def load_state_dict(self, state: dict) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])


def flatten(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """One vector of all `parameters`, which become views of it, so that one tensor is updated and not
    hundreds.
    """
    flat = nn.Parameter(torch.cat([in_memory_order(p.detach()) for p in parameters]))
    for p, part in zip(parameters, flat.detach().split([p.numel() for p in parameters]), strict=True):
        if p.dim() == 4:
            n, c, h, w = p.shape
            p.data = part.view(n, h, w, c).permute(0, 3, 1, 2)
        else:
            p.data = part.view(p.shape)
    return flat


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a vector, matrix or channels_last tensor."""
    return (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).reshape(-1)


def make_optimizer(
    name: str, flat: nn.Parameter, lr: torch.Tensor, **options: float
) -> torch.optim.Optimizer:
    """The optimiser of torch.optim whose lower-case name is `name`, on one vector, at the rate in the tensor
    `lr`.

    Of `options`, such as momentum, it gets those that it takes.
    """
    maker = {known.lower(): getattr(torch.optim, known) for known in torch.optim.__all__}[name]
    options |= {"lr": lr, "fused": True, "capturable": flat.is_cuda}
    taken = inspect.signature(maker).parameters.keys() & options.keys()
    optimizer = maker([flat], **{name: options[name] for name in taken})
    if name == "sgd" and optimizer.defaults["momentum"]:  # unwritten where fp16's first step is skipped
        optimizer.state[flat]["momentum_buffer"] = torch.zeros_like(flat.detach())
    return optimizer


class Step:
    """One step of an optimiser of torch.optim on the trainable parameters of `model` alone.

    `model` is configured already (kernels.configure). `dtype` is that of activations. `momentum` and
    `weight_decay` are for optimisers that have them. `compiled` captures the step on a GPU. The trainable
    parameters become views of one vector.

    `group`: the processes that train the model together, each on its part of a batch. Gradients are averaged,
    and metrics are those of the whole batch. BatchNorm normalises with the statistics of the part, as under
    torch's DistributedDataParallel; its running statistics are averaged after every epoch, which is as good
    as after every step because they move linearly. With `sync_bn` the model is configured to normalise over
    the whole batch.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: str = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        label_smoothing: float = 0.0,
        dtype: torch.dtype = torch.float32,
        compiled: bool = True,
        group: Group = ALONE,
        sync_bn: bool = False,
    ):
        self.model, self.dtype, self.label_smoothing = model, dtype, label_smoothing
        self.group, self.averages_statistics = group, group.connected and not sync_bn
        self.device = next(model.parameters()).device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.lr = torch.zeros((), device=self.device)
        self.optimizer = None  # mode `none`: only BatchNorm's running statistics follow the data
        if self.trained:
            self.flat = flatten(self.trained)
            options = {"momentum": momentum, "weight_decay": weight_decay}
            self.optimizer = make_optimizer(optimizer, self.flat, self.lr, **options)
        # fp16 gradients underflow without it; with other dtypes it does nothing
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        zero = {"dtype": torch.int64, "device": self.device}
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct, self.first_bad_step = torch.zeros((), **zero), torch.zeros((), **zero)
        self.position = torch.zeros(1, **zero)  # of the step in its epoch
        self.loss, self.record = self._loss, _record
        if compiled and self.device.type == "cuda":  # instead of two dozen launches of a few numbers each
            torch._dynamo.config.recompile_limit = 64  # seeds side by side may each compile their own
            self.loss, self.record = (torch.compile(f, dynamic=False) for f in (self._loss, _record))
        self.captured, self.captured_from = None, None
        self.captures = compiled and self.device.type == "cuda" and not group.connected
        self.warm_up_steps = EAGER_CALLS + 1 if self.captures else 1
        self.start_epoch()

    def start_epoch(self) -> None:
        self.model.train()
        self.seen = 0
        for metric in (self.loss_sum, self.correct, self.position):
            metric.zero_()
        self.first_bad_step.fill_(-1)

    def epoch(self, loader, epoch: int, lrs: Sequence[float]) -> Iterator[None]:
        """Train on every batch of `loader`'s epoch `epoch` (from 0), each at its learning rate in `lrs`.

        Yields after each step.
        """
        self.start_epoch()
        if not self.captures:
            for (images, labels), lr in zip(loader.epoch(epoch), lrs, strict=True):
                self(images, labels, lr)
                yield
            if self.averages_statistics:
                buffers = self.model.named_buffers()
                self.group.average_all([b for name, b in buffers if "running_" in name])
            return
        if self.captured_from is not loader:
            self.captured, self.captured_from = Captured(self._step_from_tensors), loader
            self.lrs = torch.zeros(len(lrs), device=self.device)
            self.batch = None
        self.lrs.copy_(torch.tensor(lrs))
        batches = loader.start(epoch) if loader.resident else loader.epoch(epoch)
        for _ in lrs:
            if not loader.resident:
                batch = next(batches)
                self.batch = self.batch or tuple(map(torch.clone, batch))
                for tensor, new in zip(self.batch, batch, strict=True):
                    tensor.copy_(new)
            self.captured()
            self.seen += loader.batch_size
            yield

    def _step_from_tensors(self) -> None:
        """A step whose batch and learning rate lie on the device, where `position` says."""
        loader = self.captured_from
        self.lr.copy_(self.lrs.index_select(0, self.position)[0])
        self._step(*(loader.batch(self.position) if loader.resident else self.batch))

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, lr: float) -> None:
        """One step at learning rate `lr` on images `[N, 3, H, W]`, labels `[N]` int64, this process's."""
        self.lr.fill_(lr)
        self._step(images, labels)
        self.seen += len(labels) * self.group.count

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.set_grad_enabled(self.optimizer is not None):
            autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
            with autocast:
                features = self.model.features(images)
            loss, correct = self.loss(features, labels)
        if self.optimizer is not None:
            gradients = torch.autograd.grad(self.scaler.scale(loss), self.trained)
            self.flat.grad = torch.cat([in_memory_order(gradient) for gradient in gradients])
        loss = loss.detach()
        if self.group.connected:
            loss, correct = self._averaged(loss, correct)
        if self.optimizer is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        metrics = self.loss_sum, self.correct, self.first_bad_step, self.position
        self.record(loss, correct, len(labels) * self.group.count, *metrics)

    def _averaged(self, loss: torch.Tensor, correct: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and number correct of the whole batch, and in `flat.grad` its gradient; in one message."""
        gradient = [] if self.optimizer is None else [self.flat.grad]
        shared = self.group.sum(torch.cat([*gradient, torch.stack([loss, correct.float()])]))
        loss, correct = shared[-2] / self.group.count, shared[-1].long()  # float32 counts to 16 million
        if self.optimizer is not None:
            self.flat.grad = shared[:-2] / self.group.count
        return loss, correct

    def _loss(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy, and how many are right."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model.head(features).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return loss, (logits.detach().argmax(1) == labels).sum()

    def diverged_at(self) -> int | None:
        """The first step of this epoch, from 0, whose loss was not finite. Waits for the device."""
        step = int(self.first_bad_step)
        return None if step < 0 else step

    def metrics(self) -> tuple[float, float]:
        """Mean loss and accuracy (percent) of the epoch so far. Waits for the device."""
        return float(self.loss_sum) / max(1, self.seen), 100 * int(self.correct) / max(1, self.seen)

    def state_dict(self) -> dict:
        optimizer = self.optimizer.state_dict() if self.optimizer is not None else {}
        return {"optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        if self.optimizer is not None:
            settings = {
                key: value for key, value in self.optimizer.param_groups[0].items() if key != "params"
            }
            self.optimizer.load_state_dict(state["optimizer"])
            self.optimizer.param_groups[0].update(settings)  # this device's, and the lr that each step sets
        self.scaler.load_state_dict(state["scaler"])


@torch.no_grad()
def _record(  # never compiled on a CPU: torch 2.13 drops the sum of a float64 without dimensions there
    loss: torch.Tensor,
    correct: torch.Tensor,
    count: int,
    loss_sum: torch.Tensor,
    correct_sum: torch.Tensor,
    first_bad_step: torch.Tensor,
    position: torch.Tensor,
) -> None:
    """Add a step of `count` images to the epoch's metrics, all of them on the device, and count the step."""
    bad = ~torch.isfinite(loss) & (first_bad_step < 0)
    first_bad_step.copy_(torch.where(bad, position[0], first_bad_step))
    loss_sum += loss.double() * count
    correct_sum += correct
    position += 1
