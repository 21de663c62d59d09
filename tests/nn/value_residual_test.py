"""`ValueResidualAttention`: the first layer's values in a later layer."""

import jax
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn, ops
from qkv_jax.nn.value_residual import ValueResidualAttention
from qkv_jax.ops import masks
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, S, D, C, N, K, H = 2, 3, 5, 12, 7, 6, 3, 2
RANDOM = np.random.RandomState(0)
X, CONTEXT = RANDOM.randn(B, T, D).astype("f"), RANDOM.randn(B, S, C).astype("f")
FIRST = RANDOM.randn(B, T, K, H).astype("f")


def attention(**kwargs):
    kwargs = {"num_kv_heads": K, **kwargs}
    return ValueResidualAttention(D, N, rngs=nnx.Rngs(0), **kwargs)


def test_the_values_are_the_mixture():
    captured = []

    def capture(q, k, v, **kwargs):
        captured.append(v)
        return ops.attention(q, k, v, **kwargs)

    module = randomised(attention(op=capture, use_bias=True))
    module(X, mask=masks.Causal(), first_values=FIRST)
    own = module.project(X)[2]
    expected = module.lambda_first[...] * FIRST + module.lambda_own[...] * own
    assert_close(captured[0], expected)


def test_without_first_values_it_is_plain_attention():
    plain = nn.MultiHeadAttention(D, N, num_kv_heads=K, rotary_base=100.0, rngs=nnx.Rngs(0))
    module = attention(rotary_base=100.0)
    np.testing.assert_array_equal(module(X, mask=masks.Causal()), plain(X, mask=masks.Causal()))


def test_half_of_ones_own_values_and_half_of_the_same_are_plain_attention():
    module = attention()
    assert_close(module(X, first_values=module.values(X)), module(X))
    assert np.abs(module(X, first_values=FIRST) - module(X)).max() > 0.1


@pytest.mark.parametrize(
    "kwargs", [{}, {"use_bias": True}, {"share_kv": True}, {"num_kv_heads": N, "share_qk": True}],
    ids=repr,
)  # fmt: skip
def test_values_are_those_that_the_layer_projects(kwargs):
    module = randomised(attention(**kwargs))
    assert_close(module.values(X), module.project(X)[2])


def test_values_of_a_context_are_handed_on():
    first, later = (randomised(attention(context_width=C), scale) for scale in (0.5, 0.7))
    values = first.values(CONTEXT)
    assert values.shape == (B, S, K, H)
    out = later(X, CONTEXT, first_values=values)
    assert out.shape == X.shape
    assert np.abs(out - later(X, CONTEXT)).max() > 0.01


def test_it_is_causal_and_trains_every_parameter_and_the_first_values():
    graphdef, params = nn.split(randomised(attention(use_bias=True)))

    def loss(params, x, first):
        out = nn.merge(graphdef, params)(x, mask=masks.Causal(), first_values=first)
        return (out[:, 1] ** 2).sum()

    of_params, of_x, of_first = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, X, FIRST)
    for gradient in (of_x, of_first):
        np.testing.assert_array_equal(gradient[:, 2:], 0)
        assert (np.abs(gradient[:, :2]).reshape(B, 2, -1).max(-1) > 0).all()
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(of_params))


def test_parameters_and_state():
    module = attention()
    plain = nn.MultiHeadAttention(D, N, num_kv_heads=K, rngs=nnx.Rngs(0))
    assert nn.count(nn.split(module)[1]) == nn.count(nn.split(plain)[1]) + 2
    assert module.lambda_first[...] == module.lambda_own[...] == 0.5
    assert module.state_size(10) == plain.state_size(10)


def test_bfloat16_keeps_its_dtype():
    dtypes = []

    def watch(q, k, v, **kwargs):
        dtypes.append(v.dtype)
        return ops.attention(q, k, v, **kwargs)

    module = attention(dtype="bfloat16", op=watch)
    assert module.values(X).dtype == "bfloat16"
    out = module(X, first_values=FIRST)  # in float32, from a layer of another dtype
    assert out.dtype == dtypes[0] == "bfloat16"
    assert_close(out, attention()(X, first_values=FIRST), scale=4)


def test_values_of_another_shape_are_an_error():
    message = r"first_values: wanted \[B, S, K, h\] = \[2, 3, 3, 2\], got \[2, 3, 6, 2\]"
    with pytest.raises(ValueError, match=message):
        attention()(X, first_values=np.zeros((B, T, N, H)))
