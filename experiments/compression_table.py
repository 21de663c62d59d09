"""Size, loss and speed of a run's decoder and of smaller ones made of it, in a table."""

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.setup import TrainedRun
from qkv_jax import inference, nn, training
from qkv_jax.models import Decoder
from qkv_jax.ops.cache import Cache, CacheKind

ROUNDS = 25  # in which the models decode in turn; the median counts


@dataclasses.dataclass(frozen=True)
class Row:
    """A model of the table, and what was measured.

    Args:
      name: in the table.
      megabytes: of its parameters.
      loss: over the full validation text, nats per token.
      cache: bytes that it keeps of a full context for a sequence.
      rate: tokens/s.
    """

    name: str
    megabytes: float
    loss: float
    cache: int
    rate: float


def measured(
    trained: TrainedRun,
    models: Mapping[str, Decoder],
    batch: int,
    caches: Mapping[str, CacheKind] | None = None,
) -> list[Row]:
    """Size, loss and speed of models of a run's text; the first is what others are compared with.

    Args:
      trained: the run.
      models: by their names in the table.
      batch: sequences that are decoded at a time.
      caches: kinds of caches, by the names of the models that have another than `Cache`.
    """
    context, caches = trained.settings.data.context, caches or {}
    kinds = [caches.get(name, Cache) for name in models]
    rates = decoding_rates(list(models.values()), batch, context, kinds)
    return [
        Row(
            name,
            megabytes(nn.split(model)[1]),
            trained.task.measure(*nn.split(model))["loss"]
            if kind is Cache
            else loss_from_cache(trained, model, kind),
            cache_bytes(model, context, kind),
            rate,
        )
        for (name, model), kind, rate in zip(models.items(), kinds, rates, strict=True)
    ]


def loss_from_cache(trained: TrainedRun, model: Decoder, kind: CacheKind) -> float:
    """The loss over the full validation text where all keys and values are read from a cache.

    A window is read at once: what each token sees is what it would, decoded one by one.

    Args:
      trained: the run whose text it is.
      model: a decoder.
      kind: of the cache.
    """

    def predict(model: Decoder, batch: training.step.Batch, rng: jax.Array | None) -> jax.Array:
        del rng
        tokens = batch["inputs"]
        B, T = tokens.shape
        x, _ = model.extend(tokens, model.init_cache(B, T, kind=kind), positions=jnp.arange(T))
        return model.logits(x)

    graphdef, params = nn.split(model)
    step = training.make_eval_step(graphdef, predict)
    return training.mean_metrics(step, params, trained.task.all_batches())["loss"]


def cache_bytes(model: Decoder, context: int, kind: CacheKind = Cache) -> int:
    """What decoding keeps of a full context for a sequence; positions are not counted."""
    layers = jax.eval_shape(lambda: model.init_cache(1, context, kind=kind))

    def size(cache: Any) -> int:
        if isinstance(cache, Cache):
            return cache.nbytes
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))

    return sum(map(size, layers))


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown; the first is the whole model."""
    head = "| model | MB | nats per token | change | perplexity | cache, bytes | tokens/s |"
    lines = [head, "|---|" + "---:|" * 6]
    for row in rows:
        change = "" if row is rows[0] else f"{row.loss - rows[0].loss:+.4f}"
        lines.append(
            f"| {row.name} | {row.megabytes:#.4g} | {row.loss:.4f} | {change} "
            f"| {math.exp(row.loss):.3f} | {row.cache:,} | {row.rate:,.0f} |"
        )
    return "\n".join(lines)


def megabytes(params: nn.Params) -> float:
    """What parameters take, in 10^6 bytes; two of four bits share a byte."""
    return sum(leaf.size * _bits(leaf.dtype) for leaf in jax.tree.leaves(params)) / 8e6


def _bits(dtype: np.dtype) -> int:
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return info(dtype).bits


def decoding_rates(
    models: Sequence[Decoder], batch: int, context: int, kinds: Sequence[CacheKind]
) -> list[float]:
    """Tokens/s of each model, which writes the likeliest token from a cache until it is full.

    Compilation is not counted. The models take turns, so that what else the machine does at a time
    touches all of them.

    Args:
      models: the decoders.
      batch: sequences at a time.
      context: tokens of each.
      kinds: of their caches.
    """
    prompt, rng = jnp.zeros((batch, 1), jnp.int32), jax.random.key(0)
    new = context - 1
    parts = [(*nn.split(model), kind) for model, kind in zip(models, kinds, strict=True)]

    def write(graphdef: nnx.GraphDef, params: nn.Params, kind: CacheKind) -> float:
        started = time.perf_counter()
        tokens = inference.generate(
            graphdef, params, prompt, num_tokens=new, context=context, rng=rng, top_k=1, kind=kind
        )
        jax.block_until_ready(tokens)
        return time.perf_counter() - started

    for part in parts:
        write(*part)
    seconds = [[write(*part) for part in parts] for _ in range(ROUNDS)]
    return [batch * new / statistics.median(taken) for taken in zip(*seconds, strict=True)]
