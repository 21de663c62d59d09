"""Choosing the next token from its logits."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits; hashable, so that it is static under jit.

    Args:
      temperature, top_k, top_p, min_p: see `filter_logits`; top_k = 1 takes the likeliest.
      repetition_penalty: see `penalised`; 1: none. It counts the prompt, too.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(
                f"repetition_penalty: wanted a finite number > 0, got {self.repetition_penalty}"
            )

    def __call__(self, logits: jax.Array, rngs: jax.Array, seen: jax.Array | None) -> jax.Array:
        """A token for each row, int32 [B], from logits [B, V]; each row has a key of its own."""
        logits = self._penalised(logits, seen)
        return jax.vmap(functools.partial(sample, **self._filters))(logits, rngs)

    def distribution(self, logits: jax.Array, seen: jax.Array | None) -> jax.Array:
        """The logits [..., V] of the distribution that a call draws from."""
        logits = self._penalised(logits, seen)
        if self.top_k == 1:  # the first where some tie, as `sample` takes
            best = jnp.argmax(logits, axis=-1, keepdims=True)
            return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
        return filter_logits(logits, **self._filters)

    def _penalised(self, logits: jax.Array, seen: jax.Array | None) -> jax.Array:
        return logits if seen is None else penalised(logits, seen, self.repetition_penalty)

    @property
    def _filters(self) -> dict[str, Any]:
        """The arguments of `filter_logits`."""
        filters = dataclasses.asdict(self)
        del filters["repetition_penalty"]
        return filters


def check_sampling(
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> None:
    """Checks the numbers that shape a sampling distribution.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: wanted a finite number > 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: wanted an integer >= 1 or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: wanted a number in (0, 1] or None, got {top_p}")
    if min_p is not None and not 0 < min_p <= 1:
        raise ValueError(f"min_p: wanted a number in (0, 1] or None, got {min_p}")


def filter_logits(
    logits: jax.Array, *, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None, min_p: float | None = None,
) -> jax.Array:  # fmt: skip
    """The logits of the distribution to sample from: sharpened, and -inf where cut off.

    Args:
      logits: [..., V].
      temperature: divides the logits; near 0 the largest takes all.
      top_k: keep the k largest, and what ties with the k-th (Fan et al. 2018,
        arxiv.org/abs/1805.04833).
      top_p: keep the fewest tokens whose probabilities reach p together (Holtzman et al. 2020,
        arxiv.org/abs/1904.09751), after the temperature and the cut at k.
      min_p: keep the tokens that are at least p times as probable as the likeliest, after the
        temperature (Nguyen et al. 2024, arxiv.org/abs/2407.01082).

    Returns:
      [..., V].
    """
    check_sampling(temperature, top_k, top_p, min_p)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if min_p is not None:
        smallest = jnp.max(logits, axis=-1, keepdims=True) + math.log(min_p)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def penalised(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Logits [..., V], of which those of `seen` tokens, bool [..., V], are made less likely.

    Divided by the penalty where they are positive, multiplied by it where not (Keskar et al. 2019,
    CTRL, arxiv.org/abs/1909.05858).
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: jax.Array, rng: jax.Array, **filters) -> jax.Array:
    """One token per row, int32 [...], from logits [..., V]; `filters` are `filter_logits`' own."""
    if filters.get("top_k") == 1:  # nothing is drawn
        check_sampling(**filters)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(rng, filter_logits(logits, **filters), axis=-1).astype(jnp.int32)
