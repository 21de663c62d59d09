"""Generating text by running the model over its window again for every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax import nn
from qkv_jax.inference.sampling import check_sampling, sample


def generate(
    graphdef: nnx.GraphDef,
    params: nn.Params,
    prompt: np.ndarray | jax.Array,
    *,
    num_tokens: int,
    context: int,
    rng: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Continues prompts, token by token, in one compiled loop.

    The model sees the last `context` tokens. Without a cache, each new token costs a forward pass
    over the whole window.

    Args:
      graphdef, params: a decoder as `nn.split` gives it.
      prompt: integers [B, P], P >= 1.
      num_tokens: how many tokens to add.
      context: the window, at least 1.
      rng: a key.
      temperature, top_k, top_p: see `sampling.filter_logits`.

    Returns:
      int32 [B, num_tokens], without the prompt.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    check_sampling(temperature, top_k, top_p)
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 2 or prompt.shape[1] < 1 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(
            f"prompt: wanted integers [B, P] with P >= 1, got {prompt.dtype} {list(prompt.shape)}"
        )
    if num_tokens < 1 or context < 1:
        raise ValueError(
            f"num_tokens, context: wanted at least 1 each, got {num_tokens} and {context}"
        )
    return _generate(
        graphdef, params, prompt[:, -context:].astype(jnp.int32), rng, num_tokens=num_tokens,
        context=context, temperature=temperature, top_k=top_k, top_p=top_p,
    )  # fmt: skip


@functools.partial(
    jax.jit, static_argnames=("graphdef", "num_tokens", "context", "temperature", "top_k", "top_p")
)
def _generate(graphdef, params, prompt, rng, *, num_tokens, context, **filters):
    B, P = prompt.shape
    model = nn.merge(graphdef, params)

    def body(i, carry):
        window, length, out = carry
        # Causal: what stands in the window after `length` cannot be seen.
        logits = jnp.take(model(window), length - 1, axis=1)
        token = sample(logits, jax.random.fold_in(rng, i), **filters)
        full = length == context
        window = jnp.where(full, jnp.roll(window, -1, axis=1), window)
        place = jnp.where(full, context - 1, length)
        return window.at[:, place].set(token), place + 1, out.at[:, i].set(token)

    window = jnp.zeros((B, context), jnp.int32).at[:, :P].set(prompt)
    out = jnp.zeros((B, num_tokens), jnp.int32)
    return jax.lax.fori_loop(0, num_tokens, body, (window, jnp.int32(P), out))[2]
