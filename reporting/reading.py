"""Finished runs, read from their folders and checked.

One that train.py would not have left is named and left out; no code from any file is run.
"""

import json
import math
import stat
import sys
from pathlib import Path
from typing import NamedTuple

from provenance import Start, pairs, start_of, start_text

import runs
from config import DEFAULTS, LOGISTIC, recorded, show, variant

COST_ONLY = ("loader", "memory", "no_compile")  # what changes time and memory, not accuracy

HUGE = 1e100  # more than any number of a run, and its square is still finite
SUMMARY = {  # kind, may be null, least, most
    "status": (str, False),
    "why": (str, True),
    "params_total": (int, False, 1, 2**62),
    "params_trained": (int, False, 0, 2**62),
    "final_test_acc": (float, True, 0, 100),
    "best_test_acc": (float, True, 0, 100),
    "final_test_top5_acc": (float, True, 0, 100),
    "chosen_epoch": (int, True, 1, 10**6),
    "chosen_test_acc": (float, True, 0, 100),
    "best_val_acc": (float, True, 0, 100),
    "epochs_done": (int, False, 0, 10**6),
    "train_s": (float, False, 0, HUGE),
    "startup_s": (float, False, 0, HUGE),
    "peak_memory_bytes": (int, True, 0, 2**62),
    "checkpoint_bytes": (int, True, 1, 2**62),
    "full_bytes": (int, False, 1, 2**62),
}
EPOCH = {
    "epoch": (int, False, 1, 10**6),
    "lr": (float, False, 0, HUGE),
    "train_loss": (float, False, -HUGE, HUGE),
    "train_acc": (float, False, 0, 100),
    "test_loss": (float, True, -HUGE, HUGE),
    "test_acc": (float, True, 0, 100),
    "test_top5_acc": (float, True, 0, 100),
    "val_loss": (float, True, -HUGE, HUGE),
    "val_acc": (float, True, 0, 100),
    "epoch_s": (float, False, 0, HUGE),
    "images_per_s": (float, True, 0, HUGE),
}
STARTED_FROM = {
    **dict.fromkeys(("run", "mode", "fingerprint", "device_name"), (str, False)),
    **dict.fromkeys(("epochs", "course", "epochs_done"), (int, False, 0, 10**6)),
    "seed": (int, False, 0, 2**64),
    **dict.fromkeys(("val_images", "train_subset", "processes"), (int, True, 0, 2**62)),
    "quick": (bool, True),
    "seconds": (float, True, 0, HUGE),
    "test_acc": (float, True, 0, 100),
    "options": (dict, False),
}
COUNTS = {"count": (int, False, 1, 2**62), "edges": (list, False), "counts": (list, False)}
ANALYSIS = {
    "gamma": {**COUNTS, "share_under_0.01": (float, False, 0, 1)},
    "relu": {**COUNTS, "silent": (float, False, 0, 1), "silent_99": (float, False, 0, 1)},
}
PRUNED = {
    "threshold": (float, False, 0, HUGE),
    "zeroed": (float, False, 0, 1),
    "test_acc": (float, False, 0, 100),
}


class NoRuns(ValueError):
    """There is nothing to report; the message says what would do."""


class Rubbish(ValueError):
    """A run folder that train.py would not have left; the message says what is wrong."""


class Run(NamedTuple):
    """A run folder, read and checked."""

    folder: str  # as shown: from the folder that was named
    options: dict
    config: dict
    summary: dict  # with a status also where there is no summary.json
    epochs: list[dict]
    analysis: dict | None

    @property
    def setting(self) -> tuple:
        """What two runs must share to stand on one page section."""
        o, recipe = self.options, self.config["recipe"]
        size = recipe.get("image_size") or o["image_size"]
        images = o["quick"], o["train_subset"], recipe.get("val_images", o["val_split"]) or 0
        epochs = self.course + o["epochs"]
        return self.config["data_title"], epochs, *images, size, recipe.get("fingerprint")

    @property
    def course(self) -> int:
        """Epochs that were asked for of what it started from."""
        return self.start["course"] if self.start else 0

    @property
    def start(self) -> dict | None:
        """The run on the same images that this one started from."""
        return self.config["started_from"] if self.began else None

    @property
    def before(self) -> tuple[int, float]:
        """Epochs that led to this run, and their seconds; these are NaN where another device took them."""
        if not self.start:
            return 0, 0.0
        same = self.start["device_name"] == self.config["device_name"] and self.start["seconds"] is not None
        return self.start["epochs_done"], self.start["seconds"] if same else math.nan

    @property
    def began(self) -> Start | None:
        """`start`, in the words in which runs are told apart."""
        return start_of(self.config)

    @property
    def variant(self) -> tuple[tuple[str, object], ...]:
        """The options, with their values, that set it apart from the published run of its setting."""
        differing = variant(self.options, self.course)
        processes = self.config["recipe"].get("processes") or 1
        if processes > 1 and not self.options["sync_bn"]:
            differing["processes"] = processes  # each of which normalised its own part of a batch
        if differing.get("init_from"):
            differing["init_from"] = start_text(self.config)
        return pairs(differing)

    @property
    def machine(self) -> tuple[str, str, str]:
        """Device, number format and whatever else changes the cost, version of torch."""
        options = [f"{k} {show(self.options[k])}" for k in COST_ONLY if self.options[k] != DEFAULTS[k]]
        processes = self.config["recipe"].get("processes") or 1
        options += [f"{processes} processes"] if processes > 1 else []
        dtype = self.config["recipe"].get("dtype") or self.options["dtype"] or "unknown format"
        torch = self.config["versions"].get("torch") or "unknown"
        return self.config["device_name"], ", ".join([dtype, *options]), torch


# ----------------------------------------------------------------------------------------------------------
# Reading


def note(line: str) -> None:
    print(f"report.py: {printable(line)}", file=sys.stderr)


def printable(value: object) -> object:
    """`value`, at any depth, with each character that cannot be printed replaced."""
    if isinstance(value, str):
        return (
            value
            if value.isprintable()
            else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)
        )
    if isinstance(value, dict):
        return {printable(key): printable(one) for key, one in value.items()}
    return [printable(one) for one in value] if isinstance(value, list) else value


def content(folder: Path, name: str) -> dict | None:
    """The object in a JSON file of a run folder, None where there is none. Rubbish where it is not one."""
    return printable(runs.read_json(folder / name)) if is_plain(folder / name) else None


def is_plain(file: Path) -> bool:
    """Whether the file is there; Rubbish for a link, a pipe, or one too large to be a run's."""
    try:
        info = file.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(info.st_mode) or info.st_size > 2**26:
        raise Rubbish(f"{file.name} is not a plain file of a run's size")
    return True


def check(found: object, fields: dict[str, tuple], where: str) -> None:
    """Rubbish unless `found` is a dict whose values are of the kinds, and in the ranges, of `fields`."""
    if not isinstance(found, dict):
        raise Rubbish(f"{where} is no object")
    for name, (kind, optional, *limits) in fields.items():
        value = found.get(name)
        if value is None and optional:
            continue
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise Rubbish(f"{where}: {name} is {str(value)[:40]}, and should be {kind.__name__}")
        if limits and not limits[0] <= value <= limits[1]:  # nor is NaN between any two numbers
            raise Rubbish(
                f"{where}: {name} is {str(value)[:40]}, and should be from {limits[0]:g} to {limits[1]:g}"
            )


def check_options(options: dict) -> None:
    plain = (int, float, str, bool, type(None))
    for name, value in options.items():
        parts = value if isinstance(value, list) else [value]
        kinds = (*plain, list)  # of an option that is newer than this list
        if name in DEFAULTS:
            default = type(DEFAULTS[name])
            kinds = {float: (float, int), type(None): (int, str, type(None))}.get(default, (default,))
        numbers = [part for part in parts if isinstance(part, (int, float))]
        if type(value) not in kinds or any(type(part) not in plain for part in parts):
            raise Rubbish(f"option {name} is {str(value)[:40]}")
        if not all(-HUGE <= number <= HUGE for number in numbers):  # nor is NaN between any two numbers
            raise Rubbish(f"option {name} is {str(value)[:40]}, out of range")
    kinds = {"epochs": (int, False, 1, 10**6), "train_subset": (int, True, 1, 2**62)}
    kinds |= {"image_size": (int, True, 1, 65536), "early_stop": (int, True, 0, 10**6)}
    kinds |= {"val_split": (int, True, 0, 2**62)}
    check(options, kinds | dict.fromkeys(("init_from", "dtype", "loader", "recipe"), (str, True)), "options")
    if not all(type(m) is int for m in options["milestones"]):
        raise Rubbish("option milestones are no epochs")


def read_epochs(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, [] where there is none."""
    if not is_plain(folder / "metrics.jsonl"):
        return []
    rows = []
    for number, line in enumerate((folder / "metrics.jsonl").read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            raise Rubbish(f"metrics.jsonl: line {number} is no JSON, or half of it") from None
        check(row, EPOCH, f"metrics.jsonl, line {number}")
        if row["epoch"] != number:
            raise Rubbish(f"metrics.jsonl: line {number} is of epoch {row['epoch']}")
        rows.append(dict.fromkeys(EPOCH) | row)
    return rows


def read_analysis(folder: Path, frozen_sha256: str | None) -> dict | None:
    """analysis.json; None, and a note, where there is none of this run's network."""
    try:
        if (analysis := content(folder, "analysis.json")) is not None:
            check_analysis(analysis)
            if analysis.get("frozen_sha256", frozen_sha256) != frozen_sha256:
                raise Rubbish("analysis.json is of another network")
        return analysis
    except (Rubbish, runs.RunError, RecursionError) as error:
        note(f"without its analysis, {folder}: {str(error) or type(error).__name__}; make it anew")
        return None


def check_analysis(analysis: dict) -> None:
    for part, fields in ANALYSIS.items():
        check(analysis.get(part), fields, f"analysis.json, {part}")
        edges, counts = analysis[part]["edges"], analysis[part]["counts"]
        if any(type(x) not in (int, float) or not -HUGE < x < HUGE for x in edges) or edges != sorted(
            set(edges)
        ):
            raise Rubbish(f"analysis.json, {part}: its edges are no increasing numbers")
        if any(type(x) is not int or x < 0 for x in counts) or not 0 < len(counts) == len(edges) - 1:
            raise Rubbish(f"analysis.json, {part}: its counts do not fit its edges")
        if sum(counts) > analysis[part]["count"]:
            raise Rubbish(f"analysis.json, {part}: more are counted than there are")
    if not isinstance(analysis.get("pruned"), list) or not analysis["pruned"]:
        raise Rubbish("analysis.json: pruned is no list")
    for row in analysis["pruned"]:
        check(row, PRUNED, "analysis.json, pruned")


def read_run(folder: Path, shown: str) -> Run:
    """A run folder, checked. Rubbish, or RunError, for what train.py would not have left."""
    config, summary = content(folder, "config.json"), content(folder, "summary.json")
    if config is None and summary is None:
        raise Rubbish("its files went while they were read")
    results = {*SUMMARY, "data_title", "frozen_sha256"}
    if config is None:  # a summary has the options too
        options = {key: value for key, value in summary.items() if key not in results}
        config = {"options": options, "data_title": summary.get("data_title")}
    config = {"recipe": {}, "versions": {}, "device_name": "unknown device", "started_from": None} | config
    kinds = {"options": (dict, False), "recipe": (dict, False), "versions": (dict, False)}
    kinds |= {"data_title": (str, False), "device_name": (str, False), "git_commit": (str, True)}
    check(config, kinds | {"started_from": (dict, True)}, "config.json")
    if start := config["started_from"]:
        check(start, STARTED_FROM, "config.json, started_from")
        if not config["options"].get("init_from"):
            raise Rubbish("config.json: it started from a run, and has no option init_from")
        check_options(DEFAULTS | start["options"])
    recipe = {"fingerprint": (str, True), "dtype": (str, True), "image_size": (int, True, 1, 65536)}
    recipe |= {"processes": (int, True, 1, 65536), "val_images": (int, True, 0, 2**62)}
    check(config["recipe"], recipe, "config.json, recipe")
    check(
        config["versions"],
        dict.fromkeys(("python", "torch", "cuda"), (str, True)),
        "config.json, versions",
    )
    options = recorded(config["options"])
    check_options(options)
    for name in {"arch", "mode", "seed"} - config["options"].keys():
        raise Rubbish(f"config.json: there is no option {name}")
    epochs, analysis = read_epochs(folder), read_analysis(folder, (summary or {}).get("frozen_sha256"))
    if summary is None:
        why = "no summary.json: it is still running, or was killed; --resume goes on"
        summary = {"status": "not ended", "epochs_done": len(epochs), "why": why}
        summary = dict.fromkeys(SUMMARY) | summary
        return Run(shown, options, config, summary, epochs, analysis)
    check(summary, SUMMARY, "summary.json")
    summary = dict.fromkeys(SUMMARY) | summary
    for name in options.keys() - LOGISTIC - {"data"}:
        if summary.get(name, options[name]) != options[name]:
            raise Rubbish(f"config.json and summary.json are of different runs: their {name} differs")
    if summary["status"] == "done":
        needed = ("final_test_acc", "best_test_acc", "checkpoint_bytes")
        for name in [name for name in needed if summary[name] is None]:
            raise Rubbish(f"summary.json: it is done, and has no {name}")
        done, asked = summary["epochs_done"], options["epochs"]
        if done != asked and not (options["early_stop"] and done < asked):
            raise Rubbish(f"summary.json: it is done after {done} of {asked} epochs")
        if epochs and len(epochs) != done:
            raise Rubbish(f"metrics.jsonl has {len(epochs)} of {done} epochs")
    return Run(shown, options, config, summary, epochs, analysis)


def read_runs(given: list[str]) -> list[Run]:
    """Every usable run under `given`, each seed of a series once; what is left out is named on stderr."""
    kept: dict[tuple, tuple[Run, Path]] = {}
    signature = None
    for folder, shown in runs.run_folders(given, note):
        try:
            run = read_run(folder, printable(shown))
            if run.analysis:
                parts = run.analysis["gamma"]["edges"], run.analysis["relu"]["edges"]
                mine = *parts, [row["threshold"] for row in run.analysis["pruned"]]
                signature = signature or mine
                if mine != signature:
                    note(f"without its analysis, {folder}: it has other edges than the first; make it anew")
                    run = run._replace(analysis=None)
        except (Rubbish, runs.RunError, OSError, ValueError, RecursionError) as error:
            note(f"left out {folder}: {str(error) or type(error).__name__}")
            continue
        key = run.setting, run.options["arch"], run.options["mode"], run.variant, run.options["seed"]
        key += run.machine
        if key in kept:
            before, place = kept[key]
            better = run.summary["status"] == "done" != before.summary["status"]
            out, kept_place = (place, folder) if better else (folder, place)
            note(f"left out {out}: {kept_place} is the same run, seed and all")
            if not better:
                continue
        kept[key] = run, folder
    if not kept:
        raise NoRuns(f"no usable run in {' '.join(given)}; name folders that train.py wrote, such as runs")
    return [run for run, _ in kept.values()]
