"""Clipped softmax: its limits, long rows, derivatives; `normalizers_test` has it against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import masks
from qkv_jax.ops.clipped import ClippedSoftmax, clipped_softmax_attention
from tests.tolerances import assert_close

B, T, N, K, H, h = 2, 11, 6, 3, 5, 7
RANDOM = np.random.RandomState(0)


def inputs(length=T, batch=B, heads=(N, K)):
    shapes = [(batch, length, n, size) for n, size in ((heads[0], H), (heads[1], H), (heads[1], h))]
    return [jnp.asarray(2 * RANDOM.randn(*shape), "float32") for shape in shapes]


def dense(q, k, v, allowed, gamma, zeta=1.0):
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
    softmax = jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf))
    weights = jnp.clip((zeta - gamma) * softmax + gamma, 0, 1)
    return jnp.einsum("BNTS,BSNh->BTNh", weights, v)


def test_stretched_by_nothing_it_is_attention():
    q, k, v = inputs()
    out = clipped_softmax_attention(q, k, v, gamma=0.0, mask=masks.Causal())
    assert_close(out, ops.attention(q, k, v, mask=masks.Causal()), scale=5)


@pytest.mark.parametrize("length", [T, 263])  # the longer one block by block
def test_values_and_gradients_are_those_of_the_formula(length):
    q, k, v = inputs(length, batch=1, heads=(2, 2))
    gamma, zeta, offset = -0.05, 1.1, np.arange(length)[:, None] - np.arange(length)
    mask, allowed = masks.Causal() & masks.SlidingWindow(29), (offset >= 0) & (offset <= 29)

    def results(f):
        loss = lambda *qkv: (f(*qkv) ** 2).sum()  # noqa: E731
        return jax.jit(lambda *qkv: (f(*qkv), jax.grad(loss, argnums=(0, 1, 2))(*qkv)))(q, k, v)

    found = results(lambda *qkv: clipped_softmax_attention(*qkv, gamma=gamma, zeta=zeta, mask=mask))
    expected = results(lambda *qkv: dense(*qkv, allowed, gamma, zeta))
    jax.tree.map(lambda a, b: assert_close(a, b, scale=10), found, expected)


def test_second_derivatives_of_both_orders_are_those_of_the_formula():
    q, k, v = inputs(batch=1, heads=(2, 2))
    direction = jnp.asarray(RANDOM.randn(*q.shape), "float32")

    def products(f):
        loss = lambda q: (f(q, k, v) ** 2).sum()  # noqa: E731
        forward = jax.jvp(jax.grad(loss), (q,), (direction,))[1]
        reverse = jax.grad(lambda q: jnp.vdot(jax.grad(loss)(q), direction))(q)
        return forward, reverse

    found = products(lambda *qkv: clipped_softmax_attention(*qkv, gamma=-0.05))
    expected = products(lambda *qkv: dense(*qkv, True, -0.05))
    jax.tree.map(lambda a, b: assert_close(a, b, scale=100), found, expected)


def test_a_row_whose_weights_are_all_clipped_is_0_and_has_no_gradient():
    q, k, v = inputs()
    q = q.at[:, 4].set(0.0)  # all weights 1 / T

    @jax.jit
    def out_and_gradients(*qkv):
        f = lambda *qkv: clipped_softmax_attention(*qkv, gamma=-0.5)  # noqa: E731
        return f(*qkv), jax.grad(lambda *qkv: f(*qkv).sum(), argnums=(0, 1, 2))(*qkv)

    with jax.debug_nans(True):
        out, gradients = out_and_gradients(q, k, v)
    np.testing.assert_array_equal(out[:, 4], 0)
    np.testing.assert_array_equal(gradients[0][:, 4], 0)
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in (out, *gradients))


def test_a_forbidden_logit_may_be_as_large_as_it_likes():
    q, k, v = inputs(batch=1)
    far = k.at[:, -1].multiply(1e3)  # its exp is infinite

    @jax.jit
    def before(k):
        f = lambda k: clipped_softmax_attention(q, k, v, gamma=-0.1, mask=masks.Causal())  # noqa: E731
        return f(k)[:, :-1], jax.grad(lambda k: f(k)[:, :-1].sum())(k)

    jax.tree.map(np.testing.assert_array_equal, before(far), before(k))


def test_the_weights_shown_are_those_of_the_output():
    q, k, v = inputs(heads=(2, 2))
    op = ClippedSoftmax(-0.2)
    weights = op.weights(q, k, mask=masks.Causal())
    assert (weights == 0).mean() > 0.6 and weights.max() <= 1
    out = jnp.einsum("BNTS,BSNh->BTNh", weights, v)
    assert_close(op(q, k, v, mask=masks.Causal()), out, scale=5)
    with pytest.raises(NotImplementedError, match=r"^dropout_rate: "):
        op.weights(q, k, dropout_rate=0.1, dropout_rng=jax.random.key(0))


@pytest.mark.parametrize("stretch, words", [
    ({"gamma": 0.1}, r"gamma: wanted a Python number <= 0, got 0\.1"),
    ({"gamma": float("nan")}, "gamma: .* got nan"),
    ({"gamma": np.zeros(3)}, "gamma: .* got array"),
    ({"gamma": -0.1, "zeta": 0.9}, r"zeta: wanted a Python number >= 1, got 0\.9"),
], ids=str)  # fmt: skip
def test_another_stretch_is_an_error(stretch, words):
    with pytest.raises(ValueError, match=words):
        clipped_softmax_attention(*inputs(), **stretch)
    with pytest.raises(ValueError, match=words):
        ClippedSoftmax(**stretch)
