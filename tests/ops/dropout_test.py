"""Dropout bits: how many, of what they depend, and that they look random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import masks
from qkv_jax.ops.dropout import keep_mask
from tests.tolerances import assert_close

B, T, S, N, H = 2, 31, 37, 3, 5
RNG = jax.random.key(1)
RANDOM = np.random.RandomState(0)
Q, K, V = (RANDOM.randn(B, n, N, H).astype("f") for n in (T, S, S))


def bits(rng=RNG, rate=0.3, shape=(3, 5, 101, 103)):
    batch, head, query, key = np.ogrid[tuple(map(slice, shape))]
    return np.asarray(keep_mask(rng, rate, batch=batch, head=head, query=query, key=key))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_rate_is_the_mean(rate):
    keep = bits(rate=rate)
    deviation = np.sqrt(rate * (1 - rate) / keep.size)
    assert abs(keep.mean() - (1 - rate)) <= 4 * deviation
    by_query = keep.mean(-1)  # each of the rows too: no row is all kept or all dropped
    assert np.abs(by_query - (1 - rate)).max() <= 5.5 * np.sqrt(rate * (1 - rate) / 103)


def test_bits_are_not_correlated():
    """Neither with a neighbour along any axis, nor under another key."""
    centred = bits(rate=0.5) - 0.5
    bound = 4.5 * 0.25 / np.sqrt(centred.size)
    for axis in range(4):
        for step in (1, 2, 16):
            if step < centred.shape[axis]:
                shifted = np.roll(centred, step, axis)
                assert abs((centred * shifted).mean()) < bound, (axis, step)
    others = [jax.random.key(2), jax.random.fold_in(RNG, 0), jax.random.split(RNG)[0]]
    for other in others:
        assert abs((centred * (bits(other, 0.5) - 0.5)).mean()) < bound


def test_pairs_of_rows_and_columns_are_independent():
    """Row pairs times column pairs: a product of row bits and column bits would fail this."""
    x = bits(rate=0.5)[0, 0] * 2.0 - 1
    squares = x[:-1, :-1] * x[1:, :-1] * x[:-1, 1:] * x[1:, 1:]
    assert abs(squares.mean()) < 4.5 / np.sqrt(squares.size)


def test_a_bit_depends_on_its_own_coordinates_alone():
    whole = bits()
    batch, head, query, key = np.ogrid[1:3, 2:4, 50:61, 7:90]
    part = keep_mask(RNG, 0.3, batch=batch, head=head, query=query, key=key)
    np.testing.assert_array_equal(part, whole[1:3, 2:4, 50:61, 7:90])
    jitted = jax.jit(lambda key: keep_mask(RNG, 0.3, batch=0, head=1, query=2, key=key))
    np.testing.assert_array_equal(jitted(jnp.arange(103)), whole[0, 1, 2])


def test_a_raw_key_gives_the_bits_of_the_typed_one():
    np.testing.assert_array_equal(bits(jax.random.key_data(RNG)), bits(RNG))


def test_a_weight_kept_at_one_rate_is_kept_at_every_lower_rate():
    assert (bits(rate=0.2) >= bits(rate=0.6)).all()


def test_weights_are_dropped_or_scaled():
    plain = np.asarray(ops.attention_weights(Q, K))
    dropped = np.asarray(ops.attention_weights(Q, K, dropout_rate=0.25, dropout_rng=RNG))
    keep = bits(rate=0.25, shape=plain.shape)
    assert_close(dropped, np.where(keep, plain / 0.75, 0))
    assert 0.7 < keep.mean() < 0.8


def test_the_mean_over_many_keys_is_the_output_without_dropout():
    def out(rng):
        return ops.attention(Q, K, V, dropout_rate=0.5, dropout_rng=rng)

    outs = jax.jit(jax.vmap(out))(jax.random.split(RNG, 400))
    error = np.asarray(outs.mean(0)) - np.asarray(ops.attention(Q, K, V))
    deviation = np.asarray(outs).std(0) / np.sqrt(400)
    assert np.abs(error / deviation).max() < 5
    assert 0.9 < (error / deviation).std() < 1.1


def test_a_call_on_part_of_the_queries_and_keys_drops_the_same_weights():
    whole = ops.attention_weights(Q, K, dropout_rate=0.5, dropout_rng=RNG)
    part = ops.attention_weights(Q[:, :7], K[:, :11], dropout_rate=0.5, dropout_rng=RNG)
    np.testing.assert_array_equal(np.asarray(whole)[:, :, :7, :11] == 0, np.asarray(part) == 0)


def test_dropout_leaves_the_statistics_alone():
    _, plain = ops.attention_with_stats(Q, K, V)
    _, dropped = ops.attention_with_stats(Q, K, V, dropout_rate=0.5, dropout_rng=RNG)
    jax.tree.map(np.testing.assert_array_equal, plain, dropped)


def test_rate_zero_needs_no_key_and_ignores_one():
    plain = ops.attention(Q, K, V)
    np.testing.assert_array_equal(ops.attention(Q, K, V, dropout_rate=0.0, dropout_rng=RNG), plain)


def test_dropout_resurrects_no_masked_weight():
    mask = masks.Lengths(5)
    weights = ops.attention_weights(Q, K, mask=mask, dropout_rate=0.5, dropout_rng=RNG)
    assert (np.asarray(weights)[..., 5:] == 0).all()
