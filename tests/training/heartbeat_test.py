"""The file that says a run is alive: whole at every moment, seldom written, true at the end."""

import datetime
import json
import os

import pytest

from qkv_jax.training.heartbeat import Heartbeat


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "heartbeat.json"


def read(path):
    return json.loads(path.read_text())


def test_it_says_what_runs_where_and_how_far_it_is(path):
    Heartbeat(path, process=3).beat(250, loss=1.5)
    found = read(path)
    assert (found["status"], found["step"], found["loss"]) == ("running", 250, 1.5)
    assert (found["pid"], found["process"]) == (os.getpid(), 3)
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(found["time"])
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)


def test_it_is_written_no_more_often_than_asked_and_a_mark_at_once(path, clock):
    heartbeat = Heartbeat(path, every=10, clock=clock)
    seen = []
    for step in range(1, 30):
        clock.now += 4
        heartbeat.beat(step)
        if read(path)["step"] == step:
            seen.append(step)
    assert seen == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28]
    heartbeat.mark("stopped by SIGTERM")
    assert read(path)["status"] == "stopped by SIGTERM" and read(path)["step"] == 29


def test_it_tells_the_longest_pause_so_far(path, clock):
    heartbeat = Heartbeat(path, every=0, clock=clock)
    pauses = []
    for seconds in (3, 7.5, 2):
        clock.now += seconds
        heartbeat.beat(1)
        pauses.append(read(path)["longest_pause"])
    assert pauses == [3, 7.5, 7.5]


def test_an_error_is_noted_and_goes_on_its_way(path):
    heartbeat = Heartbeat(path)
    heartbeat.beat(7, loss=2.0)
    with pytest.raises(ValueError, match="too"), heartbeat:
        raise ValueError("too\nlarge")
    assert read(path)["status"] == "failed: ValueError too large" and read(path)["step"] == 7


def test_without_an_error_the_last_word_stays(path):
    heartbeat = Heartbeat(path)
    with heartbeat:
        heartbeat.mark("finished")
    assert read(path)["status"] == "finished"


def test_what_is_not_finite_is_a_string(path):
    Heartbeat(path).beat(1, loss=float("nan"))
    assert read(path)["loss"] == "nan"


def test_a_disk_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    heartbeat = Heartbeat(tmp_path / "file" / "heartbeat.json")
    heartbeat.beat(1)
    heartbeat.mark("finished")
