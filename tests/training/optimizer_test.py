"""Schedules against their formulas, optimizers against optax used plainly."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qkv_jax.training import OptimizerConfig, make_optimizer, make_schedule
from tests.tolerances import assert_close

RANDOM = np.random.RandomState(0)
D, F, V = 5, 7, 11


def block():
    return {
        "norm": {"scale": jnp.asarray(RANDOM.randn(D), jnp.float32)},
        "up": {
            "kernel": jnp.asarray(RANDOM.randn(D, F), jnp.float32),
            "bias": jnp.asarray(RANDOM.randn(F), jnp.float32),
        },
        "gate": {"kernel": jnp.asarray(RANDOM.randn(D, F), jnp.float32)},
        "down": {"kernel": jnp.asarray(RANDOM.randn(F, D), jnp.float32)},
    }


PARAMS = {
    "embedding": {"embedding": jnp.asarray(RANDOM.randn(V, D), jnp.float32)},
    "blocks": {i: block() for i in range(3)},
    "head": {"kernel": jnp.asarray(RANDOM.randn(D, V), jnp.float32)},
}
GRADIENTS = [
    jax.tree.map(lambda x: jnp.asarray(RANDOM.randn(*x.shape), jnp.float32), PARAMS)
    for _ in range(3)
]
CONFIG = OptimizerConfig(warmup_steps=3, clip_norm=0.0)


def trained(optimizer, gradients=GRADIENTS):
    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params


def assert_trees_close(actual, expected, scale=1):
    jax.tree.map(lambda a, b: assert_close(a, b, scale=scale), actual, expected)


# Schedules


def test_the_cosine_schedule_is_nanogpt_s():
    peak, floor, warmup, num_steps = 1e-3, 1e-4, 100, 2000

    def get_lr(it):
        """nanoGPT, train.py."""
        if it < warmup:
            return peak * (it + 1) / (warmup + 1)
        if it > num_steps:
            return floor
        ratio = (it - warmup) / (num_steps - warmup)
        return floor + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (peak - floor)

    config = OptimizerConfig(schedule="cosine", warmup_steps=warmup, final_fraction=0.1)
    schedule = make_schedule(config, peak, num_steps)
    for it in (0, 1, 50, 99, 100, 101, 1000, 1999, 2000, 2500):
        np.testing.assert_allclose(schedule(it), get_lr(it), rtol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [2, 4, 6, 4.75, 3.5, 2.25, 1, 1]), ("constant", [2, 4, 6, 6, 6, 6, 6, 6])],
)
def test_linear_and_constant_schedules(schedule, expected):
    config = OptimizerConfig(schedule=schedule, warmup_steps=2, final_fraction=1 / 6)
    values = [make_schedule(config, 6.0, 6)(i) for i in range(8)]
    np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 5, 100])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_every_schedule_is_positive_and_at_most_its_peak(schedule, warmup_steps):
    config = OptimizerConfig(schedule=schedule, warmup_steps=warmup_steps)
    for num_steps in (1, 2, 7):
        values = np.array([make_schedule(config, 1.0, num_steps)(i) for i in range(num_steps)])
        assert ((values > 0) & (values <= 1 + 1e-6)).all()
        if warmup_steps == 0:
            assert values[0] == 1


# AdamW


def test_adamw_is_optax_s_with_decay_on_matrices_alone():
    config = dataclasses.replace(CONFIG, weight_decay=0.1)
    expected = trained(
        optax.adamw(
            make_schedule(config, config.learning_rate, 9), b1=0.9, b2=0.99, weight_decay=0.1,
            mask=jax.tree.map(lambda x: x.ndim == 2, PARAMS),
        )
    )  # fmt: skip
    assert_trees_close(trained(make_optimizer(config, 9)), expected)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_shrinks_matrices_and_leaves_vectors(name):
    config = dataclasses.replace(CONFIG, name=name, weight_decay=0.5, warmup_steps=0)
    zero = [jax.tree.map(jnp.zeros_like, PARAMS)]
    after = trained(make_optimizer(config, 9), zero)
    for path, x in jax.tree_util.tree_leaves_with_path(after):
        before = PARAMS
        for entry in path:
            before = before[entry.key]
        in_block = path[0].key == "blocks"
        rate = 2e-2 if name == "muon" and in_block else 1e-3
        assert_close(x, before * (1 - 0.5 * rate) if x.ndim == 2 else before)


# Muon


def test_muon_moves_the_matrices_of_blocks_and_adamw_the_rest():
    muon = trained(make_optimizer(dataclasses.replace(CONFIG, name="muon"), 9))
    adamw = trained(make_optimizer(CONFIG, 9))
    for name in ("embedding", "head"):
        assert_trees_close(muon[name], adamw[name])
    for i in range(3):
        assert_trees_close(muon["blocks"][i]["norm"], adamw["blocks"][i]["norm"])
        assert_close(muon["blocks"][i]["up"]["bias"], adamw["blocks"][i]["up"]["bias"])
        for layer in ("up", "gate", "down"):
            ours, other = (x["blocks"][i][layer]["kernel"] for x in (muon, adamw))
            assert np.abs(ours - other).max() > 1e-3


def test_the_first_muon_step_is_the_nearest_orthogonal_matrix():
    """Up to the iterations' precision: the singular values of an update are near each other."""
    config = dataclasses.replace(CONFIG, name="muon", warmup_steps=0, weight_decay=0.0)
    after = trained(make_optimizer(config, 9), GRADIENTS[:1])
    for i in range(3):
        for layer in ("up", "down"):
            change = PARAMS["blocks"][i][layer]["kernel"] - after["blocks"][i][layer]["kernel"]
            singular = np.linalg.svd(np.asarray(change, np.float64), compute_uv=False)
            assert singular.min() > 0.4 * singular.max()
            # The directions are those of the gradient.
            gradient = np.asarray(GRADIENTS[0]["blocks"][i][layer]["kernel"], np.float64)
            u, _, vt = np.linalg.svd(gradient, full_matrices=False)
            cosine = np.sum(change * (u @ vt)) / np.linalg.norm(change) / np.sqrt(D)
            assert cosine > 0.95


# Clipping


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_clipped_gradient_is_that_of_the_global_norm(name):
    config = dataclasses.replace(CONFIG, name=name, clip_norm=1.5)
    norms = [math.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g))) for g in GRADIENTS]
    assert min(norms) > 1.5
    clipped = [
        jax.tree.map(lambda x: x * 1.5 / norm, g)  # noqa: B023
        for g, norm in zip(GRADIENTS, norms, strict=True)
    ]
    expected = trained(make_optimizer(dataclasses.replace(config, clip_norm=0.0), 9), clipped)
    assert_trees_close(trained(make_optimizer(config, 9)), expected, scale=10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, r"optimizer\.name: wanted one of \['adamw', 'muon'\], got 'sgd'"),
        ({"schedule": "exponential"}, r"optimizer\.schedule: .* got 'exponential'"),
        ({"learning_rate": float("nan")}, r"optimizer\.learning_rate: wanted .* got nan"),
        ({"learning_rate": 0.0}, r"optimizer\.learning_rate: wanted a finite number > 0, got 0\.0"),
        ({"learning_rate": float("inf")}, r"optimizer\.learning_rate: .* got inf"),
        ({"muon_learning_rate": -1.0}, r"optimizer\.muon_learning_rate: .* got -1\.0"),
        ({"weight_decay": -0.1}, r"optimizer\.weight_decay: wanted .* >= 0, got -0\.1"),
        ({"clip_norm": float("nan")}, r"optimizer\.clip_norm: .* got nan"),
        ({"b1": 1.0}, r"optimizer\.b1: wanted a number in \[0, 1\), got 1\.0"),
        ({"b2": -0.1}, r"optimizer\.b2: .* got -0\.1"),
        ({"final_fraction": 1.5}, r"optimizer\.final_fraction: .* got 1\.5"),
        ({"warmup_steps": -1}, r"optimizer\.warmup_steps: wanted an integer >= 0, got -1"),
        ({"accumulate": 0}, r"optimizer\.accumulate: wanted an integer >= 1, got 0"),
    ],
    ids=repr,
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)
