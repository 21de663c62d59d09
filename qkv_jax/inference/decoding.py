"""Writing token by token, in one compiled loop over caches, however the tokens are chosen.

A step reads the token that was chosen last and chooses the next one by its logits. What it is
chosen by is a `Choice`: a draw for each row (`generation.Draws`), or the best of all beams
(`beam.Beams`). The model is a decoder, or an encoder-decoder that has read a source.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax import nn
from qkv_jax.inference.prompts import Prompts, ends
from qkv_jax.ops.cache import CacheKind
from qkv_jax.ops.paged import Pages


class Choice(Protocol):
    """What next tokens are chosen by: a pytree, whose settings are static."""

    def choose(self, logits: jax.Array) -> tuple[Self, jax.Array, jax.Array | None]:
        """From logits [B, V]: what it is then, tokens int32 [B], and the rows whose texts they
        continue, int32 [B]; None: each its own."""

    @property
    def ended(self) -> jax.Array:
        """Whether no more tokens are wanted, bool."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Where a generation stands: what it has read, and what comes next.

    Args:
      text: the tokens in the cache, int32 [B, capacity]; from `lengths` on they mean nothing.
      lengths: of the rows, int32 [B].
      cache: of the model, after `lengths` tokens; of an encoder-decoder a pair, of which the second
        is of the source and stays.
      source: what an encoder-decoder's `extend` takes besides; None: it is a decoder.
      token: of each row, to be read next, int32 [B].
      choice: what it was chosen by.
      equal: whether all rows have the same length, which spares the caches a scatter.
    """

    text: jax.Array
    lengths: jax.Array
    cache: Any
    source: dict[str, jax.Array | None] | None
    token: jax.Array
    choice: Any
    equal: bool = dataclasses.field(metadata={"static": True})


def start(
    graphdef: nnx.GraphDef,
    params: nn.Params,
    prompts: Prompts,
    make: Callable[[jax.Array, jax.Array, jax.Array], Choice],
    *,
    capacity: int,
    copies: int,
    kind: CacheKind,
) -> Decoding:
    """The state after the prompts, each read once, and the first token of each copy.

    Args:
      graphdef, params: the model.
      prompts: what it reads.
      make: of the texts, their lengths and the logits, each of all copies: how to choose.
      capacity: the most tokens that a row of the cache holds.
      copies: how many rows go on from each prompt, side by side.
      kind: of the cache.
    """
    model = nn.merge(graphdef, params)
    if isinstance(kind, Pages):  # rows cannot share the pages that each of them will write to
        prompts, copies = prompts.repeated(copies), 1
    B, P = prompts.tokens.shape
    source = None
    if prompts.sources is None:
        cache = model.init_cache(B, capacity, kind=kind)
    else:
        source = {"source_lengths": prompts.source_lengths}
        cache = model.init_cache(model.encode(prompts.sources, **source), capacity, kind=kind)
    x, cache = model.extend(
        prompts.tokens, cache, positions=jnp.arange(P), lengths=prompts.lengths, **(source or {})
    )
    equal = prompts.lengths is None
    lengths = jnp.full(B, P, jnp.int32) if equal else prompts.lengths
    last = x[:, -1:] if equal else x[jnp.arange(B), lengths - 1][:, None]
    text = jnp.zeros((B, capacity), jnp.int32).at[:, :P].set(prompts.tokens)
    rows = text, lengths, cache, source, model.logits(last)[:, 0]
    if copies > 1:
        rows = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), rows)
    text, lengths, cache, source, logits = rows
    # Which row a first token continues does not matter: copies are equal.
    choice, token, _ = make(text, lengths, logits).choose(logits)
    return Decoding(text, lengths, cache, source, token, choice, equal)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("state",))
def advance(
    graphdef: nnx.GraphDef, params: nn.Params, state: Decoding, number: int | jax.Array
) -> Decoding:
    """The state after so many more tokens, for which the cache has room, or when all is written."""
    model, cache = nn.merge(graphdef, params), state.cache

    def unfinished(carry: tuple[jax.Array, Decoding]) -> jax.Array:
        i, state = carry
        return (i < number) & ~state.choice.ended

    def step(carry: tuple[jax.Array, Decoding]) -> tuple[jax.Array, Decoding]:
        i, state = carry
        state = _next(model, dataclasses.replace(state, cache=unpacked(state.cache, cache)))
        return i + 1, dataclasses.replace(state, cache=packed(state.cache))

    state = dataclasses.replace(state, cache=packed(cache))
    _, state = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))
    return dataclasses.replace(state, cache=unpacked(state.cache, cache))


def _next(model: nnx.Module, state: Decoding) -> Decoding:
    """The state one token later."""
    positions = state.lengths[:1] if state.equal else state.lengths[:, None]
    x, cache = model.extend(
        state.token[:, None], state.cache, positions=positions, **(state.source or {})
    )
    text = state.text.at[jnp.arange(len(state.lengths)), state.lengths].set(state.token)
    choice, token, continued = state.choice.choose(model.logits(x)[:, 0])
    if continued is not None:
        own, *of_source = [cache] if state.source is None else cache
        text, own = jax.tree.map(lambda x: x[continued], (text, own))
        cache = own if state.source is None else (own, *of_source)
    return dataclasses.replace(
        state, text=text, lengths=state.lengths + 1, cache=cache, token=token,
        choice=choice,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("graphdef", "context", "kind"))
def refilled(
    graphdef: nnx.GraphDef, params: nn.Params, state: Decoding, *, context: int, kind: CacheKind
) -> Decoding:
    """The state of one that has read the last half of `context` tokens of each row alone.

    The next token stays: all that was there until now has had a say in it.
    """
    model, half = nn.merge(graphdef, params), context // 2
    B, capacity = state.text.shape
    kept = jnp.minimum(state.lengths, half)
    text = ends(state.text, state.lengths, kept, half)
    _, cache = model.extend(
        text, model.init_cache(B, capacity, kind=kind), positions=jnp.arange(half),
        lengths=None if state.equal else kept,
    )  # fmt: skip
    text = jnp.zeros_like(state.text).at[:, :half].set(text)
    return dataclasses.replace(state, text=text, lengths=kept, cache=cache)


def write(
    graphdef: nnx.GraphDef,
    params: nn.Params,
    state: Decoding,
    *,
    read: int,
    num_tokens: int,
    context: int,
    kind: CacheKind,
) -> Choice:
    """What has been chosen when `num_tokens` are written, of which `state` has the first.

    Args:
      graphdef, params: the model.
      state: what `start` returned.
      read: tokens of the longest prompt.
      num_tokens: of each row. The last one is not read.
      context: a text that has grown to so many tokens goes on from its last half.
      kind: of the cache.
    """
    # Until the cache is full, then from half to full as often as it takes: all known beforehand.
    first = min(num_tokens - 1, state.text.shape[1] - read)
    part = context - context // 2
    times, rest = divmod(num_tokens - 1 - first, part)

    def again(state: Decoding, number: int) -> Decoding:
        state = refilled(graphdef, params, state, context=context, kind=kind)
        return advance(graphdef, params, state, number)

    if first:
        state = advance(graphdef, params, state, first)
    if times:
        state = jax.lax.fori_loop(0, times, lambda _, state: again(state, part), state)
    if rest:
        state = again(state, rest)
    return state.choice


def capacity_for(read: int, num_tokens: int, context: int) -> int:
    """How many tokens a row of the cache holds, after prompts of `read` tokens."""
    return min(context, read + num_tokens - 1)


def packed(cache: Any) -> Any:
    """A cache as a loop on a CPU had better carry it: without axes of 1.

    XLA takes these out of products, and would keep the cache in both shapes, each a copy of the
    other, in every step.
    """
    return jax.tree.map(jnp.squeeze, cache)


def unpacked(cache: Any, like: Any) -> Any:
    """The inverse of `packed`, for a cache of the shapes of `like`."""
    return jax.tree.map(lambda x, y: x.reshape(y.shape), cache, like)
