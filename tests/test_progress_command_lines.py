"""A stress test: every command line is usable, or refused with exit status 2 and without a traceback."""

import importlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bench
import config
import progress

pytestmark = [
    pytest.mark.stress,
    pytest.mark.tried("scripts with a share of 1,000 command lines made at random"),
]
TRIES = 1000  # for all scripts together
TEXTS = ["9" * 5000, "-" + "9" * 5000, "a" * 5000, "~", "~no_such_user", "~no_such_user/a", "", " "]
TEXTS += ["--", "-", "\N{SNOWMAN}", "w.pt", "/dev/null", "/dev/full/a", "{seed}", "{0}", "%s"]
TEXTS += ["\udcff", "[/red]", "a\nb", "\x1b[2J", "synthetic", "cifar10", "resnet", "*"]
NUMBERS = [
    "nan",
    "-nan",
    "inf",
    "1e308",
    "-1e308",
    "1e-320",
    "-0",
    "0",
    "1",
    "2",
    "3",
    "7",
    "0.5",
    "64",
    "1e30",
]
ARCHS = ["resnet14", "resnet8_w99", "resnet9998_w1000", "resnet" + "9" * 5000, "vgg11", "vgg99", "resnet18"]
MODES = ["bn+output", "random", "none", "all", "shortcut", "+", "bn_only+", "bn+bn"]
TEXT = st.sampled_from(TEXTS) | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
NUMBER = st.sampled_from(NUMBERS) | st.integers().map(str) | st.floats().map(str)
ANY = st.sampled_from(NUMBERS + ARCHS + MODES) | TEXT
ARCH, MODE = st.sampled_from(ARCHS), st.sampled_from(MODES)
DEVICE, NONE = st.sampled_from(["auto", "cpu", "cuda"]), st.none()
WHERE = {"--data": TEXT, "--data-dir": TEXT, "--device": DEVICE}


def of_train(name: str) -> st.SearchStrategy:
    """Return the strategy that draws values of a train.py option."""
    field, known = config.FIELDS[name], {"arch": ARCH, "mode": MODE}
    told = field.metadata["argparse"]
    if field.default is False:
        return NONE
    if "choices" in told:
        return st.sampled_from(list(told["choices"]))
    return known.get(name, NUMBER if "type" in told else TEXT)


TRAIN = {config.flag(name): of_train(name) for name in config.FIELDS}
PARTS = {"--impl": st.sampled_from(bench.STEPS), "--arch": ARCH, "--mode": MODE, "--budget": TEXT | NUMBER}
COUNTS = {f"--{name}": NUMBER for name in ("batch-size", "repeats", "steps", "warm-up")}
SCRIPTS = {  # required arguments, and options with their values
    "train": ([], TRAIN),
    "sweep": ([st.just("--list")], TRAIN),
    "freeze": ([st.just("table")], {"--arch": ARCH, "--num-classes": NUMBER}),
    "checkpoint": ([st.just("rebuild"), TEXT, st.just("--out"), TEXT], {"--init-from": TEXT}),
    "evaluation": ([TEXT], WHERE | {"--init-from": TEXT}),
    "report": ([TEXT], {"--out": TEXT, "--pack": NONE}),
    "analysis": ([TEXT], {"--data-dir": TEXT, "--device": DEVICE, "--overwrite": NONE}),
    "bench": ([st.sampled_from(list(bench.IMPLS))], WHERE | PARTS | COUNTS | {"--json": TEXT}),
    "data": ([TEXT], {"--data-dir": TEXT, "--image-size": NUMBER}),
}
WORK = {  # what each script calls after it has checked its options
    "train": ["train_side_by_side", "data.prepare.prepare", "data.downloading.fetch"],
    "sweep": ["prepare"],
    "evaluation": ["Evaluation"],
    "report": ["write_report"],
    "analysis": ["look_at"],
    "bench": [
        "speed",
        "memory",
        "loading",
        "startup",
        "profile",
        "data.prepare.prepare",
        "data.downloading.fetch",
    ],
    "data": ["prepare.prepare", "downloading.fetch"],
}


class Works(progress.OptionError):
    """Raised where a script would begin its work."""


def works(*_, **__):
    raise Works("the work begins")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_line_is_usable_or_refused_without_a_traceback(script, monkeypatch, tmp_path, capsys):
    module, (needed, options) = importlib.import_module(script), SCRIPTS[script]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("ARCHS", "MODES", "SEEDS", "GRID", "JOBS", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in WORK.get(script, ()):
        monkeypatch.setattr(f"{script}.{name}", works)
    flag = st.sampled_from(sorted(options)).flatmap(
        lambda flag: st.tuples(st.just(flag), options[flag] | ANY)
    )
    usual = st.sampled_from(sorted(options)).flatmap(lambda flag: st.tuples(st.just(flag), options[flag]))
    pairs = st.lists(usual, max_size=4) | st.lists(usual | flag, max_size=3)

    @settings(max_examples=-(-TRIES // len(SCRIPTS)), deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.tuples(*needed), pairs)
    def refused_or_usable(first, pairs):
        argv = [*first, *(word for pair in pairs for word in pair if word is not None)]
        try:
            status = progress.run(f"{script}.py", lambda: module.main(argv))
        except SystemExit as ended:  # --help
            status = ended.code
        said = capsys.readouterr().err
        assert status in (0, 2), argv
        assert "Traceback" not in said and said.count("\n") <= 6 and len(said) < 3000, argv

    refused_or_usable()
