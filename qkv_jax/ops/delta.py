"""The delta rule: a linear attention that replaces what its state holds, in four forms.

As in `linear`: from all weights at once (`delta_rule_parallel`, the readable form), chunk by chunk
(`delta_rule`, for training), of tokens that lie on many devices (`lasp_delta_rule`) and token by
token (`delta_rule_step`, for decoding).
"""

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import chunks, lasp
from qkv_jax.ops.chunks import Tokens
from qkv_jax.ops.ring import Ring

Array = jax.Array | np.ndarray


def delta_rule(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    *,
    log_decay: Array | None = None,
    state: Array | None = None,
    scale: float | None = None,
    lengths: Array | int | None = None,
    chunk_size: int = 32,
) -> tuple[jax.Array, jax.Array]:
    """Linear attention whose tokens correct what the state holds for their key, chunk by chunk.

        S' = diag(exp(log_decay[t])) S[t-1]
        S[t] = S' + beta[t] k[t] (v[t] - S'^T k[t])^T
        out[t] = scale * S[t]^T q[t]

    With keys of length 1 and beta = 1, S[t]^T k[t] = v[t]: the new value takes the place of the
    old. DeltaNet, Yang et al. 2024 (arxiv.org/abs/2406.06484); with a decay per head, gated
    DeltaNet (arxiv.org/abs/2412.06464); with one per channel, Kimi delta attention
    (arxiv.org/abs/2510.26692).

    A chunk writes k[t] u[t]^T like linear attention, where all u solve one triangular system:

        u[t] = beta[t] (v[t] - (what the state before the chunk holds for k[t])
                             - sum over earlier s of (k[t] . decayed k[s]) u[s])

    whose inverse takes products of matrices alone (the papers' UT transform). O(T (C + H) h) time
    with C = `chunk_size`, O(T) memory: for the gradient, the state before each chunk.
    Differentiable any number of times, in forward and reverse mode, in all arrays, the state among
    them. States, what is safe for strong decays, and what a mesh does are as in
    `ops.linear.linear_attention`.

    Args:
      q: queries, floating [B, T, N, H].
      k: keys, floating [B, T, K, H]; K divides N, and there are K states. The state stays bounded
        where beta |k|^2 is from 0 to 2; usually keys have length 1.
      v: values, floating [B, T, K, h].
      beta: how much of the correction is made, floating [B, T, K].
      log_decay: at most 0: floating [B, T, K], or [B, T, K, H] for a decay per channel; by default
        nothing decays.
      state: before the first token, floating [B, K, H, h]; by default zeros.
      scale: factor of q; by default 1 / sqrt(H).
      lengths: integers [B]: tokens from there on are padding, which neither writes nor decays.
      chunk_size: how many tokens are computed at a time, rounded up to a power of two. The result
        does not depend on it.

    Returns:
      [B, T, N, h] in the dtype of `v`, and the state after the last token, float32 (float64 for
      float64 input).

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    tokens, state = chunks.prepare(
        q, k, v, log_decay=log_decay, beta=beta, state=state, scale=scale, lengths=lengths
    )

    out, state = lasp.scan_on_devices(_step, tokens, state, chunk_size)
    return out.astype(v.dtype), state


def lasp_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    *,
    axis_name: str | tuple[str, ...],
    log_decay: Array | None = None,
    state: Array | None = None,
    scale: float | None = None,
    lengths: Array | int | None = None,
    chunk_size: int = 32,
) -> tuple[jax.Array, jax.Array]:
    """`delta_rule` of the shards along a mesh axis; what travels is [K, H, h + H] per row.

    Arguments, results and errors are those of `lasp_linear_attention`, and `beta` [B, T, K].
    """
    ring = Ring.along("axis_name", axis_name)
    lengths = lasp.lengths_here(ring, lengths, q.shape[1])
    tokens, state = chunks.prepare(
        q, k, v, log_decay=log_decay, beta=beta, state=state, scale=scale, lengths=lengths
    )
    out, state = lasp.scan_along(ring, _step, tokens, state, chunk_size)
    return out.astype(v.dtype), state


def delta_rule_parallel(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    *,
    log_decay: Array | None = None,
    state: Array | None = None,
    scale: float | None = None,
    lengths: Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`delta_rule` as one triangular system over all tokens: the oracle.

    O(T^2 (T + H)) time and O(T^2 H) memory. Arguments, results and errors are those of
    `delta_rule`.
    """
    tokens, state = chunks.prepare(
        q, k, v, log_decay=log_decay, beta=beta, state=state, scale=scale, lengths=lengths
    )
    between, since = chunks.decays(tokens)
    overlaps = jnp.einsum("BTKH,BSKH,BTSKH->BKTS", tokens.k, tokens.k, between)
    held = jnp.einsum("BTKH,BTKH,BKHh->BTKh", tokens.k, since, state)
    u_BKTh = jax.lax.linalg.triangular_solve(
        jnp.swapaxes(tokens.beta, 1, 2) * overlaps,
        jnp.swapaxes(tokens.beta * (tokens.v - held), 1, 2),
        left_side=True, lower=True, unit_diagonal=True,
    )  # fmt: skip
    u_BTKh = jnp.swapaxes(u_BKTh, 1, 2)
    out, state = chunks.all_at_once(tokens, u_BTKh, state, between, since)
    return out.astype(v.dtype), state


def delta_rule_step(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    *,
    state: Array | None = None,
    log_decay: Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `delta_rule`, as the recurrence reads: O(H h) time.

    Args:
      q, k, v: floating [B, N, H], [B, K, H] and [B, K, h].
      beta: floating [B, K].
      state: floating [B, K, H, h], as another call returned it; None: zeros.
      log_decay: floating [B, K] or [B, K, H]; None: no decay.
      scale: by default 1 / sqrt(H).

    Returns:
      [B, N, h] in the dtype of v, and the state after this token.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    token, state = chunks.prepare_step(
        q, k, v, log_decay=log_decay, beta=beta, state=state, scale=scale
    )
    state = token.decayed(state)
    u = token.beta * (token.v - jnp.einsum("BKH,BKHh->BKh", token.k, state))
    state = state + token.k[..., :, None] * u[..., None, :]
    return token.read(state).astype(v.dtype), state


def _step(state: jax.Array, chunk: Tokens) -> tuple[jax.Array, jax.Array]:
    """A chunk, as `chunks.scan` calls it."""
    (weights, overlaps), (q, reader), k, kept = chunks.within(
        [chunk.q, chunk.k], chunk.k, chunk.log_decay
    )
    corrections = chunk.beta * (chunk.v - reader @ state)
    u = _inverse(chunk.beta * overlaps) @ corrections
    out = weights @ u + q @ state
    return kept * state + jnp.swapaxes(k, 1, 2) @ u, out


@jax.custom_jvp
def _inverse(x: jax.Array) -> jax.Array:
    """(I + L)^-1 for the part L of x [..., C, C] below the diagonal; C is a power of two.

    By halves, [[A, 0], [L, B]]^-1 = [[A^-1, 0], [-B^-1 L A^-1, B^-1]]: a few products of matrices
    for all blocks of one size, where a triangular solver would take one matrix at a time.
    """
    half = x.shape[-1] // 2
    if half == 0:
        return jnp.ones_like(x)
    blocks = jnp.stack([x[..., :half, :half], x[..., half:, half:]])
    first, second = _inverse.fun(blocks)
    return chunks.lower_triangular(first, -second @ (x[..., half:, :half] @ first), second)


@_inverse.defjvp
def _inverse_jvp(primals, tangents):
    inverse = _inverse(*primals)
    return inverse, -inverse @ (jnp.tril(tangents[0], -1) @ inverse)
