"""Attention as the formula reads, all T x S weights in memory: the oracle of the fast paths."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qkv_jax.ops import scores
from qkv_jax.ops.arguments import Arguments, First, Stats
from qkv_jax.ops.dropout import dropped


def reference(args: Arguments, *, entropy: bool = True) -> tuple[jax.Array, Stats]:
    """`softmax(mask(score(scale * q k^T))) v` and its statistics.

    The entropy is left to the compiler: where nobody reads it, it is not computed.

    Returns:
      [B, T, N, h] in the dtype of v, and the statistics.
    """
    del entropy
    weights, stats = reference_weights(args)
    return combined(weights, args), stats


def reference_weights(args: Arguments) -> tuple[jax.Array, Stats]:
    """The weights `[B, N, T, S]` after softmax and dropout, and the statistics of the softmax.

    A row that may attend to nothing has weights 0, and no derivative of any order is NaN: every
    `where` below guards the argument of the function that would be infinite, not its result.
    """
    logits, allowed = scored_logits(args)
    if allowed is not True:
        logits = jnp.where(allowed, logits, -jnp.inf)
    max_logit = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf))
    peak, sink = max_logit, None
    if args.sinks is not None:
        sink = args.sinks.astype(args.dtype)[None, :, None, None]
        peak = jnp.maximum(peak, jax.lax.stop_gradient(sink))
    peak = jnp.where(peak > -jnp.inf, peak, 0)
    exps = jnp.exp(logits - peak)
    total = jnp.sum(exps, axis=-1, keepdims=True)
    if sink is not None:
        total += jnp.exp(sink - peak)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    weights = exps / total

    lse = peak + jnp.log(total)
    mean_logit = jnp.sum(weights * jnp.where(allowed, logits, 0), axis=-1, keepdims=True)
    if sink is not None:
        mean_logit += jnp.exp(sink - lse) * sink
    stats = Stats(
        lse=jnp.where(empty, -jnp.inf, lse)[..., 0],
        max_logit=max_logit[..., 0],
        entropy=jnp.where(empty, 0, lse - mean_logit)[..., 0],
    )
    return _dropout(weights, args), stats


def dot_logits(args: Arguments) -> jax.Array:
    """`scale * q . k`, [B, N, T, S].

    The query heads that share a key head are rows of one matrix, R = G * T of them.
    """
    B, T, N, H = args.q.shape
    S, K = args.k.shape[1:3]
    q_BNTH = jnp.swapaxes(args.q, 1, 2).astype(args.dtype)
    k_BKSH = jnp.swapaxes(args.k, 1, 2).astype(args.dtype)
    logits_BKRS = jnp.einsum("BKRH,BKSH->BKRS", q_BNTH.reshape(B, K, N // K * T, H), k_BKSH)
    return logits_BKRS.reshape(B, N, T, S) * jnp.asarray(args.scale, args.dtype)


def scored_logits(
    args: Arguments, logits: Callable[[Arguments], jax.Array] = dot_logits
) -> tuple[jax.Array, jax.Array | bool]:
    """The logits [B, N, T, S] after scores, finite, and what the mask allows; True without one."""
    # As arrays of JAX, positions become an iota of the compiled program, not a constant T x S.
    where = jnp.asarray(args.q_pos), jnp.asarray(args.kv_pos), jnp.asarray(args.head)
    scored = scores.apply(args.score, logits(args), *where)
    return scored, True if args.mask is None else args.mask.mask(*where)


def combined(weights: jax.Array, args: Arguments) -> jax.Array:
    """The values weighted by [B, N, T, S]: [B, T, N, h] in the dtype of v."""
    B, N, T, S = weights.shape
    K, h = args.v.shape[2:]
    v_BKSh = jnp.swapaxes(args.v, 1, 2).astype(args.dtype)
    out_BKRh = jnp.einsum("BKRS,BKSh->BKRh", weights.reshape(B, K, N // K * T, S), v_BKSh)
    return jnp.swapaxes(out_BKRh.reshape(B, N, T, h), 1, 2).astype(args.v.dtype)


def _dropout(weights: jax.Array, args: Arguments) -> jax.Array:
    indices = {name: args.index(name) for name in First._fields}
    return dropped(weights, args.dropout_rng, args.dropout_rate, **indices)
