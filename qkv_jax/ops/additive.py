"""Attention before the Transformer: additive scores, and windows around a predicted centre.

Where each form of the literature is found:

    Bahdanau et al. 2014     e = energy . tanh(W s + U c)      additive_attention(W s, U c, c)
    Luong et al. 2015
      score "dot"            h . c                             attention(h, c, c, scale=1)
      score "general"        h . W c                           attention(h W, c, c, scale=1)
      score "concat"         energy . tanh(W [h; c])           additive_attention(W_1 h, W_2 c, c)
      local-m, monotonic     keys within D of the query        ... with mask=SlidingWindow(D, D)
      local-p, predictive    keys within D of a centre p_t     local_attention(..., centers=p)

where W_1 and W_2 are the halves of W. `nn.additive` has the matrices.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import arguments
from qkv_jax.ops.arguments import Arguments
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.operands import described, is_array, operand
from qkv_jax.ops.reference import dot_logits
from qkv_jax.ops.rows import Logits, attend_rows, masked_softmax
from qkv_jax.ops.scores import Score

Array = jax.Array | np.ndarray

TERMS = 2**20  # tanh's that are computed at once, about


def additive_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    energy: Array,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """Additive attention: a small network with one hidden layer compares query and key.

        logits[b, n, t, s] = scale * energy[n] . tanh(q[b, t, n] + k[b, s, n // G])

    and from there on `attention`. Exact: O(T S H) tanh's; blocks of queries and keys keep the
    memory linear in T and S, without a [T, S, H] array. Bahdanau et al. 2014,
    arxiv.org/abs/1409.0473; with Luong et al. 2015, arxiv.org/abs/1508.04025, it is called concat.

    Args:
      q: queries, projected already, floating [B, T, N, H].
      k: keys, projected already, floating [B, S, K, H]; K divides N.
      v: values, floating [B, S, K, h].
      energy: floating [N, H].
      scale: factor of the logits; by default 1.
      mask, score, dropout_rate, dropout_rng, q_positions, kv_positions: as in `attention`.

    Returns:
      [B, T, N, h], in the dtype of `v`.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    args = arguments.check(
        q, k, v, mask=mask, score=score, scale=1.0 if scale is None else scale, sinks=None,
        dropout_rate=dropout_rate, dropout_rng=dropout_rng, q_positions=q_positions,
        kv_positions=kv_positions,
    )  # fmt: skip

    def weigh(rows: Arguments, logits: jax.Array, allowed: jax.Array) -> jax.Array:
        return masked_softmax(logits, allowed)

    return attend_rows(args, weigh, logits=_additive_logits(energy, args))


def local_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    centers: Array,
    window: int,
    energy: Array | None = None,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """Attention to a window around a centre that each query predicts (local-p).

        near = |kv_position - center| <= window
        weights = softmax over near of logits  *  exp(-(kv_position - center)^2 / (2 sigma^2))

    with sigma = window / 2. The weights of a row sum to less than 1: a centre between keys, or far
    from any, gives less. Gradients flow to the centres through the Gaussian. O(T S) time, memory
    linear in T and S. Luong et al. 2015, section 3.2, arxiv.org/abs/1508.04025, whose logits are
    those of `scale=1`.

    Args:
      q, k, v: as in `attention`, or with `energy` as in `additive_attention`.
      centers: floating [B, T] or [B, N, T], in the unit of key positions.
      window: D, a positive integer.
      energy: floating [N, H], for the logits of `additive_attention` instead of q . k.
      scale: factor of the logits; by default 1 / sqrt(H), and 1 with `energy`.
      mask, score, dropout_rate, dropout_rng, q_positions, kv_positions: as in `attention`.

    Returns:
      [B, T, N, h], in the dtype of `v`.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    if energy is not None and scale is None:
        scale = 1.0
    args = arguments.check(
        q, k, v, mask=mask, score=score, scale=scale, sinks=None, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"window: wanted a positive integer, got {window!r}")
    B, T, N, _ = args.q.shape
    floating = is_array(centers) and jnp.issubdtype(centers.dtype, jnp.floating)
    if not floating or centers.shape not in ((B, T), (B, N, T)):
        raise ValueError(
            f"centers: wanted floating [B, T] = {[B, T]} or [B, N, T] = {[B, N, T]}, "
            f"got {described(centers)}"
        )
    # As an operand of a score they are cut to the rows of a block.
    args = dataclasses.replace(args, score=(*args.score, _Centers(centers).aligned()))

    def weigh(rows: Arguments, logits: jax.Array, allowed: jax.Array) -> jax.Array:
        distance = rows.kv_pos - rows.score[-1].centers.astype(rows.dtype)
        weights = masked_softmax(logits, allowed & (abs(distance) <= window))
        return weights * jnp.exp(-2 * (distance / window) ** 2)

    logits = dot_logits if energy is None else _additive_logits(energy, args)
    return attend_rows(args, weigh, logits=logits)


class _Centers(Score):
    """Carries the centres and leaves the logits as they are."""

    centers: Array = operand("BT", "BNT", dtype="floating")

    def score(self, logits, q_pos, kv_pos, head):
        return logits


def _additive_logits(energy: Array, args: Arguments) -> Logits:
    """The function that gives the logits [B, N, t, S] of some of the queries."""
    N, H = args.q.shape[2:]
    floating = is_array(energy) and jnp.issubdtype(energy.dtype, jnp.floating)
    if not floating or energy.shape != (N, H):
        raise ValueError(f"energy: wanted floating [N, H] = {[N, H]}, got {described(energy)}")

    def logits(rows: Arguments) -> jax.Array:
        B, T, N, H = rows.q.shape
        S, K = rows.k.shape[1:3]
        q_BKGTH = jnp.moveaxis(rows.q, 1, 2).reshape(B, K, N // K, T, H).astype(rows.dtype)
        k_BKSH = jnp.moveaxis(rows.k, 1, 2).astype(rows.dtype)
        energy_KGH = jnp.asarray(energy, rows.dtype).reshape(K, N // K, 1, 1, H) * rows.scale

        def block(k_BKsH: jax.Array) -> jax.Array:
            hidden = jnp.tanh(q_BKGTH[:, :, :, :, None] + k_BKsH[:, :, None, None])
            return (energy_KGH * hidden).sum(-1)

        size = max(1, min(S, TERMS // max(1, B * N * T * H)))
        blocks = -(-S // size)
        k_BKSH = jnp.pad(k_BKSH, ((0, 0), (0, 0), (0, blocks * size - S), (0, 0)))
        k_blocks = jnp.moveaxis(k_BKSH.reshape(B, K, blocks, size, H), 2, 0)
        found = jnp.moveaxis(jax.lax.map(jax.checkpoint(block), k_blocks), 0, 4)
        return found.reshape(B, N, T, blocks * size)[..., :S]

    return logits
