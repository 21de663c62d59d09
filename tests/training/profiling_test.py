"""Profiles: which steps, and that what is asked for is traced and nothing is left running."""

import jax
import jax.numpy as jnp
import pytest

from qkv_jax.training import Profile, profiled_steps

double = jax.jit(lambda x: x * 2)


def test_a_range_is_two_steps_and_a_colon():
    assert profiled_steps("100:110", start=100, end=110) == (100, 110)
    assert profiled_steps("0:1", start=0, end=7) == (0, 1)
    assert profiled_steps(None, start=0, end=7) is None


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "5:7:9", "a:b", "-1:5", "1.5:2", " 5:6"])
def test_what_is_no_range_is_shown(text):
    with pytest.raises(ValueError, match=r"such as 100:110, got ") as raised:
        profiled_steps(text, start=0, end=20)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize("text", ["4:9", "5:5", "9:6", "15:21", "30:40"])
def test_steps_that_will_not_be_taken_are_refused(text):
    with pytest.raises(ValueError, match=r"wanted 5 <= first < last <= 20") as raised:
        profiled_steps(text, start=5, end=20)
    assert repr(text) in str(raised.value)


def traces(directory):
    return list(directory.rglob("*.xplane.pb"))


def train(profile, steps):
    """What a loop says, one step at a time."""
    state, said = jnp.ones(3), []
    for step in range(steps):
        profile.before(step, state)
        state = double(state)
        said.append(profile.after(step + 1, state))
    return said


def test_the_steps_are_traced_and_it_says_where_once(tmp_path):
    with Profile(tmp_path / "profile", (2, 4)) as profile:
        said = train(profile, 6)
    assert [bool(text) for text in said] == [False, False, False, True, False, False]
    assert said[3] == f"profile of steps 2:4: {tmp_path / 'profile'}"
    (trace,) = traces(tmp_path)
    assert trace.stat().st_size


def test_a_loop_that_ends_within_the_steps_leaves_what_it_has_traced(tmp_path):
    with pytest.raises(KeyError), Profile(tmp_path, (2, 40)) as profile:
        train(profile, 6)
        raise KeyError
    assert traces(tmp_path)
    with Profile(tmp_path / "again", (0, 1)) as profile:  # nothing is left running
        assert train(profile, 2)[0]


def test_without_steps_nothing_is_traced(tmp_path):
    with Profile(tmp_path / "profile") as profile:
        assert not any(train(profile, 3))
    assert not (tmp_path / "profile").exists()
