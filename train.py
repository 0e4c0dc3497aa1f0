"""Train a convolutional network of which only a part trains: by default BatchNorm's gamma and beta alone.

    python train.py --arch resnet32 --mode bn_only              # the paper's schedule: 160 epochs of CIFAR-10
    python train.py --arch resnet32 --mode bn_only --quick      # the same idea in a few minutes on a CPU
    python train.py --arch resnet56 --mode random --seed 1      # as many random convolution weights instead
    python train.py --arch resnet110 --mode bn+output --resume  # go on where the run stopped
    python train.py --arch resnet32 --seed 0 1 2 3              # four runs side by side, a folder for each
    torchrun --standalone --nproc_per_node=2 train.py --arch resnet110  # one run shared by two processes

Every default is the published one: Frankle, Schwab, Morcos, "Training BatchNorm and Only BatchNorm" (2020).
A run leaves a folder in --out; exit status 0: done, 1: the run failed, 2: unusable options or data.
"""

import time

STARTED = time.perf_counter()  # before the imports: start-up is what a user waits for

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
    """It was ended by Ctrl-C, or by a cluster's SIGTERM."""


# ---- the story of a run ----


def train(
    options: Options, dataset: data.Dataset, bars: progress.Bars, group: Group
) -> Generator[None, None, runs.Run]:
    """One run, from the draw of the network to its summary; yields when it is ready, then after each step.

    The processes of `group` go through it together. Returns the run; raises RunFailed where it ends early.
    """
    # The network at its seed's weights, of which only what the mode trains has gradients
    device, split = devices.choose(options.device), share_out(options, dataset)
    spec = network_spec(options, dataset, device, split, group)
    parent = runs.read_parent(spec.init_from) if spec.init_from else None
    model = checkpoint.create(spec, note)
    frozen = freeze.frozen_sha256(model)
    brought = freeze.full_sha256(model) if spec.init_from else None  # by --init-from
    model.to(device, memory_format=torch.channels_last)
    synced = group if options.sync_bn and group.connected else None
    kernels.configure(model, options.memory, spec.compiled, synced)

    # Its batches, the step that trains on them, and what tests it
    training = Training(options, dataset, split, spec, parent, model, group)

    path = Path(options.out, runs.run_name(options, dataset.name))
    with runs.open_run(path, options.resume, options.overwrite, writes=group.leads) as run:
        group.wait()  # until the folder is open, or refused
        hashes = {"frozen_sha256": frozen, "initial_sha256": brought}
        run.refuse_another(options, spec, hashes)
        if run.status == "done":
            run.tidy()
            return run
        if training.resume(run):
            parent = run.config.parent  # as it was then
            note(f"continuing {run.path} after epoch {len(run.rows)}")
        elif options.resume:
            note(f"no epoch of {run.path} is there to resume from: starting it")
        yield  # nothing is written before every run is known to be in order

        passes = kernels.passes_for(device.type, spec.compiled and options.memory != "stock").name
        came_to = {"options": options, "spec": spec, "parent": parent, "data_title": dataset.title}
        own = runs.environment(device, bars.runs)
        run.begin(records.Config(**came_to, **hashes, passes=passes, **own))
        display = progress.Display(bars, run, len(training.loader))
        status, why, sealed = "failed", "an unforeseen error", b""
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
        finally:  # what came of it, also where an unforeseen error is passing through
            summary = training.summary(status, why, run, len(sealed))
            with contextlib.suppress(OSError if status != "done" else ()):
                run.finish(summary)
            display.finish(summary)
        if status != "done":
            raise (Interrupted if status == "interrupted" else RunFailed)(f"{run.path}: {why}")
        return run


class Training:
    """What works on a run's batches, whose order and augmentation come from seed and epoch alone.

    `split` is what `share_out` returns; `model` is on its device. What lasts from epoch to epoch is here, and
    `state_dict` is what last.pt keeps of it.
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
        # The shuffles and crops of parent runs are not drawn again
        self.epochs_before = parent.epochs_done_in_all if parent else 0
        self.startup_s, self.train_s, self.wall_s = 0.0, 0.0, 0.0  # of the processes before this one
        self.starting, self.peak_memory_bytes = True, None  # of this one
        self.lap_began, self.untimed_images = STARTED, 0

        if options.schedule == "step" and min(options.milestones, default=0) >= options.epochs:
            note(f"all of --milestones lie past the last epoch: the learning rate stays {options.lr:g}")
        same_images = parent is not None and parent.fingerprint == spec.fingerprint and spec.val_images
        if same_images and (parent.seed, parent.val_images) != (spec.seed, spec.val_images):
            better = f"--seed {spec.seed} --val-split {spec.val_images}"
            note(f"{parent.run} trained on images that validate here; better start from a run of {better}")

    def epoch(self, epoch: int, display: progress.Display) -> Generator[None, None, records.Epoch]:
        """One pass over the training images, yielding after each step, and its evaluation: its metrics.

        Raises FloatingPointError, naming epoch and step, at a loss that is not finite.
        """
        display.start_epoch(epoch)
        if not self.starting:  # else the first lap is start-up
            self.lap_s()
        first_step = (epoch - 1) * len(self.loader)
        lrs = [self.schedule.lr(first_step + i) for i in range(len(self.loader))]
        for i, _ in enumerate(self.step.epoch(self.loader, self.epochs_before + epoch - 1, lrs), start=1):
            self.look(epoch, i)
            display.step(self.step)
            progress.end_if_interrupted()
            self.group.stop_together()
            yield
        train_loss, train_acc = self.step.metrics()  # which waits for the device, and so stops the clock
        peaks = self.peak_memory_bytes or 0, devices.peak_memory_bytes(self.step.device)
        self.peak_memory_bytes = max(peaks)  # of training alone: evaluation takes larger batches
        images, self.untimed_images = self.step.seen - self.untimed_images, 0
        self.epoch_s = self.lap_s()
        images_per_s = images / self.epoch_s if images else None
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
        devices.reset_peak_memory(self.step.device)
        self.train_s += self.epoch_s
        return records.Epoch(epoch=epoch, lr=float(f"{lrs[0]:.6g}"), **row, **tested, epoch_s=self.epoch_s)

    def look(self, epoch: int, steps: int) -> None:
        """After each of an epoch's steps: whether start-up is over, and whether the loss is still finite."""
        device, count = self.step.device, len(self.loader)
        if self.starting and steps == min(devices.EAGER_CALLS, count):
            devices.reset_peak_memory(device)  # of trials; the graph's is counted as it is captured, next
        started = self.starting and steps == min(self.step.warm_up_steps, count)
        if device.type == "cpu" or started or steps == count:  # on a GPU this waits for it
            bad = self.step.diverged_at()
            if bad is not None:
                what = f"the loss is not finite at epoch {epoch}, step {bad + 1}"
                raise FloatingPointError(f"{what}; try a lower --lr")
        if started:  # the first steps, which compile, are done: the epoch's time counts from here
            self.startup_s += self.lap_s()
            self.starting, self.untimed_images = False, self.step.seen

    def scores(self, evaluation: Evaluation) -> Scores:
        """An evaluation, which counts as start-up where it compiles."""
        compiles, scores = evaluation.compiles, evaluation()
        if compiles:
            self.startup_s += self.lap_s()
        else:
            self.epoch_s += self.lap_s()
        return scores

    def lap_s(self) -> float:
        """Seconds since it was last asked for, or since the process began."""
        began, self.lap_began = self.lap_began, time.perf_counter()
        return self.lap_began - began

    def state_dict(self) -> dict:
        return {
            "model": freeze.trained_vector(self.model),
            "step": self.step.state_dict(),
            "schedule": self.schedule.state_dict(),
            **config.some(self, "epochs_before startup_s train_s"),
            "wall_s": self.wall_s + time.perf_counter() - STARTED,
        }

    def resume(self, run: runs.Run) -> bool:
        """Put everything where the run's last epoch left it; False where there is none. Raises RunError."""
        state = run.load_last()
        if int(self.group.sum(torch.tensor(len(run.rows)))) != len(run.rows) * self.group.count:
            raise records.RunError(f"{run.path}: not every process finds the same epochs there; share --out")
        if state is None:
            return False
        try:
            freeze.load_trained_vector(self.model, state["model"])
            self.step.load_state_dict(state["step"])
            self.schedule.load_state_dict(state["schedule"])
            self.epochs_before = int(state["epochs_before"])
            names = "startup_s", "train_s", "wall_s"
            self.startup_s, self.train_s, self.wall_s = (float(state[name]) for name in names)
        except Exception as error:  # rubbish fails in many ways
            raise run.unusable(error) from None
        run.write_metrics()
        return True

    def summary(self, status: str, why: str | None, run: runs.Run, checkpoint_bytes: int) -> records.Summary:
        """summary.json: the accuracy after the last epoch; the best on test images, which is no result; and
        where there are validation images, what they chose."""
        rows, of, done = run.rows, run.described, status == "done"
        total, trained = freeze.count(self.model)
        ended = {"status": status, "why": why, "params_total": total, "params_trained": trained}
        sizes = {"checkpoint_bytes": checkpoint_bytes or None, "full_bytes": freeze.full_bytes(self.model)}
        reached = {"final_test_acc": rows[-1].test_acc if done else None}
        if done and rows[-1].test_top5_acc is not None:
            reached["final_test_top5_acc"] = rows[-1].test_top5_acc
        if rows and rows[0].val_acc is not None:
            best = max(rows, key=lambda row: row.val_acc)  # the first, of equals: it has been tested
            reached |= {"chosen_epoch": best.epoch, "chosen_test_acc": best.test_acc}
            reached["best_val_acc"] = best.val_acc
        return records.Summary(
            **ended,
            **sizes,
            **reached,
            **config.some(of.options, "arch mode seed"),
            **config.some(of, "data_title frozen_sha256"),
            **config.some(self, "train_s startup_s peak_memory_bytes"),
            wall_s=self.wall_s + time.perf_counter() - STARTED,
            data=of.spec.data,
            variant=dict(of.variant),
            best_test_acc=max((row.test_acc for row in rows if row.test_acc is not None), default=None),
            epochs_done=len(rows),
        )


# ---- what the story is made of ----


def share_out(options: Options, dataset: data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the images to train on, and of those to validate on. DataError where there are too few."""
    labels, val_split = dataset.train.labels, options.val_split
    if val_split is None and (options.schedule == "plateau" or options.early_stop):
        val_split = data.tenth(labels)
    rng = functools.partial(models.stream, options.seed)
    return data.share_out(labels, rng, val_split, options.train_subset)


def network_spec(
    options: Options, dataset: data.Dataset, device: torch.device, split: tuple, group: Group
) -> records.NetworkSpec:
    """What rebuilds the network. ModelError where it cannot train on such batches."""
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
        dtype=options.dtype or devices.default_dtype(device),
        device=device.type,
        compiled=not options.no_compile,
        processes=group.count,
    )


def how_it_ended(error: BaseException, options: Options, run: runs.Run) -> tuple[str, str]:
    """The status of a run that `error` ended, and why; an error that is none of a user's passes on."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", f"interrupted; --resume goes on after epoch {len(run.rows)}"
    if isinstance(error, FloatingPointError):
        return "diverged", str(error)
    if isinstance(error, ConnectionError):
        return "failed", str(error)
    if isinstance(error, OSError):
        mend = f"mend that, and --resume goes on after epoch {len(run.rows)}"
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
    """All runs, a step of each in turn; on a GPU each on a stream of its own, so that they fill it together.

    One that fails does not stop the others. Raises, at the end, the RunFailed of the first that did.
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
        except (RunFailed, OSError) as error:  # this, where not even summary.json can be written
            failed.append(error)
            if isinstance(error, Interrupted) and not interrupted:
                raise KeyboardInterrupt from None
        return False

    with bars:
        try:
            turns = [turn for turn in turns if goes_on(*turn)]
            bars.runs = len(turns)  # without those that were done before
            while turns:
                turns = [turn for turn in turns if goes_on(*turn)]
        except KeyboardInterrupt:
            for turn in turns:
                with contextlib.suppress(KeyboardInterrupt):  # of one that had not begun
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
    """The data set; with --quick and no --data, the synthetic one where CIFAR-10 cannot be had."""
    options, size = each[0], each[0].image_size
    try:
        return each, data.open_dataset(options.data, options.data_dir, image_size=size, say=note)
    except data.DataError as error:
        if not options.quick or "data" in given:
            raise
        note(f"--quick takes synthetic images, for want of {options.data}: {str(error).splitlines()[0]}")
    size = size if "image_size" in given else None  # not a preset's
    each = [dataclasses.replace(options, data="synthetic", image_size=size) for options in each]
    return each, data.open_dataset("synthetic", options.data_dir, image_size=size, say=note)


def check_group(each: list[Options], group: Group) -> None:
    """OptionError for the first value that the processes of `group` could not share."""
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
        what = "--sync-bn with --memory stock: autograd's BatchNorm knows its own process's batch only"
        raise OptionError(f"{what}; give lean or recompute")
    gpus, wants_gpus = torch.cuda.device_count(), devices.choose(options.device).type == "cuda"
    if wants_gpus and group.count_here > gpus:
        what = f"--device {options.device}: {group.count_here} processes need as many GPUs, here are {gpus}"
        raise OptionError(f"{what}; start fewer, or give --device cpu")


def main(argv: list[str] | None = None) -> None:
    with distributed.joined() as group:
        each, given = config.parse_options(argv, __doc__, note)
        check_group(each, group)
        for options in each:  # what must be there before any download
            runs.parent_path(options)
            _ = options.log and progress.import_tracker(options.log)
        train_side_by_side(*open_data(each, given), group)


if __name__ == "__main__":
    distributed.leave(progress.run("train.py", main))
