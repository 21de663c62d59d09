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

    The source is encoded once; the loop stops where every row has its end. A model without a cache
    (`init_cache`, `extend`, `logits`) passes over all `num_tokens` for each token.

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
    cached = hasattr(model, "extend")

    def next_logits(i, written, cache):
        if cached:
            x, cache = model.extend(
                jax.lax.dynamic_slice_in_dim(written, i, 1, axis=1), cache, positions=i[None],
                source_lengths=source_lengths,
            )  # fmt: skip
            return model.logits(x)[:, 0], cache
        # Causal: what stands in the row after place i cannot be seen.
        logits = model.decode(written[:, :T], memory, source_lengths=source_lengths)
        return jnp.take(logits, i, axis=1), cache

    def unfinished(carry):
        i, _, done, _ = carry
        return (i < T) & ~done.all()

    def body(carry):
        i, written, done, cache = carry
        logits, cache = next_logits(i, written, cache)
        token = jnp.where(done, end, logits.argmax(-1).astype(jnp.int32))
        return i + 1, written.at[:, i + 1].set(token), done | (token == end), cache

    written = jnp.full((B, T + 1), end, jnp.int32).at[:, 0].set(begin)
    cache = model.init_cache(memory, T) if cached else ()
    carry = jnp.int32(0), written, jnp.zeros(B, bool), cache
    _, written, _, _ = jax.lax.while_loop(unfinished, body, carry)
    return written[:, 1:]
