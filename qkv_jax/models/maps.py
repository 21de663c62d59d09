"""The attention weights of a model's layers, and what they are made of, for looking."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qkv_jax import ops
from qkv_jax.models.decoder import Decoder

# Who says what a layer has not.
WEIGHTS = "attention_maps", "attention weights"
INPUTS = "attention_inputs", "queries and keys"


def attention_maps(model: Decoder, tokens: jax.Array) -> jax.Array:
    """The weights that every head of every layer gives to every token.

    The forward pass is the model's own; beside it, `ops.attention_weights` gets what each layer's
    op gets.

    Args:
      model: a decoder or encoder whose mixers call `ops.attention`, or an op that tells its weights
        by a method `weights`. It comes back as it was.
      tokens: integers [B, T].

    Returns:
      float32 [L, B, N, T, T].

    Raises:
      NotImplementedError: a layer's mixer has no attention weights.
    """

    def weights(op: Any, q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any) -> jax.Array:
        del v
        return (ops.attention_weights if op is ops.attention else op.weights)(q, k, **kwargs)

    for layer, block in enumerate(model.blocks):
        op = getattr(block.mixer, "op", None)
        if op is not ops.attention and not hasattr(op, "weights"):
            raise _no_op(model, layer, WEIGHTS)
    return jnp.stack(_seen(model, tokens, weights, WEIGHTS))


def attention_inputs(model: Decoder, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What every layer's op gets: queries, keys and values, after norm and rotation.

    Args:
      model: a decoder or encoder whose mixers call an op. It comes back as it was.
      tokens: integers [B, T].

    Returns:
      q [L, B, T, N, H], k and v [L, B, T, K, H].

    Raises:
      NotImplementedError: a layer's mixer calls no op.
    """

    def inputs(op: Any, *qkv: jax.Array, **kwargs: Any) -> tuple[jax.Array, ...]:
        del op, kwargs
        return qkv

    for layer, block in enumerate(model.blocks):
        if not hasattr(block.mixer, "op"):
            raise _no_op(model, layer, INPUTS)
    seen = _seen(model, tokens, inputs, INPUTS)
    return tuple(map(jnp.stack, zip(*seen, strict=True)))


def _seen(
    model: Decoder, tokens: jax.Array, look: Callable[..., Any], missing: tuple[str, str]
) -> list[Any]:
    """`look(op, q, k, v, ...)` of every layer's op in a forward pass; the model stays as it was."""
    found: list[Any] = []

    def watch(op: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def watched(q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any) -> jax.Array:
            found.append(look(op, q, k, v, **kwargs))
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
    if len(found) < len(own):  # some mixer has an op and does not call it
        raise _no_op(model, len(found), missing)
    return found


def prefix_matching(maps: jax.Array, tokens: jax.Array) -> jax.Array:
    """How much each head looks at what came after earlier occurrences of the token it is at.

        mean over t of the weight from t to all s with tokens[s - 1] = tokens[t], 0 < s <= t

    over the places t of tokens that occurred before. An induction head's is near 1. Olsson et al.
    2022, arxiv.org/abs/2209.11895.

    Args:
      maps: [L, B, N, T, T], of a decoder, from `attention_maps`.
      tokens: integers [B, T].

    Returns:
      float32 [L, N]; NaN where no token occurs twice.
    """
    T = tokens.shape[1]
    earlier = jnp.tril(tokens[:, :, None] == tokens[:, None, :], -1)  # [B, t, s]
    after = jnp.pad(earlier, ((0, 0), (0, 0), (1, 0)))[..., :T]  # [B, t, s + 1]
    weight = jnp.einsum("lbnts,bts->ln", maps, after.astype(maps.dtype))
    return weight / earlier.any(-1).sum()


def previous_token(maps: jax.Array) -> jax.Array:
    """The mean weight that each head gives to the token before: [L, B, N, T, T] -> [L, N]."""
    return jnp.diagonal(maps, -1, axis1=-2, axis2=-1).mean((1, 3))


def _no_op(model: Decoder, layer: int, missing: tuple[str, str]) -> NotImplementedError:
    mixer = type(model.blocks[layer].mixer).__name__
    who, what = missing
    return NotImplementedError(f"{who}: layer {layer}, {mixer}, has no {what}")
