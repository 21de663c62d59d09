"""Context parallelism: one sequence on many devices, attention equal to that of one.

To be called inside `jax.shard_map`, with the shard of queries, keys and values that a device has of
a sequence cut along one axis of the mesh. `Sharded` makes that call, from whole arrays.

    form                  what travels                      memory a device     needs
    ring_attention        keys, to the next device          O(T / P)            nothing
    ulysses_attention     q, k, v and out, all to all       O(T / P)            P divides N
    all_gather_attention  keys, to all devices              O(T)                nothing

P devices; bytes are those of q, k, v and of what masks and scores carry. All three take every mask
and score, and are differentiable as `attention` is. Where tokens stand is what their positions say
and not their place: with `zigzag`, a causal mask gives every device the same work.

An aligned operand of a mask or a score (see `operands`) is cut as the arrays are: along T with the
queries, along S with the keys. One with both axes is cut along T and has the S axis whole.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import arguments
from qkv_jax.ops.arguments import Arguments, First
from qkv_jax.ops.attention import choose
from qkv_jax.ops.blockwise import Blockwise
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.mesh import first_here, shared_out
from qkv_jax.ops.ring import Ring
from qkv_jax.ops.scores import Score
from qkv_jax.ops.stats import Stats

Array = jax.Array | np.ndarray
Axis = str | tuple[str, ...]


def zigzag(length: int, shards: int) -> np.ndarray:
    """The order of tokens in which contiguous shards have equal work under a causal mask.

    The sequence is cut into 2 `shards` pieces; shard i has the i-th from the beginning and the i-th
    from the end. `x[:, order]` is a sequence in this order, `order` its positions, and
    `np.argsort(order)` the way back. (Zhu, ring-flash-attention; Llama 3, section 3.3.2,
    arxiv.org/abs/2407.21783.)

    Args:
      length: T, a multiple of 2 `shards`.
      shards: how many devices the sequence is cut over.

    Returns:
      integers [T], NumPy.

    Raises:
      ValueError: for another length.
    """
    arguments.check_positive(shards=shards)
    if length % (2 * shards):
        raise ValueError(
            f"length: wanted a multiple of 2 x {shards} pieces, two for each shard, got {length}"
        )
    pieces = np.arange(length, dtype=np.int32).reshape(2, shards, -1)
    return np.stack([pieces[0], pieces[1, ::-1]], axis=1).reshape(-1)


def ring_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    axis_name: Axis,
    batch_axis: Axis | None = None,
    head_axis: Axis | None = None,
    implementation: str | Blockwise | None = None,
    **kwargs: Any,
) -> jax.Array:
    """`attention` over a ring of devices (Liu et al. 2023, arxiv.org/abs/2310.01889).

        out = merge over the shards of keys of attention(q, k of the shard, v of the shard)

    The keys travel, P rounds long, and what a device has seen is joined as `ops.merge` does. Blocks
    that the mask forbids are not computed, nor is anything in a round that has no others. Forward
    and backward, a device holds its own shard of every array and a copy in transit: the derivative,
    of any order and in both modes, is another journey of the keys, on which their gradients come
    home with them, in float32. The arguments that are not listed are those of `attention`.

    Args:
      q, k, v: the shards of this device: of T, S and S tokens.
      axis_name: the mesh axis along which the sequence is cut.
      batch_axis, head_axis: those along which batch rows and heads are cut, if they are: indices
        (of dropout, and of the heads that masks and scores ask for) count from the first of all.
      implementation: a `Blockwise`, for block sizes of one's own. By default a block is no larger
        than half a shard. No other can be honoured.
      **kwargs: positions are those of the shard; without them, those of contiguous shards. Sinks
        are those of the heads here.

    Returns:
      [B, T, N, h], in the dtype of `v`.

    Raises:
      ValueError: also where `axis_name` is no axis that `jax.shard_map` cuts along.
      NotImplementedError: for another `implementation`, such as "reference".
    """
    args, ring = _checked(q, k, v, axis_name, batch_axis, head_axis, **kwargs)
    out, _ = _blockwise(implementation)(args, entropy=False, ring=ring)
    return out


def ring_attention_with_stats(
    q: Array,
    k: Array,
    v: Array,
    *,
    axis_name: Axis,
    batch_axis: Axis | None = None,
    head_axis: Axis | None = None,
    implementation: str | Blockwise | None = None,
    **kwargs: Any,
) -> tuple[jax.Array, Stats]:
    """`ring_attention`, and what `attention_with_stats` says of the rows of this device."""
    args, ring = _checked(q, k, v, axis_name, batch_axis, head_axis, **kwargs)
    return _blockwise(implementation)(args, entropy=True, ring=ring)


def ulysses_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    axis_name: Axis,
    batch_axis: Axis | None = None,
    head_axis: Axis | None = None,
    implementation: str | Blockwise | None = None,
    **kwargs: Any,
) -> jax.Array:
    """`attention` with all tokens of a share of the heads (DeepSpeed-Ulysses).

    An all-to-all turns shards of the sequence into shards of the heads, and another turns the
    output back (Jacobs et al. 2023, arxiv.org/abs/2309.14509). Where P does not divide K, each key
    head is sent to every device that has queries for it. What masks and scores carry is sent too:
    an operand with the axes T and S becomes whole on every device, but for its heads.

    The arguments and errors are those of `ring_attention`; `implementation` may be any.

    Raises:
      ValueError: also where the devices do not divide the query heads here.
    """
    args, ring = _checked(q, k, v, axis_name, batch_axis, head_axis, **kwargs)
    S, N, P = args.k.shape[1], args.q.shape[2], ring.size
    if N % P:
        raise ValueError(
            f"q: {N} heads cannot be shared by the {P} devices along {axis_name!r} (N % P == 0)"
        )
    first_head = jax.lax.axis_index(axis_name) * (N // P)

    def of_these_heads(x: Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), first_head, N // P, axis)

    def by_heads(x: Array, head: int, token: int) -> jax.Array:
        x = ring.varying(x)
        return jax.lax.all_to_all(x, axis_name, split_axis=head, concat_axis=token, tiled=True)

    def operand(x: Array) -> Array:
        if np.ndim(x) != 4:
            return x
        _, heads, queries, keys = x.shape
        if heads > 1:
            x = by_heads(x, 1, 2) if queries > 1 else of_these_heads(x, 1)
        elif queries > 1:
            x = ring.gathered(x, 2)
        return ring.gathered(x, 3) if keys == S > 1 else x

    def positions(x: Array, name: str, axis: int) -> Array:
        if kwargs.get(name) is None:  # known while tracing, and so is which blocks are computed
            return np.arange(P * x.shape[axis], dtype=np.int32).reshape(
                [-1 if a == axis else 1 for a in range(4)]
            )
        return ring.gathered(x, axis)

    args = dataclasses.replace(
        args,
        q=by_heads(args.q, 2, 1),
        k=by_heads(shared_out(args.k, P), 2, 1),
        v=by_heads(shared_out(args.v, P), 2, 1),
        mask=jax.tree.map(operand, args.mask),
        score=jax.tree.map(operand, args.score),
        sinks=None if args.sinks is None else of_these_heads(args.sinks, 0),
        q_pos=positions(args.q_pos, "q_positions", 2),
        kv_pos=positions(args.kv_pos, "kv_positions", 3),
        first=First(batch=args.first.batch, head=args.first.head + first_head),
    )
    out, _ = choose(args, implementation, stats=False)(args, entropy=False)
    return jax.lax.all_to_all(out, axis_name, split_axis=1, concat_axis=2, tiled=True)


def all_gather_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    axis_name: Axis,
    batch_axis: Axis | None = None,
    head_axis: Axis | None = None,
    implementation: str | Blockwise | None = None,
    **kwargs: Any,
) -> jax.Array:
    """`attention` of a device's queries to the keys of all devices, gathered (Llama 3, 3.3.2).

    The simplest form, arxiv.org/abs/2407.21783: one collective before and, for the gradients of
    the keys, one after. It takes memory for all keys and values, which are few where K is far below
    N. The arguments and errors are those of `ring_attention`; `implementation` may be any.
    """
    args, ring = _checked(q, k, v, axis_name, batch_axis, head_axis, **kwargs)
    S = args.k.shape[1]

    def operand(x: Array) -> Array:
        return ring.gathered(x, 3) if np.ndim(x) == 4 and x.shape[3] == S > 1 else x

    args = dataclasses.replace(
        args,
        k=ring.gathered(args.k, 1),
        v=ring.gathered(args.v, 1),
        mask=jax.tree.map(operand, args.mask),
        score=jax.tree.map(operand, args.score),
        kv_pos=ring.gathered(args.kv_pos, 3),
        first=args.first._replace(key=0),
    )
    out, _ = choose(args, implementation, stats=False)(args, entropy=False)
    return out


def _checked(
    q: Array,
    k: Array,
    v: Array,
    axis_name: Axis,
    batch_axis: Axis | None,
    head_axis: Axis | None,
    *,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    sinks: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> tuple[Arguments, Ring]:
    """The arguments of one device's call, with what they are in the whole; and the ring."""
    ring = Ring.along("axis_name", axis_name)
    args = arguments.check(
        q, k, v, mask=mask, score=score, scale=scale, sinks=sinks, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
        shards=ring.size,
    )  # fmt: skip
    B, T, N, _ = args.q.shape
    S = args.k.shape[1]
    if args.is_empty:
        shapes = [list(x.shape) for x in (args.q, args.k, args.v)]
        raise ValueError(f"q, k, v: wanted no empty axis, got {shapes}")
    for name, length in (("q", T), ("k", S)):
        if length < 2 <= ring.size:  # an axis of 1 says "for all tokens", or "for this one"?
            raise ValueError(
                f"{name}: {length} tokens on each of {ring.size} devices along {axis_name!r}, "
                "wanted at least 2: use fewer devices"
            )
    first = First(
        batch=_first(batch_axis, "batch_axis", B),
        head=_first(head_axis, "head_axis", N),
        query=_first(axis_name, "axis_name", T),
        key=_first(axis_name, "axis_name", S),
    )
    args = dataclasses.replace(
        args,
        first=first,
        q_pos=args.q_pos + first.query if q_positions is None else args.q_pos,
        kv_pos=args.kv_pos + first.key if kv_positions is None else args.kv_pos,
    )
    return args, ring


def _first(axis: Axis | None, name: str, length: int) -> int | jax.Array:
    """`first_here`, of a mesh axis that is checked to be one; `name` as in `Ring.along`."""
    if axis is not None:
        Ring.along(name, axis)
    return first_here(axis, length)


def _blockwise(implementation: str | Blockwise | None) -> Blockwise:
    if isinstance(implementation, Blockwise):
        return implementation
    if implementation in (None, "blockwise"):
        return Blockwise()
    raise NotImplementedError(
        "implementation: keys that travel are attended to in blocks, wanted a Blockwise, "
        f'"blockwise" or None, got {implementation!r}'
    )
