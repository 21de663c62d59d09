"""Multi-head attention that adds the first layer's values to its own."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from qkv_jax.nn.attention import MultiHeadAttention


class ValueResidualAttention(MultiHeadAttention):
    """Multi-head attention to a mixture of values (ResFormer, Zhou et al. 2024).

        v = lambda_first * first layer's values + lambda_own * own values

    arxiv.org/abs/2410.17897; both weights are learned. `first_values=first.values(x)`, of the
    module `first` and its input `x`, hands the first layer's values to a call of a later one.
    Without `first_values` it is MultiHeadAttention.

    The arguments that are not listed are those of MultiHeadAttention.

    Args:
      width, num_heads: as in MultiHeadAttention.
      lambda_first, lambda_own: where the two weights start.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        lambda_first: float = 0.5,
        lambda_own: float = 0.5,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(width, num_heads, param_dtype=param_dtype, rngs=rngs, **kwargs)
        self.lambda_first = nnx.Param(jnp.asarray(lambda_first, param_dtype))
        self.lambda_own = nnx.Param(jnp.asarray(lambda_own, param_dtype))

    def values(self, x: jax.Array) -> jax.Array:
        """This layer's own values of x [B, S, context_width], as [B, S, K, h]."""
        layers = (self.value, self.key, self.query)  # with share_kv, keys are the values
        v = next(layer for layer in layers if layer is not None)(x)
        return v.reshape(*v.shape[:2], self.num_kv_heads, self.head_dim)

    def attend(
        self,
        x: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        first_values: jax.Array | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        return super().attend(x, q, k, self._mixed(v, first_values), **kwargs)

    def attend_cached(
        self,
        x: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        cache: Any,
        *,
        first_values: jax.Array | None = None,
        **kwargs: Any,
    ) -> tuple[jax.Array, Any]:
        return super().attend_cached(x, q, k, self._mixed(v, first_values), cache, **kwargs)

    def _mixed(self, v: jax.Array, first_values: jax.Array | None) -> jax.Array:
        if first_values is None:
            return v
        if first_values.shape != v.shape:
            raise ValueError(
                f"first_values: wanted [B, S, K, h] = {list(v.shape)}, "
                f"got {list(first_values.shape)}"
            )
        first, own = (w[...].astype(v.dtype) for w in (self.lambda_first, self.lambda_own))
        return first * first_values.astype(v.dtype) + own * v
