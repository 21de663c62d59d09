"""What is linear attention's own; `chunks_test` compares its forms with loops."""

import jax
import numpy as np
import pytest

from qkv_jax.ops.linear import linear_attention, linear_attention_bidirectional
from tests.tolerances import assert_close

B, T, S, N, K, H, h = 2, 7, 5, 6, 3, 4, 3
RANDOM = np.random.RandomState(0)
Q = RANDOM.randn(B, T, N, H).astype("f")
KEYS, V = RANDOM.randn(B, S, K, H).astype("f"), RANDOM.randn(B, S, K, h).astype("f")


def test_retention_is_its_paper_s_parallel_form():
    q, k, v = Q, np.repeat(KEYS, 2, 2)[:, [0, 1, 2, 3, 4, 0, 2]], np.ones((B, T, N, h), "f")
    gamma = 1 - 2.0 ** (-5 - np.arange(N))
    t, s = np.arange(T)[:, None], np.arange(T)
    D = np.where(t >= s, gamma[:, None, None] ** (t - s), 0)
    weights = np.einsum("btnd,bsnd->bnts", q, k) * D
    log_decay = np.broadcast_to(np.log(gamma), (B, T, N)).astype("f")
    out, _ = linear_attention(q, k, v, log_decay=log_decay, scale=1.0, chunk_size=4)
    assert_close(out, np.einsum("bnts,bsnd->btnd", weights, v))


def test_without_an_order_every_query_reads_every_real_key():
    real = np.arange(S) < np.array([[2], [5]])
    k, v = (np.repeat(np.where(real[..., None, None], x, 0), 2, 2) for x in (KEYS, V))
    weights = np.einsum("btnd,bsnd->bnts", Q, k) / np.sqrt(H)
    expected = np.einsum("bnts,bsnd->btnd", weights, v)
    out = jax.jit(linear_attention_bidirectional)(Q, KEYS, V, lengths=np.array([2, 5]))
    assert_close(out, expected)


def test_causal_keys_are_the_queries_own_tokens():
    with pytest.raises(ValueError, match=r"k: wanted .* \[2, 7, K, 4\], got float32\[2,5,3,4\]"):
        linear_attention(Q, KEYS, V)
