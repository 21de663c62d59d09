"""What a decoder would answer after each of its layers."""

from collections.abc import Iterator

import jax

from qkv_jax.models.decoder import Decoder


def logit_lens(model: Decoder, tokens: jax.Array) -> Iterator[jax.Array]:
    """The logits that the model would give if it ended after 0, 1, ... L of its blocks.

    Each residual stream goes through the final norm and the output matrix. The last are the model's
    own logits; the first see no token but the present one. nostalgebraist 2020, "interpreting GPT:
    the logit lens".

    Args:
      model: a decoder.
      tokens: integers [B, T].

    Yields:
      L + 1 times, float32 [B, T, V].
    """
    for state in model.hidden_states(tokens):
        yield model.logits(state)
