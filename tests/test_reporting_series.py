"""Settings are never mixed, and the runs of a series differ only in their seed."""

from pathlib import Path

import numpy as np
import pytest
from made_runs import write_run

from reporting import reading, series


def read(root: Path) -> list[reading.Run]:
    return reading.read_runs([str(root)], print)


@pytest.mark.parametrize(
    "other",
    [
        *({"epochs": 8}, {"quick": True}, {"train_subset": 10}, {"val_split": 10}),
        *({"data_title": "CIFAR-10 (not official)"}, {"image_size": 64}, {"fingerprint": "ff"}),
    ],
)
def test_settings_are_never_mixed(tmp_path, other):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, **other)
    settings = series.by_setting(read(tmp_path))
    assert [len(members) for *_, members in settings] == [1, 1]
    assert len({label for label, _, _ in settings}) == len({folder for _, folder, _ in settings}) == 2


def test_the_folder_of_a_setting_has_a_short_name():
    official, other = "CIFAR-10", "CIFAR-10 (not the official bytes)"
    for setting, folder in {
        (official, 160, False, None, 0, 32, "f"): "cifar10/160-epochs",
        (
            other,
            12,
            False,
            20000,
            5000,
            32,
            "f",
        ): "cifar10-other-bytes/12-epochs-20000-images-5000-validation",
        (official, 8, True, 3000, 0, 32, "f"): "cifar10/quick-8-epochs",
        (official, 8, True, 300, 0, 32, "f"): "cifar10/quick-8-epochs-300-images",
        ("Imagenette", 5, False, None, 0, 128, "f"): "imagenette/5-epochs-128-pixels",
        ("../../<é>", 1, False, None, 0, 32, "f"): "data/1-epochs",
    }.items():
        assert series.setting_names(setting)[1] == folder


def test_settings_with_the_same_short_name_get_different_folders(tmp_path):
    for title in ("my set", "my-set", "My Set!"):
        write_run(tmp_path / title, data_title=title)
    folders = [setting.folder for setting in series.by_setting(read(tmp_path))]
    assert sorted(folders) == ["my-set/4-epochs", "my-set/4-epochs-2", "my-set/4-epochs-3"]


@pytest.mark.parametrize("other", [{"milestones": [1]}, {"milestones": []}, {"schedule": "cosine"}])
def test_another_learning_rate_schedule_makes_another_series(tmp_path, other):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, **other)
    [(_, _, members)] = series.by_setting(read(tmp_path))
    text = {"milestones": "milestones 1", "schedule": "schedule cosine"}[next(iter(other))]
    text = "milestones none" if other == {"milestones": []} else text
    found = [(s.variant_text, s.results.index.tolist()) for s in series.series_of(members)]
    assert found == [("", [0]), (text, [1])]


def test_other_options_make_other_series_and_logistics_do_not(tmp_path):
    others = {}, {"out": "x", "memory": "stock"}, {"lr": 0.01}, {"dtype": "fp32"}, {"eval_every": 2}
    for seed, more in enumerate(others):
        write_run(tmp_path, seed=seed, **more)
    found = read(tmp_path)
    of = {s.variant_text: s.done for s in series.series_of(found)}
    assert of == {"": 3, "lr 0.01": 1, "dtype fp32": 1}, "the number format tells runs apart"
    assert len(series.series_of(found, by_machine=True)) == 4  # --memory stock counts as another machine


def test_a_seed_in_two_number_formats_counts_in_both(tmp_path):
    """The format of most runs is not named; if both have equally many runs, bf16 is not named."""
    for folder, dtype, seeds in (("a", "fp32", [0]), ("b", "bf16", [0]), ("c", "fp32", [1])):
        for seed in seeds:
            write_run(
                tmp_path / folder, seed=seed, dtype=dtype, final_test_acc=40.0 + seed + (dtype == "bf16")
            )
        of = {s.variant_text: s.mean("final_test_acc") for s in series.series_of(read(tmp_path))}
        if folder == "b":
            assert {text: (acc.mean, acc.n) for text, acc in of.items()} == {
                "": (41.0, 1),
                "dtype fp32": (40.0, 1),
            }
    assert {text: mean.n for text, mean in of.items()} == {"": 2, "dtype bf16": 1}


def test_a_seed_on_two_machines_counts_once_but_has_a_series_on_each(tmp_path):
    write_run(tmp_path / "a", device_name="one")
    write_run(tmp_path / "b", device_name="another")
    found = read(tmp_path)
    assert [s.done for s in series.series_of(found)] == [1]
    assert [s.done for s in series.series_of(found, by_machine=True)] == [1, 1]


def test_a_run_that_moved_to_another_machine_has_its_times_under_the_names_of_both(tmp_path):
    write_run(tmp_path, earlier_devices=("one",), device_name="another")
    [s] = series.series_of(read(tmp_path), by_machine=True)
    assert s.machine[0] == "one, then another"


def test_curves_have_a_column_per_seed_and_nan_where_not_evaluated(tmp_path):
    for seed in (0, 2**64 - 1):
        folder = write_run(tmp_path, seed=seed)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        lines[1] = lines[1].replace('"test_acc":', '"test_acc":null,"val_acc":')
        (folder / "metrics.jsonl").write_text("\n".join(lines))
    [s] = series.series_of(read(tmp_path))
    curves = s.curves("test_acc")
    assert curves.shape == (4, 2) and curves.columns.tolist() == [0, 2**64 - 1]
    assert np.isnan(curves.to_numpy()).tolist() == [[False] * 2, [True] * 2, [False] * 2, [False] * 2]
    assert s.mean("epoch_s").n == s.mean("images_per_s").n == 2
    assert s.mean("final_test_acc").mean == pytest.approx(curves.loc[4].mean())
