"""A call of attention as `block_sum` takes it: a static problem, a plan, and arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import plan
from qkv_jax.ops.arguments import WHOLE, Arguments
from qkv_jax.ops.dropout import key_words
from qkv_jax.ops.one_block import Problem
from qkv_jax.ops.plan import Grid
from qkv_jax.ops.ring import Ring, by_shard, for_each_shard

ROWS = 512  # queries in one step on a CPU: as many batch rows as together have so many
QKV = ("BTNH", "BSKH", "BSKh")


def prepared(args: Arguments, blocks: tuple[int | None, int | None], ring: Ring | None = None):
    """The call as a static problem, a grid, a schedule, and arrays that may be traced."""
    grid = grid_of(args, blocks, ring)
    if ring is None or args.mask is None:
        cover = plan.coverage(args.mask, args.q_pos, args.kv_pos, args.head, grid)
        grid, *schedule = plan.schedule(cover, grid)
        if ring is not None:
            schedule = [np.broadcast_to(x, (ring.size, *x.shape)) for x in schedule]
    else:
        grid, schedule = _schedule_of_shards(args, grid)
    # Beyond the end too: there the index tells that a block sticks out.
    lengths = {"batch": grid.B, "query": grid.cuts["T"][0], "key": grid.cuts["S"][0]}
    where = {"q_pos": args.q_pos, "kv_pos": args.kv_pos, "head": args.head}
    if grid.ragged:
        here = dataclasses.replace(args, first=WHOLE)
        where |= {"row": here.index("query", lengths["query"])}
        where |= {"column": here.index("key", lengths["key"])}
    if args.dropout_rate:
        where |= {name: args.index(name, length) for name, length in lengths.items()}
    words = key_words(args.dropout_rng) if args.dropout_rate else None
    scale = jnp.asarray(args.scale, args.dtype)
    leaves, axes, tree = _laid_out((scale, where, words), (args.mask, args.score), grid)
    problem = Problem(
        tree=tree, axes=(*QKV, *axes), T=grid.T, S=grid.S, ragged=grid.ragged,
        dropout_rate=args.dropout_rate, dtype=args.dtype,
    )  # fmt: skip
    return problem, grid, schedule, [args.q, args.k, args.v, *leaves]


def _schedule_of_shards(args: Arguments, grid: Grid) -> tuple[Grid, list[jax.Array]]:
    """`plan.schedule` for every shard of the keys on a ring: what a cover reads travels once."""
    mask = jax.lax.stop_gradient(args.mask)
    leaves, axes, tree = _laid_out((args.q_pos, args.kv_pos), (mask,), grid)

    def cover(leaves: list[jax.Array]) -> jax.Array:
        q_pos, kv_pos, mask = jax.tree.unflatten(tree, leaves)
        return plan.coverage(mask, q_pos, kv_pos, args.head, grid)

    one = jax.eval_shape(
        cover, [x[0] if by_shard(a) else x for x, a in zip(leaves, axes, strict=True)]
    )
    (covers,) = for_each_shard(
        grid.ring, lambda leaves, _: [jnp.asarray(cover(leaves))], leaves, axes,
        [jnp.zeros((grid.ring.size, *one.shape), one.dtype)], ("r____",),
    )  # fmt: skip
    schedule = jax.vmap(lambda cover: plan.schedule(cover, grid)[1:])(covers)
    return plan.schedule(covers[0], grid)[0], list(schedule)


def _laid_out(
    own: tuple, operands: tuple, grid: Grid
) -> tuple[list[jax.Array], list[str], jax.tree_util.PyTreeDef]:
    """All leaves of `(*own, *operands)`, how each lies over the plane, and the tree.

    On a ring, an operand that has the S axis of all shards gets an axis of shards in front.
    """

    def lies(x: jax.Array) -> str:
        if x.ndim != 4:
            return "_" * x.ndim
        return "".join(a if n > 1 else "_" for a, n in zip("BNTS", x.shape, strict=True))

    arrays = [jnp.asarray(x) for x in jax.tree.leaves(own)]
    axes = list(map(lies, arrays))
    for x in map(jnp.asarray, jax.tree.leaves(operands)):
        letters = lies(x)
        if grid.ring is not None and letters.endswith("S") and x.shape[3] > grid.S:
            x = jnp.moveaxis(x.reshape(*x.shape[:3], grid.ring.size, grid.S), 3, 0)
            letters = "r" + letters
        arrays.append(x)
        axes.append(letters)
    return arrays, axes, jax.tree.structure((*own, *operands))


def grid_of(
    args: Arguments,
    blocks: tuple[int | None, int | None],
    ring: Ring | None = None,
    platform: str | None = None,
) -> Grid:
    """How a call is cut into blocks, on a platform, by default where JAX computes."""
    B, T, N, _ = args.q.shape
    S, K = args.k.shape[1:3]
    platform = jax.default_backend() if platform is None else platform
    # In a zigzag, a shard has a piece of the sequence's beginning and one of its end: a block that
    # had tokens of both would cover nearly everything.
    lengths = [n // 2 if ring is not None and n % 2 == 0 else n for n in (T, S)]
    block_q, block_kv = plan.block_sizes(*lengths, N // K, blocks, platform)
    # On a CPU as many batch rows at once as fill a block; elsewhere all of them.
    most = max(1, ROWS // block_q) if platform == "cpu" else B
    rows = max(n for n in range(1, B + 1) if B % n == 0 and n <= most)
    return Grid(
        B=B, T=T, S=S, N=N, K=K, block_q=block_q, block_kv=block_kv, rows=rows, heads=N, ring=ring
    )
