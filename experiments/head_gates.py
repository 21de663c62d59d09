"""Heads pruned by gates that learn to close while a run's model is trained on."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from experiments import compression
from experiments.compression import Compressed
from experiments.setup import TrainedRun
from qkv_jax import nn, training
from qkv_jax.models import (
    Decoder,
    closed_heads,
    gated,
    open_gates,
    probability_open,
    prune_heads,
    sampled_gates,
    settled_gates,
)

RATE = 0.05  # Adam's, of log_alpha: far enough in some hundred steps to close a gate
TINY = 1e-6  # the noise lies between it and 1 - it


def pruned_by_gates(
    trained: TrainedRun,
    numbers: Sequence[int] | None,
    penalty: float,
    num_steps: int,
    rate: float,
) -> Compressed:
    """Models without the heads whose gates closed, before and after more training.

    Args:
      trained: the run.
      numbers: of heads that are to go, each found by a training of its own; None: as many as the
        penalty closes.
      penalty, num_steps, rate: as for `trained_with_gates`; as many steps follow without gates.

    Raises:
      ValueError: so many cannot go, there are no steps or no penalty, or no head can go.
    """
    if num_steps < 1:
        raise ValueError(f"steps: wanted at least 1, in which gates learn, got {num_steps}")
    if not 0 < penalty < float("inf"):
        raise ValueError(f"penalty: wanted a finite number > 0, got {penalty}")
    whole = nn.merge(trained.graphdef, trained.params)
    every = whole.config.num_layers * whole.config.num_heads
    start = open_gates(whole)
    numbers = [None] if numbers is None else sorted(set(numbers))
    for number in numbers:
        closed_heads(whole, start, number)  # says now if so many cannot go
    later = dataclasses.replace(trained, step=trained.step + num_steps)
    more = compression.trained_on(trained, whole, 2 * num_steps, rate)[0]
    models = {f"all {every} heads": whole, f"all {every} heads, {2 * num_steps} steps more": more}
    state = None
    for number in numbers:
        model, log_alpha = trained_with_gates(trained, whole, number, penalty, num_steps, rate)
        heads = closed_heads(whole, log_alpha, number)
        model = gated(model, jax.tree.map(settled_gates, log_alpha))
        last = prune_heads(model, heads)
        gone = sum(map(len, heads.values()))
        name = f"{gone} of {every} gone, by {num_steps} steps with gates"
        models[name] = last
        name = f"{name}, {num_steps} steps more"
        models[name], state = compression.trained_on(later, last, num_steps, rate)
    about = (
        "A gate on each head, hard concrete (Louizos et al. 2018, arxiv.org/abs/1712.01312), was "
        "trained with the model (Voita et al. 2019, arxiv.org/abs/1905.09418), "
        f"{num_steps} steps after the run's {trained.step}, with a penalty of {penalty:g} nats for "
        f"each head expected open{'' if numbers == [None] else ' beyond those that stay, or short'}"
        "; what closed was removed, and the model trained on without gates. "
        f"{compression.heads_left(models[name])} The whole model was trained on for as many steps, "
        f"too; all with a new optimizer and {rate:g} of the run's learning rates."
    )
    return Compressed(models, about, state)


def trained_with_gates(
    trained: TrainedRun,
    model: Decoder,
    number: int | None,
    penalty: float,
    num_steps: int,
    rate: float,
) -> tuple[Decoder, dict[int, jax.Array]]:
    """A model and its gates after training both.

        loss + penalty * |sum over heads of P(open) - heads that stay|

    Args:
      trained: the run.
      model: of it.
      number: of heads that are to close; None: the penalty is that of Voita et al., on all heads.
      penalty: nats for a head.
      num_steps, rate: as for `compression.trained_on`.

    Returns:
      The model, in which nothing is gated, and log_alpha of its gates.
    """
    graphdef, params = nn.split(model)
    group = model.config.num_heads // model.config.kv_heads
    start = open_gates(model)
    stay = 0 if number is None else group * sum(x.size for x in start.values()) - number
    plain_loss = training.cross_entropy_loss(graphdef, trained.task.predict)

    def loss(both: nn.Params, batch: training.step.Batch, rng: jax.Array) -> jax.Array:
        rng, *rngs = jax.random.split(rng, 1 + len(start))
        noise = {
            i: jax.random.uniform(rng, start[i].shape, minval=TINY, maxval=1 - TINY)
            for i, rng in zip(start, rngs, strict=True)
        }
        gates = jax.tree.map(sampled_gates, both["log_alpha"], noise)
        _, params = nn.split(gated(nn.merge(graphdef, both["model"]), gates))
        is_open = sum(group * probability_open(x).sum() for x in both["log_alpha"].values())
        return plain_loss(params, batch, rng) + penalty * jnp.abs(is_open - stay)

    optimizer = optax.partition(
        {"model": compression.optimizer_for(trained, num_steps, rate), "gates": optax.adam(RATE)},
        {"model": "model", "log_alpha": "gates"},
    )
    both = {"model": params, "log_alpha": start}
    state = compression.train(trained, loss, both, optimizer, num_steps)
    return nn.merge(graphdef, state.params["model"]), state.params["log_alpha"]
