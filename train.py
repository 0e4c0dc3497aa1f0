"""Train only part of a convolutional network: by default, nothing but BatchNorm's gamma and beta.

    python train.py --arch resnet32 --mode bn_only              # the paper's schedule: 160 epochs of CIFAR-10
    python train.py --arch resnet32 --mode bn_only --quick      # a much shorter run: a few minutes on a CPU
    python train.py --arch resnet56 --mode random --seed 1      # as many random convolution weights instead
    python train.py --arch resnet110 --mode bn+output --resume  # continue where the run stopped
    python train.py --arch resnet32 --seed 0 1 2 3              # four runs side by side, one folder each
    torchrun --standalone --nproc_per_node=2 train.py --arch resnet110  # one run shared by two processes

The defaults are the setting of Frankle, Schwab, Morcos, "Training BatchNorm and Only BatchNorm" (2020).
A run writes a folder in --out. Exit status 0: done, 1: the run failed, 2: unusable options or data.
"""

import time

STARTED = time.perf_counter()  # before the imports, so that start-up time includes them

import progress  # isort: split

import contextlib
import dataclasses
import functools
import math
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch

import checkpoint
import config
import data
import freeze
import kernels
import models
import records
import runs
from config import OptionError, Options
from evaluation import Evaluation, Scores, evaluation_batch_size
from kernels import device as devices
from kernels import distributed
from kernels.distributed import Group
from step import Schedule, Step

note = functools.partial(progress.note, "train.py")


class RunFailed(Exception):
    """The run ended before its last epoch; the message says why."""

    exit_status = 1


class Interrupted(RunFailed):
    """The run was stopped by Ctrl-C, or by SIGTERM, as a cluster sends it."""


# ---- one run, from start to finish ----


def train(
    options: Options, dataset: data.Dataset, bars: progress.Bars, group: Group
) -> Generator[None, None, runs.Run]:
    """Train one network from its initial weights to its summary; yield once when ready, then after each step.

    All processes of `group` run it together. The generator returns the run. Unusable options, data or folders
    raise before the first yield; after it, RunFailed is raised if training ends early.
    """
    # Build the network from its seed (or from --init-from), and freeze all that the mode does not train.
    device, split = devices.choose(options.device), split_training_images(options, dataset)
    path = Path(options.out, runs.run_name(options, dataset.name))
    spec = network_spec(options, dataset, device, split, group, number_format(options, device, path))
    parent = runs.read_parent(spec.init_from) if spec.init_from else None
    model = checkpoint.create(spec, note)
    frozen = freeze.frozen_sha256(model)
    initial = freeze.full_sha256(model) if spec.init_from else None
    model.to(device, memory_format=torch.channels_last)
    synced = group if options.sync_bn and group.connected else None
    kernels.configure(model, options.memory, spec.compiled, synced)

    # Set up the batches, the training step and the evaluations.
    training = Training(options, dataset, split, spec, parent, model, group)

    with runs.open_run(path, options.resume, options.overwrite, writes=group.leads) as run:
        group.wait()  # until rank 0 has opened the folder, or failed to
        hashes = {"frozen_sha256": frozen, "initial_sha256": initial}
        run.refuse_another(options, spec, hashes)
        if run.status == "done":
            run.tidy()
            return run
        if training.resume(run):
            parent = run.config.parent  # as recorded when the run began
            note(f"continuing {run.path} after epoch {len(run.rows)}, in {spec.dtype}")
        elif options.resume:
            note(f"{run.path} has no epoch to resume from; starting at the beginning")
        yield  # no run begins before all runs side by side are known to be usable

        passes = kernels.passes_for(device.type, spec.compiled and options.memory != "stock").name
        chosen = {"options": options, "spec": spec, "parent": parent, "data_title": dataset.title}
        where = runs.environment(device, bars.runs)
        run.begin(records.Config(**chosen, **hashes, **where, passes=passes))
        display = progress.Display(bars, run, len(training.loader))
        status, why, sealed = "failed", "an unexpected error", b""
        try:
            for epoch in range(len(run.rows) + 1, options.epochs + 1):
                if training.schedule.stopped:
                    break
                row = yield from training.epoch(epoch, display)
                run.end_epoch(row, training.state_dict())
                display.end_epoch(row)
            if freeze.frozen_sha256(model) != frozen:
                raise AssertionError("frozen weights have changed")
            if run.rows[-1].test_loss is None:
                raise FloatingPointError("the last test loss is not finite; try a lower --lr")
            sealed = checkpoint.seed_checkpoint(model, spec, len(run.rows) * len(training.loader))
            run.write(records.CHECKPOINT, sealed)
            stopped = f"no better validation accuracy for {options.early_stop} epochs"
            status, why = "done", stopped if training.schedule.stopped else None
        except (Exception, KeyboardInterrupt) as error:
            status, why = how_it_ended(error, options, run)
        finally:  # write the summary even while an unexpected error propagates
            summary = training.summary(status, why, run, len(sealed))
            with contextlib.suppress(OSError if status != "done" else ()):
                run.finish(summary)
            display.finish(summary)
        if status != "done":
            raise (Interrupted if status == "interrupted" else RunFailed)(f"{run.path}: {why}")
        return run


class Training:
    """The training state of one run: its loaders, step, schedule, evaluations and timers.

    The order and augmentation of batches depend only on the seed and the epoch. `split` is what
    `split_training_images` returns, and `model` is already on its device. last.pt stores `state_dict`.
    """

    def __init__(
        self,
        options: Options,
        dataset: data.Dataset,
        split: tuple[np.ndarray, np.ndarray],
        spec: records.NetworkSpec,
        parent: records.Parent | None,
        model: torch.nn.Module,
        group: Group,
    ):
        device, dtype, (trains_on, validates_on) = (
            torch.device(spec.device),
            devices.DTYPES[spec.dtype],
            split,
        )
        loader = functools.partial(
            data.make_loader, dataset, kind=options.loader, device=device, dtype=dtype, compiled=spec.compiled
        )
        drawn = {"rng": functools.partial(models.stream, options.seed), "augmented": options.augment}
        share = group.rank, group.count
        self.loader = loader("train", batch_size=options.batch_size, subset=trains_on, share=share, **drawn)
        batch_size = evaluation_batch_size(options.batch_size, dataset.image_size, device)

        def evaluation(of: str, subset: np.ndarray | None = None) -> Evaluation:
            return Evaluation(model, loader(of, batch_size=batch_size, subset=subset), dtype, spec.compiled)

        self.test = evaluation("test")
        self.validation = evaluation("validation", validates_on) if len(validates_on) else None
        self.step = Step(model, options, dtype=dtype, compiled=spec.compiled, group=group)
        self.schedule = Schedule(len(self.loader), options)
        self.options, self.model, self.group = options, model, group
        # Count epochs on from the parent runs, so that their shuffles and crops are not drawn again.
        self.epochs_before = parent.epochs_done_in_all if parent else 0
        self.watch, self.peak_memory_bytes = progress.Stopwatch(STARTED), None

        if options.schedule == "step" and min(options.milestones, default=0) >= options.epochs:
            note(f"all of --milestones are past the last epoch: the learning rate stays at {options.lr:g}")
        same_images = parent is not None and parent.fingerprint == spec.fingerprint and spec.val_images
        if same_images and (parent.seed, parent.val_images) != (spec.seed, spec.val_images):
            better = f"--seed {spec.seed} --val-split {spec.val_images}"
            note(f"{parent.run} trained on images that are for validation here; start from one with {better}")

    def epoch(self, epoch: int, display: progress.Display) -> Generator[None, None, records.Epoch]:
        """Train for one epoch, yielding after each step, then evaluate. The generator returns the metrics.

        Raises FloatingPointError if a training loss (it names epoch and step) or the validation loss (it
        names the epoch) is not finite.
        """
        display.start_epoch(epoch)
        self.watch.epoch_begins()
        first_step = (epoch - 1) * len(self.loader)
        lrs = [self.schedule.lr(first_step + i) for i in range(len(self.loader))]
        # Each turn of this loop is a forward pass, a backward pass and an update: Step._step.
        for i, _ in enumerate(self.step.epoch(self.loader, self.epochs_before + epoch - 1, lrs), start=1):
            self.check_step(epoch, i)
            display.step(self.step)
            progress.end_if_interrupted()
            self.group.stop_together()
            yield
        train_loss, train_acc = self.step.metrics()  # waits for the device, so that all of it is timed
        images_per_s, device = self.watch.training_ends(self.step.seen), self.step.device
        self.peak_memory_bytes = max(self.peak_memory_bytes or 0, devices.peak_memory_bytes(device))
        row = {"train_loss": train_loss, "train_acc": train_acc, "images_per_s": images_per_s}
        if self.validation:
            loss, acc, _ = self.scores(self.validation)
            if not math.isfinite(loss):
                what = f"the validation loss is not finite after epoch {epoch}"
                raise FloatingPointError(f"{what}; try a lower --lr")
            row |= {"val_loss": loss, "val_acc": self.group.agree(acc)}
            self.schedule.epoch_ended(row["val_acc"])
        tested = {"test_loss": None, "test_acc": None}
        last = epoch == self.options.epochs or self.schedule.stopped
        best = self.validation is not None and self.schedule.since_best == 0
        if epoch % self.options.eval_every == 0 or last or best:
            loss, acc, top5_acc = self.scores(self.test)
            tested = {"test_loss": loss if math.isfinite(loss) else None, "test_acc": acc}
            tested |= {"test_top5_acc": top5_acc} if top5_acc is not None else {}
        devices.reset_peak_memory(device)  # evaluation's larger batches must not count
        epoch_s = self.watch.epoch_ends()
        return records.Epoch(epoch=epoch, lr=float(f"{lrs[0]:.6g}"), **row, **tested, epoch_s=epoch_s)

    def check_step(self, epoch: int, steps: int) -> None:
        """After step number `steps` of an epoch, check the loss, and end start-up if it is over."""
        count, starting = len(self.loader), self.watch.starting
        if starting and steps == min(devices.EAGER_CALLS, count):
            devices.reset_peak_memory(self.step.device)  # the trials of kernels; capturing the graph counts
        started = starting and steps == min(self.step.warm_up_steps, count)
        on_cpu = self.step.device.type == "cpu"
        if on_cpu or started or steps == count:  # seldom on a GPU: the check waits for it
            bad = self.step.diverged_at()
            if bad is not None:
                what = f"the loss is not finite at epoch {epoch}, step {bad + 1}"
                raise FloatingPointError(f"{what}; try a lower --lr")
        if started:
            self.watch.startup_ends(self.step.seen)

    def scores(self, evaluation: Evaluation) -> Scores:
        compiles, scores = evaluation.compiles, evaluation()
        self.watch.evaluation_ends(compiles)
        return scores

    def state_dict(self) -> dict:
        return {
            "model": freeze.trained_vector(self.model),
            "step": self.step.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epochs_before": self.epochs_before,
            **self.watch.state_dict(),
        }

    def resume(self, run: runs.Run) -> bool:
        """Restore the state after the run's last epoch; return False if there is none.

        Raises RunError if last.pt is unusable, or if the processes of the group find different epochs.
        """
        state = run.load_last()
        if int(self.group.sum(torch.tensor(len(run.rows)))) != len(run.rows) * self.group.count:
            raise records.RunError(f"{run.path}: the processes find different epochs there; share --out")
        if state is None:
            return False
        try:
            freeze.load_trained_vector(self.model, state["model"])
            self.step.load_state_dict(state["step"])
            self.schedule.load_state_dict(state["schedule"])
            self.epochs_before = int(state["epochs_before"])
            self.watch.load_state_dict(state)
        except Exception as error:  # a corrupt file can fail in many ways
            raise run.unusable(error) from None
        run.write_metrics()
        return True

    def summary(self, status: str, why: str | None, run: runs.Run, checkpoint_bytes: int) -> records.Summary:
        """Return the contents of summary.json.

        `final_test_acc`, after the last epoch, is the result. `best_test_acc` is not: test images chose it.
        With validation images, the best validation accuracy gives `chosen_epoch` and `chosen_test_acc`.
        """
        rows, of, done = run.rows, run.described, status == "done"
        total, trained = freeze.count(self.model)
        ended = {"status": status, "why": why, "params_total": total, "params_trained": trained}
        sizes = {"checkpoint_bytes": checkpoint_bytes or None, "full_bytes": freeze.full_bytes(self.model)}
        reached = {"final_test_acc": rows[-1].test_acc if done else None}
        if done and rows[-1].test_top5_acc is not None:
            reached["final_test_top5_acc"] = rows[-1].test_top5_acc
        if rows and rows[0].val_acc is not None:
            best = max(rows, key=lambda row: row.val_acc)  # on a tie the first, which was tested
            reached |= {"chosen_epoch": best.epoch, "chosen_test_acc": best.test_acc}
            reached["best_val_acc"] = best.val_acc
        return records.Summary(
            **ended,
            **sizes,
            **reached,
            **config.some(of.options, "arch mode seed"),
            **config.some(of, "data_title frozen_sha256"),
            **self.watch.state_dict(),
            peak_memory_bytes=self.peak_memory_bytes,
            data=of.spec.data,
            variant=dict(of.variant),
            best_test_acc=max((row.test_acc for row in rows if row.test_acc is not None), default=None),
            epochs_done=len(rows),
        )


# ---- helpers of a run ----


def split_training_images(options: Options, dataset: data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the images to train on and of those to validate on, as data.share_out does.

    Without --val-split, the plateau schedule and --early-stop hold out a tenth (data.tenth). Raises DataError
    if the classes have too few images for that.
    """
    labels, val_split = dataset.train.labels, options.val_split
    if val_split is None and (options.schedule == "plateau" or options.early_stop):
        val_split = data.tenth(labels)
    rng = functools.partial(models.stream, options.seed)
    return data.share_out(labels, rng, val_split, options.train_subset)


def network_spec(
    options: Options, dataset: data.Dataset, device: torch.device, split: tuple, group: Group, dtype: str
) -> records.NetworkSpec:
    """Return the spec that rebuilds the network. Raises ModelError if it cannot train on such batches."""
    batch_size = options.batch_size // group.count
    models.check_batches(options.arch, options.shortcut, batch_size, dataset.image_size)
    return records.NetworkSpec(
        **config.some(options, "arch mode shortcut conv_init nonzeros bn_init seed per_channel"),
        **config.some(options, "reset_bn batch_size"),
        **config.some(dataset, "fingerprint image_size classes mean std"),
        init_from=runs.parent_path(options),
        data=dataset.name,
        train_images=len(split[0]),
        val_images=len(split[1]),
        dtype=dtype,
        device=device.type,
        compiled=not options.no_compile,
        processes=group.count,
    )


def number_format(options: Options, device: torch.device, path: Path) -> str:
    """Return --dtype, or else that in which the run at `path` is to be resumed, or the device's fastest."""
    fastest = devices.default_dtype(device)
    begun_in = runs.dtype_of(path) if options.resume else None
    lacking = device.type == "cuda" and begun_in == "bf16"  # by a GPU whose fastest is another
    return options.dtype or (fastest if begun_in is None or lacking else begun_in)


def how_it_ended(error: BaseException, options: Options, run: runs.Run) -> tuple[str, str]:
    """Return the status of a run that `error` ended, and the reason. Re-raises an unexpected `error`."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", f"interrupted; --resume continues after epoch {len(run.rows)}"
    if isinstance(error, FloatingPointError):
        return "diverged", str(error)
    if isinstance(error, ConnectionError):
        return "failed", str(error)
    if isinstance(error, OSError):
        mend = f"mend that, and --resume continues after epoch {len(run.rows)}"
        return "failed", f"a file cannot be written: {error}; {mend}"
    if progress.out_of_memory(error):
        memory = devices.memory_bytes(devices.choose(options.device)) // 10**6
        asked = {name: getattr(options, name) for name in ("arch", "mode", "data")} | {"impl": options.memory}
        asked |= {"dtype": run.described.spec.dtype, "budget": f"{memory}MB"}
        ask = " ".join(f"--{name} {value}" for name, value in asked.items())
        what = f"out of memory at --batch-size {options.batch_size}; try a smaller one"
        return "failed", f"{what} (python bench.py memory {ask} says what would fit)"
    raise error


# ---- several runs in one process, and the command ----


def train_side_by_side(each: list[Options], dataset: data.Dataset, group: Group) -> None:
    """Train all runs, one step of each in turn, and show the results of those that finish.

    On a GPU, each run has its own stream, so that together they fill it. A run that fails does not stop the
    others; at the end, the error of the first one that failed is raised.
    """
    bars, on_gpu = progress.Bars(len(each)), devices.choose(each[0].device).type == "cuda"
    trainings = [train(options, dataset, bars, group) for options in each]
    turns = [(training, torch.cuda.Stream() if on_gpu else None) for training in trainings]
    done, failed = [], []

    def goes_on(training: Generator, stream: torch.cuda.Stream | None, interrupted: bool = False) -> bool:
        try:
            with torch.cuda.stream(stream):
                training.throw(KeyboardInterrupt) if interrupted else next(training)
            return True
        except StopIteration as end:
            done.append(end.value)
        except (RunFailed, OSError) as error:  # OSError: summary.json could not be written
            failed.append(error)
            if isinstance(error, Interrupted) and not interrupted:
                raise KeyboardInterrupt from None
        return False

    with bars:
        try:
            turns = [turn for turn in turns if goes_on(*turn)]
            bars.runs = len(turns)  # runs that were already done do not count
            while turns:
                turns = [turn for turn in turns if goes_on(*turn)]
        except KeyboardInterrupt:
            for turn in turns:
                with contextlib.suppress(KeyboardInterrupt):  # from a run that had not begun
                    goes_on(*turn, interrupted=True)
            if not failed:
                raise
    for run in done if group.leads else ():
        progress.show_results(run)
    for error in failed[1:]:
        note(str(error))
    if failed:
        raise failed[0]


def open_data(each: list[Options], given: set[str]) -> tuple[list[Options], data.Dataset]:
    """Return the options and their data set. Raises DataError if it is not available.

    With --quick and without --data, both fall back to synthetic images instead.
    """
    options, size = each[0], each[0].image_size
    try:
        return each, data.open_dataset(options.data, options.data_dir, image_size=size, say=note)
    except data.DataError as error:
        if not options.quick or "data" in given:
            raise
        note(f"--quick uses synthetic images, as there is no {options.data}: {str(error).splitlines()[0]}")
    size = size if "image_size" in given else None  # drop a preset's size
    each = [dataclasses.replace(options, data="synthetic", image_size=size) for options in each]
    return each, data.open_dataset("synthetic", options.data_dir, image_size=size, say=note)


def check_group(each: list[Options], group: Group) -> None:
    """Raise OptionError for the first option with which the processes of `group` cannot train together."""
    options, count = each[0], group.count
    if count == 1:
        return
    if len(each) > 1:
        seeds = " ".join(str(options.seed) for options in each)
        raise OptionError(f"--seed {seeds}: torchrun trains one model; give one seed")
    if options.batch_size % count:
        what = f"--batch-size {options.batch_size}: must be a multiple of {count}"
        raise OptionError(f"{what}, the number of processes")
    if options.sync_bn and options.memory == "stock":
        what = "--sync-bn with --memory stock: PyTorch's BatchNorm sees only its own process's batch"
        raise OptionError(f"{what}; give lean or recompute")
    gpus, wants_gpus = torch.cuda.device_count(), devices.choose(options.device).type == "cuda"
    if wants_gpus and group.count_here > gpus:
        what = f"--device {options.device}: {group.count_here} processes need as many GPUs, not {gpus}"
        raise OptionError(f"{what}; start fewer, or give --device cpu")


def main(argv: list[str] | None = None) -> None:
    with distributed.joined() as group:
        each, given = config.parse_options(argv, __doc__, note)
        check_group(each, group)
        for options in each:  # fail before any download if one of these is missing
            runs.parent_path(options)
            _ = options.log and progress.import_tracker(options.log)
        train_side_by_side(*open_data(each, given), group)


if __name__ == "__main__":
    distributed.leave(progress.run("train.py", main))
