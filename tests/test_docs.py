"""Options, links and commands in the documentation match the code."""

import json
import re
import shlex
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest

import config

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "results").glob("*.md")])
IN_WORDS = ("dtype", "loader", "nonzeros")  # described in words: they depend on the machine or the network
MODES = ("bn_only", "random", "all")  # the columns of README's table of accuracies
on_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def options_of(page: str) -> list[tuple[str, str]]:
    """Return the options in a page's tables of options, with their defaults as text."""
    text = (ROOT / "docs" / page).read_text()
    tables = re.findall(r"^\| option \| default \|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    cells = [line.strip("|").split("|") for table in tables for line in table.splitlines()[1:]]
    return [(name.strip("` -").replace("-", "_"), default.strip("` ")) for name, default, _ in cells]


def test_every_option_is_in_a_table_with_its_default():
    listed = options_of("training.md") + options_of("data.md")
    assert sorted(name for name, _ in listed) == sorted(config.FIELDS)
    for name, text in listed:
        default = config.FIELDS[name].default
        if name in IN_WORDS:
            assert text, name
        elif default is None or default is False:
            assert text == "", name
        else:
            written = float(text) if isinstance(default, float) else text
            assert config.show(written) == config.show(default), name


@on_every_page
def test_links_within_the_repository_have_targets(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        name, _, section = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if section:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\s-]", "", title.lower()).replace(" ", "-") for title in titles]
            assert section in anchors, link


def test_train_accepts_the_documented_commands():
    parser, form = config.make_parser(""), re.compile(r"(?:python|=\d) train\.py (--(?!help)[^`\n;]*)")
    commands = [command for page in PAGES for command in form.findall(page.read_text())]
    assert len(commands) > 20
    for command in commands:
        arguments = re.sub(r"\$\w+", "1", command)
        parser.parse_args(shlex.split(arguments, comments=True))


def test_the_readmes_accuracies_are_those_of_results():
    """Where there are several seeds, it has their mean."""
    text, found, shown = (ROOT / "README.md").read_text(), defaultdict(list), {}
    for file in (ROOT / "results" / "runs").glob("*/summary.json"):
        summary = json.loads(file.read_text())
        if (summary["epochs_done"], summary["variant"]) == (160, {}):
            found[summary["arch"], summary["mode"]].append(summary)
    for row in re.findall(r"^\| ResNet-(\d+ \|.*) \|$", text, re.MULTILINE):
        depth, parameters, *accs = (cell.strip(" *%") for cell in row.split("|")[:5])
        of = found[f"resnet{depth}", "bn_only"][0]
        share = of["params_trained"] / of["params_total"]
        assert parameters == f"{of['params_trained']:,} ({share:.2%})".replace("%", " %")
        shown |= {(f"resnet{depth}", mode): float(acc) for mode, acc in zip(MODES, accs, strict=True) if acc}
    means = {key: fmean(summary["final_test_acc"] for summary in found[key]) for key in shown}
    assert shown == pytest.approx(means, abs=0.0501)
    assert shown.keys() == {key for key in found if key[1] in MODES}


def test_the_readme_has_at_most_900_words():
    assert len((ROOT / "README.md").read_text().split()) <= 900
