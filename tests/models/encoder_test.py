"""The encoder and its heads: sizes, padding, segments, what a head reads, and masked training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qkv_jax import data, nn, training
from qkv_jax.models import MIXERS, attention_maps
from qkv_jax.models.encoder import (
    Classifier,
    Encoder,
    EncoderConfig,
    MaskedLanguageModel,
    SpanClassifier,
)
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, V, D, C = 2, 7, 13, 12, 3
RANDOM = np.random.RandomState(0)
TOKENS, NOISE = RANDOM.randint(0, V, (2, B, T))
SEGMENTS = RANDOM.randint(0, 2, (B, T))
LENGTHS = np.array([5, 3])
REAL = np.arange(T) < LENGTHS[:, None]
SMALL = EncoderConfig(
    vocab_size=V, context=11, num_layers=1, width=D, num_heads=2, num_classes=C
)  # fmt: skip
MODERN = dataclasses.replace(
    SMALL, num_heads=6, num_kv_heads=3, mlp_width=13, activation="swiglu", norm="rms",
    norm_position="pre", position="rotary", qk_norm=True, use_bias=False, tie_embeddings=False,
    logit_softcap=15.0,
)  # fmt: skip
MODELS = (Encoder, MaskedLanguageModel, Classifier, SpanClassifier)


def abstract(kind, config=SMALL):
    """Shapes and dtypes of a model: nothing is computed."""
    return nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))


def count(kind, config):
    return nn.count(nn.split(abstract(kind, config))[1])


@functools.cache
def model(kind=Encoder, config=SMALL, scale=0.3):
    """With random parameters."""
    return randomised(abstract(kind, config), scale)


def apply(kind, config=SMALL, *, tokens=TOKENS, segments=SEGMENTS, lengths=(T, T), rng=None):
    """The model's outputs, a list; compiled once for all tests that only change arrays."""
    return jitted(kind, config)(
        tokens, segments=segments, lengths=jnp.asarray(lengths), rng=rng
    )  # fmt: skip


@functools.cache
def jitted(kind, config):
    m = model(kind, config)
    return jax.jit(lambda *args, **kwargs: jax.tree.leaves(m(*args, **kwargs)))


# Sizes


def test_the_counts_are_those_that_bert_base_publishes():
    base = EncoderConfig(vocab_size=30_522, context=512, num_layers=12, width=768, num_heads=12)
    pooler = 768 * 768 + 768
    assert count(Encoder, base) + pooler == 109_482_240
    assert count(MaskedLanguageModel, base) == 109_514_298
    assert count(Classifier, base) == 109_483_778
    assert count(SpanClassifier, base) == 108_893_186


@pytest.mark.parametrize("config", [SMALL, MODERN], ids=["bert", "modern"])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"use_bias": True}, {"use_bias": False}, {"tie_embeddings": True},
        {"tie_embeddings": False}, {"norm_position": "pre"}, {"norm_position": "post"},
        {"num_segments": 5}, {"num_layers": 3}, {"position": "learned"},
    ],
    ids=repr,
)  # fmt: skip
def test_the_parameters_are_counted_by_the_formula(config, changes):
    c = dataclasses.replace(config, **changes)
    F, N, K, H = c.hidden, c.num_heads, c.kv_heads, c.attention_dim
    bias = int(c.use_bias)
    attention = (D + bias) * N * H + 2 * (D + bias) * K * H + (N * H + bias) * D
    attention += 2 * H if c.qk_norm else 0
    feed_forward = (2 if c.activation == "swiglu" else 1) * (D + bias) * F + (F + bias) * D
    norm = D * (2 if c.use_bias and c.norm == "layer" else 1)
    encoder = (V + c.num_segments + (c.context if c.position == "learned" else 0)) * D + norm
    encoder += c.num_layers * (attention + feed_forward + 2 * norm)
    encoder += norm if c.norm_position == "pre" else 0
    dense = (D + bias) * D
    assert count(Encoder, c) == encoder
    head = dense + norm + bias * V + (0 if c.tie_embeddings else D * V)
    assert count(MaskedLanguageModel, c) == encoder + head
    assert count(Classifier, c) == encoder + dense + (D + bias) * C
    assert count(SpanClassifier, c) == encoder + (D + bias) * 2


# What an output depends on


def test_every_token_sees_every_token():
    """By a gradient: the hidden state at t has a derivative in the embedding of every token."""
    m = model()

    def by_token(x):
        return (m.blocks[0](x) ** 2).sum((0, 2))  # [T]

    jacobian = jax.jit(lambda: jax.jacrev(by_token)(m.embed(TOKENS)))()  # [T, B, T, D]
    assert (np.abs(jacobian).sum((1, 3)) > 0).all()


@pytest.mark.parametrize(
    ("kind", "config"), [*((kind, SMALL) for kind in MODELS), (MaskedLanguageModel, MODERN)]
)
def test_padding_changes_nothing(kind, config):
    outputs = apply(kind, config, lengths=LENGTHS)
    noisy = apply(kind, config, tokens=np.where(REAL, TOKENS, NOISE), lengths=LENGTHS)
    alone = jitted(kind, config)(TOKENS[:1, :5], segments=SEGMENTS[:1, :5])  # the first row
    for output, other, want in zip(outputs, noisy, alone, strict=True):
        # A classifier has one output for all tokens.
        real = np.s_[:] if kind is Classifier else REAL
        np.testing.assert_array_equal(output[real], other[real])
        assert_close(output[0] if kind is Classifier else output[0, :5], want[0], scale=10)


def test_padding_is_no_place_for_a_span_and_has_no_gradient():
    start, end = apply(SpanClassifier, lengths=LENGTHS)
    assert start.shape == end.shape == (B, T) and start.dtype == end.dtype == "float32"
    for logits in (start, end):
        assert (np.isneginf(logits) == ~REAL).all()
    graphdef, params = nn.split(model(SpanClassifier))

    def loss(params):
        start, end = nn.merge(graphdef, params)(TOKENS, lengths=LENGTHS)
        return -(jax.nn.log_softmax(start)[:, 1] + jax.nn.log_softmax(end)[:, 2]).sum()

    found = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    positions = np.abs(found["encoder"]["positions"]["table"]).sum(-1)
    assert (positions[:5] > 0).all() and (positions[5:] == 0).all()


def test_without_segments_all_are_0_and_without_lengths_nothing_is_padded():
    (zeros,) = apply(Encoder, segments=np.zeros_like(TOKENS))
    assert_close(jitted(Encoder, SMALL)(TOKENS)[0], zeros, scale=10)
    assert np.abs(apply(Encoder)[0] - zeros).max() > 1e-2


def test_the_first_stream_is_the_norm_of_three_embeddings():
    m = model()
    total = (
        np.asarray(m.embedding.embedding[...], np.float64)[TOKENS]
        + np.asarray(m.segments.embedding[...])[SEGMENTS]
        + np.asarray(m.positions.table[...])[:T]
    )
    centred = total - total.mean(-1, keepdims=True)
    normed = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5)
    expected = normed * m.embedding_norm.scale[...] + m.embedding_norm.bias[...]
    assert_close(jax.jit(m.embed)(TOKENS, SEGMENTS), expected, scale=5)


# The heads


@pytest.mark.parametrize("changes", [{}, {"norm_position": "pre", "mixer": "value_residual"}])
def test_the_states_lead_from_the_embedding_to_what_a_call_returns(changes):
    config = dataclasses.replace(SMALL, num_layers=3, **changes)
    encoder = model(config=config)
    states = encoder.states(TOKENS, segments=SEGMENTS, lengths=LENGTHS)
    assert states.shape == (4, B, T, D)
    assert_close(states[0], encoder.embed(TOKENS, SEGMENTS))
    last = states[-1] if encoder.final_norm is None else encoder.final_norm(states[-1])
    assert_close(last, encoder(TOKENS, segments=SEGMENTS, lengths=LENGTHS))
    shallow = model(config=config)
    shallow.blocks = nnx.List(list(shallow.blocks)[:1])
    shallow.config = dataclasses.replace(config, num_layers=1)
    assert_close(states[1], shallow.states(TOKENS, segments=SEGMENTS, lengths=LENGTHS)[-1])
    model.cache_clear()  # the encoder above is no longer the config's


@pytest.mark.parametrize(
    "config", [SMALL, dataclasses.replace(SMALL, tie_embeddings=False, logit_softcap=0.7)]
)
def test_tied_and_untied_logits(config):
    m = model(MaskedLanguageModel, config)

    @jax.jit
    def expected():
        x = m.encoder(TOKENS, segments=SEGMENTS)
        x = m.norm(nn.ACTIVATIONS["gelu"](m.dense(x)))
        kernel = m.head.kernel[...] if m.head else m.encoder.embedding.embedding[...].T
        logits = x @ kernel + m.bias[...]
        cap = config.logit_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits

    (logits,) = apply(MaskedLanguageModel, config)
    assert logits.shape == (B, T, V) and logits.dtype == "float32"
    assert_close(logits, expected(), scale=10)


def test_classes_are_read_from_the_first_token():
    m = model(Classifier)
    (hidden,) = jax.jit(lambda: [m.encoder(TOKENS, segments=SEGMENTS)])()
    pooled = np.tanh(np.asarray(hidden, np.float64)[:, 0] @ m.pooler.kernel[...] + m.pooler.bias)
    expected = pooled @ np.asarray(m.head.kernel[...], np.float64) + m.head.bias[...]
    assert_close(apply(Classifier)[0], expected, scale=10)


@pytest.mark.parametrize("kind", [Encoder, Classifier])
def test_dropout_changes_with_the_key_and_happens_only_with_one(kind):
    config = dataclasses.replace(SMALL, dropout_rate=0.2)
    first, again, second = (apply(kind, config, rng=jax.random.key(i))[0] for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    plain = apply(kind)[0]
    assert np.abs(first - plain).max() > 1e-2 and np.abs(first - second).max() > 1e-2
    if kind is Encoder:
        np.testing.assert_array_equal(apply(kind, config)[0], plain)


def test_the_classifier_drops_from_the_pooled_vector_too():
    m = model(Classifier, dataclasses.replace(SMALL, dropout_rate=0.5))
    m = nn.merge(*nn.split(m))
    m.encoder = model()  # drops nothing
    logits = jax.jit(lambda rng: m(TOKENS, rng=rng))
    assert np.abs(logits(jax.random.key(0)) - logits(jax.random.key(1))).max() > 1e-2


def test_bfloat16_computes_in_bfloat16_between_float32_parameters_and_logits():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    for kind in MODELS:
        m = abstract(kind, config)
        assert {x.dtype.name for x in jax.tree.leaves(nn.split(m)[1])} == {"float32"}
        outputs = jax.eval_shape(lambda kind=kind: model(kind, config)(TOKENS))
        wanted = "bfloat16" if kind is Encoder else "float32"
        assert {x.dtype.name for x in jax.tree.leaves(outputs)} == {wanted}
    half, full = (
        jax.jit(model(MaskedLanguageModel, c, scale=0.1))(TOKENS) for c in (config, SMALL)
    )
    assert_close(half, full, dtype="bfloat16", scale=2)


def test_the_maps_of_an_encoder_look_both_ways():
    maps = np.asarray(attention_maps(model(MaskedLanguageModel).encoder, TOKENS))
    assert maps.shape == (1, B, 2, T, T) and (maps > 0).all()
    assert_close(maps.sum(-1), np.ones(maps.shape[:-1]))


# Training


@pytest.mark.parametrize(
    "mixer", ["attention", *(name for name, mixer in MIXERS.items() if not mixer.causal)]
)
def test_ten_steps_on_masked_tokens_lower_the_loss(mixer):
    """A text that repeats: from log V towards 0."""
    length, size = 23, 11
    sizes = {"rank": 8} if "rank" in MIXERS[mixer].reads else {}
    config = EncoderConfig(
        vocab_size=size + 1, context=length, num_layers=1, width=16, num_heads=2, mixer=mixer,
        **sizes,
    )  # fmt: skip
    graphdef, _ = nn.split(abstract(MaskedLanguageModel, config))
    params = jax.jit(lambda: nn.split(MaskedLanguageModel(config, rngs=nnx.Rngs(0)))[1])()
    optimizer = optax.adam(2e-2)
    loss = training.cross_entropy_loss(graphdef)
    step = jax.jit(training.make_train_step(loss, optimizer, seed=0))
    text = np.tile(np.random.RandomState(0).permutation(size), 9)
    batch = data.masked_windows(
        text, seed=0, step=0, batch_size=8, context=length, mask_id=size, mask_rate=0.3
    )
    state, losses = training.TrainState.create(params, optimizer), []
    for _ in range(10):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_segments": 0}, r"model\.num_segments: wanted a positive integer, got 0"),
        ({"num_classes": -1}, r"model\.num_classes: wanted a positive integer, got -1"),
        ({"width": 0}, r"model\.width: wanted a positive integer"),
        ({"mixer": "lstm"}, r"model\.mixer: 'lstm' sees earlier tokens only, so no encoder"),
        ({"mixer": "mamba"}, r"model\.mixer: wanted one of .* got 'mamba'"),
        ({"window": 7}, r"model\.window: 7 was set, but no layer"),
    ],
    ids=repr,
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)
