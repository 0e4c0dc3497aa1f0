"""Tables are the same in every form: full precision in CSV, escaped in Markdown and LaTeX."""

import csv
import io

import pytest

from reporting.series import Mean
from reporting.tables import REPORTED, Table


@pytest.fixture
def files() -> dict[str, str]:
    rows = [
        ["a|b_*[^~\\<", Mean(1 / 3, None, 1), 12345, "1e5"],
        ["# & $ % {}", None, None, "007"],
        ["± ×", Mean(1000.5, 0.25, 3), 7, ""],
    ]
    return Table("t", ["what", "acc (%)", "bytes", "text"], rows).files()


def test_csv_has_full_precision_and_three_columns_of_a_mean(files):
    first, second, third = csv.DictReader(io.StringIO(files["csv"]))
    assert list(first) == ["what", "acc mean (%)", "acc std (%)", "acc n", "bytes", "text"]
    assert float(first["acc mean (%)"]) == 1 / 3 and first["acc std (%)"] == "" and first["bytes"] == "12345"
    assert second["acc mean (%)"] == "" and second["acc n"] == "0" and second["text"] == "007"
    assert third["acc std (%)"] == "0.25" and first["what"] == "a|b_*[^~\\<"


def test_markdown_is_escaped_and_numbers_stand_at_the_right(files):
    head, rule, first, second, third = files["md"].splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["what", "acc (%)", "bytes", "text"]
    assert [cell.endswith(":") for cell in rule.strip("|").split("|")] == [False, True, True, False]
    assert first.startswith(r"| a\|b\_\*\[^\~\\\< ")
    assert " ".join(first.split()).endswith("| 0.33 (n = 1) | 12,345 | 1e5 |")
    assert r"\# \& \$ % \{\}" in second and "007" in second and "1,000.50 ± 0.25 (n = 3)" in third


def test_latex_is_a_booktabs_tabular_and_escaped(files):
    lines = files["tex"].splitlines()
    assert lines[:3] == [r"% \usepackage{booktabs}", r"\begin{tabular}{lrrl}", r"\toprule"]
    assert lines[3] == r"what & acc (\%) & bytes & text \\" and lines[4] == r"\midrule"
    assert lines[5].startswith(
        r"a|b\_{*}{[}\^{}\~{}\textbackslash{}\textless{} & 0.33 (n = 1) & 12,345 & 1e5"
    )
    assert lines[6].startswith(r"\# \& \$ \% \{\} &  &  & 007")
    assert lines[7].startswith(r"$\pm$ $\times$ & 1,000.50 $\pm$ 0.25 (n = 3)")
    assert lines[8:] == [r"\bottomrule", r"\end{tabular}"]


def test_what_others_report_names_the_papers_networks():
    paper = REPORTED[REPORTED["source"] == "paper"].set_index(["mode", "architecture"])
    assert (
        paper["accuracy"]["bn_only", "resnet866"] == 82 and paper["trained"]["bn_only", "resnet866"] == 64736
    )
    assert paper["shown"]["all", "resnet14"] == "about 91" and paper["trained"]["all", "resnet14"] == 175258
