"""`merge`: attention over parts of the keys, joined, is attention over all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import masks
from tests.tolerances import assert_close

B, T, S, N, K, H, h = 2, 5, 7, 6, 3, 11, 13
RANDOM = np.random.RandomState(0)
Q, KEYS, V = RANDOM.randn(B, T, N, H), RANDOM.randn(B, S, K, H), RANDOM.randn(B, S, K, h)
Q_POSITIONS = np.array([0, 1, 2, 5, 6])  # with the window below, some rows see one part alone
MASK = masks.Causal() & masks.SlidingWindow(3) & masks.Lengths(np.array([7, 2]))


def part(q, k, v, start, stop):
    return ops.attention_with_stats(
        q, k[:, start:stop], v[:, start:stop], mask=MASK, q_positions=Q_POSITIONS,
        kv_positions=np.arange(start, stop),
    )  # fmt: skip


def merged(q, k, v, ends):
    parts = [part(q, k, v, a, b) for a, b in zip((0, *ends), (*ends, S), strict=True)]
    return functools.reduce(lambda left, right: ops.merge(*left, *right), parts)


def whole(q, k, v):
    return part(q, k, v, 0, S)


@pytest.mark.parametrize("ends", [(1,), (2, 3, 5), (0,), (S,)], ids=repr)
def test_parts_give_the_whole(ends):
    with jax.enable_x64(True):
        out, stats = jax.jit(lambda *x: merged(*x, ends))(Q, KEYS, V)
        expected_out, expected = jax.jit(whole)(Q, KEYS, V)
        assert np.isneginf(expected.lse).any()  # the mask leaves some rows without a key
        assert_close(out, expected_out)
        for name in ("lse", "max_logit", "entropy"):
            assert_close(stats[name], expected[name], scale=10)


def test_gradients_through_the_parts_are_those_of_the_whole():
    with jax.enable_x64(True):
        weights = RANDOM.randn(B, T, N, h), RANDOM.randn(B, N, T), RANDOM.randn(B, N, T)

        def gradients(attend):
            def loss(q, k, v):
                out, stats = attend(q, k, v)
                lse = jnp.where(jnp.isfinite(stats.lse), stats.lse, 0)
                return sum(
                    (w * x).sum() for w, x in zip(weights, (out, lse, stats.entropy), strict=True)
                )

            return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(Q, KEYS, V)

        of_parts = gradients(lambda *x: merged(*x, (2, 5)))
        for gradient, expected in zip(of_parts, gradients(whole), strict=True):
            assert_close(gradient, expected, scale=10)


def test_no_gradient_of_empty_parts_is_nan():
    with jax.debug_nans(True):

        def loss(q, k, v):
            out, stats = merged(q, k, v, (0, 2))
            return (out**2).sum() + stats.entropy.sum()

        for gradient in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(Q, KEYS, V):
            assert np.isfinite(gradient).all()


def test_the_order_of_the_parts_does_not_matter():
    @jax.jit
    def both_ways(q, k, v):
        first, second = part(q, k, v, 0, 4), part(q, k, v, 4, S)
        return ops.merge(*first, *second), ops.merge(*second, *first)

    jax.tree.map(assert_close, *both_ways(Q, KEYS, V))


def test_very_different_parts_do_not_overflow():
    k = np.concatenate([KEYS[:, :4] * 1e3, KEYS[:, 4:]], axis=1)
    out, stats = merged(Q, k, V, (4,))
    expected_out, expected = whole(Q, k, V)
    assert_close(out, expected_out, scale=100)
    assert_close(stats.lse, expected.lse, scale=100)


def test_the_dtypes_stay():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (Q, KEYS, V))
    out, stats = merged(q, k, v, (3,))
    assert out.dtype == jnp.bfloat16
    assert {x.dtype.name for x in stats.values()} == {"float32"}
    assert_close(out, whole(q, k, v)[0])
