"""The report's answers are computed from the runs' summaries, with differences paired by seed."""

import csv
import statistics

import numpy as np
import pandas as pd
import pytest
from made_runs import change, write_run

import report
from records import Parent
from reporting import answers, reading, series

EPOCHS = 32


def parent(mode: str, epochs: int, test_acc: float, seed: int, **more) -> Parent:
    """Return a Parent, which config.json has for the parent run; `more` overrides its fields."""
    fields = {
        "run": "before",
        "mode": mode,
        "seed": seed,
        "variant": {},
        "epochs": epochs,
        "epochs_in_all": epochs,
        "epochs_done_in_all": epochs,
        "seconds_in_all": 2.0 * epochs,
        "device_name": "NVIDIA H200",
        "test_acc": test_acc,
        "fingerprint": "21d441f3",
        "train_subset": None,
        "val_images": 0,
        "processes": 1,
        "quick": False,
    }
    return Parent(**(fields | more))


def write_grids(root, seeds=(0, 1, 2), accs=None) -> None:
    """Write the runs that answer the questions of warm starts and retraining.

    `accs` may give final test accuracies (percent) by (what, seed), where `what` is the first argument of a
    call of `write` below. For a warm start, this is the number of epochs that train BatchNorm alone.
    """

    def write(what, seed, mode, epochs, before=None, **options):
        options |= {"parent": before, "init_from": "some run" if before else None}
        given = (accs or {}).get((what, seed))
        options |= {"final_test_acc": given} if given else {}
        write_run(root, "resnet14", mode, seed, epochs, analysis=False, **options)

    for seed in seeds:
        write("all", seed, "all", EPOCHS, milestones=[16, 24])
        for k in (2, 4):
            before = parent("bn_only", k, 40.0, seed)
            write(k, seed, "all", EPOCHS - k, before, milestones=[16 - k, 24 - k])
        before = parent("all", EPOCHS, 80.0 + seed, seed)
        write("kept", seed, "bn_only", 4, before, lr=0.01, milestones=[2, 3])
        write("kept, fast", seed, "bn_only", 4, before, milestones=[2, 3])
        write("redrawn", seed, "bn_only", 4, before, lr=0.01, milestones=[2, 3], reset_bn=True)
        write("more", seed, "all", 4, before, lr=0.01, milestones=[2, 3])


def settings(root) -> list[tuple]:
    return series.by_setting(reading.read_runs([str(root)], print))


def answered(root, question) -> answers.Answer:
    """Return the answer to `question` from the only setting whose runs answer it."""
    found = [question(series.series_of(members)) for _, _, members in settings(root)]
    (answer,) = [answer for answer in found if answer.drawn]
    return answer


def test_warm_starts_are_paired_by_seed_and_have_a_pooled_variance(tmp_path):
    """The expected interval is that of a two-way analysis of variance, worked out by hand."""
    finals = {"all": (80.0, 82.0, 81.0), 2: (80.5, 82.7, 81.4), 4: (79.0, 81.1, 79.8)}
    accs = {(what, seed): acc for what, each in finals.items() for seed, acc in enumerate(each)}
    write_grids(tmp_path, accs=accs)
    answer = answered(tmp_path, answers.warm_starts)
    rows = {row[1]: row for row in answer.table.rows}
    assert list(rows) == [0, 2, 4]
    assert rows[0][2].mean == pytest.approx(81.0) and rows[0][3] is None
    assert rows[2][3].mean == pytest.approx(0.5 + 0.1 / 3) and rows[2][3].n == 3
    assert rows[4][3].mean == pytest.approx(-31 / 30)
    # Residuals after subtracting the means of seeds and of columns, with 2 x 2 degrees of freedom
    left = [[0, -0.1, 0.1], [-1 / 30, 2 / 30, -1 / 30], [1 / 30, 1 / 30, -2 / 30]]
    variance = sum(each**2 for row in left for each in row) / 4
    interval = 3.495 * (2 * variance / 3) ** 0.5  # Student's t with 4 degrees of freedom, at 1 - 0.05 / 4
    assert rows[2][4] == rows[4][4] == pytest.approx(interval, rel=1e-3)
    assert answer.text == (
        f"ResNet-14: test accuracy with BatchNorm alone for the first k of {EPOCHS} epochs, compared with "
        f"everything from the start: k = 2, 0.53 points higher (± {interval:.2f}, n = 3: significant); "
        f"k = 4, 1.03 points lower (± {interval:.2f}, n = 3: significant)."
    )


def test_pooled_interval_and_slope_per_doubling_have_known_values():
    """The accuracies are those in results/; the changes at 4 and 8 epochs exceed the interval."""
    accs = {
        0: (64.97, 65.23, 66.03),
        1: (65.49, 64.21, 65.36),
        2: (63.53, 63.46, 64.41),
        4: (62.89, 61.53, 62.96),
        8: (56.05, 58.00, 58.26),
    }
    accs = pd.DataFrame(accs)
    changes = answers.pooled(accs)
    assert {k: round(change.mean.mean, 2) for k, change in changes.items()} == {
        1: -0.39,
        2: -1.61,
        4: -2.95,
        8: -7.97,
    }
    assert all(change.interval == pytest.approx(1.8148, abs=1e-4) for change in changes.values())
    doubling = answers.trend(accs[[1, 2, 4, 8]])
    assert (round(doubling.mean.mean, 2), round(doubling.interval, 2)) == (-2.41, 1.08)
    assert answers.pooled(accs[:1])[8].interval is None


def all_series(root) -> list[series.Series]:
    return [s for _, _, members in settings(root) for s in series.series_of(members)]


def test_the_epochs_of_a_setting_include_those_of_parent_runs(tmp_path):
    write_grids(tmp_path)
    found = {label: members for label, _, members in settings(tmp_path)}
    assert [len(members) for members in found.values()] == [12, 9]
    assert list(found) == ["CIFAR-10, 36 epochs", "CIFAR-10, 32 epochs"]
    steps = {label: {run.config.variant for run in members} for label, members in found.items()}
    assert all(("milestones", (34, 35)) in variant for variant in steps["CIFAR-10, 36 epochs"])
    assert not any("milestones" in dict(variant) for variant in steps["CIFAR-10, 32 epochs"])


def test_retraining_is_compared_with_the_parent_run_of_each_seed(tmp_path):
    finals = {
        "kept": (80.1, 81.3, 81.9),
        "kept, fast": (79.0, 80.0, 80.7),
        "redrawn": (60.0, 62.0, 61.0),
        "more": (81.0, 82.0, 83.0),
    }
    accs = {(what, seed): acc for what, each in finals.items() for seed, acc in enumerate(each)}
    write_grids(tmp_path, accs=accs)
    answer = answered(tmp_path, answers.retraining)
    changes = {(row[1], row[2]): row[5] for row in answer.table.rows}
    assert changes["BatchNorm, kept", "0.01"].mean == pytest.approx(statistics.fmean([0.1, 0.3, -0.1]))
    assert changes["BatchNorm, kept", "0.1"].mean == pytest.approx(-1.1)
    assert changes["BatchNorm, redrawn", "0.01"].mean == pytest.approx(-20.0)
    assert changes["everything", "0.01"] == pytest.approx((1.0, 0.0, 3)) and len(changes) == 4
    assert "training everything for 32 epochs gives 81.00 %. After 4 more epochs of BatchNorm" in answer.text
    interval = 6.205 * 0.2 / 3**0.5  # for the two learning rates that were tried
    kept = f"0.10 points higher (± {interval:.2f}, n = 3: not significant) at learning rate 0.01, "
    assert f"{kept}the better of 2, with gamma and beta kept" in answer.text
    assert "20.00 points lower (± 2.48, n = 3: significant)" in answer.text
    everything = "1.00 points higher (± 0.00, n = 3: significant) at learning rate 0.01."
    assert answer.text.endswith(f"After as many more epochs of everything, it is {everything}")


def test_one_seed_gives_no_confidence_interval(tmp_path):
    write_grids(tmp_path, seeds=[0])
    assert "(n = 1: no confidence interval)" in answered(tmp_path, answers.retraining).text


def test_the_page_answers_warm_starts_and_retraining(tmp_path):
    write_grids(tmp_path / "runs")
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("; k = 4, ") == 1
    assert page.count("more epochs of BatchNorm alone, test accuracy is") == 1
    for name, rows in (("warmstart", 3), ("retrain", 4)):
        (table,) = (tmp_path / "out").rglob(f"{name}.csv")
        assert len(list(csv.DictReader(table.open()))) == rows
        assert table.with_suffix(".png").is_file()


def test_runs_with_different_parent_runs_are_told_apart(tmp_path):
    """Parent runs differ in their options, seed or images, or are replaced or preceded by a weight file."""
    write_grids(tmp_path, seeds=[0])
    plain = {"analysis": False, "milestones": [16, 24]}
    write_run(tmp_path, "resnet14", "all", 0, EPOCHS, init_from="a/w.pth", parent=None, **plain)
    lr = {**plain, "milestones": [12, 20], "init_from": "some run"}
    before = parent("bn_only", 4, 40.0, 0, variant={"lr": 0.05})
    write_run(tmp_path / "lr", "resnet14", "all", 0, EPOCHS - 4, parent=before, **lr)
    write_run(tmp_path / "seed", "resnet14", "all", 1, EPOCHS - 4, parent=parent("bn_only", 4, 40.0, 0), **lr)
    texts = {s.variant_text for s in all_series(tmp_path) if s.mode == "all"}
    assert {
        "init_from w",
        "init_from 4 epochs of bn_only",
        "init_from 4 epochs of bn_only, lr 0.05",
    } < texts
    assert "init_from 4 epochs of bn_only, seed 0" in texts
    other_images = parent("bn_only", 4, 40.0, 0, fingerprint="ff")
    write_run(tmp_path / "images", "resnet14", "all", 0, EPOCHS - 4, parent=other_images, **lr)
    variants = {s.variant_text for s in all_series(tmp_path / "images")}
    assert "init_from some run, milestones 12 20" in variants, "its epochs do not count as that parent's"
    from_file = parent("bn_only", 4, 40.0, 0, variant={"init_from": "w"})
    write_run(tmp_path / "file", "resnet14", "all", 0, EPOCHS - 4, parent=from_file, **lr)
    answer = answered(tmp_path, answers.warm_starts)
    rows = [tuple(row[:2]) for row in answer.table.rows]
    network = "ResNet-14"
    assert rows[:3] == [(network, 0), (network, 2), (network, 4)] and rows.count((network, 0)) == 2
    assert {(f"{network}, lr 0.05", 4), (f"{network}, from seed 0", 4)} < set(rows) and len(rows) == 9
    every = [(run.config.options, run) for run in reading.read_runs([str(tmp_path)], print)]
    plain, begun = (
        [run for options, run in every if (options.mode, options.init_from) == ("all", init_from)]
        for init_from in (None, "a/w.pth")
    )
    first = {row[2].mean for row in answer.table.rows if row[1] == 0}
    assert first == {run.summary.final_test_acc for run in plain + begun} and len(plain + begun) == 2


def test_parent_runs_with_other_subsets_or_processes_are_told_apart(tmp_path):
    options = {"init_from": "some run", "epochs": 4, "analysis": False}
    others = {}, {"train_subset": 50}, {"quick": True}, {"val_images": 5}, {"processes": 2}
    for seed, other in enumerate(others):
        before = parent("all", 8, 50.0, seed, variant={"milestones": ()})
        write_run(tmp_path, "resnet14", "bn_only", seed, parent=before.model_copy(update=other), **options)
    common = "init_from 8 epochs of all, milestones none"
    texts = {s.variant_text.split(", milestones 10")[0].removeprefix(common) for s in all_series(tmp_path)}
    assert texts == {"", ", train_subset 50", ", quick True", ", val_images 5", ", processes 2"}


def test_a_warm_start_from_a_file_is_compared_with_a_plain_run_from_it(tmp_path):
    """As in a sweep, only the first part of the warm start draws BatchNorm anew and warms up."""
    own = {"init_from": "w.pth", "reset_bn": True, "warmup_epochs": 1, "analysis": False}
    write_run(tmp_path, "resnet14", "all", 0, EPOCHS, milestones=[16, 24], **own)
    begun = {"init_from": "w", "reset_bn": True, "schedule": "constant", "warmup_epochs": 1}
    before = parent("bn_only", 4, 40.0, 0, variant=begun)
    then = {"init_from": "x", "parent": before, "milestones": [12, 20], "analysis": False}
    write_run(tmp_path, "resnet14", "all", 0, EPOCHS - 4, **then)
    rows = answered(tmp_path, answers.warm_starts).table.rows
    assert [row[:2] for row in rows] == [["ResNet-14", 0], ["ResNet-14", 4]]


def test_settings_are_chosen_on_validation_and_compared_on_test_images(tmp_path):
    """The setting with the highest test accuracy is not the chosen one."""
    found = {"": (40.0, 41.0), "lr": (45.0, 43.0), "lr and more": (44.0, 50.0)}
    options = {"": {}, "lr": {"lr": 1.0}, "lr and more": {"lr": 1.0, "schedule": "cosine"}}
    for name, (validation, test) in found.items():
        for seed in (0, 1):
            accs = {"best_val_acc": validation + seed, "final_test_acc": test + seed * (1 + (name == "lr"))}
            validated(tmp_path, accs, seed=seed, **options[name])
    write_run(tmp_path / "apart", arch="resnet32", analysis=False)  # without validation images
    answer = answered(tmp_path, answers.tuning)
    assert [row[2] for row in answer.table.rows] == ["lr 1", "lr 1, schedule cosine", "defaults"]
    *_, fresh, change, interval = answer.table.rows[0]
    assert fresh is None, "every seed chose"
    assert change == pytest.approx((2.5, 0.5**0.5, 2)) and interval == pytest.approx(12.706 * 0.5, rel=1e-3)
    told = "2.50 points higher (± 6.35, n = 2: not significant) than that of the defaults."
    best = "of 3 settings, lr 1 is the best on validation images with seeds 0, 1. With the same seeds, its"
    assert f"{best} test accuracy is {told}" in answer.text
    for seed in range(3, 6):  # seeds that no other setting has
        validated(tmp_path, {"best_val_acc": 99.0}, seed=seed, lr=2.0)
    answer = answered(tmp_path, answers.tuning)
    assert [row[2] for row in answer.table.rows] == ["lr 1", "lr 1, schedule cosine", "defaults"]
    assert f"{best} test accuracy is {told}" in answer.text


def test_the_gain_of_the_chosen_setting_is_measured_on_other_seeds(tmp_path):
    """Seed 0 chooses among three settings; two of them also have the seeds 1 and 2."""
    found = {0.1: (35.94, 37.35, 38.15, 38.47), 1.0: (42.06, 41.26, 41.36, 41.64), 3.0: (38.78, 38.92)}
    for lr, (validation, *tests) in found.items():
        for seed, test in enumerate(tests):
            accs = {"best_val_acc": validation - 9 * seed, "final_test_acc": test}
            validated(tmp_path, accs, seed=seed, **({"lr": lr} if lr != 0.1 else {}))
    answer = answered(tmp_path, answers.tuning)
    assert [row[2] for row in answer.table.rows] == ["lr 1", "lr 3", "defaults"], "ranked by seed 0 alone"
    best, other, usual = (row[3:] for row in answer.table.rows)
    assert [cell.n for cell in best[:2]] == [1, 1] and best[2].n == usual[2].n == 2
    assert best[0].mean == 42.06 and best[1].mean == 41.26
    assert (round(best[3].mean, 3), best[3].n) == (3.19, 2) and best[4] == pytest.approx(0.2541, abs=1e-3)
    assert other[2] is None and other[3].n == 1 and other[4] is None
    told = "3.19 points higher (± 0.25, n = 2: significant) than that of the defaults."
    assert f"with seed 0. With other seeds, its test accuracy is {told}" in answer.text


def test_settings_are_named_by_the_options_that_not_all_share(tmp_path):
    for more in ({}, {"lr": 1.0}):
        validated(tmp_path, {"best_val_acc": 50.0}, milestones=[], label_smoothing=0.1, **more)
    rows = answered(tmp_path, answers.tuning).table.rows
    assert {row[2] for row in rows} == {"defaults", "lr 1"}


def validated(root, accs: dict, **options) -> None:
    """Write a run with ten validation images and these accuracies in its summary."""
    write_run(root, val_split=10, analysis=False, **accs, **options)


def test_intervals_use_the_tabulated_quantiles_of_students_t():
    quantiles = {1: 12.706, 2: 4.303, 5: 2.571, 30: 2.042}
    for freedom, quantile in quantiles.items():
        of = pd.Series(np.arange(freedom + 1.0))
        found = answers.change(of, of * 0)
        assert found.interval == pytest.approx(quantile * of.std() / (freedom + 1) ** 0.5, rel=1e-3)


def test_runs_with_an_unusable_parent_are_named_and_left_out(tmp_path):
    told = []
    rubbish = [{"run": None}, {"epochs": -1}, {"epochs_in_all": 10**7}, {"test_acc": 101.0}]
    rubbish += [{"variant": {"lr": [[]]}}, {"newer_field": 1}]
    for seed, each in enumerate(rubbish):
        before = parent("all", 3, 50.0, seed)
        folder = write_run(tmp_path, seed=seed, init_from="a", parent=before)
        change("config.json", **{f"parent__{name}": value for name, value in each.items()})(folder)
    write_run(tmp_path, seed=8, parent=parent("all", 3, 50.0, 8))  # without --init-from
    write_run(tmp_path, seed=9)
    assert len(reading.read_runs([str(tmp_path)], told.append)) == 1
    assert len(told) == 7 and all(line.startswith("left out ") for line in told)
