"""Forgetting attention: a softmax with a forget gate, as recurrent networks have one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import arguments, scores
from qkv_jax.ops.attention import choose
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.operands import described, is_array
from qkv_jax.ops.scores import Score

Array = jax.Array | np.ndarray


def forgetting_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    log_forget: Array,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """Attention that forgets what lies behind, at a rate that depends on what came since.

        F[t, n] = log_forget[0, n] + ... + log_forget[t, n]
        logits[n, t, s] = score(scale * q[t, n] . k[s, n // G]) + F[t, n] - F[s, n]

    so that a key's weight shrinks by the forget gates of all tokens after it, up to the query's
    own. Exact: O(T S) time, linear memory. With log_forget = 0 it is `attention`, with a constant
    per head ALiBi. The gates run forward: meant for causal masks, it would raise the weights of
    keys after the query. The Forgetting Transformer, Lin et al. 2025, arxiv.org/abs/2503.02130.

    Args:
      q, k, v: as in `attention`, of the same tokens: T = S.
      log_forget: logarithms of the forget gates, floating [B, T, N], at most 0. Tokens follow one
        another in the order of the array, whatever their positions.
      mask, score, scale, dropout_rate, dropout_rng, q_positions, kv_positions: as in `attention`.

    Returns:
      [B, T, N, h], in the dtype of `v`.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    args = arguments.check(
        q, k, v, mask=mask, score=score, scale=scale, sinks=None, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    B, T, N, _ = args.q.shape
    if args.k.shape[1] != T:
        raise ValueError(
            f"k: wanted the keys of the {T} tokens that q has, got {args.k.shape[1]}. To decode, "
            "give `attention` the score `forget_score` of the running sums"
        )
    floating = is_array(log_forget) and jnp.issubdtype(log_forget.dtype, jnp.floating)
    if not floating or log_forget.shape != (B, T, N):
        raise ValueError(
            f"log_forget: wanted floating [B, T, N] = {[B, T, N]}, got {described(log_forget)}"
        )
    sums = running_sums(log_forget)
    args = dataclasses.replace(args, score=(*args.score, forget_score(sums, sums).aligned()))
    out, _ = choose(args, None, stats=False)(args, entropy=False)
    return out


def running_sums(log_forget: Array) -> jax.Array:
    """F: the sum of `log_forget` [B, T, N] up to and including each token, at least float32."""
    dtype = jnp.promote_types(log_forget.dtype, jnp.float32)
    return jnp.cumsum(jnp.asarray(log_forget, dtype), axis=1)


def forget_score(q_sums: Array, kv_sums: Array) -> Score:
    """The score `logits + F[t] - F[s]`.

    A decoder keeps F beside keys and values: a new token's is the last one plus its `log_forget`.

    Args:
      q_sums: F of the queries, floating [B, T, N].
      kv_sums: F of the keys, floating [B, S, N].
    """
    # [B, N, T, 1] and [B, N, 1, S]
    q_sums, kv_sums = (jnp.swapaxes(sums, 1, 2) for sums in (q_sums, kv_sums))
    return scores.from_function(_forgotten, q_sums[..., None], kv_sums[:, :, None])


def _forgotten(logits, q_pos, kv_pos, head, q_sums, kv_sums):
    return logits + (q_sums - kv_sums).astype(logits.dtype)
