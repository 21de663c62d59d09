"""A cache in pages: sequences of different lengths take what they need from one pool.

A cache that has a slot for each position of each row is as large as if all rows were as long as the
longest may be. Here a row takes a page of slots when it has a token for it, so that a pool is as
large as what its rows hold together, and less than a page more for each.

Kwon et al. 2023, PagedAttention, arxiv.org/abs/2309.06180.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qkv_jax.ops.arguments import check_positive
from qkv_jax.ops.cache import EMPTY, Cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache(Cache):
    """A cache whose slots lie on pages; made by `Pages`.

    Row b's slot s is slot s % page_size of page table[b, s // page_size]. A page is free if it is
    nowhere in the table. `read` copies the pages of each row to where a `Cache` has its slots,
    which a kernel that follows the table would spare.

    Before each `append` see on the host that `free_pages >= pages_needed(positions, lengths)`: no
    compiled program can raise, and of a pool that is exhausted the tokens without a page are lost.
    They overwrite nothing.

    Args:
      stored: arrays [num_pages, page_size, ...].
      positions: as of a `Cache`, int32 [B, S], S a multiple of page_size.
      table: the pages of each row, int32 [B, S / page_size]; num_pages where it has none.
    """

    table: jax.Array = dataclasses.field(kw_only=True)

    @property
    def num_pages(self) -> int:
        """Of the pool."""
        return self.stored[0].shape[0]

    @property
    def page_size(self) -> int:
        """Slots on a page."""
        return self.stored[0].shape[1]

    @property
    def free_pages(self) -> jax.Array:
        """How many pages no row has, int32."""
        return self.num_pages - jnp.sum(self.table < self.num_pages)

    def pages_needed(self, positions: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """How many pages `append` would take of the free ones, int32; arguments as there."""
        at = jnp.broadcast_to(positions, (len(self.table), jnp.shape(positions)[-1]))
        return jnp.sum(self._missing(self._slots_of_kept(at, lengths)))

    def read(self) -> tuple[jax.Array, ...]:
        """The arrays [B, S, ...], as attention takes them beside `positions`."""

        def of_rows(pool: jax.Array) -> jax.Array:
            pages = pool.at[self.table].get(mode="fill", fill_value=0)
            return pages.reshape(*self.positions.shape, *pool.shape[2:])

        return tuple(of_rows(pool) for pool in self.stored)

    def append(
        self, arrays: Sequence[jax.Array], positions: jax.Array, lengths: jax.Array | None = None
    ) -> "PagedCache":
        """The cache with more tokens, as `Cache.append`; rows take the free pages they need."""
        at = jnp.broadcast_to(positions, arrays[0].shape[:2]).astype(jnp.int32)
        slots = self._slots_of_kept(at, lengths)
        table = self._with_pages(slots)
        page, place = slots // self.page_size, slots % self.page_size
        rows = jnp.arange(len(at))[:, None]
        pages = table.at[rows, page].get(mode="fill", fill_value=self.num_pages)
        stored = tuple(
            pool.at[pages, place].set(new.astype(pool.dtype), mode="drop")
            for pool, new in zip(self.stored, arrays, strict=True)
        )
        slots = jnp.where(pages < self.num_pages, slots, self.capacity)
        after = self.positions.at[rows, slots].set(at, mode="drop")
        return dataclasses.replace(self, stored=stored, positions=after, table=table)

    def release(self, rows: jax.Array) -> "PagedCache":
        """The cache without these rows' tokens, whose pages are free.

        Args:
          rows: which, bool [B].
        """
        rows = jnp.reshape(rows, (-1, 1))
        positions = jnp.where(rows, EMPTY, self.positions)
        table = jnp.where(rows, self.num_pages, self.table)
        return dataclasses.replace(self, positions=positions, table=table)

    def _missing(self, slots: jax.Array) -> jax.Array:
        """Whether a row needs a page for these slots [B, T] and has none, [B, S / page_size]."""
        rows = jnp.arange(len(slots))[:, None]
        needed = jnp.zeros(self.table.shape, bool)
        needed = needed.at[rows, slots // self.page_size].set(True, mode="drop")
        return needed & (self.table == self.num_pages)

    def _with_pages(self, slots: jax.Array) -> jax.Array:
        """The table in which rows have pages for these slots, as long as there are free ones."""
        P = self.num_pages
        missing = self._missing(slots)
        taken = jnp.zeros(P, bool).at[self.table].set(True, mode="drop")
        free = jnp.flatnonzero(~taken, size=P, fill_value=P)
        turn = jnp.cumsum(missing).reshape(missing.shape) - 1
        given = free.at[turn].get(mode="fill", fill_value=P)
        return jnp.where(missing, given, self.table).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Pages:
    """The pool of a paged cache, as `init_cache` takes it.

        cache = model.init_cache(batch, length, kind=Pages(num_pages=256, page_size=16))

    Every layer has such a pool, and a table of its own.

    Args:
      num_pages: of the pool.
      page_size: slots on a page.
    """

    num_pages: int
    page_size: int = 16

    def empty(
        self,
        batch: int,
        capacity: int,
        *shapes: Sequence[int],
        rolling: bool = False,
        num_sinks: int = 0,
        dtype: str = "float32",
    ) -> Cache:
        """A cache of nothing, as `Cache.empty`.

        A capacity counts whole pages. A rolling cache, which does not grow, is a plain `Cache`.

        Raises:
          ValueError: for no pages, no slots on them, or a capacity that holds nothing.
        """
        check_positive(num_pages=self.num_pages, page_size=self.page_size)
        if rolling:
            return Cache.empty(
                batch, capacity, *shapes, rolling=True, num_sinks=num_sinks, dtype=dtype
            )
        pages = -(-capacity // self.page_size)
        pool = Cache.empty(self.num_pages, self.page_size, *shapes, dtype=dtype)
        rows = Cache.empty(batch, pages * self.page_size)
        table = jnp.full((batch, pages), self.num_pages, jnp.int32)
        return PagedCache(pool.read(), rows.positions, dtype=pool.dtype, table=table)
