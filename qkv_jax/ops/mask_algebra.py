"""The algebra of masks: what a mask is, and how masks combine.

A mask answers twice. `mask` is the truth, element by element. `cover` says of whole blocks, from
their smallest and largest positions, whether nothing (NONE), something (SOME) or everything (ALL)
in them is allowed, so that blocks can be skipped. `&`, `|` and `~` work on both: on blocks they are
Kleene's three-valued logic, the minimum, the maximum and 2 minus.

`cover` is sound: NONE and ALL are promises, SOME is none. The same lines run in NumPy, where the
positions are known when the program is built, and in jax.numpy, where they are traced.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops.operands import Operands, is_array

Array = jax.Array | np.ndarray
Interval = tuple[Array, Array]
Bounds = Callable[[Array], Interval]

NONE, SOME, ALL = 0, 1, 2


class Mask(Operands):
    """Base of all masks. A subclass states its fields, `mask` and, if it can, `cover`."""

    def mask(self, q_pos: Array, kv_pos: Array, head: Array) -> Array:
        """Whether each query may attend to each key.

        Called on an aligned object whose rank-4 operands are cut to the block.

        Args:
          q_pos: positions of the queries, int32 [B or 1, 1, T, 1].
          kv_pos: positions of the keys, int32 [B or 1, 1, 1, S]. Differences must fit in int32.
          head: indices of the heads, int32 [1, N, 1, 1].

        Returns:
          bool, broadcastable to [B, N, T, S].
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it allows")

    def cover(self, q_interval: Interval, kv_interval: Interval, bounds: Bounds) -> Array:
        """What the mask says of whole blocks: NONE, SOME or ALL.

        Args:
          q_interval: smallest and largest position of each query block, [B or 1, 1, q blocks, 1].
          kv_interval: the same of each key block, [B or 1, 1, 1, kv blocks].
          bounds: gives the (minimum, maximum) over each block of an aligned operand, batch rows and
            heads kept apart: each [B or 1, N or 1, q blocks or 1, kv blocks or 1].

        Returns:
          int8, broadcastable to [B or 1, N or 1, q blocks, kv blocks]. NumPy for NumPy arguments.
        """
        del q_interval, kv_interval, bounds
        return np.full((1, 1, 1, 1), SOME, np.int8)

    @property
    def uses_q_positions(self) -> bool:
        """Whether `mask` reads q_pos."""
        return True

    @property
    def uses_kv_positions(self) -> bool:
        """Whether `mask` reads kv_pos."""
        return True

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> "Mask":
        return Not(self)

    def __bool__(self) -> bool:
        # `Causal() and Prefix(3)` would silently be Prefix(3).
        raise ValueError("a mask has no truth value: combine masks with &, | and ~, test `is None`")


class _Pair(Mask):
    left: Mask
    right: Mask

    @property
    def uses_q_positions(self) -> bool:
        return self.left.uses_q_positions or self.right.uses_q_positions

    @property
    def uses_kv_positions(self) -> bool:
        return self.left.uses_kv_positions or self.right.uses_kv_positions


class And(_Pair):
    """`left & right`: allowed by both."""

    def mask(self, q_pos, kv_pos, head):
        return self.left.mask(q_pos, kv_pos, head) & self.right.mask(q_pos, kv_pos, head)

    def cover(self, *args):
        left, right = self.left.cover(*args), self.right.cover(*args)
        return namespace(left, right).minimum(left, right)


class Or(_Pair):
    """`left | right`: allowed by either."""

    def mask(self, q_pos, kv_pos, head):
        return self.left.mask(q_pos, kv_pos, head) | self.right.mask(q_pos, kv_pos, head)

    def cover(self, *args):
        left, right = self.left.cover(*args), self.right.cover(*args)
        return namespace(left, right).maximum(left, right)


class Not(Mask):
    """`~inner`: allowed where `inner` forbids."""

    inner: Mask

    def mask(self, q_pos, kv_pos, head):
        return ~self.inner.mask(q_pos, kv_pos, head)

    def cover(self, *args):
        return np.int8(ALL) - self.inner.cover(*args)

    @property
    def uses_q_positions(self) -> bool:
        return self.inner.uses_q_positions

    @property
    def uses_kv_positions(self) -> bool:
        return self.inner.uses_kv_positions


def conjuncts(mask: Mask | None) -> list[Mask]:
    """The masks that `&` joins, from left to right; none for None."""
    if isinstance(mask, And):
        return conjuncts(mask.left) + conjuncts(mask.right)
    return [] if mask is None else [mask]


# What the named masks build their `cover` from.


def namespace(*arrays: Any) -> Any:
    """jax.numpy if any of the arrays is JAX's, otherwise NumPy."""
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def limits(value: int | Array, bounds: Bounds) -> Interval:
    """The smallest and largest value, per block, of a number or an aligned operand."""
    return bounds(value) if is_array(value) else (value, value)


def differences(q_interval: Interval, kv_interval: Interval) -> Interval:
    """The smallest and largest `kv - q` of each block."""
    (q_low, q_high), (kv_low, kv_high) = q_interval, kv_interval
    return kv_low - q_high, kv_high - q_low


def three_valued(none: Array, every: Array) -> Array:
    """NONE, SOME or ALL, from whether it is NONE and whether it is ALL."""
    return np.int8(SOME) - none.astype(np.int8) + every.astype(np.int8)


def cover_equal(q_interval: Interval, kv_interval: Interval) -> Array:
    """The cover of `q == kv`."""
    (q_low, q_high), (kv_low, kv_high) = q_interval, kv_interval
    none = (q_high < kv_low) | (kv_high < q_low)
    return three_valued(none, every=(q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low))


def cover_before(kv_interval: Interval, limits: Interval) -> Array:
    """The cover of `kv < limit`."""
    return three_valued(none=kv_interval[0] >= limits[1], every=kv_interval[1] < limits[0])
