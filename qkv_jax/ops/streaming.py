"""Attention to the first tokens and to a window, with positions as in a cache that holds no more.

A model that streams keeps the keys of a window. Models put weight that they need nowhere onto the
first tokens, the "attention sinks"; once those are evicted, the softmax has lost a large part of
its denominator, and the model fails. Keeping a few of them is enough.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import positions
from qkv_jax.ops.attention import attention_with_stats
from qkv_jax.ops.masks import Mask, Prefix, SlidingWindow
from qkv_jax.ops.sparse_masks import check_integer
from qkv_jax.ops.stats import merge

Array = jax.Array | np.ndarray


def streaming_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    window: int,
    num_sinks: int = 4,
    rotary_base: float | None = None,
    mask: Mask | None = None,
    q_positions: Array | None = None,
    sinks: Array | None = None,
    **kwargs: Any,
) -> jax.Array:
    """Causal attention to the first tokens and to a window (Xiao et al. 2024, StreamingLLM).

        keys of query t: s < num_sinks, and t - window <= s <= t
        position of t, as the first tokens see it: at most num_sinks + window

    A cache never holds more than `num_sinks + window + 1` keys, and positions count within it: the
    first tokens stay as near as they were when the cache was full for the first time. Time and
    memory O(T (window + num_sinks)). arxiv.org/abs/2309.17453

    The arguments that are not listed, and the errors, are those of `ops.attention`.

    Args:
      q, k, v: as in `ops.attention`; rotated, where the model rotates.
      window: how far back a query sees.
      num_sinks: how many first tokens it sees from anywhere; 0: none.
      rotary_base: of the rotation of q and k; None: they are not rotated, and nothing is corrected.
      mask: joined by `&` with what is allowed here.
      sinks: cannot be honoured.

    Returns:
      [B, T, N, h], in the dtype of `v`.

    Raises:
      NotImplementedError: for `sinks`.
    """
    check_integer("window", window, least=0)
    check_integer("num_sinks", num_sinks, least=0)
    if sinks is not None:
        raise NotImplementedError("sinks: the first tokens are the sinks of this op")
    near = SlidingWindow(window, 0) & ~Prefix(num_sinks)
    first = SlidingWindow(None, 0) & Prefix(num_sinks)
    if isinstance(mask, Mask):
        near, first = mask & near, mask & first
    elif mask is not None:
        near = first = mask  # attention refuses it
    rotated = q
    if rotary_base is not None:
        at = jnp.arange(q.shape[1]) if q_positions is None else jnp.asarray(q_positions)
        too_far = jnp.maximum(at - (num_sinks + window), 0)
        rotated = positions.rotary(q, -too_far, base=rotary_base)
    kwargs["q_positions"] = q_positions
    out, _ = merge(
        *attention_with_stats(rotated, k, v, mask=first, **kwargs),
        *attention_with_stats(q, k, v, mask=near, **kwargs),
    )
    return out.astype(v.dtype)


@dataclasses.dataclass(frozen=True)
class Streaming:
    """`streaming_attention` as the op of a module."""

    window: int
    num_sinks: int = 4
    rotary_base: float | None = None

    def __call__(self, q: Array, k: Array, v: Array, **kwargs: Any) -> jax.Array:
        return streaming_attention(q, k, v, **dataclasses.asdict(self), **kwargs)

    @property
    def kept(self) -> tuple[int, int]:
        """The first tokens, and the last ones."""
        return self.num_sinks, self.window + 1

    def cache_length(self, length: int) -> int:
        """How many of `length` past keys a later query may still see."""
        return min(length, self.num_sinks + self.window)
