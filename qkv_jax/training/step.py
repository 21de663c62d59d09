"""One training step, several in one call, and the loss that they lower."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qkv_jax import nn, ops
from qkv_jax.nn.sharding import as_parameters
from qkv_jax.ops import mesh
from qkv_jax.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# (parameters, batch, key or None) -> the mean loss
Loss = Callable[[nn.Params, Batch, jax.Array | None], jax.Array]
# (model, batch, key or None) -> logits, one more axis than the targets
Predict = Callable[[nnx.Module, Batch, jax.Array | None], jax.Array]


def predict_tokens(model: nnx.Module, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """The logits of a language model, [B, T, V], for the batch's `inputs`, int32 [B, T].

    They stand at its `positions`, int32 [T], if it has them, else in order.
    """
    if "positions" in batch:
        return model(batch["inputs"], positions=batch["positions"], rng=rng)
    return model(batch["inputs"], rng=rng)


def predict_padded_tokens(model: nnx.Module, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """The same for rows of which `lengths`, int32 [B], tokens are no padding."""
    return model(batch["inputs"], lengths=batch["lengths"], rng=rng)


def predict_documents(model: nnx.Module, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """The same for packed documents, numbered by `segments` and `positions`, int32 [B, T]."""
    mask = ops.masks.Segments(batch["segments"])
    return model(batch["inputs"], mask=mask, positions=batch["positions"], rng=rng)


def cross_entropy_loss(graphdef: nnx.GraphDef, predict: Predict = predict_tokens) -> Loss:
    """The mean cross-entropy of a batch's targets, in nats, by the model with this structure.

    A batch holds what `predict` reads, such as `inputs`; `targets`, integers of the logits' shape
    without the last axis, such as [B, T]; and optionally `weights` of that shape.
    """

    def loss(params: nn.Params, batch: Batch, rng: jax.Array | None) -> jax.Array:
        logits = predict(nn.merge(graphdef, params), batch, rng)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return mean_over_targets(losses, batch)

    return loss


def in_zigzag(loss: Loss, shards: int) -> Loss:
    """A loss whose tokens come in the order of `ops.zigzag`: equal work for shards of a window.

    The mean over tokens is the same in any order, but for the bits of dropout, if the model knows
    the order by positions alone (`Mixer.in_order` is False).

    Args:
      loss: of batches of [B, T, ...] arrays, whose tokens stand at `positions`, int32 [T] or
        [B, T]; where a batch has none, it is given those of the order.
      shards: over how many devices a window is cut; twice as many divide T.
    """

    def zigzag_loss(params: nn.Params, batch: Batch, rng: jax.Array | None) -> jax.Array:
        order = ops.zigzag(batch["inputs"].shape[1], shards)
        batch = {name: x[:, order] for name, x in batch.items()}
        return loss(params, {"positions": order} | batch, rng)

    return zigzag_loss


def mean_over_targets(losses: jax.Array, batch: Batch) -> jax.Array:
    """The mean of losses of the targets' shape, by the batch's `weights` if it has them."""
    if "weights" not in batch:
        return losses.mean()
    return (losses * batch["weights"]).sum() / batch["weights"].sum()


def make_train_step(
    loss: Loss, optimizer: optax.GradientTransformation, *, seed: int, accumulate: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure function `train_step(state, batch) -> (state, metrics)`.

    Args:
      loss: what to lower.
      optimizer: turns gradients into updates.
      seed: of dropout; the key of a step is `fold_in(key(seed), step)`.
      accumulate: micro-batches in a batch; their gradients are averaged one after another.

    Returns:
      `train_step`. A batch is a dict of [accumulate * B, ...] arrays; the metrics are `loss` and
      `grad_norm` (before clipping), float32 [].
    """

    def gradients(params: nn.Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, nn.Params]:
        def one(batch: Batch, rng: jax.Array) -> tuple[jax.Array, nn.Params]:
            value, grads = jax.value_and_grad(loss)(params, batch, rng)
            return value, as_parameters(grads)

        if accumulate == 1:
            return one(batch, rng)

        def add(total, micro):
            micro_batch, i = micro
            return jax.tree.map(jnp.add, total, one(micro_batch, jax.random.fold_in(rng, i))), None

        def cut(x: jax.Array) -> jax.Array:
            x = x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:])
            return mesh.constrain(x, None, mesh.ROWS, *[None] * (x.ndim - 2))

        micro_batches = jax.tree.map(cut, batch)
        zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
        total, _ = jax.lax.scan(add, zero, (micro_batches, jnp.arange(accumulate)))
        return jax.tree.map(lambda x: x / accumulate, total)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        value, grads = gradients(state.params, batch, rng)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
        params = optax.apply_updates(state.params, updates)
        state = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
        return as_parameters(state), metrics

    return train_step


def make_train_steps(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
) -> Callable[[TrainState, Batch, int], tuple[TrainState, Metrics]]:
    """`train_steps(state, batches, count)`: the first `count` of several steps, in one call.

    A small model's step is short beside the time it takes to call it. `count` is traced, so that
    one compiled program serves every number of steps up to the length of `batches`.

    Returns:
      A jitted function that donates `state`. `batches` is a dict of [steps, B, ...] arrays; metrics
      are [steps], of which the first `count` count.
    """

    def train_steps(state: TrainState, batches: Batch, count: int) -> tuple[TrainState, Metrics]:
        steps = jax.tree.leaves(batches)[0].shape[0]
        shapes = jax.eval_shape(train_step, state, jax.tree.map(lambda x: x[0], batches))[1]
        metrics = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), shapes)

        def body(i, carry):
            state, metrics = carry
            state, new = train_step(state, jax.tree.map(lambda x: x[i], batches))
            return state, jax.tree.map(lambda old, x: old.at[i].set(x), metrics, new)

        return jax.lax.fori_loop(0, count, body, (state, metrics))

    return jax.jit(train_steps, donate_argnums=0)
