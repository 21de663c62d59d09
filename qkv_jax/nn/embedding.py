"""Position embeddings that are added to token embeddings."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from qkv_jax import ops


class LearnedPositions(nnx.Module):
    """A learned vector for each of `length` positions.

    Args:
      length: how many positions there are.
      width: D.
      embedding_init: initialiser of the table [length, D].
      param_dtype: of the table.
      rngs: where the initial table comes from.
    """

    def __init__(
        self,
        length: int,
        width: int,
        *,
        embedding_init: Initializer = nnx.initializers.normal(0.02),
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.table = nnx.Param(embedding_init(rngs.params(), (length, width), param_dtype))

    def __call__(self, positions: jax.Array) -> jax.Array:
        """Maps integer positions [...] to [..., D]; one past the table gives NaN."""
        return self.table[...].at[positions].get(mode="fill", fill_value=jnp.nan)


class SinusoidalPositions(nnx.Module):
    """The fixed sines and cosines of Vaswani et al. 2017, as a module without parameters.

    Args:
      width: D.
      base: the longest wavelength over 2 pi.
    """

    def __init__(self, width: int, *, base: float = 10_000.0):
        self.width = width
        self.base = base

    def __call__(self, positions: jax.Array) -> jax.Array:
        """Maps integer positions [...] to [..., D]."""
        return ops.positions.sinusoidal(positions, self.width, base=self.base)
