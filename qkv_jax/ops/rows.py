"""Attention whose weights need whole rows of logits, a block of query rows at a time.

A softmax may be computed from pieces of a row; the normalisers that sort a row, mix it with other
heads' rows or add along it may not. Here a block of rows is computed at once and forgotten: time is
T x S as for any exact attention, memory S times the rows of a block, in both passes.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops.arguments import Arguments
from qkv_jax.ops.dropout import dropped
from qkv_jax.ops.reference import combined, dot_logits, scored_logits

Array = jax.Array | np.ndarray
Weigh = Callable[[Arguments, jax.Array, jax.Array], jax.Array]
Logits = Callable[[Arguments], jax.Array]

LOGITS = 2**21  # of a block, by default: 8 MB in float32


def attend_rows(
    args: Arguments, weigh: Weigh, *, logits: Logits = dot_logits, block_q: int | None = None
) -> jax.Array:
    """`weigh(score(logits), allowed) v`, with dropout on the weights, a block of queries at a time.

    Args:
      args: checked arguments.
      weigh: called as `weigh(rows, logits, allowed)` with the arguments cut to a block of queries,
        the logits after scores, [B, N, t, S], and what the mask allows, bool of the same shape;
        returns weights of that shape, 0 where not allowed. The logits are finite, masked ones too.
      logits: called as `logits(rows)`, returns [B, N, t, S].
      block_q: queries in a block; by default as many as make 2^21 logits.

    Returns:
      [B, T, N, h], in the dtype of v.
    """
    B, T, N, _ = args.q.shape
    S = args.k.shape[1]
    if block_q is None:
        block_q = max(1, LOGITS // max(1, B * N * S))

    def block(start: int | jax.Array, size: int) -> jax.Array:
        return _attend(cut(args, start, size), weigh, logits, start + np.arange(size))

    return by_rows(block, T, block_q)


def by_rows(f: Callable[..., Any], T: int, block_q: int) -> Any:
    """`f(start, size)` of each block of rows, joined along axis 1.

    Args:
      f: gives the rows `start` ... `start + size - 1`: a pytree of arrays [B, size, ...].
      T: how many rows there are.
      block_q: the most that a block may have; they are computed one after another.

    Returns:
      A pytree of arrays [B, T, ...].
    """
    num_blocks = math.ceil(T / block_q)
    if num_blocks <= 1:
        return f(0, T)
    size = math.ceil(T / num_blocks)
    # The last block starts early enough to be whole: some rows are computed twice.
    starts = np.minimum(np.arange(num_blocks) * size, T - size)
    blocks = jax.lax.map(jax.checkpoint(lambda start: f(start, size)), jnp.asarray(starts))

    def joined(x: jax.Array) -> jax.Array:
        last = x[-1, :, num_blocks * size - T :]
        whole = jnp.swapaxes(x[:-1], 0, 1).reshape(
            x.shape[1], (num_blocks - 1) * size, *x.shape[3:]
        )
        return jnp.concatenate([whole, last], axis=1)

    return jax.tree.map(joined, blocks)


def cut(args: Arguments, start: int | jax.Array, size: int) -> Arguments:
    """The arguments of `size` queries from `start` on; operands are aligned, [., ., T or 1, .]."""

    def rows(x: Array, axis: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), start, size, axis)

    def cut_operand(x: Array) -> Array:
        return rows(x, 2) if np.ndim(x) == 4 and x.shape[2] > 1 else x

    return dataclasses.replace(
        args,
        q=rows(args.q, 1),
        q_pos=rows(args.q_pos, 2),
        mask=jax.tree.map(cut_operand, args.mask),
        score=jax.tree.map(cut_operand, args.score),
    )


def masked_softmax(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Softmax over the last axis among what is allowed; a row with nothing allowed is 0.

    No derivative of any order is NaN.
    """
    logits = jnp.where(allowed, logits, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf))
    exps = jnp.exp(logits - jnp.where(peak > -jnp.inf, peak, 0))
    total = jnp.sum(exps, axis=-1, keepdims=True)
    return exps / jnp.where(total == 0, 1, total)


def _attend(rows: Arguments, weigh: Weigh, logits: Logits, query: Array) -> jax.Array:
    B, S = rows.k.shape[:2]
    scored, allowed = scored_logits(rows, logits)
    weights = weigh(rows, scored, jnp.broadcast_to(allowed, scored.shape))
    weights = dropped(
        weights, rows.dropout_rng, rows.dropout_rate,
        batch=np.arange(B)[:, None, None, None], head=rows.head, query=query[:, None],
        key=np.arange(S),
    )  # fmt: skip
    return combined(weights, rows)
