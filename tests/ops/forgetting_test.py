"""Forgetting attention against NumPy loops over its equation, and against what it contains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import masks, scores
from qkv_jax.ops.forgetting import forget_score, forgetting_attention, running_sums
from tests.tolerances import assert_close

B, T, N, K, H, h = 2, 7, 6, 3, 4, 5


def inputs(dtype="float64"):
    random = np.random.RandomState(0)
    q, k, v = (random.randn(B, T, *heads) for heads in ((N, H), (K, H), (K, h)))
    log_forget = -np.log1p(np.exp(random.randn(B, T, N)))
    return [x.astype(dtype) for x in (q, k, v, log_forget)]


def numpy_forgetting_attention(q, k, v, log_forget, length):
    """The weights' unnormalised size is exp(q . k) times the gates after the key, one by one."""
    out = np.zeros((B, T, N, h))
    for b, t, n in np.ndindex(B, T, N):
        keys = range(min(t + 1, length[b]))
        sizes = np.zeros(len(keys))
        for s in keys:
            sizes[s] = np.exp(q[b, t, n] @ k[b, s, n // 2] / np.sqrt(H))
            for between in range(s + 1, t + 1):
                sizes[s] *= np.exp(log_forget[b, between, n])
        if len(keys):
            out[b, t, n] = sizes / sizes.sum() @ v[b, : len(keys), n // 2]
    return out


def test_it_is_the_equation_row_by_row():
    with jax.enable_x64(True):
        q, k, v, log_forget = inputs()
        lengths = np.array([0, 5])
        mask = masks.Causal() & masks.Lengths(lengths)
        out = jax.jit(lambda *x: forgetting_attention(*x, log_forget=log_forget, mask=mask))(
            q, k, v
        )
        assert_close(out, numpy_forgetting_attention(q, k, v, log_forget, lengths), scale=10)


def test_gradients_are_those_of_a_dense_bias():
    def dense(q, k, v, log_forget):
        sums = jnp.swapaxes(jnp.cumsum(log_forget, 1), 1, 2)
        bias = scores.Bias(sums[..., None] - sums[:, :, None])
        return ops.attention(q, k, v, mask=masks.Causal(), score=(scores.Softcap(2.0), bias))

    def sparse(q, k, v, log_forget):
        return forgetting_attention(
            q, k, v, log_forget=log_forget, mask=masks.Causal(), score=scores.Softcap(2.0)
        )

    def gradients(f):
        return jax.jit(jax.grad(lambda *x: jnp.sum(f(*x) ** 3), argnums=range(4)))(*inputs())

    with jax.enable_x64(True):
        for ours, expected in zip(gradients(sparse), gradients(dense), strict=True):
            assert np.abs(expected).max() > 1e-2
            assert_close(ours, expected, scale=100)


def test_without_forgetting_it_is_attention_and_with_a_constant_rate_alibi():
    q, k, v, _ = inputs("float32")
    rates = np.linspace(0.1, 0.7, N, dtype="float32")
    for rate, score in ((np.zeros_like(rates), None), (rates, scores.Alibi(rates))):
        log_forget = np.broadcast_to(-rate, (B, T, N))
        out = forgetting_attention(q, k, v, log_forget=log_forget, mask=masks.Causal())
        assert_close(out, ops.attention(q, k, v, mask=masks.Causal(), score=score), scale=5)


def test_decoding_with_running_sums_is_the_last_row():
    q, k, v, log_forget = inputs("float32")
    whole = forgetting_attention(q, k, v, log_forget=log_forget, mask=masks.Causal())
    sums = running_sums(log_forget)
    last = ops.attention(
        q[:, -1:], k, v, mask=masks.Causal(), score=forget_score(sums[:, -1:], sums),
        q_positions=np.array([T - 1]),
    )  # fmt: skip
    assert_close(last, whole[:, -1:], scale=5)


def test_no_token_depends_on_a_later_gate():
    q, k, v, log_forget = inputs("float32")

    def rows(log_forget):
        out = forgetting_attention(q, k, v, log_forget=log_forget, mask=masks.Causal())
        return out[0].sum((-1, -2))

    size = np.abs(jax.jit(jax.jacrev(rows))(log_forget)[:, 0]).max(-1)
    np.testing.assert_array_equal(size[np.triu_indices(T, 1)], 0)
    # The first gate comes after no key.
    assert (size[np.tril_indices(T)] > 1e-3).sum() == T * (T - 1) // 2 and size[:, 0].max() < 1e-6


def test_half_precision_sums_are_made_in_single_precision():
    q, k, v, log_forget = (jnp.asarray(x, "bfloat16") for x in inputs("float32"))
    out = forgetting_attention(q, k, v, log_forget=log_forget, mask=masks.Causal())
    assert out.dtype == "bfloat16" and running_sums(log_forget).dtype == "float32"
    wide = forgetting_attention(
        *(x.astype("float32") for x in (q, k, v)), log_forget=log_forget, mask=masks.Causal()
    )
    assert_close(out, wide, "bfloat16")


def test_what_does_not_fit_is_named():
    q, k, v, log_forget = inputs("float32")
    with pytest.raises(ValueError, match=r"k: wanted the keys of the 7 tokens that q has, got 6"):
        forgetting_attention(q, k[:, 1:], v[:, 1:], log_forget=log_forget)
    wanted = r"log_forget: wanted floating \[B, T, N\] = \[2, 7, 6\], got "
    with pytest.raises(ValueError, match=wanted + r"float32\[2,7,3\]"):
        forgetting_attention(q, k, v, log_forget=log_forget[..., :3])
    with pytest.raises(ValueError, match=wanted + "None"):
        forgetting_attention(q, k, v, log_forget=None)
    with pytest.raises(ValueError, match=wanted + r"int64\[2,7,6\]"):
        forgetting_attention(q, k, v, log_forget=log_forget.astype(int))
