"""Attention primitives: pure functions of arrays, in one convention.

The letters that docstrings, einsum strings and unpacked shapes share:

    B  batch              T  query length       S  key length
    N  query heads        K  key/value heads    G  query heads per key/value head, N // K
    H  query/key width    h  value width        D  model width
    F  MLP width          V  vocabulary

Queries are `[B, T, N, H]`, keys `[B, S, K, H]`, values `[B, S, K, h]`; what `attention` returns is
`[B, T, N, h]`.
"""

from qkv_jax.ops import basic, cache, features, masks, paged, positions, scores, sparse
from qkv_jax.ops.additive import additive_attention, local_attention
from qkv_jax.ops.attention import attention, attention_weights, attention_with_stats
from qkv_jax.ops.blockwise import Blockwise
from qkv_jax.ops.clipped import ClippedSoftmax, clipped_softmax_attention
from qkv_jax.ops.context import (
    all_gather_attention,
    ring_attention,
    ring_attention_with_stats,
    ulysses_attention,
    zigzag,
)
from qkv_jax.ops.convolution import causal_convolution, centred_convolution, long_convolution
from qkv_jax.ops.cope import cope_attention
from qkv_jax.ops.cosine import cosine_attention
from qkv_jax.ops.delta import delta_rule, delta_rule_parallel, delta_rule_step, lasp_delta_rule
from qkv_jax.ops.explain import Explanation, explain
from qkv_jax.ops.features import LinearAttention, Performer, kernel_attention, performer_attention
from qkv_jax.ops.forgetting import forgetting_attention
from qkv_jax.ops.heads import differential_attention, talking_heads_attention
from qkv_jax.ops.latent import absorbed_latent_attention, latent_attention
from qkv_jax.ops.linear import (
    lasp_linear_attention,
    linear_attention,
    linear_attention_bidirectional,
    linear_attention_parallel,
    linear_attention_step,
)
from qkv_jax.ops.lowrank import Nystrom, linformer_attention, nystrom_attention
from qkv_jax.ops.memory import memory_attention, retrieve
from qkv_jax.ops.moba import MoBA, moba_attention
from qkv_jax.ops.native_sparse import native_sparse_attention
from qkv_jax.ops.normalizers import (
    Entmax,
    Sigmoid,
    entmax,
    entmax_attention,
    off_by_one_attention,
    sigmoid_attention,
    sparsemax,
    sparsemax_attention,
)
from qkv_jax.ops.sharded import AllGatherAttention, RingAttention, Sharded, UlyssesAttention
from qkv_jax.ops.stats import Stats, merge
from qkv_jax.ops.streaming import Streaming, streaming_attention
from qkv_jax.ops.top_k import TopK, top_k_attention

__all__ = [
    "AllGatherAttention",
    "Blockwise",
    "ClippedSoftmax",
    "Entmax",
    "Explanation",
    "LinearAttention",
    "MoBA",
    "Nystrom",
    "Performer",
    "RingAttention",
    "Sharded",
    "Sigmoid",
    "Stats",
    "Streaming",
    "TopK",
    "UlyssesAttention",
    "absorbed_latent_attention",
    "additive_attention",
    "all_gather_attention",
    "attention",
    "attention_weights",
    "attention_with_stats",
    "basic",
    "cache",
    "causal_convolution",
    "centred_convolution",
    "clipped_softmax_attention",
    "cope_attention",
    "cosine_attention",
    "delta_rule",
    "delta_rule_parallel",
    "delta_rule_step",
    "differential_attention",
    "entmax",
    "entmax_attention",
    "explain",
    "features",
    "forgetting_attention",
    "kernel_attention",
    "lasp_delta_rule",
    "lasp_linear_attention",
    "latent_attention",
    "linear_attention",
    "linear_attention_bidirectional",
    "linear_attention_parallel",
    "linear_attention_step",
    "linformer_attention",
    "local_attention",
    "long_convolution",
    "masks",
    "memory_attention",
    "merge",
    "moba_attention",
    "native_sparse_attention",
    "nystrom_attention",
    "off_by_one_attention",
    "paged",
    "performer_attention",
    "positions",
    "retrieve",
    "ring_attention",
    "ring_attention_with_stats",
    "scores",
    "sigmoid_attention",
    "sparse",
    "sparsemax",
    "sparsemax_attention",
    "streaming_attention",
    "talking_heads_attention",
    "top_k_attention",
    "ulysses_attention",
    "zigzag",
]
