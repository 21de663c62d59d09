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
HEADS = "head_importance", "heads"


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
      NotImplementedError: a layer's mixer has no attention weights, or layers of a pruned model
        have different numbers of heads.
    """
    _check_equal_heads(model, WEIGHTS)
    with _seen(model, _weights, WEIGHTS) as maps:
        model(tokens)
    return jnp.stack(maps)


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

    _check_equal_heads(model, INPUTS)
    with watched_inputs(model) as seen:
        model(tokens)
    return tuple(map(jnp.stack, zip(*seen, strict=True)))


@contextlib.contextmanager
def watched_inputs(model: Decoder) -> Iterator[list[tuple[jax.Array, ...]]]:
    """A list to which a call of the model adds what every layer's op gets: `attention_inputs`.

    For what needs the answer of the same call too, such as a loss that is differentiated. Layers
    may have different numbers of heads.

    Args:
      model: as for `attention_inputs`; it is to be called once.

    Raises:
      NotImplementedError: a layer's mixer calls no op.
    """

    def inputs(op: Any, *qkv: jax.Array, **kwargs: Any) -> tuple[jax.Array, ...]:
        del op, kwargs
        return qkv

    with _seen(model, inputs, INPUTS) as found:
        yield found


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


def encoder_decoder_maps(
    model: EncoderDecoder, source: jax.Array, target_in: jax.Array
) -> dict[str, jax.Array]:
    """The weights of both stacks' attention to themselves: "encoder" and "decoder".

    What the decoder gives to the encoder's tokens is `alignment_maps`.

    Args:
      model: it comes back as it was.
      source, target_in: as for a call, without padding.

    Returns:
      float32 [L, B, N, S, S] and [L, B, N, T, T].

    Raises:
      NotImplementedError: a layer's mixer has no attention weights.
    """
    found = {}
    for name, stack in (("encoder", model), ("decoder", model.decoder)):
        mixers = [block.mixer for block in stack.blocks]
        missing = f"encoder_decoder_maps, {name}", WEIGHTS[1]
        with _without_remat(stack), _watched(mixers, _weights, missing) as maps:
            model(source, target_in)
        found[name] = jnp.stack(maps)
    return found


def attention_gradients(
    model: nnx.Module, tokens: jax.Array, loss: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The weights of every head, and how the loss changes with each of them.

    Their product says what a weight did: -w dloss/dw is, to first order, how much the loss would
    rise without it (Barkan et al. 2021, Grad-SAM, arxiv.org/abs/2204.11073; Hao et al. 2021,
    arxiv.org/abs/2004.11207).

    Args:
      model: as for `attention_maps`, or one with an encoder, such as `MaskedLanguageModel`. It
        comes back as it was.
      tokens: integers [B, T].
      loss: what the model returns -> a number.

    Returns:
      weights and dloss/dweights, each float32 [L, B, N, T, T].

    Raises:
      NotImplementedError: a layer's mixer has no attention weights.
    """
    stack = getattr(model, "encoder", model)
    maps = attention_maps(stack, tokens)

    def attend(op: Any, change: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any):
        weights = _weights(op, q, k, v, **kwargs) + change
        v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
        return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)

    return maps, _gradient(model, stack, tokens, loss, attend, jnp.zeros_like(maps))


def head_importance(
    model: nnx.Module, tokens: jax.Array, loss: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """How much the loss depends on each head: what it changes by as the head's output is scaled.

        mean over rows of |dloss/dxi|, where xi = 1 is a factor of the head's output

    Michel et al. 2019, arxiv.org/abs/1905.10650, without their norm over a layer's heads.

    Args:
      model, tokens: as for `attention_gradients`; a mixer needs an op, but no weights.
      loss: what the model returns -> a number, the sum over rows that do not depend on one another.

    Returns:
      float32 [L, N].

    Raises:
      NotImplementedError: a layer's mixer calls no op.
    """
    stack = getattr(model, "encoder", model)

    def attend(op: Any, factor: jax.Array, q: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        return op(q, *args, **kwargs) * factor[:, None, :, None].astype(q.dtype)

    _check_equal_heads(stack, HEADS)
    B, layers = tokens.shape[0], len(stack.blocks)
    factors = jnp.ones((layers, B, stack.config.of_layer(0).num_heads))
    return jnp.abs(_gradient(model, stack, tokens, loss, attend, factors)).mean(1)


def _gradient(
    model: nnx.Module,
    stack: nnx.Module,
    tokens: jax.Array,
    loss: Callable[[jax.Array], jax.Array],
    attend: Callable[..., jax.Array],
    changes: jax.Array,
) -> jax.Array:
    """The gradient in `changes`, [L, ...], where each layer computes `attend(op, change, ...)`."""
    given: list[jax.Array] = []  # the traced changes, which the ops below read

    def changed(layer: int, op: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda *args, **kwargs: attend(op, given[-1][layer], *args, **kwargs)

    def value(changes: jax.Array) -> jax.Array:
        given.append(changes)
        return loss(model(tokens))

    mixers = [block.mixer for block in stack.blocks]
    for layer, mixer in enumerate(mixers):
        if getattr(mixer, "op", None) is None:
            raise _absent(layer, mixer, HEADS)
    own = [mixer.op for mixer in mixers]
    with _without_remat(stack):
        try:
            for layer, (mixer, op) in enumerate(zip(mixers, own, strict=True)):
                mixer.op = changed(layer, op)
            return jax.grad(value)(changes)
        finally:
            for mixer, op in zip(mixers, own, strict=True):
                mixer.op = op


def _weights(op: Any, q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any) -> jax.Array:
    del v
    return (ops.attention_weights if op is ops.attention else op.weights)(q, k, **kwargs)


@contextlib.contextmanager
def _seen(
    model: Decoder, look: Callable[..., Any], missing: tuple[str, str]
) -> Iterator[list[Any]]:
    """A list of `look(op, q, k, v, ...)` of every layer's op in a call of the model."""
    mixers = [block.mixer for block in model.blocks]
    with _without_remat(model), _watched(mixers, look, missing) as found:
        yield found
    if len(found) < len(mixers):  # some mixer has an op and does not call it
        raise _absent(len(found), mixers[len(found)], missing)


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


def _check_equal_heads(stack: Decoder, missing: tuple[str, str]) -> None:
    layers = range(stack.config.num_layers)
    heads = [stack.config.of_layer(layer).num_heads for layer in layers]
    if len(set(heads)) > 1:
        who, what = missing
        raise NotImplementedError(
            f"{who}: {what} of layers with {', '.join(map(str, heads))} heads are no one array"
        )


def _absent(layer: int, mixer: nnx.Module, missing: tuple[str, str]) -> NotImplementedError:
    who, what = missing
    return NotImplementedError(f"{who}: layer {layer}, {type(mixer).__name__}, has no {what}")
