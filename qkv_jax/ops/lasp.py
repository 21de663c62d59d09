"""The linear family on a sequence that many devices share: they pass its state along.

Shards are contiguous: the first device along the axis has the first tokens. What a shard does to
the state is affine,

    S[last] = A S[before] + b,        A: what its decays and corrections leave,  b: what it writes

and so P devices find what stands before each of them from P pairs (A, b), which all of them gather:
a matter of states, whatever the length of the sequence (LASP-2, Sun et al. 2025,
arxiv.org/abs/2502.07563; for linear attention). Every device then walks its tokens from there. The
price is that it walks them twice.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from qkv_jax.ops import chunks, mesh
from qkv_jax.ops.chunks import Tokens
from qkv_jax.ops.manual import varying_like
from qkv_jax.ops.ring import Ring

Array = jax.Array | np.ndarray
Step = Callable[[jax.Array, Tokens], tuple[jax.Array, jax.Array]]
Shard = tuple[jax.Array | None, jax.Array]  # A and b


def scan_on_devices(
    step: Step, tokens: Tokens, state: jax.Array, chunk_size: int
) -> tuple[jax.Array, jax.Array]:
    """`chunks.scan` on the mesh that is set: every device walks what lies there.

    That is its rows of the batch, its heads, and along `context` its tokens, where the state is
    passed along. Where there are fewer key heads than shards of heads, each is walked by all
    devices that have queries for it. What an axis of the mesh does not divide, rows, query heads or
    tokens, every device along it walks as a whole, and the compiler gathers it. Without a mesh, on
    one device, or where an axis is empty, this is `chunks.scan`.
    """
    known = mesh.sizes()
    if not known or 0 in (*tokens.q.shape, *tokens.v.shape):  # XLA may crash on pieces of nothing
        return chunks.scan(step, tokens, state, chunk_size)
    B, T, K, G, H = tokens.q.shape
    wanted = mesh.ROWS, mesh.HEADS, mesh.TOKENS
    rows, heads, along = mesh.fitted(wanted, (B, K * G, T), known)
    devices = mesh.pieces(heads, known)
    copies = math.lcm(K, devices) // K
    q = tokens.q.reshape(B, T, K * copies, G // copies, H)
    others = jax.tree.map(lambda x: mesh.shared_out(x, devices), tokens._replace(q=None))
    of_tokens, of_states = PartitionSpec(rows, along, heads), PartitionSpec(rows, heads)

    scan = chunks.scan
    if along is not None:
        scan = functools.partial(scan_along, Ring(along, mesh.pieces(along, known)))
    out, state = jax.shard_map(
        lambda tokens, state: scan(step, tokens, state, chunk_size),
        in_specs=(of_tokens, of_states),
        out_specs=(of_tokens, of_states),
        axis_names=set(known),
    )(others._replace(q=q), mesh.shared_out(state, devices, axis=1))
    return out, state[:, ::copies]


def scan_along(
    ring: Ring, step: Step, tokens: Tokens, state: jax.Array, chunk_size: int
) -> tuple[jax.Array, jax.Array]:
    """`chunks.scan` of the shards along a mesh axis, inside `jax.shard_map`.

    What travels is, per row and head, [H, h + 1] without corrections, else [H, h + H].

    Args:
      ring: the devices along that axis.
      step, chunk_size: as in `chunks.scan`. What `step` does to a state is affine; where tokens
        have no `beta`, rows of a state [H, h] only decay beside what is written.
      tokens: of this device.
      state: before the first token of all, the same on every device.

    Returns:
      The outputs of the tokens here, and the state after the last token of all, the same on every
      device.
    """
    shard = _kept_and_written(step, tokens, state, chunk_size)
    shards = jax.tree.map(lambda x: ring.gathered(x[None], 0), shard)

    def after(state: jax.Array, shard: Shard) -> tuple[jax.Array, jax.Array]:
        kept, written = shard
        if kept is None:
            return state + written, state
        return (kept * state if tokens.beta is None else kept @ state) + written, state

    here = jax.lax.axis_index(ring.axis)
    _, before = jax.lax.scan(after, *varying_like(jax.tree.leaves(shards), [state]), shards)
    out, state = chunks.scan(step, tokens, before[here], chunk_size)
    return out, jax.lax.psum(jnp.where(here == ring.size - 1, state, 0), ring.axis)


def lengths_here(ring: Ring, lengths: Array | int | None, T: int) -> Array | int | None:
    """How many of the T tokens here are no padding, of the lengths of whole rows."""
    if lengths is None:
        return None
    return jnp.clip(lengths - T * jax.lax.axis_index(ring.axis), 0, T)


def _kept_and_written(step: Step, tokens: Tokens, state: jax.Array, chunk_size: int) -> Shard:
    """What the tokens here do to a state: A (None: nothing), and b."""
    if tokens.beta is None:
        _, written = chunks.scan(step, tokens, jnp.zeros_like(state), chunk_size)
        log_decay = tokens.log_decay
        kept = None if log_decay is None else jnp.exp(log_decay.sum(1))[..., None]
        return kept, written
    # What corrections leave of a state is what they make of the identity without values to write:
    # one walk does both, with values H wider.
    H, h = state.shape[-2:]
    one = jnp.broadcast_to(jnp.eye(H, dtype=state.dtype), (*state.shape[:-1], H))
    values = jnp.concatenate([tokens.v, jnp.zeros_like(tokens.k)], axis=-1)
    start = jnp.concatenate([jnp.zeros_like(state), one], axis=-1)
    _, end = chunks.scan(step, tokens._replace(v=values), start, chunk_size)
    return end[..., h:], end[..., :h]
