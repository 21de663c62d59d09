"""`MultiHeadAttention` against Flax's, against the plain functions, and its own choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn, ops
from qkv_jax.ops import masks, scores
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, S, D, C, N, H = 2, 3, 5, 12, 7, 6, 2
RANDOM = np.random.RandomState(0)
X, CONTEXT = RANDOM.randn(B, T, D).astype("f"), RANDOM.randn(B, S, C).astype("f")


def attention(**kwargs):
    return randomised(nn.MultiHeadAttention(D, N, rngs=nnx.Rngs(0), **kwargs))


def with_parameters_of(ours, **kwargs):
    """Flax's module with the parameters of ours."""
    theirs = nnx.MultiHeadAttention(
        N, D, N * ours.head_dim, decode=False, deterministic=True, rngs=nnx.Rngs(0), **kwargs
    )
    graphdef, params = nn.split(theirs)
    _, given = nn.split(ours)
    params |= {
        name: jax.tree.map(lambda x, like: x.reshape(like.shape), given[name], params[name])
        for name in ("query", "key", "value", "out")
    }
    return nn.merge(graphdef, params)


@pytest.mark.parametrize(("use_bias", "num_kv_heads"), [(True, None), (False, 3), (True, 1)])
def test_self_attention_is_flax_s(use_bias, num_kv_heads):
    ours = attention(use_bias=use_bias, num_kv_heads=num_kv_heads)
    theirs = with_parameters_of(ours, use_bias=use_bias, num_kv_heads=num_kv_heads)
    assert_close(ours(X), theirs(X), scale=5)
    allowed = np.tril(np.ones((T, T), bool))
    assert_close(ours(X, mask=masks.Causal()), theirs(X, mask=allowed), scale=5)


def test_cross_attention_is_flax_s():
    ours = attention(use_bias=True, context_width=C, head_dim=5)
    theirs = with_parameters_of(ours, in_kv_features=C)
    mask = np.arange(S) < np.array([4, 2]).reshape(B, 1, 1, 1)
    out = ours(X, CONTEXT, mask=masks.Lengths(np.array([4, 2])))
    assert_close(out, theirs(X, CONTEXT, mask=np.broadcast_to(mask, (B, 1, T, S))), scale=5)


def test_gradients_are_flax_s():
    ours = attention(use_bias=True)
    theirs = with_parameters_of(ours)

    def gradients(module):
        graphdef, params = nn.split(module)
        return jax.jit(jax.grad(lambda p: (nn.merge(graphdef, p)(X) ** 2).sum()))(params)

    for a, b in zip(*(jax.tree.leaves(gradients(m)) for m in (ours, theirs)), strict=True):
        assert_close(a.reshape(b.shape), b, scale=100)


def test_it_is_the_plain_function_of_its_matrices():
    module = attention(use_bias=True)
    _, p = nn.split(module)
    for name in ("query", "key", "value"):
        p[name]["bias"] = jnp.zeros_like(p[name]["bias"])
    module = nn.merge(nn.split(module)[0], p)
    expected = ops.basic.multi_head_attention(
        X, *(p[name]["kernel"] for name in ("query", "key", "value", "out")), p["out"]["bias"],
        num_heads=N, mask=np.tril(np.ones((T, T), bool)),
    )  # fmt: skip
    assert_close(module(X, mask=masks.Causal()), expected, scale=5)


@pytest.mark.parametrize(
    "kwargs", [{}, {"num_kv_heads": 3}, {"use_bias": True, "head_dim": 5}], ids=repr
)
def test_layers_projected_at_once_are_the_layers_alone(kwargs):
    module = attention(context_width=D, **kwargs)
    for context in (None, X[:, ::-1]):
        q, k, v = module.project(X, context)
        source = X if context is None else context
        assert q.shape == (B, T, N, module.head_dim)
        assert_close(q.reshape(B, T, -1), module.query(X), scale=5)
        assert_close(k.reshape(B, T, -1), module.key(source), scale=5)
        assert_close(v.reshape(B, T, -1), module.value(source), scale=5)


@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True}, {"num_kv_heads": 2}], ids=repr)
def test_shifting_all_positions_leaves_a_rotary_output_unchanged(kwargs):
    module = attention(rotary_base=100.0, **kwargs)
    positions = np.array([[0, 1, 2], [4, 7, 5]])
    out = module(X, mask=masks.Causal(), positions=positions)
    assert_close(module(X, mask=masks.Causal(), positions=positions + 50), out, scale=50)
    stretched = module(X, mask=masks.Causal(), positions=positions * 2)
    assert np.abs(stretched - out).max() > 1e-2
    default = module(X)
    assert_close(default, module(X, positions=np.arange(T)))
    assert np.abs(default - attention(**kwargs)(X)).max() > 1e-2


def test_rotary_positions_of_a_context_are_its_own():
    module = attention(rotary_base=100.0)
    whole = module(X, mask=masks.Causal())
    last = module(
        X[:, 2:], X, mask=masks.Causal(), positions=np.array([2]), context_positions=np.arange(T)
    )
    assert_close(last, whole[:, 2:], scale=5)


def test_qk_norm_makes_the_weights_blind_to_the_size_of_the_input():
    weights = []

    def watch(q, k, v, **kwargs):
        weights.append(ops.attention_weights(q, k, **kwargs))
        return ops.attention(q, k, v, **kwargs)

    attention(qk_norm=True, op=watch)(X)
    attention(qk_norm=True, op=watch)(X * 10)
    attention(op=watch)(X * 10)
    assert_close(weights[1], weights[0], scale=10)
    assert np.abs(weights[2] - weights[0]).max() > 0.1


def test_qk_norm_normalises_each_head_and_scales_by_a_parameter():
    captured = {}

    def capture(q, k, v, **kwargs):
        captured.update(q=q, k=k, v=v)
        return ops.attention(q, k, v, **kwargs)

    module = attention(qk_norm=True, op=capture)
    module(X)
    for name, norm in (("q", module.query_norm), ("k", module.key_norm)):
        raw = dict(zip("qkv", module.project(X), strict=True))[name]
        size = np.sqrt((np.asarray(raw) ** 2).mean(-1, keepdims=True) + 1e-6)
        assert_close(captured[name], raw / size * norm.scale[...], scale=5)
    assert_close(captured["v"], module.project(X)[2])


def test_shared_projections_share_their_parameters():
    matrix = D * N * H
    for kwargs, matrices in (
        ({}, 4),
        ({"share_kv": True}, 3),
        ({"share_qk": True}, 3),
        ({"share_kv": True, "share_qk": True}, 2),
    ):
        module = attention(**kwargs)
        assert nn.count(nn.split(module)[1]) == matrices * matrix
        q, k, v = module.project(X)
        assert (np.asarray(k) == np.asarray(v)).all() == bool(kwargs.get("share_kv"))
        assert (np.asarray(q) == np.asarray(k)).all() == bool(kwargs.get("share_qk"))
        q, k, v = module.project(X, X[:, ::-1])
        np.testing.assert_array_equal(k == v, bool(kwargs.get("share_kv")) * np.ones(k.shape, bool))
        if kwargs.get("share_qk"):
            assert_close(k, module.project(X[:, ::-1])[0])


def test_parameter_counts():
    # GQA: keys and values have K heads; a bias of every output; norms have H scales each.
    module = attention(num_kv_heads=3, head_dim=5, use_bias=True, qk_norm=True, context_width=C)
    expected = (D + 1) * N * 5 + 2 * (C + 1) * 3 * 5 + (N * 5 + 1) * D + 2 * 5
    assert nn.count(nn.split(module)[1]) == expected


def test_the_op_is_called_with_what_the_call_was_given():
    calls = []

    def op(q, k, v, **kwargs):
        calls.append(kwargs)
        return jnp.zeros(q.shape)

    mask, score = masks.Causal(), scores.Softcap(2.0)
    positions, context_positions = np.arange(3) + 4, np.arange(5)
    module = attention(op=op, context_width=C, dropout_rate=0.5)
    rng = jax.random.key(0)
    out = module(
        X, CONTEXT, mask=mask, score=score, positions=positions,
        context_positions=context_positions, rng=rng,
    )  # fmt: skip
    np.testing.assert_array_equal(out, 0)
    [kwargs] = calls
    assert kwargs["mask"] is mask and kwargs["score"] is score
    assert kwargs["q_positions"] is positions and kwargs["kv_positions"] is context_positions
    assert kwargs["dropout_rate"] == 0.5 and kwargs["dropout_rng"] is rng


def test_dropout_happens_only_with_a_key():
    module = attention(dropout_rate=0.5)
    np.testing.assert_array_equal(module(X), attention()(X))
    assert np.abs(module(X, rng=jax.random.key(0)) - module(X)).max() > 0.1
    np.testing.assert_array_equal(attention()(X, rng=jax.random.key(0)), attention()(X))


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    module = attention(dtype="bfloat16", qk_norm=True, rotary_base=100.0)
    out = module(X, mask=masks.Causal())
    assert out.dtype == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(nn.split(module)[1])} == {"float32"}
    assert_close(out, attention(qk_norm=True, rotary_base=100.0)(X, mask=masks.Causal()), scale=4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 5}, r"num_heads: wanted a divisor of width = 12 .* got 5"),
        ({"num_heads": 0}, r"num_heads.* got 0"),
        ({"num_kv_heads": 4}, r"num_kv_heads: wanted a divisor of num_heads = 6, got 4"),
        ({"num_kv_heads": 0}, r"num_kv_heads: wanted a divisor of num_heads = 6, got 0"),
        ({"share_qk": True, "num_kv_heads": 3}, r"share_qk: .* got 3 and 6 heads"),
        ({"share_qk": True, "context_width": 7}, r"share_qk: .* 7 and 12 wide"),
    ],
    ids=repr,
)
def test_sizes_that_do_not_fit_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        nn.MultiHeadAttention(**({"width": D, "num_heads": N} | kwargs), rngs=nnx.Rngs(0))
