"""`SinkAttention` against the op, and against attention with one more key."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax import nn, ops
from qkv_jax.ops import masks
from tests.tolerances import assert_close

B, T, D, N = 2, 5, 12, 3
X = jnp.asarray(np.random.RandomState(0).randn(B, T, D), jnp.float32)


def modules():
    plain = nn.MultiHeadAttention(D, N, rngs=nnx.Rngs(0))
    sink = nn.SinkAttention(D, N, rngs=nnx.Rngs(0))
    return plain, sink


def test_it_starts_as_attention_off_by_one():
    plain, sink = modules()
    plain.op = ops.off_by_one_attention
    assert_close(sink(X, mask=masks.Causal()), plain(X, mask=masks.Causal()))


def test_each_head_has_its_own_sink_and_a_large_one_takes_all_weight():
    plain, sink = modules()
    assert nn.count(nn.split(sink)[1]) == nn.count(nn.split(plain)[1]) + N
    sink.out.kernel[...] = jnp.eye(D)
    plain.out.kernel[...] = jnp.eye(D)
    sink.sinks[...] = jnp.array([-1e9, 0.0, 1e9])
    heads = np.asarray(sink(X)).reshape(B, T, N, -1)
    without = np.asarray(plain(X)).reshape(B, T, N, -1)
    assert_close(heads[:, :, 0], without[:, :, 0])
    share = heads[:, :, 1] / without[:, :, 1]
    assert ((share > 0) & (share < 1)).all()
    assert (heads[:, :, 2] == 0).all()


def test_the_sinks_learn():
    _, sink = modules()
    gradient = nnx.grad(lambda m: (m(X) ** 2).sum())(sink)
    assert (np.asarray(gradient["sinks"][...]) != 0).all()
