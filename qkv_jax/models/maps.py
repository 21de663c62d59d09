"""The attention weights of a model's layers, for looking."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qkv_jax import ops
from qkv_jax.models.decoder import Decoder


def attention_maps(model: Decoder, tokens: jax.Array) -> jax.Array:
    """The weights that every head of every layer gives to every token.

    The forward pass is the model's own; beside it, `ops.attention_weights` gets what each layer's
    op gets.

    Args:
      model: a decoder whose mixers call an attention op. It comes back as it was.
      tokens: integers [B, T].

    Returns:
      float32 [L, B, N, T, T].
    """
    maps: list[jax.Array] = []

    def watch(op):
        def watched(q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any) -> jax.Array:
            maps.append(ops.attention_weights(q, k, **kwargs))
            return op(q, k, v, **kwargs)

        return watched

    config, own = model.config, [block.mixer.op for block in model.blocks]
    try:
        model.config = dataclasses.replace(config, remat=False)  # what it computes cannot be kept
        for block in model.blocks:
            block.mixer.op = watch(block.mixer.op)
        model(tokens)
    finally:
        for block, op in zip(model.blocks, own, strict=True):
            block.mixer.op = op
        model.config = config
    return jnp.stack(maps)
