"""Continuing texts with a small model's drafts, of which a large one takes what it would have said.

Reading a few tokens costs a large model about what one costs, because its parameters are fetched
once. So a draft model writes some tokens one by one, the target reads all of them in one pass, and
a rule keeps as many as leaves the distribution of the text exactly the target's.

Leviathan et al. 2023, arxiv.org/abs/2211.17192; Chen et al. 2023, arxiv.org/abs/2302.01318.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax import nn
from qkv_jax.inference.decoding import capacity_for, packed, unpacked
from qkv_jax.inference.prompts import Prompts, at_least, ends
from qkv_jax.inference.sampling import Sampling
from qkv_jax.ops.cache import Cache, CacheKind
from qkv_jax.ops.paged import Pages


class Speculation(NamedTuple):
    """Texts, and what they took.

    Args:
      tokens: as of `generate`, int32 [B, num_tokens].
      lengths: how many of these a row had when it ended, int32 [B].
      passes: of the target that each row took after its prompt, int32 [B].
      drafted: tokens that were proposed to it, not counting those beyond the end, int32 [B].
      accepted: how many of these it took, int32 [B].
    """

    tokens: jax.Array
    lengths: jax.Array
    passes: jax.Array
    drafted: jax.Array
    accepted: jax.Array


def speculate(
    graphdef: nnx.GraphDef,
    params: nn.Params,
    draft_graphdef: nnx.GraphDef,
    draft_params: nn.Params,
    prompt: np.ndarray | jax.Array,
    *,
    num_tokens: int,
    num_drafted: int,
    context: int,
    rng: jax.Array,
    stop: Sequence[int] = (),
    kind: CacheKind = Cache,
    **sampling: Any,
) -> Speculation:
    """Continues prompts as `generate` would: with its distribution, though not its very tokens.

    With top_k = 1 nothing is drawn, and the tokens are those of `generate`. In every pass of the
    target a row goes on by as many drafted tokens as it accepts, and one of the target's own; rows
    need not keep step.

    Args:
      graphdef, params: the target, a decoder as for `generate`.
      draft_graphdef, draft_params: a decoder with the same vocabulary, and, to be of use, with
        similar opinions at a much smaller cost.
      prompt: integers [B, P], P >= 1; of a longer one than `context` the end.
      num_tokens: how many tokens to add.
      num_drafted: how many tokens the draft model proposes each time, at least 1.
      context: the most tokens that the models see, as in `generate`. A learned table of positions
        must be longer by `num_drafted`, unless the whole text is as much shorter.
      rng: a key.
      stop: ids after which a row ends; from there on it repeats the id.
      kind: of the caches of keys and values, such as `ops.cache.QuantizedCache`.
      **sampling: see `Sampling`; the draft model's distribution is filtered like the target's.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    chosen = Sampling(**sampling)
    at_least(1, num_drafted=num_drafted)
    if isinstance(kind, Pages):
        raise ValueError("kind: wanted a cache with a slot for each position, got Pages")
    target, draft = nn.merge(graphdef, params).config, nn.merge(draft_graphdef, draft_params).config
    prompt = Prompts.checked(
        target, prompt, num_tokens=num_tokens, context=context, copies=1, kind=kind
    ).tokens
    longest = capacity_for(prompt.shape[1], num_tokens + 1, context)  # the last one is a draft's
    if draft.vocab_size != target.vocab_size:
        raise ValueError(
            f"draft_graphdef: wanted the target's vocabulary of {target.vocab_size} tokens, "
            f"got one of {draft.vocab_size}"
        )
    if draft.context < longest:
        raise ValueError(
            f"draft_graphdef: wanted a model whose context is at least the {longest} tokens that "
            f"it is to see, got one of {draft.context}"
        )
    for config in (target, draft):
        if config.position == "learned" and config.context < longest + num_drafted:
            raise ValueError(
                f"context: {longest} tokens and num_drafted = {num_drafted} that reach beyond them "
                f"wanted as many learned positions, got {config.context}; take fewer tokens"
            )
    return _speculate(
        graphdef, params, draft_graphdef, draft_params, prompt, rng, num_tokens=num_tokens,
        num_drafted=num_drafted, context=context, stop=tuple(stop), kind=kind, sampling=chosen,
    )  # fmt: skip


def verified(
    target: jax.Array, draft: jax.Array, drafted: jax.Array, rng: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How many drafted tokens stand, and the token that follows them: Leviathan's algorithm 1.

        d_i stands, if all before it do, with probability min(1, p_i(d_i) / q_i(d_i))
        the next token ~ max(p_i - q_i, 0) / sum, where d_i fell; p where none did

    Then a token has the distribution p: it comes as d with min(p, q), and otherwise with what p has
    more than q.

    Args:
      target: p, probabilities after each drafted token and before the first, float32 [n + 1, V].
      draft: q, those that the drafted tokens were drawn from, float32 [n, V].
      drafted: d, int32 [n].
      rng: a key.

    Returns:
      The number, int32 in [0, n], and a token, int32.
    """
    of_chance, of_token = jax.random.split(rng)
    places = jnp.arange(len(drafted))
    chances = jax.random.uniform(of_chance, len(drafted))
    stands = chances * draft[places, drafted] < target[places, drafted]
    number = jnp.sum(jnp.cumprod(stands))
    p, q = target[number], jnp.append(draft, jnp.zeros_like(draft[:1]), axis=0)[number]
    rest = jnp.maximum(p - q, 0)
    rest = jnp.where(jnp.any(rest > 0), rest, p)  # where rounding alone made a token fall
    return number, jax.random.categorical(of_token, jnp.log(rest)).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Where a speculation stands.

    Args:
      text: what the models see, int32 [B, size]; from `lengths` on it means nothing.
      lengths: of the rows, int32 [B].
      caches: of the target and the draft model, after all tokens of a row but the last.
      seen: which tokens a row has had, bool [B, V]; None: nobody asks.
      done: whether a row has ended, bool [B].
      result: so far.
    """

    text: jax.Array
    lengths: jax.Array
    caches: tuple[Any, Any]
    seen: jax.Array | None
    done: jax.Array
    result: Speculation


@functools.partial(
    jax.jit,
    static_argnames=(
        "graphdef", "draft_graphdef", "num_tokens", "num_drafted", "context", "stop", "kind",
        "sampling",
    ),
)  # fmt: skip
def _speculate(
    graphdef, params, draft_graphdef, draft_params, prompt, rng, *, num_tokens, num_drafted,
    context, stop, kind, sampling,
):  # fmt: skip
    B, P = prompt.shape
    target, draft = nn.merge(graphdef, params), nn.merge(draft_graphdef, draft_params)
    # Drafts reach beyond the last token that is wanted.
    room = capacity_for(P, num_tokens + 1, context) + num_drafted
    read = functools.partial(_read, (target, draft), room=room, kind=kind)
    rngs = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(B))
    first_caches = read(prompt[:, :-1])

    def step(carry: tuple[jax.Array, _State]) -> tuple[jax.Array, _State]:
        number, state = carry
        if P + num_tokens > context:
            state = jax.lax.cond(
                jnp.any(state.lengths > context),
                functools.partial(_refilled, read=read, context=context),
                lambda state: state,
                state,
            )
        of_target, of_draft = unpacked(state.caches, first_caches)
        keys, lengths = _folded(rngs, number), state.lengths - 1  # of what the caches hold
        inputs, q, drafted = _drafted(draft, of_draft, state, keys, num_drafted, sampling)
        x, extended = target.extend(
            inputs, of_target, positions=_positions(lengths, num_drafted + 1)
        )
        seen = state.seen
        if seen is not None:  # after each input
            given = jax.nn.one_hot(inputs, seen.shape[-1], dtype=jnp.int32)
            seen = seen[:, None] | (jnp.cumsum(given, axis=1) > 0)
        p = jax.nn.softmax(sampling.distribution(target.logits(x), seen))
        accepted, token = jax.vmap(verified)(p, q, inputs[:, 1:], _folded(keys, num_drafted))
        state = _written(state, inputs[:, 1:], accepted, token, context=context, stop=stop)
        kept = functools.partial(_kept, inputs=inputs, start=lengths, end=state.lengths - 1)
        caches = kept(target, of_target, extended), kept(draft, of_draft, drafted)
        return number + 1, dataclasses.replace(state, caches=packed(caches))

    seen = None
    if sampling.repetition_penalty != 1:
        rows = jnp.arange(B)[:, None]
        seen = jnp.zeros((B, target.config.vocab_size), bool).at[rows, prompt].set(True)
    zeros = jnp.zeros(B, jnp.int32)
    state = _State(
        text=jnp.zeros((B, room), jnp.int32).at[:, :P].set(prompt),
        lengths=zeros + P,
        caches=packed(first_caches),
        seen=seen,
        done=jnp.zeros(B, bool),
        result=Speculation(jnp.zeros((B, num_tokens), jnp.int32), zeros, zeros, zeros, zeros),
    )
    _, state = jax.lax.while_loop(lambda carry: ~carry[1].done.all(), step, (jnp.int32(0), state))
    out, written = state.result.tokens, state.result.lengths[:, None]
    last = jnp.take_along_axis(out, written - 1, axis=1)
    return state.result._replace(tokens=jnp.where(jnp.arange(num_tokens) < written, out, last))


def _drafted(draft, cache, state, keys, num_drafted, sampling):
    """The last token and those drafted after it, [B, n + 1], and what these were drawn from,
    [B, n, V]; and the draft model's cache after them."""
    rows, first, like = jnp.arange(len(state.lengths)), state.lengths - 1, cache

    def step(carry: tuple, i: jax.Array) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
        token, cache, seen = carry
        x, cache = draft.extend(
            token[:, None], unpacked(cache, like), positions=_positions(first + i, 1)
        )
        logits = sampling.distribution(draft.logits(x)[:, 0], seen)
        token = jax.vmap(jax.random.categorical)(_folded(keys, i), logits).astype(jnp.int32)
        if seen is not None:
            seen = seen.at[rows, token].set(True)
        return (token, packed(cache), seen), (token, jax.nn.softmax(logits))

    # A cache that is kept has to read the last draft too, which may be accepted.
    number = num_drafted + _overwrites(cache)
    last = state.text[rows, first]
    (_, cache, _), (tokens, q) = jax.lax.scan(
        step, (last, packed(cache), state.seen), jnp.arange(number)
    )
    inputs = jnp.concatenate([last[None], tokens[:num_drafted]]).T
    return inputs, jnp.moveaxis(q[:num_drafted], 0, 1), unpacked(cache, like)


def _written(state, drafted, accepted, token, *, context, stop):
    """The state, but for its caches, with the drafts [B, n] that were accepted and one token more:
    up to a stop token, the number that is wanted, or the first that `context` has no place for."""
    n, num_tokens = drafted.shape[1], state.result.tokens.shape[1]
    rows, places = jnp.arange(len(drafted))[:, None], jnp.arange(n + 1)
    tokens = jnp.append(drafted, token[:, None], axis=1)
    tokens = jnp.where(places == accepted[:, None], token[:, None], tokens)
    wanted = jnp.minimum(num_tokens - state.result.lengths, context + 1 - state.lengths)
    wanted = jnp.where(state.done, 0, wanted)
    count = jnp.minimum(accepted + 1, wanted)
    done = state.done
    if stop:
        ends = jnp.isin(tokens, jnp.asarray(stop, jnp.int32)) & (places < count[:, None])
        done = done | ends.any(axis=1)
        count = jnp.where(ends.any(axis=1), jnp.argmax(ends, axis=1) + 1, count)
    new = places < count[:, None]

    def put(x: jax.Array, first: jax.Array) -> jax.Array:
        at = jnp.where(new, first[:, None] + places, x.shape[1])
        return x.at[rows, at].set(tokens, mode="drop")

    before = state.result
    result = Speculation(
        tokens=put(before.tokens, before.lengths),
        lengths=before.lengths + count,
        passes=before.passes + ~state.done,
        drafted=before.drafted + jnp.minimum(n, wanted),
        accepted=before.accepted + jnp.minimum(accepted, wanted),
    )
    return dataclasses.replace(
        state,
        text=put(state.text, state.lengths),
        lengths=state.lengths + count,
        seen=state.seen if state.seen is None else state.seen.at[rows, tokens].max(new),
        done=done | (result.lengths == num_tokens),
        result=result,
    )


def _kept(model, before, after, *, inputs, start, end):
    """The cache after as many of the inputs [B, T] as stay, from those before and after all.

    `start` and `end`: the lengths of the texts in the cache before them and with those that stay.
    """
    if _overwrites(after):  # the rest lies behind the row's end: unseen, until it is overwritten
        return after
    positions = _positions(start, inputs.shape[1])
    return model.extend(inputs, before, positions=positions, lengths=end - start)[1]


def _overwrites(cache: Any) -> bool:
    """Whether all that a model keeps has a slot for each position; a state takes nothing back."""
    parts = jax.tree.leaves(cache, is_leaf=_is_cache)
    return all(_is_cache(part) and not part.rolling for part in parts)


def _is_cache(x: Any) -> bool:
    return isinstance(x, Cache)


def _refilled(state, *, read, context):
    """The state in which rows of more than `context` tokens go on from the last half, and one."""
    B, half, full = len(state.lengths), context // 2, state.lengths > context
    lengths = jnp.where(full, half + 1, state.lengths)
    text = ends(state.text, state.lengths, lengths, state.text.shape[1])

    def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(full.reshape(B, *[1] * (new.ndim - 1)), new, old)

    caches = read(text[:, :half])
    caches = jax.tree.map(chosen, caches, unpacked(state.caches, caches))
    return dataclasses.replace(state, text=text, lengths=lengths, caches=packed(caches))


def _read(models, text, *, room, kind):
    """The caches of models after texts [B, P], P >= 0."""
    B, P = text.shape
    caches = [model.init_cache(B, room, kind=kind) for model in models]
    if P == 0:
        return tuple(caches)
    pairs = zip(models, caches, strict=True)
    return tuple(model.extend(text, cache, positions=jnp.arange(P))[1] for model, cache in pairs)


def _positions(lengths: jax.Array, number: int) -> jax.Array:
    """Of so many next tokens, [B, number]; of one row [number], which spares caches a scatter."""
    positions = lengths[:, None] + jnp.arange(number)
    return positions[0] if len(lengths) == 1 else positions


def _folded(keys: jax.Array, number: Any) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)
