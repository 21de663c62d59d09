"""`ContextualPositionAttention`: its embeddings, and what it shares with `MultiHeadAttention`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn, ops
from qkv_jax.nn.cope import ContextualPositionAttention
from qkv_jax.ops import masks
from qkv_jax.ops.cope import cope_attention
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, D, N, P = 2, 5, 12, 3, 4
X = np.random.RandomState(0).randn(B, T, D).astype("f")


def call(module, *inputs, **kwargs):
    """The module's output, compiled as a whole: op by op takes longer."""
    return jax.jit(lambda *inputs: module(*inputs, **kwargs))(*inputs)


def contextual(**kwargs):
    return ContextualPositionAttention(D, N, max_positions=P, rngs=nnx.Rngs(0), **kwargs)


def test_before_training_it_is_multi_head_attention():
    plain = nn.MultiHeadAttention(D, N, rngs=nnx.Rngs(0))
    out, expected = (call(module, X, mask=masks.Causal()) for module in (contextual(), plain))
    assert_close(out, expected, scale=5)


def test_it_is_the_op_on_its_projections():
    module = randomised(contextual(num_kv_heads=1))

    @jax.jit
    def expected(x):
        q, k, v = module.project(x)
        out = cope_attention(q, k, v, embeddings=module.embeddings[...], mask=masks.Causal())
        return module.out(out.reshape(B, T, D))

    out = call(module, X, mask=masks.Causal())
    assert_close(out, expected(X), scale=5)
    module.embeddings[...] *= 0
    assert np.abs(out - call(module, X, mask=masks.Causal())).max() > 0.1


def test_it_knows_the_order_of_tokens_without_positions():
    module = randomised(contextual())
    # The last of T tokens attends to the same set in another order.
    swapped = X[:, np.array([1, 0, 2, 3, 4])]
    last = jax.jit(lambda x: module(x, mask=masks.Causal())[:, -1])
    assert np.abs(last(swapped) - last(X)).max() > 1e-3


def test_padding_is_not_counted():
    module = randomised(contextual())
    longer = np.concatenate([X, X], axis=1)
    for mask in (masks.Causal(), masks.Lengths(T)):
        out, other = (call(module, x, mask=mask)[:, :T] for x in (X, longer))
        assert_close(other, out, scale=5)


def test_the_embeddings_learn():
    graphdef, params = nn.split(contextual())
    loss = lambda p: jnp.sum(nn.merge(graphdef, p)(X, mask=masks.Causal()) ** 2)  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(params)["embeddings"]
    assert gradient.shape == (P, D // N) and (np.abs(gradient[:3]) > 0).all()


def test_sizes_and_what_does_not_fit():
    module = contextual(dtype="bfloat16")
    assert nn.count(nn.split(module)[1]) == 4 * D * D + P * D // N
    assert module.state_size(7) == 7 * 2 * D
    assert module(X).dtype == "bfloat16" and module.embeddings.dtype == "float32"
    with pytest.raises(ValueError, match="max_positions: wanted 1 or more, got 0"):
        ContextualPositionAttention(D, N, max_positions=0, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="op"):
        contextual(op=ops.attention)
