"""Checkpoints that are due by steps or by the clock, and stay due until there is one."""

from qkv_jax.training import SaveTimes


def test_the_multiples_of_each_interval_are_due():
    times = SaveTimes(5, every=(4, 0, 7))
    due = []
    for step in range(6, 30):
        if times.due(step):
            due.append(step)
            times.saved(step)
    assert due == [7, 8, 12, 14, 16, 20, 21, 24, 28]


def test_what_was_not_saved_when_it_was_due_stays_due():
    times = SaveTimes(0, every=(5,))
    assert not times.due(4) and times.due(5) and times.due(6)
    times.saved(6)
    assert not times.due(9) and times.due(10)


def test_minutes_count_from_the_last_checkpoint_whatever_made_it():
    now = 1000.0
    times = SaveTimes(3, every=(10,), minutes=0.5, clock=lambda: now)
    now += 29
    assert not times.late()
    now += 1
    assert times.late() and not times.due(9)
    times.saved(9)
    now += 29
    assert not times.late() and times.due(10)
    times.saved(10)
    now += 29
    assert not times.late()


def test_without_intervals_nothing_is_ever_due():
    now = 0.0
    times = SaveTimes(0, clock=lambda: now)
    now = 1e9
    assert not times.due(10**9) and not times.late()
