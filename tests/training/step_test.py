"""Training steps: one, several at once, with micro-batches, with weights, with dropout."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qkv_jax import nn, training
from qkv_jax.models import Decoder, DecoderConfig
from tests.tolerances import assert_close

B, T, V = 2, 5, 7
CONFIG = DecoderConfig(
    vocab_size=V, context=T, num_layers=1, width=12, num_heads=2, position="rotary", use_bias=False
)
GRAPHDEF, PARAMS = nn.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
OPTIMIZER = optax.adam(1e-2)


def batch(seed=0, size=B):
    tokens = np.random.RandomState(seed).randint(0, V, (size, T + 1))
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def state():
    # A copy: several steps in one call donate their state.
    return training.TrainState.create(jax.tree.map(jnp.array, PARAMS), OPTIMIZER)


@functools.cache
def train_step(accumulate=1, dropout_rate=0.0, seed=0, jit=True):
    graphdef = GRAPHDEF
    if dropout_rate:
        config = dataclasses.replace(CONFIG, dropout_rate=dropout_rate)
        graphdef, _ = nn.split(Decoder(config, rngs=nnx.Rngs(0)))
    step = training.make_train_step(
        training.cross_entropy_loss(graphdef), OPTIMIZER, seed=seed, accumulate=accumulate
    )
    return jax.jit(step) if jit else step


# The loss


@pytest.mark.parametrize("predict", [training.predict_tokens, training.predict_documents])
def test_a_loss_in_zigzag_is_that_of_the_same_tokens_in_order(predict):
    random = np.random.RandomState(0)
    rows = {name: random.randint(0, V, (B, 12)) for name in ("inputs", "targets")}
    rows["weights"] = random.rand(B, 12).astype(np.float32)
    if predict is training.predict_documents:
        rows["segments"] = np.repeat([[0, 1], [0, 1]], [7, 5], axis=1)
        rows["positions"] = np.concatenate([np.arange(7), np.arange(5)])[None].repeat(B, 0)
    loss = training.cross_entropy_loss(GRAPHDEF, predict)
    gradients = jax.jit(jax.value_and_grad(loss))
    in_order = gradients(PARAMS, rows, None)
    in_zigzag = jax.jit(jax.value_and_grad(training.in_zigzag(loss, 3)))(PARAMS, rows, None)
    jax.tree.map(assert_close, in_zigzag, in_order)
    moved, _ = gradients(PARAMS, rows | {"inputs": rows["inputs"][:, ::-1]}, None)
    assert abs(moved - in_order[0]) > 1e-4


def losses(inputs, targets):
    logits = np.asarray(nn.merge(GRAPHDEF, PARAMS)(inputs), np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0]


def test_the_loss_is_the_mean_cross_entropy_in_nats():
    loss = training.cross_entropy_loss(GRAPHDEF)(PARAMS, batch(), None)
    assert_close(loss, losses(**batch()).mean())
    assert abs(float(loss) - np.log(V)) < 0.1  # small initial logits: almost uniform


def test_weights_choose_the_tokens_that_count():
    weights = np.array([[1, 0, 2, 0, 0], [0, 1, 1, 1, 0.5]], np.float32)
    loss = training.cross_entropy_loss(GRAPHDEF)
    weighted = loss(PARAMS, batch() | {"weights": weights}, None)
    assert_close(weighted, (losses(**batch()) * weights).sum() / weights.sum())
    ones = loss(PARAMS, batch() | {"weights": np.ones((B, T), np.float32)}, None)
    assert_close(ones, loss(PARAMS, batch(), None))


# One step


def test_a_step_is_the_optimizer_s_update_of_the_gradient():
    after, metrics = train_step()(state(), batch())
    loss = lambda params: training.cross_entropy_loss(GRAPHDEF)(params, batch(), None)  # noqa: E731
    value, gradients = jax.jit(jax.value_and_grad(loss))(PARAMS)
    updates, opt_state = OPTIMIZER.update(gradients, OPTIMIZER.init(PARAMS), PARAMS)
    jax.tree.map(assert_close, after.params, optax.apply_updates(PARAMS, updates))
    chex.assert_trees_all_close(after.opt_state, opt_state, rtol=1e-5, atol=1e-7)
    assert after.step == 1 and after.step.dtype == jnp.int32
    assert metrics.keys() == {"loss", "grad_norm"}
    assert_close(metrics["loss"], value)
    norm = np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(gradients)))
    assert_close(metrics["grad_norm"], norm, scale=2)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state())


def test_steps_lower_the_loss():
    current, first = state(), None
    for _ in range(60):
        current, metrics = train_step()(current, batch())
        first = metrics["loss"] if first is None else first
    assert metrics["loss"] < 0.5 * first


def test_dropout_follows_the_seed_and_the_step():
    def loss(seed=0, step=0, rate=0.5):
        at = dataclasses.replace(state(), step=jnp.int32(step))
        return float(train_step(dropout_rate=rate, seed=seed)(at, batch())[1]["loss"])

    assert loss() == loss()
    assert len({loss(), loss(seed=1), loss(step=1), loss(rate=0.0)}) == 4
    assert loss(rate=0.0) == loss(rate=0.0, step=1)


def test_micro_batches_are_one_large_batch():
    large = batch(size=2 * B)
    one, one_metrics = train_step()(state(), large)
    several, metrics = train_step(2)(state(), large)
    assert_close(metrics["loss"], one_metrics["loss"])
    assert_close(metrics["grad_norm"], one_metrics["grad_norm"])
    # Adam divides small gradients by their size: compare what it remembers, not what it does.
    chex.assert_trees_all_close(several.opt_state[0].mu, one.opt_state[0].mu, rtol=1e-4, atol=1e-7)
    assert several.step == 1


def test_micro_batches_have_dropout_of_their_own():
    rows = batch()
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), rows)
    # The same rows in both micro-batches: the mean of two draws is neither of them.
    once = train_step(dropout_rate=0.5)(state(), rows)[1]["loss"]
    mean = train_step(2, dropout_rate=0.5)(state(), twice)[1]["loss"]
    assert abs(float(mean - once)) > 1e-5


# Several steps in one call


@functools.cache
def train_steps():
    return training.make_train_steps(train_step(jit=False))


def batches(*seeds):
    return jax.tree.map(lambda *x: np.stack(x), *map(batch, seeds))


def test_several_steps_in_one_call_are_the_steps_one_by_one():
    current, expected = state(), []
    for seed in (1, 2, 3):
        current, metrics = train_step()(current, batch(seed))
        expected.append(metrics)
    after, metrics = train_steps()(state(), batches(1, 2, 3), 3)
    chex.assert_trees_all_close(after, current, rtol=1e-4, atol=1e-5)
    for i, one in enumerate(expected):
        jax.tree.map(lambda a, b: assert_close(a[i], b), metrics, one)  # noqa: B023


def test_batches_after_the_count_are_ignored():
    poisoned = batches(1, 2, 3) | {"weights": np.ones((3, B, T), np.float32)}
    poisoned["weights"][2] = np.nan
    after, metrics = train_steps()(state(), poisoned, 2)
    expected, _ = train_steps()(state(), batches(1, 2, 9), 2)
    assert after.step == 2
    chex.assert_trees_all_close(after, expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(metrics["loss"][:2]).all() and metrics["loss"].shape == (3,)


def test_every_count_runs_the_same_program():
    chex.clear_trace_counter()
    steps = training.make_train_steps(chex.assert_max_traces(n=2)(train_step(jit=False)))
    current = state()
    for count in (3, 1, 0, 2):  # one trace for the metrics' shapes, one for the program
        current, _ = steps(current, batches(1, 2, 3), count)
    assert current.step == 6


def test_the_state_given_is_donated():
    given = state()
    train_steps()(given, batches(1, 2, 3), 1)
    assert all(x.is_deleted() for x in jax.tree.leaves(given.params))
