"""Greedy translation: the likeliest token after the likeliest tokens, up to the end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import inference, nn
from qkv_jax.models import (
    ConvSeq2Seq,
    ConvSeq2SeqConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    RecurrentSeq2Seq,
    RecurrentSeq2SeqConfig,
)
from qkv_jax.models.seq2seq import Seq2Seq
from qkv_jax.ops.cache import QuantizedCache
from tests.parameters import randomised

B, S, T, V = 3, 5, 7, 11
BEGIN, END = 9, 10
SOURCES = np.random.RandomState(0).randint(0, BEGIN, (B, S)).astype(np.int32)
LENGTHS = np.array([5, 2, 3])
SIZES = {"vocab_size": V, "num_layers": 2, "width": 12}


def transformer():
    config = EncoderDecoderConfig(**SIZES, context=S + T, num_heads=2, use_bias=False)
    return EncoderDecoder(config, rngs=nnx.Rngs(0))


def recurrent():
    return RecurrentSeq2Seq(RecurrentSeq2SeqConfig(**SIZES), rngs=nnx.Rngs(0))


def convolutional():
    return ConvSeq2Seq(ConvSeq2SeqConfig(**SIZES, context=S + T), rngs=nnx.Rngs(0))


def translated(model, sources=SOURCES, lengths=LENGTHS, num_tokens=T, **settings):
    graphdef, params = nn.split(model)
    found = inference.translate(
        graphdef, params, sources, lengths, begin=BEGIN, end=END, num_tokens=num_tokens, **settings
    )
    return np.asarray(found)


@pytest.mark.parametrize("make", [transformer, recurrent, convolutional])
def test_each_token_is_the_likeliest_after_those_before_it(make):
    model = randomised(make())
    found = translated(model)
    assert found.shape == (B, T) and found.dtype == np.int32
    assert len(np.unique(found)) > 2
    target_in = np.concatenate([np.full((B, 1), BEGIN), found[:, :-1]], axis=1)
    graphdef, params = nn.split(model)
    apply = jax.jit(
        lambda *arrays: nn.merge(graphdef, params)(*arrays[:2], source_lengths=arrays[2])
    )
    likeliest = np.asarray(apply(SOURCES, target_in, LENGTHS).argmax(-1))
    written = np.cumsum(found == END, axis=1) - (found == END) == 0  # up to the end
    assert written.sum() > T
    np.testing.assert_array_equal(found[written], likeliest[written])


def test_after_its_end_a_row_is_ends_alone_whatever_the_others_do():
    class Model(Seq2Seq):
        config = RecurrentSeq2SeqConfig(**SIZES)

        def encode(self, sources, *, source_lengths):
            return source_lengths

        def decode(self, target_in, memory, *, source_lengths):
            place = np.arange(target_in.shape[1])
            ends = place == memory[:, None] - 1  # the end comes at the source's length, once
            return jax.nn.one_hot(np.where(False, 0, 1) + 9 * ends, V)

    found = translated(Model())
    assert found.tolist() == [[1] * 4 + [END] * 3, [1] + [END] * 6, [1] * 2 + [END] * 5]
    assert translated(Model(), num_tokens=3)[0].tolist() == [1, 1, 1]


def test_a_draw_depends_on_the_key_and_the_rows_number_and_on_no_other_row():
    model = randomised(transformer())
    draws = translated(model, rng=jax.random.key(1), num_samples=5, temperature=2.0)
    assert draws.shape == (5 * B, T) and len(np.unique(draws[:5], axis=0)) > 1
    first = translated(
        model, SOURCES[:1], LENGTHS[:1], rng=jax.random.key(1), num_samples=5, temperature=2.0
    )
    np.testing.assert_array_equal(first, draws[:5])
    greedy = translated(model, rng=jax.random.key(1), top_k=1)
    np.testing.assert_array_equal(greedy, translated(model))


def test_beams_find_translations_of_which_the_model_thinks_no_less():
    model = randomised(transformer())
    found = translated(model, beams=5, num_samples=2, length_penalty=0.0).reshape(B, 2, T)
    graphdef, params = nn.split(model)

    @jax.jit
    def log_probability(target):
        target_in = jnp.concatenate([jnp.full((B, 1), BEGIN), target[:, :-1]], axis=1)
        logits = nn.merge(graphdef, params)(SOURCES, target_in, source_lengths=LENGTHS)
        logs = jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]
        ended = jnp.cumsum(target == END, axis=1) - (target == END) > 0
        return jnp.where(ended, 0, logs).sum(1)

    best, second, greedy = map(log_probability, (found[:, 0], found[:, 1], translated(model)))
    assert (best > second).all() and (best >= greedy - 1e-4).all()
    assert (found[:, 0] != found[:, 1]).any(axis=1).all()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sources": SOURCES[0]}, r"sources: wanted integers \[B, S\] .* got int32 \[5\]"),
        ({"sources": SOURCES * 1.0}, "sources: .* got float64"),
        ({"sources": SOURCES + 9}, r"sources: wanted tokens in \[0, V = 11\), got 1[1-7]"),
        ({"lengths": LENGTHS[:2]}, r"source_lengths: wanted \[B\] = \[3\] integers from 1 to 5"),
        ({"num_tokens": 0}, "num_tokens: wanted at least 1"),
        ({"beams": 0}, "beams: wanted at least 1"),
        ({"temperature": 0.5}, r"rng: wanted a key, to draw with \['temperature'\], got None"),
        ({"beams": 2, "rng": jax.random.key(0)}, "rng: wanted None, for 2 beams draw nothing"),
        ({"length_penalty": 0.5}, "length_penalty: was set to 0.5, but beams = 1"),
        ({"kind": QuantizedCache}, "kind: RecurrentSeq2Seq keeps no keys and values"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        translated(recurrent(), **changes)
