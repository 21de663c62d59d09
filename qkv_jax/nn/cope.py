"""Multi-head attention with contextual positions."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from qkv_jax.nn.attention import MultiHeadAttention
from qkv_jax.ops.cope import cope_attention


class ContextualPositionAttention(MultiHeadAttention):
    """Multi-head attention that counts what it cares about (CoPE, Golovneva et al. 2024).

        out = concat(heads of cope_attention(q, k, v, embeddings)) W_out

    arxiv.org/abs/2405.18719. Positions enter through the gates, so `rotary_base=None` is the
    paper's choice. Embeddings start at 0, as in the paper: before training it is
    `MultiHeadAttention`.

    The arguments that are not listed are those of `MultiHeadAttention`, without `op`.

    Args:
      width, num_heads: as in `MultiHeadAttention`.
      max_positions: P; what lies P - 1 or more away shares the last embedding. They count opened
        gates, so far fewer than the tokens of a sequence suffice (the paper: 64 for 1024).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        max_positions: int = 64,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(
            width, num_heads, op=cope_attention, param_dtype=param_dtype, rngs=rngs, **kwargs
        )
        if max_positions < 1:
            raise ValueError(f"max_positions: wanted 1 or more, got {max_positions}")
        self.embeddings = nnx.Param(jnp.zeros((max_positions, self.head_dim), param_dtype))

    def attend(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any
    ) -> jax.Array:
        return self.op(q, k, v, embeddings=self.embeddings[...], **kwargs)
