"""Distillation: a small model learns from a large one's answers, and from how it found them."""

import contextlib
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qkv_jax import nn
from qkv_jax.models import Decoder, DecoderConfig, watched_inputs
from qkv_jax.ops.basic import causal_mask
from qkv_jax.training.step import Batch, Loss, mean_over_targets


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """What a student learns from its teacher beside the targets.

        (1 - alpha) * cross entropy + alpha * soft_target_loss
            + relation_weight * relation_loss + hidden_weight * hidden_loss

    Args:
      alpha: from 0, the targets alone, to 1, the teacher alone.
      temperature: divides the logits of both.
      relation_weight: of `relation_loss` of queries, keys and values, each of the last layer.
      num_relations: R of these.
      hidden_weight: of `hidden_loss`, the mean over the student's hidden states; state m of L
        layers learns from the teacher's m * L' // L.

    Raises:
      ValueError: naming the field, what came and what was wanted.
    """

    alpha: float = 0.5
    temperature: float = 2.0
    relation_weight: float = 0.0
    num_relations: int = 4
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        _check("alpha", self.alpha, 0 <= self.alpha <= 1, "a number in [0, 1]")
        _check_temperature(self.temperature)
        for name in ("relation_weight", "hidden_weight"):
            value = getattr(self, name)
            _check(name, value, math.isfinite(value) and value >= 0, "a number >= 0")
        _check("num_relations", self.num_relations, self.num_relations >= 1, "an integer >= 1")


class Student(nnx.Module):
    """A decoder that learns, and the projection of its hidden states to the teacher's width.

    The projection learns with it; what is kept in the end is `model`.

    Args:
      model: the decoder.
      teacher_width: D of the teacher.
      rngs: where the projection begins.
    """

    def __init__(self, model: Decoder, teacher_width: int, *, rngs: nnx.Rngs):
        self.model = model
        width = model.config.width
        same = width == teacher_width
        self.projection = (
            None if same else nn.Linear(width, teacher_width, use_bias=False, rngs=rngs)
        )


def soft_target_loss(
    logits: jax.Array, teacher_logits: jax.Array, *, temperature: float
) -> jax.Array:
    """How far a student's distribution is from its teacher's, both softened.

        T^2 KL(softmax(teacher_logits / T) || softmax(logits / T))

    T^2 keeps the gradient's size, which 1 / T^2 would shrink. Hinton, Vinyals and Dean 2015,
    arxiv.org/abs/1503.02531. No gradient reaches the teacher.

    Args:
      logits: [..., V].
      teacher_logits: [..., V].
      temperature: T.

    Returns:
      [...], in nats times T^2, of the logits' dtype.

    Raises:
      ValueError: T is not a number > 0, or the shapes differ.
    """
    _check_temperature(temperature)
    _check_same_shapes("teacher_logits", teacher_logits, logits, "the same")
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    log_p, log_q = (jax.nn.log_softmax(x / temperature) for x in (teacher_logits, logits))
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(log_q, log_p)


def relation_loss(
    x: jax.Array, teacher_x: jax.Array, *, num_relations: int, mask: jax.Array | None = None
) -> jax.Array:
    """How differently two models relate tokens, whatever the numbers and widths of their heads.

        mean over B, R, T of KL(softmax(y' y'^T / sqrt(d')) || softmax(y y^T / sqrt(d)))

    where y is x with all heads side by side, cut into R parts of width d. Of queries, keys and
    values: MiniLMv2, Wang et al. 2021, arxiv.org/abs/2012.15828. No gradient reaches the teacher.

    Args:
      x: [B, T, N, H], a student's queries, or its keys or values.
      teacher_x: [B, T, N', H'].
      num_relations: R, which divides N H and N' H'.
      mask: bool [T, T], the keys that a query may see; None: all.

    Returns:
      [], in nats.

    Raises:
      ValueError: R does not divide, or the batch or length differs.
    """
    if x.shape[:2] != teacher_x.shape[:2]:
        raise ValueError(f"teacher_x: wanted {x.shape[:2]} + heads, as x, got {teacher_x.shape}")

    def log_relations(y: jax.Array) -> jax.Array:
        B, T, N, H = y.shape
        if N * H % num_relations:
            raise ValueError(
                f"num_relations: wanted a divisor of {N} heads x {H}, got {num_relations}"
            )
        y = y.reshape(B, T, num_relations, -1).astype(jnp.float32)
        logits = jnp.einsum("btrh,bsrh->brts", y, y) / math.sqrt(y.shape[-1])
        if mask is not None:  # the lowest finite number: in both, so that it adds 0
            logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
        return jax.nn.log_softmax(logits)

    teacher = log_relations(jax.lax.stop_gradient(teacher_x))
    return optax.losses.kl_divergence_with_log_targets(log_relations(x), teacher).mean()


def hidden_loss(state: jax.Array, teacher_state: jax.Array) -> jax.Array:
    """How far a hidden state is from the teacher's, as a share of its size.

        mean (state - teacher_state)^2 / mean teacher_state^2

    Jiao et al. 2020, TinyBERT, arxiv.org/abs/1909.10351, without the division, by which a weight
    means the same for every layer. No gradient reaches the teacher.

    Args:
      state: [..., D], the student's, projected to the teacher's width.
      teacher_state: [..., D].

    Returns:
      float32 [].

    Raises:
      ValueError: the shapes differ.
    """
    _check_same_shapes("teacher_state", teacher_state, state, "a projection to its width")
    state = state.astype(jnp.float32)
    teacher_state = jax.lax.stop_gradient(teacher_state).astype(jnp.float32)
    return jnp.square(state - teacher_state).mean() / jnp.square(teacher_state).mean()


def distillation_loss(graphdef: nnx.GraphDef, teacher: Decoder, config: DistillationConfig) -> Loss:
    """The loss of a decoder with this structure that learns from another, for `make_train_step`.

    A term of weight 0 is not computed: with alpha = 0 and no other weight it is
    `cross_entropy_loss`, and the teacher is not called. The teacher has no dropout.

    Args:
      graphdef: of the student: a `Decoder`, or a `Student`.
      teacher: of the same vocabulary; it stays as it is.
      config: the terms and their weights.

    Returns:
      A function of parameters, batch and key, as `cross_entropy_loss` returns. Tracing it raises a
      ValueError if the two do not fit.
    """
    teacher_graphdef, teacher_params = nn.split(teacher)
    guided = config.alpha > 0 or config.relation_weight > 0 or config.hidden_weight > 0

    def loss(params: nn.Params, batch: Batch, rng: jax.Array | None) -> jax.Array:
        student, projection = nn.merge(graphdef, params), None
        if isinstance(student, Student):
            student, projection = student.model, student.projection
        _check_vocabularies(student.config, teacher.config)
        inside = config.relation_weight > 0
        own = _call(student, batch["inputs"], rng, inside)
        total = jnp.float32(0)
        if config.alpha < 1:
            losses = optax.softmax_cross_entropy_with_integer_labels(own.logits, batch["targets"])
            total += (1 - config.alpha) * mean_over_targets(losses, batch)
        if not guided:
            return total
        other = _call(nn.merge(teacher_graphdef, teacher_params), batch["inputs"], None, inside)
        if config.alpha > 0:
            losses = soft_target_loss(own.logits, other.logits, temperature=config.temperature)
            total += config.alpha * mean_over_targets(losses, batch)
        if config.relation_weight > 0:
            total += config.relation_weight * _relation_losses(own, other, config.num_relations)
        if config.hidden_weight > 0:
            total += config.hidden_weight * _hidden_losses(own, other, projection)
        return total

    return loss


class _Call(NamedTuple):
    """A decoder's answer, and how it found it."""

    logits: jax.Array  # [B, T, V]
    states: list[jax.Array]  # L + 1 times [B, T, D]
    inputs: tuple[jax.Array, ...]  # queries, keys, values of the last layer; none if not asked for


def _call(model: Decoder, tokens: jax.Array, rng: jax.Array | None, inside: bool) -> _Call:
    with watched_inputs(model) if inside else contextlib.nullcontext([()]) as inputs:
        states = list(model.hidden_states(tokens, rng=rng))
    return _Call(model.logits(states[-1]), states, inputs[-1])


def _relation_losses(own: _Call, other: _Call, num_relations: int) -> jax.Array:
    mask = causal_mask(own.logits.shape[1])
    return sum(
        relation_loss(x, y, num_relations=num_relations, mask=mask)
        for x, y in zip(own.inputs, other.inputs, strict=True)
    )


def _hidden_losses(own: _Call, other: _Call, projection: nn.Linear | None) -> jax.Array:
    layers, teacher_layers = len(own.states) - 1, len(other.states) - 1
    losses = [
        hidden_loss(
            state if projection is None else projection(state),
            other.states[m * teacher_layers // layers],
        )
        for m, state in enumerate(own.states)
    ]
    return sum(losses) / len(losses)


def _check_vocabularies(student: DecoderConfig, teacher: DecoderConfig) -> None:
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"teacher: it knows {teacher.vocab_size} tokens and the student {student.vocab_size}; "
            "wanted the same vocabulary"
        )


def _check(name: str, value: float, right: bool, wanted: str) -> None:
    if not right:
        raise ValueError(f"{name}: wanted {wanted}, got {value!r}")


def _check_temperature(value: float) -> None:
    _check("temperature", value, math.isfinite(value) and value > 0, "a number > 0")


def _check_same_shapes(name: str, x: jax.Array, like: jax.Array, wanted: str) -> None:
    if x.shape != like.shape:
        raise ValueError(f"{name}: {x.shape} beside the student's {like.shape}; wanted {wanted}")
