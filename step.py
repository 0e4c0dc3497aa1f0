"""One optimisation step: forward, loss, backward, update; and the evaluation beside it.

Metrics stay on the device until they are asked for, so that nothing here waits for the GPU. There, the whole
step, fetching its batch included, becomes a CUDA graph after a few steps, and the host only replays it; one
that is shared among processes does not.
"""

import ctypes
import math
import os
import resource
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

import kernels
from kernels.distributed import ALONE, Group
from kernels.reference import cache_folder

torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; for speed there is bf16
torch.backends.cudnn.benchmark = True  # shapes never change, so the fastest algorithm is worth looking for
# What torch.compile makes is kept between runs, also where /tmp is not.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EAGER_STEPS = 3  # before a graph is captured: libraries set themselves up, kernels are compiled and chosen


def default_dtype(device: torch.device) -> str:
    """The fastest dtype the hardware has of its own: bf16, else fp16 on a GPU and fp32 on a CPU."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() else "fp32"


def keep_freed_memory() -> None:
    """Have glibc reuse what was freed instead of returning it to the system: on a CPU a step's activations
    would be new pages every time, filled with zeros first."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its upper limit
    mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


class Schedule:
    """The learning rate of every step, and whether there is to be another epoch.

    "step": times `gamma` after each of the `milestones` (in epochs); "cosine": half a cosine to `min_lr`;
    "plateau": times `gamma`, down to `min_lr`, when the validation accuracy has not risen for `patience`
    epochs (He et al. 2015, section 3.4); "constant". The first `warmup_epochs` rise linearly (Goyal et al.
    2017). `stopped` is True once it has not risen for `early_stop` epochs.
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
        """The rate of step `step`, counted from 0 over the whole run."""
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
        """Take note of an epoch's validation accuracy; what is decided by accuracy is decided here."""
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
    """One vector of all `parameters`, which become views of it: one tensor to update, not hundreds."""
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


class Captured:
    """A function without arguments or result, replayed from a CUDA graph after its first calls.

    It must read what changes between calls from tensors that stay where they are.
    """

    def __init__(self, function: Callable[[], None], eager_calls: int = EAGER_STEPS):
        self.function, self.eager_calls, self.graph = function, eager_calls, None

    def __call__(self) -> None:
        if self.eager_calls > 0:
            self.eager_calls -= 1
            return self.function()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # On the run's own stream, whose cuBLAS workspace is in the graph; the default stream cannot be.
            stream = torch.cuda.current_stream()
            stream = None if stream == torch.cuda.default_stream() else stream
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.function()
        self.graph.replay()


class Step:
    """One step of SGD (or Adam) on the trainable parameters of `model` alone.

    `dtype` is that of activations; `memory` is what is kept for backward ("lean", "recompute" or "stock", see
    kernels.using); `compiled` means our own kernels and, on a GPU, a captured step. The trainable parameters
    become views of one vector.

    `group`: the processes that train the model together, each on its part of a batch. Gradients are averaged,
    metrics are the whole batch's. BatchNorm normalises with the statistics of the part, as under torch's
    DistributedDataParallel, and its running statistics are averaged after every epoch, which, as they move
    linearly, is as good as after every step. With `sync_bn` it takes the whole batch: the step is that of one
    process, up to rounding.
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
        memory: str = "lean",
        compiled: bool = True,
        group: Group = ALONE,
        sync_bn: bool = False,
    ):
        self.model, self.dtype, self.label_smoothing = model, dtype, label_smoothing
        self.group, self.synced = group, group if sync_bn and group.connected else None
        self.memory, self.compiled = memory, compiled
        self.device = next(model.parameters()).device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.lr = torch.zeros((), device=self.device)
        self.optimizer = None  # mode `none`: only BatchNorm's running statistics follow the data
        if self.trained:
            self.flat = flatten(self.trained)
            settings = {"lr": self.lr, "weight_decay": weight_decay, "fused": True}
            if optimizer == "adam":
                captured = self.device.type == "cuda"
                self.optimizer = torch.optim.Adam([self.flat], **settings, capturable=captured)
            else:
                self.optimizer = torch.optim.SGD([self.flat], **settings, momentum=momentum)
                if momentum:  # torch leaves it unwritten where fp16's first step is skipped
                    self.optimizer.state[self.flat]["momentum_buffer"] = torch.zeros_like(self.flat.detach())
        # fp16 gradients underflow without it; elsewhere it does nothing
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        zero = {"dtype": torch.int64, "device": self.device}
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct, self.first_bad_step = torch.zeros((), **zero), torch.zeros((), **zero)
        self.position = torch.zeros(1, **zero)  # of the step in its epoch
        self.loss, self.record = self._loss, _record
        if compiled and self.device.type == "cuda":  # else two dozen launches of a few numbers each
            torch._dynamo.config.recompile_limit = 64  # seeds side by side may each compile their own
            self.loss, self.record = (torch.compile(f, dynamic=False) for f in (self._loss, _record))
        self.captured, self.captured_from = None, None
        self.captures = compiled and self.device.type == "cuda" and not group.connected
        self.warm_up_steps = EAGER_STEPS + 1 if self.captures else 1
        self.start_epoch()

    def start_epoch(self) -> None:
        self.model.train()
        self.seen = 0
        for metric in (self.loss_sum, self.correct, self.position):
            metric.zero_()
        self.first_bad_step.fill_(-1)

    def epoch(self, loader, epoch: int, lrs: Sequence[float]) -> Iterator[None]:
        """Train on every batch of `loader`'s epoch `epoch` (from 0), at the rate that `lrs` has for each;
        yields after each step."""
        self.start_epoch()
        if not self.captures:
            for (images, labels), lr in zip(loader.epoch(epoch), lrs, strict=True):
                self(images, labels, lr)
                yield
            if self.synced is None:
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
            with kernels.using(self.memory, self.compiled, self.synced), autocast:
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
def _record(
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


class Evaluation:
    """Call it: loss and accuracy (percent) of `model` over every image of `loader`, each counted once.

    `top5_acc` is then the percentage whose class is among the five likeliest, None of ten classes or fewer.
    """

    def __init__(self, model: nn.Module, loader, dtype: torch.dtype = torch.float32, compiled: bool = True):
        self.model, self.loader, self.dtype, self.compiled = model, loader, dtype, compiled
        self.device = next(model.parameters()).device
        self.captured, self.starting = None, self.device.type == "cuda"
        if compiled and self.device.type == "cuda" and loader.resident:
            self.captured = Captured(self._batch_from_tensors, EAGER_STEPS)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        zero = {"dtype": torch.int64, "device": self.device}
        self.correct, self.among_five = torch.zeros((), **zero), torch.zeros((), **zero)
        self.position = torch.zeros(1, **zero)
        self.top5_acc = None

    @torch.no_grad()
    def __call__(self) -> tuple[float, float]:
        self.model.eval()
        self.starting = False
        for metric in (self.loss_sum, self.correct, self.among_five, self.position):
            metric.zero_()
        if self.captured:
            self.loader.start(0)
            for _ in range(len(self.loader)):
                self.captured()
        else:
            for images, labels in self.loader.epoch(0):
                self._batch(images, labels, torch.ones_like(labels, dtype=torch.bool))
        count = self.loader.num_images
        if self.model.fc.out_features > 10:
            self.top5_acc = 100 * int(self.among_five) / count
        return float(self.loss_sum) / count, 100 * int(self.correct) / count

    def _batch_from_tensors(self) -> None:
        images, labels = self.loader.batch(self.position)
        within = torch.arange(len(labels), device=self.device) < (
            self.loader.num_images - self.position * self.loader.batch_size
        )
        self._batch(images, labels, within)

    def _batch(self, images: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor) -> None:
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with kernels.using(compiled=self.compiled), autocast:
            logits = self.model(images).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        self.loss_sum += torch.where(counted, losses, 0).double().sum()
        self.correct += (counted & (logits.argmax(1) == labels)).sum()
        if self.model.fc.out_features > 10:
            likeliest = logits.topk(5).indices == labels[:, None]
            self.among_five += (counted & likeliest.any(1)).sum()
        self.position += 1


def evaluation_batch_size(batch_size: int, image_size: int, device: torch.device) -> int:
    """Images to evaluate at once: a GPU is not filled by a training batch of small ones."""
    return max(batch_size, 1000) if device.type == "cuda" and image_size <= 64 else batch_size


def forget_peak_memory(device: torch.device) -> None:
    """Count a GPU's peak anew: starting up tries more than training needs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use at once, by the whole process: the GPU's by torch's count, or on a CPU all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory or a CPU's was not enough; torch has a class of its own for the first only."""
    said = ("can't allocate memory", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in said)
