"""Blocks of query rows: the reference's answers from any block size, and little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import arguments, masks, scores
from qkv_jax.ops.rows import attend_rows, masked_softmax
from tests.tolerances import assert_close

B, T, S, N, K, H, h = 2, 11, 7, 6, 3, 5, 4


def arrays(seed=0):
    random = np.random.RandomState(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, h)
    return [jnp.asarray(random.randn(*shape), jnp.float32) for shape in shapes]


def softmax_by_rows(q, k, v, block_q, **kwargs):
    defaults = dict.fromkeys(("mask", "score", "scale", "sinks", "dropout_rng"))
    defaults |= {"dropout_rate": 0.0, "q_positions": None, "kv_positions": None}
    args = arguments.check(q, k, v, **(defaults | kwargs))
    return attend_rows(args, lambda rows, *x: masked_softmax(*x), block_q=block_q)


SETTINGS = {
    "plain": {},
    "causal": {"mask": masks.Causal(), "q_positions": np.arange(T) - 2},
    "operands along T and S": {
        "mask": masks.Dense(np.random.RandomState(1).rand(B, N, T, S) < 0.6),
        "score": (scores.Bias(jnp.asarray(np.random.RandomState(2).randn(N, T, S), jnp.float32)),
                  scores.Softcap(3.0)),
    },
    "dropout": {"dropout_rate": 0.4, "dropout_rng": jax.random.key(3)},
}  # fmt: skip


@pytest.mark.parametrize("block_q", [1, 4, None])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_rows_are_those_of_attention(settings, block_q):
    weights = jnp.asarray(np.random.RandomState(4).randn(B, T, N, h), jnp.float32)

    def loss(attend, *qkv):
        return (attend(*qkv, **settings) * weights).sum()

    by_rows = jax.jit(lambda *x: softmax_by_rows(*x, block_q=block_q, **settings))
    assert_close(by_rows(*arrays()), ops.attention(*arrays(), **settings))
    found = jax.jit(
        jax.grad(lambda *x: loss(lambda *y, **z: softmax_by_rows(*y, block_q, **z), *x), (0, 1, 2))
    )(*arrays())
    wanted = jax.jit(jax.grad(lambda *x: loss(ops.attention, *x), (0, 1, 2)))(*arrays())
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, scale=3)  # sums over blocks


def test_an_empty_row_is_zero_and_no_derivative_of_it_is_nan():
    def row(logits):
        return masked_softmax(logits, jnp.zeros(3, bool)).sum()

    logits = jnp.ones(3)
    assert row(logits) == 0
    assert not jnp.isnan(jax.grad(row)(logits)).any()
    assert not jnp.isnan(jax.hessian(row)(logits)).any()


def test_memory_does_not_grow_with_the_square_of_the_length():
    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
        gradient = jax.grad(lambda *x: softmax_by_rows(*x, block_q=16).sum(), (0, 1, 2))
        return jax.jit(gradient).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 3 * temporaries(1024)
