"""The walk over the blocks of a plan, and how arrays are cut on it.

How an array lies over the plane is a string with a letter per axis: `B`, `N`, `K`, `T` and `S` (see
`qkv_jax.ops`) are cut, any other letter is passed whole. Queries are "BTNH", keys "BSKH", ALiBi's
slopes "_N__", a table "__". An array kept block by block has an axis `t` or `s` of blocks, and the
elements of a block on an axis of its own: a block of it lies together in memory. On a ring of
devices (`ring`) the sum is over the blocks of all shards of the keys, and an axis `r` counts them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops.plan import Grid
from qkv_jax.ops.ring import for_each_shard


def block_shape(axes: str, shape: Sequence[int], grid: Grid) -> tuple[int, ...]:
    """The shape of one block of an array."""
    cuts = grid.cuts
    return tuple(
        cuts[a][1] if a in cuts else n for a, n in zip(axes, shape, strict=True) if a != "r"
    )


def along(axes: str, letters: str) -> bool:
    """Whether an array has any of these axes."""
    return not set(letters).isdisjoint(axes)


def padded(x: jax.Array, axes: str, grid: Grid) -> jax.Array:
    """An array with its last query and key repeated up to whole blocks."""
    cuts = grid.cuts
    pads = [(0, cuts[a][0] - n if a in "TS" else 0) for a, n in zip(axes, x.shape, strict=True)]
    return jnp.pad(x, pads, mode="edge") if any(map(any, pads)) else x


def cut(x: jax.Array, axes: str, start: dict[str, Any], grid: Grid) -> jax.Array:
    """The block of an array that begins at `start`."""
    shape = block_shape(axes, x.shape, grid)
    if shape == x.shape:
        return x
    return jax.lax.dynamic_slice(x, _starts(axes, start), shape)


def added(x: jax.Array, block: jax.Array, axes: str, start: dict[str, Any]) -> jax.Array:
    """The array with a block added at `start`."""
    if x.shape == block.shape:
        return x + block
    starts = _starts(axes, start)
    old = jax.lax.dynamic_slice(x, starts, block.shape)
    return jax.lax.dynamic_update_slice(x, old + block, starts)


def _starts(axes: str, start: dict[str, Any]) -> list[Any]:
    return [start.get(a, np.int32(0)) for a in axes]


def written(x: jax.Array, block: jax.Array, axes: str, start: dict[str, Any]) -> jax.Array:
    """The array with a block put at `start`."""
    if x.shape == block.shape:
        return block
    return jax.lax.dynamic_update_slice(x, block, _starts(axes, start))


def for_each_row_of_blocks(
    grid: Grid,
    plan: tuple[jax.Array, jax.Array],
    arrays: Sequence[jax.Array],
    in_axes: Sequence[str],
    body: Callable,
    carry: Any,
) -> Any:
    """Calls `carry = body(carry, start, inner)` for every block of queries.

    `start` says where the block begins on each axis. `inner(step, carry)` calls
    `carry = step(masked, carry, start, cuts)` for every block of keys that the plan lists, with the
    arrays cut to the block: what does not lie along the keys is cut once for the row.
    """
    xs = [padded(x, axes, grid) for x, axes in zip(arrays, in_axes, strict=True)]
    of_keys = [along(axes, "Ss") for axes in in_axes]

    def cuts_of(xs, where, start):
        return [
            cut(x, axes, start, grid) if here else x
            for x, axes, here in zip(xs, in_axes, where, strict=True)
        ]

    order, counts = plan
    heads = grid.N // grid.heads
    steps = grid.B // grid.rows * heads * grid.q_blocks

    def row(u, carry):
        u, i = u // np.int32(grid.q_blocks), u % np.int32(grid.q_blocks)
        b, n = u // np.int32(heads), u % np.int32(heads)
        where = (b if order.shape[0] > 1 else 0), (n if order.shape[1] > 1 else 0), i
        start = {
            "B": b * grid.rows,
            "N": n * grid.heads,
            "K": n * grid.heads * grid.K // grid.N,
            "T": i * grid.block_q,
            "t": i,
        }
        partial, total = counts[where][0], counts[where][1]
        of_row = cuts_of(xs, [not here for here in of_keys], start)

        def inner(step, carry):
            def masked_or_not(masked):
                def one(j, carry):
                    block = order[(*where, j)]
                    at = start | {"S": block * grid.block_kv, "s": block}
                    return step(masked, carry, at, cuts_of(of_row, of_keys, at))

                return one

            if grid.partial:
                carry = jax.lax.fori_loop(np.int32(0), partial, masked_or_not(True), carry)
            if grid.full:
                carry = jax.lax.fori_loop(partial, total, masked_or_not(False), carry)
            return carry

        return body(carry, start, inner)

    return jax.lax.fori_loop(np.int32(0), np.int32(steps), row, carry)


def over_shards(
    grid: Grid,
    one_shard: Callable,
    plan: tuple[jax.Array, jax.Array],
    arrays: Sequence[jax.Array],
    in_axes: Sequence[str],
    results: Sequence[jax.Array],
    out_axes: Sequence[str],
) -> list[jax.Array]:
    """`results = one_shard(order, counts, arrays, in_axes, results)` of every shard of the keys.

    Without a ring there is one. On a ring the plan has an entry for each, and those of which no
    block is needed are skipped, on this device alone.
    """
    if grid.ring is None:
        return one_shard(*plan, arrays, in_axes, results)
    letters = [axes.removeprefix("r") for axes in in_axes]

    def compute(cuts, results):
        order, counts, *arrays = cuts
        return jax.lax.cond(
            counts[..., 1].any(),
            lambda results: one_shard(order, counts, arrays, letters, results),
            lambda results: results,
            results,
        )

    in_axes = ("r____", "r____", *in_axes)
    return for_each_shard(grid.ring, compute, [*plan, *arrays], in_axes, results, out_axes)
