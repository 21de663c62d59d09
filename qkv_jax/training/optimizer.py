"""Optimizers and schedules, from optax."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qkv_jax.nn.sharding import as_parameters

SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "muon")
# Newton-Schulz iterations of Muon. From optax's "aol" preconditioning (rows scaled by their sums in
# X X^T, which bounds the spectral norm more tightly than the Frobenius norm does), four suffice.
MUON_STEPS, MUON_PRECONDITIONING = 4, "aol"


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
    rule = optax.adamw(
        schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=_is_matrix
    )
    if config.name == "muon":
        muon = optax.contrib.muon(
            make_schedule(config, config.muon_learning_rate, num_steps),
            weight_decay=config.weight_decay,
            ns_steps=MUON_STEPS,
            preconditioning=MUON_PRECONDITIONING,
            muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2),
        )
        rule = optax.partition({"muon": stack_equal_shapes(muon), "adamw": rule}, _muon_or_adamw)
    if config.clip_norm:
        rule = optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)
    return rule


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim >= 2, params)


def _muon_or_adamw(params: Any) -> Any:
    """Muon for the matrices in lists of blocks, whose entries' names are numbers."""

    def label(path: tuple, x: jax.Array) -> str:
        in_block = any(isinstance(entry.key, int) for entry in path)
        return "muon" if in_block and x.ndim == 2 else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


def stack_equal_shapes(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on stacks of the leaves that have the same shape.

    For a rule that treats every leaf alike, the result is the same in a few large operations
    instead of many small ones, which a small model's Muon step needs: it is a chain of products of
    small matrices, and a program that writes each out takes long to compile.

    Args:
      inner: sees a dict `{"128x512": [number of leaves, 128, 512], ...}`.
    """

    def update(updates: Any, state: optax.OptState, params: Any = None):
        stacked, state = inner.update(
            _stack(updates), state, None if params is None else _stack(params)
        )
        return _unstack(stacked, updates), state

    return optax.GradientTransformation(lambda params: inner.init(_stack(params)), update)


def _stack(tree: Any) -> dict[str, jax.Array]:
    groups: dict[str, list[jax.Array]] = {}
    for leaf in jax.tree.leaves(tree):
        groups.setdefault("x".join(map(str, leaf.shape)), []).append(leaf)
    return as_parameters({name: jnp.stack(leaves) for name, leaves in groups.items()})


def _unstack(stacked: dict[str, jax.Array], like: Any) -> Any:
    """The inverse of `_stack`, for a tree of the structure of `like`."""
    rows = {name: iter(group) for name, group in stacked.items()}
    return jax.tree.map(lambda x: next(rows["x".join(map(str, x.shape))]), like)
