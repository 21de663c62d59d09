"""Sparse attention: ops with the masks of the papers built in.

Each class is an op in attention's calling convention, for instance
`nn.MultiHeadAttention(op=Longformer(256))`. The computation is that of `ops.attention`, exact over
what mask and pattern allow, in time and memory linear in the blocks in which they allow anything.
The masks alone are `longformer`, `bigbird`, `strided`, `fixed` and `chunked_local`.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from qkv_jax.ops.attention import attention, attention_weights, blockwise_pays
from qkv_jax.ops.blockwise import Blockwise
from qkv_jax.ops.cache import EMPTY, Cache
from qkv_jax.ops.mask_algebra import NONE, Mask
from qkv_jax.ops.masks import And, Causal, SlidingWindow
from qkv_jax.ops.sparse_masks import (
    bigbird,
    check_integer,
    chunked_local,
    fixed,
    longformer,
    strided,
)

__all__ = [
    "BigBird", "ChunkedLocal", "Fixed", "Local", "Longformer", "SparseOp", "Strided", "bigbird",
    "chunked_local", "fixed", "longformer", "strided",
]  # fmt: skip

Array = jax.Array | np.ndarray

FAR = 2**30  # after every position; differences of positions still fit in int32


class SparseOp:
    """Base of the ops: attention under a mask of its own, joined by `&` with the one that comes.

    A subclass is a frozen dataclass of numbers, so that modules that hold it compare equal.
    """

    @property
    def block(self) -> int | None:
        """How many positions a block of `ops.Blockwise` has: few, so that many are left out.

        Measured on a CPU, and taken there: on an H100 a window of 256 is fastest in the sizes that
        `ops.Blockwise` takes by itself. None: those, on a CPU too.
        """
        return 64

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

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        implementation: str | Blockwise | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """`ops.attention` with the arguments given and both masks."""
        on_cpu = jax.default_backend() == "cpu"
        if (
            implementation is None
            and self.block
            and on_cpu
            and blockwise_pays(q.shape[1], k.shape[1])
        ):
            implementation = Blockwise(self.block, self.block)
        kwargs = self._joined(q, k, **kwargs)
        return attention(q, k, v, implementation=implementation, **kwargs)

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

    @property
    def kept(self) -> tuple[int, int]:
        """First and last tokens that a causal model keeps, the present one among them."""
        return 0, self.window + 1

    def mask(self, length, num_heads, causal=False):
        check_integer("window", self.window, least=0)
        return SlidingWindow(self.window, self.window)


@dataclasses.dataclass(frozen=True)
class ChunkedLocal(SparseOp):
    """Attention within chunks: `chunked_local`."""

    size: int
    lookback: int = 1
    lookahead: int = 0

    @property
    def kept(self) -> tuple[int, int]:
        """The chunk of the present token, and those that it looks back to."""
        return 0, (self.lookback + 1) * self.size

    def mask(self, length, num_heads, causal=False):
        return chunked_local(self.size, self.lookback, self.lookahead)


@dataclasses.dataclass(frozen=True)
class Longformer(SparseOp):
    """Attention under `longformer`; the first `num_global` tokens are global."""

    window: int
    num_global: int = 1
    dilation: int | tuple[int, ...] = 1

    @property
    def kept(self) -> tuple[int, int]:
        """The global tokens, and the last ones."""
        return self.num_global, int(np.max(self.dilation)) * self.window + 1

    def mask(self, length, num_heads, causal=False):
        check_integer("num_global", self.num_global, least=0)
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

    @property
    def block(self):
        return self.block_size * -(-16 // self.block_size)  # no smaller than 16

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

    def extend(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: Cache,
        *,
        positions: Array,
        lengths: Array | None,
        **kwargs: Any,
    ) -> tuple[jax.Array, Cache]:
        """New tokens after those of a cache, which says how many positions there may be."""
        (k, v), kv_positions, cache = cache.attended((k, v), positions, lengths)
        op = self if self.length is not None else dataclasses.replace(self, length=cache.capacity)
        out = op(q, k, v, mask=Causal(), q_positions=positions, kv_positions=kv_positions, **kwargs)
        return out, cache

    def cache_length(self, length):
        return length  # any block may be drawn later


@dataclasses.dataclass(frozen=True)
class Strided(SparseOp):
    """Attention under `strided`."""

    stride: int

    block = None  # the keys are scattered

    def mask(self, length, num_heads, causal=False):
        return strided(self.stride)


@dataclasses.dataclass(frozen=True)
class Fixed(SparseOp):
    """Attention under `fixed`."""

    stride: int
    summary: int = 1

    block = None  # the keys are scattered

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
        if positions is None:
            length = array.shape[1]
        else:  # an empty slot of a cache is nowhere
            length = int(np.max(positions, initial=-1, where=np.asarray(positions) < EMPTY)) + 1
        lengths.append(length)
    return max(1, *lengths)
