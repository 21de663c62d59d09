"""Attention whose heads work together: talking heads, and heads in pairs that are subtracted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import arguments
from qkv_jax.ops.arguments import Arguments
from qkv_jax.ops.attention import choose
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.rows import attend_rows, masked_softmax
from qkv_jax.ops.scores import Score

Array = jax.Array | np.ndarray


def talking_heads_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mix_logits: Array,
    mix_weights: Array,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """Attention that mixes the heads' logits, and their weights (arxiv.org/abs/2003.02436).

        mixed[b, m] = sum over n of score(logits)[b, n] * mix_logits[n, m]
        weights = softmax over s of mixed where mask allows
        out[b, m] = sum over n of weights[b, n] * mix_weights[n, m], times the values of head m

    Shazeer et al. 2020. Logits are mixed before the mask is applied, and the mask is applied to the
    mixed weights again: with a mask per head, a key stays out of each head that may not see it.
    O(T S) time with 2 N^2 T S products for the mixing, and memory for the logits of a block of
    queries at a time.

    The arguments that are not listed are those of `ops.attention`.

    Args:
      mix_logits: floating [N, N], from the heads of q (rows) to the heads of the softmax.
      mix_weights: floating [N, N], from the heads of the softmax (rows) to those of the output.

    Returns:
      [B, T, N, h], in the dtype of `v`. A query that may attend to nothing gets 0.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    args = arguments.check(
        q, k, v, mask=mask, score=score, scale=scale, sinks=None, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    N = q.shape[2]
    for name, mix in (("mix_logits", mix_logits), ("mix_weights", mix_weights)):
        if np.shape(mix) != (N, N):
            raise ValueError(
                f"{name}: wanted floating [N, N] = [{N}, {N}], got {list(np.shape(mix))}"
            )

    def weigh(rows: Arguments, logits: jax.Array, allowed: jax.Array) -> jax.Array:
        weights = masked_softmax(_mixed(logits, mix_logits), allowed)
        return jnp.where(allowed, _mixed(weights, mix_weights), 0)

    return attend_rows(args, weigh)


def _mixed(x: jax.Array, mix: Array) -> jax.Array:
    return jnp.einsum("BNTS,NM->BMTS", x, jnp.asarray(mix, x.dtype))


def differential_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    lam: float | Array,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """The difference of two attentions to the same values (arxiv.org/abs/2410.05258).

        out_i = (softmax(q_i k_i) - lam_i softmax(q_{i + N/2} k_{i + K/2})) [v_i, v_{i + K/2}]

    Ye et al. 2024. N heads make N/2 pairs, head i with head i + N/2; a pair's values are those of
    both its key heads side by side, 2 h wide. That is the paper's arrangement, half as many heads
    with two queries and keys of width H each, in the shapes and with the parameters of plain
    attention. With G = N // K > 1, the pair of query heads i uses the pair of key heads i // G.
    Exact, O(T S) time and linear memory: it is one call of attention to doubled values. Each of the
    two softmaxes has dropout bits of its own.

    The arguments that are not listed are those of `ops.attention`; masks and scores see N heads.

    Args:
      q: queries, floating [B, T, N, H], N even.
      k: keys, floating [B, S, K, H], K even.
      v: values, floating [B, S, K, h].
      lam: the weight of what is subtracted: a number, or floating [N/2], one per pair; gradients
        flow to it.

    Returns:
      [B, T, N, h], in the dtype of `v`: the output of pair i, 2 h wide, is heads 2i and 2i + 1.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    args = arguments.check(
        q, k, v, mask=mask, score=score, scale=scale, sinks=None, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    B, T, N, _ = q.shape
    K, h = v.shape[2:]
    if K % 2:  # N is even where K is
        raise ValueError(f"k: key/value heads come in pairs, so wanted an even K, got K = {K}")
    if np.shape(lam) not in ((), (N // 2,)):
        raise ValueError(
            f"lam: wanted a number or floating [N/2] = [{N // 2}], "
            f"got an array of shape {list(np.shape(lam))}"
        )
    lam = jnp.reshape(jnp.asarray(lam, args.dtype), (-1, 1))
    # Wide until after the subtraction, which cancels.
    v_pairs = jnp.concatenate(jnp.split(args.v.astype(args.dtype), 2, axis=2), axis=-1)
    args = dataclasses.replace(args, v=jnp.concatenate([v_pairs, v_pairs], axis=2))
    out, _ = choose(args, None, stats=False)(args, entropy=False)
    first, second = jnp.split(out, 2, axis=2)
    return (first - lam * second).reshape(B, T, N, h).astype(v.dtype)
