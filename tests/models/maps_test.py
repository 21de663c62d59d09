"""The attention weights of a model's layers."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn, ops
from qkv_jax.models import (
    ConvSeq2Seq,
    ConvSeq2SeqConfig,
    Decoder,
    DecoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    RecurrentSeq2Seq,
    RecurrentSeq2SeqConfig,
    alignment_maps,
    attention_inputs,
    attention_maps,
    prefix_matching,
    previous_token,
)
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


def test_the_inputs_are_what_the_maps_are_made_of():
    model = decoder()
    q, k, v = attention_inputs(model, TOKENS)
    assert q.shape == (L, B, T, N, 2) and k.shape == v.shape == (L, B, T, 3, 2)
    maps = attention_maps(model, TOKENS)
    for layer in range(L):
        weights = ops.attention_weights(q[layer], k[layer], mask=ops.masks.Causal())
        assert_close(weights, maps[layer])
    x = model.embed(TOKENS)
    assert_close(v[0], model.blocks[0].mixer.project(model.blocks[0].mixer_norm(x))[2])
    with pytest.raises(
        NotImplementedError, match="attention_inputs: layer 0, LSTM, has no queries"
    ):
        attention_inputs(decoder(mixer="lstm", num_kv_heads=None, qk_norm=False), TOKENS)


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


def test_prefix_matching_is_the_weight_on_what_followed_the_same_token():
    rng = np.random.RandomState(0)
    maps = np.tril(rng.rand(L, B, N, 11, 11)).astype("f")
    tokens = np.array([[3, 1, 2, 3, 1, 3, 0, 0, 4, 5, 6], np.arange(11)])  # one row never repeats
    found = np.asarray(prefix_matching(maps, tokens))
    # By hand: the places of tokens that came before, with the places after those.
    after = {3: [1], 4: [2], 5: [1, 4], 7: [7]}
    wanted = sum(maps[:, 0, :, t, places].sum(0) for t, places in after.items()) / len(after)
    assert found.shape == (L, N)
    assert_close(found, wanted)
    assert np.isnan(np.asarray(prefix_matching(maps, tokens[[1, 1]]))).all()


def test_a_head_that_looks_at_the_token_before_is_seen_to():
    maps = np.zeros((L, B, N, T, T), "f")
    maps[..., 0, 0] = 1
    for t in range(1, T):
        maps[..., t, t - 1] = 1
    maps[1] = np.eye(T)
    maps[2, 1, 0] = np.eye(T)
    np.testing.assert_allclose(
        previous_token(maps), [[1] * N, [0] * N, [0.5] + [1] * (N - 1)], atol=1e-6
    )


S, LENGTHS = 7, np.array([7, 3])
SOURCE = np.random.RandomState(1).randint(0, V, (B, S))


def seq2seq(kind, **changes):
    sizes = {"vocab_size": V, "num_layers": L, "width": 12} | changes
    if kind == "recurrent":
        return RecurrentSeq2Seq(RecurrentSeq2SeqConfig(**sizes), rngs=nnx.Rngs(0))
    if kind == "convolutional":
        return ConvSeq2Seq(ConvSeq2SeqConfig(**sizes, context=S), rngs=nnx.Rngs(0))
    config = EncoderDecoderConfig(**sizes, context=S, num_heads=N, remat=True)
    return EncoderDecoder(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "kind, layers, heads",
    [("recurrent", 1, 1), ("convolutional", L, 1), ("transformer", L, N)],
)
def test_alignments_are_weights_over_the_source_alone(kind, layers, heads):
    model = randomised(seq2seq(kind))
    graphdef, _ = nn.split(model)
    maps = np.asarray(alignment_maps(model, SOURCE, TOKENS, source_lengths=LENGTHS))
    assert maps.shape == (layers, B, heads, T, S) and maps.dtype == np.float32
    assert_close(maps.sum(-1), np.ones(maps.shape[:-1]))
    assert (maps[:, 1, ..., LENGTHS[1] :] == 0).all() and (maps[:, 0].max((0, 1, 2)) > 0.01).all()
    assert np.ptp(maps, axis=-1).max() > 0.1
    assert nn.split(model)[0] == graphdef
    # What a token looks at cannot depend on later ones.
    later = TOKENS.copy()
    later[:, -1] = (later[:, -1] + 1) % V
    again = np.asarray(alignment_maps(model, SOURCE, later, source_lengths=LENGTHS))
    assert_close(again[..., :-1, :], maps[..., :-1, :])


def test_a_model_without_attention_has_no_alignments():
    with pytest.raises(NotImplementedError, match="no attention to the source"):
        alignment_maps(seq2seq("recurrent", attention="none"), SOURCE, TOKENS)
