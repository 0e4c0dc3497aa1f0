"""One optimisation step: forward, loss, backward, update; and the evaluation beside it.

Metrics stay on the device until they are asked for, so that nothing here waits for the GPU.
"""

import math
import resource
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; for speed there is bf16

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def default_dtype(device: torch.device) -> str:
    """The fastest dtype the hardware has of its own: bf16, else fp16 on a GPU and fp32 on a CPU."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() else "fp32"


def compile_units(model: nn.Module, backend: str = "inductor") -> None:
    """Compile each unit of `model`; units of the same shape share the compiled code, whatever the depth."""
    # One entry per stage, shortcut and train/eval: more than Dynamo's default limit, and no runaway.
    torch._dynamo.config.recompile_limit = 64
    for unit in model.units():
        unit.compile(dynamic=False, backend=backend)


class Schedule:
    """The learning rate of every step.

    "step": times `gamma` after each of the `milestones` (in epochs); "cosine": half a cosine to 0; "plateau":
    times `gamma` when the training loss has not improved for 10 epochs; "constant". The first `warmup_epochs`
    rise linearly (Goyal et al. 2017).
    """

    PATIENCE = 10

    def __init__(
        self,
        steps_per_epoch: int,
        schedule: str = "step",
        lr: float = 0.1,
        epochs: int = 160,
        milestones: Sequence[int] = (80, 120),
        gamma: float = 0.1,
        warmup_epochs: int = 0,
    ):
        self.kind, self.base_lr, self.gamma = schedule, lr, gamma
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.milestones, self.warmup_steps = milestones, warmup_epochs * steps_per_epoch
        self.factor, self.best_loss, self.epochs_without_gain = 1.0, math.inf, 0

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
            return self.base_lr * 0.5 * (1 + math.cos(math.pi * done))
        return self.base_lr * self.factor

    def epoch_ended(self, train_loss: float) -> None:
        if train_loss < self.best_loss:
            self.best_loss, self.epochs_without_gain = train_loss, 0
            return
        self.epochs_without_gain += 1
        if self.kind == "plateau" and self.epochs_without_gain >= self.PATIENCE:
            self.factor, self.epochs_without_gain = self.factor * self.gamma, 0

    def state_dict(self) -> dict:
        return {k: getattr(self, k) for k in ("factor", "best_loss", "epochs_without_gain")}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


class Step:
    """Call it with a batch: one step of SGD (or Adam) on the trainable parameters of `model` alone."""

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: str = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        label_smoothing: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        self.model, self.dtype, self.label_smoothing = model, dtype, label_smoothing
        self.device = next(model.parameters()).device
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = None  # mode `none`: only BatchNorm's running statistics follow the data
        if trained and optimizer == "adam":
            self.optimizer = torch.optim.Adam(trained, weight_decay=weight_decay)
        elif trained:
            self.optimizer = torch.optim.SGD(trained, lr=0.1, momentum=momentum, weight_decay=weight_decay)
        # fp16 gradients underflow without it; elsewhere it does nothing
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.start_epoch()

    def start_epoch(self) -> None:
        self.model.train()
        self.steps = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.seen = 0
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, lr: float) -> None:
        """One step at learning rate `lr` on images `[N, 3, H, W]`, labels `[N]` int64."""
        with torch.set_grad_enabled(self.optimizer is not None):
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                logits = self.model(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        with torch.no_grad():
            bad = ~torch.isfinite(loss) & (self.first_bad_step < 0)
            self.first_bad_step.masked_fill_(bad, self.steps)
            self.loss_sum += loss.double() * len(labels)
            self.correct += (logits.argmax(1) == labels).sum()
        self.steps += 1
        self.seen += len(labels)

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
            self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


@torch.no_grad()
def evaluate(model: nn.Module, loader, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Mean loss and accuracy (percent) of `model` over every image of `loader`, each counted once."""
    model.eval()
    loss_sum, correct, images_seen = 0.0, 0, 0
    for images, labels in loader.epoch(0):
        short = loader.batch_size - len(labels)
        if short:  # one static shape, so that nothing is compiled for the last batch alone
            images = torch.cat([images, images.new_zeros(short, *images.shape[1:])])
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images)
        logits = logits[: len(labels)].float()
        loss_sum = loss_sum + F.cross_entropy(logits, labels, reduction="sum").double()
        correct = correct + (logits.argmax(1) == labels).sum()
        images_seen += len(labels)
    return float(loss_sum) / images_seen, 100 * int(correct) / images_seen


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use at once: the GPU's by torch's count, or on a CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory or a CPU's was not enough; torch has a class of its own for the first only."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
