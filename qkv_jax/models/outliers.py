"""How large a decoder's activations are, and how heavy the tails of their distribution."""

import jax
import jax.numpy as jnp

from qkv_jax import ops
from qkv_jax.models.blocks import logit_scores, own_arguments
from qkv_jax.models.decoder import Decoder


def activations(model: Decoder, tokens: jax.Array) -> dict[str, jax.Array]:
    """What a decoder's blocks compute.

    Args:
      model: a decoder, also one whose linear layers are quantized.
      tokens: integers [B, T].

    Returns:
      Each [L, B, T, D]: "attention", what each block's mixer adds, "feed_forward", what the other
      branch does, where there is one, and "residual", the stream after the block.
    """
    score = logit_scores(model.config, model.bias)
    found: dict[str, list[jax.Array]] = {}

    def noted(name: str, x: jax.Array) -> jax.Array:
        found.setdefault(name, []).append(x)
        return x

    x, first_values = model.embed(tokens), None
    for block in model.blocks:
        own, first_values = own_arguments(model.config, block, x, score, first_values)

        def mix(x: jax.Array, block=block, own=own) -> jax.Array:
            mask = ops.masks.Causal()
            return noted("attention", block.mixer(x, mask=mask, positions=None, **own))

        def feed_forward(x: jax.Array, block=block) -> jax.Array:
            return noted("feed_forward", block.feed_forward(x))

        x = noted("residual", block.added(x, mix, feed_forward))
    return {name: jnp.stack(outputs) for name, outputs in found.items()}


def largest(x: jax.Array) -> jax.Array:
    """The infinity norm max |x| over the last two axes: [..., T, D] -> [...]."""
    return jnp.abs(x).max((-2, -1))


def kurtosis(x: jax.Array) -> jax.Array:
    """How heavy the tails are: the fourth moment by the square of the second, [..., T, D] -> [...].

        mean((x - mean(x))^4) / mean((x - mean(x))^2)^2

    Pearson's: 3 for a normal distribution, T D at most, where one number alone differs. 0 where all
    are equal.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = x - x.mean((-2, -1), keepdims=True)
    variance = (centred**2).mean((-2, -1))
    fourth = (centred**4).mean((-2, -1))
    return jnp.where(variance > 0, fourth / jnp.where(variance > 0, variance, 1) ** 2, 0)
