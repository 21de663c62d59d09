"""What a student learns from its teacher: the terms by hand and beside PyTorch's, and the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qkv_jax import nn, ops, training
from qkv_jax.models import Decoder, DecoderConfig, attention_inputs
from qkv_jax.training import DistillationConfig, distillation_loss
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, V, D = 2, 5, 7, 12
CONFIG = DecoderConfig(
    vocab_size=V, context=T, num_layers=1, width=D, num_heads=2, head_dim=6, position="rotary"
)
# Twice the layers, other heads, another width.
TEACHER = dataclasses.replace(CONFIG, num_layers=2, width=20, num_heads=3, head_dim=10)
TOKENS = np.random.RandomState(0).randint(0, V, (B, T + 1))
BATCH = {"inputs": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}


def decoder(config):
    return randomised(Decoder(config, rngs=nnx.Rngs(0)))


GRAPHDEFS, PARAMS = zip(*(nn.split(decoder(config)) for config in (CONFIG, TEACHER)), strict=True)


def normal(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def softmax(x):
    exps = np.exp(np.asarray(x, np.float64))
    return exps / exps.sum(-1, keepdims=True)


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


# The terms


def test_soft_targets_by_hand():
    # Two answers, T = 2: the teacher says 3/4 and 1/4, the student says 1/2 and 1/2.
    teacher, student = jnp.array([2 * np.log(3.0), 0.0]), jnp.zeros(2)
    loss = training.soft_target_loss(student, teacher, temperature=2.0)
    assert_close(loss, 4 * (0.75 * np.log(1.5) + 0.25 * np.log(0.5)))
    assert_close(training.soft_target_loss(teacher, teacher, temperature=3.0), 0.0)


@pytest.mark.oracle
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_targets_and_their_gradient_are_pytorchs(temperature):
    import torch

    student, teacher = normal(B, T, V), normal(B, T, V, seed=1)
    theirs = torch.tensor(student, requires_grad=True)
    expected = temperature**2 * torch.nn.functional.kl_div(
        torch.log_softmax(theirs / temperature, -1),
        torch.log_softmax(torch.tensor(teacher) / temperature, -1),
        reduction="none", log_target=True,
    ).sum(-1)  # fmt: skip
    expected.mean().backward()

    def mean(logits):
        losses = training.soft_target_loss(logits, teacher, temperature=temperature)
        return losses.mean(), losses

    gradient, losses = jax.grad(mean, has_aux=True)(student)
    assert_close(losses, expected.detach().numpy(), scale=4)
    assert_close(gradient, theirs.grad.numpy())


def test_at_a_high_temperature_the_gradient_is_that_of_equal_logits():
    # Hinton et al. 2015, eq. 4: for centred logits, (z - v) / V whatever T is.
    student, teacher = (x - x.mean() for x in (normal(V), normal(V, seed=1)))
    gradient = jax.grad(training.soft_target_loss)(student, teacher, temperature=1000.0)
    np.testing.assert_allclose(gradient, (student - teacher) / V, rtol=0, atol=2e-3)


SEEN = np.tril(np.ones((T, T), bool))


def relations(x, num_relations):
    y = np.asarray(x, np.float64).reshape(*x.shape[:2], num_relations, -1)
    logits = np.einsum("btrh,bsrh->brts", y, y) / np.sqrt(y.shape[-1])
    return softmax(np.where(SEEN, logits, -np.inf))


def causal_kl(p, q):
    return np.where(SEEN, p * np.log(np.where(SEEN, p, 1) / np.where(SEEN, q, 1)), 0).sum(-1).mean()


def test_relations_compare_models_of_different_heads():
    own, other = normal(B, T, 2, 6), normal(B, T, 4, 9, seed=1)
    expected = causal_kl(relations(other, 3), relations(own, 3))
    mask = ops.basic.causal_mask(T)

    def loss(x, y):
        return training.relation_loss(x, y, num_relations=3, mask=mask)

    assert_close(jax.jit(loss)(own, other), expected)
    assert_close(loss(own, own), 0.0)
    # One relation of all heads sees no difference where heads only changed places.
    alike = training.relation_loss(own, own[:, :, ::-1], num_relations=1)
    assert_close(alike, 0.0)


def test_relations_push_the_student_and_never_through_what_is_hidden():
    own, other = normal(B, T, 2, 6), normal(B, T, 4, 9, seed=1)
    mask = ops.basic.causal_mask(T)

    def loss(x, y):
        return training.relation_loss(100 * x, y, num_relations=3, mask=mask)

    gradient = jax.grad(loss)(own, other)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    first = jax.grad(lambda x: training.relation_loss(x, other[:, :1], num_relations=3))(own[:, :1])
    assert_close(first, np.zeros_like(first))  # one token relates to itself alone


def test_hidden_states_by_hand():
    state, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 3.0]])
    assert_close(training.hidden_loss(state, teacher), 0.5 / 5)


@pytest.mark.parametrize("term", [
    lambda own, other: training.soft_target_loss(own, other, temperature=2.0).sum(),
    lambda own, other: training.relation_loss(own, other, num_relations=2),
    training.hidden_loss,
])  # fmt: skip
def test_no_gradient_reaches_the_teacher(term):
    own, other = normal(B, T, 2, 6), normal(B, T, 2, 6, seed=1)
    mine, theirs = jax.grad(term, argnums=(0, 1))(own, other)
    assert np.abs(mine).max() > 0 and not np.asarray(theirs).any()


# The loss of a model


@jax.jit
def seen(params):
    """Of both models: logits, hidden states, and queries, keys and values of all layers."""
    models = [nn.merge(graphdef, own) for graphdef, own in zip(GRAPHDEFS, params, strict=True)]
    return [
        (model(BATCH["inputs"]), list(model.hidden_states(BATCH["inputs"])),
         attention_inputs(model, BATCH["inputs"]))
        for model in models
    ]  # fmt: skip


def far(params):
    """KL from the teacher's answers to the student's."""
    (logits, *_), (theirs, *_) = seen(params)
    return kl(softmax(theirs), softmax(logits)).mean()


def test_the_loss_is_the_sum_of_its_terms():
    student = training.Student(decoder(CONFIG), TEACHER.width, rngs=nnx.Rngs(2))
    graphdef, params = nn.split(student)
    weights = np.array([[1, 0, 2, 0, 0], [0, 1, 1, 1, 0.5]], np.float32)
    config = DistillationConfig(0.3, 2.0, relation_weight=0.7, num_relations=3, hidden_weight=0.2)
    loss = jax.jit(distillation_loss(graphdef, decoder(TEACHER), config))
    (logits, states, inputs), (soft, theirs, their_inputs) = seen(PARAMS)
    hard = -np.log(np.take_along_axis(softmax(logits), BATCH["targets"][..., None], -1))[..., 0]
    answers = 0.7 * hard + 0.3 * 4 * kl(softmax(soft / 2), softmax(logits / 2))
    expected = (answers * weights).sum() / weights.sum()
    for x, y in zip(inputs, their_inputs, strict=True):  # of the last layers
        expected += 0.7 * causal_kl(relations(y[-1], 3), relations(x[-1], 3))
    kernel = np.asarray(student.projection.kernel[...], np.float64)
    for x, y in zip(states, (theirs[0], theirs[2]), strict=True):
        expected += 0.1 * (np.square(x @ kernel - y).mean() / np.square(y).mean())
    assert_close(loss(params, BATCH | {"weights": weights}, None), expected, scale=4)


def steps(loss, params, count=3):
    optimizer = optax.adam(1e-2)
    step = jax.jit(training.make_train_step(loss, optimizer, seed=0))
    state, losses = training.TrainState.create(params, optimizer), []
    for _ in range(count):
        state, metrics = step(state, BATCH)
        losses.append(metrics["loss"])
    return state, losses


def test_without_its_teacher_a_student_trains_as_any_model_does():
    graphdef, params = nn.split(decoder(dataclasses.replace(CONFIG, dropout_rate=0.3)))
    alone = distillation_loss(graphdef, decoder(TEACHER), DistillationConfig(alpha=0.0))
    expected = steps(training.cross_entropy_loss(graphdef), params)
    jax.tree.map(np.testing.assert_array_equal, steps(alone, params), expected)


def test_a_taught_student_comes_near_its_teacher_which_stays_as_it_was():
    teacher = decoder(TEACHER)
    student = training.Student(decoder(CONFIG), TEACHER.width, rngs=nnx.Rngs(2))
    graphdef, params = nn.split(student)
    config = DistillationConfig(1.0, relation_weight=0.1, num_relations=3, hidden_weight=0.1)
    state, losses = steps(distillation_loss(graphdef, teacher, config), params, 40)
    assert losses[-1] < 0.5 * losses[0]
    after = nn.merge(graphdef, state.params)
    assert np.abs(after.projection.kernel[...] - student.projection.kernel[...]).max() > 1e-3
    assert far([nn.split(after.model)[1], nn.split(teacher)[1]]) < 0.5 * far(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, nn.split(teacher)[1], PARAMS[1])


# What cannot be


@pytest.mark.parametrize("fields, words", [
    ({"alpha": -0.1}, r"alpha: wanted a number in \[0, 1\], got -0.1"),
    ({"alpha": 1.5}, "alpha: wanted"),
    ({"alpha": float("nan")}, "alpha: wanted"),
    ({"temperature": 0.0}, "temperature: wanted a number > 0, got 0.0"),
    ({"temperature": float("inf")}, "temperature: wanted"),
    ({"relation_weight": -1.0}, "relation_weight: wanted a number >= 0"),
    ({"hidden_weight": float("nan")}, "hidden_weight: wanted"),
    ({"num_relations": 0}, "num_relations: wanted an integer >= 1"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        DistillationConfig(**fields)


def test_a_temperature_of_zero_divides_nothing():
    with pytest.raises(ValueError, match="temperature: wanted a number > 0, got 0"):
        training.soft_target_loss(jnp.zeros(V), jnp.zeros(V), temperature=0)


def test_what_does_not_fit_is_refused_before_it_is_compiled():
    graphdef, params = nn.split(decoder(CONFIG))

    def trace(teacher, **fields):
        loss = distillation_loss(graphdef, decoder(teacher), DistillationConfig(**fields))
        jax.eval_shape(loss, params, BATCH, None)

    with pytest.raises(ValueError, match="teacher: it knows 11 tokens and the student 7"):
        trace(dataclasses.replace(TEACHER, vocab_size=11))
    with pytest.raises(ValueError, match="num_relations: wanted a divisor of 2 heads x 6, got 5"):
        trace(TEACHER, relation_weight=1.0, num_relations=5)
    with pytest.raises(ValueError, match=r"teacher_state: .* wanted a projection to its width"):
        trace(TEACHER, hidden_weight=1.0)
    with pytest.raises(ValueError, match="teacher_x: wanted"):
        training.relation_loss(normal(B, T, 2, 6), normal(B, T + 1, 2, 6), num_relations=2)
