"""The likeliest continuations of texts, by beam search over the same caches."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax import nn
from qkv_jax.inference.decoding import capacity_for, start, write
from qkv_jax.inference.prompts import Prompts, at_least
from qkv_jax.ops.cache import Cache, CacheKind
from qkv_jax.ops.paged import Pages


class Hypotheses(NamedTuple):
    """What a beam search has found, the best first.

    Args:
      tokens: int32 [B, n, num_tokens], without the prompts; from a stop token on it alone.
      scores: float32 [B, n]; -inf where there are fewer texts than were asked for.
    """

    tokens: jax.Array
    scores: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """A `Choice`: of all continuations of a prompt's K beams the likeliest K go on.

    Args:
      written: int32 [B, K, num_tokens], up to `number`.
      number: of the next token, from 0.
      logs: the sum of the log probabilities of a beam's tokens, float32 [B, K].
      found: what has ended, the best first.
      length_penalty: float32; another one compiles nothing new.
      num_results, stop: see `beam_search`.
    """

    written: jax.Array
    number: jax.Array
    logs: jax.Array
    found: Hypotheses
    length_penalty: jax.Array
    num_results: int = dataclasses.field(metadata={"static": True})
    stop: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def none(
        cls,
        batch: int,
        beams: int,
        num_tokens: int,
        *,
        length_penalty: float | jax.Array,
        num_results: int,
        stop: tuple[int, ...],
    ) -> Self:
        """Before the first token."""
        written = jnp.zeros((batch, beams, num_tokens), jnp.int32)
        nothing = jnp.full((batch, beams), -jnp.inf)
        logs = nothing.at[:, 0].set(0)  # at first all beams are one
        return cls(
            written, jnp.int32(0), logs, Hypotheses(written, nothing), jnp.float32(length_penalty),
            num_results, stop,
        )  # fmt: skip

    def choose(self, logits: jax.Array) -> tuple[Self, jax.Array, jax.Array | None]:
        """The next token of each beam, int32 [B K], from logits [B K, V], and whom it continues."""
        B, K, T = self.written.shape
        V = logits.shape[-1]
        logs = jax.nn.log_softmax(logits).reshape(B, K, V) + self.logs[..., None]
        # Each beam may end in so many ways, and K that go on are wanted beside those.
        number = min(K * (1 + len(self.stop)), K * V)
        logs, places = jax.lax.top_k(logs.reshape(B, K * V), number)
        parents, tokens = places // V, (places % V).astype(jnp.int32)
        texts = jnp.take_along_axis(self.written, parents[..., None], axis=1)
        texts = jnp.where(jnp.arange(T) >= self.number, tokens[..., None], texts)
        ends = jnp.isin(tokens, jnp.asarray(self.stop, jnp.int32)) | (self.number == T - 1)
        after = self.number + 1
        results = ends & (jnp.arange(number) < K)
        scores = jnp.where(results, self._scores(logs, after), -jnp.inf)
        found = Hypotheses(*map(functools.partial(jnp.concatenate, axis=1), zip(
            self.found, (texts, scores), strict=True
        )))  # fmt: skip
        best = jax.lax.top_k(found.scores, K)[1]
        logs, going = jax.lax.top_k(jnp.where(ends, -jnp.inf, logs), K)
        rows = jnp.arange(B)[:, None]
        state = dataclasses.replace(
            self, written=texts[rows, going], number=after, logs=logs,
            found=Hypotheses(*(x[rows, best] for x in found)),
        )  # fmt: skip
        continued = (rows * K + parents[rows, going]).reshape(-1)
        return state, tokens[rows, going].reshape(-1), None if K == 1 else continued

    def _scores(self, logs: jax.Array, length: int | jax.Array) -> jax.Array:
        return logs / jnp.float32(length) ** self.length_penalty

    @property
    def ended(self) -> jax.Array:
        """Whether no beam can become better than the results that are there.

        Log probabilities only fall, so that the best that a beam can reach is its sum now, by the
        length that is the best for it: the next or the last, as the penalty is.
        """
        T = self.written.shape[-1]
        likeliest = self.logs.max(axis=1)
        lengths = (self.number + 1, T)
        reached = functools.reduce(jnp.maximum, (self._scores(likeliest, n) for n in lengths))
        return (self.found.scores[:, self.num_results - 1] >= reached).all()


def beam_search(
    graphdef: nnx.GraphDef,
    params: nn.Params,
    prompt: np.ndarray | jax.Array,
    *,
    num_tokens: int,
    context: int,
    beams: int,
    num_results: int = 1,
    length_penalty: float = 1.0,
    lengths: np.ndarray | jax.Array | None = None,
    sources: np.ndarray | jax.Array | None = None,
    source_lengths: np.ndarray | jax.Array | None = None,
    stop: Sequence[int] = (),
    kind: CacheKind = Cache,
) -> Hypotheses:
    """The likeliest continuations of prompts that a search with so many beams finds.

        score = sum over t = 1..L of log p(y[t] | y[1..t-1], prompt) / L ** length_penalty

    L counts the stop token. In each step the K likeliest continuations of K beams go on; of the
    likeliest K of all those that end are results. The search goes on until no beam can become
    better than its results, or up to `num_tokens`, where all beams end. Graves 2012,
    arxiv.org/abs/1211.3711; the penalty is transformers', for Wu et al. 2016,
    arxiv.org/abs/1609.08144, have ((5 + L) / 6) ** alpha, and so is what counts as an end
    (`early_stopping="never"`).

    Args:
      graphdef, params, prompt, num_tokens, context, lengths, sources, source_lengths, kind: as in
        `generate`; beams share no `ops.paged.Pages`.
      beams: K. One without stop tokens is the likeliest token each time.
      num_results: how many of the best to return, n, at most K.
      length_penalty: 0 compares sums, in which short texts win; 1 means; more than 1 prefers long
        texts.
      stop: ids with which a text ends.

    Returns:
      Tokens int32 [B, n, num_tokens] and scores float32 [B, n].

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    at_least(1, beams=beams, num_results=num_results)
    if num_results > beams:
        raise ValueError(f"num_results: wanted at most beams = {beams}, got {num_results}")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty: wanted a finite number, got {length_penalty}")
    if isinstance(kind, Pages):
        raise ValueError(
            "kind: wanted a cache whose rows can be copied, got Pages, which all share"
        )
    prompts = Prompts.checked(
        nn.merge(graphdef, params).config, prompt, lengths, sources, source_lengths,
        num_tokens=num_tokens, context=context, copies=beams, kind=kind,
    )  # fmt: skip
    return _beam_search(
        graphdef, params, prompts, length_penalty, num_tokens=num_tokens, context=context,
        beams=beams, kind=kind, num_results=num_results, stop=tuple(stop),
    )  # fmt: skip


SETTINGS = ("num_tokens", "context", "beams", "kind", "num_results", "stop")


@functools.partial(jax.jit, static_argnames=("graphdef", *SETTINGS))
def _beam_search(
    graphdef, params, prompts, length_penalty, *, num_tokens, context, beams, kind, num_results,
    stop,
):  # fmt: skip
    B, P = prompts.tokens.shape
    none = Beams.none(
        B, beams, num_tokens, length_penalty=length_penalty, num_results=num_results, stop=stop
    )
    state = start(
        graphdef, params, prompts, lambda *_: none, copies=beams, kind=kind,
        capacity=capacity_for(P, num_tokens, context),
    )  # fmt: skip
    choice = write(
        graphdef, params, state, read=P, num_tokens=num_tokens, context=context, kind=kind
    )
    return Hypotheses(*(x[:, :num_results] for x in choice.found))
