"""One block of attention, and the derivatives of one block.

The functions that `block_sum` sums: of one block's cuts of queries, keys, values and whatever mask
and score carry. `Problem` is what they have in common.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import scores
from qkv_jax.ops.block_sum import Tangent, block_sum, filled, padded
from qkv_jax.ops.dropout import dropped
from qkv_jax.ops.plan import Grid


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static half of an attention call: with one block's cuts of the arrays, all there is.

    The arrays are q [B, T, N, H], k [B, S, K, H], v [B, S, K, h], the scale, the coordinates of
    queries, keys, heads and batch rows, dropout's two words, and what mask and score carry.
    """

    tree: Any  # of (scale, where, words, mask, score)
    axes: tuple[str, ...]  # of q, k, v and the leaves of that tree
    T: int
    S: int
    ragged: bool
    dropout_rate: float
    dtype: Any

    @property
    def first_of_score(self) -> int:
        """Where among the arrays those of the score begin."""
        *_, score = self.tree.children()
        return len(self.axes) - score.num_leaves

    def logits(self, masked: bool, q: jax.Array, k: jax.Array, *leaves: jax.Array) -> jax.Array:
        """What the softmax sees, [B, N, T, S] of a block; -inf where the mask forbids."""
        scale, where, _, mask, score = jax.tree.unflatten(self.tree, leaves)
        logits = self.products(q, k, scale)
        return self.forbidden(masked, self.scored(logits, where, score), where, mask)

    def products(self, q: jax.Array, k: jax.Array, scale: jax.Array | float) -> jax.Array:
        """scale q . k, from [B, T, N, H] and [B, S, K, H], as [B, N, T, S]."""
        q, k = (jnp.swapaxes(x, 1, 2).astype(self.dtype) for x in (q, k))
        B, N, T, H = q.shape
        K, S = k.shape[1:3]
        rows = (q * scale).reshape(B, K, N // K * T, H)
        return jnp.einsum("BKRH,BKSH->BKRS", rows, k).reshape(B, N, T, S)

    def scored(self, logits, where, score):
        return scores.apply(score, logits, where["q_pos"], where["kv_pos"], where["head"])

    def forbidden(self, masked: bool, logits, where, mask):
        """The logits, -inf for those that the mask forbids."""
        if not masked:
            return logits
        allowed = np.True_
        if mask is not None:
            allowed = mask.mask(where["q_pos"], where["kv_pos"], where["head"])
        if self.ragged:
            allowed = allowed & (where["row"] < self.T) & (where["column"] < self.S)
        return jnp.where(allowed, logits, -jnp.inf)

    def dropped(self, weights: jax.Array, where: Any, words: Any) -> jax.Array:
        """The weights after dropout."""
        if not self.dropout_rate:  # then `where` has no need of the indices
            return weights
        indices = {name: where[name] for name in ("batch", "head", "query", "key")}
        return dropped(weights, words, self.dropout_rate, **indices)

    def combined(self, weights: jax.Array, v: jax.Array) -> jax.Array:
        """weights [B, N, T, S] v [B, S, K, h], as [B, N, T, h]."""
        v = jnp.swapaxes(v, 1, 2)
        B, N, T, S = weights.shape
        K, _, h = v.shape[1:]
        rows = weights.reshape(B, K, N // K * T, S)
        return jnp.einsum("BKRS,BKSh->BKRh", rows, v.astype(self.dtype)).reshape(B, N, T, h)

    def over_queries(self, turned: jax.Array, weights: jax.Array, K: int) -> jax.Array:
        """turned [B, N, H, T] weights [B, N, T, S], as [B, K, H, S]: also summed over groups."""
        product = jnp.einsum("BNHT,BNTS->BNHS", turned.astype(self.dtype), weights)
        B, N, H, S = product.shape
        return product if N == K else product.reshape(B, K, N // K, H, S).sum(2)


# Each of these takes the problem's arrays, cut, and the log-sum-exp [B, N, T].


@dataclasses.dataclass(frozen=True)
class Weighted:
    """`sum over s of weight (v, 1)`: the output, and 1. Its derivative is that of attention."""

    problem: Problem

    def __call__(self, masked, q, k, v, *rest):
        *leaves, lse = rest
        problem = self.problem
        _, where, words, _, _ = jax.tree.unflatten(problem.tree, leaves)
        weights = jnp.exp(problem.logits(masked, q, k, *leaves) - lse[..., None])
        out = problem.combined(problem.dropped(weights, where, words), v)
        return [jnp.swapaxes(out, 1, 2), weights.sum(-1)]


@dataclasses.dataclass(frozen=True)
class MeanLogit:
    """`sum over s of weight * logit`, from which the entropy follows."""

    problem: Problem

    def __call__(self, masked, q, k, v, *rest):
        *leaves, lse = rest
        logits = self.problem.logits(masked, q, k, *leaves)
        finite = jnp.where(logits == -jnp.inf, 0, logits) if masked else logits
        return [(jnp.exp(logits - lse[..., None]) * finite).sum(-1)]


@dataclasses.dataclass(frozen=True)
class WeightedTangent(Tangent):
    """The derivative of `Weighted`, which is attention's, with a transpose by hand."""

    def transpose(self, linear, grid, schedule, others, cotangents, axes_in):
        """The first backward pass, see `Backward`; None where this is not it."""
        f = Backward(self.f.problem, self.moves)
        inputs = len(self.moves)
        if any(linear[:inputs]) or not all(linear[inputs:]) or not f.possible:
            return None
        d_out, d_total = cotangents
        turned = [_turned(x, grid) for x in (others[0], d_out)]
        outs = block_sum(
            f, grid, schedule, [*others, *turned, d_out, d_total],
            (*axes_in[:inputs], "tBNH_", "tBNh_", "BTNh", "BNT"), f.out_axes,
        )  # fmt: skip
        moving = [x for x, moves in zip(others, self.moves, strict=True) if moves]
        return [
            (_turned_back(x, grid) if axes[0] == "s" else x).astype(primal.dtype)
            for x, axes, primal in zip(outs, f.out_axes, moving, strict=True)
        ]


def _turned(x: jax.Array, grid: Grid) -> jax.Array:
    """[B, T, N, H] block by block and turned: [q blocks, B, N, H, block_q]."""
    x = padded(x, "BTNH", grid)
    B, _, N, H = x.shape
    return x.reshape(B, grid.q_blocks, grid.block_q, N, H).transpose(1, 0, 3, 4, 2)


def _turned_back(x: jax.Array, grid: Grid) -> jax.Array:
    """[kv blocks, B, K, H, block_kv] as [B, S, K, H]."""
    _, B, K, H, _ = x.shape
    return x.transpose(1, 0, 4, 2, 3).reshape(B, -1, K, H)[:, : grid.S]


@dataclasses.dataclass(frozen=True)
class Backward:
    """The transpose of `Tangent(Weighted)`, its products laid out for a CPU.

    There, contracting weights [T, S] over T takes twice as long as over S, unless the other factor
    comes as [H, T] and the result leaves as [H, S]. Takes the problem's arrays and lse; q and d_out
    turned, block by block; and the cotangents d_out [B, T, N, h] and d_total [B, N, T].
    """

    problem: Problem
    moves: tuple[bool, ...]  # of the problem's arrays and lse

    @property
    def possible(self) -> bool:
        """Whether it knows all that moves: q, k, v, the scale and the score's arrays."""
        return not any(self.moves[4 : self.problem.first_of_score]) and not self.moves[-1]

    @property
    def out_axes(self) -> tuple[str, ...]:
        axes = ("BTNH", "sBKH_", "sBKh_", *self.problem.axes[3:])
        return tuple(a for a, moves in zip(axes, self.moves, strict=False) if moves)

    def __call__(self, masked, q, k, v, *rest):
        *leaves, lse, q_turned, d_out_turned, d_out, d_total = rest
        p = self.problem
        scale, where, words, mask, score = jax.tree.unflatten(p.tree, leaves)
        raw = p.products(q, k, scale)
        score_leaves, score_tree = jax.tree.flatten(score)
        score_moves = self.moves[p.first_of_score : -1]

        def scored(raw, moving):
            score = jax.tree.unflatten(score_tree, filled(score_moves, moving, score_leaves))
            return p.scored(raw, where, score)

        # In the wide dtype, so that their gradients are summed in it.
        moving = [
            x.astype(p.dtype) for x, moves in zip(score_leaves, score_moves, strict=True) if moves
        ]
        logits, pullback = jax.vjp(scored, raw, moving)
        weights = jnp.exp(p.forbidden(masked, logits, where, mask) - lse[..., None])
        d_weights = p.dropped(p.products(d_out, v, 1), where, words)
        d_raw, d_score = pullback(weights * (d_weights + d_total[..., None]))
        weights = p.dropped(weights, where, words)
        gradients = (
            lambda: jnp.swapaxes(scale * p.combined(d_raw, k), 1, 2),
            lambda: p.over_queries(q_turned[0] * scale, d_raw, k.shape[2])[None],
            lambda: p.over_queries(d_out_turned[0], weights, k.shape[2])[None],
            lambda: (d_raw * p.products(q, k, 1)).sum(),
        )
        moves = zip(gradients, self.moves[:4], strict=True)
        return [gradient() for gradient, here in moves if here] + d_score
