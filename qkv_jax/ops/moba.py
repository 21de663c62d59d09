"""Mixture of block attention: each query attends to the blocks of keys that suit it best."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops.arguments import check_positive
from qkv_jax.ops.block_selection import SCORES, attend_chosen, best_blocks, check
from qkv_jax.ops.cache import Cache, among_all, of_these
from qkv_jax.ops.masks import Causal, Mask
from qkv_jax.ops.rows import by_rows
from qkv_jax.ops.scores import Score

Array = jax.Array | np.ndarray


def moba_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block_size: int,
    num_blocks: int,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """Mixture of block attention, MoBA (Lu et al. 2025, arxiv.org/abs/2502.13189).

        gate[t, j] = q[t] . mean of the keys of block j
        chosen[t]  = the block of t, and the num_blocks - 1 others of largest gate
        out[t]     = softmax over s in chosen[t] (scale * q[t] . k[s]) v[s]

    Under `Causal()` the others are blocks before that of t, and keys after t are hidden. Each query
    head chooses for itself; the choice has no gradient. Approximates attention over all keys, and
    is it where num_blocks covers them. O(T num_blocks block_size), and T S / block_size products
    for the gates.

    Args:
      q, k, v: as in `ops.attention`, with T == S.
      block_size: keys in a block.
      num_blocks: how many blocks a query attends to, its own included.
      mask: None, `Causal()`, `Lengths(...)`, or these joined by `&`.
      score, q_positions, kv_positions: None; tokens stand in array order.
      scale, dropout_rate, dropout_rng: as in `ops.attention`.

    Returns:
      [B, T, N, h], in the dtype of v.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
      NotImplementedError: for another mask, a score or positions.
    """
    check_positive(block_size=block_size, num_blocks=num_blocks)
    args, causal, lengths = check(
        q, k, v, who="MoBA", mask=mask, score=score, scale=scale, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    chosen = blocks_by_mean_key(
        args.q, args.k, block_size=block_size, num_blocks=num_blocks, causal=causal, lengths=lengths
    )
    return attend_chosen(args, chosen, block_size=block_size, causal=causal, lengths=lengths)


def blocks_by_mean_key(
    q: jax.Array,
    k: jax.Array,
    *,
    block_size: int,
    num_blocks: int,
    causal: bool,
    lengths: int | Array | None = None,
) -> jax.Array:
    """MoBA's choice: int32 [B, T, N, num_blocks], -1 where there are fewer blocks."""
    B, T, N, _ = q.shape
    K, blocks = k.shape[2], np.arange(-(-T // block_size))
    means, filled = _mean_keys(k, block_size, lengths)

    def choose(start: int | jax.Array, size: int) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(q, start, size, axis=1).astype(means.dtype)
        gates_BTKGm = jnp.einsum("BTKGH,BmKH->BTKGm", rows.reshape(B, size, K, N // K, -1), means)
        gates = gates_BTKGm.reshape(B, size, N, len(blocks))
        own = ((start + np.arange(size)) // block_size)[:, None, None]
        open_to_choice = blocks < own if causal else filled[:, None, None]
        gates = jnp.where(open_to_choice, gates, -jnp.inf)
        return best_blocks(jnp.where(blocks == own, jnp.inf, gates), num_blocks)

    return by_rows(choose, T, max(1, SCORES // max(1, B * N * len(blocks))))


def _mean_keys(
    k: jax.Array, block_size: int, lengths: int | Array | None
) -> tuple[jax.Array, jax.Array]:
    """The mean of the keys of each block, [B, blocks, K, H], and whether it has any, [B, blocks].

    In float32 at least; a row's keys from its length on do not count.
    """
    B, S, K, H = k.shape
    lengths = jnp.broadcast_to(jnp.asarray(S if lengths is None else lengths), (B,))
    real = np.arange(S) < lengths[:, None]
    k = jnp.where(real[..., None, None], k, 0).astype(jnp.promote_types(k.dtype, jnp.float32))
    rest = -S % block_size
    count = jnp.pad(real, ((0, 0), (0, rest))).reshape(B, -1, block_size).sum(2)
    total = jnp.pad(k, ((0, 0), (0, rest), (0, 0), (0, 0))).reshape(B, -1, block_size, K, H).sum(2)
    return total / jnp.maximum(count, 1)[..., None, None], count > 0


@dataclasses.dataclass(frozen=True)
class MoBA:
    """`moba_attention` with its settings, for `nn.MultiHeadAttention(op=MoBA(64, 4))`."""

    block_size: int
    num_blocks: int

    def __call__(self, q: Array, k: Array, v: Array, **kwargs: Any) -> jax.Array:
        """`moba_attention` with the arguments given."""
        return moba_attention(
            q, k, v, block_size=self.block_size, num_blocks=self.num_blocks, **kwargs
        )

    def extend(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: Cache,
        *,
        positions: Array,
        lengths: Array | None,
        **kwargs: Any,
    ) -> tuple[jax.Array, Cache]:
        """New tokens after those of a cache: `nn.MultiHeadAttention.attend_cached`.

        It computes all rows, those of the queries that it was not asked for too.
        """
        (k, v), _, cache = cache.attended((k, v), positions, lengths)
        out = self(among_all(q, positions, k.shape[1]), k, v, mask=Causal(), **kwargs)
        return of_these(out, positions), cache
