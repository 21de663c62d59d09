"""Attention in linear memory, on any device: the reference's answers, block by block.

Forward, `attend` walks the blocks that the plan lists with an online softmax (Milakov & Gimelshein
2018, arxiv.org/abs/1805.02867; Rabe & Staats 2021, arxiv.org/abs/2112.05682). Given the log-sum-exp
of each row that it leaves behind, the weights of any block can be had again (Dao et al. 2022,
arxiv.org/abs/2205.14135), so that attention is a plain sum over blocks,

    out[t] = sum over s of exp(logit[t, s] - lse[t]) v[s],        with  A = d out,  L = d lse:

    A[t] = sum over s of weight[t, s] (d logit[t, s] v[s] + d v[s])
    L[t] = sum over s of weight[t, s]  d logit[t, s]
    d out = A - L out,   d lse = L

and all its derivatives are sums over blocks of derivatives of one block, which JAX takes
(`block_sum`, `one_block`). By hand there is one thing: the transpose that the first backward pass
uses, because a CPU wants its products laid out otherwise than automatic differentiation does.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qkv_jax.ops.arguments import Arguments
from qkv_jax.ops.block_loop import block_shape, for_each_row_of_blocks, over_shards, written
from qkv_jax.ops.block_sum import batch_by_loop, block_sum, no_tangent
from qkv_jax.ops.manual import abstract_array, varying_like
from qkv_jax.ops.one_block import MeanLogit, Problem, Weighted, WeightedTangent
from qkv_jax.ops.plan import Grid
from qkv_jax.ops.prepared import prepared
from qkv_jax.ops.reference import reference
from qkv_jax.ops.ring import Ring
from qkv_jax.ops.stats import Stats, merge

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """The implementation "blockwise", with block sizes of one's own.

    Args:
      block_q: queries per block.
      block_kv: keys per block; by default both are what was measured to be fast.
    """

    block_q: int | None = None
    block_kv: int | None = None

    def __post_init__(self):
        for name in ("block_q", "block_kv"):
            size = getattr(self, name)
            if size is not None and (not isinstance(size, int) or size < 1):
                raise ValueError(f"Blockwise: {name} must be a positive integer, got {size!r}")

    def __call__(
        self, args: Arguments, *, entropy: bool = True, ring: Ring | None = None
    ) -> tuple[jax.Array, Stats]:
        """The output and the statistics of `attention_with_stats`; `reference` says what they are.

        Args:
          args: checked arguments.
          entropy: whether the entropy is wanted; it costs another pass.
          ring: along which the keys are one of several shards; None: they are all there are.
        """
        return _blockwise(args, entropy, (self.block_q, self.block_kv), ring)


def _blockwise(args, entropy, blocks, ring):
    if args.is_empty:
        return reference(args)
    problem, grid, schedule, arrays = prepared(args, blocks, ring)
    _check_closures(problem, grid, arrays)
    order, counts, *arrays = varying_like([*schedule, *arrays], [*schedule, *arrays])
    schedule = order, counts
    out, lse, max_logit = attend_p.bind(*schedule, *arrays, problem=problem, grid=grid)
    mean_logit = None  # where nobody asked for the entropy
    if entropy:
        (mean_logit,) = block_sum(
            MeanLogit(problem), grid, schedule, [*arrays, _finite(lse)],
            (*problem.axes, "BNT"), ("BNT",),
        )  # fmt: skip
    if args.sinks is not None:
        out, lse, mean_logit = _with_sinks(out, lse, mean_logit, args.sinks.astype(args.dtype))
    return out.astype(args.v.dtype), Stats(
        lse=lse,
        max_logit=jax.lax.stop_gradient(max_logit),
        entropy=_finite(lse) - mean_logit if entropy else None,
    )


def _check_closures(problem: Problem, grid: Grid, arrays: list[jax.Array]) -> None:
    """Traces mask and score on one block: what they return is checked, and what they close over."""
    blocks = (
        jax.ShapeDtypeStruct(block_shape(axes, x.shape, grid), x.dtype)
        for x, axes in zip(arrays, problem.axes, strict=True)
    )
    q, k, _, *leaves = blocks
    traced = jax.make_jaxpr(functools.partial(problem.logits, True))(q, k, *leaves)
    for x in traced.consts:
        if isinstance(x, jax.core.Tracer):
            raise ValueError(
                f"mask or score: a function of one's own closes over a traced array, {x.aval}; "
                "pass it as an operand: from_function(f, array), with f(..., array)"
            )


def _with_sinks(out, lse, mean_logit, sinks):
    """A sink is one more key, whose value is nothing."""
    sink = jnp.broadcast_to(sinks[None, :, None], lse.shape)
    total = jnp.logaddexp(lse, sink)
    share = jnp.exp(lse - total)
    out = out * jnp.swapaxes(share, 1, 2)[..., None]
    if mean_logit is not None:
        mean_logit = share * mean_logit + jnp.exp(sink - total) * sink
    return out, total, mean_logit


def _finite(lse: jax.Array) -> jax.Array:
    """With 0 for a row that may attend to nothing, whose logits are all -inf: weights of 0."""
    return jnp.where(lse == -jnp.inf, 0, lse)


# attend: the fused forward pass

attend_p = Primitive("attend")
attend_p.multiple_results = True


def _attend(order, counts, q, k, v, *leaves, problem: Problem, grid: Grid):
    """Output [B, T, N, h], log-sum-exp and largest logit [B, N, T], in the problem's dtype."""
    arrays = [q, k, v, *leaves]
    dtype = problem.dtype
    like = [order, *arrays]
    per_row, per_out = "BNT", "BTNh"
    shape = (grid.B, grid.N, grid.q_blocks * grid.block_q)

    def body(buffers, start, inner):
        def step(masked, carry, start, cuts):
            q, k, v, *leaves = cuts
            _, where, words, _, _ = jax.tree.unflatten(problem.tree, leaves)
            peak, total, out = carry
            logits = problem.logits(masked, q, k, *leaves)
            new_peak = jnp.maximum(peak, logits.max(-1))
            finite = jnp.where(new_peak == -jnp.inf, 0, new_peak)  # all keys forbidden so far
            weights = jnp.exp(logits - finite[..., None])
            shrink = jnp.exp(peak - finite)
            total = total * shrink + weights.sum(-1)
            weights = problem.dropped(weights, where, words)
            return new_peak, total, out * shrink[..., None] + problem.combined(weights, v)

        rows = block_shape(per_row, shape, grid)
        start_carry = varying_like(
            like,
            [
                jnp.full(rows, -jnp.inf, dtype),
                jnp.zeros(rows, dtype),
                jnp.zeros((*rows, v.shape[-1]), dtype),
            ],
        )
        peak, total, out = inner(step, tuple(start_carry))
        empty = total == 0
        out = jnp.swapaxes(out / jnp.where(empty, 1, total)[..., None], 1, 2)
        lse = peak + jnp.log(jnp.where(empty, 1, total))
        return [
            written(buffer, x, axes, start)
            for buffer, x, axes in zip(
                buffers, (out, lse, peak), (per_out, per_row, per_row), strict=True
            )
        ]

    def one_shard(order, counts, arrays, in_axes, before):
        buffers = [
            jnp.zeros((grid.B, shape[2], grid.N, v.shape[-1]), dtype),
            jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype),
        ]
        out, lse, peak = for_each_row_of_blocks(
            grid, (order, counts), arrays, in_axes, body, varying_like(like, buffers)
        )
        after = [out[:, : grid.T], lse[:, :, : grid.T], peak[:, :, : grid.T]]
        return after if grid.ring is None else _merged(before, after)

    nothing = [jnp.zeros((grid.B, grid.T, grid.N, v.shape[-1]), dtype)]
    nothing += [jnp.full((grid.B, grid.N, grid.T), -jnp.inf, dtype)] * 2
    return over_shards(
        grid, one_shard, (order, counts), arrays, problem.axes, varying_like(like, nothing),
        (per_out, per_row, per_row),
    )  # fmt: skip


def _merged(before: list[jax.Array], after: list[jax.Array]) -> list[jax.Array]:
    """What `attend` returns, over two disjoint sets of keys."""
    (out_a, *stats_a), (out_b, *stats_b) = before, after
    stats_a, stats_b = (
        Stats(lse=lse, max_logit=peak, entropy=jnp.zeros_like(lse))
        for lse, peak in (stats_a, stats_b)
    )
    out, stats = merge(out_a, stats_a, out_b, stats_b)
    return [out, stats.lse, stats.max_logit]


_compiled_attend = jax.jit(_attend, static_argnames=("problem", "grid"))


def _abstract_attend(order, counts, q, k, v, *leaves, problem, grid):
    like = (order, counts, q, k, v, *leaves)
    rows = (grid.B, grid.N, grid.T)
    shapes = ((grid.B, grid.T, grid.N, v.shape[-1]), rows, rows)
    return [abstract_array(shape, problem.dtype, like) for shape in shapes]


def _jvp_attend(primals, tangents, *, problem, grid):
    schedule, arrays = primals[:2], primals[2:]
    out, lse, max_logit = attend_p.bind(*primals, problem=problem, grid=grid)
    zeros = [no_tangent(x) for x in (out, lse, max_logit)]
    moves = (*(type(t) is not ad.Zero for t in tangents[2:]), False)  # lse stays
    if not any(moves):
        return [out, lse, max_logit], zeros
    moved = [t for t in tangents[2:] if type(t) is not ad.Zero]
    axes = (*problem.axes, "BNT")
    f = WeightedTangent(Weighted(problem), moves)
    A, L = block_sum(
        f, grid, schedule, [*arrays, _finite(lse), *moved],
        (*axes, *(a for a, m in zip(axes, moves, strict=True) if m)), ("BTNh", "BNT"),
    )  # fmt: skip
    d_out = A - jnp.swapaxes(L, 1, 2)[..., None] * out
    return [out, lse, max_logit], [d_out, L, zeros[2]]


attend_p.def_impl(_compiled_attend)
attend_p.def_abstract_eval(_abstract_attend)
ad.primitive_jvps[attend_p] = _jvp_attend
batching.primitive_batchers[attend_p] = batch_by_loop(attend_p)
mlir.register_lowering(attend_p, mlir.lower_fun(_attend, multiple_results=True))
