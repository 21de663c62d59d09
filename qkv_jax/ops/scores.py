"""Scores: what happens to a logit between the scaled dot product and the mask.

A score maps a block of logits to a block of logits, element by element: it never reduces over keys.
It receives finite logits and returns finite ones, in the same shape and dtype. A tuple of scores
applies in order. Gradients flow to every array that a score carries, in the shape it was given.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import positions
from qkv_jax.ops.operands import Operands, as_jax, is_array, operand

Array = jax.Array | np.ndarray


class Score(Operands):
    """Base of all scores. A subclass states its fields and `score`."""

    def score(self, logits: Array, q_pos: Array, kv_pos: Array, head: Array) -> Array:
        """The modified logits.

        Called on an aligned object whose rank-4 operands are cut to the block.

        Args:
          logits: scaled dot products, float32 or float64 [B, N, T, S].
          q_pos: positions of the queries, int32 [B or 1, 1, T, 1].
          kv_pos: positions of the keys, int32 [B or 1, 1, 1, S].
          head: indices of the heads, int32 [1, N, 1, 1].

        Returns:
          Logits of the same shape and dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it does to a logit")

    @property
    def uses_positions(self) -> bool:
        """Whether `score` reads q_pos or kv_pos."""
        return False


class Softcap(Score):
    """`cap * tanh(logits / cap)`: logits stay within (-cap, cap) (Gemma 2).

    Args:
      cap: a positive number, or an array: a scalar or [N].
    """

    cap: float | Array = operand("", "N", dtype="floating", number=True, sign="positive")

    def score(self, logits, q_pos, kv_pos, head):
        cap = _like(logits, self.cap)
        return cap * jnp.tanh(logits / cap)


class Temperature(Score):
    """`logits / temperature`: a positive number, or an array: a scalar, [N] or aligned."""

    temperature: float | Array = operand("", "N", dtype="floating", number=True, sign="positive")

    def score(self, logits, q_pos, kv_pos, head):
        return logits / _like(logits, self.temperature)


class Alibi(Score):
    """`logits - slope * |q - kv|`, a slope per head (Press et al. 2022, arxiv.org/abs/2108.12409).

    Args:
      slopes: floating [N]; `positions.alibi_slopes(N)` gives the paper's.
    """

    slopes: Array = operand("N", dtype="floating")
    uses_positions = True

    def score(self, logits, q_pos, kv_pos, head):
        distance = abs(q_pos - kv_pos).astype(logits.dtype)
        return logits - _like(logits, self.slopes) * distance


class RelativeBias(Score):
    """`logits + table[bucket(kv - q), head]` (T5, Raffel et al. 2020, arxiv.org/abs/1910.10683).

    Args:
      table: floating [buckets, N].
      bidirectional: whether keys after the query have buckets of their own (an encoder's table).
      max_distance: from this distance on, all keys share the last bucket.
    """

    table: Array = operand(tables=("buckets N",), dtype="floating")
    bidirectional: bool = False
    max_distance: int = 128
    uses_positions = True

    def __post_init__(self):
        super().__post_init__()
        positions.t5_thresholds(self.table.shape[0], self.max_distance, self.bidirectional)

    def score(self, logits, q_pos, kv_pos, head):
        table = _like(logits, self.table)
        if 0 in logits.shape:
            return logits
        # Far from the diagonal a whole block shares one bucket, and needs no lookup.
        nearest = self._buckets(kv_pos.max() - q_pos.min())
        farthest = self._buckets(kv_pos.min() - q_pos.max())
        return jax.lax.cond(
            nearest == farthest,
            lambda logits, table: logits + table[nearest, head],
            lambda logits, table: logits + table[self._buckets(kv_pos - q_pos), head],
            logits,
            table,
        )

    def _buckets(self, relative_position: Array) -> Array:
        return positions.t5_buckets(
            relative_position,
            num_buckets=self.table.shape[0],
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
        )


class Bias(Score):
    """`logits + array`: floating [T, S], [N, T, S] or [B or 1, N or 1, T, S]."""

    array: Array = operand("TS", "NTS", dtype="floating")

    def score(self, logits, q_pos, kv_pos, head):
        return logits + _like(logits, self.array)


class FromFunction(Score):
    """What `from_function` returns."""

    f: Callable[..., Array]
    operands: tuple[Any, ...]
    uses_positions = True

    def score(self, logits, q_pos, kv_pos, head):
        scored = self.f(logits, q_pos, kv_pos, head, *as_jax(self.operands))
        found = getattr(scored, "dtype", type(scored)), np.shape(scored)
        if found != (logits.dtype, logits.shape):
            raise ValueError(
                f"scores.from_function: f must return {logits.dtype} {list(logits.shape)}, "
                f"the shape and dtype of the logits it was given, got {found[0]} {list(found[1])}"
            )
        return scored


def from_function(f: Callable[..., Array], *operands: Any) -> Score:
    """A score from a function of one's own.

    Args:
      f: called as `f(logits, q_pos, kv_pos, head, *operands)` with the shapes of `Score.score`;
        returns finite logits of the same shape and dtype.
      *operands: arrays of rank 4 are cut to the block, others are passed whole, numbers are static.
        Gradients flow to the arrays.
    """
    return FromFunction(f, operands)


Scores = Score | tuple[Score, ...] | None


def apply(score: Scores, logits: Array, q_pos: Array, kv_pos: Array, head: Array) -> Array:
    """The logits after a score, after each score of a tuple in order, or as they are for None."""
    for step in _steps(score):
        logits = step.score(logits, q_pos, kv_pos, head)
    return logits


def aligned(score: Scores) -> tuple[Score, ...]:
    """The scores in order, each with its operands aligned (see `operands`)."""
    return tuple(step.aligned() for step in _steps(score))


def uses_positions(score: Scores) -> bool:
    """Whether any of the scores reads positions."""
    return any(step.uses_positions for step in _steps(score))


def _steps(score: Scores) -> tuple[Score, ...]:
    steps = () if score is None else tuple(score) if isinstance(score, tuple | list) else (score,)
    for step in steps:
        if not isinstance(step, Score):
            raise ValueError(f"score must be a Score, a tuple of Scores or None, got {step!r}")
    return steps


def _like(logits: Array, value: float | Array) -> float | Array:
    """An operand in the dtype of the logits; the cast gives it gradients of its own dtype."""
    return jnp.asarray(value, logits.dtype) if is_array(value) else value
