"""Linear attention: a matrix per head remembers what was seen, in time linear in the sequence.

    S[t] = diag(exp(log_decay[t])) S[t-1] + k[t] v[t]^T          out[t] = S[t]^T scale q[t]

Without decay this is linear attention, with a fixed decay per head retention, with one that the
token chooses per head Mamba-2's SSD, and per channel of the key gated linear attention. Four forms
of it agree: `linear_attention_parallel` (quadratic, as the sum reads), `linear_attention` (chunk by
chunk, for training), `lasp_linear_attention` (the same of tokens that lie on many devices) and
`linear_attention_step` (one token, for decoding).
"""

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import chunks, lasp
from qkv_jax.ops.chunks import Tokens
from qkv_jax.ops.ring import Ring

Array = jax.Array | np.ndarray


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    log_decay: Array | None = None,
    state: Array | None = None,
    scale: float | None = None,
    lengths: Array | int | None = None,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """Causal linear attention with or without decay, chunk by chunk.

        out[t] = sum over s <= t of (scale q[t] . exp(sum of log_decay after s) k[s]) v[s]

    Katharopoulos et al. 2020, arxiv.org/abs/2006.16236; retention, Sun et al. 2023,
    arxiv.org/abs/2307.08621; gated linear attention, Yang et al. 2023, arxiv.org/abs/2312.06635;
    SSD, Dao and Gu 2024, arxiv.org/abs/2405.21060. O(T (chunk_size + H) h) time; memory O(T), of
    which a gradient keeps one state per chunk. What the state forgets, no later query can recall:
    that is the price against softmax attention. On a mesh that is set, devices compute what lies
    there and pass the state along (`ops.lasp.scan_on_devices`).

    Args:
      q: queries, floating [B, T, N, H].
      k: keys, floating [B, T, K, H]; K divides N.
      v: values, floating [B, T, K, h].
      log_decay: at most 0, floating [B, T, K] (per head) or [B, T, K, H] (per channel); None: no
        decay. It is applied before the token's own write.
      state: floating [B, K, H, h], as another call returned it; None: zeros.
      scale: by default 1 / sqrt(H).
      lengths: of the rows, integers [B] or an integer: a padded token writes nothing and does not
        decay.
      chunk_size: tokens that are computed at once: a matter of speed alone. Rounded up to a power
        of two.

    Returns:
      [B, T, N, h] in the dtype of v, and the state after the last token in float32 (float64 for
      float64 input). Sums and exponentials are in that dtype.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    tokens, state = chunks.prepare(
        q, k, v, log_decay=log_decay, state=state, scale=scale, lengths=lengths
    )

    out, state = lasp.scan_on_devices(_step, tokens, state, chunk_size)
    return out.astype(v.dtype), state


def lasp_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    axis_name: str | tuple[str, ...],
    log_decay: Array | None = None,
    state: Array | None = None,
    scale: float | None = None,
    lengths: Array | int | None = None,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """`linear_attention` of the shards along a mesh axis, inside `jax.shard_map`.

    To be called as the functions of `ops.context` are, with contiguous shards. What travels is
    [K, H, h + 1] per row (see `ops.lasp`).

    Args:
      q, k, v, log_decay: the shards of this device.
      axis_name: the mesh axis along which the sequence is cut.
      state: before the first token of all, the same on every device.
      scale, chunk_size: as in `linear_attention`.
      lengths: of the whole rows.

    Returns:
      The outputs of the tokens here, and the state after the last token of all, the same on every
      device.

    Raises:
      ValueError: as `linear_attention`, or where `axis_name` is no axis that `jax.shard_map` cuts
        along.
    """
    ring = Ring.along("axis_name", axis_name)
    lengths = lasp.lengths_here(ring, lengths, q.shape[1])
    tokens, state = chunks.prepare(
        q, k, v, log_decay=log_decay, state=state, scale=scale, lengths=lengths
    )
    out, state = lasp.scan_along(ring, _step, tokens, state, chunk_size)
    return out.astype(v.dtype), state


def linear_attention_parallel(
    q: Array,
    k: Array,
    v: Array,
    *,
    log_decay: Array | None = None,
    state: Array | None = None,
    scale: float | None = None,
    lengths: Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`linear_attention` as its sum reads, all T x T weights at once: the fast form's oracle."""
    tokens, state = chunks.prepare(
        q, k, v, log_decay=log_decay, state=state, scale=scale, lengths=lengths
    )
    out, state = chunks.all_at_once(tokens, tokens.v, state, *chunks.decays(tokens))
    return out.astype(v.dtype), state


def linear_attention_step(
    q: Array,
    k: Array,
    v: Array,
    *,
    state: Array,
    log_decay: Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `linear_attention`, as the recurrence reads.

    Args:
      q, k, v: floating [B, N, H], [B, K, H] and [B, K, h].
      state: floating [B, K, H, h].
      log_decay: floating [B, K] or [B, K, H]; None: no decay.
      scale: by default 1 / sqrt(H).

    Returns:
      [B, N, h] in the dtype of v, and the new state.
    """
    token, state = chunks.prepare_step(q, k, v, log_decay=log_decay, state=state, scale=scale)
    state = token.decayed(state) + token.k[..., :, None] * token.v[..., None, :]
    return token.read(state).astype(v.dtype), state


def linear_attention_bidirectional(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    lengths: Array | int | None = None,
) -> jax.Array:
    """Linear attention of every query to all keys, without decay: two products, O(T + S).

        out[t] = (sum over s of k[s] v[s]^T)^T scale q[t]

    The arguments are those of `linear_attention`, but k and v may have another length, S.
    """
    tokens, _ = chunks.prepare(q, k, v, state=None, scale=scale, lengths=lengths, same_length=False)
    state = jnp.einsum("BSKH,BSKh->BKHh", tokens.k, tokens.v)
    out = jnp.einsum("BTKGH,BKHh->BTKGh", tokens.q, state)
    return out.reshape(*q.shape[:3], -1).astype(v.dtype)


def _step(state: jax.Array, chunk: Tokens) -> tuple[jax.Array, jax.Array]:
    """A chunk, as `chunks.scan` calls it."""
    [weights], [q], k, kept = chunks.within([chunk.q], chunk.k, chunk.log_decay)
    out = weights @ chunk.v + q @ state
    return kept * state + jnp.swapaxes(k, 1, 2) @ chunk.v, out
