"""`Linear` against `nnx.Linear`, and several layers as one product against one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, D, F = 2, 3, 5, 7
X = np.random.RandomState(0).randn(B, T, D).astype("f")


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("shape", [(B, T, D), (T, D), (D,)])
def test_linear_is_flax_s_linear_with_its_gradients(shape, dtype, use_bias):
    ours = randomised(nn.Linear(D, F, use_bias=use_bias, dtype=dtype, rngs=nnx.Rngs(0)))
    theirs = nnx.Linear(D, F, use_bias=use_bias, dtype=dtype, rngs=nnx.Rngs(0))
    graphdef, params = nn.split(ours)
    their_graphdef, _ = nn.split(theirs)
    x = jnp.asarray(X.reshape(-1)[: np.prod(shape)].reshape(shape))

    def value_and_gradients(graphdef):
        def loss(params, x):
            y = nn.merge(graphdef, params)(x)
            return (y.astype(jnp.float32) ** 2).sum(), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    gradients, y = value_and_gradients(graphdef)
    expected_gradients, expected = value_and_gradients(their_graphdef)
    assert y.dtype == expected.dtype == ("bfloat16" if dtype else "float32")
    assert_close(y, expected)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert a.dtype == b.dtype == "float32"
        assert_close(a, b, dtype=y.dtype, scale=2)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_layers_projected_together_are_the_layers_one_by_one(dtype, use_bias):
    layers = [
        randomised(nn.Linear(D, width, use_bias=use_bias, dtype=dtype, rngs=nnx.Rngs(i)))
        for i, width in enumerate((7, 3, 11))
    ]
    together = nn.project(X, layers)
    assert [y.shape[-1] for y in together] == [7, 3, 11]
    for y, layer in zip(together, layers, strict=True):
        assert y.dtype == layer(X).dtype
        assert_close(y, layer(X))
    [alone] = nn.project(X, layers[:1])
    assert_close(alone, together[0])
