"""Associative recall: every row is a puzzle with one answer, and the draws are what they claim."""

import numpy as np
import pytest

from qkv_jax import data
from qkv_jax.data import draws

SIZES = {"batch_size": 37, "context": 30, "num_pairs": 5, "vocab_size": 23}


def test_every_key_is_asked_once_after_the_pairs_and_its_value_is_wanted():
    batch = data.recall(seed=3, step=11, **SIZES)
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "inputs": ((37, 30), "int32"), "targets": ((37, 30), "int32"),
        "weights": ((37, 30), "float32"),
    }  # fmt: skip
    for inputs, targets, weights in zip(*batch.values(), strict=True):
        pairs = dict(zip(inputs[0:10:2], inputs[1:10:2], strict=True))
        assert len(pairs) == len(set(pairs.values())) == 5
        assert all(1 <= key < 11 <= value < 23 for key, value in pairs.items())
        asked = np.flatnonzero(weights)
        assert len(asked) == 5 and (asked >= 10).all() and (asked % 2 == 0).all()
        assert {inputs[place]: targets[place] for place in asked} == pairs
        assert not inputs[10:][weights[10:] == 0].any() and not targets[weights == 0].any()


def test_a_batch_is_a_function_of_seed_step_and_stream():
    batch = data.recall(seed=3, step=11, **SIZES)["inputs"]
    np.testing.assert_array_equal(data.recall(seed=3, step=11, **SIZES)["inputs"], batch)
    for other in ({"seed": 4}, {"step": 12}, {"stream": data.EVALUATION}, {"stream": data.TEST}):
        found = data.recall(**({"seed": 3, "step": 11} | SIZES | other))["inputs"]
        assert (found != batch).any()


def test_keys_values_and_order_are_uniform():
    batch = data.recall(seed=0, step=0, batch_size=6000, context=20, num_pairs=3, vocab_size=10)
    for place, low, choices in ((0, 1, 4), (2, 1, 4), (1, 5, 5), (5, 5, 5)):
        counts = np.bincount(batch["inputs"][:, place] - low, minlength=choices)
        np.testing.assert_allclose(counts / 6000, 1 / choices, atol=0.03)


def test_indices_are_drawn_with_their_weights_one_after_another():
    weights = np.array([1.0, 2.0, 5.0])
    found = draws.without_replacement(
        draws.uniform((20_000, 3), seed=1, step=2, stream=0), 2, weights
    )
    assert (found[:, 0] != found[:, 1]).all()
    first = np.bincount(found[:, 0]) / len(found)
    np.testing.assert_allclose(first, weights / 8, atol=0.015)
    after_last = found[found[:, 0] == 2, 1]  # 1 and 2 of 3 are left
    np.testing.assert_allclose(np.bincount(after_last) / len(after_last), [1 / 3, 2 / 3], atol=0.02)


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"num_pairs": 0}, "num_pairs is 0; wanted at least 1"),
        ({"context": 31}, "context is 31; wanted an even number, at least 4 . num_pairs = 20"),
        ({"context": 18}, "context is 18"),
        ({"vocab_size": 11}, "vocab_size is 11; wanted at least 12"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        data.recall(seed=0, step=0, **(SIZES | sizes))


def test_the_smallest_vocabulary_holds_every_pair():
    batch = data.recall(seed=0, step=0, batch_size=2, context=20, num_pairs=5, vocab_size=12)
    assert set(batch["inputs"][0, 0:10:2]) == {1, 2, 3, 4, 5}


def test_rows_may_have_fewer_pairs_each_number_as_often():
    sizes = SIZES | {"batch_size": 6000, "min_pairs": 2}
    batch = data.recall(seed=0, step=0, **sizes)
    asked = batch["weights"].sum(-1).astype(int)
    np.testing.assert_allclose(np.bincount(asked)[2:] / 6000, 1 / 4, atol=0.03)
    assert asked.min() == 2 and asked.max() == 5
    for inputs, weights, number in zip(batch["inputs"], batch["weights"], asked, strict=True):
        assert (inputs[: 2 * number] > 0).all() and (inputs[2 * number : 10] == 0).all()
        assert set(inputs[weights > 0]) == set(inputs[0 : 2 * number : 2])


def test_the_largest_number_of_pairs_grows_with_the_step():
    sizes = SIZES | {"min_pairs": 1, "ramp_steps": 8}
    most = [data.recall(seed=0, step=s, **sizes)["weights"].sum(-1).max() for s in range(10)]
    assert most == [1, 2, 2, 3, 3, 4, 4, 5, 5, 5]


@pytest.mark.parametrize(
    "more, words",
    [
        ({"min_pairs": 0}, "min_pairs is 0; wanted 1 to num_pairs = 5"),
        ({"min_pairs": 6}, "min_pairs is 6"),
        ({"ramp_steps": -1}, "ramp_steps is -1"),
    ],
)
def test_numbers_of_pairs_that_do_not_fit_are_refused(more, words):
    with pytest.raises(ValueError, match=words):
        data.recall(seed=0, step=0, **SIZES, **more)
