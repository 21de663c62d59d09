"""Continuing texts with a decoder and its caches, in one compiled loop."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax import nn
from qkv_jax.inference.sampling import check_sampling, penalised, sample
from qkv_jax.ops.cache import Cache

STREAMED = 16  # tokens of a stream that are computed at once


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
        if seen is not None:
            logits = penalised(logits, seen, self.repetition_penalty)
        filters = dataclasses.asdict(self)
        del filters["repetition_penalty"]
        return jax.vmap(functools.partial(sample, **filters))(logits, rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Where a generation stands: what it has read, and what comes next.

    Args:
      text: the tokens in the cache, int32 [B, capacity]; from `lengths` on they mean nothing.
      lengths: of the rows, int32 [B].
      logits: of the next token, float32 [B, V].
      cache: of the model, after `lengths` tokens.
      rngs: a key for each row.
      number: of the next token, from 0.
      done: whether a row has had a stop token, bool [B].
      seen: which tokens a row has had, bool [B, V]; None: nobody asks.
    """

    text: jax.Array
    lengths: jax.Array
    logits: jax.Array
    cache: Any
    rngs: jax.Array
    number: jax.Array
    done: jax.Array
    seen: jax.Array | None


def generate(
    graphdef: nnx.GraphDef,
    params: nn.Params,
    prompt: np.ndarray | jax.Array,
    *,
    num_tokens: int,
    context: int,
    rng: jax.Array,
    lengths: np.ndarray | jax.Array | None = None,
    num_samples: int = 1,
    stop: Sequence[int] = (),
    kind: type[Cache] = Cache,
    **sampling: Any,
) -> jax.Array:
    """Continues prompts, token by token, in one compiled loop that keeps what it has read.

    A text that has grown to `context` tokens is read again from the last half of them on, and goes
    on from there: so the model never sees more than `context` tokens, and beyond the first that
    many never less than half. What a row becomes depends on the key, its number and its prompt
    alone, not on the others.

    Args:
      graphdef, params: a decoder with `init_cache`, `extend` and `logits`, as `nn.split` gives it.
      prompt: integers [B, P], P >= 1; of a longer one than `context` the end.
      num_tokens: how many tokens to add.
      context: the most tokens that the model sees, at least 2.
      rng: a key.
      lengths: of the prompts, integers [B] from 1 to P: what follows is padding. None: P.
      num_samples: continuations of each prompt, which is read once.
      stop: ids after which a row ends; from there on it repeats the id.
      kind: of the cache of keys and values, such as `ops.cache.QuantizedCache`.
      **sampling: see `Sampling`.

    Returns:
      int32 [B * num_samples, num_tokens], without the prompts, the samples of one side by side.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    chosen = Sampling(**sampling)
    prompt, lengths = _checked(prompt, lengths, num_tokens, context, num_samples)
    return _generate(
        graphdef, params, prompt, lengths, rng, num_tokens=num_tokens, context=context,
        num_samples=num_samples, stop=tuple(stop), kind=kind, sampling=chosen,
    )  # fmt: skip


def stream(
    graphdef: nnx.GraphDef,
    params: nn.Params,
    prompt: np.ndarray | jax.Array,
    *,
    num_tokens: int,
    context: int,
    rng: jax.Array,
    stop: Sequence[int] = (),
    kind: type[Cache] = Cache,
    **sampling: Any,
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, a few at a time, as they come; it ends where all rows have ended.

    Arguments as in `generate`.

    Yields:
      int32 [B, up to `STREAMED`].
    """
    chosen = Sampling(**sampling)
    prompt, lengths = _checked(prompt, None, num_tokens, context, 1)
    shared = {"equal": True, "sampling": chosen, "stop": tuple(stop)}
    capacity = _capacity(prompt.shape[1], num_tokens, context)
    state = _start(
        graphdef, params, prompt, lengths, rng, capacity=capacity, num_samples=1, kind=kind,
        sampling=chosen,
    )  # fmt: skip
    used = prompt.shape[1]
    while num_tokens > 0:
        if used == capacity:
            used = _half(context)
            state = _refilled(graphdef, params, state, half=used, equal=True, kind=kind)
        number = min(STREAMED, num_tokens, capacity - used)
        state, tokens = _advance(graphdef, params, state, number=number, **shared)
        yield np.asarray(tokens)
        used, num_tokens = used + number, num_tokens - number
        if stop and bool(state.done.all()):
            return


def _checked(
    prompt: Any, lengths: Any, num_tokens: int, context: int, num_samples: int
) -> tuple[jax.Array, jax.Array | None]:
    """Prompts of at most `context` tokens, and their lengths."""
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 2 or prompt.shape[1] < 1 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(
            f"prompt: wanted integers [B, P] with P >= 1, got {prompt.dtype} {list(prompt.shape)}"
        )
    for name, value, least in (
        ("num_tokens", num_tokens, 1), ("context", context, 2), ("num_samples", num_samples, 1),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name}: wanted at least {least}, got {value}")
    B, P = prompt.shape
    if lengths is None:
        return prompt[:, -context:].astype(jnp.int32), None
    lengths = np.asarray(lengths)
    if lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > P:
        raise ValueError(f"lengths: wanted [B] = [{B}] integers from 1 to {P}, got {lengths}")
    kept = np.minimum(lengths, context)
    return _ends(prompt, lengths, kept, min(P, context)), jnp.asarray(kept, jnp.int32)


def _ends(text: jax.Array, lengths: jax.Array, kept: jax.Array, size: int) -> jax.Array:
    """The last `kept` of the `lengths` tokens of each row, [B, size], then padding."""
    places = jnp.reshape(lengths - kept, (-1, 1)) + jnp.arange(size)
    places = jnp.minimum(places, text.shape[1] - 1)
    return jnp.take_along_axis(text, places, axis=1).astype(jnp.int32)


def _capacity(P: int, num_tokens: int, context: int) -> int:
    return min(context, P + num_tokens)


def _half(context: int) -> int:
    return max(context // 2, 1)


@functools.partial(
    jax.jit,
    static_argnames=(
        "graphdef", "num_tokens", "context", "num_samples", "stop", "kind", "sampling",
    ),
)  # fmt: skip
def _generate(
    graphdef, params, prompt, lengths, rng, *, num_tokens, context, num_samples, stop, kind,
    sampling,
):  # fmt: skip
    P = prompt.shape[1]
    capacity, half = _capacity(P, num_tokens, context), _half(context)
    state = _start(
        graphdef, params, prompt, lengths, rng, capacity=capacity, num_samples=num_samples,
        kind=kind, sampling=sampling,
    )  # fmt: skip
    equal = lengths is None
    advance = functools.partial(
        _advance, graphdef, params, equal=equal, sampling=sampling, stop=stop
    )
    # Until the cache is full, then from half to full as often as it takes: all known beforehand.
    first = min(num_tokens, capacity - P)
    outs = []
    if first:
        state, out = advance(state, number=first)
        outs.append(out)
    times, rest = divmod(num_tokens - first, context - half)

    def again(state: Decoding, number: int) -> tuple[Decoding, jax.Array]:
        state = _refilled(graphdef, params, state, half=half, equal=equal, kind=kind)
        return advance(state, number=number)

    if times:
        state, out = jax.lax.scan(
            lambda state, _: again(state, context - half), state, length=times
        )
        outs.append(jnp.moveaxis(out, 0, 1).reshape(out.shape[1], -1))
    if rest:
        outs.append(again(state, rest)[1])
    return jnp.concatenate(outs, axis=1)


@functools.partial(
    jax.jit, static_argnames=("graphdef", "capacity", "num_samples", "kind", "sampling")
)
def _start(graphdef, params, prompt, lengths, rng, *, capacity, num_samples, kind, sampling):
    """The state after the prompts."""
    B, P = prompt.shape
    cache, logits = _read(graphdef, params, prompt, lengths, capacity, kind)
    filled = jnp.full(B, P, jnp.int32) if lengths is None else lengths
    text = jnp.zeros((B, capacity), jnp.int32).at[:, :P].set(prompt)
    seen = None
    if sampling.repetition_penalty != 1:
        real = jnp.arange(P) < filled[:, None]
        seen = jnp.zeros((B, logits.shape[-1]), bool)
        seen = seen.at[jnp.arange(B)[:, None], prompt].max(real)
    # Every sample goes on from what its prompt has left.
    rows = jax.tree.map(
        lambda x: jnp.repeat(x, num_samples, axis=0), (text, filled, logits, cache, seen)
    )
    text, filled, logits, cache, seen = rows
    rngs = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(B * num_samples))
    done = jnp.zeros(B * num_samples, bool)
    return Decoding(text, filled, logits, cache, rngs, jnp.int32(0), done, seen)


@functools.partial(
    jax.jit, static_argnames=("graphdef", "number", "equal", "sampling", "stop"),
    donate_argnames=("state",),
)  # fmt: skip
def _advance(graphdef, params, state, *, number, equal, sampling, stop):
    """The state after so many more tokens, for which the cache has room, and these [B, number].

    `equal`: all rows have the same length, which spares the caches a scatter.
    """
    model, rows = nn.merge(graphdef, params), jnp.arange(len(state.lengths))

    def unfinished(carry: tuple[jax.Array, Decoding, jax.Array]) -> jax.Array:
        i, state, _ = carry
        return (i < number) & ~state.done.all()

    def step(carry: tuple[jax.Array, Decoding, jax.Array]) -> tuple:
        i, state, out = carry
        rngs = jax.vmap(jax.random.fold_in, (0, None))(state.rngs, state.number)
        token = sampling(state.logits, rngs, state.seen)
        done = state.done
        if stop:
            token = jnp.where(done, state.text[rows, state.lengths - 1], token)
            done = done | jnp.isin(token, jnp.asarray(stop, jnp.int32))
        positions = state.lengths[:1] if equal else state.lengths[:, None]
        x, cache = model.extend(
            token[:, None], unpacked(state.cache, len(rows)), positions=positions
        )
        after = Decoding(
            text=state.text.at[rows, state.lengths].set(token),
            lengths=state.lengths + 1,
            logits=model.logits(x)[:, 0],
            cache=packed(cache, len(rows)),
            rngs=state.rngs,
            number=state.number + 1,
            done=done,
            seen=state.seen if state.seen is None else state.seen.at[rows, token].set(True),
        )
        return i + 1, after, out.at[:, i].set(token)

    out = jnp.zeros((len(rows), number), jnp.int32)
    state = dataclasses.replace(state, cache=packed(state.cache, len(rows)))
    i, state, out = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, out))
    state = dataclasses.replace(state, cache=unpacked(state.cache, len(rows)))
    if stop:  # where all rows have ended early
        last = state.text[rows, state.lengths - 1]
        out = jnp.where(jnp.arange(number) < i, out, last[:, None])
    return state, out


def packed(cache: Any, batch: int) -> Any:
    """A cache as a loop on a CPU had better carry it: of one row without the batch's axis.

    XLA takes axes of 1 out of products, and would keep the cache in both shapes, each a copy of the
    other, in every step.
    """
    return jax.tree.map(lambda x: x[0], cache) if batch == 1 else cache


def unpacked(cache: Any, batch: int) -> Any:
    """The inverse of `packed`."""
    return jax.tree.map(lambda x: x[None], cache) if batch == 1 else cache


@functools.partial(jax.jit, static_argnames=("graphdef", "half", "equal", "kind"))
def _refilled(graphdef, params, state, *, half, equal, kind):
    """The state of one that has read the last `half` tokens of each row alone.

    The logits stay: all that was there until now has had a say in the next token.
    """
    kept = jnp.minimum(state.lengths, half)
    text = _ends(state.text, state.lengths, kept, half)
    capacity = state.text.shape[1]
    cache, _ = _read(graphdef, params, text, None if equal else kept, capacity, kind)
    text = jnp.zeros_like(state.text).at[:, :half].set(text)
    return dataclasses.replace(state, text=text, lengths=kept, cache=cache)


def _read(graphdef, params, text, lengths, capacity, kind):
    """The cache after texts [B, P], and the logits [B, V] of what comes next."""
    model = nn.merge(graphdef, params)
    B, P = text.shape
    cache = model.init_cache(B, capacity, kind=kind)
    x, cache = model.extend(text, cache, positions=jnp.arange(P), lengths=lengths)
    last = x[:, -1:] if lengths is None else x[jnp.arange(B), lengths - 1][:, None]
    return cache, model.logits(last)[:, 0]
