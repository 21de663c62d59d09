"""The attention weights of a model's layers."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn, ops
from qkv_jax.models import Decoder, DecoderConfig, attention_maps
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, V, N, L = 2, 5, 7, 6, 3
TOKENS = np.random.RandomState(0).randint(0, V, (B, T))
CONFIG = DecoderConfig(
    vocab_size=V, context=T, num_layers=L, width=12, num_heads=N, num_kv_heads=3, qk_norm=True,
    position="rotary",
)  # fmt: skip


def decoder(**changes):
    return randomised(Decoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("remat", [False, True])
def test_the_maps_are_the_weights_of_each_layer(remat):
    model = decoder(remat=remat)
    maps = np.asarray(attention_maps(model, TOKENS))
    assert maps.shape == (L, B, N, T, T) and maps.dtype == np.float32
    x = model.embed(TOKENS)
    for block, weights in zip(model.blocks, maps, strict=True):
        q, k, _ = block.mixer.project(block.mixer_norm(x))
        q, k = block.mixer.query_norm(q), block.mixer.key_norm(k)
        q, k = (ops.positions.rotary(y, np.arange(T)) for y in (q, k))
        logits = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, 2, axis=2)) / np.sqrt(2)
        exps = np.where(np.tril(np.ones((T, T), bool)), np.exp(logits), 0)
        assert_close(weights, exps / exps.sum(-1, keepdims=True), scale=10)
        x = block(x, mask=ops.masks.Causal())


def test_the_model_comes_back_as_it_was():
    model = decoder()
    graphdef, _ = nn.split(model)
    attention_maps(model, TOKENS)
    assert nn.split(model)[0] == graphdef
    assert all(block.mixer.op is ops.attention for block in model.blocks)


def test_the_model_comes_back_as_it_was_after_an_error():
    model = decoder()
    with pytest.raises(Exception):
        attention_maps(model, TOKENS[0])
    assert all(block.mixer.op is ops.attention for block in model.blocks)
    assert model.config == CONFIG


def test_a_sparse_op_tells_the_weights_under_its_own_mask():
    maps = np.asarray(attention_maps(decoder(mixer="sliding_window", window=2), TOKENS))
    distance = np.arange(T)[:, None] - np.arange(T)
    assert ((maps > 0) == ((distance >= 0) & (distance <= 2))).all()


def test_a_mixer_without_attention_weights_is_named():
    with pytest.raises(NotImplementedError, match="layer 1, LSTM, has no attention weights"):
        attention_maps(decoder(mixer="attention,lstm", num_kv_heads=None), TOKENS)
