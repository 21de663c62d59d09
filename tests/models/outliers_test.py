"""Activations are those that make the model's logits; their statistics those of NumPy and SciPy."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from qkv_jax.inference import quantize
from qkv_jax.models import Decoder, DecoderConfig
from qkv_jax.models.outliers import activations, kurtosis, largest
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, V, L, D = 2, 13, 11, 3, 10
TOKENS = np.random.RandomState(0).randint(0, V, (B, T))
CONFIG = DecoderConfig(
    vocab_size=V, context=T, num_layers=L, width=D, num_heads=5, mlp_width=7, position="alibi"
)


def decoder(**changes):
    return randomised(Decoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("changes", [
    {}, {"norm_position": "both", "position": "rotary", "mixer": "value_residual,gated_attention"},
], ids=str)  # fmt: skip
def test_activations_add_up_to_the_logits(changes):
    model = decoder(**changes)
    found = jax.jit(lambda tokens: activations(model, tokens))(TOKENS)
    assert {name: x.shape for name, x in found.items()} == dict.fromkeys(
        ("attention", "feed_forward", "residual"), (L, B, T, D)
    )
    assert_close(model.logits(found["residual"][-1]), model(TOKENS), scale=10)
    if not changes:
        before = np.concatenate([model.embed(TOKENS)[None], found["residual"][:-1]])
        added = found["attention"] + found["feed_forward"]
        assert_close(before + added, found["residual"], scale=10)


def test_a_model_of_attention_alone_has_no_other_branch():
    found = activations(decoder(mlp_width=0), TOKENS)
    assert set(found) == {"attention", "residual"}


def test_a_quantized_models_activations_are_its_own():
    model = decoder()
    quantized = quantize(model, activations="int8")
    found = activations(quantized, TOKENS)
    assert_close(model.logits(found["residual"][-1]), quantized(TOKENS), scale=10)
    assert np.abs(found["residual"] - activations(model, TOKENS)["residual"]).max() > 1e-3


def test_the_statistics_are_those_of_numpy_and_scipy():
    x = np.random.RandomState(0).standard_t(5, (L, B, T, D)).astype(np.float32)
    flat = x.reshape(L, B, -1)
    assert_close(largest(x), np.abs(flat).max(-1))
    assert_close(kurtosis(x), scipy.stats.kurtosis(flat, axis=-1, fisher=False), scale=20)


def test_one_number_among_equal_ones_is_the_heaviest_tail():
    x = np.zeros((1, T, D), np.float32)
    assert kurtosis(x) == 0
    x[0, 4, 2] = -6
    n = T * D
    assert largest(x) == 6
    assert_close(kurtosis(x), [(n - 1) + 1 / (n - 1) - 1], scale=10)
