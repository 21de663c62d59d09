"""Attention to the few keys that matter most to each query."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import arguments
from qkv_jax.ops.arguments import Arguments
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.rows import attend_rows, masked_softmax
from qkv_jax.ops.scores import Score

Array = jax.Array | np.ndarray


def top_k_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    num_keys: int,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """Top-k attention (Gupta et al. 2021, arxiv.org/abs/2106.06899).

        kept[t] = the num_keys largest of score(scale * q[t] . k[s]) where mask allows
        out[t]  = softmax over s in kept[t] of these logits, times v[s]

    Of equal logits the ones of earlier keys are kept: never more than num_keys. The choice has no
    gradient. Approximates `ops.attention`, and is it where num_keys is at least S. O(T S) in time,
    as every logit is computed; memory linear in T and S.

    Args:
      num_keys: how many keys a query attends to.
      The others: as in `ops.attention`.

    Returns:
      [B, T, N, h], in the dtype of v.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    check_num_keys(num_keys)
    args = arguments.check(
        q, k, v, mask=mask, score=score, scale=scale, sinks=None, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip

    def weigh(rows: Arguments, logits: jax.Array, allowed: jax.Array) -> jax.Array:
        return masked_softmax(logits, largest(logits, allowed, num_keys))

    return attend_rows(args, weigh)


def largest(logits: jax.Array, allowed: jax.Array, number: int) -> jax.Array:
    """Which are the `number` largest of the last axis among what is allowed, the first of equals.

    Args:
      logits: floating [..., S].
      allowed: bool [..., S].

    Returns:
      bool [..., S], at most `number` of each row.
    """
    S = logits.shape[-1]
    if number >= S:
        return allowed
    logits = jax.lax.stop_gradient(jnp.where(allowed, logits, -jnp.inf))
    logits = jnp.where(logits == 0, 0, logits)  # top_k takes -0 for less than 0
    values, keys = jax.lax.top_k(logits, number)
    # The last of each: a slice instead would have XLA sort whole rows, 30 times slower on a CPU.
    last_value = values.min(-1, keepdims=True)
    last_key = jnp.where(values == last_value, keys, -1).max(-1, keepdims=True)
    tied = (logits == last_value) & (np.arange(S) <= last_key)
    return allowed & ((logits > last_value) | tied)


@dataclasses.dataclass(frozen=True)
class TopK:
    """`top_k_attention` with its setting, for `nn.MultiHeadAttention(op=TopK(32))`."""

    num_keys: int

    def __post_init__(self):
        check_num_keys(self.num_keys)

    def __call__(self, q: Array, k: Array, v: Array, **kwargs: Any) -> jax.Array:
        """`top_k_attention` with the arguments given."""
        return top_k_attention(q, k, v, num_keys=self.num_keys, **kwargs)


def check_num_keys(num_keys: Any) -> None:
    """Raises a ValueError unless it is a positive integer."""
    if not isinstance(num_keys, int) or num_keys < 1:
        raise ValueError(f"num_keys: wanted a positive integer, got {num_keys!r}")
