"""Top-k attention against a loop that sorts, and full attention where k is large."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn, ops
from qkv_jax.ops import masks, rows, scores
from qkv_jax.ops.dropout import keep_mask
from qkv_jax.ops.top_k import TopK, largest, top_k_attention
from tests.tolerances import assert_close

B, T, S, N, K, H, h = 2, 5, 11, 6, 3, 4, 7
RANDOM = np.random.RandomState(0)
Q, KEYS, V = (RANDOM.randn(B, *shape) for shape in ((T, N, H), (S, K, H), (S, K, h)))
Q_POSITIONS = np.array([2, 4, 6, 8, 10])  # the first sees 3 keys
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CASES = {  # arguments, and what they do to a logit of query t and key s
    "plain": ({}, lambda logit, t, s: logit),
    "scaled": ({"scale": -0.7}, lambda logit, t, s: -0.7 * H**0.5 * logit),
    "causal": (
        {"mask": masks.Causal(), "q_positions": Q_POSITIONS},
        lambda logit, t, s: logit if s <= Q_POSITIONS[t] else None,
    ),
    "scores": (
        {"mask": ~masks.Prefix(1), "score": (scores.Alibi(np.full(N, 0.5)), scores.Softcap(2.0)),
         "q_positions": Q_POSITIONS},
        lambda logit, t, s: 2 * np.tanh((logit - 0.5 * abs(Q_POSITIONS[t] - s)) / 2) if s else None,
    ),
    "dropout": ({"dropout_rate": 0.3, "dropout_rng": jax.random.key(2)}, lambda logit, t, s: logit),
    "nothing allowed": ({"mask": masks.Prefix(0)}, lambda logit, t, s: None),
}  # fmt: skip


def loop(num_keys, kwargs, logit_of):
    """The output [B, T, N, h], and which keys a query attends to."""
    out, kept = np.zeros((B, T, N, h)), np.zeros((B, N, T, S), bool)
    rate = kwargs.get("dropout_rate", 0.0)
    keep = np.ones((B, N, T, S))
    if rate:
        batch, head, query, key = np.ogrid[:B, :N, :T, :S]
        rng = kwargs["dropout_rng"]
        keep = keep_mask(rng, rate, batch=batch, head=head, query=query, key=key) / (1 - rate)
    for b, t, n in np.ndindex(B, T, N):
        dots = KEYS[b, :, n * K // N] @ Q[b, t, n] / H**0.5
        logits = {s: x for s in range(S) if (x := logit_of(dots[s], t, s)) is not None}
        keys = sorted(logits, key=logits.get, reverse=True)[:num_keys]
        weights = np.exp([logits[s] for s in keys])
        for weight, s in zip(weights / weights.sum() if keys else [], keys, strict=True):
            out[b, t, n] += weight * keep[b, n, t, s] * V[b, s, n * K // N]
            kept[b, n, t, s] = True
    return out, kept


@pytest.mark.parametrize("num_keys", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_it_is_a_softmax_over_the_first_of_the_sorted_logits(name, num_keys):
    kwargs, logit_of = CASES[name]
    with jax.enable_x64(True):
        out = compiled(lambda *x: TopK(num_keys)(*x, **kwargs))(Q, KEYS, V)
        assert_close(out, loop(num_keys, kwargs, logit_of)[0])


@pytest.mark.parametrize("num_keys", [S, S + 5])
@pytest.mark.parametrize("name", CASES)
def test_as_many_keys_as_there_are_make_it_full_attention(name, num_keys):
    def values_and_gradients(f, q, k, v):
        out, pullback = jax.vjp(functools.partial(f, **CASES[name][0]), q, k, v)
        return out, *pullback(jnp.cos(out))

    with jax.enable_x64(True):
        ours, full = compiled(
            lambda *x: [values_and_gradients(f, *x) for f in (TopK(num_keys), ops.attention)]
        )(Q, KEYS, V)
        for a, b in zip(ours, full, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("name", ["causal", "scores", "nothing allowed"])
def test_gradients_are_those_of_attention_under_a_mask_of_the_kept_keys(name, monkeypatch):
    kwargs, logit_of = CASES[name]
    _, kept = loop(3, kwargs, logit_of)
    monkeypatch.setattr(rows, "LOGITS", 2 * B * N * S)  # two queries at a time

    def gradients(f, **others):
        def loss(q, k, v):
            return jnp.sin(f(q, k, v, **(kwargs | others))).sum()

        return jax.grad(loss, (0, 1, 2))

    with jax.enable_x64(True):
        found, expected = compiled(
            lambda *x: [
                gradients(TopK(3))(*x),
                gradients(ops.attention, mask=masks.Dense(kept))(*x),
            ]
        )(Q, KEYS, V)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)


def test_of_equal_logits_the_first_are_kept_and_never_more_than_asked_for():
    logits = np.array([
        [1.0, 2, 2, 2, 0], [5, 5, 5, 5, 5], [0.0, -0.0, 0, -0.0, -1], [-1, -2, -3, -4, -5],
    ])  # fmt: skip
    allowed = np.ones((4, 5), bool)
    np.testing.assert_array_equal(
        jax.jit(largest, static_argnums=2)(logits, allowed, 2),
        [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]],
    )
    allowed = np.array([[1, 1, 0, 1, 1], [0, 0, 0, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(
        largest(logits, allowed, 2),
        [[0, 1, 0, 1, 0], [0, 0, 0, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1]],
    )


def test_causality_by_gradient():
    x = [RANDOM.randn(B, S, n, H) for n in (N, K, K)]
    kwargs = {"mask": masks.Causal()}
    pull = compiled(lambda q, k, v: jax.vjp(lambda *y: TopK(3)(q, *y, **kwargs)[:, 4], k, v)[1](
        jnp.ones((B, N, H))
    ))  # fmt: skip
    for grad in pull(*(a.astype("f") for a in x)):
        used = np.abs(grad).max((0, 2, 3)) > 0
        assert used[:5].any() and not used[5:].any()


def test_bfloat16_is_computed_in_float32():
    q, k, v = (jnp.asarray(x, "bfloat16") for x in (Q, KEYS, V))
    out = compiled(TopK(3))(q, k, v)
    assert out.dtype == "bfloat16"
    assert_close(out, compiled(TopK(3))(*(x.astype("f") for x in (q, k, v))), "bfloat16")


def test_an_op_is_a_value_that_a_module_carries():
    modules = [nn.MultiHeadAttention(12, N, op=TopK(3), rngs=nnx.Rngs(0)) for _ in "ab"]
    a, b = (nn.split(m)[0] for m in modules)
    assert a == b and hash(a) == hash(b)
    x = RANDOM.randn(B, T, 12).astype("f")
    out = top_k_attention(*modules[0].project(x), num_keys=3, mask=masks.Causal())
    assert_close(modules[0](x, mask=masks.Causal()), modules[0].out(out.reshape(B, T, -1)))


@pytest.mark.parametrize("num_keys", [0, -1, 2.0])
def test_the_number_of_keys_is_a_positive_integer(num_keys):
    for build in (lambda: TopK(num_keys), lambda: top_k_attention(Q, KEYS, V, num_keys=num_keys)):
        with pytest.raises(ValueError, match="num_keys: wanted a positive integer, got"):
            build()
