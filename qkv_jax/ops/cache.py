"""What a decoder keeps of the tokens that it has read: caches of keys and values, as pytrees.

Positions, not places in an array, say who sees whom: a cache knows the position of each of its
slots, an empty slot is at `EMPTY`, after every query, and so the masks that serve training serve
decoding too, `attention(q, *cache.arrays, mask=Causal(), q_positions=..., kv_positions=...)`.

    Cache             a slot for each position, or for the last ones and a few first ones
    QuantizedCache    the same in int8, with a scale for each token and head
    PagedCache        slots on pages that rows of different lengths take from one pool: `ops.paged`

All have one interface: `append`, `attended`, `read`, `positions`, `capacity`, `nbytes`.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray

EMPTY = 2**30  # differences of positions still fit in int32


class CacheKind(Protocol):
    """What makes caches: `Cache`, `QuantizedCache`, or `paged.Pages` of a size."""

    def empty(
        self,
        batch: int,
        capacity: int,
        *shapes: Sequence[int],
        rolling: bool = False,
        num_sinks: int = 0,
        dtype: str = "float32",
    ) -> "Cache":
        """A cache of nothing; arguments as of `Cache.empty`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Arrays with a slot per token; made by `Cache.empty`.

    Args:
      stored: arrays [B, ..., S, H], what `read` is made of: the axes before the last, such as the
        heads, come first, because products with one query's vectors read them so without a copy.
      positions: of the tokens in the slots, int32 [B, S]; EMPTY where there is none.
      rolling: whether the last tokens take the slots of the oldest.
      num_sinks: of a rolling cache: how many first tokens keep their slots.
      dtype: of what `read` returns.
    """

    stored: tuple[jax.Array, ...]
    positions: jax.Array
    rolling: bool = dataclasses.field(default=False, metadata={"static": True})
    num_sinks: int = dataclasses.field(default=0, metadata={"static": True})
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    @classmethod
    def empty(
        cls,
        batch: int,
        capacity: int,
        *shapes: Sequence[int],
        rolling: bool = False,
        num_sinks: int = 0,
        dtype: str = "float32",
    ) -> "Cache":
        """A cache of nothing.

        Args:
          batch: B.
          capacity: S. A full cache holds the positions 0 ... S-1; a rolling one the first
            `num_sinks` and the last S - num_sinks.
          shapes: of what one token leaves, for instance (K, H) and (K, h).
          rolling, num_sinks, dtype: as in the class.

        Raises:
          ValueError: for a capacity that holds nothing.
        """
        if capacity <= num_sinks:
            raise ValueError(
                f"capacity: wanted more than num_sinks = {num_sinks} slots, got {capacity}"
            )
        of_tokens = [jax.ShapeDtypeStruct((batch, capacity, *shape), dtype) for shape in shapes]
        stored = jax.eval_shape(lambda *arrays: cls.encode(_slots_last(arrays)), *of_tokens)
        stored = tuple(jnp.zeros(x.shape, x.dtype) for x in stored)
        positions = jnp.full((batch, capacity), EMPTY, jnp.int32)
        return cls(stored, positions, rolling, num_sinks, jnp.dtype(dtype).name)

    @property
    def capacity(self) -> int:
        """S."""
        return self.positions.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that what is stored takes, positions not counted."""
        return sum(x.size * x.dtype.itemsize for x in self.stored)

    def read(self) -> tuple[jax.Array, ...]:
        """The arrays [B, S, ...], as attention takes them beside `positions`."""
        return tuple(jnp.moveaxis(x, -2, 1) for x in self.decode(self.stored))

    def append(
        self, arrays: Sequence[jax.Array], positions: jax.Array, lengths: jax.Array | None = None
    ) -> "Cache":
        """The cache with more tokens. Positions beyond a full cache are lost: check them before.

        Args:
          arrays: what the tokens leave, each [B, T, ...].
          positions: integers that follow one another, [T], or [B, T] where rows differ.
          lengths: how many of the T tokens of each row are no padding, which is not kept, integers
            [B]; None: all.
        """
        B, T = arrays[0].shape[:2]
        stored = self.encode(_slots_last(x.astype(self.dtype) for x in arrays))
        at = jnp.broadcast_to(positions, (B, T)).astype(jnp.int32)
        if positions.ndim == 1 and T == 1 and lengths is None:
            # A slice in place, where a scatter would go row by row; a place beyond is none.
            slot = self.slots(positions)[0]
            fits = slot < self.capacity

            def put(x: jax.Array, new: jax.Array) -> jax.Array:
                old = jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=-2)
                new = jnp.where(fits, new.astype(x.dtype), old)
                return jax.lax.dynamic_update_slice_in_dim(x, new, slot, axis=-2)
        else:
            slots = self._slots_of_kept(at, lengths)
            rows = jnp.arange(B)[:, None]

            def put(x: jax.Array, new: jax.Array) -> jax.Array:
                x, new = jnp.moveaxis(x, -2, 1), jnp.moveaxis(new, -2, 1).astype(x.dtype)
                return jnp.moveaxis(x.at[rows, slots].set(new, mode="drop"), 1, -2)

        stored = tuple(put(x, new) for x, new in zip(self.stored, stored, strict=True))
        after = put(self.positions[..., None], at[..., None])[..., 0]
        return dataclasses.replace(self, stored=stored, positions=after)

    def attended(
        self, arrays: Sequence[jax.Array], positions: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, ...], jax.Array, "Cache"]:
        """What the new tokens may attend to, themselves included, and the cache after them.

        Arguments as in `append`.

        Returns:
          arrays [B, S', ...], their positions int32 [B, S'], and the cache.
        """
        after = self.append(arrays, positions, lengths)
        if not self.rolling or arrays[0].shape[1] == 1:
            return after.read(), after.positions, after
        # The last of many tokens have taken the slots of keys that the first of them still see.
        B, T = arrays[0].shape[:2]
        both = zip(self.read(), self._rounded(arrays), strict=True)
        joined = tuple(jnp.concatenate(pair, axis=1) for pair in both)
        at = jnp.broadcast_to(positions, (B, T)).astype(jnp.int32)
        return joined, jnp.concatenate([self.positions, at], axis=1), after

    def slots(self, positions: jax.Array) -> jax.Array:
        """Where tokens are kept, by their positions."""
        if not self.rolling:
            return positions
        first, rest = self.num_sinks, self.capacity - self.num_sinks
        return jnp.where(positions < first, positions, first + (positions - first) % rest)

    def _slots_of_kept(self, positions: jax.Array, lengths: jax.Array | None) -> jax.Array:
        """Slots [B, T]; `capacity`, which is none, for padding and what is rolled over at once."""
        T = positions.shape[1]
        kept = jnp.ones(positions.shape, bool)
        last = positions[:, -1:]
        if lengths is not None:
            kept = jnp.arange(T) < jnp.reshape(lengths, (-1, 1))
            last = positions[:, :1] + jnp.reshape(lengths, (-1, 1)) - 1
        if self.rolling:
            recent = positions > last - (self.capacity - self.num_sinks)
            kept &= recent | (positions < self.num_sinks)
        return jnp.where(kept, self.slots(positions), self.capacity)

    def _rounded(self, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """New arrays as the cache would give them back."""
        kept = self.decode(self.encode(_slots_last(x.astype(self.dtype) for x in arrays)))
        return tuple(jnp.moveaxis(x, -2, 1) for x in kept)

    @staticmethod
    def encode(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """What is stored of arrays."""
        return arrays

    def decode(self, stored: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The arrays of what is stored."""
        return stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedCache(Cache):
    """A cache in int8: each vector of a token and head as integers times a scale of its own.

        scale = max |x| / 127,   x ~ scale * round(x / scale)         an error of at most scale / 2

    About a quarter of float32's bytes. Liu et al. 2024, KIVI, arxiv.org/abs/2402.02750, has the
    keys' scales by channel, which fewer bits need.
    """

    @staticmethod
    def encode(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        stored: list[jax.Array] = []
        for x in arrays:
            x = x.astype(jnp.float32)
            scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0) / 127
            integers = jnp.round(x / jnp.where(scale > 0, scale, 1))
            stored += [integers.astype(jnp.int8), scale]
        return tuple(stored)

    def decode(self, stored: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        pairs = zip(stored[::2], stored[1::2], strict=True)
        return tuple((x.astype(jnp.float32) * scale).astype(self.dtype) for x, scale in pairs)


def _slots_last(arrays: Iterable[jax.Array]) -> tuple[jax.Array, ...]:
    """[B, S, ..., H] as [B, ..., S, H]."""
    return tuple(jnp.moveaxis(x, 1, -2) for x in arrays)


def among_all(x: jax.Array, positions: jax.Array, length: int) -> jax.Array:
    """`x` [B, T, ...] at its positions, [T] or [B, T], among zeros: [B, length, ...].

    For ops that want all queries of a sequence.
    """
    rows = jnp.arange(x.shape[0])[:, None]
    whole = jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype)
    return whole.at[rows, jnp.atleast_2d(positions)].set(x, mode="drop")


def of_these(x: jax.Array, positions: jax.Array) -> jax.Array:
    """The inverse of `among_all`: [B, T, ...] of [B, length, ...]."""
    return x[jnp.arange(x.shape[0])[:, None], jnp.atleast_2d(positions)]
