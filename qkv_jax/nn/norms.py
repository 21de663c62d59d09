"""Norms of the residual stream and of queries and keys."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

NORMS = ("layer", "rms", "zero_centered_rms", "none")


def make_norm(
    name: str,
    width: int,
    *,
    use_bias: bool = True,
    epsilon: float | None = None,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
) -> Callable[[jax.Array], jax.Array]:
    """The norm called "layer" (Ba et al. 2016) or "rms" (Zhang and Sennrich 2019) of `width`.

    "zero_centered_rms" is `ZeroCenteredRMSNorm`, "none" the identity. What is added to the variance
    is by default 1e-5 for "layer", 1e-6 for the others.
    """
    if name == "layer":
        return nnx.LayerNorm(
            width, epsilon=1e-5 if epsilon is None else epsilon, use_bias=use_bias, dtype=dtype,
            param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
    if name in ("rms", "zero_centered_rms"):
        kind = nnx.RMSNorm if name == "rms" else ZeroCenteredRMSNorm
        return kind(
            width, epsilon=1e-6 if epsilon is None else epsilon, dtype=dtype,
            param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
    if name == "none":
        return _unchanged
    raise ValueError(f"norm: wanted one of {list(NORMS)}, got {name!r}")


class ZeroCenteredRMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + epsilon) * (1 + scale)`, the scale 0 at first: Gemma's norm.

    In bfloat16 a scale near 0 has digits that a factor near 1 has not, and weight decay pulls the
    factor to 1. It is computed in float32. Gemma Team 2024, arxiv.org/abs/2403.08295.

    Args:
      width: of the last axis.
      epsilon: what is added to the mean.
      dtype: of the output; None: that of the input and the scale.
      param_dtype: of the scale.
      rngs: unused, as the scale begins as 0.
    """

    def __init__(
        self,
        width: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del rngs
        self.epsilon = epsilon
        self.dtype = dtype
        self.scale = nnx.Param(jnp.zeros(width, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., width] to the same."""
        scale = self.scale[...]
        dtype = jnp.result_type(x, scale) if self.dtype is None else self.dtype
        x, scale = (y.astype(jnp.promote_types(dtype, jnp.float32)) for y in (x, scale))
        square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(square + self.epsilon) * (1 + scale)).astype(dtype)


def _unchanged(x: jax.Array) -> jax.Array:
    return x
