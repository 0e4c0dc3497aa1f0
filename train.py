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

import contextlib
import dataclasses
import functools
import math
import signal
import sys
from collections.abc import Generator
from typing import Any

import torch

import data
import freeze
import loaders
import models
import progress as display
import provenance
import runs
import step as steps
from config import LOGISTIC, OptionError, Options, parse_options
from datasets.augment import AugmentError
from kernels import distributed as processes


def open_data(each: list[Options], given: set[str]) -> tuple[list[Options], data.Dataset]:
    """The data set; with --quick and no --data, the synthetic one where CIFAR-10 cannot be had."""
    for options in each:
        _ = options.init_from and provenance.start_path(options)  # before any download
    options = each[0]
    wanted = {"data_dir": options.data_dir, "image_size": options.image_size, "say": note}
    try:
        return each, data.open_dataset(options.data, **wanted)
    except data.DataError as error:
        if not options.quick or "data" in given:
            raise
        note(f"--quick takes synthetic images, for want of {options.data}: {str(error).splitlines()[0]}")
    size = options.image_size if "image_size" in given else None
    each = [dataclasses.replace(options, data="synthetic", image_size=size) for options in each]
    return each, data.open_dataset("synthetic", **wanted | {"image_size": size})


def note(line: str) -> None:
    if processes.rank() == 0:  # which speaks for all that torchrun started
        print(f"train.py: {line}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------
# The run


UNUSABLE = OptionError, data.DataError, models.ModelError, freeze.FreezeError, runs.RunError, AugmentError


class RunFailed(Exception):
    """The run ended before its last epoch; the message says why."""


class Interrupted(RunFailed):
    """By Ctrl-C, or by a cluster's polite kill."""


def train_epoch(
    epoch: int, step: steps.Step, schedule: steps.Schedule, loader: Any, bars: display.Display, at: dict
) -> Generator[None, None, dict]:
    """One pass over the training images, yielding after each step: its metrics, without the evaluation's.

    A process's first steps, which compile, count as start-up and not as training. Raises FloatingPointError,
    naming epoch and step, at a loss that is not finite.
    """
    bars.start_epoch(epoch)
    first_step, untimed_images, began = (epoch - 1) * len(loader), 0, time.perf_counter()
    lrs = [schedule.lr(first_step + i) for i in range(len(loader))]
    for i, _ in enumerate(step.epoch(loader, at["epochs_before"] + epoch - 1, lrs), start=1):
        if not at["started"] and i == min(steps.EAGER_STEPS, len(loader)):
            steps.forget_peak_memory(step.device)  # of trials; a graph's is counted as it is captured, next
        starting = not at["started"] and i == min(step.warm_up_steps, len(loader))
        looks = step.device.type == "cpu" or starting or i == len(loader)  # which on a GPU is to wait for it
        if looks and (bad := step.diverged_at()) is not None:
            raise FloatingPointError(
                f"the loss is not finite at epoch {epoch}, step {bad + 1}; try a lower --lr"
            )
        if starting:
            untimed_images, began = step.seen, time.perf_counter()
            at |= {"started": True, "startup_s": at["startup_s"] + began - STARTED}
        bars.step(step)
        step.group.stop_together()
        yield
    train_loss, train_acc = step.metrics()
    seconds, images = time.perf_counter() - began, step.seen - untimed_images
    row = {"epoch": epoch, "lr": float(f"{lrs[0]:.6g}"), "train_loss": train_loss, "train_acc": train_acc}
    return row | {"epoch_s": seconds, "images_per_s": images / seconds if images else None}


def train(
    options: Options, dataset: data.Dataset, bars: display.Bars, group: processes.Group
) -> Generator[None, None, runs.Run]:
    """One run, from the draw of the network to its summary; yields when it is ready, then after each step.

    The processes of `group` go through it together. RunFailed where it ends early.
    """
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    dtype_name = options.dtype or steps.default_dtype(device)
    dtype, compiled = steps.DTYPES[dtype_name], not options.no_compile

    # What a stranger needs, besides the trained tensors, to make the same network again
    recipe = {key: getattr(options, key) for key in freeze.RECIPE if hasattr(options, key)}
    recipe |= {"data": dataset.name, "fingerprint": dataset.fingerprint, "image_size": dataset.image_size}
    recipe |= {key: list(getattr(dataset, key)) for key in ("classes", "mean", "std")}
    recipe |= {"dtype": dtype_name, "device": device.type, "compile": compiled}
    recipe |= {"processes": group.count}
    start = None
    if options.init_from:
        recipe["init_from"] = provenance.start_path(options)
        start = provenance.started_from(recipe["init_from"])
    own_batch = options.batch_size // group.count
    models.check_batches(options.arch, options.shortcut, own_batch, dataset.image_size)

    # The network at its seed's weights, of which only what the mode trains has gradients
    model = freeze.create(recipe, say=note)
    frozen_sha256 = freeze.frozen_sha256(model)
    weights = {"sha256": frozen_sha256}
    weights |= {"initial_sha256": freeze.full_sha256(model)} if options.init_from else {}
    model.to(device, memory_format=torch.channels_last)

    # Batches, whose order and augmentation come from the seed and the epoch alone
    rng = functools.partial(models.stream, options.seed)
    val_split = options.val_split
    if val_split is None and (options.schedule == "plateau" or options.early_stop):
        val_split = data.tenth(dataset.train.labels)
    train_on, validate_on = data.share_out(dataset.train.labels, rng, val_split, options.train_subset)
    recipe |= {"train_images": len(train_on), "val_images": len(validate_on)}
    knew = start and start["fingerprint"] == dataset.fingerprint
    if knew and len(validate_on) and (start["seed"], start["val_images"]) != (options.seed, len(validate_on)):
        apart = f"--seed {options.seed} --val-split {len(validate_on)}"
        note(f"{start['run']} trained on images that validate here; better start from a run of {apart}")
    batches = {"kind": options.loader, "device": device, "dtype": dtype, "compiled": compiled}
    drawn = {"rng": rng, "augmented": options.augment, "subset": train_on}
    drawn |= {"share": (group.rank, group.count)}
    train_loader = loaders.make_loader(dataset, "train", batch_size=options.batch_size, **batches, **drawn)
    batches["batch_size"] = steps.evaluation_batch_size(options.batch_size, dataset.image_size, device)

    # The step, the course of its learning rate, and what it is tested on
    settings = ("optimizer", "momentum", "weight_decay", "label_smoothing", "memory", "sync_bn")
    settings = {key: getattr(options, key) for key in settings}
    step = steps.Step(model, dtype=dtype, compiled=compiled, group=group, **settings)
    settings = ("schedule", "lr", "epochs", "milestones", "gamma", "warmup_epochs")
    settings += ("min_lr", "patience", "early_stop")
    schedule = steps.Schedule(len(train_loader), **{key: getattr(options, key) for key in settings})
    tests = {
        "test": steps.Evaluation(model, loaders.make_loader(dataset, "test", **batches), dtype, compiled)
    }
    if len(validate_on):
        loader = loaders.make_loader(dataset, "validation", subset=validate_on, **batches)
        tests["val"] = steps.Evaluation(model, loader, dtype, compiled)
    if options.schedule == "step" and min(options.milestones, default=0) >= options.epochs:
        note(f"all of --milestones lie past the last epoch: the learning rate stays {options.lr:g}")

    folder = options.out, provenance.cell_name(options, dataset.name), options.resume, options.overwrite
    with runs.open_run(*folder, writes=group.leads) as run:
        group.wait()  # until the folder is open, or refused

        # Where the run stopped, if it was run before
        config = provenance.describe(options, recipe, start, weights, dataset)
        alike = {"data", "compile", "init_from"} | ({"processes"} if options.sync_bn else set())
        run.refuse_another(config, ignoring=LOGISTIC | alike)
        if run.status == "done":
            return run
        at = {"epoch": 0, "train_s": 0.0, "startup_s": 0.0}
        at["epochs_before"] = start["epochs_done"] if start else 0  # whose draws are used
        if (state := run.load_last()) is not None:
            at = restore(run, state, model, step, schedule)
            config["started_from"] = run.config.get("started_from")  # as it was then
            note(f"continuing {run.path} after epoch {at['epoch']}")
        elif options.resume:
            note(f"no epoch of {run.path} is there to resume from: starting it")
        if int(group.sum(torch.tensor(at["epoch"]))) != at["epoch"] * group.count:
            raise runs.RunError(
                f"--out {options.out}: not every process finds the same epochs there; share it"
            )
        at["started"] = False
        yield  # nothing is written before every run is known to be in order
        run.start(config | {"device_name": provenance.device_name(device, bars.runs)})
        title = f"{run.path}\n{options.arch}, {options.mode}, {dataset.title}"
        what = f"{dataset.name} quick" if options.quick else dataset.name
        what = what if bars.runs == 1 else f"{what} s{options.seed}"
        progress = display.Display(bars, title, what, options.epochs, len(train_loader), at["epoch"])

        # The epochs
        ending, checkpoint = {"status": "failed", "why": "an unforeseen error"}, b""
        try:
            for epoch in range(at["epoch"] + 1, options.epochs + 1):
                if schedule.stopped:
                    break
                row = yield from train_epoch(epoch, step, schedule, train_loader, progress, at)
                if "val" in tests:
                    evaluate(tests["val"], "val", row, at)
                    row["val_acc"] = group.agree(row["val_acc"])
                    schedule.epoch_ended(row["val_acc"])
                row |= {"test_loss": None, "test_acc": None}
                ends = epoch == options.epochs or schedule.stopped
                chosen = "val" in tests and schedule.since_best == 0  # the best so far
                if epoch % options.eval_every == 0 or ends or chosen:
                    evaluate(tests["test"], "test", row, at)
                after = {"epoch": epoch, "train_s": at["train_s"] + row["epoch_s"]}
                state = {"model": freeze.trained_state(model), "step": step.state_dict()}
                run.end_epoch(row, state | {"schedule": schedule.state_dict(), "at": at | after})
                at |= after
                progress.end_epoch(row)
            if run.rows[-1]["test_loss"] is None:
                raise FloatingPointError("the last test loss is not finite; try a lower --lr")
            if freeze.frozen_sha256(model) != frozen_sha256:
                raise AssertionError("frozen weights have changed")
            checkpoint = freeze.seed_checkpoint(model, recipe, at["epoch"] * len(train_loader))
            run.write(runs.CHECKPOINT, checkpoint)
            why = f"no better validation accuracy for {options.early_stop} epochs"
            ending = {"status": "done", "why": why if schedule.stopped else None}
        except FloatingPointError as error:
            ending = {"status": "diverged", "why": str(error)}
        except ConnectionError as error:
            ending["why"] = str(error)
        except OSError as error:
            ending["why"] = f"a file cannot be written: {error}"
        except KeyboardInterrupt:
            why = f"interrupted; --resume goes on after epoch {at['epoch']}"
            ending = {"status": "interrupted", "why": why}
        except RuntimeError as error:
            if not steps.out_of_memory(error):
                raise
            ending["why"] = f"out of memory at --batch-size {options.batch_size}; try a smaller one"
        finally:  # what came of it, also where an unforeseen error is passing through
            total, trained = freeze.count(model)
            summary = ending | {"params_total": total, "params_trained": trained}
            summary |= results(run.rows, done=ending["status"] == "done")
            summary |= {"epochs_done": at["epoch"], "peak_memory_bytes": steps.peak_memory_bytes(device)}
            summary |= {key: at[key] for key in ("train_s", "startup_s")}
            summary |= {"checkpoint_bytes": len(checkpoint) or None, "full_bytes": freeze.full_bytes(model)}
            summary |= {"data_title": dataset.title, "frozen_sha256": frozen_sha256}
            with contextlib.suppress(OSError if ending["status"] != "done" else ()):
                run.finish(summary | config["options"] | {"data": dataset.name})
        if ending["status"] == "interrupted":
            raise Interrupted(f"{run.path}: {ending['why']}")
        if ending["status"] != "done":
            raise RunFailed(f"{run.path}: {ending['why']}")
        return run


def evaluate(evaluation: steps.Evaluation, name: str, row: dict, at: dict) -> None:
    """Put loss and accuracies in an epoch's `row`.

    A loss that is not finite is None in test, which decides nothing; in validation, FloatingPointError.
    """
    starting, began = evaluation.starting, time.perf_counter()
    loss, row[f"{name}_acc"] = evaluation()
    row[f"{name}_loss"] = loss if math.isfinite(loss) else None
    if evaluation.top5_acc is not None:
        row[f"{name}_top5_acc"] = evaluation.top5_acc
    # A GPU's first one compiles and captures: start-up, like the first steps.
    times, of = (at, "startup_s") if starting else (row, "epoch_s")
    times[of] += time.perf_counter() - began
    if name == "val" and not math.isfinite(loss):
        why = f"the validation loss is not finite after epoch {row['epoch']}; try a lower --lr"
        raise FloatingPointError(why)


def results(rows: list[dict], done: bool) -> dict:
    """The accuracies of a run's summary: after the last epoch, the best on test images, which is no result,
    and where there are validation images, what they chose."""
    tested = [row for row in rows if row["test_acc"] is not None]
    found = {"final_test_acc": rows[-1]["test_acc"] if done else None}
    found["best_test_acc"] = max((row["test_acc"] for row in tested), default=None)
    if done and "test_top5_acc" in rows[-1]:
        found["final_test_top5_acc"] = rows[-1]["test_top5_acc"]
    if rows and "val_acc" in rows[0]:
        chosen = max(rows, key=lambda row: row["val_acc"])  # the first, of equals: it has been tested
        found |= {"chosen_epoch": chosen["epoch"], "chosen_test_acc": chosen["test_acc"]}
        found["best_val_acc"] = chosen["val_acc"]
    return found


def train_side_by_side(each: list[Options], dataset: data.Dataset, group: processes.Group) -> None:
    """All runs, a step of each in turn; on a GPU each on a stream of its own, so that they fill it together.

    One that fails does not stop the others. RunFailed, at the end, for the first that did.
    """
    bars = display.Bars(len(each), shown=group.leads)
    on_gpu = torch.cuda.is_available() and each[0].device != "cpu"
    streams = [torch.cuda.Stream() if on_gpu else None for _ in each]
    each = [train(options, dataset, bars, group) for options in each]
    turns = list(zip(each, streams, strict=True))
    done, failed = [], []

    def goes_on(run: Generator, stream: torch.cuda.Stream | None, interrupted: bool = False) -> bool:
        try:
            with torch.cuda.stream(stream):
                run.throw(KeyboardInterrupt) if interrupted else next(run)
            return True
        except StopIteration as end:
            done.append(end.value)
        except RunFailed as error:
            failed.append(error)
            if isinstance(error, Interrupted) and not interrupted:
                raise KeyboardInterrupt from None
        return False

    with bars.bars:
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
        show_results(run)
    for error in failed[1:]:
        note(str(error))
    if failed:
        raise failed[0]


def restore(
    run: runs.Run, state: dict, model: torch.nn.Module, step: steps.Step, schedule: steps.Schedule
) -> dict:
    """Put everything where `state`, of last.pt, left it; returns how far that was. RunError for rubbish."""
    try:
        if state["model"].keys() != freeze.trained_state(model).keys():
            raise KeyError("its tensors are not those that this run trains")
        if not all({"epoch", "test_acc"} <= row.keys() for row in run.rows):
            raise KeyError("its epochs are damaged")
        model.load_state_dict(state["model"], strict=False)
        step.load_state_dict(state["step"])
        schedule.load_state_dict(state["schedule"])
        at = {"epochs_before": 0} | state["at"]
        return {key: at[key] for key in ("epoch", "train_s", "startup_s", "epochs_before")}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise runs.RunError(
            f"{run.path / 'last.pt'} cannot be resumed from ({reason});\nstart again with --overwrite"
        ) from None


def show_results(run: runs.Run) -> None:
    try:
        display.show_results(str(run.path), run.summary)
    except (KeyError, TypeError):
        raise runs.RunError(f"{run.path / 'summary.json'} is damaged; start again with --overwrite") from None


def interrupt(*_: object) -> None:
    """A cluster's polite kill ends a run as Ctrl-C does; one that comes twice, only once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with processes.joined() as group:
            train_side_by_side(*open_data(*parse_options(argv, __doc__, group)), group)
    except UNUSABLE as error:
        note(str(error))
        return 2
    except (RunFailed, OSError) as error:
        note(str(error))
        return 1
    except RuntimeError as error:
        if not steps.out_of_memory(error):
            raise
        note("out of memory before the first step; try a smaller --batch-size, or --loader ffcv")
        return 1
    except KeyboardInterrupt:
        note("interrupted before the first epoch")
        return 1
    return 0


if __name__ == "__main__":
    processes.leave(main())
