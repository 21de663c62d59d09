"""`ForgettingAttention`: its gate, and what it shares with `MultiHeadAttention`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn, ops
from qkv_jax.nn.forgetting import ForgettingAttention
from qkv_jax.ops import masks, scores
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, D, N, K = 2, 5, 12, 6, 3
X = np.random.RandomState(0).randn(B, T, D).astype("f")


def forgetting(**kwargs):
    return ForgettingAttention(D, N, rngs=nnx.Rngs(0), **kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"num_kv_heads": K, "rotary_base": 100.0}], ids=repr)
def test_it_is_attention_with_the_gates_as_a_bias(kwargs):
    module = randomised(forgetting(**kwargs))
    _, params = nn.split(module)
    gate = params["forget"]
    sums = np.cumsum(jax.nn.log_sigmoid(X @ gate["kernel"] + gate["bias"]), 1).swapaxes(1, 2)
    bias = scores.Bias(sums[..., None] - sums[:, :, None])
    plain = nn.MultiHeadAttention(D, N, rngs=nnx.Rngs(1), **kwargs)
    plain = nn.merge(nn.split(plain)[0], {k: v for k, v in params.items() if k != "forget"})
    for module_mask in (masks.Causal(), masks.Causal() & masks.Lengths(np.array([3, 5]))):
        out = jax.jit(lambda x, mask=module_mask: module(x, mask=mask))(X)
        assert_close(out, plain(X, mask=module_mask, score=bias), scale=10)


def test_before_training_each_head_forgets_at_its_own_slow_rate():
    module = forgetting(decay_times=(8.0, 200.0))
    rates = np.exp(jax.nn.log_sigmoid(module.forget.bias[...]))
    np.testing.assert_allclose(
        rates ** np.geomspace(8.0, 200.0, N), np.full(N, np.exp(-1)), rtol=1e-3
    )
    np.testing.assert_array_less(0.9, np.asarray(jax.nn.sigmoid(forgetting().forget.bias[...])))


def test_a_token_s_output_depends_on_no_later_token():
    module = randomised(forgetting())
    rows = lambda x: module(x, mask=masks.Causal())[0].sum(-1)  # noqa: E731
    size = np.abs(jax.jit(jax.jacrev(rows))(X)[:, 0]).max(-1)
    assert (size[np.tril_indices(T)] > 0).all()
    np.testing.assert_array_equal(size[np.triu_indices(T, 1)], 0)


def test_the_gate_learns():
    graphdef, params = nn.split(forgetting())
    loss = lambda p: jnp.sum(nn.merge(graphdef, p)(X, mask=masks.Causal()) ** 2)  # noqa: E731
    gradients = jax.jit(jax.grad(loss))(params)["forget"]
    assert (np.abs(gradients["bias"]) > 0).all() and (np.abs(gradients["kernel"]) > 0).all()


def test_sizes():
    module = forgetting(num_kv_heads=K)
    parameters = nn.count(nn.split(module)[1])
    assert parameters == 2 * D * D + 2 * D * D // 2 + (D + 1) * N
    assert module.state_size(7) == 7 * (2 * K * 2 + N)
    assert nn.split(module)[0] == nn.split(forgetting(num_kv_heads=K))[0]


def test_bfloat16_gates_are_summed_in_float32():
    module = randomised(forgetting(dtype="bfloat16"))
    out = module(X, mask=masks.Causal())
    assert out.dtype == "bfloat16"
    assert_close(out, randomised(forgetting())(X, mask=masks.Causal()), scale=4)


def test_what_it_cannot_do_is_named():
    with pytest.raises(ValueError, match="context: forgetting attention is of a sequence with"):
        forgetting()(X, X)
    with pytest.raises(ValueError, match=r"decay_times: wanted two positive numbers, got \(0, 3\)"):
        forgetting(decay_times=(0, 3))
    with pytest.raises(TypeError, match="op"):
        forgetting(op=ops.attention)
