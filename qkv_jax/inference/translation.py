"""Translating by running an encoder-decoder, the likeliest token first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax import nn


def translate(
    graphdef: nnx.GraphDef,
    params: nn.Params,
    sources: np.ndarray | jax.Array,
    source_lengths: np.ndarray | jax.Array,
    *,
    begin: int,
    end: int,
    num_tokens: int,
) -> jax.Array:
    """The translations that a model writes when it takes the likeliest token each time (greedily).

    The source is encoded once. Without a cache, each token costs a decoder's pass over all
    `num_tokens`; the loop stops where every row has its end.

    Args:
      graphdef, params: a model with `encode(sources, source_lengths=...)` and `decode(target_in,
        memory, source_lengths=...)`, as `nn.split` gives it.
      sources: integers [B, S].
      source_lengths: integers [B].
      begin: the id that the decoder reads first.
      end: the id that ends a translation.
      num_tokens: of the longest translation, T.

    Returns:
      int32 [B, T]; from a row's end on, `end` alone.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    sources, source_lengths = jnp.asarray(sources), jnp.asarray(source_lengths)
    if sources.ndim != 2 or not jnp.issubdtype(sources.dtype, jnp.integer):
        raise ValueError(
            f"sources: wanted integers [B, S], got {sources.dtype} {list(sources.shape)}"
        )
    if source_lengths.shape != sources.shape[:1]:
        raise ValueError(
            f"source_lengths: wanted shape {list(sources.shape[:1])}, as many as sources, got "
            f"{list(source_lengths.shape)}"
        )
    if num_tokens < 1:
        raise ValueError(f"num_tokens: wanted at least 1, got {num_tokens}")
    return _translate(graphdef, params, sources, source_lengths, begin, end, num_tokens=num_tokens)


@functools.partial(jax.jit, static_argnames=("graphdef", "num_tokens"))
def _translate(graphdef, params, sources, source_lengths, begin, end, *, num_tokens):
    B, T = sources.shape[0], num_tokens
    model = nn.merge(graphdef, params)
    memory = model.encode(sources, source_lengths=source_lengths)

    def unfinished(carry):
        i, _, done = carry
        return (i < T) & ~done.all()

    def body(carry):
        i, written, done = carry
        # Causal: what stands in the row after place i cannot be seen.
        logits = model.decode(written[:, :T], memory, source_lengths=source_lengths)
        token = jnp.take(logits, i, axis=1).argmax(-1).astype(jnp.int32)
        token = jnp.where(done, end, token)
        return i + 1, written.at[:, i + 1].set(token), done | (token == end)

    written = jnp.full((B, T + 1), end, jnp.int32).at[:, 0].set(begin)
    _, written, _ = jax.lax.while_loop(
        unfinished, body, (jnp.int32(0), written, jnp.zeros(B, bool))
    )
    return written[:, 1:]
