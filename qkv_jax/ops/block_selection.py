"""Attention of each query to a few blocks of keys that were chosen for it.

    out[t] = softmax over s in the chosen blocks of t (scale * q[t] . k[s]) v[s]

MoBA (`moba`) and native sparse attention (`native_sparse`) choose by different rules and share
this. Choices are integers `chosen` [B, T, R, n]: for each query, n different blocks of keys, or -1
for none. R divides N: the G = N / R query heads of a group choose together, and share a key head.

`attend_by_mask` is the readable form, and the faster one for short sequences: T x S. The time and
the memory of `attend_by_tiles` are O(T n block_size): keys do not travel to queries, queries travel
to the blocks that they chose, as tokens travel to experts. Sorted by block, they are cut into tiles
of queries with a block in common, and a tile is one matrix product.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import arguments
from qkv_jax.ops.arguments import Arguments
from qkv_jax.ops.attention import attention
from qkv_jax.ops.dropout import dropped
from qkv_jax.ops.masks import Causal, Dense, Lengths, Mask, order_of

Array = jax.Array | np.ndarray

SCORES = 2**18  # of blocks, at once while choosing: they stay in a CPU's cache
SHORT = 1024  # up to so many tokens, the mask is the faster form on a CPU
# In one step of the other: as many groups as make so many; one makes n T G block_size.
LOGITS = 2**21


def best_blocks(importance: Array, num_blocks: int) -> jax.Array:
    """The blocks of greatest importance; of equals the first. The choice has no gradient.

    Args:
      importance: floating [..., blocks]; -inf where a block may not be chosen.
      num_blocks: n.

    Returns:
      int32 [..., n]; -1 where fewer may be chosen.
    """
    n = min(num_blocks, importance.shape[-1])
    values, blocks = jax.lax.top_k(jax.lax.stop_gradient(importance), n)
    chosen = jnp.where(values > -jnp.inf, blocks, -1).astype(jnp.int32)
    missing = [(0, 0)] * (chosen.ndim - 1) + [(0, num_blocks - n)]
    return jnp.pad(chosen, missing, constant_values=-1)


def check(
    q: Array, k: Array, v: Array, *, who: str, mask: Mask | None, **kwargs: Any
) -> tuple[Arguments, bool, int | Array | None]:
    """What `arguments.check` and `masks.order_of` return, for a function that chooses blocks.

    Raises:
      ValueError: as `arguments.check`, or where T != S.
      NotImplementedError: for what is not about tokens in array order, or does not reach the
        blocks: other masks, scores, positions.
    """
    for name in ("score", "q_positions", "kv_positions"):
        if kwargs[name] is not None:
            raise NotImplementedError(f"{name}: {who} takes tokens in array order and no scores")
    causal, lengths = order_of(mask, who)
    if np.ndim(q) == np.ndim(k) == 4 and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"k: {who} is self-attention, so wanted T = {q.shape[1]} keys, got {k.shape[1]}"
        )
    args = arguments.check(q, k, v, mask=mask, sinks=None, **kwargs)
    return args, causal, lengths


def attend_chosen(
    args: Arguments,
    chosen: Array,
    *,
    block_size: int,
    causal: bool,
    lengths: int | Array | None = None,
) -> jax.Array:
    """Attention to the keys of the chosen blocks that order and lengths allow.

    Args:
      args: checked arguments with T == S; mask, score, sinks and positions are not read.
      chosen: integers [B, T, R, n]; K divides R, R divides N.
      block_size: keys in a block.
      causal: whether keys after the query are hidden.
      lengths: how many keys each row has, an integer or integers [B]; None: all.

    Returns:
      [B, T, N, h], in the dtype of v.
    """
    attend = attend_by_mask if args.q.shape[1] <= SHORT else attend_by_tiles
    return attend(args, chosen, block_size=block_size, causal=causal, lengths=lengths)


def selection_mask(chosen: Array, *, num_heads: int, num_keys: int, block_size: int) -> Dense:
    """The choices as a mask, bool [B, N, T, S]: `kv // block_size in chosen`."""
    block_of_key = np.arange(num_keys) // block_size
    allowed_BTRS = (jnp.asarray(chosen)[..., None] == block_of_key).any(-2)
    G = num_heads // chosen.shape[2]
    return Dense(jnp.repeat(jnp.swapaxes(allowed_BTRS, 1, 2), G, axis=1))


def attend_by_mask(
    args: Arguments,
    chosen: Array,
    *,
    block_size: int,
    causal: bool,
    lengths: int | Array | None = None,
) -> jax.Array:
    """`attend_chosen` as attention under a mask, T x S."""
    _, T, N, _ = args.q.shape
    mask = selection_mask(chosen, num_heads=N, num_keys=T, block_size=block_size)
    if causal:
        mask = mask & Causal()
    if lengths is not None:
        mask = mask & Lengths(lengths)
    return attention(
        args.q, args.k, args.v, mask=mask, scale=args.scale,
        dropout_rate=args.dropout_rate, dropout_rng=args.dropout_rng,
    )  # fmt: skip


def attend_by_tiles(
    args: Arguments,
    chosen: Array,
    *,
    block_size: int,
    causal: bool,
    lengths: int | Array | None = None,
) -> jax.Array:
    """`attend_chosen` with the queries sorted by block."""
    B, T, N, H = args.q.shape
    K, h = args.v.shape[2:]
    R, n = chosen.shape[2:]
    G, num_blocks = N // R, -(-T // block_size)

    def key_blocks(x_BSKh: jax.Array) -> jax.Array:
        x = jnp.pad(x_BSKh, ((0, 0), (0, num_blocks * block_size - T), (0, 0), (0, 0)))
        x = jnp.repeat(jnp.swapaxes(x, 1, 2), R // K, axis=1).astype(args.dtype)
        return x.reshape(B * R, num_blocks, block_size, -1)

    q_BRTGH = jnp.moveaxis(args.q.reshape(B, T, R, G, H), 2, 1).astype(args.dtype)
    lengths = jnp.minimum(T, jnp.asarray(T if lengths is None else lengths))
    groups = (
        q_BRTGH.reshape(B * R, T, G, H),
        key_blocks(args.k),
        key_blocks(args.v),
        jnp.swapaxes(chosen, 1, 2).reshape(B * R, T, n),
        jnp.arange(B * R),
        jnp.repeat(jnp.broadcast_to(lengths, (B,)), R),
    )
    attend = functools.partial(_attend_group, args=args, causal=causal)
    most = max(1, LOGITS // max(1, n * T * G * block_size))
    step = max(d for d in range(1, B * R + 1) if B * R % d == 0 and d <= most)
    out = jax.lax.map(jax.checkpoint(lambda group: attend(*group)), groups, batch_size=step)
    out_BTRGh = jnp.moveaxis(out.reshape(B, R, T, G, h), 1, 2)
    return out_BTRGh.reshape(B, T, N, h).astype(args.v.dtype)


def _attend_group(q, k, v, chosen, group, length, *, args: Arguments, causal: bool) -> jax.Array:
    """One batch row, and the query heads of one group.

    Args:
      q: [T, G, H].
      k, v: [blocks, block_size, H or h].
      chosen: [T, n].
      group: which it is, of the B * R groups.
      length: how many keys there are.

    Returns:
      [T, G, h].
    """
    T, G, H = q.shape
    num_blocks, size = k.shape[:2]
    tiles = tiles_of(chosen, num_blocks, size)
    q_ctGH = jnp.take(q, tiles.query, axis=0, mode="fill", fill_value=0)
    rows = (-1, size * G)  # of a tile, as one matrix
    logits = jnp.einsum("crH,csH->crs", q_ctGH.reshape(*rows, H), k[tiles.block])
    logits_ctGs = logits.reshape(-1, size, G, size) * jnp.asarray(args.scale, args.dtype)

    query = tiles.query[:, :, None, None]
    key = (tiles.block[:, None] * size + np.arange(size))[:, None, None]
    allowed = (query < T) & (key < length)
    if causal:
        allowed &= key <= query
    logits_ctGs = jnp.where(allowed, logits_ctGs, -jnp.inf)
    peak = jax.lax.stop_gradient(logits_ctGs.max(-1))
    exps = jnp.exp(logits_ctGs - _finite(peak)[..., None])
    total = exps.sum(-1)
    R = args.q.shape[2] // G
    exps = dropped(
        exps, args.dropout_rng, args.dropout_rate,
        batch=group // R, head=group % R * G + np.arange(G)[:, None], query=query, key=key,
    )  # fmt: skip
    out = jnp.einsum("crs,csh->crh", exps.reshape(*rows, size), v[tiles.block])

    # Back at the queries, n softmaxes become one.
    peak, total, out = (
        jnp.take(x.reshape(-1, *end), tiles.place, axis=0, mode="fill", fill_value=nothing)
        for x, end, nothing in ((peak, (G,), -jnp.inf), (total, (G,), 0), (out, (G, v.shape[2]), 0))
    )
    share = jnp.exp(peak - _finite(peak.max(1, keepdims=True)))
    total = (share * total).sum(1)
    return (share[..., None] * out).sum(1) / jnp.where(total == 0, 1, total)[..., None]


@chex.dataclass(frozen=True)
class Tiles:
    """Queries by the block that they chose, `size` of them in a tile."""

    block: jax.Array  # [tiles], the block of all queries in a tile
    query: jax.Array  # [tiles, size], T where a tile is not full
    place: jax.Array  # [T, n], where a choice went: tile * size + row; beyond the end if it is -1


def tiles_of(chosen: jax.Array, num_blocks: int, size: int) -> Tiles:
    """Sorts the choices [T, n] by block, and cuts them so that no tile has two blocks."""
    T, n = chosen.shape
    num_tiles = T * n // size + num_blocks  # as many whole ones as there can be, and the rests
    block_of_choice = jnp.where(chosen < 0, num_blocks, chosen).reshape(-1)
    order = jnp.argsort(block_of_choice, stable=True)
    first = jnp.searchsorted(block_of_choice[order], np.arange(num_blocks + 1))
    count = jnp.diff(first, append=T * n)  # the last are the choices that are none
    tiles = jnp.cumsum(-(-count[:-1] // size))
    first_tile = jnp.concatenate([jnp.zeros_like(tiles[:1]), tiles])

    tile = np.arange(num_tiles)
    block = jnp.searchsorted(tiles, tile, side="right")  # num_blocks for the tiles left over
    rank = (tile - first_tile[block])[:, None] * size + np.arange(size)
    filled = (block < num_blocks)[:, None] & (rank < count[block][:, None])
    choice = order[jnp.where(filled, first[block][:, None] + rank, 0)]

    rank = jnp.argsort(order) - first[block_of_choice]
    place = first_tile[block_of_choice] * size + rank
    return Tiles(
        block=jnp.minimum(block, num_blocks - 1),
        query=jnp.where(filled, choice // n, T),
        place=jnp.where(block_of_choice < num_blocks, place, num_tiles * size).reshape(T, n),
    )


def _finite(peak: jax.Array) -> jax.Array:
    """With 0 for -inf, the peak of a row that may attend to nothing."""
    return jnp.where(peak == -jnp.inf, 0, peak)
