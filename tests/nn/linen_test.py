"""Linen users get the same modules through Flax's own bridge."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax import nn, ops
from tests.tolerances import assert_close

X = np.random.RandomState(0).randn(2, 3, 8).astype("f")


class Model(flax.linen.Module):
    """A Linen module with ours inside."""

    @flax.linen.compact
    def __call__(self, x):
        x = flax.linen.Dense(8)(x)
        attention = nnx.bridge.to_linen(nn.MultiHeadAttention, width=8, num_heads=2, name="mix")
        return attention(x, mask=ops.masks.Causal())


def test_a_bridged_module_is_the_nnx_module_with_the_same_parameters():
    linen = nnx.bridge.to_linen(nn.MultiHeadAttention, width=8, num_heads=2)
    variables = linen.init(jax.random.key(0), X)
    ours = nn.MultiHeadAttention(8, 2, rngs=nnx.Rngs(0))
    graphdef, params = nn.split(ours)
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, params)
    out = linen.apply(variables, X, mask=ops.masks.Causal())
    assert_close(out, nn.merge(graphdef, variables["params"])(X, mask=ops.masks.Causal()))


def test_a_linen_model_with_a_bridged_module_trains():
    model = Model()
    variables = model.init(jax.random.key(0), X)
    loss = lambda variables: (model.apply(variables, X) ** 2).mean()  # noqa: E731
    before, gradients = jax.value_and_grad(loss)(variables)
    assert set(gradients["params"]["mix"]) == {"query", "key", "value", "out"}
    stepped = jax.tree.map(lambda x, g: x - 0.1 * g, variables, gradients)
    assert loss(stepped) < before
