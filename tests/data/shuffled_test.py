"""Windows in a shuffled order: each once an epoch, the same for any number of processes."""

import numpy as np
import pytest

from qkv_jax import data
from qkv_jax.data.draws import permuted
from qkv_jax.data.shuffled import of_documents

TOKENS = np.arange(7 * 31 + 1 + 5)  # 31 windows of 7, a last target, and what is in no window
SIZES = {"seed": 3, "num_steps": 2, "batch_size": 4, "context": 7}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# --- the order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 1009])
def test_a_permutation_has_every_number_once(length):
    found = permuted(np.arange(length), length, seed=5, step=2, stream=0)
    assert sorted(found) == list(range(length))


def test_permutations_are_those_of_every_earlier_release():
    found = permuted(np.arange(11), 11, seed=0, step=0, stream=0)
    assert found.tolist() == [6, 2, 0, 10, 3, 8, 4, 1, 7, 5, 9]
    large = permuted(np.array([0, 1, 2**40]), 2**40 + 15, seed=7, step=3, stream=1)
    assert large.tolist() == [132008205268, 604557769923, 698242461882]


def test_every_order_of_three_is_as_frequent():
    orders = [tuple(permuted(np.arange(3), 3, seed=s, step=0, stream=0)) for s in range(3000)]
    counts = np.array([orders.count(order) for order in sorted(set(orders))])
    assert len(counts) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # chi-squared of 5 degrees: 1 in 1,000


def test_neighbours_are_sent_far_apart_and_seeds_and_epochs_differ():
    words = {"seed": 1, "step": 1, "stream": 1}
    base = permuted(np.arange(1009), 1009, **words)
    assert abs(np.corrcoef(base[:-1], base[1:])[0, 1]) < 0.15
    for word in words:
        other = permuted(np.arange(1009), 1009, **words | {word: 2})
        assert np.mean(base == other) < 0.01


def test_indices_that_are_not_in_the_range_are_named():
    with pytest.raises(ValueError, match="indices go from -1 to 3; wanted 0 to 4"):
        permuted(np.array([3, -1]), 5, seed=0, step=0, stream=0)
    with pytest.raises(ValueError, match="length is 0"):
        permuted(np.array([]), 0, seed=0, step=0, stream=0)


# --- windows ------------------------------------------------------------------------------------


def test_an_epoch_has_every_window_once_and_the_next_one_another_order():
    batches = [data.shuffled_windows(TOKENS, step=s, **SIZES) for s in range(0, 16, 2)]
    rows = np.concatenate([batch["inputs"].reshape(-1, 7) for batch in batches])
    targets = np.concatenate([batch["targets"].reshape(-1, 7) for batch in batches])
    np.testing.assert_array_equal(rows % 7, np.broadcast_to(np.arange(7), rows.shape))
    np.testing.assert_array_equal(targets, rows + 1)
    windows = rows[:, 0] // 7
    assert sorted(windows[:31]) == sorted(windows[31:62]) == list(range(31))
    assert windows[:31].tolist() != windows[31:62].tolist()


@pytest.mark.parametrize("documents", [None, np.array([0, 5, 30, 100])])
def test_one_two_and_four_processes_read_the_same_batches(documents):
    whole = data.shuffled_windows(TOKENS, step=6, documents=documents, **SIZES)
    for processes in (1, 2, 4):
        shares = [
            data.shuffled_windows(
                TOKENS, step=6, documents=documents, **SIZES,
                rows=slice(4 * process // processes, 4 * (process + 1) // processes),
            )
            for process in range(processes)
        ]  # fmt: skip
        joined = {name: np.concatenate([s[name] for s in shares], axis=1) for name in whole}
        assert equal(joined, whole)


def test_a_batch_is_a_function_of_the_step_alone():
    both = data.shuffled_windows(TOKENS, step=9, **SIZES)
    one = data.shuffled_windows(TOKENS, step=10, **SIZES | {"num_steps": 1})
    np.testing.assert_array_equal(both["inputs"][1], one["inputs"][0])
    assert both["inputs"].dtype == np.int32 and both["inputs"].shape == (2, 4, 7)
    data.shuffled_windows(TOKENS, step=2**64 - 2, **SIZES)  # a step of any size


def test_there_may_be_more_tokens_than_32_bits_count():
    tokens = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (2**33,), (0,))
    documents = np.array([0, 2**32])
    batch = data.shuffled_windows(tokens, step=0, documents=documents, **SIZES)
    assert set(batch["positions"].ravel().tolist()) == set(range(7))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"context": 223}, "tokens has 223 entries; wanted at least 224"),
        ({"step": -1}, "step is -1"),
    ],
)
def test_a_size_that_cannot_be_is_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        data.shuffled_windows(TOKENS, **{"step": 0} | SIZES | wrong)


# --- documents ----------------------------------------------------------------------------------


def test_documents_are_told_apart_in_windows():
    documents = np.array([0, 3, 3, 10])  # the second is empty
    found = of_documents(documents, np.array([[0, 5]]), 7)
    assert found["segments"].tolist() == [[[0, 0, 0, 2, 2, 2, 2], [0, 0, 0, 0, 0, 1, 1]]]
    assert found["positions"].tolist() == [[[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]]]
    assert found["weights"].tolist() == [[[1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 1]]]


def test_a_walk_counts_every_token_once_but_documents_first_ones():
    tokens, documents = np.arange(1, 24), np.array([0, 4, 13])
    counted = np.zeros(24, int)
    for batch in data.sequential_documents(tokens, documents, batch_size=2, context=5):
        np.add.at(counted, batch["targets"].ravel(), batch["weights"].ravel().astype(int))
    assert np.flatnonzero(counted).tolist() == sorted(set(range(1, 24)) - {1, 5, 14})
    assert counted.max() == 1
