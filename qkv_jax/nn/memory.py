"""Multi-head attention to a window, and to what it retrieves from all that is older."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from qkv_jax.nn.attention import MultiHeadAttention
from qkv_jax.ops.masks import Mask, SlidingWindow
from qkv_jax.ops.memory import memory_attention, retrieve
from qkv_jax.ops.scores import Score
from qkv_jax.ops.sparse import Local

BEFORE_ALL = -(2**30)  # the position of an external memory's keys


class MemoryAttention(MultiHeadAttention):
    """Multi-head attention with a memory (Memorizing Transformers, Wu et al. 2022).

        out = g * retrieved + (1 - g) * local,        g = sigmoid(gate[n])

    arxiv.org/abs/2203.08913. `local` is attention to the keys within `window` of the query.
    `retrieved` is `ops.memory.memory_attention` to the others that the mask allows, of which each
    query reads the `num_keys` nearest. They are the memory: no gradient flows to its keys and
    values. A score is for local attention alone, as in the paper. O(T window), and O(T S) for the
    exact search.

    A call may add to the memory by `memory=(keys, values)`, each [B, M, K, H]: what other calls
    projected, keys after norm and rotation. They stand before all positions, at -2^30, and the mask
    decides there too: `Causal()` and `Lengths()` allow them, an array of S keys does not fit.

    The arguments that are not listed are those of MultiHeadAttention but `op`.

    Args:
      width, num_heads: as in MultiHeadAttention.
      window: how far the local keys are from the query, as in `masks.SlidingWindow`.
      num_keys: how many keys of the memory a query reads.
      search: finds them, `ops.memory.retrieve` or a function that is called as it is.
      gate: where every head's gate starts, before the sigmoid.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        window: int,
        num_keys: int,
        search: Callable[..., tuple[jax.Array, jax.Array]] = retrieve,
        gate: float = 0.0,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        for name, value, least in (("window", window, 0), ("num_keys", num_keys, 1)):
            if value < least:
                raise ValueError(f"{name}: wanted at least {least}, got {value}")
        super().__init__(
            width, num_heads, op=memory_attention, param_dtype=param_dtype, rngs=rngs, **kwargs
        )
        self.window = window
        self.num_keys = num_keys
        self.search = search
        self.gate = nnx.Param(jnp.full((num_heads,), gate, param_dtype))

    def attend(
        self,
        x: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        mask: Mask | None = None,
        score: Score | tuple[Score, ...] | None = None,
        q_positions: jax.Array | None = None,
        kv_positions: jax.Array | None = None,
        memory: tuple[jax.Array, jax.Array] | None = None,
        **dropout: Any,
    ) -> jax.Array:
        local = Local(self.window)(
            q, k, v, mask=mask, score=score, q_positions=q_positions, kv_positions=kv_positions,
            **dropout,
        )  # fmt: skip
        k, v = jax.lax.stop_gradient((k, v))
        if memory is not None:
            q_positions = np.arange(q.shape[1]) if q_positions is None else q_positions
            k, v, kv_positions = _joined(k, v, kv_positions, *jax.lax.stop_gradient(memory))
        far = ~SlidingWindow(self.window, self.window)
        retrieved = self.op(
            q, k, v, num_keys=self.num_keys, search=self.search,
            mask=far if mask is None else mask & far,
            q_positions=q_positions, kv_positions=kv_positions, **dropout,
        )  # fmt: skip
        gate = jax.nn.sigmoid(self.gate[...].astype(local.dtype))[:, None]
        return gate * retrieved + (1 - gate) * local


def _joined(
    k: jax.Array, v: jax.Array, positions: jax.Array | None, more_k: jax.Array, more_v: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The keys and values of the sequence and of the memory, and where they stand."""
    for name, x, like in (("keys", more_k, k), ("values", more_v, v)):
        if np.ndim(x) != 4 or x.shape != (like.shape[0], more_k.shape[1], *like.shape[2:]):
            B, _, K, H = like.shape
            raise ValueError(f"memory: wanted {name} [{B}, M, {K}, {H}], got {list(np.shape(x))}")
    positions = jnp.arange(k.shape[1]) if positions is None else jnp.asarray(positions)
    before = jnp.full((*positions.shape[:-1], more_k.shape[1]), BEFORE_ALL, positions.dtype)
    return (
        jnp.concatenate([k, more_k.astype(k.dtype)], axis=1),
        jnp.concatenate([v, more_v.astype(v.dtype)], axis=1),
        jnp.concatenate([positions, before], axis=-1),
    )
