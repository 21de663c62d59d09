"""Attention to a large stored set of keys and values, of which each query reads the nearest."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import arguments
from qkv_jax.ops.arguments import Arguments
from qkv_jax.ops.dropout import dropped
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.reference import scored_logits
from qkv_jax.ops.rows import LOGITS, by_rows, cut, masked_softmax
from qkv_jax.ops.scores import Score
from qkv_jax.ops.top_k import check_num_keys

Array = jax.Array | np.ndarray
Search = Callable[..., tuple[jax.Array, jax.Array]]


def retrieve(
    q: Array,
    k: Array,
    *,
    num_keys: int,
    mask: Mask | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Exact search: the keys of largest dot product with each query, without a gradient.

    O(T S) in time, computed for a few queries at a time: memory linear in T and S. Whatever has
    this signature, an approximate search too, may stand in its place in `memory_attention`.

    Args:
      q: queries, floating [B, T, N, H].
      k: keys, floating [B, S, K, H].
      num_keys: how many keys to find; more than S finds S.
      mask, q_positions, kv_positions: which keys may be found, as in `ops.attention`.

    Returns:
      Indices of keys, int32 [B, T, N, num_keys], the largest product first; and which of them are
      found, bool of that shape: where a query may see fewer, the rest are not.
    """
    check_num_keys(num_keys)
    args = arguments.check(
        jax.lax.stop_gradient(q), jax.lax.stop_gradient(k), None, mask=mask, score=None, scale=1.0,
        sinks=None, dropout_rate=0.0, dropout_rng=None, q_positions=q_positions,
        kv_positions=kv_positions,
    )  # fmt: skip
    B, T, N, _ = args.q.shape
    S = args.k.shape[1]

    def search(start: int | jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        products, allowed = scored_logits(cut(args, start, size))
        products = jnp.where(allowed, products, -jnp.inf)
        values, keys = jax.lax.top_k(products, min(num_keys, S))
        return jnp.swapaxes(keys, 1, 2).astype(jnp.int32), jnp.swapaxes(values > -jnp.inf, 1, 2)

    return by_rows(search, T, max(1, LOGITS // max(1, B * N * S)))


def memory_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    num_keys: int,
    search: Search = retrieve,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """Attention to the nearest keys of a memory (Wu et al. 2022, arxiv.org/abs/2203.08913).

        found[t] = search(q[t], k), the num_keys keys of largest q[t] . k[s] where mask allows
        out[t]   = softmax over s in found[t] (scale * q[t] . k[s]) v[s]

    Memorizing Transformers' retrieval: `top_k_attention` whose search can be replaced. Besides the
    search, O(T num_keys) in time and memory. Approximates `ops.attention`. The search has no
    gradient; q, and the keys and values that were found, do.

    Args:
      q: queries, floating [B, T, N, H].
      k, v: the memory, floating [B, S, K, H] and [B, S, K, h].
      num_keys: how many keys a query reads.
      search: called as `retrieve` is, and returns what it returns.
      score: None: a score does not reach single keys.
      The others: as in `ops.attention`.

    Returns:
      [B, T, N, h], in the dtype of v; 0 where nothing was found.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
      NotImplementedError: for a score.
    """
    check_num_keys(num_keys)
    if score is not None:
        raise NotImplementedError("score: attention to a memory takes no scores")
    args = arguments.check(
        q, k, v, mask=mask, score=None, scale=scale, sinks=None, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    where = {"mask": mask, "q_positions": q_positions, "kv_positions": kv_positions}
    keys, found = search(args.q, args.k, num_keys=num_keys, **where)

    def attend(start: int | jax.Array, size: int) -> jax.Array:
        rows, at, there = (
            jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (args.q, keys, found)
        )
        return _attend_found(rows, at, there, args, start + np.arange(size))

    B, T, N, H = args.q.shape
    block_q = LOGITS // max(1, B * N * keys.shape[-1] * (H + args.v.shape[-1]))
    return by_rows(attend, T, max(1, block_q))


def _attend_found(q, keys, found, args: Arguments, query: Array) -> jax.Array:
    """Attention of queries [B, t, N, H] to the keys at indices [B, t, N, n]."""
    B, _, N, _ = q.shape
    K = args.k.shape[2]
    batch, head = np.arange(B)[:, None, None, None], np.arange(N)[:, None]
    k, v = (x[batch, keys, head // (N // K)].astype(args.dtype) for x in (args.k, args.v))
    logits = jnp.einsum("BTNH,BTNmH->BTNm", q.astype(args.dtype), k)
    weights = masked_softmax(logits * jnp.asarray(args.scale, args.dtype), found)
    weights = dropped(
        weights, args.dropout_rng, args.dropout_rate,
        batch=batch, head=head, query=query[:, None, None], key=keys,
    )  # fmt: skip
    return jnp.einsum("BTNm,BTNmh->BTNh", weights, v).astype(args.v.dtype)
