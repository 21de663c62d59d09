"""Modules as pure functions of a nested dict."""

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from tests.tolerances import assert_close

X = np.random.RandomState(0).randn(2, 3, 4).astype("f")


def attention(seed=0, num_heads=2):
    return nn.MultiHeadAttention(4, num_heads, qk_norm=True, rngs=nnx.Rngs(seed))


def test_merge_is_the_inverse_of_split():
    module = attention()
    graphdef, params = nn.split(module)
    again = nn.merge(graphdef, params)
    np.testing.assert_array_equal(again(X), module(X))
    chex.assert_trees_all_equal(nn.split(again)[1], params)


def test_parameters_are_plain_nested_dicts_of_arrays():
    def assert_plain(node):
        if isinstance(node, jax.Array):
            return
        assert type(node) is dict
        for child in node.values():
            assert_plain(child)

    _, params = nn.split(attention())
    assert_plain(params)
    assert params.keys() == {"query", "key", "value", "out", "query_norm", "key_norm"}
    assert nn.count(params) == 4 * 4 * 4 + 2 * 2


def test_structures_of_equal_modules_are_equal_and_hash_alike():
    (one, _), (two, _), (other, _) = map(nn.split, (attention(0), attention(1), attention(0, 1)))
    assert one == two and hash(one) == hash(two)
    assert one != other


@pytest.mark.parametrize("as_argument", [True, False])
def test_equal_structures_compile_once(as_argument):
    @jax.jit
    @chex.assert_max_traces(1)
    def apply(params, x):
        return nn.merge(nn.split(attention())[0], params)(x)

    static = jax.jit(
        chex.assert_max_traces(1)(lambda graphdef, params, x: nn.merge(graphdef, params)(x)),
        static_argnums=0,
    )
    chex.clear_trace_counter()
    for seed in (0, 1):
        graphdef, params = nn.split(attention(seed))
        out = static(graphdef, params, X) if as_argument else apply(params, X)
        assert_close(out, attention(seed)(X))
