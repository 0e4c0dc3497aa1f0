"""Read runs from their folders or from packed files, and check them; unusable runs are noted and left out.

A packed file, `*.jsonl`, has one run per line, as `Run.to_json` writes it. No code from any file is executed.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import runs
from records import Analysis, Config, Epoch, Record, RunError, Summary, Text, read_epochs

Say = Callable[[str], None]  # receives one-line notes


class Run(Record):
    """A run that has been read and checked."""

    name: Text  # its folder, as shown
    config: Config
    summary: Summary | None  # None if the run has not ended
    epochs: tuple[Epoch, ...]
    analysis: Analysis | None

    @property
    def status(self) -> str:
        return self.summary.status if self.summary else "not ended"

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def epochs_done(self) -> int:
        return self.summary.epochs_done if self.summary else len(self.epochs)


def read_runs(given: Sequence[str], say: Say) -> list[Run]:
    """Return every usable run in or under `given`, each once.

    `say` receives one-line notes on what is left out. Raises RunError if no run is usable.
    """
    kept: dict[tuple, list[tuple[str, Run]]] = {}
    edges = None
    for place, read in _places(given, say):
        try:
            run = read()
            if wrong := _wrong(run):
                raise RunError(f"{place}: {wrong}")
        except RunError as error:
            say(f"left out {error}")
            continue
        config, options, of = run.config, run.config.options, run.analysis
        if of:
            other = of.frozen_sha256 != config.frozen_sha256
            mine = of.gamma.edges, of.relu.edges, [row.threshold for row in of.pruned]
            edges = edges or (None if other else mine)
            if other or mine != edges:
                wrong = "belongs to another network" if other else "has other bin edges than the first"
                say(f"left out the analysis of {place}: it {wrong}; analysis.py --overwrite redoes it")
                run = run.model_copy(update={"analysis": None})
        key = config.setting, options.arch, options.mode, config.variant, options.seed, config.machine
        twins = sorted([*kept.get(key, ()), (place, run)], key=lambda at: not at[1].done)  # a stable sort
        kept[key] = twins[:1]
        for twin, _ in twins[1:]:
            say(f"left out {twin}: {twins[0][0]} is the same run with the same seed")
    if not kept:
        raise RunError(f"no usable run in {' '.join(given)}; name folders that train.py wrote, such as runs")
    return [run for [(_, run)] in kept.values()]


def _places(given: Sequence[str], say: Say) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Yield each run's place, for messages, and a function that reads the run."""
    packed = [Path(path) for path in given if path.endswith(".jsonl") and Path(path).is_file()]
    folders = [Path(path) for path in given if Path(path) not in packed]
    for folder, name in runs.run_folders(folders, say):
        yield str(folder), partial(read_run, folder, name, say)
    for top in folders:
        files = top.glob("*.jsonl")
        packed += sorted(file for file in files if file.name != "metrics.jsonl" and file.is_file())
    for file in {file.resolve(): file for file in packed}.values():
        try:
            if file.stat().st_size > 2**30:
                raise RunError(f"{file} is larger than packed runs are")
            lines = file.read_bytes().splitlines()
        except OSError as error:
            raise RunError(f"{file} cannot be read ({error.strerror})") from None
        for number, line in enumerate(lines, start=1):
            place = f"{file}, line {number}"
            yield place, partial(Run.parse, line, place)


def read_run(folder: Path, name: str, say: Say) -> Run:
    """Return the run in a folder. Raises RunError if a file of it does not fit the schema.

    If only its analysis does not fit, the run is returned without it, and `say` receives a note.
    """
    config = Config.read(folder / "config.json")
    if config is None:
        raise RunError(f"{folder}: there is no config.json")
    try:
        analysis = Analysis.read(folder / "analysis.json")
    except RunError as error:
        say(f"left out the analysis, {error}; analysis.py --overwrite redoes it")
        analysis = None
    summary, epochs = Summary.read(folder / "summary.json"), tuple(read_epochs(folder))
    return Run(name=name, config=config, summary=summary, epochs=epochs, analysis=analysis)


def _wrong(run: Run) -> str | None:
    """Return how a run's files contradict each other, or what a finished run lacks; None if it is sound."""
    config, summary, options = run.config, run.summary, run.config.options
    if config.parent and not options.init_from:
        return "config.json has a parent run but no option init_from"
    found = vars(options) | vars(config) | {"data": config.spec.data, "variant": dict(config.variant)}
    for name in ("data", "data_title", "arch", "mode", "seed", "variant", "frozen_sha256"):
        if summary and getattr(summary, name) != found[name]:
            return f"config.json and summary.json are of different runs: their {name} differs"
    if [row.epoch for row in run.epochs] != list(range(1, len(run.epochs) + 1)):
        return "its epochs are not numbered consecutively from 1"
    if not run.done:
        return None
    done, asked = summary.epochs_done, options.epochs
    if done != asked and not (options.early_stop and done < asked):
        return f"summary.json says that it is done after {done} of {asked} epochs"
    there = len(run.epochs)
    return f"metrics.jsonl has {there} of {done} epochs" if there not in (0, done) else None
