"""Batches: pure functions of (seed, step), and a walk that counts every target once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv_jax.data import EVALUATION
from qkv_jax.data.batches import (
    check_token_ids,
    pack_tokens,
    random_windows,
    sequential_windows,
    split,
    stacked_windows,
)

TOKENS = np.arange(1009)  # each token is its own position
SIZES = {"batch_size": 5, "context": 3}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# --- random windows ------------------------------------------------------------------------------


def test_batches_are_those_of_every_earlier_release():
    batch = random_windows(TOKENS, seed=0, step=0, **SIZES)
    starts = np.array([11, 242, 112, 567, 505])
    np.testing.assert_array_equal(batch["inputs"], starts[:, None] + [0, 1, 2])
    np.testing.assert_array_equal(batch["targets"], starts[:, None] + [1, 2, 3])
    other = random_windows(TOKENS, seed=7, step=1_234_567, stream=EVALUATION, **SIZES)
    assert other["inputs"][:, 0].tolist() == [577, 818, 729, 424, 678]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_batches_are_contiguous_int32_whatever_the_tokens_are_stored_in(dtype):
    tokens = (TOKENS % 251).astype(dtype)
    batch = random_windows(tokens, seed=0, step=2, **SIZES)
    for array in batch.values():
        assert array.shape == (5, 3) and array.dtype == np.int32 and array.flags.c_contiguous
    assert equal(batch, random_windows(TOKENS % 251, seed=0, step=2, **SIZES))


def test_a_batch_needs_no_state_so_data_resumes_at_every_step():
    steps = 13
    run = [random_windows(TOKENS, seed=3, step=step, **SIZES) for step in range(steps)]
    for start in range(steps):
        tail = [random_windows(TOKENS, seed=3, step=step, **SIZES) for step in range(start, steps)]
        assert all(map(equal, run[start:], tail))
    backwards = [random_windows(TOKENS, seed=3, step=s, **SIZES) for s in reversed(range(steps))]
    assert all(map(equal, run, reversed(backwards)))


def test_seeds_steps_and_streams_draw_different_windows():
    def starts(**words):
        words = {"seed": 1, "step": 1, "stream": 0} | words
        return tuple(random_windows(TOKENS, batch_size=31, context=3, **words)["inputs"][:, 0])

    draws = [
        starts(),
        *(starts(**{word: i}) for word in ("seed", "step", "stream") for i in (2, 3)),
    ]
    assert len(set(draws)) == len(draws)
    shared = max(np.mean(np.equal(a, b)) for a in draws for b in draws if a is not b)
    assert shared < 0.2


def test_numpy_integers_are_the_same_seeds_and_steps():
    plain = random_windows(TOKENS, seed=5, step=6, stream=1, **SIZES)
    words = {"seed": np.int64(5), "step": np.int32(6), "stream": np.uint8(1)}
    assert equal(plain, random_windows(TOKENS, **words, **SIZES))


def test_windows_start_everywhere_equally_often():
    tokens = np.arange(29)  # 23 starts of context 6
    batch = random_windows(tokens, seed=0, step=0, batch_size=23_000, context=6)
    counts = np.bincount(batch["inputs"][:, 0], minlength=23)
    assert len(counts) == 23
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)
    assert batch["targets"].max() == 28


def test_a_text_of_one_window_gives_that_window():
    batch = random_windows(np.arange(4), seed=0, step=0, **SIZES)
    assert batch["inputs"].tolist() == [[0, 1, 2]] * 5
    assert batch["targets"].tolist() == [[1, 2, 3]] * 5


def test_stacked_windows_are_the_batches_of_the_steps():
    stacked = stacked_windows(TOKENS, seed=11, step=17, num_steps=7, **SIZES)
    assert stacked["inputs"].shape == stacked["targets"].shape == (7, 5, 3)
    for i in range(7):
        one = random_windows(TOKENS, seed=11, step=17 + i, **SIZES)
        assert equal(one, {name: array[i] for name, array in stacked.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.arange(3)}, "tokens has 3 entries; wanted at least 4"),
        ({"tokens": np.zeros((3, 3), int)}, r"tokens are int64\[3, 3\]"),
        ({"tokens": np.zeros(9)}, r"tokens are float64\[9\]"),
        ({"seed": -1}, "seed is -1"),
        ({"step": -1}, "step is -1"),
        ({"step": 2**64}, "step is"),
        ({"stream": 2**64}, "stream is"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"context": 0}, "context is 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"tokens": TOKENS, "seed": 0, "step": 0, **SIZES} | change
    with pytest.raises(ValueError, match=message):
        random_windows(**arguments)


# --- sequential windows --------------------------------------------------------------------------


@given(
    length=st.integers(2, 61),
    batch_size=st.integers(1, 5),
    context=st.integers(1, 17),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_every_target_counts_exactly_once(length, batch_size, context, data):
    stride = data.draw(st.none() | st.integers(1, context))
    tokens = np.arange(100, 100 + length, dtype=np.uint8)
    counted = []
    for batch in sequential_windows(tokens, batch_size=batch_size, context=context, stride=stride):
        assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
            "inputs": ((batch_size, context), "int32"),
            "targets": ((batch_size, context), "int32"),
            "weights": ((batch_size, context), "float32"),
        }
        weights = batch["weights"]
        assert set(np.unique(weights)) <= {0.0, 1.0} and weights.any()
        counted += batch["targets"][weights == 1].tolist()
        exists = batch["inputs"] > 0
        np.testing.assert_array_equal(batch["targets"][exists], batch["inputs"][exists] + 1)
        assert not batch["targets"][~exists].any() and not weights[~exists].any()
    assert counted == tokens[1:].tolist()


def test_overlapping_windows_count_targets_that_have_a_past():
    batches = sequential_windows(np.arange(12), batch_size=7, context=5, stride=2)
    (batch,) = batches
    assert batch["weights"].tolist() == [
        [1, 1, 1, 1, 1],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 1, 1],
        *[[0] * 5] * 3,
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.arange(1)}, "wanted at least 2"),
        ({"stride": 4}, "stride is 4; wanted <= context, 3"),
        ({"stride": 0}, "stride is 0"),
        ({"context": 0}, "context is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_batch(change, message):
    with pytest.raises(ValueError, match=message):
        sequential_windows(**{"tokens": TOKENS, **SIZES} | change)


# --- split, token ids ----------------------------------------------------------------------------


@given(length=st.integers(40, 5_000))
@settings(max_examples=100, deadline=None)
def test_the_split_is_nanogpts(length):
    train, validation = split(np.arange(length), 0.1, context=3)
    assert len(train) == int(length * 0.9)
    np.testing.assert_array_equal(np.concatenate([train, validation]), np.arange(length))


def test_each_part_holds_a_window_or_the_sizes_are_told():
    train, validation = split(np.arange(50), 0.1, context=4)
    assert (len(train), len(validation)) == (45, 5)
    with pytest.raises(ValueError, match=r"50 tokens split into 45 .* and 5 .* at least 6"):
        split(np.arange(50), 0.1, context=5)
    with pytest.raises(ValueError, match="into 12 for training and 36"):
        split(np.arange(48), 0.75, context=12)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_its_range_is_an_error(fraction):
    with pytest.raises(ValueError, match="validation_fraction is"):
        split(TOKENS, fraction, context=3)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0, 12, 13, 99], r"tokens\[2\] is 13; wanted ids from 0 to 12"),
        ([5, -1, 2], r"tokens\[1\] is -1"),
        ([[1, 2]], r"tokens are int64\[1, 2\]"),
        ([0.5], r"tokens are float64\[1\]"),
    ],
)
def test_ids_outside_the_vocabulary_are_named_with_their_position(tokens, message):
    with pytest.raises(ValueError, match=message):
        check_token_ids(np.array(tokens), 13)
    with pytest.raises(ValueError, match=message):
        pack_tokens(np.array(tokens), 13)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(97, np.uint8), (256, np.uint8), (257, np.uint16), (65_536, np.uint16), (65_537, np.int32)],
)
def test_tokens_are_packed_into_the_smallest_type_that_holds_the_vocabulary(vocab_size, dtype):
    tokens = np.array([0, vocab_size - 1, 7])
    packed = pack_tokens(tokens, vocab_size)
    assert packed.dtype == dtype
    np.testing.assert_array_equal(packed, tokens)
    check_token_ids(packed, vocab_size)
    check_token_ids(packed[:0], vocab_size)
