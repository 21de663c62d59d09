"""The linear family on a sequence that many devices share: they pass its state along.

To be called inside `jax.shard_map`, as `ops.context` is, with contiguous shards: the first device
along the axis has the first tokens. What a shard does to the state is affine,

    S[last] = A S[before] + b,        A: what its decays and corrections leave,  b: what it writes

and so P devices find what stands before each of them from P pairs (A, b), which all of them gather:
a matter of states, whatever the length of the sequence (LASP-2, Sun et al. 2025,
arxiv.org/abs/2502.07563; for linear attention). Every device then walks its tokens from there. The
price is that it walks them twice.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import chunks
from qkv_jax.ops.delta import delta_rule
from qkv_jax.ops.linear import linear_attention
from qkv_jax.ops.ring import Ring

Array = jax.Array | np.ndarray
Axis = str | tuple[str, ...]


def lasp_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    axis_name: Axis,
    log_decay: Array | None = None,
    state: Array | None = None,
    scale: float | None = None,
    lengths: Array | int | None = None,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """`linear_attention` of the shards along a mesh axis; what travels is [K, H, h + 1] per row.

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
    ring, lengths = _shard(axis_name, lengths, q)

    def walk(state: Array | None) -> tuple[jax.Array, jax.Array]:
        return linear_attention(
            q, k, v, log_decay=log_decay, state=state, scale=scale, lengths=lengths,
            chunk_size=chunk_size,
        )  # fmt: skip

    _, written = walk(None)
    tokens, _ = chunks.prepare(q, k, v, log_decay=log_decay, lengths=lengths)
    kept = jnp.ones((1, 1, 1, 1), written.dtype)
    if log_decay is not None:
        kept = jnp.exp(tokens.log_decay.sum(1))[..., None]
    return _passed_along(ring, walk, jnp.multiply, kept, written, state)


def lasp_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    *,
    axis_name: Axis,
    log_decay: Array | None = None,
    state: Array | None = None,
    scale: float | None = None,
    lengths: Array | int | None = None,
    chunk_size: int = 32,
) -> tuple[jax.Array, jax.Array]:
    """`delta_rule` of the shards along a mesh axis; what travels is [K, H, h + H] per row.

    What a shard leaves of a state is what the rule itself makes of the identity without values to
    write, so that the first walk has values H wider. Arguments, results and errors are those of
    `lasp_linear_attention`, and `beta` [B, T, K].
    """
    ring, lengths = _shard(axis_name, lengths, q)

    def walk(state: Array | None, v: Array = v) -> tuple[jax.Array, jax.Array]:
        return delta_rule(
            q, k, v, beta, log_decay=log_decay, state=state, scale=scale, lengths=lengths,
            chunk_size=chunk_size,
        )  # fmt: skip

    (B, _, K, H), h = k.shape, v.shape[-1]
    nothing_and_one = jnp.concatenate([jnp.zeros((H, h)), jnp.eye(H)], axis=1)
    _, ends = walk(
        jnp.broadcast_to(nothing_and_one, (B, K, H, h + H)),
        jnp.concatenate([v, jnp.zeros(k.shape, v.dtype)], axis=-1),
    )
    return _passed_along(ring, walk, jnp.matmul, ends[..., h:], ends[..., :h], state)


def _shard(
    axis_name: Axis, lengths: Array | int | None, q: Array
) -> tuple[Ring, Array | int | None]:
    """The ring, and how many of the tokens here are no padding."""
    ring = Ring.along("axis_name", axis_name)
    if lengths is not None:
        T = q.shape[1]
        lengths = jnp.clip(lengths - T * jax.lax.axis_index(axis_name), 0, T)
    return ring, lengths


def _passed_along(
    ring: Ring,
    walk: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    apply: Callable[[jax.Array, jax.Array], jax.Array],
    kept: jax.Array,
    written: jax.Array,
    state: Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The outputs here and the last state of all, given A (`kept`) and b (`written`) here."""
    if state is None:
        state = jnp.zeros(written.shape, written.dtype)
    here = jax.lax.axis_index(ring.axis)

    def after(state: jax.Array, shard: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        kept, written = shard
        return apply(kept, state) + written, state

    shards = [ring.gathered(x[None], 0) for x in (kept, written)]
    state = ring.varying(jnp.asarray(state, written.dtype))
    _, before = jax.lax.scan(after, state, tuple(shards))
    out, state = walk(before[here])
    return out, jax.lax.psum(jnp.where(here == ring.size - 1, state, 0), ring.axis)
