"""What `experiments.compress` does to a run's decoder, as functions."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from configs import char_lm
from experiments.setup import TrainedRun
from qkv_jax import nn, training
from qkv_jax.inference import quantize
from qkv_jax.models import (
    Decoder,
    group_heads,
    head_importance,
    least_important,
    prune_heads,
    silence_heads,
)
from qkv_jax.ops.cache import CacheKind, QuantizedCache
from qkv_jax.training.run_directory import RunDirectory, open_run, read_config

INT8_CACHE = "float32, and an int8 cache"


@dataclasses.dataclass(frozen=True)
class Compressed:
    """Models made of a run's.

    Args:
      models: by their names in a table, the run's own first.
      about: what was done, in words.
      state: of the training of the last one, with which a run can go on; None: it is no run.
      caches: kinds of caches of keys and values, by the names of those with another than `Cache`.
    """

    models: dict[str, Decoder]
    about: str
    state: training.TrainState | None
    caches: dict[str, CacheKind] = dataclasses.field(default_factory=dict)

    @property
    def last(self) -> Decoder:
        return self.models[next(reversed(self.models))]


def pruned(
    trained: TrainedRun, numbers: Sequence[int] | None, num_steps: int, rate: float
) -> Compressed:
    """Models without the least important heads, by both ways to rank them, and after more training.

    Args:
      trained: the run.
      numbers: of heads that go, as for `heads_to_prune`; None: half of all.
      num_steps, rate: as for `trained_on`, of those ranked one by one; 0 steps: none is trained on.
    """
    whole = nn.merge(trained.graphdef, trained.params)
    every = whole.config.num_layers * whole.config.num_heads
    numbers = [every // 2] if numbers is None else sorted(set(numbers))
    orders = heads_to_prune(trained, numbers)
    models, state = {f"all {every} heads": whole}, None
    if num_steps:
        name = f"all {every} heads, {num_steps} steps more"
        models[name] = trained_on(trained, whole, num_steps, rate)[0]
    for number in numbers:
        for way, heads in orders.items():
            name = f"{number} of {every} gone, ranked {way}"
            models[name] = last = prune_heads(whole, heads[number])
        if num_steps:
            name = f"{name}, {num_steps} steps more"
            models[name], state = trained_on(trained, last, num_steps, rate)
    about = (
        "Heads went in the order of their importance on windows of the training text (Michel et "
        "al. 2019, arxiv.org/abs/1905.10650), ranked at once, or one by one, with what is left "
        f"ranked again. {heads_left(last)}"
    )
    if num_steps:
        about += f" {after_steps(trained, num_steps, rate)}"
    return Compressed(models, about, untrained(trained, last) if state is None else state)


def grouped(trained: TrainedRun, num_kv_heads: int, num_steps: int, rate: float) -> Compressed:
    """Models with fewer key/value heads, before and after more training; and the whole one after.

    Args:
      trained: the run.
      num_kv_heads: K of these models.
      num_steps, rate: as for `trained_on`.
    """
    if num_steps < 1:
        raise ValueError(f"steps: wanted at least 1, in which pooled heads settle, got {num_steps}")
    whole = nn.merge(trained.graphdef, trained.params)
    pooled = group_heads(whole, num_kv_heads)
    recovered, state = trained_on(trained, pooled, num_steps, rate)
    name, fewer = f"{whole.config.kv_heads} key/value heads", f"pooled to {num_kv_heads}"
    models = {
        name: whole,
        f"{name}, {num_steps} steps more": trained_on(trained, whole, num_steps, rate)[0],
        fewer: pooled,
        f"{fewer}, {num_steps} steps more": recovered,
    }
    about = (
        "Key/value heads were averaged in groups (Ainslie et al. 2023, arxiv.org/abs/2305.13245). "
        f"{after_steps(trained, num_steps, rate)}"
    )
    return Compressed(models, about, state)


def quantized(trained: TrainedRun, group: int) -> Compressed:
    """Models with matrices of 8 and 4 bits.

    Args:
      trained: the run.
      group: how many of a column's numbers share a scale, beside whole columns.
    """
    whole = nn.merge(trained.graphdef, trained.params)
    models = {
        "float32": whole,
        "int8, a scale for each column": quantize(whole),
        f"int8, for {group} numbers": quantize(whole, group=group),
        "int4, a scale for each column": quantize(whole, "int4"),
        f"int4, for {group} numbers": quantize(whole, "int4", group=group),
        "int8, and activations in int8": quantize(whole, activations="int8"),
        INT8_CACHE: whole,
    }
    about = (
        "Linear layers were quantized by qwix, embeddings and norms not. MB counts four bits as "
        "half a byte; where JAX does not pack them, in the memory of a CPU, each takes one. The "
        "last row's model is the first's: it reads keys and values, each token's own too, from a "
        "cache in int8 with a scale for each token and head. A quantized model is not saved: a "
        "run's config has no field that says so."
    )
    return Compressed(models, about, None, {INT8_CACHE: QuantizedCache})


def heads_to_prune(
    trained: TrainedRun, numbers: Sequence[int]
) -> dict[str, dict[int, dict[int, list[int]]]]:
    """Which heads go where so many of them do, by two ways to rank them.

    "at once" ranks the heads of the whole model; "one by one" ranks again what each removal leaves.
    Importance is that of windows of the training text, so that the validation text stays unseen.

    Args:
      trained: the run.
      numbers: of heads that go; with grouped queries, of whole groups.

    Returns:
      Way -> number -> heads, as `least_important` gives them.

    Raises:
      ValueError: so many cannot go, or heads of the run's model went before.
    """
    model = nn.merge(trained.graphdef, trained.params)
    if model.config.heads_per_layer is not None:
        raise ValueError(f"workdir: {trained.run.path} holds a pruned model; prune the whole one")
    K, G = model.config.kv_heads, model.config.num_heads // model.config.kv_heads
    batches = trained.task.train_batches(0)

    @jax.jit
    def importance(params: nn.Params) -> jax.Array:
        def of(batch: training.step.Batch) -> jax.Array:
            def loss(logits: jax.Array) -> jax.Array:
                targets = batch["targets"]
                return optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum()

            return head_importance(nn.merge(trained.graphdef, params), batch["inputs"], loss)

        return jax.lax.map(of, batches).mean(0)

    whole = np.asarray(importance(trained.params))
    at_once = {number: least_important(whole, number, num_kv_heads=K) for number in numbers}
    one_by_one, gone, found = {}, {}, whole
    for number in range(G, max(numbers) + 1, G):
        gone = least_important(found, number, num_kv_heads=K, gone=gone)
        if number in numbers:
            one_by_one[number] = gone
        found = np.asarray(importance(nn.split(silence_heads(model, gone))[1]))
    return {"at once": at_once, "one by one": one_by_one}


def trained_on(
    trained: TrainedRun,
    model: Decoder,
    num_steps: int,
    rate: float,
    make_loss: Callable[[nnx.GraphDef], training.Loss] | None = None,
) -> tuple[Decoder, training.TrainState]:
    """A model after more steps on its run's text, from the window after the run's last one.

    Args:
      trained: the run, whose optimizer and schedule begin anew.
      model: to train.
      num_steps: how many.
      rate: factor of the run's learning rates.
      make_loss: the loss of a model with this structure; None: its cross entropy.

    Returns:
      The model, and the state of its training, whose step goes on from the run's.
    """
    graphdef, params = nn.split(model)
    if make_loss is None:
        make_loss = functools.partial(training.cross_entropy_loss, predict=trained.task.predict)
    state = train(
        trained, make_loss(graphdef), params, optimizer_for(trained, num_steps, rate), num_steps
    )
    return nn.merge(graphdef, state.params), state


def optimizer_for(trained: TrainedRun, num_steps: int, rate: float) -> optax.GradientTransformation:
    """The run's optimizer and schedule, begun anew; arguments as for `trained_on`."""
    config = trained.settings.optimizer
    config = dataclasses.replace(
        config,
        learning_rate=rate * config.learning_rate,
        muon_learning_rate=rate * config.muon_learning_rate,
    )
    return training.make_optimizer(config, num_steps)


def train(
    trained: TrainedRun,
    loss: training.Loss,
    params: nn.Params,
    optimizer: optax.GradientTransformation,
    num_steps: int,
) -> training.TrainState:
    """The state after steps on a run's text, from the window after the run's last one.

    Args:
      trained: the run, from whose step that of the state goes on.
      loss: what is lowered.
      params: where it starts; they stay as they were.
      optimizer: new.
      num_steps: how many.
    """
    settings = trained.settings
    state = training.TrainState.create(jax.tree.map(jnp.copy, params), optimizer)  # is donated
    steps = training.make_train_steps(
        training.make_train_step(
            loss, optimizer, seed=settings.seed, accumulate=settings.optimizer.accumulate
        )
    )
    for done in range(0, num_steps, settings.train.steps_per_dispatch):
        count = min(settings.train.steps_per_dispatch, num_steps - done)
        state, _ = steps(state, trained.task.train_batches(trained.step + done), count)
    return dataclasses.replace(state, step=state.step + trained.step)


def after_steps(trained: TrainedRun, num_steps: int, rate: float) -> str:
    """What "steps more" are, in words."""
    return (
        f'"{num_steps} steps more": trained on after the run\'s {trained.step} steps, with a new '
        f"optimizer and {rate:g} of the run's learning rates; the whole model too, so that what "
        "more training gains is seen apart."
    )


def heads_left(model: Decoder) -> str:
    """How many heads a pruned model has, in words."""
    left = [model.config.of_layer(layer).num_heads for layer in range(model.config.num_layers)]
    return f"The last model has {', '.join(map(str, left))} heads in its layers."


def untrained(trained: TrainedRun, model: Decoder) -> training.TrainState:
    """The state of a model that was made of a run's and not trained on: a new optimizer's."""
    optimizer = training.make_optimizer(
        trained.settings.optimizer, trained.settings.train.num_steps
    )
    state = training.TrainState.create(nn.split(model)[1], optimizer)
    return dataclasses.replace(state, step=jnp.asarray(trained.step, jnp.int32))


def save_run(out: Path, trained: TrainedRun, compressed: Compressed) -> RunDirectory:
    """Writes the last of the models as a run of its own, which every script reads as any other.

    Args:
      out: a new folder.
      trained: the run that it was made of.
      compressed: the models, with a state.
    """
    config = read_config(trained.run, char_lm.get_config())
    made = compressed.last.config
    with config.unlocked():
        config.name = out.absolute().name
        fields = [name for name in config.model if hasattr(made, name)]
        config.model.update({name: getattr(made, name) for name in fields})
        config.train.num_steps = int(compressed.state.step)
    run = open_run(out, config)
    trained.task.keep(run)
    with training.Checkpointer(run.checkpoints) as checkpointer:
        checkpointer.save(int(compressed.state.step), compressed.state)
    return run
