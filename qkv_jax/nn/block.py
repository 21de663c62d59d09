"""A Transformer block: something that mixes tokens, something that does not, and two norms."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

NORMS = ("layer", "rms", "none")


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

    "none" is the identity. What is added to the variance is by default 1e-5 for "layer", 1e-6 for
    "rms".
    """
    if name == "layer":
        return nnx.LayerNorm(
            width, epsilon=1e-5 if epsilon is None else epsilon, use_bias=use_bias, dtype=dtype,
            param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
    if name == "rms":
        return nnx.RMSNorm(
            width, epsilon=1e-6 if epsilon is None else epsilon, dtype=dtype,
            param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
    if name == "none":
        return _unchanged
    raise ValueError(f"norm: wanted one of {list(NORMS)}, got {name!r}")


def _unchanged(x: jax.Array) -> jax.Array:
    return x


def dropout(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Drops elements with probability `rate` and scales the rest; without `rng`, `x` as it is."""
    if rng is None or rate == 0:
        return x
    keep = jax.random.bernoulli(rng, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


class TransformerBlock(nnx.Module):
    """Two residual branches, the norm before each ("pre") or after each sum ("post").

        pre:   x = x + mix(norm(x));  x = x + feed_forward(norm(x))
        post:  x = norm(x + mix(x));  x = norm(x + feed_forward(x))

    Args:
      mixer: a module that mixes tokens, such as `MultiHeadAttention`; it is called as
        `mixer(x, rng=rng, **kwargs)`.
      feed_forward: a module [B, T, D] -> [B, T, D]; None: there is one branch alone.
      norm: makes a norm; called once for each branch.
      norm_position: "pre" (Xiong et al. 2020, arxiv.org/abs/2002.04745) or "post" (Vaswani).
      dropout_rate: of each branch's output, where a call passes `rng`.
    """

    def __init__(
        self,
        mixer: nnx.Module,
        feed_forward: nnx.Module | None,
        *,
        norm: Callable[[], Callable[[jax.Array], jax.Array]],
        norm_position: str = "pre",
        dropout_rate: float = 0.0,
    ):
        if norm_position not in ("pre", "post"):
            raise ValueError(f"norm_position: wanted 'pre' or 'post', got {norm_position!r}")
        self.mixer = mixer
        self.feed_forward = feed_forward
        self.mixer_norm = norm()
        self.feed_forward_norm = None if feed_forward is None else norm()
        self.norm_position = norm_position
        self.dropout_rate = dropout_rate

    def __call__(self, x: jax.Array, *, rng: jax.Array | None = None, **kwargs: Any) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]; `kwargs` (mask, positions, ...) go to the mixer."""
        mix_rng, drop_rng, last_rng = (None,) * 3 if rng is None else jax.random.split(rng, 3)

        def mix(x: jax.Array) -> jax.Array:
            return dropout(self.mixer(x, rng=mix_rng, **kwargs), self.dropout_rate, drop_rng)

        def feed_forward(x: jax.Array) -> jax.Array:
            return dropout(self.feed_forward(x), self.dropout_rate, last_rng)

        branches = [(mix, self.mixer_norm)]
        if self.feed_forward is not None:
            branches.append((feed_forward, self.feed_forward_norm))
        for branch, norm in branches:
            x = x + branch(norm(x)) if self.norm_position == "pre" else norm(x + branch(x))
        return x
