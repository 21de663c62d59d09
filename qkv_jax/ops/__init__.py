"""Attention primitives: pure functions of arrays, in one convention.

The letters that docstrings, einsum strings and unpacked shapes share:

    B  batch              T  query length       S  key length
    N  query heads        K  key/value heads    G  query heads per key/value head, N // K
    H  query/key width    h  value width        D  model width
    F  MLP width          V  vocabulary

Queries are `[B, T, N, H]`, keys `[B, S, K, H]`, values `[B, S, K, h]`; what `attention` returns is
`[B, T, N, h]`.
"""

from qkv_jax.ops import basic, masks, positions, scores
from qkv_jax.ops.arguments import Stats
from qkv_jax.ops.attention import attention, attention_weights, attention_with_stats, merge
from qkv_jax.ops.blockwise import Blockwise
from qkv_jax.ops.explain import Explanation, explain

__all__ = [
    "Blockwise",
    "Explanation",
    "Stats",
    "attention",
    "attention_weights",
    "attention_with_stats",
    "basic",
    "explain",
    "masks",
    "merge",
    "positions",
    "scores",
]
