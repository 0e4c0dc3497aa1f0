"""Tests of config.py: how a command line is read, which options are refused, and what --help shows."""

import dataclasses

import pytest

import config
import progress
import runs
from config import FIELDS, OptionError, Options, parse_options


def parsed(line: str) -> Options:
    (options,), _ = parse_options(line.split(), "")
    return options


WHOLE_NUMBERS = [n for n, field in FIELDS.items() if field.metadata["argparse"].get("type") is int]


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
        ("--image-size 7", "--image-size 7"),
        ("--lr 1e308", "--lr 1e+308"),
        ("--gamma 1e308", "--gamma 1e+308: must be from 0 to 1"),
        ("--gamma 1e30 --milestones 1 2 3 4 5 6 7 8 9 10 11 12", "--gamma 1e+30"),
        ("--momentum 2", "--momentum 2"),
        ("--warmup-epochs 999999999999", "--warmup-epochs 999999999999"),
        ("--warmup-epochs 161", "--warmup-epochs 161: must be at most --epochs, 160"),
        ("--quick --warmup-epochs 9", "--warmup-epochs 9: must be at most --epochs, 8"),
        ("--epochs 1000001", "--epochs 1000001"),
        ("--patience 1000001", "--patience 1000001"),
        ("--early-stop 1000001", "--early-stop 1000001"),
        ("--milestones 1 1000001", "--milestones 1 1000001"),
        ("--per-channel 577", "--per-channel 577: must be at most 576"),
        ("--mode random --arch resnet50 --per-channel 4609", "--per-channel 4609: must be at most 4608"),
        ("--arch resnet9998_w1000", "--arch resnet9998_w1000 is too large"),
        ("--data-dir ~no_such_user", "--data-dir ~no_such_user"),
        ("--data a\u00a0b", "must be spelt without U+00A0"),
        ("--init-from caf\udce9.pt", "must be spelt without U+DCE9"),
        ("--data-dir " + "a" * 5000, "--data-dir aaa"),
        *((f"{config.flag(name)} {'9' * 5000}", config.flag(name)) for name in WHOLE_NUMBERS),
    ],
)
def test_an_unusable_option_gives_a_line_or_two_and_exit_status_2(capsys, options, named):
    assert progress.run("train.py", lambda: parse_options(options.split(" "), "") and 0) == 2
    said = capsys.readouterr()
    assert named in said.err and said.err.count("\n") <= 2 and "Traceback" not in said.err
    assert len(said.err) < 700, "not all of a value that is thousands of characters long"


@pytest.mark.parametrize("name", [name for name in FIELDS if FIELDS[name].metadata["limits"]])
def test_a_number_must_lie_within_its_limits(name):
    least, greatest = FIELDS[name].metadata["limits"]
    greatest = 64 * 9 if name == "per_channel" else greatest  # the weights of resnet32's largest filter
    # --min-lr is at most --lr, --warmup-epochs at most --epochs, and --nonzeros needs --conv-init sparse
    options = Options(lr=1e30, epochs=10**6, conv_init="sparse")
    for value in (least, greatest):
        config.check(dataclasses.replace(options, **{name: value}))
    for value in (least - 1, greatest * 2):
        with pytest.raises(OptionError, match=config.flag(name)):
            config.check(dataclasses.replace(options, **{name: value}))


def test_an_empty_command_line_gives_the_published_run():
    assert parsed("") == Options() == config.defaults()
    published = {"arch": "resnet32", "mode": "bn_only", "data": "cifar10", "augment": "paper", "seed": 0}
    published |= {"epochs": 160, "batch_size": 128, "optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4}
    published |= {"schedule": "step", "lr": 0.1, "milestones": (80, 120), "gamma": 0.1, "bn_init": "uniform"}
    assert published.items() <= dataclasses.asdict(Options()).items()


def test_given_options_override_a_preset_and_quick():
    assert parsed("--preset 000-1 --lr 0.5") == dataclasses.replace(config.defaults("000-1"), lr=0.5)
    quick = parsed("--quick --epochs 2 --preset best")
    assert quick == dataclasses.replace(config.defaults("best", quick=True), epochs=2)
    assert (quick.lr, quick.train_subset, quick.batch_size) == (1.0, 3000, 64)


def test_preset_001_changes_only_the_mode_and_the_shortcuts():
    study = dataclasses.replace(Options(), mode="bn_main", shortcut="projection_all", preset="001")
    assert parsed("--preset 001") == study
    assert parsed("--preset 001 --mode random") == dataclasses.replace(study, mode="random")


def test_a_list_of_milestones_in_a_preset_becomes_a_tuple(monkeypatch):
    monkeypatch.setitem(config.PRESETS, "short", {"epochs": 8, "milestones": [4, 6]})
    assert config.defaults("short").milestones == (4, 6)
    usual = config.defaults("short")
    assert config.differing(Options(milestones=(4, 6)), usual, "setting") == {"epochs": 160}


def test_modes_and_augmentations_are_normalised_to_one_spelling():
    assert parsed("--mode beta+gamma") == Options()
    assert parsed("--mode output+bn").mode == parsed("--mode bn_only+output").mode == "bn+output"
    assert parsed("--augment flip+crop") == parsed("--augment paper")


def test_each_seed_gets_its_own_options():
    each, given = parse_options(["--seed", "3", "0", "--lr", "0.2"], "")
    assert each == [Options(seed=3, lr=0.2), Options(seed=0, lr=0.2)] and given == {"seed", "lr"}


IDLE = [
    ("--momentum 0.5 --optimizer adam", "--momentum with --optimizer adam"),
    (
        "--gamma 0.5 --milestones 3 --schedule cosine",
        "--gamma with --schedule cosine, --milestones with --schedule",
    ),
    ("--gamma 0.5 --schedule constant", "--gamma with --schedule constant"),
    ("--milestones 3 --schedule plateau", "--milestones with --schedule plateau"),
    (
        "--conv-init binary --bn-init ones --init-from w.pt",
        "--conv-init with --init-from, --bn-init with --init-from",
    ),
    ("--conv-init sparse --nonzeros 3 --init-from w.pt", "--nonzeros with --init-from"),
    ("--min-lr 0.01 --patience 3", "--min-lr with --schedule step, --patience with --schedule step"),
    ("--per-channel 3", "--per-channel with --mode bn_only"),
    ("--shortcut pad --arch vgg11", "--shortcut with --arch vgg11"),
    ("--momentum 0.5 --optimizer adam --preset 000-1", "--momentum with --optimizer adam"),
    ("--milestones 3 --schedule cosine --quick", "--milestones with --schedule cosine"),
]


@pytest.mark.parametrize("line, said", IDLE)
def test_options_without_effect_give_one_note_and_do_not_change_the_name(line, said):
    notes, words = [], line.split()
    (options, again), given = parse_options([*words, "--seed", "0", "1"], "", notes.append)
    assert len(notes) == 1 and notes[0].startswith("without effect: ") and said in notes[0]
    named = {name for name in given if f"{config.flag(name)} with" in notes[0]}
    usual = config.defaults(options.preset, options.quick)
    assert named and not named & config.differing(options, usual, "variant", "setting").keys()
    assert not any(name in runs.run_name(options, "cifar10") for name in named)
    assert dataclasses.replace(again, seed=0) == options


@pytest.mark.parametrize(
    "line",
    [
        "--bn-init ones --init-from w.pt --reset-bn",
        "--mode random --per-channel 3 --momentum 0.5 --gamma 0.5 --milestones 3",
        "--schedule plateau --patience 3 --min-lr 0.01 --gamma 0.5",
        "--schedule cosine --min-lr 0.01 --conv-init binary --shortcut pad",
        "--preset 000-1",
    ],
)
def test_options_with_an_effect_are_kept_without_a_note(line):
    notes = []
    (options,), given = parse_options(line.split(), "", notes.append)
    usual = config.defaults(options.preset)
    assert not notes and given - {"preset"} == config.differing(
        options, usual, "variant", "setting"
    ).keys() - {"preset"}


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


def test_every_option_has_a_role():
    assert config.names("variant", "setting", "logistics") == FIELDS.keys()
    assert config.names("logistics") == {
        *("data_dir", "device", "loader", "memory", "no_compile"),
        *("eval_every", "log", "out", "resume", "overwrite"),
    }
