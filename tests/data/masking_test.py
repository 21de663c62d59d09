"""Masked tokens: which are chosen, what becomes of them, and that nothing but (seed, step) decides.

Tokens are their own positions, so that targets say where a window stood.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv_jax.data import (
    EVALUATION,
    masked_windows,
    random_windows,
    sequential_masked_windows,
    stacked_masked_windows,
)

TOKENS = np.arange(1009)
MASK = 1009
SIZES = {"batch_size": 5, "context": 17, "mask_id": MASK}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def assert_masked(batch, numbers, mask_id=MASK):
    """Of every window that many tokens are chosen, and all others are as they were."""
    chosen = batch["weights"] == 1
    assert ((batch["weights"] == 0) | chosen).all()
    np.testing.assert_array_equal(chosen.sum(-1), numbers)
    np.testing.assert_array_equal(batch["inputs"][~chosen], batch["targets"][~chosen])
    assert batch["inputs"].max() <= mask_id and batch["targets"].max() < mask_id
    assert batch["inputs"].min() >= 0


# --- random windows ------------------------------------------------------------------------------


def test_batches_are_those_of_every_earlier_release():
    batch = masked_windows(TOKENS, seed=2, step=3, batch_size=2, context=19, mask_id=MASK)
    assert np.nonzero(batch["weights"])[1].reshape(2, 3).tolist() == [[2, 3, 14], [0, 3, 6]]
    chosen = batch["weights"] == 1
    assert batch["targets"][chosen].tolist() == [215, 216, 227, 922, 925, 928]
    assert batch["inputs"][chosen].tolist() == [MASK, MASK, 227, MASK, MASK, 228]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_batches_hold_the_random_windows_as_targets(dtype):
    batch = masked_windows(TOKENS.astype(dtype), seed=3, step=2, **SIZES)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "inputs": ((5, 17), "int32"),
        "targets": ((5, 17), "int32"),
        "weights": ((5, 17), "float32"),
    }
    assert all(array.flags.c_contiguous for array in batch.values())
    windows = random_windows(TOKENS, seed=3, step=2, batch_size=5, context=17)["inputs"]
    np.testing.assert_array_equal(batch["targets"], windows)
    assert_masked(batch, 3)  # round(0.15 * 17)


@pytest.mark.parametrize(
    ("context", "rate", "number"),
    [(1, 0.15, 1), (3, 0.15, 1), (20, 0.15, 3), (128, 0.15, 19), (20, 0.5, 10), (5, 0.99, 5)],
)
def test_every_window_has_the_same_number_of_targets(context, rate, number):
    sizes = SIZES | {"context": context}
    assert_masked(masked_windows(TOKENS, seed=0, step=0, mask_rate=rate, **sizes), number)


def test_of_the_chosen_80_percent_are_masked_10_replaced_and_10_kept_all_places_alike():
    batch = masked_windows(
        TOKENS % 7, seed=0, step=0, batch_size=3000, context=40, mask_id=7, mask_rate=0.25
    )
    assert_masked(batch, 10, mask_id=7)
    chosen = batch["weights"] == 1
    inputs, targets = batch["inputs"][chosen], batch["targets"][chosen]
    masked, same = (inputs == 7).mean(), (inputs == targets).mean()
    deviation = 5 * np.sqrt(0.25 / len(inputs))
    assert abs(masked - 0.8) < deviation
    assert abs(same - (0.1 + 0.1 / 7)) < deviation  # some are replaced by themselves
    replaced = np.bincount(inputs[(inputs < 7) & (inputs != targets)], minlength=7)
    assert np.abs(replaced / replaced.sum() - 1 / 7).max() < 5 * np.sqrt(0.25 / replaced.sum())
    assert np.abs(chosen.mean(0) - 0.25).max() < 5 * np.sqrt(0.25 / 3000)


def test_a_batch_needs_no_state_so_data_resumes_at_every_step():
    stacked = stacked_masked_windows(TOKENS, seed=11, step=17, num_steps=7, **SIZES)
    assert stacked["inputs"].shape == (7, 5, 17)
    for i in reversed(range(7)):
        one = masked_windows(TOKENS, seed=11, step=17 + i, **SIZES)
        assert equal(one, {name: array[i] for name, array in stacked.items()})


def test_seeds_steps_and_streams_choose_different_places():
    def places(**words):
        words = {"seed": 1, "step": 1, "stream": 0} | words
        return masked_windows(TOKENS, **words, **SIZES | {"batch_size": 31})["weights"]

    draws = [
        places(),
        *(places(**{word: i}) for word in ("seed", "step", "stream") for i in (2, 3)),
    ]
    shared = max((a * b).sum() / a.sum() for a in draws for b in draws if a is not b)
    assert shared < 0.4  # 3 of 17 by chance
    words = {"seed": np.int64(5), "step": np.int32(6), "stream": np.uint8(EVALUATION)}
    plain = masked_windows(TOKENS, seed=5, step=6, stream=EVALUATION, **SIZES)
    assert equal(plain, masked_windows(TOKENS, **words, **SIZES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.arange(17)}, "tokens has 17 entries; wanted at least 18"),
        ({"seed": -1}, "seed is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"mask_rate": 0.0}, r"mask_rate: wanted a number in \(0, 1\), got 0.0"),
        ({"mask_rate": 1.0}, "mask_rate: .* got 1.0"),
        ({"mask_rate": float("nan")}, "mask_rate: .* got nan"),
        ({"mask_id": 3}, "mask_id: wanted an id above that of every token, .* got 3"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"tokens": TOKENS, "seed": 0, "step": 0, **SIZES} | change
    with pytest.raises(ValueError, match=message):
        masked_windows(**arguments)


# --- sequential windows --------------------------------------------------------------------------


@given(
    length=st.integers(1, 61),
    batch_size=st.integers(1, 5),
    context=st.integers(1, 17),
    rate=st.sampled_from([0.01, 0.15, 0.5, 0.9]),
)
@settings(max_examples=200, deadline=None)
def test_every_token_stands_in_one_window_that_may_hide_it(length, batch_size, context, rate):
    tokens = np.arange(length, dtype=np.uint8)
    sizes = {"context": context, "mask_id": MASK, "mask_rate": rate}
    batches = list(sequential_masked_windows(tokens, batch_size=batch_size, **sizes))
    width = min(context, length)
    assert all(array.shape == (batch_size, width) for b in batches for array in b.values())
    windows = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    begins = np.arange(0, length, width)
    number = len(begins)
    assert len(windows["inputs"]) == -(-number // batch_size) * batch_size
    new = np.minimum(width, length - begins)  # the last window's others are in the one before
    numbers = np.zeros(len(windows["inputs"]), int)
    numbers[:number] = np.minimum(new, np.maximum(1, np.rint(rate * new)))
    assert_masked(windows, numbers)
    targets = windows["targets"][:number]
    np.testing.assert_array_equal(targets[:, 0], np.minimum(begins, length - width))
    assert (np.diff(targets, axis=1) == 1).all()
    chosen = windows["targets"][windows["weights"] == 1]
    assert len(set(chosen.tolist())) == len(chosen)  # none twice


def test_the_hidden_tokens_depend_on_the_seed_alone():
    def hidden(**changes):
        arguments = {"tokens": TOKENS, **SIZES, "seed": 0} | changes
        batches = sequential_masked_windows(**arguments)
        return np.concatenate([b["targets"][b["weights"] == 1] for b in batches])

    np.testing.assert_array_equal(hidden(), hidden())
    np.testing.assert_array_equal(hidden(), hidden(batch_size=3))
    assert len(np.intersect1d(hidden(), hidden(seed=1))) < 0.3 * len(hidden())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.arange(0)}, "tokens: wanted at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: wanted at least 1, got 0"),
        ({"context": 0}, "context: wanted at least 1, got 0"),
        ({"mask_rate": 0.0}, "mask_rate: "),
        ({"mask_id": 1008}, "mask_id: "),
    ],
)
def test_bad_arguments_are_refused_before_the_first_batch(change, message):
    with pytest.raises(ValueError, match=message):
        sequential_masked_windows(**{"tokens": TOKENS, **SIZES} | change)
