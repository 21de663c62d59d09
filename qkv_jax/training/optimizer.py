"""Optimizers and schedules, from optax."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "muon")
STACK = "*"  # the name of a stacked list's only entry


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow gradients. `configs/char_lm.py` explains the fields.

    Raises:
      ValueError: naming the field, what came and what was wanted.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    muon_learning_rate: float = 2e-2
    schedule: str = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        _check("name", self.name, self.name in OPTIMIZERS, f"one of {list(OPTIMIZERS)}")
        _check("schedule", self.schedule, self.schedule in SCHEDULES, f"one of {list(SCHEDULES)}")
        for name in ("learning_rate", "muon_learning_rate"):
            value = getattr(self, name)
            _check(name, value, math.isfinite(value) and value > 0, "a finite number > 0")
        for name in ("weight_decay", "clip_norm"):
            value = getattr(self, name)
            _check(name, value, math.isfinite(value) and value >= 0, "a finite number >= 0")
        for name in ("b1", "b2"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        _check("final_fraction", self.final_fraction, 0 <= self.final_fraction <= 1, "[0, 1]")
        _check("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "an integer >= 0")
        _check("accumulate", self.accumulate, self.accumulate >= 1, "an integer >= 1")


def _check(name: str, value: Any, right: bool, wanted: str) -> None:
    if not right:
        raise ValueError(f"optimizer.{name}: wanted {wanted}, got {value!r}")


def make_schedule(config: OptimizerConfig, peak: float, num_steps: int) -> optax.Schedule:
    """The learning rate at each step: a linear warm-up to `peak`, then the config's descent.

    Step 0 of w warm-up steps has peak / (w + 1); step `num_steps` has final_fraction * peak.
    """
    warmup = min(config.warmup_steps, num_steps - 1)
    remaining = max(num_steps - warmup, 1)
    descent = {
        "cosine": optax.cosine_decay_schedule(peak, remaining, alpha=config.final_fraction),
        "linear": optax.linear_schedule(peak, config.final_fraction * peak, remaining),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if warmup <= 0:
        return descent
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, descent], [warmup])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `num_steps`.

    AdamW (Loshchilov and Hutter 2019, arxiv.org/abs/1711.05101) decays matrices alone. Muon
    (Jordan et al. 2024, kellerjordan.github.io/posts/muon) moves the matrices between the embedding
    and the head, AdamW the rest.
    """
    schedule = make_schedule(config, config.learning_rate, num_steps)
    if config.name == "adamw":
        rule = optax.adamw(
            schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay,
            mask=lambda params: _map_with_rank(lambda names, rank: rank >= 2, params),
        )  # fmt: skip
    else:
        rule = optax.contrib.muon(
            make_schedule(config, config.muon_learning_rate, num_steps),
            weight_decay=config.weight_decay,
            adam_learning_rate=schedule,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=_muon_matrices,
        )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return stack_lists(optax.chain(clip, rule))


def _muon_matrices(params: Any) -> Any:
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return _map_with_rank(
        lambda names, rank: matrix if rank == 2 and STACK in names else None, params
    )


def _map_with_rank(f, params: Any) -> Any:
    """Maps `f(names on the path, rank of a single layer's array)` over a stacked tree."""

    def with_rank(path, leaf):
        names = [entry.key for entry in path]
        return f(names, leaf.ndim - names.count(STACK))

    return jax.tree_util.tree_map_with_path(with_rank, params)


def stack_lists(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on parameters in which lists of equal blocks are one block of stacked arrays.

    The result is the same, in a few large operations instead of many small ones: an optimizer
    otherwise costs a small model as much time as its gradient, and longer to compile.
    """

    def init(params: Any) -> optax.OptState:
        return inner.init(stack(params))

    def update(updates: Any, state: optax.OptState, params: Any = None):
        stacked, state = inner.update(
            stack(updates), state, None if params is None else stack(params)
        )
        return unstack(stacked, updates), state

    return optax.GradientTransformation(init, update)


def stack(tree: Any) -> Any:
    """`{0: block, 1: block}` as `{"*": block of stacked arrays}`, where the blocks are alike."""
    if not isinstance(tree, dict):
        return tree
    if _is_list_of_equals(tree):
        blocks = [tree[i] for i in range(len(tree))]
        return {STACK: stack(jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks))}
    return {name: stack(child) for name, child in tree.items()}


def unstack(stacked: Any, like: Any) -> Any:
    """The inverse of `stack`, for a tree of the structure of `like`."""
    if not isinstance(like, dict):
        return stacked
    if _is_list_of_equals(like):
        blocks = (jax.tree.map(lambda x, i=i: x[i], stacked[STACK]) for i in range(len(like)))
        return {i: unstack(block, like[i]) for i, block in enumerate(blocks)}
    return {name: unstack(stacked[name], child) for name, child in like.items()}


def _is_list_of_equals(tree: dict) -> bool:
    """Whether the keys are 0 ... n-1 and every entry has the same arrays under the same names."""
    if not tree or set(tree) != set(range(len(tree))):
        return False
    shapes = [jax.tree.map(lambda x: (jnp.shape(x), x.dtype), entry) for entry in tree.values()]
    return all(shape == shapes[0] for shape in shapes)
