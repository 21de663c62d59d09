"""Arrays on the devices of a mesh, and attention where its rows and heads lie.

A mesh is set by `jax.set_mesh`; what is traced under it may know its axes. These have a meaning
here, where they are of type Auto, and the compiler does what is not said:

    data, fsdp    rows of a batch (parameters are cut along fsdp too: see `qkv_jax.nn.sharding`)
    tensor        heads, the MLP's hidden units, the vocabulary
    context       tokens

Without a mesh, or on one device, nothing here does anything: the program is the same.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from qkv_jax.ops.arguments import Arguments, First
from qkv_jax.ops.blockwise import Blockwise
from qkv_jax.ops.dropout import key_words
from qkv_jax.ops.kernels import Preferred
from qkv_jax.ops.ring import Ring
from qkv_jax.ops.stats import Stats

AXES = ("data", "fsdp", "tensor", "context")
ROWS, HEADS, TOKENS = ("data", "fsdp"), ("tensor",), ("context",)
Axes = Sequence[str] | None  # the mesh axes that cut one axis of an array
Implementation = Callable[..., tuple[jax.Array, Stats]]


def sizes() -> dict[str, int]:
    """The size of each of `AXES` that cuts something: more than one device, of type Auto."""
    mesh = jax.sharding.get_abstract_mesh()
    known = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {
        name: size
        for name, size, kind in known
        if name in AXES and size > 1 and kind == AxisType.Auto
    }


def cuts(*axes: str) -> bool:
    """Whether any of these axes cuts something."""
    return not sizes().keys().isdisjoint(axes)


def fitted(wanted: Sequence[Axes], shape: Sequence[int], sizes: dict[str, int]) -> tuple[Axes, ...]:
    """The mesh axes that cut each axis of an array: those wanted that exist and divide it."""
    spec: list[Axes] = []
    for axes, length in zip(wanted, shape, strict=True):
        kept: tuple[str, ...] = ()
        for name in axes or ():
            pieces = math.prod(sizes[other] for other in kept) * sizes.get(name, 1)
            if name in sizes and length % pieces == 0:
                kept += (name,)
        spec.append(kept or None)
    return tuple(spec)


def constrain(x: jax.Array, *wanted: Axes) -> jax.Array:
    """`x`, which the compiler is to cut so; along what divides it, else whole.

    Args:
      x: any array.
      *wanted: the mesh axes for each of its axes, such as `ROWS, None, HEADS`.
    """
    known = sizes()
    if not known:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitted(wanted, x.shape, known)))


def operand_cut(x: Any, axes: Sequence[Axes | str]) -> PartitionSpec:
    """How an operand of a mask or a score is cut, or another array that is aligned as they are.

    Along the axes it has, but along T alone where it has T and S: a device has queries, and keys
    come to it.

    Args:
      x: of rank 4, each axis that of [B, N, T, S] or 1; or a table, which every device has whole.
      axes: the mesh axes that cut B, N, T and S.
    """
    if np.ndim(x) != 4:
        return PartitionSpec()
    B, N, T, S = axes
    cut = zip((B, N, T, S if np.shape(x)[2] == 1 else None), np.shape(x), strict=True)
    return PartitionSpec(*(axis if length > 1 else None for axis, length in cut))


def on_devices(implementation: Implementation) -> Implementation:
    """An implementation of attention on the mesh that is set: everything computed where it lies.

    Each device computes its rows of the batch and its heads; the compiler left alone would gather
    them, over which an implementation may loop. Along `context` it computes its queries, and the
    keys travel past them in a ring, so that no device ever holds those of all tokens (Liu et al.
    2023, arxiv.org/abs/2310.01889). They are gathered (Llama 3, section 3.3.2,
    arxiv.org/abs/2407.21783), with the same answers, where a ring cannot be:

        an implementation other than a `Blockwise`    it wants all keys of a query at once
        `context` does not divide T                   the queries are not cut
        `context` does not divide S                   nor are the keys
        less than 2 tokens on a device                an axis of 1 would say "for all tokens"

    Where an axis is empty, nothing is cut.
    """
    return functools.partial(_sharded, implementation) if sizes() else implementation


def _sharded(
    implementation: Implementation, args: Arguments, *, entropy: bool = True
) -> tuple[jax.Array, Stats]:
    known = sizes()
    if args.is_empty:  # XLA may crash on pieces of nothing
        return implementation(args, entropy=entropy)
    axes, implementation = _axes_and_form(implementation, args, known)
    rows, heads, queries, keys = axes
    # A device needs the keys of its queries' heads. Where key heads are too few to share out, each
    # is sent to all devices that have queries for it.
    k, v = (shared_out(x, pieces(heads, known)) for x in (args.k, args.v))
    rng = None if args.dropout_rng is None else key_words(args.dropout_rng)
    arrays = {
        "q": args.q, "k": k, "v": v,
        "sinks": args.sinks, "scale": args.scale, "dropout_rng": rng,
        "mask": args.mask, "score": args.score, "q_pos": args.q_pos, "kv_pos": args.kv_pos,
    }  # fmt: skip
    q, kv = PartitionSpec(rows, queries, heads), PartitionSpec(rows, keys, heads)
    specs = jax.tree.map(lambda x: operand_cut(x, axes), arrays) | {"q": q, "k": kv, "v": kv}
    if args.sinks is not None:
        specs["sinks"] = PartitionSpec(heads)
    leaves, tree = jax.tree.flatten(arrays)
    cuts = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    # What is known while tracing and not cut stays known: a plan of blocks is made of it.
    passed = [isinstance(x, jax.Array) or any(spec) for x, spec in zip(leaves, cuts, strict=True)]

    def here(*given: jax.Array) -> tuple[jax.Array, Stats]:
        rest = iter(given)
        mine = [next(rest) if p else x for x, p in zip(leaves, passed, strict=True)]
        local = dataclasses.replace(args, **jax.tree.unflatten(tree, mine))
        (B, T, N, _), S = local.q.shape, local.k.shape[1]
        first = First(*map(first_here, (rows, heads, queries, keys), (B, N, T, S)))
        return implementation(dataclasses.replace(local, first=first), entropy=entropy)

    return jax.shard_map(
        here,
        in_specs=tuple(spec for spec, p in zip(cuts, passed, strict=True) if p),
        out_specs=(q, PartitionSpec(rows, heads, queries)),
        axis_names=set(known),
    )(*(x for x, p in zip(leaves, passed, strict=True) if p))


def _axes_and_form(
    implementation: Implementation, args: Arguments, known: dict[str, int]
) -> tuple[tuple[Axes, ...], Implementation]:
    """The mesh axes that cut B, N, T and S, and the implementation: a ring, if the keys are cut."""
    B, T, N, _ = args.q.shape
    S = args.k.shape[1]
    rows, heads, queries, keys = fitted((ROWS, HEADS, TOKENS, TOKENS), (B, N, T, S), known)
    devices = pieces(queries, known)
    enough = min(T, S) >= 2 * devices
    # A kernel has no ring; what it would be preferred to may have.
    general = implementation.otherwise if isinstance(implementation, Preferred) else implementation
    if queries and keys and enough and isinstance(general, Blockwise):
        ring = functools.partial(general, ring=Ring(keys, devices))
        return (rows, heads, queries, keys), ring
    return (rows, heads, queries, None), implementation


def shared_out(x: jax.Array, shards: int, axis: int = 2) -> jax.Array:
    """Keys or values [B, S, K, H], each head as often as it takes for `shards` to divide them.

    `axis` is where another array has its K heads.
    """
    copies = math.lcm(x.shape[axis], shards) // x.shape[axis]
    return x if copies == 1 else jnp.repeat(x, copies, axis=axis)


def pieces(axes: Axes, sizes: dict[str, int]) -> int:
    """Into how many pieces mesh axes cut."""
    return math.prod(sizes[name] for name in axes or ())


def first_here(axes: Axes | str, length: int) -> int | jax.Array:
    """The index, among those of all devices along mesh axes, of the first of `length` here."""
    return 0 if axes is None else jax.lax.axis_index(axes) * length
