"""How likely a model finds given texts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax import nn


def log_probabilities(
    graphdef: nnx.GraphDef, params: nn.Params, tokens: np.ndarray | jax.Array
) -> jax.Array:
    """The logarithm of each token's probability after those before it.

    Args:
      graphdef, params: a decoder as `nn.split` gives it.
      tokens: integers [B, T], T >= 2.

    Returns:
      float32 [B, T - 1], of the tokens from the second on.

    Raises:
      ValueError: for tokens of another shape or kind.
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens: wanted integers [B, T] with T >= 2, got {tokens.dtype} {list(tokens.shape)}"
        )
    return _log_probabilities(graphdef, params, tokens)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _log_probabilities(graphdef, params, tokens):
    logits = nn.merge(graphdef, params)(tokens[:, :-1])
    chances = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1)[..., 0]
