"""Size, loss and speed of a run's decoder and of smaller ones made of it, in a table."""

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.setup import TrainedRun
from qkv_jax import inference, nn
from qkv_jax.models import Decoder

ROUNDS = 25  # in which the models decode in turn; the median counts


@dataclasses.dataclass(frozen=True)
class Row:
    """A model of the table, and what was measured.

    Args:
      name: in the table.
      megabytes: of its parameters.
      loss: over the full validation text, nats per token.
      state: numbers that it keeps of a full context for a sequence.
      rate: tokens/s.
    """

    name: str
    megabytes: float
    loss: float
    state: int
    rate: float


def measured(trained: TrainedRun, models: Mapping[str, Decoder], batch: int) -> list[Row]:
    """Size, loss and speed of models of a run's text; the first is what others are compared with.

    Args:
      trained: the run.
      models: by their names in the table.
      batch: sequences that are decoded at a time.
    """
    context = trained.settings.data.context
    rates = decoding_rates(list(models.values()), batch, context)
    return [
        Row(
            name,
            megabytes(nn.split(model)[1]),
            trained.task.measure(*nn.split(model))["loss"],
            model.state_size(context),
            rate,
        )
        for (name, model), rate in zip(models.items(), rates, strict=True)
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown; the first is the whole model."""
    head = "| model | MB | nats per token | change | perplexity | cache, numbers | tokens/s |"
    lines = [head, "|---|" + "---:|" * 6]
    for row in rows:
        change = "" if row is rows[0] else f"{row.loss - rows[0].loss:+.4f}"
        lines.append(
            f"| {row.name} | {row.megabytes:#.4g} | {row.loss:.4f} | {change} "
            f"| {math.exp(row.loss):.3f} | {row.state:,} | {row.rate:,.0f} |"
        )
    return "\n".join(lines)


def megabytes(params: nn.Params) -> float:
    """What parameters take, in 10^6 bytes; two of four bits share a byte."""
    return sum(leaf.size * _bits(leaf.dtype) for leaf in jax.tree.leaves(params)) / 8e6


def _bits(dtype: np.dtype) -> int:
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return info(dtype).bits


def decoding_rates(models: Sequence[Decoder], batch: int, context: int) -> list[float]:
    """Tokens/s of each model, which writes the likeliest token from a cache until it is full.

    Compilation is not counted. The models take turns, so that what else the machine does at a time
    touches all of them.

    Args:
      models: the decoders.
      batch: sequences at a time.
      context: tokens of each.
    """
    prompt, rng = jnp.zeros((batch, 1), jnp.int32), jax.random.key(0)
    new = context - 1
    parts = [nn.split(model) for model in models]

    def write(graphdef: nnx.GraphDef, params: nn.Params) -> float:
        started = time.perf_counter()
        jax.block_until_ready(
            inference.generate(
                graphdef, params, prompt, num_tokens=new, context=context, rng=rng, top_k=1
            )
        )
        return time.perf_counter() - started

    for part in parts:
        write(*part)
    seconds = [[write(*part) for part in parts] for _ in range(ROUNDS)]
    return [batch * new / statistics.median(taken) for taken in zip(*seconds, strict=True)]
