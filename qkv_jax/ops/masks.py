"""Masks: who may attend to whom, as predicates over positions.

    Causal() & SlidingWindow(256) & Segments(ids)      packed documents, local attention
    Causal() | Prefix(n)                               the prefix language model

Positions, not array indices: the same mask serves training, one-token decoding and packed
documents. What a mask is, and what `&`, `|`, `~` and `cover` mean, stands in `mask_algebra`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops.mask_algebra import (
    ALL,
    NONE,
    SOME,
    And,
    Array,
    Bounds,
    Interval,
    Mask,
    Not,
    Or,
    cover_before,
    cover_equal,
    differences,
    limits,
    namespace,
    three_valued,
)
from qkv_jax.ops.operands import as_jax, described, is_array, operand

__all__ = [
    "ALL", "NONE", "SOME", "And", "Blocks", "Bounds", "Causal", "Chunked", "Dense", "Dilated",
    "Global", "Interval", "Lengths", "Mask", "Not", "Or", "Prefix", "Segments", "SlidingWindow",
    "causal_lengths", "from_function", "order_of",
]  # fmt: skip


class Causal(Mask):
    """No key after the query: `kv <= q`."""

    def mask(self, q_pos, kv_pos, head):
        return kv_pos <= q_pos

    def cover(self, q_interval, kv_interval, bounds):
        (q_low, q_high), (kv_low, kv_high) = q_interval, kv_interval
        return three_valued(none=kv_low > q_high, every=kv_high <= q_low)


class SlidingWindow(Mask):
    """Keys near the query, ends included: `q - left <= kv <= q + right`.

    The convention of `jax.nn.dot_product_attention`; Hugging Face's window w is `left = w - 1`.

    Args:
      left: how far back a query sees: an integer, integers [N] (per head), or None for no limit.
      right: how far ahead, likewise.
    """

    left: int | Array | None = operand(
        "", "N", dtype="integer", number=True, sign="non-negative", optional=True
    )
    right: int | Array | None = operand(
        "", "N", dtype="integer", number=True, sign="non-negative", optional=True, default=0
    )

    def mask(self, q_pos, kv_pos, head):
        allowed = (q_pos == q_pos) & (kv_pos == kv_pos)
        if self.left is not None:
            allowed = allowed & (q_pos - kv_pos <= self.left)
        if self.right is not None:
            allowed = allowed & (kv_pos - q_pos <= self.right)
        return allowed

    def cover(self, q_interval, kv_interval, bounds):
        low, high = differences(q_interval, kv_interval)
        none, every = low != low, low == low
        if self.left is not None:
            narrow, wide = limits(self.left, bounds)
            none, every = none | (-high > wide), every & (-low <= narrow)
        if self.right is not None:
            narrow, wide = limits(self.right, bounds)
            none, every = none | (low > wide), every & (high <= narrow)
        return three_valued(none, every)


class Chunked(Mask):
    """Keys in the query's chunk: `q // size == kv // size`."""

    size: int = operand(dtype="integer", number=True, sign="positive")

    def mask(self, q_pos, kv_pos, head):
        return q_pos // self.size == kv_pos // self.size

    def cover(self, q_interval, kv_interval, bounds):
        q_chunks = tuple(end // self.size for end in q_interval)
        kv_chunks = tuple(end // self.size for end in kv_interval)
        return cover_equal(q_chunks, kv_chunks)


class Prefix(Mask):
    """Keys before `length`, an integer or integers [B]: `kv < length`."""

    length: int | Array = operand("", "B", dtype="integer", number=True, sign="non-negative")
    uses_q_positions = False

    def mask(self, q_pos, kv_pos, head):
        return kv_pos < self.length

    def cover(self, q_interval, kv_interval, bounds):
        return cover_before(kv_interval, limits(self.length, bounds))


class Lengths(Mask):
    """The keys of a padded batch, row by row: `kv < kv_lengths`, integers [B]."""

    kv_lengths: int | Array = operand("", "B", dtype="integer", number=True, sign="non-negative")
    uses_q_positions = False

    def mask(self, q_pos, kv_pos, head):
        return kv_pos < self.kv_lengths

    def cover(self, q_interval, kv_interval, bounds):
        return cover_before(kv_interval, limits(self.kv_lengths, bounds))


class Global(Mask):
    """Tokens that see all and that all see: `q in positions or kv in positions` (Longformer).

    Args:
      positions: an integer or a tuple of integers, or an integer array [any number].
    """

    positions: int | tuple[int, ...] | Array

    def __post_init__(self):
        given = self.positions
        if is_array(given):
            valid = given.ndim == 1 and jnp.issubdtype(given.dtype, jnp.integer)
        else:
            given = tuple(given) if isinstance(given, list | tuple) else (given,)
            valid = all(isinstance(p, int | np.integer) and not isinstance(p, bool) for p in given)
            given = tuple(sorted({int(p) for p in given})) if valid else given
        if not valid:
            wanted = "an integer, a tuple of integers or an integer array [any number]"
            raise ValueError(f"Global: positions must be {wanted}, got {described(given)}")
        self.__dict__["positions"] = given

    def mask(self, q_pos, kv_pos, head):
        table = self._table()[None, None, None, None]
        return (q_pos[..., None] == table).any(-1) | (kv_pos[..., None] == table).any(-1)

    def cover(self, q_interval, kv_interval, bounds):
        q_some, q_every = self._cover_axis(*q_interval)
        kv_some, kv_every = self._cover_axis(*kv_interval)
        return three_valued(none=~(q_some | kv_some), every=q_every | kv_every)

    def _table(self) -> Array:
        return self.positions if is_array(self.positions) else np.array(self.positions, np.int32)

    def _cover_axis(self, low: Array, high: Array) -> tuple[Array, Array]:
        """Whether any, and whether every, position from `low` to `high` is global."""
        table = self._table()
        np_ = namespace(table)
        table = np_.sort(table)
        is_first = np_.concatenate([np_.ones_like(table[:1], bool), table[1:] != table[:-1]])
        table, is_first = table[None, None, None, None], is_first[None, None, None, None]
        inside = (low[..., None] <= table) & (table <= high[..., None]) & is_first
        count = inside.sum(-1)
        return count > 0, count == high - low + 1


class Dilated(Mask):
    """Every `stride`-th key, counted from the query: `(q - kv) % stride == 0`.

    Args:
      stride: an integer, or integers [N] (per head).
    """

    stride: int | Array = operand("", "N", dtype="integer", number=True, sign="positive")

    def mask(self, q_pos, kv_pos, head):
        return (q_pos - kv_pos) % self.stride == 0

    def cover(self, q_interval, kv_interval, bounds):
        low, high = differences(q_interval, kv_interval)
        stride, widest = limits(self.stride, bounds)
        known = stride == widest  # an aligned array may vary within a block
        last_multiple = high // stride * stride
        every = (low == last_multiple) & (low == high) | (stride == 1)
        return three_valued(none=(last_multiple < low) & known, every=every & known)


class Segments(Mask):
    """Keys in the query's own segment: `q_ids == kv_ids` (packed documents).

    Padding is a segment like any other: give it an id that no real token has.

    Args:
      q_ids: integers [B, T] or [T].
      kv_ids: integers [B, S] or [S]; None where they are the same as `q_ids`.
    """

    q_ids: Array = operand("T", "BT", dtype="integer")
    kv_ids: Array | None = operand("S", "BS", dtype="integer", optional=True, default=None)
    uses_q_positions = False
    uses_kv_positions = False

    def aligned(self):
        kv_ids = self.kv_ids
        if kv_ids is None:
            kv_ids = self.q_ids.swapaxes(2, 3) if self.q_ids.ndim == 4 else self.q_ids
            return Segments(self.q_ids, kv_ids).aligned()
        return super().aligned()

    def mask(self, q_pos, kv_pos, head):
        return self.q_ids == self.kv_ids

    def cover(self, q_interval, kv_interval, bounds):
        return cover_equal(bounds(self.q_ids), bounds(self.kv_ids))


class Blocks(Mask):
    """A layout of allowed blocks: `layout[q // size, kv // size]`, nothing outside it.

    Args:
      layout: bool [rows, columns], or [N, rows, columns] with one layout per head.
      size: positions along each side of a block.
    """

    layout: Array = operand(tables=("rows columns", "N rows columns"), dtype="bool")
    size: int = operand(dtype="integer", number=True, sign="positive")
    # [1, N, 1, 1]: the heads that a block's cut has, so that `cover` knows them; set by `aligned`.
    heads: Array | None = operand("N", dtype="integer", optional=True, default=None)

    def __post_init__(self):
        super().__post_init__()
        if 0 in self.layout.shape:
            raise ValueError(f"Blocks: layout must not be empty, got {described(self.layout)}")

    def aligned(self):
        if self.heads is None and self.layout.ndim == 3:
            heads = np.arange(self.layout.shape[0], dtype=np.int32)
            return Blocks(self.layout, self.size, heads).aligned()
        return super().aligned()

    def mask(self, q_pos, kv_pos, head):
        np_ = namespace(q_pos, kv_pos, self.layout, self.heads)
        layout, heads = np_.asarray(self.layout), 0 if self.heads is None else self.heads
        layout = layout.reshape(-1, *layout.shape[-2:])
        row, column = q_pos // self.size, kv_pos // self.size
        _, rows, columns = layout.shape
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        return inside & layout[heads, row.clip(0, rows - 1), column.clip(0, columns - 1)]

    def cover(self, q_interval, kv_interval, bounds):
        heads = 0 if self.heads is None else bounds(self.heads)[0]
        np_ = namespace(*q_interval, *kv_interval, self.layout, heads)
        layout = np_.asarray(self.layout)
        layout = layout.reshape(-1, *layout.shape[-2:])
        _, rows, columns = layout.shape
        # sums[i, j] counts what is allowed above row i and left of column j.
        sums = np_.pad(layout.astype(np.int32).cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
        (top, bottom), (left, right) = (
            (low // self.size, high // self.size + 1) for low, high in (q_interval, kv_interval)
        )
        area = (bottom - top) * (right - left)
        top, bottom = top.clip(0, rows), bottom.clip(0, rows)
        left, right = left.clip(0, columns), right.clip(0, columns)
        below = sums[heads, bottom, right] - sums[heads, bottom, left]
        count = below - sums[heads, top, right] + sums[heads, top, left]
        return three_valued(none=count == 0, every=count == area)


class Dense(Mask):
    """An array of what is allowed: bool [T, S], [N, T, S] or [B or 1, N or 1, T, S]."""

    array: Array = operand("TS", "NTS", dtype="bool")
    uses_q_positions = False
    uses_kv_positions = False

    def mask(self, q_pos, kv_pos, head):
        return self.array

    def cover(self, q_interval, kv_interval, bounds):
        low, high = bounds(self.array)
        return three_valued(none=high == 0, every=low != 0)


class FromFunction(Mask):
    """What `from_function` returns."""

    f: Callable[..., Array]
    operands: tuple[Any, ...]
    f_cover: Callable[..., Array] | None = None
    exact: bool = False

    def mask(self, q_pos, kv_pos, head):
        operands = self.operands
        if namespace(q_pos, kv_pos, head) is jnp:
            operands = as_jax(operands)
        allowed = self.f(q_pos, kv_pos, head, *operands)
        allowed = np.asarray(allowed) if isinstance(allowed, bool) else allowed
        aligned = [x for x in jax.tree.leaves(self.operands) if np.ndim(x) == 4]
        block = np.broadcast_shapes(*(np.shape(x) for x in (q_pos, kv_pos, head, *aligned)))
        shape, dtype = np.shape(allowed), getattr(allowed, "dtype", type(allowed).__name__)
        padded = (1,) * (len(block) - len(shape)) + shape
        fits = len(padded) == len(block) and all(
            n in (1, m) for n, m in zip(padded, block, strict=True)
        )
        if dtype != np.bool_ or not fits:
            raise ValueError(
                f"masks.from_function: f must return bool, broadcastable to {list(block)}, "
                f"got {dtype} {list(shape)}"
            )
        return allowed

    def cover(self, q_interval, kv_interval, bounds):
        if self.exact:
            return bounds.evaluate(self)
        if self.f_cover is None:
            return super().cover(q_interval, kv_interval, bounds)
        return self.f_cover(q_interval, kv_interval, bounds, *self.operands)


def from_function(
    f: Callable[..., Array],
    *operands: Any,
    cover: Callable[..., Array] | None = None,
    exact: bool = False,
) -> Mask:
    """A mask from a function of one's own.

    Args:
      f: called as `f(q_pos, kv_pos, head, *operands)` with the shapes of `Mask.mask`; returns bool.
      *operands: arrays of rank 4 are cut to the block, others are passed whole, numbers are static.
      cover: called as `cover(q_interval, kv_interval, bounds, *operands)`, see `Mask.cover`.
        Without it no block is skipped on this mask's account.
      exact: find out what each block holds by calling `f` on all of it while the program is built:
        T x S steps of NumPy, a row of blocks at a time, so `f` must work on NumPy arrays. Has no
        effect where positions or operands are traced.
    """
    if exact and cover is not None:
        raise ValueError("masks.from_function: exact=True finds the cover, so give no cover")
    return FromFunction(f, operands, cover, exact)


def order_of(mask: Mask | None, who: str) -> tuple[bool, int | Array | None]:
    """What a recurrence or a convolution can honour of a mask: the order, and the rows' lengths.

    Args:
      mask: None, `Causal()`, `Lengths(...)`, or these joined by `&`.
      who: who asks, for the message.

    Returns:
      Whether a token sees only itself and earlier ones; and the lengths of the rows, an integer or
      integers [B], or None.

    Raises:
      NotImplementedError: for any other mask.
    """
    if mask is None:
        return False, None
    if isinstance(mask, Causal):
        return True, None
    if isinstance(mask, Lengths):
        lengths = mask.kv_lengths  # [B, 1, 1, 1] once aligned
        return False, lengths.reshape(-1) if is_array(lengths) else lengths
    if isinstance(mask, And):
        (left, some), (right, others) = order_of(mask.left, who), order_of(mask.right, who)
        if some is None or others is None:
            return left or right, others if some is None else some
        return left or right, namespace(some, others).minimum(some, others)
    raise NotImplementedError(
        f"mask: {who} takes tokens in order and honours Causal() and Lengths(...), joined by &; "
        f"got {mask!r}"
    )


def causal_lengths(mask: Mask | None, who: str) -> int | Array | None:
    """The lengths of the rows, for what can only be causal: as `order_of`.

    Raises:
      NotImplementedError: for a mask that is not causal, or that says more.
    """
    causal, lengths = order_of(mask, who)
    if not causal:
        raise NotImplementedError(f"mask: {who} is causal, wanted Causal(), got {mask}")
    return lengths
