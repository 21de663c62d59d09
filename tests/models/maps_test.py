"""The attention weights of a model's layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qkv_jax import nn, ops
from qkv_jax.models import (
    ConvSeq2Seq,
    ConvSeq2SeqConfig,
    Decoder,
    DecoderConfig,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    MaskedLanguageModel,
    RecurrentSeq2Seq,
    RecurrentSeq2SeqConfig,
    alignment_maps,
    attention_gradients,
    attention_inputs,
    attention_maps,
    encoder_decoder_maps,
    head_importance,
    logit_lens,
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


def row_losses(logits):
    """Of each row, [B]: of logits that hang together with all layers' weights."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(TOKENS)).sum(-1)


@pytest.mark.parametrize("remat", [False, True])
def test_importance_is_the_derivative_in_what_scales_the_heads_output(remat):
    model = decoder(remat=remat)
    graphdef, params = nn.split(model)
    found = head_importance(model, TOKENS, lambda logits: row_losses(logits).sum())
    assert found.shape == (L, N) and nn.split(model)[0] == graphdef
    # A factor of a head's output is one of its rows of the projection after it.
    of_rows = jax.jacobian(lambda params: row_losses(nn.merge(graphdef, params)(TOKENS)))
    slopes = jax.jit(of_rows)(params)
    for layer in range(L):
        kernel = params["blocks"][layer]["mixer"]["out"]["kernel"]
        changes = (slopes["blocks"][layer]["mixer"]["out"]["kernel"] * kernel).reshape(B, N, -1)
        assert_close(found[layer], np.abs(changes.sum(-1)).mean(0), scale=100)


def test_the_gradient_of_a_weight_is_what_the_loss_changes_by():
    def loss(logits):
        return row_losses(logits).sum()

    model = decoder()
    graphdef, _ = nn.split(model)
    maps, gradients = attention_gradients(model, TOKENS, loss)
    assert maps.shape == gradients.shape == (L, B, N, T, T) and nn.split(model)[0] == graphdef
    assert_close(maps, attention_maps(model, TOKENS))
    # A head's output is linear in its weights: scaling all of them scales it.
    of_heads = np.abs(np.einsum("lbnts,lbnts->lbn", maps, gradients)).mean(1)
    assert_close(of_heads, head_importance(model, TOKENS, loss), scale=100)
    # One weight of the last layer, by hand: what it adds to the residual stream is its value.
    x = jnp.asarray(model.embed(TOKENS))
    for block in model.blocks[:-1]:
        x = block(x, mask=ops.masks.Causal())
    block, t, s, head = model.blocks[-1], 3, 1, 4
    value = block.mixer.project(block.mixer_norm(x))[2][0, s, head // 2]  # two heads share one
    added = value @ block.mixer.out.kernel[...].reshape(N, -1, 12)[head]

    def of_weight(change):
        after = x + block.mixer(block.mixer_norm(x), mask=ops.masks.Causal())
        after = after.at[0, t].add(change * added)
        after = after + block.feed_forward(block.feed_forward_norm(after))
        return loss(model.logits(after))

    assert_close(gradients[-1, 0, head, t, s], jax.grad(of_weight)(0.0), scale=100)


def test_an_encoders_heads_matter_to_the_model_around_it():
    config = EncoderConfig(vocab_size=V, context=T, num_layers=L, width=12, num_heads=N)
    model = randomised(MaskedLanguageModel(config, rngs=nnx.Rngs(0)))
    found = head_importance(model, TOKENS, lambda logits: row_losses(logits).sum())
    maps, gradients = attention_gradients(model, TOKENS, lambda logits: row_losses(logits).sum())
    assert_close(np.abs(np.einsum("lbnts,lbnts->lbn", maps, gradients)).mean(1), found, scale=100)


def test_a_mixer_without_an_op_has_no_heads_of_importance():
    model = decoder(mixer="attention,lstm", num_kv_heads=None)
    with pytest.raises(NotImplementedError, match="head_importance: layer 1, LSTM, has no heads"):
        head_importance(model, TOKENS, jnp.sum)


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


def test_both_stacks_of_a_translator_tell_their_weights():
    model = randomised(seq2seq("transformer"))
    found = encoder_decoder_maps(model, SOURCE, TOKENS)
    encoder, decoder = (np.asarray(found[name]) for name in ("encoder", "decoder"))
    assert encoder.shape[-2:] == (S, S) and decoder.shape[-2:] == (T, T)
    x = model.embedding(SOURCE)
    x = x if model.positions is None else x + model.positions(np.arange(S))
    block = model.blocks[0]
    seen = block.mixer_norm(x) if model.config.norm_position == "pre" else x
    q, k, _ = block.mixer.project(seen)
    assert_close(encoder[0], ops.attention_weights(q, k), scale=10)
    assert (np.triu(decoder, 1) == 0).all() and (np.triu(encoder, 1) > 0).any()
    for maps in (encoder, decoder):
        assert_close(maps.sum(-1), np.ones(maps.shape[:-1]))


def test_the_lens_ends_with_the_models_own_logits():
    model = decoder()
    lens = [np.asarray(logits) for logits in logit_lens(model, TOKENS)]
    assert len(lens) == L + 1
    assert_close(lens[-1], model(TOKENS), scale=10)
    assert_close(lens[0], model.logits(model.embed(TOKENS)))
    one = Decoder(dataclasses.replace(CONFIG, num_layers=1), rngs=nnx.Rngs(0))
    one.embedding, one.final_norm, one.blocks[0] = (
        model.embedding,
        model.final_norm,
        model.blocks[0],
    )
    assert_close(lens[1], one(TOKENS), scale=10)


def test_a_model_without_attention_has_no_alignments():
    with pytest.raises(NotImplementedError, match="no attention to the source"):
        alignment_maps(seq2seq("recurrent", attention="none"), SOURCE, TOKENS)
