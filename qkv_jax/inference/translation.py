"""Translating by running an encoder-decoder: the likeliest tokens, draws, or beams."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from qkv_jax import nn
from qkv_jax.inference.beam import beam_search
from qkv_jax.inference.generation import generate
from qkv_jax.inference.prompts import at_least
from qkv_jax.ops.cache import Cache, CacheKind


def translate(
    graphdef: nnx.GraphDef,
    params: nn.Params,
    sources: np.ndarray | jax.Array,
    source_lengths: np.ndarray | jax.Array,
    *,
    begin: int,
    end: int,
    num_tokens: int,
    num_samples: int = 1,
    beams: int = 1,
    length_penalty: float | None = None,
    rng: jax.Array | None = None,
    kind: CacheKind = Cache,
    **sampling: Any,
) -> jax.Array:
    """The translations that a model writes: by default of the likeliest token each time (greedily).

    The source is encoded once; the loop stops where every row has its end.

    Args:
      graphdef, params: an encoder-decoder with `encode`, `init_cache`, `extend` and `logits`, as
        `nn.split` gives it.
      sources: integers [B, S].
      source_lengths: integers [B].
      begin: the id that the decoder reads first.
      end: the id that ends a translation.
      num_tokens: of the longest translation, T.
      num_samples: translations of each source: draws, or the best that the beams have found.
      beams: more than 1: see `beam_search`, which also gives scores.
      length_penalty: of beams; None: 1.
      rng: a key, to draw tokens as `generate` does; None: nothing is drawn.
      kind: of the decoder's cache.
      **sampling: see `Sampling`; of draws.

    Returns:
      int32 [B * num_samples, T]; from a row's end on, `end` alone.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    at_least(1, beams=beams, num_tokens=num_tokens)
    shared = {
        "num_tokens": num_tokens, "context": max(num_tokens, 2), "stop": (end,), "kind": kind,
        "sources": sources, "source_lengths": source_lengths,
    }  # fmt: skip
    prompt = np.full((len(sources), 1), begin, np.int32)
    if rng is None and sampling:
        raise ValueError(f"rng: wanted a key, to draw with {sorted(sampling)}, got None")
    if beams > 1:
        if rng is not None:
            raise ValueError(f"rng: wanted None, for {beams} beams draw nothing, got a key")
        found = beam_search(
            graphdef, params, prompt, beams=beams, num_results=num_samples,
            length_penalty=1.0 if length_penalty is None else length_penalty, **shared,
        )  # fmt: skip
        return found.tokens.reshape(-1, num_tokens)
    if length_penalty is not None:
        raise ValueError(f"length_penalty: was set to {length_penalty}, but beams = 1")
    if rng is None:
        rng, sampling = jax.random.key(0), {"top_k": 1}
    return generate(
        graphdef, params, prompt, rng=rng, num_samples=num_samples, **shared, **sampling
    )
