"""Sums over blocks: one primitive from which all derivatives of attention are made.

    block_sum(f, x)  =  sum over the blocks (i, j) of a plan of  f(the cuts of x at (i, j))

where each output of f is added at the place of its own block. Attention's derivatives, given each
row's log-sum-exp, are such sums; and the derivative of such a sum is one again, of f's derivative:

    jvp        block_sum of `Tangent(f)`
    transpose  block_sum of `Transpose(f)`
    vmap       a loop over block_sum

so that forward mode, reverse mode and derivatives of any order take memory for x and for the
result, never for T x S. Block functions are values (frozen dataclasses): two equal ones compile
once. They close over no arrays. How an array lies over the plane is said by letters, see
`block_loop`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qkv_jax.ops.block_loop import added, along, block_shape, for_each_row_of_blocks, over_shards
from qkv_jax.ops.manual import abstract_array, varying_like
from qkv_jax.ops.plan import Grid
from qkv_jax.ops.ring import by_shard

# Called as f(masked, *cuts) and returns a list of blocks; `masked` says whether the predicate is
# needed. It may have a method `transpose` that does what the rule `_transpose` would do, or returns
# None where it cannot.
BlockFunction = Callable[..., list[jax.Array]]


def block_sum(
    f: BlockFunction,
    grid: Grid,
    plan: tuple[Any, Any],
    arrays: Sequence[jax.Array],
    in_axes: tuple[str, ...],
    out_axes: tuple[str, ...],
) -> list[jax.Array]:
    """The sum of f over the blocks of a plan.

    Args:
      f: the block function.
      grid, plan: what `plan.schedule` returned.
      arrays: the inputs, whole.
      in_axes, out_axes: how each input and output lies over the plane.

    Returns:
      Each output, whole; zero where no block contributes.
    """
    args = varying_like([*plan, *arrays], [*plan, *arrays])
    return block_sum_p.bind(*args, f=f, grid=grid, in_axes=in_axes, out_axes=out_axes)


@dataclasses.dataclass(frozen=True)
class Tangent:
    """The derivative of a block function along tangents of the inputs that move.

    Takes the inputs of f, then the tangents.
    """

    f: BlockFunction
    moves: tuple[bool, ...]

    def __call__(self, masked: bool, *cuts: jax.Array) -> list[jax.Array]:
        primals, tangents = cuts[: len(self.moves)], cuts[len(self.moves) :]

        def moving(*moved):
            return self.f(masked, *filled(self.moves, moved, primals))

        moved = [x for x, moves in zip(primals, self.moves, strict=True) if moves]
        return jax.jvp(moving, moved, list(tangents))[1]


@dataclasses.dataclass(frozen=True)
class Transpose:
    """The transpose of a block function in the inputs in which it is linear.

    Takes the other inputs, then the cotangents of the outputs.
    """

    f: BlockFunction
    linear: tuple[bool, ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]  # of the linear inputs' cuts

    def __call__(self, masked: bool, *cuts: jax.Array) -> list[jax.Array]:
        others = cuts[: len(self.linear) - sum(self.linear)]
        cotangents = list(cuts[len(others) :])
        fixed = tuple(not linear for linear in self.linear)

        def linear(*inputs):
            return self.f(masked, *filled(fixed, others, filled(self.linear, inputs, fixed)))

        # Not `jax.linear_transpose`: it would take the mesh axes of `shard_map` from the shapes.
        zeros = varying_like(cuts, [jnp.zeros(x.shape, x.dtype) for x in self.shapes])
        return list(jax.vjp(linear, *zeros)[1](cotangents))


def filled(where: Sequence[bool], values: Sequence[Any], rest: Sequence[Any]) -> list[Any]:
    """`rest`, with the next of `values` wherever `where` is true."""
    values = iter(values)
    return [next(values) if here else x for here, x in zip(where, rest, strict=True)]


# The sum


def _implementation(order, counts, *arrays, f, grid, in_axes, out_axes):
    outs = _out_shapes(arrays, f, grid, in_axes, out_axes)
    like = [order, *arrays]
    in_row = [along(axes, "Tt") and not along(axes, "Ss") for axes in out_axes]
    out_letters = [axes.removeprefix("r") for axes in out_axes]  # of one shard

    def body(buffers, start, inner):
        def step(masked, carry, start, cuts):
            blocks = f(masked, *cuts)
            return [
                old + block if row else added(old, block, axes, start)
                for old, block, axes, row in zip(carry, blocks, out_letters, in_row, strict=True)
            ]

        carry = [
            _zeros(block_shape(axes, x.shape, grid), x.dtype, like) if row else x
            for x, axes, row in zip(buffers, out_letters, in_row, strict=True)
        ]
        return [
            added(old, new, axes, start) if row else new
            for old, new, axes, row in zip(
                buffers, inner(step, carry), out_letters, in_row, strict=True
            )
        ]

    def one_shard(order, counts, arrays, in_axes, buffers):
        return for_each_row_of_blocks(grid, (order, counts), arrays, in_axes, body, buffers)

    buffers = [
        _zeros(_padded_shape(axes, shape, grid), jnp.promote_types(dtype, jnp.float32), like)
        for (shape, dtype), axes in zip(outs, out_axes, strict=True)
    ]
    buffers = over_shards(grid, one_shard, (order, counts), arrays, in_axes, buffers, out_axes)
    return [
        x[tuple(map(slice, shape))].astype(dtype)
        for x, (shape, dtype) in zip(buffers, outs, strict=True)
    ]


def _zeros(shape, dtype, like):
    return varying_like(like, [jnp.zeros(shape, dtype)])[0]


def _padded_shape(axes, shape, grid):
    return [grid.cuts[a][0] if a in grid.cuts else n for a, n in zip(axes, shape, strict=True)]


def _out_shapes(arrays, f, grid, in_axes, out_axes) -> list[tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each output."""
    cuts = tuple(
        jax.ShapeDtypeStruct(block_shape(axes, x.shape, grid), x.dtype)
        for x, axes in zip(arrays, in_axes, strict=True)
    )
    sizes = {a: length for a, (length, _) in grid.cuts.items()} | {"T": grid.T, "S": grid.S}

    def whole(axes: str, block: tuple[int, ...]) -> tuple[int, ...]:
        shards = (grid.ring.size,) if by_shard(axes) else ()
        letters = axes.removeprefix("r")
        return shards + tuple(sizes.get(a, n) for a, n in zip(letters, block, strict=True))

    return [
        (whole(axes, block.shape), block.dtype)
        for block, axes in zip(_blocks_of(f, cuts), out_axes, strict=True)
    ]


@functools.lru_cache(maxsize=1024)
def _blocks_of(f: BlockFunction, cuts: tuple[jax.ShapeDtypeStruct, ...]) -> list[Any]:
    return jax.eval_shape(functools.partial(f, True), *cuts)


# The primitive and its rules

block_sum_p = Primitive("block_sum")
block_sum_p.multiple_results = True


_compiled = jax.jit(_implementation, static_argnames=("f", "grid", "in_axes", "out_axes"))


def _abstract(order, counts, *arrays, f, grid, in_axes, out_axes):
    shapes = _out_shapes(arrays, f, grid, in_axes, out_axes)
    return [abstract_array(shape, dtype, (order, counts, *arrays)) for shape, dtype in shapes]


def _jvp(primals, tangents, *, f, grid, in_axes, out_axes):
    plan, arrays = primals[:2], primals[2:]
    out = block_sum(f, grid, plan, arrays, in_axes, out_axes)
    moves = tuple(type(t) is not ad.Zero for t in tangents[2:])
    if not any(moves):
        return out, [no_tangent(x) for x in out]
    moved = [t for t, here in zip(tangents[2:], moves, strict=True) if here]
    axes = in_axes + tuple(a for a, here in zip(in_axes, moves, strict=True) if here)
    return out, block_sum(Tangent(f, moves), grid, plan, [*arrays, *moved], axes, out_axes)


def _transpose(cotangents, order, counts, *arrays, f, grid, in_axes, out_axes):
    linear = tuple(ad.is_undefined_primal(x) for x in arrays)
    cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
    others = [x for x, here in zip(arrays, linear, strict=True) if not here]
    axes_in = tuple(a for a, here in zip(in_axes, linear, strict=True) if not here) + out_axes
    axes_out = tuple(a for a, here in zip(in_axes, linear, strict=True) if here)
    plan, results = (order, counts), None
    if hasattr(f, "transpose"):
        results = f.transpose(linear, grid, plan, others, cotangents, axes_in)
    if results is None:
        shapes = tuple(
            jax.ShapeDtypeStruct(block_shape(a, x.aval.shape, grid), x.aval.dtype)
            for x, a, here in zip(arrays, in_axes, linear, strict=True)
            if here
        )
        f = Transpose(f, linear, shapes)
        results = block_sum(f, grid, plan, [*others, *cotangents], axes_in, axes_out)
    return [None, None, *filled(linear, results, [None] * len(arrays))]


def no_tangent(x: jax.Array) -> ad.Zero:
    """The tangent of what does not move."""
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def batch_by_loop(primitive: Primitive) -> Callable:
    """The batching rule of a primitive: `lax.map` over the batched axis."""

    def rule(args, dims, **params):
        mapped = tuple(d is not None for d in dims)
        in_front = [jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True) if d is not None]
        outs = jax.lax.map(lambda xs: primitive.bind(*filled(mapped, xs, args), **params), in_front)
        return outs, [0] * len(outs)

    return rule


block_sum_p.def_impl(_compiled)
block_sum_p.def_abstract_eval(_abstract)
ad.primitive_jvps[block_sum_p] = _jvp
ad.primitive_transposes[block_sum_p] = _transpose
batching.primitive_batchers[block_sum_p] = batch_by_loop(block_sum_p)
mlir.register_lowering(block_sum_p, mlir.lower_fun(_implementation, multiple_results=True))
