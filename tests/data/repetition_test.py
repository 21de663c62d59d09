"""Noise that repeats: every row goes on as the docstring draws it."""

import numpy as np
import pytest

from qkv_jax import data

STEP = {"seed": 5, "step": 2}


@pytest.mark.parametrize("context", [13, 16])
def test_a_row_repeats_itself_after_its_own_period(context):
    batch = data.repeats(**STEP, batch_size=300, context=context, vocab_size=1000)
    periods = set()
    for inputs, targets, weights, distances in zip(*batch.values(), strict=True):
        tokens = np.append(inputs, targets[-1])
        np.testing.assert_array_equal(targets[:-1], inputs[1:])
        assert weights.tolist() == [1] * context
        period = int(np.argmax(distances > 0)) + 1  # the first target that was seen before
        periods.add(period)
        np.testing.assert_array_equal(tokens[period:], tokens[:-period])
        assert len(set(tokens[:period].tolist())) > period - 3  # noise: hardly two are equal
        assert (distances[: period - 1] == 0).all() and (
            distances[period - 1 :] == period - 1
        ).all()
        for t in range(period - 1, context):
            assert inputs[t - distances[t]] == targets[t]
    assert periods == set(range(-(-context // 4), context // 2 + 1))


def test_all_ids_are_drawn_evenly():
    inputs = data.repeats(**STEP, batch_size=500, context=8, vocab_size=3)["inputs"]
    shares = np.bincount(inputs[:, :2].ravel(), minlength=3) / 1000
    assert inputs.max() == 2 and np.abs(shares - 1 / 3).max() < 0.05


def test_a_batch_is_a_function_of_seed_step_and_stream():
    sizes = {"batch_size": 3, "context": 20, "vocab_size": 30}
    batch = data.repeats(**STEP, **sizes)
    np.testing.assert_array_equal(data.repeats(**STEP, **sizes)["inputs"], batch["inputs"])
    for other in ({"seed": 4}, {"step": 12}, {"stream": data.TEST}):
        assert (data.repeats(**(STEP | sizes | other))["inputs"] != batch["inputs"]).any()
    assert all(array.shape == (3, 20) for array in batch.values())
    assert [array.dtype.name for array in batch.values()] == ["int32", "int32", "float32", "int32"]


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"context": 7, "vocab_size": 9}, "context is 7; wanted at least 8"),
        ({"context": 8, "vocab_size": 1}, "vocab_size is 1; wanted at least 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        data.repeats(**STEP, batch_size=1, **sizes)
