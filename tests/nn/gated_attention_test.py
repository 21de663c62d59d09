"""`GatedAttention` against attention whose heads are scaled by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.ops import masks
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, D, N = 2, 5, 12, 3
X = jnp.asarray(np.random.RandomState(0).randn(B, T, D), jnp.float32)


def test_each_head_is_scaled_by_the_gate_of_its_token():
    gated = randomised(nn.GatedAttention(D, N, rngs=nnx.Rngs(0)))
    seen = []
    op = gated.op
    gated.op = lambda *args, **kwargs: seen.append(op(*args, **kwargs)) or seen[-1]
    out = gated(X, mask=masks.Causal())
    logits = X @ gated.gate.kernel[...] + gated.gate.bias[...]
    heads = np.asarray(seen[0]) / (1 + np.exp(-np.asarray(logits)))[..., None]
    assert_close(out, heads.reshape(B, T, D) @ gated.out.kernel[...], scale=5)


def test_its_gates_start_at_what_is_asked_for():
    gated = nn.GatedAttention(D, N, gate=0.2, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    plain = nn.MultiHeadAttention(D, N, rngs=nnx.Rngs(0))
    for name in ("query", "key", "value", "out"):
        getattr(gated, name).kernel[...] = getattr(plain, name).kernel[...]
    assert_close(gated(X), 0.2 * plain(X), scale=5)
    assert nn.count(nn.split(gated)[1]) == nn.count(nn.split(plain)[1]) + N * (D + 1)


def test_a_closed_gate_adds_nothing():
    gated = nn.GatedAttention(D, N, rngs=nnx.Rngs(0))
    gated.gate.bias[...] = jnp.full((N,), -1e3)
    np.testing.assert_array_equal(gated(X), 0)


@pytest.mark.parametrize("gate", [0, 1, -1.0])
def test_a_gate_that_no_sigmoid_gives_is_named(gate):
    with pytest.raises(ValueError, match=r"gate: wanted a number in \(0, 1\), got"):
        nn.GatedAttention(D, N, gate=gate, rngs=nnx.Rngs(0))
