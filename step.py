"""One optimisation step (forward, loss, backward, update), and the learning-rate schedule.

Metrics stay on the device until they are read, so a step never waits for the GPU. On a GPU, the whole step is
captured as a CUDA graph after a few steps, and the host then only replays it. The graph also makes a resident
loader's batch. A step that several processes share is not captured.
"""

import inspect
import math
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from config import Options
from kernels import compile_ahead, passes_for
from kernels.device import EAGER_CALLS, Captured, keep_freed_memory
from kernels.distributed import ALONE, Group


class Schedule:
    """The learning rate of each step, and whether to stop early, as set by `options`.

    "step" multiplies the rate by `gamma` after each of the `milestones` (in epochs). "cosine" lowers it along
    half a cosine to `min_lr`. "plateau" multiplies it by `gamma`, but not below `min_lr`, whenever the
    validation accuracy has not risen for `patience` epochs (He et al. 2015, section 3.4). "constant" keeps
    it. In the first `warmup_epochs`, the rate rises linearly (Goyal et al. 2017). `stopped` becomes True when
    the validation accuracy has not risen for `early_stop` epochs.
    """

    def __init__(self, steps_per_epoch: int, options: Options):
        self.steps_per_epoch, self.options = steps_per_epoch, options
        self.warmup_steps = options.warmup_epochs * steps_per_epoch
        self.factor, self.best_acc, self.since_best, self.since_cut = 1.0, -math.inf, 0, 0

    def lr(self, step: int) -> float:
        """Return the learning rate of step `step`, counted from 0 over the whole run."""
        kind, base, least = self.options.schedule, self.options.lr, self.options.min_lr
        if step < self.warmup_steps:
            return base * (step + 1) / self.warmup_steps
        if kind == "step":
            passed = sum(step >= m * self.steps_per_epoch for m in self.options.milestones)
            return base * self.options.gamma**passed
        if kind == "cosine":
            total = self.options.epochs * self.steps_per_epoch
            done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
            return least + (base - least) * 0.5 * (1 + math.cos(math.pi * done))
        return max(base * self.factor, least) if kind == "plateau" else base

    def epoch_ended(self, validation_acc: float) -> None:
        """Record an epoch's validation accuracy (percent), which drives plateaus and early stopping."""
        if validation_acc > self.best_acc:
            self.best_acc, self.since_best, self.since_cut = validation_acc, 0, 0
            return
        self.since_best, self.since_cut = self.since_best + 1, self.since_cut + 1
        if self.options.schedule == "plateau" and self.since_cut >= self.options.patience:
            self.factor, self.since_cut = self.factor * self.options.gamma, 0

    @property
    def stopped(self) -> bool:
        return bool(self.options.early_stop) and self.since_best >= self.options.early_stop

    def state_dict(self) -> dict:
        return {k: getattr(self, k) for k in ("factor", "best_acc", "since_best", "since_cut")}

    def load_state_dict(self, state: dict) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])


def flatten(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """Make `parameters` views of one vector and return it: the optimiser updates one tensor, not hundreds."""
    flat = nn.Parameter(torch.cat([in_memory_order(p.detach()) for p in parameters]))
    for p, part in zip(parameters, flat.detach().split([p.numel() for p in parameters]), strict=True):
        channel = min(1, p.dim() - 1)  # the dimension that channels_last puts last
        p.data = part.view(p.movedim(channel, -1).shape).movedim(-1, channel)
    return flat


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a vector, matrix or channels_last tensor as a vector, in memory order."""
    return tensor.movedim(min(1, tensor.dim() - 1), -1).reshape(-1)


class Step:
    """One step of the optimiser named in `options`, on the trainable parameters of `model` only.

    They become views of one vector. `model` must be configured already (kernels.configure). `dtype` is that
    of the activations. With `compiled`, a GPU runs compiled kernels and a captured CUDA graph.

    The processes of `group` train the model together, each on its own part of every batch. Gradients are
    averaged, and metrics describe the whole batch. BatchNorm normalises with the statistics of the part, as
    under torch's DistributedDataParallel. Its running statistics are averaged after every epoch; as their
    updates are linear, averaging after every step would give the same. With `options.sync_bn`, the model must
    be configured to normalise over the whole batch.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        compiled: bool = True,
        group: Group = ALONE,
    ):
        self.options = options = options or Options()
        self.model, self.dtype, self.label_smoothing = model, dtype, options.label_smoothing
        self.group, self.averages_statistics = group, group.connected and not options.sync_bn
        self.device = next(model.parameters()).device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.lr = torch.zeros((), device=self.device)
        if self.trained:  # else (mode `none`) only BatchNorm's running statistics change
            self.flat = flatten(self.trained)
            self.optimizer = self._make_optimizer(self.flat)
        # fp16 gradients underflow unless the loss is scaled; other dtypes need no scaling.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        zero = {"dtype": torch.int64, "device": self.device}
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct, self.first_bad_step = torch.zeros((), **zero), torch.zeros((), **zero)
        self.position = torch.zeros(1, **zero)  # index of the step in its epoch
        self.loss, self.record = self._loss, _record
        if compiled and self.device.type == "cuda":  # replaces two dozen tiny launches
            torch._dynamo.config.recompile_limit = 64  # each run side by side may compile its own
            self.loss, self.record = (torch.compile(f, dynamic=False) for f in (self._loss, _record))
        # A frozen head's gradient needs no autograd graph, so `passes` may compute it directly.
        alone = compiled and dtype != torch.float16 and not group.connected
        frozen_head = not any(p.requires_grad for p in model.fc.parameters())
        self.passes, self.head_checked = passes_for(self.device.type, alone and frozen_head), False
        self.loader = None  # the epoch's loader, whose batches `replay` trains on
        self.captures = compiled and self.device.type == "cuda" and not group.connected
        self.warm_up_steps = EAGER_CALLS + 1 if self.captures else 1
        self.start_epoch()

    def _make_optimizer(self, flat: nn.Parameter) -> torch.optim.Optimizer:
        """Return the torch.optim optimiser named by `options.optimizer`, with the options that it accepts."""
        options = self.options
        names = {name.lower(): name for name in torch.optim.__all__}
        maker = getattr(torch.optim, names[options.optimizer])
        given = {
            "lr": self.lr,
            "momentum": options.momentum,
            "weight_decay": options.weight_decay,
            "fused": True,
            "capturable": flat.is_cuda,
        }
        taken = inspect.signature(maker).parameters.keys() & given.keys()
        optimizer = maker([flat], **{name: given[name] for name in taken})
        if maker is torch.optim.SGD and options.momentum:  # fp16 may skip the step that would make it
            optimizer.state[flat]["momentum_buffer"] = torch.zeros_like(flat.detach())
        return optimizer

    def start_epoch(self) -> None:
        self.model.train()
        self.seen = 0
        for metric in (self.loss_sum, self.correct, self.position):
            metric.zero_()
        self.first_bad_step.fill_(-1)

    def epoch(self, loader, epoch: int, lrs: Sequence[float]) -> Iterator[None]:
        """Train on every batch of epoch `epoch` (from 0) of `loader`, yielding after each step.

        `lrs` are the learning rates, one per batch.
        """
        self.start_epoch()
        if self.loader is not loader:
            self.loader, self.batch, self.lrs = loader, None, torch.zeros(len(lrs), device=self.device)
            self.replay = Captured(self._next_step) if self.captures else self._next_step
            if self.captures:
                compile_ahead(self.model, loader.batch_shape, self.dtype)
        self.lrs.copy_(torch.tensor(lrs))
        if loader.resident:
            loader.start(epoch)
        else:
            batches = loader.epoch(epoch)
        for _ in lrs:
            if not loader.resident:
                batch = next(batches)
                self.batch = self.batch or tuple(map(torch.clone, batch))
                for tensor, new in zip(self.batch, batch, strict=True):
                    tensor.copy_(new)
            self.replay()
            self.seen += loader.batch_size * self.group.count
            yield
        if self.averages_statistics:
            buffers = self.model.named_buffers()
            self.group.average_all([b for name, b in buffers if "running_" in name])

    def _next_step(self) -> None:
        """Do the step at `position` of the epoch; its batch and learning rate are already on the device."""
        batch = self.loader.batch(self.position) if self.loader.resident else self.batch
        self._step(*batch, self.lrs)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, lr: float) -> None:
        """Do one step at rate `lr` on this process's images `[N, 3, H, W]` and int64 labels `[N]`."""
        self.lr.fill_(lr)
        self._step(images, labels)
        self.seen += len(labels) * self.group.count

    def _step(self, images: torch.Tensor, labels: torch.Tensor, lrs: torch.Tensor | None = None) -> None:
        """Do one step at the learning rate `lrs[position]`, or at `self.lr` if `lrs` is None."""
        casts = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with torch.set_grad_enabled(bool(self.trained)), casts:
            features = self.model.features(images)
        d_features = self._by_kernel(features.detach(), labels, lrs)
        if d_features is None:
            if lrs is not None:
                self.lr.copy_(lrs.index_select(0, self.position)[0])
            with torch.set_grad_enabled(bool(self.trained)), casts:
                loss, correct = self.loss(features, labels)
        gradient, count = [], self.group.count
        if self.trained:
            of = self.scaler.scale(loss) if d_features is None else features
            gradient = [in_memory_order(g) for g in torch.autograd.grad(of, self.trained, d_features)]
        if self.group.connected:  # one all-reduce for gradient, loss and number correct
            shared = self.group.sum(torch.cat([*gradient, torch.stack([loss.detach(), correct.float()])]))
            loss, correct = shared[-2] / count, shared[-1].long()  # float32 counts exactly to 16 million
            gradient = [shared[:-2] / count]
        if self.trained:
            self.flat.grad = torch.cat(gradient)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if d_features is None:
            self.record(loss.detach(), correct, len(labels) * count, self._metrics())

    def _loss(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean cross-entropy and the number of correct predictions."""
        logits = self.model.head(features).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return loss, (logits.detach().argmax(1) == labels).sum()

    def _by_kernel(
        self, features: torch.Tensor, labels: torch.Tensor, lrs: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return the loss's gradient in `features` from a GPU kernel that also records the step, else None.

        The kernel repeats `_loss`, the network's `head` and `_record`. In its first step it is compared with
        the first two, which take its place if they differ, as they do when somebody changes them.
        """

        def head(*state: torch.Tensor) -> torch.Tensor | None:
            *metrics, lr = state
            return self.passes.head(features, self.model.fc, labels, self.label_smoothing, metrics, lrs, lr)

        if self.passes is None:
            return None
        state = *self._metrics(), self.lr
        capturing = features.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.head_checked or capturing:  # a comparison would wait for the device, which a capture forbids
            return head(*state)
        trial = [tensor.clone() for tensor in state]
        d_features, count = head(*trial), len(labels)
        if d_features is None:
            self.passes = None
            return None
        x = features.float().detach().requires_grad_()
        with torch.enable_grad():
            loss, correct = self._loss(x, labels)
        if not loss.isfinite():
            return None  # there is nothing to compare with yet
        expected = torch.autograd.grad(loss, x)[0].to(features.dtype).float()
        loss_off, correct_off = (trial[0] - self.loss_sum) / count - loss, trial[1] - self.correct - correct
        near = (d_features.float() - expected).norm() < 5e-4 * expected.norm()
        self.head_checked = bool(near & (loss_off.abs() < 1e-5 * (1 + loss)) & (correct_off == 0))
        if self.head_checked:
            return head(*state)
        what = "the GPU's kernel for the loss differs from Step._loss, which takes its place"
        warnings.warn(what, stacklevel=2)
        self.passes = None
        return None

    def _metrics(self) -> tuple[torch.Tensor, ...]:
        return self.loss_sum, self.correct, self.first_bad_step, self.position

    def diverged_at(self) -> int | None:
        """Return the epoch's first step, from 0, with a non-finite loss, else None. Waits for the device."""
        step = int(self.first_bad_step)
        return None if step < 0 else step

    def metrics(self) -> tuple[float, float]:
        """Return the mean loss and accuracy (percent) of the epoch so far. Waits for the device."""
        return float(self.loss_sum) / max(1, self.seen), 100 * int(self.correct) / max(1, self.seen)

    def state_dict(self) -> dict:
        optimizer = self.optimizer.state_dict() if self.trained else {}
        return {"optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore `state`. Raises an exception, of any type, if it is not the state of such a step."""
        if self.trained:
            settings = self.optimizer.param_groups[0]  # with this device's flags and lr tensor
            unstepped, stepped = self.optimizer.state[self.flat], self._state_after_a_step()
            self.optimizer.load_state_dict(state["optimizer"])
            self.optimizer.param_groups[0].update(settings)
            found = self.optimizer.state[self.flat]
            if found.keys() != stepped.keys() and found.keys() != unstepped.keys():  # fp16 can skip all steps
                raise ValueError(f"its optimizer has {sorted(found)}, not {sorted(stepped)}")
            for name, tensor in found.items():
                if (tensor.shape, tensor.dtype) != (stepped[name].shape, stepped[name].dtype):
                    raise ValueError(f"{name} of its optimizer has the wrong shape or dtype")
        if own := self.scaler.state_dict():
            scale, tracker = float(state["scaler"]["scale"]), int(state["scaler"]["_growth_tracker"])
            if not 0 < scale < torch.finfo().max or not 0 <= tracker <= own["growth_interval"]:
                raise ValueError("its loss scale is invalid")
            self.scaler.load_state_dict(own | {"scale": scale, "_growth_tracker": tracker})

    def _state_after_a_step(self) -> dict[str, torch.Tensor]:
        """Return the optimiser's state after one step, for its keys, shapes and dtypes; ignore the values."""
        trial = nn.Parameter(torch.zeros_like(self.flat))
        trial.grad = torch.zeros_like(trial)
        optimizer = self._make_optimizer(trial)
        optimizer.step()
        return optimizer.state[trial]


@torch.no_grad()  # never compiled on a CPU, where torch 2.13 loses the sum of a 0-d float64
def _record(loss: torch.Tensor, correct: torch.Tensor, count: int, metrics: tuple[torch.Tensor, ...]) -> None:
    """Add a step of `count` images to the epoch's metrics, in place and on the device, and count the step."""
    loss_sum, correct_sum, first_bad_step, position = metrics
    bad = ~torch.isfinite(loss) & (first_bad_step < 0)
    first_bad_step.copy_(torch.where(bad, position[0], first_bad_step))
    loss_sum += loss.double() * count
    correct_sum += correct
    position += 1
