"""Quantized matrices are the nearest ones on a scale; a model of them is one with these."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.inference import QuantizedLinear, quantize
from qkv_jax.models import Decoder, DecoderConfig
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, V, D, F = 2, 7, 11, 12, 10
TOKENS = np.random.RandomState(0).randint(0, V, (B, T))
CONFIG = DecoderConfig(
    vocab_size=V, context=T, num_layers=2, width=D, num_heads=2, head_dim=6, mlp_width=18,
    position="rotary", tie_embeddings=False,
)  # fmt: skip


def decoder(**changes):
    return randomised(Decoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)))


def matrix(layer):
    """What a quantized layer's integers stand for."""
    values, scale = np.asarray(layer.values[...], np.float32), np.asarray(layer.scale[...])
    return values * np.repeat(scale, len(values) // len(scale), 0)


def dequantized(model, dtype="int8", group=None):
    """The model with every linear layer's matrix replaced by that of its quantized layer."""
    model = nn.merge(*nn.split(model))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nn.Linear):
            module.kernel[...] = jnp.asarray(matrix(QuantizedLinear(module, dtype, group=group)))
    return model


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_layers_integers_are_the_nearest_ones_on_the_scale_of_their_group(dtype, group, use_bias):
    layer = randomised(nn.Linear(D, F, use_bias=use_bias, rngs=nnx.Rngs(0)))
    made, kernel = QuantizedLinear(layer, dtype, group=group), np.asarray(layer.kernel[...])
    largest = np.abs(kernel.reshape(-1, group or D, F)).max(1)
    assert made.values.dtype == dtype
    assert_close(made.scale[...], largest / {"int8": 127.5, "int4": 7.5}[dtype])
    steps = kernel / np.repeat(made.scale[...], group or D, 0)
    assert np.abs(np.asarray(made.values[...], np.float32) - steps).max() <= 0.5 + 1e-4
    x = np.random.RandomState(1).randn(B, T, D).astype(np.float32)
    assert_close(made(x), x @ matrix(made) + (layer.bias[...] if use_bias else 0), scale=10)


def test_activations_are_rounded_for_each_token():
    made = QuantizedLinear(
        randomised(nn.Linear(D, F, use_bias=False, rngs=nnx.Rngs(0))), activations="int8"
    )
    x = np.random.RandomState(1).randn(B, T, D).astype(np.float32)
    x[..., 0] = 4 + np.arange(T)  # the largest of its token: 127.5, which no sign rounds up
    scale = x[..., :1] / 127.5
    values = np.minimum(np.round(x / scale), 127)
    assert_close(made(x), values @ np.asarray(made.values[...], int) * scale * made.scale[...])
    assert "preferred_element_type=int32" in str(jax.make_jaxpr(made)(x))  # of two of integers


def test_activations_are_rounded_for_all_tokens_by_the_largest_of_them():
    layer = randomised(nn.Linear(D, F, use_bias=False, rngs=nnx.Rngs(0)))
    made = QuantizedLinear(layer, activations="int8_tensor")
    x = np.random.RandomState(1).randn(B, T, D).astype(np.float32)
    x[1, 3, 5] = 40.0  # an outlier, beside which all others are -9 to 9 steps
    values = np.minimum(np.round(x * 127.5 / 40), 127)
    matrix = np.asarray(made.values[...], int)
    assert_close(made(x), values @ matrix * (40 / 127.5) * made.scale[...], scale=5)


@pytest.mark.parametrize("changes", [
    {}, {"num_kv_heads": 1, "activation": "swiglu"}, {"mixer": "gated_delta,attention"},
    {"mixer": "differential"}, {"mixer": "gated_conv,lstm", "head_dim": None},
    {"mixer": "talking_heads"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("choices", [{}, {"dtype": "int4", "group": 6}], ids=str)
def test_a_quantized_model_is_the_one_with_the_matrices_that_its_integers_stand_for(
    changes, choices
):
    model = decoder(**changes)
    before = nn.split(model)
    quantized, expected = quantize(model, **choices), dequantized(model, **choices)
    assert_close(quantized(TOKENS), expected(TOKENS), scale=100)
    assert np.abs(quantized(TOKENS) - model(TOKENS)).max() > 1e-3
    after = nn.split(model)
    assert after[0] == before[0]
    jax.tree.map(np.testing.assert_array_equal, after[1], before[1])


def test_all_matrices_but_the_embedding_are_integers():
    params = nn.split(quantize(decoder()))[1]
    floats = {
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_flatten_with_path(params)[0]
        if x.dtype != jnp.int8 and min(x.shape) > 1 and x.ndim == 2
    }
    assert floats == {"['embedding']['embedding']"}


@pytest.mark.parametrize("choices", [{"dtype": "int4", "group": 6}, {"activations": "int8"}])
def test_a_quantized_model_decodes_what_it_computes_at_once_jitted(choices):
    graphdef, params = nn.split(quantize(decoder(), **choices))

    @jax.jit
    def decoded(params):
        model = nn.merge(graphdef, params)
        x, cache = model.extend(TOKENS[:, :4], model.init_cache(B, T), positions=jnp.arange(4))
        y, _ = model.extend(TOKENS[:, 4:], cache, positions=jnp.arange(4, T))
        return model.logits(jnp.concatenate([x, y], 1))

    # Rounded activations jump where a sum's last digit differs.
    scale = 10 if "group" in choices else 1e4
    assert_close(decoded(params), nn.merge(graphdef, params)(TOKENS), scale=scale)


@pytest.mark.parametrize("choices, words", [
    ({"dtype": "int2"}, "dtype: wanted one of .*'int4'.*, got 'int2'"),
    ({"group": 5}, "group: wanted a divisor of the layer's 1. inputs, got 5"),
    ({"group": 0}, "group: wanted a divisor of the layer's 1. inputs, got 0"),
    ({"activations": "int4"}, "activations: wanted one of .*'int8'.* or None, got 'int4'"),
])  # fmt: skip
def test_wrong_choices_are_named(choices, words):
    with pytest.raises(ValueError, match=words):
        quantize(decoder(), **choices)


def test_latent_attention_is_refused():
    with pytest.raises(ValueError, match="'latent'"):
        quantize(decoder(mixer="latent,attention"))
