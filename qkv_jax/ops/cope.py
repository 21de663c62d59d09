"""Contextual position encoding: positions that count what a query cares about, not tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import arguments
from qkv_jax.ops.arguments import Arguments
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.operands import described, is_array
from qkv_jax.ops.rows import attend_rows, masked_softmax
from qkv_jax.ops.scores import Score

Array = jax.Array | np.ndarray


def cope_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    embeddings: Array,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """Attention with contextual positions (CoPE, Golovneva et al. 2024, arxiv.org/abs/2405.18719).

        gate[t, s] = sigmoid(logit[t, s]) where mask allows, else 0
        p[t, s] = min(gate[t, s] + gate[t, s + 1] + ... + gate[t, S - 1], P - 1)
        weights = softmax over s of logit[t, s] + q[t] . e[p[t, s]]

    where logit = score(scale * q . k), and e between two whole positions is interpolated linearly.
    Under a causal mask p counts, from the query back to the key, the tokens that the query opens
    its gates to: with gates of 1, it is t - s + 1. Exact: O(T S) time, memory linear in T and S.

    Keys are counted in the order of the array. Where they are not ordered by position, p is not a
    distance; positions serve the mask and the score.

    Args:
      q, k, v: as in `attention`.
      embeddings: e, of the P positions 0 ... P-1, floating [P, H]; all heads share them.
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
    H = args.q.shape[-1]
    floating = is_array(embeddings) and jnp.issubdtype(embeddings.dtype, jnp.floating)
    if not floating or embeddings.shape[1:] != (H,) or len(embeddings) == 0:
        raise ValueError(
            f"embeddings: wanted floating [P, H] = [P, {H}], got {described(embeddings)}"
        )

    def weigh(rows: Arguments, logits: jax.Array, allowed: jax.Array) -> jax.Array:
        gates = jnp.where(allowed, jax.nn.sigmoid(logits), 0)
        p = jnp.minimum(jax.lax.cumsum(gates, axis=3, reverse=True), len(embeddings) - 1)
        scores_BNTP = jnp.einsum(
            "BTNH,PH->BNTP", rows.q.astype(rows.dtype), jnp.asarray(embeddings, rows.dtype)
        )
        return masked_softmax(logits + _interpolated(scores_BNTP, p), allowed)

    return attend_rows(args, weigh)


def _interpolated(table: jax.Array, p: jax.Array) -> jax.Array:
    """`table` [..., P] at the places p [..., S], each in [0, P - 1]."""
    P = table.shape[-1]
    floor = jax.lax.stop_gradient(jnp.floor(p))
    # Value and slope lie side by side in one long table: a single lookup finds both.
    pairs = jnp.stack([table, jnp.diff(table, append=table[..., -1:])], axis=-1).reshape(-1, 2)
    row = P * jnp.arange(table.size // P).reshape(*table.shape[:-1], 1)
    found = jnp.take(pairs, (row + floor.astype(jnp.int32)).reshape(-1), axis=0, mode="clip")
    value, slope = jnp.moveaxis(found.reshape(*p.shape, 2), -1, 0)
    return value + (p - floor) * slope
