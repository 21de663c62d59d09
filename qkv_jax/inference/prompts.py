"""What is read before the first token is written, checked before anything compiles."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops.cache import CacheKind
from qkv_jax.ops.paged import Pages

Integers = np.ndarray | jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """What a model reads first; made by `Prompts.checked`.

    Args:
      tokens: int32 [B, P].
      lengths: of the prompts, int32 [B]; None: P.
      sources: of an encoder-decoder, int32 [B, S]; None: the model has no encoder.
      source_lengths: int32 [B]; None: S.
    """

    tokens: jax.Array
    lengths: jax.Array | None = None
    sources: jax.Array | None = None
    source_lengths: jax.Array | None = None

    @classmethod
    def checked(
        cls,
        config: Any,
        tokens: Integers,
        lengths: Integers | None = None,
        sources: Integers | None = None,
        source_lengths: Integers | None = None,
        *,
        num_tokens: int,
        context: int,
        copies: int,
        kind: CacheKind,
    ) -> Self:
        """Prompts of at most `context` tokens: of longer ones the end.

        Args:
          config: of the model.
          tokens, lengths, sources, source_lengths: as in the class, of any integers.
          num_tokens: how many will be added.
          context: the most tokens that the model may see.
          copies: how many continuations of each prompt there will be.
          kind: of the cache.

        Raises:
          ValueError: naming the argument, what came and what was wanted.
        """
        at_least(1, num_tokens=num_tokens)
        at_least(2, context=context)
        tokens = check_tokens("prompt", "[B, P]", tokens, config.vocab_size)
        B, P = tokens.shape
        _check_lengths("lengths", lengths, B, P)
        if sources is not None:
            size = getattr(config, "source_vocab_size", None) or config.vocab_size
            sources = check_tokens("sources", "[B, S]", sources, size)
            if len(sources) != B:
                raise ValueError(f"sources: wanted one for each of {B} prompts, got {len(sources)}")
            _check_lengths("source_lengths", source_lengths, B, sources.shape[1])
            if P + num_tokens - 1 > context:
                raise ValueError(
                    f"context: wanted at least {P + num_tokens - 1}, the prompt's {P} and "
                    f"{num_tokens} new tokens, of which the last is not read, got {context}"
                )
        elif source_lengths is not None:
            raise ValueError("source_lengths: were given, but no sources")
        if lengths is None:
            kept, tokens = None, tokens[:, -context:]
        else:
            kept = jnp.minimum(jnp.asarray(lengths), context)
            tokens = ends(jnp.asarray(tokens), jnp.asarray(lengths), kept, min(P, context))
        if isinstance(kind, Pages):
            read = np.full(B, P) if lengths is None else np.asarray(lengths)
            _check_pages(kind, np.minimum(read + num_tokens - 1, context), copies)
        return cls(*(x if x is None else jnp.asarray(x, jnp.int32) for x in (
            tokens, kept, sources, source_lengths,
        )))  # fmt: skip

    def repeated(self, copies: int) -> Self:
        """Each of them so many times, side by side."""
        return jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), self)


def at_least(least: int, **numbers: int) -> None:
    """Checks that arguments, by their names, are not smaller.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name}: wanted at least {least}, got {number}")


def check_tokens(name: str, shape: str, tokens: Any, vocab_size: int) -> Integers:
    """The tokens, if they are integers of two axes that a model knows.

    The values of what is traced by `jit` are not known, and not checked.

    Args:
      name: of the argument.
      shape: how its axes are called.
      tokens: what came.
      vocab_size: V.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"{name}: wanted integers {shape} with no axis of 0, got {tokens.dtype} "
            f"{list(tokens.shape)}"
        )
    if not isinstance(tokens, jax.core.Tracer):
        values = np.asarray(tokens)
        wrong = values[(values < 0) | (values >= vocab_size)]
        if wrong.size:
            raise ValueError(f"{name}: wanted tokens in [0, V = {vocab_size}), got {wrong[0]}")
    return tokens


def _check_lengths(name: str, lengths: Any, B: int, most: int) -> None:
    if lengths is None or isinstance(lengths, jax.core.Tracer):
        return
    values = np.asarray(lengths)
    whole = np.issubdtype(values.dtype, np.integer)
    if values.shape != (B,) or not whole or values.min() < 1 or values.max() > most:
        raise ValueError(f"{name}: wanted [B] = [{B}] integers from 1 to {most}, got {values}")


def _check_pages(kind: Pages, tokens: np.ndarray, copies: int) -> None:
    """A compiled loop cannot stop where a pool is exhausted, so that it has to hold them all."""
    needed = copies * int(np.sum(-(-tokens // kind.page_size)))
    if kind.num_pages < needed:
        raise ValueError(
            f"kind: wanted Pages of at least {needed} pages of {kind.page_size} tokens, for all "
            f"that these rows may hold, got {kind.num_pages}"
        )


def ends(text: jax.Array, lengths: jax.Array, kept: jax.Array, size: int) -> jax.Array:
    """The last `kept` of the `lengths` tokens of each row, [B, size], then padding."""
    places = jnp.reshape(lengths - kept, (-1, 1)) + jnp.arange(size)
    places = jnp.minimum(places, text.shape[1] - 1)
    return jnp.take_along_axis(text, places, axis=1).astype(jnp.int32)
