"""Tables have full precision in CSV, and are escaped in Markdown and LaTeX."""

import csv
import io

import pytest
from made_runs import write_run

from reporting.reading import read_runs
from reporting.series import Mean, by_setting, series_of
from reporting.tables import REPORTED, Table, accuracy, stored


@pytest.fixture
def files() -> dict[str, str]:
    rows = [
        ["a|b_*[^~\\<", Mean(1 / 3, None, 1), 12345, "1e5"],
        ["# & $ % {}", None, None, "007"],
        ["± ×", Mean(1000.5, 0.25, 3), 7, ""],
    ]
    return Table("t", ["what", "acc (%)", "bytes", "text"], rows).files()


def test_csv_has_full_precision_and_three_columns_per_mean(files):
    first, second, third = csv.DictReader(io.StringIO(files["csv"]))
    assert list(first) == ["what", "acc mean (%)", "acc std (%)", "acc n", "bytes", "text"]
    assert float(first["acc mean (%)"]) == 1 / 3 and first["acc std (%)"] == "" and first["bytes"] == "12345"
    assert second["acc mean (%)"] == "" and second["acc n"] == "0" and second["text"] == "007"
    assert third["acc std (%)"] == "0.25" and first["what"] == "a|b_*[^~\\<"


def test_markdown_is_escaped_and_numbers_are_right_aligned(files):
    head, rule, first, second, third = files["md"].splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["what", "acc (%)", "bytes", "text"]
    assert [cell.endswith(":") for cell in rule.strip("|").split("|")] == [False, True, True, False]
    assert first.startswith(r"| a\|b\_\*\[^\~\\\< ")
    assert " ".join(first.split()).endswith("| 0.33 (n = 1) | 12,345 | 1e5 |")
    assert r"\# \& \$ % \{\}" in second and "007" in second and "1,000.50 ± 0.25 (n = 3)" in third


def test_latex_is_an_escaped_booktabs_tabular(files):
    lines = files["tex"].splitlines()
    assert lines[:3] == [r"% \usepackage{booktabs}", r"\begin{tabular}{lrrl}", r"\toprule"]
    assert lines[3] == r"what & acc (\%) & bytes & text \\" and lines[4] == r"\midrule"
    assert lines[5].startswith(
        r"a|b\_{*}{[}\^{}\~{}\textbackslash{}\textless{} & 0.33 (n = 1) & 12,345 & 1e5"
    )
    assert lines[6].startswith(r"\# \& \$ \% \{\} &  &  & 007")
    assert lines[7].startswith(r"$\pm$ $\times$ & 1,000.50 $\pm$ 0.25 (n = 3)")
    assert lines[8:] == [r"\bottomrule", r"\end{tabular}"]


def test_published_values_include_the_papers_networks():
    paper = REPORTED[REPORTED["source"] == "paper"].set_index(["mode", "architecture"])
    assert (
        paper["accuracy"]["bn_only", "resnet866"] == 82 and paper["trained"]["bn_only", "resnet866"] == 64736
    )
    assert paper["shown"]["all", "resnet14"] == "about 91" and paper["trained"]["all", "resnet14"] == 175258


def test_stored_sizes_are_listed_with_accuracies_smallest_first(tmp_path):
    """Runs with --init-from are left out: their initial weights would have to be stored as well."""
    for mode, acc in (("all", 91.0), ("bn_only", 48.0), ("random", 27.0)):
        write_run(tmp_path, mode=mode, final_test_acc=acc, checkpoint_bytes=int(100 * acc), full_bytes=10_000)
    write_run(tmp_path, mode="bn_only", init_from="some run", final_test_acc=90.0)
    table = stored(series_of(read_runs([str(tmp_path)], print)))
    rows = [(mode, kept, share, acc.mean) for _, mode, _, kept, share, acc in table.rows]
    assert rows == [("random", 2700, 27.0, 27.0), ("bn_only", 4800, 48.0, 48.0), ("all", 9100, 91.0, 91.0)]


def test_published_values_of_other_data_sets_are_not_shown(tmp_path):
    write_run(tmp_path, "resnet50", "all", data_title="Imagenette", image_size=128)
    (setting,) = by_setting(read_runs([str(tmp_path)], print))
    table = accuracy(series_of(setting.runs), setting)
    assert table.columns[-1] == "Keras study (%)" and [row[-1] for row in table.rows] == ["95", "85"]
