"""Sparse attention: the masks of the papers, by their names, and ops with these masks built in.

    longformer      window, dilated per head, and global tokens     Beltagy et al. 2020
    bigbird         window, global and random blocks                Zaheer et al. 2020
    strided         window, and every stride-th key                 Child et al. 2019
    fixed           own chunk, and the last keys of every chunk     Child et al. 2019
    chunked_local   own chunk and its neighbours

Each function returns a mask. It says who is seen on both sides of a query; decoders add
`& Causal()`. Each class is an op in attention's calling convention, for instance
`nn.MultiHeadAttention(op=Longformer(256))`. The computation is that of `ops.attention`: exact over
what the pattern allows, in time and memory linear in the blocks that it does not forbid.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from qkv_jax.ops.attention import attention, attention_weights
from qkv_jax.ops.mask_algebra import NONE, Mask, three_valued
from qkv_jax.ops.masks import And, Blocks, Causal, Dilated, Global, SlidingWindow
from qkv_jax.ops.operands import operand

Array = jax.Array | np.ndarray

FAR = 2**30  # after every position; differences of positions still fit in int32


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
    _check("window", window, least=0)
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
        _check(name, value, least)
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
    _check("stride", stride, least=1)
    return SlidingWindow(stride, stride) | Dilated(stride)


def fixed(stride: int, summary: int = 1) -> Mask:
    """Sparse Transformer, fixed: the query's chunk, and the last `summary` keys of every chunk.

        q // stride == kv // stride or kv % stride >= stride - summary

    Child et al. 2019, arxiv.org/abs/1904.10509; as `strided` in complexity, with c = summary.
    """
    _check("stride", stride, least=1)
    _check("summary", summary, least=1)
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


class SparseOp:
    """Base of the ops: attention under a mask of its own, joined by `&` with the one that comes.

    A subclass is a frozen dataclass of numbers, so that modules that hold it compare equal.
    """

    def mask(self, length: int | None, num_heads: int, causal: bool = False) -> Mask:
        """The op's mask.

        Args:
          length: how many positions there are; None where the positions are traced.
          num_heads: N.
          causal: whether it will be joined with `Causal()`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it allows")

    def __post_init__(self) -> None:
        self.mask(1, 1)  # settings that make no mask fail here

    def __call__(self, q: Array, k: Array, v: Array, **kwargs: Any) -> jax.Array:
        """`ops.attention` with the arguments given and both masks."""
        return attention(q, k, v, **self._joined(q, k, **kwargs))

    def weights(self, q: Array, k: Array, **kwargs: Any) -> jax.Array:
        """`ops.attention_weights` with the arguments given and both masks."""
        return attention_weights(q, k, **self._joined(q, k, **kwargs))

    def _joined(
        self, q: Array, k: Array, mask: Mask | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        positions = kwargs.get("q_positions"), kwargs.get("kv_positions")
        length = _num_positions(*zip((q, k), positions, strict=True))
        own = self.mask(length, q.shape[2], _is_causal(mask))
        if mask is not None:  # what is not a mask, attention refuses
            own = mask & own if isinstance(mask, Mask) else mask
        return kwargs | {"mask": own}

    def cache_length(self, length: int) -> int:
        """How many of `length` past keys some later query of a causal model may still see."""
        past = np.arange(length).reshape(1, 1, 1, length)
        later = tuple(np.full((1, 1, 1, 1), end) for end in (length, FAR))
        cover = self.mask(length, 1).aligned().cover(later, (past, past), lambda x: (x, x))
        return int((cover != NONE).any(axis=(0, 1, 2)).sum())


@dataclasses.dataclass(frozen=True)
class Local(SparseOp):
    """Attention within a sliding window: `|q - kv| <= window`."""

    window: int

    def mask(self, length, num_heads, causal=False):
        _check("window", self.window, least=0)
        return SlidingWindow(self.window, self.window)


@dataclasses.dataclass(frozen=True)
class ChunkedLocal(SparseOp):
    """Attention within chunks: `chunked_local`."""

    size: int
    lookback: int = 1
    lookahead: int = 0

    def mask(self, length, num_heads, causal=False):
        return chunked_local(self.size, self.lookback, self.lookahead)


@dataclasses.dataclass(frozen=True)
class Longformer(SparseOp):
    """Attention under `longformer`; the first `num_global` tokens are global."""

    window: int
    num_global: int = 1
    dilation: int | tuple[int, ...] = 1

    def mask(self, length, num_heads, causal=False):
        _check("num_global", self.num_global, least=0)
        return longformer(self.window, tuple(range(self.num_global)), dilation=self.dilation)


@dataclasses.dataclass(frozen=True)
class BigBird(SparseOp):
    """Attention under `bigbird`; under a mask with `& Causal()` it draws from the past.

    Args:
      per_head: whether each head draws blocks of its own.
      length: how many positions there are; None: as many as a call has, which it shows unless its
        positions are traced.
      The others: as in `bigbird`.
    """

    block_size: int
    window_blocks: int = 3
    num_global_blocks: int = 1
    num_random_blocks: int = 3
    seed: int = 0
    per_head: bool = False
    length: int | None = None

    def mask(self, length, num_heads, causal=False):
        if length is None and self.length is None:
            raise ValueError("length: wanted BigBird(length=...), for the positions are traced")
        if None not in (length, self.length) and length > self.length:
            raise ValueError(f"length: wanted at least {length} for this call, got {self.length}")
        return bigbird(
            length if self.length is None else self.length, block_size=self.block_size,
            window_blocks=self.window_blocks, num_global_blocks=self.num_global_blocks,
            num_random_blocks=self.num_random_blocks, seed=self.seed, causal=causal,
            num_heads=num_heads if self.per_head else None,
        )  # fmt: skip

    def cache_length(self, length):
        return length  # any block may be drawn later


@dataclasses.dataclass(frozen=True)
class Strided(SparseOp):
    """Attention under `strided`."""

    stride: int

    def mask(self, length, num_heads, causal=False):
        return strided(self.stride)


@dataclasses.dataclass(frozen=True)
class Fixed(SparseOp):
    """Attention under `fixed`."""

    stride: int
    summary: int = 1

    def mask(self, length, num_heads, causal=False):
        return fixed(self.stride, self.summary)


def _is_causal(mask: Mask | None) -> bool:
    if isinstance(mask, And):
        return _is_causal(mask.left) or _is_causal(mask.right)
    return isinstance(mask, Causal)


def _num_positions(*axes: tuple[Array, Array | None]) -> int | None:
    """One more than the largest position of any axis; None where one of them is traced."""
    lengths = []
    for array, positions in axes:
        if isinstance(positions, jax.core.Tracer):
            return None
        length = array.shape[1] if positions is None else int(np.max(positions, initial=-1)) + 1
        lengths.append(length)
    return max(1, *lengths)


def _check(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: wanted an integer of at least {least}, got {value!r}")
