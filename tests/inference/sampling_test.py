"""What is cut off a distribution, against brute force, and what is then drawn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import inference
from tests.tolerances import assert_close

V = 11
LOGITS = np.random.RandomState(0).randn(2, 3, V).astype("f") * 2


def softmax(x):
    exps = np.exp(x - x.max())
    return exps / exps.sum()


def brute_force(row, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The filtered probabilities of one row, by trying every set of tokens."""
    row = row.astype(np.float64) / temperature
    kept = set(range(len(row)))
    if top_k is not None:
        kept = {i for i in kept if sum(row > row[i]) < top_k}
    if top_p is not None:
        p = softmax(np.where([i in kept for i in range(len(row))], row, -np.inf))
        for size in range(1, len(kept) + 1):
            reaching = [s for s in itertools.combinations(kept, size) if p[list(s)].sum() >= top_p]
            if reaching:  # of the smallest sets that reach it, the most probable
                kept = set(max(reaching, key=lambda s: p[list(s)].sum()))
                break
    if min_p is not None:
        kept = {i for i in kept if softmax(row)[i] >= min_p * softmax(row).max()}
    return softmax(np.where([i in kept for i in range(len(row))], row, -np.inf))


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
@pytest.mark.parametrize(
    "cut",
    [
        {},
        {"top_k": 3},
        {"top_k": 20},
        {"top_p": 0.6},
        {"top_p": 0.95},
        {"min_p": 0.1},
        {"top_k": 5, "top_p": 0.7},
        {"top_k": 5, "min_p": 0.3},
    ],
    ids=repr,
)
def test_what_is_left_is_what_brute_force_leaves(cut, temperature):
    filtered = inference.filter_logits(LOGITS, temperature=temperature, **cut)
    expected = np.apply_along_axis(lambda row: brute_force(row, temperature, **cut), -1, LOGITS)
    assert_close(jax.nn.softmax(filtered), expected, scale=2)
    assert (np.isneginf(filtered) == (expected == 0)).all()


@pytest.mark.parametrize("top_p", [1e-6, 0.5, 1.0])
def test_the_most_probable_token_always_stays(top_p):
    filtered = inference.filter_logits(LOGITS, top_p=top_p)
    np.testing.assert_array_equal(np.argmax(filtered, -1), np.argmax(LOGITS, -1))
    if top_p == 1.0:
        np.testing.assert_array_equal(filtered, LOGITS)


def test_what_ties_with_the_k_th_stays():
    filtered = np.asarray(inference.filter_logits(jnp.array([3.0, 1.0, 1.0, 0.0]), top_k=2))
    assert np.isfinite(filtered).tolist() == [True, True, True, False]


def test_top_1_and_a_temperature_near_0_are_the_largest():
    for seed in range(3):
        for cut in ({"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-6}):
            token = inference.sample(LOGITS, jax.random.key(seed), **cut)
            assert token.dtype == jnp.int32
            np.testing.assert_array_equal(token, LOGITS.argmax(-1))


def test_samples_have_the_filtered_distribution():
    expected = brute_force(LOGITS[0, 0], 1.5, 6, 0.9)
    rows = jnp.tile(LOGITS[0, 0], (20_000, 1))
    tokens = inference.sample(rows, jax.random.key(0), temperature=1.5, top_k=6, top_p=0.9)
    counts = np.bincount(np.asarray(tokens), minlength=V) / 20_000
    assert (counts[expected == 0] == 0).all()
    assert np.abs(counts - expected).max() < 4 * 0.5 / np.sqrt(20_000)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0.0}, r"temperature: wanted a finite number > 0, got 0\.0"),
        ({"temperature": -1.0}, r"temperature: .* got -1\.0"),
        ({"temperature": float("nan")}, r"temperature: .* got nan"),
        ({"temperature": float("inf")}, r"temperature: .* got inf"),
        ({"top_k": 0}, r"top_k: wanted an integer >= 1 or None, got 0"),
        ({"top_p": 0.0}, r"top_p: wanted a number in \(0, 1\] or None, got 0\.0"),
        ({"top_p": 1.1}, r"top_p: .* got 1\.1"),
        ({"top_p": float("nan")}, r"top_p: .* got nan"),
    ],
    ids=repr,
)
def test_a_wrong_number_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        inference.filter_logits(LOGITS, **wrong)
