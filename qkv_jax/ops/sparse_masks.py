"""Sparse attention's masks, by the names of the papers: who is seen on both sides of a query.

    longformer      window, dilated per head, and global tokens     Beltagy et al. 2020
    bigbird         window, global and random blocks                Zaheer et al. 2020
    strided         window, and every stride-th key                 Child et al. 2019
    fixed           own chunk, and the last keys of every chunk     Child et al. 2019
    chunked_local   own chunk and its neighbours

Decoders add `& Causal()`.
"""

from typing import Any

import jax
import numpy as np

from qkv_jax.ops.mask_algebra import Mask, three_valued
from qkv_jax.ops.masks import Blocks, Dilated, Global, SlidingWindow
from qkv_jax.ops.operands import operand

Array = jax.Array | np.ndarray


def longformer(
    window: int,
    global_positions: int | tuple[int, ...] | Array = (),
    *,
    dilation: int | tuple[int, ...] | Array = 1,
) -> Mask:
    """Longformer: a window, dilated per head, and tokens that see all and that all see.

        |q - kv| <= window * dilation and (q - kv) % dilation == 0
        or q in global_positions or kv in global_positions

    Beltagy et al. 2020, arxiv.org/abs/2004.05150. O(T (window * dilation + globals)).

    Args:
      window: how many keys on each side of a query, half the paper's w.
      global_positions: as `masks.Global` takes them.
      dilation: how far apart the keys of the window are: an integer, or one for each head.
    """
    check_integer("window", window, least=0)
    stride = dilation if isinstance(dilation, int) else np.asarray(dilation)
    dilated = Dilated(stride)
    return SlidingWindow(window * stride, window * stride) & dilated | Global(global_positions)


def bigbird(
    length: int,
    *,
    block_size: int,
    window_blocks: int = 3,
    num_global_blocks: int = 1,
    num_random_blocks: int = 3,
    seed: int = 0,
    num_heads: int | None = None,
    causal: bool = False,
) -> Mask:
    """BigBird: blocks near the diagonal, the first blocks, and blocks drawn at random.

    With i and j the blocks of a query and of a key, allowed is

        |i - j| <= window_blocks // 2 or i < num_global_blocks or j < num_global_blocks
        or j in random(i): num_random_blocks that none of these allows, or all if there are fewer

    Zaheer et al. 2020, arxiv.org/abs/2007.14062, in its ITC form; their code makes the first and
    the last block global, which no causal model could use. O(T (window + globals + randoms)).

    Args:
      length: how many positions there are; none beyond is allowed.
      block_size: positions in a block.
      window_blocks: odd; the query's own block is in the middle.
      num_global_blocks: how many blocks see all and are seen by all.
      num_random_blocks: how many blocks each block of queries draws.
      seed: the draw depends on it, the head and the block of queries alone (and on `length`, where
        blocks may be drawn from the whole of it).
      num_heads: N, for a draw per head; None: one draw for all heads.
      causal: whether to draw from the past alone, for use with `& Causal()`: blocks of the future
        would be drawn in vain. The draw for a shorter length is then a part of that for a longer.
    """
    for name, value, least in (
        ("length", length, 1), ("block_size", block_size, 1), ("window_blocks", window_blocks, 1),
        ("num_global_blocks", num_global_blocks, 0), ("num_random_blocks", num_random_blocks, 0),
        ("seed", seed, 0), ("num_heads", 1 if num_heads is None else num_heads, 1),
    ):  # fmt: skip
        check_integer(name, value, least)
    if window_blocks % 2 == 0:
        raise ValueError(f"window_blocks: wanted an odd number, got {window_blocks}")
    blocks = np.arange(-(-length // block_size))
    row, column = blocks[:, None], blocks
    near = abs(row - column) <= window_blocks // 2
    certain = near | (row < num_global_blocks) | (column < num_global_blocks)
    layout = np.repeat(certain[None], num_heads or 1, axis=0)
    open_to_draw = ~certain & (column < row) if causal else ~certain
    for head in range(len(layout)):
        for i in blocks:
            # A stream that NumPy never changes: a trained model depends on the draw.
            random = np.random.RandomState([seed, head, i])
            drawn = random.permutation(np.flatnonzero(open_to_draw[i]))[:num_random_blocks]
            layout[head, i, drawn] = True
    return Blocks(layout[0] if num_heads is None else layout, block_size)


def strided(stride: int) -> Mask:
    """Sparse Transformer, strided: a window, and every stride-th key (images, music).

        |q - kv| <= stride or (q - kv) % stride == 0

    Child et al. 2019, arxiv.org/abs/1904.10509: the union of their two patterns, one head with
    both. Of T keys a query sees O(stride + T / stride), O(T sqrt(T)) in all for stride = sqrt(T).
    They are scattered over all blocks, so that a computation by blocks skips none of them.
    """
    check_integer("stride", stride, least=1)
    return SlidingWindow(stride, stride) | Dilated(stride)


def fixed(stride: int, summary: int = 1) -> Mask:
    """Sparse Transformer, fixed: the query's chunk, and the last `summary` keys of every chunk.

        q // stride == kv // stride or kv % stride >= stride - summary

    Child et al. 2019, arxiv.org/abs/1904.10509; as `strided` in complexity, with c = summary.
    """
    check_integer("stride", stride, least=1)
    check_integer("summary", summary, least=1)
    if summary > stride:
        raise ValueError(f"summary: wanted at most stride = {stride}, got {summary}")
    return chunked_local(stride, lookback=0) | ChunkEnds(stride, summary)


def chunked_local(size: int, lookback: int = 1, lookahead: int = 0) -> Mask:
    """The query's chunk of `size` positions, and its neighbours before and after.

        -lookback <= kv // size - q // size <= lookahead

    O(T size (1 + lookback + lookahead)). Without neighbours it is `masks.Chunked`.
    """
    return Coarse(SlidingWindow(lookback, lookahead), size)


class Coarse(Mask):
    """A mask over chunks of positions: `inner` of `q // size` and `kv // size`."""

    inner: Mask
    size: int = operand(dtype="integer", number=True, sign="positive")

    def mask(self, q_pos, kv_pos, head):
        return self.inner.mask(q_pos // self.size, kv_pos // self.size, head)

    def cover(self, q_interval, kv_interval, bounds):
        q_chunks, kv_chunks = (
            tuple(end // self.size for end in interval) for interval in (q_interval, kv_interval)
        )
        return self.inner.cover(q_chunks, kv_chunks, bounds)


class ChunkEnds(Mask):
    """The last `count` keys of every chunk: `kv % size >= size - count`."""

    size: int = operand(dtype="integer", number=True, sign="positive")
    count: int = operand(dtype="integer", number=True, sign="positive")
    uses_q_positions = False

    def mask(self, q_pos, kv_pos, head):
        return kv_pos % self.size >= self.size - self.count

    def cover(self, q_interval, kv_interval, bounds):
        low, high = kv_interval

        def allowed_before(end):  # positions 0 ... end-1
            rest = end % self.size - (self.size - self.count)
            return end // self.size * self.count + rest.clip(0)

        allowed = allowed_before(high + 1) - allowed_before(low)
        return three_valued(none=allowed == 0, every=allowed == high + 1 - low)


def check_integer(name: str, value: Any, least: int) -> None:
    """Raises a ValueError that names the argument, unless it is an integer of at least `least`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: wanted an integer of at least {least}, got {value!r}")
