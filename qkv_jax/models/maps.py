"""The attention weights of a model's layers, and what they are made of, for looking."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax import ops
from qkv_jax.models.convolutional import ConvSeq2Seq
from qkv_jax.models.decoder import Decoder
from qkv_jax.models.encoder_decoder import EncoderDecoder
from qkv_jax.models.recurrent import RecurrentSeq2Seq

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
    return jnp.stack(_seen(model, tokens, _weights, WEIGHTS))


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

    seen = _seen(model, tokens, inputs, INPUTS)
    return tuple(map(jnp.stack, zip(*seen, strict=True)))


def alignment_maps(
    model: EncoderDecoder | RecurrentSeq2Seq | ConvSeq2Seq,
    source: jax.Array,
    target_in: jax.Array,
    *,
    source_lengths: int | jax.Array | None = None,
) -> jax.Array:
    """The weights that every head of every decoder layer gives to every token of the source.

    Bahdanau et al. 2014, figure 3, arxiv.org/abs/1409.0473. A recurrent model has one layer and
    head, a convolutional one a head a layer.

    Args:
      model: it comes back as it was.
      source, target_in, source_lengths: as for a call.

    Returns:
      float32 [L, B, N, T, S]; the weights of token t are those with which token t + 1 is predicted.

    Raises:
      NotImplementedError: the model has no attention to the source.
    """
    if isinstance(model, RecurrentSeq2Seq):
        if model.attention is None:
            raise NotImplementedError("alignment_maps: the model has no attention to the source")
        return model.alignment(source, target_in, source_lengths=source_lengths)[None, :, None]
    convolutional = isinstance(model, ConvSeq2Seq)
    blocks = [] if convolutional else model.decoder.blocks
    holders = [model] if convolutional else [block.cross.mixer for block in blocks]
    remat = contextlib.nullcontext() if convolutional else _without_remat(model.decoder)
    with remat, _watched(holders, _weights, ("alignment_maps", WEIGHTS[1])) as maps:
        memory = model.encode(source, source_lengths=source_lengths)
        model.decode(target_in, memory, source_lengths=source_lengths)
    return jnp.stack(maps)


def _weights(op: Any, q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any) -> jax.Array:
    del v
    return (ops.attention_weights if op is ops.attention else op.weights)(q, k, **kwargs)


def _seen(
    model: Decoder, tokens: jax.Array, look: Callable[..., Any], missing: tuple[str, str]
) -> list[Any]:
    """`look(op, q, k, v, ...)` of every layer's op in a forward pass; the model stays as it was."""
    mixers = [block.mixer for block in model.blocks]
    with _without_remat(model), _watched(mixers, look, missing) as found:
        model(tokens)
    if len(found) < len(mixers):  # some mixer has an op and does not call it
        raise _absent(len(found), mixers[len(found)], missing)
    return found


@contextlib.contextmanager
def _watched(
    holders: Sequence[nnx.Module], look: Callable[..., Any], missing: tuple[str, str]
) -> Iterator[list[Any]]:
    """A list to which every call of the modules' `op` adds what `look` sees in it."""
    found: list[Any] = []

    def watch(op: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def watched(q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any) -> jax.Array:
            found.append(look(op, q, k, v, **kwargs))
            return op(q, k, v, **kwargs)

        return watched

    own = [getattr(holder, "op", None) for holder in holders]
    for number, (holder, op) in enumerate(zip(holders, own, strict=True)):
        tells = op is ops.attention or hasattr(op, "weights")
        if op is None or (look is _weights and not tells):
            raise _absent(number, holder, missing)
    try:
        for holder, op in zip(holders, own, strict=True):
            holder.op = watch(op)
        yield found
    finally:
        for holder, op in zip(holders, own, strict=True):
            holder.op = op


@contextlib.contextmanager
def _without_remat(stack: Decoder) -> Iterator[None]:
    """What a recomputed block computes cannot be kept."""
    config = stack.config
    try:
        stack.config = dataclasses.replace(config, remat=False)
        yield
    finally:
        stack.config = config


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


def _absent(layer: int, mixer: nnx.Module, missing: tuple[str, str]) -> NotImplementedError:
    who, what = missing
    return NotImplementedError(f"{who}: layer {layer}, {type(mixer).__name__}, has no {what}")
