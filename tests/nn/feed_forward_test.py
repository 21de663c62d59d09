"""Each activation and the network around it, against its formula."""

import math

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
erf = np.vectorize(math.erf)


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


FORMULAS = {
    "gelu": lambda x: x * (1 + erf(x / 2**0.5)) / 2,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "swiglu": lambda x: x / (1 + np.exp(-x)),
    "geglu": gelu_tanh,
}


def test_every_activation_has_its_formula_here():
    assert FORMULAS.keys() == nn.ACTIVATIONS.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_an_activation_is_its_formula(name):
    x = np.linspace(-6, 6, 101)
    assert_close(nn.ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), FORMULAS[name](x), scale=2)


def test_exact_gelu_is_that_of_jax_nn_with_its_derivative():
    x = jnp.linspace(-9, 9, 501)
    ours, theirs = nn.ACTIVATIONS["gelu"], lambda x: jax.nn.gelu(x, approximate=False)
    assert_close(ours(x), theirs(x))
    assert_close(jax.vmap(jax.grad(ours))(x), jax.vmap(jax.grad(theirs))(x))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_network_is_its_formula(name, use_bias):
    network = randomised(nn.FeedForward(D, F, activation=name, use_bias=use_bias, rngs=nnx.Rngs(0)))

    def linear(layer, x):
        kernel = np.asarray(layer.kernel[...], np.float64)
        return x @ kernel + (np.asarray(layer.bias[...], np.float64) if use_bias else 0)

    gated = name in ("swiglu", "geglu")
    hidden = FORMULAS[name](linear(network.gate if gated else network.up, X))
    if gated:
        hidden = hidden * linear(network.up, X)
    assert_close(network(X), linear(network.down, hidden), scale=4)


def test_parameter_counts():
    for name, matrices in {"gelu": 2, "swiglu": 3, "geglu": 3}.items():
        network = nn.FeedForward(D, F, activation=name, rngs=nnx.Rngs(0))
        assert nn.count(nn.split(network)[1]) == matrices * D * F
    network = nn.FeedForward(D, F, use_bias=True, rngs=nnx.Rngs(0))
    assert nn.count(nn.split(network)[1]) == 2 * D * F + F + D


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match=r"activation: wanted one of .*'gelu'.* got 'tanh'"):
        nn.FeedForward(D, F, activation="tanh", rngs=nnx.Rngs(0))


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    network = nn.FeedForward(D, F, dtype="bfloat16", rngs=nnx.Rngs(0))
    assert network(X).dtype == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(nn.split(network)[1])} == {"float32"}
