"""Which blocks of the T x S plane an attention computes, and in what order.

The plane is cut into blocks of `block_q` queries by `block_kv` keys. A mask's `cover` says of each
block whether nothing, something or everything in it is allowed. For every block of queries a plan
lists the blocks of keys that are not NONE: first those that need the mask's predicate (SOME), then
those that do not (ALL). The same lines build it in NumPy, where positions and masks are known while
tracing, and in jax.numpy, where they are traced.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops.mask_algebra import ALL, NONE, SOME, Mask, namespace

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Grid:
    """The static half of a plan: sizes, block sizes, and what one step of the loop takes.

    `rows` batch rows and `heads` query heads are computed together: all of them, or one.
    """

    B: int
    T: int
    S: int
    N: int
    K: int
    block_q: int
    block_kv: int
    rows: int
    heads: int
    partial: bool = True  # whether there can be blocks that need the predicate
    full: bool = True  # whether there can be blocks that do not

    @property
    def q_blocks(self) -> int:
        return -(-self.T // self.block_q)

    @property
    def kv_blocks(self) -> int:
        return -(-self.S // self.block_kv)

    @property
    def ragged(self) -> bool:
        """Whether the last blocks stick out of the plane."""
        return bool(self.T % self.block_q or self.S % self.block_kv)

    @property
    def cuts(self) -> dict[str, tuple[int, int]]:
        """By axis: the padded length, and how much of it one block takes.

        `t` and `s` count blocks of queries and of keys.
        """
        kv_heads = self.K if self.heads == self.N else 1
        return {
            "B": (self.B, self.rows),
            "N": (self.N, self.heads),
            "K": (self.K, kv_heads),
            "T": (self.q_blocks * self.block_q, self.block_q),
            "S": (self.kv_blocks * self.block_kv, self.block_kv),
            "t": (self.q_blocks, 1),
            "s": (self.kv_blocks, 1),
        }


def block_sizes(
    T: int, S: int, G: int, blocks: tuple[int | None, int | None], platform: str
) -> tuple[int, int]:
    """Queries and keys per block: what was asked for, or what was measured to be fast.

    The heads that share a key head are rows of one matrix, so that more of them mean fewer queries.
    """
    most = (512, 256) if platform == "cpu" else (1024, 1024)  # on an H100: 10 times (128, 128)
    return (
        blocks[0] or _even(T, max(64, most[0] // G), 8),
        blocks[1] or _even(S, most[1], 16),
    )


def _even(length: int, most: int, multiple: int) -> int:
    """The block size that cuts `length` most evenly into blocks of at most `most`."""
    size = math.ceil(length / math.ceil(length / most))
    return max(multiple, -(-size // multiple) * multiple)


def coverage(mask: Mask | None, q_pos: Array, kv_pos: Array, head: Array, grid: Grid) -> Array:
    """NONE, SOME or ALL for each block: int8 [B or 1, N or 1, q blocks, kv blocks].

    Args:
      mask: an aligned mask, or None.
      q_pos, kv_pos, head: as `Mask.mask` takes them.
      grid: the block sizes.

    Returns:
      NumPy if mask and positions are known while tracing.
    """
    q_blocks, kv_blocks = grid.q_blocks, grid.kv_blocks
    shape = (1, 1, q_blocks, kv_blocks)
    if mask is None:
        cover = np.full(shape, ALL, np.int8)
    else:
        arrays = (q_pos, kv_pos, mask)
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arrays))
        np_ = jnp if traced else np
        q_pos, kv_pos, mask = jax.tree.map(np_.asarray, arrays)
        look = BlockBounds(grid, q_pos, kv_pos, head)
        cover = mask.cover(look(q_pos), look(kv_pos), look)
        cover = np_.broadcast_to(np_.asarray(cover, np.int8), (*cover.shape[:2], *shape[2:]))
    if grid.ragged:  # what sticks out is cut off by the predicate
        whole_q = (np.arange(q_blocks) + 1) * grid.block_q <= grid.T
        whole_kv = (np.arange(kv_blocks) + 1) * grid.block_kv <= grid.S
        whole = whole_q[:, None] & whole_kv
        np_ = namespace(cover)
        cover = np_.where(whole, cover, np_.minimum(cover, np.int8(SOME)))
    return cover


@dataclasses.dataclass(frozen=True)
class BlockBounds:
    """What a mask's `cover` may ask: an operand's bounds in each block, and the exact cover."""

    grid: Grid
    q_pos: Array
    kv_pos: Array
    head: Array

    def __call__(self, operand: Array) -> tuple[Array, Array]:
        """The smallest and largest value of an aligned operand in each block."""
        blocked = _blocked(operand, self.grid)
        return blocked.min((3, 5)), blocked.max((3, 5))

    def evaluate(self, mask: Mask) -> np.ndarray:
        """The exact cover of a mask, from its value at every element, a row of blocks at a time.

        SOME where positions, heads or operands are traced: that would cost T x S each time.
        """
        grid = self.grid
        if namespace(self.q_pos, self.kv_pos, self.head, *jax.tree.leaves(mask)) is jnp:
            return np.full((1, 1, 1, 1), SOME, np.int8)
        rows = []
        for start in range(0, grid.T, grid.block_q):
            queries = slice(start, start + grid.block_q)
            q_pos, part = jax.tree.map(
                lambda x, queries=queries: x[:, :, queries] if np.shape(x)[2:3] > (1,) else x,
                (self.q_pos, mask),
            )
            allowed = np.asarray(part.mask(q_pos, self.kv_pos, self.head))
            blocked = _blocked(allowed, grid)
            low, high = blocked.min((2, 3, 5)), blocked.max((2, 3, 5))
            rows.append(np.broadcast_to(low + high, (*low.shape[:2], grid.kv_blocks)))
        return np.stack(rows, axis=2)


def _blocked(x: Array, grid: Grid) -> Array:
    """An aligned array as [B, N, q blocks, block_q, kv blocks, block_kv], edges repeated."""
    np_ = namespace(x)
    x = x.astype(np.int8) if x.dtype == np.bool_ else x
    pads, shape = [(0, 0), (0, 0)], list(x.shape[:2])
    for axis, size in ((2, grid.block_q), (3, grid.block_kv)):
        length = x.shape[axis]
        blocks = -(-length // size)
        pads.append((0, blocks * size - length if length > 1 else 0))
        shape += [blocks, size] if length > 1 else [1, 1]
    return np_.pad(x, pads, mode="edge").reshape(shape)


def schedule(cover: Array, grid: Grid) -> tuple[Grid, Array, Array]:
    """The plan: the grid with what is known of it, and per block of queries what to compute.

    Returns:
      The grid; the blocks of keys in order, int32 [B or 1, N or 1, q blocks, kv blocks]; and how
      many of them need the predicate and how many there are, int32 [B or 1, N or 1, q blocks, 2].
    """
    np_ = namespace(cover)
    if np_ is np:
        cover = _collapsed(cover)
        grid = dataclasses.replace(
            grid, partial=bool((cover == SOME).any()), full=bool((cover == ALL).any())
        )
    if cover.shape[1] > 1:
        grid = dataclasses.replace(grid, heads=1)
    if cover.shape[0] > 1:
        grid = dataclasses.replace(grid, rows=1)
    rank = np_.where(cover == SOME, 0, np_.where(cover == ALL, 1, 2))
    order = np_.argsort(rank, axis=-1, stable=True)
    counts = np_.stack([(cover == SOME).sum(-1), (cover != NONE).sum(-1)], axis=-1)
    return grid, order.astype(np.int32), counts.astype(np.int32)


def _collapsed(cover: np.ndarray) -> np.ndarray:
    """Without the axes of batch rows and heads where all of them agree."""
    for axis in (0, 1):
        first = cover.take([0], axis)
        if cover.shape[axis] > 1 and (cover == first).all():
            cover = first
    return cover
