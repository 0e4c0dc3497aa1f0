"""The options of a run: what a command line comes to, what is refused, and how --help shows them."""

import dataclasses

import pytest

import config
import progress
from config import FIELDS, OptionError, Options, parse_options


def parsed(line: str) -> Options:
    (options,), _ = parse_options(line.split(), "")
    return options


@pytest.mark.parametrize(
    "options, named",
    [
        ("--arch resnet33", "--arch resnet33"),
        ("--mode bnn", "--mode bnn"),
        ("--epochs 0", "--epochs 0"),
        ("--epochs two", "--epochs"),
        ("--lr nan", "--lr nan"),
        ("--batch-size -1", "--batch-size"),
        ("--milestones 2 1", "--milestones 2 1"),
        ("--seed -1", "--seed -1"),
        ("--seed 0 1 0", "--seed 0 1 0"),
        ("--seed 0 1 --log wandb", "--log wandb"),
        ("--memory none", "--memory"),
        ("--label-smoothing 1", "--label-smoothing"),
        ("--shortcut none", "--shortcut"),
        ("--no-such-option", "--no-such-option"),
        ("--epoch 3", "--epoch"),
        ("--resume --overwrite", "--resume"),
        ("--reset-bn", "--reset-bn"),
        ("--nonzeros 3", "--nonzeros 3"),
        ("--nonzeros 3 --conv-init binary", "--nonzeros 3"),
        ("--nonzeros 0 --conv-init sparse", "--nonzeros 0"),
        ("--nonzeros 1.5 --conv-init sparse", "--nonzeros"),
        ("--augment blur", "--augment blur"),
        ("--augment +", "--augment +"),
        ("--val-split 0 --early-stop 3", "--val-split 0"),
        ("--val-split 0 --schedule plateau", "--val-split 0"),
        ("--early-stop -1", "--early-stop -1"),
        ("--min-lr 0.2", "--min-lr 0.2"),
        ("--preset 000-4", "--preset"),
        ("--log comet", "--log"),
        ("--data ", "--data"),
        ("--image-size 100000", "--image-size"),
    ],
)
def test_an_option_that_no_run_could_use_is_a_line_or_two_and_exit_status_2(capsys, options, named):
    assert progress.run("train.py", lambda: parse_options(options.split(" "), "") and 0) == 2
    said = capsys.readouterr()
    assert named in said.err and said.err.count("\n") <= 2 and "Traceback" not in said.err


@pytest.mark.parametrize("name", [name for name in FIELDS if FIELDS[name].metadata["limits"]])
def test_a_number_may_take_its_limits_and_nothing_beyond(name):
    least, greatest = FIELDS[name].metadata["limits"]
    options = Options(lr=1e30, conv_init="sparse")  # to which --min-lr may rise; with which --nonzeros goes
    for value in (least, greatest):
        config.check(dataclasses.replace(options, **{name: value}))
    for value in (least - 1, greatest * 2):
        with pytest.raises(OptionError, match=config.flag(name)):
            config.check(dataclasses.replace(options, **{name: value}))


def test_the_least_that_a_command_line_can_say_is_the_published_run():
    assert parsed("") == Options() == config.defaults()
    published = {"arch": "resnet32", "mode": "bn_only", "data": "cifar10", "augment": "paper", "seed": 0}
    published |= {"epochs": 160, "batch_size": 128, "optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4}
    published |= {"schedule": "step", "lr": 0.1, "milestones": (80, 120), "gamma": 0.1, "bn_init": "uniform"}
    assert published.items() <= dataclasses.asdict(Options()).items()


def test_what_is_given_goes_before_a_preset_and_before_quick():
    assert parsed("--preset 000-1 --lr 0.5") == dataclasses.replace(config.defaults("000-1"), lr=0.5)
    quick = parsed("--quick --epochs 2 --preset best")
    assert quick == dataclasses.replace(config.defaults("best", quick=True), epochs=2)
    assert (quick.lr, quick.train_subset, quick.batch_size) == (1.0, 3000, 64)


def test_the_preset_of_the_pytorch_study_changes_what_trains_and_the_shortcuts_alone():
    study = dataclasses.replace(Options(), mode="bn_main", shortcut="projection_all", preset="001")
    assert parsed("--preset 001") == study
    assert parsed("--preset 001 --mode random") == dataclasses.replace(study, mode="random")


def test_a_preset_may_have_milestones_which_toml_writes_as_a_list(monkeypatch):
    monkeypatch.setitem(config.PRESETS, "short", {"epochs": 8, "milestones": [4, 6]})
    assert config.defaults("short").milestones == (4, 6)
    usual = config.defaults("short")
    assert config.differing(Options(milestones=(4, 6)), usual, "setting") == {"epochs": 160}


def test_modes_and_augmentations_have_one_spelling():
    assert parsed("--mode beta+gamma") == Options()
    assert parsed("--mode output+bn").mode == parsed("--mode bn_only+output").mode == "bn+output"
    assert parsed("--augment flip+crop") == parsed("--augment paper")


def test_each_seed_has_options_of_its_own():
    each, given = parse_options(["--seed", "3", "0", "--lr", "0.2"], "")
    assert each == [Options(seed=3, lr=0.2), Options(seed=0, lr=0.2)] and given == {"seed", "lr"}


def test_help_lists_every_option_once_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        parse_options(["--help"], "What this is for.\n\n    python train.py --quick")
    assert ended.value.code in (0, None)
    said = capsys.readouterr().out
    assert "What this is for.\n\n    python train.py --quick" in said, "as it was written"
    entries = [" ".join(entry.split()) for entry in said.split("\n  --")[1:]]
    for name, field in FIELDS.items():
        (entry,) = (entry for entry in entries if f"--{entry.split(' ')[0]}" == config.flag(name))
        if field.default not in (None, False):
            assert f"[{'80 120' if name == 'milestones' else field.default}]" in entry
    assert [title for title in config.SECTIONS.values() if f"\n{title}:\n" in said] == list(
        config.SECTIONS.values()
    )


def test_an_option_says_whether_it_belongs_to_what_is_run_or_to_how_fast_it_goes():
    assert config.names("variant", "setting", "logistics") == FIELDS.keys()
    assert config.names("logistics") == {
        *("data_dir", "device", "loader", "memory", "no_compile"),
        *("eval_every", "log", "out", "resume", "overwrite"),
    }
