"""Gates of heads are the hard concrete ones, and a closed gate is a head that went."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.models import (
    Decoder,
    DecoderConfig,
    closed_heads,
    gated,
    open_gates,
    probability_open,
    prune_heads,
    sampled_gates,
    settled_gates,
    silence_heads,
)
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, V, L, N, H, D = 2, 13, 11, 3, 6, 4, 10
TOKENS = np.random.RandomState(0).randint(0, V, (B, T))
CONFIG = DecoderConfig(
    vocab_size=V, context=T, num_layers=L, width=D, num_heads=N, head_dim=H, mlp_width=7,
    position="rotary",
)  # fmt: skip
LOG_ALPHA = np.array([-4.0, -1.0, 0.0, 0.7, 3.0], np.float32)


def decoder(**changes):
    return randomised(Decoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)))


def test_a_draw_is_that_of_the_papers_formula():
    u = np.random.RandomState(0).uniform(0.01, 0.99, (7, 5)).astype(np.float32)
    stretched = 1.2 / (1 + np.exp(-(np.log(u / (1 - u)) + LOG_ALPHA) / (2 / 3))) - 0.1
    draws = sampled_gates(jnp.asarray(LOG_ALPHA), u)
    assert_close(draws, np.clip(stretched, 0, 1), scale=5)
    assert (draws == 0).any() and (draws == 1).any() and ((draws > 0) & (draws < 1)).any()
    assert_close(settled_gates(LOG_ALPHA), np.clip(1.2 / (1 + np.exp(-LOG_ALPHA)) - 0.1, 0, 1))


def test_the_expected_l0_norm_is_how_often_draws_are_not_0():
    u = np.random.RandomState(0).uniform(size=(40_000, 5)).astype(np.float32)
    counted = (np.asarray(sampled_gates(jnp.asarray(LOG_ALPHA), u)) > 0).mean(0)
    np.testing.assert_allclose(probability_open(LOG_ALPHA), counted, atol=0.01)


def test_a_draws_gradient_is_that_of_differences_and_0_where_it_is_clipped():
    u = np.full(5, 0.4)
    with jax.enable_x64(True):
        at = np.asarray(LOG_ALPHA, np.float64)
        gradient = np.asarray(jax.grad(lambda x: sampled_gates(x, u).sum())(at))
        step = 1e-6
        up, down = (np.asarray(sampled_gates(at + s, u)) for s in (step, -step))
    np.testing.assert_allclose(gradient, (up - down) / (2 * step), atol=1e-8)
    assert gradient[0] == 0 == gradient[-1] and (gradient[1:4] > 0).all()


@pytest.mark.parametrize("changes, closed", [
    ({}, {0: [1, 4], 2: [0]}), ({"num_kv_heads": 3}, {0: [0], 2: [1, 2]}),
    ({"mixer": "attention,lstm"}, {0: [1], 2: [0]}),
], ids=str)  # fmt: skip
def test_gates_of_0_and_1_are_silent_heads(changes, closed):
    """`closed` are key/value heads."""
    model = decoder(**changes)
    gates = {i: np.ones(len(x), np.float32) for i, x in open_gates(model).items()}
    for layer, heads in closed.items():
        gates[layer][heads] = 0
    group = N // model.config.kv_heads
    heads = {i: [k * group + j for k in ks for j in range(group)] for i, ks in closed.items()}
    out = jax.jit(lambda gates: gated(model, gates)(TOKENS))(gates)
    assert_close(out, silence_heads(model, heads)(TOKENS), scale=10)
    assert_close(out, prune_heads(model, heads)(TOKENS), scale=10)


def test_a_gate_scales_its_head_and_learns():
    model = decoder(num_layers=1, mlp_width=0)
    x, gates = model.embed(TOKENS), np.linspace(0.1, 0.9, N).astype(np.float32)
    mixer = model.blocks[0].mixer
    plain = mixer.op
    scaled = gated(model, {0: gates}).blocks[0].mixer(x)
    mixer.op = lambda *args, **kwargs: plain(*args, **kwargs) * gates[:, None]
    assert_close(scaled, mixer(x), scale=10)
    mixer.op = plain
    gradient = jax.grad(lambda gates: gated(model, {0: gates})(TOKENS).sum())(gates)
    assert np.isfinite(gradient).all() and (np.abs(gradient) > 0).all()


def test_the_most_closed_heads_go_but_never_a_layers_last():
    model = decoder(num_layers=2, num_heads=3, head_dim=4)
    log_alpha = {0: np.array([-9.0, -8.0, -7.0]), 1: np.array([3.0, -1.0, -5.0])}
    assert closed_heads(model, log_alpha) == {0: [0, 1], 1: [2]}  # -2.4 closes a gate for good
    assert closed_heads(model, log_alpha, 1) == {0: [0]}
    assert closed_heads(model, log_alpha, 4) == {0: [0, 1], 1: [1, 2]}
    assert closed_heads(model, {0: np.zeros(3), 1: np.zeros(3)}) == {}
    prune_heads(model, closed_heads(model, log_alpha, 4))
    for number in (5, -1):
        with pytest.raises(ValueError, match=f"number: .* from 0 to 4, .* got {number}"):
            closed_heads(model, log_alpha, number)


def test_groups_go_together():
    model = decoder(num_layers=1, num_kv_heads=3)
    log_alpha = {0: np.array([1.0, -5.0, 2.0])}
    assert closed_heads(model, log_alpha) == {0: [2, 3]}
    with pytest.raises(ValueError, match=r"number: wanted a multiple of 2 .* got 3"):
        closed_heads(model, log_alpha, 3)


def test_what_has_no_gates_is_named():
    with pytest.raises(ValueError, match=r"model\.mixer = 'lstm'.*sliding_window"):
        open_gates(decoder(mixer="lstm", position="none"))
    with pytest.raises(ValueError, match=r"model\.heads_per_layer = "):
        open_gates(prune_heads(decoder(), {0: [1]}))
    with pytest.raises(ValueError, match=r"factors: .* 6 heads of layer 1, .* \[5\]"):
        gated(decoder(), {1: np.ones(5)})
    with pytest.raises(ValueError, match="layer 1 is 'talking_heads'"):
        gated(decoder(mixer="attention,talking_heads"), {1: np.ones(6)})


@pytest.mark.oracle
def test_the_draws_and_the_norm_are_those_of_torch():
    """The uniform distribution through its transforms, and the distribution function at 0."""
    torch = pytest.importorskip("torch")
    shift, stretch = (torch.distributions.AffineTransform(*x) for x in ((0.0, 1.5), (-0.1, 1.2)))
    sigmoid = torch.distributions.SigmoidTransform()
    alpha = torch.distributions.AffineTransform(torch.tensor(LOG_ALPHA), 1.0)
    uniform = torch.distributions.Uniform(torch.zeros(5), torch.ones(5), validate_args=False)
    steps = [sigmoid.inv, alpha, shift, sigmoid, stretch]
    stretched = torch.distributions.TransformedDistribution(uniform, steps)
    assert_close(probability_open(LOG_ALPHA), 1 - stretched.cdf(torch.zeros(5)).numpy(), scale=5)
    u = torch.linspace(0.1, 0.9, 5)
    draws = u
    for step in steps:
        draws = step(draws)
    assert_close(sampled_gates(LOG_ALPHA, u.numpy()), draws.clamp(0, 1).numpy(), scale=5)


def test_the_gates_of_a_model_begin_open():
    gates = open_gates(decoder(num_kv_heads=2, mixer="attention,lstm"))
    assert {i: x.shape for i, x in gates.items()} == {0: (2,), 2: (2,)}
    assert all((np.asarray(probability_open(x)) > 0.97).all() for x in gates.values())
    assert nn.count(gates) == 4
