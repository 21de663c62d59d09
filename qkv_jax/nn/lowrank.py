"""Multi-head attention through Linformer's projections of the sequence."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from qkv_jax.nn.attention import MultiHeadAttention
from qkv_jax.ops.arguments import check_positive
from qkv_jax.ops.lowrank import linformer_attention


class SequenceProjections(nnx.Module):
    """Linformer's matrices E and F, which mix tokens: parameters that layers may share.

    Args:
      length: the most tokens that they project.
      rank: r, the mixtures that they make.
      num_heads: None: all heads share a matrix [r, length]; K: each has one, [K, r, length].
      share_kv: keys and values are mixed by the same matrix.
      param_dtype: of the parameters.
      rngs: where the initial parameters come from: N(0, 1 / length), so that the mixtures of
        independent keys are as large as they.

    Raises:
      ValueError: for sizes that are not positive.
    """

    def __init__(
        self,
        length: int,
        rank: int,
        *,
        num_heads: int | None = None,
        share_kv: bool = False,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_positive(length=length, rank=rank)
        shape = (rank, length) if num_heads is None else (num_heads, rank, length)
        init = nnx.initializers.normal(length**-0.5)
        self.key = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.value = None if share_kv else nnx.Param(init(rngs.params(), shape, param_dtype))

    def __call__(self, length: int) -> tuple[jax.Array, jax.Array]:
        """E and F of the first `length` tokens, each [r, length] or [K, r, length].

        Raises:
          ValueError: for more tokens than there are columns.
        """
        if length > self.key.shape[-1]:
            raise ValueError(
                f"length: the projections have {self.key.shape[-1]} columns, got {length} tokens"
            )
        key = self.key[..., :length]
        return key, key if self.value is None else self.value[..., :length]


class LinformerAttention(MultiHeadAttention):
    """Multi-head attention over r mixtures of the keys and values (arxiv.org/abs/2006.04768).

    `ops.lowrank.linformer_attention` with learned projections; bidirectional. Fewer tokens than
    `length` take the projections' first columns.

    The arguments that are not listed are those of MultiHeadAttention but `op`.

    Args:
      width, num_heads: as in MultiHeadAttention.
      length: the most keys that there may be.
      rank: r, the mixtures that queries attend to.
      share_heads: whether one projection serves all heads; else each key/value head has its own.
      share_kv_projection: whether one projection serves keys and values.
      projections: those of another layer, to share them (the paper's layer-wise sharing: together
        with the two above, one matrix for the whole model); None: its own.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        length: int,
        rank: int,
        share_heads: bool = True,
        share_kv_projection: bool = False,
        projections: SequenceProjections | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(
            width, num_heads, op=linformer_attention, param_dtype=param_dtype, rngs=rngs, **kwargs
        )
        self.rank = rank
        heads = () if share_heads else (self.num_kv_heads,)
        if projections is None:
            projections = SequenceProjections(
                length, rank, num_heads=heads[0] if heads else None, share_kv=share_kv_projection,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip
        found = projections.key.shape, projections.value is None
        wanted = (*heads, rank, length), share_kv_projection
        if found != wanted:
            raise ValueError(
                "projections: wanted a shape and a share_kv of "
                f"{wanted[0]} and {wanted[1]}, got {found[0]} and {found[1]}"
            )
        self.projections = projections

    def attend(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any
    ) -> jax.Array:
        key, value = self.projections(k.shape[1])
        return self.op(q, k, v, key_projection=key, value_projection=value, **kwargs)

    def state_size(self, length: int) -> int:
        """The mixtures of keys and values, whatever the `length`: to each, a token adds a term."""
        del length
        return super().state_size(self.rank)
