"""The learning rate follows the schedule in the options, and training stops early only if they say so."""

import pytest

from config import Options
from step import Schedule


def test_lr_steps_at_80_and_120():
    schedule = Schedule(steps_per_epoch=390, options=Options())
    assert schedule.lr(0) == schedule.lr(80 * 390 - 1) == 0.1
    assert schedule.lr(80 * 390) == schedule.lr(120 * 390 - 1) == pytest.approx(0.01)
    assert schedule.lr(120 * 390) == schedule.lr(160 * 390 - 1) == pytest.approx(0.001)


def test_cosine_ends_at_zero_and_warm_up_rises_linearly():
    schedule = Schedule(10, Options(schedule="cosine", lr=1.0, epochs=5, warmup_epochs=1))
    assert [schedule.lr(i) for i in range(10)] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert schedule.lr(10) == 1.0 and schedule.lr(30) == pytest.approx(0.5)
    assert schedule.lr(50) == pytest.approx(0, abs=1e-12)
    assert Schedule(10, Options(schedule="constant", lr=0.3, milestones=(1,))).lr(999) == 0.3


def test_plateau_cuts_down_to_a_floor_and_survives_a_resume():
    def plateau() -> Schedule:
        return Schedule(1, Options(schedule="plateau", lr=1.0, min_lr=0.05, patience=3))

    schedule = plateau()
    for accuracy in (50.0, 50.0, 49.0):
        schedule.epoch_ended(accuracy)
    assert schedule.lr(3) == 1.0
    again = plateau()
    again.load_state_dict(schedule.state_dict())
    again.epoch_ended(50.0)
    assert again.lr(4) == pytest.approx(0.1)
    again.epoch_ended(60.0)
    third = plateau()
    third.load_state_dict(again.state_dict())
    for _ in range(3):
        assert third.lr(5) == pytest.approx(0.1), "a gain starts the count anew"
        third.epoch_ended(60.0)
    assert third.lr(8) == 0.05 and not third.stopped
    with pytest.raises(KeyError):
        plateau().load_state_dict({"factor": 1.0, "best_loss": 2.0})
    assert Schedule(1, Options(schedule="cosine", lr=1.0, min_lr=0.1, epochs=10)).lr(10) == pytest.approx(0.1)


def test_early_stopping_counts_from_the_best_epoch_despite_rate_cuts():
    schedule = Schedule(1, Options(schedule="plateau", lr=1.0, patience=2, early_stop=4))
    ends = []
    for accuracy in (10.0, 20.0, 19.0, 20.0, 21.0, 21.0, 20.0, 21.0, 20.0):
        schedule.epoch_ended(accuracy)
        ends.append(schedule.stopped)
    assert ends == [False] * 8 + [True]
    assert schedule.lr(9) == pytest.approx(1e-3), "cut after epochs 4, 7 and 9"
