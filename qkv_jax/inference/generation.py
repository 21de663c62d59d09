"""Continuing texts with a decoder and its caches, each token drawn from its logits."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax import nn
from qkv_jax.inference.decoding import Decoding, advance, capacity_for, refilled, start, write
from qkv_jax.inference.prompts import Prompts, at_least
from qkv_jax.inference.sampling import Sampling
from qkv_jax.ops.cache import Cache, CacheKind

STREAMED = 16  # tokens of a stream that are computed at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """A `Choice`: each row draws for itself.

    Args:
      written: int32 [B, num_tokens], up to `number`.
      number: of the next token, from 0.
      rngs: a key for each row.
      done: whether a row has had a stop token, bool [B].
      seen: which tokens a row has had, bool [B, V]; None: nobody asks.
      sampling, stop: see `generate`.
    """

    written: jax.Array
    number: jax.Array
    rngs: jax.Array
    done: jax.Array
    seen: jax.Array | None
    sampling: Sampling = dataclasses.field(metadata={"static": True})
    stop: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def none(
        cls,
        text: jax.Array,
        lengths: jax.Array,
        logits: jax.Array,
        *,
        num_tokens: int,
        rng: jax.Array,
        sampling: Sampling,
        stop: tuple[int, ...],
    ) -> Self:
        """Before the first token, after texts [B, capacity] and their logits [B, V]."""
        B = len(text)
        seen = None
        if sampling.repetition_penalty != 1:
            real = jnp.arange(text.shape[1]) < lengths[:, None]
            seen = jnp.zeros(logits.shape, bool).at[jnp.arange(B)[:, None], text].max(real)
        rngs = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(B))
        written = jnp.zeros((B, num_tokens), jnp.int32)
        return cls(written, jnp.int32(0), rngs, jnp.zeros(B, bool), seen, sampling, stop)

    def choose(self, logits: jax.Array) -> tuple[Self, jax.Array, None]:
        """A token for each row, int32 [B], from logits [B, V]."""
        rngs = jax.vmap(jax.random.fold_in, (0, None))(self.rngs, self.number)
        token, done, seen = self.sampling(logits, rngs, self.seen), self.done, self.seen
        if self.stop:
            token = jnp.where(done, self.written[:, self.number - 1], token)
            done = done | jnp.isin(token, jnp.asarray(self.stop, jnp.int32))
        if seen is not None:
            seen = seen.at[jnp.arange(len(token)), token].set(True)
        written = self.written.at[:, self.number].set(token)
        after = dataclasses.replace(
            self, written=written, number=self.number + 1, done=done, seen=seen
        )
        return after, token, None

    @property
    def ended(self) -> jax.Array:
        """Whether all rows have ended."""
        return self.done.all()

    @property
    def tokens(self) -> jax.Array:
        """Int32 [B, num_tokens]; where all rows ended early, their stop tokens to the end."""
        last = self.written[:, self.number - 1]
        places = jnp.arange(self.written.shape[1])
        return jnp.where(places < self.number, self.written, last[:, None])


def generate(
    graphdef: nnx.GraphDef,
    params: nn.Params,
    prompt: np.ndarray | jax.Array,
    *,
    num_tokens: int,
    context: int,
    rng: jax.Array,
    lengths: np.ndarray | jax.Array | None = None,
    sources: np.ndarray | jax.Array | None = None,
    source_lengths: np.ndarray | jax.Array | None = None,
    num_samples: int = 1,
    stop: Sequence[int] = (),
    kind: CacheKind = Cache,
    **sampling: Any,
) -> jax.Array:
    """Continues prompts, token by token, in one compiled loop that keeps what it has read.

    A text that has grown to `context` tokens is read again from the last half of them on, and goes
    on from there: so the model never sees more than `context` tokens, and beyond the first that
    many never less than half. What a row becomes depends on the key, its number and its prompt
    alone, not on the others.

    Args:
      graphdef, params: a decoder with `init_cache`, `extend` and `logits`, as `nn.split` gives it,
        or with sources an encoder-decoder that has `encode`, too.
      prompt: integers [B, P] in [0, V), P >= 1; of a longer one than `context` the end.
      num_tokens: how many tokens to add.
      context: the most tokens that the model sees, at least 2.
      rng: a key.
      lengths: of the prompts, integers [B] from 1 to P: what follows is padding. None: P.
      sources: what an encoder-decoder reads, integers [B, S]; prompts and new tokens then have to
        fit into `context`.
      source_lengths: integers [B] from 1 to S; None: S.
      num_samples: continuations of each prompt, which is read once.
      stop: ids after which a row ends; from there on it repeats the id.
      kind: of the cache of keys and values, such as `ops.cache.QuantizedCache`; `ops.paged.Pages`
        need as many pages as the rows may fill.
      **sampling: see `Sampling`.

    Returns:
      int32 [B * num_samples, num_tokens], without the prompts, the samples of one side by side.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    chosen = Sampling(**sampling)
    at_least(1, num_samples=num_samples)
    prompts = Prompts.checked(
        nn.merge(graphdef, params).config, prompt, lengths, sources, source_lengths,
        num_tokens=num_tokens, context=context, copies=num_samples, kind=kind,
    )  # fmt: skip
    return _generate(
        graphdef, params, prompts, rng, num_tokens=num_tokens, context=context,
        num_samples=num_samples, stop=tuple(stop), kind=kind, sampling=chosen,
    )  # fmt: skip


SETTINGS = ("num_tokens", "context", "num_samples", "stop", "kind", "sampling")


@functools.partial(jax.jit, static_argnames=("graphdef", *SETTINGS))
def _begun(
    graphdef, params, prompts, rng, *, num_tokens, context, num_samples, stop, kind, sampling
) -> Decoding:
    """The prompts read, and the first token of each row chosen."""
    none = functools.partial(
        Draws.none, num_tokens=num_tokens, rng=rng, sampling=sampling, stop=stop
    )
    capacity = capacity_for(prompts.tokens.shape[1], num_tokens, context)
    return start(graphdef, params, prompts, none, capacity=capacity, copies=num_samples, kind=kind)


@functools.partial(jax.jit, static_argnames=("graphdef", *SETTINGS))
def _generate(graphdef, params, prompts, rng, *, num_tokens, context, kind, **settings):
    shared = {"num_tokens": num_tokens, "context": context, "kind": kind}
    state = _begun(graphdef, params, prompts, rng, **shared, **settings)
    return write(graphdef, params, state, read=prompts.tokens.shape[1], **shared).tokens


def stream(
    graphdef: nnx.GraphDef,
    params: nn.Params,
    prompt: np.ndarray | jax.Array,
    *,
    num_tokens: int,
    context: int,
    rng: jax.Array,
    stop: Sequence[int] = (),
    kind: CacheKind = Cache,
    **sampling: Any,
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, a few at a time, as they come; it ends where all rows have ended.

    The first one comes alone, as soon as the prompt is read: before the loop has compiled.
    Arguments and errors as in `generate`.

    Yields:
      int32 [B, up to `STREAMED`].
    """
    chosen = Sampling(**sampling)
    prompts = Prompts.checked(
        nn.merge(graphdef, params).config,
        prompt,
        num_tokens=num_tokens,
        context=context,
        copies=1,
        kind=kind,
    )
    settings = {"stop": tuple(stop), "sampling": chosen, "num_samples": 1}
    return _stream(
        graphdef, params, prompts, rng, num_tokens=num_tokens, context=context, kind=kind,
        **settings,
    )  # fmt: skip


def _stream(graphdef, params, prompts, rng, *, num_tokens, context, kind, **settings):
    state = _begun(
        graphdef, params, prompts, rng, num_tokens=num_tokens, context=context, kind=kind,
        **settings,
    )  # fmt: skip
    read, capacity = prompts.tokens.shape[1], state.text.shape[1]
    given = 0
    while True:
        number = int(state.choice.number)
        yield np.asarray(state.choice.written)[:, given:number].copy()
        given = number
        if given == num_tokens or state.choice.ended:
            return
        if read == capacity:
            state, read = (
                refilled(graphdef, params, state, context=context, kind=kind),
                context // 2,
            )
        number = min(STREAMED, num_tokens - given, capacity - read)
        state = advance(graphdef, params, state, number)
        read += number
